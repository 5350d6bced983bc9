"""Problem: what an engine computes."""

from __future__ import annotations

from typing import Any

from .._dtypes import Array
from .._options import Progress

UNBOUNDED = 1 << 62  # of a window's side


class Problem:
    """What an engine computes: arrays of one layout, and plain numbers.

    A field without a default is set by the stages of every call. A default stays in the class until
    a stage sets the field, so a new Problem costs nothing. Any tensor of bfloat16 may be uint16.
    """

    # (*batch, Hq, Lq, D), (*batch, Hkv, Lk, D), (*batch, Hkv, Lk, Dv); any strides, 0 along an
    # axis that was broadcast. With a block_table, key and value are (pages, Hkv, page_size, ...).
    query: Array
    key: Array
    value: Array

    # Element types as `_dtypes` numbers them; mask_code is -1 without a mask, and so is bias_code.
    query_code: int
    key_code: int
    value_code: int
    mask_code: int = -1
    bias_code: int = -1
    out_code: int
    # The type of the arithmetic: that of all tensors, else float64 if one has it, else float32.
    code: int
    # Whether the caller says that uint16 arrays hold bfloat16.
    uint16_is_bf16: bool = False

    # Keys that a batch entry has at most (Lk), and has: int64, (*batch,).
    kv_len: int
    key_lengths: Array | None = None

    # Packed sequences, int64, (batch,): a batch entry's queries (and rows of out and lse) begin at
    # its query_starts and are query_lengths many; its keys begin at its key_starts.
    query_starts: Array | None = None
    query_lengths: Array | None = None
    key_starts: Array | None = None

    # Pages, int64, (batch, blocks): key j of a batch entry is row j % page_size of page
    # block_table[entry, j // page_size]. Entries that no query can see may hold anything.
    block_table: Array | None = None
    # Factors of int8 rows: float32, of the shape of key and value without the last axis.
    key_scales: Array | None = None
    value_scales: Array | None = None

    # score = q·k * scale; then softcap (0.0: none), alibi_slopes (float64, (*batch, Hq)), attn_mask
    # (boolean or floating, (*batch, Hq, Lq, Lk)) and attn_bias (floating, of that shape). With
    # packed sequences, Lq and Lk are those of the longest ones.
    scale: float
    softcap: float = 0.0
    alibi_slopes: Array | None = None
    attn_mask: Array | None = None
    attn_bias: Array | None = None
    # Logits that join the denominator: float64, (Hq,).
    sinks: Array | None = None

    # Keys position - left to position + right are visible. The first query's position is 0, or
    # query_offset: int64, (*batch,).
    left: int = UNBOUNDED
    right: int = UNBOUNDED
    query_offset: Array | None = None
    # Row i sees the keys key_begins[i] <= j < key_ends[i] at most: int64 from 0 to kv_len,
    # (*batch, Hq, Lq), with packed sequences (batch, Hq, total). Both are given, or none is.
    key_begins: Array | None = None
    key_ends: Array | None = None

    num_threads: int
    # The caller's function of (done, total), which is told of the call's progress now and then.
    progress: Progress | None = None

    # Of `attention_weights` and `analysis` alone: what is written, and which query heads and rows
    # (int64, along one axis; None: all) are computed, in their order. Besides the stages that
    # `attention_weights` takes: "received", sums of the weights over rows, and "statistics".
    stage: str = ""
    heads: Array | None = None
    rows: Array | None = None
    # Log-sum-exps of these rows that are known already, without sinks: float32 or, for float64,
    # float64, (*batch, len(heads), len(rows)).
    known_lse: Array | None = None

    # Where the engine writes: (*batch, Hq, Lq, Dv) and (*batch, Hq, Lq). Weights are (*batch,
    # len(heads), len(rows), Lk), in rows that lie in one piece; what keys receive is a single such
    # row for each head. Statistics are float64, (*batch, len(heads), len(rows), 8): the fields of
    # `analysis.Statistics`.
    out: Array
    lse: Array | None = None

    # What the caller has and gets, in the layout of the query as it was given: `result` is the
    # memory of `out`, or the array or tensor that was given; `lse_result` is the memory of `lse`.
    caller_query: Array
    result: Any
    lse_result: Array | None = None
    # Where the engine can't write to the memory of `result`: what it writes to instead, and that
    # memory, to which it is copied in the end.
    temporary: Array | None = None
    target: Array | None = None
