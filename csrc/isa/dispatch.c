/* The list of ISAs: the tables of each, and whether this machine can run them. To add an ISA,
 * write its tables (isa/NAME_f32.c and so on) and a line in FOR_EACH_ISA, which names the test
 * whether the machine can run it.
 *
 * The CPU must have every feature that a table's QKV_TARGET names, and the operating system must
 * save the registers. */
#define QKV_STRUCT(name, ...)                                                                    \
    typedef struct {__VA_ARGS__} name;                                                           \
    static const char fields_of_##name[] = #__VA_ARGS__
#include "../kernels/kernels.h"
#include "../runtime/convert.h"
#include "x86_features.h"

static int always(void) { return 1; }

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define AVX_STATE 0x06u         /* XCR0: XMM, YMM */
#define AVX512_STATE 0xe6u      /* and opmask, ZMM0-15, ZMM16-31 */
#define AMX_STATE 0x60000u      /* AMX tile configuration, tile data */
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

#if QKV_HAVE_AVX512BF16
static int runs_avx512bf16(void)
{
    unsigned a, b, c, d;
    return runs_avx512() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && has(a, AVX512_BF16_BIT);
}

/* On Intel's CPUs vdpbf16ps does half the operations of float32 multiply-adds in a cycle: 107
 * GFLOP/s where those do 215, on a Granite Rapids Xeon (python -m qkv_fast bench). On AMD's it
 * does twice as many. */
static int is_profitable_avx512bf16(void)
{
    unsigned a, b, c, d;
    return __get_cpuid(0, &a, &b, &c, &d) && b != signature_INTEL_ebx;
}
#endif

#if QKV_HAVE_AMX
/* Linux makes room for AMX's tile registers only if the process asks. */
static int runs_amx(void)
{
#if defined(SYS_arch_prctl)
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

#if QKV_HAVE_AVX512BF16
#define AVX512BF16(ISA)                                                                          \
    ISA(avx512bf16, avx512, avx512bf16, runs_avx512bf16, is_profitable_avx512bf16)
#else
#define AVX512BF16(ISA)
#endif
#if QKV_HAVE_AMX
#define AMX(ISA) ISA(amx, avx512, amx, runs_amx, always)
#else
#define AMX(ISA)
#endif

#define FOR_EACH_ISA_HERE(ISA)                                                                   \
    ISA(avx2, avx2, none, runs_avx2, always)                                                     \
    ISA(avx512, avx512, none, runs_avx512, always)                                               \
    AVX512BF16(ISA) AMX(ISA)
#elif defined(__aarch64__) && !defined(__AARCH64EB__) /* each such CPU has NEON */
#if defined(__clang__) || __GNUC__ >= 10 /* as in neonbf16_bf16.c */
#if defined(__linux__)
#include <sys/auxv.h>

#ifndef AT_HWCAP2
#define AT_HWCAP2 26
#endif
#define BF16_BIT (1ul << 14) /* HWCAP2_BF16, which old headers lack */

static int runs_neonbf16(void) { return (getauxval(AT_HWCAP2) & BF16_BIT) != 0; }
#elif defined(__APPLE__)
#include <sys/sysctl.h>

static int runs_neonbf16(void)
{
    int has_bf16 = 0;
    size_t size = sizeof has_bf16;
    return sysctlbyname("hw.optional.arm.FEAT_BF16", &has_bf16, &size, NULL, 0) == 0 && has_bf16;
}
#else
static int runs_neonbf16(void) { return 0; }
#endif

/* bfmmla does 4 times the operations of float32's fmla on Arm's Cortex-X2 and A710, the cores of
 * Neoverse V2 and N2: https://github.com/iree-org/iree/pull/14495. Nobody has measured Apple's. */
static int is_profitable_neonbf16(void)
{
#if defined(__APPLE__)
    return 0;
#else
    return 1;
#endif
}

#define FOR_EACH_ISA_HERE(ISA)                                                                   \
    ISA(neon, neon, none, always, always)                                                        \
    ISA(neonbf16, neon, neonbf16, runs_neonbf16, is_profitable_neonbf16)
#else
#define FOR_EACH_ISA_HERE(ISA) ISA(neon, neon, none, always, always)
#endif
#else
#define FOR_EACH_ISA_HERE(ISA)
#endif

/* Weakest first: ISA(name, whose float and double tables it uses, whose bfloat16 table or none,
 * whether the machine runs it, whether it is then faster than the ISAs before it). */
#define FOR_EACH_ISA(ISA)                                                                        \
    ISA(scalar, scalar, none, always, always)                                                    \
    FOR_EACH_ISA_HERE(ISA)

static const qkv_tile_kernels qkv_tile_kernels_bf16_none = {.isa = NULL};

#define DECLARE_TABLES(name, reals, pairs, runs, is_profitable)                                  \
    extern const qkv_tile_kernels qkv_tile_kernels_f32_##reals, qkv_tile_kernels_f64_##reals;    \
    extern const qkv_tile_kernels qkv_tile_kernels_bf16_##pairs;
FOR_EACH_ISA(DECLARE_TABLES)

static const struct {
    const char *name;
    const qkv_tile_kernels *f32, *f64, *bf16;
    int (*runs)(void);
    int (*is_profitable)(void);
} isas[] = {
#define ENTRY(name, reals, pairs, runs, is_profitable)                                           \
    {#name, &qkv_tile_kernels_f32_##reals, &qkv_tile_kernels_f64_##reals,                        \
     &qkv_tile_kernels_bf16_##pairs, runs, is_profitable},
    FOR_EACH_ISA(ENTRY)
};

#define COUNT ((int)(sizeof isas / sizeof isas[0]))

const char *qkv_isa_name(int index)
{
    return index >= 0 && index < COUNT ? isas[index].name : NULL;
}

const qkv_tile_kernels *qkv_tile_table(int index, int input_type)
{
    const qkv_tile_kernels *table = &qkv_tile_kernels_bf16_none;
    if (index < 0 || index >= COUNT) return NULL;
    if (input_type == QKV_FLOAT32) table = isas[index].f32;
    if (input_type == QKV_FLOAT64) table = isas[index].f64;
    if (input_type == QKV_BFLOAT16) table = isas[index].bf16;
    return table->isa ? table : NULL;
}

int qkv_isa_runs(int index) { return index >= 0 && index < COUNT && isas[index].runs(); }

int qkv_isa_is_profitable(int index) { return qkv_isa_runs(index) && isas[index].is_profitable(); }

size_t qkv_kernels_size(void) { return sizeof(qkv_tile_kernels); }

const char *qkv_kernels_fields(void) { return fields_of_qkv_tile_kernels; }
