/* S[k][r] = sum_d K[k][d] * Q[r][d] for few query rows.
 *
 * LANES scores are computed at a time, `rows` query rows by LANES / rows keys, of which up to
 * DECODE_ROWS keys together: each score's products are summed in the lanes of a vector, v_sum_fours
 * turns four such vectors into one, and v_sum_parts these into one of sums. rows is DECODE_ROWS, 2
 * or 1. Keys that are left over are done one at a time: the same key stands in for its neighbours,
 * so that the order of its sum is the same. */

#define SUMMED (LANES < 4 ? LANES : 4) /* vectors that v_sum_fours takes */

/* `live` of the keys are wanted. Beside the keys, as many rows from `ahead` on are prefetched:
 * without gaps between rows, in the order of memory. */
INLINE void decode_scores_tile(const int rows, const int type, real *S, ptrdiff_t ld, const real *Q,
                               ptrdiff_t q_stride, const char *K, ptrdiff_t k_stride, int live,
                               ptrdiff_t D, const char *ahead)
{
    const int keys = LANES / rows, keys_per_step = keys < DECODE_ROWS ? keys : DECODE_ROWS;
    const int line = LANES * BYTES_OF(type) < CACHE_LINE ? CACHE_LINE / BYTES_OF(type) : LANES;
    const int gapless = k_stride == D * BYTES_OF(type);
    const ptrdiff_t ahead_stride = gapless ? CACHE_LINE : k_stride;
    const ptrdiff_t ahead_step = gapless ? keys_per_step * CACHE_LINE : CACHE_LINE;
    vec parts[LANES / SUMMED];
#define STEP(at, load)                                                                           \
    do {                                                                                         \
        vec q[DECODE_ROWS];                                                                      \
        UNROLL for (int r = 0; r < rows; r++) q[r] = v_hold(v_load(Q + r * q_stride + (at)));    \
        UNROLL for (int k = 0; k < keys_per_step; k++) {                                         \
            const char *p = key[k] + (at) * BYTES_OF(type);                                      \
            const vec x = load;                                                                  \
            UNROLL for (int r = 0; r < rows; r++)                                                \
                c[k * rows + r] = v_fma(q[r], x, c[k * rows + r]);                               \
        }                                                                                        \
    } while (0)
    UNROLL for (int g = 0; g < keys; g += keys_per_step) {
        const char *key[DECODE_ROWS], *next[DECODE_ROWS];
        vec c[DECODE_ROWS * DECODE_ROWS];
        ptrdiff_t d = 0, at = 0;
        key[0] = K + g * k_stride;
        next[0] = ahead + g * k_stride;
        UNROLL for (int k = 1; k < keys_per_step; k++) {
            key[k] = key[k - 1] + k_stride;
            next[k] = next[k - 1] + ahead_stride;
            KEEP_IN_REGISTER(key[k]);
            KEEP_IN_REGISTER(next[k]);
        }
        UNROLL for (int i = 0; i < keys_per_step * rows; i++) c[i] = v_set1(0);
        for (; d + line <= D; d += line, at += ahead_step) {
            UNROLL for (int k = 0; k < keys_per_step; k++) PREFETCH_L1(next[k] + at);
            UNROLL for (int i = 0; i < line; i += LANES) STEP(d + i, load_lanes(p, type));
        }
        if (d < D) UNROLL for (int k = 0; k < keys_per_step; k++) PREFETCH_L1(next[k] + at);
        for (; d + LANES <= D; d += LANES) STEP(d, load_lanes(p, type));
        if (d < D) STEP(d, load_first_lanes(p, D - d, type));
        UNROLL for (int i = 0; i < keys_per_step * rows; i += SUMMED)
            parts[(g * rows + i) / SUMMED] = v_sum_fours(c + i);
    }
#undef STEP
    const vec sums = v_sum_parts(parts);
    if (ld == rows && live == keys) { /* S has no gaps */
        v_store(S, sums);
        return;
    }
    real scores[LANES];
    v_store(scores, sums);
    for (int k = 0; k < live; k++)
        memcpy(S + k * ld, scores + k * rows, (size_t)rows * sizeof(real));
}

INLINE void decode_scores_type(const int type, real *S, ptrdiff_t ld, const real *Q,
                               ptrdiff_t q_stride, const char *const *K, ptrdiff_t k_stride,
                               ptrdiff_t nk, ptrdiff_t D, int rows)
{
    const char *const *ahead = K + prefetch_runs(D, type);
    for (; nk > 0; nk -= QKV_KEY_RUN, K++, ahead++, S += QKV_KEY_RUN * ld) {
        const ptrdiff_t end = nk < QKV_KEY_RUN ? nk : QKV_KEY_RUN;
        int r = 0;
#define ROWS(n)                                                                                  \
    do {                                                                                         \
        ptrdiff_t i = 0;                                                                         \
        for (; i + LANES / (n) <= end; i += LANES / (n))                                         \
            decode_scores_tile(n, type, S + i * ld + r, ld, Q + r * q_stride, q_stride,          \
                               K[0] + i * k_stride, k_stride, LANES / (n), D,                    \
                               (r ? K[0] : ahead[0]) + i * k_stride);                            \
        for (; i < end; i++) /* stride 0: the same key in all places */                          \
            decode_scores_tile(n, type, S + i * ld + r, ld, Q + r * q_stride, q_stride,          \
                               K[0] + i * k_stride, 0, 1, D, ahead[0] + i * k_stride);           \
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
