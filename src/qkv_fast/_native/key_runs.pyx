"""Keys and values as the decode kernels read them: runs of QKV_KEY_RUN rows, each in one piece.

A list of runs goes on past the block: the kernels prefetch the QKV_KEY_RUNS_AHEAD runs after the
one that they work on. The list may repeat a run there, but must name readable addresses only.
"""

from libc.stdint cimport int64_t

from .kernels cimport QKV_KEY_RUN, QKV_KEY_RUNS_AHEAD
from .rows cimport find_row, gather
from .types cimport HeadView, KVBlock, Plan, TensorView


cdef bint find_key_runs(const Plan *plan, const HeadView *head, const TensorView *view,
                        const char *rows, int64_t begin, Py_ssize_t nk, int64_t key_end,
                        KeyRuns *runs) noexcept nogil:
    """List the runs from key `begin` on in place; return False where a page splits one."""
    cdef Py_ssize_t page_size = plan.page_size, slot, i, step = QKV_KEY_RUN * view.row
    cdef int count = <int>((nk + QKV_KEY_RUN - 1) // QKV_KEY_RUN), run
    cdef const int64_t *page
    cdef const char *source
    if head.pages == NULL:
        source = rows + begin * view.row
        for run in range(count + QKV_KEY_RUNS_AHEAD):
            runs.rows[run] = source
            source += step
        return True
    page = head.pages + begin // page_size
    slot = begin % page_size
    source = rows + page[0] * view.batch_strides[0] + slot * view.row
    for run in range(count + QKV_KEY_RUNS_AHEAD):
        runs.rows[run] = source
        i = run * QKV_KEY_RUN
        if i < nk and slot + min(<Py_ssize_t>QKV_KEY_RUN, nk - i) > page_size:
            return False
        if begin + i + QKV_KEY_RUN >= key_end:
            continue                    # the table need not hold a page for keys past the end
        slot += QKV_KEY_RUN
        source += step
        if slot >= page_size:
            page += slot // page_size
            slot %= page_size
            source = rows + page[0] * view.batch_strides[0] + slot * view.row
    return True


cdef void load_key_runs(const Plan *plan, const HeadView *head, const TensorView *view,
                        const char *rows, Py_ssize_t length, const KVBlock *block, Py_ssize_t nk,
                        int64_t key_end, KeyRuns *runs) noexcept nogil:
    """List the block's runs: in place where each lies in one page and kernels can widen it.

    Else they are gathered as reals.
    """
    cdef char *row = head.scratch + plan.layout.keys
    cdef int64_t begin = block.begin + block.before_window
    cdef int run
    nk -= block.before_window
    runs.stride = view.row
    runs.type = view.type
    if view.contiguous and find_key_runs(plan, head, view, rows, begin, nk, key_end, runs):
        return
    runs.stride = length * plan.input_bytes
    runs.type = plan.kernels.input_type
    gather(plan, head, view, rows, begin, nk, length, row, runs.stride)
    for run in range((nk + QKV_KEY_RUN - 1) // QKV_KEY_RUN + QKV_KEY_RUNS_AHEAD):
        runs.rows[run] = row
        if run * QKV_KEY_RUN < nk:
            row += QKV_KEY_RUN * runs.stride


cdef void find_interleaved_runs(const Plan *plan, const HeadView *head, const TensorView *view,
                                const char *rows, int64_t begin, int count, int heads,
                                int64_t key_end, KeyRuns *runs) noexcept nogil:
    """List `count` runs from this head's key `begin` on, and those that follow, in memory's order.

    That is: plan.adjacent_keys keys of each of the `heads` heads, then the keys after these.
    """
    cdef int run, number = head.number
    cdef Py_ssize_t step = QKV_KEY_RUN * view.row, slot = begin % plan.adjacent_keys, unused = 0
    cdef const char *source = find_row(plan, head, view, rows, begin, &unused)
    runs.stride = view.row
    runs.type = view.type
    begin -= slot
    rows -= number * view.head          # of the task's first head
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
        source = find_row(plan, head, view, rows, begin, &unused) + number * view.head
