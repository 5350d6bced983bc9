/* Any machine, float64. */
#define REAL_BITS 64
#define QKV_ISA "scalar"
#define QKV_TABLE qkv_tile_kernels_f64_scalar
#include "../simd/scalar.h"

#include "../kernels/tile_tmpl.h"
