/* x86-64 with AVX-512 F, DQ, VL and BW, float64. */
#if defined(__x86_64__)
#define REAL_BITS 64
#define QKV_ISA "avx512"
#define QKV_TABLE qkv_tile_kernels_f64_avx512
#define QKV_TARGET "avx512f,avx512dq,avx512vl,avx512bw,avx2,fma,f16c"
#include <immintrin.h>
#include <string.h>

#include "../simd/target_push.h"
#include "../simd/avx512.h"
#include "../kernels/tile_tmpl.h"
#include "../simd/target_pop.h"
#else
typedef int qkv_no_avx512_f64_here;
#endif
