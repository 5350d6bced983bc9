/* One step of the online softmax (Milakov & Gimelshein 2018; Dao et al. 2022), in place.
 *
 *     row_max' = max(row_max, max_k scale * S[k])     P[k] = exp2(scale * S[k] - row_max')
 *     rescale  = exp2(row_max - row_max')             row_sum' = row_sum * rescale + sum_k P[k]
 *
 * S is [nk][ld] reals, aligned; inputs_*.h say how P is stored there. row_max, row_sum and rescale
 * are [ld]. Keys are taken in fours with four sums: k % 4 chooses the sum, so a span begins at a
 * multiple of 4 and its result is that of the whole block. Excluded keys get P = -0.0. */
INLINE void softmax_block(const int masked, real *S, ptrdiff_t nk, int nvec,
                          const uint64_t *allow, const qkv_span *span, real scale_,
                          real *row_max, real *row_sum, real *rescales)
{
    const ptrdiff_t ld = (ptrdiff_t)nvec * LANES;
    const vec lowest = v_set1(-REAL_INF), minus_zero = v_set1((real)-0.0), scale = v_set1(scale_);
    for (int v = 0; v < nvec; v++, S += LANES) {
        const int lane = v * LANES;
        const ptrdiff_t begin = masked ? span[v].begin & ~3 : 0;
        const ptrdiff_t end = masked ? span[v].end : nk;
        vec maxima[4] = {lowest, lowest, lowest, lowest};
        ptrdiff_t k = begin;
#define SCORE(k)                                                                                 \
    (masked ? v_select(v_mask_at(allow + k, lane), v_load(S + (k)*ld), lowest) : v_load(S + (k)*ld))
        for (; k + 4 <= end; k += 4)
            UNROLL for (int i = 0; i < 4; i++) maxima[i] = v_max(maxima[i], SCORE(k + i));
        for (; k < end; k++) maxima[0] = v_max(maxima[0], SCORE(k));
        const vec block_max = v_max(v_max(maxima[0], maxima[1]), v_max(maxima[2], maxima[3]));
        const vec old_max = v_load(row_max + lane);
        const vec new_max = v_max(v_mul(block_max, scale), old_max);
        const vec rescale = exp2_nonpositive(v_sub(old_max, new_max), 0);
        const vec minus_max = v_sub(v_set1(0), new_max);

        vec sums[4] = {v_set1(0), v_set1(0), v_set1(0), v_set1(0)};
        for (k = begin; k < end; k += 4) {
            vec p[4];
            const int count = end - k < 4 ? (int)(end - k) : 4;
#define WEIGHT(i)                                                                                \
    do {                                                                                         \
        p[i] = exp2_nonpositive(v_fma(v_load(S + (k + (i)) * ld), scale, minus_max), ROUGH_EXP2); \
        if (masked) {                                                                            \
            const vmask allowed = v_mask_at(allow + k + (i), lane);                              \
            sums[i] = v_add(sums[i], v_select(allowed, p[i], v_set1(0)));                        \
            p[i] = v_select(allowed, p[i], minus_zero);                                          \
        } else {                                                                                 \
            sums[i] = v_add(sums[i], p[i]);                                                      \
        }                                                                                        \
    } while (0)
            if (count == 4) {
                UNROLL for (int i = 0; i < 4; i++) WEIGHT(i);
                store_weights(S, ld, k, p, 4);
            } else {
                for (int i = 0; i < 4; i++) p[i] = minus_zero;
                for (int i = 0; i < count; i++) WEIGHT(i);
                store_weights(S, ld, k, p, count);
            }
        }
        const vec block_sum = v_add(v_add(sums[0], sums[1]), v_add(sums[2], sums[3]));
#undef SCORE
#undef WEIGHT
        fill_weights(S, ld, begin, end, nk);
        v_store(row_sum + lane, v_fma(v_load(row_sum + lane), rescale, block_sum));
        v_store(row_max + lane, new_max);
        v_store(rescales + lane, rescale);
    }
}

static void softmax(void *S, ptrdiff_t nk, int nvec, const uint64_t *allow, const qkv_span *span,
                    double scale_, void *row_max, void *row_sum, void *rescale)
{
    const real scale = (real)scale_;
    if (allow)
        softmax_block(1, S, nk, nvec, allow, span, scale, row_max, row_sum, rescale);
    else
        softmax_block(0, S, nk, nvec, allow, span, scale, row_max, row_sum, rescale);
}
