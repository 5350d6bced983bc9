/* Sums over the keys of a block, by which a row of weights is described without being held.
 *
 *     P[k]    = exp2(scale * S[k] - row_max')      row_max' = max(row_max, max_k scale * S[k])
 *     sums[0] = sum_k P[k]                         sums[1] = sum_k P[k] * (row_max' - scale * S[k])
 *     sums[2] = sum_k P[k] * |position - k|        sums[3] = the first k with the largest score
 *
 * S is [nk][ld] reals, sums is [4][ld], position and row_max are [ld], all aligned; ld is whole
 * vectors, so there are no tails. A key that is excluded adds 0, so a span's sums are those of the
 * whole block. A score of -inf has weight 0 and adds nothing to sums[1] either. */
INLINE void statistics_block(const int masked, const real *S, ptrdiff_t nk, int nvec,
                             const uint64_t *allow, const qkv_span *span, real scale_,
                             const real *position, real *row_max, real *sums)
{
    const ptrdiff_t ld = (ptrdiff_t)nvec * LANES;
    const vec zero = v_set1(0), one = v_set1(1), scale = v_set1(scale_);
    const vec minus_inf = v_set1(-REAL_INF), lowest = v_set1(-REAL_MAX);
    for (int v = 0; v < nvec; v++, S += LANES, sums += LANES) {
        const int lane = v * LANES;
        const ptrdiff_t begin = masked ? span[v].begin : 0, end = masked ? span[v].end : nk;
        const vec at = v_load(position + lane);
        vec largest = minus_inf;
        for (ptrdiff_t k = begin; k < end; k++) {
            vec score = v_mul(v_load(S + k * ld), scale);
            if (masked) score = v_select(v_mask_at(allow + k, lane), score, minus_inf);
            largest = v_max(largest, score);
        }
        const vec top = v_max(largest, v_load(row_max + lane));
        const vec minus_top = v_sub(zero, top);

        vec sum = zero, excess = zero, distance = zero, first = v_set1((real)nk);
        vec key_at = v_set1((real)begin);
        for (ptrdiff_t k = begin; k < end; k++, key_at = v_add(key_at, one)) {
            const vec s = v_load(S + k * ld);
            /* v_max, so that a compiler can't round the difference from `largest` only once. */
            vec score = v_max(v_mul(s, scale), minus_inf);
            vec log2_weight = v_fma(s, scale, minus_top);
            vec weight = exp2_nonpositive(log2_weight, 0);
            if (masked) {
                const vmask allowed = v_mask_at(allow + k, lane);
                score = v_select(allowed, score, minus_inf);
                log2_weight = v_select(allowed, log2_weight, zero);
                weight = v_select(allowed, weight, zero);
            }
            const vec is_less = v_sub(score, largest); /* negative where it is */
            first = v_min(first, v_select_negative(is_less, first, key_at));
            sum = v_add(sum, weight);
            excess = v_fma(weight, v_max(lowest, log2_weight), excess);
            distance = v_fma(weight, v_abs(v_sub(at, key_at)), distance);
        }
        v_store(row_max + lane, top);
        v_store(sums, sum);
        v_store(sums + ld, v_sub(zero, excess));
        v_store(sums + 2 * ld, distance);
        v_store(sums + 3 * ld, first);
    }
}

static void statistics(const void *S, ptrdiff_t nk, int nvec, const uint64_t *allow,
                       const qkv_span *span, double scale_, const void *position, void *row_max,
                       void *sums)
{
    const real scale = (real)scale_;
    if (allow)
        statistics_block(1, S, nk, nvec, allow, span, scale, position, row_max, sums);
    else
        statistics_block(0, S, nk, nvec, allow, span, scale, position, row_max, sums);
}
