"""The bits of a row's result depend on its own inputs alone.

Results of BLAS tiles and of the Python engine depend on neither threads nor batch, but they may
depend on where a row falls in a tile: BLAS kernels may round it differently there.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from helpers import make

from qkv_fast import _dispatch, _select
from qkv_fast import scaled_dot_product_attention as sdpa

pytestmark = pytest.mark.usefixtures("many_cpus")

OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"window": (40, 7), "query_offset": 30},
    "all": {"is_causal": True, "softcap": 3.0, "alibi_slopes": 0.1, "query_offset": 50},
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("size", [(300, 700), (130, 4500)], ids=str)
def test_the_number_of_threads_changes_no_bit(engine, rng, dtype, options, size):
    q, k, v = make(rng, (2, 4, 2, *size, 64, 64), dtype)
    one = sdpa(q, k, v, enable_gqa=True, num_threads=1, **options)
    for threads in (2, 3, 7):
        many = sdpa(q, k, v, enable_gqa=True, num_threads=threads, **options)
        np.testing.assert_array_equal(many, one)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("size", [(100, 200), (70, 4500)], ids=str)
def test_the_rest_of_the_batch_changes_no_bit(engine, rng, dtype, options, size):
    q, k, v = make(rng, (3, 4, 2, *size, 32, 32), dtype)
    together = sdpa(q, k, v, enable_gqa=True, **options)
    for b in range(3):
        np.testing.assert_array_equal(
            together[b], sdpa(q[b], k[b], v[b], enable_gqa=True, **options)
        )


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("first", [1200, 4400])
@pytest.mark.parametrize("left", [None, 2500])
def test_the_tile_that_a_row_falls_in_changes_no_bit(engine, rng, monkeypatch, dtype, first, left):
    """Neither do the number of rows, while prefill takes the call, and the keys of other rows."""
    if engine.tiles != "simd":
        pytest.skip("neither NumPy's products nor BLAS' promise this")
    monkeypatch.setattr(_dispatch, "_runners", {})
    for name in ("DECODE_OCCUPANCY", "DECODE_OCCUPANCY_PAIRS", "DECODE_OCCUPANCY_CONVERTED"):
        monkeypatch.setattr(_select, name, 0.0)
    q, k, v = make(rng, (1, 2, 2, 150, first + 100, 48, 40), dtype)
    options = {"is_causal": True, "window": (left, None)}
    whole = sdpa(q, k, v, query_offset=first, **options)
    for begin, end in [(0, 1), (3, 20), (63, 66), (100, 150), (149, 150)]:
        part = sdpa(q[:, :, begin:end], k, v, query_offset=first + begin, **options)
        np.testing.assert_array_equal(part, whole[:, :, begin:end])


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("q_len", [1, 3, 40])
def test_splitting_the_keys_changes_no_bit(engine, rng, dtype, options, q_len):
    """Parts of the keys are merged in the same order on any threads and in any batch."""
    q, k, v = make(rng, (3, 4, 2, q_len, 4500, 40, 24), dtype)
    lengths = [4500, 2049, 3]
    options = options | {"enable_gqa": True, "query_offset": [4497, 2046, 0]}
    one, lse = sdpa(q, k, v, key_lengths=lengths, num_threads=1, return_lse=True, **options)
    for threads in (2, 3, 4):
        many = sdpa(q, k, v, key_lengths=lengths, num_threads=threads, return_lse=True, **options)
        np.testing.assert_array_equal(many[0], one)
        np.testing.assert_array_equal(many[1], lse)
    for b in range(3):
        here = options | {"query_offset": options["query_offset"][b]}
        alone = sdpa(q[b], k[b], v[b], key_lengths=lengths[b], **here)
        np.testing.assert_array_equal(alone, one[b])


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
def test_skipping_excluded_blocks_changes_no_bit(engine, rng, dtype):
    """`window` skips blocks of keys, and a mask of the same keys reads them."""
    if engine.tiles != "simd":
        pytest.skip("neither NumPy's products nor BLAS' promise this")
    q, k, v = make(rng, (1, 2, 2, 100, 500, 32, 32), dtype)
    position = 250 + np.arange(100)[:, None]
    j = np.arange(500)
    mask = (j >= position - 70) & (j <= position + 30)
    by_window = sdpa(q, k, v, window=(70, 30), query_offset=250)
    np.testing.assert_array_equal(sdpa(q, k, v, mask), by_window)


@pytest.mark.parametrize("q_len", [1, 3, 70])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_masks_of_other_rows_change_no_bit(engine, rng, dtype, q_len):
    if engine.engine == "python" or engine.tiles == "blas":
        pytest.skip("neither NumPy's products nor BLAS' promise this")
    q, k, v = make(rng, (1, 4, 2, q_len, 300, 40, 24), dtype)
    row = q_len // 2
    seen = np.arange(300) < 270
    results = []
    for others in (rng.random(300) > 0.5, np.ones(300, bool), np.arange(300) > 100):
        mask = np.broadcast_to(others, (1, 4, q_len, 300)).copy()
        mask[0, 1, row] = seen
        results.append(sdpa(q, k, v, mask, enable_gqa=True)[0, 1, row])
    np.testing.assert_array_equal(results[1], results[0])
    np.testing.assert_array_equal(results[2], results[0])
