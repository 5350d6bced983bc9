/* Modifiers of scores. */
static void scale(void *S_, ptrdiff_t nk, int nvec, double c)
{
    real *S = S_;
    const vec factor = v_set1((real)c);
    for (ptrdiff_t i = 0; i < nk * nvec; i++, S += LANES) v_store(S, v_mul(v_load(S), factor));
}

static void scale_keys(void *S_, ptrdiff_t nk, int nvec, const float *factors, int weights)
{
    real *S = S_;
    for (ptrdiff_t k = 0; k < nk; k++) {
        const vec factor = v_set1((real)factors[k]);
        for (int v = 0; v < nvec; v++, S += LANES) {
            const vec x = v_load(S), y = v_mul(x, factor);
            v_store(S, weights ? v_select_negative(x, x, y) : y);
        }
    }
}

static void softcap(void *S_, ptrdiff_t nk, int nvec, double c)
{
    /* tanh(x) = e / (e + 2) with e = exp(2x) - 1 = 2^y - 1, y = 2 x log2(e); with y = n + f,
     * e = 2^n (2^f - 1) + (2^n - 1) keeps its relative precision around 0. */
    real *S = S_;
    const vec to_y = v_set1((real)(2.0 / c)), limit = v_set1(60), two = v_set1(2);
    const vec back = v_set1((real)(c * LOG2E)), one = v_set1(1);
    for (ptrdiff_t i = 0; i < nk * nvec; i++, S += LANES) {
        const vec y = v_max(v_sub(v_set1(0), limit), v_min(limit, v_mul(v_load(S), to_y)));
        vec n;
        const vec f = v_split(y, &n);
        const vec two_n = v_ldexp(one, n);
        const vec e = v_fma(two_n, v_mul(exp2_slope(f), f), v_sub(two_n, one));
        v_store(S, v_mul(back, v_div(e, v_add(e, two))));
    }
}

static void alibi(void *S_, ptrdiff_t nk, int nvec, const void *slope_, const void *position_)
{
    real *S = S_;
    const real *slope = slope_, *position = position_;
    const ptrdiff_t ld = (ptrdiff_t)nvec * LANES;
    for (int v = 0; v < nvec; v++) {
        const vec factor = v_mul(v_load(slope + v * LANES), v_set1((real)-LOG2E));
        const vec at = v_load(position + v * LANES), one = v_set1(1);
        vec key = v_set1(0);
        real *s = S + v * LANES;
        for (ptrdiff_t k = 0; k < nk; k++, s += ld, key = v_add(key, one))
            v_store(s, v_fma(factor, v_abs(v_sub(at, key)), v_load(s)));
    }
}

/* S + log2(e) * bias. A finite bias stays finite in log2 units: finfo.min is a common stand-in for
 * -inf, but a row that holds nothing else is a plain average, not an empty row. */
#define HUGE_BIAS (-REAL_MAX / 2)
INLINE vec add_huge_bias(vec S, vec bias)
{
    const vec log2e = v_set1((real)LOG2E), lowest = v_set1(-REAL_MAX);
    const vec kept = v_add(v_max(lowest, v_mul(bias, log2e)), S);
    return v_select(v_mask(v_le_bits(bias, v_set1(HUGE_BIAS))), kept, v_fma(bias, log2e, S));
}

static void bias(void *S_, ptrdiff_t nk, int nvec, const char *const *rows, int shared,
                 uint64_t *allow)
{
    real *S = S_;
    const ptrdiff_t ld = (ptrdiff_t)nvec * LANES;
    const vec log2e = v_set1((real)LOG2E), minus_inf = v_set1(-REAL_INF);
    if (shared) {
        for (ptrdiff_t k = 0; k < nk; k++) {
            const real one = load_real(rows[0] + k * (ptrdiff_t)sizeof(real));
            if (one == -REAL_INF) allow[k] = 0;
            for (int v = 0; v < nvec; v++) {
                real *s = S + k * ld + v * LANES;
                v_store(s, add_huge_bias(v_load(s), v_set1(one)));
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
            for (int i = 0; i < LANES; i++) /* the next block, too far apart for the CPU's guess */
                __builtin_prefetch(row[i] + at + nk * (ptrdiff_t)sizeof(real));
            vec least = x[0];
            for (int i = 1; i < LANES; i++) least = v_min(x[i], least);
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
