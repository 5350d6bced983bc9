/* Sums of many blocks that lose no more than sums of few (Knuth's TwoSum, The Art of Computer
 * Programming 2, 4.2.2).
 *
 *     total + error = (total + error) * rescale + acc;   finish: acc = total + error
 *
 * total, error and acc are [rows][ld] reals, rescale is [ld], all aligned; ld is whole vectors, so
 * there are no tails. Rescaling is a pass of its own: a compiler must not fuse its product with the
 * sum behind it, because the sum's rounding error is found by taking the sum apart again. */
static void fold(void *total_, void *error_, void *acc_, ptrdiff_t rows, int nvec,
                 const void *rescale_, int finish)
{
    const ptrdiff_t ld = (ptrdiff_t)nvec * LANES;
    for (int v = 0; v < nvec; v++) {
        real *total = (real *)total_ + v * LANES, *error = (real *)error_ + v * LANES;
        real *acc = (real *)acc_ + v * LANES;
        const vec rescale = v_load((const real *)rescale_ + v * LANES), zero = v_set1(0);
        if (v_le_bits(v_set1(1), rescale) != ALL_LANES)
            for (ptrdiff_t i = 0; i < rows * ld; i += ld) {
                const vec t = v_load(total + i), product = v_mul(t, rescale);
                const vec lost = v_fma(t, rescale, v_sub(zero, product));
                v_store(error + i, v_fma(v_load(error + i), rescale, lost));
                v_store(total + i, product);
            }
        for (ptrdiff_t i = 0; i < rows * ld; i += ld) {
            const vec t = v_load(total + i), a = v_load(acc + i), sum = v_add(t, a);
            const vec added = v_sub(sum, t);
            const vec lost = v_add(v_sub(t, v_sub(sum, added)), v_sub(a, added));
            const vec e = v_add(v_load(error + i), lost);
            v_store(total + i, sum);
            v_store(error + i, e);
            if (!finish) continue;
            const vmask finite = v_mask(v_le_bits(v_sub(sum, sum), zero));
            v_store(acc + i, v_select(finite, v_add(sum, e), sum));
        }
    }
}
