/* The products where rows are few (decode): head_dim lies in lanes, so that each key and value is read
 * once, in the type that it is stored in, and widened in registers. Included by tile_tmpl.h for
 * reals. S and P have the layout of tiles; Q and acc are [rows][stride].
 *
 * Such work waits for memory. Rows are asked for PREFETCH_DISTANCE bytes before they are needed: a line at a time
 * beside the arithmetic, in several rows at once. On two cores of a Granite Rapids Xeon, as shares of
 * the speed of a plain read, keys and values of size 128: 2 KiB ahead 0.81-0.92, 4 KB 0.83-0.96,
 * 6000 bytes 0.92-0.98; int8 3000 bytes 0.83, 6000 0.75; every other line alone 0.5-0.8; whole groups
 * of 4 KiB ahead 0.1 less on bfloat16. */
#define PREFETCH_DISTANCE(type) (BYTES_OF(type) == 1 ? 3000 : 6000)

#ifndef DECODE_SUMS
#define DECODE_SUMS 8 /* registers for the accumulators of values */
#endif
#define FEW_MOST (LANES < 4 ? LANES : 4) /* rows that go together */
#define DECODE_STEP(rows, type) ((rows) > 2 && BYTES_OF(type) < 4 ? 2 : 4) /* values that do */
#define DECODE_VALUES(type) (BYTES_OF(type) < 4 ? 16 : 8) /* that stay in L1 for all rows */

#if REAL_BITS == 32
#define BY_TYPE(type, DO) /* DO with the element type as a constant */                           \
    switch (type) {                                                                              \
    case QKV_FLOAT16: DO(QKV_FLOAT16); break;                                                    \
    case QKV_BFLOAT16: DO(QKV_BFLOAT16); break;                                                  \
    case QKV_INT8: DO(QKV_INT8); break;                                                          \
    default: DO(QKV_FLOAT32); break;                                                             \
    }
#else
#define BY_TYPE(type, DO)                                                                        \
    (void)type;                                                                                  \
    DO(QKV_FLOAT64);
#endif

/* Keys between one and the one to ask for: a multiple of FEW_MOST. */
INLINE ptrdiff_t keys_ahead(ptrdiff_t length, int type)
{
    const ptrdiff_t most = (QKV_KEY_RUNS_AHEAD - 1) * QKV_KEY_RUN;
    const ptrdiff_t keys = PREFETCH_DISTANCE(type) / (length > 0 ? length * BYTES_OF(type) : 1);
    return keys < FEW_MOST ? FEW_MOST : keys < most ? keys / FEW_MOST * FEW_MOST : most;
}

/* How far behind a multiple of FEW_MOST rows' bytes they begin. What is asked for is moved back by
 * that: in rows that fill lines and pages, the order of its lines is then the same in each page,
 * and one that the hardware's own prefetching goes well with. (Granite Rapids, 16-bit keys of size
 * 128 that begin 64 bytes into a page: 0.70 of a plain read without, 0.80 with it.) */
INLINE ptrdiff_t alignment_offset(const char *rows, ptrdiff_t stride, ptrdiff_t length, int type)
{
    const ptrdiff_t bytes = FEW_MOST * stride;
    if (bytes <= 0 || stride != length * BYTES_OF(type) || bytes & (bytes - 1)) return 0;
    return (ptrdiff_t)((uintptr_t)rows & (uintptr_t)(bytes - 1));
}

INLINE const char *key_at(const char *const *groups, ptrdiff_t stride, size_t i)
{
    return groups[i / QKV_KEY_RUN] + (ptrdiff_t)(i % QKV_KEY_RUN) * stride;
}

#ifndef HAVE_SUM_EACH
/* Lane i of the result is the sum of x[i]'s lanes. */
INLINE vec v_sum_each(vec x[LANES])
{
    v_transpose(x);
    for (int n = LANES / 2; n > 0; n /= 2)
        for (int i = 0; i < n; i++) x[i] = v_add(x[i], x[i + n]);
    return x[0];
}
#endif

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

#ifndef HAVE_REPEAT
/* Lane i is x[i / times], times a power of 2; a whole vector from x on is readable. */
INLINE vec v_repeat(const float *x, int times)
{
    real lane[LANES];
    for (int i = 0; i < LANES; i++) lane[i] = (real)x[i / times];
    return v_load(lane);
}
#endif

/* The softmax of tiles (tile_tmpl.h) where S[k] is ld reals, ld a power of 2: a lane stands for a row
 * and every LANES / ld-th key, and what those lanes found is put together in the end. Scores are
 * multiplied by key_factors before, weights by value_factors afterwards, unless those are NULL. */
static void decode_softmax(void *S_, ptrdiff_t nk, int ld, const float *key_factors,
                        const float *value_factors, void *row_max, void *row_sum, void *decay_)
{
    real *S = S_, lane[2 * LANES];
    const ptrdiff_t count = nk * ld;
    vec best = v_set1(-REAL_INF), total = v_set1(0);
    if (key_factors)
        for (ptrdiff_t i = 0; i < count; i += LANES)
            v_store(S + i, v_mul(v_load(S + i), v_repeat(key_factors + i / ld, ld)));
    for (ptrdiff_t i = count; i % LANES; i++) S[i] = -REAL_INF;
    for (ptrdiff_t i = 0; i < count; i += LANES) best = v_max(best, v_load(S + i));
    v_store(lane, best);
    for (int n = LANES / 2; n >= ld; n /= 2)
        for (int i = 0; i < n; i++) lane[i] = lane[i + n] > lane[i] ? lane[i + n] : lane[i];
    for (int i = ld; i < LANES; i++) lane[i] = lane[i - ld];
    const vec before = v_load(row_max), top = v_max(v_load(lane), before);
    const vec rescale = exp2_nonpositive(v_sub(before, top), 0);
    v_store(lane, top);
    for (int i = ld; i < LANES; i++) lane[i] = lane[i - ld];
    const vec each = v_load(lane);
    for (ptrdiff_t i = 0; i < count; i += LANES) {
        const vec p = exp2_nonpositive(v_sub(v_load(S + i), each), 0);
        total = v_add(total, p);
        v_store(S + i, value_factors ? v_mul(p, v_repeat(value_factors + i / ld, ld)) : p);
    }
    v_store(lane, total);
    for (int n = LANES / 2; n >= ld; n /= 2)
        for (int i = 0; i < n; i++) lane[i] += lane[i + n];
    v_store(row_sum, v_fma(v_load(row_sum), rescale, v_load(lane)));
    v_store(row_max, top);
    v_store(decay_, rescale);
}

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
