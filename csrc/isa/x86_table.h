/* A table of kernels for x86-64. It is compiled for the features that QKV_TARGET names, and nothing
 * else of the library is: gcc and clang do the same, and no file has compiler flags of its own.
 *
 * A file of isa/ that includes this defines before it what kernels/tile_tmpl.h lists; QKV_SIMD, the
 * header of simd/; and QKV_NEEDS, a macro of x86_features.h, if older compilers don't know the ISA. */
#include "x86_features.h"
#ifndef QKV_NEEDS
#define QKV_NEEDS 1
#endif

#if defined(__x86_64__) && QKV_NEEDS
#include <immintrin.h>
#include <string.h>

#define QKV_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define QKV_PUSH(isa)                                                                            \
    QKV_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#else
#define QKV_PUSH(isa) QKV_PRAGMA(GCC target(isa))
#pragma GCC push_options
#endif
QKV_PUSH(QKV_TARGET)

#include QKV_SIMD
#include "../kernels/tile_tmpl.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
typedef int qkv_no_table_here; /* a file must declare something */
#endif
