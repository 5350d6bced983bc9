/* AArch64 with NEON, float32. */
#if defined(__aarch64__) && !defined(__AARCH64EB__)
#define REAL_BITS 32
#define QKV_ISA "neon"
#define QKV_TABLE qkv_tile_kernels_f32_neon
#include "../simd/neon.h"

#include "../kernels/tile_tmpl.h"
#else
typedef int qkv_no_table_here; /* a file must declare something */
#endif
