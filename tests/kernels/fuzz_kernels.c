/* A coverage-guided fuzz of the kernels: bytes become a table, a kernel, sizes, strides, masks and
 * values; the kernel's result is compared with that of the portable table.
 *
 * tests/fuzz_kernels.sh compiles it with csrc/isa. With clang, libFuzzer chooses the bytes by the
 * branches that they reach. Without it, STANDALONE adds a main: `fuzz_kernels N` runs N inputs of
 * random bytes, and `fuzz_kernels FILE...` runs files of a corpus.
 *
 * Numbers come from a generator that the bytes seed, and single ones from `special`. Each array ends
 * where a page without access begins; with AddressSanitizer, nothing before it may be read either.
 * A difference aborts. Where numbers overflow, NaN and infinity depend on the order of a sum, so
 * none are large enough for that. */
#define main against_portable
#include "against_portable.c"
#undef main

#if defined(__SANITIZE_ADDRESS__)
#define POISONING 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define POISONING 1
#endif
#endif
#ifdef POISONING
#include <sanitizer/asan_interface.h>
#endif

static const uint8_t *at;
static size_t left;

static int byte(void) { return left ? (left--, *at++) : 0; }
static int within(int low, int high) { return low + byte() % (high - low + 1); }
static int chance(int percent) { return byte() * 100 < percent * 256; }

static int eps_is_double(void) { return tested->real_bytes == 8; }

static void forget(void)
{
    slots_used = 0;
#ifdef POISONING
    for (int i = 0; i < SLOTS && slots[i]; i++)
        __asan_unpoison_memory_region(slots[i], SLOT_BYTES);
#endif
}

/* What lies before an array's first byte may not be read: call it when all arrays are there. */
static void fence(const void *x, size_t bytes)
{
#ifdef POISONING
    char *begin = (char *)((uintptr_t)x & ~(uintptr_t)7); /* of the shadow's granule */
    for (int i = 0; i < slots_used; i++)
        if (slots[i] + SLOT_BYTES == (const char *)x + bytes)
            __asan_poison_memory_region(slots[i], (size_t)(begin - slots[i]));
#else
    (void)x, (void)bytes;
#endif
}

static double special(void)
{
    const double tiny = eps_is_double() ? 0x1p-1060 : 0x1p-140;
    const double numbers[] = {NAN, INFINITY, -INFINITY, 0.0, -0.0, tiny, -tiny, 1.0, -1.0, 88.0, 1e-6};
    return numbers[byte() % (int)(sizeof numbers / sizeof numbers[0])];
}

/* Set up to 3 of the numbers to special ones, in both copies. */
static int spoil(void *x, void *other, ptrdiff_t count)
{
    int finite = 1;
    for (int n = byte() % 4; n > 0 && count; n--) {
        const ptrdiff_t i = (byte() * 256 + byte()) % count;
        const double value = special();
        set(x, i, value);
        if (other) set(other, i, value);
        finite &= isfinite(value) != 0;
    }
    return finite;
}

/* `rows` rows of `length` elements of `bytes`, any distance apart, in either direction. */
typedef struct {
    char *first, *memory;
    ptrdiff_t stride;
    size_t bytes;
} matrix;

static matrix draw_matrix(int rows, int length, int bytes)
{
    matrix m;
    const ptrdiff_t row = (ptrdiff_t)length * bytes;
    const int kind = byte() % 6;
    m.stride = kind == 0 ? 0 : row + (kind == 1 ? within(0, 9) : kind == 2 ? within(0, 9) * bytes : 0);
    m.bytes = (size_t)(row + m.stride * (rows > 0 ? rows - 1 : 0));
    m.memory = m.first = take(m.bytes);
    if (kind > 3) m.first += m.stride * (rows > 0 ? rows - 1 : 0), m.stride = -m.stride;
    return m;
}

static int stored_bytes(int type)
{
    return type == QKV_FLOAT64 ? 8 : type == QKV_FLOAT32 ? 4 : type == QKV_INT8 ? 1 : 2;
}

static void store(char *to, double value, int type)
{
    const float single = (float)value;
    if (type == QKV_INT8) *to = (char)(int)(isfinite(value) ? value * 30 : 5);
    else if (type == QKV_FLOAT64) memcpy(to, &value, 8);
    else if (type == QKV_FLOAT32) memcpy(to, &single, 4);
    else portable->narrow(to, &single, 1, type);
}

/* Fill a matrix with numbers from -2 to 2 and some special ones; return whether all are finite. */
static int fill(matrix m, int rows, int length, int type)
{
    const int bytes = stored_bytes(type);
    int finite = 1;
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < length; i++)
            store(m.first + r * m.stride + i * bytes, uniform(-2, 2), type);
    for (int n = byte() % 3; n > 0 && rows && length; n--) {
        char *to = m.first + byte() % rows * m.stride;
        to += byte() % length * bytes;
        store(to, special(), type);
    }
    for (int r = 0; r < rows; r++) /* rows may overlap, so a later one decides */
        for (int i = 0; i < length; i++) {
            const char *from = m.first + r * m.stride + i * bytes;
            double value = 0;
            float single = 0;
            if (type == QKV_FLOAT64) memcpy(&value, from, 8);
            if (type == QKV_FLOAT32) memcpy(&single, from, 4);
            finite &= isfinite(value) && isfinite(single);
        }
    fence(m.memory, m.bytes);
    return finite;
}

static void fuzz_products(int ld, int rows, int red)
{
    const int real = tested->real_bytes, type = tested->input_type;
    const double size = 400.0 * (red + 1);
    matrix k = draw_matrix(rows, red, real), v = draw_matrix(red, rows, real);
    const int finite_k = fill(k, rows, red, type), finite_v = fill(v, red, rows, type);
    void *b = drawn(red * ld, -2, 2), *rescale = drawn(ld, 0, 1);
    spoil(b, NULL, red * ld);
    pair s = drawn_twice(rows * ld, 9, 9), acc = drawn_twice(rows * ld, 2, 2);
    qkv_prefetch_rows ahead[2] = {{k.first, k.stride, red, rows, 0}, {NULL, 64, 640, 9, 64}};
    const qkv_prefetch_rows *fetch = chance(30) ? ahead : NULL;
    BOTH(t->scores(s.of[i], b, k.first, k.stride, rows, red, nvec, NULL, fetch))
    compare("scores", s, s.count, 4, size);
    const void *scaled = chance(50) ? rescale : NULL;
    BOTH(t->accumulate(acc.of[i], b, v.first, v.stride, red, rows, nvec, scaled, NULL))
    compare("accumulate", acc, acc.count, 6, size);
    BOTH(int finite[2] = {t->all_finite(k.first, k.stride, rows, red),
                          t->all_finite(v.first, v.stride, red, rows)};
         if (!!finite[0] != finite_k || !!finite[1] != finite_v) {
             printf("%s: all_finite is wrong\n", t->isa), failures++;
         })

    /* Excluded keys: their P is -0.0, and no element of V adds anything there. */
    const uint64_t *allow = draw_allow(red, ld);
    for (int r = 0; r < red; r++)
        for (int j = 0; j < ld; j++)
            set(b, r * ld + j, allow[r] >> j & 1 ? uniform(0, 2) : -0.0);
    pair sum = drawn_twice(rows * ld, 0, 1);
    BOTH(t->accumulate_nonfinite(sum.of[i], b, v.first, v.stride, red, rows, nvec))
    compare("accumulate_nonfinite", sum, sum.count, 8, size);
    if (!finite_v) return;
    qkv_span span[64];
    BOTH(find_spans(allow, red, ld, t->lanes, span);
         t->accumulate(sum.of[i], b, v.first, v.stride, red, rows, nvec, rescale, span))
    compare("accumulate, spans", sum, sum.count, 8, size);
}

/* In a lane whose sum is NaN, its result is NaN whatever else it has: make that equal. */
static void forgive_nan(pair sum, pair top, pair rescale, pair p, int nk, int ld)
{
    for (int i = 0; i < ld; i++) {
        if (!isnan(get(sum.of[0], i)) || !isnan(get(sum.of[1], i))) continue;
        for (int j = 0; j < 2; j++) {
            set(top.of[j], i, 0);
            set(rescale.of[j], i, 0);
            for (int k = 0; k < nk; k++) set(p.of[j], k * ld + i, 0);
        }
    }
}

static void fuzz_softmax(int ld, int nk)
{
    pair top = drawn_twice(ld, -FLT_MAX, -FLT_MAX), sum = drawn_twice(ld, 0, 0);
    if (eps_is_double())
        for (int i = 0; i < 2 * ld; i++) set(top.of[i / ld], i % ld, -DBL_MAX);
    pair rescale = drawn_twice(ld, 0, 0);
    static const double scales[] = {1, 0.7, 0.01, 0};
    const double scale = scales[byte() % 4], ulps = 2000;
    const double least = eps_is_double() ? DBL_MIN / DBL_EPSILON : FLT_MIN / FLT_EPSILON;
    const int before = slots_used;
    for (int block = within(1, 3); block > 0; block--) {
        const int masked = chance(60);
        const double range = chance(20) ? 150 : within(1, 90);
        pair s = drawn_twice(nk * ld, -range, range);
        spoil(s.of[0], s.of[1], nk * ld);
        const uint64_t *allow = draw_allow(nk, ld);
        qkv_span span[64];
        BOTH(find_spans(allow, nk, ld, t->lanes, span);
             t->softmax(s.of[i], nk, nvec, masked ? allow : NULL, span, scale, top.of[i], sum.of[i],
                        rescale.of[i]))
        forgive_nan(sum, top, rescale, s, nk, ld);
        compare("softmax, row_max", top, ld, 1, 0);
        compare("softmax, rescale", rescale, ld, ulps, least);
        compare("softmax, row_sum", sum, ld, ulps, least);
        compare("softmax", s, s.count, ulps, least);
        compare_signs("softmax", s);
        slots_used = before;
    }
}

static void fuzz_statistics(int ld, int nk)
{
    const int masked = chance(60);
    pair s = drawn_twice(nk * ld, -9, 9), top = drawn_twice(ld, -3, 3);
    pair sums = drawn_twice(4 * ld, 0, 0);
    void *position = drawn(ld, -9, 40);
    const uint64_t *allow = draw_allow(nk, ld);
    qkv_span span[64];
    BOTH(find_spans(allow, nk, ld, t->lanes, span);
         t->statistics(s.of[i], nk, nvec, masked ? allow : NULL, span, position, top.of[i],
                       sums.of[i]))
    compare("statistics, row_max", top, ld, 0, 0);
    for (int j = 0; masked && j < ld; j++) {
        uint64_t any = 0;
        for (int k = 0; k < nk; k++) any |= allow[k] >> j & 1;
        if (!any) set(sums.of[0], 3 * ld + j, 0), set(sums.of[1], 3 * ld + j, 0);
    }
    compare("statistics", sums, sums.count, 40 + 4 * nk, 0);
}

static void fuzz_modifiers(int ld, int nk)
{
    const ptrdiff_t count = (ptrdiff_t)nk * ld, real = tested->real_bytes;
    pair s = drawn_twice(count, -30, 30);
    spoil(s.of[0], s.of[1], count);
    const int kind = byte() % 6;
    if (kind == 0) {
        BOTH(t->scale(s.of[i], nk, nvec, 0.3))
        compare("scale", s, count, 0, 0);
    } else if (kind == 1) {
        void *slope = drawn(ld, -1, 1), *position = drawn(ld, -99, 99);
        BOTH(t->alibi(s.of[i], nk, nvec, slope, position))
        compare("alibi", s, count, 4, 400);
    } else if (kind == 2) {
        const double cap = chance(50) ? 5 : 1e-3;
        BOTH(t->softcap(s.of[i], nk, nvec, cap))
        compare("softcap", s, count, 40, 0);
    } else if (kind == 3) {
        const int shared = chance(50), biases = shared ? 1 : ld;
        const char *rows[64];
        uint64_t allow[2][64];
        void *b = drawn(biases * nk, -30, 30);
        for (int j = 0; j < biases * nk; j++)
            if (uniform(0, 1) < 0.1) set(b, j, -INFINITY);
        spoil(b, NULL, biases * nk);
        rows_of(b, nk * real, biases, rows);
        fence(b, (size_t)(biases * nk * real));
        memset(allow, chance(50) ? 255 : 0x5a, sizeof allow);
        BOTH(t->bias(s.of[i], nk, nvec, rows, shared, allow[i]))
        for (int k = 0; k < nk; k++) { /* bits behind the lanes are any */
            const uint64_t lanes = ld < 64 ? (UINT64_C(1) << ld) - 1 : ~UINT64_C(0);
            if ((allow[0][k] ^ allow[1][k]) & lanes)
                printf("%s: bias: allow differs\n", tested->isa), failures++;
            for (int i = 0; i < ld; i++)
                if (!(allow[1][k] >> i & 1)) set(s.of[0], k * ld + i, 0), set(s.of[1], k * ld + i, 0);
        }
        compare("bias", s, count, 4, 80);
    } else if (kind == 4) {
        const int stride = within(1, 5);
        const char *rows[64];
        uint64_t allow[2][64];
        const size_t size = (size_t)(ld * nk * stride - (stride - 1));
        char *mask = take(size);
        for (size_t j = 0; j < size; j++) mask[j] = uniform(0, 1) < 0.5;
        rows_of(mask, nk * stride, ld, rows);
        fence(mask, size);
        memset(allow, 255, sizeof allow);
        BOTH(t->mask_bool(allow[i], nk, nvec, rows, stride))
        same_bytes("mask_bool", allow[0], allow[1], sizeof allow[0]);
    } else {
        float *scales = take((size_t)nk * 4);
        for (int k = 0; k < nk; k++) scales[k] = (float)uniform(0, 2);
        const int weights = chance(50);
        BOTH(t->scale_keys(s.of[i], nk, nvec, scales, weights))
        compare("scale_keys", s, count, 0, 0);
    }
}

static void fuzz_rows(int ld, int d)
{
    const ptrdiff_t real = tested->real_bytes;
    matrix m = draw_matrix(ld, d, (int)real);
    fill(m, ld, d, tested->input_type);
    const char *rows[64];
    for (int i = 0; i < ld; i++) rows[i] = m.first + (chance(90) ? i : 0) * m.stride;
    pair packed = drawn_twice((ptrdiff_t)ld * d, 0, 1);
    BOTH(t->pack_rows(packed.of[i], rows, d, nvec, 0.5))
    compare("pack_rows", packed, packed.count, 0, 0);
    const int count = within(1, ld);
    void *weight = drawn(ld, 0, 2);
    pair out = drawn_twice((ptrdiff_t)count * d, 0, 1);
    BOTH(const char *to[64]; rows_of(out.of[i], d * real, count, to);
         t->store_rows((char *const *)to, count, packed.of[i], d, nvec, weight))
    compare("store_rows", out, out.count, 0, 0);
}

static void fuzz_fold(int ld, int rows)
{
    const ptrdiff_t count = (ptrdiff_t)rows * ld;
    pair total = drawn_twice(count, 0, 0), error = drawn_twice(count, 0, 0);
    const int before = slots_used;
    for (int step = within(1, 6); step-- > 0;) {
        pair acc = drawn_twice(count, 2, 4);
        spoil(acc.of[0], acc.of[1], count);
        void *rescale = drawn(ld, chance(30) ? 0 : 1, 1);
        BOTH(t->fold(total.of[i], error.of[i], acc.of[i], rows, nvec, rescale, !step))
        if (!step) compare("fold", acc, count, 10, 9);
        slots_used = before;
    }
}

static void fuzz_decode(int rows, int nk, int length, int type)
{
    const int padded = (length + 15) / 16 * 16, ld = (rows + 15) / 16 * 16, bytes = stored_bytes(type);
    const double size = 40000.0 * (length + nk);
    matrix runs[6];
    const char *first[6 + QKV_KEY_RUNS_AHEAD];
    int used = 0;
    ptrdiff_t stride = (ptrdiff_t)length * bytes + (chance(30) ? within(0, 9) * bytes : 0);
    for (int k = 0; k < nk; k += QKV_KEY_RUN, used++) { /* runs lie anywhere */
        const int n = nk - k < QKV_KEY_RUN ? nk - k : QKV_KEY_RUN;
        matrix m = {NULL, NULL, stride, (size_t)(stride * (n - 1) + (ptrdiff_t)length * bytes)};
        m.first = m.memory = take(m.bytes);
        fill(m, n, length, type);
        runs[used] = m;
        first[used] = m.first;
    }
    for (int i = 0; i < QKV_KEY_RUNS_AHEAD; i++) first[used + i] = runs[byte() % used].first;
    void *q = drawn((ptrdiff_t)rows * padded, -2, 2);
    for (int r = 0; r < rows; r++)
        for (int d = length; d < padded; d++) set(q, r * padded + d, 0);
    pair s = drawn_twice((ptrdiff_t)nk * ld, 9, 9), acc = drawn_twice((ptrdiff_t)rows * padded, 2, 2);
    BOTH(t->decode_scores(s.of[i], ld, q, padded, first, stride, nk, length, rows, type))
    compare("decode_scores", s, s.count, 4, size);
    void *p = drawn((ptrdiff_t)nk * ld, 0, 1), *rescale = drawn(rows, 0, 1);
    const int masked = chance(50);
    for (int j = 0; masked && j < nk * ld; j++)
        if (uniform(0, 1) < 0.4) set(p, j, -0.0);
    const void *scaled = chance(50) ? rescale : NULL;
    BOTH(t->decode_accumulate(acc.of[i], padded, p, ld, first, stride, nk, length, rows, scaled,
                              masked, type))
    for (int r = 0; r < rows; r++)
        for (int d = length; d < padded; d++)
            for (int i = 0; i < 2; i++) set(acc.of[i], r * padded + d, 0);
    compare("decode_accumulate", acc, acc.count, 8, size);
}

static void fuzz_decode_softmax(int ld, int nk)
{
    const int lanes = 16, scaled = chance(50);
    float *scales = take((size_t)(nk + 2 * lanes) * 4);
    for (int k = 0; k < nk + 2 * lanes; k++) scales[k] = (float)uniform(0.5, 2);
    pair top = drawn_twice(lanes, -FLT_MAX, -FLT_MAX), sum = drawn_twice(lanes, 0, 0);
    pair rescale = drawn_twice(lanes, 0, 0);
    const int before = slots_used;
    for (int block = 0; block < 2; block++) {
        pair s = drawn_twice(nk * ld + lanes, -20, 20);
        spoil(s.of[0], s.of[1], nk * ld);
        BOTH(t->decode_softmax(s.of[i], nk, ld, scaled ? scales : NULL, scaled ? scales : NULL,
                               top.of[i], sum.of[i], rescale.of[i]))
        forgive_nan(sum, top, rescale, s, nk, ld);
        const double least = eps_is_double() ? DBL_MIN / DBL_EPSILON : FLT_MIN / FLT_EPSILON;
        compare("decode_softmax", s, nk * ld, 200, least);
        compare("decode_softmax, row_max", top, ld, 1, 0);
        compare("decode_softmax, row_sum", sum, ld, 200, least);
        compare("decode_softmax, rescale", rescale, ld, 200, least);
        slots_used = before;
    }
}

static void fuzz_conversions(int n)
{
    static const int types[] = {QKV_FLOAT16, QKV_BFLOAT16, QKV_INT8};
    const int type = types[byte() % 3], bytes = stored_bytes(type);
    char *x = take((size_t)(n * bytes));
    float *wide[2] = {take((size_t)(4 * n)), take((size_t)(4 * n))};
    for (int i = 0; i < n * bytes; i++) x[i] = (char)(left ? byte() : (int)uniform(0, 256));
    fence(x, (size_t)(n * bytes));
    tested->widen(wide[0], x, n, type);
    portable->widen(wide[1], x, n, type);
    compare("widen", (pair){{wide[0], wide[1]}, n}, n, 0, 0);
    if (type == QKV_INT8) return;
    char *narrow[2] = {take((size_t)(2 * n)), take((size_t)(2 * n))};
    for (int i = 0; i < n; i++) { /* any bits of a float */
        const uint32_t bits = (uint32_t)uniform(0, 0x1p32);
        memcpy(wide[0] + i, &bits, 4);
    }
    tested->narrow(narrow[0], wide[0], n, type);
    portable->narrow(narrow[1], wide[0], n, type);
    tested->widen(wide[0], narrow[0], n, type);
    tested->widen(wide[1], narrow[1], n, type);
    compare("narrow", (pair){{wide[0], wide[1]}, n}, n, 0, 0);
}

static void fuzz_merge(int parts, int n)
{
    static const int singles[] = {QKV_FLOAT32, QKV_FLOAT16, QKV_BFLOAT16};
    const int is_double = eps_is_double();
    const int type = is_double ? QKV_FLOAT64 : singles[byte() % 3];
    const int out_type = is_double ? QKV_FLOAT64 : singles[byte() % 3];
    const char *rows[2][8];
    for (int p = 0; p < parts; p++) {
        matrix m = {NULL, NULL, 0, (size_t)(n * stored_bytes(type))};
        m.first = m.memory = take(m.bytes);
        fill(m, 1, n, type);
        rows[0][p] = rows[1][p] = m.first;
    }
    void *weights = drawn(parts, 0, 1);
    const size_t size = (size_t)(n * stored_bytes(out_type));
    char *out[2] = {take(size), take(size)};
    const int target = parts && type == out_type && chance(50) ? byte() % parts : -1;
    for (int i = 0; i < 2 && target >= 0; i++) {
        memcpy(out[i], rows[i][target], size);
        rows[i][target] = out[i];
    }
    tested->merge_rows(out[0], out_type, rows[0], weights, parts, n, type);
    portable->merge_rows(out[1], out_type, rows[1], weights, parts, n, type);
    if (out_type != QKV_FLOAT32 && out_type != QKV_FLOAT64) {
        /* Sums that differ in the last place may round to neighbours: compare those as floats. */
        float *wide[2] = {take((size_t)(4 * n)), take((size_t)(4 * n))};
        for (int i = 0; i < 2; i++) portable->widen(wide[i], out[i], n, out_type);
        compare("merge_rows", (pair){{wide[0], wide[1]}, n}, n, 0x1p16 + 99, 0x1p-20);
    } else {
        compare("merge_rows", (pair){{out[0], out[1]}, n}, n, 99, 16);
    }
}

static void run(void)
{
    int isas = 0, runnable[8];
    for (int isa = 1; qkv_isa_name(isa); isa++)
        if (qkv_isa_runs(isa) && qkv_tile_table(isa, QKV_FLOAT32)) runnable[isas++] = isa;
    if (!isas) return;
    const int chosen = byte();
    const int input = chosen & 1 ? QKV_FLOAT64 : QKV_FLOAT32;
    tested = qkv_tile_table(runnable[chosen / 2 % isas], input);
    portable = qkv_tile_table(0, input);
    const int kernel = byte() % 11, n = within(1, 64), other = within(0, 70);
    seed = 1;
    for (int i = 0; i < 4; i++) seed = seed << 8 | (unsigned)byte();
    const int common = tested->lanes > portable->lanes ? tested->lanes : portable->lanes;
    const int ld = common * within(1, tested->tile_q / common);
    const int types = eps_is_double() ? 1 : 4;
    static const int stored[] = {QKV_FLOAT32, QKV_FLOAT16, QKV_BFLOAT16, QKV_INT8};
    switch (kernel) {
    case 0:
    case 1: fuzz_products(ld, n, other); break;
    case 2: fuzz_softmax(ld, n); break;
    case 3: fuzz_statistics(ld, n); break;
    case 4:
    case 5: fuzz_modifiers(ld, n); break;
    case 6: fuzz_rows(ld, n); break;
    case 7: fuzz_fold(ld, n); break;
    case 8: {
        const int type = eps_is_double() ? QKV_FLOAT64 : stored[byte() % types];
        fuzz_decode(within(1, 10), n, other + 1, type);
        break;
    }
    case 9: {
        int narrow_ld = 1 << within(0, 4);
        while (narrow_ld > tested->lanes || narrow_ld > portable->lanes) narrow_ld /= 2;
        fuzz_decode_softmax(narrow_ld, n);
        break;
    }
    default:
        if (chance(50) || eps_is_double()) fuzz_merge(other % 5, n);
        else fuzz_conversions(n + other);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    at = data;
    left = size;
    forget();
    run();
    forget();
    if (failures) {
        fflush(stdout);
        abort();
    }
    return 0;
}

#ifdef STANDALONE
int main(int argc, char **argv)
{
    static uint8_t data[4096];
    char *end = NULL;
    const long count = argc == 2 ? strtol(argv[1], &end, 10) : 0;
    if (end && !*end) {
        uint64_t state = 7;
        for (long n = 0; n < count; n++) {
            const int size = 64;
            for (int i = 0; i < size; i++) {
                state = state * 6364136223846793005u + 1442695040888963407u;
                data[i] = (uint8_t)(state >> 56);
            }
            LLVMFuzzerTestOneInput(data, (size_t)size);
        }
        printf("%ld inputs, %ld comparisons: no difference\n", count, comparisons);
        return 0;
    }
    for (int i = 1; i < argc; i++) {
        FILE *file = fopen(argv[i], "rb");
        if (!file) return perror(argv[i]), 1;
        const size_t size = fread(data, 1, sizeof data, file);
        fclose(file);
        LLVMFuzzerTestOneInput(data, size);
    }
    printf("%d files, %ld comparisons: no difference\n", argc - 1, comparisons);
    return 0;
}
#endif
