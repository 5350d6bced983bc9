#include "convert.h"

#include <float.h>
#include <math.h>
#include <string.h>

static uint16_t load16(const char *p, int swapped)
{
    uint16_t x;
    memcpy(&x, p, sizeof x);
    return swapped ? __builtin_bswap16(x) : x;
}

static uint32_t load32(const char *p, int swapped)
{
    uint32_t x;
    memcpy(&x, p, sizeof x);
    return swapped ? __builtin_bswap32(x) : x;
}

static uint64_t load64(const char *p, int swapped)
{
    uint64_t x;
    memcpy(&x, p, sizeof x);
    return swapped ? __builtin_bswap64(x) : x;
}

static float float_of_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static uint32_t bits_of_float(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static double double_of_bits(uint64_t bits)
{
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* The exponent and mantissa, shifted to float32's places, are the half's value times 2^-112;
 * one multiplication by 2^112 sets that right, subnormals included. */
static float float_of_half(uint16_t half)
{
    const uint32_t sign = (uint32_t)(half & 0x8000u) << 16, rest = half & 0x7fffu;
    if (rest >= 0x7c00u) return float_of_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    const float magnitude = float_of_bits(rest << 13) * 0x1p112f;
    return float_of_bits(sign | bits_of_float(magnitude));
}

static uint16_t half_of_float(float x)
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

static float float_of_bfloat(uint16_t x) { return float_of_bits((uint32_t)x << 16); }

static uint16_t bfloat_of_float(float x)
{
    const uint32_t bits = bits_of_float(x);
    if (x != x) return (uint16_t)(bits >> 16 | 0x40u);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

static double load_element(const char *p, int type)
{
    const int swapped = (type & QKV_SWAPPED) != 0;
    switch (type & ~QKV_SWAPPED) {
    case QKV_FLOAT32: return float_of_bits(load32(p, swapped));
    case QKV_FLOAT64: return double_of_bits(load64(p, swapped));
    case QKV_FLOAT16: return float_of_half(load16(p, swapped));
    default: return float_of_bfloat(load16(p, swapped));
    }
}

static float narrow(double x)
{
    if (isfinite(x) && fabs(x) > FLT_MAX) return x > 0 ? FLT_MAX : -FLT_MAX;
    return (float)x;
}

void qkv_read_row(void *row, int real_bytes, const char *src, ptrdiff_t n, ptrdiff_t stride,
                  int type)
{
    if (real_bytes == 8) {
        double *to = row;
        for (ptrdiff_t i = 0; i < n; i++) to[i] = load_element(src + i * stride, type);
        return;
    }
    float *to = row;
    switch (type) { /* the common types without a branch for each element */
    case QKV_FLOAT32:
        for (ptrdiff_t i = 0; i < n; i++) to[i] = float_of_bits(load32(src + i * stride, 0));
        return;
    case QKV_FLOAT16:
        for (ptrdiff_t i = 0; i < n; i++) to[i] = float_of_half(load16(src + i * stride, 0));
        return;
    case QKV_BFLOAT16:
        for (ptrdiff_t i = 0; i < n; i++) to[i] = float_of_bfloat(load16(src + i * stride, 0));
        return;
    default:
        for (ptrdiff_t i = 0; i < n; i++) to[i] = narrow(load_element(src + i * stride, type));
    }
}

void qkv_clear_odd(void *row, int real_bytes, ptrdiff_t n)
{
    for (ptrdiff_t i = 0; i < n; i++) {
        if (real_bytes == 4 && !isfinite(((float *)row)[i])) ((float *)row)[i] = 0;
        if (real_bytes == 8 && !isfinite(((double *)row)[i])) ((double *)row)[i] = 0;
    }
}

void qkv_write_row(char *dst, const void *row, int real_bytes, ptrdiff_t n, ptrdiff_t stride,
                   int type)
{
    for (ptrdiff_t i = 0; i < n; i++, dst += stride) {
        if (type == QKV_FLOAT64) {
            memcpy(dst, (const double *)row + i, 8);
            continue;
        }
        const float x = real_bytes == 8 ? (float)((const double *)row)[i] : ((const float *)row)[i];
        if (type == QKV_FLOAT32) {
            memcpy(dst, &x, 4);
        } else {
            const uint16_t bits = type == QKV_FLOAT16 ? half_of_float(x) : bfloat_of_float(x);
            memcpy(dst, &bits, 2);
        }
    }
}

/* Eight bytes, each made 0 or 1 by whether it was 0. */
static uint64_t truth(uint64_t x)
{
    const uint64_t low7 = UINT64_C(0x7f7f7f7f7f7f7f7f);
    return ((((x & low7) + low7) | x) & ~low7) >> 7;
}

void qkv_limit_mask(uint64_t *allow, ptrdiff_t nk, int lanes, const char *const *rows,
                    ptrdiff_t stride)
{
    for (ptrdiff_t k = 0; k < nk; k += 8) {
        const int n = nk - k < 8 ? (int)(nk - k) : 8;
        uint64_t bits[8] = {0};
        for (int group = 0; group < lanes; group += 8) {
            uint64_t eight = 0; /* byte j: the bits of eight lanes for key k + j */
            for (int i = 0; i < 8 && group + i < lanes; i++) {
                const char *p = rows[group + i] + k * stride;
                uint64_t x = 0;
                if (stride == 1 && n == 8)
                    memcpy(&x, p, 8);
                else
                    for (int j = 0; j < n; j++) ((char *)&x)[j] = p[j * stride];
                eight |= truth(x) << i;
            }
            for (int j = 0; j < n; j++)
                bits[j] |= (uint64_t)((unsigned char *)&eight)[j] << group;
        }
        for (int j = 0; j < n; j++) allow[k + j] &= bits[j];
    }
}
