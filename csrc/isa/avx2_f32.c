/* x86-64 with AVX2 and FMA, float32. */
#if defined(__x86_64__)
#define REAL_BITS 32
#define QKV_ISA "avx2"
#define QKV_TABLE qkv_tile_kernels_f32_avx2
#define QKV_TARGET "avx2,fma,f16c"
#include <immintrin.h>
#include <string.h>

#include "../simd/target_push.h"
#include "../simd/avx2.h"
#include "../kernels/tile_tmpl.h"
#include "../simd/target_pop.h"
#else
typedef int qkv_no_avx2_f32_here;
#endif
