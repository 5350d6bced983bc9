"""Keys and values as the decode kernels read them: runs of QKV_KEY_RUN rows, each in one piece.

A list of runs goes on past the block: the kernels prefetch the QKV_KEY_RUNS_AHEAD runs after the
one that they work on. The list may repeat a run there, but must name readable addresses only.
"""

from libc.stdint cimport int64_t

from .kernels cimport QKV_KEY_RUN, QKV_KEY_RUNS_AHEAD
from .rows cimport find_row, gather
from .types cimport HeadRows, HeadView, KVBlock, Plan


cdef bint find_key_runs(const HeadRows *rows, int64_t begin, Py_ssize_t nk, int64_t key_end,
                        KeyRuns *runs) noexcept nogil:
    """List the runs from key `begin` on in place; return False where a page splits one."""
    cdef Py_ssize_t slot, i, unused = 0, step = QKV_KEY_RUN * rows.view.row
    cdef int count = <int>((nk + QKV_KEY_RUN - 1) // QKV_KEY_RUN), run
    cdef const char *source = find_row(rows, begin, &unused)
    if rows.pages == NULL:
        for run in range(count + QKV_KEY_RUNS_AHEAD):
            runs.rows[run] = source
            source += step
        return True
    slot = begin % rows.page_size
    for run in range(count + QKV_KEY_RUNS_AHEAD):
        runs.rows[run] = source
        i = run * QKV_KEY_RUN
        if i < nk and slot + min(<Py_ssize_t>QKV_KEY_RUN, nk - i) > rows.page_size:
            return False
        if begin + i + QKV_KEY_RUN >= key_end:
            continue                    # the table need not hold a page for keys past the end
        slot += QKV_KEY_RUN
        source += step
        if slot >= rows.page_size:
            slot %= rows.page_size
            source = find_row(rows, begin + i + QKV_KEY_RUN, &unused)
    return True


cdef void load_key_runs(const Plan *plan, const HeadRows *rows, const KVBlock *block,
                        Py_ssize_t nk, int64_t key_end, KeyRuns *runs) noexcept nogil:
    """List the block's runs: in place where each lies in one page and kernels can widen it.

    Else they are gathered as reals.
    """
    cdef int64_t begin = block.begin + block.before_window
    nk -= block.before_window
    runs.stride = rows.view.row
    runs.type = rows.view.type
    if not (rows.view.contiguous and find_key_runs(rows, begin, nk, key_end, runs)):
        gather_key_runs(plan, rows, begin, nk, runs)


cdef void gather_key_runs(const Plan *plan, const HeadRows *rows, int64_t begin, Py_ssize_t nk,
                          KeyRuns *runs) noexcept nogil:
    """List the runs of nk rows from key `begin` on, gathered as reals."""
    cdef char *row = rows.copies
    cdef int run
    runs.stride = rows.length * plan.input_bytes
    runs.type = plan.kernels.input_type
    gather(plan, rows, begin, nk, row, runs.stride)
    for run in range((nk + QKV_KEY_RUN - 1) // QKV_KEY_RUN + QKV_KEY_RUNS_AHEAD):
        runs.rows[run] = row
        if run * QKV_KEY_RUN < nk:
            row += QKV_KEY_RUN * runs.stride


cdef void find_interleaved_runs(const Plan *plan, const HeadView *head, const HeadRows *rows,
                                int64_t begin, int count, int heads, int64_t key_end,
                                KeyRuns *runs) noexcept nogil:
    """List `count` runs from this head's key `begin` on, and those that follow, in memory's order.

    That is: plan.adjacent_keys keys of each of the `heads` heads, then the keys after these.
    """
    cdef int run, number = head.number
    cdef Py_ssize_t step = QKV_KEY_RUN * rows.view.row, slot = begin % plan.adjacent_keys
    cdef Py_ssize_t unused = 0
    cdef const char *source = find_row(rows, begin, &unused)
    runs.stride = rows.view.row
    runs.type = rows.view.type
    begin -= slot
    for run in range(count + QKV_KEY_RUNS_AHEAD):
        runs.rows[run] = source
        slot += QKV_KEY_RUN
        source += step
        if slot < plan.adjacent_keys:
            continue
        slot = 0
        number += 1
        if number == heads:
            number = 0
            if begin + plan.adjacent_keys < key_end:
                begin += plan.adjacent_keys
        source = find_row(rows, begin, &unused) + (number - head.number) * rows.view.head
