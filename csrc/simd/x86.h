/* Wrappers that AVX2 and AVX-512 have in common, for the `vec` and the OP of an including header:
 * OP(name) is an intrinsic for that type. */
INLINE vec v_set1(real x) { return OP(set1)(x); }
INLINE vec v_load(const real *p) { return OP(loadu)(p); }
/* A vector that stays in a register: a compiler may else load it again for each use. */
#define HAVE_HOLD
INLINE vec v_hold(vec x)
{
    __asm__("" : "+v"(x));
    return x;
}
INLINE void v_store(real *p, vec x) { OP(storeu)(p, x); }
INLINE vec v_add(vec a, vec b) { return OP(add)(a, b); }
INLINE vec v_sub(vec a, vec b) { return OP(sub)(a, b); }
INLINE vec v_mul(vec a, vec b) { return OP(mul)(a, b); }
INLINE vec v_div(vec a, vec b) { return OP(div)(a, b); }
INLINE vec v_fma(vec a, vec b, vec c) { return OP(fmadd)(a, b, c); }
INLINE vec v_max(vec a, vec b) { return OP(max)(a, b); } /* b where one is NaN */
INLINE vec v_min(vec a, vec b) { return OP(min)(a, b); } /* b where one is NaN */

#if REAL_BITS == 32
/* Transposes 4 x 4 reals in each 16 bytes of four vectors. */
INLINE void transpose_fours(const vec x[4], vec y[4])
{
    const vec a = OP(unpacklo)(x[0], x[1]), b = OP(unpackhi)(x[0], x[1]);
    const vec c = OP(unpacklo)(x[2], x[3]), d = OP(unpackhi)(x[2], x[3]);
    y[0] = OP(shuffle)(a, c, 0x44);
    y[1] = OP(shuffle)(a, c, 0xee);
    y[2] = OP(shuffle)(b, d, 0x44);
    y[3] = OP(shuffle)(b, d, 0xee);
}
/* Lane i of each four lanes = the sum of x[i]'s four. */
#define HAVE_SUM_FOURS
INLINE vec v_sum_fours(const vec x[4])
{
    const vec a = v_add(OP(unpacklo)(x[0], x[1]), OP(unpackhi)(x[0], x[1]));
    const vec b = v_add(OP(unpacklo)(x[2], x[3]), OP(unpackhi)(x[2], x[3]));
    return v_add(OP(shuffle)(a, b, 0x44), OP(shuffle)(a, b, 0xee));
}
#endif
