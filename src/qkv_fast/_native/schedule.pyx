"""From batch entries to tasks.

Each batch entry uses prefill or decode, by how many query rows its KV groups have. Its own queries
and keys are what is divided, so that no padding is computed. A task belongs to one batch entry:

    prefill   tiles_per_task query tiles of one KV head; of few rows, one split of the keys
    decode    one split of the keys of heads_per_task KV heads

Tasks of a head are neighbours, since they share its keys. In prefill the last queries come
first: with a causal mask these have the most keys.
"""

from libc.stdint cimport int64_t
from libc.string cimport memset

from .decode cimport run_decode_task
from .kernels cimport QKV_BOOL
from .parallel cimport look_for_signals
from .prefill cimport run_prefill_task
from .tuning cimport BATCHES_PER_LOOK, KV_SPLIT, MAX_SPLIT_ROWS, TILE_KV_SPLIT
from .types cimport (
    UNBOUNDED, HeadRows, HeadView, Launch, PartialState, Plan, SequencePlan, TaskOffset, TensorView,
    batch_entry, is_shared, is_shared_by_heads, lanes_per_step,
)


cdef inline int64_t entry_of(const Plan *plan, const TensorView *view, Py_ssize_t batch,
                             int64_t otherwise) noexcept nogil:
    """Return a batch entry's own number, or another one where the array is absent."""
    cdef char *data = batch_entry(plan, view, batch)
    return otherwise if data == NULL else (<int64_t *>data)[0]


cdef inline bint is_decode(const Launch *launch, Py_ssize_t rows) noexcept nogil:
    """Return whether the rows fill at most decode_occupancy of the vectors of a query tile."""
    cdef Py_ssize_t step = lanes_per_step(&launch.prefill)
    return (rows <= launch.max_decode_rows
            and rows <= launch.decode_occupancy * ((rows + step - 1) // step * step))


cdef void narrow_to_ranges(const Plan *plan, const SequencePlan *sequence, int64_t *key_begin,
                           int64_t *key_end) noexcept nogil:
    """Narrow the keys to those from the first to the last that is in some row's range."""
    cdef const TensorView *begins = &plan.key_begins
    cdef const TensorView *ends = &plan.key_ends
    cdef bint alike = is_shared_by_heads(begins) and is_shared_by_heads(ends)
    cdef const char *first = batch_entry(plan, begins, sequence.batch)
    cdef const char *last = batch_entry(plan, ends, sequence.batch)
    cdef int64_t low = UNBOUNDED, high = 0, begin, end
    cdef Py_ssize_t head, row
    for head in range(1 if alike else plan.num_kv_heads * plan.group):
        for row in range(sequence.q_start, sequence.q_start + sequence.q_len):
            begin = (<const int64_t *>(first + head * begins.head + row * begins.row))[0]
            end = (<const int64_t *>(last + head * ends.head + row * ends.row))[0]
            if begin < end:
                low = min(low, begin)
                high = max(high, end)
    key_begin[0] = max(key_begin[0], low)
    key_end[0] = min(key_end[0], high)


cdef void divide_keys(const Plan *plan, SequencePlan *sequence, int keys) noexcept nogil:
    """Set which splits of so many keys a head of the sequence needs."""
    cdef int64_t key_begin = 0, key_end = sequence.kv_len
    if plan.left < UNBOUNDED and sequence.offset - plan.left > 0:
        key_begin = sequence.offset - plan.left
    if plan.right < UNBOUNDED:
        key_end = min(key_end, sequence.offset + sequence.q_len + plan.right)
    if plan.key_begins.data != NULL:
        narrow_to_ranges(plan, sequence, &key_begin, &key_end)
    sequence.first_split = key_begin // keys
    sequence.splits = 1                 # without keys there is a task to write zeros
    if key_end > key_begin:
        sequence.splits = (key_end - 1) // keys - sequence.first_split + 1


cdef void divide_queries(const Plan *plan, SequencePlan *sequence) noexcept nogil:
    """Set how many prefill tasks a head of the sequence has."""
    cdef Py_ssize_t rows = plan.group * sequence.q_len, tile_q = plan.kernels.tile_q
    sequence.tiles = (rows + tile_q - 1) // tile_q
    sequence.tasks_per_split = (sequence.tiles + plan.tiles_per_task - 1) // plan.tiles_per_task
    sequence.first_split = 0
    sequence.splits = 1
    # BLAS tiles are whole, so the partial states of a few rows would be large.
    if plan.fixed_nvec == 0 and rows <= MAX_SPLIT_ROWS and sequence.kv_len > TILE_KV_SPLIT:
        divide_keys(plan, sequence, TILE_KV_SPLIT)
    sequence.tasks_per_head = sequence.splits * sequence.tasks_per_split


cdef void open_sequence(const Launch *launch, Py_ssize_t batch,
                        SequencePlan *sequence) noexcept nogil:
    """Fill the plan of a batch entry."""
    cdef const Plan *plan = &launch.prefill
    cdef const char *mask
    sequence.batch = batch
    sequence.q_start = entry_of(plan, &plan.query_starts, batch, 0)
    sequence.q_len = entry_of(plan, &plan.query_lengths, batch, plan.q_len)
    sequence.k_start = entry_of(plan, &plan.key_starts, batch, 0)
    sequence.kv_len = entry_of(plan, &plan.key_lengths, batch, plan.kv_len)
    sequence.offset = entry_of(plan, &plan.query_offset, batch, 0)
    if plan.mask.data != NULL and plan.mask.type == QKV_BOOL and is_shared(&plan.mask):
        mask = batch_entry(plan, &plan.mask, batch)
        while sequence.kv_len > 0 and not mask[(sequence.kv_len - 1) * plan.mask.col]:
            sequence.kv_len -= 1        # keys that the mask hides at the end are padding
    sequence.is_decode = is_decode(launch, plan.group * sequence.q_len)
    if sequence.is_decode:
        divide_keys(&launch.decode, sequence, KV_SPLIT)
        sequence.tasks_per_head = sequence.splits if sequence.q_len > 0 else 0
    else:
        divide_queries(plan, sequence)


cdef void count_tasks(Launch *launch) noexcept nogil:
    """Set launch.totals and launch.work, and the offsets if there is memory for them."""
    cdef const Plan *plan = &launch.prefill
    cdef SequencePlan sequence
    cdef TaskOffset offset
    cdef double work = 0
    cdef Py_ssize_t batch, heads
    memset(&offset, 0, sizeof(TaskOffset))
    for batch in range(launch.batches):
        if batch % BATCHES_PER_LOOK == BATCHES_PER_LOOK - 1:
            look_for_signals(&launch.interrupt)
            if launch.interrupt.stop:
                break
        if launch.offsets != NULL:
            launch.offsets[batch] = offset
        open_sequence(launch, batch, &sequence)
        heads = launch.decode.heads_per_task if sequence.is_decode else 1
        offset.task += (plan.num_kv_heads + heads - 1) // heads * sequence.tasks_per_head
        if sequence.splits > 1 and sequence.is_decode:
            offset.partial += plan.num_kv_heads * sequence.splits
        elif sequence.splits > 1:
            offset.tile_partial += plan.num_kv_heads * sequence.tiles * sequence.splits
        # Decode waits for memory as long as four rows take to compute.
        work += <double>max(4, plan.group * sequence.q_len) * sequence.kv_len
    if launch.offsets != NULL:
        launch.offsets[launch.batches] = offset
    launch.totals = offset
    launch.work = work * plan.num_kv_heads * (plan.head_dim + plan.v_dim)


cdef void count_splits(const Launch *launch) noexcept nogil:
    """Note in the first partial state of each split head or tile how many have not ended."""
    cdef SequencePlan sequence
    cdef const TaskOffset *offset = launch.offsets
    cdef Py_ssize_t batch
    for batch in range(launch.batches):
        if offset[0].partial < offset[1].partial or offset[0].tile_partial < offset[1].tile_partial:
            open_sequence(launch, batch, &sequence)
            set_remaining(launch.partials, launch.partial_bytes, offset[0].partial,
                          offset[1].partial, sequence.splits)
            set_remaining(launch.tile_partials, launch.tile_partial_bytes, offset[0].tile_partial,
                          offset[1].tile_partial, sequence.splits)
        offset += 1


cdef void set_remaining(char *partials, Py_ssize_t bytes, Py_ssize_t begin, Py_ssize_t end,
                        Py_ssize_t splits) noexcept nogil:
    """Set the counts of the partial states [begin, end), `splits` of each head or tile."""
    while begin < end:
        (<PartialState *>(partials + begin * bytes)).remaining = splits
        begin += splits


cdef void set_offsets(Launch *launch) noexcept nogil:
    """Fill the offsets and the partial states' counts, before the tasks run."""
    count_tasks(launch)
    if not launch.interrupt.stop:
        count_splits(launch)


# --- A task -------------------------------------------------------------------------------------

cdef inline Py_ssize_t find_sequence(const Launch *launch, Py_ssize_t task) noexcept nogil:
    """Return the batch entry that a task belongs to."""
    cdef Py_ssize_t low = 0, high = launch.batches, middle
    while high - low > 1:
        middle = (low + high) // 2
        if launch.offsets[middle].task <= task:
            low = middle
        else:
            high = middle
    return low


cdef void open_rows(const Plan *plan, const SequencePlan *sequence, const TensorView *view,
                    Py_ssize_t length, Py_ssize_t kv_head, char *copies,
                    HeadRows *rows) noexcept nogil:
    """Note where the keys, the values or the scales of a batch entry's KV head lie."""
    rows.view = view
    rows.copies = copies
    rows.length = length
    rows.page_size = plan.page_size
    rows.pages = <const int64_t *>batch_entry(plan, &plan.block_table, sequence.batch)
    rows.data = view.data
    if rows.pages == NULL:
        rows.data = batch_entry(plan, view, sequence.batch) + sequence.k_start * view.row
    rows.data += kv_head * view.head


cdef void open_head(const Plan *plan, const SequencePlan *sequence, Py_ssize_t kv_head,
                    HeadView *head) noexcept nogil:
    """Note where the rows of a batch entry's KV head lie, besides the scratch."""
    cdef Py_ssize_t batch = sequence.batch
    head.kv_head = kv_head
    head.number = 0
    head.q_len = sequence.q_len
    head.offset = sequence.offset
    head.kv_len = sequence.kv_len
    head.query = batch_entry(plan, &plan.query, batch) + sequence.q_start * plan.query.row
    head.out = batch_entry(plan, &plan.out, batch) + sequence.q_start * plan.out.row
    head.lse = batch_entry(plan, &plan.lse, batch)
    if head.lse != NULL:
        head.lse += sequence.q_start * plan.lse.row
    head.mask = batch_entry(plan, &plan.mask, batch)
    head.bias = batch_entry(plan, &plan.bias, batch)
    head.key_begins = batch_entry(plan, &plan.key_begins, batch)
    head.key_ends = batch_entry(plan, &plan.key_ends, batch)
    if head.key_begins != NULL:
        head.key_begins += sequence.q_start * plan.key_begins.row
        head.key_ends += sequence.q_start * plan.key_ends.row
    head.slopes = batch_entry(plan, &plan.slopes, batch)
    open_rows(plan, sequence, &plan.key, plan.head_dim, kv_head,
              head.scratch + plan.layout.keys, &head.key)
    open_rows(plan, sequence, &plan.value, plan.v_dim, kv_head,
              head.scratch + plan.layout.values, &head.value)
    open_rows(plan, sequence, &plan.key_scales, 1, kv_head,
              head.scratch + plan.layout.key_scales, &head.key_scales)
    open_rows(plan, sequence, &plan.value_scales, 1, kv_head,
              head.scratch + plan.layout.value_scales, &head.value_scales)


cdef void run_task(const void *context, int thread, Py_ssize_t task) noexcept nogil:
    """Run a task of a launch (a task_function of parallel.pxd)."""
    cdef const Launch *launch = <const Launch *>context
    cdef Py_ssize_t batch = find_sequence(launch, task)
    cdef SequencePlan sequence
    cdef HeadView head
    open_sequence(launch, batch, &sequence)
    task -= launch.offsets[batch].task
    cdef const Plan *plan = &launch.decode if sequence.is_decode else &launch.prefill
    cdef Py_ssize_t heads = task // sequence.tasks_per_head
    task %= sequence.tasks_per_head
    head.on_caller = thread == 0
    head.scratch = launch.scratch + thread * launch.scratch_bytes
    head.gathered = head.scratch + plan.layout.gathered
    open_head(plan, &sequence, heads * plan.heads_per_task, &head)
    if plan.kernels.enter != NULL:
        plan.kernels.enter()
    if sequence.is_decode:
        run_decode_task(launch, &head, &sequence, task)
    else:
        run_prefill_task(launch, &head, &sequence, task)
    if plan.kernels.leave != NULL:
        plan.kernels.leave()
