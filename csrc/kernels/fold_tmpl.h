/* Sums of sums. */
/* Two passes where rows rescale: a compiler must not fuse that product with the sum behind it, whose
 * rounding error is found by taking it apart again (Knuth's TwoSum). */
static void fold(void *total_, void *error_, void *acc_, ptrdiff_t rows, int nvec,
                 const void *decay_, int finish)
{
    const ptrdiff_t ld = (ptrdiff_t)nvec * LANES;
    for (int v = 0; v < nvec; v++) {
        real *total = (real *)total_ + v * LANES, *error = (real *)error_ + v * LANES;
        real *acc = (real *)acc_ + v * LANES;
        const vec factor = v_load((const real *)decay_ + v * LANES), zero = v_set1(0);
        if (v_le_bits(v_set1(1), factor) != ALL_LANES)
            for (ptrdiff_t i = 0; i < rows * ld; i += ld) {
                const vec t = v_load(total + i), product = v_mul(t, factor);
                const vec lost = v_fma(t, factor, v_sub(zero, product));
                v_store(error + i, v_fma(v_load(error + i), factor, lost));
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
