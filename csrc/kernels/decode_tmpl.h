/* The decode kernels: head_dim lies in lanes, for query rows that would not fill a vector.
 *
 *     S[k][r]   = sum_d K[k][d] * Q[r][d]
 *     acc[r][:] = acc[r][:] * rescale[r] + sum_k P[k][r] * V[k][:]
 *
 * Shapes: kernels.h. Each key and value is read once, in the type in which it is stored, and
 * widened in registers. A result does not depend on where in a block it is computed. The last
 * D % LANES elements of a row are loaded without what lies behind them.
 *
 * Such work waits for memory, so rows are prefetched PREFETCH_DISTANCE bytes before they are
 * needed: a line at a time beside the arithmetic, in DECODE_ROWS rows at once. */

/* Chosen by benches/decode.py on two cores of a Granite Rapids Xeon, keys and values of size 128.
 * Figures are shares of the speed of a plain read of the same memory; higher is better.
 *
 *     distance     all types but int8   int8
 *     2048 bytes   0.81-0.92
 *     3000 bytes                        0.83
 *     4000 bytes   0.83-0.96
 *     6000 bytes   0.92-0.98            0.75
 *
 * On a Zen 4, whose figures go on rising, all types but int8 (AVX2, AVX-512; 268 MB of them):
 *
 *     6000 bytes   0.83-0.87, 0.80-0.87
 *     8192 bytes   0.88-0.91, 0.88-0.97
 *     24576 bytes  0.89-0.92, 0.88-0.95
 *
 * Prefetching every other line alone gives 0.5-0.8. Prefetching a whole run at once, 4 KiB of
 * bfloat16, gives 0.1 less. */
#define PREFETCH_DISTANCE(type) (BYTES_OF(type) == 1 ? 3000 : 8192)

#ifndef DECODE_ACCUMULATORS
#define DECODE_ACCUMULATORS 8 /* registers for sums over values */
#endif
#define DECODE_ROWS (LANES < 4 ? LANES : 4) /* query rows that share a load of a key or value */
#define VALUES_PER_STEP(rows, type) ((rows) > 2 && BYTES_OF(type) < 4 ? 2 : 4)
#define VALUES_IN_L1(type) (BYTES_OF(type) < 4 ? 16 : 8) /* read again for the other query rows */

/* DO with the element type as a constant. */
#if REAL_BITS == 32
#define BY_TYPE(type, DO)                                                                        \
    switch (type) {                                                                              \
    case QKV_FLOAT16: DO(QKV_FLOAT16); break;                                                    \
    case QKV_BFLOAT16: DO(QKV_BFLOAT16); break;                                                  \
    case QKV_INT8: DO(QKV_INT8); break;                                                          \
    default: DO(QKV_FLOAT32); break;                                                             \
    }
#else
#define BY_TYPE(type, DO)                                                                        \
    (void)type;                                                                                  \
    DO(QKV_FLOAT64);
#endif

/* PREFETCH_DISTANCE in rows of `length` elements: a multiple of DECODE_ROWS, and no more than the
 * addresses behind a block's runs reach. */
INLINE ptrdiff_t prefetch_distance(ptrdiff_t length, int type)
{
    const ptrdiff_t most = (QKV_KEY_RUNS_AHEAD - 1) * QKV_KEY_RUN;
    const ptrdiff_t rows = PREFETCH_DISTANCE(type) / (length > 0 ? length * BYTES_OF(type) : 1);
    return rows < DECODE_ROWS ? DECODE_ROWS : rows < most ? rows / DECODE_ROWS * DECODE_ROWS : most;
}

/* How far the rows begin behind a multiple of DECODE_ROWS rows' bytes. Prefetches are moved back by
 * that. In rows that fill lines and pages, the order of the lines is then the same in each page,
 * and it goes well with the hardware's own prefetching. Keys of size 128 in 16 bits that begin 64
 * bytes into a page are read at 0.80 of a plain read's speed on a Granite Rapids Xeon, and at 0.70
 * without the move (benches/decode.py). */
INLINE ptrdiff_t alignment_offset(const char *rows, ptrdiff_t stride, ptrdiff_t length, int type)
{
    const ptrdiff_t bytes = DECODE_ROWS * stride;
    if (bytes <= 0 || stride != length * BYTES_OF(type) || bytes & (bytes - 1)) return 0;
    return (ptrdiff_t)((uintptr_t)rows & (uintptr_t)(bytes - 1));
}

/* The address of row i, given those of the runs. */
INLINE const char *row_in_runs(const char *const *runs, ptrdiff_t stride, size_t i)
{
    return runs[i / QKV_KEY_RUN] + (ptrdiff_t)(i % QKV_KEY_RUN) * stride;
}

#include "decode_scores_tmpl.h"
#include "decode_softmax_tmpl.h"
#include "decode_accumulate_tmpl.h"
