/* SIMD wrappers that an ISA may leave out, made of those that it has. */
#ifndef HAVE_LOAD_COLUMNS
/* x[j] = the j-th real at rows[i] + at, for each lane i */
INLINE void v_load_columns(vec x[LANES], const char *const *rows, ptrdiff_t at)
{
    for (int i = 0; i < LANES; i++) x[i] = v_load((const real *)(rows[i] + at));
    v_transpose(x);
}
#endif

#ifndef HAVE_SUM_FOURS
/* Vectors of up to 4 lanes: lane i of the result is the sum of x[i]'s lanes. Longer vectors: lane i
 * of each four lanes is such a part of it, and v_sum_parts adds the parts of each x in order. */
INLINE vec v_sum_fours(vec x[LANES])
{
    v_transpose(x);
    for (int n = LANES / 2; n > 0; n /= 2)
        for (int i = 0; i < n; i++) x[i] = v_add(x[i], x[i + n]);
    return x[0];
}
#endif

#ifndef HAVE_SUM_PARTS
INLINE vec v_sum_parts(const vec *parts) { return parts[0]; }
#endif

#ifndef HAVE_HOLD
INLINE vec v_hold(vec x) { return x; }
#endif

#ifndef HAVE_ROTATE
INLINE vec v_rotate(vec x, int n) /* lane i of the result is x[(i + n) % LANES] */
{
    real lane[LANES], rotated[LANES];
    v_store(lane, x);
    for (int i = 0; i < LANES; i++) rotated[i] = lane[(i + n) % LANES];
    return v_load(rotated);
}
INLINE vec v_cycle(vec x, int n) /* lane i of the result is x[i % n]; n is a power of 2 */
{
    real lane[LANES];
    v_store(lane, x);
    for (int i = n; i < LANES; i++) lane[i] = lane[i - n];
    return v_load(lane);
}
#endif

#ifndef HAVE_REPEAT
/* Lane i of the result is x[i / times]. times is a power of 2; a whole vector at x is readable. */
INLINE vec v_repeat(const float *x, int times)
{
    real lane[LANES];
    for (int i = 0; i < LANES; i++) lane[i] = (real)x[i / times];
    return v_load(lane);
}
#endif

#ifndef HAVE_FMA_SCALAR
/* v_fma with one real for all lanes of a. */
typedef vec vscalar;
INLINE vscalar v_scalar(real x) { return v_set1(x); }
INLINE vec v_fma_scalar(vscalar a, vec b, vec c) { return v_fma(a, b, c); }
#endif
