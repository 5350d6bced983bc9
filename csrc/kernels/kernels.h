/* The contract between the loop nest (src/qkv_fast/_engine.pyx) and the tile kernels.
 *
 * A tile is up to `tile_q` query rows, one per vector lane; a kernel works on `nvec` vectors of
 * `lanes` of them, so every scratch matrix is [rows][ld] with ld = nvec * lanes, aligned to 64
 * bytes. "real" is float or double; the table says which. An "operand" is an element of what the
 * products multiply: a real, or bfloat16 with sums in float.
 *
 *     Qt    [D][ld]    packed queries, operands
 *     S     [nk][ld]   scores of one key block, reals; then in place its probabilities P, operands
 *     acc   [Dv][ld]   output accumulator, reals
 *     allow [nk]       bit i of allow[k]: may lane i attend to key k
 *     span  [nvec]     vector v needs keys [begin, end) only; NULL: all of them
 *
 * bfloat16 operands lie in pairs along the reduced axis: Qt is [D / 2][ld][2], P is [nk / 2][ld][2].
 * Reduced axes are padded with zeros to a multiple of depth_step, the other axis of K and V (what
 * gives S and acc their rows) to a multiple of row_step; both are 1 for reals.
 *
 * K, and V where pack_values is NULL, stay in the caller's memory: unit stride along their last axis,
 * any stride in bytes (negative and zero too) between rows, any alignment. A lane's result never
 * depends on the other lanes nor on nvec. Kernels do not allocate, call libm or know of threads. */
#ifndef QKV_TILE_KERNELS_H
#define QKV_TILE_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#define QKV_KEY_RUN 16       /* keys that decode_tmpl.h wants side by side */
#define QKV_KEY_RUNS_AHEAD 4 /* of which it asks where the next ones lie */

typedef struct {
    int begin, end;
} qkv_span;

/* Rows to prefetch: so many, of so many bytes, the first of them from its byte `at` on. */
typedef struct {
    const char *row;
    ptrdiff_t stride, bytes, count, at;
} qkv_prefetch_rows;

typedef struct {
    const char *isa;
    int real_bytes; /* 4: float, 8: double */
    int input_type;    /* QKV_FLOAT32, QKV_FLOAT64 or QKV_BFLOAT16 of convert.h */
    int lanes;      /* reals in a vector */
    int tile_q;     /* most query rows of a tile; a multiple of lanes, at most 64 */
    int depth_step, row_step;

    /* Around all other calls of a task, on its thread; may be NULL. */
    void (*enter)(void);
    void (*leave)(void);

    /* Qt[d][i] = mult * rows[i][d] for i < nvec * lanes; every row pointer must be readable.
     * bfloat16: mult is 1 or -1. */
    void (*pack_rows)(void *Qt, const char *const *rows, ptrdiff_t D, int nvec, double mult);

    /* Vt[d][k] = V[k][d], rows of packed_stride bytes: V as accumulate wants it, for all tiles of
     * a task. Both axes padded to 32 with zeros. NULL: accumulate takes V itself. */
    void (*pack_values)(void *Vt, ptrdiff_t packed_stride, const char *V, ptrdiff_t v_stride,
                        ptrdiff_t nk, ptrdiff_t Dv);

    /* S[k][:] = sum_d K[k][d] * Qt[d][:], at least inside the span. Meanwhile some tables fetch
     * the two lists of rows in `prefetch` into the caches, side by side; NULL: there are none. */
    void (*scores)(void *S, const void *Qt, const char *K, ptrdiff_t k_stride, ptrdiff_t nk,
                   ptrdiff_t D, int nvec, const qkv_span *span, const qkv_prefetch_rows *prefetch);

    /* S *= c */
    void (*scale)(void *S, ptrdiff_t nk, int nvec, double c);

    /* S = c * tanh(S / c), c in natural units while S is in log2 units. */
    void (*softcap)(void *S, ptrdiff_t nk, int nvec, double c);

    /* S[k][i] -= slope[i] * log2(e) * |position[i] - k|, position relative to the block. */
    void (*alibi)(void *S, ptrdiff_t nk, int nvec, const void *slope, const void *position);

    /* S[k][i] += log2(e) * rows[i][k], and bit i of allow[k] is cleared where that is -inf.
     * shared: all lanes have rows[0]. */
    void (*bias)(void *S, ptrdiff_t nk, int nvec, const char *const *rows, int shared,
                 uint64_t *allow);

    /* bit i of allow[k] stays set only when first[i] <= k <= last[i]. */
    void (*mask_positions)(uint64_t *allow, ptrdiff_t nk, int nvec, const void *first,
                        const void *last);

    /* bit i of allow[k] stays set only when rows[i][k] is true; `stride` bytes between keys. */
    void (*mask_bool)(uint64_t *allow, ptrdiff_t nk, int nvec, const char *const *rows,
                       ptrdiff_t stride);

    /* One step of the online softmax. allow may be NULL (every lane sees every key, all is needed).
     *     m' = max(m, max_k factor * S[k]);  P[k] = exp2(factor * S[k] - m');  rescale = exp2(m - m')
     *     l' = l * rescale + sum_k P[k]
     * An excluded key gets P = -0.0, which no exp2 gives. m starts at the lowest finite real. */
    void (*softmax)(void *S, ptrdiff_t nk, int nvec, const uint64_t *allow, const qkv_span *span,
                    double factor, void *row_max, void *row_sum, void *rescale);

    /* acc[d][:] = acc[d][:] * rescale[:] + sum_k V[k][d] * P[k][:]; rescale NULL: acc is overwritten.
     * V is what pack_values made, if it is there. */
    void (*accumulate)(void *acc, const void *P, const char *V, ptrdiff_t v_stride, ptrdiff_t nk,
                       ptrdiff_t Dv, int nvec, const void *rescale, const qkv_span *span);

    /* acc[d][:] += sum_k V[k][d] * P[k][:] over the infinities and NaN of V alone (never packed),
     * where an excluded key (P = -0.0) adds nothing. */
    void (*accumulate_nonfinite)(void *acc, const void *P, const char *V, ptrdiff_t v_stride,
                           ptrdiff_t nk, ptrdiff_t Dv, int nvec);

    /* S[k][:] *= factors[k]; weights: it is P (of reals), where an excluded key's -0.0 stays. */
    void (*scale_keys)(void *S, ptrdiff_t nk, int nvec, const float *factors, int weights);

    /* Whether every element of V[nk][Dv] is finite. */
    int (*all_finite)(const char *V, ptrdiff_t v_stride, ptrdiff_t nk, ptrdiff_t Dv);

    /* rows[i][d] = acc[d][i] * weight[i] for i < n */
    void (*store_rows)(char *const *rows, int n, const void *acc, ptrdiff_t Dv, int nvec,
                       const void *weight);

    /* total + error = (total + error) * rescale[:] + acc for rows[rows][ld], error being what rounding
     * takes from total: sums of sums that lose no more the longer they are. finish: acc = total + error,
     * or total where that is not finite. */
    void (*fold)(void *total, void *error, void *acc, ptrdiff_t rows, int nvec, const void *rescale,
                 int finish);

    /* The decode kernels (decode_tmpl.h); NULL where operands are no reals. S and P have rows of
     * ld reals: whole vectors, so that the kernels above go between these; or for the softmax
     * here, where all rows see all keys, the power of 2 that holds the rows, up to `lanes`.
     * Q and acc are [rows][stride] reals, padded with zeros to whole vectors. K and V are of any
     * `type` that real can hold, with unit stride along their rows; K[i] is where key
     * i * QKV_KEY_RUN lies and those of its group follow. After the last group come QKV_KEY_RUNS_AHEAD
     * addresses of what is wanted next, to be fetched or not.
     *     S[k][r]   = sum_d K[k][d] * Q[r][d]
     *     acc[r][:] = acc[r][:] * rescale[r] + sum_k P[k][r] * V[k][:]; no rescale: 1
     * partial: some key is excluded from some row. */
    void (*decode_scores)(void *S, ptrdiff_t ld, const void *Q, ptrdiff_t q_stride,
                       const char *const *K, ptrdiff_t k_stride, ptrdiff_t nk, ptrdiff_t D,
                       int rows, int type);
    void (*decode_softmax)(void *S, ptrdiff_t nk, int ld, const float *key_factors,
                        const float *value_factors, void *row_max, void *row_sum, void *rescale);
    void (*decode_accumulate)(void *acc, ptrdiff_t acc_stride, const void *P, ptrdiff_t ld,
                           const char *const *V, ptrdiff_t v_stride, ptrdiff_t nk, ptrdiff_t Dv,
                           int rows, const void *rescale, int partial, int type);

    /* Between n elements of a 16-bit type (or int8, widen alone) and floats, both of unit stride;
     * NULL for double. */
    void (*widen)(void *row, const char *src, ptrdiff_t n, int type);
    void (*narrow)(char *dst, const void *row, ptrdiff_t n, int type);

    /* n rounds of multiply-adds in registers, fma_chain_flop operations each: the speed limit. */
    double (*fma_chain)(ptrdiff_t n);
    int fma_chain_flop;
} qkv_tile_kernels;

#if defined(__GNUC__)
#define QKV_EXPORT __attribute__((visibility("default"))) /* for tests/tile_tables.py */
#else
#define QKV_EXPORT
#endif

/* The tables in this build, weakest ISA first: that ISA's table for an operand type (NULL where it
 * has none of its own), and the ISA's name (NULL past the end). */
QKV_EXPORT const qkv_tile_kernels *qkv_tile_table(int index, int input_type);
QKV_EXPORT const char *qkv_isa_name(int index);

/* Whether this CPU and operating system can execute the tables with that index. */
QKV_EXPORT int qkv_isa_runs(int index);

/* Whether they are also faster than those before them. */
QKV_EXPORT int qkv_isa_is_profitable(int index);

#endif
