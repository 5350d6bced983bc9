/* Masks. */
static void mask_positions(uint64_t *allow, ptrdiff_t nk, int nvec, const void *first_,
                        const void *last_)
{
    const real *first = first_, *last = last_;
    for (ptrdiff_t k = 0; k < nk; k++) {
        const vec at = v_set1((real)k);
        uint64_t bits = 0;
        for (int v = 0; v < nvec; v++)
            bits |= (v_le_bits(v_load(first + v * LANES), at) &
                     v_le_bits(at, v_load(last + v * LANES)))
                    << (v * LANES);
        allow[k] &= bits;
    }
}

/* In 64 keys, a byte holds the bits of eight lanes for a key; then eight bytes are a key's word. */
static void mask_bool(uint64_t *allow, ptrdiff_t nk, int nvec, const char *const *rows,
                       ptrdiff_t stride)
{
    const int count = nvec * LANES;
    for (ptrdiff_t begin = 0; begin < nk; begin += 64) {
        const ptrdiff_t n = nk - begin < 64 ? nk - begin : 64;
        uint8_t bits[8][64];
        memset(bits, 0, sizeof bits);
        for (int i = 0; i < count; i++) {
            const char *row = rows[i] + begin * stride;
            __builtin_prefetch(row + nk * stride); /* the next block's */
            uint8_t one[64], *to = bits[i / 8];
            if (stride == 1)
                memcpy(one, row, (size_t)n);
            else
                for (ptrdiff_t k = 0; k < n; k++) one[k] = (uint8_t)row[k * stride];
            const uint8_t bit = (uint8_t)(1 << i % 8);
            for (int k = 0; k < 64; k++) to[k] |= one[k] ? bit : 0; /* past n: never read */
        }
        for (ptrdiff_t k = 0; k < n; k++) {
            uint64_t word = 0;
            for (int j = 0; j < 8; j++) word |= (uint64_t)bits[j][k] << 8 * j;
            allow[begin + k] &= word;
        }
    }
}
