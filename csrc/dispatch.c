/* Which tile tables this build has, and which of them the machine can run: the CPU must have
 * every feature that a table's target names, and the operating system must save the registers. */
#include "tile_kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>

extern const qkv_tile_kernels qkv_tile_kernels_f32_avx2, qkv_tile_kernels_f64_avx2;
extern const qkv_tile_kernels qkv_tile_kernels_f32_avx512, qkv_tile_kernels_f64_avx512;

#define AVX_STATE 0x06u    /* XCR0: XMM, YMM */
#define AVX512_STATE 0xe6u /* and opmask, ZMM0-15, ZMM16-31 */

static int has(unsigned reg, unsigned bits) { return (reg & bits) == bits; }

static unsigned saved_by_os(void)
{
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !has(c, bit_OSXSAVE)) return 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

static int runs_avx2(void)
{
    unsigned a, b, c, d;
    if (!has(saved_by_os(), AVX_STATE)) return 0;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !has(c, bit_AVX | bit_FMA)) return 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && has(b, bit_AVX2);
}

static int runs_avx512(void)
{
    unsigned a, b, c, d;
    if (!runs_avx2() || !has(saved_by_os(), AVX512_STATE)) return 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) &&
           has(b, bit_AVX512F | bit_AVX512DQ | bit_AVX512VL | bit_AVX512BW);
}
#endif

extern const qkv_tile_kernels qkv_tile_kernels_f32_scalar, qkv_tile_kernels_f64_scalar;

static int runs_anywhere(void) { return 1; }

static const struct {
    const qkv_tile_kernels *f32, *f64;
    int (*runs)(void);
} tables[] = {
    {&qkv_tile_kernels_f32_scalar, &qkv_tile_kernels_f64_scalar, runs_anywhere},
#if defined(__x86_64__)
    {&qkv_tile_kernels_f32_avx2, &qkv_tile_kernels_f64_avx2, runs_avx2},
    {&qkv_tile_kernels_f32_avx512, &qkv_tile_kernels_f64_avx512, runs_avx512},
#endif
};

#define COUNT ((int)(sizeof tables / sizeof tables[0]))

const qkv_tile_kernels *qkv_tile_table(int index, int real_bytes)
{
    if (index < 0 || index >= COUNT) return NULL;
    return real_bytes == 4 ? tables[index].f32 : tables[index].f64;
}

int qkv_tile_table_runs(int index)
{
    return index >= 0 && index < COUNT && tables[index].runs();
}
