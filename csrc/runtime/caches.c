#include "caches.h"

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

#if defined(__x86_64__)
#include <cpuid.h>

#define TOPOLOGY_EXTENSIONS (1u << 22) /* leaf 0x80000001, ECX: leaf 0x8000001D is there */
#define HYBRID (1u << 15)              /* leaf 7, EDX: cores of different kinds */

/* Intel's leaf 4 and AMD's leaf 0x8000001D describe a cache in each subleaf, in the same format. */
static ptrdiff_t level2_in(unsigned leaf)
{
    unsigned a, b, c, d;
    for (unsigned i = 0; i < 8 && __get_cpuid_count(leaf, i, &a, &b, &c, &d); i++) {
        const unsigned type = a & 0x1f, level = a >> 5 & 7;
        if (!type) break;
        if (level == 2 && type != 2) /* 2: instructions alone */
            return (ptrdiff_t)((b >> 22) + 1) * ((b >> 12 & 0x3ff) + 1) * ((b & 0xfff) + 1) *
                   ((ptrdiff_t)c + 1);
    }
    return -1;
}

/* Returns 0 where the CPU's cores differ: each would answer for itself. Returns -1 where CPUID does
 * not tell. */
static ptrdiff_t level2_by_cpuid(void)
{
    unsigned a, b, c, d;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) && d & HYBRID) return 0;
    if (__get_cpuid(0, &a, &b, &c, &d) && b == signature_INTEL_ebx) return level2_in(4);
    if (__get_cpuid(0x80000001, &a, &b, &c, &d) && c & TOPOLOGY_EXTENSIONS)
        return level2_in(0x8000001D);
    return -1;
}
#else
static ptrdiff_t level2_by_cpuid(void) { return -1; }
#endif

ptrdiff_t qkv_l2_bytes(void)
{
    ptrdiff_t bytes = level2_by_cpuid();
#if defined(_SC_LEVEL2_CACHE_SIZE)
    if (bytes < 0) bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return bytes > 0 ? bytes : 0;
}
