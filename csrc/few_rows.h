/* The products where rows are few (decode): head_dim lies in lanes, so that each key and value is read
 * once, in the type that it is stored in, and widened in registers. Included by tile_tmpl.h for
 * reals. S and P have the layout of tiles; Q and acc are [rows][stride]. */

/* Registers for the accumulators of values. */
#ifndef FEW_SUMS
#define FEW_SUMS 8
#endif
#define FEW_MOST (LANES < 4 ? LANES : 4) /* rows that go together */
#define FEW_KEYS 16                      /* keys that stay in L1 while all rows meet them */

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

/* LANES scores at a time: `rows` rows with LANES / rows keys, of which `live` are wanted. A score's
 * sum does not depend on where among the LANES it is computed. */
INLINE void few_scores_tile(const int rows, const int type, real *S, ptrdiff_t ld, const real *Q,
                            ptrdiff_t q_stride, const char *K, ptrdiff_t k_stride, int live,
                            ptrdiff_t D)
{
    const int keys = LANES / rows;
    const ptrdiff_t stride3 = 3 * k_stride, stride5 = 5 * k_stride, stride7 = 7 * k_stride;
    /* Few enough registers for the addresses of 16 keys. */
    const ptrdiff_t at[8] = {0, k_stride, 2 * k_stride, stride3, 4 * k_stride, stride5, 2 * stride3,
                             stride7};
    const char *upper = K + 8 * k_stride;
    vec x[LANES];
    UNROLL for (int i = 0; i < LANES; i++) x[i] = v_set1(0);
    ptrdiff_t d = 0;
#define STEP(load)                                                                               \
    do {                                                                                         \
        vec q[FEW_MOST];                                                                         \
        UNROLL for (int r = 0; r < rows; r++) q[r] = v_load(Q + r * q_stride + d);               \
        UNROLL for (int k = 0; k < keys; k++) {                                                  \
            const char *p = (k < 8 ? K : upper) + at[k % 8] + d * BYTES_OF(type);                \
            const vec key = load;                                                                \
            UNROLL for (int r = 0; r < rows; r++)                                                \
                x[k * rows + r] = v_fma(q[r], key, x[k * rows + r]);                             \
        }                                                                                        \
    } while (0)
    for (; d + LANES <= D; d += LANES) STEP(load_lanes(p, type));
    if (d < D) STEP(load_some_lanes(p, D - d, type));
#undef STEP
    real part[LANES];
    v_store(part, v_sum_each(x));
    for (int k = 0; k < live; k++)
        for (int r = 0; r < rows; r++) S[k * ld + r] = part[k * rows + r];
}

INLINE void few_scores_of(const int type, real *S, ptrdiff_t ld, const real *Q, ptrdiff_t q_stride,
                          const char *K, ptrdiff_t k_stride, ptrdiff_t nk, ptrdiff_t D, int rows)
{
    for (ptrdiff_t k = 0; k < nk; k += FEW_KEYS) {
        const ptrdiff_t end = nk - k < FEW_KEYS ? nk : k + FEW_KEYS;
        int r = 0;
#define ROWS(n)                                                                                  \
    do {                                                                                         \
        ptrdiff_t i = k;                                                                         \
        for (; i + LANES / (n) <= end; i += LANES / (n))                                         \
            few_scores_tile(n, type, S + i * ld + r, ld, Q + r * q_stride, q_stride,             \
                            K + i * k_stride, k_stride, LANES / (n), D);                         \
        for (; i < end; i++) /* the same key in all places */                                    \
            few_scores_tile(n, type, S + i * ld + r, ld, Q + r * q_stride, q_stride,             \
                            K + i * k_stride, 0, 1, D);                                          \
        r += n;                                                                                  \
    } while (0)
        while (rows - r >= FEW_MOST) ROWS(FEW_MOST);
        if (FEW_MOST > 2 && rows - r >= 2) ROWS(2);
        if (rows - r >= 1) ROWS(1);
#undef ROWS
    }
}

static void few_scores(void *S, ptrdiff_t ld, const void *Q, ptrdiff_t q_stride, const char *K,
                       ptrdiff_t k_stride, ptrdiff_t nk, ptrdiff_t D, int rows, int type)
{
#define TYPE(t) few_scores_of(t, S, ld, Q, q_stride, K, k_stride, nk, D, rows)
#if REAL_BITS == 32
    switch (type) {
    case QKV_FLOAT16: TYPE(QKV_FLOAT16); break;
    case QKV_BFLOAT16: TYPE(QKV_BFLOAT16); break;
    case QKV_INT8: TYPE(QKV_INT8); break;
    default: TYPE(QKV_FLOAT32); break;
    }
#else
    (void)type;
    TYPE(QKV_FLOAT64);
#endif
#undef TYPE
}

/* acc[r][0..nv) = acc * decay + sum_k P[k][r] V[k]; `some` > 0: elements of the only vector. */
INLINE void few_accumulate_tile(const int rows, const int nv, const int type, const int partial,
                                real *acc, ptrdiff_t acc_stride, const real *P, ptrdiff_t ld,
                                const char *V, ptrdiff_t v_stride, ptrdiff_t nk, const real *decay,
                                ptrdiff_t some)
{
    vec c[FEW_SUMS];
    UNROLL for (int i = 0; i < rows * nv; i++) c[i] = v_set1(0);
    for (ptrdiff_t k = 0; k < nk; k++, P += ld, V += v_stride) {
        vec p[FEW_MOST];
        UNROLL for (int r = 0; r < rows; r++) p[r] = v_set1(P[r]);
        UNROLL for (int v = 0; v < nv; v++) {
            const char *at = V + v * LANES * BYTES_OF(type);
            const vec x = some ? load_some_lanes(at, some, type) : load_lanes(at, type);
            UNROLL for (int r = 0; r < rows; r++) {
                const vec sum = v_fma(p[r], x, c[r * nv + v]);
                /* An excluded key adds nothing, whatever it holds. */
                c[r * nv + v] = partial ? v_select_negative(p[r], c[r * nv + v], sum) : sum;
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++) {
        const vec factor = v_set1(decay ? decay[r] : 1);
        UNROLL for (int v = 0; v < nv; v++) {
            real *a = acc + r * acc_stride + v * LANES;
            v_store(a, v_fma(v_load(a), factor, c[r * nv + v]));
        }
    }
}

INLINE void few_accumulate_rows(const int rows, const int type, const int partial, real *acc,
                                ptrdiff_t acc_stride, const real *P, ptrdiff_t ld, const char *V,
                                ptrdiff_t v_stride, ptrdiff_t nk, ptrdiff_t Dv, const real *decay)
{
    ptrdiff_t d = 0;
#define COLUMNS(nv, some)                                                                        \
    few_accumulate_tile(rows, nv, type, partial, acc + d, acc_stride, P, ld,                     \
                        V + d * BYTES_OF(type), v_stride, nk, decay, some)
    for (; d + FEW_SUMS / rows * LANES <= Dv; d += FEW_SUMS / rows * LANES)
        COLUMNS(FEW_SUMS / rows, 0);
    for (; d + LANES <= Dv; d += LANES) COLUMNS(1, 0);
    if (d < Dv) COLUMNS(1, Dv - d);
#undef COLUMNS
}

INLINE void few_accumulate_of(const int type, const int partial, real *acc, ptrdiff_t acc_stride,
                              const real *P, ptrdiff_t ld, const char *V, ptrdiff_t v_stride,
                              ptrdiff_t nk, ptrdiff_t Dv, int rows, const real *decay)
{
    for (ptrdiff_t k = 0; k < nk; k += FEW_KEYS) {
        const ptrdiff_t n = nk - k < FEW_KEYS ? nk - k : FEW_KEYS;
        int r = 0;
#define ROWS(count)                                                                              \
    do {                                                                                         \
        few_accumulate_rows(count, type, partial, acc + r * acc_stride, acc_stride,              \
                            P + k * ld + r, ld, V + k * v_stride, v_stride, n, Dv,               \
                            decay && k == 0 ? decay + r : NULL);                                 \
        r += count;                                                                              \
    } while (0)
        while (rows - r >= FEW_MOST) ROWS(FEW_MOST);
        if (FEW_MOST > 2 && rows - r >= 2) ROWS(2);
        if (rows - r >= 1) ROWS(1);
#undef ROWS
    }
}

static void few_accumulate(void *acc, ptrdiff_t acc_stride, const void *P, ptrdiff_t ld,
                           const char *V, ptrdiff_t v_stride, ptrdiff_t nk, ptrdiff_t Dv, int rows,
                           const void *decay, int partial, int type)
{
#define TYPE(t)                                                                                  \
    do {                                                                                         \
        if (partial)                                                                             \
            few_accumulate_of(t, 1, acc, acc_stride, P, ld, V, v_stride, nk, Dv, rows, decay);   \
        else                                                                                     \
            few_accumulate_of(t, 0, acc, acc_stride, P, ld, V, v_stride, nk, Dv, rows, decay);   \
    } while (0)
#if REAL_BITS == 32
    switch (type) {
    case QKV_FLOAT16: TYPE(QKV_FLOAT16); break;
    case QKV_BFLOAT16: TYPE(QKV_BFLOAT16); break;
    case QKV_INT8: TYPE(QKV_INT8); break;
    default: TYPE(QKV_FLOAT32); break;
    }
#else
    (void)type;
    TYPE(QKV_FLOAT64);
#endif
#undef TYPE
}
