"""Runner: computes Problems with one choice of kernels, in scratch that is kept between calls."""

cimport cython
cimport numpy as cnp
from cpython.ref cimport PyObject
from libc.stdint cimport uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from .isa cimport index_of, table_of
from .kernels cimport QKV_FLOAT32, QKV_FLOAT64, qkv_tile_kernels
from .linear cimport LinearCall, pad_rows, plan_linear, run_linear_task, view_linear
from .merge cimport MergeCall, measure_merge, plan_merge, run_merge_task, view_parts, views_bytes
from .parallel cimport begin_call, end_call, raise_pending, run_tasks, task_function
from .plan cimport (
    choose_decode_tasks, choose_max_decode_rows, choose_prefill_tasks, is_in_place, lay_out_decode,
    lay_out_prefill, limit_to_blas, plan_decode, plan_prefill, view_problem,
)
from .schedule cimport count_tasks, run_task, set_offsets
from .shared cimport Lock, lock, unlock
from .statistics cimport (
    count_ranges, lay_out_received, lay_out_statistics, norms_bytes, run_norms_task,
    run_received_task, run_statistics_task,
)
from .tuning cimport BATCHES_PER_LOOK, KEPT_BYTES, PAGE, SHORT_WORK
from .types cimport Interrupt, PartialState, Plan, TaskOffset, lanes_per_step, round_up
from .weights cimport (
    WeightsCall, count_weights_tasks, lay_out_weights, plan_weights, run_weights_task,
    view_selection,
)

cnp.import_array()

cdef extern from *:
    """
    #include <stdlib.h>
    #if defined(__GLIBC__)
    #include <malloc.h>
    static void give_back_free_memory(void) { malloc_trim(0); }
    #else
    static void give_back_free_memory(void) {}
    #endif
    """
    void give_back_free_memory()


# --- Scratch: kept between calls ----------------------------------------------------------------

@cython.final
cdef class Arena:
    """Memory from a page's begin on, for the scratch of all threads of a call."""
    cdef char *memory
    cdef size_t size

    def __cinit__(self, size_t size):
        self.size = size
        self.memory = <char *>malloc(size + PAGE)
        if self.memory == NULL:
            raise MemoryError(f"no memory for {size} bytes of attention scratch")

    def __dealloc__(self):
        free(self.memory)

    cdef char *aligned(self) noexcept:
        return <char *>((<uintptr_t>self.memory + PAGE - 1) & ~<uintptr_t>(PAGE - 1))


cdef list idle_arenas = []              # of KEPT_BYTES in all at most
cdef size_t idle_bytes = 0
cdef Lock idle_lock                     # of both; what holds it runs no code of others


cdef Arena take_arena(size_t size):
    """Return an arena of at least so many bytes, an idle one if it is large enough."""
    global idle_bytes
    cdef Arena arena = None
    lock(&idle_lock)
    if idle_arenas:
        arena = idle_arenas.pop()
        idle_bytes -= arena.size
    unlock(&idle_lock)
    if arena is not None and arena.size >= size:
        return arena
    return Arena(size)


cdef int keep_arena(Arena arena) except -1:
    """Keep an arena for the next call, unless that is too much with those that are kept."""
    global idle_bytes
    lock(&idle_lock)
    try:
        if idle_bytes + arena.size <= KEPT_BYTES:
            idle_arenas.append(arena)
            idle_bytes += arena.size
    finally:
        unlock(&idle_lock)
    return 0


def release_scratch():
    """Free the arenas that no call uses, and have the C library give free memory back."""
    global idle_arenas, idle_bytes
    cdef list arenas, empty = []
    lock(&idle_lock)
    arenas, idle_arenas, idle_bytes = idle_arenas, empty, 0
    unlock(&idle_lock)
    arenas.clear()
    give_back_free_memory()


def kept_scratch():
    """Return the bytes of the arenas that no call uses, for tests."""
    return idle_bytes


# --- A call -------------------------------------------------------------------------------------

cdef int follow(Interrupt *interrupt, problem) except -1:
    """Have the problem's function told of the call's progress, if it has one."""
    progress = problem.progress         # which the problem keeps alive
    if progress is not None:
        interrupt.progress = <PyObject *>progress
    return 0


cdef bint is_empty(problem) except -1:
    """Return whether there is nothing to write, or no head to read."""
    cdef cnp.ndarray query = problem.query, key = problem.key
    return (cnp.PyArray_DIMS(key)[cnp.PyArray_NDIM(query) - 3] == 0
            or cnp.PyArray_SIZE(problem.out) == 0
            and (problem.lse is None or cnp.PyArray_SIZE(problem.lse) == 0))


cdef void plan_algorithms(Launch *launch, Runner runner) noexcept:
    """Complete the launch's plans, all but tasks and scratch, from the views of prefill's."""
    cdef Plan *prefill = &launch.prefill
    cdef int axis
    launch.decode.heads_per_task = 1
    plan_prefill(prefill, runner.prefill, &launch.interrupt)
    if runner.uses_blas:
        limit_to_blas(prefill)
    launch.batches = 1
    for axis in range(prefill.batch_ndim):
        launch.batches *= prefill.batch_shape[axis]
    launch.decode_occupancy = (runner.occupancy if is_in_place(prefill)
                               else runner.occupancy_converted)
    if launch.decode_occupancy > 0:
        launch.max_decode_rows = choose_max_decode_rows(prefill, runner.decode)
        plan_decode(&launch.decode, prefill, runner.decode)


cdef int count_interruptibly(Launch *launch) except -1:
    """Count the tasks, without the GIL where that takes long; raise what a handler raised."""
    if launch.batches < BATCHES_PER_LOOK:
        count_tasks(launch)
        return 0
    with nogil:
        count_tasks(launch)
    return raise_pending(&launch.interrupt)


cdef void plan_tasks(Launch *launch, Py_ssize_t budget) noexcept:
    """Complete the plans: what a task is, by the number of tasks, and the scratch of one."""
    cdef const qkv_tile_kernels *kernels = launch.decode.kernels
    cdef Py_ssize_t rows
    choose_prefill_tasks(&launch.prefill, launch.totals.task, budget)
    lay_out_prefill(&launch.prefill, launch.totals.tile_partial > 0)
    rows = round_up(launch.prefill.group * launch.prefill.q_len, lanes_per_step(&launch.prefill))
    rows = min(<Py_ssize_t>launch.prefill.kernels.tile_q, rows)
    launch.tile_partial_bytes = round_up(sizeof(PartialState)) + round_up(
        rows * (2 + launch.prefill.v_dim) * launch.prefill.kernels.real_bytes)
    launch.scratch_bytes = launch.prefill.layout.bytes
    if launch.max_decode_rows == 0:
        return
    rows = round_up(min(launch.max_decode_rows, launch.decode.group * launch.decode.q_len),
                    kernels.lanes)
    choose_decode_tasks(&launch.decode, launch.totals.task, budget)
    lay_out_decode(&launch.decode, rows)
    launch.scratch_bytes = max(launch.scratch_bytes, launch.decode.layout.bytes)
    launch.partial_bytes = round_up(sizeof(PartialState)) + round_up(
        rows * (2 + launch.decode.acc_stride) * kernels.real_bytes)


cdef int compute(Launch *launch, int threads, double *busy) except -1:
    """Run all tasks of a launch on its planned scratch."""
    cdef size_t offsets_bytes = round_up((launch.batches + 1) * sizeof(TaskOffset))
    cdef size_t partials_bytes = launch.totals.partial * launch.partial_bytes
    cdef size_t tile_partials_bytes = launch.totals.tile_partial * launch.tile_partial_bytes
    cdef Arena arena = take_arena(
        offsets_bytes + partials_bytes + tile_partials_bytes
        + <size_t>threads * launch.scratch_bytes)
    launch.scratch = arena.aligned()
    launch.offsets = <TaskOffset *>(launch.scratch + threads * launch.scratch_bytes)
    launch.partials = <char *>launch.offsets + offsets_bytes
    launch.tile_partials = launch.partials + partials_bytes
    with nogil:
        set_offsets(launch)             # counts the tasks anew, now that their sizes are chosen
        launch.interrupt.total = launch.totals.task
        if not launch.interrupt.stop:
            run_tasks(run_task, launch, launch.totals.task, threads, &launch.interrupt, busy,
                      launch.work < SHORT_WORK)
    keep_arena(arena)
    return raise_pending(&launch.interrupt)


cdef int execute(Launch *launch, Runner runner, int budget, double *busy) except -1:
    """Compute what the views of an otherwise empty launch show, with at most `budget` threads."""
    cdef int threads
    if runner.uses_blas:
        budget = runner.blas.limit_threads(budget)
    plan_algorithms(launch, runner)
    count_interruptibly(launch)
    if launch.totals.task == 0:
        return 0
    threads = begin_call(launch.work, min(<Py_ssize_t>budget, launch.totals.task))
    try:
        plan_tasks(launch, threads)
        compute(launch, threads, busy)
    finally:
        end_call()
    return 0


cdef int write_weights(WeightsCall *call, int threads, bint are_weights) except -1:
    """Run all tasks of a planned call for weights, or for the statistics of their rows."""
    cdef task_function function = run_weights_task if are_weights else run_statistics_task
    cdef Py_ssize_t tasks = (lay_out_weights(call, threads) if are_weights
                             else lay_out_statistics(call, threads))
    cdef Arena arena = take_arena(<size_t>threads * call.launch.scratch_bytes)
    call.launch.interrupt.total = tasks
    call.launch.scratch = arena.aligned()
    with nogil:
        run_tasks(function, call, tasks, threads, &call.launch.interrupt, NULL,
                  call.launch.work < SHORT_WORK)
    keep_arena(arena)
    return raise_pending(&call.launch.interrupt)


cdef int multiply(LinearCall *call, int threads) except -1:
    """Run all tasks of a viewed product."""
    cdef Py_ssize_t tasks = plan_linear(call, threads)
    cdef size_t padded_bytes = 0
    cdef Arena arena
    if call.is_decode:
        padded_bytes = call.rows * call.padded_stride * call.kernels.real_bytes
    arena = take_arena(<size_t>threads * call.scratch_bytes + padded_bytes)
    call.scratch = arena.aligned()
    call.padded = call.scratch + threads * call.scratch_bytes
    with nogil:
        if call.is_decode:
            pad_rows(call)
        run_tasks(run_linear_task, call, tasks, threads, &call.interrupt, NULL,
                  call.work < SHORT_WORK)
    keep_arena(arena)
    return raise_pending(&call.interrupt)


cdef int write_received(WeightsCall *call, int threads) except -1:
    """Run both passes of a planned call for what the keys receive."""
    cdef Launch *launch = &call.launch
    cdef Py_ssize_t tasks = lay_out_received(call, threads)
    cdef Py_ssize_t ranges = count_ranges(call, call.range_keys)
    cdef bint is_short = launch.work < SHORT_WORK
    cdef Arena arena = take_arena(
        <size_t>threads * launch.scratch_bytes + 2 * <size_t>norms_bytes(call))
    launch.interrupt.total = tasks + ranges
    launch.scratch = arena.aligned()
    call.row_max = launch.scratch + threads * launch.scratch_bytes
    call.row_weight = call.row_max + norms_bytes(call)
    with nogil:
        run_tasks(run_norms_task, call, tasks, threads, &launch.interrupt, NULL, is_short)
        if not launch.interrupt.stop:
            run_tasks(run_received_task, call, ranges, threads, &launch.interrupt, NULL, is_short)
    keep_arena(arena)
    return raise_pending(&launch.interrupt)


@cython.final
cdef class Runner:
    """What computes Problems of an element type with one choice of kernels.

    gemm: what computes prefill's products, "simd" or "blas".
    occupancy: the share of a query tile's lanes up to which decode computes a sequence; 0 for
    prefill alone. occupancy_converted: the same where prefill would have to convert the keys.
    """

    def __init__(self, int code, str gemm, str isa, double occupancy=0,
                 double occupancy_converted=0):
        cdef int index = index_of(isa)
        cdef bint is_double = code == QKV_FLOAT64
        self.uses_blas = gemm == "blas"
        if self.uses_blas:
            from . import blas          # SciPy's, whose import takes a quarter of a second

            self.blas = blas
            self.prefill = <const qkv_tile_kernels *><size_t>blas.table_address(index, is_double)
        else:
            self.prefill = table_of(index, code)
        self.decode = table_of(index, QKV_FLOAT64 if is_double else QKV_FLOAT32)
        self.occupancy = occupancy
        self.occupancy_converted = occupancy_converted

    def __call__(self, problem, cnp.ndarray busy=None):
        """Compute a Problem (see _problem/problem.py) into its `out` and `lse`.

        busy: float64; the seconds that each thread was in tasks are added to it.
        """
        cdef Launch launch
        cdef int budget = problem.num_threads
        if is_empty(problem):
            return
        memset(&launch, 0, sizeof(Launch))
        view_problem(&launch.prefill, problem)
        follow(&launch.interrupt, problem)
        if busy is None:
            execute(&launch, self, budget, NULL)
        else:
            execute(&launch, self, min(budget, <int>cnp.PyArray_SIZE(busy)),
                    <double *>cnp.PyArray_DATA(busy))

    def weights(self, problem):
        """Compute what a Problem's stage names into its `out`: weights, scores or sums of them."""
        cdef WeightsCall call
        cdef str stage = problem.stage
        cdef Py_ssize_t tasks
        cdef int threads, budget = problem.num_threads
        if is_empty(problem):
            return
        memset(&call, 0, sizeof(WeightsCall))
        view_problem(&call.launch.prefill, problem)
        view_selection(&call, problem)
        follow(&call.launch.interrupt, problem)
        if self.uses_blas:
            budget = self.blas.limit_threads(budget)
            plan_weights(&call, self.prefill)
            limit_to_blas(&call.launch.prefill)
        else:                           # decode's kernels take reals
            plan_weights(&call, self.decode)
        tasks = count_weights_tasks(&call)
        if stage == "received":
            tasks = max(tasks, count_ranges(&call, call.launch.prefill.block_k))
        threads = begin_call(call.launch.work, min(<Py_ssize_t>budget, tasks))
        try:
            if stage == "received":
                write_received(&call, threads)
            else:
                write_weights(&call, threads, stage != "statistics")
        finally:
            end_call()

    def linear(self, x, weight, int weight_code, bias, y, int num_threads):
        """Compute y = x weightᵀ + bias; see linear.pyx for the shapes.

        x, bias and y are reals of the Runner's; weight may also be of a 16-bit type.
        """
        cdef LinearCall call
        cdef int threads
        if y.size == 0:
            return
        if self.uses_blas and weight.dtype == y.dtype:
            self.blas.limit_threads(num_threads)
            self.blas.linear(x, weight, bias, y)
            return
        memset(&call, 0, sizeof(LinearCall))
        view_linear(&call, self.decode, x, weight, weight_code, bias, y)
        threads = begin_call(call.work, num_threads)
        try:
            multiply(&call, threads)
        finally:
            end_call()

    def merge(self, list outputs, list codes, list lses, sinks, out, int out_code, lse,
              int num_threads):
        """Merge parts of a result into `out` and `lse`; see merge.pyx, and _merge.py for shapes."""
        cdef MergeCall call
        cdef Arena arena
        cdef Py_ssize_t tasks
        cdef int threads
        memset(&call, 0, sizeof(MergeCall))
        measure_merge(&call, self.decode, outputs)
        if call.rows == 0:
            return
        threads = begin_call(call.work, min(<Py_ssize_t>num_threads, call.rows))
        try:
            tasks = plan_merge(&call, threads)
            arena = take_arena(<size_t>threads * call.scratch_bytes + views_bytes(&call))
            call.scratch = arena.aligned()
            view_parts(&call, call.scratch + threads * call.scratch_bytes, outputs, codes, lses,
                       out, out_code, lse, sinks)
            with nogil:
                run_tasks(run_merge_task, &call, tasks, threads, &call.interrupt, NULL,
                          call.work < SHORT_WORK)
            keep_arena(arena)
            raise_pending(&call.interrupt)
        finally:
            end_call()

    def describe(self, problem):
        """Return what a call would do, for tests: the plans' choices and the scratch layout."""
        cdef Launch launch
        memset(&launch, 0, sizeof(Launch))
        view_problem(&launch.prefill, problem)
        plan_algorithms(&launch, self)
        count_tasks(&launch)
        plan_tasks(&launch, problem.num_threads)
        return {"tasks of one": launch.totals.task, "partials": launch.totals.partial,
                "tile partials": launch.totals.tile_partial,
                "work": launch.work, "max_decode_rows": launch.max_decode_rows,
                "scratch_bytes": launch.scratch_bytes, "partial_bytes": launch.partial_bytes,
                "prefill": describe_plan(&launch.prefill),
                "decode": describe_plan(&launch.decode) if launch.max_decode_rows else None}


cdef dict describe_plan(const Plan *plan):
    return {"block_k": plan.block_k, "tiles_per_task": plan.tiles_per_task,
            "prefetches": bool(plan.prefetches), "heads_per_task": plan.heads_per_task,
            "adjacent_keys": plan.adjacent_keys, "interleave_span": plan.interleave_span,
            "in_place": bool(is_in_place(plan)), "lanes": plan.kernels.lanes,
            "tile_q": plan.kernels.tile_q, "layout": plan.layout}
