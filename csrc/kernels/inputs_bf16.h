/* The kernels that touch inputs, for bfloat16 inputs that products take in pairs or quads.
 *
 *     pack_rows             Qt[d / 2][i] = (rows[i][d], rows[i][d + 1]), negated if scale is -1
 *                           (in quads: as kernels.h says)
 *     pack_values           Vt[d][k] = V[k][d]
 *     scores, accumulate    the product of product_*.h, with S or acc as its result
 *     accumulate_nonfinite  acc[d][:] += sum_k V[k][d] * P[k][:] over V's infinities and NaN
 *     all_finite            whether all of V is finite
 *
 * A pair takes the place of a float in vectors and scratch. P lies in the first half of the
 * scores' memory: [nk / 2][ld] pairs. Qt, P, Vt and acc are aligned, the caller's rows need not
 * be. Nothing behind a row is read. Zeros fill Qt, P and Vt up to DEPTH_STEP and ROW_STEP. */
#define DECODE_SCORES NULL /* float32's tables serve bfloat16 too */
#define DECODE_ACCUMULATE NULL
#define DECODE_SOFTMAX NULL
#define INPUT_TYPE QKV_BFLOAT16
#ifndef DEPTH_STEP
#define DEPTH_STEP 2
#endif

/* GROUP_ROWS vectors of pairs, whose pairs follow one another along a sum, make up the groups that
 * products take. ungroup_pairs is the inverse of group_pairs. */
#ifdef QKV_QUADS
#define DEPTH_GROUP 4
INLINE void group_pairs(vec x[2]) { v_quads_of_pairs(x); }
INLINE void ungroup_pairs(vec x[2]) { v_pairs_of_quads(x); }
#else
#define DEPTH_GROUP 2
INLINE void group_pairs(vec x[1]) { (void)x; }
INLINE void ungroup_pairs(vec x[1]) { (void)x; }
#endif
#define GROUP_ROWS (DEPTH_GROUP / 2)

static void pack_rows(void *Qt_, const char *const *rows, ptrdiff_t D, int nvec, double scale)
{
    real *Qt = Qt_;
    const ptrdiff_t ld = (ptrdiff_t)nvec * LANES, bytes = 2 * D;
    const ptrdiff_t pairs = (D + DEPTH_STEP - 1) / DEPTH_STEP * DEPTH_STEP / 2;
    for (int v = 0; v < nvec; v++) {
        const char *const *row = rows + v * LANES;
        for (ptrdiff_t d = 0; d < pairs; d += LANES) {
            vec x[LANES];
            load_columns(x, row, 4 * d, bytes - 4 * d);
            for (ptrdiff_t i = 0; i < LANES && d + i < pairs; i += GROUP_ROWS) {
                group_pairs(x + i);
                for (ptrdiff_t j = i; j < i + GROUP_ROWS; j++)
                    v_store(Qt + (d + j) * ld + v * LANES,
                            scale < 0 ? v_negate_pairs(x[j]) : x[j]);
            }
        }
    }
}

/* Zeros in the lanes from `first` on. */
INLINE void clear_lanes_from(vec x[LANES], ptrdiff_t first)
{
    const uint64_t live = first <= 0 ? 0 : ~(~UINT64_C(0) << first);
    for (int i = 0; i < LANES; i++) x[i] = v_select(v_mask(live), x[i], v_set1(0));
}

/* A block of 2 * LANES keys by 2 * LANES elements is two transposes of pairs (d, d + 1), whose
 * pairs are then put together as (k, k + 1). */
static void pack_values(void *Vt_, ptrdiff_t packed_stride, const char *V, ptrdiff_t v_stride,
                        ptrdiff_t nk, ptrdiff_t Dv)
{
    for (ptrdiff_t k = 0; k < nk; k += 2 * LANES) {
        for (ptrdiff_t d = 0; d < Dv; d += 2 * LANES) {
            vec x[2][LANES];
            const ptrdiff_t bytes = 2 * (Dv - d);
            for (int half = 0; half < 2; half++) {
                const char *rows[LANES];
                const ptrdiff_t first = k + half * LANES;
                for (ptrdiff_t i = 0; i < LANES; i++)
                    rows[i] = V + (first + i < nk ? first + i : nk - 1) * v_stride;
                load_columns(x[half], rows, 2 * d, bytes);
                if (first + LANES > nk) clear_lanes_from(x[half], nk - first);
            }
            char *to = (char *)Vt_ + d * packed_stride + 2 * k;
            for (int i = 0; i < LANES; i++, to += 2 * packed_stride) {
                v_store((real *)to, v_first_of_pairs(x[0][i], x[1][i]));
                v_store((real *)(to + packed_stride), v_second_of_pairs(x[0][i], x[1][i]));
            }
        }
    }
}
#define PACK_VALUES pack_values

/* P[k..k + count) = p, for the softmax. k is a multiple of DEPTH_GROUP. p is -0.0 behind count, up
 * to the end of the last group. */
INLINE void store_weights(real *S, ptrdiff_t ld, ptrdiff_t k, const vec *p, const int count)
{
    for (int i = 0; i < count; i += DEPTH_GROUP) {
        vec x[GROUP_ROWS];
        UNROLL for (int j = 0; j < GROUP_ROWS; j++)
            x[j] = v_to_pairs(p[i + 2 * j], p[i + 2 * j + 1]);
        group_pairs(x);
        UNROLL for (int j = 0; j < GROUP_ROWS; j++) v_store(S + ((k + i) / 2 + j) * ld, x[j]);
    }
}

/* P = -0.0 outside [begin, end), where the softmax stores nothing, up to the padded end. */
INLINE void fill_weights(real *S, ptrdiff_t ld, ptrdiff_t begin, ptrdiff_t end, ptrdiff_t nk)
{
    const vec none = v_to_pairs(v_set1(-0.0f), v_set1(-0.0f));
    const ptrdiff_t padded = (nk + DEPTH_STEP - 1) / DEPTH_STEP * DEPTH_STEP / 2;
    ptrdiff_t k = (end + DEPTH_GROUP - 1) / DEPTH_GROUP * GROUP_ROWS;
    for (; k < padded; k++) v_store(S + k * ld, none);
    for (k = 0; k < begin / 2; k++) v_store(S + k * ld, none);
}

/* The vector of pairs that has key k. */
INLINE vec load_weights(const real *P, ptrdiff_t ld, ptrdiff_t k)
{
    vec x[GROUP_ROWS];
    for (int i = 0; i < GROUP_ROWS; i++)
        x[i] = v_load(P + (k / DEPTH_GROUP * GROUP_ROWS + i) * ld);
    ungroup_pairs(x);
    return x[k % DEPTH_GROUP / 2];
}

static void accumulate_nonfinite(void *acc_, const void *P_, const char *V, ptrdiff_t v_stride,
                                 ptrdiff_t nk, ptrdiff_t Dv, int nvec)
{
    real *acc = acc_;
    const real *P = P_;
    const ptrdiff_t ld = (ptrdiff_t)nvec * LANES;
    for (ptrdiff_t k = 0; k < nk; k++) {
        for (ptrdiff_t d = 0; d < Dv; d++) {
            uint16_t bits;
            memcpy(&bits, V + k * v_stride + 2 * d, sizeof bits);
            if ((bits & 0x7f80u) != 0x7f80u) continue;
            const vec x = v_set1(float_of_bfloat(bits));
            for (int v = 0; v < nvec; v++) {
                real *c = acc + d * ld + v * LANES;
                const vec pair = load_weights(P + v * LANES, ld, k), sum = v_load(c);
                const vec p = k % 2 ? v_second_of_pair(pair) : v_first_of_pair(pair);
                v_store(c, v_select_negative(p, sum, v_fma(x, p, sum)));
            }
        }
    }
}

static int all_finite(const char *V, ptrdiff_t v_stride, ptrdiff_t nk, ptrdiff_t Dv)
{
    int nonfinite = 0;
    for (ptrdiff_t k = 0; k < nk; k++, V += v_stride) {
        for (ptrdiff_t d = 0; d < Dv; d++) {
            uint16_t bits;
            memcpy(&bits, V + 2 * d, sizeof bits);
            nonfinite |= (bits & 0x7f80u) == 0x7f80u;
        }
    }
    return !nonfinite;
}

/* Spans are not used: they would have to be padded too, and would save little. */
static void scores(void *S, const void *Qt, const char *K, ptrdiff_t k_stride, ptrdiff_t nk,
                   ptrdiff_t D, int nvec, const qkv_span *span, const qkv_prefetch_rows *prefetch)
{
    const ptrdiff_t rows = (nk + ROW_STEP - 1) / ROW_STEP * ROW_STEP;
    const ptrdiff_t pairs = (D + DEPTH_STEP - 1) / DEPTH_STEP * DEPTH_STEP / 2;
    qkv_prefetch_rows lists[2];
    (void)span;
    if (prefetch) { /* a loop of its own, as for reals */
        memcpy(lists, prefetch, sizeof lists);
        product(S, Qt, K, k_stride, 4, rows, pairs, nvec, NULL, NULL, 1, lists);
    } else {
        product(S, Qt, K, k_stride, 4, rows, pairs, nvec, NULL, NULL, 1, NULL);
    }
}

static void accumulate(void *acc, const void *P, const char *Vt, ptrdiff_t v_stride, ptrdiff_t nk,
                       ptrdiff_t Dv, int nvec, const void *rescale, const qkv_span *span)
{
    (void)span;
    product(acc, P, Vt, v_stride, 4, (Dv + ROW_STEP - 1) / ROW_STEP * ROW_STEP,
            (nk + DEPTH_STEP - 1) / DEPTH_STEP * DEPTH_STEP / 2, nvec, rescale, NULL, 0, NULL);
}
