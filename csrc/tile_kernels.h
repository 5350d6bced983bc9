/* The contract between the loop nest (src/qkv_fast/_engine.pyx) and the tile kernels.
 *
 * A tile is up to `tile_q` query rows, one per vector lane; a kernel works on `nvec` vectors of
 * `lanes` of them, so every scratch matrix is [rows][ld] with ld = nvec * lanes, aligned to 64
 * bytes. "real" is float or double; the table says which. Scores live in units of log2: the
 * queries are packed with scale * log2(e) multiplied in, so that the softmax is an exp2.
 *
 *     Qt    [D][ld]    packed queries
 *     S     [nk][ld]   scores of one key block, later its probabilities
 *     acc   [Dv][ld]   output accumulator
 *     allow [nk]       bit i of allow[k]: may lane i attend to key k
 *
 * K and V stay in the caller's memory: unit stride along their last axis, any stride in bytes
 * (negative and zero too) between rows, any alignment. A lane's result never depends on the
 * other lanes nor on nvec. Kernels do not allocate, call libm or know of threads. */
#ifndef QKV_TILE_KERNELS_H
#define QKV_TILE_KERNELS_H

#include <stddef.h>
#include <stdint.h>

typedef struct {
    const char *isa;
    int real_bytes; /* 4: float, 8: double */
    int lanes;      /* reals in a vector */
    int tile_q;     /* most query rows of a tile; a multiple of lanes, at most 64 */

    /* Qt[d][i] = mult * rows[i][d] for i < nvec * lanes; every row pointer must be readable. */
    void (*pack_rows)(void *Qt, const char *const *rows, ptrdiff_t D, int nvec, double mult);

    /* S[k][:] = sum_d K[k][d] * Qt[d][:] */
    void (*scores)(void *S, const void *Qt, const char *K, ptrdiff_t k_stride, ptrdiff_t nk,
                   ptrdiff_t D, int nvec);

    /* S = c * tanh(S / c), c in natural units while S is in log2 units. */
    void (*softcap)(void *S, ptrdiff_t nk, int nvec, double c);

    /* S[k][i] -= slope[i] * log2(e) * |position[i] - k|, position relative to the block. */
    void (*alibi)(void *S, ptrdiff_t nk, int nvec, const void *slope, const void *position);

    /* S[k][i] += log2(e) * rows[i][k], and bit i of allow[k] is cleared where that is -inf.
     * shared: all lanes have rows[0]. */
    void (*bias)(void *S, ptrdiff_t nk, int nvec, const char *const *rows, int shared,
                 uint64_t *allow);

    /* bit i of allow[k] stays set only when first[i] <= k <= last[i]. */
    void (*limit_range)(uint64_t *allow, ptrdiff_t nk, int nvec, const void *first,
                        const void *last);

    /* One step of the online softmax. allow may be NULL: every lane sees every key.
     *     m' = max(m, max_k S[k]);  P[k] = exp2(S[k] - m');  decay = exp2(m - m')
     *     l' = l * decay + sum_k P[k]
     * An excluded key gets P = -0.0, which no exp2 gives. m starts at the lowest finite real. */
    void (*softmax)(void *S, ptrdiff_t nk, int nvec, const uint64_t *allow, void *row_max,
                    void *row_sum, void *decay);

    /* acc[d][:] = acc[d][:] * decay[:] + sum_k V[k][d] * P[k][:]; decay NULL: acc is overwritten. */
    void (*accumulate)(void *acc, const void *P, const char *V, ptrdiff_t v_stride, ptrdiff_t nk,
                       ptrdiff_t Dv, int nvec, const void *decay);

    /* acc[d][:] += sum_k V[k][d] * P[k][:] over the infinities and NaN of V alone, where an excluded
     * key (P = -0.0) adds nothing. */
    void (*accumulate_odd)(void *acc, const void *P, const char *V, ptrdiff_t v_stride,
                           ptrdiff_t nk, ptrdiff_t Dv, int nvec);

    /* Whether every element of V[nk][Dv] is finite. */
    int (*all_finite)(const char *V, ptrdiff_t v_stride, ptrdiff_t nk, ptrdiff_t Dv);

    /* rows[i][d] = acc[d][i] * weight[i] for i < n */
    void (*store_rows)(char *const *rows, int n, const void *acc, ptrdiff_t Dv, int nvec,
                       const void *weight);

    /* 2 * 24 * lanes * n floating-point operations in registers, to measure the FMA peak. */
    double (*fma_chain)(ptrdiff_t n);
} qkv_tile_kernels;

#if defined(__GNUC__)
#define QKV_EXPORT __attribute__((visibility("default"))) /* for tests/tile_tables.py */
#else
#define QKV_EXPORT
#endif

/* The tables in this build, weakest first, for real_bytes 4 or 8; NULL past the end. */
QKV_EXPORT const qkv_tile_kernels *qkv_tile_table(int index, int real_bytes);

/* Whether this CPU and operating system can execute the table with that index. */
QKV_EXPORT int qkv_tile_table_runs(int index);

#endif
