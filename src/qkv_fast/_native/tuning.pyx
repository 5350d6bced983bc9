"""Tuned numbers that follow from the caches of the CPU; all others are in tuning.pxd."""

import os

from .kernels cimport qkv_l2_bytes

# Where nothing tells (many virtual machines on ARM), the L2 of most ARM servers. A CPU's model number
# would not tell more: docs/algorithm.md.
cdef Py_ssize_t UNKNOWN_L2 = 1 << 20


cdef Py_ssize_t level2_bytes() except -1:
    """Return the bytes of a core's L2 cache, or what QKV_FAST_L2_BYTES says (for tests)."""
    given = os.environ.get("QKV_FAST_L2_BYTES", "")
    if given:
        if not (given.isdecimal() and 0 < int(given) < 1 << 40):
            raise ValueError(
                f"QKV_FAST_L2_BYTES is {given!r}: it must be a whole number above 0, below 2^40")
        return int(given)
    return qkv_l2_bytes() or UNKNOWN_L2


cdef Py_ssize_t _half_l2 = level2_bytes() // 2


cdef Py_ssize_t shared_keys() noexcept nogil:
    """Return the bytes of a head's keys and values that stay in a core's L2, beside the scratch.

    If a head has more, its query tiles share a task, and blocks are prefetched. Granite Rapids was
    tuned with 1 MiB of its 2 MiB (bench_attention.py); on Zen 3, 128 KiB to 1 MiB stay within 7 %
    at eight shapes. It decides the order of tasks and loads, so it changes no bit of a result.
    """
    return _half_l2


cdef Py_ssize_t fitting_keys(Py_ssize_t row_bytes, Py_ssize_t most, bint narrow) noexcept nogil:
    """Return the keys of a prefill block whose keys and values fill at most half of the L2.

    It is a power of two of at least LEAST_BLOCK_K. row_bytes: of a key and its value. On Zen 3
    (512 KiB), 2x2048x512 in float32 is 5 to 7 % faster with 64 keys than with 128, float64 11 % at
    sizes 256 and 512; with 32 keys sizes up to 256 are 3 to 10 % slower (bench_attention.py).

    narrow: tiles have few rows. Then they read the block more often, and it fills at most
    NARROW_BLOCK_BYTES: with 1 MiB of L2 (Zen 4) 2x2048x512 by AVX2 is 7 % faster with 64 keys than
    with 128, float64 3 % at size 256; with AVX-512, whose tiles have 64 rows, it is 1 % slower.
    """
    cdef Py_ssize_t keys = most, limit = _half_l2
    if narrow:
        limit = min(limit, NARROW_BLOCK_BYTES)
    while keys > LEAST_BLOCK_K and keys * row_bytes > limit:
        keys //= 2
    return keys
