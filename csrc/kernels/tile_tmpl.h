/* The tile kernels, written once. Include after a simd/ header, which defines `real`, `vec`,
 * LANES, STRIP (vectors in a register tile) and rows_of(nv), the rows that fill the registers;
 * QKV_TABLE names the table that is exported, QKV_ISA its ISA, QKV_PAIRS that operands are bfloat16,
 * QKV_MATRIX_UNIT that a matrix unit multiplies them. Formulas: kernels.h. */
#include "../runtime/convert.h"
#include "../runtime/elements.h"
#include "kernels.h"

#include <string.h>

#define LOG2E 1.4426950408889634074
#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif

#define CACHE_LINE 64
#define PREFETCH(p) __builtin_prefetch(p, 0, 2)

/* Ask for the next line of both lists. */
INLINE void prefetch_next(qkv_prefetch_rows prefetch[2])
{
    UNROLL for (int i = 0; i < 2; i++) {
        if (prefetch[i].count == 0) continue;
        PREFETCH(prefetch[i].row + prefetch[i].at);
        prefetch[i].at += CACHE_LINE;
        if (prefetch[i].at < prefetch[i].bytes) continue;
        prefetch[i].at = 0;
        prefetch[i].row += prefetch[i].stride;
        prefetch[i].count--;
    }
}

INLINE real load_real(const char *p)
{
    real x;
    memcpy(&x, p, sizeof x);
    return x;
}

/* `bytes` of a vector, without touching what lies behind them; the rest is zero. */
INLINE vec load_part(const char *p, ptrdiff_t bytes)
{
    real part[LANES] = {0};
    memcpy(part, p, (size_t)bytes);
    return v_load(part);
}

/* A vector of elements of any type that real can hold, widened. */
#if REAL_BITS == 32
#define BYTES_OF(type) ((type) == QKV_FLOAT32 ? 4 : (type) == QKV_INT8 ? 1 : 2)
#else
#define BYTES_OF(type) ((void)(type), 8)
#endif

INLINE vec load_lanes(const char *p, const int type)
{
#if REAL_BITS == 32
    if (type == QKV_FLOAT16) return v_load_half(p);
    if (type == QKV_BFLOAT16) return v_load_bfloat(p);
    if (type == QKV_INT8) return v_load_int8(p);
#endif
    return v_load((const real *)p);
}

/* n < LANES elements, without touching what lies behind them; the rest is zero. */
INLINE vec load_some_lanes(const char *p, ptrdiff_t n, const int type)
{
    char part[sizeof(vec)] = {0};
    memcpy(part, p, (size_t)(n * BYTES_OF(type)));
    return load_lanes(part, type);
}

#ifndef HAVE_LOAD_COLUMNS
INLINE void v_load_columns(vec x[LANES], const char *const *rows, ptrdiff_t at)
{
    for (int i = 0; i < LANES; i++) x[i] = v_load((const real *)(rows[i] + at));
    v_transpose(x);
}
#endif

/* x[j] = the j-th real (or pair of bfloat16) at rows[i] + at, for each lane i; zeros past `bytes`. */
INLINE void load_columns(vec x[LANES], const char *const *rows, ptrdiff_t at, ptrdiff_t bytes)
{
    if (bytes >= (ptrdiff_t)sizeof(vec)) {
        v_load_columns(x, rows, at);
        return;
    }
    for (int i = 0; i < LANES; i++) x[i] = load_part(rows[i] + at, bytes);
    v_transpose(x);
}

/* (2^x - 1) / x for |x| <= 1/2, a minimax polynomial: the relative error of 1 + x * it against
 * 2^x is 2e-9 in float and 4e-18 in double. For tanh, which needs precision on both sides of 0. */
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
 * more than rounding beside the row's largest weight, 1); NaN stays NaN. With x = n + f, n the floor,
 * 2^f = 1 + f * g(f) for a minimax polynomial g: relative error 2e-9 in float, 3e-18 in double. A
 * rough one, 3e-6, is enough where the result is rounded to bfloat16, 4e-3. */
INLINE vec exp2_nonpositive(vec x, const int rough)
{
    vec n;
    const vec f = v_fraction(x, &n);
#if REAL_BITS == 32
    vec g = v_set1(rough ? 0.013426682640086255951f : 0.00021612910951221658911f);
    if (!rough) {
        g = v_fma(g, f, v_set1(0.0012467847551207965361f));
        g = v_fma(g, f, v_set1(0.0096754514550593455974f));
    }
    g = v_fma(g, f, v_set1(rough ? 0.052242477222727445026f : 0.055485280669814803464f));
    g = v_fma(g, f, v_set1(rough ? 0.24128020318582252272f : 0.24022930554164043771f));
    g = v_fma(g, f, v_set1(rough ? 0.69304484511709280257f : 0.69314704444416419636f));
#else
    vec g = v_set1(6.2634646009761470802e-10);
    (void)rough;
    g = v_fma(g, f, v_set1(6.5595301896210069816e-9));
    g = v_fma(g, f, v_set1(1.0253212223905222794e-7));
    g = v_fma(g, f, v_set1(1.3208367318424936942e-6));
    g = v_fma(g, f, v_set1(0.00001525317505299179206));
    g = v_fma(g, f, v_set1(0.00015403512309774436912));
    g = v_fma(g, f, v_set1(0.0013333558629561369834));
    g = v_fma(g, f, v_set1(0.0096181290995509217695));
    g = v_fma(g, f, v_set1(0.055504108665602235701));
    g = v_fma(g, f, v_set1(0.24022650695906330332));
    g = v_fma(g, f, v_set1(0.69314718055994592839));
#endif
    return v_ldexp_or_zero(v_fma(g, f, v_set1(1)), n);
}

#ifdef QKV_PAIRS
#define ROUGH 1
#define MULTIPLY_ADD(a, b, c) v_dot_pairs(a, b, c)
#define MULTIPLY_ADD_FLOP 4
#else
#define ROUGH 0
#define MULTIPLY_ADD(a, b, c) v_fma(a, b, c)
#define MULTIPLY_ADD_FLOP 2
#endif
#ifdef QKV_MATRIX_UNIT
#include "product_matrix.h"
#else
#include "product_lanes.h"
#endif
#ifdef QKV_PAIRS
#include "inputs_bf16.h"
#else
#include "inputs_real.h"
#endif

static void scale_keys(void *S_, ptrdiff_t nk, int nvec, const float *factors, int weights)
{
    real *S = S_;
    for (ptrdiff_t k = 0; k < nk; k++) {
        const vec factor = v_set1((real)factors[k]);
        for (int v = 0; v < nvec; v++, S += LANES) {
            const vec x = v_load(S), y = v_mul(x, factor);
            v_store(S, weights ? v_select_negative(x, x, y) : y);
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

/* Two passes where rows rescale: a compiler must not fuse that product with the sum behind it, whose
 * rounding error is found by taking it apart again (Knuth's TwoSum). */
static void fold(void *total_, void *error_, void *acc_, ptrdiff_t rows, int nvec,
                 const void *decay_, int finish)
{
    const ptrdiff_t ld = (ptrdiff_t)nvec * LANES;
    for (int v = 0; v < nvec; v++) {
        real *total = (real *)total_ + v * LANES, *error = (real *)error_ + v * LANES;
        real *acc = (real *)acc_ + v * LANES;
        const vec factor = v_load((const real *)decay_ + v * LANES), zero = v_set1(0);
        if (v_le_bits(v_set1(1), factor) != ALL_LANES)
            for (ptrdiff_t i = 0; i < rows * ld; i += ld) {
                const vec t = v_load(total + i), product = v_mul(t, factor);
                const vec lost = v_fma(t, factor, v_sub(zero, product));
                v_store(error + i, v_fma(v_load(error + i), factor, lost));
                v_store(total + i, product);
            }
        for (ptrdiff_t i = 0; i < rows * ld; i += ld) {
            const vec t = v_load(total + i), a = v_load(acc + i), sum = v_add(t, a);
            const vec added = v_sub(sum, t);
            const vec lost = v_add(v_sub(t, v_sub(sum, added)), v_sub(a, added));
            const vec e = v_add(v_load(error + i), lost);
            v_store(total + i, sum);
            v_store(error + i, e);
            if (!finish) continue;
            const vmask finite = v_mask(v_le_bits(v_sub(sum, sum), zero));
            v_store(acc + i, v_select(finite, v_add(sum, e), sum));
        }
    }
}

static void scale(void *S_, ptrdiff_t nk, int nvec, double c)
{
    real *S = S_;
    const vec factor = v_set1((real)c);
    for (ptrdiff_t i = 0; i < nk * nvec; i++, S += LANES) v_store(S, v_mul(v_load(S), factor));
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
    const ptrdiff_t ld = (ptrdiff_t)nvec * LANES;
    for (int v = 0; v < nvec; v++) {
        const vec factor = v_mul(v_load(slope + v * LANES), v_set1((real)-LOG2E));
        const vec at = v_load(position + v * LANES), one = v_set1(1);
        vec key = v_set1(0);
        real *s = S + v * LANES;
        for (ptrdiff_t k = 0; k < nk; k++, s += ld, key = v_add(key, one))
            v_store(s, v_fma(factor, v_abs(v_sub(at, key)), v_load(s)));
    }
}

/* S + log2(e) * bias. A finite bias stays finite in log2 units: finfo.min is a common stand-in for
 * -inf, but a row that holds nothing else is a plain average, not an empty row. */
#define HUGE_BIAS (-REAL_MAX / 2)
INLINE vec add_huge_bias(vec S, vec bias)
{
    const vec log2e = v_set1((real)LOG2E), lowest = v_set1(-REAL_MAX);
    const vec kept = v_add(v_max(lowest, v_mul(bias, log2e)), S);
    return v_select(v_mask(v_le_bits(bias, v_set1(HUGE_BIAS))), kept, v_fma(bias, log2e, S));
}

static void bias(void *S_, ptrdiff_t nk, int nvec, const char *const *rows, int shared,
                 uint64_t *allow)
{
    real *S = S_;
    const ptrdiff_t ld = (ptrdiff_t)nvec * LANES;
    const vec log2e = v_set1((real)LOG2E), minus_inf = v_set1(-REAL_INF);
    if (shared) {
        for (ptrdiff_t k = 0; k < nk; k++) {
            const real one = load_real(rows[0] + k * (ptrdiff_t)sizeof(real));
            if (one == -REAL_INF) allow[k] = 0;
            for (int v = 0; v < nvec; v++) {
                real *s = S + k * ld + v * LANES;
                v_store(s, add_huge_bias(v_load(s), v_set1(one)));
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
            load_columns(x, row, at, n * (ptrdiff_t)sizeof(real));
            for (int i = 0; i < LANES; i++) /* the next block, too far apart for the CPU's guess */
                __builtin_prefetch(row[i] + at + nk * (ptrdiff_t)sizeof(real));
            vec least = x[0];
            for (int i = 1; i < LANES; i++) least = v_min(x[i], least);
            real *s = S + k * ld + v * LANES;
            if (!v_le_bits(least, v_set1(HUGE_BIAS))) {
                for (ptrdiff_t i = 0; i < n; i++, s += ld)
                    v_store(s, v_fma(x[i], log2e, v_load(s)));
                continue;
            }
            for (ptrdiff_t i = 0; i < n; i++, s += ld) {
                allow[k + i] &= ~(v_le_bits(x[i], minus_inf) << (v * LANES));
                v_store(s, add_huge_bias(v_load(s), x[i]));
            }
        }
    }
}

static void mask_positions(uint64_t *allow, ptrdiff_t nk, int nvec, const void *first_,
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

/* In 64 keys, a byte holds the bits of eight lanes for a key; then eight bytes are a key's word. */
static void mask_bool(uint64_t *allow, ptrdiff_t nk, int nvec, const char *const *rows,
                       ptrdiff_t stride)
{
    const int count = nvec * LANES;
    for (ptrdiff_t begin = 0; begin < nk; begin += 64) {
        const ptrdiff_t n = nk - begin < 64 ? nk - begin : 64;
        uint8_t bits[8][64];
        memset(bits, 0, sizeof bits);
        for (int i = 0; i < count; i++) {
            const char *row = rows[i] + begin * stride;
            __builtin_prefetch(row + nk * stride); /* the next block's */
            uint8_t one[64], *to = bits[i / 8];
            if (stride == 1)
                memcpy(one, row, (size_t)n);
            else
                for (ptrdiff_t k = 0; k < n; k++) one[k] = (uint8_t)row[k * stride];
            const uint8_t bit = (uint8_t)(1 << i % 8);
            for (int k = 0; k < 64; k++) to[k] |= one[k] ? bit : 0; /* past n: never read */
        }
        for (ptrdiff_t k = 0; k < n; k++) {
            uint64_t word = 0;
            for (int j = 0; j < 8; j++) word |= (uint64_t)bits[j][k] << 8 * j;
            allow[begin + k] &= word;
        }
    }
}

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

#if REAL_BITS == 32
INLINE void widen_of(const int type, float *row, const char *src, ptrdiff_t n)
{
    ptrdiff_t i = 0;
    for (; i + LANES <= n; i += LANES) v_store(row + i, load_lanes(src + i * BYTES_OF(type), type));
    if (i < n) {
        float rest[LANES];
        v_store(rest, load_some_lanes(src + i * BYTES_OF(type), n - i, type));
        memcpy(row + i, rest, (size_t)(n - i) * sizeof(float));
    }
}

static void widen(void *row, const char *src, ptrdiff_t n, int type)
{
    switch (type) {
    case QKV_FLOAT16: widen_of(QKV_FLOAT16, row, src, n); break;
    case QKV_BFLOAT16: widen_of(QKV_BFLOAT16, row, src, n); break;
    default: widen_of(QKV_INT8, row, src, n); break;
    }
}

static void narrow(char *dst, const void *row_, ptrdiff_t n, int type)
{
    const float *row = row_;
    ptrdiff_t i = 0;
    if (type == QKV_FLOAT16) {
        for (; i + LANES <= n; i += LANES) v_store_half(dst + 2 * i, v_load(row + i));
    } else {
        for (; i + LANES <= n; i += LANES) v_store_bfloat(dst + 2 * i, v_load(row + i));
    }
    if (i < n) {
        char part[2 * LANES];
        const vec rest = load_part((const char *)(row + i), (n - i) * (ptrdiff_t)sizeof(float));
        if (type == QKV_FLOAT16)
            v_store_half(part, rest);
        else
            v_store_bfloat(part, rest);
        memcpy(dst + 2 * i, part, (size_t)(n - i) * 2);
    }
}
#define WIDEN widen
#define NARROW narrow
#else
#define WIDEN NULL
#define NARROW NULL
#endif

const qkv_tile_kernels QKV_TABLE = {
    .isa = QKV_ISA,
    .real_bytes = sizeof(real),
    .input_type = INPUT_TYPE,
    .lanes = LANES,
    .tile_q = TILE_Q,
    .depth_step = DEPTH_STEP,
    .row_step = ROW_STEP,
    .enter = ENTER,
    .leave = LEAVE,
    .pack_rows = pack_rows,
    .pack_values = PACK_VALUES,
    .scores = scores,
    .scale = scale,
    .softcap = softcap,
    .alibi = alibi,
    .bias = bias,
    .mask_positions = mask_positions,
    .mask_bool = mask_bool,
    .softmax = softmax,
    .accumulate = accumulate,
    .accumulate_nonfinite = accumulate_nonfinite,
    .scale_keys = scale_keys,
    .all_finite = all_finite,
    .store_rows = store_rows,
    .fold = fold,
    .decode_scores = DECODE_SCORES,
    .decode_softmax = DECODE_SOFTMAX,
    .decode_accumulate = DECODE_ACCUMULATE,
    .widen = WIDEN,
    .narrow = NARROW,
    .fma_chain = fma_chain,
    .fma_chain_flop = FMA_CHAIN_FLOP,
};
