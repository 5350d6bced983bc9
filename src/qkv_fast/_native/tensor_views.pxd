cimport numpy as cnp

cdef cnp.ndarray view_tensor(given, int *code)
