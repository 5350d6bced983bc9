"""A call of MultiHeadAttention: projections, the op on their views, the output projection.

    qkv = x W_inᵀ + b_in            one product; q, k and v are views (batch, heads, length, size)
    q   = attention(q, k, v)        in place of the queries: (batch, length, heads * size) in memory
    y   = q W_outᵀ + b_out

Sequences are taken ROWS_AT_ONCE rows at a time, so that a large batch needs little memory beyond
its result, and what one step writes is in the caches when the next one reads it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
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
from ._norm import rms_norm
from ._options import Ints
from ._problem.arguments import as_array, plain
from ._threads import checked
from ._weights import attention_weights

if TYPE_CHECKING:
    from ._layer import MultiHeadAttention
    from .rotary import Rotary

ROWS_AT_ONCE = 1024
Sources = tuple[Array | None, Array | None, Array | None]  # vectors for queries, keys, values


class Heads(NamedTuple):
    """Views (batch, heads, length, head size) of what the projections gave; None for no vectors."""

    query: Any
    key: Any
    value: Any
    rotated: Any  # queries and keys as one array, where they come from one product


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


def combined_mask(
    attn_mask: Any, padding: Any, batch: int, keys: int, *, may_shorten: bool = True
) -> Mask:
    """Return what both masks leave; padding at the ends may become lengths of sequences."""
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
    if may_shorten and np.array_equal(padding, np.arange(keys) >= lengths[:, np.newaxis]):
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


def check_cache(layer: MultiHeadAttention, cache: KVCache, batch: int) -> None:
    """Check that a cache is one for the layer's keys and values."""
    pages, values = cache.key_pages, cache.value_pages
    sizes = (len(cache.lengths), pages.shape[1], pages.shape[3], values.shape[3])
    wanted = (batch, layer.num_kv_heads, layer.head_dim, layer.head_dim)
    if sizes != wanted:
        raise ValueError(
            f"the cache has batch, key heads and head sizes {sizes}: they must be {wanted}"
        )


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


def project(layer: MultiHeadAttention, sources: Sources, num_threads: int | None) -> Heads:
    """Return the heads of the vectors for queries, for keys and for values.

    The arrays are (batch, length, size) of contiguous reals. Neighbours that are the same array
    are one product.
    """
    parts, rows = layer._parts, layer._rows
    weights = (parts.query, parts.key, parts.value)
    bias = None if parts.bias is None else reals(parts.bias, layer._code, layer._real)
    heads: list[Any] = []
    rotated = None
    while len(heads) < 3:
        first = len(heads)
        source, last = sources[first], first + 1
        if source is None:
            heads.append(None)
            continue
        while parts.fused is not None and last < 3 and sources[last] is source:
            last += 1
        batch, length, size = source.shape
        begin, end = sum(rows[:first]), sum(rows[:last])
        weight = weights[first] if parts.fused is None else parts.fused[begin:end]
        assert weight is not None
        y = np.empty((batch * length, end - begin), layer._real)
        linear(source.reshape(len(y), size), weight, layer._code,
               None if bias is None else bias[begin:end], y, num_threads)  # fmt: skip
        split = (batch, length, (end - begin) // layer.head_dim, layer.head_dim)
        joined = y.reshape(split).swapaxes(1, 2)
        at = 0
        for count in rows[first:last]:
            heads.append(joined[:, at : at + count // layer.head_dim])
            at += count // layer.head_dim
        if first == 0 and last > 1:
            rotated = joined[:, : layer.num_heads + layer.num_kv_heads]
    query, key, value = heads
    return Heads(query, key, value, rotated)


def place(layer: MultiHeadAttention, heads: Heads, rotary: Rotary | None, positions: Any) -> None:
    """Normalise and rotate queries and keys in place, where the layer and the call want that."""
    norms = layer._parts.query_norm, layer._parts.key_norm
    for x, weight in zip((heads.query, heads.key), norms, strict=True):
        if x is not None and weight is not None:
            rms_norm(x, reals(weight, layer._code, layer._real), layer.norm_eps, out=x)
    if rotary is not None:
        rotary(heads.rotated, positions, out=heads.rotated)


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


@contextlib.contextmanager
def restored(caches: Sequence[KVCache]) -> Iterator[None]:
    """Take the tokens off the caches that a call has appended before it raised."""
    lengths = [cache.lengths for cache in caches]
    try:
        yield
    except BaseException:
        for cache, before in zip(caches, lengths, strict=True):
            with contextlib.suppress(ValueError):  # a window gave pages back
                cache.truncate(before)
        raise


# --- A call ---------------------------------------------------------------------------------------


class Call:
    """One call of a layer: its checked arguments, and the two ways to compute it."""

    def __init__(
        self,
        layer: MultiHeadAttention,
        x: Any,
        context: Any,
        cache: KVCache | None,
        rotary: Rotary | None,
        positions: Ints | None,
        masks: tuple[Any, Any],
        out: Any,
        options: dict[str, Any],
    ) -> None:
        given, self.x = tokens(layer, "x", x, layer.embed_dim)
        self.layer, self.rotary, self.positions, self.masks = layer, rotary, positions, masks
        self.is_batch = given.ndim == 3
        self.batch, self.length = self.x.shape[:2]
        self.cache = context if isinstance(context, KVCache) else cache
        self.appends = cache is not None
        self.pair: tuple[Array, Array] | None = None
        if context is not None and (rotary is not None or cache is not None):
            raise ValueError("context goes with neither rotary nor cache")
        if context is None and layer._parts.fused is None:
            raise ValueError("kdim or vdim differ from embed_dim: a context must be given")
        if self.cache is not None:
            check_cache(layer, self.cache, self.batch)
        elif context is not None:
            self.pair = context_pair(layer, context)
            if len(self.pair[0]) != self.batch:
                raise ValueError(f"context has batch {len(self.pair[0])}, but x has {self.batch}")
        self.target = Target(given, self.x, list(self.pair or ()), out)
        self.op = options | {"scale": layer.scale}
        if options.get("num_threads") is not None:
            checked(options["num_threads"])

    def run(self, need_weights: bool) -> tuple[Any, Array | None]:
        """Return the result and, if they are needed, the weights."""
        if self.cache is None:
            weights = self.attend(need_weights)
        else:
            with restored([self.cache] if self.appends else []):
                weights = self.attend_cache(self.cache, need_weights)
        result = self.target.finish()
        return result, weights if weights is None or self.is_batch else weights[0]

    def project(self, sources: Sources) -> Heads:
        return project(self.layer, sources, self.op.get("num_threads"))

    def mix(self, query: Array, entries: slice) -> None:
        """Write the output projection of the heads' results, which lie where the queries did."""
        parts, layer = self.layer._parts, self.layer
        y = self.target.reals[entries].reshape(-1, layer.embed_dim)
        rows = query.swapaxes(1, 2).reshape(len(y), layer._rows[0])
        bias = parts.output_bias
        linear(rows, parts.output, layer._code,
               None if bias is None else reals(bias, layer._code, layer._real),
               y, self.op.get("num_threads"))  # fmt: skip

    def attend(self, need_weights: bool) -> Array | None:
        """Compute a call without a cache, some sequences at a time; return the weights or None."""
        layer = self.layer
        keys = self.length if self.pair is None else self.pair[0].shape[1]
        mask = combined_mask(*self.masks, self.batch, keys)
        positions: Any = 0 if self.positions is None else plain("positions", self.positions)
        each = np.ndim(positions) == 2 and len(positions) > 1
        weights = None
        if need_weights:
            weights = np.empty((self.batch, layer.num_heads, self.length, keys), layer._real)
        for entries in self.groups():
            x = self.x[entries]
            sources: Sources = (x, x, x)
            if self.pair is not None:
                key = self.pair[0][entries]
                sources = (x, key, key if self.pair[1] is self.pair[0] else self.pair[1][entries])
            heads = self.project(sources)
            place(layer, heads, self.rotary, positions[entries] if each else positions)
            query, key, value, _ = heads
            op = self.op | mask.of(entries)
            if weights is not None:
                attention_weights(query, key, enable_gqa=True, out=weights[entries], **op)
            scaled_dot_product_attention(query, key, value, enable_gqa=True, out=query, **op)
            self.mix(query, entries)
        return weights

    def groups(self) -> Iterator[slice]:
        """Yield the sequences that are taken together."""
        step = max(1, ROWS_AT_ONCE // max(1, self.length))
        ranges = self.op.get("key_ranges")
        ends: list[Any] = list(ranges) if isinstance(ranges, tuple | list) else []
        given = [(self.op.get("alibi_slopes"), 1), (self.op.get("attn_bias"), 3)]
        given += [(end, 2) for end in ends]
        if any(x is not None and np.ndim(x) > axes for x, axes in given):  # differ over the batch
            step = max(1, self.batch)
        for begin in range(0, self.batch, step):
            yield slice(begin, min(self.batch, begin + step))

    def attend_cache(self, cache: KVCache, need_weights: bool) -> Array | None:
        """Compute a call whose keys are, or come to be, in a cache."""
        layer = self.layer
        if self.appends:
            heads = self.project((self.x, self.x, self.x))
            place(layer, heads, self.rotary, self.positions_behind(cache.lengths))
            cache.append(heads.key, heads.value)
        else:
            heads = self.project((self.x, None, None))
            place(layer, heads, None, 0)
        query = heads.query
        lengths = cache.lengths
        longest = int(lengths.max(initial=0))
        mask = combined_mask(*self.masks, self.batch, longest, may_shorten=False).attn_mask
        weights = None
        if need_weights:
            weights = attention_weights(
                query, cached_keys(cache, layer._real), mask, enable_gqa=True,
                key_lengths=lengths, query_offset=lengths - self.length, **self.op)  # fmt: skip
        cache.attend(query, mask, out=query, **self.op)
        self.mix(query, slice(None))
        return weights

    def positions_behind(self, lengths: Array) -> Any:
        """Return the positions of x: those given, or those behind the tokens of the cache."""
        if self.positions is not None:
            return self.positions
        if (lengths == lengths[:1]).all():
            return int(lengths[:1].sum())
        return lengths[:, np.newaxis] + np.arange(self.length)
