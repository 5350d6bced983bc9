"""``torch.nn.functional.scaled_dot_product_attention`` on CPU tensors, computed by this library.

    scaled_dot_product_attention(query, key, value, is_causal=True)     torch's function: tensors
    with patch(): model(x)                         models of torch call it without being changed

This is the only module that imports torch, with its neighbours of ``integrations`` for libraries
that hold tensors.
"""

from __future__ import annotations

import threading
import warnings
from types import TracebackType
from typing import Any

try:
    import torch
except ImportError as error:
    raise ImportError('torch is missing: pip install "qkv-fast[torch]"') from error

import torch.nn.functional as torch_functional
from torch.autograd import forward_ad
from torch.compiler import is_compiling

import qkv_fast

from .. import _dispatch

__all__ = ["Patch", "patch", "scaled_dot_product_attention"]

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_BIASES = "torch.nn.attention.bias"  # not imported: torch itself does not
_OPERATOR = "qkv_fast::scaled_dot_product_attention"
_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, bool is_causal=False, "
    "float? scale=None, bool enable_gqa=False) -> Tensor"
)

_empty_like = torch.empty_like
# What shows that something in torch must see a call: _why_watched says what. Tensors within a
# transform have no memory of their own, so the shortcut does not recognise them.
_count_modes = torch._C._len_torch_dispatch_stack
_has_transforms = torch._C._are_functorch_transforms_active
_jit_trace = torch._C._get_tracing_state
_is_autocast = torch.is_autocast_enabled
_no_override = torch._C._disabled_torch_function_impl


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    r"""Compute ``softmax(query @ key.mT * scale + bias) @ value``, as torch's function does.

    Parameters
    ----------
    query : Tensor, shape (..., Hq, Lq, D)
        On the CPU, in float32, float64, float16 or bfloat16, with any strides. Two axes mean one
        head. Nothing is copied.
    key : Tensor, shape (..., Hkv, Lk, D)
        Of query's dtype. Batch axes and heads broadcast, without copies.
    value : Tensor, shape (..., Hkv, Lk, Dv)
        Of query's dtype.
    attn_mask : Tensor, broadcastable to (..., Hq, Lq, Lk), optional
        Boolean: True where the query may attend to the key. Floating, of float32 or query's dtype:
        added to the scores. At least two axes.
    dropout_p : float
        Probability of dropout; torch's own function computes the call unless it is 0.0.
    is_causal : bool
        Query i attends to the keys up to i only (top-left). Together with `attn_mask`, both apply.
    scale : float, optional
        Factor of the scores; 1/√D by default.
    enable_gqa : bool
        Allow Hq to be a multiple of Hkv.

    Returns
    -------
    Tensor, shape (..., Hq, Lq, Dv)
        A new tensor of query's dtype. It is laid out in memory like query if Dv is D, as torch's
        is, so for a query that is a ``view(B, L, H, D).transpose(1, 2)`` the
        ``transpose(1, 2).reshape(B, L, H * D)`` of the result is free. Otherwise it is contiguous.

    Raises
    ------
    RuntimeError, TypeError, IndexError
        As torch's own function does: it gets the calls that this library refuses.
    ValueError
        key and value hold different numbers of keys.

    Warns
    -----
    RuntimeWarning
        Once for each reason why torch's own function computed a call: grad mode is on and a tensor
        requires grad; dropout; a tensor that is not on the CPU, or not dense, or of another dtype,
        or of a subclass; forward-mode derivatives and the transforms of ``torch.func``; traces of
        ``torch.jit``; shapes that torch takes and this library doesn't.

    Notes
    -----
    The maths and what a result depends on are those of `qkv_fast.scaled_dot_product_attention`.
    Results differ from those of torch's own function in these points:

    - A key that a mask excludes has no influence, even if it holds NaN or infinity.
    - The choices of ``torch.nn.attention.sdpa_kernel`` are ignored.

    Under ``torch.compile`` and ``torch.export`` a call becomes the operator
    ``torch.ops.qkv_fast.scaled_dot_product_attention``, without a graph break. Under
    ``torch.autocast`` tensors are cast as torch casts them.

    Examples
    --------
    >>> import torch
    >>> from qkv_fast.integrations.torch import scaled_dot_product_attention
    >>> query, key, value = torch.randn(3, 2, 12, 128, 64).bfloat16()
    >>> scaled_dot_product_attention(query, key, value, is_causal=True).dtype
    torch.bfloat16
    """
    if is_compiling():
        return _dispatched(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if (
        dropout_p == 0.0
        and not _count_modes()
        and forward_ad._current_level < 0
        and _jit_trace() is None
        and not _is_autocast("cpu")
    ):
        answer: torch.Tensor | None = _dispatch.shortcuts.attend_tensors(
            query, key, value, attn_mask, is_causal, scale, enable_gqa, _empty_like
        )
        if answer is not None:
            return answer
    return _checked(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def _checked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    """Compute a call that the shortcut did not recognise, or leave it to torch."""
    if type(attn_mask).__module__ == _BIASES:
        attn_mask, is_causal = _plain_bias(query, attn_mask, is_causal)
    reason = _why_watched(query, key, value, attn_mask)
    if not reason and _count_modes():
        return _dispatched(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if not reason and _is_autocast("cpu"):
        query, key, value, attn_mask = (_autocast(x) for x in (query, key, value, attn_mask))
    reason = reason or _why_not(query, key, value, attn_mask, dropout_p, enable_gqa)
    if reason:
        result: torch.Tensor = _torchs_own(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        _warn_once(reason)
        return result
    return _compute(query, key, value, attn_mask, is_causal, scale, enable_gqa)


def _dispatched(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    """Call an operator of torch, this library's or torch's own, so that what traces sees it.

    Dynamo traces this function: it and what it calls hold nothing that breaks a graph.
    """
    if type(attn_mask).__module__ == _BIASES:
        attn_mask, is_causal = _plain_bias(query, attn_mask, is_causal)
    if _is_autocast("cpu"):
        query, key, value, attn_mask = (_autocast(x) for x in (query, key, value, attn_mask))
    reason = _why_not(query, key, value, attn_mask, dropout_p, enable_gqa)
    if reason:
        result: torch.Tensor = _torchs_own(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        _warn_once(reason)
        return result
    answer: torch.Tensor = torch.ops.qkv_fast.scaled_dot_product_attention(
        query, key, value, attn_mask, is_causal, scale, enable_gqa
    )
    return answer


# --- Which calls are torch's --------------------------------------------------------------------

# What computes them. Not what patch() replaced, which might call this library again.
_torchs_own = torch._C._nn.scaled_dot_product_attention
_warned: set[str] = set()


def _warn_once(reason: str) -> None:
    """Warn that torch's own function computed a call, once for each reason."""
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"torch's own scaled_dot_product_attention computed a call, not qkv_fast: {reason}",
            RuntimeWarning,
            stacklevel=4,  # the line that called the public function
        )


# Dynamo runs it while it traces, as torch.compiler.assume_constant_result lets it; that function
# would import Dynamo, which takes a second.
_warn_once._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _why_watched(*tensors: torch.Tensor | None) -> str:
    """Return why torch's dispatcher must see a call with its own operator, or an empty string."""
    if _jit_trace() is not None:
        return "torch.jit traces it"
    if _has_transforms():
        return "it runs within a transform of torch.func"
    if forward_ad._current_level >= 0:
        return "it runs within forward-mode differentiation"
    for x in tensors:  # has_torch_function() is True for all tensors while a mode is active
        overriding = getattr(type(x), "__torch_function__", _no_override)
        if type(x) is not torch.Tensor and overriding is not _no_override:
            return "a tensor is of a subclass that overrides torch's functions"
    return ""


def _why_not(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    enable_gqa: bool,
) -> str:
    """Return why this library does not compute a call, or an empty string."""
    tensors = [query, key, value] if attn_mask is None else [query, key, value, attn_mask]
    for x in tensors:
        if not isinstance(x, torch.Tensor):
            return "an argument is no tensor"
    if dropout_p != 0.0:
        return "dropout is asked for"
    for x in tensors:
        if x.is_nested or x.layout != torch.strided or x.is_quantized:
            return "a tensor is not dense"
        if x.device.type != "cpu":
            return "a tensor is not on the CPU"
    if torch.is_grad_enabled():
        for x in tensors:
            if x.requires_grad:
                return "a tensor requires grad, and grad mode is on"
    if query.dtype not in _DTYPES or key.dtype != query.dtype or value.dtype != query.dtype:
        return "the tensors are not of one of the dtypes float32, float64, float16 and bfloat16"
    if attn_mask is not None and not _is_right_mask(attn_mask, query.dtype):
        return "the mask is neither boolean nor of float32 or the query's dtype, or has one axis"
    if min(query.dim(), key.dim(), value.dim()) < 2:
        return "a tensor has fewer than two axes"
    if key.shape[-2] != value.shape[-2]:  # torch would read past the end of value
        raise ValueError(
            f"value has length {value.shape[-2]} on axis -2, but key has {key.shape[-2]}: both "
            "must hold the same number of keys"
        )
    shape = _result_shape(query, key, value, enable_gqa)
    if shape is None or query.shape[-1] != key.shape[-1] or query.shape[-1] == 0:
        return "the shapes of query, key and value fit together in no way that qkv_fast knows"
    if attn_mask is not None:
        scores = (*shape[:-1], key.shape[-2])
        if _broadcast(attn_mask.shape, scores) != scores:
            return "the mask does not broadcast to (..., Hq, Lq, Lk)"
    return ""


def _plain_bias(
    query: torch.Tensor, bias: Any, is_causal: bool
) -> tuple[torch.Tensor | None, bool]:
    """Return a CausalBias of torch as attn_mask and is_causal.

    Its own code compares with ``torch.nn.functional.scaled_dot_product_attention``, so torch's own
    function does not reach it while `patch` is in force.
    """
    if is_causal:
        raise ValueError("CausalBias should not be used with causal=True")  # as torch does
    if bias.variant.name == "UPPER_LEFT" or bias.seq_len_q == bias.seq_len_kv:
        return None, True
    return bias._materialize(query.device), False


def _is_right_mask(attn_mask: torch.Tensor, dtype: torch.dtype) -> bool:
    return attn_mask.dtype in (torch.bool, torch.float32, dtype) and attn_mask.dim() > 1


def _autocast(x: Any) -> Any:
    """Return a tensor as ``torch.autocast`` casts those of this operator."""
    if x is None or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype("cpu"))


# --- The operator -------------------------------------------------------------------------------

Shape = tuple[int, ...]


def _compute(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Compute a call whose tensors are of the right kind, whether they require grad or not."""
    query, key, value = (_plain(x) for x in (query, key, value))
    if attn_mask is not None:
        attn_mask = _plain(attn_mask)
    answer: torch.Tensor | None = _dispatch.shortcuts.attend_tensors(
        query, key, value, attn_mask, is_causal, scale, enable_gqa, _empty_like
    )
    if answer is not None:
        return answer
    out = _new_result(query, key, value, attn_mask, is_causal, scale, enable_gqa)
    heads = out.shape[-3] if out.dim() > 2 else 1
    if _heads(key) == _heads(value) == 1:  # one head that all query heads read
        enable_gqa = True
    elif not _are_groups(_heads(query), _heads(key), _heads(value), enable_gqa):
        query, key, value = (_with_heads(x, heads) for x in (query, key, value))
    if isinstance(scale, torch.Tensor):  # torch takes one of one element
        scale = float(scale)
    qkv_fast.scaled_dot_product_attention(
        query, key, value, attn_mask, 0.0, is_causal, scale, enable_gqa, out=out
    )
    return out


def _plain(x: torch.Tensor) -> torch.Tensor:
    return x if type(x) is torch.Tensor and not x.requires_grad else x.detach()


def _with_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x if _heads(x) == heads else x.expand(*x.shape[:-3], heads, *x.shape[-2:])


def _new_result(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Return a new tensor for the result: the operator without its computation."""
    shape = _result_shape(query, key, value, enable_gqa)
    assert shape is not None
    return torch.empty_like(query) if shape == query.shape else query.new_empty(shape)


def _result_shape(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool
) -> Shape | None:
    """Return the shape of the result; None if batch axes and heads do not fit together."""
    heads = _heads(query), _heads(key), _heads(value)
    if _are_groups(*heads, enable_gqa):
        lead = _broadcast(query.shape[:-3], key.shape[:-3], value.shape[:-3])
        lead = None if lead is None else (*lead, heads[0])
    elif enable_gqa and heads.count(heads[0]) < 3:
        return None
    else:
        lead = _broadcast(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    return None if lead is None else (*lead, query.shape[-2], value.shape[-1])


def _heads(x: torch.Tensor) -> int:
    return x.shape[-3] if x.dim() > 2 else 1


def _are_groups(query_heads: int, key_heads: int, value_heads: int, enable_gqa: bool) -> bool:
    """Return whether several query heads share a key head."""
    return (
        enable_gqa
        and query_heads != key_heads
        and key_heads == value_heads != 0
        and query_heads % key_heads == 0
    )


def _broadcast(*shapes: Shape) -> Shape | None:
    """Return what shapes broadcast to, or None; without an exception, which Dynamo can't trace."""
    axes = max(len(shape) for shape in shapes)
    result = []
    for axis in range(-axes, 0):
        size = 1
        for shape in shapes:
            if len(shape) >= -axis and shape[axis] != 1:
                if size != 1 and shape[axis] != size:
                    return None
                size = shape[axis]
        result.append(size)
    return tuple(result)


torch.library.define(_OPERATOR, _SCHEMA)
torch.library.impl(_OPERATOR, "CPU", _compute)
torch.library.register_fake(_OPERATOR, _new_result)
# torch.jit.script compiles calls of this function as calls of torch's own.
torch.jit._builtins._register_builtin(
    scaled_dot_product_attention, "aten::scaled_dot_product_attention"
)


# --- patch() ------------------------------------------------------------------------------------

_lock = threading.Lock()
_active: set[Patch] = set()
_replaced: Any = None  # by the first patch in force


class Patch:
    """What `patch` returns: a patch of torch that lasts until `undo` or the end of a ``with``.

    Attributes
    ----------
    original : callable
        What ``torch.nn.functional.scaled_dot_product_attention`` was before all patches.
    """

    def __init__(self) -> None:
        self._apply()

    def _apply(self) -> None:
        global _replaced
        with _lock:
            if not _active:
                _replaced = torch_functional.scaled_dot_product_attention
                torch_functional.scaled_dot_product_attention = scaled_dot_product_attention
            self.original = _replaced
            _active.add(self)

    def undo(self) -> None:
        """Give torch its function back, unless another patch is still in force.

        A second call does nothing. If something else replaced the function in the meantime, that
        stays.
        """
        with _lock:
            if self not in _active:
                return
            _active.remove(self)
            mine = torch_functional.scaled_dot_product_attention is scaled_dot_product_attention
            if not _active and mine:
                torch_functional.scaled_dot_product_attention = _replaced

    def __enter__(self) -> Patch:
        if self not in _active:
            self._apply()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()


def patch() -> Patch:
    """Let ``torch.nn.functional.scaled_dot_product_attention`` be `scaled_dot_product_attention`.

    Whatever calls it by that name is then computed by this library: ``torch.nn.MultiheadAttention``
    and ``torch.nn.TransformerEncoder`` outside their fast path, the models of timm, diffusers and
    Transformers. The patch holds for the whole process, for all threads.

    Returns
    -------
    Patch
        Its method `undo` ends the patch, as does the end of a ``with`` block. The object holds
        torch's function as `original`.

    Notes
    -----
    Patches may be nested and repeated: the last one that ends gives torch its function back.

    It reaches no code that holds the function itself: a module that ran ``from
    torch.nn.functional import scaled_dot_product_attention`` before, and what ``torch.jit`` traces
    or scripts. Nor does it reach the fast path of torch's layers, which calls
    none; ``torch.backends.mha.set_fastpath_enabled(False)`` switches that path off.

    Examples
    --------
    >>> import torch
    >>> from qkv_fast.integrations.torch import patch, scaled_dot_product_attention
    >>> with patch():
    ...     torch.nn.functional.scaled_dot_product_attention is scaled_dot_product_attention
    True
    >>> torch.nn.functional.scaled_dot_product_attention is scaled_dot_product_attention
    False
    """
    return Patch()
