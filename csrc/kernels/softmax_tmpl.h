/* The online softmax. */
INLINE void softmax_block(const int masked, real *S, ptrdiff_t nk, int nvec,
                          const uint64_t *allow, const qkv_span *span, real factor,
                          real *row_max, real *row_sum, real *rescales)
{
    const ptrdiff_t ld = (ptrdiff_t)nvec * LANES;
    const vec lowest = v_set1(-REAL_INF), minus_zero = v_set1((real)-0.0), mult = v_set1(factor);
    for (int v = 0; v < nvec; v++, S += LANES) {
        const int lane = v * LANES;
        const ptrdiff_t begin = masked ? span[v].begin & ~3 : 0; /* k % 4 chooses the sum */
        const ptrdiff_t end = masked ? span[v].end : nk;
        vec part[4] = {lowest, lowest, lowest, lowest};
        ptrdiff_t k = begin;
#define SCORE(k)                                                                                 \
    (masked ? v_select(v_mask_at(allow + k, lane), v_load(S + (k)*ld), lowest) : v_load(S + (k)*ld))
        for (; k + 4 <= end; k += 4)
            UNROLL for (int i = 0; i < 4; i++) part[i] = v_max(part[i], SCORE(k + i));
        for (; k < end; k++) part[0] = v_max(part[0], SCORE(k));
        const vec best = v_max(v_max(part[0], part[1]), v_max(part[2], part[3]));
        const vec before = v_load(row_max + lane), top = v_max(v_mul(best, mult), before);
        const vec rescale = exp2_nonpositive(v_sub(before, top), 0), below = v_sub(v_set1(0), top);

        vec sum[4] = {v_set1(0), v_set1(0), v_set1(0), v_set1(0)};
        for (k = begin; k < end; k += 4) {
            vec p[4];
            const int count = end - k < 4 ? (int)(end - k) : 4;
#define WEIGHT(i)                                                                                \
    do {                                                                                         \
        p[i] = exp2_nonpositive(v_fma(v_load(S + (k + (i)) * ld), mult, below), ROUGH);          \
        if (masked) {                                                                            \
            const vmask seen = v_mask_at(allow + k + (i), lane);                                 \
            sum[i] = v_add(sum[i], v_select(seen, p[i], v_set1(0)));                             \
            p[i] = v_select(seen, p[i], minus_zero);                                             \
        } else {                                                                                 \
            sum[i] = v_add(sum[i], p[i]);                                                        \
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
        const vec total = v_add(v_add(sum[0], sum[1]), v_add(sum[2], sum[3]));
#undef SCORE
#undef WEIGHT
        fill_weights(S, ld, begin, end, nk);
        v_store(row_sum + lane, v_fma(v_load(row_sum + lane), rescale, total));
        v_store(row_max + lane, top);
        v_store(rescales + lane, rescale);
    }
}

static void softmax(void *S, ptrdiff_t nk, int nvec, const uint64_t *allow, const qkv_span *span,
                    double factor, void *row_max, void *row_sum, void *rescale)
{
    const real mult = (real)factor;
    if (allow)
        softmax_block(1, S, nk, nvec, allow, span, mult, row_max, row_sum, rescale);
    else
        softmax_block(0, S, nk, nvec, allow, span, mult, row_max, row_sum, rescale);
}
