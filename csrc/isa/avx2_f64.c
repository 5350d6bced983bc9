/* x86-64 with AVX2 and FMA, float64. */
#define REAL_BITS 64
#define QKV_ISA "avx2"
#define QKV_TABLE qkv_tile_kernels_f64_avx2
#define QKV_TARGET "avx2,fma,f16c"
#define QKV_SIMD "../simd/avx2.h"
#include "x86_table.h"
