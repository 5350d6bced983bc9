/* The tile kernels, written once. Include after a simd/ header, which defines `real`, `vec`,
 * LANES, STRIP (vectors in a register tile) and rows_of(nv), the rows that fill the registers;
 * QKV_TABLE names the table that is exported, QKV_ISA its ISA. Formulas: tile_kernels.h. */
#include "tile_kernels.h"

#include <string.h>

#define LOG2E 1.4426950408889634074
#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif

INLINE real load_real(const char *p)
{
    real x;
    memcpy(&x, p, sizeof x);
    return x;
}

/* n reals, n <= LANES, without touching what lies behind them; the rest is zero. */
INLINE vec load_part(const char *p, ptrdiff_t n)
{
    real part[LANES] = {0};
    memcpy(part, p, (size_t)n * sizeof(real));
    return v_load(part);
}

/* (2^x - 1) / x for |x| <= 1/2, a minimax polynomial: the relative error of 1 + x * it against
 * 2^x is 2e-9 in float and 4e-18 in double. */
INLINE vec exp2_slope(vec x)
{
#if REAL_BITS == 32
    vec g = v_set1(0.00015353360629290430159f);
    g = v_fma(g, x, v_set1(0.0013398874866602267857f));
    g = v_fma(g, x, v_set1(0.0096184373664188702776f));
    g = v_fma(g, x, v_set1(0.05550332469693873224f));
    g = v_fma(g, x, v_set1(0.24022647913498998415f));
    return v_fma(g, x, v_set1(0.6931472028559704008f));
#else
    vec g = v_set1(4.4347708103775016192e-10);
    g = v_fma(g, x, v_set1(7.0737832854020625769e-9));
    g = v_fma(g, x, v_set1(1.0178199575306790032e-7));
    g = v_fma(g, x, v_set1(1.3215435282068186062e-6));
    g = v_fma(g, x, v_set1(0.000015252733493118438132));
    g = v_fma(g, x, v_set1(0.00015403530457112641239));
    g = v_fma(g, x, v_set1(0.001333355814677463106));
    g = v_fma(g, x, v_set1(0.0096181291075941195762));
    g = v_fma(g, x, v_set1(0.055504108664820083176));
    g = v_fma(g, x, v_set1(0.24022650695910131262));
    return v_fma(g, x, v_set1(0.69314718055994532581));
#endif
}

/* 2^x for x <= 0; results below the smallest normal number are 0 (subnormals are slow, and no
 * more than rounding beside the row's largest weight, 1); NaN stays NaN. */
INLINE vec exp2_nonpositive(vec x)
{
    vec n;
    const vec f = v_split(x, &n);
    const vec p = v_ldexp(v_fma(exp2_slope(f), f, v_set1(1)), n);
    return v_zero_where_less(x, v_set1(REAL_MIN_EXP), p);
}

static void pack_rows(void *Qt_, const char *const *rows, ptrdiff_t D, int nvec, double mult)
{
    real *Qt = Qt_;
    const ptrdiff_t ld = (ptrdiff_t)nvec * LANES;
    const vec factor = v_set1((real)mult);
    for (int v = 0; v < nvec; v++) {
        const char *const *row = rows + v * LANES;
        for (ptrdiff_t d = 0; d < D; d += LANES) {
            vec x[LANES];
            const ptrdiff_t n = D - d < LANES ? D - d : LANES;
            const ptrdiff_t at = d * (ptrdiff_t)sizeof(real);
            if (n == LANES)
                for (int i = 0; i < LANES; i++) x[i] = v_load((const real *)(row[i] + at));
            else
                for (int i = 0; i < LANES; i++) x[i] = load_part(row[i] + at, n);
            v_transpose(x);
            for (ptrdiff_t i = 0; i < n; i++)
                v_store(Qt + (d + i) * ld + v * LANES, v_mul(x[i], factor));
        }
    }
}

static void store_rows(char *const *rows, int count, const void *acc_, ptrdiff_t Dv, int nvec,
                       const void *weight_)
{
    const real *acc = acc_, *weight = weight_;
    const ptrdiff_t ld = (ptrdiff_t)nvec * LANES;
    for (int v = 0; v * LANES < count; v++) {
        const int live = count - v * LANES < LANES ? count - v * LANES : LANES;
        const vec w = v_load(weight + v * LANES);
        for (ptrdiff_t d = 0; d < Dv; d += LANES) {
            vec x[LANES];
            const ptrdiff_t n = Dv - d < LANES ? Dv - d : LANES;
            const ptrdiff_t at = d * (ptrdiff_t)sizeof(real);
            for (int i = 0; i < LANES; i++) /* the last row stands in for those past the end */
                x[i] = v_mul(v_load(acc + (d + (i < n ? i : n - 1)) * ld + v * LANES), w);
            v_transpose(x);
            if (n == LANES) {
                for (int i = 0; i < live; i++) v_store((real *)(rows[v * LANES + i] + at), x[i]);
            } else {
                for (int i = 0; i < live; i++) {
                    real part[LANES];
                    v_store(part, x[i]);
                    memcpy(rows[v * LANES + i] + at, part, (size_t)n * sizeof(real));
                }
            }
        }
    }
}

/* The register tile of both products: C[r][0..nv) = C * decay + sum_t A[r][t] * B[t][0..nv), where
 * A[r][t] is a scalar to broadcast at A + r * a_row + t * a_red; no decay: C is overwritten. The
 * sum begins at 0, so that its rounding errors don't grow with all that C has taken up before.
 * `rows` and `nv` are constants where this is inlined, so that the accumulators are registers. */
INLINE void register_tile(const int rows, const int nv, real *C, const real *B, ptrdiff_t ld,
                          const char *A, const ptrdiff_t a_row, const ptrdiff_t a_red,
                          ptrdiff_t red, const real *decay)
{
    vec c[24];
    UNROLL for (int i = 0; i < rows * nv; i++) c[i] = v_set1(0);
    for (ptrdiff_t t = 0; t < red; t++) {
        vec b[STRIP];
        UNROLL for (int v = 0; v < nv; v++) b[v] = v_load(B + v * LANES);
        UNROLL for (int r = 0; r < rows; r++) {
            const vec a = v_set1(load_real(A + r * a_row));
            UNROLL for (int v = 0; v < nv; v++) c[r * nv + v] = v_fma(a, b[v], c[r * nv + v]);
        }
        A += a_red;
        B += ld;
    }
    if (decay) {
        vec factor[STRIP];
        UNROLL for (int v = 0; v < nv; v++) factor[v] = v_load(decay + v * LANES);
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int v = 0; v < nv; v++)
                c[r * nv + v] = v_fma(v_load(C + r * ld + v * LANES), factor[v], c[r * nv + v]);
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < nv; v++) v_store(C + r * ld + v * LANES, c[r * nv + v]);
}

INLINE void strip_product(const int nv, real *C, const real *B, ptrdiff_t ld, const char *A,
                          const ptrdiff_t a_row, const ptrdiff_t a_red, ptrdiff_t rows,
                          ptrdiff_t red, const real *decay)
{
#define TILE(n)                                                                                  \
    do {                                                                                         \
        register_tile(n, nv, C, B, ld, A, a_row, a_red, red, decay);                             \
        C += (n) * ld, A += (n) * a_row, rows -= (n);                                            \
    } while (0)
    while (rows >= rows_of(nv)) TILE(rows_of(nv));
    if (rows_of(nv) > 8 && rows >= 8) TILE(8);
    if (rows_of(nv) > 4 && rows >= 4) TILE(4);
    if (rows >= 2) TILE(2);
    if (rows >= 1) TILE(1);
#undef TILE
}

/* C[rows][ld] = C * decay + A[rows][red] * B[red][ld], a strip of at most STRIP vectors at a time. */
INLINE void product(real *C, const real *B, const char *A, const ptrdiff_t a_row,
                    const ptrdiff_t a_red, ptrdiff_t rows, ptrdiff_t red, int nvec,
                    const real *decay)
{
    const ptrdiff_t ld = (ptrdiff_t)nvec * LANES;
    for (int v = 0; v < nvec; v += STRIP, C += STRIP * LANES, B += STRIP * LANES) {
        const real *at = decay ? decay + v * LANES : NULL;
        switch (nvec - v) {
        case 1: strip_product(1, C, B, ld, A, a_row, a_red, rows, red, at); break;
#if STRIP > 2
        case 2: strip_product(2, C, B, ld, A, a_row, a_red, rows, red, at); break;
        case 3: strip_product(3, C, B, ld, A, a_row, a_red, rows, red, at); break;
#endif
        default: strip_product(STRIP, C, B, ld, A, a_row, a_red, rows, red, at); break;
        }
    }
}

static void scores(void *S, const void *Qt, const char *K, ptrdiff_t k_stride, ptrdiff_t nk,
                   ptrdiff_t D, int nvec)
{
    product(S, Qt, K, k_stride, sizeof(real), nk, D, nvec, NULL);
}

static void accumulate(void *acc, const void *P, const char *V, ptrdiff_t v_stride, ptrdiff_t nk,
                       ptrdiff_t Dv, int nvec, const void *decay)
{
    product(acc, P, V, sizeof(real), v_stride, Dv, nk, nvec, decay);
}

static void accumulate_odd(void *acc_, const void *P_, const char *V, ptrdiff_t v_stride,
                           ptrdiff_t nk, ptrdiff_t Dv, int nvec)
{
    real *acc = acc_;
    const real *P = P_;
    const ptrdiff_t ld = (ptrdiff_t)nvec * LANES;
    for (ptrdiff_t k = 0; k < nk; k++) {
        for (ptrdiff_t d = 0; d < Dv; d++) {
            const real x = load_real(V + k * v_stride + d * (ptrdiff_t)sizeof(real));
            if (x - x == 0) continue;
            for (int v = 0; v < nvec; v++) {
                real *c = acc + d * ld + v * LANES;
                const vec p = v_load(P + k * ld + v * LANES), sum = v_load(c);
                v_store(c, v_select_negative(p, sum, v_fma(v_set1(x), p, sum)));
            }
        }
    }
}

static int all_finite(const char *V, ptrdiff_t v_stride, ptrdiff_t nk, ptrdiff_t Dv)
{
    const vec zero = v_set1(0);
    vec sum = zero; /* x * 0 is 0, or NaN where x is not finite */
    for (ptrdiff_t k = 0; k < nk; k++, V += v_stride) {
        ptrdiff_t d = 0;
        for (; d + LANES <= Dv; d += LANES)
            sum = v_fma(v_load((const real *)(V + d * (ptrdiff_t)sizeof(real))), zero, sum);
        if (d < Dv)
            sum = v_fma(load_part(V + d * (ptrdiff_t)sizeof(real), Dv - d), zero, sum);
    }
    return v_le_bits(sum, zero) == ALL_LANES;
}

static void softcap(void *S_, ptrdiff_t nk, int nvec, double c)
{
    /* tanh(x) = e / (e + 2) with e = exp(2x) - 1 = 2^y - 1, y = 2 x log2(e); with y = n + f,
     * e = 2^n (2^f - 1) + (2^n - 1) keeps its relative precision around 0. */
    real *S = S_;
    const vec to_y = v_set1((real)(2.0 / c)), limit = v_set1(60), two = v_set1(2);
    const vec back = v_set1((real)(c * LOG2E)), one = v_set1(1);
    for (ptrdiff_t i = 0; i < nk * nvec; i++, S += LANES) {
        const vec y = v_max(v_sub(v_set1(0), limit), v_min(limit, v_mul(v_load(S), to_y)));
        vec n;
        const vec f = v_split(y, &n);
        const vec two_n = v_ldexp(one, n);
        const vec e = v_fma(two_n, v_mul(exp2_slope(f), f), v_sub(two_n, one));
        v_store(S, v_mul(back, v_div(e, v_add(e, two))));
    }
}

static void alibi(void *S_, ptrdiff_t nk, int nvec, const void *slope_, const void *position_)
{
    real *S = S_;
    const real *slope = slope_, *position = position_;
    for (ptrdiff_t k = 0; k < nk; k++) {
        for (int v = 0; v < nvec; v++, S += LANES) {
            const vec factor = v_mul(v_load(slope + v * LANES), v_set1((real)-LOG2E));
            const vec away = v_sub(v_load(position + v * LANES), v_set1((real)k));
            const vec distance = v_max(away, v_sub(v_set1(0), away));
            v_store(S, v_fma(factor, distance, v_load(S)));
        }
    }
}

/* A finite bias stays finite in log2 units: finfo.min is a common stand-in for -inf, but a row
 * that holds nothing else is a plain average, not an empty row. */
INLINE vec bias_in_log2(vec bias)
{
    const vec lowest = v_set1(-REAL_MAX);
    const vec scaled = v_mul(bias, v_set1((real)LOG2E));
    return v_max(lowest, scaled);
}

static void bias(void *S_, ptrdiff_t nk, int nvec, const char *const *rows, int shared,
                 uint64_t *allow)
{
    real *S = S_;
    const ptrdiff_t ld = (ptrdiff_t)nvec * LANES;
    const vec minus_inf = v_set1(-REAL_INF);
    if (shared) {
        for (ptrdiff_t k = 0; k < nk; k++) {
            const real one = load_real(rows[0] + k * (ptrdiff_t)sizeof(real));
            if (one == -REAL_INF) allow[k] = 0;
            const vec b = bias_in_log2(v_set1(one));
            for (int v = 0; v < nvec; v++) {
                real *s = S + k * ld + v * LANES;
                v_store(s, v_add(v_load(s), b));
            }
        }
        return;
    }
    for (int v = 0; v < nvec; v++) {
        const char *const *row = rows + v * LANES;
        for (ptrdiff_t k = 0; k < nk; k += LANES) {
            vec x[LANES];
            const ptrdiff_t n = nk - k < LANES ? nk - k : LANES;
            const ptrdiff_t at = k * (ptrdiff_t)sizeof(real);
            if (n == LANES)
                for (int i = 0; i < LANES; i++) x[i] = v_load((const real *)(row[i] + at));
            else
                for (int i = 0; i < LANES; i++) x[i] = load_part(row[i] + at, n);
            v_transpose(x);
            for (ptrdiff_t i = 0; i < n; i++) {
                real *s = S + (k + i) * ld + v * LANES;
                allow[k + i] &= ~(v_le_bits(x[i], minus_inf) << (v * LANES));
                v_store(s, v_add(v_load(s), bias_in_log2(x[i])));
            }
        }
    }
}

static void limit_range(uint64_t *allow, ptrdiff_t nk, int nvec, const void *first_,
                        const void *last_)
{
    const real *first = first_, *last = last_;
    for (ptrdiff_t k = 0; k < nk; k++) {
        const vec at = v_set1((real)k);
        uint64_t bits = 0;
        for (int v = 0; v < nvec; v++)
            bits |= (v_le_bits(v_load(first + v * LANES), at) &
                     v_le_bits(at, v_load(last + v * LANES)))
                    << (v * LANES);
        allow[k] &= bits;
    }
}

INLINE void softmax_block(const int masked, real *S, ptrdiff_t nk, int nvec,
                         const uint64_t *allow, real *row_max, real *row_sum, real *decays)
{
    const ptrdiff_t ld = (ptrdiff_t)nvec * LANES;
    const vec minus_inf = v_set1(-REAL_INF), minus_zero = v_set1((real)-0.0);
    for (int v = 0; v < nvec; v++) {
        const int lane = v * LANES;
        const vec before = v_load(row_max + lane);
        vec part[4] = {before, before, before, before};
        ptrdiff_t k = 0;
#define SCORE(k)                                                                                 \
    (masked ? v_select(v_mask(allow[k] >> lane), v_load(S + (k)*ld + lane), minus_inf)           \
            : v_load(S + (k)*ld + lane))
        for (; k + 4 <= nk; k += 4)
            UNROLL for (int i = 0; i < 4; i++) part[i] = v_max(part[i], SCORE(k + i));
        for (; k < nk; k++) part[0] = v_max(part[0], SCORE(k));
        const vec top = v_max(v_max(part[0], part[1]), v_max(part[2], part[3]));
        const vec decay = exp2_nonpositive(v_sub(before, top));

        vec sum[4] = {v_set1(0), v_set1(0), v_set1(0), v_set1(0)};
#define EXPONENT(k, to)                                                                          \
    do {                                                                                         \
        real *s = S + (k)*ld + lane;                                                             \
        vec p = exp2_nonpositive(v_sub(v_load(s), top));                                         \
        if (masked) {                                                                            \
            const vmask seen = v_mask(allow[k] >> lane);                                         \
            v_store(s, v_select(seen, p, minus_zero));                                           \
            p = v_select(seen, p, v_set1(0));                                                    \
        } else {                                                                                 \
            v_store(s, p);                                                                       \
        }                                                                                        \
        to = v_add(to, p);                                                                       \
    } while (0)
        for (k = 0; k + 4 <= nk; k += 4)
            UNROLL for (int i = 0; i < 4; i++) EXPONENT(k + i, sum[i]);
        for (int i = 0; k < nk; k++, i++) EXPONENT(k, sum[i]);
        const vec total = v_add(v_add(sum[0], sum[1]), v_add(sum[2], sum[3]));
#undef SCORE
#undef EXPONENT
        v_store(row_sum + lane, v_fma(v_load(row_sum + lane), decay, total));
        v_store(row_max + lane, top);
        v_store(decays + lane, decay);
    }
}

static void softmax(void *S, ptrdiff_t nk, int nvec, const uint64_t *allow, void *row_max,
                   void *row_sum, void *decay)
{
    if (allow)
        softmax_block(1, S, nk, nvec, allow, row_max, row_sum, decay);
    else
        softmax_block(0, S, nk, nvec, allow, row_max, row_sum, decay);
}

static double fma_chain(ptrdiff_t n)
{
    vec c[24], sum = v_set1(0);
    const vec a = v_set1((real)0.999), b = v_set1((real)1e-3);
    UNROLL for (int i = 0; i < 24; i++) c[i] = v_set1((real)i);
    for (ptrdiff_t t = 0; t < n; t++)
        UNROLL for (int i = 0; i < 24; i++) c[i] = v_fma(a, c[i], b);
    UNROLL for (int i = 0; i < 24; i++) sum = v_add(sum, c[i]);
    real lanes[LANES];
    v_store(lanes, sum);
    return (double)lanes[0];
}

const qkv_tile_kernels QKV_TABLE = {
    .isa = QKV_ISA,
    .real_bytes = sizeof(real),
    .lanes = LANES,
    .tile_q = TILE_Q,
    .pack_rows = pack_rows,
    .scores = scores,
    .softcap = softcap,
    .alibi = alibi,
    .bias = bias,
    .limit_range = limit_range,
    .softmax = softmax,
    .accumulate = accumulate,
    .accumulate_odd = accumulate_odd,
    .all_finite = all_finite,
    .store_rows = store_rows,
    .fma_chain = fma_chain,
};
