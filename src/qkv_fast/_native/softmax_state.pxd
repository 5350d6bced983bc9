from libc.stdint cimport int64_t

from .types cimport HeadView, KVBlock, Plan, QueryTile, Visibility

cdef double lowest(int real_bytes) noexcept nogil
cdef void reset_state(const Plan *plan, QueryTile *tile) noexcept nogil
cdef void weigh_scores(const Plan *plan, const HeadView *head, QueryTile *tile,
                       const KVBlock *block, const Visibility *visible) noexcept nogil
cdef void fold_before(const Plan *plan, QueryTile *tile, int64_t begin) noexcept nogil
cdef double weight_with_sink(double row_max, double row_sum, double sink) noexcept nogil
cdef void finish_state(const Plan *plan, const HeadView *head, QueryTile *tile) noexcept nogil
cdef bint ends_last(char *partials) noexcept nogil
cdef void save_tile_partial(const Plan *plan, QueryTile *tile, char *memory) noexcept nogil
cdef void merge_tile_partials(const Plan *plan, QueryTile *tile, const char *partials,
                              Py_ssize_t partial_bytes, Py_ssize_t count) noexcept nogil
cdef void save_partial(const Plan *plan, const QueryTile *tile, char *memory) noexcept nogil
cdef void merge_partials(const Plan *plan, const HeadView *head, QueryTile *tile,
                         const char *partials, Py_ssize_t partial_bytes,
                         Py_ssize_t count) noexcept nogil
