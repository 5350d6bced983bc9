"""Every tuned number of the engine, with the benchmark that chose it.

Three kinds stand apart: sizes of the structures, numbers that decide in which order a sum runs
(another value gives other last bits), and numbers that decide only how fast a call is.
"Granite Rapids" is an Intel Xeon with AVX-512 and AMX, 48 KiB of L1d and 2 MiB of L2 a core.
"""

cdef enum:  # sizes of structures
    MAX_LANES = 64          # rows of the largest query tile: one bit each in a uint64
    MAX_VECTORS = 32        # of a query tile: a vector holds at least two doubles
    PACKED_STEP = 32        # pack_values rounds both axes up to a multiple of this
    MAX_BLOCK_K = 256
    MAX_BLOCK_K_DECODE = 128
    MAX_HEADS = 16          # of a decode task
    MAX_KEY_RUNS = 132      # MAX_BLOCK_K_DECODE * MAX_HEADS / QKV_KEY_RUN + QKV_KEY_RUNS_AHEAD
    MAX_TABLES = 8          # ISAs of a build
    ALIGNMENT = 64          # bytes, of each array in the scratch
    PAGE = 4096             # bytes

cdef enum:  # fix the order of sums, so they depend on head sizes, element types and caches alone
    # Keys of a block in prefill. At head sizes 64 to 256, 64 and 128 are equally fast on Granite
    # Rapids, 32 and 256 are 5 % slower; 128 wins where all keys fit in one block, at bert-128
    # (bench_attention.py).
    BLOCK_K = 128
    # Kernels of a matrix unit read and write acc once a block. From head size LARGE on that costs
    # more than the larger scores: 4x4096x256 in bfloat16 is 4 % faster with 256 keys than with 128.
    BLOCK_K_MATRIX = 256
    LARGE = 128
    # Long rows have shorter blocks, down to this (fitting_keys in tuning.pyx).
    LEAST_BLOCK_K = 16
    NARROW_TILE_Q = 32
    NARROW_BLOCK_BYTES = 256 << 10
    # Beyond head size WIDE, decode has the shortest blocks and does not interleave heads.
    WIDE = 1024
    # Keys of a block in decode. Read from memory, float32 and int8 are up to 10 % faster with 64
    # than with 128, 16-bit keys 3 to 5 % faster with 128 (decode.py).
    BLOCK_K_DECODE = 64
    BLOCK_K_DECODE_16BIT = MAX_BLOCK_K_DECODE
    # Keys of a decode task. Many threads can share one sequence, and merging the partial states
    # is cheap beside reading 2048 keys.
    KV_SPLIT = 2048
    # Keys of a query tile's task, where a KV group has at most MAX_SPLIT_ROWS rows: else one
    # sequence of a model with latent attention, 16 to 64 rows of one KV head, has one task
    # (decode.py --only latent). As many as FOLD_KEYS, so calls with fewer keys have the same sums
    # as without splits.
    TILE_KV_SPLIT = 4096
    MAX_SPLIT_ROWS = 256
    # Keys after which a query tile folds its sums. With plain float32 sums, 64 rows of equal keys
    # are off by 1.3e-5 at 2^17 keys and by 2.4e-4 at 2^22; folded every 4096, by 1.6e-6 at any
    # length. Every 2048 gives 1.4e-6 and costs 1.5 % at 4096 keys on Zen 3. Results in bfloat16 are
    # rounded to 4e-3, so their sums need it less often.
    FOLD_KEYS = 4096
    FOLD_KEYS_BFLOAT16 = 1 << 16
    # Elements of a piece of the depth in a layer's products: with AVX2 kernels 256 are 7 % faster
    # than 512 (1024 rows, 768 inputs, 2304 features on Zen 4); with AVX-512 both are equally fast.
    LINEAR_DEPTH = 256
    # Rows of a layer's product for decode's kernels: 8 take 0.28 ms, 9 to 16 take 0.56 ms in tiles
    # (768 inputs, 2304 features on Zen 4 with AVX-512).
    MAX_LINEAR_DECODE_ROWS = 8
    # Decode kernels are not faster than query tiles beyond so many rows (decode.py, --queries).
    # With 16-bit keys on Zen 4, tiles take 0.91 to 1.09 (AVX2) and 0.76 to 1.04 (AVX-512) of
    # decode's time at 28 rows, 0.87 to 1.19 at 24.
    MAX_DECODE_ROWS = 24

cdef enum:  # decide how fast a call is
    # Decode interleaves the heads of a task where a head's adjacent keys are fewer bytes than this:
    # in pieces of 64 KiB memory is read at 4/5 of its speed, in rows of 512 bytes at half of it
    # (decode.py on Granite Rapids).
    LONG_RUN = 1 << 17
    # Rows of a task whose query tiles share what is made ready of a block, as long as each thread
    # still has so many tasks, for balance. It does not follow the caches: on Zen 3 with 512 KiB of
    # L2, 128 rows are as fast at head sizes 192 to 512, and 64 rows 3 to 11 % slower, although
    # the tiles of 256 rows of size 512 take 1 MiB. Where values are packed, sharing saves more:
    # 1,8,64 queries on 4096 keys of size 128 in bfloat16 take 900 us with 2, 1240 us with 4.
    MAX_ROWS_PER_TASK = 256
    TASKS_PER_THREAD = 4
    TASKS_PER_THREAD_PACKED = 2
    # While the scores of a block are computed, its values and the keys from this one on are
    # prefetched. From memory, 16 rows of float32 are 1.7 to 1.9 times as fast with it (AVX2: 1.6),
    # 4096 queries 7 % faster at size 128.
    PREFETCH_DISTANCE = 16
    # Multiply-adds below which a call uses one thread: to wake a sleeping worker takes 10 us or
    # more, which are about 2^19 multiply-adds (bench_overhead.py).
    SERIAL_WORK = 1 << 19
    # Multiply-adds that take as long as to weigh a score and to write it: on Zen 3 the weights of
    # 1,12,512,64 take as long as the op with values of size 64 (bench_weights.py).
    WEIGHT_WORK = 64
    # Keys of a task that sums over the queries, a multiple of MAX_BLOCK_K. Each such task packs the
    # queries anew, but many threads need many tasks. With a known lse, 8x6000x64 takes 0.61 to 0.73
    # of the op's time with 128 keys, 0.60 to 0.62 with 1024, 0.55 to 0.61 with 4096 (a busy Zen 4,
    # "received, lse" of bench_analysis.py).
    RANGE_KEYS = 1024
    # Multiply-adds below which no sleeping worker is woken, unless calls follow each other fast
    # (FREQUENT in csrc/runtime/thread_pool.c; about 90 us of one thread there).
    SHORT_WORK = 1 << 20
    # A call looks for signals and tells of its progress so often, and looks at the clock after so many multiply-adds, which take
    # a millisecond or less, or after planning so many batch entries.
    SIGNAL_MILLISECONDS = 100
    CLOCK_WORK = 1 << 24
    BATCHES_PER_LOOK = 1 << 14
    # The scratch of calls is kept for the next ones, so many bytes in all at most.
    KEPT_BYTES = 32 << 20
    # The products of a layer (linear.pyx), chosen on Zen 4 with AVX-512 and with AVX2 kernels
    # (bench_layers.py). Features of a block: 128 and 32 are up to 10 % slower with AVX2. Tiles of a
    # task: 2 and 8 are up to 10 % slower.
    LINEAR_BLOCK = 64
    LINEAR_TILES = 4
    LINEAR_TASKS_PER_THREAD = 2
    # Merging: multiply-adds that take as long as to merge an element of a part (two threads are
    # faster from 2^16 elements on: 21 us instead of 30 on two cores of Zen 4), elements of all
    # parts in a task, and elements of a row that are converted at a time.
    MERGE_WORK = 8
    MERGE_TASK = 1 << 18
    MERGE_COLUMNS = 1024
    # OpenBLAS serves at most so many threads. Each needs a buffer of 32 MiB and its stack, for
    # which OpenBLAS waits without end where there is no memory.
    MAX_BLAS_THREADS = 64
    BLAS_THREAD_BYTES = 48 << 20

cdef Py_ssize_t shared_keys() noexcept nogil
cdef Py_ssize_t fitting_keys(Py_ssize_t row_bytes, Py_ssize_t most, bint narrow) noexcept nogil
