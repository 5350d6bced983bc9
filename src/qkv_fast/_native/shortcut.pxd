cimport numpy as cnp

from .engine cimport Runner
from .types cimport Plan

cdef bint is_bool(x) noexcept
cdef bint are_plain(is_causal, scale, return_lse, window, softcap, alibi_slopes, sinks, attn_bias,
                    key_ranges) noexcept
cdef bint fit(cnp.ndarray query, cnp.ndarray key, cnp.ndarray value, bint enable_gqa,
              bint same_batch) noexcept
cdef cnp.ndarray view(given, bint uint16_is_bf16, int *code)
cdef bint view_mask(Plan *plan, cnp.ndarray mask, int code, cnp.npy_intp *strides) noexcept
cdef bint overlap(cnp.ndarray a, cnp.ndarray b) noexcept
cdef bint is_writable(cnp.ndarray out, cnp.ndarray query, cnp.ndarray key, cnp.ndarray value,
                      cnp.ndarray mask) noexcept
cdef cnp.ndarray new_rows(cnp.ndarray query, cnp.ndarray value, int code)
cdef cnp.ndarray new_lse(cnp.ndarray query, int code)
cdef Runner find_runner(int code)
cdef int count_threads(const Plan *plan, given) except -1
cdef int set_plain_scoring(Plan *plan, scale, bint is_causal) except -1
