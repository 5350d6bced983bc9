/* AArch64 with NEON and FEAT_BF16: bfloat16 quads multiplied by bfmmla. gcc 9 doesn't know it. */
#if defined(__aarch64__) && !defined(__AARCH64EB__) && (defined(__clang__) || __GNUC__ >= 10)
#include <arm_neon.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("+bf16")
#endif

#define REAL_BITS 32
#define QKV_PAIRS
#define QKV_QUADS
#define QKV_ISA "neonbf16"
#define QKV_TABLE qkv_tile_kernels_bf16_neonbf16
#include "../simd/neonbf16.h"

#include "../kernels/tile_tmpl.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
typedef int qkv_no_table_here; /* a file must declare something */
#endif
