/* x86-64 with AVX-512 F, DQ, VL and BW, float64. */
#define REAL_BITS 64
#define QKV_ISA "avx512"
#define QKV_TABLE qkv_tile_kernels_f64_avx512
#define QKV_TARGET "avx512f,avx512dq,avx512vl,avx512bw,avx2,fma,f16c"
#define QKV_SIMD "../simd/avx512.h"
#include "x86_table.h"
