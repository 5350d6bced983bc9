"""The weights of attention layers: which model family names which how, and what must fit.

Every family keeps the same matrices, (features, inputs), which are applied as x Wᵀ + b; GPT-2
stores them transposed. `read` finds the family by its names and returns the parts under this
library's names; `named` goes the other way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ._dtypes import BFLOAT16, CODES, SWAPPED, Array, code_of, dtype_name, rounded
from ._problem.arguments import as_array, shown


class Family(NamedTuple):
    """How a model family names query, key, value and output; "" for query: they are fused."""

    query: str
    key: str
    value: str
    output: str
    fused: str = ""
    transposed: bool = False


# The first family whose query (or fused) weight is found is taken. torch's separate weights have no
# ".weight" behind their name.
FAMILIES = {
    "gpt2": Family("", "", "", "c_proj", fused="c_attn", transposed=True),
    "bert": Family("self.query", "self.key", "self.value", "output.dense"),
    "llama": Family("q_proj", "k_proj", "v_proj", "o_proj"),
    "bart": Family("q_proj", "k_proj", "v_proj", "out_proj"),
    "vit": Family("attention.query", "attention.key", "attention.value", "output.dense"),
    "distilbert": Family("q_lin", "k_lin", "v_lin", "out_lin"),
}
TORCH = "torch"


class Parts(NamedTuple):
    """The matrices of a layer; `fused` holds query's, key's and value's rows one after another."""

    fused: Array | None
    query: Array | None
    key: Array | None
    value: Array | None
    bias: Array | None  # of all three, one after another
    output: Array
    output_bias: Array | None
    query_norm: Array | None
    key_norm: Array | None


def read(state: Mapping[str, Any], prefix: str) -> Parts:
    """Return the weights that a state dict has under a prefix, or raise."""
    if prefix and not prefix.endswith("."):
        prefix += "."

    def find(name: str) -> Array | None:
        return as_array(prefix + name, state[prefix + name]) if prefix + name in state else None

    for name in ("bias_k", "bias_v"):
        if prefix + name in state:
            raise ValueError(f"the state has {prefix}{name}: layers with add_bias_kv aren't known")
    norms = find("q_norm.weight"), find("k_norm.weight")
    if prefix + "in_proj_weight" in state or prefix + "q_proj_weight" in state:
        query, key, value = (find(f"{part}_proj_weight") for part in ("q", "k", "v"))
        output = _needed(find("out_proj.weight"), prefix, "out_proj.weight")
        return Parts(find("in_proj_weight"), query, key, value, find("in_proj_bias"), output,
                     find("out_proj.bias"), *norms)  # fmt: skip
    for family in FAMILIES.values():
        first = family.fused or family.query
        if prefix + f"{first}.weight" in state and prefix + f"{family.output}.weight" in state:
            return _read_family(find, prefix, family, norms)
    known = ["in_proj_weight", *(f"{f.fused or f.query}.weight" for f in FAMILIES.values())]
    there = sorted(name for name in state if name.startswith(prefix))[:6] or sorted(state)[:6]
    raise ValueError(
        f"the state has none of {', '.join(known)} (beside its output projection) under "
        f"the prefix {prefix!r}; it has {', '.join(there) or 'nothing'}"
    )


def _needed(array: Array | None, prefix: str, name: str) -> Array:
    if array is None:
        raise ValueError(f"the state has no {prefix}{name}")
    return array


def _read_family(
    find: Callable[[str], Array | None], prefix: str, family: Family, norms: tuple[Any, Any]
) -> Parts:
    def matrix(name: str) -> Array:
        array = _needed(find(f"{name}.weight"), prefix, f"{name}.weight")
        return np.ascontiguousarray(array.T) if family.transposed else array

    output, output_bias = matrix(family.output), find(f"{family.output}.bias")
    if family.fused:
        return Parts(matrix(family.fused), None, None, None, find(f"{family.fused}.bias"), output,
                     output_bias, *norms)  # fmt: skip
    names = (family.query, family.key, family.value)
    weights = [matrix(name) for name in names]
    biases = [find(f"{name}.bias") for name in names]
    bias = None
    if any(b is not None for b in biases):  # Whisper's keys have none
        bias = np.concatenate([
            np.zeros(len(w), w.dtype) if b is None else b
            for b, w in zip(biases, weights, strict=True)
        ])  # fmt: skip
    query, key, value = weights
    return Parts(None, query, key, value, bias, output, output_bias, *norms)


def named(parts: Parts, rows: tuple[int, int, int], layout: str, prefix: str) -> dict[str, Array]:
    """Return a state dict of the layout "torch" or of a family; `rows` are of each part."""
    if layout != TORCH and layout not in FAMILIES:
        raise ValueError(f"layout is {layout!r}: it must be one of {', '.join([TORCH, *FAMILIES])}")
    if prefix and not prefix.endswith("."):
        prefix += "."
    state: dict[str, Array | None] = {}
    bounds = np.cumsum(rows)[:-1]
    if layout == TORCH:
        if parts.fused is not None:
            state["in_proj_weight"] = parts.fused
        else:
            state |= {"q_proj_weight": parts.query, "k_proj_weight": parts.key,
                      "v_proj_weight": parts.value}  # fmt: skip
        state |= {"in_proj_bias": parts.bias, "out_proj.weight": parts.output,
                  "out_proj.bias": parts.output_bias}  # fmt: skip
    else:
        family = FAMILIES[layout]
        if family.fused:
            if parts.fused is None:
                raise ValueError(f"layout {layout!r} has one matrix, but kdim or vdim differ here")
            state = {f"{family.fused}.weight": parts.fused.T, f"{family.fused}.bias": parts.bias,
                     f"{family.output}.weight": parts.output.T}  # fmt: skip
        else:
            split = (np.split(parts.fused, bounds) if parts.fused is not None
                     else [parts.query, parts.key, parts.value])  # fmt: skip
            biases = [None] * 3 if parts.bias is None else np.split(parts.bias, bounds)
            for name, weight, bias in zip(family[:3], split, biases, strict=True):
                state |= {f"{name}.weight": weight, f"{name}.bias": bias}
            state[f"{family.output}.weight"] = parts.output
        state[f"{family.output}.bias"] = parts.output_bias
    state |= {"q_norm.weight": parts.query_norm, "k_norm.weight": parts.key_norm}
    return {prefix + name: array for name, array in state.items() if array is not None}


# --- What must fit --------------------------------------------------------------------------------


def weight_code(dtype: Any) -> int:
    """Return the code of the weights' element type, or raise."""
    name = dtype_name(dtype)
    if name in CODES and name != "int8":
        return CODES[name]
    raise (ValueError if name else TypeError)(
        f"dtype is {shown(dtype)}: it must be one of float32, float64, float16, bfloat16"
    )


def rounded_weight(array: Array, code: int) -> Array:
    """Return a weight in an element type."""
    return rounded("weight", array, code)[0]


def row_counts(num_heads: int, num_kv_heads: int, head_dim: int) -> tuple[int, int, int]:
    """Return the rows of the matrices of queries, keys and values."""
    return num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim


def checked(parts: Parts, num_heads: int) -> tuple[Parts, int, int]:
    """Return weights that fit each other, as kernels read them, and the numbers of heads."""
    code = code_of(parts.output.dtype, uint16_is_bf16=True)
    if code < 0:
        raise TypeError(f"the output's weight has dtype {parts.output.dtype}: it must be floating")
    for name, array in parts._asdict().items():
        axes = 1 if "bias" in name or "norm" in name else 2
        if array is not None and array.ndim != axes:
            raise ValueError(f"{name} has shape {array.shape}: it must have {axes} axes")
    width = parts.output.shape[1]
    if width % num_heads:
        raise ValueError(
            f"num_heads is {num_heads}: the output's weight has {width} columns, no multiple of it"
        )
    head_dim = width // num_heads
    query, key, value = parts.query, parts.key, parts.value
    if parts.fused is not None:
        kv_rows = (len(parts.fused) - width) // 2
    elif query is None or key is None or value is None:
        raise ValueError("the state lacks one of the weights of query, key and value")
    else:
        kv_rows = len(key)
    num_kv_heads = max(0, kv_rows // head_dim) if head_dim else 0
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads is {num_heads}: there are {num_kv_heads} key heads of size {head_dim}, "
            "which must divide it"
        )
    _check_shapes(parts, row_counts(num_heads, num_kv_heads, head_dim), head_dim)
    if query is not None and key is not None and value is not None and (
        query.shape[1] == key.shape[1] == value.shape[1]
    ):  # fmt: skip
        parts = parts._replace(
            fused=np.concatenate([query, key, value]), query=None, key=None, value=None
        )
    code &= ~SWAPPED
    weights: dict[str, Any] = {
        name: None if array is None else readable(array, code)
        for name, array in parts._asdict().items()
    }
    return parts._replace(**weights), num_heads, num_kv_heads


def _check_shapes(parts: Parts, rows: tuple[int, int, int], head_dim: int) -> None:
    """Check the rows of all weights, and that token vectors come in as large as they go out."""
    embed_dim = len(parts.output)
    expected = {"fused": sum(rows), "query": rows[0], "key": rows[1], "value": rows[2],
                "bias": sum(rows), "output_bias": embed_dim, "query_norm": head_dim,
                "key_norm": head_dim}  # fmt: skip
    for name, array in parts._asdict().items():
        if array is not None and name in expected and len(array) != expected[name]:
            raise ValueError(
                f"{name} has shape {array.shape}: with heads of size {head_dim}, {rows[0]} rows of "
                f"queries and {rows[1]} of keys, it must have {expected[name]} rows"
            )
    for name in ("fused", "query"):
        array = getattr(parts, name)
        if array is not None and array.shape[1] != embed_dim:
            raise ValueError(
                f"{name} has shape {array.shape}: it must have {embed_dim} columns, as many as the "
                "output's weight has rows"
            )


def readable(array: Array, code: int) -> Array:
    """Return a weight of the element type, with rows that kernels can read."""
    if code_of(array.dtype, uint16_is_bf16=True) != code:
        array = rounded_weight(array, code)
    elif code == BFLOAT16:
        array = array.view(np.uint16)
    in_rows = array.flags.aligned and array.strides[-1] == array.itemsize
    return array if in_rows else np.ascontiguousarray(array)
