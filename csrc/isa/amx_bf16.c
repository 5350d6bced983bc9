/* x86-64 with AVX-512 F, DQ, VL, BW, BF16 and AMX: bfloat16 multiplied by the matrix unit. */
#if defined(__x86_64__)
#define REAL_BITS 32
#define QKV_PAIRS
#define QKV_MATRIX_UNIT
#define QKV_ISA "amx"
#define QKV_TABLE qkv_tile_kernels_bf16_amx
#define QKV_TARGET "avx512f,avx512dq,avx512vl,avx512bw,avx512bf16,amx-tile,amx-bf16,avx2,fma,f16c"
#include <immintrin.h>
#include <string.h>

#include "../simd/target_push.h"
#include "../simd/avx512bf16.h"
#include "../kernels/tile_tmpl.h"
#include "../simd/target_pop.h"
#else
typedef int qkv_no_amx_bf16_here;
#endif
