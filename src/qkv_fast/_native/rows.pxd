from libc.stdint cimport int64_t

from .kernels cimport qkv_prefetch_rows, qkv_tile_kernels
from .types cimport HeadRows, HeadView, KVBlock, Plan, QueryTile, TensorView

cdef void read_row(const qkv_tile_kernels *kernels, void *row, const char *source,
                   Py_ssize_t length, Py_ssize_t stride, int type) noexcept nogil
cdef void round_row(const qkv_tile_kernels *kernels, char *target, const void *row,
                    Py_ssize_t length, Py_ssize_t stride, int type) noexcept nogil
cdef void read_reals(const Plan *plan, void *row, const TensorView *view, const char *source,
                     Py_ssize_t length) noexcept nogil
cdef void write_row(const Plan *plan, char *target, const void *row) noexcept nogil
cdef void gather_queries(const Plan *plan, const HeadView *head, QueryTile *tile) noexcept nogil
cdef void gather(const Plan *plan, const HeadRows *rows, int64_t begin, Py_ssize_t nk, char *row,
                 Py_ssize_t row_bytes) noexcept nogil
cdef void load_keys(const Plan *plan, const HeadView *head, KVBlock *block) noexcept nogil
cdef void load_value_rows(const Plan *plan, const HeadView *head, KVBlock *block) noexcept nogil
cdef void load_values(const Plan *plan, const HeadView *head, KVBlock *block,
                      bint finite) noexcept nogil
cdef const float *load_scales(const HeadRows *rows, const KVBlock *block,
                              Py_ssize_t nk) noexcept nogil
cdef void plan_prefetch(const HeadView *head, const QueryTile *tile, const KVBlock *block,
                        qkv_prefetch_rows *prefetch) noexcept nogil


cdef inline const char *find_row(const HeadRows *rows, int64_t key,
                                 Py_ssize_t *count) noexcept nogil:
    """Return where the row of a key lies; lower *count to the rows from there on in its page.

    No page is -1, unless another thread changes a KVCache meanwhile: then it reads some page.
    """
    cdef Py_ssize_t slot
    cdef int64_t page
    if rows.pages == NULL:
        return rows.data + key * rows.view.row
    slot = key % rows.page_size
    page = max(<int64_t>0, rows.pages[key // rows.page_size])
    count[0] = min(count[0], rows.page_size - slot)
    return rows.data + page * rows.view.batch_strides[0] + slot * rows.view.row
