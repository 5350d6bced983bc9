/* The decode kernels: head_dim lies in lanes, for query rows that would not fill a vector.
 *
 *     S[k][r]   = sum_d K[k][d] * Q[r][d]
 *     acc[r][:] = acc[r][:] * rescale[r] + sum_k P[k][r] * V[k][:]
 *
 * Shapes: kernels.h. Each key and value is read once, in the type in which it is stored, and
 * widened in registers. A result does not depend on where in a block it is computed. The last
 * D % LANES elements of a row are loaded without what lies behind them.
 *
 * Such work waits for memory, so rows are prefetched into L1 some runs before they are needed, a
 * line at a time beside the arithmetic. Where rows lie side by side, lines are prefetched in the
 * order of memory, which goes well with the hardware's own prefetching. */

/* Bytes ahead, chosen by benches/decode.py, keys and values of size 128: on two cores of a Granite
 * Rapids Xeon, int8 is read at 0.83 of the speed of a plain read with 3000 bytes and at 0.75 with
 * 6000, the other types at 0.81-0.92 with 2048 and at 0.92-0.98 with 6000; on a Zen 4 these rise
 * by up to 0.1 from 6000 to 8192, and stay the same up to 24576. On a Zen 5 the order of memory,
 * instead of four rows at a time, gives 0.1 more, and L1 instead of L2 makes caches that fit in L3
 * 1.2 to 1.4 times as fast. */
#define PREFETCH_DISTANCE(type) (BYTES_OF(type) == 1 ? 3000 : 8192)

#ifndef DECODE_ACCUMULATORS
#define DECODE_ACCUMULATORS 8 /* registers for sums over values */
#endif
#define DECODE_ROWS (LANES < 4 ? LANES : 4) /* query rows that share a load of a key or value */

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

/* PREFETCH_DISTANCE in runs of rows of `length` elements: as near as the list of runs allows. */
INLINE ptrdiff_t prefetch_runs(ptrdiff_t length, int type)
{
    const ptrdiff_t bytes = QKV_KEY_RUN * length * BYTES_OF(type);
    const ptrdiff_t runs = (PREFETCH_DISTANCE(type) + bytes / 2) / (bytes > 0 ? bytes : 1);
    return runs < 1 ? 1 : runs < QKV_KEY_RUNS_AHEAD ? runs : QKV_KEY_RUNS_AHEAD;
}

#include "decode_scores_tmpl.h"
#include "decode_softmax_tmpl.h"
#include "decode_accumulate_tmpl.h"
