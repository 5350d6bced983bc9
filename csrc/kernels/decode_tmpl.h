/* The products where rows are few (decode): head_dim lies in lanes, so that each key and value is read
 * once, in the type that it is stored in, and widened in registers. Included by tile_tmpl.h for
 * reals. S and P have the layout of tiles; Q and acc are [rows][stride].
 *
 * Such work waits for memory. Rows are asked for PREFETCH_DISTANCE bytes before they are needed: a line at a time
 * beside the arithmetic, in several rows at once. On two cores of a Granite Rapids Xeon, as shares of
 * the speed of a plain read, keys and values of size 128: 2 KiB ahead 0.81-0.92, 4 KB 0.83-0.96,
 * 6000 bytes 0.92-0.98; int8 3000 bytes 0.83, 6000 0.75; every other line alone 0.5-0.8; whole groups
 * of 4 KiB ahead 0.1 less on bfloat16. */
#define PREFETCH_DISTANCE(type) (BYTES_OF(type) == 1 ? 3000 : 6000)

#ifndef DECODE_SUMS
#define DECODE_SUMS 8 /* registers for the accumulators of values */
#endif
#define FEW_MOST (LANES < 4 ? LANES : 4) /* rows that go together */
#define DECODE_STEP(rows, type) ((rows) > 2 && BYTES_OF(type) < 4 ? 2 : 4) /* values that do */
#define DECODE_VALUES(type) (BYTES_OF(type) < 4 ? 16 : 8) /* that stay in L1 for all rows */

#if REAL_BITS == 32
#define BY_TYPE(type, DO) /* DO with the element type as a constant */                           \
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

/* Keys between one and the one to ask for: a multiple of FEW_MOST. */
INLINE ptrdiff_t keys_ahead(ptrdiff_t length, int type)
{
    const ptrdiff_t most = (QKV_KEY_RUNS_AHEAD - 1) * QKV_KEY_RUN;
    const ptrdiff_t keys = PREFETCH_DISTANCE(type) / (length > 0 ? length * BYTES_OF(type) : 1);
    return keys < FEW_MOST ? FEW_MOST : keys < most ? keys / FEW_MOST * FEW_MOST : most;
}

/* How far behind a multiple of FEW_MOST rows' bytes they begin. What is asked for is moved back by
 * that: in rows that fill lines and pages, the order of its lines is then the same in each page,
 * and one that the hardware's own prefetching goes well with. (Granite Rapids, 16-bit keys of size
 * 128 that begin 64 bytes into a page: 0.70 of a plain read without, 0.80 with it.) */
INLINE ptrdiff_t alignment_offset(const char *rows, ptrdiff_t stride, ptrdiff_t length, int type)
{
    const ptrdiff_t bytes = FEW_MOST * stride;
    if (bytes <= 0 || stride != length * BYTES_OF(type) || bytes & (bytes - 1)) return 0;
    return (ptrdiff_t)((uintptr_t)rows & (uintptr_t)(bytes - 1));
}

INLINE const char *key_at(const char *const *groups, ptrdiff_t stride, size_t i)
{
    return groups[i / QKV_KEY_RUN] + (ptrdiff_t)(i % QKV_KEY_RUN) * stride;
}

#include "decode_scores_tmpl.h"
#include "decode_softmax_tmpl.h"
#include "decode_accumulate_tmpl.h"
