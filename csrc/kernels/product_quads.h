/* The products of tiles by an instruction that multiplies 2 x 4 by 4 x 2 bfloat16.
 *
 *     C[r][:] = C[r][:] * rescale[:] + sum_t A[r][t] * B[t][:]      rescale NULL: C is overwritten
 *
 * For scores, A is K, B is Qt and C is S; to accumulate, A is Vt, B is P and C is acc. C is
 * [rows][ld] floats, aligned. A is [rows][red], of quads of 8 bytes at any alignment. B is
 * [red][2][ld], aligned: two vectors for each vector v of C, the quads of its first and of its last
 * lanes. A register tile is `rows` rows, a multiple of 2, of up to STRIP vectors of C; a last row
 * is computed twice and stored once. The sum begins at 0, as in product_lanes.h. */
#define ROW_STEP 1
#define DEPTH_STEP 4
#define ENTER NULL
#define LEAVE NULL

/* rows and nv are constants where this is inlined, so that c and b are registers. c holds 2 rows of
 * 2 lanes in each vector. `prefetch` is prefetched at about the pace at which A is read. */
INLINE void register_tile(const int rows, const int nv, real *C, const real *B, ptrdiff_t ld,
                          const char *A, const ptrdiff_t a_row, ptrdiff_t red,
                          const real *rescale, qkv_prefetch_rows *prefetch)
{
    const int quad = 8, steps_per_line = rows * quad <= CACHE_LINE / 2 ? 2 : 1;
    const ptrdiff_t second = rows > 1 ? a_row : 0;
    vec c[24];
    UNROLL for (int i = 0; i < (rows + rows % 2) * nv; i++) c[i] = v_set1(0);
    for (ptrdiff_t t = 0; t < red; t++) {
        vec b[2 * STRIP];
        UNROLL for (int i = 0; i < 2 * nv; i++) b[i] = v_load(B + i % 2 * ld + i / 2 * LANES);
        UNROLL for (int r = 0; r < rows; r += 2) {
            const vec a = v_load_quads(A + r * a_row, A + r * a_row + second);
            UNROLL for (int i = 0; i < 2 * nv; i++)
                c[r * nv + i] = v_dot_quads(a, b[i], c[r * nv + i]);
        }
        A += quad;
        B += 2 * ld;
        if (prefetch && t % steps_per_line == 0) prefetch_next(prefetch);
    }
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int v = 0; v < nv; v++) {
            const vec *x = c + (r & ~1) * nv + 2 * v;
            vec sum = r % 2 ? v_high_halves(x[0], x[1]) : v_low_halves(x[0], x[1]);
            if (rescale)
                sum = v_fma(v_load(C + r * ld + v * LANES), v_load(rescale + v * LANES), sum);
            v_store(C + r * ld + v * LANES, sum);
        }
    }
}

/* nv vectors of C, `most` rows at a time: as many as there are registers for. */
INLINE void strip_product(const int nv, const int most, real *C, const real *B, ptrdiff_t ld,
                          const char *A, const ptrdiff_t a_row, ptrdiff_t rows, ptrdiff_t red,
                          const real *rescale, qkv_prefetch_rows *prefetch)
{
#define TILE(n)                                                                                  \
    do {                                                                                         \
        register_tile(n, nv, C, B, ld, A, a_row, red, rescale, prefetch);                        \
        C += (n) * ld, A += (n) * a_row, rows -= (n);                                            \
    } while (0)
    while (rows >= most) TILE(most);
    if (most > 4 && rows >= 4) TILE(4);
    if (rows >= 2) TILE(2);
    if (rows >= 1) TILE(1);
#undef TILE
}

/* a_red and red count pairs: 4 bytes, and two to a quad. */
INLINE void product(real *C, const real *B, const char *A, const ptrdiff_t a_row,
                    const ptrdiff_t a_red, ptrdiff_t rows, ptrdiff_t red, int nvec,
                    const real *rescale, const qkv_span *span, const int is_scores,
                    qkv_prefetch_rows *prefetch)
{
    const ptrdiff_t ld = (ptrdiff_t)nvec * LANES, quads = red / 2;
    (void)a_red, (void)span, (void)is_scores;
    for (int v = 0; v < nvec; v += STRIP) {
        const real *strip_rescale = rescale ? rescale + v * LANES : NULL;
#define STRIP_OF(width, most)                                                                    \
    strip_product(width, most, C + v * LANES, B + v * LANES, ld, A, a_row, rows, quads,          \
                  strip_rescale, prefetch)
        switch (nvec - v) {
        case 1: STRIP_OF(1, 8); break;
        case 2: STRIP_OF(2, 8); break;
        case 3: STRIP_OF(3, 8); break;
        default: STRIP_OF(STRIP, 4); break;
        }
#undef STRIP_OF
    }
}

#define FMA_CHAIN_FLOP (24 * DOT_QUADS_FLOP)
static double fma_chain(ptrdiff_t n)
{
    vec c[24], sum = v_set1(0);
    const vec a = v_set1((real)1e-3);
    UNROLL for (int i = 0; i < 24; i++) c[i] = v_set1((real)i);
    for (ptrdiff_t t = 0; t < n; t++)
        UNROLL for (int i = 0; i < 24; i++) c[i] = v_dot_quads(a, a, c[i]);
    UNROLL for (int i = 0; i < 24; i++) sum = v_add(sum, c[i]);
    real lanes[LANES]; /* the result is returned so that the compiler keeps the sums */
    v_store(lanes, sum);
    return (double)lanes[0];
}
