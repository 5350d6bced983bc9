/* The products of tiles by broadcasts and multiply-adds, for ISAs without a matrix unit.
 *
 *     C[r][:] = C[r][:] * rescale[:] + sum_t A[r][t] * B[t][:]      rescale NULL: C is overwritten
 *
 * For scores, A is K, B is Qt and C is S; to accumulate, A is V transposed, B is P and C is acc. C
 * is [rows][ld] and B is [red][ld], aligned, of vectors. A[r][t], at A + r * a_row + t * a_red, is
 * one real or one pair of bfloat16, at any alignment. A register tile is `rows` rows of up to
 * STRIP vectors of C; rows that are left over are done in tiles of 16, 8, 4, 2 and 1. Fewer than 4
 * rows by 2 vectors take as long as 4, so 7 rows are 4 + 3, 8 are 4 + 4, 11 are 4 + 4 + 3. The sum
 * begins at 0, so that its rounding errors do not grow with what C has summed up before. */
#define ROW_STEP 1
#define ENTER NULL
#define LEAVE NULL

/* rows and nv are constants where this is inlined, so that c and b are registers. `prefetch` is
 * prefetched at about the pace at which A is read: all at once between register tiles, it takes a
 * quarter longer from memory. */
INLINE void register_tile(const int rows, const int nv, real *C, const real *B, ptrdiff_t ld,
                          const char *A, const ptrdiff_t a_row, const ptrdiff_t a_red,
                          ptrdiff_t red, const real *rescale, qkv_prefetch_rows *prefetch)
{
    const int steps_per_line = 2 * rows * (int)sizeof(real) <= CACHE_LINE ? 2 : 1;
    vec c[24];
    UNROLL for (int i = 0; i < rows * nv; i++) c[i] = v_set1(0);
    for (ptrdiff_t t = 0; t < red; t++) {
        vec b[STRIP];
        UNROLL for (int v = 0; v < nv; v++) b[v] = v_load(B + v * LANES);
        UNROLL for (int r = 0; r < rows; r++) {
            const vscalar a = v_scalar(load_real(A + r * a_row));
            UNROLL for (int v = 0; v < nv; v++)
                c[r * nv + v] = MULTIPLY_ADD_SCALAR(a, b[v], c[r * nv + v]);
        }
        A += a_red;
        B += ld;
        if (prefetch && t % steps_per_line == 0) prefetch_next(prefetch);
    }
    if (rescale) {
        vec scale[STRIP];
        UNROLL for (int v = 0; v < nv; v++) scale[v] = v_load(rescale + v * LANES);
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int v = 0; v < nv; v++)
                c[r * nv + v] = v_fma(v_load(C + r * ld + v * LANES), scale[v], c[r * nv + v]);
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < nv; v++) v_store(C + r * ld + v * LANES, c[r * nv + v]);
}

/* Rows of a register tile if A is V: its elements follow one another along r, so that more rows
 * need no more addresses. */
#ifndef rows_of_values
#define rows_of_values(nv) rows_of(nv)
#endif

/* nv vectors of C, `most` rows at a time. */
INLINE void strip_product(const int nv, const int most, real *C, const real *B, ptrdiff_t ld,
                          const char *A, const ptrdiff_t a_row, const ptrdiff_t a_red,
                          ptrdiff_t rows, ptrdiff_t red, const real *rescale,
                          qkv_prefetch_rows *prefetch)
{
#define TILE(n)                                                                                  \
    do {                                                                                         \
        register_tile(n, nv, C, B, ld, A, a_row, a_red, red, rescale, prefetch);                 \
        C += (n) * ld, A += (n) * a_row, rows -= (n);                                            \
    } while (0)
    while (rows >= most && !(most == 6 && (rows == 7 || rows == 8 || rows == 11))) TILE(most);
    if (most > 16 && rows >= 16) TILE(16);
    if (most > 8 && rows >= 8) TILE(8);
    while (most > 4 && rows >= 4) TILE(4);
    if (most == 6 && rows >= 3) TILE(3);
    if (rows >= 2) TILE(2);
    if (rows >= 1) TILE(1);
#undef TILE
}

/* strip_product with nv, at most STRIP, as a constant. */
INLINE void product_by_width(int nv, real *C, const real *B, ptrdiff_t ld, const char *A,
                             const ptrdiff_t a_row, const ptrdiff_t a_red, ptrdiff_t rows,
                             ptrdiff_t red, const real *rescale, const int is_scores,
                             qkv_prefetch_rows *prefetch)
{
#define STRIP_OF(width)                                                                          \
    strip_product(width, is_scores ? rows_of(width) : rows_of_values(width), C, B, ld, A, a_row, \
                  a_red, rows, red, rescale, prefetch)
    switch (nv) {
    case 1: STRIP_OF(1); break;
#if STRIP > 2
    case 2: STRIP_OF(2); break;
    case 3: STRIP_OF(3); break;
#endif
    default: STRIP_OF(STRIP); break;
    }
#undef STRIP_OF
}

/* The whole product, at most STRIP vectors at a time. A span only skips what adds nothing. For
 * scores it skips rows of C: those that all vectors of a strip need are computed together, the
 * others for each vector alone. To accumulate it skips terms of the sums, and vectors of equal
 * spans make up a strip. */
INLINE void product(real *C, const real *B, const char *A, const ptrdiff_t a_row,
                    const ptrdiff_t a_red, ptrdiff_t rows, ptrdiff_t red, int nvec,
                    const real *rescale, const qkv_span *span, const int is_scores,
                    qkv_prefetch_rows *prefetch)
{
    const ptrdiff_t ld = (ptrdiff_t)nvec * LANES;
    for (int v = 0, n; v < nvec; v += n) {
        const real *strip_rescale = rescale ? rescale + v * LANES : NULL;
        int begin = 0, end = (int)(is_scores ? rows : red);
        n = nvec - v < STRIP ? nvec - v : STRIP;
        if (span && is_scores) {
            for (int i = v; i < v + n; i++) {
                begin = span[i].begin > begin ? span[i].begin : begin;
                end = span[i].end < end ? span[i].end : end;
            }
            if (end < begin) end = begin;
            for (int i = v; i < v + n; i++) {
                real *c = C + i * LANES;
                const real *b = B + i * LANES;
                const ptrdiff_t first = span[i].begin, last = span[i].end;
                const ptrdiff_t before = (begin < last ? begin : last) - first;
                const ptrdiff_t behind = end > first ? end : first;
                if (before > 0)
                    product_by_width(1, c + first * ld, b, ld, A + first * a_row, a_row, a_red,
                                     before, red, strip_rescale, 1, prefetch);
                if (last > behind)
                    product_by_width(1, c + behind * ld, b, ld, A + behind * a_row, a_row, a_red,
                                     last - behind, red, strip_rescale, 1, prefetch);
            }
        } else if (span) {
            begin = span[v].begin, end = span[v].end;
            for (int i = 1; i < n; i++)
                if (span[v + i].begin != begin || span[v + i].end != end) n = i;
        }
        if (is_scores)
            product_by_width(n, C + v * LANES + begin * ld, B + v * LANES, ld, A + begin * a_row,
                             a_row, a_red, end - begin, red, strip_rescale, 1, prefetch);
        else
            product_by_width(n, C + v * LANES, B + v * LANES + begin * ld, ld, A + begin * a_red,
                             a_row, a_red, rows, end - begin, strip_rescale, 0, NULL);
    }
}

/* As many sums as the register tile has, so that none is spilled. */
#define FMA_CHAINS (STRIP * rows_of(STRIP))
#define FMA_CHAIN_FLOP (FMA_CHAINS * LANES * MULTIPLY_ADD_FLOP)
static double fma_chain(ptrdiff_t n)
{
    vec c[FMA_CHAINS], sum = v_set1(0);
    const vec a = v_set1((real)0.999), b = v_set1((real)1e-3);
    UNROLL for (int i = 0; i < FMA_CHAINS; i++) c[i] = v_set1((real)i);
    for (ptrdiff_t t = 0; t < n; t++)
        UNROLL for (int i = 0; i < FMA_CHAINS; i++) c[i] = MULTIPLY_ADD(a, b, c[i]);
    UNROLL for (int i = 0; i < FMA_CHAINS; i++) sum = v_add(sum, c[i]);
    real lanes[LANES]; /* the result is returned so that the compiler keeps the sums */
    v_store(lanes, sum);
    return (double)lanes[0];
}
