/* SIMD wrappers for AArch64's NEON (Advanced SIMD): vectors of 16 bytes, 32 registers. The names
 * and their meaning are those of scalar.h. Lanes are numbered as on little-endian machines. */
#include "limits.h"

#include <arm_neon.h>
#include <string.h>

#define LANES (16 / (REAL_BITS / 8))
#define STRIP 4
#define rows_of(nv) ((nv) <= 2 ? 12 : (nv) == 3 ? 8 : 6)
#define rows_of_values(nv) ((nv) == 1 ? 24 : rows_of(nv))
#define TILE_Q (8 * LANES)
#define ALL_LANES ((UINT64_C(1) << LANES) - 1)

/* An intrinsic of the vector's type, and one of its bits. */
#if REAL_BITS == 32
typedef float32x4_t vec;
typedef uint32x4_t vmask;
#define OP(name) v##name##q_f32
#define SET1 vdupq_n_f32
#define BITS_OP(name) v##name##q_u32
#define BITS_OF vreinterpretq_u32_f32
#define OF_BITS vreinterpretq_f32_u32
#define LANE_BITS ((vmask){1, 2, 4, 8})
#else
typedef float64x2_t vec;
typedef uint64x2_t vmask;
#define OP(name) v##name##q_f64
#define SET1 vdupq_n_f64
#define BITS_OP(name) v##name##q_u64
#define BITS_OF vreinterpretq_u64_f64
#define OF_BITS vreinterpretq_f64_u64
#define LANE_BITS ((vmask){1, 2})
#endif

INLINE vec v_set1(real x) { return SET1(x); }
INLINE vec v_load(const real *p) { vec x; memcpy(&x, p, sizeof x); return x; }
INLINE void v_store(real *p, vec x) { memcpy(p, &x, sizeof x); }
INLINE vec v_add(vec a, vec b) { return OP(add)(a, b); }
INLINE vec v_sub(vec a, vec b) { return OP(sub)(a, b); }
INLINE vec v_mul(vec a, vec b) { return OP(mul)(a, b); }
INLINE vec v_div(vec a, vec b) { return OP(div)(a, b); }
INLINE vec v_fma(vec a, vec b, vec c) { return OP(fma)(c, a, b); }
INLINE vec v_abs(vec x) { return OP(abs)(x); }
INLINE vec v_select(vmask m, vec a, vec b) { return OP(bsl)(m, a, b); }
INLINE vec v_clear(vmask m, vec x) { return OF_BITS(BITS_OP(bic)(BITS_OF(x), m)); } /* m ? 0 : x */
/* Compared and selected: vmaxq is NaN where one is, and vmaxnmq the other one. */
INLINE vec v_max(vec a, vec b) { return v_select(OP(cgt)(a, b), a, b); } /* b where one is NaN */
INLINE vec v_min(vec a, vec b) { return v_select(OP(clt)(a, b), a, b); } /* b where one is NaN */
INLINE vec v_select_negative(vec sign, vec a, vec b)
{
#if REAL_BITS == 32
    return v_select(vcltzq_s32(vreinterpretq_s32_f32(sign)), a, b);
#else
    return v_select(vcltzq_s64(vreinterpretq_s64_f64(sign)), a, b);
#endif
}
INLINE vec v_split(vec x, vec *n) /* x = n + f, n the nearest integer */
{
    *n = OP(rndn)(x);
    return v_sub(x, *n);
}
INLINE vec v_ldexp(vec x, vec n) /* x * 2^n, n an integer, 2^n a normal number */
{
#if REAL_BITS == 32
    const int32x4_t e = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
    return vmulq_f32(x, vreinterpretq_f32_s32(vshlq_n_s32(e, 23)));
#else
    const int64x2_t e = vaddq_s64(vcvtq_s64_f64(n), vdupq_n_s64(1023));
    return vmulq_f64(x, vreinterpretq_f64_s64(vshlq_n_s64(e, 52)));
#endif
}
INLINE vec v_fraction(vec x, vec *n) /* x - floor(x), and floor(x) */
{
    *n = OP(rndm)(x);
    return v_sub(x, *n);
}
INLINE vec v_ldexp_or_zero(vec x, vec n) /* x * 2^n, 0 where 2^n is below the normal numbers */
{
    return v_clear(OP(clt)(n, v_set1(REAL_MIN_EXP)), v_ldexp(x, n));
}
INLINE uint64_t v_le_bits(vec a, vec b)
{
    return BITS_OP(addv)(BITS_OP(and)(OP(cle)(a, b), LANE_BITS));
}
#if REAL_BITS == 32
INLINE vmask v_mask(uint64_t bits) { return vtstq_u32(vdupq_n_u32((uint32_t)bits), LANE_BITS); }
#else
INLINE vmask v_mask(uint64_t bits) { return vtstq_u64(vdupq_n_u64(bits), LANE_BITS); }
#endif
INLINE vmask v_mask_at(const uint64_t *word, int lane) /* v_mask(*word >> lane) */
{
#if REAL_BITS == 32 /* a load to all lanes, and a shifted constant */
    const vmask bits = vshlq_u32(LANE_BITS, vdupq_n_s32(lane % 32));
    uint32_t half;
    memcpy(&half, (const char *)word + lane / 32 * 4, sizeof half);
    return vtstq_u32(vdupq_n_u32(half), bits);
#else
    return vtstq_u64(vdupq_n_u64(*word), vshlq_u64(LANE_BITS, vdupq_n_s64(lane)));
#endif
}

/* A multiply-add with one real for all lanes, which fmla takes as an element of a register: a load
 * to all lanes would use a unit that multiplies. Of intrinsics gcc 12 makes such loads, or three
 * instructions that load an element. */
#define HAVE_FMA_SCALAR
typedef real vscalar;
INLINE vscalar v_scalar(real x) { return x; }
INLINE vec v_fma_scalar(vscalar a, vec b, vec c)
{
#if REAL_BITS == 32
    __asm__("fmla %0.4s, %1.4s, %2.s[0]" : "+w"(c) : "w"(b), "w"(a));
#else
    __asm__("fmla %0.2d, %1.2d, %2.d[0]" : "+w"(c) : "w"(b), "w"(a));
#endif
    return c;
}

#if REAL_BITS == 32
INLINE void v_transpose(vec x[LANES])
{
    const float64x2_t a = vreinterpretq_f64_f32(vtrn1q_f32(x[0], x[1]));
    const float64x2_t b = vreinterpretq_f64_f32(vtrn2q_f32(x[0], x[1]));
    const float64x2_t c = vreinterpretq_f64_f32(vtrn1q_f32(x[2], x[3]));
    const float64x2_t d = vreinterpretq_f64_f32(vtrn2q_f32(x[2], x[3]));
    x[0] = vreinterpretq_f32_f64(vtrn1q_f64(a, c));
    x[1] = vreinterpretq_f32_f64(vtrn1q_f64(b, d));
    x[2] = vreinterpretq_f32_f64(vtrn2q_f64(a, c));
    x[3] = vreinterpretq_f32_f64(vtrn2q_f64(b, d));
}
#define HAVE_SUM_FOURS
INLINE vec v_sum_fours(vec x[LANES]) /* lane i = the sum of x[i]'s lanes */
{
    return vpaddq_f32(vpaddq_f32(x[0], x[1]), vpaddq_f32(x[2], x[3]));
}
#define HAVE_REPEAT
INLINE vec v_repeat(const float *p, int times) /* lane i is p[i / times] */
{
    const vec x = v_load(p);
    return times == 1 ? x : times == 2 ? vzip1q_f32(x, x) : vdupq_laneq_f32(x, 0);
}
INLINE vec v_load_half(const char *p)
{
    uint16x4_t x;
    memcpy(&x, p, sizeof x);
    return vcvt_f32_f16(vreinterpret_f16_u16(x));
}
INLINE vec v_load_bfloat(const char *p)
{
    uint16x4_t x;
    memcpy(&x, p, sizeof x);
    return vreinterpretq_f32_u32(vshll_n_u16(x, 16));
}
INLINE vec v_load_int8(const char *p)
{
    uint32_t x;
    memcpy(&x, p, sizeof x);
    const int16x8_t wide = vmovl_s8(vcreate_s8(x));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
}
INLINE void v_store_half(char *p, vec x) /* rounded to nearest even */
{
    const uint16x4_t y = vreinterpret_u16_f16(vcvt_f16_f32(x));
    memcpy(p, &y, sizeof y);
}
INLINE void v_store_bfloat(char *p, vec x) /* rounded to nearest even; NaN kept, and made quiet */
{
    const uint32x4_t bits = BITS_OF(x);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    const uint16x4_t y = vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), rounded, quiet), 16);
    memcpy(p, &y, sizeof y);
}
#else
INLINE void v_transpose(vec x[LANES])
{
    const vec first = vtrn1q_f64(x[0], x[1]);
    x[1] = vtrn2q_f64(x[0], x[1]);
    x[0] = first;
}
#define HAVE_SUM_FOURS
INLINE vec v_sum_fours(vec x[LANES]) { return vpaddq_f64(x[0], x[1]); }
#endif
