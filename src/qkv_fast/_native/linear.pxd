from .kernels cimport qkv_tile_kernels
from .types cimport Interrupt


cdef struct LinearCall:
    const qkv_tile_kernels *kernels
    Interrupt interrupt
    const char *x                       # [rows][depth] reals
    const char *weight                  # [features][depth] of weight_type
    const char *bias                    # [features] reals, or NULL
    char *y                             # [rows][features] reals
    Py_ssize_t x_stride, weight_stride, y_stride    # bytes from row to row
    int weight_type                     # as runtime/convert.h numbers them
    Py_ssize_t rows, features, depth
    double work                         # multiply-adds
    bint is_decode                      # few rows: decode's kernels
    int tiles_per_task
    Py_ssize_t block                    # features of a block
    Py_ssize_t features_per_task, tasks_per_group   # a group: the rows of tiles_per_task tiles
    Py_ssize_t packed_bytes             # of a tile's rows
    Py_ssize_t padded_stride            # decode: reals in a row of the padded x
    char *padded                        # decode: x, padded with zeros
    char *scratch
    Py_ssize_t scratch_bytes            # of a thread


cdef int view_linear(LinearCall *call, const qkv_tile_kernels *kernels, x, weight, int weight_type,
                     bias, y) except -1
cdef Py_ssize_t plan_linear(LinearCall *call, Py_ssize_t threads) noexcept
cdef void pad_rows(LinearCall *call) noexcept nogil
cdef void run_linear_task(const void *context, int thread, Py_ssize_t task) noexcept nogil
