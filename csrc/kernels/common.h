/* What the templates share: unrolling, prefetching, and loads of whole and cut vectors. */
#define LOG2E 1.4426950408889634074
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#define UNROLL_4 _Pragma("clang loop unroll_count(4)")
#else
#define UNROLL _Pragma("GCC unroll 32")
#define UNROLL_4 _Pragma("GCC unroll 4")
#endif

#define CACHE_LINE 64
#define PREFETCH_L1(p) __builtin_prefetch(p, 0, 3)
#define PREFETCH_L2(p) __builtin_prefetch(p, 0, 2)
/* Else a compiler may keep many sums of this pointer and constants in memory, to save additions. */
#define KEEP_IN_REGISTER(pointer) __asm__("" : "+r"(pointer))

/* Prefetches the next line of both lists of rows. Rows may lie where no memory is: their addresses
 * are computed as numbers. */
INLINE void prefetch_next(qkv_prefetch_rows prefetch[2])
{
    UNROLL for (int i = 0; i < 2; i++) {
        if (prefetch[i].count == 0) continue;
        const uintptr_t row = (uintptr_t)prefetch[i].row;
        PREFETCH_L2((const char *)(row + (uintptr_t)prefetch[i].at));
        prefetch[i].at += CACHE_LINE;
        if (prefetch[i].at < prefetch[i].bytes) continue;
        prefetch[i].at = 0;
        prefetch[i].row = (const char *)(row + (uintptr_t)prefetch[i].stride);
        prefetch[i].count--;
    }
}

INLINE real load_real(const char *p)
{
    real x;
    memcpy(&x, p, sizeof x);
    return x;
}

/* The first `bytes` bytes of a vector; the rest is zero. Reads nothing behind them. */
INLINE vec load_bytes(const char *p, ptrdiff_t bytes)
{
    real padded[LANES] = {0};
    memcpy(padded, p, (size_t)bytes);
    return v_load(padded);
}

#if REAL_BITS == 32
#define BYTES_OF(type) ((type) == QKV_FLOAT32 ? 4 : (type) == QKV_INT8 ? 1 : 2)
#else
#define BYTES_OF(type) ((void)(type), 8)
#endif

/* A vector of elements of a type that real can represent, widened to reals. */
INLINE vec load_lanes(const char *p, const int type)
{
#if REAL_BITS == 32
    if (type == QKV_FLOAT16) return v_load_half(p);
    if (type == QKV_BFLOAT16) return v_load_bfloat(p);
    if (type == QKV_INT8) return v_load_int8(p);
#endif
    (void)type;
    return v_load((const real *)p);
}

/* The same for the first n < LANES elements; the rest is zero. Reads nothing behind them. */
INLINE vec load_first_lanes(const char *p, ptrdiff_t n, const int type)
{
    char padded[sizeof(vec)] = {0};
    memcpy(padded, p, (size_t)(n * BYTES_OF(type)));
    return load_lanes(padded, type);
}

/* x[j] = the j-th real (or pair of bfloat16) at rows[i] + at, for each lane i; zeros from `bytes`
 * bytes behind `at` on. */
INLINE void load_columns(vec x[LANES], const char *const *rows, ptrdiff_t at, ptrdiff_t bytes)
{
    if (bytes >= (ptrdiff_t)sizeof(vec)) {
        v_load_columns(x, rows, at);
        return;
    }
    for (int i = 0; i < LANES; i++) x[i] = load_bytes(rows[i] + at, bytes);
    v_transpose(x);
}
