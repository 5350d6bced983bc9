/* The contract between the engine (Cython) and the kernels (C).
 *
 * The engine walks over query tiles and blocks of keys. A kernel does one step of the arithmetic
 * for one tile and one block. It allocates nothing, calls no libm and knows of no threads.
 *
 * A query tile has up to `tile_q` rows, one per vector lane. A kernel works on `nvec` vectors of
 * `lanes` lanes, so a scratch matrix is [rows][ld] with ld = nvec * lanes, aligned to 64 bytes. A
 * lane's result depends neither on other lanes nor on nvec.
 *
 * "real" is float or double; the table says which. An "input" is an element that the products
 * multiply: a real, or a bfloat16 whose products are summed in float. */
#ifndef QKV_TILE_KERNELS_H
#define QKV_TILE_KERNELS_H

#include <stddef.h>
#include <stdint.h>

/* Layouts:
 *
 *     Qt    [D][ld]    packed queries, inputs
 *     S     [nk][ld]   scores of a block of keys, reals; softmax turns it into P
 *     P     [nk][ld]   probabilities, inputs, in the memory of S
 *     acc   [Dv][ld]   output accumulator, reals
 *     allow [nk]       bit i of allow[k] is set if lane i may attend to key k
 *     span  [nvec]     vector v needs the keys [begin, end) only; NULL: all vectors need all keys
 *
 * bfloat16 inputs lie in groups along the axis that a product sums over. In pairs, Qt is
 * [D / 2][ld][2] and P is [nk / 2][ld][2]. In quads, Qt is [D / 4][2][ld / 2][4] and P is
 * [nk / 4][2][ld / 2][4], where the axis of 2 are a vector's first and last lanes; vectors have 4.
 * The engine pads that axis with zeros to a multiple of depth_step, and the other axis of K and V
 * (the rows of S and acc) to a multiple of row_step. Both are 1 for reals.
 *
 * K stays in the caller's memory, and so does V if pack_values is NULL. Their last axis has unit
 * stride. Their rows may be any number of bytes apart (zero and negative too), at any alignment. */

#define QKV_KEY_RUN 16       /* keys of a run: decode kernels want them `k_stride` bytes apart */
#define QKV_KEY_RUNS_AHEAD 4 /* addresses behind those of a block's runs, to prefetch from */

/* Declares a struct. dispatch.c also keeps the text, from which tests/kernels/tile_tables.py reads
 * the fields that the library was built with. */
#ifndef QKV_STRUCT
#define QKV_STRUCT(name, ...) typedef struct {__VA_ARGS__} name
#endif

typedef struct {
    int begin, end;
} qkv_span;

/* Rows to prefetch: `count` of `bytes` bytes, `stride` apart; the first one from its byte `at` on.
 */
typedef struct {
    const char *row;
    ptrdiff_t stride, bytes, count, at;
} qkv_prefetch_rows;

QKV_STRUCT(qkv_tile_kernels,
    const char *isa;
    int real_bytes; /* 4: float, 8: double */
    int input_type; /* QKV_FLOAT32, QKV_FLOAT64 or QKV_BFLOAT16 of convert.h */
    int lanes;      /* reals in a vector */
    int tile_q;     /* most query rows of a tile: a multiple of lanes, at most 64 */
    int depth_step, row_step;
    int depth_group; /* inputs that lie side by side: 1, or 2 (pairs) or 4 (quads) bfloat16 */

    /* The engine calls these on a task's thread, before and after all other kernels of the task.
     * NULL: there is nothing to prepare. */
    void (*enter)(void);
    void (*leave)(void);

    /* Qt[d][i] = scale * rows[i][d] for i < nvec * lanes. Every row pointer must be readable.
     * For bfloat16, scale is 1 or -1. */
    void (*pack_rows)(void *Qt, const char *const *rows, ptrdiff_t D, int nvec, double scale);

    /* Vt[d][k] = V[k][d], in rows of packed_stride bytes. It pads d with zeros to row_step and k to
     * depth_step, and writes nothing from the next multiples of 32 on. All tiles of a task share
     * Vt. NULL: accumulate takes V itself. */
    void (*pack_values)(void *Vt, ptrdiff_t packed_stride, const char *V, ptrdiff_t v_stride,
                        ptrdiff_t nk, ptrdiff_t Dv);

    /* S[k][:] = sum_d K[k][d] * Qt[d][:], at least inside the span. Some tables prefetch the two
     * lists of rows in `prefetch` meanwhile, side by side. NULL: there is nothing to prefetch. */
    void (*scores)(void *S, const void *Qt, const char *K, ptrdiff_t k_stride, ptrdiff_t nk,
                   ptrdiff_t D, int nvec, const qkv_span *span, const qkv_prefetch_rows *prefetch);

    /* S *= scale */
    void (*scale)(void *S, ptrdiff_t nk, int nvec, double scale);

    /* S = cap * tanh(S / cap). cap is in natural units, S is in log2 units. */
    void (*softcap)(void *S, ptrdiff_t nk, int nvec, double cap);

    /* S[k][i] -= slope[i] * log2(e) * |position[i] - k|. Positions count from the block's start. */
    void (*alibi)(void *S, ptrdiff_t nk, int nvec, const void *slope, const void *position);

    /* S[k][i] += log2(e) * rows[i][k]. Where that bias is -inf, bit i of allow[k] is cleared.
     * shared: rows[0] serves all lanes. */
    void (*bias)(void *S, ptrdiff_t nk, int nvec, const char *const *rows, int shared,
                 uint64_t *allow);

    /* Bit i of allow[k] stays set only if rows[i][k] is true; keys are `stride` bytes apart. */
    void (*mask_bool)(uint64_t *allow, ptrdiff_t nk, int nvec, const char *const *rows,
                      ptrdiff_t stride);

    /* One step of the online softmax:
     *     row_max' = max(row_max, max_k scale * S[k])
     *     P[k]     = exp2(scale * S[k] - row_max')
     *     rescale  = exp2(row_max - row_max')
     *     row_sum' = row_sum * rescale + sum_k P[k]
     * A key that allow excludes gets P = -0.0, which exp2 never gives. allow NULL: every lane may
     * attend to every key, and span is not read. row_max starts at the lowest finite real. */
    void (*softmax)(void *S, ptrdiff_t nk, int nvec, const uint64_t *allow, const qkv_span *span,
                    double scale, void *row_max, void *row_sum, void *rescale);

    /* Sums over the keys of a block. P and row_max' are those of softmax with scale 1; S stays.
     *     sums[0] = sum_k P[k]                     sums[1] = sum_k P[k] * (row_max' - S[k])
     *     sums[2] = sum_k P[k] * |position - k|    sums[3] = the first k with the largest S[k]
     * sums is [4][ld]; position counts from the block's start. A key that allow excludes adds
     * nothing. sums[3] is any number in lanes that may attend to no key. */
    void (*statistics)(const void *S, ptrdiff_t nk, int nvec, const uint64_t *allow,
                       const qkv_span *span, const void *position, void *row_max, void *sums);

    /* acc[d][:] = acc[d][:] * rescale[:] + sum_k V[k][d] * P[k][:]. rescale NULL: acc is
     * overwritten. V is what pack_values made, if the table has that. */
    void (*accumulate)(void *acc, const void *P, const char *V, ptrdiff_t v_stride, ptrdiff_t nk,
                       ptrdiff_t Dv, int nvec, const void *rescale, const qkv_span *span);

    /* acc[d][:] += sum_k V[k][d] * P[k][:] over the infinities and NaN of V alone, where an
     * excluded key (P = -0.0) adds nothing. V is never packed here. */
    void (*accumulate_nonfinite)(void *acc, const void *P, const char *V, ptrdiff_t v_stride,
                                 ptrdiff_t nk, ptrdiff_t Dv, int nvec);

    /* S[k][:] *= scales[k]. weights: S is P (of reals), and an excluded key's -0.0 stays. */
    void (*scale_keys)(void *S, ptrdiff_t nk, int nvec, const float *scales, int weights);

    /* Whether every element of V[nk][Dv] is finite. */
    int (*all_finite)(const char *V, ptrdiff_t v_stride, ptrdiff_t nk, ptrdiff_t Dv);

    /* rows[i][d] = acc[d][i] * weight[i] for i < count */
    void (*store_rows)(char *const *rows, int count, const void *acc, ptrdiff_t Dv, int nvec,
                       const void *weight);

    /* total + error = (total + error) * rescale[:] + acc, each of them [rows][ld]. error is what
     * rounding takes from total, so a sum of many blocks loses no more than a sum of few. finish:
     * acc = total + error, or total where that is not finite. */
    void (*fold)(void *total, void *error, void *acc, ptrdiff_t rows, int nvec, const void *rescale,
                 int finish);

    /* The decode kernels, for few query rows; NULL if inputs are not reals.
     *     S[k][r]   = sum_d K[k][d] * Q[r][d]
     *     acc[r][:] = acc[r][:] * rescale[r] + sum_k P[k][r] * V[k][:]; rescale NULL: 1
     * Q and acc are [rows][stride] reals, padded with zeros to whole vectors. K and V hold elements
     * of any `type` that real can represent, with unit stride along their rows. K[i] is the address
     * of run i, the keys from i * QKV_KEY_RUN on. QKV_KEY_RUNS_AHEAD addresses follow those of the
     * block: what the caller reads next, to be prefetched or not. masked: P excludes some keys.
     * S and P have rows of ld reals. The kernels above can work on them if ld is whole vectors.
     * decode_softmax is for rows that may attend to all keys: there ld is the power of 2, at most
     * `lanes`, that holds the rows. It multiplies S by key_scales first and P by value_scales last;
     * NULL: 1. Elsewhere, its arguments are those of softmax. */
    void (*decode_scores)(void *S, ptrdiff_t ld, const void *Q, ptrdiff_t q_stride,
                          const char *const *K, ptrdiff_t k_stride, ptrdiff_t nk, ptrdiff_t D,
                          int rows, int type);
    void (*decode_softmax)(void *S, ptrdiff_t nk, int ld, const float *key_scales,
                           const float *value_scales, void *row_max, void *row_sum, void *rescale);
    void (*decode_accumulate)(void *acc, ptrdiff_t acc_stride, const void *P, ptrdiff_t ld,
                              const char *const *V, ptrdiff_t v_stride, ptrdiff_t nk, ptrdiff_t Dv,
                              int rows, const void *rescale, int masked, int type);

    /* row[0..n) = src[0..n): n elements of a 16-bit type or int8 as floats. NULL: real is double.
     */
    void (*widen)(void *row, const char *src, ptrdiff_t n, int type);

    /* dst[0..n) = row[0..n): n floats rounded to a 16-bit type. NULL: real is double. */
    void (*narrow)(char *dst, const void *row, ptrdiff_t n, int type);

    /* out[0..n) = sum_i weights[i] * parts[i][0..n), in the order of the `count` parts. weights are
     * reals, parts hold elements of any `type` that real can represent, out of `out_type`: real or,
     * if that is float, a 16-bit type to which the sums are rounded. out may be one of the parts.
     * An element's sum does not depend on where it stands; one of zeros, or of no part, is +0. */
    void (*merge_rows)(char *out, int out_type, const char *const *parts, const void *weights,
                       ptrdiff_t count, ptrdiff_t n, int type);

    /* Runs n rounds of multiply-adds in registers, fma_chain_flop operations each: the speed limit
     * that benchmarks compare with. */
    double (*fma_chain)(ptrdiff_t n);
    int fma_chain_flop;
);

#if defined(__GNUC__)
#define QKV_EXPORT __attribute__((visibility("default"))) /* for tests/kernels/tile_tables.py */
#else
#define QKV_EXPORT
#endif

/* ISAs of this build are numbered from 0, the weakest, on. */

/* The ISA's table for an input type; NULL if it has none of its own. */
QKV_EXPORT const qkv_tile_kernels *qkv_tile_table(int index, int input_type);

/* The ISA's name; NULL behind the last one. */
QKV_EXPORT const char *qkv_isa_name(int index);

/* Whether this CPU and operating system can execute the ISA's tables. */
QKV_EXPORT int qkv_isa_runs(int index);

/* Whether they can, and the tables are faster than those of weaker ISAs. */
QKV_EXPORT int qkv_isa_is_profitable(int index);

/* The size and the fields, as C text, of the qkv_tile_kernels that the library was built with. */
QKV_EXPORT size_t qkv_kernels_size(void);
QKV_EXPORT const char *qkv_kernels_fields(void);

#endif
