/* Rows of the caller's: results out of the accumulator, and 16-bit types and int8 to and from
 * float.
 *
 *     store_rows  rows[i][d] = acc[d][i] * weight[i], by transposing LANES x LANES blocks
 *     widen       row[0..n) = src[0..n)               narrow  dst[0..n) = row[0..n), rounded
 *
 * acc is [Dv][ld], weight [ld], both aligned; rows, src and dst have any alignment and unit
 * stride. The last Dv % LANES or n % LANES elements go through a buffer on the stack, so that
 * nothing behind a row is read or written. */
static void store_rows(char *const *rows, int count, const void *acc_, ptrdiff_t Dv, int nvec,
                       const void *weight_)
{
    const real *acc = acc_, *weight = weight_;
    const ptrdiff_t ld = (ptrdiff_t)nvec * LANES;
    for (int v = 0; v * LANES < count; v++) {
        const int live = count - v * LANES < LANES ? count - v * LANES : LANES;
        const vec w = v_load(weight + v * LANES);
        for (ptrdiff_t d = 0; d < Dv; d += LANES) {
            vec x[LANES];
            const ptrdiff_t n = Dv - d < LANES ? Dv - d : LANES;
            const ptrdiff_t at = d * (ptrdiff_t)sizeof(real);
            for (int i = 0; i < LANES; i++) /* the last row stands in for those past the end */
                x[i] = v_mul(v_load(acc + (d + (i < n ? i : n - 1)) * ld + v * LANES), w);
            v_transpose(x);
            if (n == LANES) {
                for (int i = 0; i < live; i++) v_store((real *)(rows[v * LANES + i] + at), x[i]);
            } else {
                for (int i = 0; i < live; i++) {
                    real row_end[LANES];
                    v_store(row_end, x[i]);
                    memcpy(rows[v * LANES + i] + at, row_end, (size_t)n * sizeof(real));
                }
            }
        }
    }
}

#if REAL_BITS == 32
INLINE void widen_type(const int type, float *row, const char *src, ptrdiff_t n)
{
    ptrdiff_t i = 0;
    for (; i + LANES <= n; i += LANES) v_store(row + i, load_lanes(src + i * BYTES_OF(type), type));
    if (i < n) {
        float row_end[LANES];
        v_store(row_end, load_first_lanes(src + i * BYTES_OF(type), n - i, type));
        memcpy(row + i, row_end, (size_t)(n - i) * sizeof(float));
    }
}

static void widen(void *row, const char *src, ptrdiff_t n, int type)
{
    switch (type) {
    case QKV_FLOAT16: widen_type(QKV_FLOAT16, row, src, n); break;
    case QKV_BFLOAT16: widen_type(QKV_BFLOAT16, row, src, n); break;
    default: widen_type(QKV_INT8, row, src, n); break;
    }
}

static void narrow(char *dst, const void *row_, ptrdiff_t n, int type)
{
    const float *row = row_;
    ptrdiff_t i = 0;
    if (type == QKV_FLOAT16) {
        for (; i + LANES <= n; i += LANES) v_store_half(dst + 2 * i, v_load(row + i));
    } else {
        for (; i + LANES <= n; i += LANES) v_store_bfloat(dst + 2 * i, v_load(row + i));
    }
    if (i < n) {
        char dst_end[2 * LANES];
        const vec row_end = load_bytes((const char *)(row + i), (n - i) * (ptrdiff_t)sizeof(float));
        if (type == QKV_FLOAT16)
            v_store_half(dst_end, row_end);
        else
            v_store_bfloat(dst_end, row_end);
        memcpy(dst + 2 * i, dst_end, (size_t)(n - i) * 2);
    }
}
#define WIDEN widen
#define NARROW narrow
#else
#define WIDEN NULL
#define NARROW NULL
#endif
