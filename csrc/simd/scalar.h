/* The vocabulary on any machine: vectors of 16 bytes by the compiler's own vector type, which
 * becomes SSE2 or NEON where there is one and plain scalars elsewhere. 16 registers. */
#include "limits.h"
#include "../runtime/elements.h"

#include <string.h>

#define LANES (16 / (REAL_BITS / 8))
#define STRIP 2
#define rows_of(nv) ((nv) == 1 ? 10 : 6)
#define TILE_Q (4 * LANES)
#define ALL_LANES ((UINT64_C(1) << LANES) - 1)

typedef real vec __attribute__((vector_size(16)));
#if REAL_BITS == 32
typedef int32_t vmask __attribute__((vector_size(16)));
#define ROUNDER 12582912.0f /* 1.5 * 2^23: adding it rounds to an integer in the low bits */
#define EXPONENT_BIAS 127
#define MANTISSA_BITS 23
#else
typedef int64_t vmask __attribute__((vector_size(16)));
#define ROUNDER 6755399441055744.0 /* 1.5 * 2^52 */
#define EXPONENT_BIAS 1023
#define MANTISSA_BITS 52
#endif

SIMD_INLINE vec v_set1(real x) { return x - (vec){0}; }
SIMD_INLINE vec v_load(const real *p) { vec x; memcpy(&x, p, sizeof x); return x; }
SIMD_INLINE void v_store(real *p, vec x) { memcpy(p, &x, sizeof x); }
SIMD_INLINE vec v_add(vec a, vec b) { return a + b; }
SIMD_INLINE vec v_sub(vec a, vec b) { return a - b; }
SIMD_INLINE vec v_mul(vec a, vec b) { return a * b; }
SIMD_INLINE vec v_div(vec a, vec b) { return a / b; }
SIMD_INLINE vec v_fma(vec a, vec b, vec c) { return a * b + c; }

SIMD_INLINE vec v_select(vmask m, vec a, vec b) /* m ? a : b */
{
    return (vec)((m & (vmask)a) | (~m & (vmask)b));
}
SIMD_INLINE vec v_abs(vec x) { return v_select(x < 0, -x, x); }
SIMD_INLINE vec v_max(vec a, vec b) { return v_select(a > b, a, b); } /* b where one is NaN */
SIMD_INLINE vec v_min(vec a, vec b) { return v_select(a < b, a, b); } /* b where one is NaN */
SIMD_INLINE vec v_select_negative(vec sign, vec a, vec b) /* a where the sign bit is set */
{
    return v_select((vmask)sign >> (REAL_BITS - 1), a, b);
}
/* x = n + f with n the nearest integer; |x| < 2^22 and no NaN, or else n and f are anything. */
SIMD_INLINE vec v_split(vec x, vec *n)
{
    *n = (x + ROUNDER) - ROUNDER;
    return x - *n;
}
SIMD_INLINE vec v_ldexp(vec x, vec n) /* x * 2^n, n an integer, 2^n a normal number */
{
    const vmask low = (vmask)(n + ROUNDER) + EXPONENT_BIAS;
    return x * (vec)(low << MANTISSA_BITS);
}
/* x - n and n, an integer with x - 1 <= n <= x; where |x| is too large for that, n is about x. */
SIMD_INLINE vec v_fraction(vec x, vec *n)
{
    *n = ((x - (real)0.5) + ROUNDER) - ROUNDER;
    return x - *n;
}
SIMD_INLINE vec v_ldexp_or_zero(vec x, vec n) /* x * 2^n, 0 where 2^n is below the normal numbers */
{
    return (vec)(~(n < REAL_MIN_EXP) & (vmask)v_ldexp(x, n));
}
#if REAL_BITS == 32
SIMD_INLINE vec v_load_half(const char *p)
{
    uint16_t x[LANES];
    memcpy(x, p, sizeof x);
    return (vec){float_of_half(x[0]), float_of_half(x[1]), float_of_half(x[2]), float_of_half(x[3])};
}
SIMD_INLINE vec v_load_bfloat(const char *p)
{
    uint16_t x[LANES];
    memcpy(x, p, sizeof x);
    const vmask bits = {x[0], x[1], x[2], x[3]};
    return (vec)(bits << 16);
}
SIMD_INLINE vec v_load_int8(const char *p)
{
    signed char x[LANES];
    memcpy(x, p, sizeof x);
    return (vec){x[0], x[1], x[2], x[3]};
}
SIMD_INLINE void v_store_half(char *p, vec x)
{
    const uint16_t y[LANES] = {half_of_float(x[0]), half_of_float(x[1]), half_of_float(x[2]),
                               half_of_float(x[3])};
    memcpy(p, y, sizeof y);
}
SIMD_INLINE void v_store_bfloat(char *p, vec x)
{
    const uint16_t y[LANES] = {bfloat_of_float(x[0]), bfloat_of_float(x[1]), bfloat_of_float(x[2]),
                               bfloat_of_float(x[3])};
    memcpy(p, y, sizeof y);
}
#endif
SIMD_INLINE uint64_t v_bits(vmask m)
{
    uint64_t bits = 0;
    for (int i = 0; i < LANES; i++) bits |= (uint64_t)(m[i] & 1) << i;
    return bits;
}
SIMD_INLINE uint64_t v_le_bits(vec a, vec b) { return v_bits(a <= b); }
SIMD_INLINE vmask v_mask(uint64_t bits) /* the low LANES bits */
{
    vmask m;
    for (int i = 0; i < LANES; i++) m[i] = -(int)((bits >> i) & 1);
    return m;
}
SIMD_INLINE vmask v_mask_at(const uint64_t *word, int lane) { return v_mask(*word >> lane); }
SIMD_INLINE void v_transpose(vec x[LANES])
{
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < i; j++) {
            const real t = x[i][j];
            x[i][j] = x[j][i];
            x[j][i] = t;
        }
}
