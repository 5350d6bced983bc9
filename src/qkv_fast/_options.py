"""Types of the keyword arguments of the attention functions, for their overloads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypedDict

from ._dtypes import Array

Ints = int | Sequence[int] | Array
Window = tuple[int | None, int | None]
KeyRanges = tuple[Any, Any]  # each of Ints, anything that NumPy can view as these, or None
Progress = Callable[[int, int], object]  # of (done, total); what it returns is not looked at


class Options(TypedDict, total=False):
    """Taken by all; `scaled_dot_product_attention` says what they mean."""

    window: Window | None
    softcap: float | None
    alibi_slopes: Any
    sinks: Any
    attn_bias: Any
    key_ranges: KeyRanges | None
    out: Any
    num_threads: int | None
    out_dtype: Any
    progress: Progress | None


class DenseOptions(Options, total=False):
    """Taken by `scaled_dot_product_attention`."""

    query_offset: Ints
    key_lengths: Ints | None
    dtype: Any


class VarlenOptions(Options, total=False):
    """Taken by `varlen_attention`."""

    query_offset: Ints | None
    key_lengths: Ints | None
    dtype: Any


class PagedOptions(Options, total=False):
    """Taken by `paged_attention`."""

    query_offset: Ints | None
    key_scales: Any
    value_scales: Any
    dtype: Any


class CacheOptions(Options, total=False):
    """Taken by `KVCache.attend`."""

    sequences: Any
