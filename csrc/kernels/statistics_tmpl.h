/* Sums over the keys of a block, by which a row of weights is described without being held.
 *
 *     P[k]    = exp2(S[k] - row_max')              row_max' = max(row_max, max_k S[k])
 *     sums[0] = sum_k P[k]                         sums[1] = sum_k P[k] * (row_max' - S[k])
 *     sums[2] = sum_k P[k] * |position - k|        sums[3] = the first k with the largest S[k]
 *
 * S is [nk][ld] reals, sums is [4][ld], position and row_max are [ld], all aligned; ld is whole
 * vectors, so there are no tails. An excluded key is one with a score of -inf: its weight is 0, and
 * it adds 0 to all sums. So a span's sums are those of the whole block. */
INLINE void statistics_block(const int masked, const real *S, ptrdiff_t nk, int nvec,
                             const uint64_t *allow, const qkv_span *span, const real *position,
                             real *row_max, real *sums)
{
    const ptrdiff_t ld = (ptrdiff_t)nvec * LANES;
    const vec zero = v_set1(0), one = v_set1(1);
    const vec minus_inf = v_set1(-REAL_INF), lowest = v_set1(-REAL_MAX);
    for (int v = 0; v < nvec; v++, S += LANES, sums += LANES) {
        const int lane = v * LANES;
        const ptrdiff_t begin = masked ? span[v].begin : 0, end = masked ? span[v].end : nk;
        const vec at = v_load(position + lane);
#define SCORE(k)                                                                                 \
    (masked ? v_select(v_mask_at(allow + k, lane), v_load(S + (k)*ld), minus_inf)                \
            : v_load(S + (k)*ld))
        vec largest = minus_inf;
        for (ptrdiff_t k = begin; k < end; k++) largest = v_max(largest, SCORE(k));
        const vec top = v_max(largest, v_load(row_max + lane));

        vec sum = zero, excess = zero, distance = zero, first = v_set1((real)nk);
        vec key_at = v_set1((real)begin);
        for (ptrdiff_t k = begin; k < end; k++, key_at = v_add(key_at, one)) {
            const vec score = SCORE(k);
            const vec log2_weight = v_sub(score, top), below = v_sub(score, largest);
            const vec weight = exp2_nonpositive(log2_weight, 0);
            first = v_min(first, v_select_negative(below, first, key_at));
            sum = v_add(sum, weight);
            excess = v_fma(weight, v_max(lowest, log2_weight), excess);
            distance = v_fma(weight, v_abs(v_sub(at, key_at)), distance);
        }
#undef SCORE
        v_store(row_max + lane, top);
        v_store(sums, sum);
        v_store(sums + ld, v_sub(zero, excess));
        v_store(sums + 2 * ld, distance);
        v_store(sums + 3 * ld, first);
    }
}

static void statistics(const void *S, ptrdiff_t nk, int nvec, const uint64_t *allow,
                       const qkv_span *span, const void *position, void *row_max, void *sums)
{
    if (allow)
        statistics_block(1, S, nk, nvec, allow, span, position, row_max, sums);
    else
        statistics_block(0, S, nk, nvec, allow, span, position, row_max, sums);
}
