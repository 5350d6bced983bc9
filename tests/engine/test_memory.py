"""Memory: strides, alignment, byte order, `out` and its overlaps, other array types, footprint."""

from __future__ import annotations

import array
import ctypes
import mmap
import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
from helpers import layouts, make, normal, run_python

from qkv_fast import scaled_dot_product_attention as sdpa


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("layout", list(layouts(np.zeros((1, 1, 1, 1), "f4"))))
def test_any_layout_gives_the_same_answer(engine, rng, dtype, layout):
    q, k, v = make(rng, (2, 2, 2, 35, 70, 24, 20), dtype)
    expected = sdpa(q, k, v, is_causal=True)
    for i in range(3):
        mixed = [layouts(x)[layout] if i == j else x for j, x in enumerate((q, k, v))]
        np.testing.assert_allclose(
            sdpa(*mixed, is_causal=True),
            expected,
            rtol=1e-5,
            atol=1e-6 if dtype != np.float16 else 1e-3,
        )
    for x in (q, k, v):
        x.flags.writeable = False
    np.testing.assert_array_equal(sdpa(q, k, v, is_causal=True), expected)


def test_broadcast_inputs_are_not_copied(engine, rng):
    q = normal(rng, (1, 1, 5, 8))
    k, v = (np.broadcast_to(normal(rng, (1, 1, 9, 8)), (300, 4, 9, 8)) for _ in range(2))
    q = np.broadcast_to(q, (300, 4, 5, 8))
    out = sdpa(q, k, v)
    assert out.flags.c_contiguous
    np.testing.assert_array_equal(out, np.broadcast_to(out[:1, :1], out.shape))
    oracle.assert_close(out[0], q[0], k[0], v[0])


def test_the_result_is_laid_out_like_query(engine, rng):
    q, k, v = (x.transpose(0, 2, 1, 3) for x in make(rng, (2, 5, 5, 3, 4, 8, 6)))
    assert q.shape == (2, 3, 5, 8)  # (B, L, H, D) storage seen as (B, H, L, D)
    k, v = (np.repeat(x, 1, 1)[:, :3] if x.shape[1] > 3 else x for x in (k, v))
    k, v = normal(rng, (2, 7, 3, 8)).swapaxes(1, 2), normal(rng, (2, 7, 3, 6)).swapaxes(1, 2)
    out = sdpa(q, k, v)
    assert out.swapaxes(1, 2).flags.c_contiguous
    oracle.assert_close(out, q, k, v)
    view = np.empty((2, 5, 3, 6), np.float32)
    assert sdpa(q, k, v, out=view.swapaxes(1, 2)).base is view
    np.testing.assert_array_equal(view.swapaxes(1, 2), out)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("threads", [1, 2])
def test_in_place(engine, rng, dtype, threads):
    q, k, v = make(rng, (2, 4, 2, 150, 90, 32, 32), dtype)
    expected = sdpa(q, k, v, enable_gqa=True)
    assert sdpa(q, k, v, enable_gqa=True, out=q, num_threads=threads) is q
    np.testing.assert_array_equal(q, expected)


def test_out_may_overlap_anything(engine, rng):
    arena = normal(rng, (3, 2, 70, 16))
    for name, place in {
        "key": np.s_[1],
        "value": np.s_[2],
        "shifted query": np.s_[0, ::-1],
        "reversed rows": np.s_[0, :, ::-1],
    }.items():
        q, k, v = memory = arena.copy()
        expected = sdpa(q, k, v)
        out = memory[place]
        assert sdpa(q, k, v, out=out) is out, name
        np.testing.assert_array_equal(out, expected, name)
    flat = normal(rng, (5000,))
    q, k, v = (flat[i : i + 1120].reshape(1, 70, 16) for i in (0, 100, 200))
    expected = sdpa(q, k, v)
    out = flat[37 : 37 + 1120].reshape(1, 70, 16)
    np.testing.assert_array_equal(sdpa(q, k, v, out=out), expected)


def test_out_may_be_a_mask_or_share_a_packed_array(engine, rng):
    q, k, v = make(rng, (1, 2, 2, 70, 70, 70, 70))
    mask = normal(rng, (1, 2, 70, 70))
    expected = sdpa(q, k, v, mask)
    np.testing.assert_array_equal(sdpa(q, k, v, mask, out=mask), expected)
    packed = normal(rng, (2, 30, 3, 4, 8))
    q, k, v = packed.transpose(2, 0, 3, 1, 4)
    expected = sdpa(q, k, v)
    np.testing.assert_array_equal(sdpa(q, k, v, out=v), expected)


def test_out_of_any_layout(engine, rng):
    q, k, v = make(rng, (2, 2, 2, 35, 70, 24, 20))
    expected = sdpa(q, k, v)
    for name, out in layouts(np.zeros_like(expected)).items():
        assert sdpa(q, k, v, out=out) is out
        np.testing.assert_array_equal(out, expected, name)
    strange = np.lib.stride_tricks.as_strided(
        np.zeros(10000, "f4"), expected.shape, (4, 4, 4, 4), writeable=True
    )
    sdpa(q, k, v, out=strange)  # elements overlap: the call must return, with any numbers


class Interface:
    def __init__(self, x: np.ndarray) -> None:
        self.x = x
        self.__array_interface__ = x.__array_interface__


class Dlpack:
    def __init__(self, x: np.ndarray) -> None:
        self.x = x

    def __dlpack__(self, **options: Any) -> Any:
        return self.x.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.x.__dlpack_device__()


@pytest.mark.parametrize("kind", [memoryview, Interface, Dlpack])
def test_other_array_types(engine, rng, kind):
    q, k, v = make(rng, "small")
    out = sdpa(kind(q), kind(k), kind(v))
    assert type(out) is np.ndarray
    np.testing.assert_array_equal(out, sdpa(q, k, v))


def test_arrays_of_one_axis_are_seen_and_refused():
    with pytest.raises(ValueError, match=r"query has shape \(3,\)"):
        sdpa(*[array.array("f", [1, 2, 3])] * 3)


def test_subclasses_are_seen_as_arrays(engine, rng):
    class Mine(np.ndarray):
        pass

    q, k, v = make(rng, "small")
    out = sdpa(q.view(Mine), k, v)
    assert type(out) is np.ndarray
    np.testing.assert_array_equal(out, sdpa(q, k, v))


FOOTPRINT = """
import resource, numpy as np, qkv_fast
rng = np.random.default_rng(0)
x = rng.standard_normal((1, 8, {length}, 8), np.float32)
k = np.ascontiguousarray(x[:, :, :64])
out = np.empty_like(x)
sdpa = qkv_fast.scaled_dot_product_attention
sdpa(k, k, k)
resource.getrusage(resource.RUSAGE_SELF)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sdpa(x, x, x, out=out, is_causal=True, window=(64, 0))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_nothing_grows_with_the_square_of_the_length(native):
    """All scores of 8 heads would take 32 GiB; the window only keeps the test short."""
    done: subprocess.CompletedProcess[str] = run_python(FOOTPRINT.format(length=32768))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 8 * 1024  # KiB


class Fenced:
    """Memory in front of a page that can't be read."""

    def __init__(self) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.maps: list[mmap.mmap] = []

    def place(self, array: np.ndarray) -> np.ndarray:
        """Return a copy that ends where the unreadable page begins."""
        page = mmap.PAGESIZE
        size = -(-array.nbytes // page) * page
        memory = mmap.mmap(-1, size + page)
        self.maps.append(memory)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        if self.libc.mprotect(ctypes.c_void_p(start + size), ctypes.c_size_t(page), 0):
            pytest.skip("mprotect failed")
        copy = np.frombuffer(memory, array.dtype, array.size, size - array.nbytes)
        copy = copy.reshape(array.shape)
        copy[...] = array
        return copy


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    "size", [(5, 7, 3, 2), (64, 128, 64, 64), (33, 50, 40, 24), (17, 129, 80, 31)]
)
def test_nothing_behind_the_inputs_is_read(engine, rng, dtype, size):
    """A kernel that reads past the end of an array ends the process."""
    q_len, kv_len, head_dim, v_dim = size
    fenced = Fenced()
    q, k, v = (
        fenced.place(rng.standard_normal(shape).astype(dtype))
        for shape in ((2, q_len, head_dim), (2, kv_len, head_dim), (2, kv_len, v_dim))
    )
    masks = [None, rng.random((2, q_len, kv_len)) > 0.3, rng.standard_normal((2, q_len, kv_len))]
    for mask in masks:
        if mask is not None:
            mask = fenced.place(mask.astype(dtype) if mask.dtype != bool else mask)
        for is_causal in (False, True):
            out = fenced.place(np.zeros((2, q_len, v_dim), dtype))
            sdpa(q, k, v, mask, is_causal=is_causal, out=out)
            expected = sdpa(q.copy(), k.copy(), v.copy(), mask, is_causal=is_causal)
            np.testing.assert_array_equal(out.astype(float), expected.astype(float))
