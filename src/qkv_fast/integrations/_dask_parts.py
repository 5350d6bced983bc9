"""Attention over chunks of queries and keys, merged in a fixed order: what a task of Dask computes.

Nothing here needs Dask. The call is checked once, on arrays that have the shapes but no memory:

    p = check(query, key, value, ...)            a Problem, or the error that the op would raise
    seen_keys(p, rows)                           which keys a chunk of queries can see
    options_of(p, rows, first_key, last_key)     the op's arguments for that chunk and these keys
    attend_part(...)                             (out, lse) of it, in float32 or float64
    merge_parts(parts), finish(parts, ...)       the branches of the tree, and its root
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

import qkv_fast

from .. import _threads
from .._dtypes import BFLOAT16, FLOAT16, FLOAT64, UINT16, Array, code_of
from .._problem.arguments import flag
from .._problem.problem import UNBOUNDED, Problem
from .._problem.scoring import no_dropout
from .._problem.selection import scores

FAN_IN = 2  # parts that one task merges
_SHORT = {FLOAT16: "float16", BFLOAT16: "bfloat16"}  # dtypes that parts do not have

Part = tuple[Array, Array]  # out (..., Lq, Dv) and lse (..., Lq), float32 or float64


class Rows(NamedTuple):
    """A chunk of queries: slices of the batch axes and of the query heads, and its positions."""

    batch: tuple[slice, ...]
    heads: slice
    start: int
    stop: int


def without_memory(shape: tuple[int, ...], dtype: Any, fill: Any = 0) -> Array:
    """Return an array that has a shape and a dtype, but a single element."""
    return np.broadcast_to(np.full((), fill, dtype), shape)


def check(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Any,
    dropout_p: Any,
    is_causal: Any,
    scale: Any,
    enable_gqa: Any,
    key_lengths: Any,
    return_lse: Any,
    num_threads: Any,
    dtype: Any,
    **modifiers: Any,
) -> Problem:
    """Return the call as the op's own stages read it, or raise as the op does."""
    p = Problem()
    no_dropout(dropout_p)
    scores(p, query, key, attn_mask, is_causal, scale, enable_gqa, key_lengths=key_lengths,
           dtype=dtype, value=value, **modifiers)  # fmt: skip
    flag("return_lse", return_lse)
    if num_threads is not None:
        _threads.checked(num_threads)
    return p


def seen_keys(p: Problem, rows: Rows) -> Callable[[int, int], bool]:
    """Return a function that says whether some query of a chunk can see one of the keys [a, b)."""
    offset = np.zeros((), np.int64) if p.query_offset is None else p.query_offset[rows.batch]
    lengths = np.int64(p.kv_len) if p.key_lengths is None else p.key_lengths[rows.batch]
    if p.key_begins is None or p.key_ends is None:  # the union of what rows see has no gap
        begin = offset + (rows.start - p.left)
        end = np.minimum(offset + (rows.stop + p.right), lengths)
        if rows.start == rows.stop:
            end = begin
    else:
        which = (*rows.batch, rows.heads, slice(rows.start, rows.stop))
        position = offset[..., np.newaxis, np.newaxis] + np.arange(rows.start, rows.stop)
        begin = np.maximum(position - p.left, p.key_begins[which])
        end = np.minimum(position + (p.right + 1), p.key_ends[which])
        end = np.minimum(end, np.asarray(lengths)[..., np.newaxis, np.newaxis])
    begin, end = np.broadcast_arrays(np.maximum(begin, 0), end)
    some = begin < end
    begin, end = begin[some], end[some]
    return lambda a, b: a < b and bool(np.any((begin < b) & (end > a)))


def options_of(p: Problem, rows: Rows, first_key: int, last_key: int) -> dict[str, Any]:
    """Return the op's arguments for a chunk of queries and the keys [first_key, last_key)."""
    left, right = (None if side >= UNBOUNDED else side for side in (p.left, p.right))
    offset = 0 if p.query_offset is None else p.query_offset[rows.batch]
    options: dict[str, Any] = {
        "scale": p.scale,
        "enable_gqa": True,
        "window": (left, right),
        "query_offset": offset + (rows.start - first_key),  # that of this part's first key is 0
        "softcap": p.softcap or None,
    }
    if p.alibi_slopes is not None:
        options["alibi_slopes"] = p.alibi_slopes[(*rows.batch, rows.heads)]
    if p.key_lengths is not None:
        count = last_key - first_key
        lengths = np.clip(p.key_lengths[rows.batch] - first_key, 0, count)
        if np.any(lengths < count):
            options["key_lengths"] = lengths
    if p.uint16_is_bf16 or p.caller_query.dtype.num == UINT16.num:
        options["dtype"] = "bfloat16"
    return options


def attend_part(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None,
    attn_bias: Array | None,
    begin: Array | None,
    end: Array | None,
    *,
    options: dict[str, Any],
    first_key: int,
    partial: bool,
    num_threads: int | None,
) -> Any:
    """Compute attention of a chunk of queries over one of keys.

    `begin` and `end` are `key_ranges` among all keys, of which `first_key` is this chunk's first.
    With `partial` the result is a `Part`; else it is what the op returns.
    """
    options = dict(options)
    if begin is not None or end is not None:
        options["key_ranges"] = tuple(_shifted(x, first_key) for x in (begin, end))
    if partial:
        options["return_lse"] = True
        options["out_dtype"] = "float32" if query.dtype.itemsize == 2 else None
    if num_threads is None:
        num_threads = threads_of_task()
    return qkv_fast.scaled_dot_product_attention(
        query, key, value, attn_mask, attn_bias=attn_bias, num_threads=num_threads, **options
    )


def _shifted(bound: Array | None, first_key: int) -> Array | None:
    """Return one end of key ranges, counted from a later key."""
    if bound is None or bound.dtype.kind not in "iu":  # the op refuses what are no integers
        return bound
    if bound.dtype == np.uint64:
        bound = np.minimum(bound, np.uint64(UNBOUNDED))
    return np.maximum(bound.astype(np.int64), 0) - first_key


def empty_part(rows_shape: tuple[int, ...], v_dim: int, real: Any) -> Part:
    """Return the result of queries that see no key."""
    return np.zeros((*rows_shape, v_dim), real), np.full(rows_shape, -np.inf, real)


def merge_parts(parts: Sequence[Part]) -> Part:
    """Merge the results of the same queries over different keys, in the order given."""
    if len(parts) == 1:
        return parts[0]
    outputs, lses = zip(*parts, strict=True)
    return qkv_fast.merge_attention(outputs, lses, num_threads=threads_of_task())


def finish(parts: Sequence[Part], *, sinks: Array | None, dtype: Any, with_lse: bool) -> Any:
    """Merge the last parts, let sinks join the denominator and round to the query's dtype."""
    outputs, lses = zip(*parts, strict=True)
    out_dtype = _SHORT.get(code_of(dtype, True))
    out, lse = qkv_fast.merge_attention(
        outputs, lses, sinks=sinks, out_dtype=out_dtype, num_threads=threads_of_task()
    )
    out = out.view(dtype)
    return (out, lse) if with_lse else out


def merge_tree(parts: Sequence[Part]) -> list[Part]:
    """Merge parts until at most `FAN_IN` are left."""
    parts = list(parts)
    while len(parts) > FAN_IN:
        parts = [merge_parts(parts[i : i + FAN_IN]) for i in range(0, len(parts), FAN_IN)]
    return parts


def real_of(p: Problem) -> type[np.floating[Any]]:
    """Return the dtype of partial results."""
    return np.float64 if p.code == FLOAT64 else np.float32


def threads_of_task() -> int:
    """Return how many threads a task may use, so that all tasks of a process share its CPUs.

    On a worker of Dask the share is one CPU for each of its threads, which is how Dask divides a
    machine, or more if OMP_NUM_THREADS or `set_num_threads` says so there.
    """
    total = _threads.get_num_threads()
    distributed = sys.modules.get("distributed")
    if distributed is not None:
        try:
            worker = distributed.get_worker()
        except ValueError:
            pass
        else:
            every = getattr(type(worker), "_instances", ()) or (worker,)
            running = sum(w.state.nthreads for w in every if w.status.name in ("running", "paused"))
            slots = max(1, running, worker.state.nthreads)
            if _threads.source() in ("CPU affinity", "CPUs", "cgroup CPU quota"):
                return 1
            return max(1, min(total, _threads.cpus()) // int(slots))
    return max(1, total // _pool_size(total))


def _pool_size(most: int) -> int:
    """Return how many tasks run beside each other where dask's local schedulers run this one."""
    multiprocessing = sys.modules.get("multiprocessing")
    if multiprocessing is not None and multiprocessing.parent_process() is not None:
        return most  # scheduler="processes": one process for each CPU
    thread = threading.current_thread()
    threaded: Any = sys.modules.get("dask.threaded")
    if threaded is None or thread is threading.main_thread():
        return 1
    pools = [threaded.default_pool]
    pools += [pool for of_thread in list(threaded.pools.values()) for pool in of_thread.values()]
    for pool in pools:
        if thread in getattr(pool, "_threads", ()):
            return int(pool._max_workers)
    return most if "ThreadPool" in thread.name else 1
