"""ONNX's operator Attention for ``onnx.reference.ReferenceEvaluator``, computed by this library.

This is the only module that imports the package onnx, which must be installed for it.
"""

# mypy: allow-subclassing-any

from __future__ import annotations

from typing import Any

import numpy as np

try:
    from onnx import TensorProto
    from onnx.reference.op_run import OpRun
except ImportError as error:
    raise ImportError('onnx is missing: pip install "qkv-fast[onnx]"') from error

import qkv_fast

from .._dtypes import Array

__all__ = ["Attention"]

_INPUTS = 7  # Q, K, V, attn_mask, past_key, past_value, nonpad_kv_seqlen
_STAGES = ("scaled", "softcapped", "masked", "softmax")  # by qk_matmul_output_mode


class Attention(OpRun):
    """Run ONNX's operator Attention, opsets 23 to 25, with the functions of this library.

    Hand the class to the evaluator: ``ReferenceEvaluator(model, new_ops=[Attention])``. All
    inputs, outputs and attributes of the operator are taken: 3-D and 4-D tensors, grouped heads,
    float16, bfloat16, float32 and float64, boolean and additive masks, `past_key` and
    `past_value`, `nonpad_kv_seqlen`, the local window, and the four modes of `qk_matmul_output`,
    which is computed only for nodes that have this output.

    Raises
    ------
    ImportError
        When the module is imported and onnx is not installed.
    TypeError, ValueError
        When a node runs, as `qkv_fast.scaled_dot_product_attention` does. The evaluator wraps a
        TypeError in one of its own.

    Notes
    -----
    Y is ``softmax(mask(softcap(Q @ K.T * scale))) @ V``. For causal attention and windows, query i
    stands at key ``i + past length``, ``i + nonpad_kv_seqlen - Lq`` or ``i``, by what the node is
    given. The source is the operator's schema: ``onnx.defs.get_schema("Attention",
    max_inclusive_version=opset).doc``. Rows that see no key are zero in Y and in mode 3.

    A mask with fewer keys than K excludes the keys that it lacks. If it has one key only, that rule
    holds from opset 24 on; in opset 23 the mask broadcasts.

    Results differ from those of onnx's own NumPy code in these points:

    - Intermediate values are float32, or float64 where an input is float64 or `softmax_precision`
      asks for it. onnx rounds them to the type of Q, which loses digits of float16 and bfloat16.
    - `scale` multiplies Q @ K.T and may be negative. onnx multiplies Q and K by its square root,
      rounded to the type of Q; a negative scale gives NaN.
    - NaN and infinity in keys and values that a row must not see have no influence on the row's Y,
      nor on `qk_matmul_output` in the modes 2 and 3.
    - `qk_matmul_output` in mode 0 is Q @ K.T * scale, as the schema and the operator's expansion
      into a function have it. onnx's NumPy code applies the softcap to it.
    - A negative softcap raises, and so does a `nonpad_kv_seqlen` that exceeds the keys.
    - 4-D inputs may come with `q_num_heads` and `kv_num_heads` in opset 25 too, if they are right.

    Examples
    --------
    >>> import numpy as np
    >>> from onnx import TensorProto, helper
    >>> from onnx.reference import ReferenceEvaluator
    >>> from qkv_fast.integrations.onnx import Attention
    >>> node = helper.make_node(
    ...     "Attention", ["q", "k", "v"], ["y"], is_causal=1, q_num_heads=2, kv_num_heads=1)
    >>> given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "qkv"]
    >>> result = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    >>> graph = helper.make_graph([node], "attention", given, result)
    >>> model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    >>> evaluator = ReferenceEvaluator(model, new_ops=[Attention])
    >>> q = np.ones((1, 3, 8), np.float32)  # batch, length, 2 heads of 4
    >>> k = np.ones((1, 3, 4), np.float32)  # one head, which both query heads read
    >>> v = np.array([[[0.0], [2.0], [4.0]]], np.float32)
    >>> (y,) = evaluator.run(None, {"q": q, "k": k, "v": v})
    >>> y.round(6).tolist()
    [[[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]]
    """

    op_domain = ""

    def _run(
        self,
        *inputs: Any,
        scale: Any = None,
        is_causal: int = 0,
        q_num_heads: int | None = None,
        kv_num_heads: int | None = None,
        softmax_precision: int | None = None,
        softcap: Any = 0.0,
        qk_matmul_output_mode: int = 0,
        left_window_size: int = -1,
        right_window_size: int = -1,
    ) -> tuple[Array, ...]:
        """Return the node's outputs, as many as it has; attributes are those of the operator."""
        # An omitted input is None or missing. But the evaluator hands over an array if an earlier
        # node left out an output, since it stores results by name and both names are "".
        named = zip(inputs, self.onnx_node.input, strict=True)
        given: list[Any] = [array if name else None for array, name in named]
        given += [None] * (_INPUTS - len(given))
        query, key, value, attn_mask, past_key, past_value, nonpad_kv_seqlen = given
        output_count = len(self.onnx_node.output)
        if qk_matmul_output_mode not in range(len(_STAGES)):
            raise ValueError(
                f"qk_matmul_output_mode is {qk_matmul_output_mode}: it must be 0, 1, 2 or 3"
            )

        shape, dtype = query.shape, query.dtype
        if not query.ndim == key.ndim == value.ndim:
            raise ValueError(
                f"Q, K and V have {query.ndim}, {key.ndim} and {value.ndim} axes: all must be 3-D "
                "or all 4-D"
            )
        query = _split_heads("Q", query, "q_num_heads", q_num_heads)
        key = _split_heads("K", key, "kv_num_heads", kv_num_heads)
        value = _split_heads("V", value, "kv_num_heads", kv_num_heads)

        if (past_key is None) != (past_value is None):
            raise ValueError("past_key and past_value must both be given or both be omitted")
        query_offset: Any = 0
        if past_key is not None:
            if nonpad_kv_seqlen is not None:
                raise ValueError("nonpad_kv_seqlen and past_key are given: only one of them may be")
            query_offset = past_key.shape[2]
            key = np.concatenate((past_key, key), axis=2)
            value = np.concatenate((past_value, value), axis=2)
        elif nonpad_kv_seqlen is not None:
            _check_lengths(nonpad_kv_seqlen, key)
            query_offset = nonpad_kv_seqlen - query.shape[2]
        if attn_mask is not None:
            one_key_broadcasts = self.run_params["opsets"][""] < 24
            attn_mask = _whole_mask(attn_mask, key.shape[2], one_key_broadcasts)

        options: dict[str, Any] = {
            "attn_mask": attn_mask,
            "is_causal": bool(is_causal),
            "scale": None if scale is None else float(scale),
            "enable_gqa": True,
            "query_offset": query_offset,
            "window": (_bound(left_window_size), _bound(right_window_size)),
            "softcap": float(softcap),
            "key_lengths": nonpad_kv_seqlen,
        }
        real = _common_dtype((query, key, value), softmax_precision)
        q, k, v = (array.astype(real, copy=False) for array in (query, key, value))
        with np.errstate(over="ignore"):  # what exceeds a narrower type of Q becomes infinite
            y = qkv_fast.scaled_dot_product_attention(q, k, v, **options).astype(dtype, copy=False)
            if len(shape) == 3:
                y = y.swapaxes(1, 2).reshape(*shape[:2], y.shape[1] * y.shape[3])
            results = [y, key, value]
            if output_count == 4:
                options["stage"] = _STAGES[qk_matmul_output_mode]
                if qk_matmul_output_mode < 2:  # the products of all keys, valid or not
                    options["key_lengths"] = None
                scores = qkv_fast.attention_weights(q, k, **options)
                results.append(scores.astype(dtype, copy=False))
        return tuple(results[:output_count])


def _split_heads(name: str, array: Array, attribute: str, num_heads: int | None) -> Array:
    """Return (batch, length, heads * size) or (batch, heads, length, size) as the latter."""
    if array.ndim == 4:
        if num_heads not in (None, array.shape[1]):
            raise ValueError(
                f"{attribute} is {num_heads}, but {name} has shape {array.shape}: 4-D tensors hold "
                "their heads on axis 1"
            )
        return array
    if array.ndim != 3:
        raise ValueError(f"{name} has shape {array.shape}: it must be 3-D or 4-D")
    batch, length, size = array.shape
    if num_heads is None or num_heads < 1 or size % num_heads:
        raise ValueError(
            f"{attribute} is {num_heads}, but {name} has shape {array.shape}: a 3-D tensor needs "
            "a number of heads that divides its last axis"
        )
    return array.reshape(batch, length, num_heads, size // num_heads).swapaxes(1, 2)


def _check_lengths(nonpad_kv_seqlen: Array, key: Array) -> None:
    """Raise unless each batch entry has a number of keys that K can hold."""
    batch, _, kv_len, _ = key.shape
    if nonpad_kv_seqlen.shape != (batch,):
        raise ValueError(
            f"nonpad_kv_seqlen has shape {nonpad_kv_seqlen.shape}: one length for each batch entry "
            f"is needed, ({batch},)"
        )
    wrong = nonpad_kv_seqlen[(nonpad_kv_seqlen < 0) | (nonpad_kv_seqlen > kv_len)]
    if len(wrong):
        raise ValueError(f"nonpad_kv_seqlen holds {wrong[0]}, but K has {kv_len} keys")


def _common_dtype(arrays: tuple[Array, ...], softmax_precision: int | None) -> np.dtype[Any]:
    """Return the dtype to compute in: that of all arrays, or a wider one where they differ."""
    dtypes: set[np.dtype[Any]] = {array.dtype for array in arrays}
    if softmax_precision == TensorProto.DOUBLE or np.dtype(np.float64) in dtypes:
        return np.dtype(np.float64)
    return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)


def _whole_mask(attn_mask: Array, kv_len: int, one_key_broadcasts: bool) -> Array:
    """Return a boolean or floating mask that has all keys, or one that broadcasts to them."""
    if attn_mask.dtype.kind in "iu":  # the schema allows integers, which are added
        attn_mask = attn_mask.astype(np.float64)
    given = attn_mask.shape[-1] if attn_mask.ndim else kv_len
    if given >= kv_len or (given == 1 and one_key_broadcasts):
        return attn_mask
    excluded = False if attn_mask.dtype == np.bool_ else -np.inf
    missing = [(0, 0)] * (attn_mask.ndim - 1) + [(0, kv_len - given)]
    return np.pad(attn_mask, missing, constant_values=excluded)


def _bound(window_size: int) -> int | None:
    """Return a side of the window as this library has it: None, not -1, is no bound."""
    return None if window_size == -1 else window_size
