/* Scores. */
/* LANES scores at a time: `rows` rows with LANES / rows keys, of which `live` are wanted; further:
 * the key of `groups` to prefetch beside the first one, from `back` bytes before it on, unless groups
 * is NULL. A score's sum does not depend on where it is computed. */
INLINE void decode_scores_tile(const int rows, const int type, real *S, ptrdiff_t ld, const real *Q,
                            ptrdiff_t q_stride, const char *K, ptrdiff_t k_stride, int live,
                            ptrdiff_t D, const char *const *groups, ptrdiff_t further,
                            ptrdiff_t back)
{
    const int keys = LANES / rows, some = keys < FEW_MOST ? keys : FEW_MOST;
    const ptrdiff_t at[4] = {0, k_stride, 2 * k_stride, 3 * k_stride};
    vec x[LANES];
#define STEP(load)                                                                               \
    do {                                                                                         \
        vec q[FEW_MOST];                                                                         \
        UNROLL for (int r = 0; r < rows; r++) q[r] = v_load(Q + r * q_stride + d);               \
        UNROLL for (int k = 0; k < some; k++) {                                                  \
            const char *p = K + at[k] + d * BYTES_OF(type);                                      \
            const vec key = load;                                                                \
            if (groups && d * BYTES_OF(type) % CACHE_LINE == 0)                                  \
                PREFETCH(ahead + at[k] + d * BYTES_OF(type));                                    \
            UNROLL for (int r = 0; r < rows; r++)                                                \
                c[k * rows + r] = v_fma(q[r], key, c[k * rows + r]);                             \
        }                                                                                        \
    } while (0)
    UNROLL for (int g = 0; g < keys; g += some) {
        const char *ahead = groups ? key_at(groups, k_stride, further + g) - back : NULL;
        vec c[FEW_MOST * FEW_MOST];
        UNROLL for (int i = 0; i < some * rows; i++) c[i] = v_set1(0);
        ptrdiff_t d = 0;
        for (; d + LANES <= D; d += LANES) STEP(load_lanes(p, type));
        if (d < D) STEP(load_some_lanes(p, D - d, type));
        UNROLL for (int i = 0; i < some * rows; i++) x[g * rows + i] = c[i];
        K += some * k_stride;
    }
#undef STEP
    real part[LANES];
    v_store(part, v_sum_each(x));
    if (ld == rows && live == keys) /* side by side */
        v_store(S, v_load(part));
    else
        for (int k = 0; k < live; k++)
            memcpy(S + k * ld, part + k * rows, (size_t)rows * sizeof(real));
}

INLINE void decode_scores_of(const int type, real *S, ptrdiff_t ld, const real *Q, ptrdiff_t q_stride,
                          const char *const *K, ptrdiff_t k_stride, ptrdiff_t nk, ptrdiff_t D,
                          int rows)
{
    const ptrdiff_t further = keys_ahead(D, type);
    const ptrdiff_t back = alignment_offset(K[0], k_stride, D, type);
    for (; nk > 0; nk -= QKV_KEY_RUN, K++, S += QKV_KEY_RUN * ld) {
        const ptrdiff_t end = nk < QKV_KEY_RUN ? nk : QKV_KEY_RUN;
        int r = 0;
#define ROWS(n)                                                                                  \
    do {                                                                                         \
        ptrdiff_t i = 0;                                                                         \
        for (; i + LANES / (n) <= end; i += LANES / (n))                                         \
            decode_scores_tile(n, type, S + i * ld + r, ld, Q + r * q_stride, q_stride,             \
                            K[0] + i * k_stride, k_stride, LANES / (n), D, r ? NULL : K,         \
                            further + i, back);                                                  \
        for (; i < end; i++) /* the same key in all places */                                    \
            decode_scores_tile(n, type, S + i * ld + r, ld, Q + r * q_stride, q_stride,             \
                            K[0] + i * k_stride, 0, 1, D, NULL, 0, 0);                           \
        r += n;                                                                                  \
    } while (0)
        while (rows - r >= FEW_MOST) ROWS(FEW_MOST);
        if (FEW_MOST > 2 && rows - r >= 2) ROWS(2);
        if (rows - r >= 1) ROWS(1);
#undef ROWS
    }
}

static void decode_scores(void *S, ptrdiff_t ld, const void *Q, ptrdiff_t q_stride,
                       const char *const *K, ptrdiff_t k_stride, ptrdiff_t nk, ptrdiff_t D,
                       int rows, int type)
{
#define TYPE(t) decode_scores_of(t, S, ld, Q, q_stride, K, k_stride, nk, D, rows)
    BY_TYPE(type, TYPE)
#undef TYPE
}
