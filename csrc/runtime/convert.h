/* Between the caller's memory and rows of float or double, for any stride, any alignment and
 * element types in either byte order. The engine uses these, a block at a time, if a kernel cannot
 * read or write the caller's rows itself. */
#ifndef QKV_CONVERT_H
#define QKV_CONVERT_H

#include <stddef.h>
#include <stdint.h>

/* Element types; src/qkv_fast numbers them alike. QKV_SWAPPED is added for foreign byte order. */
enum { QKV_FLOAT32, QKV_FLOAT64, QKV_FLOAT16, QKV_BFLOAT16, QKV_BOOL, QKV_INT8, QKV_SWAPPED = 8 };

/* row[0..n) = the n elements at src, `stride` bytes apart. A finite element stays finite: a double
 * beyond float's range becomes the largest float of its sign. */
void qkv_read_row(void *row, int real_bytes, const char *src, ptrdiff_t n, ptrdiff_t stride,
                  int type);

/* row[0..n) = the n 16-bit elements at src, `stride` bytes apart, in native byte order. */
void qkv_copy_row16(void *row, const char *src, ptrdiff_t n, ptrdiff_t stride, int type);

/* Replaces infinities and NaN in row[0..n) by 0. type: float32, float64 or bfloat16. */
void qkv_zero_nonfinite(void *row, int type, ptrdiff_t n);

/* The n elements at dst, `stride` bytes apart, = row[0..n), rounded to nearest even, in native byte
 * order. */
void qkv_write_row(char *dst, const void *row, int real_bytes, ptrdiff_t n, ptrdiff_t stride,
                   int type);

#endif
