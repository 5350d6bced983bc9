"""Attention of JAX arrays on CPUs, under ``jax.jit``, ``jax.vmap`` and ``jax.lax.scan`` too.

    dot_product_attention(query, key, value, is_causal=True)          jax.nn's function
    scaled_dot_product_attention(query, key, value, is_causal=True)   this library's

A call of arrays goes straight to the op. A call of traced values becomes a custom call of XLA (see
_xla_ffi.py), which reads and writes XLA's own buffers. Two forms of the parameters go through this
file: `options`, plain values that a compiled program holds, and `operands`, the arrays by name.
"""

from __future__ import annotations

import functools
import json
import math
import operator
import threading
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

try:
    import jax
except ImportError as error:
    raise ImportError('jax is missing: pip install "qkv-fast[jax]"') from error

import jax.numpy as jnp
import numpy as np

import qkv_fast

from .._dtypes import Array
from .._options import KeyRanges, Window
from .._problem.output import output
from .._problem.problem import Problem
from .._problem.scoring import no_dropout
from .._problem.selection import scores
from . import _xla_ffi

__all__ = ["dot_product_attention", "scaled_dot_product_attention"]

_TARGET = "qkv_fast.attention"  # XLA's messages name it
_ALIGNMENT = 64  # bytes; JAX takes over memory so aligned without a copy
_Tracer = jax.core.Tracer
_ShapeDtype: Any = jax.ShapeDtypeStruct
_ffi: Any = jax.ffi

# The axes that each operand has behind the batch axes.
_OWN_AXES = {"query": 3, "key": 3, "value": 3, "attn_mask": 3, "attn_bias": 3, "query_offset": 0,
             "key_lengths": 0, "alibi_slopes": 1, "sinks": 1, "key_begins": 2,
             "key_ends": 2}  # fmt: skip


def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    query_offset: Any = 0,
    window: Window | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    attn_bias: Any = None,
    key_ranges: KeyRanges | None = None,
    key_lengths: Any = None,
    return_lse: bool = False,
    num_threads: int | None = None,
) -> Any:
    r"""Compute ``softmax(query @ key.mT * scale + bias) @ value`` for every head of JAX arrays.

    The parameters are those of `qkv_fast.scaled_dot_product_attention`, without `out` and `dtype`.
    Heads come before tokens; `dot_product_attention` takes the layout of ``jax.nn``.

    Parameters
    ----------
    query : array, shape (..., Hq, Lq, D)
        float32, float64 (with ``jax_enable_x64``), float16 or bfloat16, on the CPU. Two axes mean
        one head. What is no JAX array becomes one by ``jnp.asarray``, as all arrays here.
    key : array, shape (..., Hkv, Lk, D)
        Of query's dtype. Batch axes (``...``) broadcast, without copies.
    value : array, shape (..., Hkv, Lk, Dv)
        Of query's dtype.
    attn_mask : array, broadcastable to (..., Hq, Lq, Lk), optional
        Boolean: True where the query may attend to the key. Floating: added to the scores.
    dropout_p : float
        Must be 0.0.
    is_causal : bool
        A query attends to the keys up to its own position only.
    scale : float, optional
        Factor of the scores; 1/√D by default.
    enable_gqa : bool
        Allow Hq to be a multiple of Hkv.
    query_offset : int or array of ints, shape broadcastable to (...)
        Query i stands at position ``query_offset + i``, key j at j.
    window : pair (left, right) of int or None, optional
        A query at position p sees keys ``p - left <= j <= p + right``.
    softcap : float, optional
        Positive c: scores become ``c * tanh(score / c)``.
    alibi_slopes : array, shape broadcastable to (..., Hq), optional
        ``-slope * abs(position - j)`` is added to the scores.
    sinks : array, shape (Hq,), optional
        Logits that join the softmax's denominator only.
    attn_bias : array, broadcastable to (..., Hq, Lq, Lk), optional
        Floating: added to the scores, beside an `attn_mask` of either kind.
    key_ranges : pair (begin, end), optional
        Ints or arrays of ints, each of a shape broadcastable to (..., Hq, Lq), or None: a row of
        queries sees keys ``begin <= j < end`` only.
    key_lengths : int or array of ints, shape broadcastable to (...), optional
        Keys from there on are never read.
    return_lse : bool
        Also return the log-sum-exp of the scores.
    num_threads : int, optional
        Threads of this call.

    Returns
    -------
    result : jax.Array, shape (..., Hq, Lq, Dv)
        A new array of query's dtype.
    lse : jax.Array, shape (..., Hq, Lq)
        With `return_lse`: float32, or float64 for float64.

    Raises
    ------
    TypeError, ValueError
        As `qkv_fast.scaled_dot_product_attention` does, while the program is traced where shapes,
        dtypes and plain values are wrong; an array that is not on the CPU; a traced value for a
        parameter that is not called an array above.
    NotImplementedError
        The call is differentiated.
    jax.errors.JaxRuntimeError, ValueError
        A compiled program meets a number that is out of range, such as a key length beyond Lk.
        JAX chooses which.

    Notes
    -----
    Parameters that are called an array above may be traced; the others are fixed when a program is
    traced. ``jax.vmap`` over any of the arrays adds a batch axis to one call. The maths, and what a
    result depends on, are those of `qkv_fast.scaled_dot_product_attention`.

    No gradient is computed: ``jax.nn.dot_product_attention`` has one.

    Examples
    --------
    >>> import jax
    >>> from qkv_fast.integrations.jax import scaled_dot_product_attention
    >>> keys = jax.random.split(jax.random.key(0), 3)
    >>> query, key, value = (jax.random.normal(k, (2, 12, 128, 64)) for k in keys)
    >>> attend = jax.jit(scaled_dot_product_attention, static_argnames="is_causal")
    >>> attend(query, key, value, is_causal=True).shape
    (2, 12, 128, 64)
    """
    if type(dropout_p) is not float or dropout_p:
        no_dropout(dropout_p)
    begins, ends = _pair(key_ranges)
    options = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa, "window": window,
               "softcap": softcap, "return_lse": return_lse,
               "num_threads": num_threads}  # fmt: skip
    operands = {"query": query, "key": key, "value": value, "attn_mask": attn_mask,
                "attn_bias": attn_bias, "query_offset": query_offset, "key_lengths": key_lengths,
                "alibi_slopes": alibi_slopes, "sinks": sinks, "key_begins": begins,
                "key_ends": ends}  # fmt: skip
    return _attend(operands, options)


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Any:
    """Compute attention as ``jax.nn.dot_product_attention`` does, with its parameters.

    Parameters
    ----------
    query : array, shape (B, T, N, H) or (T, N, H)
        float32, float64, float16 or bfloat16, on the CPU.
    key : array, shape (B, S, K, H) or (S, K, H)
        Of query's dtype. N must be a multiple of K: several query heads share a key head.
    value : array, shape (B, S, K, H) or (S, K, H)
        Of query's dtype. Its last axis may have another length, which the result then has.
    bias : array, broadcastable to (B, N, T, S) or (N, T, S), optional
        Floating: added to the scores.
    mask : array, broadcastable to (B, N, T, S) or (N, T, S), optional
        Boolean: True where the query may attend to the key.
    scale : float, optional
        Factor of the scores; 1/√H by default.
    is_causal : bool
        Query i attends to the keys up to i only.
    query_seq_lengths : array of ints, shape (B,), optional
        Rows of queries from there on are zeros.
    key_value_seq_lengths : array of ints, shape (B,), optional
        Keys from there on are never read.
    local_window_size : int or pair (left, right) of int, optional
        Query i attends to the keys ``i - left <= j <= i + right``.
    implementation : "xla", optional
        Makes no difference; "cudnn" is refused.
    return_residual : bool
        Also return the log-sum-exp of the scores.

    Returns
    -------
    result : jax.Array, shape (B, T, N, H) or (T, N, H)
        A new array of query's dtype.
    residual : jax.Array, shape (B, T, N) or (T, N)
        With `return_residual`: of query's dtype.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, jax.errors.JaxRuntimeError
        As `scaled_dot_product_attention` does.

    Notes
    -----
    Results differ from those of ``jax.nn.dot_product_attention`` in these points:

    - A row that may attend to no key is zeros, and its log-sum-exp -inf. JAX gives the mean of all
      values there.
    - A key that a mask excludes has no influence, even if it holds NaN.
    - Weights are not rounded to float16 or bfloat16 before they meet the values.
    - No gradient is computed.

    Examples
    --------
    >>> import jax
    >>> from qkv_fast.integrations.jax import dot_product_attention
    >>> query = jax.random.normal(jax.random.key(0), (2, 128, 12, 64))
    >>> key = value = jax.random.normal(jax.random.key(1), (2, 128, 4, 64))
    >>> result = dot_product_attention(query, key, value, is_causal=True)
    >>> expected = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    >>> bool(abs(result - expected).max() < 1e-5)
    True
    """
    if implementation not in (None, "xla"):
        raise ValueError(f"implementation is {implementation!r}: it must be None or 'xla'")
    query, key, value = (_as_jax(x) for x in (query, key, value))
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim not in (3, 4) or x.ndim != query.ndim:
            raise ValueError(
                f"{name} has shape {x.shape}: query, key and value must all be (batch, length, "
                "heads, head size) or all (length, heads, head size)"
            )
    if mask is not None and _as_jax(mask).dtype != np.bool_:
        raise TypeError(
            f"mask has dtype {_as_jax(mask).dtype}: it must be bool (True = may attend); what is "
            "added to the scores is a bias"
        )
    ends = None
    if query_seq_lengths is not None:
        lengths = _like_batch("query_seq_lengths", query_seq_lengths, query)[..., None, None]
        ends = jnp.where(jnp.arange(query.shape[-3]) < lengths, key.shape[-3], 0)
    if key_value_seq_lengths is not None:
        lengths = _like_batch("key_value_seq_lengths", key_value_seq_lengths, key)
        key_value_seq_lengths = jnp.clip(lengths, 0, key.shape[-3])
    window = local_window_size
    if window is not None and not isinstance(window, tuple | list):
        window = window, window
    options = {"is_causal": is_causal, "scale": scale, "enable_gqa": True, "window": window,
               "softcap": None, "return_lse": return_residual, "num_threads": None}  # fmt: skip
    operands = {"query": query, "key": key, "value": value,
                "attn_mask": _without_batch(mask, query), "attn_bias": _without_batch(bias, query),
                "key_lengths": key_value_seq_lengths, "key_ends": ends}  # fmt: skip
    if not return_residual:
        return _attend(operands, options, heads_last=True)
    result, lse = _attend(operands, options, heads_last=True)
    return result, lse.swapaxes(-1, -2).astype(query.dtype)


def _like_batch(name: str, lengths: Any, x: Any) -> Any:
    """Return lengths of shape (B,) with the batch axes of (B, T, N, H) or (T, N, H)."""
    lengths = _as_jax(lengths)
    batch = x.shape[:-3] or (1,)
    if lengths.shape != batch:
        raise ValueError(f"{name} has shape {lengths.shape}: it must be {batch}")
    return lengths.reshape(x.shape[:-3])


def _without_batch(scores: Any, query: Any) -> Any:
    """Return a mask or bias without a batch axis of 1 that (T, N, H) does not have."""
    if scores is None:
        return None
    scores = _as_jax(scores)
    extra = query.ndim == 3 and scores.ndim == 4 and scores.shape[0] == 1
    return scores[0] if extra else scores


def _pair(key_ranges: Any) -> tuple[Any, Any]:
    if key_ranges is None:
        return None, None
    try:
        begins, ends = key_ranges
    except (TypeError, ValueError):
        raise TypeError(
            f"key_ranges is {key_ranges!r}: it must be a pair (begin, end) of ints, arrays of ints "
            "or None"
        ) from None
    return begins, ends


# --- Both ways ----------------------------------------------------------------------------------


def _attend(operands: dict[str, Any], options: dict[str, Any], heads_last: bool = False) -> Any:
    """Compute a call, or stage it where a value is traced or lies on several devices."""
    arrays: dict[str, Any] = {}
    staged = False
    for name, given in operands.items():
        if given is None:
            continue
        if type(given) is int and _OWN_AXES[name] < 3:
            options[name] = given
            continue
        arrays[name] = x = _as_jax(given)
        staged = staged or isinstance(x, _Tracer) or _is_elsewhere(name, x)
    for name, given in options.items():
        for x in given if isinstance(given, tuple | list) else (given,):
            if isinstance(x, _Tracer):
                raise TypeError(
                    f"{name} is traced: it must be a plain Python value, which jax.jit takes by "
                    f"static_argnames={name!r}"
                )
    if staged:
        return _stage(arrays, options, heads_last)
    return _compute(arrays, options, heads_last)


def _as_jax(given: Any) -> Any:
    return given if isinstance(given, jax.Array) else jnp.asarray(given)


def _is_elsewhere(name: str, x: Any) -> bool:
    """Return whether an array lies on several CPU devices; raise if not on the CPU."""
    devices = x.devices()
    platform = next(iter(devices)).platform
    if platform != "cpu":
        raise TypeError(
            f"{name} is on a device of the platform {platform}: qkv_fast computes on CPUs; "
            "jax.device_put(x, jax.devices('cpu')[0]) moves it"
        )
    return len(devices) > 1


def _compute(arrays: dict[str, Any], options: dict[str, Any], heads_last: bool) -> Any:
    """Compute a call of arrays: the op reads JAX's memory, and JAX takes over the result's."""
    home = arrays["query"]
    views = {name: np.asarray(x) for name, x in arrays.items()}
    if heads_last:
        _swap_heads(views)
    shape = _result_shape(views["query"], views["key"], views["value"])
    out = None
    if shape is not None:  # otherwise the op refuses the call
        out = _aligned(_swapped(shape) if heads_last else shape, views["query"].dtype)
    answer = _op(views, options, None if out is None else _swap(out) if heads_last else out)
    lse = answer[1] if options["return_lse"] else None
    result = _hand_over(out, home)
    return result if lse is None else (result, _hand_over(lse, home))


def _hand_over(array: Any, home: Any) -> Any:
    """Return an array that JAX owns from now on, on the device of another one."""
    device = home.sharding if home.committed else None
    return jax.device_put(array, device, may_alias=True)


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Return a new array at an address that JAX takes over without a copy."""
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    return room[start : start + size].view(dtype).reshape(shape)


def _result_shape(query: Array, key: Array, value: Array) -> tuple[int, ...] | None:
    """Return the shape of the op's result; None if the tensors don't fit together."""
    axes = query.ndim, key.ndim, value.ndim
    if min(axes) < 2:
        return None
    batch = query.shape[:-3]
    if batch != key.shape[:-3] or batch != value.shape[:-3]:
        try:
            batch = np.broadcast_shapes(batch, key.shape[:-3], value.shape[:-3])
        except ValueError:
            return None
    heads = query.shape[-3:-2] or ((1,) if max(axes) > 2 else ())
    return (*batch, *heads, query.shape[-2], value.shape[-1])


def _op(arrays: dict[str, Array], options: dict[str, Any], out: Array | None) -> Any:
    """Call the op with operands and options by name."""
    both = options | arrays
    if "key_begins" in both or "key_ends" in both:
        both["key_ranges"] = both.pop("key_begins", None), both.pop("key_ends", None)
    return qkv_fast.scaled_dot_product_attention(**both, out=out)


def _swap_heads(arrays: dict[str, Any]) -> None:
    """Show tensors (..., length, heads, size) as (..., heads, length, size)."""
    for name in ("query", "key", "value"):
        arrays[name] = _swap(arrays[name])


def _swap(x: Any) -> Any:
    return x.swapaxes(-2, -3)


def _swapped(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-3], shape[-2], shape[-3], shape[-1])


# --- Traced values ------------------------------------------------------------------------------


def _stage(arrays: dict[str, Any], options: dict[str, Any], heads_last: bool) -> Any:
    """Check a call by its shapes, and put it into the program that is traced."""
    problem = _checked(arrays, options, heads_last)
    # All operands get the same batch axes, so that vmap adds one in front of each.
    batch_axes = max(arrays[name].ndim for name in ("query", "key", "value")) - 3
    operands = {}
    for name, x in arrays.items():
        missing = max(0, batch_axes) + _OWN_AXES[name] - x.ndim
        operands[name] = x.reshape((1,) * missing + x.shape) if missing > 0 else x
    plain = {name: _plain(x) for name, x in options.items() if x is not None}
    call = {"operands": list(operands), "options": plain, "heads_last": heads_last}
    results = _custom_call(json.dumps(call), *operands.values())
    shape = problem.result.shape
    result = results[0].reshape(_swapped(shape) if heads_last else shape)
    if problem.lse_result is None:
        return result
    return result, results[1].reshape(problem.lse_result.shape)


def _checked(arrays: dict[str, Any], options: dict[str, Any], heads_last: bool) -> Problem:
    """Return a problem of these shapes and dtypes, or raise what the op raises for it."""
    like = {
        name: np.broadcast_to(np.zeros((), x.dtype), x.shape)  # takes no memory
        for name, x in arrays.items()
    }
    if heads_last:
        _swap_heads(like)
    both = options | like
    p = Problem()
    scores(p, like["query"], like["key"], like.get("attn_mask"), options["is_causal"],
           options["scale"], options["enable_gqa"], both.get("query_offset"), options["window"],
           options["softcap"], both.get("alibi_slopes"), both.get("sinks"), both.get("key_lengths"),
           None, both.get("attn_bias"), (both.get("key_begins"), both.get("key_ends")),
           like["value"])  # fmt: skip
    output(p, None, options["return_lse"], options["num_threads"])
    return p


def _plain(x: Any) -> Any:
    """Return a value of a kind that JSON keeps exactly."""
    if isinstance(x, tuple | list):
        return [_plain(item) for item in x]
    if x is None or isinstance(x, bool | np.bool_):
        return None if x is None else bool(x)
    try:
        return operator.index(x)
    except TypeError:
        return float(x)


def _results(text: str, *operands: Any) -> tuple[Any, ...]:
    """Stage a call; return its out and, if it is wanted, lse."""
    call = _parsed(text)
    shapes = dict(zip(call["operands"], (x.shape for x in operands), strict=True))
    query, key, value = (
        _swapped(shapes[name]) if call["heads_last"] else shapes[name]
        for name in ("query", "key", "value")
    )
    batch = np.broadcast_shapes(query[:-3], key[:-3], value[:-3])
    rows, dtype = (*batch, *query[-3:-1]), operands[0].dtype
    out = (*rows, value[-1])
    results = [_ShapeDtype(_swapped(out) if call["heads_last"] else out, dtype)]
    if call["options"]["return_lse"]:
        real = np.float64 if dtype == np.float64 else np.float32
        results.append(_ShapeDtype(rows, real))
    staged = _way()(text, tuple(results), operands)
    return tuple(staged)


def _refuse_to_differentiate(*_: Any) -> NoReturn:
    raise NotImplementedError(
        "qkv_fast computes attention forward only: where gradients are asked for, call "
        "jax.nn.dot_product_attention, or keep the call out of the differentiated function by "
        "jax.lax.stop_gradient on its inputs"
    )


# JAX calls the rule for derivatives of both modes.
_custom_call: Any = jax.custom_jvp(_results, nondiff_argnums=(0,))
_custom_call.defjvp(_refuse_to_differentiate)


@functools.cache
def _parsed(text: str) -> dict[str, Any]:
    call: dict[str, Any] = json.loads(text)
    return call


def _run(text: str, inputs: list[Array], outputs: list[Array]) -> None:
    """Compute a staged call, whose operands may have got more batch axes by vmap."""
    call = _parsed(text)
    arrays = dict(zip(call["operands"], inputs, strict=True))
    out = outputs[0]
    if call["heads_last"]:
        _swap_heads(arrays)
        out = _swap(out)
    batch = out.shape[:-3]
    query = arrays["query"]
    if query.shape[:-3] != batch:
        arrays["query"] = np.broadcast_to(query, (*batch, *query.shape[-3:]))
    options, sinks = call["options"], arrays.get("sinks")
    lse = outputs[1] if options["return_lse"] else None
    if sinks is not None and math.prod(sinks.shape[:-1]) != 1:
        _run_each(arrays, options, out, lse)
        return
    if sinks is not None:
        arrays["sinks"] = sinks.reshape(-1)
    answer = _op(arrays, options, out)
    if lse is not None:
        lse[...] = answer[1]


def _run_each(
    arrays: dict[str, Array], options: dict[str, Any], out: Array, lse: Array | None
) -> None:
    """Compute each batch entry by itself: the op takes one row of sinks for all of them."""
    batch = out.shape[:-3]
    whole = {
        name: np.broadcast_to(x, (*batch, *x.shape[x.ndim - _OWN_AXES[name] :]))
        for name, x in arrays.items()
    }
    for index in np.ndindex(batch):
        answer = _op({name: x[index] for name, x in whole.items()}, options, out[index])
        if lse is not None:
            lse[index] = answer[1]


# --- How XLA reaches _run -----------------------------------------------------------------------

_Results = tuple[Any, ...]  # of _ShapeDtype
_Way = Callable[[str, _Results, tuple[Any, ...]], Any]
_lock = threading.Lock()
_handler = _xla_ffi.Handler(_run)
_chosen: _Way | None = None


def _way() -> _Way:
    """Return how traced calls reach `_run`: by a custom call if this jaxlib takes its version."""
    global _chosen
    with _lock:
        if _chosen is None:
            # jaxlib checks a handler at once only if its CPU client is there already.
            jax.local_devices(backend="cpu")
            try:
                _ffi.register_ffi_target(_TARGET, _ffi.pycapsule(_handler.address), platform="cpu")
                _chosen = _by_ffi
            except Exception as error:
                version = ".".join(map(str, _xla_ffi.VERSION))
                warnings.warn(
                    f"this jaxlib does not take version {version} of XLA's foreign functions "
                    f"({error}): qkv_fast goes through jax.pure_callback, which copies",
                    RuntimeWarning,
                    stacklevel=2,
                )
                _chosen = _by_callback
        return _chosen


def _by_ffi(text: str, results: _Results, operands: tuple[Any, ...]) -> Any:
    """Stage a call that reads and writes XLA's buffers where they are."""
    call = _ffi.ffi_call(_TARGET, results, vmap_method="expand_dims")
    return call(*operands, **{_xla_ffi.ATTRIBUTE: text})


def _by_callback(text: str, results: _Results, operands: tuple[Any, ...]) -> Any:
    """Stage a call that JAX copies to and from."""

    def called(*inputs: Any) -> tuple[Array, ...]:
        arrays = [np.asarray(x) for x in inputs]
        names = _parsed(text)["operands"]
        batch = np.broadcast_shapes(
            *(x.shape[: x.ndim - _OWN_AXES[name]] for name, x in zip(names, arrays, strict=True))
        )
        outputs = []
        for result, own in zip(results, (3, 2), strict=False):
            shape = (*batch, *result.shape[len(result.shape) - own :])
            outputs.append(np.empty(shape, result.dtype))
        _run(text, arrays, outputs)
        return tuple(outputs)

    return jax.pure_callback(called, results, *operands, vmap_method="expand_dims")
