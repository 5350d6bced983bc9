/* Which ISAs of x86-64 the compiler knows beyond those of gcc 9 and clang 14: 1 or 0. A table that it
 * cannot compile is left out of the library. */
#define QKV_HAVE_AVX512BF16 0
#define QKV_HAVE_AMX 0
#if defined(__x86_64__) && defined(__has_include)
#if __has_include(<avx512bf16intrin.h>)
#undef QKV_HAVE_AVX512BF16
#define QKV_HAVE_AVX512BF16 1
/* gcc has a header for each part of AMX, clang one for all. Only Linux lets a process use AMX here
 * (runs_amx of dispatch.c). */
#if defined(__linux__) && \
    (__has_include(<amxbf16intrin.h>) || (defined(__clang__) && __has_include(<amxintrin.h>)))
#undef QKV_HAVE_AMX
#define QKV_HAVE_AMX 1
#endif
#endif
#endif
