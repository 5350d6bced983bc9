/* SIMD wrappers for AVX2, FMA and F16C: vectors of 32 bytes, 16 registers. The names and their
 * meaning are those of scalar.h. */
#include "limits.h"

#include <immintrin.h>

#define LANES (32 / (REAL_BITS / 8))
#define STRIP 2
#define rows_of(nv) ((nv) == 1 ? 10 : 6)
#define TILE_Q (4 * LANES)
#define ALL_LANES ((UINT64_C(1) << LANES) - 1)

/* An intrinsic of the vector's type. */
#if REAL_BITS == 32
typedef __m256 vec, vmask;
#define OP(name) _mm256_##name##_ps
#else
typedef __m256d vec, vmask;
#define OP(name) _mm256_##name##_pd
#endif

#include "x86.h"

INLINE vec v_abs(vec x) { return OP(andnot)(v_set1((real)-0.0), x); }
INLINE vec v_select(vmask m, vec a, vec b) { return OP(blendv)(b, a, m); }
INLINE vec v_select_negative(vec sign, vec a, vec b) { return OP(blendv)(b, a, sign); }
INLINE vec v_split(vec x, vec *n) /* x = n + f, n the nearest integer */
{
    *n = OP(round)(x, 8); /* 8: to nearest, no exceptions */
    return v_sub(x, *n);
}
INLINE vec v_ldexp(vec x, vec n) /* x * 2^n, n an integer, 2^n a normal number */
{
#if REAL_BITS == 32
    const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(e, 23)));
#else /* n to its low bits by adding 1.5 * 2^52 */
    const __m256i low = _mm256_castpd_si256(_mm256_add_pd(n, _mm256_set1_pd(6755399441055744.0)));
    const __m256i e = _mm256_add_epi64(low, _mm256_set1_epi64x(1023));
    return _mm256_mul_pd(x, _mm256_castsi256_pd(_mm256_slli_epi64(e, 52)));
#endif
}
INLINE vec v_fraction(vec x, vec *n) /* x - floor(x), and floor(x) */
{
    *n = OP(round)(x, 9); /* 9: downwards, no exceptions */
    return v_sub(x, *n);
}
INLINE vec v_ldexp_or_zero(vec x, vec n) /* x * 2^n, 0 where 2^n is below the normal numbers */
{
    return OP(andnot)(OP(cmp)(n, v_set1(REAL_MIN_EXP), _CMP_LT_OQ), v_ldexp(x, n));
}
INLINE uint64_t v_le_bits(vec a, vec b)
{
    return (uint64_t)OP(movemask)(OP(cmp)(a, b, _CMP_LE_OQ));
}
INLINE vmask v_mask(uint64_t bits)
{
#if REAL_BITS == 32
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i x = _mm256_and_si256(_mm256_set1_epi32((int)bits), lane);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(x, lane));
#else
    const __m256i lane = _mm256_setr_epi64x(1, 2, 4, 8);
    const __m256i x = _mm256_and_si256(_mm256_set1_epi64x((long long)bits), lane);
    return _mm256_castsi256_pd(_mm256_cmpeq_epi64(x, lane));
#endif
}
INLINE vmask v_mask_at(const uint64_t *word, int lane) { return v_mask(*word >> lane); }

#if REAL_BITS == 32
INLINE void v_transpose(vec x[LANES])
{
    for (int i = 0; i < 8; i += 4) transpose_fours(x + i, x + i); /* fours, then the two halves */
    for (int i = 0; i < 4; i++) {
        const vec low = _mm256_permute2f128_ps(x[i], x[i + 4], 0x20);
        x[i + 4] = _mm256_permute2f128_ps(x[i], x[i + 4], 0x31);
        x[i] = low;
    }
}
#define HAVE_SUM_PARTS
INLINE vec v_sum_parts(const vec *parts)
{
    return v_add(_mm256_permute2f128_ps(parts[0], parts[1], 0x20),
                 _mm256_permute2f128_ps(parts[0], parts[1], 0x31));
}
/* Lane i is x[(i + n) % 8], x[i % n] or x[i / times]; n and times are powers of 2. */
#define LANE_NUMBERS _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)
#define HAVE_ROTATE
INLINE vec v_rotate(vec x, int n)
{
    return _mm256_permutevar8x32_ps(x, _mm256_add_epi32(LANE_NUMBERS, _mm256_set1_epi32(n)));
}
INLINE vec v_cycle(vec x, int n)
{
    return _mm256_permutevar8x32_ps(x, _mm256_and_si256(LANE_NUMBERS, _mm256_set1_epi32(n - 1)));
}
#define HAVE_REPEAT
INLINE vec v_repeat(const float *x, int times)
{
    const __m128i shift = _mm_cvtsi32_si128(__builtin_ctz((unsigned)times));
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(x), _mm256_srl_epi32(LANE_NUMBERS, shift));
}
INLINE vec v_load_half(const char *p)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}
INLINE vec v_load_bfloat(const char *p)
{
    const __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
}
INLINE vec v_load_int8(const char *p)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
INLINE void v_store_half(char *p, vec x)
{
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(x, 0)); /* 0: to nearest even */
}
INLINE void v_store_bfloat(char *p, vec x) /* rounded to nearest even; NaN kept, and made quiet */
{
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
    const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i kept = _mm256_blendv_epi8(rounded, quiet, nan);
    const __m256i packed = _mm256_packus_epi32(kept, kept); /* each half twice */
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 8)));
}
#else
INLINE void v_transpose(vec x[LANES])
{
    const vec a = _mm256_unpacklo_pd(x[0], x[1]), b = _mm256_unpackhi_pd(x[0], x[1]);
    const vec c = _mm256_unpacklo_pd(x[2], x[3]), d = _mm256_unpackhi_pd(x[2], x[3]);
    x[0] = _mm256_permute2f128_pd(a, c, 0x20);
    x[1] = _mm256_permute2f128_pd(b, d, 0x20);
    x[2] = _mm256_permute2f128_pd(a, c, 0x31);
    x[3] = _mm256_permute2f128_pd(b, d, 0x31);
}
#endif
