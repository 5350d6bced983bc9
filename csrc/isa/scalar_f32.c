/* Any machine, float32. */
#define REAL_BITS 32
#define QKV_ISA "scalar"
#define QKV_TABLE qkv_tile_kernels_f32_scalar
#include "../simd/scalar.h"

#include "../kernels/tile_tmpl.h"
