from .types cimport HeadView, KVBlock, Plan, QueryTile, Visibility

cdef bint find_visibility(const Plan *plan, const HeadView *head, QueryTile *tile,
                          const KVBlock *block, Visibility *visible) noexcept nogil
cdef void modify_scores(const Plan *plan, const HeadView *head, QueryTile *tile,
                        const KVBlock *block, Visibility *visible) noexcept nogil
