cimport numpy as cnp

cdef enum:
    MAX_AXES = 16           # of tensors and arrays that take a shortcut

cdef cnp.ndarray view_tensor(given, int *code)
