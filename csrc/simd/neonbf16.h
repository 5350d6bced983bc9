/* SIMD wrappers for NEON with FEAT_BF16: those of neon.h, pairs of bfloat16 that take the place of
 * a float each, and quads that take the place of two. */
#include "neon.h"

/* Quads of two rows times quads of two lanes: c + {a0 b0, a0 b1, a1 b0, a1 b1}, each a sum of 4
 * products. Not an intrinsic: clang before 16 has those only if -march names the extension. */
INLINE vec v_dot_quads(vec a, vec b, vec c)
{
    __asm__("bfmmla %0.4s, %1.8h, %2.8h" : "+w"(c) : "w"(a), "w"(b));
    return c;
}
#define DOT_QUADS_FLOP 32
INLINE vec v_load_quads(const char *first, const char *second)
{
    float32x2_t low, high;
    memcpy(&low, first, sizeof low);
    memcpy(&high, second, sizeof high);
    return vcombine_f32(low, high);
}
INLINE vec v_low_halves(vec a, vec b)
{
    return vreinterpretq_f32_f64(vzip1q_f64(vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b)));
}
INLINE vec v_high_halves(vec a, vec b)
{
    return vreinterpretq_f32_f64(vzip2q_f64(vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b)));
}

INLINE vec v_negate_pairs(vec x) { return OF_BITS(veorq_u32(BITS_OF(x), vdupq_n_u32(0x80008000u))); }
/* The pairs (first[i], second[i]), rounded to nearest, halves upwards. A NaN may come out as
 * anything. */
INLINE vec v_to_pairs(vec first, vec second)
{
    const uint32x4_t half = vdupq_n_u32(0x8000);
    return OF_BITS(vsriq_n_u32(vaddq_u32(BITS_OF(second), half),
                               vaddq_u32(BITS_OF(first), half), 16));
}
INLINE vec v_first_of_pair(vec x) { return OF_BITS(vshlq_n_u32(BITS_OF(x), 16)); }
INLINE vec v_second_of_pair(vec x)
{
    return OF_BITS(vandq_u32(BITS_OF(x), vdupq_n_u32(0xffff0000u)));
}
/* The first elements of the pairs of a and then of b; v_second_of_pairs: the second ones. */
INLINE vec v_first_of_pairs(vec a, vec b)
{
    return vreinterpretq_f32_u16(vuzp1q_u16(vreinterpretq_u16_f32(a), vreinterpretq_u16_f32(b)));
}
INLINE vec v_second_of_pairs(vec a, vec b)
{
    return vreinterpretq_f32_u16(vuzp2q_u16(vreinterpretq_u16_f32(a), vreinterpretq_u16_f32(b)));
}
/* Two vectors of pairs to quads, those of the lanes 0 and 1 and those of the others:
 * {p0 q0, p1 q1} and {p2 q2, p3 q3}. v_pairs_of_quads is the inverse. */
INLINE void v_quads_of_pairs(vec x[2])
{
    const vec low = vzip1q_f32(x[0], x[1]);
    x[1] = vzip2q_f32(x[0], x[1]);
    x[0] = low;
}
INLINE void v_pairs_of_quads(vec x[2])
{
    const vec first = vuzp1q_f32(x[0], x[1]);
    x[1] = vuzp2q_f32(x[0], x[1]);
    x[0] = first;
}
