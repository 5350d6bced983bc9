"""varlen_attention: each packed sequence gives what it gives alone."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
from helpers import normal

import qkv_fast
from qkv_fast import scaled_dot_product_attention as sdpa
from qkv_fast import varlen_attention

DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
LENGTHS_Q = [3, 0, 70, 1, 140, 8, 2]
LENGTHS_K = [5, 9, 70, 300, 140, 0, 1]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"window": (20, 4)},
    "all": {"is_causal": True, "softcap": 2.0, "scale": 0.3, "window": (100, None)},
}


def starts(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)])


def packed(rng, heads: int = 4, kv_heads: int = 2, d: int = 24, dv: int = 20, dtype=np.float32):
    q = normal(rng, (sum(LENGTHS_Q), heads, d), dtype)
    k = normal(rng, (sum(LENGTHS_K), kv_heads, d), dtype)
    return q, k, normal(rng, (sum(LENGTHS_K), kv_heads, dv), dtype)


def each(q, k, v):
    """Yield for each sequence its slice of queries, and (H, L, D) query, key and value."""
    cu_q, cu_k = starts(LENGTHS_Q), starts(LENGTHS_K)
    for i in range(len(LENGTHS_Q)):
        own, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        yield own, q[own].swapaxes(0, 1), k[keys].swapaxes(0, 1), v[keys].swapaxes(0, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_agrees_with_the_oracle_and_with_each_sequence_alone(engine, rng, dtype, options):
    q, k, v = packed(rng, dtype=dtype)
    sinks, slopes = rng.standard_normal(4), rng.random((len(LENGTHS_Q), 4)) * 0.1
    extra = {"sinks": sinks} if "scale" in options else {}
    out, lse = varlen_attention(
        q, k, v, starts(LENGTHS_Q), starts(LENGTHS_K), return_lse=True, **options, **extra,
        alibi_slopes=slopes if extra else None,
    )  # fmt: skip
    assert out.shape == (len(q), 4, 20)
    assert lse.shape == (len(q), 4)
    for i, (own, a, b, c) in enumerate(each(q, k, v)):
        here = options | extra | ({"alibi_slopes": slopes[i]} if extra else {})
        here["query_offset"] = b.shape[1] - a.shape[1]  # bottom-right
        oracle.assert_close(np.ascontiguousarray(out[own].swapaxes(0, 1)), a, b, c, **here)
        alone, alone_lse = sdpa(a, b, c, enable_gqa=True, return_lse=True, **here)
        if engine.engine == "native":
            np.testing.assert_array_equal(out[own].swapaxes(0, 1), alone)
            np.testing.assert_array_equal(lse[own].T, alone_lse)


@pytest.mark.parametrize("heads", [1, 4])
def test_a_bias_for_each_sequence(engine, rng, heads):
    """Its rows and columns count from each sequence's own first query and key."""
    q, k, v = packed(rng)
    bias = normal(rng, (len(LENGTHS_Q), heads, max(LENGTHS_Q), max(LENGTHS_K)))
    bias[bias > 2] = -np.inf
    args = (starts(LENGTHS_Q), starts(LENGTHS_K))
    out = varlen_attention(q, k, v, *args, attn_bias=bias)
    shared = varlen_attention(q, k, v, *args, attn_bias=bias[3])
    for i, (own, a, b, c) in enumerate(each(q, k, v)):
        for result, whole in ((out, bias[i]), (shared, bias[3])):
            here = whole[:, : a.shape[1], : b.shape[1]]
            result = np.ascontiguousarray(result[own].swapaxes(0, 1))
            oracle.assert_close(result, a, b, c, attn_bias=here)
    with pytest.raises(ValueError, match="attn_bias has shape"):
        varlen_attention(q, k, v, *args, attn_bias=bias[..., 1:])


def test_cu_seqlens_q_are_the_default_of_cu_seqlens_k(engine, rng):
    q, k, v = (normal(rng, (30, 2, 8)) for _ in range(3))
    cu = [0, 7, 30]
    np.testing.assert_array_equal(
        varlen_attention(q, k, v, cu, is_causal=True),
        varlen_attention(q, k, v, np.array(cu, np.int32), np.array(cu, "u8"), is_causal=True),
    )


def test_query_offset_and_key_lengths(engine, rng):
    q, k, v = packed(rng)
    lengths = np.array(LENGTHS_K) // 2
    # Past key_lengths: must not be read.
    k[starts(LENGTHS_K)[3] + lengths[3] :][: lengths[3]] = np.nan
    out = varlen_attention(
        q, k, v, starts(LENGTHS_Q), starts(LENGTHS_K), is_causal=True, query_offset=4,
        key_lengths=lengths,
    )  # fmt: skip
    for i, (own, a, b, c) in enumerate(each(q, k, v)):
        oracle.assert_close(
            np.ascontiguousarray(out[own].swapaxes(0, 1)), a, b, c, is_causal=True, query_offset=4,
            key_lengths=int(lengths[i]),
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [[0, 1, 2], [0, 0, 1, 1, 2, 3], [0, 1, 1]], ids=str)
def test_sequences_of_one_key_at_most(engine, rng, dtype, keys):
    """Rows of keys and values may be strided, interleaved, reversed or one and the same."""
    queries = np.arange(0, 30 * len(keys), 30)
    q = normal(rng, (queries[-1], 1, 4), dtype)
    wide = normal(rng, (keys[-1], 1, 14), dtype)
    layouts = {
        "strided": (wide[..., :4], wide[..., 7:11]),
        "interleaved": tuple(normal(rng, (keys[-1], 2, 4), dtype)[:, i : i + 1] for i in (0, 1)),
        "reversed": (wide[::-1, :, :4], wide[::-1, :, 4:8]),
        "one row": (np.broadcast_to(wide[:1, :, :4], (keys[-1], 1, 4)),) * 2,
    }
    for name, (k, v) in layouts.items():
        out = varlen_attention(q, k, v, queries, keys)
        for i in range(len(keys) - 1):
            here, there = out[queries[i] : queries[i + 1]], v[keys[i] : keys[i + 1]]
            expected = np.broadcast_to(there if len(there) else np.zeros(4, dtype), here.shape)
            np.testing.assert_array_equal(here, expected, name)


def test_out_may_be_query(engine, rng):
    q, k, v = (normal(rng, (50, 2, 8)) for _ in range(3))
    expected = varlen_attention(q, k, v, [0, 20, 50], is_causal=True)
    assert varlen_attention(q, k, v, [0, 20, 50], is_causal=True, out=q) is q
    np.testing.assert_array_equal(q, expected)
    big = np.zeros((50, 4, 8), np.float32)
    varlen_attention(k, k, v, [0, 20, 50], out=big[:, ::2])
    np.testing.assert_array_equal(big[:, ::2], varlen_attention(k, k, v, [0, 20, 50]))
    assert not big[:, 1::2].any()
    v_before = v.copy()
    expected = varlen_attention(k, k, v, [0, 20, 50])
    varlen_attention(k, k, v, [0, 20, 50], out=v)
    np.testing.assert_array_equal(v, expected)
    assert (v != v_before).any()


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_the_number_of_threads_changes_no_bit(engine, rng, threads):
    q, k, v = packed(rng)
    args = (starts(LENGTHS_Q), starts(LENGTHS_K))
    one = varlen_attention(q, k, v, *args, is_causal=True, num_threads=1)
    np.testing.assert_array_equal(
        varlen_attention(q, k, v, *args, is_causal=True, num_threads=threads), one
    )


def test_empty_sequences(engine):
    empty = np.ones((0, 2, 8), np.float32)
    assert varlen_attention(empty, empty, empty, [0]).shape == (0, 2, 8)
    assert varlen_attention(empty, empty, empty, [0, 0, 0]).shape == (0, 2, 8)
    one = np.ones((1, 2, 8), np.float32)
    out, lse = varlen_attention(one, empty, empty, [0, 1], [0, 0], return_lse=True)
    assert not out.any()
    assert (lse == -np.inf).all()


def test_bfloat16_as_bit_patterns(engine, rng):
    q, k, v = (normal(rng, (40, 2, 16), ml_dtypes.bfloat16) for _ in range(3))
    bits = varlen_attention(*(x.view(np.uint16) for x in (q, k, v)), [0, 9, 40], dtype="bfloat16")
    np.testing.assert_array_equal(
        bits, varlen_attention(q, k, v, [0, 9, 40]).view(np.uint16)
    )  # fmt: skip


X = np.ones((10, 2, 8), np.float32)
REFUSED: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (ValueError, r"query has shape \(2, 8\)", {"query": X[0]}),
    (ValueError, "value has length 9 on axis -2", {"value": X[:9]}),
    (TypeError, "float64, float32 and float32", {"query": X.astype(float)}),
    (ValueError, "cu_seqlens_q goes from 0 to 9: it must rise from 0", {"cu_seqlens_q": [0, 9]}),
    (ValueError, "cu_seqlens_q goes from 1 to 10", {"cu_seqlens_q": [1, 10]}),
    (ValueError, "cu_seqlens_q goes from 0 to 10, but falls from 6 to 4",
     {"cu_seqlens_q": [0, 6, 4, 10]}),
    (ValueError, "cu_seqlens_q holds -2: it must rise from 0 to the length of query on axis 0, 10",
     {"cu_seqlens_q": np.array([0, 2**63 - 1, -2, 10])}),
    (ValueError, "cu_seqlens_q holds 18446744073709551615",
     {"cu_seqlens_q": np.array([0, 2**64 - 1, 10], np.uint64)}),
    (ValueError, "cu_seqlens_q holds 9223372036854775808", {"cu_seqlens_q": [0, 2**63, -2, 10]}),
    (ValueError, "cu_seqlens_q holds 9223372036854775808", {"cu_seqlens_q": [0, 2**63, 10]}),
    (ValueError, "cu_seqlens_k holds 1180591620717411303424",
     {"cu_seqlens_k": [0, 2**70, 10]}),
    (ValueError, r"cu_seqlens_q is \[0, \[10\]\]: its rows", {"cu_seqlens_q": [0, [10]]}),
    (ValueError, "dtype is an array of float32", {"dtype": X}),
    (TypeError, "dtype='bfloat16' says", {"query": X.astype("u2")}),
    (ValueError, "scale is 1000", {"scale": 10**400}),
    (TypeError, "cu_seqlens_q must be ints .* float64", {"cu_seqlens_q": [0.0, 10.0]}),
    (TypeError, r"cu_seqlens_q must be ints .*, not of shape \(\)", {"cu_seqlens_q": 10}),
    (ValueError, "cu_seqlens_k has 2", {"cu_seqlens_q": [0, 5, 10], "cu_seqlens_k": [0, 10]}),
    (ValueError, "without cu_seqlens_k", {"key": X[:5], "value": X[:5]}),
    (ValueError, "holds 11", {"key_lengths": 11}),
    (ValueError, "holds 6 for sequence 0, which has 5", {"cu_seqlens_q": [0, 5, 10],
                                                        "cu_seqlens_k": [0, 5, 10],
                                                        "key_lengths": [6, 5]}),
    (ValueError, "out has shape", {"out": X[:5].copy()}),
    (ValueError, "enable_gqa=True", {"key": X[:, :1], "value": X[:, :1], "enable_gqa": False}),
    (ValueError, "sinks has shape", {"sinks": [1.0]}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "wrong"), REFUSED)
def test_refusals(error, message, wrong):
    options: dict[str, Any] = {"query": X, "key": X, "value": X, "cu_seqlens_q": [0, 10]}
    if message == "holds 11":
        options["cu_seqlens_k"] = [0, 10]
    if "holds 6" in message:
        wrong = wrong | {"key_lengths": [6, 4]}
        options["key"] = options["value"] = np.ones((11, 2, 8), np.float32)
        wrong = wrong | {"cu_seqlens_k": [0, 5, 11]}
    with pytest.raises(error, match=message):
        varlen_attention(**(options | wrong))


def test_uneven_lengths_are_balanced(native, rng):
    """One long sequence among short ones: tasks have a bounded size, so both threads get some."""
    from qkv_fast.bench.probes import busy_seconds

    lengths = [1024, *[16] * 31]
    cu = np.concatenate([[0], np.cumsum(lengths)])
    q, k, v = (normal(rng, (cu[-1], 2, 32)) for _ in range(3))
    with qkv_fast.backend("native"):
        result, busy = busy_seconds(q, k, v, cu, threads=2)
        expected = varlen_attention(q, k, v, cu, is_causal=True)
    assert busy.sum() > 0
    np.testing.assert_array_equal(result, expected)
