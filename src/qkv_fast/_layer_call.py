"""A call of MultiHeadAttention: projections, the op on their views, the output projection.

    qkv = x W_inᵀ + b_in            one product; q, k and v are views (batch, heads, length, size)
    q   = attention(q, k, v)        in place of the queries: (batch, length, heads * size) in memory
    y   = q W_outᵀ + b_out

Sequences are taken ROWS_AT_ONCE rows at a time, so that a large batch needs little memory beyond
its result, and what one step writes is in the caches when the next one reads it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ._attention import scaled_dot_product_attention
from ._dtypes import (
    BFLOAT16,
    FLOAT16,
    INT8,
    SWAPPED,
    Array,
    code_of,
    named,
    reals,
    result_dtype,
    rounded,
    storage_code,
)
from ._kv_cache import KVCache
from ._linear import linear
from ._options import Ints
from ._problem.arguments import as_array, plain
from ._weights import attention_weights

if TYPE_CHECKING:
    from ._layer import MultiHeadAttention
    from .rotary import Rotary

ROWS_AT_ONCE = 1024


Sources = tuple[Array | None, Array | None, Array | None]  # vectors for queries, keys, values


class Mask(NamedTuple):
    """What a batch may look at: `attn_mask` and `key_lengths` of the op."""

    attn_mask: Array | None
    key_lengths: Array | None

    def of(self, entries: slice) -> dict[str, Any]:
        """Return the op's arguments for some entries of the batch."""
        mask, lengths = self
        if mask is not None and mask.ndim == 4 and mask.shape[0] > 1:
            mask = mask[entries]
        return {"attn_mask": mask, "key_lengths": None if lengths is None else lengths[entries]}


# --- Arguments ------------------------------------------------------------------------------------


def tokens(layer: MultiHeadAttention, name: str, given: Any, size: int) -> tuple[Array, Array]:
    """Return token vectors as they were given, and as contiguous reals (batch, length, size)."""
    array = as_array(name, given)
    code = code_of(array.dtype)
    if code < 0:
        raise TypeError(
            f"{name} has dtype {named(array.dtype)}: it must be float32, float64, float16 or "
            "bfloat16"
        )
    if array.ndim not in (2, 3) or array.shape[-1] != size:
        raise ValueError(
            f"{name} has shape {array.shape}: it must be (batch, length, {size}) or "
            f"(length, {size})"
        )
    vectors = np.ascontiguousarray(reals(array, code, layer._real))
    return array, vectors if vectors.ndim == 3 else vectors[np.newaxis]


def context_pair(layer: MultiHeadAttention, context: Any) -> tuple[Array, Array]:
    """Return a context's vectors for keys and for values; one array serves both."""
    if isinstance(context, tuple | list):
        if len(context) != 2:
            raise ValueError(f"context has {len(context)} arrays: a pair is for keys and values")
        _, key = tokens(layer, "context[0]", context[0], layer.kdim)
        _, value = tokens(layer, "context[1]", context[1], layer.vdim)
        if key.shape[:2] != value.shape[:2]:
            raise ValueError(
                f"context has keys of shape {key.shape} and values of shape {value.shape}: "
                "batch and length must be the same"
            )
        return key, value
    if layer.kdim != layer.vdim:
        raise ValueError(
            f"kdim is {layer.kdim} and vdim {layer.vdim}: context must be a pair of arrays"
        )
    _, both = tokens(layer, "context", context, layer.kdim)
    return both, both


def combined_mask(attn_mask: Any, padding: Any, batch: int, keys: int, has_cache: bool) -> Mask:
    """Return what both masks leave; padding at the ends of sequences becomes lengths."""
    mask = None if attn_mask is None else plain("attn_mask", attn_mask)
    if padding is None:
        return Mask(mask, None)
    padding = plain("key_padding_mask", padding)
    if padding.dtype != np.bool_ or padding.shape not in ((batch, keys), (keys,)):
        raise ValueError(
            f"key_padding_mask is an array of {padding.dtype} of shape {padding.shape}: it must be "
            f"of bool, ({batch}, {keys})"
        )
    padding = np.broadcast_to(padding, (batch, keys))
    lengths = np.zeros(batch, np.int64)  # up to the last key that is none
    if keys:
        lengths = np.where(padding.all(axis=1), 0, keys - padding[:, ::-1].argmin(axis=1))
    if not has_cache and np.array_equal(padding, np.arange(keys) >= lengths[:, np.newaxis]):
        return Mask(mask, lengths)
    allowed = ~padding[:, np.newaxis, np.newaxis]
    if mask is None:
        return Mask(allowed, None)
    if mask.dtype == np.bool_:
        return Mask(mask & allowed, None)
    code = code_of(mask.dtype)
    if code < 0:
        raise TypeError(
            f"attn_mask has dtype {named(mask.dtype)}: it must be bool, float32, float64, float16 "
            "or bfloat16"
        )
    return Mask(np.where(allowed, reals(mask, code), -np.inf), None)


class Target:
    """Where a call's result goes: contiguous reals to compute into, then `finish`."""

    def __init__(self, given: Array, vectors: Array, others: list[Array], out: Any) -> None:
        code = code_of(given.dtype) & ~SWAPPED
        self.code = code
        narrow = code in (FLOAT16, BFLOAT16)
        dtype = result_dtype(given.dtype) if narrow else vectors.dtype
        self.array = np.empty(given.shape, dtype) if out is None else as_array(
            "out", out, in_place=True)  # fmt: skip
        same = self.array.dtype == dtype or (
            code == BFLOAT16 and code_of(self.array.dtype, uint16_is_bf16=True) == BFLOAT16
        )
        if self.array.shape != given.shape or not same:
            raise ValueError(
                f"out is an array of {named(self.array.dtype)} of shape {self.array.shape}: it "
                f"must be of {named(np.dtype(dtype))}, {given.shape}"
            )
        if not self.array.flags.writeable:
            raise ValueError("out is read-only")
        self.result: Any = self.array if out is None else out
        # A sequence's result may replace its own vectors, which are no longer needed then.
        in_place = np.shares_memory(vectors, self.array) and (
            vectors.__array_interface__["data"] == self.array.__array_interface__["data"]
        )
        overlaps = any(np.may_share_memory(other, self.array) for other in others) or (
            np.may_share_memory(given, self.array) and not in_place
        )
        direct = (not narrow and self.array.flags.c_contiguous and self.array.flags.aligned
                  and not overlaps)  # fmt: skip
        self.reals = self.array.reshape(vectors.shape) if direct else np.empty_like(vectors)

    def finish(self) -> Any:
        """Write the result where it goes and return it as the caller gets it."""
        if not np.may_share_memory(self.reals, self.array):
            narrow = self.reals.reshape(self.array.shape)
            if self.code in (FLOAT16, BFLOAT16):
                narrow = rounded("x", narrow, self.code)[0].view(self.array.dtype)
            np.copyto(self.array, narrow)
        return self.result


# --- Steps ----------------------------------------------------------------------------------------


def project(layer: MultiHeadAttention, sources: Sources, num_threads: int | None) -> list[Any]:
    """Return the heads of the vectors for queries, for keys and for values; None for None.

    The arrays are (batch, length, size) of contiguous reals. Neighbours that are the same array
    are one product.
    """
    parts, rows = layer._parts, layer._rows
    weights = (parts.query, parts.key, parts.value)
    bias = None if parts.bias is None else reals(parts.bias, layer._code, layer._real)
    heads: list[Any] = []
    while len(heads) < 3:
        first = len(heads)
        source, last = sources[first], first + 1
        if source is None:
            heads.append(None)
            continue
        while parts.fused is not None and last < 3 and sources[last] is source:
            last += 1
        batch, length, size = source.shape
        span = slice(sum(rows[:first]), sum(rows[:last]))
        weight = weights[first] if parts.fused is None else parts.fused[span]
        assert weight is not None
        y = np.empty((batch * length, span.stop - span.start), layer._real)
        linear(source.reshape(-1, size), weight, layer._code, None if bias is None else bias[span],
               y, num_threads)  # fmt: skip
        for columns in np.split(y, np.cumsum(rows[first : last - 1]), axis=1):
            heads.append(columns.reshape(batch, length, -1, layer.head_dim).swapaxes(1, 2))
    return heads


def normalize(layer: MultiHeadAttention, x: Array, weight: Array) -> None:
    """Divide each row of x by the root of its mean square, in place, and multiply by weight."""
    square = np.einsum("...d,...d->...", x, x)[..., np.newaxis]
    x /= np.sqrt(square / layer._real(x.shape[-1]) + layer._real(layer.norm_eps))
    x *= reals(weight, layer._code, layer._real)


def place(
    layer: MultiHeadAttention, query: Array, key: Array, rotary: Rotary | None, positions: Any
) -> None:
    """Normalise and rotate queries and keys in place, where the layer and the call want that."""
    for x, weight in ((query, layer._parts.query_norm), (key, layer._parts.key_norm)):
        if weight is not None:
            normalize(layer, x, weight)
        if rotary is not None:
            rotary(x, positions, out=x)


def mix(layer: MultiHeadAttention, query: Array, y: Array, num_threads: int | None) -> None:
    """Write to y the output projection of the heads' results, which lie where the queries did."""
    parts = layer._parts
    rows = query.swapaxes(1, 2).reshape(-1, layer._rows[0])
    bias = None if parts.output_bias is None else reals(parts.output_bias, layer._code, layer._real)
    linear(rows, parts.output, layer._code, bias, y.reshape(-1, y.shape[-1]), num_threads)


def cached_keys(cache: KVCache, real: Any) -> Array:
    """Return the keys of a cache as reals (batch, kv heads, longest length, head size)."""
    pool = cache._pool
    lengths = pool.lengths
    if pool.window is not None:
        raise ValueError("need_weights can't be had with a cache that has a window")
    longest = int(lengths.max(initial=0))

    def dense(pages: Array) -> Array:
        if pool.fixed:
            return pages[:, :, :longest]
        used = pool.table[:, : -(-longest // pool.page_size)].clip(0)
        joined: Array = np.moveaxis(pages[used], 2, 1)  # (batch, heads, blocks, page, ...)
        whole: Array = joined.reshape(*joined.shape[:2], -1, *joined.shape[4:])
        return whole[:, :, :longest]

    keys: Array = dense(pool.keys)
    if pool.code != INT8:
        return reals(keys, storage_code(keys.dtype), real)
    assert pool.key_scales is not None
    keys = keys * dense(pool.key_scales)[..., np.newaxis]
    return keys


# --- A call ---------------------------------------------------------------------------------------


def run(
    layer: MultiHeadAttention,
    x: Any,
    context: Any,
    attn_mask: Any,
    key_padding_mask: Any,
    cache: KVCache | None,
    rotary: Rotary | None,
    positions: Ints | None,
    out: Any,
    is_causal: bool,
    need_weights: bool,
    options: dict[str, Any],
) -> tuple[Any, Array | None]:
    """Return the result and, if they are needed, the weights."""
    given, vectors = tokens(layer, "x", x, layer.embed_dim)
    batch, length = vectors.shape[:2]
    stored = context if isinstance(context, KVCache) else cache
    pair = None
    if context is not None:
        if rotary is not None or cache is not None:
            raise ValueError("a context goes with neither rotary nor cache")
        if stored is None:
            pair = context_pair(layer, context)
            if len(pair[0]) != batch:
                raise ValueError(f"context has batch {len(pair[0])}, but x has {batch}")
    elif layer._parts.fused is None:
        raise ValueError("kdim or vdim differ from embed_dim: a context must be given")
    if stored is not None:
        check_cache(layer, stored, batch)
    target = Target(given, vectors, [] if pair is None else list(pair), out)
    op = dict(options, is_causal=is_causal, scale=layer.scale)
    threads = op.get("num_threads")
    weights: Array | None = None
    if stored is None:
        keys = length if pair is None else pair[0].shape[1]
        mask = combined_mask(attn_mask, key_padding_mask, batch, keys, False)
        place_at: Any = 0 if positions is None else plain("positions", positions)
        if need_weights:
            weights = np.empty((batch, layer.num_heads, length, keys), layer._real)
        for entries in groups(batch, length, op):
            x = vectors[entries]
            sources = (x, x, x) if pair is None else (x, pair[0][entries], pair[1][entries])
            if pair is not None and pair[0] is pair[1]:
                sources = (x, sources[1], sources[1])
            query, key, value = project(layer, sources, threads)
            at = place_at[entries] if np.ndim(place_at) == 2 and len(place_at) > 1 else place_at
            place(layer, query, key, rotary, at)
            visible = mask.of(entries)
            if weights is not None:
                attention_weights(query, key, enable_gqa=True, out=weights[entries], **visible,
                                  **op)  # fmt: skip
            scaled_dot_product_attention(query, key, value, enable_gqa=True, out=query, **visible,
                                         **op)  # fmt: skip
            mix(layer, query, target.reals[entries], threads)
    else:
        with restored(cache):
            query = store_and_query(layer, vectors, stored, cache is not None, rotary, positions,
                                    threads)  # fmt: skip
            mask = combined_mask(attn_mask, key_padding_mask, batch, int(max(stored.lengths)), True)
            lengths = stored.lengths
            if need_weights:
                weights = attention_weights(
                    query, cached_keys(stored, layer._real), mask.attn_mask, enable_gqa=True,
                    key_lengths=lengths, query_offset=lengths - length, **op)  # fmt: skip
            stored.attend(query, mask.attn_mask, out=query, **op)
            mix(layer, query, target.reals, threads)
    if weights is not None and given.ndim == 2:
        weights = weights[0]
    return target.finish(), weights


def groups(batch: int, length: int, op: dict[str, Any]) -> Iterator[slice]:
    """Yield the sequences that are taken together."""
    step = max(1, ROWS_AT_ONCE // max(1, length))
    slopes: Any = op.get("alibi_slopes")
    if np.ndim(slopes) > 1:  # of the whole batch
        step = max(1, batch)
    for begin in range(0, batch, step):
        yield slice(begin, min(batch, begin + step))


def check_cache(layer: MultiHeadAttention, cache: KVCache, batch: int) -> None:
    """Check that a cache is one for the layer's keys and values."""
    pages, values = cache.key_pages, cache.value_pages
    sizes = (len(cache.lengths), pages.shape[1], pages.shape[3], values.shape[3])
    wanted = (batch, layer.num_kv_heads, layer.head_dim, layer.head_dim)
    if sizes != wanted:
        raise ValueError(
            f"the cache has batch, key heads and head sizes {sizes}: they must be {wanted}"
        )


@contextlib.contextmanager
def restored(cache: KVCache | None) -> Iterator[None]:
    """Take the tokens off the cache that a call has appended before it raised."""
    lengths: Any = None if cache is None else cache.lengths
    try:
        yield
    except BaseException:
        if cache is not None:
            with contextlib.suppress(ValueError):  # a window gave pages back
                cache.truncate(lengths)
        raise


def store_and_query(
    layer: MultiHeadAttention,
    vectors: Array,
    cache: KVCache,
    appends: bool,
    rotary: Rotary | None,
    positions: Ints | None,
    num_threads: int | None,
) -> Array:
    """Return the queries of some vectors, whose keys and values a cache takes if it `appends`."""
    if not appends:
        query: Array = project(layer, (vectors, None, None), num_threads)[0]
        return query
    query, key, value = project(layer, (vectors,) * 3, num_threads)
    at: Any = positions
    if positions is None:
        begin = cache.lengths
        at = begin[:, np.newaxis] + np.arange(vectors.shape[1])
        if (begin == begin[:1]).all():
            at = int(begin[:1].sum())
    place(layer, query, key, rotary, at)
    cache.append(key, value)
    return query
