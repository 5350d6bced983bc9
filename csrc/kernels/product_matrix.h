/* The products of tiles on AMX, whose unit multiplies 16 x 32 by 32 x 16 bfloat16.
 *
 *     C[r][:] = C[r][:] * rescale[:] + sum_t A[r][t] * B[t][:]      rescale NULL: C is overwritten
 *
 * For scores, A is K, B is Qt and C is S; to accumulate, A is Vt, B is P and C is acc. C is
 * [rows][ld] floats, A is [rows][red] and B [red][ld] pairs of bfloat16; C and B are aligned. rows
 * and red are multiples of 16, so there are no tails: the engine pads by ROW_STEP and DEPTH_STEP.
 *
 * A query tile has 32 rows: S, Qt, acc and a block of K or V of head size 64 then fit into an L1d
 * of 48 KiB. */
#undef TILE_Q
#define TILE_Q (2 * LANES)
#define ROW_STEP 16
#define DEPTH_STEP 32
#define ENTER open_matrix_unit
#define LEAVE close_matrix_unit

/* Each of the eight AMX tiles holds 16 rows of 64 bytes. This is constant because compilers do not
 * know that ldtilecfg reads memory. */
static const struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_shapes = {
    .palette = 1,
    .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64},
    .rows = {16, 16, 16, 16, 16, 16, 16, 16},
};

static void open_matrix_unit(void) { _tile_loadconfig(&tile_shapes); }

static void close_matrix_unit(void) { _tile_release(); }

/* 16 or 32 rows of C by one or two vectors: C = A * B, or C += A * B, over 32 * steps bfloat16. */
INLINE void matrix_tile(const int two_rows, const int two_vecs, real *C, const real *B,
                        ptrdiff_t ld, const char *A, ptrdiff_t a_row, ptrdiff_t steps,
                        const int add)
{
    const ptrdiff_t ld_bytes = ld * (ptrdiff_t)sizeof(real);
    real *C2 = C + 16 * ld;
    if (add) {
        _tile_loadd(0, C, ld_bytes);
        if (two_vecs) _tile_loadd(1, C + LANES, ld_bytes);
        if (two_rows) _tile_loadd(2, C2, ld_bytes);
        if (two_rows && two_vecs) _tile_loadd(3, C2 + LANES, ld_bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (ptrdiff_t s = 0; s < steps; s++, A += 64, B += 16 * ld) {
        _tile_loadd(4, A, a_row);
        _tile_loadd(6, B, ld_bytes);
        _tile_dpbf16ps(0, 4, 6);
        if (two_vecs) _tile_loadd(7, B + LANES, ld_bytes);
        if (two_vecs) _tile_dpbf16ps(1, 4, 7);
        if (two_rows) _tile_loadd(5, A + 16 * a_row, a_row);
        if (two_rows) _tile_dpbf16ps(2, 5, 6);
        if (two_rows && two_vecs) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, C, ld_bytes);
    if (two_vecs) _tile_stored(1, C + LANES, ld_bytes);
    if (two_rows) _tile_stored(2, C2, ld_bytes);
    if (two_rows && two_vecs) _tile_stored(3, C2 + LANES, ld_bytes);
}

/* C = A * B for all rows of two vectors. B, at most 64 bfloat16 deep, stays in four AMX tiles: that
 * halves the loads, and the stores of two results overlap with the products of the next two. */
INLINE void matrix_rows(real *C, const real *B, ptrdiff_t ld, const char *A, ptrdiff_t a_row,
                        ptrdiff_t rows, const int two_steps)
{
    const ptrdiff_t ld_bytes = ld * (ptrdiff_t)sizeof(real);
    _tile_loadd(4, B, ld_bytes);
    _tile_loadd(5, B + LANES, ld_bytes);
    if (two_steps) _tile_loadd(6, B + 16 * ld, ld_bytes);
    if (two_steps) _tile_loadd(7, B + 16 * ld + LANES, ld_bytes);
    for (ptrdiff_t r = 0; r < rows; r += 16, C += 16 * ld, A += 16 * a_row) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_loadd(2, A, a_row);
        _tile_dpbf16ps(0, 2, 4);
        _tile_dpbf16ps(1, 2, 5);
        if (two_steps) {
            _tile_loadd(3, A + 64, a_row);
            _tile_dpbf16ps(0, 3, 6);
            _tile_dpbf16ps(1, 3, 7);
        }
        _tile_stored(0, C, ld_bytes);
        _tile_stored(1, C + LANES, ld_bytes);
    }
}

/* C[r][:] *= rescale[:] for the vectors in which that is not 1 everywhere. */
INLINE void rescale_rows(real *C, ptrdiff_t rows, int nvec, const real *rescale)
{
    const ptrdiff_t ld = (ptrdiff_t)nvec * LANES;
    for (int v = 0; v < nvec; v++) {
        const vec scale = v_load(rescale + v * LANES);
        if (v_le_bits(v_set1(1), scale) == ALL_LANES) continue;
        for (ptrdiff_t r = 0; r < rows; r++) {
            real *c = C + r * ld + v * LANES;
            v_store(c, v_mul(v_load(c), scale));
        }
    }
}

/* a_red is 4, the size of a pair. Nothing is prefetched: that gains 5 % if K and V come from
 * memory, and loses as much or more if they come from the caches. */
INLINE void product(real *C, const real *B, const char *A, const ptrdiff_t a_row,
                    const ptrdiff_t a_red, ptrdiff_t rows, ptrdiff_t red, int nvec,
                    const real *rescale, const qkv_span *span, const int is_scores,
                    qkv_prefetch_rows *prefetch)
{
    const ptrdiff_t ld = (ptrdiff_t)nvec * LANES, steps = red / 16;
    (void)a_red, (void)span, (void)is_scores, (void)prefetch;
    if (rescale) rescale_rows(C, rows, nvec, rescale);
    /* The unit reads what was just stored, which the compiler does not know. */
    __asm__ volatile("" ::: "memory");
    if (!rescale && steps == 2 && nvec == 2) {
        matrix_rows(C, B, ld, A, a_row, rows, 1);
        return;
    }
    if (!rescale && steps == 1 && nvec == 2) {
        matrix_rows(C, B, ld, A, a_row, rows, 0);
        return;
    }
    for (ptrdiff_t r = 0; r < rows; r += 32, C += 32 * ld, A += 32 * a_row) {
        const int two_rows = rows - r > 16;
        for (int v = 0; v < nvec; v += 2) {
            real *c = C + v * LANES;
            const real *b = B + v * LANES;
            const int add = rescale != NULL;
            switch (2 * two_rows + (nvec - v > 1)) {
            case 0: matrix_tile(0, 0, c, b, ld, A, a_row, steps, add); break;
            case 1: matrix_tile(0, 1, c, b, ld, A, a_row, steps, add); break;
            case 2: matrix_tile(1, 0, c, b, ld, A, a_row, steps, add); break;
            default: matrix_tile(1, 1, c, b, ld, A, a_row, steps, add); break;
            }
        }
    }
}

#define FMA_CHAIN_FLOP (4 * 16 * 16 * 32 * 2)
static double fma_chain(ptrdiff_t n)
{
    _tile_zero(4); /* zeros: the unit's speed does not depend on the data */
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    for (ptrdiff_t t = 0; t < n; t++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    return 0;
}
