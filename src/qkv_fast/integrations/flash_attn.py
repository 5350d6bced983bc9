"""The functions of the package flash_attn, for CPU tensors, computed by this library.

    flash_attn_func              (batch, length, heads, size)
    flash_attn_varlen_func       sequences packed one after another, keys in pages too
    flash_attn_with_kvcache      a step of a decoder: the cache is written in place
    flash_attn_qkvpacked_func, flash_attn_kvpacked_func, flash_attn_varlen_qkvpacked_func,
    flash_attn_varlen_kvpacked_func     the first two, of tensors that hold keys and values together

Code for GPUs runs on CPUs when it imports from here: ``from qkv_fast.integrations.flash_attn import
flash_attn_func``. Names, order and defaults of the parameters are those of flash_attn 2.8.

What all of them have in common:

- Tensors are float32, float64, float16 or bfloat16 on the CPU, with any strides, and are not
  copied. The number of query heads may be a multiple of that of key heads.
- `softmax_scale` is 1/√D by default. `causal` and `window_size` align the last query with the last
  key (bottom-right). In ``window_size=(left, right)`` both ends are inclusive and -1 is no bound.
  ``softcap=0.0`` is no soft cap. `alibi_slopes` of shape (heads,) or (batch, heads) add
  ``-slope * abs(position - j)`` to the scores.
- A row that sees no key is zeros, and its log-sum-exp is -inf.
- There is no dropout and no gradient: `dropout_p` other than 0.0 raises ValueError, and a tensor
  that requires grad while grad mode is on raises TypeError. `deterministic` and `num_splits` have
  no effect: all results are reproducible.
- With ``return_attn_probs=True`` the result is (out, softmax_lse, S_dmask). softmax_lse is float32,
  float64 for float64. S_dmask is an empty tensor, since it is what dropout left.
- Wrong shapes and values raise ValueError or TypeError, before anything is written.
"""

from __future__ import annotations

from typing import Any

import numpy as np

try:
    import torch
except ImportError as error:
    raise ImportError('torch is missing: pip install "qkv-fast[torch]"') from error

import qkv_fast

from .._dtypes import Array

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

Tensor = torch.Tensor
Window = tuple[int, int]
Answer = Tensor | tuple[Tensor, Tensor, Tensor]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Answer:
    """Compute attention over (batch, length, heads, size); the module's docstring has the rules.

    Parameters
    ----------
    q : Tensor, shape (batch, Lq, Hq, D)
    k : Tensor, shape (batch, Lk, Hkv, D)
    v : Tensor, shape (batch, Lk, Hkv, Dv)

    Returns
    -------
    out : Tensor, shape (batch, Lq, Hq, Dv)
    softmax_lse : Tensor, shape (batch, Hq, Lq)
        With `return_attn_probs`, as is S_dmask.

    Examples
    --------
    >>> import torch
    >>> from qkv_fast.integrations.flash_attn import flash_attn_func
    >>> q = torch.ones(1, 1, 2, 4)  # one query of two heads: the last token
    >>> k = torch.ones(1, 3, 1, 4)
    >>> v = torch.arange(3.0).reshape(1, 3, 1, 1)
    >>> flash_attn_func(q, k, v, causal=True).flatten().tolist()
    [1.0, 1.0]
    """
    q, k, v = _inputs(q=q, k=k, v=v)
    _check_axes(4, "(batch, length, heads, size)", q=q, k=k, v=v)
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    out = _new_result(q, v)
    lse = _attend(q, k, v, out, return_attn_probs, options)
    return out if lse is None else (out, torch.from_numpy(lse), q.new_empty(0))


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Answer:
    """Compute `flash_attn_func` of qkv (batch, length, 3, heads, size)."""
    _check_packed(5, 3, qkv=qkv)
    q, k, v = qkv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs)  # fmt: skip


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Answer:
    """Compute `flash_attn_func` of q and kv (batch, length, 2, heads, size)."""
    _check_packed(5, 2, kv=kv)
    k, v = kv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs)  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Answer:
    """Compute attention within sequences that are packed one after another.

    Parameters
    ----------
    q : Tensor, shape (total_q, Hq, D)
        Sequence i is ``q[cu_seqlens_q[i]:cu_seqlens_q[i + 1]]``.
    k, v : Tensor, shape (total_k, Hkv, D or Dv)
        Likewise; with `block_table` pages, (pages, page_size, Hkv, D or Dv).
    cu_seqlens_q, cu_seqlens_k : Tensor of ints, shape (batch + 1,)
        Where each sequence begins, and the total.
    max_seqlen_q, max_seqlen_k : int
        Not needed here, and not looked at.
    block_table : Tensor of ints, shape (batch, blocks), optional
        Key j of sequence i is row ``j % page_size`` of page ``block_table[i, j // page_size]``.

    Returns
    -------
    out : Tensor, shape (total_q, Hq, Dv)
    softmax_lse : Tensor, shape (Hq, total_q)
        With `return_attn_probs`, as is S_dmask.

    Examples
    --------
    >>> import torch
    >>> from qkv_fast.integrations.flash_attn import flash_attn_varlen_func
    >>> q = k = torch.ones(5, 1, 4)
    >>> v = torch.arange(5.0).reshape(5, 1, 1)
    >>> starts = torch.tensor([0, 2, 5], dtype=torch.int32)
    >>> flash_attn_varlen_func(q, k, v, starts, starts, 3, 3).flatten().tolist()
    [0.5, 0.5, 3.0, 3.0, 3.0]
    """
    q, k, v = _inputs(q=q, k=k, v=v)
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    out = _new_result(q, v)
    if block_table is None:
        answer = qkv_fast.varlen_attention(
            q, k, v, cu_seqlens_q.numpy(), cu_seqlens_k.numpy(), out=out,
            return_lse=return_attn_probs, **options)  # fmt: skip
        if not return_attn_probs:
            return out
        return out, torch.from_numpy(answer[1].T.copy()), q.new_empty(0)
    lse = _attend_packed_pages(
        q, k, v, cu_seqlens_q.tolist(), cu_seqlens_k.diff().tolist(), block_table.numpy(), out,
        return_attn_probs, options)  # fmt: skip
    return out if lse is None else (out, lse, q.new_empty(0))


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Answer:
    """Compute `flash_attn_varlen_func` of qkv (total, 3, heads, size)."""
    _check_packed(4, 3, qkv=qkv)
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale,
        causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Answer:
    """Compute `flash_attn_varlen_func` of q and kv (total_k, 2, heads, size)."""
    _check_packed(4, 2, kv=kv)
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs)  # fmt: skip


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Append keys and values to a cache in place, and attend to it.

    Parameters
    ----------
    q : Tensor, shape (batch, Lq, Hq, D)
    k_cache, v_cache : Tensor, shape (cached, Lk, Hkv, D or Dv)
        With `block_table` pages, (pages, page_size, Hkv, D or Dv).
    k, v : Tensor, shape (batch, new, Hkv, D or Dv), optional
        Written to the cache from position ``cache_seqlens[i]`` on, which must be given then.
    rotary_cos, rotary_sin : Tensor, shape (positions, dims / 2), optional
        Cosines and sines by which the first `dims` elements of k and q are rotated. New key i
        stands at ``cache_seqlens + i``; so does query i if `causal` or a window is in force, else
        all queries stand at `cache_seqlens`. They need `k`.
    cache_seqlens : int or Tensor of ints, shape (batch,), optional
        How many keys each sequence has before `k`; the length of the cache by default. It is not
        changed.
    cache_batch_idx : Tensor of ints, shape (batch,), optional
        Which row of the cache belongs to each sequence; not with `block_table`.
    cache_leftpad : Tensor of ints, shape (batch,), optional
        Where each sequence's keys begin in the cache; not with `block_table`.
    block_table : Tensor of ints, shape (batch, blocks), optional
        Key j of sequence i is row ``j % page_size`` of page ``block_table[i, j // page_size]``.
    rotary_interleaved : bool
        Whether the elements 2 j and 2 j + 1 are a pair, else j and j + dims / 2.

    Returns
    -------
    out : Tensor, shape (batch, Lq, Hq, Dv)
    softmax_lse : Tensor, shape (batch, Hq, Lq)
        With `return_softmax_lse`.

    Examples
    --------
    >>> import torch
    >>> from qkv_fast.integrations.flash_attn import flash_attn_with_kvcache
    >>> k_cache, v_cache = torch.zeros(2, 1, 8, 1, 4)  # room for 8 tokens
    >>> new = torch.ones(1, 2, 1, 4)
    >>> lengths = torch.zeros(1, dtype=torch.int32)
    >>> out = flash_attn_with_kvcache(
    ...     new, k_cache, v_cache, new, new, cache_seqlens=lengths, causal=True)
    >>> v_cache[0, :, 0, 0].tolist()
    [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    """
    q, k_cache, v_cache = _inputs(q=q, k_cache=k_cache, v_cache=v_cache)
    _check_axes(4, "(batch, length, heads, size)", q=q, k_cache=k_cache, v_cache=v_cache)
    options = _options(0.0, softmax_scale, causal, window_size, softcap, alibi_slopes)
    batch, q_len = q.shape[:2]
    page_size = k_cache.shape[1]
    if block_table is not None and not (cache_batch_idx is None and cache_leftpad is None):
        raise ValueError("block_table goes with neither cache_batch_idx nor cache_leftpad")
    # A row of a cache without a block table is one large page.
    table = block_table
    if table is None:
        rows = torch.arange(batch) if cache_batch_idx is None else cache_batch_idx
        table = rows.reshape(-1, 1)
    if table.dim() != 2 or len(table) != batch:
        name = "cache_batch_idx" if block_table is None else "block_table"
        given = table[:, 0] if block_table is None else table
        raise ValueError(f"{name} has shape {tuple(given.shape)}: q has {batch} sequences")
    lengths = _lengths(cache_seqlens, batch, table.shape[1] * page_size, k is not None)
    if (k is None) != (v is None):
        raise ValueError("k and v must both be given or both be omitted")
    if (rotary_cos is None) != (rotary_sin is None) or (rotary_cos is not None and k is None):
        raise ValueError("rotary_cos and rotary_sin go together, and with new k and v")
    if k is not None and v is not None:
        k, v = _inputs(k=k, v=v)
        _check_new(k, k_cache, batch, "k")
        _check_new(v, v_cache, batch, "v")
        positions = lengths[:, None] + torch.arange(k.shape[1])
        if k.shape[1] != v.shape[1]:
            raise ValueError(f"k has {k.shape[1]} new tokens, but v has {v.shape[1]}")
        if positions.numel() and int(positions.max()) >= table.shape[1] * page_size:
            raise ValueError(
                f"the cache has room for {table.shape[1] * page_size} tokens of a sequence: "
                f"{int(positions.max()) + 1} are needed"
            )
        pages = table.long().gather(1, positions // page_size)
        if pages.numel() and not 0 <= int(pages.min()) <= int(pages.max()) < len(k_cache):
            raise ValueError(f"new keys go to pages from 0 to {len(k_cache) - 1} only")
        if rotary_cos is not None and rotary_sin is not None:
            moves = causal or tuple(window_size) != (-1, -1)
            of_queries = lengths[:, None] + torch.arange(q_len) * int(moves)
            q = _rotate(q, rotary_cos, rotary_sin, of_queries, rotary_interleaved)
            k = _rotate(k, rotary_cos, rotary_sin, positions, rotary_interleaved)
        k_cache[pages, positions % page_size] = k
        v_cache[pages, positions % page_size] = v
        lengths = lengths + k.shape[1]
    if cache_leftpad is not None:
        j = torch.arange(int(lengths.max()) if batch else 0)
        options["attn_mask"] = (j >= cache_leftpad[:, None])[:, None, None]
    out = _new_result(q, v_cache)
    lse = _attend_pages(
        q, k_cache, v_cache, table.numpy(), lengths.numpy(), out, return_softmax_lse, options
    )
    return out if lse is None else (out, torch.from_numpy(lse))


# --- Parameters ---------------------------------------------------------------------------------


def _inputs(**tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors without their gradients, or raise if these are needed."""
    for name, x in tensors.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(x).__name__}")
        if x.requires_grad and torch.is_grad_enabled():
            raise TypeError(
                f"{name} is a tensor that requires grad, but no gradient can be computed: call "
                f"within torch.no_grad(), or pass {name}.detach()"
            )
    return tuple(x.detach() if x.requires_grad else x for x in tensors.values())


def _check_axes(axes: int, meaning: str, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.dim() != axes:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: it must be {meaning}")
    if len({x.shape[0] for name, x in tensors.items() if name in "qkv"}) > 1:
        raise ValueError("q, k and v must have the same length on axis 0")


def _check_packed(axes: int, count: int, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.dim() != axes or x.shape[-3] != count:
            lead = "batch, length" if axes == 5 else "total"
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}: it must be ({lead}, {count}, heads, size)"
            )


def _check_new(x: Tensor, cache: Tensor, batch: int, name: str) -> None:
    """Raise unless the shape of new keys or values fits."""
    if x.dim() != 4 or x.shape[0] != batch or x.shape[2:] != cache.shape[2:]:
        wanted = f"({batch}, new, {', '.join(map(str, cache.shape[2:]))})"
        raise ValueError(f"{name} has shape {tuple(x.shape)}: it must be {wanted}")


def _options(
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Window,
    softcap: float,
    alibi_slopes: Tensor | None,
) -> dict[str, Any]:
    """Return the keyword arguments of this library's functions."""
    if dropout_p != 0.0:
        raise ValueError(f"dropout_p is {dropout_p!r}: it must be 0.0, since there is no dropout")
    left, right = (None if side < 0 else side for side in window_size)
    options: dict[str, Any] = {
        "is_causal": bool(causal), "scale": softmax_scale, "softcap": softcap,
    }  # fmt: skip
    if left is not None or right is not None:
        options["window"] = (left, right)
    if alibi_slopes is not None:
        options["alibi_slopes"] = alibi_slopes.detach()
    return options


def _lengths(given: int | Tensor | None, batch: int, most: int, is_needed: bool) -> Tensor:
    """Return how many keys each sequence has in the cache, as int64."""
    if given is None and is_needed:
        raise ValueError("cache_seqlens is needed where k and v are given")
    lengths = torch.as_tensor(most if given is None else given).long()
    if lengths.dim() > 1 or (lengths.dim() == 1 and len(lengths) != batch):
        raise ValueError(
            f"cache_seqlens has shape {tuple(lengths.shape)}: an int for each of {batch} sequences "
            "is needed"
        )
    if lengths.numel() and not 0 <= int(lengths.min()) <= int(lengths.max()) <= most:
        raise ValueError(
            f"cache_seqlens goes from {int(lengths.min())} to {int(lengths.max())}: a sequence may "
            f"have 0 to {most} tokens"
        )
    return lengths.expand(batch).contiguous()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """Return (batch, length, heads, size) with its first elements rotated, (batch, length)."""
    half = cos.shape[-1]
    if cos.dim() != 2 or cos.shape != sin.shape or 2 * half > x.shape[-1]:
        raise ValueError(
            f"rotary_cos has shape {tuple(cos.shape)} and rotary_sin {tuple(sin.shape)}: both must "
            f"be (positions, dims / 2), with at most {x.shape[-1]} dims"
        )
    if positions.numel() and int(positions.max()) >= len(cos):
        raise ValueError(
            f"rotary_cos has {len(cos)} positions, but position {int(positions.max())} is needed"
        )
    real = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (table[positions].to(real)[:, :, None] for table in (cos, sin))
    rotated = x.clone()
    if interleaved:
        first, second = x[..., 0 : 2 * half : 2].to(real), x[..., 1 : 2 * half : 2].to(real)
        targets = rotated[..., 0 : 2 * half : 2], rotated[..., 1 : 2 * half : 2]
    else:
        first, second = x[..., :half].to(real), x[..., half : 2 * half].to(real)
        targets = rotated[..., :half], rotated[..., half : 2 * half]
    targets[0].copy_(first * cos - second * sin)
    targets[1].copy_(first * sin + second * cos)
    return rotated


# --- Calls --------------------------------------------------------------------------------------


def _new_result(q: Tensor, v: Tensor) -> Tensor:
    """Return a new tensor for the result, in C order."""
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, return_lse: bool, options: dict[str, Any]
) -> Array | None:
    """Attend with tensors (batch, length, heads, size) into `out`; return the log-sum-exp."""
    answer = qkv_fast.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), enable_gqa=True,
        query_offset=k.shape[1] - q.shape[1], out=out.transpose(1, 2), return_lse=return_lse,
        **options)  # fmt: skip
    return answer[1] if return_lse else None


def _attend_pages(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Array,
    lengths: Array,
    out: Tensor,
    return_lse: bool,
    options: dict[str, Any],
) -> Array | None:
    """Attend to pages (pages, page_size, heads, size), likewise."""
    answer = qkv_fast.paged_attention(
        q.transpose(1, 2), k_pages.transpose(1, 2), v_pages.transpose(1, 2), block_table, lengths,
        out=out.transpose(1, 2), return_lse=return_lse, **options)  # fmt: skip
    return answer[1] if return_lse else None


def _attend_packed_pages(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    starts: list[int],
    lengths: list[int],
    block_table: Array,
    out: Tensor,
    return_lse: bool,
    options: dict[str, Any],
) -> Tensor | None:
    """Attend to pages with packed queries, a sequence at a time; return lse (heads, total_q)."""
    batch = len(starts) - 1
    if len(lengths) != batch or len(block_table) != batch or starts[-1] != len(q):
        raise ValueError(
            f"cu_seqlens_q, cu_seqlens_k and block_table are for {batch}, {len(lengths)} and "
            f"{len(block_table)} sequences, and q has {len(q)} tokens of {starts[-1]}"
        )
    slopes = options.pop("alibi_slopes", None)
    lse = q.new_empty((q.shape[1], len(q)), dtype=torch.float64 if q.dtype == torch.float64
                      else torch.float32) if return_lse else None  # fmt: skip
    for i in range(batch):
        rows = slice(starts[i], starts[i + 1])
        if slopes is not None:
            options["alibi_slopes"] = slopes[i] if slopes.dim() == 2 else slopes
        part = _attend_pages(
            q[None, rows], k_pages, v_pages, block_table[i : i + 1],
            np.array([lengths[i]]), out[None, rows], return_lse, options)  # fmt: skip
        if lse is not None and part is not None:
            lse[:, rows] = torch.from_numpy(part[0])
    return lse
