/* Which keys each lane may attend to, as bits.
 *
 *     mask_bool       allow[k] &= bit i where rows[i][k * stride] is not 0
 *
 * allow is [nk] words. Rows of a mask are the caller's bytes, at any alignment and stride; nothing
 * behind a row's last key is read.
 *
 * 64 keys at a time: bits[j][k] holds the bits of lanes 8 j to 8 j + 7 for key k, so that the inner
 * loop runs along a row. Eight such bytes make up a key's word. */
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
            uint8_t mask[64], *lane_bits = bits[i / 8];
            if (stride == 1)
                memcpy(mask, row, (size_t)n);
            else
                for (ptrdiff_t k = 0; k < n; k++) mask[k] = (uint8_t)row[k * stride];
            const uint8_t bit = (uint8_t)(1 << i % 8);
            /* A constant 64, so that the loop is vector code; bytes from n on are never used. */
            for (int k = 0; k < 64; k++) lane_bits[k] |= mask[k] ? bit : 0;
        }
        for (ptrdiff_t k = 0; k < n; k++) {
            uint64_t word = 0;
            for (int j = 0; j < 8; j++) word |= (uint64_t)bits[j][k] << 8 * j;
            allow[begin + k] &= word;
        }
    }
}
