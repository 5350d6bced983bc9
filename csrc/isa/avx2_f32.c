/* x86-64 with AVX2 and FMA, float32. */
#define REAL_BITS 32
#define QKV_ISA "avx2"
#define QKV_TABLE qkv_tile_kernels_f32_avx2
#define QKV_TARGET "avx2,fma,f16c"
#define QKV_SIMD "../simd/avx2.h"
#include "x86_table.h"
