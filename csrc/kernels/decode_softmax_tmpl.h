/* The online softmax (softmax_tmpl.h) for few query rows that may attend to all keys.
 *
 *     S[k][:] *= key_scales[k];   the softmax;   P[k][:] *= value_scales[k]
 *
 * S is [nk][ld] reals without gaps, ld a power of 2 up to LANES, so no lane is idle: a lane stands
 * for one row and every LANES / ld-th key, and the lanes of a row are combined at the end.
 * row_max, row_sum and rescale are whole vectors. S is padded with -inf to whole vectors; the
 * caller's S has room for that, and its scales can be read up to there. */
static void decode_softmax(void *S_, ptrdiff_t nk, int ld, const float *key_scales,
                           const float *value_scales, void *row_max, void *row_sum, void *rescale_)
{
    real *S = S_;
    const ptrdiff_t count = nk * ld;
    vec maxima = v_set1(-REAL_INF), sums = v_set1(0);
    if (key_scales)
        for (ptrdiff_t i = 0; i < count; i += LANES)
            v_store(S + i, v_mul(v_load(S + i), v_repeat(key_scales + i / ld, ld)));
    for (ptrdiff_t i = count; i % LANES; i++) S[i] = -REAL_INF;
    for (ptrdiff_t i = 0; i < count; i += LANES) maxima = v_max(maxima, v_load(S + i));
    for (int n = LANES / 2; n >= ld; n /= 2) maxima = v_max(maxima, v_rotate(maxima, n));
    const vec old_max = v_load(row_max), new_max = v_max(maxima, old_max);
    const vec rescale = exp2_nonpositive(v_sub(old_max, new_max), 0);
    const vec lane_max = v_cycle(new_max, ld); /* old_max need not hold rows in other lanes */
    for (ptrdiff_t i = 0; i < count; i += LANES) {
        const vec p = exp2_nonpositive(v_sub(v_load(S + i), lane_max), 0);
        sums = v_add(sums, p);
        v_store(S + i, value_scales ? v_mul(p, v_repeat(value_scales + i / ld, ld)) : p);
    }
    for (int n = LANES / 2; n >= ld; n /= 2) sums = v_add(sums, v_rotate(sums, n));
    v_store(row_sum, v_fma(v_load(row_sum), rescale, sums));
    v_store(row_max, new_max);
    v_store(rescale_, rescale);
}
