"""Models of Hugging Face Transformers with this library's attention: ``register()``, and a name.

    register()
    model = AutoModel.from_pretrained(folder, attn_implementation="qkv_fast")

Transformers calls two functions by that name: `make_mask` once for a forward pass and `attend` in
each layer. A mask travels from the one to the other as a `SymbolicMask`: a few numbers, which turn
into the boolean tensor that a model expects as soon as the model does anything with it.

This is the only module that imports transformers.
"""

# mypy: allow-subclassing-any, allow-untyped-calls

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

try:
    import torch
    from torch.utils._pytree import tree_map
    from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.utils.import_utils import is_tracing
except ImportError as error:
    raise ImportError(
        'torch or transformers is missing: pip install "qkv-fast[transformers]"'
    ) from error

import qkv_fast

from .._dtypes import Array

__all__ = ["SymbolicMask", "attend", "make_mask", "register"]

# What models hand to every attention function, and what none of them computes with. Documents that
# are packed in a row arrive by the mask too, for all functions but those of flash-attn.
_IGNORED = frozenset((
    "cache", "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "deterministic", "labels",
    "layer_idx", "logits_to_keep", "max_length_k", "max_length_q", "num_items_in_batch",
    "output_hidden_states", "output_router_logits", "past_key_values", "position_embeddings",
    "position_ids", "return_dict", "return_loss", "seq_idx", "token_type_ids", "use_cache",
))  # fmt: skip


def register(name: str = "qkv_fast") -> None:
    """Make ``attn_implementation=name`` compute the attention of models with this library.

    Parameters
    ----------
    name : str
        What to call it. It can't hold "/" or "|", by which Transformers loads kernels from its
        hub, nor "flash", nor be "eager" or "sdpa": models compare their names with these.

    Raises
    ------
    ValueError
        The name has another meaning in Transformers.
    ImportError
        When the module is imported, and torch or transformers is missing.

    Notes
    -----
    It serves each architecture that takes its attention from ``AttentionInterface``. The model must
    run without gradients (``torch.no_grad()`` or ``torch.inference_mode()``) and on the CPU: where
    grad is needed, where dropout is asked for or a tensor is elsewhere, Transformers' function for
    sdpa computes the layer, and a RuntimeWarning says why, once.

    Results differ from those of "eager" in these points:

    - Rows that may attend to no key, such as those of padding on the left, are zero.
    - In bfloat16 and float16, scores and sums are float32. Eager rounds the scores.

    Examples
    --------
    >>> import torch
    >>> from transformers import BertConfig, BertModel
    >>> from qkv_fast.integrations.transformers import register
    >>> register()
    >>> config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
    ...                     intermediate_size=32, attn_implementation="qkv_fast")
    >>> model = BertModel(config).eval()
    >>> with torch.inference_mode():
    ...     model(torch.tensor([[101, 7592, 102]])).last_hidden_state.shape
    torch.Size([1, 3, 32])
    """
    if any(mark in name for mark in "/|") or name in ("eager", "sdpa") or "flash" in name:
        raise ValueError(
            f"name is {name!r}: Transformers gives a meaning of its own to eager, sdpa, and names "
            'with "flash", "/" or "|"'
        )
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, make_mask)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute a layer's attention, as Transformers' ``AttentionInterface`` asks for it.

    Parameters
    ----------
    module : Module
        The layer. Its attribute ``is_causal`` counts if `is_causal` is None.
    query : Tensor, shape (B, Hq, Lq, D)
        On the CPU, in float32, float64, float16 or bfloat16. No tensor is copied.
    key : Tensor, shape (B, Hkv, Lk, D)
        Hq may be a multiple of Hkv: heads are not repeated.
    value : Tensor, shape (B, Hkv, Lk, Dv)
        Likewise.
    attention_mask : Tensor, optional
        What `make_mask` returned; a boolean or floating tensor that broadcasts to (B, Hq, Lq, Lk),
        which alone says what a query sees; or padding (B, Lk), 0 where a key is none.
    dropout : float
        Other than 0.0, Transformers' function for sdpa computes the layer.
    scaling : float, optional
        Factor of the scores; 1/√D by default.
    is_causal : bool, optional
        Without a mask, and for more than one query: query i sees the keys up to i.
    **kwargs
        `sliding_window` w (a causal query at p sees keys > p - w; counts where no mask has it),
        `softcap`, `s_aux` (sinks, (Hq,)), `position_bias` (added to the scores) and
        `output_attentions`. None and False stand for "none" in all others. Names that no attention
        function computes with are ignored: {ignored}.

    Returns
    -------
    out : Tensor, shape (B, Lq, Hq, Dv)
        Contiguous, of query's dtype.
    weights : Tensor, shape (B, Hq, Lq, Lk), or None
        With `output_attentions`, in query's dtype.

    Raises
    ------
    TypeError
        A keyword that is neither known nor ignored: the result might be wrong without it.
    TypeError, ValueError
        As `qkv_fast.scaled_dot_product_attention` does.
    NotImplementedError
        Grad, dropout or another device together with `softcap` or `s_aux`, which sdpa lacks.

    Notes
    -----
    The maths is that of `qkv_fast.scaled_dot_product_attention`.

    Examples
    --------
    >>> import torch
    >>> from qkv_fast.integrations.transformers import attend
    >>> layer = torch.nn.Module()
    >>> query, key, value = torch.randn(2, 8, 5, 16), *torch.randn(2, 2, 2, 5, 16)
    >>> out, weights = attend(layer, query, key, value, None, is_causal=True)
    >>> out.shape, weights
    (torch.Size([2, 5, 8, 16]), None)
    """
    given = {name: x for name, x in kwargs.items() if x is not None and x is not False}
    sliding_window = given.pop("sliding_window", None)
    softcap = given.pop("softcap", None) or None
    sinks = given.pop("s_aux", None)
    position_bias = given.pop("position_bias", None)
    output_attentions = given.pop("output_attentions", False)
    unknown = given.keys() - _IGNORED
    if unknown:
        raise TypeError(
            f"{type(module).__name__} passes {', '.join(sorted(unknown))} to its attention, which "
            "qkv_fast does not know: the result might be wrong without it"
        )
    is_causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if attention_mask is not None and attention_mask.ndim == 2:
        attention_mask = _padding_mask(attention_mask, query, key, is_causal, sliding_window)
    tensors = (query, key, value, attention_mask, sinks, position_bias)
    if reason := _why_not_here(tensors, dropout):
        if softcap is not None or sinks is not None:
            raise NotImplementedError(
                f"{type(module).__name__} has softcap or sinks, and {reason}: sdpa, which computes "
                'such calls, lacks both; use attn_implementation="eager"'
            )
        _warn(reason)
        if type(attention_mask) is SymbolicMask:
            attention_mask = attention_mask.dense()
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            is_causal=is_causal, position_bias=position_bias)  # fmt: skip
        return out, None
    options: dict[str, Any] = {
        "scale": scaling,
        "softcap": softcap,
        "sinks": None if sinks is None else sinks.detach().reshape(-1),
        "attn_bias": position_bias,
    }
    if attention_mask is None:
        options |= _unmasked(query.shape[2], key.shape[2], is_causal, sliding_window)
    elif type(attention_mask) is SymbolicMask:
        options |= attention_mask.options
    else:
        options["attn_mask"] = attention_mask
    call = _outside_graph if torch.compiler.is_compiling() else _call
    return call(query, key, value, options, output_attentions)


assert attend.__doc__ is not None
attend.__doc__ = attend.__doc__.format(ignored=", ".join(sorted(_IGNORED)))


def _call(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    options: dict[str, Any],
    output_attentions: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    batch = max(query.shape[0], key.shape[0])  # learned queries have 1, and broadcast
    out = query.new_empty((batch, query.shape[2], query.shape[1], value.shape[3]))
    qkv_fast.scaled_dot_product_attention(
        query, key, value, enable_gqa=True, out=out.transpose(1, 2), **options
    )
    if not output_attentions:
        return out, None
    weights = qkv_fast.attention_weights(query, key, enable_gqa=True, **options)
    return out, torch.from_numpy(weights).to(query.dtype)


_outside_graph = torch.compiler.disable(_call)


def _why_not_here(tensors: tuple[torch.Tensor | None, ...], dropout: float) -> str | None:
    """Return why this library can't compute a call, or None."""
    if dropout:
        return "dropout is asked for"
    grad = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is not None:
            if grad and tensor.requires_grad:
                return "a gradient is needed (without one, call the model in torch.no_grad())"
            if tensor.device.type != "cpu":
                return f"a tensor is on the device {tensor.device.type}"
    return None


@functools.cache
def _warn(reason: str) -> None:
    message = f"{reason}: sdpa computes the attention, not qkv_fast. This warning comes once"
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def _unmasked(
    q_len: int, kv_len: int, is_causal: bool, sliding_window: int | None
) -> dict[str, Any]:
    """Return the op's options for a call without a mask.

    One query stands at the last key; several stand at the first ones, since Transformers leaves
    out the mask for as many keys, and where a static cache holds no others yet.
    """
    options: dict[str, Any] = {"is_causal": is_causal and q_len > 1}
    if sliding_window is not None and 0 < sliding_window < kv_len:
        options["window"] = (sliding_window - 1, 0 if is_causal else sliding_window - 1)
        options["query_offset"] = kv_len - 1 if q_len == 1 else 0
    return options


def _padding_mask(
    padding: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    is_causal: bool,
    sliding_window: int | None,
) -> torch.Tensor | None:
    """Return the mask that padding (B, Lk) stands for; the last query stands at the last key."""
    pattern: Callable[..., Any] = masking_utils.bidirectional_mask_function
    if is_causal:
        pattern = masking_utils.causal_mask_function
        if sliding_window is not None and sliding_window > 0:
            pattern = masking_utils.sliding_window_causal_mask_function(sliding_window)
    q_len, kv_len = query.shape[2], key.shape[2]
    return make_mask(
        padding.shape[0], q_len, kv_len, kv_len - q_len, mask_function=pattern,
        attention_mask=padding.bool(), allow_is_bidirectional_skip=True, device=query.device,
    )  # fmt: skip


class SymbolicMask(torch.Tensor):
    """A boolean mask (B, 1, Lq, Lk) that holds no elements, but how to make them.

    Parameters
    ----------
    given : dict
        Arguments of Transformers' ``sdpa_mask``, which makes the elements.
    options : dict
        Parameters of `qkv_fast.scaled_dot_product_attention` that have the same effect.

    Notes
    -----
    Any operation on it sees the elements, and returns an ordinary tensor. `make_mask` has an
    example.
    """

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, given: dict[str, Any], options: dict[str, Any]) -> SymbolicMask:
        """Return a tensor that claims the shape, and has no memory."""
        make: Any = torch.Tensor._make_wrapper_subclass
        shape = (given["batch_size"], 1, given["q_length"], given["kv_length"])
        mask: SymbolicMask = make(cls, shape, dtype=torch.bool, device="cpu")
        return mask

    def __init__(self, given: dict[str, Any], options: dict[str, Any]) -> None:
        self.given = given
        self.options = options

    def dense(self) -> torch.Tensor:
        """Return the mask with its elements."""
        return _dense(self.given)

    @classmethod
    def _apply(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def elements(x: Any) -> Any:
            return x.dense() if type(x) is cls else x

        args, kwargs = tree_map(elements, (args, kwargs or {}))
        return operation(*args, **kwargs)

    __torch_dispatch__: Any = _apply


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor | None:
    """Return a forward pass's mask, as Transformers' ``AttentionMaskInterface`` asks for it.

    Parameters
    ----------
    batch_size, q_length, kv_length : int
        Sizes of the mask.
    q_offset, kv_offset : int
        Positions of the first query and of the first key.
    mask_function : callable
        The pattern, of Transformers' own pieces or any other.
    attention_mask : Tensor, shape (B, length), optional
        Padding: False where a token is none.
    allow_is_causal_skip, allow_is_bidirectional_skip : bool
        Whether the model can do with something else than a boolean tensor.
    use_vmap : bool
        The pattern is the caller's own.
    device : device
        Where the queries are.
    **kwargs
        What Transformers' function for sdpa takes besides.

    Returns
    -------
    Tensor, shape (B, 1, Lq, Lk), or None
        None where each query sees all keys, and that is no effect of a causal pattern on several
        queries. A `SymbolicMask` where the pattern is causal, bidirectional, a window or chunks,
        and each text's padding is at its ends. Otherwise a boolean tensor, True where the query may
        attend to the key.

    Examples
    --------
    >>> import torch
    >>> from qkv_fast.integrations.transformers import make_mask
    >>> mask = make_mask(1, 3, 3, attention_mask=torch.tensor([[False, True, True]]))
    >>> mask.options
    {'is_causal': True, 'query_offset': 0, 'key_ranges': (array([[[1]]]), None)}
    >>> mask[0, 0].int().tolist()
    [[0, 0, 0], [0, 1, 0], [0, 1, 1]]
    """
    given: dict[str, Any] = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "allow_is_causal_skip": allow_is_causal_skip,
        "allow_is_bidirectional_skip": allow_is_bidirectional_skip,
        "use_vmap": use_vmap,
        "device": device,
        **kwargs,
    }
    pattern = _pattern(mask_function)
    if pattern is None or use_vmap or torch.device(device).type != "cpu":
        return _dense(given)
    if not (allow_is_causal_skip if pattern.is_causal else allow_is_bidirectional_skip):
        return _dense(given)
    if is_tracing(attention_mask) or (isinstance(q_offset, torch.Tensor) and is_tracing(q_offset)):
        return _dense(given)
    begin, end = np.zeros(1, np.int64), np.full(1, kv_length)
    if attention_mask is not None:
        padding: Any = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        runs = _runs(padding[:, kv_offset : kv_offset + kv_length].numpy())
        if runs is None:
            return _dense(given)
        begin, end = runs
    first = int(q_offset) - kv_offset
    options = _options(pattern, q_length, kv_length, first, kv_offset, begin, end)
    # Without a mask a layer is asked whether it is causal, and some that are don't say so.
    if not options and (q_length == 1 or not pattern.is_causal):
        return None
    return SymbolicMask(given, options)


def _dense(given: dict[str, Any]) -> torch.Tensor:
    always = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    make: Any = masking_utils.sdpa_mask
    mask: torch.Tensor = make(**{**given, **always})
    return mask


class _Pattern(NamedTuple):
    """A query at p sees the keys j with: j <= p; p - left <= j; j <= p + right; those of its chunk.

    Chunks are counted from the first token of a text, behind the padding on the left, (B,).
    """

    is_causal: bool = False
    left: int | None = None
    right: int | None = None
    chunk_size: int | None = None
    left_padding: Any = 0


def _pattern(mask_function: Callable[..., Any]) -> _Pattern | None:
    """Return the pattern of a function that Transformers made of its own pieces, or None."""
    if mask_function is masking_utils.causal_mask_function:
        return _Pattern(is_causal=True)
    if mask_function is masking_utils.bidirectional_mask_function:
        return _Pattern()
    code = getattr(mask_function, "__code__", None)
    if code not in _PIECES:
        return None
    cells = getattr(mask_function, "__closure__", None) or ()
    held = dict(zip(code.co_freevars, [cell.cell_contents for cell in cells], strict=True))
    if code is _AND:
        patterns = [_pattern(piece) for piece in held["mask_functions"]]
        fields: dict[str, Any] = {}
        for pattern in patterns:
            if pattern is None:
                return None
            said = {
                name: x
                for name, x in pattern._asdict().items()
                if x is not _Pattern._field_defaults[name]
            }
            if said.keys() & fields.keys():
                return None
            fields |= said
        return _Pattern(**fields)
    if code is _WINDOW:
        return _Pattern(left=held["sliding_window"] - 1)
    if code is _TWO_SIDED:
        return _Pattern(left=held["sliding_window"], right=held["sliding_window"])
    return _Pattern(chunk_size=held["chunk_size"], left_padding=held["left_padding"])


# Each piece is a closure that a function of Transformers returns: its code object tells which.
_AND = masking_utils.and_masks(masking_utils.causal_mask_function).__code__
_WINDOW = masking_utils.sliding_window_overlay(1).__code__
_TWO_SIDED = masking_utils.sliding_window_bidirectional_overlay(1).__code__
_CHUNKS = masking_utils.chunked_overlay(1, torch.zeros(1)).__code__
_PIECES = (_AND, _WINDOW, _TWO_SIDED, _CHUNKS)


def _runs(padding: Array) -> tuple[Array, Array] | None:
    """Return where each text begins and ends, (B,), or None if one has padding inside."""
    count = padding.sum(axis=1)
    begin = padding.argmax(axis=1)
    end = np.where(count > 0, padding.shape[1] - padding[:, ::-1].argmax(axis=1), 0)
    return (begin, end) if (end - begin == count).all() else None


def _options(
    pattern: _Pattern,
    q_len: int,
    kv_len: int,
    first: int,
    kv_offset: int,
    begin: Array,
    end: Array,
) -> dict[str, Any]:
    """Return the op's options for a pattern, without what excludes no key.

    The first query stands at `first`, counted from the first key, which stands at `kv_offset` in
    the texts. Each has keys from `begin` to before `end`.
    """
    options: dict[str, Any] = {}
    last = first + q_len - 1
    if pattern.is_causal and first < kv_len - 1:
        options["is_causal"] = True
    left, right = pattern.left, pattern.right
    if left is not None and last <= left:
        left = None
    if right is not None and first + right >= kv_len - 1:
        right = None
    if left is not None or right is not None:
        options["window"] = (left, right)
    if options:
        options["query_offset"] = first
    begin = begin[:, np.newaxis, np.newaxis]
    if pattern.chunk_size is not None:
        text = np.asarray(pattern.left_padding).reshape(-1, 1, 1) - kv_offset
        chunk = (np.arange(first, last + 1) - text) // pattern.chunk_size
        begin = np.maximum(begin, chunk * pattern.chunk_size + text)
    if begin.max(initial=0) > 0:
        options["key_ranges"] = (begin, None)
    if end.min(initial=kv_len) < min(kv_len, last + 1 if pattern.is_causal else kv_len):
        options["key_lengths"] = end
    return options
