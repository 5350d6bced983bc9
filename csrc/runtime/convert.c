/* convert.h, an element at a time: these rows are what no kernel reads, so plain C is enough. */
#include "convert.h"

#include "elements.h"

#include <float.h>
#include <math.h>
#include <string.h>

#define DEFINE_LOAD(bits)                                                                        \
    static uint##bits##_t load##bits(const char *p, int swapped)                                 \
    {                                                                                            \
        uint##bits##_t x;                                                                        \
        memcpy(&x, p, sizeof x);                                                                 \
        return swapped ? __builtin_bswap##bits(x) : x;                                           \
    }
DEFINE_LOAD(16)
DEFINE_LOAD(32)
DEFINE_LOAD(64)

static double double_of_bits(uint64_t bits)
{
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static double load_element(const char *p, int type)
{
    const int swapped = (type & QKV_SWAPPED) != 0;
    switch (type & ~QKV_SWAPPED) {
    case QKV_FLOAT32: return float_of_bits(load32(p, swapped));
    case QKV_FLOAT64: return double_of_bits(load64(p, swapped));
    case QKV_FLOAT16: return float_of_half(load16(p, swapped));
    case QKV_INT8: return (signed char)*p;
    default: return float_of_bfloat(load16(p, swapped));
    }
}

static float finite_float(double x)
{
    if (isfinite(x) && fabs(x) > FLT_MAX) return x > 0 ? FLT_MAX : -FLT_MAX;
    return (float)x;
}

void qkv_read_row(void *row, int real_bytes, const char *src, ptrdiff_t n, ptrdiff_t stride,
                  int type)
{
    if (stride == real_bytes && type == (real_bytes == 4 ? QKV_FLOAT32 : QKV_FLOAT64)) {
        memcpy(row, src, (size_t)(n * stride));
        return;
    }
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
        for (ptrdiff_t i = 0; i < n; i++)
            to[i] = finite_float(load_element(src + i * stride, type));
    }
}

void qkv_copy_row16(void *row, const char *src, ptrdiff_t n, ptrdiff_t stride, int type)
{
    uint16_t *to = row;
    const int swapped = (type & QKV_SWAPPED) != 0;
    if (stride == 2 && !swapped)
        memcpy(to, src, (size_t)n * 2);
    else
        for (ptrdiff_t i = 0; i < n; i++) to[i] = load16(src + i * stride, swapped);
}

void qkv_zero_nonfinite(void *row, int type, ptrdiff_t n)
{
    for (ptrdiff_t i = 0; i < n; i++) {
        if (type == QKV_BFLOAT16 && (((uint16_t *)row)[i] & 0x7f80u) == 0x7f80u)
            ((uint16_t *)row)[i] = 0;
        if (type == QKV_FLOAT32 && !isfinite(((float *)row)[i])) ((float *)row)[i] = 0;
        if (type == QKV_FLOAT64 && !isfinite(((double *)row)[i])) ((double *)row)[i] = 0;
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
