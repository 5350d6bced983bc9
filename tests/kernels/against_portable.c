/* Runs every kernel of each table of this machine beside that of the portable table, on the same
 * input, for every tail. tests/cross_aarch64.sh compiles it together with csrc/isa and runs it.
 *
 * Each array ends where a page without access begins, so that a read or write behind it ends the
 * process. Prints a line for each table and returns the number of those that differ. The tables'
 * lanes may differ: ld is the same for both, nvec is not. The portable table has no products of
 * bfloat16: sums in double, and its kernels of floats, stand in. */
#include "kernels/kernels.h"
#include "runtime/convert.h"
#include "runtime/elements.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#else
#include <sys/mman.h>
#endif

typedef const qkv_tile_kernels table;
typedef struct {
    void *of[2]; /* the tested table's copy and the portable one's */
    ptrdiff_t count;
} pair;

enum { SLOTS = 40, SLOT_BYTES = 1 << 18, PAGE = 1 << 16 };
static const int sizes[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 15, 16, 17, 23, 25, 33, 64};
enum { SIZES = sizeof sizes / sizeof sizes[0] };

static char *slots[SLOTS];
static int slots_used;
static uint64_t seed = 1;
static table *tested, *portable;
static long comparisons, failures;

/* SLOT_BYTES, and a page without access behind them. */
static char *make_slot(void)
{
#if defined(_WIN32)
    DWORD before;
    char *slot = VirtualAlloc(NULL, SLOT_BYTES + PAGE, MEM_COMMIT | MEM_RESERVE, PAGE_READWRITE);
    if (!slot || !VirtualProtect(slot + SLOT_BYTES, PAGE, PAGE_NOACCESS, &before)) abort();
#else
    char *slot = mmap(NULL, SLOT_BYTES + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                      -1, 0);
    if (slot == MAP_FAILED || mprotect(slot + SLOT_BYTES, PAGE, PROT_NONE)) abort();
#endif
    return slot;
}

static void *take(size_t bytes)
{
    if (slots_used == SLOTS || bytes > SLOT_BYTES) abort();
    char **slot = &slots[slots_used++];
    if (!*slot) *slot = make_slot();
    return *slot + SLOT_BYTES - bytes;
}

static double uniform(double low, double high)
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return low + (high - low) * (double)(seed >> 11) * 0x1p-53;
}

static double get(const void *x, ptrdiff_t i)
{
    return tested->real_bytes == 8 ? ((const double *)x)[i] : (double)((const float *)x)[i];
}
static void set(void *x, ptrdiff_t i, double value)
{
    if (tested->real_bytes == 8)
        ((double *)x)[i] = value;
    else
        ((float *)x)[i] = (float)value;
}

static void *reals(ptrdiff_t count) { return take((size_t)(count * tested->real_bytes)); }
static void *drawn(ptrdiff_t count, double low, double high)
{
    void *x = reals(count);
    for (ptrdiff_t i = 0; i < count; i++) set(x, i, uniform(low, high));
    return x;
}
static pair twice(const void *x, ptrdiff_t count)
{
    pair p = {{reals(count), reals(count)}, count};
    for (int i = 0; i < 2; i++) memcpy(p.of[i], x, (size_t)(count * tested->real_bytes));
    return p;
}
static pair drawn_twice(ptrdiff_t count, double low, double high)
{
    return twice(drawn(count, low, high), count);
}

/* The first `count` reals differ by at most `ulps` epsilons, relative to `size` or to themselves.
 * With size 0, zeros have the same sign. */
static void compare(const char *kernel, pair p, ptrdiff_t count, double ulps, double size)
{
    const double eps = tested->real_bytes == 8 ? DBL_EPSILON : FLT_EPSILON;
    for (ptrdiff_t i = 0; i < count; i++) {
        const double a = get(p.of[0], i), b = get(p.of[1], i);
        comparisons++;
        const double unit = eps * (fabs(b) > size ? fabs(b) : size);
        const int other_zero = size == 0 && a == 0 && b == 0 && signbit(a) != signbit(b);
        if ((a == b && !other_zero) || (isnan(a) && isnan(b))) continue;
        if (fabs(a - b) <= ulps * unit && !other_zero) continue;
        if (failures++ < 20)
            printf("%s: %s[%td] is %.17g, portable %.17g\n", tested->isa, kernel, i, a, b);
    }
}
static void same_bytes(const char *kernel, const void *a, const void *b, size_t bytes)
{
    comparisons++;
    if (memcmp(a, b, bytes) && failures++ < 20) printf("%s: %s differs\n", tested->isa, kernel);
}

static void compare_signs(const char *kernel, pair p)
{
    for (ptrdiff_t i = 0; i < p.count; i++) {
        const double a = get(p.of[0], i), b = get(p.of[1], i);
        if (!isnan(a) && !signbit(a) != !signbit(b) && failures++ < 20)
            printf("%s: %s[%td] has another sign\n", tested->isa, kernel, i);
    }
}

static void rows_of(const void *x, ptrdiff_t stride, int count, const char **rows)
{
    for (int i = 0; i < count; i++) rows[i] = (const char *)x + i * stride;
}

/* Calls a kernel of both tables: `t` is the table, `nvec` its vectors, `i` the copy. */
#define BOTH(...)                                                                                \
    for (int i = 0; i < 2; i++) {                                                                \
        table *t = i ? portable : tested;                                                        \
        const int nvec = ld / t->lanes;                                                          \
        (void)nvec;                                                                              \
        __VA_ARGS__;                                                                             \
    }

/* Bits of the lanes that may attend to each key, and the span of each of a table's vectors. */
static uint64_t *draw_allow(int nk, int ld)
{
    uint64_t *allow = take((size_t)nk * 8);
    for (int k = 0; k < nk; k++) {
        allow[k] = 0;
        for (int i = 0; i < ld; i++) allow[k] |= (uint64_t)(uniform(0, 1) < 0.6) << i;
    }
    return allow;
}
static void find_spans(const uint64_t *allow, int nk, int ld, int lanes, qkv_span *span)
{
    for (int v = 0; v < ld / lanes; v++) {
        const uint64_t bits = ((lanes < 64 ? UINT64_C(1) << lanes : 0) - 1) << v * lanes;
        span[v] = (qkv_span){0, 0};
        for (int k = nk; k-- > 0;) {
            if (!(allow[k] & bits)) continue;
            span[v].begin = k;
            if (!span[v].end) span[v].end = k + 1;
        }
    }
}

static void check_rows(int ld, int d)
{
    const ptrdiff_t bytes = d * tested->real_bytes;
    const char *rows[64];
    rows_of(drawn(ld * d, -2, 2), bytes, ld, rows);
    pair packed = drawn_twice(ld * d, 0, 1);
    BOTH(t->pack_rows(packed.of[i], rows, d, nvec, 0.5))
    compare("pack_rows", packed, ld * d, 0, 0);

    void *weight = drawn(ld, 0, 2);
    for (int count = 1; count <= ld; count += ld / 2 + 1) {
        pair out = drawn_twice(count * d, 0, 1);
        BOTH(const char *to[64]; rows_of(out.of[i], bytes, count, to);
             t->store_rows((char *const *)to, count, packed.of[i], d, nvec, weight))
        compare("store_rows", out, count * d, 0, 0);
        slots_used -= 3;
    }
}

static void check_products(int ld, int rows, int red)
{
    const int bytes = tested->real_bytes;
    void *k = drawn(rows * red, -2, 2), *v = drawn(red * rows, -2, 2);
    void *b = drawn(red * ld, -2, 2), *rescale = drawn(ld, 0, 1);
    pair s = drawn_twice(rows * ld, 9, 9), acc = drawn_twice(rows * ld, 2, 2);
    const double size = 4.0 * red + 2;
    BOTH(t->scores(s.of[i], b, k, red * bytes, rows, red, nvec, NULL, NULL))
    compare("scores", s, s.count, 4, size);
    qkv_prefetch_rows ahead[2] = {{k, 8, 8, 100, 0}, {NULL, 64, 640, 9, 64}};
    BOTH(t->scores(s.of[i], b, k, red * bytes, rows, red, nvec, NULL, ahead))
    compare("scores, prefetching", s, s.count, 4, size);
    BOTH(t->accumulate(acc.of[i], b, v, rows * bytes, red, rows, nvec, NULL, NULL))
    compare("accumulate", acc, acc.count, 4, size);
    BOTH(t->accumulate(acc.of[i], b, v, rows * bytes, red, rows, nvec, rescale, NULL))
    compare("accumulate, rescaled", acc, acc.count, 6, 2 * size);
    if (!red) return;

    const uint64_t *allow = draw_allow(red, ld);
    for (int r = 0; r < red; r++)
        for (int j = 0; j < ld; j++)
            if (!(allow[r] >> j & 1)) set(b, r * ld + j, -0.0);
    qkv_span span[32];
    BOTH(find_spans(allow, red, ld, t->lanes, span);
         t->accumulate(acc.of[i], b, v, rows * bytes, red, rows, nvec, rescale, span))
    compare("accumulate, spans", acc, acc.count, 8, 3 * size);
    set(v, red * rows - 1, -INFINITY);
    set(v, 0, NAN);
    BOTH(t->accumulate_nonfinite(acc.of[i], b, v, rows * bytes, red, rows, nvec))
    compare("accumulate_nonfinite", acc, acc.count, 8, 3 * size);
    BOTH(int finite[2] = {t->all_finite(v, rows * bytes, red, rows),
                          t->all_finite(k, red * bytes, rows, red)};
         if (finite[0] || !finite[1]) printf("%s: all_finite is wrong\n", t->isa), failures++)
}

static void check_softmax(int ld, int nk, int masked)
{
    pair top = drawn_twice(ld, -FLT_MAX, -FLT_MAX), sum = drawn_twice(ld, 0, 0);
    pair rescale = drawn_twice(ld, 0, 0);
    const double ulps = 1000, least = tested->real_bytes == 8 ? DBL_MIN / DBL_EPSILON
                                                              : FLT_MIN / FLT_EPSILON;
    for (int block = 0; block < 3; block++) {
        const double range = block != 1 ? 90 : tested->real_bytes == 8 ? 1000 : 150;
        pair s = drawn_twice(nk * ld, -range, range); /* block 1 has weights of 0 */
        const uint64_t *allow = draw_allow(nk, ld);
        if (block == 2 && !masked) set(s.of[0], nk * ld / 2, NAN), set(s.of[1], nk * ld / 2, NAN);
        qkv_span span[32];
        BOTH(find_spans(allow, nk, ld, t->lanes, span);
             t->softmax(s.of[i], nk, nvec, masked ? allow : NULL, span, 0.7, top.of[i], sum.of[i],
                        rescale.of[i]))
        compare("softmax, row_max", top, ld, 0, 0);
        compare("softmax, rescale", rescale, ld, ulps, least);
        /* An ISA without fused multiply-adds rounds 0.7 * S first: half an ulp of up to 700. A
         * weight that is about the least normal number may be 0. */
        compare("softmax, row_sum", sum, ld, ulps, least);
        compare("softmax", s, s.count, ulps, least);
        compare_signs("softmax", s);
        slots_used -= 4;
    }
}

static void check_statistics(int ld, int nk, int masked)
{
    pair s = drawn_twice(nk * ld, -9, 9), top = drawn_twice(ld, -3, 3);
    pair sums = drawn_twice(4 * ld, 0, 0);
    void *position = drawn(ld, -9, 40);
    const uint64_t *allow = draw_allow(nk, ld);
    qkv_span span[32];
    BOTH(find_spans(allow, nk, ld, t->lanes, span);
         t->statistics(s.of[i], nk, nvec, masked ? allow : NULL, span, position, top.of[i],
                       sums.of[i]))
    compare("statistics, row_max", top, ld, 0, 0);
    for (int j = 0; masked && j < ld; j++) { /* sums[3] is any number where no key is allowed */
        uint64_t any = 0;
        for (int k = 0; k < nk; k++) any |= allow[k] >> j & 1;
        if (!any) set(sums.of[0], 3 * ld + j, 0), set(sums.of[1], 3 * ld + j, 0);
    }
    compare("statistics", sums, sums.count, 40 + 2 * nk, 0);
}

static void check_modifiers(int ld, int nk)
{
    const ptrdiff_t count = nk * ld, bytes = nk * tested->real_bytes;
    void *slope = drawn(ld, 0, 1), *position = drawn(ld, -9, 40);
    pair s = drawn_twice(count, -30, 30);
    BOTH(t->scale(s.of[i], nk, nvec, 0.3))
    compare("scale", s, count, 0, 0);
    BOTH(t->alibi(s.of[i], nk, nvec, slope, position))
    compare("alibi", s, count, 4, 100);
    s = drawn_twice(count, -30, 30);
    for (int i = 0; i < 2; i++) set(s.of[i], count - 1, NAN), set(s.of[i], 0, INFINITY);
    BOTH(t->softcap(s.of[i], nk, nvec, 5))
    compare("softcap", s, count, 40, 0);

    for (int shared = 0; shared < 2; shared++) {
        const char *rows[64];
        const int biases = shared ? 1 : ld;
        void *b = drawn(biases * nk, -30, 30);
        for (int j = 0; j < biases * nk; j++) {
            const double u = uniform(0, 1);
            const double lowest = tested->real_bytes == 8 ? -DBL_MAX : -FLT_MAX;
            if (u < 0.1) set(b, j, u < 0.06 ? -INFINITY : lowest);
        }
        rows_of(b, bytes, biases, rows);
        pair scores = drawn_twice(count, -30, 30);
        uint64_t allow[2][64];
        memset(allow, 255, sizeof allow);
        BOTH(t->bias(scores.of[i], nk, nvec, rows, shared, allow[i]))
        same_bytes("bias, allow", allow[0], allow[1], sizeof allow[0]);
        for (int j = 0; j < count; j++) /* an excluded score is any number */
            if (!(allow[1][j / ld] >> j % ld & 1))
                for (int i = 0; i < 2; i++) set(scores.of[i], j, 0);
        compare("bias", scores, count, 4, 80);
        slots_used -= 4;
    }

    float *scales = take((size_t)nk * 4);
    for (int k = 0; k < nk; k++) scales[k] = (float)uniform(0, 2);
    pair p = drawn_twice(count, 0, 1);
    for (int j = 0; j < count; j += 3)
        for (int i = 0; i < 2; i++) set(p.of[i], j, -0.0);
    for (int weights = 0; weights < 2; weights++) {
        BOTH(t->scale_keys(p.of[i], nk, nvec, scales, weights))
        compare("scale_keys", p, count, 0, 0);
    }

    for (int stride = 1; stride < 4; stride += 2) {
        const char *rows[64];
        const size_t size = (size_t)(ld * nk * stride);
        char *mask = take(size);
        for (size_t j = 0; j < size; j++) mask[j] = uniform(0, 1) < 0.5;
        rows_of(mask, nk * stride, ld, rows);
        uint64_t allow[2][64];
        memset(allow, 255, sizeof allow);
        BOTH(t->mask_bool(allow[i], nk, nvec, rows, stride))
        same_bytes("mask_bool", allow[0], allow[1], sizeof allow[0]);
    }

    pair total = drawn_twice(count, 0, 0), error = drawn_twice(count, 0, 0);
    for (int step = 0; step < 9; step++) {
        pair acc = drawn_twice(count, 2, 4);
        void *rescale = drawn(ld, step % 4 == 3 ? 0.5 : 1, 1);
        BOTH(t->fold(total.of[i], error.of[i], acc.of[i], nk, nvec, rescale, step == 8))
        if (step == 8) compare("fold", acc, count, 10, 0);
        slots_used -= 4;
    }
}

/* nk rows of `length` elements of a type, in runs of 16. */
static const char *stored_rows(int nk, int length, int type, ptrdiff_t *stride)
{
    const int bytes = type == QKV_FLOAT64 ? 8 : type == QKV_FLOAT32 ? 4 : type == QKV_INT8 ? 1 : 2;
    const ptrdiff_t count = (ptrdiff_t)nk * length;
    char *x = take((size_t)(count * bytes));
    *stride = length * bytes;
    for (ptrdiff_t i = 0; i < count; i++) {
        const double value = uniform(-2, 2);
        const float single = (float)value;
        if (type == QKV_INT8) x[i] = (char)(int)(value * 60);
        else if (type == QKV_FLOAT64) memcpy(x + 8 * i, &value, 8);
        else if (type == QKV_FLOAT32) memcpy(x + 4 * i, &single, 4);
        else portable->narrow(x + 2 * i, &single, 1, type);
    }
    return x;
}

static void check_decode(int rows, int nk, int length, int type)
{
    const int padded = (length + 15) / 16 * 16, ld = (rows + 15) / 16 * 16;
    const double size = 4.0 * 60 * length;
    ptrdiff_t stride;
    const char *stored = stored_rows(nk, length, type, &stride), *runs[16];
    for (int i = 0; i < 16; i++) runs[i] = stored + i * QKV_KEY_RUN * stride;
    void *q = drawn(rows * padded, -2, 2);
    for (int r = 0; r < rows; r++)
        for (int d = length; d < padded; d++) set(q, r * padded + d, 0);
    pair s = drawn_twice(nk * ld, 9, 9), acc = drawn_twice(rows * padded, 2, 2);
    BOTH(t->decode_scores(s.of[i], ld, q, padded, runs, stride, nk, length, rows, type))
    compare("decode_scores", s, s.count, 4, size);
    void *p = drawn(nk * ld, 0, 1), *rescale = drawn(rows, 0, 1);
    for (int masked = 0; masked < 2; masked++) {
        BOTH(t->decode_accumulate(acc.of[i], padded, p, ld, runs, stride, nk, length, rows,
                                  masked ? rescale : NULL, masked, type))
        for (int r = 0; r < rows; r++) /* what is behind a row stays as it is, or not */
            for (int d = length; d < padded; d++)
                for (int i = 0; i < 2; i++) set(acc.of[i], r * padded + d, 0);
        compare("decode_accumulate", acc, acc.count, 8, 4.0 * 60 * nk);
        for (int j = 0; j < nk * ld; j += 2) set(p, j, -0.0);
    }
}

static void check_decode_softmax(int ld, int nk, int scaled)
{
    const int lanes = 16; /* whole vectors of both tables, and room for scales */
    float *scales = take((size_t)(nk + 2 * lanes) * 4);
    for (int k = 0; k < nk + 2 * lanes; k++) scales[k] = (float)uniform(0.5, 2);
    pair top = drawn_twice(lanes, -FLT_MAX, -FLT_MAX), sum = drawn_twice(lanes, 0, 0);
    pair rescale = drawn_twice(lanes, 0, 0);
    for (int block = 0; block < 2; block++) {
        pair s = drawn_twice(nk * ld + lanes, -20, 20);
        BOTH(t->decode_softmax(s.of[i], nk, ld, scaled ? scales : NULL, scaled ? scales : NULL,
                               top.of[i], sum.of[i], rescale.of[i]))
        compare("decode_softmax", s, nk * ld, 40, 0);
        compare("decode_softmax, row_max", top, ld, 0, 0);
        compare("decode_softmax, row_sum", sum, ld, 80, 0);
        compare("decode_softmax, rescale", rescale, ld, 20, 0);
        slots_used -= 3;
    }
}

static void check_conversions(int n)
{
    static const int types[] = {QKV_FLOAT16, QKV_BFLOAT16, QKV_INT8};
    for (int j = 0; j < 3; j++) {
        for (long first = 0; first < 65536; first += n < 64 ? 16381 : n) {
            const int count = first + n < 65536 ? n : (int)(65536 - first);
            char *x = take((size_t)(2 * count)), *narrow[2] = {take((size_t)(2 * count)),
                                                              take((size_t)(2 * count))};
            float *wide[2] = {take((size_t)(4 * count)), take((size_t)(4 * count))};
            for (int i = 0; i < count; i++) {
                const uint16_t bits = (uint16_t)(first + i);
                memcpy(x + 2 * i, &bits, 2);
            }
            const char *from = types[j] == QKV_INT8 ? x + count : x;
            tested->widen(wide[0], from, count, types[j]);
            portable->widen(wide[1], from, count, types[j]);
            compare("widen", (pair){{wide[0], wide[1]}, count}, count, 0, 0);
            for (int i = 0; i < count && types[j] != QKV_INT8; i++) {
                const uint32_t bits = ((uint32_t)(first + i) << 16) + (uint32_t)uniform(0, 65536);
                memcpy(wide[0] + i, &bits, 4);
            }
            if (types[j] != QKV_INT8) {
                tested->narrow(narrow[0], wide[0], count, types[j]);
                portable->narrow(narrow[1], wide[0], count, types[j]);
                tested->widen(wide[0], narrow[0], count, types[j]);
                tested->widen(wide[1], narrow[1], count, types[j]);
                compare("narrow", (pair){{wide[0], wide[1]}, count}, count, 0, 0);
            }
            slots_used = 0;
        }
    }
}

/* `count` parts of n elements of a type, merged into a row of out_type. */
static void check_merge(int count, int n, int type, int out_type)
{
    const int eps_bits = out_type == QKV_BFLOAT16 ? 16 : out_type == QKV_FLOAT16 ? 13 : 0;
    const char *parts[6], *sources[6];
    void *weights = drawn(count, 0, 1);
    ptrdiff_t stride = 0, out_stride = 0;
    for (int i = 0; i < count; i++) parts[i] = stored_rows(1, n, type, &stride);
    for (int is_part = 0; is_part <= (count > 0 && type == out_type); is_part++) {
        pair sum;
        char *out[2];
        for (int i = 0; i < 2; i++) {
            out[i] = (char *)stored_rows(1, n, out_type, &out_stride);
            memcpy(sources, parts, sizeof sources);
            if (is_part) memcpy(out[i], parts[count - 1], (size_t)stride);
            if (is_part) sources[count - 1] = out[i];
            (i ? portable : tested)->merge_rows(out[i], out_type, sources, weights, count, n, type);
            sum.of[i] = out[i];
        }
        if (count == 0) same_bytes("merge_rows of no part", out[0], out[1], (size_t)out_stride);
        sum.count = n;
        for (int i = 0; i < 2 && eps_bits; i++) {
            sum.of[i] = reals(n);
            portable->widen(sum.of[i], out[i], n, out_type);
        }
        compare("merge_rows", sum, n, (double)(1 << eps_bits) + 3, eps_bits ? 1 : 12);
    }
}

static ptrdiff_t up(ptrdiff_t n, ptrdiff_t step) { return (n + step - 1) / step * step; }

/* [rows][length] bfloat16, drawn, in rows of `padded` elements, whose other elements are zeros. */
static uint16_t *drawn_bfloats(ptrdiff_t rows, ptrdiff_t length, ptrdiff_t all_rows,
                               ptrdiff_t padded)
{
    uint16_t *x = take((size_t)(all_rows * padded * 2));
    memset(x, 0, (size_t)(all_rows * padded * 2));
    for (ptrdiff_t r = 0; r < rows; r++)
        for (ptrdiff_t d = 0; d < length; d++)
            x[r * padded + d] = bfloat_of_float((float)uniform(-2, 2));
    return x;
}

static void check_paired_scores(int ld, int nk, int length)
{
    table *t = tested;
    const ptrdiff_t depth = up(length, t->depth_step), rows = up(nk, t->row_step);
    const uint16_t *q = drawn_bfloats(ld, length, ld, length);
    const uint16_t *k = drawn_bfloats(nk, length, rows, depth);
    const char *q_rows[64];
    void *Qt = take((size_t)(depth * ld * 2));
    qkv_prefetch_rows ahead[2] = {{(const char *)k, 8, 8, 100, 0}, {NULL, 64, 640, 9, 64}};
    rows_of(q, 2 * length, ld, q_rows);
    for (int negated = 0; negated < 2; negated++) {
        pair s = drawn_twice(rows * ld, 9, 9);
        t->pack_rows(Qt, q_rows, length, ld / t->lanes, negated ? -1 : 1);
        t->scores(s.of[0], Qt, (const char *)k, 2 * depth, nk, length, ld / t->lanes, NULL,
                  negated ? ahead : NULL);
        for (int r = 0; r < nk; r++)
            for (int i = 0; i < ld; i++) {
                double sum = 0;
                for (int d = 0; d < length; d++)
                    sum += (double)float_of_bfloat(k[r * depth + d]) *
                           (double)float_of_bfloat(q[i * length + d]);
                set(s.of[1], r * ld + i, negated ? -sum : sum);
            }
        compare("scores", s, (ptrdiff_t)nk * ld, 4, 4.0 * length);
    }
}

/* The weights of a softmax, found as their products with a unit matrix, and other products. */
static void check_paired_values(int ld, int nk, int length, int masked)
{
    table *t = tested;
    const int nvec = ld / t->lanes;
    const ptrdiff_t depth = up(nk, t->depth_step), vt_row = 2 * up(nk, 32);
    const ptrdiff_t s_rows = depth / 2 > nk ? depth / 2 : nk;
    pair s = drawn_twice(s_rows * ld, -20, 20), top = drawn_twice(ld, -9, -9);
    pair sum = drawn_twice(ld, 1, 1), rescale = drawn_twice(ld, 0, 0);
    const uint64_t *allow = draw_allow(nk, ld);
    qkv_span span[32];
    BOTH(find_spans(allow, nk, ld, t->lanes, span);
         t->softmax(s.of[i], nk, nvec, masked ? allow : NULL, span, 0.7, top.of[i], sum.of[i],
                    rescale.of[i]))
    compare("softmax, row_max", top, ld, 0, 0);
    compare("softmax, rescale", rescale, ld, 1000, 0);
    compare("softmax, row_sum", sum, ld, 1000, 0); /* exp2 is rough: 3e-6 */

    uint16_t *unit = drawn_bfloats(0, 0, nk, nk);
    for (int k = 0; k < nk; k++) unit[k * nk + k] = bfloat_of_float(1);
    char *Vt = take((size_t)(up(nk > length ? nk : length, 32) * vt_row));
    const ptrdiff_t p_rows = up(nk, t->row_step), acc_rows = up(length, t->row_step);
    pair p = drawn_twice(p_rows * ld, 2, 2);
    t->pack_values(Vt, vt_row, (const char *)unit, 2 * nk, nk, nk);
    t->accumulate(p.of[0], s.of[0], Vt, vt_row, nk, nk, nvec, NULL, NULL);
    for (int j = 0; j < nk * ld; j++) set(p.of[1], j, get(s.of[1], j));
    compare("softmax", p, (ptrdiff_t)nk * ld, 0x1p15 + 100, FLT_MIN); /* half an ulp of bfloat16 */

    uint16_t *v = drawn_bfloats(nk, length, nk, length);
    pair acc = drawn_twice(acc_rows * ld, 2, 2);
    t->pack_values(Vt, vt_row, (const char *)v, 2 * length, nk, length);
    for (int rescaled = 0; rescaled < 2; rescaled++) {
        t->accumulate(acc.of[0], s.of[0], Vt, vt_row, nk, length, nvec,
                      rescaled ? rescale.of[0] : NULL, NULL);
        for (int d = 0; d < length; d++)
            for (int i = 0; i < ld; i++) {
                double x = rescaled ? get(acc.of[1], d * ld + i) * get(rescale.of[0], i) : 0;
                for (int k = 0; k < nk; k++)
                    x += get(p.of[0], k * ld + i) * (double)float_of_bfloat(v[k * length + d]);
                set(acc.of[1], d * ld + i, x);
            }
        compare("accumulate", acc, (ptrdiff_t)length * ld, 8, 2.0 * nk + 2);
    }

    int finite = t->all_finite((const char *)v, 2 * length, nk, length);
    v[nk * length - 1] = 0xff80; /* -inf */
    v[0] = 0x7fc0;               /* NaN */
    if (!finite || t->all_finite((const char *)v, 2 * length, nk, length))
        printf("%s: all_finite is wrong\n", t->isa), failures++;
    float *wide = take((size_t)(nk * length * 4));
    for (int j = 0; j < nk * length; j++) wide[j] = float_of_bfloat(v[j]);
    pair bad = drawn_twice(length * ld, 2, 2);
    t->accumulate_nonfinite(bad.of[0], s.of[0], (const char *)v, 2 * length, nk, length, nvec);
    portable->accumulate_nonfinite(bad.of[1], s.of[1], (const char *)wide, 4 * length, nk, length,
                                   ld / portable->lanes);
    compare("accumulate_nonfinite", bad, (ptrdiff_t)length * ld, 0, 0);
}

static void check_paired_table(void)
{
    if (tested->enter) tested->enter();
    for (int ld = tested->lanes; ld <= tested->tile_q; ld += tested->lanes)
        for (int i = 0; i < SIZES; i++)
            for (int j = 0; j < SIZES; j++) {
                slots_used = 0, check_paired_scores(ld, sizes[i], sizes[j]);
                for (int masked = 0; masked < 2; masked++)
                    slots_used = 0, check_paired_values(ld, sizes[i], sizes[j], masked);
            }
    if (!isfinite(tested->fma_chain(10))) failures++;
    if (tested->leave) tested->leave();
}

static void check_table(void)
{
    const int is_double = tested->real_bytes == 8;
    static const int types[] = {QKV_FLOAT32, QKV_FLOAT16, QKV_BFLOAT16, QKV_INT8, QKV_FLOAT64};
    static const int reductions[] = {0, 1, 2, 7, 33}, decoded[] = {1, 3, 16, 21, 64};
    const int common = tested->lanes > portable->lanes ? tested->lanes : portable->lanes;
#define CHECK(call) slots_used = 0, call
    for (int ld = common; ld <= tested->tile_q; ld += common)
        for (int i = 0; i < SIZES; i++) {
            CHECK(check_rows(ld, sizes[i]));
            for (int j = 0; j < 5; j++) CHECK(check_products(ld, sizes[i], reductions[j]));
            for (int masked = 0; masked < 2; masked++) {
                CHECK(check_softmax(ld, sizes[i], masked));
                CHECK(check_statistics(ld, sizes[i], masked));
            }
            CHECK(check_modifiers(ld, sizes[i]));
        }
    for (int i = 0; i < 5; i++) {
        for (int scaled = 0; scaled < 2; scaled++)
            for (int ld = 1; ld <= tested->lanes && ld <= portable->lanes; ld *= 2)
                CHECK(check_decode_softmax(ld, decoded[i], scaled));
        for (int rows = 1; rows < 10; rows++)
            for (int j = 0; j < SIZES; j++)
                for (int type = is_double ? 4 : 0; type < (is_double ? 5 : 4); type++)
                    CHECK(check_decode(rows, decoded[i], sizes[j], types[type]));
    }
    for (int count = 0; count < 6; count++)
        for (int i = 0; i < SIZES; i++)
            for (int type = 0; type < (is_double ? 1 : 3); type++)
                for (int out = 0; out < (is_double ? 1 : 3); out++)
                    CHECK(check_merge(count, sizes[i], is_double ? QKV_FLOAT64 : types[type],
                                      is_double ? QKV_FLOAT64 : types[out]));
    slots_used = 0;
    for (int i = 0; !is_double && i < SIZES; i++) check_conversions(sizes[i]);
    if (!is_double) check_conversions(8192); /* all 16-bit patterns */
    if (!isfinite(tested->fma_chain(10))) failures++;
}

int main(void)
{
    static const struct {
        const char *name;
        int type;
    } inputs[] = {{"f32", QKV_FLOAT32}, {"f64", QKV_FLOAT64}, {"bf16", QKV_BFLOAT16}};
    int bad_tables = 0;
    for (int j = 0; j < 3; j++)
        for (int isa = 1; qkv_isa_name(isa); isa++) {
            const int paired = inputs[j].type == QKV_BFLOAT16;
            portable = qkv_tile_table(0, paired ? QKV_FLOAT32 : inputs[j].type);
            tested = qkv_tile_table(isa, inputs[j].type);
            if (!tested || strcmp(tested->isa, qkv_isa_name(isa)) || !qkv_isa_runs(isa)) continue;
            comparisons = failures = 0;
            if (paired) check_paired_table();
            else check_table();
            printf("%s-%s: %ld comparisons, %ld differ\n", tested->isa, inputs[j].name, comparisons,
                   failures);
            bad_tables += failures > 0;
        }
    return bad_tables;
}
