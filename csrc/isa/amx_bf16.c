/* x86-64 with AVX-512 F, DQ, VL, BW, BF16 and AMX: bfloat16 multiplied by the matrix unit. */
#define REAL_BITS 32
#define QKV_PAIRS
#define QKV_MATRIX_UNIT
#define QKV_ISA "amx"
#define QKV_TABLE qkv_tile_kernels_bf16_amx
#define QKV_TARGET "avx512f,avx512dq,avx512vl,avx512bw,avx512bf16,amx-tile,amx-bf16,avx2,fma,f16c"
#define QKV_SIMD "../simd/avx512bf16.h"
#define QKV_NEEDS QKV_HAVE_AMX
#include "x86_table.h"
