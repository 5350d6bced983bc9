/* The kernels that touch inputs, for inputs that are reals.
 *
 *     pack_rows             Qt[d][i] = scale * rows[i][d]
 *     scores, accumulate    the product of product_lanes.h, with S or acc as its result
 *     accumulate_nonfinite  acc[d][:] += sum_k V[k][d] * P[k][:] over V's infinities and NaN
 *     all_finite            whether all of V is finite
 *
 * P lies where the scores were: [nk][ld] reals. Qt, P and acc are aligned, the caller's rows need
 * not be. Nothing behind a row is read: its last D % LANES elements are loaded on their own. */
#define DEPTH_STEP 1
#define DEPTH_GROUP 1
#define DECODE_SCORES decode_scores
#define DECODE_ACCUMULATE decode_accumulate
#define DECODE_SOFTMAX decode_softmax
#define PACK_VALUES NULL
#define INPUT_TYPE (REAL_BITS == 32 ? QKV_FLOAT32 : QKV_FLOAT64)

static void pack_rows(void *Qt_, const char *const *rows, ptrdiff_t D, int nvec, double scale_)
{
    real *Qt = Qt_;
    const ptrdiff_t ld = (ptrdiff_t)nvec * LANES;
    const vec scale = v_set1((real)scale_);
    for (int v = 0; v < nvec; v++) {
        const char *const *row = rows + v * LANES;
        for (ptrdiff_t d = 0; d < D; d += LANES) {
            vec x[LANES];
            const ptrdiff_t n = D - d < LANES ? D - d : LANES;
            load_columns(x, row, d * (ptrdiff_t)sizeof(real), n * (ptrdiff_t)sizeof(real));
            for (ptrdiff_t i = 0; i < n; i++)
                v_store(Qt + (d + i) * ld + v * LANES, v_mul(x[i], scale));
        }
    }
}

/* P[k..k + count) = p, for the softmax. */
INLINE void store_weights(real *S, ptrdiff_t ld, ptrdiff_t k, const vec *p, const int count)
{
    for (int i = 0; i < count; i++) v_store(S + (k + i) * ld, p[i]);
}

/* P = -0.0 outside [begin, end), where the softmax stores nothing. */
INLINE void fill_weights(real *S, ptrdiff_t ld, ptrdiff_t begin, ptrdiff_t end, ptrdiff_t nk)
{
    for (ptrdiff_t k = 0; k < begin; k++) v_store(S + k * ld, v_set1((real)-0.0));
    for (ptrdiff_t k = end; k < nk; k++) v_store(S + k * ld, v_set1((real)-0.0));
}

static void accumulate_nonfinite(void *acc_, const void *P_, const char *V, ptrdiff_t v_stride,
                                 ptrdiff_t nk, ptrdiff_t Dv, int nvec)
{
    real *acc = acc_;
    const real *P = P_;
    const ptrdiff_t ld = (ptrdiff_t)nvec * LANES;
    for (ptrdiff_t k = 0; k < nk; k++) {
        for (ptrdiff_t d = 0; d < Dv; d++) {
            const real x = load_real(V + k * v_stride + d * (ptrdiff_t)sizeof(real));
            if (x - x == 0) continue;
            for (int v = 0; v < nvec; v++) {
                real *c = acc + d * ld + v * LANES;
                const vec p = v_load(P + k * ld + v * LANES), sum = v_load(c);
                v_store(c, v_select_negative(p, sum, v_fma(v_set1(x), p, sum)));
            }
        }
    }
}

static int all_finite(const char *V, ptrdiff_t v_stride, ptrdiff_t nk, ptrdiff_t Dv)
{
    const vec zero = v_set1(0);
    vec sum = zero; /* x * 0 is 0, or NaN if x is not finite */
    for (ptrdiff_t k = 0; k < nk; k++, V += v_stride) {
        ptrdiff_t d = 0;
        for (; d + LANES <= Dv; d += LANES)
            sum = v_fma(v_load((const real *)(V + d * (ptrdiff_t)sizeof(real))), zero, sum);
        if (d < Dv)
            sum = v_fma(load_bytes(V + d * (ptrdiff_t)sizeof(real),
                                   (Dv - d) * (ptrdiff_t)sizeof(real)), zero, sum);
    }
    return v_le_bits(sum, zero) == ALL_LANES;
}

static void scores(void *S, const void *Qt, const char *K, ptrdiff_t k_stride, ptrdiff_t nk,
                   ptrdiff_t D, int nvec, const qkv_span *span, const qkv_prefetch_rows *prefetch)
{
    qkv_prefetch_rows lists[2];
    if (prefetch) { /* a loop of its own: a test in the inner loop costs AVX2 2 % */
        memcpy(lists, prefetch, sizeof lists);
        product(S, Qt, K, k_stride, sizeof(real), nk, D, nvec, NULL, span, 1, lists);
    } else {
        product(S, Qt, K, k_stride, sizeof(real), nk, D, nvec, NULL, span, 1, NULL);
    }
}

static void accumulate(void *acc, const void *P, const char *V, ptrdiff_t v_stride, ptrdiff_t nk,
                       ptrdiff_t Dv, int nvec, const void *rescale, const qkv_span *span)
{
    product(acc, P, V, sizeof(real), v_stride, Dv, nk, nvec, rescale, span, 0, NULL);
}
