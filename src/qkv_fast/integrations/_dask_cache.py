"""DistributedKVCache: keys and values of one long text on the workers of a Dask cluster."""

from __future__ import annotations

from typing import Any

import numpy as np

import qkv_fast

from .._dtypes import FLOAT64, SWAPPED, UINT16, Array, code_of, reals, result_dtype, widened
from .._options import KeyRanges, Window
from .._problem.arguments import as_array, integer
from ._dask_parts import (
    Part,
    Rows,
    check,
    empty_part,
    finish,
    merge_tree,
    options_of,
    real_of,
    seen_keys,
    threads_of_task,
    without_memory,
)


class DistributedKVCache:
    """Keys and values of the tokens so far, in chunks that lie on the workers of a cluster.

    `append` fills the last chunk and opens further ones, each on the next worker in turn. `attend`
    sends the query to the chunks that it can see, whose ``out`` and ``lse`` come back and are
    merged as a tree. Keys, values and scores stay where they are.

    Parameters
    ----------
    client : distributed.Client
        Not an asynchronous one. With ``Client(..., direct_to_workers=True)`` what is sent goes
        straight to the workers; otherwise it passes through the scheduler.
    batch, num_kv_heads : int
        Sequences, and key heads of each. All sequences have the same length.
    chunk_size : int
        Tokens of a chunk. It has its storage from the start.
    head_dim : int
        Size of a key; `v_dim`, of a value, is the same unless given.
    v_dim : int, optional
    dtype : {"float32", "float64", "float16", "bfloat16", "int8"} or dtype of NumPy or torch
        What is stored, as in `qkv_fast.KVCache`.
    workers : list of str, optional
        Addresses of the workers to use, in this order; by default all that the client has now.

    Raises
    ------
    TypeError, ValueError
        An argument of the wrong kind or out of range, no workers.

    Notes
    -----
    A chunk is an actor of Dask with a `qkv_fast.KVCache`: it never moves and has no copy. When its
    worker dies, its tokens are lost, and from then on `append` and `attend` raise RuntimeError,
    which names them: make a new cache and append all tokens again. `close`, or the end of a
    ``with`` block, frees the storage.

    The bits of a result depend on the chunks, not on which workers have them.

    Examples
    --------
    >>> import numpy as np
    >>> from distributed import Client
    >>> from qkv_fast.integrations.dask import DistributedKVCache
    >>> client = Client(processes=False, dashboard_address=None)  # doctest: +SKIP
    >>> cache = DistributedKVCache(client, 1, 2, chunk_size=64, head_dim=8)  # doctest: +SKIP
    >>> k, v = np.random.default_rng(0).random((2, 1, 2, 100, 8), np.float32)
    >>> cache.append(k, v)  # doctest: +SKIP
    >>> cache.attend(k[:, :, -1:], is_causal=True).shape, cache.length  # doctest: +SKIP
    ((1, 2, 1, 8), 100)
    """

    def __init__(
        self,
        client: Any,
        batch: int,
        num_kv_heads: int,
        chunk_size: int,
        head_dim: int,
        v_dim: int | None = None,
        *,
        dtype: Any = "float32",
        workers: list[str] | None = None,
    ) -> None:
        self._client = client
        self._chunk_size = integer("chunk_size", chunk_size)
        self._sizes = (batch, num_kv_heads, self._chunk_size, head_dim, v_dim)
        self._dtype = dtype
        small = qkv_fast.KVCache(batch, num_kv_heads, 1, head_dim, v_dim, dtype=dtype)  # or raises
        self._key = small.key_pages[..., :0, :]
        self._value = small.value_pages[..., :0, :]
        if workers is None:
            workers = sorted(client.scheduler_info(n_workers=-1)["workers"])
        if not workers:
            raise ValueError("the cluster has no workers: a cache needs at least one")
        self._workers = list(workers)
        self._chunks: list[Any] = []
        self._length = 0

    def __repr__(self) -> str:
        batch, num_kv_heads, chunk_size, head_dim, v_dim = self._sizes
        facts = [f"batch={batch}", f"num_kv_heads={num_kv_heads}", f"chunk_size={chunk_size}"]
        facts += [f"head_dim={head_dim}", *([] if v_dim is None else [f"v_dim={v_dim}"])]
        facts += [f"length={self._length}", f"workers={len(self._workers)}"]
        return f"<{type(self).__name__} {', '.join(facts)}>"

    def __enter__(self) -> DistributedKVCache:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def length(self) -> int:
        """Tokens of each sequence."""
        return self._length

    def close(self) -> None:
        """Free the storage on the workers; the cache then holds no tokens."""
        self._chunks, self._length = [], 0

    def append(self, key: Any, value: Any) -> None:
        """Write new tokens behind those that are there.

        Parameters
        ----------
        key : array, shape (batch, Hkv, n, D)
            float32, float64, float16 or bfloat16; rounded to the cache's dtype.
        value : array, shape (batch, Hkv, n, Dv)

        Raises
        ------
        ValueError
            Shapes that don't fit.
        RuntimeError
            A chunk's worker has died.
        """
        key, value = as_array("key", key), as_array("value", value)
        new = key.shape[2] if key.ndim == 4 else 0
        for name, array, kept in (("key", key, self._key), ("value", value, self._value)):
            expected = (*kept.shape[:2], new, kept.shape[3])
            if array.shape != expected:
                raise ValueError(
                    f"{name} has shape {array.shape}: it must be {expected}, "
                    "(batch, Hkv, new tokens, head size)"
                )
        calls, done = [], 0
        while done < new:
            index, filled = divmod(self._length + done, self._chunk_size)
            if index == len(self._chunks):
                self._chunks.append(self._open(index))
            count = min(self._chunk_size - filled, new - done)
            which = slice(done, done + count)
            parts = (_plain(x[:, :, which]) for x in (key, value))
            calls.append((index, self._call(index, "append", *parts, filled)))
            done += count
        for index, call in calls:
            self._result(index, call)
        self._length += new

    def attend(
        self,
        query: Any,
        attn_mask: Any = None,
        is_causal: bool = False,
        scale: float | None = None,
        *,
        window: Window | None = None,
        softcap: float | None = None,
        alibi_slopes: Any = None,
        sinks: Any = None,
        attn_bias: Any = None,
        key_ranges: KeyRanges | None = None,
        return_lse: bool = False,
        num_threads: int | None = None,
    ) -> Array | tuple[Array, Array]:
        """Compute attention of the last tokens over all that are cached.

        It is `qkv_fast.KVCache.attend`, whose parameters have the same meaning here.

        Parameters
        ----------
        query : array, shape (batch, Hq, Lq, D)
            float32, float64, float16 or bfloat16, whatever the cache's dtype is. Its last row
            stands where the last token does.
        attn_mask, attn_bias : array, broadcastable to (batch, Hq, Lq, length), optional
        is_causal, scale, window, softcap, alibi_slopes, sinks, key_ranges, return_lse
            As in `qkv_fast.scaled_dot_product_attention`.
        num_threads : int, optional
            Threads that each chunk is computed with; its share of the worker's CPUs by default.

        Returns
        -------
        result : ndarray, shape (batch, Hq, Lq, Dv)
            Of query's dtype; bit patterns in uint16 for a bfloat16 tensor.
        lse : ndarray, shape (batch, Hq, Lq)
            With `return_lse`.

        Raises
        ------
        TypeError, ValueError
            As `qkv_fast.KVCache.attend` raises them, before anything is sent.
        RuntimeError
            A chunk's worker has died.
        """
        query = as_array("query", query)
        batch, num_kv_heads, _, head_dim = self._key.shape
        given = query.dtype
        wide = _widened(query)
        offset = self._length - query.shape[-2] if query.ndim > 1 else 0
        masks = {"attn_mask": attn_mask, "attn_bias": attn_bias}
        mask, bias = (x if x is None else _bits_widened(as_array(n, x)) for n, x in masks.items())
        p = check(
            wide,
            without_memory((batch, num_kv_heads, self._length, head_dim), wide.dtype),
            without_memory((batch, num_kv_heads, self._length, self._value.shape[3]), wide.dtype),
            mask, 0.0, is_causal, scale, True, None, return_lse, num_threads, None,
            query_offset=offset, window=window, softcap=softcap, alibi_slopes=alibi_slopes,
            sinks=sinks, attn_bias=bias, key_ranges=key_ranges)  # fmt: skip
        if p.query.shape != query.shape or query.ndim != 4:
            raise ValueError(f"query has shape {query.shape}: it must be ({batch}, Hq, Lq, D)")

        rows = Rows((slice(None),), slice(None), 0, query.shape[2])
        sees = seen_keys(p, rows)
        calls = []
        for index in range(len(self._chunks)):
            first = index * self._chunk_size
            last = min(first + self._chunk_size, self._length)
            if sees(first, last):
                options = options_of(p, rows, first, last) | {"num_threads": num_threads}
                for name, array in (("attn_mask", mask), ("attn_bias", bias)):
                    if array is not None:
                        every = array.ndim == 0 or array.shape[-1] == 1
                        options[name] = array if every else array[..., first:last]
                if p.key_begins is not None and p.key_ends is not None:
                    ends = (p.key_begins - first, p.key_ends - first)
                    options["key_ranges"] = ends
                call = self._call(index, "attend", _plain(query), last - first, options)
                calls.append((index, call))
        parts: list[Part] = [self._result(index, call) for index, call in calls]
        parts = parts or [empty_part(query.shape[:-1], self._value.shape[3], real_of(p))]
        result: Array | tuple[Array, Array] = finish(
            merge_tree(parts), sinks=p.sinks, dtype=result_dtype(given), with_lse=return_lse
        )
        return result

    def _open(self, index: int) -> Any:
        """Return a new chunk on the worker whose turn it is."""
        worker = self._workers[index % len(self._workers)]
        future = self._client.submit(
            _Chunk, *self._sizes, dtype=self._dtype, actor=True, pure=False, workers=[worker],
            allow_other_workers=False)  # fmt: skip
        return self._guarded(index, future.result)

    def _call(self, index: int, method: str, *arguments: Any) -> Any:
        return self._guarded(index, lambda: getattr(self._chunks[index], method)(*arguments))

    def _result(self, index: int, call: Any) -> Any:
        return self._guarded(index, call.result)

    def _guarded(self, index: int, function: Any) -> Any:
        """Call a function; say which tokens are lost if the chunk's worker is."""
        try:
            return function()
        except (OSError, RuntimeError, KeyError) as error:
            first = index * self._chunk_size
            raise RuntimeError(
                f"the worker {self._workers[index % len(self._workers)]}, which had the tokens "
                f"from {first} to {first + self._chunk_size - 1}, is lost: make a new "
                "DistributedKVCache and append all tokens again"
            ) from error


class _Chunk:
    """Consecutive tokens, on a worker."""

    def __init__(self, *sizes: Any, dtype: Any) -> None:
        self.cache = qkv_fast.KVCache(*sizes, dtype=dtype)
        self.table = np.arange(sizes[0])[:, np.newaxis]

    def append(self, key: Array, value: Array, length: int) -> None:
        """Write tokens behind the first `length`, in place of what a failed call has left there."""
        if (self.cache.lengths > length).any():
            self.cache.truncate(length)
        self.cache.append(key, value)

    def attend(self, query: Array, length: int, options: dict[str, Any]) -> Part:
        """Return the partial result over the first `length` tokens."""
        cache, options = self.cache, dict(options)
        if options["num_threads"] is None:
            options["num_threads"] = threads_of_task()
        result: Part = qkv_fast.paged_attention(
            _widened(query), cache.key_pages, cache.value_pages, self.table, length,
            key_scales=cache.key_scales, value_scales=cache.value_scales, return_lse=True,
            dtype="bfloat16", **options)  # fmt: skip
        return result


def _plain(array: Array) -> Array:
    """Return an array without a dtype that pickle would change."""
    return array.view(np.uint16) if array.dtype.num == UINT16.num else array


def _bits_widened(array: Array) -> Array:
    return widened(array) if array.dtype.num == UINT16.num else array


def _widened(query: Array) -> Array:
    """Return queries in the dtype of partial results; as they are if it is none of the op's."""
    code = code_of(query.dtype, uint16_is_bf16=True)
    real = np.float64 if code & ~SWAPPED == FLOAT64 else np.float32
    return reals(query, code, real) if code >= 0 else query
