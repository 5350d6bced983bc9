"""A cache of keys and values for decoding: in one piece per sequence, or in pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ._dispatch import notify_call_start, solve
from ._dtypes import (
    BFLOAT16,
    CODES,
    INT8,
    SWAPPED,
    Array,
    bfloat16_bits,
    dtype_name,
    named,
    quantize,
    reals,
    storage_code,
)
from ._problem.arguments import as_array, integer, integers, shown
from ._problem.output import output
from ._problem.problem import UNBOUNDED, Problem
from ._problem.scoring import mask, scoring, window_sides
from ._problem.tensors import cached

Ints = int | Sequence[int] | Array

_STORED = {"float32": "f4", "float64": "f8", "float16": "f2", "bfloat16": "u2", "int8": "i1"}
_NAMES = {code: name for name, code in CODES.items()}
_LARGEST = np.iinfo(np.intp).max
WINDOW_PAGE = 64  # keys of a page in window mode, unless told


class KVCache:
    """Keys and values of the tokens so far, for a batch of sequences of different lengths.

    Storage is in one piece per sequence, or with `page_size` in pages that sequences take from a
    common pool as they grow, may share, and give back.

    Parameters
    ----------
    batch, num_kv_heads : int
        Sequences, and key heads of each.
    capacity : int
        Tokens that a sequence can have. With `window`, all that ever come, not those kept.
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
        A query sees only its own position and so many before it, and pages that no further query
        can see are given back. Implies pages (of 64 unless `page_size` says otherwise); the
        default pool then lets each sequence append max(window, 512) tokens at a time.

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
    ``copy.deepcopy`` and pickle give independent caches with storage of their own. A cache must not
    be changed by one thread while another uses it.

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
        batch = integer("batch", batch, 0, _LARGEST)
        num_kv_heads = integer("num_kv_heads", num_kv_heads, 1, _LARGEST)
        capacity = integer("capacity", capacity, 1, _LARGEST)
        head_dim = integer("head_dim", head_dim, 1, _LARGEST)
        v_dim = head_dim if v_dim is None else integer("v_dim", v_dim, 1, _LARGEST)
        window = None if window is None else min(integer("window", window, 0), UNBOUNDED)
        if page_size is None and window is not None:
            page_size = WINDOW_PAGE
        if page_size is None:
            if num_pages is not None:
                raise ValueError(f"num_pages is {shown(num_pages)}, but there is no page_size")
            self._page_size, pages = capacity, batch
        else:
            self._page_size = integer("page_size", page_size, 1, _LARGEST)
            at_once = capacity if window is None else min(capacity, window + max(window, 512))
            spare = 0 if window is None else 1  # the window may begin anywhere in a page
            blocks = min(-(-at_once // self._page_size) + spare, -(-capacity // self._page_size))
            pages = batch * blocks
            if num_pages is not None:
                pages = integer("num_pages", num_pages, 0, _LARGEST)
        name = dtype_name(dtype)
        if name not in _STORED:
            kind = ValueError if name else TypeError
            raise kind(f"dtype is {shown(dtype)}: it must be one of {', '.join(_STORED)}")
        shape = (pages, num_kv_heads, self._page_size)
        self._keys = _zeros("keys", (*shape, head_dim), _STORED[name])
        self._values = _zeros("values", (*shape, v_dim), _STORED[name])
        self._key_scales = self._value_scales = None
        if name == "int8":
            self._key_scales = _zeros("key_scales", shape, "f4")
            self._value_scales = _zeros("value_scales", shape, "f4")
        self._code = CODES[name]
        self._set_up(batch, capacity, page_size is None, window)

    _keys: Array
    _values: Array
    _key_scales: Array | None
    _value_scales: Array | None

    def _set_up(self, batch: int, capacity: int, fixed: bool, window: int | None) -> None:
        """Begin with empty sequences; fixed: sequence i has page i, for good."""
        self._capacity, self._fixed, self._window = capacity, fixed, window
        self._lengths = _zeros("lengths", (batch,), "i8")
        blocks = -(-capacity // self._page_size)
        self._table = _zeros("block table", (batch, blocks), "i8")
        self._table[...] = -1
        self._uses = np.zeros(len(self._keys), np.int64)  # sequences that have a page
        self._free = list(range(len(self._keys)))[::-1]
        if fixed:
            self._table[:, 0] = np.arange(batch)
            self._uses[:] = 1
            self._free = []

    def __repr__(self) -> str:
        batch, head_dim, v_dim = len(self._lengths), self._keys.shape[3], self._values.shape[3]
        facts = [
            f"batch={batch}",
            f"num_kv_heads={self._keys.shape[1]}",
            f"capacity={self._capacity}",
            f"head_dim={head_dim}",
        ]
        if v_dim != head_dim:
            facts.append(f"v_dim={v_dim}")
        facts.append(f"dtype={_NAMES[self._code]}")
        lengths = self._lengths.tolist() if batch <= 8 else self._lengths[:6].tolist()
        facts.append(f"lengths=[{', '.join(map(str, lengths))}{', ...' if batch > 8 else ''}]")
        if not self._fixed:
            facts.append(f"page_size={self._page_size}")
            facts.append(f"free_pages={self.free_pages} of {self.num_pages}")
        if self._window is not None:
            facts.append(f"window={self._window}")
        return f"<{type(self).__name__} {', '.join(facts)}>"

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a copy of another cache's state: for copy.copy, copy.deepcopy and pickle.

        All memory is new, and aligned as that of any new cache.
        """
        self.__dict__.update(state)
        for name, array in state.items():
            if isinstance(array, np.ndarray):
                copied = _zeros(name.lstrip("_"), array.shape, array.dtype)
                copied[...] = array
                setattr(self, name, copied)
        self._free = self._free.copy()

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
        key = as_array("key", key, in_place=True)
        value = as_array("value", value, in_place=True)
        if key.ndim != 4 or value.ndim != 4 or key.shape[:3] != value.shape[:3] or not key.size:
            raise ValueError(
                f"key has shape {key.shape} and value {value.shape}: they must be "
                "(batch, Hkv, capacity, D) and (batch, Hkv, capacity, Dv), none of them 0"
            )
        code = storage_code(key.dtype)
        if code != storage_code(value.dtype) or code < 0 or code & SWAPPED:
            raise TypeError(
                f"key has dtype {named(key.dtype)} and value {named(value.dtype)}: both must be "
                f"the same one of {', '.join(_STORED)} in native byte order"
            )
        scales = []
        for name, given in (("key_scales", key_scales), ("value_scales", value_scales)):
            array = None if given is None else as_array(name, given, in_place=True)
            if (array is None) == (code == INT8) or (
                array is not None and (array.shape != key.shape[:3] or array.dtype != np.float32)
            ):
                raise ValueError(
                    f"{name} must be float32 of shape {key.shape[:3]} with int8 arrays, and None "
                    "otherwise"
                )
            scales.append(array)
        capacity = key.shape[2]
        rule = f"each must be from 0 to the arrays' capacity of {capacity}"
        number = _counts("lengths", lengths, np.arange(len(key)), capacity, rule)
        cache = cls.__new__(cls)
        if code == BFLOAT16:  # assigned to ml_dtypes' type, bit patterns would be numbers
            key, value = key.view(np.uint16), value.view(np.uint16)
        cache._keys, cache._values = key, value
        cache._key_scales, cache._value_scales = scales
        cache._code, cache._page_size = code, capacity
        cache._set_up(len(key), capacity, True, None)
        cache._lengths[:] = number
        return cache

    @property
    def lengths(self) -> Array:
        """Tokens of each sequence: int64, (batch,); a copy."""
        return self._lengths.copy()

    @property
    def capacity(self) -> int:
        """Tokens that a sequence can have."""
        return self._capacity

    @property
    def page_size(self) -> int | None:
        """Tokens of a page; None where storage is in one piece per sequence."""
        return None if self._fixed else self._page_size

    @property
    def num_pages(self) -> int:
        """Pages of the pool, taken and free."""
        return len(self._uses)

    @property
    def free_pages(self) -> int:
        """Pages that no sequence has."""
        return len(self._free)

    @property
    def key_pages(self) -> Array:
        """The storage: (pages, Hkv, page_size, D); in one piece, (batch, Hkv, capacity, D)."""
        return self._keys

    @property
    def value_pages(self) -> Array:
        """The storage of the values, as `key_pages`."""
        return self._values

    @property
    def key_scales(self) -> Array | None:
        """The factors of int8 keys, (pages, Hkv, page_size); None for other dtypes."""
        return self._key_scales

    @property
    def value_scales(self) -> Array | None:
        """The factors of int8 values."""
        return self._value_scales

    @property
    def block_table(self) -> Array:
        """The pages of each sequence, (batch, blocks), -1 where it has none; a copy."""
        return self._table.copy()

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
        chosen = self._chosen(sequences)
        key, value = as_array("key", key), as_array("value", value)
        for name, array, pages in (("key", key, self._keys), ("value", value, self._values)):
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
        self._check_writeable()
        new = key.shape[2]
        if counts is None:
            number = np.full(len(chosen), new)
        else:
            number = _counts("counts", counts, chosen, new, f"each must be from 0 to {new}")
        given = np.arange(new) < number[:, np.newaxis]  # (sequences, new)
        rows = [x.swapaxes(1, 2)[given] for x in (key, value)]  # (tokens, Hkv, D)
        stored = [self._stored(name, x) for name, x in zip(("key", "value"), rows, strict=True)]
        position = (self._lengths[chosen, np.newaxis] + np.arange(new))[given]
        owner = np.broadcast_to(chosen[:, np.newaxis], given.shape)[given]
        block, slot = position // self._page_size, position % self._page_size
        self._grow(chosen, number)
        page = self._table[owner, block]
        for pages, scales, (array, factors) in zip(
            (self._keys, self._values), (self._key_scales, self._value_scales), stored, strict=True
        ):
            pages[page, :, slot] = array
            if scales is not None:
                scales[page, :, slot] = factors

    def attend(
        self,
        query: Any,
        attn_mask: Any = None,
        is_causal: bool = False,
        scale: float | None = None,
        *,
        sequences: Any = None,
        window: tuple[int | None, int | None] | None = None,
        softcap: float | None = None,
        alibi_slopes: Any = None,
        sinks: Any = None,
        out: Any = None,
        return_lse: bool = False,
        num_threads: int | None = None,
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
        is_causal, scale, window, softcap, alibi_slopes, sinks, out, return_lse, num_threads
            As in `scaled_dot_product_attention`. A cache's own window bounds `window`.
        sequences : ints, optional
            The sequences that query's first axis stands for; all by default, in order.

        Returns
        -------
        result : ndarray, shape (batch, Hq, Lq, Dv)
            `out`, or a new array of query's dtype; bit patterns in uint16 for a bfloat16 tensor.
        lse : ndarray, shape (batch, Hq, Lq)
            With `return_lse`.
        """
        notify_call_start()
        lengths, table = self._lengths, None if self._fixed else self._table
        if sequences is not None:
            chosen = self._chosen(sequences)
            lengths, table = lengths[chosen], self._table[chosen]
        if self._window is not None:
            query = as_array("query", query)
            left, right = (UNBOUNDED, UNBOUNDED) if window is None else window_sides(window)
            window = (min(left, self._window), right)
            q_len = query.shape[2] if query.ndim == 4 else 0
            self._check_kept(
                self._chosen(sequences), lengths - q_len, lengths, f"query has {q_len} tokens"
            )
        p = Problem()
        cached(p, query, self._keys, self._values, self._code, self._key_scales,
               self._value_scales, table, lengths)  # fmt: skip
        if attn_mask is not None:
            mask(p, attn_mask)
        scoring(p, is_causal, scale, None, window, softcap, alibi_slopes, sinks)
        output(p, out, return_lse, num_threads)
        return solve(p)

    def extend(self, counts: Ints, *, sequences: Any = None) -> None:
        """Lengthen sequences by tokens that the caller writes into the storage by himself.

        Parameters
        ----------
        counts : int or ints
            New tokens of each sequence; `views` then shows where they are.
        sequences : ints, optional
            All by default.
        """
        chosen = self._chosen(sequences)
        rule = f"each must be from 0 to the cache's capacity of {self._capacity}"
        self._grow(chosen, _counts("counts", counts, chosen, self._capacity, rule))

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
        row = self._sequence("sequence", sequence)
        length = int(self._lengths[row])
        stop = length if stop is None else min(integer("stop", stop, 0), length)
        start = integer("start", start, 0)
        pairs: list[Any] = []
        while start < stop:
            page, slot = self._table[row, start // self._page_size], start % self._page_size
            count = min(self._page_size - slot, stop - start)
            if page >= 0:
                some = (page, slice(None), slice(slot, slot + count))
                pairs.append((self._keys[some], self._values[some]))
            start += count
        return pairs

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
        kept = _counts("lengths", lengths, chosen, self._capacity, rule)
        have = self._lengths[chosen]
        if (kept > have).any():
            raise ValueError(
                f"lengths holds {shown(kept.tolist())}: {rule}, {shown(have.tolist())}"
            )
        self._check_kept(chosen, kept, kept, "lengths are too small")
        for sequence, length in zip(chosen, kept, strict=True):
            self._give_back(sequence, -(-int(length) // self._page_size), self._table.shape[1])
        self._lengths[chosen] = kept

    def reset(self, *, sequences: Any = None) -> None:
        """Drop all tokens of the sequences, of all by default."""
        chosen = self._chosen(sequences)
        for sequence in chosen:
            self._give_back(sequence, 0, self._table.shape[1])
        self._lengths[chosen] = 0

    def reorder(self, indices: Any) -> None:
        """Let sequence i become what sequence indices[i] was, as after a step of beam search.

        Parameters
        ----------
        indices : ints, shape (batch,)
            Any of the sequences, some perhaps several times. Pages are shared, not copied.
        """
        index = self._chosen(indices, "indices", repeats=True)
        if index.shape != self._lengths.shape:
            raise ValueError(f"indices has length {len(index)}: it must be {len(self._lengths)}")
        if self._fixed:
            self._copy(index, np.arange(len(index)), int(self._lengths.max(initial=0)))
            self._lengths = self._lengths[index]
        else:
            self._adopt(self._table[index], self._lengths[index])

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
        have = int(self._lengths[one])
        kept = have if length is None else integer("length", length, 0)
        if kept > have:
            raise ValueError(
                f"length is {shown(kept)}, but sequence {one} has {have} tokens: it must not "
                "exceed them"
            )
        self._check_kept(np.array([one]), np.array([kept]), np.array([kept]), "length is too small")
        if one == other:
            self.truncate(kept, sequences=one)
        elif self._fixed:
            self._copy(np.array([one]), np.array([other]), kept)
            self._lengths[other] = kept
        else:
            table, lengths = self._table.copy(), self._lengths.copy()
            table[other] = table[one]
            table[other, -(-kept // self._page_size) :] = -1
            lengths[other] = kept
            self._adopt(table, lengths)

    def _chosen(self, sequences: Any, name: str = "sequences", repeats: bool = False) -> Array:
        batch = len(self._lengths)
        if sequences is None:
            return np.arange(batch)
        rule = f"each must be from 0 to {batch - 1}"
        index = integers(name, sequences, "ints", 0, batch - 1, rule)
        if index.ndim == 0:
            index = index[np.newaxis]
        if index.ndim != 1:
            raise TypeError(f"{name} must be ints along one axis, not of shape {index.shape}")
        if not repeats and len(np.unique(index)) < len(index):
            raise ValueError(f"{name} holds {shown(index.tolist())}: none may come twice")
        return index

    def _sequence(self, name: str, given: Any) -> int:
        return integer(name, given, 0, len(self._lengths) - 1)

    def _check_writeable(self) -> None:
        """Raise where tokens can't be written, before any of them is."""
        for name, array in self._storage().items():
            if not array.flags.writeable:
                raise ValueError(f"the cache's {name} array is read-only")

    def _storage(self) -> dict[str, Array]:
        """Return the arrays that hold tokens, by the names that `from_arrays` has for them."""
        arrays = {"key": self._keys, "value": self._values}
        if self._key_scales is not None and self._value_scales is not None:
            arrays |= {"key_scales": self._key_scales, "value_scales": self._value_scales}
        return arrays

    def _stored(self, name: str, rows: Array) -> tuple[Array, Array | None]:
        """Round (tokens, Hkv, D) to the cache's dtype; for int8 also return the scales."""
        code = storage_code(rows.dtype)
        if code < 0 or code == INT8:
            raise TypeError(
                f"{name} has dtype {named(rows.dtype)}: it must be float32, float64, float16 or "
                "bfloat16"
            )
        if code == self._code and code == BFLOAT16:
            return rows.view(np.uint16), None
        with np.errstate(over="ignore", under="ignore"):
            real = reals(rows, code)
            if self._code == BFLOAT16:
                return bfloat16_bits(real), None
            if self._code != INT8:
                return real.astype(self._keys.dtype), None
            real = real.astype(np.float32)
        if not np.isfinite(real).all():
            raise ValueError(f"{name} holds NaN or infinity, which int8 storage can't")
        return quantize(real)

    def _grow(self, chosen: Array, counts: Array) -> None:
        """Take the pages for so many more tokens, and count them; or raise and change nothing."""
        before = self._lengths[chosen]
        exceeds = counts > self._capacity - before  # a sum might wrap
        if exceeds.any():
            i = int(np.argmax(exceeds))
            raise ValueError(
                f"sequence {chosen[i]} has {before[i]} tokens, and {counts[i]} more exceed the "
                f"cache's capacity of {self._capacity}"
            )
        after = before + counts
        if not self._fixed:
            self._take_pages(chosen, before, after)
        self._lengths[chosen] = after

    def _take_pages(self, chosen: Array, before: Array, after: Array) -> None:
        size = self._page_size
        growing = after > before
        uses = self._uses.copy()
        passed: list[tuple[int, int]] = []  # blocks that the window has left behind
        if self._window is not None:
            for sequence, length in zip(chosen[growing], before[growing], strict=True):
                first = max(0, int(length) - self._window) // size
                blocks = np.flatnonzero(self._table[sequence, :first] >= 0)
                passed += [(sequence, int(block)) for block in blocks]
                np.subtract.at(uses, self._table[sequence, blocks], 1)
        spare = len(self._free) + int(((uses == 0) & (self._uses > 0)).sum())
        shared: list[tuple[int, int, int]] = []  # begun pages that others have too
        wanted = int((-(-after // size) - -(-before // size)).sum())
        for sequence, length in zip(chosen[growing], before[growing], strict=True):
            page = self._table[sequence, length // size] if length % size else -1
            if page >= 0 and uses[page] > 1:
                uses[page] -= 1
                shared.append((sequence, int(length // size), int(length % size)))
        if wanted + len(shared) > spare:
            raise MemoryError(
                f"{wanted + len(shared)} pages are needed, but {spare} of {len(uses)} are free"
            )
        if shared:
            self._check_writeable()
        for sequence, block in passed:
            self._give_back(sequence, block, block + 1)
        for sequence, block, count in shared:
            old, new = self._table[sequence, block], self._free.pop()
            for array in self._storage().values():
                array[new, :, :count] = array[old, :, :count]
            self._uses[old] -= 1
            self._uses[new] = 1
            self._table[sequence, block] = new
        for sequence, old, new in zip(chosen, -(-before // size), -(-after // size), strict=True):
            for block in range(old, new):
                page = self._free.pop()
                self._uses[page] = 1
                self._table[sequence, block] = page

    def _give_back(self, sequence: int, start: int, stop: int) -> None:
        """Let go of the pages of a sequence's blocks; those that nobody else has become free."""
        if self._fixed:
            return
        row = self._table[sequence, start:stop]
        pages = row[row >= 0]
        self._uses[pages] -= 1
        self._free += [int(page) for page in pages if self._uses[page] == 0]
        row[:] = -1

    def _adopt(self, table: Array, lengths: Array) -> None:
        """Have another table and other lengths; bring uses and free pages up to date."""
        uses = np.bincount(table[table >= 0], minlength=len(self._uses))
        freed = np.flatnonzero((self._uses > 0) & (uses == 0)).tolist()
        self._table, self._lengths, self._uses = table, lengths, uses
        self._free += freed

    def _copy(self, sources: Array, targets: Array, length: int) -> None:
        """Copy tokens between sequences in one piece, as if all at once."""
        moved = sources != targets
        if not moved.any():
            return
        self._check_writeable()
        arrays = self._storage().values()
        # All are read before any is written: too little memory for that then changes nothing.
        tokens = [array[sources[moved], :, :length] for array in arrays]
        for array, part in zip(arrays, tokens, strict=True):
            array[targets[moved], :, :length] = part

    def _check_kept(self, chosen: Array, positions: Array, lengths: Array, why: str) -> None:
        """Raise when queries from these positions on would see keys that were given back."""
        if self._window is None:
            return
        first = np.maximum(0, positions - self._window) // self._page_size
        for sequence, block, length in zip(chosen, first, lengths, strict=True):
            if (self._table[sequence, block : -(-length // self._page_size)] < 0).any():
                raise ValueError(
                    f"{why}: keys of sequence {sequence} that their window of {self._window} "
                    "would see have been given back"
                )


def _zeros(name: str, shape: tuple[int, ...], dtype: Any) -> Array:
    """Return zeros that begin where a cache line does: rows of whole lines are read faster."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    try:
        if size > _LARGEST - 64:
            raise MemoryError
        memory = np.zeros(size + 64, np.uint8)
    except MemoryError:
        raise MemoryError(
            f"the cache's {name} of shape {shape} need {size / 2**30:.4g} GiB, which can't be "
            "allocated"
        ) from None
    start = -memory.ctypes.data % 64
    zeros: Array = memory[start : start + size].view(dtype).reshape(shape)
    return zeros


def _counts(name: str, given: Any, chosen: Array, most: int, rule: str) -> Array:
    """Return int64 from 0 to `most`, one for each of the chosen sequences."""
    array = integers(name, given, "an int, or ints for each sequence", 0, most, rule)
    try:
        return np.broadcast_to(array, chosen.shape)
    except ValueError:
        raise ValueError(
            f"{name} has shape {array.shape}: one for each of {len(chosen)} sequences is needed"
        ) from None
