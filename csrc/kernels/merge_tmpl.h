/* A row of attention over all keys, from the rows over parts of them:
 *
 *     merge_rows  out[0..n) = sum_i weights[i] * parts[i][0..n), in the order of the parts
 *
 * Rows have any alignment and unit stride. An element's sum is the same wherever it stands in its
 * row, and it begins with +0, so a sum of zeros is +0. The last n % LANES elements go through
 * buffers on the stack. A strip is loaded from all parts before it is stored, so `out` may be one
 * of them. */
#define MERGE_STRIP 4 /* vectors */

INLINE void store_lanes(char *p, vec x, const int type)
{
#if REAL_BITS == 32
    if (type == QKV_FLOAT16) {
        v_store_half(p, x);
        return;
    }
    if (type == QKV_BFLOAT16) {
        v_store_bfloat(p, x);
        return;
    }
#endif
    (void)type;
    v_store((real *)p, x);
}

INLINE void merge_type(char *out, int out_type, const char *const *parts, const real *weights,
                       ptrdiff_t count, ptrdiff_t n, const int type)
{
    const ptrdiff_t bytes = BYTES_OF(type), out_bytes = BYTES_OF(out_type);
    ptrdiff_t d = 0;
    for (; d + MERGE_STRIP * LANES <= n; d += MERGE_STRIP * LANES) {
        vec sum[MERGE_STRIP];
        UNROLL for (int v = 0; v < MERGE_STRIP; v++) sum[v] = v_set1(0);
        for (ptrdiff_t i = 0; i < count; i++) {
            const vec w = v_set1(weights[i]);
            UNROLL for (int v = 0; v < MERGE_STRIP; v++)
                sum[v] = v_fma(w, load_lanes(parts[i] + (d + v * LANES) * bytes, type), sum[v]);
        }
        UNROLL for (int v = 0; v < MERGE_STRIP; v++)
            store_lanes(out + (d + v * LANES) * out_bytes, sum[v], out_type);
    }
    for (; d < n; d += LANES) {
        const ptrdiff_t live = n - d < LANES ? n - d : LANES;
        vec sum = v_set1(0);
        for (ptrdiff_t i = 0; i < count; i++)
            sum = v_fma(v_set1(weights[i]), load_first_lanes(parts[i] + d * bytes, live, type),
                        sum);
        char row_end[sizeof(vec)];
        store_lanes(row_end, sum, out_type);
        memcpy(out + d * out_bytes, row_end, (size_t)(live * out_bytes));
    }
}

static void merge_rows(char *out, int out_type, const char *const *parts, const void *weights,
                       ptrdiff_t count, ptrdiff_t n, int type)
{
#if REAL_BITS == 32
    if (type == QKV_FLOAT16) {
        merge_type(out, out_type, parts, weights, count, n, QKV_FLOAT16);
        return;
    }
    if (type == QKV_BFLOAT16) {
        merge_type(out, out_type, parts, weights, count, n, QKV_BFLOAT16);
        return;
    }
#endif
    (void)type;
    merge_type(out, out_type, parts, weights, count, n,
               REAL_BITS == 32 ? QKV_FLOAT32 : QKV_FLOAT64);
}
