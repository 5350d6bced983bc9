/* SIMD wrappers for AVX-512 (F, DQ, VL, BW): vectors of 64 bytes, 32 registers, a mask bit per
 * lane. The names and their meaning are those of scalar.h. */
#include "limits.h"

#include <immintrin.h>

#define LANES (64 / (REAL_BITS / 8))
#define STRIP 4
#define rows_of(nv) ((nv) <= 2 ? 12 : (nv) == 3 ? 8 : 6)
#define rows_of_values(nv) ((nv) == 1 ? 24 : rows_of(nv))
#define TILE_Q (4 * LANES)
#define DECODE_ACCUMULATORS 16
#define ALL_LANES ((UINT64_C(1) << LANES) - 1)

/* An intrinsic of the vector's type. */
#if REAL_BITS == 32
typedef __m512 vec;
typedef __mmask16 vmask;
#define OP(name) _mm512_##name##_ps
#define SIGN_BITS(x) _mm512_movepi32_mask(_mm512_castps_si512(x))
#define COMPARE _mm512_cmp_ps_mask
#else
typedef __m512d vec;
typedef __mmask8 vmask;
#define OP(name) _mm512_##name##_pd
#define SIGN_BITS(x) _mm512_movepi64_mask(_mm512_castpd_si512(x))
#define COMPARE _mm512_cmp_pd_mask
#endif

#include "x86.h"

INLINE vec v_abs(vec x) { return OP(abs)(x); }
INLINE vec v_select(vmask m, vec a, vec b) { return OP(mask_mov)(b, m, a); }
INLINE vec v_select_negative(vec sign, vec a, vec b) { return v_select(SIGN_BITS(sign), a, b); }
INLINE vec v_split(vec x, vec *n) /* x = n + f, n the nearest integer */
{
    const vec f = OP(reduce)(x, 8); /* 8: to nearest, no exceptions */
    *n = v_sub(x, f);
    return f;
}
INLINE vec v_ldexp(vec x, vec n) { return OP(scalef)(x, n); } /* x * 2^n */
INLINE vec v_fraction(vec x, vec *n) /* x - floor(x), and x for v_ldexp_or_zero */
{
    *n = x; /* scalef takes its floor */
    return OP(reduce)(x, 9); /* 9: downwards, no exceptions */
}
INLINE vec v_ldexp_or_zero(vec x, vec n) /* x * 2^n, 0 where 2^n is below the normal numbers */
{
    return OP(maskz_scalef)(COMPARE(n, v_set1(REAL_MIN_EXP), _CMP_NLT_UQ), x, n);
}
INLINE uint64_t v_le_bits(vec a, vec b) { return COMPARE(a, b, _CMP_LE_OQ); }
INLINE vmask v_mask(uint64_t bits) { return (vmask)bits; }
INLINE vmask v_mask_at(const uint64_t *word, int lane) /* v_mask(*word >> lane), from memory */
{
    vmask m;
    memcpy(&m, (const char *)word + lane / 8, sizeof m);
    return m;
}

#if REAL_BITS == 32
INLINE void v_transpose(vec x[LANES])
{
    vec t[16]; /* fours, then quarters of the vectors */
    for (int i = 0; i < 16; i += 4) transpose_fours(x + i, x + i);
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_f32x4(x[i], x[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_f32x4(x[i], x[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        x[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
        x[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
        x[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
        x[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
    }
}
/* x[j] = the j-th of the 16 floats at rows[i] + at, for i = 0..15: quarters of four rows are put
 * together as they are loaded, so that two rounds of shuffles are left of v_transpose's four. */
#define HAVE_LOAD_COLUMNS
INLINE void v_load_columns(vec x[LANES], const char *const *rows, ptrdiff_t at)
{
    vec y[4][4];
    for (int i = 0; i < 4; i++) {
        /* Four pointers at a time: a compiler that keeps all 16 puts them into vector registers. */
        __asm__ volatile("" : "+r"(rows));
        const char *r0 = rows[i] + at, *r1 = rows[i + 4] + at;
        const char *r2 = rows[i + 8] + at, *r3 = rows[i + 12] + at;
        for (int c = 0; c < 4; c++) {
            vec q = _mm512_castps128_ps512(_mm_loadu_ps((const float *)(r0 + 16 * c)));
            q = _mm512_insertf32x4(q, _mm_loadu_ps((const float *)(r1 + 16 * c)), 1);
            q = _mm512_insertf32x4(q, _mm_loadu_ps((const float *)(r2 + 16 * c)), 2);
            y[c][i] = _mm512_insertf32x4(q, _mm_loadu_ps((const float *)(r3 + 16 * c)), 3);
        }
    }
    for (int c = 0; c < 4; c++) transpose_fours(y[c], x + 4 * c);
}
#define HAVE_SUM_PARTS
INLINE vec v_sum_parts(const vec *parts)
{
    vec w[2];
    for (int i = 0; i < 2; i++)
        w[i] = v_add(_mm512_shuffle_f32x4(parts[2 * i], parts[2 * i + 1], 0x88),
                     _mm512_shuffle_f32x4(parts[2 * i], parts[2 * i + 1], 0xdd));
    return v_add(_mm512_shuffle_f32x4(w[0], w[1], 0x88), _mm512_shuffle_f32x4(w[0], w[1], 0xdd));
}
/* Lane i is x[(i + n) % 16], x[i % n] or x[i / times]; n and times are powers of 2. */
#define LANE_NUMBERS _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
#define HAVE_ROTATE
INLINE vec v_rotate(vec x, int n)
{
    return _mm512_permutexvar_ps(_mm512_add_epi32(LANE_NUMBERS, _mm512_set1_epi32(n)), x);
}
INLINE vec v_cycle(vec x, int n)
{
    return _mm512_permutexvar_ps(_mm512_and_si512(LANE_NUMBERS, _mm512_set1_epi32(n - 1)), x);
}
#define HAVE_REPEAT
INLINE vec v_repeat(const float *x, int times)
{
    const __m128i shift = _mm_cvtsi32_si128(__builtin_ctz((unsigned)times));
    return _mm512_permutexvar_ps(_mm512_srl_epi32(LANE_NUMBERS, shift), _mm512_loadu_ps(x));
}
INLINE vec v_load_half(const char *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
INLINE vec v_load_bfloat(const char *p)
{
    const __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
}
INLINE vec v_load_int8(const char *p)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
INLINE void v_store_half(char *p, vec x)
{
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(x, 0)); /* 0: to nearest even */
}
INLINE void v_store_bfloat(char *p, vec x) /* rounded to nearest even; NaN kept, and made quiet */
{
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_add_epi32(bits, half);
    const __m512i kept = _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), bits,
                                              _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
}
#else
INLINE void v_transpose(vec x[LANES])
{
    vec t[8];
    for (int i = 0; i < 8; i += 2) { /* pairs of rows, then quarters of the vectors */
        t[i] = _mm512_unpacklo_pd(x[i], x[i + 1]);
        t[i + 1] = _mm512_unpackhi_pd(x[i], x[i + 1]);
    }
    for (int i = 0; i < 2; i++) {
        x[i] = _mm512_shuffle_f64x2(t[i], t[i + 2], 0x88);
        x[i + 2] = _mm512_shuffle_f64x2(t[i], t[i + 2], 0xdd);
        x[i + 4] = _mm512_shuffle_f64x2(t[i + 4], t[i + 6], 0x88);
        x[i + 6] = _mm512_shuffle_f64x2(t[i + 4], t[i + 6], 0xdd);
    }
    for (int i = 0; i < 4; i++) t[i] = x[i], t[i + 4] = x[i + 4];
    for (int i = 0; i < 4; i++) {
        x[i] = _mm512_shuffle_f64x2(t[i], t[i + 4], 0x88);
        x[i + 4] = _mm512_shuffle_f64x2(t[i], t[i + 4], 0xdd);
    }
}
/* Quarters of two lanes: of x[0] and x[1] in the first half, of x[2] and x[3] in the second. */
#define HAVE_SUM_FOURS
INLINE vec v_sum_fours(const vec x[4])
{
    const vec a = v_add(_mm512_unpacklo_pd(x[0], x[1]), _mm512_unpackhi_pd(x[0], x[1]));
    const vec b = v_add(_mm512_unpacklo_pd(x[2], x[3]), _mm512_unpackhi_pd(x[2], x[3]));
    return v_add(_mm512_shuffle_f64x2(a, b, 0x88), _mm512_shuffle_f64x2(a, b, 0xdd));
}
#define HAVE_SUM_PARTS
INLINE vec v_sum_parts(const vec *parts)
{
    return v_add(_mm512_shuffle_f64x2(parts[0], parts[1], 0x88),
                 _mm512_shuffle_f64x2(parts[0], parts[1], 0xdd));
}
#endif
