/* Between the caller's memory and rows of float or double: any stride, any alignment, the
 * element types in either byte order. The loop nest uses these where a tile kernel can't read
 * or write the caller's rows themselves, one block at a time. */
#ifndef QKV_CONVERT_H
#define QKV_CONVERT_H

#include <stddef.h>
#include <stdint.h>

/* Element types, as _problem.py numbers them; QKV_SWAPPED is added for foreign byte order. */
enum { QKV_FLOAT32, QKV_FLOAT64, QKV_FLOAT16, QKV_BFLOAT16, QKV_BOOL, QKV_INT8, QKV_SWAPPED = 8 };

/* row[0..n) = the n elements at src, `stride` bytes apart. A finite element stays finite. */
void qkv_read_row(void *row, int real_bytes, const char *src, ptrdiff_t n, ptrdiff_t stride,
                  int type);

/* row[0..n) = the 16-bit elements at src, as they are but in native byte order. */
void qkv_copy_row16(void *row, const char *src, ptrdiff_t n, ptrdiff_t stride, int type);

/* Infinities and NaN of row[0..n) become 0; float32, float64 or bfloat16. */
void qkv_zero_nonfinite(void *row, int type, ptrdiff_t n);

/* The n elements at dst = row[0..n), rounded to nearest even; never byte-swapped. */
void qkv_write_row(char *dst, const void *row, int real_bytes, ptrdiff_t n, ptrdiff_t stride,
                   int type);

#endif
