/* acc[r][:] = acc[r][:] * rescale[r] + sum_k P[k][r] * V[k][:] for few query rows.
 *
 * Values are taken VALUES_IN_L1 at a time. For those, DECODE_ROWS, 2 or 1 query rows by up to 8
 * vectors of V's columns are summed in registers, VALUES_PER_STEP values a step; the sum begins at
 * 0 and is added to acc at the end. The last Dv % LANES columns are one vector of their own. */

/* The sums of `rows` query rows by `nv` vectors. live_lanes > 0: V has so many elements in the only
 * vector. Unless runs is NULL, value number `prefetch_value` of runs is prefetched beside the first
 * value and the following ones beside theirs, each from `prefetch_at` bytes behind its begin on. */
INLINE void decode_accumulate_tile(const int rows, const int nv, const int type, const int masked,
                                   real *acc, ptrdiff_t acc_stride, const real *P, ptrdiff_t ld,
                                   const char *V, ptrdiff_t v_stride, ptrdiff_t nk,
                                   const real *rescale, const ptrdiff_t live_lanes,
                                   const char *const *runs, ptrdiff_t prefetch_value,
                                   ptrdiff_t prefetch_at)
{
    const ptrdiff_t value_at[4] = {0, v_stride, 2 * v_stride, 3 * v_stride};
    vec c[DECODE_ACCUMULATORS];
    UNROLL for (int i = 0; i < rows * nv; i++) c[i] = v_set1(0);
#define STEP(n)                                                                                  \
    do {                                                                                         \
        const char *ahead =                                                                      \
            runs ? row_in_runs(runs, v_stride, prefetch_value) + prefetch_at : NULL;             \
        vec p[4 * DECODE_ROWS];                                                                  \
        for (int k = 0; k < n; k++)                                                              \
            UNROLL for (int r = 0; r < rows; r++) p[k * rows + r] = v_set1(P[k * ld + r]);       \
        UNROLL for (int v = 0; v < nv; v++) {                                                    \
            const ptrdiff_t d = v * LANES * BYTES_OF(type);                                      \
            for (int k = 0; k < n; k++) {                                                        \
                const char *from = V + value_at[k] + d;                                          \
                const vec x = live_lanes ? load_first_lanes(from, live_lanes, type)              \
                                         : load_lanes(from, type);                               \
                if (runs && d % CACHE_LINE == 0) PREFETCH(ahead + value_at[k] + d);              \
                UNROLL for (int r = 0; r < rows; r++) {                                          \
                    const vec sum = v_fma(p[k * rows + r], x, c[r * nv + v]);                    \
                    /* An excluded key adds nothing, whatever it holds. */                       \
                    c[r * nv + v] =                                                              \
                        masked ? v_select_negative(p[k * rows + r], c[r * nv + v], sum) : sum;   \
                }                                                                                \
            }                                                                                    \
        }                                                                                        \
        P += n * ld, V += n * v_stride;                                                          \
        prefetch_value += n;                                                                     \
    } while (0)
    ptrdiff_t left = nk;
    for (; left >= VALUES_PER_STEP(rows, type); left -= VALUES_PER_STEP(rows, type))
        STEP(VALUES_PER_STEP(rows, type));
    for (; left > 0; left--) STEP(1);
#undef STEP
    UNROLL for (int r = 0; r < rows; r++) {
        const vec scale = v_set1(rescale ? rescale[r] : 1);
        UNROLL for (int v = 0; v < nv; v++) {
            real *a = acc + r * acc_stride + v * LANES;
            v_store(a, v_fma(v_load(a), scale, c[r * nv + v]));
        }
    }
}

INLINE void decode_accumulate_rows(const int rows, const int type, const int masked, real *acc,
                                   ptrdiff_t acc_stride, const real *P, ptrdiff_t ld,
                                   const char *V, ptrdiff_t v_stride, ptrdiff_t nk, ptrdiff_t Dv,
                                   const real *rescale, const char *const *runs,
                                   ptrdiff_t prefetch_value, ptrdiff_t prefetch_back)
{
    const int most = DECODE_ACCUMULATORS / rows < 8 ? DECODE_ACCUMULATORS / rows : 8;
    ptrdiff_t d = 0;
#define COLUMNS(nv, live_lanes)                                                                  \
    do {                                                                                         \
        decode_accumulate_tile(rows, nv, type, masked, acc + d, acc_stride, P, ld,               \
                               V + d * BYTES_OF(type), v_stride, nk, rescale, live_lanes, runs,  \
                               prefetch_value, d * BYTES_OF(type) - prefetch_back);              \
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
    const ptrdiff_t distance = prefetch_distance(Dv, type);
    const ptrdiff_t prefetch_back = alignment_offset(V[0], v_stride, Dv, type);
    for (ptrdiff_t k = 0; k < nk; k += VALUES_IN_L1(type)) {
        const ptrdiff_t n = nk - k < VALUES_IN_L1(type) ? nk - k : VALUES_IN_L1(type);
        const char *const *run = V + k / QKV_KEY_RUN;
        const ptrdiff_t first = k % QKV_KEY_RUN;
        int r = 0;
#define ROWS(count)                                                                              \
    do {                                                                                         \
        decode_accumulate_rows(count, type, masked, acc + r * acc_stride, acc_stride,            \
                               P + k * ld + r, ld, run[0] + first * v_stride, v_stride, n, Dv,   \
                               rescale && k == 0 ? rescale + r : NULL, r ? NULL : run,           \
                               distance + first, prefetch_back);                                 \
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
