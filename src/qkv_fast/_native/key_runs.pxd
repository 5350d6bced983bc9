from libc.stdint cimport int64_t

from .tuning cimport MAX_KEY_RUNS
from .types cimport HeadRows, HeadView, KVBlock, Plan

cdef struct KeyRuns:
    const char *rows[MAX_KEY_RUNS]      # where each run of QKV_KEY_RUN rows lies
    Py_ssize_t stride                   # of the rows in a run
    int type

cdef void load_key_runs(const Plan *plan, const HeadRows *rows, const KVBlock *block,
                        Py_ssize_t nk, int64_t key_end, KeyRuns *runs) noexcept nogil
cdef void gather_key_runs(const Plan *plan, const HeadRows *rows, int64_t begin, Py_ssize_t nk,
                          KeyRuns *runs) noexcept nogil
cdef void find_interleaved_runs(const Plan *plan, const HeadView *head, const HeadRows *rows,
                                int64_t begin, int count, int heads, int64_t key_end,
                                KeyRuns *runs) noexcept nogil
