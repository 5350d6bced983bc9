"""Engine "native": the loop nest around the tile kernels of csrc/ (tile_kernels.h).

A tile is up to `tile_q` rows, each a (query head of one KV group, query position) pair; a task
is one tile, or a few neighbours that share the keys they read. For each key block, each tile:

    S = K Qt;  softcap, ALiBi, bias;  m' = max(m, S);  P = exp2(S - m');  acc = acc 2^(m - m') + Vᵀ P

The same nest serves float32 and float64, SIMD and BLAS tiles: only the table differs. Where a KV group
has few rows (decode), both products are others (few_rows.h), and the keys are split into chunks of
a fixed length, a task each, whose partial results the last one to end merges in their order. Such a
task takes several KV heads, a tile each, where these lie between one another in memory.
"""

cimport cython
cimport numpy as cnp
from cpython.ref cimport PyObject
from cython.parallel cimport prange, threadid
from libc.math cimport INFINITY, NAN, exp2, log
from libc.stdint cimport int64_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memchr, memcpy, memset

import time

from . import _threads

cnp.import_array()

cdef extern from "kernels/kernels.h" nogil:
    ctypedef struct qkv_span:
        int begin, end

    ctypedef struct qkv_prefetch_rows:
        const char *row
        Py_ssize_t stride, bytes, count, at

    ctypedef struct qkv_tile_kernels:
        const char *isa
        int real_bytes
        int input_type
        int lanes
        int tile_q
        int depth_step
        int row_step
        void (*enter)() noexcept nogil
        void (*leave)() noexcept nogil
        void (*pack_rows)(void *, const char **, Py_ssize_t, int, double) noexcept nogil
        void (*pack_values)(void *, Py_ssize_t, const char *, Py_ssize_t, Py_ssize_t,
                            Py_ssize_t) noexcept nogil
        void (*scores)(void *, const void *, const char *, Py_ssize_t, Py_ssize_t, Py_ssize_t,
                       int, const qkv_span *, const qkv_prefetch_rows *) noexcept nogil
        void (*scale)(void *, Py_ssize_t, int, double) noexcept nogil
        void (*softcap)(void *, Py_ssize_t, int, double) noexcept nogil
        void (*alibi)(void *, Py_ssize_t, int, const void *, const void *) noexcept nogil
        void (*bias)(void *, Py_ssize_t, int, const char **, int, uint64_t *) noexcept nogil
        void (*mask_positions)(uint64_t *, Py_ssize_t, int, const void *, const void *) noexcept nogil
        void (*mask_bool)(uint64_t *, Py_ssize_t, int, const char **, Py_ssize_t) noexcept nogil
        void (*softmax)(void *, Py_ssize_t, int, const uint64_t *, const qkv_span *, double,
                        void *, void *, void *) noexcept nogil
        void (*accumulate)(void *, const void *, const char *, Py_ssize_t, Py_ssize_t, Py_ssize_t,
                           int, const void *, const qkv_span *) noexcept nogil
        void (*accumulate_nonfinite)(void *, const void *, const char *, Py_ssize_t, Py_ssize_t,
                               Py_ssize_t, int) noexcept nogil
        void (*scale_keys)(void *, Py_ssize_t, int, const float *, int) noexcept nogil
        int (*all_finite)(const char *, Py_ssize_t, Py_ssize_t, Py_ssize_t) noexcept nogil
        void (*store_rows)(char **, int, const void *, Py_ssize_t, int,
                           const void *) noexcept nogil
        void (*fold)(void *, void *, void *, Py_ssize_t, int, const void *, int) noexcept nogil
        void (*decode_scores)(void *, Py_ssize_t, const void *, Py_ssize_t, const char **,
                           Py_ssize_t, Py_ssize_t, Py_ssize_t, int, int) noexcept nogil
        void (*decode_softmax)(void *, Py_ssize_t, int, const float *, const float *, void *, void *,
                            void *) noexcept nogil
        void (*decode_accumulate)(void *, Py_ssize_t, const void *, Py_ssize_t, const char **,
                               Py_ssize_t, Py_ssize_t, Py_ssize_t, int, const void *, int,
                               int) noexcept nogil
        void (*widen)(void *, const char *, Py_ssize_t, int) noexcept nogil
        void (*narrow)(char *, const void *, Py_ssize_t, int) noexcept nogil
        double (*fma_chain)(Py_ssize_t) noexcept nogil
        int fma_chain_flop

    int QKV_KEY_RUN, QKV_KEY_RUNS_AHEAD
    const qkv_tile_kernels *qkv_tile_table(int index, int input_type)
    const char *qkv_isa_name(int index)
    int qkv_isa_runs(int index)
    int qkv_isa_is_profitable(int index)

cdef extern from "runtime/convert.h" nogil:
    int QKV_FLOAT32, QKV_FLOAT64, QKV_FLOAT16, QKV_BFLOAT16, QKV_BOOL, QKV_INT8, QKV_SWAPPED
    void qkv_read_row(void *, int, const char *, Py_ssize_t, Py_ssize_t, int)
    void qkv_copy_row16(void *, const char *, Py_ssize_t, Py_ssize_t, int)
    void qkv_zero_nonfinite(void *, int, Py_ssize_t)
    void qkv_write_row(char *, const void *, int, Py_ssize_t, Py_ssize_t, int)

cdef extern from "runtime/thread_pool.h" nogil:
    ctypedef void (*qkv_task)(const void *, int, Py_ssize_t) noexcept nogil
    ctypedef void (*qkv_wait)(const void *) noexcept nogil
    void qkv_run_tasks(qkv_task, qkv_wait, const void *, Py_ssize_t, int)
    void qkv_notify_call_start()
    int qkv_forked()

cdef extern from "Python.h":
    int PyErr_CheckSignals()    # an exception of a handler stays set, for `raise_pending`

cdef extern from "time.h" nogil:
    cdef struct timespec:
        long tv_sec
        long tv_nsec
    int CLOCK_MONOTONIC
    int clock_gettime(int, timespec *)

cdef extern from *:
    """
    #include <float.h>
    #ifdef _OPENMP
    #define QKV_OPENMP _OPENMP
    #else
    #define QKV_OPENMP 0
    #endif
    #if defined(__clang__)
    #define QKV_COMPILER "clang " __clang_version__
    #elif defined(__GNUC__)
    #define QKV_COMPILER "gcc " __VERSION__
    #else
    #define QKV_COMPILER "unknown"
    #endif
    """
    int QKV_OPENMP
    const char *QKV_COMPILER
    double FLT_MAX, DBL_MAX
    int64_t take_one "__sync_sub_and_fetch"(int64_t *, int64_t) nogil
    void prefetch_line "__builtin_prefetch"(const void *) nogil

cdef enum:
    MAX_LANES = 64      # rows of the largest tile: one bit each in a uint64
    MAX_VECTORS = 32    # of a tile: two doubles each at least
    PACKED_STEP = 32    # what pack_values rounds both axes up to
    MAX_BLOCK_K = 256
    MAX_BLOCK_K_FEW = 128
    MAX_HEADS = 16      # of a task
    MAX_GROUPS = 132    # of such a block for as many heads, and QKV_KEY_RUNS_AHEAD
    MAX_TABLES = 8
    ALIGNMENT = 64
    PAGE = 4096

cdef int64_t UNBOUNDED = <int64_t>1 << 62  # _problem.UNBOUNDED
cdef double LOG2E = 1.4426950408889634074
cdef double LN2 = 0.69314718055994530942

# Keys of a block. 64 to 128 are alike at head_dim 64 to 256 with a 48 KiB L1, 32 and 256 are 5 %
# slower; 128 wins at bert-128, one block (bench_attention.py). A matrix unit reads and writes acc
# too often with 128 where heads are LARGE (4x4096x256 in bfloat16: 4 % slower). Fixed for a head
# size and table, since a row's sums depend on where blocks begin.
cdef Py_ssize_t BLOCK_K = 128
cdef Py_ssize_t BLOCK_K_MATRIX = 256
cdef Py_ssize_t LARGE = 128
# From memory, float32 and int8 are up to a tenth faster with 64, 16-bit keys 3 to 5 % with 128.
cdef Py_ssize_t BLOCK_K_FEW = 64
cdef Py_ssize_t BLOCK_K_FEW_HALF = MAX_BLOCK_K_FEW
cdef Py_ssize_t BLOCK_K_WIDE = 16       # head sizes beyond WIDE: bounds the scratch
cdef Py_ssize_t WIDE = 1024

# Rows beyond which the kernels for few rows have not been seen to win (_backend.FEW_SHARE).
cdef Py_ssize_t FEW_MOST = 32

# Keys of a task where rows are few: short enough for many threads to share one sequence, so long
# that merging the parts is nothing beside reading them.
cdef Py_ssize_t CHUNK = 2048

# Keys after which a tile moves its sums to others, which lose no more the longer a row is: 64 rows of
# equal keys are off by 1.4e-6 at any length, where plain sums are by 1.3e-5 at 2^17, 2.4e-4 at 2^22. Where the
# result is rounded to bfloat16, 4e-3, such sums are exact enough for longer.
cdef Py_ssize_t FOLD_KEYS = 2048
cdef Py_ssize_t FOLD_KEYS_PAIRS = 1 << 16

# Where the keys of a head lie together for fewer bytes than this (a page's, or each alone between
# those of other heads), a task takes several heads, in the order of memory: it is read a fifth
# slower in pieces of 64 KB than from end to end, and half as fast in rows of 512 bytes.
cdef Py_ssize_t LONG_RUN = 1 << 17

# Rows of the tiles that run in step over the key blocks, where a block must be made ready for them
# or a head's keys and values are more than SHARED_KEYS bytes, about what stays in a core's L2: a
# block then comes from the L3 once for all of them. As long as the threads still have
# TASKS_PER_THREAD tasks each, for balance.
cdef Py_ssize_t MAX_ROWS_PER_TASK = 256
cdef Py_ssize_t SHARED_KEYS = 1 << 20
cdef Py_ssize_t TASKS_PER_THREAD = 4
cdef Py_ssize_t TASKS_IF_PACKED = 2     # sharing weighs more then: 1,8,64 on 4096,128 took 1240 us, 900

# While the scores of a block are computed, its values and the keys from this one on are fetched. From
# memory that is 1.7 to 1.9 times as fast with 16 rows of float32, and 7 % at 4096,128; AVX2 1.6.
cdef Py_ssize_t KEYS_AHEAD = 16

# A call looks for signals (Ctrl-C) every so many seconds, and at the clock after so many
# multiply-adds: a millisecond's work or less.
cdef double SIGNAL_SECONDS = 0.1
cdef double CLOCK_WORK = 1 << 24
cdef Py_ssize_t BATCHES_PER_LOOK = 1 << 14

# Multiply-adds below which a second thread costs more than it brings (bench_overhead.py: waking
# a sleeping worker takes 10 us and more, which is some 2^19 of them).
cdef double SERIAL_WORK = 1 << 19


cdef struct Operand:
    char *data
    const cnp.npy_intp *batch_strides   # bytes; one per batch axis, or per page
    Py_ssize_t head, row, col           # strides in bytes
    int type                            # as convert.h numbers them
    bint direct                         # rows of the kernels' type with unit stride


cdef struct Interrupt:
    bint stop                           # a signal's handler has raised: leave the rest undone
    double next_look                    # when the calling thread looks for signals again


cdef struct Call:
    const qkv_tile_kernels *kernels
    Interrupt *interrupt
    Py_ssize_t blocks_per_look          # at the clock
    Py_ssize_t fold_keys
    int fixed_nvec                      # 0: as many vectors as the tile's rows need
    Py_ssize_t batch_ndim
    const cnp.npy_intp *batch_shape
    Py_ssize_t num_kv_heads, group, q_len, kv_len, head_dim, v_dim
    Py_ssize_t block_k, tiles_per_task
    bint few                            # the kernels for few rows; else tiles
    Py_ssize_t run, turn                # see set_turns
    Py_ssize_t heads_per_task           # 1 for tiles
    bint fetches                        # tiles ask for keys and values before they need them
    Operand query, key, value, mask, out, lse
    Operand key_scales, value_scales
    Operand query_offset, query_starts, query_lengths, key_starts, key_lengths
    Operand slopes, block_table         # data NULL when absent
    Py_ssize_t page_size                # 0: keys are not in pages
    int operand_bytes
    Py_ssize_t key_bytes, packed_stride # of a key row and of a packed row in our own scratch
    const double *sinks                 # (Hq,) or NULL
    double query_factor, score_factor   # their product is scale * log2(e)
    double softcap
    bint modified                       # modify_scores has something to do
    int64_t left, right
    # A thread's scratch: S, gathered rows, key rows, value rows, packed values, factors, then for
    # each tile of a task Tile, Qt (or Q), acc, where it folds total and error of acc's size, and, where
    # these are of several heads, their own S.
    Py_ssize_t gathered_at, keys_at, values_at, packed_at, factors_at, value_factors_at
    Py_ssize_t tiles_at, acc_at, total_at, error_at, S_at, tile_bytes
    Py_ssize_t scratch_bytes
    Py_ssize_t q_stride, acc_stride     # reals in a row of Q and of acc, where rows are few


cdef struct Place:                      # where the tasks of a batch entry begin, and its parts
    Py_ssize_t task, part


cdef struct Job:
    Call tiles, few                     # the same call for sequences of many and of few rows
    Interrupt interrupt
    double few_share                    # see rows_are_few
    Py_ssize_t few_most, batches
    Place *places                       # batches + 1
    char *scratch
    Py_ssize_t scratch_bytes            # of a thread
    char *parts
    Py_ssize_t part_bytes
    double *busy                        # seconds in tasks, a thread each, or NULL


cdef struct Sequence:                   # a batch entry
    Py_ssize_t batch, q_start, q_len, k_start
    int64_t offset, visible             # the first query's position; keys before key_lengths
    bint few
    Py_ssize_t tasks_per_head
    Py_ssize_t first_chunk              # where rows are few: a task is a chunk


cdef struct Part:                       # what a chunk leaves behind; acc and the sums come after
    int64_t remaining                   # in the first one: chunks that have not ended
    uint64_t seen


cdef struct Head:                       # what the tiles of a KV head share
    Py_ssize_t kv_head, q_len
    int number                          # among the heads of its task
    bint on_caller                      # the task runs on the calling thread
    char *query
    char *out
    char *lse
    char *key
    char *value
    char *key_scales
    char *value_scales
    const int64_t *pages                # of the batch entry's keys, or NULL
    char *mask
    char *slopes
    int64_t offset, visible
    char *scratch                       # of the thread
    char *gathered


cdef struct Block:                      # keys, and what of them was made ready for all tiles
    int64_t begin
    Py_ssize_t skipped                  # keys that no row of the task has in its reach
    Py_ssize_t nk
    const char *keys                    # NULL: not yet
    const char *value_rows
    const char *values                  # as accumulate wants them
    Py_ssize_t key_stride, row_stride, value_stride
    int finite                          # whether all of value_rows is; -1: not known


cdef struct Tile:
    void *Qt
    void *acc
    char *S                             # scores, and then weights, of a block
    Py_ssize_t row_begin
    int count, nvec, lanes
    int64_t first_min, first_max, last_min, last_max    # over the rows' reach
    bint fresh                          # acc holds nothing yet
    bint folded                         # total and error do
    int64_t fold                        # the keys that acc is of: from fold * fold_keys on
    void *total
    void *error
    uint64_t seen                       # rows that saw a key
    const char *query_rows[MAX_LANES]
    const char *mask_rows[MAX_LANES]
    const char *rows[MAX_LANES]
    char *out_rows[MAX_LANES]
    char *lse_rows[MAX_LANES]
    int64_t first[MAX_LANES]            # keys [first, last] are in reach of the row
    int64_t last[MAX_LANES]
    int64_t position[MAX_LANES]
    double row_max[MAX_LANES]           # from here on: reals of the call's size
    double row_sum[MAX_LANES]
    double rescale[MAX_LANES]
    double weight[MAX_LANES]
    double slope[MAX_LANES]
    double range_first[MAX_LANES]
    double range_last[MAX_LANES]
    double relative[MAX_LANES]
    double fold_max[MAX_LANES]          # row_max when acc was folded
    double total_sum[MAX_LANES]
    double sum_error[MAX_LANES]
    qkv_span span[MAX_VECTORS]
    uint64_t allow[MAX_BLOCK_K]


cdef inline Py_ssize_t round_up(Py_ssize_t size, Py_ssize_t step=ALIGNMENT) noexcept nogil:
    return (size + step - 1) // step * step


cdef Py_ssize_t TILE_BYTES = round_up(sizeof(Tile))


cdef double seconds_now() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return t.tv_sec + 1e-9 * t.tv_nsec


cdef bint handler_raised() noexcept with gil:
    """Run the handlers of signals that came; outside the main thread there are none."""
    return PyErr_CheckSignals() != 0


cdef void look_for_signals(Interrupt *interrupt) noexcept nogil:
    """Only on the calling thread, where an exception belongs."""
    cdef double now
    if interrupt.stop:
        return
    now = seconds_now()
    if interrupt.next_look == 0:        # the call has just begun
        interrupt.next_look = now + SIGNAL_SECONDS
    elif now >= interrupt.next_look:
        interrupt.stop = handler_raised()
        interrupt.next_look = seconds_now() + SIGNAL_SECONDS


cdef inline Tile *tile_of(const Call *call, const Head *head, int number) noexcept nogil:
    """The task's tile of that number."""
    return <Tile *>(head.scratch + call.tiles_at + number * call.tile_bytes)


cdef inline double get_real(const void *reals, int i, int real_bytes) noexcept nogil:
    return (<const float *>reals)[i] if real_bytes == 4 else (<const double *>reals)[i]


cdef inline void set_real(void *reals, int i, int real_bytes, double x) noexcept nogil:
    if real_bytes == 4:
        (<float *>reals)[i] = <float>x
    else:
        (<double *>reals)[i] = x


cdef void set_relative(void *reals, const int64_t *values, int64_t origin, int64_t low,
                       int64_t high, int count, int real_bytes) noexcept nogil:
    """reals[i] = values[i] - origin, between low and high."""
    cdef int i
    if real_bytes == 4:
        for i in range(count):
            (<float *>reals)[i] = <float>clamp(values[i] - origin, low, high)
    else:
        for i in range(count):
            (<double *>reals)[i] = <double>clamp(values[i] - origin, low, high)


cdef inline int size_of(int type) noexcept nogil:
    type &= ~QKV_SWAPPED
    return 8 if type == QKV_FLOAT64 else 4 if type == QKV_FLOAT32 else 1 if type == QKV_INT8 else 2


cdef inline int64_t clamp(int64_t x, int64_t low, int64_t high) noexcept nogil:
    return low if x < low else high if x > high else x


cdef inline char *batch_entry(const Call *call, const Operand *operand,
                              Py_ssize_t batch) noexcept nogil:
    """Where the operand's part for a batch entry begins; NULL when the operand is absent."""
    cdef char *data = operand.data
    cdef Py_ssize_t axis = call.batch_ndim
    if data == NULL:
        return NULL
    while axis > 0:
        axis -= 1
        data += batch % call.batch_shape[axis] * operand.batch_strides[axis]
        batch //= call.batch_shape[axis]
    return data


cdef inline void read_reals(const Call *call, void *row, const Operand *operand, const char *src,
                            Py_ssize_t length) noexcept nogil:
    """A row of the caller's as reals."""
    if call.kernels.widen != NULL and (operand.col == 2 and (
            operand.type == QKV_FLOAT16 or operand.type == QKV_BFLOAT16)
            or operand.col == 1 and operand.type == QKV_INT8):
        call.kernels.widen(row, src, length, operand.type)
    else:
        qkv_read_row(row, call.kernels.real_bytes, src, length, operand.col, operand.type)


cdef void read_row(const Call *call, char *row, const Operand *operand, const char *src,
                   Py_ssize_t length) noexcept nogil:
    """A row of the caller's as operands of the kernels."""
    if call.kernels.input_type == QKV_BFLOAT16:
        qkv_copy_row16(row, src, length, operand.col, operand.type)
    else:
        read_reals(call, row, operand, src, length)


cdef char *find_rows(const Call *call, const Head *head, const Operand *operand, char *rows,
                     int64_t key, Py_ssize_t *count) noexcept nogil:
    """Where the row of a key lies; *count: how many follow it in its page, if less than it was."""
    cdef Py_ssize_t slot
    if head.pages == NULL:
        return rows + key * operand.row
    slot = key % call.page_size
    count[0] = min(count[0], call.page_size - slot)
    return rows + head.pages[key // call.page_size] * operand.batch_strides[0] + slot * operand.row


cdef void gather_keys(const Call *call, const Head *head, const Operand *operand, char *rows,
                      int64_t begin, Py_ssize_t nk, Py_ssize_t length, char *row,
                      Py_ssize_t row_bytes) noexcept nogil:
    """Rows of operands, one after another, padded with zeros to row_bytes."""
    cdef Py_ssize_t i = 0, j, count, bytes = length * call.operand_bytes
    cdef const char *source
    while i < nk:
        count = nk - i
        source = find_rows(call, head, operand, rows, begin + i, &count)
        for j in range(count):
            if operand.direct and operand.type == call.kernels.input_type:
                memcpy(row, source, bytes)
            else:
                read_row(call, row, operand, source, length)
            memset(row + bytes, 0, row_bytes - bytes)
            source += operand.row
            row += row_bytes
        i += count


cdef bint in_one_page(const Call *call, const Head *head, const Block *block) noexcept nogil:
    return head.pages == NULL or block.begin % call.page_size + block.nk <= call.page_size


cdef void load_keys(const Call *call, const Head *head, Block *block) noexcept nogil:
    """The block's keys as the kernels want them: in place, or gathered and padded with zeros."""
    cdef Py_ssize_t rows = call.kernels.row_step, count = block.nk
    cdef char *row = head.scratch + call.keys_at
    if (call.key.direct and call.head_dim % call.kernels.depth_step == 0
            and block.nk % call.kernels.row_step == 0 and in_one_page(call, head, block)):
        block.keys = find_rows(call, head, &call.key, head.key, block.begin, &count)
        block.key_stride = call.key.row
        return
    block.keys = row
    block.key_stride = call.key_bytes
    memset(row, 0, block.skipped * call.key_bytes)
    gather_keys(call, head, &call.key, head.key, block.begin + block.skipped,
                block.nk - block.skipped, call.head_dim, row + block.skipped * call.key_bytes,
                call.key_bytes)
    rows = (block.nk + rows - 1) // rows * rows
    memset(row + block.nk * call.key_bytes, 0, (rows - block.nk) * call.key_bytes)


cdef inline void set_prefetch(const Call *call, const Head *head, const Operand *operand, char *rows,
                          Py_ssize_t length, int64_t begin, int64_t end,
                          qkv_prefetch_rows *prefetch) noexcept nogil:
    """The rows of keys from begin to end, as far as they lie in one page."""
    prefetch.row = rows
    prefetch.stride = operand.row
    prefetch.bytes = length * size_of(operand.type)
    prefetch.count = max(0, end - begin)
    prefetch.at = 0
    if begin < end:
        prefetch.row = find_rows(call, head, operand, rows, begin, &prefetch.count)


cdef void plan_prefetch(const Call *call, const Head *head, const Tile *tile, const Block *block,
                    qkv_prefetch_rows *prefetch) noexcept nogil:
    """What to fetch while a block's scores are computed: the keys to come and the block's values."""
    cdef int64_t end = block.begin + block.nk, last = tile.last_max
    cdef int64_t begin = end            # this block's keys were read already to be converted
    if block.keys != head.scratch + call.keys_at:
        begin = min(end, block.begin + KEYS_AHEAD)
    set_prefetch(call, head, &call.key, head.key, call.head_dim, begin,
             min(last + 1, begin + block.nk), &prefetch[0])
    set_prefetch(call, head, &call.value, head.value, call.v_dim, block.begin, min(last + 1, end),
             &prefetch[1])


cdef void load_value_rows(const Call *call, const Head *head, Block *block) noexcept nogil:
    """The block's values as rows of operands: in place, or gathered."""
    cdef char *row = head.scratch + call.values_at
    cdef Py_ssize_t count = block.nk
    if call.value.direct and in_one_page(call, head, block):
        block.value_rows = find_rows(call, head, &call.value, head.value, block.begin, &count)
        block.row_stride = call.value.row
        return
    block.value_rows = row
    block.row_stride = call.v_dim * call.operand_bytes
    memset(row, 0, block.skipped * block.row_stride)
    gather_keys(call, head, &call.value, head.value, block.begin + block.skipped,
                block.nk - block.skipped, call.v_dim, row + block.skipped * block.row_stride,
                block.row_stride)


cdef const float *load_factors(const Call *call, const Head *head, const Operand *scales,
                               char *rows, const Block *block, Py_ssize_t nk,
                               Py_ssize_t at) noexcept nogil:
    """The factors of a block's rows, one after another in the scratch; NULL: there are none."""
    cdef float *factors = <float *>(head.scratch + at)
    cdef Py_ssize_t i, count
    cdef const char *source
    if scales.data == NULL:
        return NULL
    for i in range(block.skipped):
        factors[i] = 0
    i = block.skipped
    while i < nk:
        count = nk - i
        source = find_rows(call, head, scales, rows, block.begin + i, &count)
        if scales.row == sizeof(float):
            memcpy(&factors[i], source, count * sizeof(float))
            i += count
            while count > 0:            # the next block's
                count -= <Py_ssize_t>(ALIGNMENT // sizeof(float))
                source += ALIGNMENT
                prefetch_line(source + nk * sizeof(float))
            continue
        while count > 0:
            memcpy(&factors[i], source, sizeof(float))
            source += scales.row
            count -= 1
            i += 1
    return factors


cdef struct Groups:                     # keys or values as few_rows.h takes them
    const char *rows[MAX_GROUPS]
    Py_ssize_t stride
    int type


cdef bint find_groups(const Call *call, const Head *head, const Operand *operand, char *rows,
                      int64_t begin, Py_ssize_t nk, int64_t last, Groups *groups) noexcept nogil:
    """Where each group of keys lies and those that follow up to key last; False: one is split."""
    cdef Py_ssize_t page_size = call.page_size, slot, i, step = QKV_KEY_RUN * operand.row
    cdef int count = <int>((nk + QKV_KEY_RUN - 1) // QKV_KEY_RUN), g
    cdef const int64_t *page
    cdef char *source
    if head.pages == NULL:
        source = rows + begin * operand.row
        for g in range(count + QKV_KEY_RUNS_AHEAD):
            groups.rows[g] = source
            source += step
        return True
    page = head.pages + begin // page_size
    slot = begin % page_size
    source = rows + page[0] * operand.batch_strides[0] + slot * operand.row
    for g in range(count + QKV_KEY_RUNS_AHEAD):
        groups.rows[g] = source
        i = g * QKV_KEY_RUN
        if i < nk and slot + min(<Py_ssize_t>QKV_KEY_RUN, nk - i) > page_size:
            return False
        if begin + i + QKV_KEY_RUN > last:
            continue                    # the last one again and again
        slot += QKV_KEY_RUN
        source += step
        if slot >= page_size:
            page += slot // page_size
            slot %= page_size
            source = rows + page[0] * operand.batch_strides[0] + slot * operand.row
    return True


cdef void find_turn(const Call *call, const Head *head, const Operand *operand, char *rows,
                    int64_t begin, int count, int heads, int64_t last,
                    Groups *groups) noexcept nogil:
    """Where `count` groups of keys lie, this head's first, and then those that follow in memory.

    They follow in the order of a turn: a run of keys of each of `heads` heads, then the next run.
    """
    cdef int g, h = head.number
    cdef Py_ssize_t step = QKV_KEY_RUN * operand.row, slot = begin % call.run, following = 0
    cdef char *source = find_rows(call, head, operand, rows, begin, &following)
    groups.stride = operand.row
    groups.type = operand.type
    begin -= slot
    rows -= h * operand.head
    for g in range(count + QKV_KEY_RUNS_AHEAD):
        groups.rows[g] = source
        slot += QKV_KEY_RUN
        source += step
        if slot < call.run:
            continue
        slot = 0
        h += 1
        if h == heads:
            h = 0
            if begin + call.run <= last:
                begin += call.run
        source = find_rows(call, head, operand, rows, begin, &following) + h * operand.head


cdef void load_groups(const Call *call, const Head *head, const Operand *operand, char *rows,
                      Py_ssize_t length, const Block *block, Py_ssize_t nk, int64_t last,
                      Groups *groups) noexcept nogil:
    """In place where each group lies in one page and can be widened; else gathered as reals."""
    cdef char *row = head.scratch + call.keys_at
    cdef int64_t begin = block.begin + block.skipped
    cdef int g
    nk -= block.skipped
    groups.stride = operand.row
    groups.type = operand.type
    if operand.direct and find_groups(call, head, operand, rows, begin, nk, last, groups):
        return
    groups.stride = length * call.operand_bytes
    groups.type = call.kernels.input_type
    gather_keys(call, head, operand, rows, begin, nk, length, row, groups.stride)
    for g in range((nk + QKV_KEY_RUN - 1) // QKV_KEY_RUN + QKV_KEY_RUNS_AHEAD):
        groups.rows[g] = row
        if g * QKV_KEY_RUN < nk:
            row += QKV_KEY_RUN * groups.stride


cdef inline void score_few(const Call *call, Tile *tile, const Groups *keys, int g,
                           Py_ssize_t begin, Py_ssize_t nk, Py_ssize_t ld) noexcept nogil:
    """Scores of the block's keys from `begin` on, which lie from group g on."""
    call.kernels.decode_scores(tile.S + begin * ld * call.kernels.real_bytes, ld, tile.Qt,
                            call.q_stride, <const char **>keys.rows + g, keys.stride, nk,
                            call.head_dim, tile.count, keys.type)


cdef inline void accumulate_few(const Call *call, Tile *tile, const Groups *values, int g,
                                Py_ssize_t begin, Py_ssize_t nk, Py_ssize_t ld, bint rescales,
                                bint partial) noexcept nogil:
    call.kernels.decode_accumulate(
        tile.acc, call.acc_stride, tile.S + begin * ld * call.kernels.real_bytes, ld,
        <const char **>values.rows + g, values.stride, nk, call.v_dim, tile.count,
        tile.rescale if rescales else NULL, partial, values.type)


cdef void attend_whole(const Call *call, const Head *heads, int count, int turns,
                       const Block *block, Py_ssize_t nk) noexcept nogil:
    """A step of the online softmax for few rows that all see the whole block.

    turns > 1: the heads of the task that take turns. `count` of them are here, from heads[0] on,
    and what they read is in the order of a turn. Else one head, whose keys may begin and end
    anywhere in the block.
    """
    cdef const qkv_tile_kernels *kernels = call.kernels
    cdef int first = heads.number, h, g = 0
    cdef Tile *tile = tile_of(call, heads, first)
    cdef int64_t last = tile.last_max
    cdef Py_ssize_t k, run = nk - block.skipped, ld = 1
    cdef int num_groups = <int>(count * nk // QKV_KEY_RUN)
    cdef Groups groups
    if count > 1:
        run = call.run
    while ld < tile.count:
        ld *= 2
    if turns > 1:
        find_turn(call, heads, &call.key, heads.key, block.begin, num_groups, turns, last, &groups)
    else:
        load_groups(call, heads, &call.key, heads.key, call.head_dim, block, nk, last, &groups)
    for k from block.skipped <= k < nk by run:
        for h in range(count):
            score_few(call, tile_of(call, heads, first + h), &groups, g, k, run, ld)
            g += <int>(run // QKV_KEY_RUN)
    if turns > 1:
        find_turn(call, heads, &call.value, heads.value, block.begin, num_groups, turns, last,
                  &groups)
    else:
        load_groups(call, heads, &call.value, heads.value, call.v_dim, block, nk, last, &groups)
    g = 0
    for k from block.skipped <= k < nk by run:
        for h in range(count):
            tile = tile_of(call, heads, first + h)
            if k == block.skipped:
                kernels.decode_softmax(
                    tile.S, nk, <int>ld,
                    load_factors(call, &heads[h], &call.key_scales, heads[h].key_scales, block,
                                 nk, call.factors_at),
                    load_factors(call, &heads[h], &call.value_scales, heads[h].value_scales,
                                 block, nk, call.value_factors_at),
                    tile.row_max, tile.row_sum, tile.rescale)
            accumulate_few(call, tile, &groups, g, k, run, ld, k == block.skipped, False)
            g += <int>(run // QKV_KEY_RUN)


cdef void pack_values(const Call *call, const Head *head, Block *block, const char *rows,
                      Py_ssize_t stride) noexcept nogil:
    """Value rows as accumulate wants them."""
    block.values = rows
    block.value_stride = stride
    if call.kernels.pack_values != NULL:
        block.values = head.scratch + call.packed_at
        block.value_stride = call.packed_stride
        call.kernels.pack_values(head.scratch + call.packed_at, call.packed_stride, rows, stride,
                                 block.nk, call.v_dim)


cdef void zero_nonfinite(const Call *call, const Head *head, Block *block) noexcept nogil:
    """Values with 0 for what isn't finite."""
    cdef Py_ssize_t i, row_bytes = call.v_dim * call.operand_bytes
    cdef char *row = head.gathered
    for i in range(block.nk):
        memcpy(row, block.value_rows + i * block.row_stride, row_bytes)
        qkv_zero_nonfinite(row, call.kernels.input_type, call.v_dim)
        row += row_bytes
    pack_values(call, head, block, head.gathered, row_bytes)


cdef void gather_rows(const Call *call, const char **rows, const char **source, int count,
                      Py_ssize_t length, const Operand *operand, char *gathered) noexcept nogil:
    """rows[i] = source[i], as operands with unit stride, gathered where they are not."""
    cdef int i
    for i in range(count):
        if operand.direct:
            rows[i] = source[i]
        else:
            rows[i] = gathered + i * length * call.operand_bytes
            read_row(call, <char *>rows[i], operand, source[i], length)


cdef void open_tile(const Call *call, const Head *head, Tile *tile) noexcept nogil:
    """Where every row lies and which keys are in its reach; pack the queries.

    Lanes past the last row compute it again, so that they never need a thought of their own.
    """
    cdef int real_bytes = call.kernels.real_bytes
    cdef Py_ssize_t query_head, index
    cdef int64_t position
    cdef int i
    tile.first_min = tile.last_min = UNBOUNDED
    tile.first_max = 0
    tile.last_max = -1
    tile.fresh = True
    tile.folded = False
    tile.fold = -1
    tile.seen = 0
    query_head = head.kv_head * call.group + tile.row_begin // head.q_len
    index = tile.row_begin % head.q_len
    for i in range(tile.lanes):
        position = head.offset + index
        tile.position[i] = position
        tile.query_rows[i] = (head.query + query_head * call.query.head
                              + index * call.query.row)
        tile.out_rows[i] = head.out + query_head * call.out.head + index * call.out.row
        if head.lse != NULL:
            tile.lse_rows[i] = head.lse + query_head * call.lse.head + index * call.lse.row
        if head.mask != NULL:
            tile.mask_rows[i] = head.mask + query_head * call.mask.head + index * call.mask.row
        if head.slopes != NULL:
            set_real(tile.slope, i, real_bytes,
                     (<double *>(head.slopes + query_head * call.slopes.head))[0])
        tile.first[i] = 0
        tile.last[i] = head.visible - 1
        if call.left < UNBOUNDED and position - call.left > 0:
            tile.first[i] = position - call.left
        if call.right < UNBOUNDED and position + call.right < head.visible - 1:
            tile.last[i] = position + call.right
        tile.first_min = min(tile.first_min, tile.first[i])
        tile.first_max = max(tile.first_max, tile.first[i])
        tile.last_min = min(tile.last_min, tile.last[i])
        tile.last_max = max(tile.last_max, tile.last[i])
        set_real(tile.row_max, i, real_bytes, -FLT_MAX if real_bytes == 4 else -DBL_MAX)
        set_real(tile.row_sum, i, real_bytes, 0)
        if i + 1 < tile.count:
            index += 1
            if index == head.q_len:
                index = 0
                query_head += 1
    if call.few:
        memset(tile.Qt, 0, tile.count * call.q_stride * real_bytes)
        for i in range(tile.count):
            read_reals(call, <char *>tile.Qt + i * call.q_stride * real_bytes, &call.query,
                       tile.query_rows[i], call.head_dim)
        call.kernels.scale(tile.Qt, tile.count * call.q_stride // call.kernels.lanes, 1,
                           call.query_factor)
        memset(tile.acc, 0, tile.count * call.acc_stride * real_bytes)
        memset(tile.S, 0, call.block_k * tile.lanes * real_bytes)  # lanes that are not written
        return
    gather_rows(call, tile.rows, tile.query_rows, tile.lanes, call.head_dim, &call.query,
                head.gathered)
    call.kernels.pack_rows(tile.Qt, tile.rows, call.head_dim, tile.nvec, call.query_factor)


cdef inline bint is_shared(const Operand *mask) noexcept nogil:
    """Whether all rows of a batch entry have the same mask, as for padding."""
    return mask.head == 0 and mask.row == 0


cdef bint mask_limits(const Call *call, const Head *head, int64_t begin,
                      Py_ssize_t nk) noexcept nogil:
    """Whether a boolean mask may exclude some key of a block."""
    if head.mask == NULL or call.mask.type != QKV_BOOL:
        return False
    return not (is_shared(&call.mask) and call.mask.col == 1
                and memchr(head.mask + begin, 0, nk) == NULL)


cdef uint64_t allow_in_block(const Call *call, Tile *tile, int64_t begin, Py_ssize_t nk,
                             bint masked) noexcept nogil:
    """Fill tile.allow for a block that not every row sees whole; which rows see any key."""
    cdef int real_bytes = call.kernels.real_bytes
    cdef uint64_t any_allowed = 0
    cdef const char *mask
    cdef Py_ssize_t k
    cdef int i
    memset(tile.allow, 0xff, nk * sizeof(uint64_t))
    if tile.first_max > begin or tile.last_min < begin + nk - 1:
        set_relative(tile.range_first, tile.first, begin, -1, nk, tile.lanes, real_bytes)
        set_relative(tile.range_last, tile.last, begin, -1, nk, tile.lanes, real_bytes)
        call.kernels.mask_positions(tile.allow, nk, tile.nvec, tile.range_first, tile.range_last)
    if masked:
        if is_shared(&call.mask):
            mask = tile.mask_rows[0] + begin * call.mask.col
            for k in range(nk):
                if not mask[k * call.mask.col]:
                    tile.allow[k] = 0
        else:
            for i in range(tile.lanes):
                tile.rows[i] = tile.mask_rows[i] + begin * call.mask.col
            call.kernels.mask_bool(tile.allow, nk, tile.nvec, tile.rows, call.mask.col)
    for k in range(nk):
        any_allowed |= tile.allow[k]
    return any_allowed & lane_bits(tile.lanes)


cdef inline uint64_t lane_bits(int lanes) noexcept nogil:
    return ~<uint64_t>0 >> (64 - lanes)


cdef bint sees_all(const Tile *tile, Py_ssize_t nk) noexcept nogil:
    """Whether tile.allow excludes nothing."""
    cdef uint64_t all_allowed = lane_bits(tile.lanes)
    cdef Py_ssize_t k
    for k in range(nk):
        all_allowed &= tile.allow[k]
    return all_allowed == lane_bits(tile.lanes)


cdef void find_spans(const Call *call, Tile *tile, Py_ssize_t nk) noexcept nogil:
    """Which keys each vector needs: from the first to the last that one of its lanes may see."""
    cdef int v, lanes = call.kernels.lanes
    cdef uint64_t bits = lane_bits(lanes)
    cdef int begin, end
    for v in range(tile.nvec):
        begin = 0
        end = <int>nk
        while end > 0 and not tile.allow[end - 1] & bits:
            end -= 1
        while begin < end and not tile.allow[begin] & bits:
            begin += 1
        tile.span[v].begin = begin
        tile.span[v].end = end
        bits <<= lanes


cdef void modify_scores(const Call *call, const Head *head, Tile *tile, int64_t begin,
                        Py_ssize_t nk) noexcept nogil:
    """softcap, then ALiBi and the additive mask: a new score modifier goes here."""
    cdef const qkv_tile_kernels *kernels = call.kernels
    cdef bint shared = is_shared(&call.mask)
    cdef int i
    if call.score_factor != 1:
        kernels.scale(tile.S, nk, tile.nvec, call.score_factor)
    if call.softcap != 0:
        kernels.softcap(tile.S, nk, tile.nvec, call.softcap)
    if head.slopes != NULL:
        set_relative(tile.relative, tile.position, begin, -UNBOUNDED, UNBOUNDED, tile.lanes,
                     kernels.real_bytes)
        kernels.alibi(tile.S, nk, tile.nvec, tile.slope, tile.relative)
    if head.mask != NULL and call.mask.type != QKV_BOOL:
        for i in range(1 if shared else tile.lanes):
            tile.rows[i] = tile.mask_rows[i] + begin * call.mask.col
            if not call.mask.direct:
                read_reals(call, head.gathered + i * nk * kernels.real_bytes, &call.mask,
                           tile.rows[i], nk)
                tile.rows[i] = head.gathered + i * nk * kernels.real_bytes
        kernels.bias(tile.S, nk, tile.nvec, tile.rows, shared, tile.allow)


cdef void fold_sums(const Call *call, Tile *tile, bint finish) noexcept nogil:
    """Move acc and row_sum to total and total_sum; finish: and the whole sums back."""
    cdef const qkv_tile_kernels *kernels = call.kernels
    cdef int real_bytes = kernels.real_bytes, i
    cdef Py_ssize_t row_bytes = tile.lanes * real_bytes
    cdef double before, now
    if not tile.folded:
        memset(tile.total, 0, call.v_dim * row_bytes)
        memset(tile.error, 0, call.v_dim * row_bytes)
        memset(tile.total_sum, 0, row_bytes)
        memset(tile.sum_error, 0, row_bytes)
        memcpy(tile.fold_max, tile.row_max, row_bytes)
        tile.folded = True
    for i in range(tile.lanes):
        before = get_real(tile.fold_max, i, real_bytes)
        now = get_real(tile.row_max, i, real_bytes)
        set_real(tile.rescale, i, real_bytes, 1 if before == now else exp2(before - now))
    memcpy(tile.fold_max, tile.row_max, row_bytes)
    if tile.fresh:
        memset(tile.acc, 0, call.v_dim * row_bytes)
    kernels.fold(tile.total, tile.error, tile.acc, call.v_dim, tile.nvec, tile.rescale, finish)
    kernels.fold(tile.total_sum, tile.sum_error, tile.row_sum, 1, tile.nvec, tile.rescale, finish)
    tile.fresh = not finish
    if not finish:
        memset(tile.row_sum, 0, row_bytes)


cdef void attend_block(const Call *call, const Head *head, Tile *tile,
                       Block *block) noexcept nogil:
    """One step of the online softmax: the keys of a block against one tile."""
    cdef const qkv_tile_kernels *kernels = call.kernels
    cdef int64_t begin = block.begin
    if begin > tile.last_max or begin + block.nk <= tile.first_min:
        return
    cdef Py_ssize_t nk = min(block.nk, tile.last_max + 1 - begin)
    cdef bint bias = head.mask != NULL and call.mask.type != QKV_BOOL
    cdef bint masked = mask_limits(call, head, begin, nk)
    cdef bint partial = (bias or masked or tile.first_max > begin
                         or tile.last_min < begin + nk - 1)
    cdef uint64_t seen = ~<uint64_t>0
    cdef Py_ssize_t k
    if partial:
        seen = allow_in_block(call, tile, begin, nk, masked)
        if not seen:
            return
        partial = bias or not sees_all(tile, nk)
    if partial:
        find_spans(call, tile, nk)
        while not tile.allow[nk - 1]:
            nk -= 1
    if begin // call.fold_keys != tile.fold:  # where rows are few, a tile is of one chunk
        if tile.fold >= 0:
            fold_sums(call, tile, False)
        tile.fold = begin // call.fold_keys
    cdef Py_ssize_t ld = tile.lanes
    cdef Groups groups
    cdef qkv_prefetch_rows[2] prefetch
    cdef bint fetches
    if call.few:
        if not partial and not call.modified and tile.count <= kernels.lanes:
            attend_whole(call, head, 1, 1, block, nk)
            tile.seen |= seen
            return
        load_groups(call, head, &call.key, head.key, call.head_dim, block, nk, tile.last_max,
                    &groups)
        score_few(call, tile, &groups, 0, block.skipped, nk - block.skipped, ld)
    else:
        fetches = block.keys == NULL and call.fetches
        if block.keys == NULL:
            load_keys(call, head, block)
        if fetches:
            plan_prefetch(call, head, tile, block, prefetch)
        kernels.scores(tile.S, tile.Qt, block.keys, block.key_stride, nk, call.head_dim, tile.nvec,
                       tile.span if partial else NULL, prefetch if fetches else NULL)
    if call.key_scales.data != NULL:
        kernels.scale_keys(tile.S, nk, tile.nvec, load_factors(
            call, head, &call.key_scales, head.key_scales, block, nk, call.factors_at), 0)
    if call.modified:
        modify_scores(call, head, tile, begin, nk)
    if bias:
        seen = 0
        for k in range(nk):
            seen |= tile.allow[k]
        partial = not sees_all(tile, nk)
    tile.seen |= seen
    kernels.softmax(tile.S, nk, tile.nvec, tile.allow if partial else NULL, tile.span,
                    1.0 if call.modified else call.score_factor, tile.row_max, tile.row_sum,
                    tile.rescale)
    if call.value_scales.data != NULL:
        kernels.scale_keys(tile.S, nk, tile.nvec, load_factors(
            call, head, &call.value_scales, head.value_scales, block, nk, call.factors_at), 1)
    if call.few:
        load_groups(call, head, &call.value, head.value, call.v_dim, block, nk, tile.last_max,
                    &groups)
        accumulate_few(call, tile, &groups, 0, block.skipped, nk - block.skipped, ld, True, partial)
        return
    cdef const void *rescale = NULL if tile.fresh else tile.rescale
    cdef const qkv_span *span = tile.span if partial else NULL
    tile.fresh = False
    if block.value_rows == NULL:
        load_value_rows(call, head, block)
    # A probability of 0, of an excluded key or of padding, times infinity is NaN.
    if block.finite < 0 and (partial or kernels.depth_step > 1 and nk < block.nk):
        block.finite = kernels.all_finite(block.value_rows, block.row_stride, block.nk,
                                          call.v_dim)
    if block.finite == 0 and (partial or nk < block.nk):
        # What is not finite is kept out of the product, and goes to the rows that may see it
        # afterwards.
        zero_nonfinite(call, head, block)
        kernels.accumulate(tile.acc, tile.S, block.values, block.value_stride, nk, call.v_dim,
                           tile.nvec, rescale, span)
        kernels.accumulate_nonfinite(tile.acc, tile.S, block.value_rows, block.row_stride, nk,
                               call.v_dim, tile.nvec)
        block.values = NULL
        return
    if block.values == NULL:
        pack_values(call, head, block, block.value_rows, block.row_stride)
    kernels.accumulate(tile.acc, tile.S, block.values, block.value_stride, nk, call.v_dim,
                       tile.nvec, rescale, span)


cdef void close_tile(const Call *call, const Head *head, Tile *tile) noexcept nogil:
    """Divide by the sums and write the rows."""
    cdef int real_bytes = call.kernels.real_bytes
    cdef int i
    if tile.folded:
        fold_sums(call, tile, True)
    for i in range(tile.count):
        finish_row(call, head, tile, i)
    for i in range(tile.count, tile.lanes):
        set_real(tile.weight, i, real_bytes, 0)
    if call.few:
        for i in range(tile.count):
            tile.rows[i] = <char *>tile.acc + i * call.acc_stride * real_bytes
            call.kernels.scale(<void *>tile.rows[i], call.acc_stride // call.kernels.lanes, 1,
                               get_real(tile.weight, i, real_bytes))
    else:
        if tile.fresh:
            memset(tile.acc, 0, call.v_dim * tile.lanes * real_bytes)
        if call.out.direct:
            call.kernels.store_rows(tile.out_rows, tile.count, tile.acc, call.v_dim, tile.nvec,
                                    tile.weight)
            return
        for i in range(tile.count):
            tile.rows[i] = head.gathered + i * call.v_dim * real_bytes
        call.kernels.store_rows(<char **>tile.rows, tile.count, tile.acc, call.v_dim, tile.nvec,
                                tile.weight)
    for i in range(tile.count):
        if call.out.direct:
            memcpy(tile.out_rows[i], tile.rows[i], call.v_dim * real_bytes)
        elif (call.kernels.narrow != NULL and call.out.col == 2
              and (call.out.type == QKV_FLOAT16 or call.out.type == QKV_BFLOAT16)):
            call.kernels.narrow(tile.out_rows[i], tile.rows[i], call.v_dim, call.out.type)
        else:
            qkv_write_row(tile.out_rows[i], tile.rows[i], real_bytes, call.v_dim, call.out.col,
                          call.out.type)


cdef inline int64_t entry_of(const Call *call, const Operand *operand, Py_ssize_t batch,
                             int64_t otherwise) noexcept nogil:
    """A batch entry's own number."""
    cdef char *data = batch_entry(call, operand, batch)
    return otherwise if data == NULL else (<int64_t *>data)[0]


cdef inline Py_ssize_t lanes_at_once(const Call *call) noexcept nogil:
    """What the lanes of a tile are a multiple of."""
    return call.kernels.lanes * max(1, call.fixed_nvec)


cdef inline bint rows_are_few(const Job *job, Py_ssize_t rows) noexcept nogil:
    """Whether they fill at most few_share of the vectors that a tile of them would have."""
    cdef Py_ssize_t step = lanes_at_once(&job.tiles)
    return rows <= job.few_most and rows <= job.few_share * ((rows + step - 1) // step * step)


cdef void open_sequence(const Job *job, Py_ssize_t batch, Sequence *sequence) noexcept nogil:
    """What a batch entry is, and how its rows and keys are divided into tasks."""
    cdef const Call *call = &job.tiles
    cdef const char *mask
    cdef Py_ssize_t rows, tiles
    cdef int64_t first = 0, last
    sequence.batch = batch
    sequence.q_start = entry_of(call, &call.query_starts, batch, 0)
    sequence.q_len = entry_of(call, &call.query_lengths, batch, call.q_len)
    sequence.k_start = entry_of(call, &call.key_starts, batch, 0)
    sequence.visible = entry_of(call, &call.key_lengths, batch, call.kv_len)
    sequence.offset = entry_of(call, &call.query_offset, batch, 0)
    if call.mask.data != NULL and call.mask.type == QKV_BOOL and is_shared(&call.mask):
        mask = batch_entry(call, &call.mask, batch)
        while sequence.visible > 0 and not mask[(sequence.visible - 1) * call.mask.col]:
            sequence.visible -= 1  # padding at the end is as good as key_lengths
    rows = call.group * sequence.q_len
    sequence.few = rows_are_few(job, rows)
    if not sequence.few:
        tiles = (rows + call.kernels.tile_q - 1) // call.kernels.tile_q
        sequence.tasks_per_head = (tiles + call.tiles_per_task - 1) // call.tiles_per_task
        return
    last = sequence.visible - 1
    if call.left < UNBOUNDED and sequence.offset - call.left > 0:
        first = sequence.offset - call.left
    if call.right < UNBOUNDED:
        last = min(last, sequence.offset + sequence.q_len - 1 + call.right)
    sequence.first_chunk = first // CHUNK
    sequence.tasks_per_head = 0
    if rows > 0:
        sequence.tasks_per_head = 1
        if last >= first:
            sequence.tasks_per_head = last // CHUNK - sequence.first_chunk + 1


cdef inline void move_head(const Call *call, Head *head, Py_ssize_t by) noexcept nogil:
    """To the KV head that is so many further on."""
    head.kv_head += by
    head.key += by * call.key.head
    head.value += by * call.value.head
    head.key_scales += by * call.key_scales.head
    head.value_scales += by * call.value_scales.head


cdef void run_task(const Job *job, int thread, Py_ssize_t task) noexcept nogil:
    # Tasks of a head stand together (they share its keys), the last queries first: with causal
    # masks those are the largest.
    cdef Py_ssize_t low = 0, high = job.batches, middle
    cdef Sequence sequence
    cdef Head head
    cdef char *scratch = job.scratch + thread * job.scratch_bytes
    while high - low > 1:
        middle = (low + high) // 2
        if job.places[middle].task <= task:
            low = middle
        else:
            high = middle
    task -= job.places[low].task
    open_sequence(job, low, &sequence)
    cdef const Call *call = &job.few if sequence.few else &job.tiles
    cdef Py_ssize_t kv_head = task // sequence.tasks_per_head * call.heads_per_task
    task %= sequence.tasks_per_head
    head.kv_head = 0
    head.number = 0
    head.q_len = sequence.q_len
    head.query = batch_entry(call, &call.query, low) + sequence.q_start * call.query.row
    head.out = batch_entry(call, &call.out, low) + sequence.q_start * call.out.row
    head.lse = batch_entry(call, &call.lse, low)
    if head.lse != NULL:
        head.lse += sequence.q_start * call.lse.row
    head.pages = NULL
    head.key = call.key.data
    head.value = call.value.data
    head.key_scales = call.key_scales.data
    head.value_scales = call.value_scales.data
    if call.block_table.data != NULL:
        head.pages = <const int64_t *>batch_entry(call, &call.block_table, low)
    else:
        head.key = batch_entry(call, &call.key, low) + sequence.k_start * call.key.row
        head.value = batch_entry(call, &call.value, low) + sequence.k_start * call.value.row
        head.key_scales = batch_entry(call, &call.key_scales, low)
        head.value_scales = batch_entry(call, &call.value_scales, low)
    move_head(call, &head, kv_head)
    head.mask = batch_entry(call, &call.mask, low)
    head.slopes = batch_entry(call, &call.slopes, low)
    head.offset = sequence.offset
    head.visible = sequence.visible
    head.on_caller = thread == 0
    head.scratch = scratch
    head.gathered = scratch + call.gathered_at
    if call.kernels.enter != NULL:
        call.kernels.enter()
    if sequence.few:
        run_chunk(job, call, &head, &sequence, task)
    else:
        run_tiles(call, &head, sequence.tasks_per_head - 1 - task)
    if call.kernels.leave != NULL:
        call.kernels.leave()


cdef Tile *open_next(const Call *call, const Head *head, int number,
                     Py_ssize_t row_begin, Py_ssize_t rows) noexcept nogil:
    """The task's tile of that number, opened, with `rows` from row_begin on."""
    cdef Tile *tile = tile_of(call, head, number)
    tile.Qt = <char *>tile + TILE_BYTES
    tile.acc = <char *>tile + call.acc_at
    tile.total = <char *>tile + call.total_at
    tile.error = <char *>tile + call.error_at
    tile.S = head.scratch if call.heads_per_task == 1 else <char *>tile + call.S_at
    tile.row_begin = row_begin
    tile.count = <int>rows
    tile.nvec = (tile.count + call.kernels.lanes - 1) // call.kernels.lanes
    if call.fixed_nvec:
        tile.nvec = call.fixed_nvec
    tile.lanes = tile.nvec * call.kernels.lanes
    open_tile(call, head, tile)
    return tile


cdef void attend_turn(const Call *call, const Head *heads, int count, int64_t begin) noexcept nogil:
    """The keys from `begin` on, which the rows of all heads see, in the order of a turn."""
    cdef int together = count if call.run < call.block_k else 1, i
    cdef int64_t key
    cdef Block block
    memset(&block, 0, sizeof(Block))
    for i from 0 <= i < count by together:
        for key from begin <= key < begin + call.turn by call.block_k:
            block.begin = key
            attend_whole(call, &heads[i], together, count, &block, call.block_k)
    for i in range(count):
        tile_of(call, heads, i).seen = ~<uint64_t>0


cdef void attend_keys(const Call *call, const Head *heads, int num_heads, int tiles, int64_t first,
                      int64_t last) noexcept nogil:
    """The keys first to last, block by block, against open tiles: all of a head, or one of each."""
    cdef const Tile *tile = tile_of(call, heads, 0)
    cdef bint turns = num_heads > 1 and tile.count <= call.kernels.lanes
    cdef Block block
    cdef int i
    cdef int64_t begin = first // call.block_k * call.block_k
    cdef Py_ssize_t blocks = 0
    while begin <= last and not call.interrupt.stop:
        blocks += 1
        if blocks >= call.blocks_per_look and heads.on_caller:
            blocks = 0
            look_for_signals(call.interrupt)
        if (turns and begin % call.turn == 0 and begin >= tile.first_max
                and begin + call.turn - 1 <= min(tile.last_min, last)):
            attend_turn(call, heads, num_heads, begin)
            begin += call.turn
            continue
        memset(&block, 0, sizeof(Block))
        block.begin = begin
        block.nk = min(call.block_k, last + 1 - begin)
        block.skipped = max(0, first - begin)
        block.finite = -1
        for i in range(tiles):
            attend_block(call, &heads[i if num_heads > 1 else 0], tile_of(call, heads, i), &block)
        begin += call.block_k


cdef void run_tiles(const Call *call, const Head *head, Py_ssize_t part) noexcept nogil:
    cdef Py_ssize_t rows = call.group * head.q_len
    cdef Py_ssize_t row_begin = part * call.tiles_per_task * call.kernels.tile_q
    cdef int tiles = 0, i
    cdef int64_t first = UNBOUNDED, last = -1
    cdef Tile *tile
    while tiles < call.tiles_per_task and row_begin < rows:
        tile = open_next(call, head, tiles, row_begin,
                         min(<Py_ssize_t>call.kernels.tile_q, rows - row_begin))
        first = min(first, tile.first_min)
        last = max(last, tile.last_max)
        row_begin += call.kernels.tile_q
        tiles += 1
    attend_keys(call, head, 1, tiles, first, last)
    if call.interrupt.stop:
        return
    for i in range(tiles):
        close_tile(call, head, tile_of(call, head, i))


cdef void run_chunk(const Job *job, const Call *call, const Head *head, const Sequence *sequence,
                    Py_ssize_t chunk) noexcept nogil:
    """All rows of the task's KV groups against a chunk of the keys."""
    cdef int count = <int>min(call.heads_per_task, call.num_kv_heads - head.kv_head), i
    cdef Head heads[MAX_HEADS]
    cdef Tile *tile = NULL
    cdef int64_t begin = (sequence.first_chunk + chunk) * CHUNK
    cdef char *parts
    for i in range(count):
        heads[i] = head[0]
        heads[i].number = i
        move_head(call, &heads[i], i)
        tile = open_next(call, &heads[i], i, 0, call.group * head.q_len)
    attend_keys(call, heads, count, count, max(begin, tile.first_min),
                min(begin + CHUNK - 1, tile.last_max))
    if call.interrupt.stop:
        return
    for i in range(count):
        tile = tile_of(call, head, i)
        if sequence.tasks_per_head > 1:
            parts = job.parts + (job.places[sequence.batch].part
                                 + heads[i].kv_head * sequence.tasks_per_head) * job.part_bytes
            save_part(call, tile, parts + chunk * job.part_bytes)
            if take_one(&(<Part *>parts).remaining, 1) > 0:
                continue
            merge_parts(call, head, tile, parts, job.part_bytes, sequence.tasks_per_head)
        close_tile(call, &heads[i], tile)


cdef void save_part(const Call *call, const Tile *tile, char *memory) noexcept nogil:
    cdef Part *part = <Part *>memory
    cdef Py_ssize_t bytes = tile.count * call.kernels.real_bytes
    part.seen = tile.seen
    memory += round_up(sizeof(Part))
    memcpy(memory, tile.row_max, bytes)
    memcpy(memory + bytes, tile.row_sum, bytes)
    memcpy(memory + 2 * bytes, tile.acc, bytes * call.acc_stride)


cdef void merge_parts(const Call *call, const Head *head, Tile *tile, const char *parts,
                      Py_ssize_t part_bytes, Py_ssize_t count) noexcept nogil:
    """The chunks' partial results, in their order whichever ended first, summed in double."""
    cdef int real_bytes = call.kernels.real_bytes, r
    cdef Py_ssize_t i, bytes = tile.count * real_bytes
    cdef double *total = <double *>head.gathered
    cdef const char *part
    cdef char *acc
    cdef double top, row_sum, weight
    tile.seen = 0
    for i in range(count):
        tile.seen |= (<const Part *>(parts + i * part_bytes)).seen
    parts += round_up(sizeof(Part))
    for r in range(tile.count):
        top = get_real(parts, r, real_bytes)
        for i in range(1, count):
            weight = get_real(parts + i * part_bytes, r, real_bytes)
            if weight > top:
                top = weight
        row_sum = 0
        memset(total, 0, call.acc_stride * sizeof(double))
        for i in range(count):
            part = parts + i * part_bytes
            weight = exp2(get_real(part, r, real_bytes) - top)
            row_sum += weight * get_real(part + bytes, r, real_bytes)
            part += 2 * bytes + r * call.acc_stride * real_bytes
            if real_bytes == 4:
                add_weighted(total, weight, <const float *>part, call.acc_stride)
            else:
                add_weighted(total, weight, <const double *>part, call.acc_stride)
        set_real(tile.row_max, r, real_bytes, top)
        set_real(tile.row_sum, r, real_bytes, row_sum)
        acc = <char *>tile.acc + r * call.acc_stride * real_bytes
        for i in range(call.acc_stride):
            set_real(acc, <int>i, real_bytes, total[i])


ctypedef fused real:
    float
    double


cdef void add_weighted(double *total, double weight, const real *part,
                       Py_ssize_t length) noexcept nogil:
    """total += weight * part"""
    cdef Py_ssize_t i
    for i in range(length):
        total[i] += weight * part[i]


cdef void finish_row(const Call *call, const Head *head, Tile *tile, int i) noexcept nogil:
    """The factor that turns a row of acc into the answer, and the row's log-sum-exp.

    With a sink s (log2 units) the denominator is l + 2^(s - m); both are scaled to the larger
    of m and s first.
    """
    cdef int real_bytes = call.kernels.real_bytes
    cdef bint seen = tile.seen >> i & 1
    cdef double row_max = get_real(tile.row_max, i, real_bytes)
    cdef double row_sum = get_real(tile.row_sum, i, real_bytes)
    cdef double lowest = -FLT_MAX if real_bytes == 4 else -DBL_MAX
    cdef double weight = 0, sink, top
    if seen:
        weight = 1 / row_sum
        if call.sinks != NULL:
            sink = call.sinks[head.kv_head * call.group
                              + (tile.row_begin + i) // head.q_len] * LOG2E
            top = sink if sink > row_max else row_max
            if sink == INFINITY:
                weight = 0 * row_sum
            else:
                weight = exp2(row_max - top)
                weight = weight / (row_sum * weight + exp2(sink - top))
    set_real(tile.weight, i, real_bytes, weight)
    if head.lse == NULL:
        return
    if not seen:
        set_real(tile.lse_rows[i], 0, real_bytes, -INFINITY)
    else:  # a bias of finfo.min was clamped to it in log2 units: see tile_tmpl.h
        set_real(tile.lse_rows[i], 0, real_bytes,
                 (row_max if row_max == lowest else row_max * LN2) + log(row_sum))


# --- The one place where threads are used ---------------------------------------------------

cdef int active_calls = 0       # changed with the GIL held only


cdef void run_pool_task(const void *context, int thread, Py_ssize_t task) noexcept nogil:
    cdef const Job *job = <const Job *>context
    cdef double begin
    if thread == 0 and task > 0:
        look_for_signals(job.tiles.interrupt)
    if job.tiles.interrupt.stop:
        return
    if job.busy == NULL:
        run_task(job, thread, task)
        return
    begin = seconds_now()
    run_task(job, thread, task)
    job.busy[thread] += seconds_now() - begin


cdef void wait_for_tasks(const void *context) noexcept nogil:
    """What the calling thread does while others are at work on the last tasks."""
    look_for_signals((<const Job *>context).tiles.interrupt)


cdef void run_tasks(const Job *job, int threads) noexcept nogil:
    """All tasks of a job on at most `threads` threads: by our pool, or OpenMP if so built.

    OpenMP's calling thread can't look for signals while it waits for the others' last tasks.
    """
    cdef Py_ssize_t task, tasks = job.places[job.batches].task
    if threads <= 1:
        for task in range(tasks):
            run_pool_task(job, 0, task)
    elif QKV_OPENMP:
        for task in prange(tasks, num_threads=threads, schedule="dynamic", chunksize=1):
            run_pool_task(job, threadid(), task)
    else:
        qkv_run_tasks(run_pool_task, wait_for_tasks, job, tasks, threads)


cdef int raise_pending(const Interrupt *interrupt) except -1:
    """Raise what a signal's handler has raised."""
    return -1 if interrupt.stop else 0


cdef int threads_for(double work, int budget) noexcept:
    """The caller's budget, shared with the other callers of the moment, as far as it pays."""
    if qkv_forked() or work < SERIAL_WORK:
        return 1
    if active_calls > 1:
        budget = max(1, budget // active_calls)
    return budget


# --- Scratch: kept between calls ------------------------------------------------------------

cdef size_t KEPT_BYTES = 32 << 20       # a larger arena is given back at once


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


cdef list idle_arenas = []      # one for each call that ever ran at the same time as the others


cdef Arena take_arena(size_t size):
    cdef Arena arena
    if idle_arenas:
        arena = idle_arenas.pop()
        if arena.size >= size:
            return arena
    return Arena(size)


# --- From a Problem to a Call ---------------------------------------------------------------

cdef qkv_tile_kernels blas_tables[MAX_TABLES][2]
cdef bint blas_loaded = False


def load_blas():
    """Import scipy's BLAS and make the BLAS tile tables: a SIMD table with GEMM for products."""
    global blas_loaded
    from . import _blas

    cdef int index, wide
    for index in range(len(isas())):
        for wide in range(2):
            blas_tables[index][wide] = qkv_tile_table(
                index, QKV_FLOAT64 if wide else QKV_FLOAT32)[0]
            blas_tables[index][wide].tile_q = MAX_LANES
            _blas.install(<size_t>&blas_tables[index][wide].scores,
                          <size_t>&blas_tables[index][wide].accumulate, wide)
    blas_loaded = True


# OpenBLAS has room for so many threads, with a buffer each that it waits for without end where
# there is no memory for it.
cdef int MOST_BLAS_THREADS = 64
cdef size_t BLAS_BUFFER = 48 << 20      # 32 MiB, and a thread's stack
cdef int blas_threads_seen = 0


cdef int blas_threads(int budget) except -1:
    """As many threads as may call BLAS: no more than there are CPUs, and memory for their buffers."""
    global blas_threads_seen
    cdef void *probe
    budget = min(budget, MOST_BLAS_THREADS, <int>_threads.cpus())
    if budget > blas_threads_seen:
        probe = malloc(<size_t>(budget - blas_threads_seen) * BLAS_BUFFER)
        if probe == NULL:
            raise MemoryError(f"no memory for the buffers of BLAS on {budget} threads")
        free(probe)
        blas_threads_seen = budget
    return budget


cdef dict isa_index = {}    # of those that run
cdef int each = 0
while qkv_isa_name(each) != NULL:
    if qkv_isa_runs(each):
        isa_index[qkv_isa_name(each).decode()] = each
    each += 1


def isas():
    """Names of the ISAs that this machine can execute, weakest first."""
    return tuple(isa_index)


cdef const qkv_tile_kernels *table_of(int index, int type) noexcept:
    """The kernels that an ISA has for an element type: those of float, where none are its own."""
    cdef const qkv_tile_kernels *kernels = qkv_tile_table(index, type)
    return qkv_tile_table(index, QKV_FLOAT32) if kernels == NULL else kernels


def best_isa(int type):
    """Name of the weakest ISA with the fastest kernels for an element type."""
    cdef int index, best = 0
    for index in isa_index.values():
        if qkv_isa_is_profitable(index) and table_of(index, type) != table_of(best, type):
            best = index
    return qkv_isa_name(best).decode()


def info():
    """Facts about this build, for show_config()."""
    return {"compiler": QKV_COMPILER.decode(),
            "threading": f"OpenMP {QKV_OPENMP}" if QKV_OPENMP else "own pool"}


cdef Py_ssize_t FMA_ROUNDS = 100_000


cdef void run_fma_task(const void *context, int thread, Py_ssize_t task) noexcept nogil:
    cdef const qkv_tile_kernels *kernels = <const qkv_tile_kernels *>context
    if kernels.enter != NULL:
        kernels.enter()
    kernels.fma_chain(FMA_ROUNDS)
    if kernels.leave != NULL:
        kernels.leave()


def fma_peak(int threads, double seconds=0.2, int type=QKV_FLOAT32, isa=None):
    """GFLOP/s of multiply-adds in registers as the kernels for a type do them: the speed limit."""
    cdef const qkv_tile_kernels *kernels = table_of(isa_index[isa or best_isa(type)], type)
    rounds = 0
    begin = time.perf_counter()
    elapsed = 0.0
    while elapsed < seconds:
        with nogil:
            qkv_run_tasks(run_fma_task, NULL, kernels, 8 * threads, threads)
        rounds += 1
        elapsed = time.perf_counter() - begin
    return 8e-9 * threads * rounds * FMA_ROUNDS * kernels.fma_chain_flop / elapsed


cdef struct Memory:
    const uint64_t *words
    Py_ssize_t count


cdef Py_ssize_t WORDS_PER_TASK = 1 << 17
cdef uint64_t memory_sum = 0


cdef void run_read_task(const void *context, int thread, Py_ssize_t task) noexcept nogil:
    cdef const Memory *memory = <const Memory *>context
    cdef Py_ssize_t i = task * WORDS_PER_TASK
    cdef uint64_t total = 0
    global memory_sum
    for i in range(i, min(memory.count, i + WORDS_PER_TASK)):
        total += memory.words[i]
    memory_sum += total     # whatever it is: so that the compiler leaves the loop in


def read_once(arrays, int threads):
    """Seconds in which the threads read contiguous arrays from end to end, and do nothing else."""
    cdef Memory memory
    cdef cnp.ndarray array
    begin = time.perf_counter()
    for array in arrays:
        memory.words = <const uint64_t *>cnp.PyArray_DATA(array)
        memory.count = cnp.PyArray_NBYTES(array) // 8
        with nogil:
            qkv_run_tasks(run_read_task, NULL, &memory,
                          (memory.count + WORDS_PER_TASK - 1) // WORDS_PER_TASK, threads)
    return time.perf_counter() - begin


def read_bandwidth(int threads, double seconds=0.2, Py_ssize_t megabytes=256):
    """GB/s at which the threads read so much memory, again and again: the other limit."""
    cdef cnp.npy_intp size = megabytes << 17
    cdef cnp.ndarray array = cnp.PyArray_ZEROS(1, &size, cnp.NPY_UINT64, 0)
    array.fill(0)       # touched, so that each page is memory of its own
    rounds = 0
    elapsed = 0.0
    while elapsed < seconds:
        elapsed += read_once([array], threads)
        rounds += 1
    return rounds * megabytes * 2.0 ** 20 / elapsed / 1e9


cdef void set_operand(Operand *operand, cnp.ndarray array, int type, Py_ssize_t batch_ndim,
                      int direct_type) noexcept:
    """(*batch, heads, rows, columns); an axis of one element has no say in `direct`."""
    cdef cnp.npy_intp *strides = cnp.PyArray_STRIDES(array)
    cdef cnp.npy_intp *shape = cnp.PyArray_DIMS(array)
    cdef Py_ssize_t item = 2 if direct_type == QKV_BFLOAT16 else 8 if direct_type == QKV_FLOAT64 else 4
    operand.data = <char *>cnp.PyArray_DATA(array)
    operand.batch_strides = strides
    operand.head = strides[batch_ndim]
    operand.row = strides[batch_ndim + 1]
    operand.col = strides[batch_ndim + 2]
    operand.type = type
    operand.direct = type == direct_type and (
        operand.col == item or shape[batch_ndim + 2] <= 1)


cdef void limit_to_blas(Operand *operand, Py_ssize_t length, int real_bytes) noexcept:
    """GEMM wants aligned rows one after another, their distance an int."""
    cdef Py_ssize_t columns = operand.row // real_bytes
    if (operand.row % real_bytes != 0 or columns < length or columns > 0x7fffffff):
        operand.direct = False
    if <uintptr_t>operand.data % real_bytes != 0:
        operand.direct = False


cdef void set_vector(Operand *operand, cnp.ndarray array, Py_ssize_t batch_ndim) noexcept:
    """(*batch), (*batch, heads) or (*batch, heads, rows)"""
    operand.data = <char *>cnp.PyArray_DATA(array)
    operand.batch_strides = cnp.PyArray_STRIDES(array)
    if cnp.PyArray_NDIM(array) > batch_ndim:
        operand.head = cnp.PyArray_STRIDES(array)[batch_ndim]
    if cnp.PyArray_NDIM(array) > batch_ndim + 1:
        operand.row = cnp.PyArray_STRIDES(array)[batch_ndim + 1]


cdef void note_widened(Operand *operand, cnp.ndarray array, int real_bytes) noexcept:
    """`direct` also for the types that the kernels for few rows widen."""
    cdef Py_ssize_t item = 1 if operand.type == QKV_INT8 else 2
    if real_bytes == 4 and (operand.type == QKV_FLOAT16 or operand.type == QKV_BFLOAT16
                            or operand.type == QKV_INT8):
        operand.direct = (operand.col == item
                          or cnp.PyArray_DIMS(array)[cnp.PyArray_NDIM(array) - 1] <= 1)


cdef void set_turns(Call *call) noexcept:
    """In what order several heads of a task read, if that is of use: see LONG_RUN.

    run: keys of a head that lie together, before those of the next one. turn: whole blocks and
    whole runs, after which all heads are as far. 0: heads don't take turns.
    """
    cdef Py_ssize_t run = 0
    if abs(call.key.head) < abs(call.key.row):
        run = QKV_KEY_RUN
    elif call.page_size * call.key.row < LONG_RUN:
        run = call.page_size
    if (run == 0 or run % QKV_KEY_RUN or call.page_size % run
            or not call.key.direct or not call.value.direct
            or call.modified or call.mask.data != NULL or max(call.head_dim, call.v_dim) > WIDE):
        return
    call.turn = max(run, call.block_k)
    if call.turn % run == 0 and call.turn % call.block_k == 0 and CHUNK % call.turn == 0:
        call.run = run


cdef Py_ssize_t heads_in_turn(const Call *call, Py_ssize_t tasks, Py_ssize_t threads) noexcept:
    """The KV heads of a task, if there are so many tasks of one."""
    cdef Py_ssize_t heads = min(<Py_ssize_t>MAX_HEADS, call.num_kv_heads)
    if call.run == 0:
        return 1
    while heads > 1 and tasks < heads * TASKS_IF_PACKED * threads:
        heads = (heads + 1) // 2
    return heads


cdef void prepare(Call *call, problem, const qkv_tile_kernels *kernels, bint few,
                  Interrupt *interrupt) except *:
    """Fill a Call, for tiles or for few rows, with these kernels."""
    cdef cnp.ndarray query = problem.query, key = problem.key, value = problem.value
    cdef cnp.ndarray out = problem.out, sinks
    cdef int real_type = QKV_FLOAT64 if kernels.real_bytes == 8 else QKV_FLOAT32
    cdef Py_ssize_t nb = cnp.PyArray_NDIM(query) - 3
    cdef cnp.npy_intp *shape = cnp.PyArray_DIMS(query)
    memset(call, 0, sizeof(Call))
    call.kernels = kernels
    call.interrupt = interrupt
    call.few = few
    call.batch_ndim = nb
    call.batch_shape = shape
    call.num_kv_heads = cnp.PyArray_DIMS(key)[nb]
    call.group = shape[nb] // call.num_kv_heads
    call.q_len = shape[nb + 1]
    call.head_dim = shape[nb + 2]
    call.kv_len = problem.kv_len
    call.v_dim = cnp.PyArray_DIMS(value)[nb + 2]
    set_operand(&call.query, query, problem.query_code, nb, kernels.input_type)
    set_operand(&call.key, key, problem.key_code, nb, kernels.input_type)
    set_operand(&call.value, value, problem.value_code, nb, kernels.input_type)
    set_operand(&call.out, out, problem.out_code, nb, real_type)
    if few:
        note_widened(&call.key, key, kernels.real_bytes)
        note_widened(&call.value, value, kernels.real_bytes)
    if problem.attn_mask is not None:
        set_operand(&call.mask, problem.attn_mask, problem.mask_code, nb, real_type)
    if problem.block_table is not None:
        set_vector(&call.block_table, problem.block_table, 1)
        call.page_size = cnp.PyArray_DIMS(key)[nb + 1]
    if problem.key_scales is not None:
        set_vector(&call.key_scales, problem.key_scales, nb)
    if problem.value_scales is not None:
        set_vector(&call.value_scales, problem.value_scales, nb)
    if problem.query_offset is not None:
        set_vector(&call.query_offset, problem.query_offset, nb)
    if problem.query_starts is not None:
        set_vector(&call.query_starts, problem.query_starts, nb)
        set_vector(&call.query_lengths, problem.query_lengths, nb)
        set_vector(&call.key_starts, problem.key_starts, nb)
    if problem.key_lengths is not None:
        set_vector(&call.key_lengths, problem.key_lengths, nb)
    if problem.alibi_slopes is not None:
        set_vector(&call.slopes, problem.alibi_slopes, nb)
    if problem.sinks is not None:
        sinks = problem.sinks
        call.sinks = <const double *>cnp.PyArray_DATA(sinks)
    if problem.lse is not None:
        set_vector(&call.lse, problem.lse, nb)
    call.softcap = problem.softcap
    call.modified = (call.softcap != 0 or call.slopes.data != NULL
                     or call.mask.data != NULL and call.mask.type != QKV_BOOL)
    call.query_factor = problem.scale * LOG2E
    call.score_factor = 1
    if kernels.input_type == QKV_BFLOAT16:  # queries stay as they are: no rounding but the caller's
        call.score_factor = abs(call.query_factor)
        call.query_factor = -1 if call.query_factor < 0 else 1
    call.left = problem.left
    call.right = problem.right
    call.tiles_per_task = call.heads_per_task = 1
    call.operand_bytes = 2 if kernels.input_type == QKV_BFLOAT16 else kernels.real_bytes
    cdef Py_ssize_t widest = max(call.head_dim, call.v_dim)
    if widest > (<Py_ssize_t>1 << 40):
        raise MemoryError(f"no memory for tiles of head size {widest}")
    call.block_k = BLOCK_K if widest <= WIDE else BLOCK_K_WIDE
    if kernels.row_step > 1 and LARGE < widest <= WIDE:
        call.block_k = BLOCK_K_MATRIX
    if few:
        call.block_k = min(call.block_k, BLOCK_K_FEW_HALF if size_of(call.key.type) == 2
                           else BLOCK_K_FEW)
        set_turns(call)
    call.fold_keys = FOLD_KEYS_PAIRS if kernels.input_type == QKV_BFLOAT16 else FOLD_KEYS
    call.blocks_per_look = max(1, <Py_ssize_t>(
        CLOCK_WORK / (<double>MAX_ROWS_PER_TASK * call.block_k * (call.head_dim + call.v_dim))))


cdef void lay_out_scratch(Call *call, Py_ssize_t rows) noexcept:
    """Where everything lies in a thread's scratch; rows: of a tile, whole vectors."""
    cdef const qkv_tile_kernels *kernels = call.kernels
    cdef Py_ssize_t row_bytes = rows * kernels.real_bytes
    cdef Py_ssize_t widest = max(call.head_dim, call.v_dim)
    cdef Py_ssize_t keys = (call.block_k + PACKED_STEP - 1) // PACKED_STEP * PACKED_STEP
    cdef Py_ssize_t depth = (call.head_dim + PACKED_STEP - 1) // PACKED_STEP * PACKED_STEP
    cdef Py_ssize_t v_depth = (call.v_dim + PACKED_STEP - 1) // PACKED_STEP * PACKED_STEP
    cdef Py_ssize_t step = kernels.depth_step
    call.q_stride = (call.head_dim + kernels.lanes - 1) // kernels.lanes * kernels.lanes
    call.acc_stride = (call.v_dim + kernels.lanes - 1) // kernels.lanes * kernels.lanes
    call.key_bytes = (call.head_dim + step - 1) // step * step * call.operand_bytes
    call.packed_stride = keys * call.operand_bytes
    call.gathered_at = round_up(keys * row_bytes)
    call.keys_at = call.gathered_at + round_up(
        max(call.block_k, rows) * max(widest, call.block_k) * kernels.real_bytes)
    call.values_at = call.keys_at + round_up(
        keys * max(call.key_bytes, call.v_dim * call.operand_bytes))
    call.packed_at = call.values_at + round_up(keys * call.v_dim * call.operand_bytes)
    call.factors_at = call.packed_at
    if kernels.pack_values != NULL:
        call.factors_at += round_up(v_depth * call.packed_stride)
    cdef Py_ssize_t factors = round_up((keys + kernels.lanes) * sizeof(float))
    call.value_factors_at = call.factors_at + factors
    call.tiles_at = call.value_factors_at + factors
    call.acc_at = TILE_BYTES + round_up(depth * row_bytes)
    if call.few:
        # Q at a page's begin and acc half a page on: had few_rows.h just written to where in a page
        # it asks for values next, it would wait (7 % of bfloat16 from memory, if acc is at 3200).
        call.tiles_at = round_up(call.tiles_at + TILE_BYTES, PAGE) - TILE_BYTES
        call.acc_at = TILE_BYTES + round_up(depth * row_bytes, PAGE) + PAGE // 2
    call.total_at = call.acc_at + round_up(v_depth * row_bytes)
    call.error_at = call.S_at = call.total_at
    if not call.few and call.kv_len > call.fold_keys:
        call.error_at = call.total_at + round_up(call.v_dim * row_bytes)
        call.S_at = call.error_at + round_up(call.v_dim * row_bytes)
    call.tile_bytes = call.S_at
    if call.heads_per_task > 1:  # and spread over the sets of the caches
        call.tile_bytes = round_up(call.S_at + keys * row_bytes, PAGE) + PAGE // 2 + PAGE // 8
    call.scratch_bytes = round_up(
        call.tiles_at + call.tiles_per_task * call.heads_per_task * call.tile_bytes, PAGE)


cdef double place_tasks(const Job *job, Place *totals) noexcept nogil:
    """Fill the job's places, if it has any; return the multiply-adds to be done, roughly."""
    cdef const Call *call = &job.tiles
    cdef Sequence sequence
    cdef Place place
    cdef double work = 0
    cdef Py_ssize_t batch, heads
    memset(&place, 0, sizeof(Place))
    for batch in range(job.batches):
        if batch % BATCHES_PER_LOOK == BATCHES_PER_LOOK - 1:
            look_for_signals(call.interrupt)
            if call.interrupt.stop:
                break
        if job.places != NULL:
            job.places[batch] = place
        open_sequence(job, batch, &sequence)
        heads = job.few.heads_per_task if sequence.few else 1
        place.task += (call.num_kv_heads + heads - 1) // heads * sequence.tasks_per_head
        if sequence.few and sequence.tasks_per_head > 1:
            place.part += call.num_kv_heads * sequence.tasks_per_head
        # Few rows wait for memory as long as four would compute.
        work += <double>max(4, call.group * sequence.q_len) * sequence.visible
    if job.places != NULL:
        job.places[job.batches] = place
    totals[0] = place
    return work * call.num_kv_heads * (call.head_dim + call.v_dim)


cdef void count_chunks(const Job *job) noexcept nogil:
    """Note in the first part of each head that is split how many chunks have not ended."""
    cdef Sequence sequence
    cdef Py_ssize_t batch, part
    for batch in range(job.batches):
        part = job.places[batch].part
        if part == job.places[batch + 1].part:
            continue
        open_sequence(job, batch, &sequence)
        while part < job.places[batch + 1].part:
            (<Part *>(job.parts + part * job.part_bytes)).remaining = sequence.tasks_per_head
            part += sequence.tasks_per_head


def announce():
    """Keep threads awake that have just done a call's work: another call has begun."""
    qkv_notify_call_start()


def run(problem, str tiles, str isa, double few_share=0, double few_share_converted=0,
        cnp.ndarray busy=None):
    """Compute a Problem (see _problem.py) into its `out` and `lse`.

    few_share, few_share_converted: _backend.few_shares(); 0 for tiles alone. busy: float64, one for
    each thread, to which the seconds are added that it was in tasks.
    """
    global active_calls
    cdef bint wide = problem.code == QKV_FLOAT64
    cdef int index = isa_index[isa]
    cdef const qkv_tile_kernels *kernels
    cdef Job job
    cdef cnp.ndarray query = problem.query, key = problem.key
    cdef Py_ssize_t axis
    if cnp.PyArray_SIZE(problem.out) == 0 and (
            problem.lse is None or cnp.PyArray_SIZE(problem.lse) == 0):
        return
    if cnp.PyArray_DIMS(key)[cnp.PyArray_NDIM(query) - 3] == 0:  # no heads
        return
    memset(&job, 0, sizeof(Job))
    job.few.heads_per_task = 1
    if tiles == "blas":
        if not blas_loaded:
            load_blas()
        kernels = &blas_tables[index][wide]
    else:
        kernels = table_of(index, problem.code)
    prepare(&job.tiles, problem, kernels, False, &job.interrupt)
    if tiles == "blas":
        job.tiles.fixed_nvec = kernels.tile_q // kernels.lanes
        limit_to_blas(&job.tiles.key, job.tiles.head_dim, kernels.real_bytes)
        limit_to_blas(&job.tiles.value, job.tiles.v_dim, kernels.real_bytes)
    cdef Call *call = &job.tiles
    cdef const qkv_tile_kernels *few = table_of(index, QKV_FLOAT64 if wide else QKV_FLOAT32)
    job.few_share = few_share if call.key.direct and call.value.direct else few_share_converted
    job.few_most = min(FEW_MOST, <Py_ssize_t>few.tile_q) if job.few_share > 0 else 0
    if call.key.direct and call.value.direct:  # tiles of several vectors are always faster
        job.few_most = min(job.few_most, lanes_at_once(call))
    job.batches = 1
    for axis in range(call.batch_ndim):
        job.batches *= call.batch_shape[axis]
    cdef int budget = problem.num_threads
    if tiles == "blas":
        budget = blas_threads(budget)
    cdef Place totals
    if job.few_most > 0:
        prepare(&job.few, problem, few, True, &job.interrupt)
    cdef double work
    if job.batches < BATCHES_PER_LOOK:      # too short to let go of the GIL for it
        work = place_tasks(&job, &totals)
    else:
        with nogil:
            work = place_tasks(&job, &totals)
        raise_pending(&job.interrupt)
    # Keys and values that must be converted, packed or looked at once for several tiles, or fetched
    # from far.
    if (not call.key.direct or not call.value.direct or kernels.pack_values != NULL
            or call.mask.data != NULL or call.page_size != 0
            or call.kv_len * (call.head_dim + call.v_dim) * call.operand_bytes > SHARED_KEYS):
        while (call.tiles_per_task * kernels.tile_q < MAX_ROWS_PER_TASK
               and totals.task >= 2 * call.tiles_per_task * budget
               * (TASKS_IF_PACKED if kernels.pack_values != NULL else TASKS_PER_THREAD)):
            call.tiles_per_task *= 2
    # What all tiles of a head find in the L2 needs no asking for.
    call.fetches = (call.group * call.q_len <= call.tiles_per_task * kernels.tile_q
                    or call.kv_len * (call.head_dim + call.v_dim) * call.operand_bytes > SHARED_KEYS)
    if totals.task == 0:
        return
    cdef size_t places_bytes = round_up((job.batches + 1) * sizeof(Place))
    cdef size_t parts_bytes = 0
    lay_out_scratch(call, kernels.tile_q)
    job.scratch_bytes = call.scratch_bytes
    if job.few_most > 0:
        job.few.heads_per_task = heads_in_turn(&job.few, totals.task, budget)
        axis = min(job.few_most, call.group * call.q_len)
        axis = (axis + few.lanes - 1) // few.lanes * few.lanes
        lay_out_scratch(&job.few, axis)
        job.scratch_bytes = max(job.scratch_bytes, job.few.scratch_bytes)
        job.part_bytes = round_up(sizeof(Part)) + round_up(
            axis * (2 + job.few.acc_stride) * few.real_bytes)
        parts_bytes = totals.part * job.part_bytes

    active_calls += 1
    cdef int threads
    cdef Arena arena
    try:
        if busy is not None:
            job.busy = <double *>cnp.PyArray_DATA(busy)
            budget = min(budget, <int>cnp.PyArray_SIZE(busy))
        threads = threads_for(work, min(<Py_ssize_t>budget, totals.task))
        arena = take_arena(places_bytes + parts_bytes + <size_t>threads * job.scratch_bytes)
        job.scratch = arena.aligned()
        job.places = <Place *>(job.scratch + threads * job.scratch_bytes)
        job.parts = <char *>job.places + places_bytes
        with nogil:
            place_tasks(&job, &totals)
            if not job.interrupt.stop:
                count_chunks(&job)
                run_tasks(&job, threads)
        if arena.size <= KEPT_BYTES:
            idle_arenas.append(arena)
    finally:
        active_calls -= 1
    raise_pending(&job.interrupt)
