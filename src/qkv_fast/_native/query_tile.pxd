from .types cimport HeadView, Plan, QueryTile

cdef QueryTile *place_tile(const Plan *plan, const HeadView *head, int number,
                           Py_ssize_t row_begin, Py_ssize_t rows) noexcept nogil
