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
static ptrdiff_t level2_of_machine(void)
{
    unsigned a, b, c, d;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) && d & HYBRID) return 0;
    if (__get_cpuid(0, &a, &b, &c, &d) && b == signature_INTEL_ebx) return level2_in(4);
    if (__get_cpuid(0x80000001, &a, &b, &c, &d) && c & TOPOLOGY_EXTENSIONS)
        return level2_in(0x8000001D);
    return -1;
}
#elif defined(__APPLE__)
#include <sys/sysctl.h>

static long long value_of(const char *name)
{
    long long value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, NULL, 0) == 0 && size <= sizeof value ? value : 0;
}

/* A performance core's share of the cache that its cluster has in common: threads run on those
 * cores first. */
static ptrdiff_t level2_of_machine(void)
{
    const long long bytes = value_of("hw.perflevel0.l2cachesize");
    const long long cores = value_of("hw.perflevel0.cpusperl2");
    return bytes > 0 ? (ptrdiff_t)(bytes / (cores > 0 ? cores : 1)) : -1;
}
#elif defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>

#include <stdlib.h>

/* Returns 0 where the level 2 caches differ in size: cores of different kinds have them. */
static ptrdiff_t level2_in(const char *records, DWORD bytes)
{
    ptrdiff_t found = -1;
    for (DWORD at = 0; at < bytes;) {
        const SYSTEM_LOGICAL_PROCESSOR_INFORMATION_EX *record = (const void *)(records + at);
        const CACHE_RELATIONSHIP *cache = &record->Cache;
        at += record->Size;
        if (cache->Level != 2 || cache->Type == CacheInstruction) continue;
        if (found > 0 && found != (ptrdiff_t)cache->CacheSize) return 0;
        found = (ptrdiff_t)cache->CacheSize;
    }
    return found;
}

static ptrdiff_t level2_of_machine(void)
{
    DWORD bytes = 0;
    GetLogicalProcessorInformationEx(RelationCache, NULL, &bytes); /* how many it needs */
    char *records = bytes ? malloc(bytes) : NULL;
    ptrdiff_t found = -1;
    if (records && GetLogicalProcessorInformationEx(RelationCache, (void *)records, &bytes))
        found = level2_in(records, bytes);
    free(records);
    return found;
}
#elif defined(__linux__)
#include <stdio.h>

/* The first line of a file of a CPU's cache, "" where there is none. */
static const char *read_cache_file(char line[32], long cpu, int index, const char *name)
{
    char path[96];
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%ld/cache/index%d/%s", cpu, index,
             name);
    FILE *file = fopen(path, "re");
    line[0] = 0;
    if (file) {
        if (!fgets(line, 32, file)) line[0] = 0;
        fclose(file);
    }
    return line;
}

static ptrdiff_t level2_of_cpu(long cpu)
{
    for (int i = 0; i < 8; i++) {
        char line[32];
        int kib = 0;
        if (read_cache_file(line, cpu, i, "level")[0] != '2') continue;
        if (read_cache_file(line, cpu, i, "type")[0] == 'I') continue; /* Instruction */
        if (sscanf(read_cache_file(line, cpu, i, "size"), "%dK", &kib) == 1 && kib > 0)
            return (ptrdiff_t)kib * 1024;
    }
    return -1;
}

/* Cores of different kinds are numbered kind by kind: the first and the last CPU tell. */
static ptrdiff_t level2_of_machine(void)
{
    const ptrdiff_t first = level2_of_cpu(0);
    const ptrdiff_t last = level2_of_cpu(sysconf(_SC_NPROCESSORS_CONF) - 1);
    return first > 0 && last > 0 && first != last ? 0 : first;
}
#else
static ptrdiff_t level2_of_machine(void) { return -1; }
#endif

ptrdiff_t qkv_l2_bytes(void)
{
    ptrdiff_t bytes = level2_of_machine();
#if defined(_SC_LEVEL2_CACHE_SIZE)
    if (bytes < 0) bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return bytes > 0 ? bytes : 0;
}
