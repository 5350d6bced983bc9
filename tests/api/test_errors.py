"""Refused arguments: all engines raise the same message, before any work."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import qkv_fast
from qkv_fast import scaled_dot_product_attention as sdpa

Q = np.ones((2, 4, 5, 8), np.float32)
KV = np.ones((2, 4, 7, 8), np.float32)
OUT = np.full((2, 4, 5, 8), 77, np.float32)


def read_only() -> np.ndarray:
    out = OUT.copy()
    out.flags.writeable = False
    return out


REFUSED: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "float32, float64 and float32", {"key": KV.astype(float)}),
    (TypeError, "int64, float32 and float32", {"query": Q.astype(int)}),
    (TypeError, "complex64, float32 and float32", {"query": Q.astype("c8")}),
    (TypeError, "object, float32 and float32", {"query": Q.astype(object)}),
    (TypeError, "longdouble|float128", {"query": Q.astype("g")}),
    (TypeError, "query is a MaskedArray", {"query": np.ma.array(Q)}),
    (TypeError, "value is a list: pass a NumPy array", {"value": KV.tolist()}),
    (TypeError, "key is a NoneType", {"key": None}),
    (ValueError, r"query has shape \(8,\)", {"query": Q[0, 0, 0]}),
    (ValueError, "key has length 6 on axis -1, but query has 8", {"key": KV[..., :6]}),
    (ValueError, "query has length 0 on axis -1", {"query": Q[..., :0], "key": KV[..., :0]}),
    (ValueError, "value has length 3 on axis -2, but key has 7", {"value": KV[:, :, :3]}),
    (ValueError, "value has length 2 on axis -3, but key has 4", {"value": KV[:, :2]}),
    (ValueError, "enable_gqa=True", {"key": KV[:, :2], "value": KV[:, :2]}),
    (ValueError, "multiple", {"key": KV[:, :3], "value": KV[:, :3], "enable_gqa": True}),
    (ValueError, "batch axes", {"key": KV[:1].repeat(3, 0), "value": KV[:1].repeat(3, 0)}),
    (ValueError, r"attn_mask has shape \(6, 7\)", {"attn_mask": np.ones((6, 7), bool)}),
    (ValueError, "attn_mask has shape", {"attn_mask": np.ones((1, 2, 4, 5, 7), bool)}),
    (TypeError, "attn_mask has dtype int64", {"attn_mask": np.ones((5, 7), int)}),
    (TypeError, "must be uint16 arrays of its bit patterns", {"dtype": "bfloat16"}),
    (TypeError, "uint16, float32 and float32", {"query": Q.astype("u2")}),
    (ValueError, "dtype is 'float32': it must be 'bfloat16'", {"dtype": "float32"}),
    (ValueError, "dtype is 3: it must be 'bfloat16'", {"dtype": 3}),
    (ValueError, "dtype is an array of float32 of shape", {"dtype": Q}),
    (
        TypeError,
        "uint16, uint16 and uint16.*; dtype='bfloat16' says",
        {"query": Q.astype("u2"), "key": KV.astype("u2"), "value": KV.astype("u2")},
    ),
    (
        TypeError,
        "attn_mask has dtype uint16.*dtype='bfloat16' says",
        {"attn_mask": np.ones((5, 7), "u2")},
    ),
    (
        ValueError,
        r"attn_mask has shape \(2, 7\).*as mask\[:, None, None\]$",
        {"attn_mask": np.ones((2, 7), bool)},
    ),
    (
        ValueError,
        r"attn_mask has shape \(3, 7\).* = \(2, 4, 5, 7\)$",
        {"attn_mask": np.ones((3, 7), bool)},
    ),
    (ValueError, r"scale is 1000+\.\.\.: it must not exceed", {"scale": 10**400}),
    (ValueError, "scale is an int too large to print", {"scale": 10**5000}),
    (ValueError, "softcap is 1000", {"softcap": 10**400}),
    (ValueError, "dropout_p is 1000", {"dropout_p": 10**400}),
    (ValueError, "inference", {"dropout_p": 0.1}),
    (TypeError, "dropout_p must be a real number", {"dropout_p": None}),
    (TypeError, "is_causal must be a bool, not str", {"is_causal": "no"}),
    (TypeError, "enable_gqa must be a bool, not int", {"enable_gqa": 1}),
    (TypeError, "return_lse must be a bool, not ndarray", {"return_lse": np.ones(2, bool)}),
    (TypeError, "sinks is a MaskedArray", {"sinks": np.ma.array([1.0] * 4)}),
    (TypeError, "key_lengths is a MaskedArray", {"key_lengths": np.ma.array([1, 2])}),
    (ValueError, "alibi_slopes .* rows differ in length", {"alibi_slopes": [[1.0], [1.0, 2.0]]}),
    (ValueError, "query_offset holds 1180591620717411303424", {"query_offset": 2**70}),
    (ValueError, "query_offset holds 9223372036854775808", {"query_offset": [2**63, -1]}),
    (ValueError, "query_offset holds an int too large", {"query_offset": [10**5000, 0]}),
    (ValueError, r"query_offset is \[\[1\], \[1, 2\]\]: its rows", {"query_offset": [[1], [1, 2]]}),
    (ValueError, r"key_lengths is \[1, \[2\]\]: its rows differ", {"key_lengths": [1, [2]]}),
    (TypeError, "scale must be a real number, not str", {"scale": "1"}),
    (TypeError, "scale must be a real number, not complex", {"scale": 1j}),
    (TypeError, "query_offset must be an int, or ints", {"query_offset": 1.5}),
    (TypeError, "query_offset must be an int, or ints", {"query_offset": True}),
    (ValueError, "query_offset holds", {"query_offset": 2**62}),
    (ValueError, r"query_offset has shape \(3,\)", {"query_offset": [1, 2, 3]}),
    (TypeError, "window is 3", {"window": 3}),
    (TypeError, "window's left side is 'a': it must be an int or None", {"window": "ab"}),
    (TypeError, "window is 'abc'", {"window": "abc"}),
    (TypeError, "window's left side", {"window": (1.5, 0)}),
    (ValueError, "flash-attn writes as -1", {"window": (-1, -1)}),
    (ValueError, "softcap", {"softcap": -1.0}),
    (ValueError, "softcap", {"softcap": np.inf}),
    (ValueError, "softcap", {"softcap": np.nan}),
    (ValueError, r"alibi_slopes has shape \(3,\)", {"alibi_slopes": [1.0, 2.0, 3.0]}),
    (TypeError, "alibi_slopes has dtype complex", {"alibi_slopes": [1j] * 4}),
    (
        TypeError,
        "attn_bias has dtype bool: .*; a boolean mask is an attn_mask$",
        {"attn_bias": np.ones((5, 7), bool)},
    ),
    (TypeError, "attn_bias has dtype int64: it must be float32", {"attn_bias": np.ones(7, int)}),
    (TypeError, "attn_bias has dtype uint16.* says", {"attn_bias": np.ones(7, "u2")}),
    (TypeError, "attn_bias is a list: pass a NumPy array", {"attn_bias": [0.0] * 7}),
    (TypeError, "attn_bias is a MaskedArray", {"attn_bias": np.ma.zeros(7)}),
    (
        ValueError,
        r"attn_bias has shape \(6, 7\).* = \(2, 4, 5, 7\)$",
        {"attn_bias": np.ones((6, 7))},
    ),
    (ValueError, "attn_bias has shape", {"attn_bias": np.ones((1, 2, 4, 5, 7))}),
    (ValueError, r"sinks has shape \(2,\)", {"sinks": [1.0, 2.0]}),
    (TypeError, "sinks has dtype", {"sinks": ["a"] * 4}),
    (
        ValueError,
        r"sinks has shape \(\): one logit for each of 1 query",
        {"query": Q[:, :1], "key": KV[:, :1], "value": KV[:, :1], "sinks": 1.0, "out": OUT[:, :1]},
    ),
    (ValueError, "key_lengths holds 8: it must be between 0 and 7", {"key_lengths": 8}),
    (ValueError, "key_lengths holds -1", {"key_lengths": [3, -1]}),
    (TypeError, "key_lengths must be an int, or ints", {"key_lengths": [1.0, 2.0]}),
    (ValueError, "key_lengths holds", {"key_lengths": np.array([2**64 - 1, 1], np.uint64)}),
    (TypeError, "num_threads is 1.0: it must be an int of at", {"num_threads": 1.0}),
    (TypeError, "num_threads is True: it must be an int of at", {"num_threads": True}),
    (ValueError, "num_threads is 0", {"num_threads": 0}),
    (TypeError, "out must be a NumPy array", {"out": OUT.tolist()}),
    (ValueError, r"out has shape \(2, 4, 5, 7\)", {"out": OUT[..., :7].copy()}),
    (TypeError, "out has dtype float64", {"out": OUT.astype(float)}),
    (ValueError, "out is read-only", {"out": read_only()}),
]


@pytest.mark.parametrize(("error", "message", "arguments"), REFUSED)
def test_refusals(engine, error, message, arguments):
    out = arguments.get("out", OUT.copy())
    given = {"query": Q, "key": KV, "value": KV, "out": out} | arguments
    before = np.array(out)
    with pytest.raises(error, match=message):
        sdpa(**given)
    np.testing.assert_array_equal(out, before)


class Broken:
    """An array of another library, whose export raises `error`."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __dlpack__(self, **options: Any) -> Any:
        raise self.error

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


@pytest.mark.parametrize("error", [AttributeError("no"), OSError("no"), KeyError("no")])
def test_a_failing_export_is_reported_with_the_argument(error):
    for name in ("query", "key", "value", "attn_mask", "attn_bias"):
        with pytest.raises(TypeError, match=f"{name} is a Broken that NumPy can't view") as caught:
            sdpa(**({"query": Q, "key": KV, "value": KV} | {name: Broken(error)}))
        assert caught.value.__cause__ is error


def test_a_window_has_no_largest_width(engine):
    np.testing.assert_array_equal(sdpa(Q, KV, KV, window=(2**70, 2**70)), sdpa(Q, KV, KV))


def test_unknown_backends_tiles_and_isas_are_refused():
    for arguments in ({"backend": "cuda"}, {"tiles": "neon"}, {"isa": "sse9"}):
        with pytest.raises(ValueError, match="must be one of"), qkv_fast.backend(**arguments):
            pass


def test_sizes_beyond_memory_raise_memory_error(native):
    huge = np.broadcast_to(np.float32(1), (1, 1, 1, 1 << 41))
    with pytest.raises(MemoryError), qkv_fast.backend("native"):
        sdpa(huge, huge, np.ones((1, 1, 1, 1), np.float32))
