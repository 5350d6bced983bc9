from .kernels cimport qkv_tile_kernels
from .types cimport Interrupt


cdef struct MergeArray:                 # a part, its lse, the result, its lse, or the sinks
    char *data                          # NULL: the array is absent
    Py_ssize_t *strides                 # in bytes, one for each axis of rows
    Py_ssize_t col                      # bytes between the elements of a row
    int type                            # as runtime/convert.h numbers them


cdef struct MergeCall:
    const qkv_tile_kernels *kernels
    Interrupt interrupt
    Py_ssize_t parts
    Py_ssize_t rows, v_dim
    Py_ssize_t axes                     # of rows, at least 1
    Py_ssize_t *shape                   # rows along each of them
    MergeArray *arrays                  # [parts] parts, [parts] lses, result, lse, sinks
    bint converts_parts                 # kernels can't read the rows of all parts in place
    bint converts_out
    Py_ssize_t rows_per_task
    double work                         # multiply-adds
    char *scratch
    Py_ssize_t scratch_bytes            # of a thread


cdef void measure_merge(MergeCall *call, const qkv_tile_kernels *kernels, list outputs) noexcept
cdef Py_ssize_t views_bytes(const MergeCall *call) noexcept
cdef Py_ssize_t plan_merge(MergeCall *call, Py_ssize_t threads) noexcept
cdef int view_parts(MergeCall *call, char *memory, list outputs, list codes, list lses, out,
                    int out_code, lse, sinks) except -1
cdef void run_merge_task(const void *context, int thread, Py_ssize_t task) noexcept nogil
