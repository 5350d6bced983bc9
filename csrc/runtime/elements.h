/* One element: float16 and bfloat16 ("bfloat") to float and back, rounded to nearest even. */
#ifndef QKV_ELEMENTS_H
#define QKV_ELEMENTS_H

#include <stdint.h>
#include <string.h>

static inline float float_of_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline uint32_t bits_of_float(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* The exponent and mantissa, shifted to float32's places, are the half's value times 2^-112;
 * a multiplication by 2^112 corrects that, for subnormals too. */
static inline float float_of_half(uint16_t half)
{
    const uint32_t sign = (uint32_t)(half & 0x8000u) << 16, rest = half & 0x7fffu;
    if (rest >= 0x7c00u) return float_of_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    const float magnitude = float_of_bits(rest << 13) * 0x1p112f;
    return float_of_bits(sign | bits_of_float(magnitude));
}

static inline uint16_t half_of_float(float x)
{
    const uint32_t bits = bits_of_float(x), rest = bits & 0x7fffffffu;
    const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000u);
    if (rest > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
    if (rest >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* 65520 and more: infinity */
    if (rest < 0x38800000u) { /* subnormal: adding 1/2 rounds to the half's last place */
        const uint32_t sum = bits_of_float(float_of_bits(rest) + 0.5f);
        return (uint16_t)(sign | (sum - 0x3f000000u));
    }
    return (uint16_t)(sign | (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1)) >> 13);
}

static inline float float_of_bfloat(uint16_t x) { return float_of_bits((uint32_t)x << 16); }

static inline uint16_t bfloat_of_float(float x)
{
    const uint32_t bits = bits_of_float(x);
    if (x != x) return (uint16_t)(bits >> 16 | 0x40u);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

#endif
