/* S[k][r] = sum_d K[k][d] * Q[r][d] for few query rows.
 *
 * LANES scores are computed at a time, `rows` query rows by LANES / rows keys: each score's
 * products are summed in the lanes of a vector, and v_sum_each turns LANES such vectors into one
 * of sums. rows is DECODE_ROWS, 2 or 1. Keys that are left over are done one at a time: the same
 * key stands in for its neighbours, so that the order of its sum is the same. */

/* `live` of the keys are wanted. Unless runs is NULL, key number `prefetch_key` of runs is
 * prefetched beside the first key and the following ones beside theirs, each from `prefetch_back`
 * bytes before it on. */
INLINE void decode_scores_tile(const int rows, const int type, real *S, ptrdiff_t ld, const real *Q,
                               ptrdiff_t q_stride, const char *K, ptrdiff_t k_stride, int live,
                               ptrdiff_t D, const char *const *runs, ptrdiff_t prefetch_key,
                               ptrdiff_t prefetch_back)
{
    const int keys = LANES / rows, keys_per_step = keys < DECODE_ROWS ? keys : DECODE_ROWS;
    const ptrdiff_t key_at[4] = {0, k_stride, 2 * k_stride, 3 * k_stride};
    vec sums[LANES];
#define STEP(load)                                                                               \
    do {                                                                                         \
        vec q[DECODE_ROWS];                                                                      \
        UNROLL for (int r = 0; r < rows; r++) q[r] = v_load(Q + r * q_stride + d);               \
        UNROLL for (int k = 0; k < keys_per_step; k++) {                                         \
            const char *p = K + key_at[k] + d * BYTES_OF(type);                                  \
            const vec key = load;                                                                \
            if (runs && d * BYTES_OF(type) % CACHE_LINE == 0)                                    \
                PREFETCH(ahead + key_at[k] + d * BYTES_OF(type));                                \
            UNROLL for (int r = 0; r < rows; r++)                                                \
                c[k * rows + r] = v_fma(q[r], key, c[k * rows + r]);                             \
        }                                                                                        \
    } while (0)
    UNROLL for (int g = 0; g < keys; g += keys_per_step) {
        const char *ahead =
            runs ? row_in_runs(runs, k_stride, prefetch_key + g) - prefetch_back : NULL;
        vec c[DECODE_ROWS * DECODE_ROWS];
        UNROLL for (int i = 0; i < keys_per_step * rows; i++) c[i] = v_set1(0);
        ptrdiff_t d = 0;
        for (; d + LANES <= D; d += LANES) STEP(load_lanes(p, type));
        if (d < D) STEP(load_first_lanes(p, D - d, type));
        UNROLL for (int i = 0; i < keys_per_step * rows; i++) sums[g * rows + i] = c[i];
        K += keys_per_step * k_stride;
    }
#undef STEP
    real scores[LANES];
    v_store(scores, v_sum_each(sums));
    if (ld == rows && live == keys) /* S has no gaps */
        v_store(S, v_load(scores));
    else
        for (int k = 0; k < live; k++)
            memcpy(S + k * ld, scores + k * rows, (size_t)rows * sizeof(real));
}

INLINE void decode_scores_type(const int type, real *S, ptrdiff_t ld, const real *Q,
                               ptrdiff_t q_stride, const char *const *K, ptrdiff_t k_stride,
                               ptrdiff_t nk, ptrdiff_t D, int rows)
{
    const ptrdiff_t distance = prefetch_distance(D, type);
    const ptrdiff_t prefetch_back = alignment_offset(K[0], k_stride, D, type);
    for (; nk > 0; nk -= QKV_KEY_RUN, K++, S += QKV_KEY_RUN * ld) {
        const ptrdiff_t end = nk < QKV_KEY_RUN ? nk : QKV_KEY_RUN;
        int r = 0;
#define ROWS(n)                                                                                  \
    do {                                                                                         \
        ptrdiff_t i = 0;                                                                         \
        for (; i + LANES / (n) <= end; i += LANES / (n))                                         \
            decode_scores_tile(n, type, S + i * ld + r, ld, Q + r * q_stride, q_stride,          \
                               K[0] + i * k_stride, k_stride, LANES / (n), D, r ? NULL : K,      \
                               distance + i, prefetch_back);                                     \
        for (; i < end; i++) /* stride 0: the same key in all places */                          \
            decode_scores_tile(n, type, S + i * ld + r, ld, Q + r * q_stride, q_stride,          \
                               K[0] + i * k_stride, 0, 1, D, NULL, 0, 0);                        \
        r += n;                                                                                  \
    } while (0)
        while (rows - r >= DECODE_ROWS) ROWS(DECODE_ROWS);
        if (DECODE_ROWS > 2 && rows - r >= 2) ROWS(2);
        if (rows - r >= 1) ROWS(1);
#undef ROWS
    }
}

static void decode_scores(void *S, ptrdiff_t ld, const void *Q, ptrdiff_t q_stride,
                          const char *const *K, ptrdiff_t k_stride, ptrdiff_t nk, ptrdiff_t D,
                          int rows, int type)
{
#define SCORES(t) decode_scores_type(t, S, ld, Q, q_stride, K, k_stride, nk, D, rows)
    BY_TYPE(type, SCORES)
#undef SCORES
}
