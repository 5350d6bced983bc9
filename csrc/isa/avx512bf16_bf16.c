/* x86-64 with AVX-512 F, DQ, VL, BW and BF16: bfloat16 pairs multiplied by vdpbf16ps. */
#define REAL_BITS 32
#define QKV_PAIRS
#define QKV_ISA "avx512bf16"
#define QKV_TABLE qkv_tile_kernels_bf16_avx512bf16
#define QKV_TARGET "avx512f,avx512dq,avx512vl,avx512bw,avx512bf16,avx2,fma,f16c"
#define QKV_SIMD "../simd/avx512bf16.h"
#define QKV_NEEDS QKV_HAVE_AVX512BF16
#include "x86_table.h"
