/* SIMD wrappers for any machine, by the compiler's own vectors of 16 bytes: SSE2 or NEON where
 * there is one, plain scalars elsewhere. 16 registers.
 *
 * Every header of simd/ defines these names, once for REAL_BITS 32 and once for 64:
 *
 *     vec, vmask   a vector, a mask of lanes      LANES        reals in a vector
 *     STRIP        vectors of a register tile     rows_of(nv)  its rows for nv vectors
 *     TILE_Q       query rows of a tile           ALL_LANES    bits of a vector's lanes
 *
 * A header may also define rows_of_values, DECODE_ACCUMULATORS and the wrappers of fallbacks.h,
 * each with its HAVE_ macro. The loads and stores of narrower types are needed for float only. */
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
typedef uint32_t vbits __attribute__((vector_size(16))); /* of which sums and shifts may overflow */
#define ROUNDER 12582912.0f /* 1.5 * 2^23: adding it rounds to an integer in the low bits */
#define EXPONENT_BIAS 127
#define MANTISSA_BITS 23
#else
typedef int64_t vmask __attribute__((vector_size(16)));
typedef uint64_t vbits __attribute__((vector_size(16)));
#define ROUNDER 6755399441055744.0 /* 1.5 * 2^52 */
#define EXPONENT_BIAS 1023
#define MANTISSA_BITS 52
#endif

INLINE vec v_set1(real x) { return x - (vec){0}; }
INLINE vec v_load(const real *p) { vec x; memcpy(&x, p, sizeof x); return x; }
INLINE void v_store(real *p, vec x) { memcpy(p, &x, sizeof x); }
INLINE vec v_add(vec a, vec b) { return a + b; }
INLINE vec v_sub(vec a, vec b) { return a - b; }
INLINE vec v_mul(vec a, vec b) { return a * b; }
INLINE vec v_div(vec a, vec b) { return a / b; }
INLINE vec v_fma(vec a, vec b, vec c) { return a * b + c; }

INLINE vec v_select(vmask m, vec a, vec b) /* m ? a : b */
{
    return (vec)((m & (vmask)a) | (~m & (vmask)b));
}
INLINE vec v_abs(vec x) { return v_select(x < 0, -x, x); }
INLINE vec v_max(vec a, vec b) { return v_select(a > b, a, b); } /* b where one is NaN */
INLINE vec v_min(vec a, vec b) { return v_select(a < b, a, b); } /* b where one is NaN */
INLINE vec v_select_negative(vec sign, vec a, vec b) /* a where the sign bit is set */
{
    return v_select((vmask)sign >> (REAL_BITS - 1), a, b);
}
/* f and n: x = n + f, n the nearest integer. If |x| >= 2^22 or x is NaN, both may be anything. */
INLINE vec v_split(vec x, vec *n)
{
    *n = (x + ROUNDER) - ROUNDER;
    return x - *n;
}
INLINE vec v_ldexp(vec x, vec n) /* x * 2^n, n an integer, 2^n a normal number */
{
    const vbits low = (vbits)(n + ROUNDER) + EXPONENT_BIAS;
    return x * (vec)(low << MANTISSA_BITS);
}
/* x - n and n, an integer with x - 1 <= n <= x. If |x| is too large for that, n is about x. */
INLINE vec v_fraction(vec x, vec *n)
{
    *n = ((x - (real)0.5) + ROUNDER) - ROUNDER;
    return x - *n;
}
INLINE vec v_ldexp_or_zero(vec x, vec n) /* x * 2^n, 0 where 2^n is below the normal numbers */
{
    return (vec)(~(n < REAL_MIN_EXP) & (vmask)v_ldexp(x, n));
}
#if REAL_BITS == 32
INLINE vec v_load_half(const char *p)
{
    uint16_t x[LANES];
    memcpy(x, p, sizeof x);
    return (vec){float_of_half(x[0]), float_of_half(x[1]), float_of_half(x[2]),
                 float_of_half(x[3])};
}
INLINE vec v_load_bfloat(const char *p)
{
    uint16_t x[LANES];
    memcpy(x, p, sizeof x);
    const vbits bits = {x[0], x[1], x[2], x[3]};
    return (vec)(bits << 16);
}
INLINE vec v_load_int8(const char *p)
{
    signed char x[LANES];
    memcpy(x, p, sizeof x);
    return (vec){x[0], x[1], x[2], x[3]};
}
INLINE void v_store_half(char *p, vec x)
{
    const uint16_t y[LANES] = {half_of_float(x[0]), half_of_float(x[1]), half_of_float(x[2]),
                               half_of_float(x[3])};
    memcpy(p, y, sizeof y);
}
INLINE void v_store_bfloat(char *p, vec x)
{
    const uint16_t y[LANES] = {bfloat_of_float(x[0]), bfloat_of_float(x[1]), bfloat_of_float(x[2]),
                               bfloat_of_float(x[3])};
    memcpy(p, y, sizeof y);
}
#endif
INLINE uint64_t v_le_bits(vec a, vec b)
{
    const vmask m = a <= b;
    uint64_t bits = 0;
    for (int i = 0; i < LANES; i++) bits |= (uint64_t)(m[i] & 1) << i;
    return bits;
}
INLINE vmask v_mask(uint64_t bits) /* the low LANES bits */
{
    vmask m;
    for (int i = 0; i < LANES; i++) m[i] = -(int)((bits >> i) & 1);
    return m;
}
INLINE vmask v_mask_at(const uint64_t *word, int lane) { return v_mask(*word >> lane); }
INLINE void v_transpose(vec x[LANES])
{
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < i; j++) {
            const real t = x[i][j];
            x[i][j] = x[j][i];
            x[j][i] = t;
        }
}
