/* Both products by broadcasts: included by tile_tmpl.h, where no matrix unit does them. */
#define ROW_STEP 1
#define ENTER NULL
#define LEAVE NULL

/* The register tile of both products: C[r][0..nv) = C * decay + sum_t A[r][t] * B[t][0..nv), where
 * A[r][t] is a real, or a pair of bfloat16, to broadcast at A + r * a_row + t * a_red; no decay: C is
 * overwritten. The sum begins at 0, so that its rounding errors don't grow with all that C has taken up before.
 * `rows` and `nv` are constants where this is inlined, so that the accumulators are registers. */
INLINE void register_tile(const int rows, const int nv, real *C, const real *B, ptrdiff_t ld,
                          const char *A, const ptrdiff_t a_row, const ptrdiff_t a_red,
                          ptrdiff_t red, const real *decay)
{
    vec c[24];
    UNROLL for (int i = 0; i < rows * nv; i++) c[i] = v_set1(0);
    for (ptrdiff_t t = 0; t < red; t++) {
        vec b[STRIP];
        UNROLL for (int v = 0; v < nv; v++) b[v] = v_load(B + v * LANES);
        UNROLL for (int r = 0; r < rows; r++) {
            const vec a = v_set1(load_real(A + r * a_row));
            UNROLL for (int v = 0; v < nv; v++) c[r * nv + v] = MULTIPLY_ADD(a, b[v], c[r * nv + v]);
        }
        A += a_red;
        B += ld;
    }
    if (decay) {
        vec factor[STRIP];
        UNROLL for (int v = 0; v < nv; v++) factor[v] = v_load(decay + v * LANES);
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int v = 0; v < nv; v++)
                c[r * nv + v] = v_fma(v_load(C + r * ld + v * LANES), factor[v], c[r * nv + v]);
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < nv; v++) v_store(C + r * ld + v * LANES, c[r * nv + v]);
}

INLINE void strip_product(const int nv, real *C, const real *B, ptrdiff_t ld, const char *A,
                          const ptrdiff_t a_row, const ptrdiff_t a_red, ptrdiff_t rows,
                          ptrdiff_t red, const real *decay)
{
#define TILE(n)                                                                                  \
    do {                                                                                         \
        register_tile(n, nv, C, B, ld, A, a_row, a_red, red, decay);                             \
        C += (n) * ld, A += (n) * a_row, rows -= (n);                                            \
    } while (0)
    while (rows >= rows_of(nv)) TILE(rows_of(nv));
    if (rows_of(nv) > 8 && rows >= 8) TILE(8);
    if (rows_of(nv) > 4 && rows >= 4) TILE(4);
    if (rows >= 2) TILE(2);
    if (rows >= 1) TILE(1);
#undef TILE
}

/* C = C * decay + A * B, for vectors of equal spans together, at most STRIP at a time. A span limits
 * the rows of C (span_rows), or else the reduced axis; that skips only what adds nothing. */
INLINE void product(real *C, const real *B, const char *A, const ptrdiff_t a_row,
                    const ptrdiff_t a_red, ptrdiff_t rows, ptrdiff_t red, int nvec,
                    const real *decay, const qkv_span *span, const int span_rows)
{
    const ptrdiff_t ld = (ptrdiff_t)nvec * LANES;
    for (int v = 0, n; v < nvec; v += n) {
        real *c = C + v * LANES;
        const real *b = B + v * LANES, *by = decay ? decay + v * LANES : NULL;
        const char *a = A;
        ptrdiff_t some_rows = rows, some_red = red;
        n = 1;
        while (n < STRIP && v + n < nvec &&
               (!span || (span[v].begin == span[v + n].begin && span[v].end == span[v + n].end)))
            n++;
        if (span && span_rows) {
            c += span[v].begin * ld, a += span[v].begin * a_row;
            some_rows = span[v].end - span[v].begin;
        } else if (span) {
            b += span[v].begin * ld, a += span[v].begin * a_red;
            some_red = span[v].end - span[v].begin;
        }
        switch (n) {
        case 1: strip_product(1, c, b, ld, a, a_row, a_red, some_rows, some_red, by); break;
#if STRIP > 2
        case 2: strip_product(2, c, b, ld, a, a_row, a_red, some_rows, some_red, by); break;
        case 3: strip_product(3, c, b, ld, a, a_row, a_red, some_rows, some_red, by); break;
#endif
        default: strip_product(STRIP, c, b, ld, a, a_row, a_red, some_rows, some_red, by); break;
        }
    }
}

#define FMA_CHAIN_FLOP (24 * LANES * MULTIPLY_ADD_FLOP)
static double fma_chain(ptrdiff_t n)
{
    vec c[24], sum = v_set1(0);
    const vec a = v_set1((real)0.999), b = v_set1((real)1e-3);
    UNROLL for (int i = 0; i < 24; i++) c[i] = v_set1((real)i);
    for (ptrdiff_t t = 0; t < n; t++)
        UNROLL for (int i = 0; i < 24; i++) c[i] = MULTIPLY_ADD(a, b, c[i]);
    UNROLL for (int i = 0; i < 24; i++) sum = v_add(sum, c[i]);
    real lanes[LANES];
    v_store(lanes, sum);
    return (double)lanes[0];
}
