"""Tuned numbers that follow from the caches of the CPU; all others are in tuning.pxd."""

import os

from .kernels cimport qkv_l2_bytes

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


# A head whose keys and values take more bytes than this, half of the L2, does not stay in the L2
# beside the scratch: query tiles then share a task, and blocks are prefetched (bench_attention.py
# on Granite Rapids, 1 MiB of 2 MiB; on Zen 3 128 KiB to 1 MiB stay within 7 % at eight shapes).
# It decides nothing but the order of tasks and loads, so it changes no bit of a result.
cdef Py_ssize_t _shared_keys = level2_bytes() // 2


cdef Py_ssize_t shared_keys() noexcept nogil:
    """Return the bytes of keys and values that stay in a core's L2."""
    return _shared_keys
