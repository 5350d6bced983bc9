/* Values. */
/* acc[r][0..nv) = acc * rescale + sum_k P[k][r] V[k]; `some` > 0: elements of the only vector.
 * The vectors begin `first` bytes into their rows. */
INLINE void decode_accumulate_tile(const int rows, const int nv, const int type, const int partial,
                                real *acc, ptrdiff_t acc_stride, const real *P, ptrdiff_t ld,
                                const char *V, ptrdiff_t v_stride, ptrdiff_t nk, const real *rescale,
                                const ptrdiff_t some, const char *const *groups,
                                ptrdiff_t further, ptrdiff_t first)
{
    const ptrdiff_t at[4] = {0, v_stride, 2 * v_stride, 3 * v_stride};
    vec c[DECODE_SUMS];
    UNROLL for (int i = 0; i < rows * nv; i++) c[i] = v_set1(0);
#define KEYS(n)                                                                                  \
    do {                                                                                         \
        const char *ahead = groups ? key_at(groups, v_stride, further) + first : NULL;           \
        vec p[4 * FEW_MOST];                                                                     \
        for (int k = 0; k < n; k++)                                                              \
            UNROLL for (int r = 0; r < rows; r++) p[k * rows + r] = v_set1(P[k * ld + r]);       \
        UNROLL for (int v = 0; v < nv; v++) {                                                    \
            const ptrdiff_t d = v * LANES * BYTES_OF(type);                                      \
            for (int k = 0; k < n; k++) {                                                        \
                const char *from = V + at[k] + d;                                                \
                const vec x = some ? load_some_lanes(from, some, type) : load_lanes(from, type); \
                if (groups && d % CACHE_LINE == 0) PREFETCH(ahead + at[k] + d);                  \
                UNROLL for (int r = 0; r < rows; r++) {                                          \
                    const vec sum = v_fma(p[k * rows + r], x, c[r * nv + v]);                    \
                    /* An excluded key adds nothing, whatever it holds. */                       \
                    c[r * nv + v] =                                                              \
                        partial ? v_select_negative(p[k * rows + r], c[r * nv + v], sum) : sum;  \
                }                                                                                \
            }                                                                                    \
        }                                                                                        \
        P += n * ld, V += n * v_stride;                                                          \
        further += n;                                                                            \
    } while (0)
    ptrdiff_t left = nk;
    for (; left >= DECODE_STEP(rows, type); left -= DECODE_STEP(rows, type))
        KEYS(DECODE_STEP(rows, type));
    for (; left > 0; left--) KEYS(1);
#undef KEYS
    UNROLL for (int r = 0; r < rows; r++) {
        const vec factor = v_set1(rescale ? rescale[r] : 1);
        UNROLL for (int v = 0; v < nv; v++) {
            real *a = acc + r * acc_stride + v * LANES;
            v_store(a, v_fma(v_load(a), factor, c[r * nv + v]));
        }
    }
}

INLINE void decode_accumulate_rows(const int rows, const int type, const int partial, real *acc,
                                ptrdiff_t acc_stride, const real *P, ptrdiff_t ld, const char *V,
                                ptrdiff_t v_stride, ptrdiff_t nk, ptrdiff_t Dv, const real *rescale,
                                const char *const *groups, ptrdiff_t further, ptrdiff_t back)
{
    const int most = DECODE_SUMS / rows < 8 ? DECODE_SUMS / rows : 8;
    ptrdiff_t d = 0;
#define COLUMNS(nv, some)                                                                        \
    do {                                                                                         \
        decode_accumulate_tile(rows, nv, type, partial, acc + d, acc_stride, P, ld,                 \
                            V + d * BYTES_OF(type), v_stride, nk, rescale, some, groups, further,  \
                            d * BYTES_OF(type) - back);                                          \
        d += (nv) * LANES;                                                                       \
    } while (0)
    while (d + most * LANES <= Dv) COLUMNS(most, 0);
    if (most > 4 && d + 4 * LANES <= Dv) COLUMNS(4, 0);
    if (most > 2 && d + 2 * LANES <= Dv) COLUMNS(2, 0);
    if (d + LANES <= Dv) COLUMNS(1, 0);
    if (d < Dv) COLUMNS(1, Dv - d);
#undef COLUMNS
}

INLINE void decode_accumulate_of(const int type, const int partial, real *acc, ptrdiff_t acc_stride,
                              const real *P, ptrdiff_t ld, const char *const *V,
                              ptrdiff_t v_stride, ptrdiff_t nk, ptrdiff_t Dv, int rows,
                              const real *rescale)
{
    const ptrdiff_t further = keys_ahead(Dv, type);
    const ptrdiff_t back = alignment_offset(V[0], v_stride, Dv, type);
    for (ptrdiff_t k = 0; k < nk; k += DECODE_VALUES(type)) {
        const ptrdiff_t n = nk - k < DECODE_VALUES(type) ? nk - k : DECODE_VALUES(type);
        const char *const *group = V + k / QKV_KEY_RUN;
        const ptrdiff_t at = k % QKV_KEY_RUN;
        int r = 0;
#define ROWS(count)                                                                              \
    do {                                                                                         \
        decode_accumulate_rows(count, type, partial, acc + r * acc_stride, acc_stride,              \
                            P + k * ld + r, ld, group[0] + at * v_stride, v_stride, n, Dv,       \
                            rescale && k == 0 ? rescale + r : NULL, r ? NULL : group, further + at,  \
                            back);                                                               \
        r += count;                                                                              \
    } while (0)
        while (FEW_MOST > 2 && rows - r >= FEW_MOST) ROWS(FEW_MOST);
        while (rows - r >= 2) ROWS(2);
        if (rows - r >= 1) ROWS(1);
#undef ROWS
    }
}

static void decode_accumulate(void *acc, ptrdiff_t acc_stride, const void *P, ptrdiff_t ld,
                           const char *const *V, ptrdiff_t v_stride, ptrdiff_t nk, ptrdiff_t Dv,
                           int rows, const void *rescale, int partial, int type)
{
#define OF(t, some)                                                                              \
    decode_accumulate_of(t, some, acc, acc_stride, P, ld, V, v_stride, nk, Dv, rows, rescale)
#define TYPE(t)                                                                                  \
    do {                                                                                         \
        if (partial)                                                                             \
            OF(t, 1);                                                                            \
        else                                                                                     \
            OF(t, 0);                                                                            \
    } while (0)
    BY_TYPE(type, TYPE)
#undef TYPE
#undef OF
}
