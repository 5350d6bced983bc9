/* Which tile tables this build has, and which of them the machine can run: the CPU must have
 * every feature that a table's target names, and the operating system must save the registers. */
#include "../runtime/convert.h"
#include "../kernels/kernels.h"

static int always(void) { return 1; }

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

extern const qkv_tile_kernels qkv_tile_kernels_f32_avx2, qkv_tile_kernels_f64_avx2;
extern const qkv_tile_kernels qkv_tile_kernels_f32_avx512, qkv_tile_kernels_f64_avx512;
extern const qkv_tile_kernels qkv_tile_kernels_bf16_avx512bf16, qkv_tile_kernels_bf16_amx;

#define AVX_STATE 0x06u      /* XCR0: XMM, YMM */
#define AVX512_STATE 0xe6u   /* and opmask, ZMM0-15, ZMM16-31 */
#define AMX_STATE 0x60000u   /* tile configuration, tile data */
#define AMX_BF16_BIT 0x400000u  /* leaf 7, EDX */
#define AMX_TILE_BIT 0x1000000u /* leaf 7, EDX */
#define AVX512_BF16_BIT 0x20u   /* leaf 7.1, EAX */

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
    if (!__get_cpuid(1, &a, &b, &c, &d) || !has(c, bit_AVX | bit_FMA | bit_F16C)) return 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && has(b, bit_AVX2);
}

static int runs_avx512(void)
{
    unsigned a, b, c, d;
    if (!runs_avx2() || !has(saved_by_os(), AVX512_STATE)) return 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) &&
           has(b, bit_AVX512F | bit_AVX512DQ | bit_AVX512VL | bit_AVX512BW);
}

static int runs_avx512bf16(void)
{
    unsigned a, b, c, d;
    return runs_avx512() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && has(a, AVX512_BF16_BIT);
}

/* Intel's vdpbf16ps does half the operations of its float32 multiply-adds in a cycle (Granite Rapids:
 * 107 to 215 GFLOP/s, python -m qkv_fast bench), AMD's twice as many (Zen 4, docs/architecture.md). */
static int is_profitable_avx512bf16(void)
{
    unsigned a, b, c, d;
    return __get_cpuid(0, &a, &b, &c, &d) && b != signature_INTEL_ebx;
}

/* The kernel makes room for the tile registers once a process has asked. */
static int runs_amx(void)
{
#if defined(__linux__) && defined(SYS_arch_prctl)
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    unsigned a, b, c, d;
    return runs_avx512bf16() && has(saved_by_os(), AMX_STATE) &&
           __get_cpuid_count(7, 0, &a, &b, &c, &d) && has(d, AMX_BF16_BIT | AMX_TILE_BIT) &&
           syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return 0;
#endif
}
#endif

extern const qkv_tile_kernels qkv_tile_kernels_f32_scalar, qkv_tile_kernels_f64_scalar;

static const struct {
    const char *name;
    const qkv_tile_kernels *f32, *f64, *bf16;
    int (*runs)(void);
    int (*is_profitable)(void);
} tables[] = {
    {"scalar", &qkv_tile_kernels_f32_scalar, &qkv_tile_kernels_f64_scalar, NULL, always, always},
#if defined(__x86_64__)
    {"avx2", &qkv_tile_kernels_f32_avx2, &qkv_tile_kernels_f64_avx2, NULL, runs_avx2, always},
    {"avx512", &qkv_tile_kernels_f32_avx512, &qkv_tile_kernels_f64_avx512, NULL, runs_avx512,
     always},
    {"avx512bf16", &qkv_tile_kernels_f32_avx512, &qkv_tile_kernels_f64_avx512,
     &qkv_tile_kernels_bf16_avx512bf16, runs_avx512bf16, is_profitable_avx512bf16},
    {"amx", &qkv_tile_kernels_f32_avx512, &qkv_tile_kernels_f64_avx512, &qkv_tile_kernels_bf16_amx,
     runs_amx, always},
#endif
};

#define COUNT ((int)(sizeof tables / sizeof tables[0]))

const char *qkv_isa_name(int index)
{
    return index >= 0 && index < COUNT ? tables[index].name : NULL;
}

const qkv_tile_kernels *qkv_tile_table(int index, int input_type)
{
    if (index < 0 || index >= COUNT) return NULL;
    switch (input_type) {
    case QKV_FLOAT32: return tables[index].f32;
    case QKV_FLOAT64: return tables[index].f64;
    case QKV_BFLOAT16: return tables[index].bf16;
    default: return NULL;
    }
}

int qkv_isa_runs(int index) { return index >= 0 && index < COUNT && tables[index].runs(); }

int qkv_isa_is_profitable(int index) { return qkv_isa_runs(index) && tables[index].is_profitable(); }
