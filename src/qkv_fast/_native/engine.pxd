from .kernels cimport qkv_tile_kernels
from .types cimport Launch

cdef int execute(Launch *launch, Runner runner, int budget, double *busy) except -1


cdef class Runner:
    cdef const qkv_tile_kernels *prefill
    cdef const qkv_tile_kernels *decode
    cdef bint uses_blas
    cdef object blas                    # the module where it is used, else None
    cdef double occupancy, occupancy_converted
