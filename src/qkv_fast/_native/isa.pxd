from .kernels cimport qkv_tile_kernels

cdef int index_of(str isa) except -1
cdef int index_of_best(int type) noexcept
cdef int count_isas() noexcept
cdef const qkv_tile_kernels *table_of(int index, int type) noexcept nogil
