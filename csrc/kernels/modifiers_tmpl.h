/* What changes scores between the product and the softmax.
 *
 *     scale       S *= scale
 *     scale_keys  S[k][:] *= scales[k]
 *     softcap     S = cap * tanh(S / cap)
 *     alibi       S[k][i] -= slope[i] * log2(e) * |position[i] - k|
 *     bias        S[k][i] += log2(e) * rows[i][k]; a bias of -inf excludes the key
 *
 * S is [nk][ld] reals, aligned, in log2 units; ld is whole vectors, so there are no tails. Rows of
 * a bias are the caller's: any alignment, and the last nk % LANES keys are loaded without what
 * lies behind them. */
static void scale(void *S_, ptrdiff_t nk, int nvec, double scale_)
{
    real *S = S_;
    const vec scale = v_set1((real)scale_);
    for (ptrdiff_t i = 0; i < nk * nvec; i++, S += LANES) v_store(S, v_mul(v_load(S), scale));
}

static void scale_keys(void *S_, ptrdiff_t nk, int nvec, const float *scales, int weights)
{
    real *S = S_;
    for (ptrdiff_t k = 0; k < nk; k++) {
        const vec scale = v_set1((real)scales[k]);
        for (int v = 0; v < nvec; v++, S += LANES) {
            const vec x = v_load(S), scaled = v_mul(x, scale);
            v_store(S, weights ? v_select_negative(x, x, scaled) : scaled);
        }
    }
}

static void softcap(void *S_, ptrdiff_t nk, int nvec, double cap)
{
    /* tanh(x) = e / (e + 2) with e = exp(2x) - 1 = 2^y - 1, y = 2 x log2(e). With y = n + f, e =
     * 2^n (2^f - 1) + (2^n - 1) keeps its relative precision around 0. From y = 60 on, tanh is 1
     * in both reals. */
    real *S = S_;
    const vec to_y = v_set1((real)(2.0 / cap)), limit = v_set1(60), two = v_set1(2);
    const vec cap_log2 = v_set1((real)(cap * LOG2E)), one = v_set1(1);
    for (ptrdiff_t i = 0; i < nk * nvec; i++, S += LANES) {
        const vec y = v_max(v_sub(v_set1(0), limit), v_min(limit, v_mul(v_load(S), to_y)));
        vec n;
        const vec f = v_split(y, &n);
        const vec two_n = v_ldexp(one, n);
        const vec e = v_fma(two_n, v_mul(exp2_slope(f), f), v_sub(two_n, one));
        v_store(S, v_mul(cap_log2, v_div(e, v_add(e, two))));
    }
}

static void alibi(void *S_, ptrdiff_t nk, int nvec, const void *slope_, const void *position_)
{
    real *S = S_;
    const real *slope = slope_, *position = position_;
    const ptrdiff_t ld = (ptrdiff_t)nvec * LANES;
    for (int v = 0; v < nvec; v++) {
        const vec slope_log2 = v_mul(v_load(slope + v * LANES), v_set1((real)-LOG2E));
        const vec query_at = v_load(position + v * LANES), one = v_set1(1);
        vec key_at = v_set1(0);
        real *s = S + v * LANES;
        for (ptrdiff_t k = 0; k < nk; k++, s += ld, key_at = v_add(key_at, one))
            v_store(s, v_fma(slope_log2, v_abs(v_sub(query_at, key_at)), v_load(s)));
    }
}

/* S + log2(e) * bias, where a finite bias stays finite in log2 units. Callers write finfo.min for
 * -inf, but a row that holds nothing else is a plain average, not an empty row. */
#define HUGE_BIAS (-REAL_MAX / 2)
INLINE vec add_huge_bias(vec S, vec bias)
{
    const vec log2e = v_set1((real)LOG2E), lowest = v_set1(-REAL_MAX);
    const vec clamped = v_add(v_max(lowest, v_mul(bias, log2e)), S);
    return v_select(v_mask(v_le_bits(bias, v_set1(HUGE_BIAS))), clamped, v_fma(bias, log2e, S));
}

static void bias(void *S_, ptrdiff_t nk, int nvec, const char *const *rows, int shared,
                 uint64_t *allow)
{
    real *S = S_;
    const ptrdiff_t ld = (ptrdiff_t)nvec * LANES;
    const vec log2e = v_set1((real)LOG2E), minus_inf = v_set1(-REAL_INF);
    if (shared) {
        for (ptrdiff_t k = 0; k < nk; k++) {
            const real key_bias = load_real(rows[0] + k * (ptrdiff_t)sizeof(real));
            if (key_bias == -REAL_INF) allow[k] = 0;
            for (int v = 0; v < nvec; v++) {
                real *s = S + k * ld + v * LANES;
                v_store(s, add_huge_bias(v_load(s), v_set1(key_bias)));
            }
        }
        return;
    }
    for (int v = 0; v < nvec; v++) {
        const char *const *row = rows + v * LANES;
        for (ptrdiff_t k = 0; k < nk; k += LANES) {
            vec x[LANES];
            const ptrdiff_t n = nk - k < LANES ? nk - k : LANES;
            const ptrdiff_t at = k * (ptrdiff_t)sizeof(real);
            load_columns(x, row, at, n * (ptrdiff_t)sizeof(real));
            for (int i = 0; i < LANES; i++) /* the next block: too far for the CPU to foresee */
                __builtin_prefetch(row[i] + at + nk * (ptrdiff_t)sizeof(real));
            vec least = v_set1(0); /* a NaN does not replace it */
            for (int i = 0; i < LANES; i++) least = v_min(x[i], least);
            real *s = S + k * ld + v * LANES;
            if (!v_le_bits(least, v_set1(HUGE_BIAS))) {
                for (ptrdiff_t i = 0; i < n; i++, s += ld)
                    v_store(s, v_fma(x[i], log2e, v_load(s)));
                continue;
            }
            for (ptrdiff_t i = 0; i < n; i++, s += ld) {
                allow[k + i] &= ~(v_le_bits(x[i], minus_inf) << (v * LANES));
                v_store(s, add_huge_bias(v_load(s), x[i]));
            }
        }
    }
}
