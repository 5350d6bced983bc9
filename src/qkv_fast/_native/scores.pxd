from libc.stdint cimport int64_t

from .types cimport HeadView, KVBlock, Plan, QueryTile, Visibility

cdef void set_relative(const Plan *plan, QueryTile *tile, int64_t origin) noexcept nogil
cdef bint find_visibility(const Plan *plan, const HeadView *head, QueryTile *tile,
                          const KVBlock *block, Visibility *visible) noexcept nogil
cdef void modify_scores(const Plan *plan, const HeadView *head, QueryTile *tile,
                        const KVBlock *block, Visibility *visible) noexcept nogil
