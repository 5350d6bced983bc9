/* acc[r][:] = acc[r][:] * rescale[r] + sum_k P[k][r] * V[k][:] for few query rows.
 *
 * Values are taken a run at a time. For those, DECODE_ROWS, 2 or 1 query rows by up to 8 vectors of
 * V's columns are summed in registers; the sum begins at 0 and is added to acc at the end. The last
 * Dv % LANES columns are one vector of their own. */

/* The sums of `rows` query rows by `nv` vectors. live_lanes > 0: V has so many elements in the only
 * vector. Beside each value as many bytes are prefetched as are read of it, from `ahead` on and
 * then ahead_stride further on. */
INLINE void decode_accumulate_tile(const int rows, const int nv, const int type, const int masked,
                                   real *acc, ptrdiff_t acc_stride, const real *P, ptrdiff_t ld,
                                   const char *V, ptrdiff_t v_stride, ptrdiff_t nk,
                                   const real *rescale, const ptrdiff_t live_lanes,
                                   const char *ahead, ptrdiff_t ahead_stride)
{
    const int lines = (nv * LANES * BYTES_OF(type) + CACHE_LINE - 1) / CACHE_LINE;
    vec c[DECODE_ACCUMULATORS];
    UNROLL for (int i = 0; i < rows * nv; i++) c[i] = v_set1(0);
    UNROLL_4 for (ptrdiff_t k = 0; k < nk; k++) {
        vec p[DECODE_ROWS];
        UNROLL for (int r = 0; r < rows; r++) p[r] = v_set1(P[r]);
        UNROLL for (int i = 0; i < lines; i++) PREFETCH_L1(ahead + i * CACHE_LINE);
        UNROLL for (int v = 0; v < nv; v++) {
            const char *from = V + v * LANES * BYTES_OF(type);
            const vec x = live_lanes ? load_first_lanes(from, live_lanes, type)
                                     : load_lanes(from, type);
            UNROLL for (int r = 0; r < rows; r++) {
                const vec sum = v_fma(p[r], x, c[r * nv + v]);
                /* An excluded key adds nothing, whatever it holds. */
                c[r * nv + v] = masked ? v_select_negative(p[r], c[r * nv + v], sum) : sum;
            }
        }
        P += ld, V += v_stride, ahead += ahead_stride;
    }
    UNROLL for (int r = 0; r < rows; r++) {
        const vec scale = v_set1(rescale ? rescale[r] : 1);
        UNROLL for (int v = 0; v < nv; v++) {
            real *a = acc + r * acc_stride + v * LANES;
            v_store(a, v_fma(v_load(a), scale, c[r * nv + v]));
        }
    }
}

/* The sums over the values of a run. ahead: the run to prefetch, or NULL. */
INLINE void decode_accumulate_rows(const int rows, const int type, const int masked, real *acc,
                                   ptrdiff_t acc_stride, const real *P, ptrdiff_t ld,
                                   const char *V, ptrdiff_t v_stride, ptrdiff_t nk, ptrdiff_t Dv,
                                   const real *rescale, const char *ahead)
{
    const int most = DECODE_ACCUMULATORS / rows < 8 ? DECODE_ACCUMULATORS / rows : 8;
    const int gapless = v_stride == Dv * BYTES_OF(type);
    ptrdiff_t d = 0;
/* Together, all columns prefetch the run: without gaps between rows, in the order of memory. */
#define COLUMNS(nv, live_lanes)                                                                  \
    do {                                                                                         \
        const ptrdiff_t at = d * BYTES_OF(type), bytes = (nv) * LANES * BYTES_OF(type);          \
        decode_accumulate_tile(rows, nv, type, masked, acc + d, acc_stride, P, ld, V + at,       \
                               v_stride, nk, rescale, live_lanes,                                \
                               ahead ? ahead + (gapless ? at * QKV_KEY_RUN : at) : V + at,       \
                               ahead && gapless ? bytes : v_stride);                             \
        d += (nv) * LANES;                                                                       \
    } while (0)
    while (d + most * LANES <= Dv) COLUMNS(most, 0);
    if (most > 4 && d + 4 * LANES <= Dv) COLUMNS(4, 0);
    if (most > 2 && d + 2 * LANES <= Dv) COLUMNS(2, 0);
    if (d + LANES <= Dv) COLUMNS(1, 0);
    if (d < Dv) COLUMNS(1, Dv - d);
#undef COLUMNS
}

INLINE void decode_accumulate_type(const int type, const int masked, real *acc,
                                   ptrdiff_t acc_stride, const real *P, ptrdiff_t ld,
                                   const char *const *V, ptrdiff_t v_stride, ptrdiff_t nk,
                                   ptrdiff_t Dv, int rows, const real *rescale)
{
    const ptrdiff_t runs = prefetch_runs(Dv, type);
    for (ptrdiff_t k = 0; k < nk; k += QKV_KEY_RUN, V++) {
        const ptrdiff_t n = nk - k < QKV_KEY_RUN ? nk - k : QKV_KEY_RUN;
        int r = 0;
#define ROWS(count)                                                                              \
    do {                                                                                         \
        decode_accumulate_rows(count, type, masked, acc + r * acc_stride, acc_stride,            \
                               P + k * ld + r, ld, V[0], v_stride, n, Dv,                        \
                               rescale && k == 0 ? rescale + r : NULL, r ? NULL : V[runs]);      \
        r += count;                                                                              \
    } while (0)
        while (DECODE_ROWS > 2 && rows - r >= DECODE_ROWS) ROWS(DECODE_ROWS);
        while (rows - r >= 2) ROWS(2);
        if (rows - r >= 1) ROWS(1);
#undef ROWS
    }
}

static void decode_accumulate(void *acc, ptrdiff_t acc_stride, const void *P, ptrdiff_t ld,
                              const char *const *V, ptrdiff_t v_stride, ptrdiff_t nk, ptrdiff_t Dv,
                              int rows, const void *rescale, int masked, int type)
{
#define ACCUMULATE(t, masked)                                                                    \
    decode_accumulate_type(t, masked, acc, acc_stride, P, ld, V, v_stride, nk, Dv, rows, rescale)
#define BY_MASK(t)                                                                               \
    do {                                                                                         \
        if (masked)                                                                              \
            ACCUMULATE(t, 1);                                                                    \
        else                                                                                     \
            ACCUMULATE(t, 0);                                                                    \
    } while (0)
    BY_TYPE(type, BY_MASK)
#undef BY_MASK
#undef ACCUMULATE
}
