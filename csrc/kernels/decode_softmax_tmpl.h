/* Softmax. */
/* The softmax of tiles (tile_tmpl.h) where S[k] is ld reals, ld a power of 2: a lane stands for a row
 * and every LANES / ld-th key, and what those lanes found is put together in the end. Scores are
 * multiplied by key_factors before, weights by value_factors afterwards, unless those are NULL. */
static void decode_softmax(void *S_, ptrdiff_t nk, int ld, const float *key_factors,
                        const float *value_factors, void *row_max, void *row_sum, void *decay_)
{
    real *S = S_, lane[2 * LANES];
    const ptrdiff_t count = nk * ld;
    vec best = v_set1(-REAL_INF), total = v_set1(0);
    if (key_factors)
        for (ptrdiff_t i = 0; i < count; i += LANES)
            v_store(S + i, v_mul(v_load(S + i), v_repeat(key_factors + i / ld, ld)));
    for (ptrdiff_t i = count; i % LANES; i++) S[i] = -REAL_INF;
    for (ptrdiff_t i = 0; i < count; i += LANES) best = v_max(best, v_load(S + i));
    v_store(lane, best);
    for (int n = LANES / 2; n >= ld; n /= 2)
        for (int i = 0; i < n; i++) lane[i] = lane[i + n] > lane[i] ? lane[i + n] : lane[i];
    for (int i = ld; i < LANES; i++) lane[i] = lane[i - ld];
    const vec before = v_load(row_max), top = v_max(v_load(lane), before);
    const vec rescale = exp2_nonpositive(v_sub(before, top), 0);
    v_store(lane, top);
    for (int i = ld; i < LANES; i++) lane[i] = lane[i - ld];
    const vec each = v_load(lane);
    for (ptrdiff_t i = 0; i < count; i += LANES) {
        const vec p = exp2_nonpositive(v_sub(v_load(S + i), each), 0);
        total = v_add(total, p);
        v_store(S + i, value_factors ? v_mul(p, v_repeat(value_factors + i / ld, ld)) : p);
    }
    v_store(lane, total);
    for (int n = LANES / 2; n >= ld; n /= 2)
        for (int i = 0; i < n; i++) lane[i] += lane[i + n];
    v_store(row_sum, v_fma(v_load(row_sum), rescale, v_load(lane)));
    v_store(row_max, top);
    v_store(decay_, rescale);
}
