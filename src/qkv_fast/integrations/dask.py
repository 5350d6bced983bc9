"""Attention on dask arrays, and a cache of keys and values spread over the workers of a cluster.

This module and _dask_cache.py are the only ones that import Dask, which must be installed for them.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterable
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np

try:
    import dask.array as da
    from dask._task_spec import List, Task, TaskRef
    from dask.base import is_dask_collection, tokenize
    from dask.core import flatten
    from dask.highlevelgraph import HighLevelGraph
except ImportError as error:
    raise ImportError('dask is missing: pip install "qkv-fast[dask]"') from error

from .._dtypes import is_bits, result_dtype, widened
from .._options import Ints, KeyRanges, Window
from .._problem.arguments import as_array
from .._problem.problem import Problem
from ._dask_cache import DistributedKVCache
from ._dask_parts import (
    FAN_IN,
    Rows,
    attend_part,
    check,
    empty_part,
    finish,
    merge_parts,
    options_of,
    real_of,
    seen_keys,
    without_memory,
)

__all__ = ["DistributedKVCache", "scaled_dot_product_attention"]

Chunks = tuple[int, ...]


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
    query_offset: Ints = 0,
    window: Window | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    attn_bias: Any = None,
    key_ranges: KeyRanges | None = None,
    key_lengths: Ints | None = None,
    return_lse: bool = False,
    num_threads: int | None = None,
    dtype: Any = None,
) -> Any:
    r"""Return `qkv_fast.scaled_dot_product_attention` of dask arrays, to be computed by Dask.

    Each pair of a chunk of queries and a chunk of keys is a task that computes ``out`` and ``lse``
    in float32. These are merged as a tree, two at a time, and rounded to query's dtype at the end.
    Scores stay within a task. A pair in which no query can see a key is no task.

    Parameters
    ----------
    query : dask array, or an array of the op, shape (..., Hq, Lq, D)
        Chunked along any axis; what is in memory is one chunk. float32, float64, float16 or
        bfloat16, in an array of ``ml_dtypes`` or as bit patterns with ``dtype="bfloat16"``.
    key : dask array, or an array of the op, shape (..., Hkv, Lk, D)
        Of query's dtype. A cut along the batch, the heads or the keys that one of the arrays has
        is made in the others too, which moves no data; a head size in several chunks is made one.
    value : dask array, or an array of the op, shape (..., Hkv, Lk, Dv)
        Likewise.
    attn_mask, attn_bias : dask array, or an array of the op, optional
        Broadcastable to (..., Hq, Lq, Lk).
    key_ranges : pair (begin, end), optional
        Each an int, ints, a dask array of ints or None. Ranges in memory decide which tasks there
        are; those of dask arrays are read by the tasks.
    dropout_p, is_causal, scale, enable_gqa, window, softcap
        As in `qkv_fast.scaled_dot_product_attention`.
    query_offset, key_lengths, alibi_slopes, sinks
        Likewise, in memory.
    return_lse : bool
        Also return the log-sum-exp of the scores.
    num_threads : int, optional
        Threads of each task. By default a task uses its share of the CPUs: with Dask's threads, the
        CPUs divided by the threads of the pool; on a worker, one thread, or OMP_NUM_THREADS divided
        by the worker's threads where that is set to more.
    dtype : "bfloat16", optional
        Take uint16 arrays as the bit patterns of bfloat16.

    Returns
    -------
    result : dask array, shape (..., Hq, Lq, Dv)
        Of query's dtype and chunks; cut finer where key's batch or heads are.
    lse : dask array, shape (..., Hq, Lq)
        With `return_lse`: float32, or float64 for float64.

    Raises
    ------
    ImportError
        When the module is imported and Dask is not installed.
    TypeError, ValueError
        As the op raises them, before any task runs. Dask arrays of unknown chunk sizes are refused.
        What is wrong with the numbers in a dask array of `key_ranges` is raised by the tasks.

    Notes
    -----
    On machines of one kind the bits depend on the chunks alone: not on the number of workers, the
    scheduler or the number of threads. They agree with the op's to rounding. Where all queries of a
    chunk see keys of one chunk only, the task is the op itself, with no merge and in query's dtype.
    Partial results of 16-bit inputs are otherwise those of ``out_dtype="float32"``.

    Where a cluster has computed the chunks of `key` before the call, tasks carry a wish to run where
    these are. Dask heeds it with ``compute(optimize_graph=False)``, and its work stealing may
    override it.

    The merge is that of `qkv_fast.merge_attention`; splitting the keys of a softmax is from Dao et
    al., *Flash-Decoding* (2023), merging in a tree over machines from Shyam et al., *Tree
    Attention* (2024).

    Examples
    --------
    >>> import dask.array as da
    >>> import numpy as np
    >>> import qkv_fast
    >>> from qkv_fast.integrations.dask import scaled_dot_product_attention
    >>> rng = np.random.default_rng(0)
    >>> query, key, value = rng.standard_normal((3, 2, 100, 8), np.float32)  # 2 heads, 100 tokens
    >>> q, k, v = (da.from_array(x, chunks=(1, 40, 8)) for x in (query, key, value))
    >>> out = scaled_dot_product_attention(q, k, v, is_causal=True)
    >>> out
    dask.array<attention, shape=(2, 100, 8), dtype=float32, chunksize=(1, 40, 8), chunktype=numpy.ndarray>
    >>> same = qkv_fast.scaled_dot_product_attention(query, key, value, is_causal=True)
    >>> bool(np.allclose(out.compute(scheduler="synchronous"), same, atol=1e-6))
    True
    """  # noqa: E501
    given = {"query": query, "key": key, "value": value}
    tensors = {name: _as_tensor(name, x) for name, x in given.items()}
    for name, x in tensors.items():
        if is_bits(x.dtype):
            tensors[name], dtype = x.view(np.uint16), "bfloat16"
    masks = {"attn_mask": attn_mask, "attn_bias": attn_bias}
    masks = {name: x if x is None else _as_tensor(name, x) for name, x in masks.items()}
    masks = {n: widened(x) if x is not None and is_bits(x.dtype) else x for n, x in masks.items()}
    kv_len = tensors["key"].shape[-2] if tensors["key"].ndim > 1 else 0
    modifiers = {
        "query_offset": _in_memory("query_offset", query_offset),
        "window": window,
        "softcap": softcap,
        "alibi_slopes": _in_memory("alibi_slopes", alibi_slopes),
        "sinks": _in_memory("sinks", sinks),
        "attn_bias": _shape_alone(masks["attn_bias"]),
        "key_ranges": _known_ranges(key_ranges, kv_len),
    }
    q, k, v = map(_shape_alone, tensors.values())
    p = check(
        q, k, v, _shape_alone(masks["attn_mask"]), dropout_p, is_causal, scale, enable_gqa,
        _in_memory("key_lengths", key_lengths), return_lse, num_threads, dtype, **modifiers
    )  # fmt: skip

    is_flat = all(x.ndim == 2 for x in tensors.values())
    if is_flat:  # one head
        tensors = {name: x[np.newaxis] for name, x in tensors.items()}
    axes = _Axes(p, tensors)
    q, k, v = (axes.chunked(name, x) for name, x in tensors.items())
    mask, bias = (axes.chunked("scores", x) for x in masks.values())
    begin, end = (axes.chunked("rows", x) for x in _ranges_of(p, key_ranges))
    inputs = [x for x in (q, k, v, mask, bias, begin, end) if x is not None]
    facts = (p.scale, p.left, p.right, p.softcap, p.query_offset, p.key_lengths, p.alibi_slopes)
    token = tokenize([x.name for x in inputs], facts, p.sinks, return_lse, num_threads, dtype)
    graph = _Graph(p, axes, token, return_lse, num_threads)
    holders = _holders(k)
    for where in itertools.product(*(range(len(c)) for c in (*axes.batch, axes.q_heads, axes.q))):
        graph.add_rows(where, (q, k, v, mask, bias, begin, end), holders)
    return graph.arrays(inputs, squeeze=is_flat)


class _Axes:
    """The chunks of each axis, which all arrays get."""

    def __init__(self, p: Problem, tensors: dict[str, Any]) -> None:
        *batch, num_heads, q_len, _ = p.query.shape
        q_cuts, kv_cuts = _head_cuts(tensors, num_heads, p.key.shape[-3])
        self.batch = [
            _chunks(size, *(_cuts(x, i - len(batch) - 3, size) for x in tensors.values()))
            for i, size in enumerate(batch)
        ]
        self.q_heads, self.kv_heads = _chunks(num_heads, q_cuts), _chunks(p.key.shape[-3], kv_cuts)
        self.q = _chunks(q_len, _cuts(tensors["query"], -2, q_len))
        of_keys = (_cuts(tensors[name], -2, p.kv_len) for name in ("key", "value"))
        self.k = _chunks(p.kv_len, *of_keys)

    def chunked(self, kind: str, array: Any) -> Any:
        """Return an array as a dask array of these chunks."""
        if array is None:
            return None
        last = (array.shape[-1],) if array.ndim else ()
        by_kind: dict[str, list[Chunks]] = {
            "query": [*self.batch, self.q_heads, self.q, last],
            "key": [*self.batch, self.kv_heads, self.k, last],
            "value": [*self.batch, self.kv_heads, self.k, last],
            "scores": [*self.batch, self.q_heads, self.q, self.k],
            "rows": [*self.batch, self.q_heads, self.q],
        }
        wanted = by_kind[kind][len(by_kind[kind]) - array.ndim :]
        if isinstance(array, da.Array):
            wanted = [
                (size,) if size == 1 else c for size, c in zip(array.shape, wanted, strict=True)
            ]
            return array.rechunk(tuple(wanted))
        # A broadcast axis becomes one of length 1, since from_array copies.
        short = tuple(
            slice(0, 1) if size > 1 and stride == 0 else slice(None)
            for size, stride in zip(array.shape, array.strides, strict=True)
        )
        array = array[short]
        wanted = [(size,) if size == 1 else c for size, c in zip(array.shape, wanted, strict=True)]
        return da.from_array(array, chunks=tuple(wanted))


class _Graph:
    """The tasks of a call, and the arrays that they make."""

    def __init__(
        self, p: Problem, axes: _Axes, token: str, with_lse: bool, num_threads: int | None
    ) -> None:
        self.p, self.axes, self.with_lse, self.num_threads = p, axes, with_lse, num_threads
        self.part, self.merge = f"attention-part-{token}", f"attention-merge-{token}"
        self.out, self.lse = f"attention-{token}", f"attention-lse-{token}"
        self.both = f"attention-with-lse-{token}"
        self.dtype = result_dtype(p.caller_query.dtype)
        self.tasks: dict[Any, Task] = {}
        self.workers: dict[Any, list[str]] = {}  # of parts, whose keys a cluster has already
        chunks = (*axes.batch, axes.q_heads, axes.q)
        self.starts = [_starts(c) for c in (*chunks, axes.k)]
        self.kv_starts = _starts(axes.kv_heads)

    def add_rows(
        self, where: tuple[int, ...], arrays: tuple[Any, ...], holders: dict[Any, list[str]]
    ) -> None:
        """Add the tasks of a chunk of queries, which is at `where` among the chunks.

        `holders` are the workers that have chunks of keys.
        """
        *batch, heads, queries = (
            slice(starts[i], starts[i + 1])
            for starts, i in zip(self.starts[:-1], where, strict=True)
        )
        p, rows = self.p, Rows(tuple(batch), heads, queries.start, queries.stop)
        sees = seen_keys(p, rows)
        ends = list(itertools.pairwise(self.starts[-1]))
        seen = [i for i, (first, last) in enumerate(ends) if sees(first, last)]
        sinks = None if p.sinks is None else p.sinks[heads]
        is_single = len(seen) == 1
        parts = []
        for i in seen:
            first, last = ends[i]
            options = options_of(p, rows, first, last)
            if is_single:
                options |= {"sinks": sinks, "return_lse": self.with_lse}
            name = self._root(where) if is_single else (self.part, *where, i)
            compute = partial(
                attend_part, options=options, first_key=first, partial=not is_single,
                num_threads=self.num_threads)  # fmt: skip
            blocks = self._blocks(arrays, where, i)
            self._add(name, compute, *blocks)
            if workers := holders.get(blocks[1].key):
                self.workers[name] = workers
            parts.append(name)
        level = 0
        while len(parts) > FAN_IN:
            groups = [parts[i : i + FAN_IN] for i in range(0, len(parts), FAN_IN)]
            parts = [
                group[0] if len(group) == 1
                else self._add((self.merge, *where, level, i), merge_parts, _refs(group))
                for i, group in enumerate(groups)
            ]  # fmt: skip
            level += 1
        last_task = partial(finish, sinks=sinks, dtype=self.dtype, with_lse=self.with_lse)
        if not parts:
            shape = tuple(part.stop - part.start for part in (*batch, heads, queries))
            nothing = partial(_nothing, last_task, shape, p.value.shape[-1], real_of(p))
            self._add(self._root(where), nothing)
        elif not is_single:
            self._add(self._root(where), last_task, _refs(parts))

    def arrays(self, inputs: list[Any], squeeze: bool) -> Any:
        """Return the result as a dask array, or the pair of it and the lse."""
        chunks = (*self.axes.batch, self.axes.q_heads, self.axes.q)
        names = list(itertools.product(*(range(len(c)) for c in chunks)))
        if self.with_lse:
            for where in names:
                self._add((self.out, *where, 0), itemgetter(0), TaskRef(self._root(where)))
        graph = HighLevelGraph.from_collections(self.out, self.tasks, dependencies=inputs)
        if self.workers:  # a wish: other workers may compute what these can't
            graph.layers[self.out].annotations = {
                "workers": self.workers.get,
                "allow_other_workers": self.workers.__contains__,
            }
        v_chunks = (self.p.value.shape[-1],)
        out = da.Array(graph, self.out, (*chunks, v_chunks), dtype=self.dtype)
        if not self.with_lse:
            return out[0] if squeeze else out
        self.tasks = {}
        for where in names:
            self._add((self.lse, *where), itemgetter(1), TaskRef(self._root(where)))
        graph = HighLevelGraph.from_collections(self.lse, self.tasks, dependencies=[out])
        lse = da.Array(graph, self.lse, chunks, dtype=real_of(self.p))
        return (out[0], lse[0]) if squeeze else (out, lse)

    def _blocks(self, arrays: tuple[Any, ...], where: tuple[int, ...], k: int) -> list[Any]:
        """Return references to the blocks of all arrays for a chunk of queries and one of keys."""
        *batch, heads, _ = where
        group = self.p.query.shape[-3] // max(1, self.p.key.shape[-3])
        kv_head = self.starts[-3][heads] // max(1, group)
        kv_heads = bisect_right(self.kv_starts, kv_head) - 1
        of_keys, of_scores, of_rows = (*batch, kv_heads, k, 0), (*where, k), where
        wanted = ((*where, 0), of_keys, of_keys, of_scores, of_scores, of_rows, of_rows)
        blocks: list[Any] = []
        for array, index in zip(arrays, wanted, strict=True):
            if array is None:
                blocks.append(None)
                continue
            own = zip(index[len(index) - array.ndim :], array.numblocks, strict=True)
            blocks.append(TaskRef((array.name, *(0 if n == 1 else i for i, n in own))))
        return blocks

    def _root(self, where: tuple[int, ...]) -> tuple[Any, ...]:
        """Return the name of the task that ends a chunk of queries."""
        return (self.both, *where) if self.with_lse else (self.out, *where, 0)

    def _add(self, name: Any, function: Any, *arguments: Any) -> Any:
        self.tasks[name] = Task(name, function, *arguments)
        return name


def _nothing(last_task: Any, shape: tuple[int, ...], v_dim: int, real: Any) -> Any:
    """Return the result of queries that see no key."""
    return last_task([empty_part(shape, v_dim, real)])


def _refs(names: Iterable[Any]) -> Any:
    return List(*map(TaskRef, names))


def _as_tensor(name: str, given: Any) -> Any:
    """Return a dask array, of known chunks, or what was given as an ndarray."""
    if not is_dask_collection(given):
        return as_array(name, given)
    if not isinstance(given, da.Array):
        raise TypeError(f"{name} is a {type(given).__name__}: a dask array or an array is needed")
    if any(size != size for axis in given.chunks for size in axis):  # NaN
        raise ValueError(
            f"{name} has chunks of unknown sizes: call {name}.compute_chunk_sizes() first"
        )
    return given


def _in_memory(name: str, given: Any) -> Any:
    if is_dask_collection(given):
        raise TypeError(
            f"{name} is a {type(given).__name__} of Dask: it must be in memory, as "
            f"{name}.compute() gives"
        )
    return given


def _shape_alone(array: Any) -> Any:
    return array if array is None else without_memory(array.shape, array.dtype)


def _known_ranges(given: Any, kv_len: int) -> Any:
    """Return `key_ranges` with the widest ones in place of dask arrays."""
    if not isinstance(given, tuple | list) or len(given) != 2:
        return given  # which the op refuses, unless it is None
    known = []
    for i, bound in enumerate(given):
        if is_dask_collection(bound):
            bound = _as_tensor(f"key_ranges[{i}]", bound)
            if bound.dtype.kind in "iu":  # else the op refuses its dtype
                bound = without_memory(bound.shape, np.int64, (0, kv_len)[i])
            else:
                bound = _shape_alone(bound)
        known.append(bound)
    return known


def _ranges_of(p: Problem, given: Any) -> list[Any]:
    """Return both ends of the rows' ranges, as dask arrays or in memory."""
    if p.key_begins is None:
        return [None, None]
    ends = zip(given, (p.key_begins, p.key_ends), strict=True)
    return [x if is_dask_collection(x) else known for x, known in ends]


def _cuts(array: Any, axis: int, size: int) -> set[int]:
    """Return where an axis is cut; nowhere if it is in memory, is missing or broadcasts."""
    if not isinstance(array, da.Array) or array.ndim < -axis or array.shape[axis] != size:
        return set()
    return set(np.cumsum(array.chunks[axis]).tolist())


def _holders(array: Any) -> dict[Any, list[str]]:
    """Return the workers that have the chunks of an array which a cluster has computed.

    A chunk may be a view of such a one: it is then made where that is.
    """
    graph = dict(array.dask)
    sources: dict[Any, Any] = {}
    for name in flatten(array.__dask_keys__()):
        source = name
        while len(before := tuple(getattr(graph.get(source), "dependencies", ()))) == 1:
            source = before[0]
        if hasattr(graph.get(source), "client"):  # a Future
            sources[name] = graph[source]
    if not sources:
        return {}
    client = next(iter(sources.values())).client
    if client.asynchronous:
        return {}
    known = client.who_has(list(sources.values()))
    return {name: list(known.get(future.key, ())) for name, future in sources.items()}


def _starts(chunks: Chunks) -> list[int]:
    """Return where the chunks of an axis begin, and its size."""
    return [0, *itertools.accumulate(chunks)]


def _chunks(size: int, *cuts: set[int]) -> Chunks:
    """Return the chunks of an axis that is cut wherever one of the sets says."""
    edges = sorted({0, size}.union(*cuts))
    return tuple(b - a for a, b in itertools.pairwise(edges)) or (0,)


def _head_cuts(
    tensors: dict[str, Any], num_heads: int, num_kv_heads: int
) -> tuple[set[int], set[int]]:
    """Return where the heads of queries and of keys are cut, so that chunks match.

    A chunk of query heads then reads all heads of one chunk of keys: either it has all query heads
    of them, or some query heads of a single one.
    """
    group = max(1, num_heads // max(1, num_kv_heads))
    q_cuts = _cuts(tensors["query"], -3, num_heads)
    kv_cuts = set().union(*(_cuts(tensors[name], -3, num_kv_heads) for name in ("key", "value")))
    for cut in q_cuts:
        kv_cuts |= {cut // group, -(-cut // group)}
    return q_cuts | {cut * group for cut in kv_cuts}, kv_cuts
