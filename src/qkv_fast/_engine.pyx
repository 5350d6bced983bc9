"""Engine "native": the loop nest around the tile kernels of csrc/ (tile_kernels.h).

A tile is up to `tile_q` rows, each a (query head of one KV group, query position) pair; a task
is one tile, or a few neighbours that share the keys they read. For each key block, each tile:

    S = K Qt;  softcap, ALiBi, bias;  m' = max(m, S);  P = exp2(S - m');  acc = acc 2^(m - m') + Vᵀ P

The same nest serves float32 and float64, SIMD and BLAS tiles: only the table differs.
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

cnp.import_array()

cdef extern from "tile_kernels.h" nogil:
    ctypedef struct qkv_span:
        int begin, end

    ctypedef struct qkv_tile_kernels:
        const char *isa
        int real_bytes
        int operand
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
                       int, const qkv_span *) noexcept nogil
        void (*scale)(void *, Py_ssize_t, int, double) noexcept nogil
        void (*softcap)(void *, Py_ssize_t, int, double) noexcept nogil
        void (*alibi)(void *, Py_ssize_t, int, const void *, const void *) noexcept nogil
        void (*bias)(void *, Py_ssize_t, int, const char **, int, uint64_t *) noexcept nogil
        void (*limit_range)(uint64_t *, Py_ssize_t, int, const void *, const void *) noexcept nogil
        void (*limit_mask)(uint64_t *, Py_ssize_t, int, const char **, Py_ssize_t) noexcept nogil
        void (*softmax)(void *, Py_ssize_t, int, const uint64_t *, const qkv_span *, double,
                        void *, void *, void *) noexcept nogil
        void (*accumulate)(void *, const void *, const char *, Py_ssize_t, Py_ssize_t, Py_ssize_t,
                           int, const void *, const qkv_span *) noexcept nogil
        void (*accumulate_odd)(void *, const void *, const char *, Py_ssize_t, Py_ssize_t,
                               Py_ssize_t, int) noexcept nogil
        int (*all_finite)(const char *, Py_ssize_t, Py_ssize_t, Py_ssize_t) noexcept nogil
        void (*store_rows)(char **, int, const void *, Py_ssize_t, int,
                           const void *) noexcept nogil
        void (*widen)(void *, const char *, Py_ssize_t, int) noexcept nogil
        void (*narrow)(char *, const void *, Py_ssize_t, int) noexcept nogil
        double (*fma_chain)(Py_ssize_t) noexcept nogil
        int fma_chain_flop

    const qkv_tile_kernels *qkv_tile_table(int index, int operand)
    const char *qkv_isa_name(int index)
    int qkv_isa_runs(int index)
    int qkv_isa_pays(int index)

cdef extern from "convert.h" nogil:
    int QKV_FLOAT32, QKV_FLOAT64, QKV_FLOAT16, QKV_BFLOAT16, QKV_BOOL
    void qkv_read_row(void *, int, const char *, Py_ssize_t, Py_ssize_t, int)
    void qkv_copy_row16(void *, const char *, Py_ssize_t, Py_ssize_t, int)
    void qkv_clear_odd(void *, int, Py_ssize_t)
    void qkv_write_row(char *, const void *, int, Py_ssize_t, Py_ssize_t, int)

cdef extern from "thread_pool.h" nogil:
    void qkv_run_tasks(void (*)(const void *, int, Py_ssize_t) noexcept nogil, const void *,
                       Py_ssize_t, int)
    int qkv_forked()

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

cdef enum:
    MAX_LANES = 64      # rows of the largest tile: one bit each in a uint64
    MAX_VECTORS = 32    # of a tile: two doubles each at least
    PACKED_STEP = 32    # what pack_values rounds both axes up to
    MAX_BLOCK_K = 256
    MAX_TABLES = 8
    ALIGNMENT = 64

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
cdef Py_ssize_t BLOCK_K_WIDE = 16       # head sizes beyond WIDE: bounds the scratch
cdef Py_ssize_t WIDE = 1024

# Rows of the tiles that run in step over the key blocks, where a block must be made ready for them
# or a head's keys and values are more than SHARED_KEYS bytes, about what stays in a core's L2: a
# block then comes from the L3 once for all of them. As long as the threads still have
# TASKS_PER_THREAD tasks each, for balance.
cdef Py_ssize_t MAX_ROWS_PER_TASK = 256
cdef Py_ssize_t SHARED_KEYS = 1 << 20
cdef Py_ssize_t TASKS_PER_THREAD = 4

# Multiply-adds below which a second thread costs more than it brings (bench_overhead.py: waking
# a sleeping worker takes 10 us and more, which is some 2^19 of them).
cdef double SERIAL_WORK = 1 << 19


cdef struct Operand:
    char *data
    const cnp.npy_intp *batch_strides   # bytes; one per batch axis
    Py_ssize_t head, row, col           # strides in bytes
    int type                            # as convert.h numbers them
    bint direct                         # rows of the kernels' type with unit stride


cdef struct Call:
    const qkv_tile_kernels *kernels
    int fixed_nvec                      # 0: as many vectors as the tile's rows need
    Py_ssize_t batch_ndim
    const cnp.npy_intp *batch_shape
    Py_ssize_t num_kv_heads, group, q_len, kv_len, head_dim, v_dim
    Py_ssize_t block_k
    Py_ssize_t tiles, tiles_per_task, tasks_per_head, tasks
    Operand query, key, value, mask, out
    Operand query_offset, key_lengths, slopes   # data NULL when absent
    int operand_bytes
    Py_ssize_t key_bytes, packed_stride # of a key row and of a packed row in our own scratch
    const double *sinks                 # (Hq,) or NULL
    char *lse                           # C order, reals, or NULL
    double query_factor, score_factor   # their product is scale * log2(e)
    double softcap
    bint modified                       # modify_scores has something to do
    int64_t left, right
    # A thread's scratch: S, gathered rows, key rows, value rows, packed values, then for each tile
    # of a task Tile, Qt and acc.
    Py_ssize_t gathered_at, keys_at, values_at, packed_at, tiles_at, acc_at, tile_bytes
    Py_ssize_t scratch_bytes


cdef struct ThreadedCall:
    const Call *call
    char *scratch


cdef struct Head:                       # what the tiles of a task share
    Py_ssize_t kv_head, batch
    char *query
    char *out
    char *key
    char *value
    char *mask
    char *slopes
    int64_t offset, visible             # the first query's position; keys before key_lengths
    char *S                             # the thread's scratch begins here
    char *gathered


cdef struct Block:                      # keys, and what of them was made ready for all tiles
    int64_t begin
    Py_ssize_t nk
    const char *keys                    # NULL: not yet
    const char *value_rows
    const char *values                  # as accumulate wants them
    Py_ssize_t key_stride, row_stride, value_stride
    int finite                          # whether all of value_rows is; -1: not known


cdef struct Tile:
    void *Qt
    void *acc
    Py_ssize_t row_begin
    int count, nvec, lanes
    int64_t first_min, first_max, last_min, last_max    # over the rows' reach
    bint fresh                          # acc holds nothing yet
    uint64_t seen                       # rows that saw a key
    const char *query_rows[MAX_LANES]
    const char *mask_rows[MAX_LANES]
    const char *rows[MAX_LANES]
    char *out_rows[MAX_LANES]
    int64_t first[MAX_LANES]            # keys [first, last] are in reach of the row
    int64_t last[MAX_LANES]
    int64_t position[MAX_LANES]
    double row_max[MAX_LANES]           # from here on: reals of the call's size
    double row_sum[MAX_LANES]
    double decay[MAX_LANES]
    double weight[MAX_LANES]
    double slope[MAX_LANES]
    double range_first[MAX_LANES]
    double range_last[MAX_LANES]
    double relative[MAX_LANES]
    qkv_span span[MAX_VECTORS]
    uint64_t allow[MAX_BLOCK_K]


cdef inline Py_ssize_t round_up(Py_ssize_t size) noexcept nogil:
    return (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


cdef Py_ssize_t TILE_BYTES = round_up(sizeof(Tile))


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
    if ((operand.type == QKV_FLOAT16 or operand.type == QKV_BFLOAT16) and operand.col == 2
            and call.kernels.widen != NULL):
        call.kernels.widen(row, src, length, operand.type)
    else:
        qkv_read_row(row, call.kernels.real_bytes, src, length, operand.col, operand.type)


cdef void read_row(const Call *call, char *row, const Operand *operand, const char *src,
                   Py_ssize_t length) noexcept nogil:
    """A row of the caller's as operands of the kernels."""
    if call.kernels.operand == QKV_BFLOAT16:
        qkv_copy_row16(row, src, length, operand.col, operand.type)
    else:
        read_reals(call, row, operand, src, length)


cdef void load_keys(const Call *call, const Head *head, Block *block) noexcept nogil:
    """The block's keys as the kernels want them: in place, or gathered and padded with zeros."""
    cdef const char *data = head.key + block.begin * call.key.row
    cdef Py_ssize_t row_bytes = call.head_dim * call.operand_bytes
    cdef Py_ssize_t i, rows = call.kernels.row_step
    cdef char *row = head.S + call.keys_at
    if (call.key.direct and call.head_dim % call.kernels.depth_step == 0
            and block.nk % call.kernels.row_step == 0):
        block.keys = data
        block.key_stride = call.key.row
        return
    block.keys = row
    block.key_stride = call.key_bytes
    for i in range(block.nk):
        read_row(call, row, &call.key, data + i * call.key.row, call.head_dim)
        memset(row + row_bytes, 0, call.key_bytes - row_bytes)
        row += call.key_bytes
    rows = (block.nk + rows - 1) // rows * rows
    memset(row, 0, (rows - block.nk) * call.key_bytes)


cdef void load_value_rows(const Call *call, const Head *head, Block *block) noexcept nogil:
    """The block's values as rows of operands: in place, or gathered."""
    cdef const char *data = head.value + block.begin * call.value.row
    cdef char *rows = head.S + call.values_at
    cdef Py_ssize_t i
    if call.value.direct:
        block.value_rows = data
        block.row_stride = call.value.row
        return
    block.value_rows = rows
    block.row_stride = call.v_dim * call.operand_bytes
    for i in range(block.nk):
        read_row(call, rows + i * block.row_stride, &call.value, data + i * call.value.row,
                 call.v_dim)


cdef void pack_values(const Call *call, const Head *head, Block *block, const char *rows,
                      Py_ssize_t stride) noexcept nogil:
    """Value rows as accumulate wants them."""
    block.values = rows
    block.value_stride = stride
    if call.kernels.pack_values != NULL:
        block.values = head.S + call.packed_at
        block.value_stride = call.packed_stride
        call.kernels.pack_values(head.S + call.packed_at, call.packed_stride, rows, stride,
                                 block.nk, call.v_dim)


cdef void clean_values(const Call *call, const Head *head, Block *block) noexcept nogil:
    """Values with 0 for what isn't finite."""
    cdef Py_ssize_t i, row_bytes = call.v_dim * call.operand_bytes
    cdef char *row = head.gathered
    for i in range(block.nk):
        memcpy(row, block.value_rows + i * block.row_stride, row_bytes)
        qkv_clear_odd(row, call.kernels.operand, call.v_dim)
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
    tile.seen = 0
    query_head = head.kv_head * call.group + tile.row_begin // call.q_len
    index = tile.row_begin % call.q_len
    for i in range(tile.lanes):
        position = head.offset + index
        tile.position[i] = position
        tile.query_rows[i] = (head.query + query_head * call.query.head
                              + index * call.query.row)
        tile.out_rows[i] = head.out + query_head * call.out.head + index * call.out.row
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
            if index == call.q_len:
                index = 0
                query_head += 1
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
        call.kernels.limit_range(tile.allow, nk, tile.nvec, tile.range_first, tile.range_last)
    if masked:
        if is_shared(&call.mask):
            mask = tile.mask_rows[0] + begin * call.mask.col
            for k in range(nk):
                if not mask[k * call.mask.col]:
                    tile.allow[k] = 0
        else:
            for i in range(tile.lanes):
                tile.rows[i] = tile.mask_rows[i] + begin * call.mask.col
            call.kernels.limit_mask(tile.allow, nk, tile.nvec, tile.rows, call.mask.col)
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
        kernels.scale(head.S, nk, tile.nvec, call.score_factor)
    if call.softcap != 0:
        kernels.softcap(head.S, nk, tile.nvec, call.softcap)
    if head.slopes != NULL:
        set_relative(tile.relative, tile.position, begin, -UNBOUNDED, UNBOUNDED, tile.lanes,
                     kernels.real_bytes)
        kernels.alibi(head.S, nk, tile.nvec, tile.slope, tile.relative)
    if head.mask != NULL and call.mask.type != QKV_BOOL:
        for i in range(1 if shared else tile.lanes):
            tile.rows[i] = tile.mask_rows[i] + begin * call.mask.col
            if not call.mask.direct:
                read_reals(call, head.gathered + i * nk * kernels.real_bytes, &call.mask,
                           tile.rows[i], nk)
                tile.rows[i] = head.gathered + i * nk * kernels.real_bytes
        kernels.bias(head.S, nk, tile.nvec, tile.rows, shared, tile.allow)


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
    if block.keys == NULL:
        load_keys(call, head, block)
    kernels.scores(head.S, tile.Qt, block.keys, block.key_stride, nk, call.head_dim, tile.nvec,
                   tile.span if partial else NULL)
    if call.modified:
        modify_scores(call, head, tile, begin, nk)
    if bias:
        seen = 0
        for k in range(nk):
            seen |= tile.allow[k]
        partial = not sees_all(tile, nk)
    tile.seen |= seen
    kernels.softmax(head.S, nk, tile.nvec, tile.allow if partial else NULL, tile.span,
                    1.0 if call.modified else call.score_factor, tile.row_max, tile.row_sum,
                    tile.decay)
    cdef const void *decay = NULL if tile.fresh else tile.decay
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
        clean_values(call, head, block)
        kernels.accumulate(tile.acc, head.S, block.values, block.value_stride, nk, call.v_dim,
                           tile.nvec, decay, span)
        kernels.accumulate_odd(tile.acc, head.S, block.value_rows, block.row_stride, nk,
                               call.v_dim, tile.nvec)
        block.values = NULL
        return
    if block.values == NULL:
        pack_values(call, head, block, block.value_rows, block.row_stride)
    kernels.accumulate(tile.acc, head.S, block.values, block.value_stride, nk, call.v_dim,
                       tile.nvec, decay, span)


cdef void close_tile(const Call *call, const Head *head, Tile *tile) noexcept nogil:
    """Divide by the sums and write the rows."""
    cdef int real_bytes = call.kernels.real_bytes
    cdef int i
    if tile.fresh:
        memset(tile.acc, 0, call.v_dim * tile.lanes * real_bytes)
    cdef Py_ssize_t row = tile.row_begin
    cdef Py_ssize_t query_head = head.kv_head * call.group
    # The rows of a KV group are one run of the (batch, query head, query) order of lse.
    cdef Py_ssize_t lse_index = ((head.batch * call.num_kv_heads * call.group + query_head)
                                 * call.q_len + row)
    for i in range(tile.count):
        finish_row(call, tile, i, tile.seen >> i & 1, query_head + (row + i) // call.q_len
                   if call.sinks != NULL else 0, lse_index + i)
    for i in range(tile.count, tile.lanes):
        set_real(tile.weight, i, real_bytes, 0)
    if call.out.direct:
        call.kernels.store_rows(tile.out_rows, tile.count, tile.acc, call.v_dim, tile.nvec,
                                tile.weight)
        return
    for i in range(tile.count):
        tile.rows[i] = head.gathered + i * call.v_dim * real_bytes
    call.kernels.store_rows(<char **>tile.rows, tile.count, tile.acc, call.v_dim, tile.nvec,
                            tile.weight)
    for i in range(tile.count):
        if call.kernels.narrow != NULL and call.out.col == 2 and call.out.type != QKV_FLOAT32:
            call.kernels.narrow(tile.out_rows[i], tile.rows[i], call.v_dim, call.out.type)
        else:
            qkv_write_row(tile.out_rows[i], tile.rows[i], real_bytes, call.v_dim, call.out.col,
                          call.out.type)


cdef void run_task(const Call *call, char *scratch, Py_ssize_t task) noexcept nogil:
    # Tasks of a head stand together (they share its keys), the last queries first: with causal
    # masks those are the largest.
    cdef Py_ssize_t part = call.tasks_per_head - 1 - task % call.tasks_per_head
    cdef Head head
    head.kv_head = task // call.tasks_per_head % call.num_kv_heads
    head.batch = task // call.tasks_per_head // call.num_kv_heads
    head.query = batch_entry(call, &call.query, head.batch)
    head.out = batch_entry(call, &call.out, head.batch)
    head.key = batch_entry(call, &call.key, head.batch) + head.kv_head * call.key.head
    head.value = batch_entry(call, &call.value, head.batch) + head.kv_head * call.value.head
    head.mask = batch_entry(call, &call.mask, head.batch)
    head.slopes = batch_entry(call, &call.slopes, head.batch)
    head.offset = 0
    head.visible = call.kv_len
    if call.query_offset.data != NULL:
        head.offset = (<int64_t *>batch_entry(call, &call.query_offset, head.batch))[0]
    if call.key_lengths.data != NULL:
        head.visible = (<int64_t *>batch_entry(call, &call.key_lengths, head.batch))[0]
    if head.mask != NULL and call.mask.type == QKV_BOOL and is_shared(&call.mask):
        while head.visible > 0 and not head.mask[(head.visible - 1) * call.mask.col]:
            head.visible -= 1  # padding at the end is as good as key_lengths
    head.S = scratch
    head.gathered = scratch + call.gathered_at

    cdef char *tile_scratch = scratch + call.tiles_at
    cdef Py_ssize_t rows = call.group * call.q_len
    cdef Py_ssize_t row_begin = part * call.tiles_per_task * call.kernels.tile_q
    cdef int tiles = 0, i
    cdef int64_t begin = UNBOUNDED, last = -1
    cdef Tile *tile
    cdef Block block
    if call.kernels.enter != NULL:
        call.kernels.enter()
    while tiles < call.tiles_per_task and row_begin < rows:
        tile = <Tile *>(tile_scratch + tiles * call.tile_bytes)
        tile.Qt = <char *>tile + TILE_BYTES
        tile.acc = <char *>tile + call.acc_at
        tile.row_begin = row_begin
        tile.count = <int>min(<Py_ssize_t>call.kernels.tile_q, rows - row_begin)
        tile.nvec = (tile.count + call.kernels.lanes - 1) // call.kernels.lanes
        if call.fixed_nvec:
            tile.nvec = call.fixed_nvec
        tile.lanes = tile.nvec * call.kernels.lanes
        open_tile(call, &head, tile)
        begin = min(begin, tile.first_min)
        last = max(last, tile.last_max)
        row_begin += call.kernels.tile_q
        tiles += 1
    begin = begin // call.block_k * call.block_k
    while begin <= last:
        memset(&block, 0, sizeof(Block))
        block.begin = begin
        block.nk = min(call.block_k, last + 1 - begin)
        block.finite = -1
        for i in range(tiles):
            attend_block(call, &head, <Tile *>(tile_scratch + i * call.tile_bytes), &block)
        begin += call.block_k
    for i in range(tiles):
        close_tile(call, &head, <Tile *>(tile_scratch + i * call.tile_bytes))
    if call.kernels.leave != NULL:
        call.kernels.leave()


cdef void finish_row(const Call *call, Tile *tile, int i, bint seen, Py_ssize_t head,
                     Py_ssize_t lse_index) noexcept nogil:
    """The factor that turns a row of acc into the answer, and the row's log-sum-exp.

    With a sink s (log2 units) the denominator is l + 2^(s - m); both are scaled to the larger
    of m and s first.
    """
    cdef int real_bytes = call.kernels.real_bytes
    cdef double row_max = get_real(tile.row_max, i, real_bytes)
    cdef double row_sum = get_real(tile.row_sum, i, real_bytes)
    cdef double lowest = -FLT_MAX if real_bytes == 4 else -DBL_MAX
    cdef double weight = 0, sink, top
    if seen:
        weight = 1 / row_sum
        if call.sinks != NULL:
            sink = call.sinks[head] * LOG2E
            top = sink if sink > row_max else row_max
            if sink == INFINITY:
                weight = 0 * row_sum
            else:
                weight = exp2(row_max - top)
                weight = weight / (row_sum * weight + exp2(sink - top))
    set_real(tile.weight, i, real_bytes, weight)
    if call.lse != NULL:
        if not seen:
            set_real(call.lse + lse_index * real_bytes, 0, real_bytes, -INFINITY)
        else:  # a bias of finfo.min was clamped to it in log2 units: see tile_tmpl.h
            set_real(call.lse + lse_index * real_bytes, 0, real_bytes,
                     (row_max if row_max == lowest else row_max * LN2) + log(row_sum))


# --- The one place where threads are used ---------------------------------------------------

cdef int active_calls = 0       # changed with the GIL held only


cdef void run_pool_task(const void *context, int thread, Py_ssize_t task) noexcept nogil:
    cdef const ThreadedCall *threaded = <const ThreadedCall *>context
    run_task(threaded.call, threaded.scratch + thread * threaded.call.scratch_bytes, task)


cdef void run_tasks(const Call *call, char *scratch, int threads) noexcept nogil:
    """All tasks of a call on at most `threads` threads: by our pool, or OpenMP if so built."""
    cdef Py_ssize_t task
    cdef ThreadedCall threaded
    if threads <= 1:
        for task in range(call.tasks):
            run_task(call, scratch, task)
    elif QKV_OPENMP:
        for task in prange(call.tasks, num_threads=threads, schedule="dynamic", chunksize=1):
            run_task(call, scratch + threadid() * call.scratch_bytes, task)
    else:
        threaded.call = call
        threaded.scratch = scratch
        qkv_run_tasks(run_pool_task, &threaded, call.tasks, threads)


cdef int threads_for(const Call *call, int budget) noexcept:
    """The caller's budget, shared with the other callers of the moment, as far as it pays."""
    cdef double work = (<double>call.tasks * call.tiles_per_task * call.kernels.tile_q * call.kv_len
                        * (call.head_dim + call.v_dim))
    if qkv_forked() or work < SERIAL_WORK:
        return 1
    if active_calls > 1:
        budget = max(1, budget // active_calls)
    return <int>min(<Py_ssize_t>budget, call.tasks)


# --- Scratch: kept between calls ------------------------------------------------------------

cdef size_t KEPT_BYTES = 32 << 20       # a larger arena is given back at once


@cython.final
cdef class Arena:
    """64-byte aligned memory for the scratch of all threads of a call."""
    cdef char *memory
    cdef size_t size

    def __cinit__(self, size_t size):
        self.size = size
        self.memory = <char *>malloc(size + ALIGNMENT)
        if self.memory == NULL:
            raise MemoryError(f"no memory for {size} bytes of attention scratch")

    def __dealloc__(self):
        free(self.memory)

    cdef char *aligned(self) noexcept:
        return <char *>((<uintptr_t>self.memory + ALIGNMENT - 1) & ~<uintptr_t>(ALIGNMENT - 1))


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
        if qkv_isa_pays(index) and table_of(index, type) != table_of(best, type):
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
            qkv_run_tasks(run_fma_task, kernels, 8 * threads, threads)
        rounds += 1
        elapsed = time.perf_counter() - begin
    return 8e-9 * threads * rounds * FMA_ROUNDS * kernels.fma_chain_flop / elapsed


cdef struct Memory:
    const uint64_t *words
    Py_ssize_t count                    # of a task


cdef uint64_t memory_sum = 0


cdef void run_read_task(const void *context, int thread, Py_ssize_t task) noexcept nogil:
    cdef const Memory *memory = <const Memory *>context
    cdef const uint64_t *words = memory.words + task * memory.count
    cdef uint64_t total = 0
    cdef Py_ssize_t i
    global memory_sum
    for i in range(memory.count):
        total += words[i]
    if total != 0:      # never, but the compiler can't know
        memory_sum += total


def read_bandwidth(int threads, double seconds=0.2, Py_ssize_t megabytes=256):
    """GB/s at which the threads read memory, each its own part of so much: the other limit."""
    cdef cnp.npy_intp size = megabytes << 17
    cdef cnp.ndarray array = cnp.PyArray_ZEROS(1, &size, cnp.NPY_UINT64, 0)
    cdef Memory memory
    array.fill(0)       # touched, so that each page is memory of its own
    memory.words = <const uint64_t *>cnp.PyArray_DATA(array)
    memory.count = 1 << 17
    rounds = 0
    begin = time.perf_counter()
    elapsed = 0.0
    while elapsed < seconds:
        with nogil:
            qkv_run_tasks(run_read_task, &memory, megabytes, threads)
        rounds += 1
        elapsed = time.perf_counter() - begin
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


cdef void limit_to_blas(Operand *operand, Py_ssize_t count, Py_ssize_t length,
                        int real_bytes) noexcept:
    """GEMM wants aligned rows one after another, their distance an int."""
    cdef Py_ssize_t columns = operand.row // real_bytes
    if count == 1:
        operand.row = length * real_bytes
    elif (operand.row % real_bytes != 0 or columns < length or columns > 0x7fffffff):
        operand.direct = False
    if <uintptr_t>operand.data % real_bytes != 0:
        operand.direct = False


cdef void set_vector(Operand *operand, cnp.ndarray array, Py_ssize_t batch_ndim) noexcept:
    """(*batch) or (*batch, heads)"""
    operand.data = <char *>cnp.PyArray_DATA(array)
    operand.batch_strides = cnp.PyArray_STRIDES(array)
    if cnp.PyArray_NDIM(array) > batch_ndim:
        operand.head = cnp.PyArray_STRIDES(array)[batch_ndim]


def run(problem, str tiles, str isa):
    """Compute a Problem (see _problem.py) into its `out` and `lse`."""
    global active_calls
    cdef cnp.ndarray query = problem.query, key = problem.key, value = problem.value
    cdef cnp.ndarray out = problem.out, sinks
    cdef int out_type = problem.out_code
    cdef bint wide = out_type == QKV_FLOAT64
    cdef bint blas = tiles == "blas"
    cdef int index = isa_index[isa]
    cdef const qkv_tile_kernels *kernels
    if blas:
        if not blas_loaded:
            load_blas()
        kernels = &blas_tables[index][wide]
    else:
        kernels = table_of(index, out_type)

    cdef Call call
    memset(&call, 0, sizeof(Call))
    call.kernels = kernels
    cdef Py_ssize_t nb = cnp.PyArray_NDIM(query) - 3
    cdef cnp.npy_intp *shape = cnp.PyArray_DIMS(query)
    call.batch_ndim = nb
    call.batch_shape = shape
    call.num_kv_heads = cnp.PyArray_DIMS(key)[nb]
    call.q_len = shape[nb + 1]
    call.head_dim = shape[nb + 2]
    call.kv_len = cnp.PyArray_DIMS(key)[nb + 1]
    call.v_dim = cnp.PyArray_DIMS(value)[nb + 2]
    if cnp.PyArray_SIZE(out) == 0 and problem.lse is None or call.num_kv_heads == 0:
        return
    call.group = shape[nb] // call.num_kv_heads
    cdef int real_type = QKV_FLOAT64 if wide else QKV_FLOAT32
    set_operand(&call.query, query, problem.query_code, nb, kernels.operand)
    set_operand(&call.key, key, problem.key_code, nb, kernels.operand)
    set_operand(&call.value, value, problem.value_code, nb, kernels.operand)
    set_operand(&call.out, out, out_type, nb, real_type)
    if blas:
        call.fixed_nvec = kernels.tile_q // kernels.lanes
        limit_to_blas(&call.key, call.kv_len, call.head_dim, kernels.real_bytes)
        limit_to_blas(&call.value, call.kv_len, call.v_dim, kernels.real_bytes)
    if problem.attn_mask is not None:
        set_operand(&call.mask, problem.attn_mask, problem.mask_code, nb, real_type)
    if problem.query_offset is not None:
        set_vector(&call.query_offset, problem.query_offset, nb)
    if problem.key_lengths is not None:
        set_vector(&call.key_lengths, problem.key_lengths, nb)
    if problem.alibi_slopes is not None:
        set_vector(&call.slopes, problem.alibi_slopes, nb)
    if problem.sinks is not None:
        sinks = problem.sinks
        call.sinks = <const double *>cnp.PyArray_DATA(sinks)
    if problem.lse is not None:
        call.lse = <char *>cnp.PyArray_DATA(<cnp.ndarray>problem.lse)
    call.softcap = problem.softcap
    call.modified = (call.softcap != 0 or call.slopes.data != NULL
                     or call.mask.data != NULL and call.mask.type != QKV_BOOL)
    call.query_factor = problem.scale * LOG2E
    call.score_factor = 1
    if kernels.operand == QKV_BFLOAT16:  # queries stay as they are: no rounding but the caller's
        call.score_factor = abs(call.query_factor)
        call.query_factor = -1 if call.query_factor < 0 else 1
    call.left = problem.left
    call.right = problem.right

    cdef Py_ssize_t batches = 1, axis
    for axis in range(nb):
        batches *= shape[axis]
    cdef Py_ssize_t widest = max(call.head_dim, call.v_dim)
    if widest > (<Py_ssize_t>1 << 40):
        raise MemoryError(f"no memory for tiles of head size {widest}")
    cdef int budget = problem.num_threads
    call.block_k = BLOCK_K if widest <= WIDE else BLOCK_K_WIDE
    if kernels.row_step > 1 and LARGE < widest <= WIDE:
        call.block_k = BLOCK_K_MATRIX
    call.tiles = (call.group * call.q_len + kernels.tile_q - 1) // kernels.tile_q
    call.operand_bytes = 2 if kernels.operand == QKV_BFLOAT16 else kernels.real_bytes
    call.tiles_per_task = 1
    # Keys and values that must be converted, packed or looked at once for several tiles, or fetched
    # from far.
    if (not call.key.direct or not call.value.direct or kernels.pack_values != NULL
            or call.mask.data != NULL
            or call.kv_len * (call.head_dim + call.v_dim) * call.operand_bytes > SHARED_KEYS):
        while (call.tiles_per_task * kernels.tile_q < MAX_ROWS_PER_TASK
               and batches * call.num_kv_heads * call.tiles
               > 2 * TASKS_PER_THREAD * budget * call.tiles_per_task):
            call.tiles_per_task *= 2
    call.tasks_per_head = (call.tiles + call.tiles_per_task - 1) // call.tiles_per_task
    call.tasks = batches * call.num_kv_heads * call.tasks_per_head
    if call.tasks == 0:
        return
    cdef Py_ssize_t row_bytes = kernels.tile_q * kernels.real_bytes
    cdef Py_ssize_t keys = (call.block_k + PACKED_STEP - 1) // PACKED_STEP * PACKED_STEP
    cdef Py_ssize_t depth = (call.head_dim + PACKED_STEP - 1) // PACKED_STEP * PACKED_STEP
    cdef Py_ssize_t v_depth = (call.v_dim + PACKED_STEP - 1) // PACKED_STEP * PACKED_STEP
    cdef Py_ssize_t step = kernels.depth_step
    call.key_bytes = (call.head_dim + step - 1) // step * step * call.operand_bytes
    call.packed_stride = keys * call.operand_bytes
    call.gathered_at = round_up(keys * row_bytes)
    call.keys_at = call.gathered_at + round_up(
        max(call.block_k, kernels.tile_q) * max(widest, call.block_k) * kernels.real_bytes)
    call.values_at = call.keys_at + round_up(keys * call.key_bytes)
    call.packed_at = call.values_at + round_up(keys * call.v_dim * call.operand_bytes)
    call.tiles_at = call.packed_at
    if kernels.pack_values != NULL:
        call.tiles_at += round_up(v_depth * call.packed_stride)
    call.acc_at = TILE_BYTES + round_up(depth * row_bytes)
    call.tile_bytes = call.acc_at + round_up(v_depth * row_bytes)
    call.scratch_bytes = call.tiles_at + call.tiles_per_task * call.tile_bytes

    active_calls += 1
    cdef int threads
    cdef Arena arena
    cdef char *scratch
    try:
        threads = threads_for(&call, budget)
        arena = take_arena(<size_t>threads * call.scratch_bytes)
        scratch = arena.aligned()
        with nogil:
            run_tasks(&call, scratch, threads)
        if arena.size <= KEPT_BYTES:
            idle_arenas.append(arena)
    finally:
        active_calls -= 1
