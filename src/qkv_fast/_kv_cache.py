"""KVCache: its API. What it stores, and in which pages, is in _page_pool."""

from __future__ import annotations

from typing import Any, Literal, Unpack, overload

import numpy as np

from . import _dispatch
from ._dispatch import notify_call_start, solve
from ._dtypes import CODES, Array, dtype_name, rounded
from ._options import CacheOptions, Ints, KeyRanges, Progress, Window
from ._page_pool import LARGEST, PagePool
from ._problem.arguments import as_array, indices_of, integer, per_sequence, shown
from ._problem.output import output, watch
from ._problem.problem import UNBOUNDED, Problem
from ._problem.scoring import mask, scoring, window_sides
from ._problem.tensors import cached

_NAMES = {code: name for name, code in CODES.items()}
WINDOW_PAGE = 64  # tokens of a page, if there is a window and no page_size


class KVCache:
    """Keys and values of the tokens so far, for a batch of sequences of different lengths.

    Storage is in one piece per sequence, or with `page_size` in pages that sequences take from a
    common pool as they grow, may share, and give back.

    Parameters
    ----------
    batch, num_kv_heads : int
        Sequences, and key heads of each.
    capacity : int
        Tokens that a sequence can have. With `window` it counts all tokens that were appended, not
        only those that are kept.
    head_dim : int
        Size of a key; `v_dim`, of a value, is the same unless given.
    v_dim : int, optional
    dtype : {"float32", "float64", "float16", "bfloat16", "int8"} or dtype of NumPy or torch
        What is stored; what is appended is rounded to it. bfloat16 is stored as uint16. int8 has
        a float32 scale for each token and head, the largest magnitude of its row over 127: an
        element is off by at most 1/254 of that magnitude.
    page_size : int, optional
        Tokens of a page.
    num_pages : int, optional
        Size of the pool; by default enough for all sequences at full length.
    window : int, optional
        A query sees its own position and the `window` positions before it. Pages that no later
        query can see are given back. Storage is then in pages, of 64 tokens by default, and the
        default pool lets each sequence append max(window, 512) tokens at a time.

    Raises
    ------
    TypeError, ValueError
        An argument of the wrong kind or out of range.
    MemoryError
        Storage that can't be allocated.

    Notes
    -----
    uint16 arrays mean bfloat16 everywhere here. What comes in may be CPU tensors of torch, as in
    `scaled_dot_product_attention`. Whatever raises leaves the cache as it was. ``copy.copy``,
    ``copy.deepcopy`` and pickle give independent caches with storage of their own.

    Any number of threads may call `attend`, `views` and the properties at the same time. A thread
    that changes the cache (`append`, `extend`, `truncate`, `reset`, `reorder`, `fork`) needs a lock
    of the caller's against all others that use it, as a NumPy array does. Without that the others'
    results and the cache's contents are undefined, but no memory outside of the cache is touched.

    Examples
    --------
    >>> import numpy as np
    >>> import qkv_fast
    >>> rng = np.random.default_rng(0)
    >>> cache = qkv_fast.KVCache(batch=1, num_kv_heads=2, capacity=100, head_dim=8)
    >>> k, v = rng.standard_normal((2, 1, 2, 5, 8), np.float32)  # a prompt of 5 tokens
    >>> q = rng.standard_normal((1, 4, 5, 8), np.float32)  # 4 query heads
    >>> cache.append(k, v)
    >>> prompt = cache.attend(q, is_causal=True)
    >>> cache.append(k[:, :, :1], v[:, :, :1])  # one more token
    >>> cache.attend(q[:, :, :1]).shape, int(cache.lengths[0])
    ((1, 4, 1, 8), 6)
    >>> cache
    <KVCache batch=1, num_kv_heads=2, capacity=100, head_dim=8, dtype=float32, lengths=[6]>
    """

    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        capacity: int,
        head_dim: int,
        v_dim: int | None = None,
        *,
        dtype: Any = "float32",
        page_size: int | None = None,
        num_pages: int | None = None,
        window: int | None = None,
    ) -> None:
        batch = integer("batch", batch, 0, LARGEST)
        num_kv_heads = integer("num_kv_heads", num_kv_heads, 1, LARGEST)
        capacity = integer("capacity", capacity, 1, LARGEST)
        head_dim = integer("head_dim", head_dim, 1, LARGEST)
        v_dim = head_dim if v_dim is None else integer("v_dim", v_dim, 1, LARGEST)
        window = None if window is None else min(integer("window", window, 0), UNBOUNDED)
        name = dtype_name(dtype)
        if page_size is None and window is not None:
            page_size = WINDOW_PAGE
        if page_size is not None:
            page_size = integer("page_size", page_size, 1, LARGEST)
            num_pages = None if num_pages is None else integer("num_pages", num_pages, 0, LARGEST)
        elif num_pages is not None:
            raise ValueError(f"num_pages is {shown(num_pages)}, but there is no page_size")
        if name not in CODES:
            kind = ValueError if name else TypeError
            raise kind(f"dtype is {shown(dtype)}: it must be one of {', '.join(CODES)}")
        sizes = (num_kv_heads, head_dim, v_dim)
        self._pool = PagePool.allocate(name, batch, sizes, capacity, page_size, num_pages, window)

    def __repr__(self) -> str:
        pool, batch = self._pool, len(self._pool.lengths)
        head_dim, v_dim = pool.keys.shape[3], pool.values.shape[3]
        facts = [f"batch={batch}", f"num_kv_heads={pool.keys.shape[1]}"]
        facts += [f"capacity={pool.capacity}", f"head_dim={head_dim}"]
        if v_dim != head_dim:
            facts.append(f"v_dim={v_dim}")
        facts.append(f"dtype={_NAMES[pool.code]}")
        lengths = pool.lengths[: batch if batch <= 8 else 6].tolist()
        facts.append(f"lengths=[{', '.join(map(str, lengths))}{', ...' if batch > 8 else ''}]")
        if not pool.fixed:
            facts.append(f"page_size={pool.page_size}")
            facts.append(f"free_pages={self.free_pages} of {self.num_pages}")
        if pool.window is not None:
            facts.append(f"window={pool.window}")
        return f"<{type(self).__name__} {', '.join(facts)}>"

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a copy of another cache's storage: for copy.copy, copy.deepcopy and pickle."""
        from copy import copy

        self.__dict__.update(state)
        self._pool = copy(self._pool)

    @classmethod
    def from_arrays(
        cls,
        key: Any,
        value: Any,
        lengths: Ints = 0,
        *,
        key_scales: Any = None,
        value_scales: Any = None,
    ) -> KVCache:
        """Return a cache whose storage is the given arrays themselves.

        Parameters
        ----------
        key : array, shape (batch, Hkv, capacity, D)
            Of any dtype that a cache can have (uint16 is bfloat16), any strides, or a tensor; not
            copied.
        value : array, shape (batch, Hkv, capacity, Dv)
            Of key's dtype.
        lengths : int or ints, shape broadcastable to (batch,)
            Tokens that the arrays already hold.
        key_scales, value_scales : array of float32, shape (batch, Hkv, capacity)
            With int8 arrays, and only with them.

        Examples
        --------
        >>> import numpy as np
        >>> import qkv_fast
        >>> own = np.zeros((2, 1, 3, 50, 8), np.float32)  # keys and values of 3 heads, 50 tokens
        >>> cache = qkv_fast.KVCache.from_arrays(*own)
        >>> cache.append(np.ones((1, 3, 2, 8), "f4"), np.ones((1, 3, 2, 8), "f4"))
        >>> own[0, 0, 0, :3, 0]
        array([1., 1., 0.], dtype=float32)
        """
        cache = cls.__new__(cls)
        cache._pool = pool = PagePool.of_arrays(key, value, key_scales, value_scales)
        rule = f"each must be from 0 to the arrays' capacity of {pool.capacity}"
        pool.lengths[:] = per_sequence("lengths", lengths, pool.lengths, pool.capacity, rule)
        return cache

    @property
    def lengths(self) -> Array:
        """Tokens of each sequence: int64, (batch,); a copy."""
        return self._pool.lengths.copy()

    @property
    def capacity(self) -> int:
        """Tokens that a sequence can have."""
        return self._pool.capacity

    @property
    def page_size(self) -> int | None:
        """Tokens of a page; None where storage is in one piece per sequence."""
        return None if self._pool.fixed else self._pool.page_size

    @property
    def num_pages(self) -> int:
        """Pages of the pool, taken and free."""
        return len(self._pool.uses)

    @property
    def free_pages(self) -> int:
        """Pages that no sequence has."""
        return len(self._pool.free)

    @property
    def key_pages(self) -> Array:
        """The storage: (pages, Hkv, page_size, D); in one piece, (batch, Hkv, capacity, D)."""
        return self._pool.keys

    @property
    def value_pages(self) -> Array:
        """The storage of the values, as `key_pages`."""
        return self._pool.values

    @property
    def key_scales(self) -> Array | None:
        """The factors of int8 keys, (pages, Hkv, page_size); None for other dtypes."""
        return self._pool.key_scales

    @property
    def value_scales(self) -> Array | None:
        """The factors of int8 values."""
        return self._pool.value_scales

    @property
    def block_table(self) -> Array:
        """The pages of each sequence, (batch, blocks), -1 where it has none; a copy."""
        return self._pool.table.copy()

    def append(
        self, key: Any, value: Any, *, sequences: Any = None, counts: Ints | None = None
    ) -> None:
        """Write new tokens behind those that are there.

        Parameters
        ----------
        key : array, shape (batch, Hkv, n, D)
            float32, float64, float16 or bfloat16; rounded to the cache's dtype.
        value : array, shape (batch, Hkv, n, Dv)
        sequences : ints, optional
            The sequences that the first axis stands for; all by default, in order.
        counts : int or ints, optional
            New tokens of each, at most n: the first ones on axis -2.

        Raises
        ------
        ValueError
            Shapes that don't fit, a sequence that would exceed the capacity, NaN or infinity for
            int8, storage that is read-only.
        MemoryError
            Too few free pages.
        """
        key, value = as_array("key", key), as_array("value", value)
        if sequences is None and counts is None and self._pool.append_alike(key, value):
            return
        pool, chosen = self._pool, self._chosen(sequences)
        for name, array, pages in (("key", key, pool.keys), ("value", value, pool.values)):
            if array.ndim != 4:
                raise ValueError(
                    f"{name} has shape {array.shape}, {array.ndim} axes: it must have 4, "
                    "(sequences, Hkv, new tokens, head size)"
                )
            expected = (len(chosen), pages.shape[1], key.shape[2], pages.shape[3])
            if array.shape != expected:
                raise ValueError(
                    f"{name} has shape {array.shape}: it must be {expected}, "
                    "(sequences, Hkv, new tokens, head size)"
                )
        pool.check_writeable()
        new = key.shape[2]
        if counts is None:
            number: Array = np.full(len(chosen), new)
        else:
            number = per_sequence("counts", counts, chosen, new, f"each must be from 0 to {new}")
        given = np.arange(new) < number[:, np.newaxis]  # (sequences, new)
        rows = {"key": key.swapaxes(1, 2)[given], "value": value.swapaxes(1, 2)[given]}
        pool.append(chosen, number, [rounded(name, x, pool.code) for name, x in rows.items()])

    @overload
    def attend(
        self,
        query: Any,
        attn_mask: Any = ...,
        is_causal: bool = ...,
        scale: float | None = ...,
        *,
        return_lse: Literal[False] = ...,
        **options: Unpack[CacheOptions],
    ) -> Array: ...

    @overload
    def attend(
        self,
        query: Any,
        attn_mask: Any = ...,
        is_causal: bool = ...,
        scale: float | None = ...,
        *,
        return_lse: Literal[True],
        **options: Unpack[CacheOptions],
    ) -> tuple[Array, Array]: ...

    @overload
    def attend(
        self,
        query: Any,
        attn_mask: Any = ...,
        is_causal: bool = ...,
        scale: float | None = ...,
        *,
        return_lse: bool = ...,
        **options: Unpack[CacheOptions],
    ) -> Array | tuple[Array, Array]: ...

    def attend(
        self,
        query: Any,
        attn_mask: Any = None,
        is_causal: bool = False,
        scale: float | None = None,
        *,
        sequences: Any = None,
        window: Window | None = None,
        softcap: float | None = None,
        alibi_slopes: Any = None,
        sinks: Any = None,
        attn_bias: Any = None,
        key_ranges: KeyRanges | None = None,
        out: Any = None,
        return_lse: bool = False,
        num_threads: int | None = None,
        out_dtype: Any = None,
        progress: Progress | None = None,
    ) -> Array | tuple[Array, Array]:
        """Compute attention of the last tokens over all that are cached.

        It is `scaled_dot_product_attention` with ``key_lengths`` = `lengths` and ``query_offset``
        = `lengths` - Lq, so that with is_causal the last query sees all keys, the one before it all
        but one, and so on. Pass is_causal=True when several tokens of a decoder come at once.

        Parameters
        ----------
        query : array, shape (batch, Hq, Lq, D)
            float32, float64, float16 or bfloat16, whatever the cache's dtype is, in an array or
            a tensor. Hq may be any multiple of Hkv.
        attn_mask : array, broadcastable to (batch, Hq, Lq, max(lengths)), optional
            Boolean: True where the query may attend to the key. Floating: added to the scores.
        attn_bias : array, broadcastable to (batch, Hq, Lq, max(lengths)), optional
            Floating: added to the scores, beside an `attn_mask`.
        is_causal, scale, window, softcap, alibi_slopes, sinks, key_ranges
            As in `scaled_dot_product_attention`. A cache's own window bounds `window`.
        out, return_lse, num_threads, out_dtype, progress
            Likewise.
        sequences : ints, optional
            The sequences that query's first axis stands for; all by default, in order.

        Returns
        -------
        result : ndarray, shape (batch, Hq, Lq, Dv)
            `out`, or a new array of query's dtype, or of `out_dtype`; bit patterns in uint16 for a
            bfloat16 tensor.
        lse : ndarray, shape (batch, Hq, Lq)
            With `return_lse`.
        """
        pool = self._pool
        lengths, table = pool.lengths, None if pool.fixed else pool.table
        if progress is None and sequences is None and pool.window is None:
            answer: Array | tuple[Array, Array] | None = _dispatch.shortcuts.attend_cache(
                query, pool.keys, pool.values, pool.key_scales, pool.value_scales, table, lengths,
                attn_mask, is_causal, scale, window, softcap, alibi_slopes, sinks, attn_bias,
                key_ranges, out, return_lse, num_threads, out_dtype)  # fmt: skip
            if answer is not None:
                return answer
        notify_call_start()
        if sequences is not None:
            chosen = self._chosen(sequences)
            lengths, table = lengths[chosen], pool.table[chosen]
        if pool.window is not None:
            query = as_array("query", query)
            left, right = (UNBOUNDED, UNBOUNDED) if window is None else window_sides(window)
            window = (min(left, pool.window), right)
            q_len = query.shape[2] if query.ndim == 4 else 0
            pool.check_kept(
                self._chosen(sequences), lengths - q_len, lengths, f"query has {q_len} tokens"
            )
        p = Problem()
        cached(p, query, pool.keys, pool.values, pool.code, pool.key_scales, pool.value_scales,
               table, lengths)  # fmt: skip
        if attn_mask is not None:
            mask(p, attn_mask)
        scoring(p, is_causal, scale, None, window, softcap, alibi_slopes, sinks, attn_bias,
                key_ranges)  # fmt: skip
        output(p, out, return_lse, num_threads, out_dtype)
        if progress is not None:
            watch(p, progress)
        return solve(p)

    def extend(self, counts: Ints, *, sequences: Any = None) -> None:
        """Lengthen sequences by tokens that the caller then writes into the storage.

        Parameters
        ----------
        counts : int or ints
            New tokens of each sequence; `views` then shows where they are.
        sequences : ints, optional
            All by default.
        """
        chosen = self._chosen(sequences)
        rule = f"each must be from 0 to the cache's capacity of {self.capacity}"
        self._pool.grow(chosen, per_sequence("counts", counts, chosen, self.capacity, rule))

    def views(self, sequence: int, start: int = 0, stop: int | None = None) -> list[Any]:
        """Return a sequence's storage, to read or to write: no copies.

        Parameters
        ----------
        sequence : int
        start, stop : int
            Tokens; to the end by default. Those that a window has given back are left out.

        Returns
        -------
        list of pairs of ndarray
            Keys (Hkv, n, D) and values (Hkv, n, Dv) of successive tokens: one pair, or one for
            each page. What is written to a page that another sequence shares is seen by both.

        Examples
        --------
        >>> import qkv_fast
        >>> cache = qkv_fast.KVCache(1, 2, 10, 4, page_size=4)
        >>> cache.extend(6)
        >>> [keys.shape for keys, values in cache.views(0)]
        [(2, 4, 4), (2, 2, 4)]
        """
        pool, row = self._pool, self._sequence("sequence", sequence)
        length = int(pool.lengths[row])
        stop = length if stop is None else min(integer("stop", stop, 0), length)
        start = integer("start", start, 0)
        return pool.views(row, start, stop)

    def truncate(self, lengths: Ints, *, sequences: Any = None) -> None:
        """Drop the last tokens, as when speculated ones are rejected.

        Parameters
        ----------
        lengths : int or ints
            Tokens to keep, at most those that each sequence has.
        sequences : ints, optional
            All by default.
        """
        chosen = self._chosen(sequences)
        rule = "each must be from 0 to what the sequence has"
        kept = per_sequence("lengths", lengths, chosen, self.capacity, rule)
        have = self._pool.lengths[chosen]
        if (kept > have).any():
            raise ValueError(
                f"lengths holds {shown(kept.tolist())}: {rule}, {shown(have.tolist())}"
            )
        self._pool.check_kept(chosen, kept, kept, "lengths are too small")
        self._pool.shorten(chosen, kept)

    def reset(self, *, sequences: Any = None) -> None:
        """Drop all tokens of the sequences, of all by default."""
        chosen = self._chosen(sequences)
        self._pool.shorten(chosen, np.zeros_like(chosen))

    def reorder(self, indices: Any) -> None:
        """Let sequence i become what sequence indices[i] was, as after a step of beam search.

        Parameters
        ----------
        indices : ints, shape (batch,)
            Any of the sequences, some perhaps several times. Pages are shared, not copied.
        """
        index = indices_of("indices", indices, len(self._pool.lengths), repeats=True)
        if len(index) != len(self._pool.lengths):
            raise ValueError(
                f"indices has length {len(index)}: it must be {len(self._pool.lengths)}"
            )
        self._pool.reorder(index)

    def fork(self, source: int, target: int, length: int | None = None) -> None:
        """Let sequence `target` begin with the tokens of `source`, dropping its own.

        Parameters
        ----------
        source, target : int
            Sequences.
        length : int, optional
            Tokens of the common prefix; all by default. Its pages are shared, and copied only
            when one of the two appends to them.
        """
        one, other = self._sequence("source", source), self._sequence("target", target)
        have = int(self._pool.lengths[one])
        kept = have if length is None else integer("length", length, 0)
        if kept > have:
            raise ValueError(
                f"length is {shown(kept)}, but sequence {one} has {have} tokens: it must not "
                "exceed them"
            )
        self._pool.check_kept(
            np.array([one]), np.array([kept]), np.array([kept]), "length is too small"
        )
        if one == other:
            self.truncate(kept, sequences=one)
        else:
            self._pool.fork(one, other, kept)

    def _chosen(self, sequences: Any) -> Array:
        batch = len(self._pool.lengths)
        return np.arange(batch) if sequences is None else indices_of("sequences", sequences, batch)

    def _sequence(self, name: str, given: Any) -> int:
        return integer(name, given, 0, len(self._pool.lengths) - 1)
