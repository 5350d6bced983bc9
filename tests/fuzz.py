"""Run seeded random cases on every engine, and judge the results by the oracle.

`python tests/fuzz.py --seed s --cases 100000` runs cases 0 to 99999 of seed s. Case n of a seed is
always the same: `--seed s --case n` runs it alone and prints its arguments. Cases run in child
processes: after a crash or a hang the run reports the number of the case and continues.

`--resume FILE` keeps counts and differences in FILE, and continues where an earlier run with this
file has stopped. `--corpus FOLDER` first runs the cases of a folder again (see fuzz_state.py), and
adds to it cases in which it finds a difference or features that no case had together. With
`--torch`, torch judges each result that it can compute too.

All arrays of a case lie in buffers of bytes (`Memory`), whose gaps hold NaN. After each call the
buffers are compared with a copy: only the elements of `out` may differ.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import faulthandler
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fuzz_state
import fuzz_torch
import numpy as np
import oracle
import statistics_oracle

import qkv_fast
from qkv_fast import _loader, _select, analysis

try:
    import ml_dtypes
except ImportError:
    ml_dtypes = None

Array = np.ndarray
Options = dict[str, Any]

RAW = {"float32": "f4", "float64": "f8", "float16": "f2", "bfloat16": "u2", "int8": "i1"}
FLOATS = ("float32", "float64", "float16", "bfloat16")
LANES = (7, 8, 9, 15, 16, 17, 31, 32, 33)
LENGTHS = (0, 1, 1, 2, 3, 5, *LANES, 63, 64, 65, 127, 128, 129, 255, 256, 257)
LONG = (2047, 2048, 2049, 2050, 2100, 4095, 4096, 4097, 4200, 6145)
HEAD_SIZES = (1, 2, 3, 4, 5, *LANES, 63, 64, 65, 127, 128, 129, 257)
PAIRED = ("auto", "neonbf16", "avx512bf16", "amx")  # these round weights to bfloat16 too
# A case that takes longer is reported as a hang.
SECONDS = int(os.environ.get("FUZZ_SECONDS", "60"))
COUNTS, NEW_PAIR = "counts", "new pair"  # what a child reports beside differences
AGAIN = 75  # exit status of a child that wants the next case to run in a new one
GAP = 0xFF  # a byte of NaN in every floating type
judge_by_torch = False  # --torch
TINIEST = {"float32": 2.0**-149, "float64": 2.0**-1074, "float16": 2.0**-24, "bfloat16": 2.0**-133}
ULP = {"float32": 2.0**-23, "float64": 2.0**-52, "float16": 2.0**-10, "bfloat16": 2.0**-7}


class Draw:
    """Decisions from one generator, drawn in blocks: a draw of one number takes microseconds."""

    def __init__(self, seed: int, number: int) -> None:
        self.rng = np.random.default_rng([seed, number])
        self._block: list[float] = []

    def uniform(self) -> float:
        if not self._block:
            self._block = self.rng.random(64).tolist()
        return self._block.pop()

    def chance(self, probability: float) -> bool:
        return self.uniform() < probability

    def whole(self, low: int, high: int) -> int:
        """Return an int from low to high, both inclusive."""
        return low + int(self.uniform() * (high - low + 1))

    def pick(self, items: Sequence[Any]) -> Any:
        return items[int(self.uniform() * len(items))]

    def order(self, count: int) -> list[int]:
        return sorted(range(count), key=[self.uniform() for _ in range(count)].__getitem__)


# --- Memory, layouts, element types -------------------------------------------------------------


class Memory:
    """A buffer of bytes, and a copy of it from before the first call."""

    def __init__(self, size: int) -> None:
        self.bytes = np.full(size, GAP, np.uint8)
        self.before = b""

    def seal(self) -> None:
        self.before = self.bytes.tobytes()

    def restore(self) -> None:
        self.bytes[:] = np.frombuffer(self.before, np.uint8)

    def changed(self, allowed: Array | None = None) -> bool:
        """Return whether bytes other than the allowed ones have changed."""
        if allowed is None:
            return self.bytes.tobytes() != self.before
        return bool(((self.bytes != np.frombuffer(self.before, np.uint8)) & ~allowed).any())


class Placed(NamedTuple):
    array: Array
    memory: Memory
    start: int


def layout(
    draw: Draw,
    shape: Sequence[int],
    itemsize: int,
    repeated: Sequence[int] = (),
    plain: float = 0.4,
) -> tuple[list[int], int, int]:
    """Return strides, the offset of the first element, and the size, all in bytes."""
    axes = len(shape)
    order, steps, start = list(range(axes)), [1] * axes, 0
    if not draw.chance(plain):
        if draw.chance(0.4):
            order = draw.order(axes)
        if draw.chance(0.4) and axes:
            steps[draw.whole(0, axes - 1)] = draw.pick((-1, -1, 2, 3, -2))
        if draw.chance(0.4) and axes:
            steps[draw.whole(0, axes - 1)] = draw.pick((-1, 2, 2, 5))
        if draw.chance(0.15):
            start = draw.whole(1, itemsize)  # mostly not a multiple of the alignment
    strides, size = [0] * axes, itemsize
    for axis in reversed(order):
        if axis in repeated:
            continue
        strides[axis] = size * steps[axis]
        if strides[axis] < 0:
            start += -strides[axis] * max(0, shape[axis] - 1)
        size *= max(1, shape[axis]) * abs(steps[axis])
    last = start + sum(max(0, s) * max(0, n - 1) for s, n in zip(strides, shape, strict=True))
    return strides, start, last + itemsize


def exposed_dtype(name: str, raw: np.dtype[Any], bits: bool) -> np.dtype[Any]:
    if name == "bfloat16" and not bits and ml_dtypes is not None:
        return np.dtype(ml_dtypes.bfloat16)
    return raw


def place(
    draw: Draw,
    memories: list[Memory],
    data: Array,
    name: str = "",
    *,
    bits: bool = True,
    plain: float = 0.4,
    room: int = 0,
    swap: float = 0.06,
    read_only: float = 0.15,
) -> Placed:
    """Copy data into memory of its own, in a random layout.

    `data` holds raw elements (bfloat16 as uint16); an axis of stride 0 stays one.
    """
    repeated = [a for a in range(data.ndim) if data.strides[a] == 0 and data.shape[a] > 1]
    strides, start, size = layout(draw, data.shape, data.itemsize, repeated, plain)
    memory = Memory(size + room + draw.pick((0, 0, 64)))
    dtype = data.dtype
    if data.itemsize > 1 and draw.chance(swap) and exposed_dtype(name, dtype, bits) == dtype:
        dtype = dtype.newbyteorder(">")
    # Along a repeated axis all elements are equal, and only the first is written.
    once = tuple(slice(0, 1) if a in repeated else slice(None) for a in range(data.ndim))
    np.ndarray(data.shape, dtype, memory.bytes, start, strides)[once] = data[once]
    seen = exposed_dtype(name, dtype, bits) if dtype.isnative else dtype
    array = np.ndarray(data.shape, seen, memory.bytes, start, strides)
    if draw.chance(read_only):
        array.flags.writeable = False
    memories.append(memory)
    return Placed(array, memory, start)


def encode(x: Array, name: str) -> Array:
    """Round float64 to an element type (bfloat16 as uint16). Axes of stride 0 keep it."""
    repeated = [s == 0 and n > 1 for s, n in zip(x.strides, x.shape, strict=True)]
    if any(repeated) and x.size:
        once = tuple(slice(0, 1) if r else slice(None) for r in repeated)
        return np.broadcast_to(encode(np.ascontiguousarray(x[once]), name), x.shape)
    with np.errstate(all="ignore"):
        if name != "bfloat16":
            return x.astype(RAW[name])
        bits = x.astype(np.float32).view(np.uint32)
        rounded = bits + (0x7FFF + (bits >> 16 & 1)) >> 16
        return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def decode(x: Array, name: str = "") -> Array:
    """Return any element type as float64."""
    if x.dtype.kind == "u" or name == "bfloat16":
        if x.dtype.kind != "u":
            return x.astype(np.float64)
        return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return x.astype(np.float64)


def quantize(x: Array) -> tuple[Array, Array]:
    """Return float32 rows (..., D) as int8 and their scales (...)."""
    scales = np.abs(x).max(axis=-1, initial=0) / np.float32(127)
    safe = np.where(scales == 0, 1, scales)[..., np.newaxis]
    return np.clip(np.rint(x / safe), -127, 127).astype(np.int8), scales


# --- The exact result, and the tolerance ----------------------------------------------------------


@dataclasses.dataclass
class Truth:
    """A call as one dense problem in float64, whatever the layout of the call itself."""

    query: Array  # (*batch, Hq, Lq, D), or 2 axes
    key: Array
    value: Array
    options: Options
    # Makes the call's result, or lse, of the dense one.
    take: Callable[[Array], Array] = lambda x: x
    _exact: tuple[Array, Array] | None = None
    _floor: tuple[Array, Array] | None = None
    _by_torch: Truth | None = None

    def has_torch(self) -> bool:
        return self._by_torch is not None

    def by_torch(self) -> Truth | None:
        """Return this problem with torch's result as the exact one; None where torch has none."""
        if self._by_torch is None:
            out = fuzz_torch.attention(self.query, self.key, self.value, self.options)
            if out is not None:
                exact = self.take(out), self.exact()[1]
                self._by_torch = dataclasses.replace(self, _exact=exact)
        return self._by_torch

    def exact(self) -> tuple[Array, Array]:
        if self._exact is None:
            out, lse = oracle.attention(self.query, self.key, self.value, **self.options)
            self._exact = self.take(out), self.take(lse)
        return self._exact

    def plain(self, real: Any) -> tuple[Array, Array]:
        """Return what a plain computation in this precision gives."""
        out, lse = oracle.attention(self.query, self.key, self.value, real=real, **self.options)
        return self.take(out), self.take(lse)

    def lost_infinities(self, wide: bool) -> Array:
        """Return where an infinite value has a weight that this precision may round to 0.

        Engines round weights below the smallest normal number to 0: 0 times infinity is NaN, and a
        key without weight may be left out, so that another infinity is the result.
        """
        length = self.key.shape[-2]
        value = np.broadcast_to(np.eye(length), (*self.value.shape[:-1], length))
        weights, _ = oracle.attention(self.query, self.key, value, **self.options)
        least = 2.0 ** (-1021 if wide else -125) * weights.max(-1, initial=0, keepdims=True)
        scores = self.sizes()[0]  # such as ALiBi's of 10^9, whose last place is 64
        largest = float(scores.max(initial=0, where=np.isfinite(scores)))
        least = least * math.exp(min(700.0, 8 * (2.0**-52 if wide else 2.0**-23) * largest))
        tiny = (weights < least) & self.visible(value)
        infinite = np.isinf(self.value)
        if infinite.ndim > 2:
            infinite = np.repeat(infinite, tiny.shape[-3] // max(1, infinite.shape[-3]), -3)
        return self.take((tiny.astype(float) @ infinite.astype(float)) > 0)

    def visible(self, one_hot: Array) -> Array:
        """Return which keys each row sees, though the weight may be 0 even in float64."""
        options = {n: x for n, x in self.options.items() if n not in ("alibi_slopes", "scale")}
        for name in ("attn_mask", "attn_bias"):
            mask = options.get(name)
            if mask is not None and mask.dtype != bool:
                options[name] = np.where(np.isneginf(mask), mask, 0.0)
        query, key = (np.zeros_like(x) for x in (self.query, self.key))
        return oracle.attention(query, key, one_hot, **options)[0] > 0

    def sizes(self) -> tuple[Array, Array]:
        """Return bounds of each row's scores, and of the values that it may see.

        An error of e in a score is a relative error of e in a weight. A score is no more exact than
        the last place of its summands: those are at most |q| |k| * scale, and what the mask and
        ALiBi add; softcap limits an infinite score to the cap. The relative error of its weights
        times the largest value bounds the error of a row, also where its result is small by
        cancellation.
        """
        if self._floor is not None:
            return self._floor
        q, k, v = (x[np.newaxis] if x.ndim == 2 else x for x in (self.query, self.key, self.value))
        finite_q, finite_k, finite_v = (np.nan_to_num(x, posinf=0.0, neginf=0.0) for x in (q, k, v))
        heads, kv_heads = q.shape[-3], k.shape[-3]
        group = heads // max(1, kv_heads)
        scale = self.options.get("scale")
        scale = q.shape[-1] ** -0.5 if scale is None else abs(scale)
        longest = np.sqrt((finite_k**2).sum(-1).max(-1, initial=0))
        scores = np.sqrt((finite_q**2).sum(-1)) * np.repeat(longest, group, -1)[..., np.newaxis]
        scores = scores * scale
        cap = self.options.get("softcap")
        if cap is not None:
            endless = ~np.isfinite(q).all(-1) | ~np.isfinite(k).all()
            scores = np.where(endless, cap, scores)
        for name in ("attn_mask", "attn_bias"):
            mask = self.options.get(name)
            if mask is not None and mask.dtype != bool:
                scores = scores + np.abs(np.nan_to_num(mask, posinf=0.0, neginf=0.0)).max(initial=0)
        slopes = self.options.get("alibi_slopes")
        if slopes is not None:
            batch = np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
            offset = np.broadcast_to(self.options.get("query_offset", 0), batch)[..., None, None]
            ends = np.abs(offset + np.arange(q.shape[-2])).astype(float) + k.shape[-2]
            scores = scores + np.abs(np.broadcast_to(slopes, (*batch, heads)))[..., None] * ends
        largest = np.repeat(np.abs(finite_v).max((-1, -2), initial=0), group, -1)[..., np.newaxis]
        batch = np.broadcast_shapes(scores.shape[:-2], largest.shape[:-2], v.shape[:-3])
        shape = (*batch, heads, q.shape[-2])
        flat = max(x.ndim for x in (self.query, self.key, self.value)) == 2
        both = []
        for x in (scores, largest):
            x = np.nan_to_num(np.broadcast_to(x, shape), nan=np.inf)
            both.append(self.take(x[0] if flat else x))
        self._floor = both[0], both[1]
        return self._floor

    def bias(self) -> float:
        """Return the units in the last place by which sums of equal products may be off.

        Where all elements of a query are equal, and all of a key, each of the D additions of their
        product rounds a partial sum, of half the product on average, in the same direction.
        """
        if self.query.size == 0 or self.key.size == 0:
            return 0.0
        with np.errstate(all="ignore"):
            constant = (np.ptp(x, axis=-1) == 0 for x in (self.query, self.key))
            return self.query.shape[-1] / 4 if all(x.any() for x in constant) else 0.0

    def value_bias(self) -> float:
        """Return the same for sums of weights times values, where keys have equal values."""
        if self.value.size == 0:
            return 0.0
        with np.errstate(all="ignore"):
            equal = (np.ptp(self.value, axis=-2) == 0).any()
        return self.value.shape[-2] / 4 if equal else 0.0


def judge(truth: Truth, out: Array, name: str, wide: bool, paired: bool) -> str:
    """Return what is wrong with a result (float64, but of type `name`), or an empty string.

    An error may be as large as a floor, plus twice the error of the plain computation, which is
    computed only where the floor does not suffice. The floor of an element is a unit in the last
    place of the result, for its rounding, plus a number of units of the computing precision,
    relative to the largest value that the row may see: 16, and 4 times the bound of the scores.
    For float64 it is 64, and 8 times the bound: the oracle is no more exact.
    """
    exact, _ = truth.exact()
    if out.shape != exact.shape:
        return f"shape {out.shape} instead of {exact.shape}"
    with np.errstate(all="ignore"):
        rounded = decode(encode(np.ascontiguousarray(exact), name), name)
        odd = ~np.isfinite(rounded)
        wrong = odd & ~((out == rounded) | (np.isnan(out) & np.isnan(rounded)))
        wrong |= ~odd & ~np.isfinite(out)
        if wrong.any():  # the weight of an infinite value may be 0 in this precision: NaN
            plain, _ = truth.plain(np.float64 if wide else np.float32)
            wrong &= ~((out == plain) | (np.isnan(out) & np.isnan(plain)))
            odd |= ~np.isfinite(out)
        if wrong.any():
            wrong &= np.isfinite(out) | ~truth.lost_infinities(wide)
        if wrong.any():
            return "not finite where the formula is, or not so: " + first(wrong, out, rounded)
        scores, largest = truth.sizes()
        eps = 2.0**-52 if wide else 2.0**-23
        relative = eps * ((64 if wide else 16) + ((8 if wide else 4) + truth.bias()) * scores)
        relative = relative + eps * truth.value_bias()
        if paired:
            relative = relative + 2.0**-8
        floor = (relative * largest)[..., np.newaxis] + ULP[name] * np.abs(rounded)
        # Weights below the smallest normal number may be 0.
        floor = floor + 4 * TINIEST[name] + (0 if wide else 2.0**-120 * largest[..., np.newaxis])
        error = np.abs(out - exact)
        wrong = ~odd & (error > floor)
        if not wrong.any():
            return ""
        plain, _ = truth.plain(np.float64 if wide else np.float32)
        plain = decode(encode(np.ascontiguousarray(plain, dtype=np.float64), name), name)
        off = np.abs(plain - exact)
        off = np.max(off, where=np.isfinite(off) & ~odd, initial=0.0)
        wrong &= error > 2 * off + floor
        if not wrong.any():
            return ""
        return f"error {error[wrong].max():.3g} (plain {off:.3g}): " + first(wrong, out, exact)


def judge_lse(truth: Truth, lse: Array, wide: bool, paired: bool) -> str:
    _, exact = truth.exact()
    if lse.shape != exact.shape:
        return f"lse has shape {lse.shape} instead of {exact.shape}"
    if lse.dtype != (np.float64 if wide else np.float32):
        return f"lse has dtype {lse.dtype}"
    with np.errstate(all="ignore"):
        lse = lse.astype(np.float64)
        odd = ~np.isfinite(exact)
        wrong = odd & ~((lse == exact) | (np.isnan(lse) & np.isnan(exact)))
        scores, _ = truth.sizes()
        eps = 2.0**-52 if wide else 2.0**-23
        floor = eps * ((64 if wide else 16) + (8 + truth.bias()) * scores + 2 * np.abs(exact))
        if paired:
            floor = floor + 2.0**-8
        error = np.abs(lse - exact)
        wrong |= ~odd & ~(error <= floor)
        if wrong.any():
            _, plain = truth.plain(np.float64 if wide else np.float32)
            off = np.abs(plain.astype(np.float64) - exact)
            off = np.max(off, where=np.isfinite(off) & ~odd, initial=0.0)
            wrong &= odd | ~(error <= 2 * off + floor)
        return "lse: " + first(wrong, lse, exact) if wrong.any() else ""


def first(wrong: Array, got: Array, exact: Array) -> str:
    index = tuple(map(int, np.argwhere(wrong)[0]))
    return (
        f"{int(wrong.sum())} of {wrong.size}, first at {index}: {got[index]!r} instead of "
        f"{exact[index]!r}"
    )


# --- Cases ---------------------------------------------------------------------------------------


class Difference(NamedTuple):
    what: str
    choice: str
    detail: str


@dataclasses.dataclass
class Case:
    """One call of a public function."""

    function: str
    arguments: Options
    memories: list[Memory]
    dtype: str = "float32"  # of the result
    wide: bool = False  # whether engines compute it in float64
    truth: Truth | None = None  # None: the call must be refused
    note: str = ""
    out: Placed | None = None
    allowed: Array | None = None  # bytes of out's memory that the call may change
    threads: int = 2
    target: Callable[..., Any] | None = None  # called instead of the public function
    query_dtype: str = ""  # if out_dtype makes it another one than the result's

    def run(self, choices: Sequence[_select.Choice]) -> Iterator[Difference]:
        for memory in self.memories:
            memory.seal()
        if self.truth is None:
            yield from self.run_refused(choices)
            return
        for choice in suited(choices, self.query_dtype or self.dtype, self.wide):
            one = None
            for threads in (1, self.threads) if choice.engine == "native" else (1,):
                what, detail, bits = self.attempt(choice, threads, one)
                if what:
                    yield Difference(what, label(choice), f"{detail} [{threads} threads]")
                one = one or bits

    def attempt(
        self, choice: _select.Choice, threads: int, expected: bytes | None
    ) -> tuple[str, str, bytes | None]:
        """Call once; return the kind of a difference, its details, and the bits of the answer."""
        assert self.truth is not None
        try:
            with in_force(choice):
                answer = self.call(num_threads=threads)
        except Exception as error:
            self.restore()
            return f"raised {type(error).__name__}", str(error), None
        wants_lse = self.arguments.get("return_lse", False)
        result, lse = answer if wants_lse else (answer, None)
        copy = np.array(result)
        bits = copy.tobytes() + (lse.tobytes() if lse is not None else b"")
        trouble = self.trouble()
        self.restore()
        if trouble:
            return trouble, "", bits
        if self.out is not None and result is not self.arguments["out"]:
            return "result is not out", "", bits
        if expected is not None:
            return ("threads change bits", "", bits) if bits != expected else ("", "", bits)
        given = self.arguments.get("out", self.arguments["query"]).dtype
        if self.query_dtype and self.out is None:
            given = np.dtype(self.dtype)
        if copy.dtype != (given if self.out is not None else given.newbyteorder("=")):
            return "dtype", f"{copy.dtype} instead of {given}", bits
        paired = "bfloat16" in self.note and choice.isa in PAIRED
        rounds = paired and (self.query_dtype or self.dtype) == "bfloat16"
        detail = judge(self.truth, decode(copy, self.dtype), self.dtype, self.wide, rounds)
        if not detail and judge_by_torch:
            by_torch = self.truth.by_torch()
            if by_torch is not None:
                out = decode(copy, self.dtype)
                detail = judge(by_torch, out, self.dtype, self.wide, rounds)
                detail = detail and f"by torch: {detail}"
        if detail:
            return "result", detail, bits
        detail = judge_lse(self.truth, lse, self.wide, paired) if lse is not None else ""
        return "lse" if detail else "", detail, bits

    def call(self, **more: Any) -> Any:
        return call(self.target or getattr(qkv_fast, self.function), self.arguments | more)

    def run_refused(self, choices: Sequence[_select.Choice]) -> Iterator[Difference]:
        raised = {}
        for choice in choices:
            what = ""
            try:
                with in_force(choice):
                    self.call()
            except (TypeError, ValueError, MemoryError) as error:
                raised[choice] = type(error).__name__
            except Exception as error:
                what = f"raised {type(error).__name__}"
                raised[choice] = type(error).__name__
            else:
                what = "not refused"
            trouble = self.trouble() if any(m.changed() for m in self.memories) else ""
            self.restore()
            if trouble or what:
                yield Difference(what or trouble, label(choice), self.note)
                if what:
                    return  # no engine takes part in refusals: the others would do the same
        if len(set(raised.values())) > 1:
            yield Difference("exceptions differ", "all", f"{raised} {self.note}")

    def trouble(self) -> str:
        for memory in self.memories:
            own = self.out is not None and memory is self.out.memory and self.truth is not None
            if memory.changed(self.allowed if own else None):
                return "wrote beside out" if own else "wrote to an input"
        return ""

    def restore(self) -> None:
        for memory in self.memories:
            if memory.changed():
                memory.restore()

    def describe(self) -> str:
        lines = [f"{self.function} {self.note} -> {self.dtype}, {self.threads} threads"]
        lines += [f"  {name} = {described(x)}" for name, x in self.arguments.items()]
        return "\n".join(lines)


def described(x: Any) -> str:
    if isinstance(x, list | tuple) and x and isinstance(x[0], np.ndarray):
        return "[" + ", ".join(map(described, x)) + "]"
    if not isinstance(x, np.ndarray):
        text = repr(x) if not huge(x) or x < 2**128 else f"an int of {x.bit_length()} bits"
        return text if len(text) < 200 else text[:200] + "..."
    flags = "" if x.flags.writeable else " read-only"
    flags += "" if x.flags.aligned else " unaligned"
    text = f"{x.dtype.str if x.dtype.kind != 'V' else x.dtype} {x.shape} strides {x.strides}{flags}"
    return text + (f" {x.tolist()}" if x.size <= 12 else "")


def call(function: Callable[..., Any], arguments: Options) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return function(**arguments)


@contextlib.contextmanager
def in_force(choice: _select.Choice) -> Iterator[None]:
    with qkv_fast.backend(choice.engine, tiles=choice.tiles or "auto", isa=choice.isa or "auto"):
        yield


def label(choice: _select.Choice) -> str:
    return "-".join(filter(None, choice))


def all_choices() -> list[_select.Choice]:
    """Return each engine, tile kind and ISA of this machine, and the default choice."""
    choices = _select.available("bfloat16")
    if len(choices) > 1:
        choices.append(_select.Choice("native", "auto", "auto"))
    return choices


def suited(choices: Sequence[_select.Choice], dtype: str, wide: bool) -> list[_select.Choice]:
    """Leave out choices that equal another for this dtype; "auto" differs for float64 only."""
    some = [c for c in choices if c.tiles != "auto" or wide or len(choices) == 1]
    if dtype != "bfloat16":
        some = [c for c in some if c.isa not in PAIRED[1:]] or some
    return some


class Sizes:
    """Axis lengths of a case, shortened until the work is within a budget."""

    def __init__(self, draw: Draw) -> None:
        kind = draw.uniform()
        small = (0, 1, 1, 1, 2, 2, 2, 3, 3, 4, 5, 6)
        self.kv_heads, self.group = (
            draw.pick((1, 1, 1, 2, 2, 3)),
            draw.pick((1, 1, 1, 2, 3, 4, 7, 12)),
        )
        if draw.chance(0.01):
            self.kv_heads = self.group = 0
        batches: list[tuple[int, ...]] = [(), (1,), (1,), (2,), (2,), (3,), (2, 2), (1, 3)]
        self.batch = (0,) if draw.chance(0.02) else draw.pick(batches)
        if kind < 0.4:
            self.q_len, self.kv_len = draw.pick(small), draw.pick(small)
            self.d, self.dv = draw.pick((1, 2, 3, 4, 8)), draw.pick((1, 1, 1, 2, 3, 4, 8))
        else:
            self.q_len = 1 if draw.chance(0.25) else draw.pick(LENGTHS)
            self.kv_len = draw.pick(LENGTHS)
            self.d, self.dv = draw.pick(HEAD_SIZES), draw.pick(HEAD_SIZES)
        if draw.chance(0.04):
            self.dv = 0
        elif draw.chance(0.25):
            self.dv = self.d
        self.long = kind > 0.96
        if self.long:
            self.kv_len, self.q_len = draw.pick(LONG), draw.pick((1, 1, 1, 2, 3, 4))
            self.kv_heads, self.group = draw.pick((1, 1, 2)), draw.pick((1, 1, 2, 4))
            self.batch = draw.pick(((), (1,), (2,)))
        budget = draw.pick((1e5, 5e5, 1.5e6))
        if self.long:
            budget = 2e6
        while self.work() > budget:
            name = max(("q_len", "d", "dv", "group", "kv_len"), key=self.weight)
            setattr(self, name, getattr(self, name) * draw.whole(30, 70) // 100)
        self.d = max(1, self.d)

    def weight(self, name: str) -> float:
        if name == "kv_len":
            return 0 if self.long else self.kv_len / 2
        if name == "q_len" and self.long:
            return 0
        return getattr(self, name) * (10 if name == "group" else 1) - (name in ("d", "group"))

    def work(self) -> float:
        rows = math.prod(self.batch) * self.kv_heads * max(1, self.group * self.q_len)
        return rows * self.kv_len * (self.d + self.dv + 24)

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group


MAGNITUDES = (1.0, 1.0, 1.0, 1.0, 1.0, 0.01, 4.0, 30.0, 1e-4, 0.0)


def numbers(draw: Draw, shape: Sequence[int], repeat: float = 0.06) -> Array:
    """Return float64 numbers, in some cases with axes of stride 0."""
    once = list(shape)
    if shape and draw.chance(repeat):
        once[draw.whole(0, len(once) - 1)] = 1
        once = [min(1, n) if a < n else a for a, n in zip(once, shape, strict=True)]
    x = draw.rng.standard_normal(once)
    if draw.chance(0.3):
        x *= draw.pick(MAGNITUDES)
    elif draw.chance(0.05):
        x = np.rint(x * 2)
    return np.broadcast_to(x, shape)


def spoil(draw: Draw, x: Array) -> Array:
    """Return x with a few elements that are not finite."""
    x = np.array(x)
    for _ in range(draw.pick((1, 1, 2, 4))):
        if x.size:
            index = tuple(draw.whole(0, n - 1) for n in x.shape)
            x[index] = draw.pick((np.nan, np.inf, -np.inf))
    return x


def as_ints(draw: Draw, memories: list[Memory], x: Array, unsigned: bool = True) -> Any:
    """Return ints as an int, a list or an array of some dtype."""
    x = np.asarray(x)
    if x.ndim == 0 and draw.chance(0.8):
        return draw.pick((int, np.int64))(int(x))
    if draw.chance(0.3) and (x.size or x.ndim == 1):  # a list without rows lacks their lengths
        return x.tolist()
    big = bool(x.size) and int(np.abs(x).max()) >= 2**31
    kinds = ["i8"] if big else ["i8", "i8", "i4"]
    if unsigned and not big and (not x.size or x.min() >= 0):
        kinds += ["u8", "u4"]
    return place(draw, memories, x.astype(draw.pick(kinds))).array


def add_out(draw: Draw, case: Case, shape: tuple[int, ...], bits: bool, query: Placed) -> None:
    """Choose `out`: none, new memory, the query, or an overlap with an input; and its type."""
    if draw.chance(0.03):
        case.arguments["out_dtype"] = case.dtype
    elif case.dtype in ("float16", "bfloat16") and draw.chance(0.2):
        case.query_dtype, case.dtype = case.dtype, "float32"
        case.arguments["out_dtype"] = draw.pick(("float32", np.float32, np.dtype("f4")))
    raw = np.dtype(RAW[case.dtype])
    how = draw.uniform()
    if how < 0.5:
        return
    is_query = how < 0.62 and query.array.shape == shape and not case.query_dtype
    if is_query and 0 not in query.array.strides:
        query.array.flags.writeable = True
        case.out = query
    else:
        over = draw.pick(case.memories)
        repeated: Sequence[int] = ()
        strides, start, size = layout(draw, shape, raw.itemsize, repeated)
        if how < 0.8 and size <= len(over.bytes):
            shift = draw.whole(0, len(over.bytes) - size)
            if draw.chance(0.5):
                shift -= shift % raw.itemsize
            start += shift
        else:
            over = Memory(size + draw.pick((0, 64)))
            case.memories.append(over)
        dtype = raw
        if draw.chance(0.05) and exposed_dtype(case.dtype, raw, bits) == raw:
            dtype = raw.newbyteorder(">")
        seen = exposed_dtype(case.dtype, dtype, bits) if dtype.isnative else dtype
        case.out = Placed(np.ndarray(shape, seen, over.bytes, start, strides), over, start)
    array = case.out.array
    case.arguments["out"] = array
    case.allowed = np.zeros(len(case.out.memory.bytes), bool)
    np.ndarray((*shape, raw.itemsize), bool, case.allowed, case.out.start, (*array.strides, 1))[
        ...
    ] = True


def add_modifiers(
    draw: Draw,
    case: Case,
    truth: Options,
    batch: tuple[int, ...],
    sizes: Sizes,
    default_offset: Any,
    offset_in_call: bool = True,
) -> None:
    """Draw positions and score modifiers, for the call and for the oracle."""
    given, memories = case.arguments, case.memories
    q_len, kv_len, heads = sizes.q_len, sizes.kv_len, sizes.heads
    if draw.chance(0.35):
        given["is_causal"] = truth["is_causal"] = True
    truth["query_offset"] = default_offset
    if offset_in_call and draw.chance(0.3):
        shape = batch if draw.chance(0.5) else ()
        kind = draw.uniform()
        if kind < 0.1:
            offset = np.full(shape, draw.pick((2**61, -(2**61), 2**40, -(2**33), 2**31)))
        elif kind < 0.4:
            offset = np.full(shape, kv_len - q_len)
        else:
            offset = draw.rng.integers(-q_len - 2, kv_len + 3, shape)
        given["query_offset"] = as_ints(draw, memories, offset)
        truth["query_offset"] = offset
    if draw.chance(0.9 if kv_len > 4095 else 0.25):
        sides = [
            draw.pick((None, 0, 0, 1, 2, 5, 16, 63, 64, 65, kv_len // 2, kv_len, 2**61, 2**70))
            for _ in "lr"
        ]
        given["window"] = tuple(sides)
        truth["window"] = tuple(None if s is None else min(s, 2**62) for s in sides)
    if draw.chance(0.15):
        given["scale"] = truth["scale"] = draw.pick(
            (1, 0.0, -0.3, 0.5, 0.125, 3.0, np.float32(0.7))
        )
    if draw.chance(0.15):
        cap = given["softcap"] = draw.pick((0.5, 5, 30.0, 1e-3, 1e5, np.float32(2), 0.0, 0))
        truth["softcap"] = cap or None
    if draw.chance(0.15):
        shape = draw.pick(((), (heads,), (*batch, heads), (*[1 for _ in batch], heads)))
        slopes = draw.rng.random(shape) * draw.pick((0.1, 1.0, 0.5, -0.2))
        name = draw.pick(("float64", "float64", "float32", "float16"))
        slopes = np.asarray(slopes).astype(RAW[name])
        listed = slopes.size > 0 and draw.chance(0.3)
        given["alibi_slopes"] = slopes.tolist() if listed else place(draw, memories, slopes).array
        truth["alibi_slopes"] = slopes.astype(float)
    if draw.chance(0.15):
        sinks = draw.rng.standard_normal(heads) * draw.pick((1, 3, 10))
        if heads and draw.chance(0.15):
            sinks[draw.whole(0, heads - 1)] = draw.pick((-np.inf, -np.inf, np.inf, np.nan, -80.0))
        sinks = sinks.astype(draw.pick(("f8", "f8", "f4")))
        listed = draw.chance(0.3)
        given["sinks"] = sinks.tolist() if listed else place(draw, memories, sinks).array
        truth["sinks"] = sinks.astype(float)
    add_ranges(draw, case, truth, (*batch, heads, q_len), kv_len)
    if draw.chance(0.3):
        given["return_lse"] = True


def add_ranges(draw: Draw, case: Case, truth: Options, shape: tuple[int, ...], kv_len: int) -> None:
    """Draw key_ranges that broadcast to shape, (*batch, Hq, Lq); varlen's are (Hq, total_q)."""
    if not draw.chance(0.25):
        return
    ends = []
    for _ in range(2):
        own = [1 if draw.chance(0.3) else n for n in shape][draw.whole(0, len(shape)) :]
        ends.append(draw.rng.integers(-3, kv_len + 4, own))
    begin, end = ends
    kind = draw.uniform()
    if kind < 0.3:  # narrow ranges
        end = begin + draw.rng.integers(-1, 1 + max(1, kv_len // 4), begin.shape)
    elif kind < 0.5:  # most rows see something
        begin = begin // 4
    beyond = draw.pick((2**40, 2**62, 2**63 - 1))
    if begin.size and draw.chance(0.1):
        begin = np.array(begin)
        begin.flat[draw.whole(0, begin.size - 1)] = draw.pick((-beyond, beyond))
    if end.size and draw.chance(0.1):
        end = np.array(end)
        end.flat[draw.whole(0, end.size - 1)] = draw.pick((-beyond, beyond))
    absent = draw.uniform()
    sides = [None if absent < 0.15 else begin, None if 0.1 < absent < 0.25 else end]
    given = [None if x is None else as_ints(draw, case.memories, x) for x in sides]
    case.arguments["key_ranges"] = draw.pick((tuple, list))(given)
    truth["key_ranges"] = tuple(sides)


def add_bias(
    draw: Draw,
    case: Case,
    truth: Options,
    shape: tuple[int, ...],
    bits: bool,
    dtypes: Sequence[str] = FLOATS,
) -> None:
    """Draw a bias that broadcasts to shape, (*batch, Hq, Lq, Lk)."""
    own = list(shape)
    kind = draw.uniform()
    if kind < 0.5:
        own[:-3] = [1] * len(own[:-3])  # the same for all batch entries
    elif kind < 0.8:
        own = [1 if draw.chance(0.35) else n for n in own][draw.whole(0, len(own) - 1) :]
    name = draw.pick([n for n in dtypes if n != "bfloat16" or bits or ml_dtypes is not None])
    bias = draw.rng.standard_normal(own) * draw.pick((0.0, 1.0, 1.0, 5.0))
    if draw.chance(0.3):
        bias = np.where(draw.rng.random(own) < draw.pick((0.02, 0.5, 1.0)), -np.inf, bias)
    data = encode(np.ascontiguousarray(bias), name)
    truth["attn_bias"] = decode(data)
    case.arguments["attn_bias"] = place(draw, case.memories, data, name, bits=bits).array


def add_mask(
    draw: Draw,
    case: Case,
    truth: Options,
    shape: tuple[int, ...],
    bits: bool,
    dtypes: Sequence[str] = FLOATS,
) -> None:
    """Draw a mask that broadcasts to shape, (*batch, Hq, Lq, Lk)."""
    own = list(shape)
    kind = draw.uniform()
    if kind < 0.3:
        own = own[-2:]
    elif kind < 0.45:
        own[-3:-1] = [1, 1]  # padding
    elif kind < 0.75:
        own = [1 if draw.chance(0.35) else n for n in own][draw.whole(0, len(own) - 1) :]
    share = draw.pick((0.0, 0.1, 0.5, 0.9, 0.99, 1.0))
    allowed = draw.rng.random(own) < share
    if draw.chance(0.3):  # a suffix is hidden
        allowed = np.arange(own[-1]) < draw.rng.integers(0, own[-1] + 1, (*own[:-1], 1))
    elif len(own) > 1 and own[-2] and draw.chance(0.3):  # rows without keys
        allowed[..., :: draw.whole(1, 3), :] = False
    name = "bool"
    if draw.chance(0.5):
        data = allowed
        truth["attn_mask"] = allowed
    else:
        name = draw.pick([n for n in dtypes if n != "bfloat16" or bits or ml_dtypes is not None])
        hidden = -np.inf if draw.chance(0.8) else -3e4
        if name in ("float32", "float64") and draw.chance(0.1):
            hidden = float(np.finfo(name).min)
        bias = draw.rng.standard_normal(own) * draw.pick((0.0, 1.0, 1.0, 5.0))
        bias = np.where(allowed, bias, hidden)
        if draw.chance(0.05):
            bias = spoil(draw, bias)
        data = encode(np.ascontiguousarray(bias), name)
        truth["attn_mask"] = decode(data)
    if draw.chance(0.1) and data.size:
        data = np.broadcast_to(data[..., :1], own)
        truth["attn_mask"] = np.broadcast_to(truth["attn_mask"][..., :1], own)
    case.arguments["attn_mask"] = place(draw, case.memories, data, name, bits=bits).array


def draw_latent(draw: Draw, sizes: Sizes) -> slice | None:
    """Return in some cases where in its key a value lies, as in latent attention."""
    if not sizes.dv or not draw.chance(0.08):
        return None
    sizes.d, sizes.dv = max(sizes.d, sizes.dv), min(sizes.d, sizes.dv)
    begin = 0 if draw.chance(0.6) else draw.whole(0, sizes.d - sizes.dv)
    return slice(begin, begin + sizes.dv)


def add_tensors(
    draw: Draw,
    case: Case,
    tensors: dict[str, Array],
    names: dict[str, str],
    bits: bool,
    latent: slice | None = None,
) -> dict[str, Placed]:
    """Place raw tensors in memory, in some cases several side by side in one array's last axis.

    With `latent`, that part of the keys is the values.
    """
    placed: dict[str, Placed] = {}
    rest = dict(tensors)
    if latent is not None:
        rest = {name: x for name, x in rest.items() if not name.startswith("value")}
    room = draw.pick((0, 0, 0, 200, 2000, 20000))
    for together in (("query", "key", "value"), ("key", "value"), ("key_pages", "value_pages")):
        parts = [rest.get(name) for name in together]
        if any(p is None for p in parts) or not draw.chance(0.15):
            continue
        if (
            len({(p.shape[:-1], p.dtype, names[n]) for p, n in zip(parts, together, strict=True)})
            > 1
        ):
            continue
        name = names[together[0]]
        whole = place(draw, case.memories, np.concatenate(parts, -1), name, bits=bits, room=room)
        at = 0
        for part_name, part in zip(together, parts, strict=True):
            view = whole.array[..., at : at + part.shape[-1]]
            start = whole.start + at * whole.array.strides[-1]
            placed[part_name] = Placed(view, whole.memory, start)
            at += part.shape[-1]
            del rest[part_name]
    for name, data in rest.items():
        placed[name] = place(draw, case.memories, data, names[name], bits=bits, room=room)
    if latent is not None:
        key_name, value_name = (n for n in tensors if n.startswith(("key", "value")))
        array, memory, start = placed[key_name]
        placed[value_name] = Placed(
            array[..., latent], memory, start + latent.start * array.strides[-1]
        )
    for name, one in placed.items():
        case.arguments[name] = one.array
    return placed


def draw_dense(draw: Draw, of_weights: bool = False) -> Case:
    """Return a call; `of_weights`: its value has the batch axes of its key, and it has no out."""
    s = Sizes(draw)
    name = draw.pick(("float32", "float32", *FLOATS))
    bits = name == "bfloat16" and (ml_dtypes is None or draw.chance(0.5))
    case = Case("scaled_dot_product_attention", {}, [], name, name == "float64", note=name)
    case.threads = draw.pick((2, 2, 3, 4))
    latent = draw_latent(draw, s)
    shapes = {"query": (s.heads, s.q_len, s.d), "key": (s.kv_heads, s.kv_len, s.d)}
    shapes["value"] = (s.kv_heads, s.kv_len, s.dv)
    flat = s.batch == () and s.heads == s.kv_heads == 1 and draw.chance(0.5)
    for part, shape in shapes.items():
        lead = s.batch
        if draw.chance(0.12):
            lead = tuple(1 if draw.chance(0.5) else n for n in lead)[draw.whole(0, len(lead)) :]
        shapes[part] = shape[1:] if flat else (*lead, *shape)
    if latent or of_weights:
        shapes["value"] = (*shapes["key"][:-1], s.dv)
    s.batch = np.broadcast_shapes(*(x[:-3] for x in shapes.values()))
    batch = s.batch
    x = {part: numbers(draw, shape) for part, shape in shapes.items()}
    truth: Options = {}
    lengths = None
    if draw.chance(0.2):
        lengths = draw.rng.integers(0, s.kv_len + 1, batch if draw.chance(0.6) else ())
        truth["key_lengths"] = lengths
    if draw.chance(0.06) and not of_weights:
        part = draw.pick(("query", "key", "value"))
        x[part] = spoil(draw, x[part])
    if latent:
        x["value"] = x["key"][..., latent]
    raw = {part: encode(data, name) for part, data in x.items()}
    exact = {part: decode(data, name) for part, data in raw.items()}
    if lengths is not None and draw.chance(0.6):
        bad = encode(np.array(draw.pick((np.nan, np.inf, -np.inf, 1e4))), name)
        for part in ("key", "value"):
            lead = shapes[part][:-3]
            end = np.broadcast_to(lengths, batch)
            end = end.max(axis=tuple(range(end.ndim - len(lead))), initial=0)
            for axis, n in enumerate(lead):
                if n == 1:
                    end = end.max(axis=axis, keepdims=True, initial=0)
            end = np.asarray(end)[(..., *[None] * (3 if not flat else 2))]
            if flat:
                end = end.reshape(1, 1)
            behind = np.arange(s.kv_len)[:, None] >= end
            raw[part] = np.where(behind, bad, raw[part]).astype(raw[part].dtype)
            exact[part] = np.where(behind, 0.0, exact[part])
    placed = add_tensors(draw, case, raw, dict.fromkeys(raw, name), bits, latent)
    if bits:
        case.arguments["dtype"] = "bfloat16"
    if s.group != 1 or draw.chance(0.2):
        case.arguments["enable_gqa"] = True
    if lengths is not None:
        case.arguments["key_lengths"] = as_ints(draw, case.memories, lengths)
    heads = (*batch, s.heads)
    if draw.chance(0.3):
        add_mask(draw, case, truth, (*heads, s.q_len, s.kv_len), bits)
        if flat and truth["attn_mask"].ndim > 2:
            mask = truth["attn_mask"]
            truth["attn_mask"] = mask.reshape(mask.shape[-2:])
    if draw.chance(0.2):
        add_bias(draw, case, truth, (*heads, s.q_len, s.kv_len), bits)
        if flat and truth["attn_bias"].ndim > 2:
            truth["attn_bias"] = truth["attn_bias"].reshape(truth["attn_bias"].shape[-2:])
    add_modifiers(draw, case, truth, batch, s, 0)
    if flat and truth.get("key_ranges"):
        truth["key_ranges"] = tuple(
            None if x is None else x.reshape(x.shape[-1:]) for x in truth["key_ranges"]
        )
    case.truth = Truth(exact["query"], exact["key"], exact["value"], truth)
    shape = (s.q_len, s.dv) if flat else (*heads, s.q_len, s.dv)
    if not of_weights:
        add_out(draw, case, shape, bits, placed["query"])
    return case


def draw_varlen(draw: Draw) -> Case:
    s = Sizes(draw)
    name = draw.pick(("float32", "float64", *FLOATS))
    bits = name == "bfloat16" and (ml_dtypes is None or draw.chance(0.5))
    case = Case("varlen_attention", {}, [], name, name == "float64", note=name)
    case.threads = draw.pick((2, 2, 3, 4))
    latent = draw_latent(draw, s)
    count = draw.pick((1, 1, 2, 2, 3, 5, 9, 17, 40, 0))
    kind = draw.uniform()
    most_q, most_k = s.q_len, s.kv_len
    if kind < 0.3:  # at most one key each
        most_k = 1
    if kind < 0.15 or draw.chance(0.1):
        most_q = 1
    if count > 3:
        most_q, most_k = min(most_q, draw.pick((1, 2, 9))), min(most_k, draw.pick((1, 2, 9)))
    lengths_q = draw.rng.integers(0, most_q + 1, count)
    lengths_k = draw.rng.integers(0, most_k + 1, count)
    if draw.chance(0.3):
        lengths_q[:] = most_q
    same = draw.chance(0.2)
    if same:
        lengths_q = lengths_k
    cu_q, cu_k = (np.concatenate([[0], np.cumsum(n)]) for n in (lengths_q, lengths_k))
    s.q_len, s.kv_len = int(lengths_q.max(initial=0)), int(lengths_k.max(initial=0))
    shapes = {"query": (cu_q[-1], s.heads, s.d), "key": (cu_k[-1], s.kv_heads, s.d)}
    shapes["value"] = (cu_k[-1], s.kv_heads, s.dv)
    x = {part: numbers(draw, tuple(map(int, shape))) for part, shape in shapes.items()}
    if draw.chance(0.06):
        part = draw.pick(("query", "key", "value"))
        x[part] = spoil(draw, x[part])
    if latent:
        x["value"] = x["key"][..., latent]
    raw = {part: encode(data, name) for part, data in x.items()}
    seen = lengths_k
    if draw.chance(0.2):
        seen = np.minimum(lengths_k, draw.rng.integers(0, s.kv_len + 1, count))
        for part in ("key", "value"):
            raw[part] = np.array(raw[part])
            for i in range(count):
                raw[part][cu_k[i] + seen[i] : cu_k[i + 1]] = encode(np.array(np.nan), name)
    placed = add_tensors(draw, case, raw, dict.fromkeys(raw, name), bits, latent)
    case.arguments["cu_seqlens_q"] = as_ints(draw, case.memories, cu_q)
    if not same or draw.chance(0.5):
        case.arguments["cu_seqlens_k"] = as_ints(draw, case.memories, cu_k)
    if seen is not lengths_k:
        case.arguments["key_lengths"] = as_ints(draw, case.memories, seen)
    if bits:
        case.arguments["dtype"] = "bfloat16"
    truth: Options = {"key_lengths": seen}
    if draw.chance(0.2):
        add_bias(draw, case, truth, (count, s.heads, s.q_len, s.kv_len), bits)
    add_modifiers(draw, case, truth, (count,), s, lengths_k - lengths_q)

    row_q, slot_q = spread(lengths_q)
    add_packed_ranges(draw, case, truth, (count, s.heads, s.q_len), row_q, slot_q)
    row_k, slot_k = spread(seen)
    at_k = cu_k[row_k] + slot_k
    dense = {"query": np.zeros((count, s.heads, s.q_len, s.d))}
    dense["key"] = np.zeros((count, s.kv_heads, s.kv_len, s.d))
    dense["value"] = np.zeros((count, s.kv_heads, s.kv_len, s.dv))
    dense["query"][row_q, :, slot_q] = decode(raw["query"], name)
    dense["key"][row_k, :, slot_k] = decode(raw["key"], name)[at_k]
    dense["value"][row_k, :, slot_k] = decode(raw["value"], name)[at_k]
    case.truth = Truth(*dense.values(), truth, lambda result: result[row_q, :, slot_q])
    add_out(draw, case, (int(cu_q[-1]), s.heads, s.dv), bits, placed["query"])
    return case


def add_packed_ranges(
    draw: Draw, case: Case, truth: Options, shape: tuple[int, ...], row: Array, slot: Array
) -> None:
    """Turn the ranges that were drawn for a dense problem into those of packed tokens."""
    if "key_ranges" not in truth:
        return
    dense = [None if x is None else np.broadcast_to(x, shape) for x in truth["key_ranges"]]
    if draw.chance(0.5):  # the same for all heads
        dense = [None if x is None or not x.size else x[:, :1] for x in dense]
    truth["key_ranges"] = tuple(dense)
    packed = [None if x is None else x[row, :, slot].T for x in dense]
    case.arguments["key_ranges"] = tuple(
        None if x is None else as_ints(draw, case.memories, x) for x in packed
    )


def spread(lengths: Array) -> tuple[Array, Array]:
    """Return the sequence of each packed token and its place there."""
    row = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.cumsum(lengths) - lengths
    return row, np.arange(len(row)) - starts[row]


def draw_paged(draw: Draw) -> Case:
    s = Sizes(draw)
    names = [draw.pick(("float32", *FLOATS))] * 3
    if draw.chance(0.4):
        names = [names[0], draw.pick((*FLOATS, "int8", "int8")), draw.pick((*FLOATS, "int8"))]
    latent = draw_latent(draw, s)
    if latent:
        names[2] = names[1]
    bits = "bfloat16" in names and (ml_dtypes is None or draw.chance(0.5))
    case = Case("paged_attention", {}, [], names[0], "float64" in names, note="/".join(names))
    case.threads = draw.pick((2, 2, 3, 4))
    count = 0 if draw.chance(0.03) else draw.pick((1, 1, 2, 3, 5))
    size = draw.pick((1, 2, 3, 7, 8, 15, 16, 16, 17, 32, 64, 64, 128))
    if s.long:
        count, size = 1, draw.pick((16, 64, 100, 256))
    elif count > 2:
        s.kv_len = min(s.kv_len, 70)
        s.q_len = min(s.q_len, 40)
    lengths = draw.rng.integers(0, s.kv_len + 1, count)
    if count and draw.chance(0.7):
        lengths[draw.whole(0, count - 1)] = s.kv_len
    s.kv_len = int(lengths.max(initial=0))
    used = -(-lengths // size)
    blocks = int(used.max(initial=0)) + draw.pick((0, 0, 1, 2))
    needed, spare = int(used.sum()), draw.pick((0, 1, 3))
    shared = draw.chance(0.3)
    pages = max(1, needed // 2) if shared and needed else needed + spare
    table = draw.rng.integers(-3, pages + 3, (count, blocks))
    if draw.chance(0.1):
        table = np.full((count, blocks), draw.pick((-1, -(2**62), 2**62, 2**31)))
    pool = draw.rng.integers(0, pages, needed) if shared else draw.rng.permutation(pages)[:needed]
    row, block = spread(used)
    table[row, block] = pool
    x = {"query": numbers(draw, (count, s.heads, s.q_len, s.d))}
    x["key"] = numbers(draw, (pages, s.kv_heads, size, s.d))
    x["value"] = numbers(draw, (pages, s.kv_heads, size, s.dv))
    if draw.chance(0.05):
        part = draw.pick(("query", "key", "value"))
        x[part] = spoil(draw, x[part])
    if latent:
        x["value"] = x["key"][..., latent]
    live = np.zeros((pages, size), bool)  # rows that a sequence uses
    token_row, token = spread(lengths)
    where = table[token_row, token // size], token % size
    live[where] = True
    raw, exact = {"query": encode(x["query"], names[0])}, {}
    exact["query"] = decode(raw["query"], names[0])
    for part, name in zip(("key", "value"), names[1:], strict=True):
        if name == "int8":
            rows = np.nan_to_num(x[part], posinf=3.0, neginf=-3.0).astype(np.float32)
            data, scales = quantize(rows)
            if latent and part == "value":  # int8 rows of the keys, and scales of their own
                data, scales = raw["key_pages"][..., latent], scales * np.float32(0.5)
            raw[f"{part}_scales"] = scales
            full = data * scales[..., None].astype(float)
        else:
            data = encode(x[part], name)
            full = decode(data, name)
            if draw.chance(0.5):
                dead = encode(np.array(np.nan), name)
                data = np.where(live[:, None, :, None], data, dead).astype(data.dtype)
        raw[f"{part}_pages"] = data
        dense = np.zeros((count, s.kv_heads, s.kv_len, full.shape[-1]))
        dense[token_row, :, token] = full[where[0], :, where[1]]
        exact[part] = dense
    tensor_names = {"query": names[0], "key_pages": names[1], "value_pages": names[2]}
    tensors = {part: raw[part] for part in tensor_names}
    placed = add_tensors(draw, case, tensors, tensor_names, bits, latent)
    for part in ("key", "value"):
        if f"{part}_scales" in raw:
            one = place(draw, case.memories, raw[f"{part}_scales"], swap=0)
            case.arguments[f"{part}_scales"] = one.array
    case.arguments["block_table"] = (
        place(draw, case.memories, table).array
        if table.size == 0 or draw.chance(0.8)
        else table.tolist()
    )
    case.arguments["key_lengths"] = as_ints(draw, case.memories, lengths)
    if bits:
        case.arguments["dtype"] = "bfloat16"
    truth: Options = {"key_lengths": lengths}
    if draw.chance(0.25):
        add_mask(draw, case, truth, (count, s.heads, s.q_len, s.kv_len), bits)
    if draw.chance(0.15):
        add_bias(draw, case, truth, (count, s.heads, s.q_len, s.kv_len), bits)
    add_modifiers(draw, case, truth, (count,), s, lengths - s.q_len)
    case.truth = Truth(exact["query"], exact["key"], exact["value"], truth)
    add_out(draw, case, (count, s.heads, s.q_len, s.dv), bits, placed["query"])
    return case


class MergeCase:
    """A call of merge_attention."""

    function = "merge_attention"

    def __init__(self, draw: Draw) -> None:
        name = self.name = self.out_name = draw.pick(FLOATS)
        self.wide = name == "float64"
        bits = self.bits = name == "bfloat16" and (ml_dtypes is None or draw.chance(0.5))
        shape = tuple(draw.pick((0, 1, 1, 2, 3, 5)) for _ in range(draw.whole(1, 4)))
        if draw.chance(0.3):
            shape = (*shape[:-1], draw.pick((16, 31, 32, 33, 64, 70, 130, 1030, 2100)))
        self.memories: list[Memory] = []
        self.allowed: dict[int, Array] = {}
        outputs, lses, self.outputs, self.lses = [], [], [], []
        placed: list[list[Placed]] = [[], []]
        for _ in range(draw.pick((1, 2, 2, 3, 6))):
            data = encode(numbers(draw, shape), name)
            lse = np.asarray(draw.rng.standard_normal(shape[:-1]) * draw.pick((1, 1, 30, 1e4)))
            if draw.chance(0.3) and lse.size:
                data = np.array(data)
                empty = draw.rng.random(lse.shape) < 0.5
                lse[empty] = -np.inf
                data[empty] = encode(np.array(draw.pick((np.nan, 0.0, np.inf))), name)
            elif draw.chance(0.03):
                lse = spoil(draw, lse)
            lse_raw = np.asarray(lse).astype("f8" if self.wide else "f4")
            placed[0].append(place(draw, self.memories, data, name, bits=bits))
            placed[1].append(place(draw, self.memories, lse_raw))
            outputs.append(placed[0][-1].array)
            lses.append(placed[1][-1].array)
            self.outputs.append(decode(data, name))
            self.lses.append(lse_raw.astype(float))
        self.arguments: Options = {"outputs": outputs, "lses": lses}
        if bits:
            self.arguments["dtype"] = "bfloat16"
        if draw.chance(0.3):
            others = ("float16", "bfloat16") if name == "float32" else ("float32",)
            self.out_name = draw.pick((name, *(() if self.wide else others)))
            self.arguments["out_dtype"] = self.out_name
        self.sinks = np.full(shape[:-1], -np.inf)
        if draw.chance(0.3):
            heads = shape[-3] if len(shape) > 2 else 1
            sinks = draw.rng.standard_normal(heads) * draw.pick((1, 1, 30))
            logits = sinks[:, None] if len(shape) > 2 else sinks[0]
            self.sinks = np.broadcast_to(logits, shape[:-1])
            if len(shape) > 2 and draw.chance(0.3):
                sinks = np.array(self.sinks)
            kind = draw.pick((np.array, np.ndarray.tolist if sinks.size else np.array))
            self.arguments["sinks"] = kind(sinks)
        own = self.out_name == name
        self.add("out", draw, placed[0] if own else [], shape, self.out_name)
        lse_name = "float64" if self.wide else "float32"
        self.add("lse_out", draw, placed[1], shape[:-1], lse_name)

    def add(
        self, argument: str, draw: Draw, inputs: list[Placed], shape: tuple[int, ...], name: str
    ) -> None:
        """Choose where a result goes: to new memory, to an input or into the middle of one."""
        how = draw.uniform()
        if how < 0.5:
            return
        target = draw.pick(inputs) if inputs and how < 0.75 else None
        if target is None or 0 in target.array.strides:
            strides, start, size = layout(draw, shape, np.dtype(RAW[name]).itemsize)
            memory = draw.pick(self.memories)
            if argument == "lse_out" or size > len(memory.bytes) or how > 0.9:
                memory = Memory(size)
                self.memories.append(memory)
            else:
                start += draw.whole(0, len(memory.bytes) - size)
            bits = self.bits or self.name != name
            seen = exposed_dtype(name, np.dtype(RAW[name]), bits)
            array = np.ndarray(shape, seen, memory.bytes, start, strides)
            target = Placed(array, memory, start)
        if any(target.memory is memory for memory in self.memories if id(memory) in self.allowed):
            return  # it would overlap `out`
        target.array.flags.writeable = True
        self.arguments[argument] = target.array
        allowed = self.allowed[id(target.memory)] = np.zeros(len(target.memory.bytes), bool)
        size = target.array.itemsize
        np.ndarray((*shape, size), bool, allowed, target.start, (*target.array.strides, 1))[...] = 1

    def run(self, choices: Sequence[_select.Choice]) -> Iterator[Difference]:
        for memory in self.memories:
            memory.seal()
        for choice in suited(choices, "float32", self.wide):
            one = None
            for threads in (1, 3) if choice.engine == "native" else (1,):
                what, detail, bits = self.attempt(choice, threads)
                if not what and one is not None and bits != one:
                    what = "threads change bits"
                if what:
                    yield Difference(what, label(choice), f"{detail} [{threads} threads]")
                one = one or bits

    def attempt(self, choice: _select.Choice, threads: int) -> tuple[str, str, bytes | None]:
        """Call once; return the kind of a difference, its details, and the bits of the answer."""
        try:
            with in_force(choice):
                given = self.arguments | {"num_threads": threads}
                result, lse = call(qkv_fast.merge_attention, given)
        except Exception as error:
            return f"raised {type(error).__name__}", str(error), None
        for array, name in ((result, "out"), (lse, "lse_out")):
            if name in self.arguments and array is not self.arguments[name]:
                return f"the answer is not {name}", "", None
        got, got_lse = np.array(decode(result, self.out_name)), np.array(lse)
        bits = np.array(result).tobytes() + got_lse.tobytes()
        changed = any(memory.changed(self.allowed.get(id(memory))) for memory in self.memories)
        for memory in self.memories:
            memory.restore()
        if changed:
            return "wrote to an input", "", bits
        return (*self.judge(got, got_lse), bits)

    def judge(self, got: Array, lse: Array) -> tuple[str, str]:
        """Return the kind of a difference and its details, or empty strings."""
        parts, lses = np.stack(self.outputs), np.stack(self.lses)
        name = self.out_name
        with np.errstate(all="ignore"):
            top = lses.max(axis=0)
            base = np.where(top == -np.inf, 0, top)
            weights = np.exp(lses - base)
            total = weights.sum(axis=0)
            parts = np.where(weights[..., None] == 0, 0, parts)
            shares = weights / (total + np.exp(self.sinks - base))
            exact = (shares[..., None] * parts).sum(axis=0)
            exact = np.where(total[..., None] == 0, 0, exact)
            exact_lse = base + np.log(total)
            finite = np.nan_to_num(parts, posinf=0.0, neginf=0.0)
            eps = 2.0**-52 if self.wide else 2.0**-23
            size = np.abs(np.where(np.isfinite(lses), lses, 0)).max(axis=0)
            size = size + np.where(np.isfinite(self.sinks), np.abs(self.sinks), 0)
            floor = eps * (16 + 4 * size[..., None]) * np.abs(finite).max(axis=0)
            rounded = decode(encode(np.ascontiguousarray(exact), name), name)
            floor = floor + ULP[name] * np.abs(rounded) + 4 * TINIEST[name]
            same = (got == rounded) | (np.isnan(got) & np.isnan(rounded))
            wrong = ~same & ~(np.isfinite(rounded) & (np.abs(got - exact) <= floor))
            # A share of an infinite value may be 0 in this precision: NaN.
            tiny = (weights > 0) & (shares < 2.0 ** (-1021 if self.wide else -125))
            lost = (tiny[..., None] & np.isinf(parts)).any(axis=0)
            wrong &= ~(np.isnan(got) & lost)
            if wrong.any():
                return "result", first(wrong, got, exact)
            same = (lse == exact_lse) | (np.isnan(lse) & np.isnan(exact_lse))
            wrong = ~same & ~(np.abs(lse - exact_lse) <= eps * (16 + 4 * np.abs(exact_lse)))
            if wrong.any():
                return "lse", first(wrong, lse, exact_lse)
        return "", ""

    def describe(self) -> str:
        lines = [f"merge_attention {self.name} -> {self.out_name}"]
        lines += [f"  {name} = {described(x)}" for name, x in self.arguments.items()]
        return "\n".join(lines)


# --- Weights, what keys receive, statistics -------------------------------------------------------


class WeightsCase:
    """A call of attention_weights, attention_received or attention_statistics."""

    def __init__(self, draw: Draw) -> None:
        case = draw_dense(draw, of_weights=True)
        assert case.truth is not None
        self.function = draw.pick(
            ("attention_weights", "attention_received", "attention_statistics")
        )
        self.memories, self.wide, self.threads = case.memories, case.wide, case.threads
        self.truth, self.note = case.truth, case.note
        given = {n: x for n, x in case.arguments.items() if n not in ("value", "return_lse")}
        self.selection: Options = {}
        q = self.truth.query
        heads = 0 if q.ndim == 2 else q.shape[-3]
        for name, count in ("rows", q.shape[-2]), ("heads", heads):
            if draw.chance(0.3) and (name == "rows" or q.ndim > 2):
                self.selection[name] = self.choose(draw, count)
        self.more: Options = {}
        if self.function == "attention_weights" and draw.chance(0.5):
            self.more["stage"] = draw.pick(("scaled", "softcapped", "masked"))
        real = "f8" if self.wide else "f4"
        self.lse_size = 0.0
        if self.function != "attention_statistics" and not self.more and draw.chance(0.25):
            exact = np.asarray(self.truth.exact()[1])
            with np.errstate(over="ignore"):
                lse = exact.astype(real)
            if np.isfinite(lse[np.isfinite(exact)]).all():  # else this precision can't hold it
                self.lse_size = float(np.abs(lse).max(initial=0, where=np.isfinite(lse)))
                given["lse"] = place(draw, self.memories, lse).array
        self.out: Placed | None = None
        self.allowed: Array | None = None
        self.arguments = given | self.selection | self.more
        if self.function != "attention_statistics" and draw.chance(0.4):
            shape = self.expected(np.float64)["result"].shape
            strides, start, size = layout(draw, shape, np.dtype(real).itemsize)
            memory = Memory(size + 64)
            self.memories.append(memory)
            array = np.ndarray(shape, real, memory.bytes, start, strides)
            self.out, self.arguments["out"] = Placed(array, memory, start), array
            self.allowed = np.zeros(len(memory.bytes), bool)
            shape = (*shape, array.itemsize)
            np.ndarray(shape, bool, self.allowed, start, (*strides, 1))[...] = True

    @staticmethod
    def choose(draw: Draw, count: int) -> Any:
        """Return some of `count` rows or heads, as a slice or a list."""
        if draw.chance(0.4):
            step = draw.pick((None, 1, 2, -1))
            return slice(draw.pick((None, -3, count // 2)), draw.pick((None, count)), step)
        picked = [draw.whole(-count, count - 1) for _ in range(draw.whole(0, 5))] if count else []
        return draw.pick((list, np.array))(picked) if picked else picked

    def expected(self, real: Any) -> dict[str, Array]:
        """Return the answer by the oracle, by its arrays' names."""
        t = self.truth
        options = t.options | self.more
        if self.function == "attention_statistics":
            return statistics_oracle.statistics(
                t.query, t.key, real=real, **self.selection, **options
            )
        if self.function == "attention_received":
            x = statistics_oracle.received(t.query, t.key, real=real, **self.selection, **options)
        else:
            x = oracle.weights(t.query, t.key, real=real, **options)
            x = statistics_oracle.selected(x, **self.selection, ends=1)
        return {"result": x}

    def run(self, choices: Sequence[_select.Choice]) -> Iterator[Difference]:
        for memory in self.memories:
            memory.seal()
        for choice in suited(choices, "float32", self.wide):
            one = None
            for threads in (1, self.threads) if choice.engine == "native" else (1,):
                what, detail, bits = self.attempt(choice, threads)
                if not what and one is not None and bits != one:
                    what = "threads change bits"
                if what:
                    yield Difference(what, label(choice), f"{detail} [{threads} threads]")
                one = one or bits

    def attempt(self, choice: _select.Choice, threads: int) -> tuple[str, str, bytes | None]:
        """Call once; return the kind of a difference, its details, and the bits of the answer."""
        module = qkv_fast if self.function == "attention_weights" else analysis
        try:
            with in_force(choice):
                answer = call(
                    getattr(module, self.function), self.arguments | {"num_threads": threads}
                )
        except Exception as error:
            return f"raised {type(error).__name__}", str(error), None
        if self.out is not None and answer is not self.arguments["out"]:
            return "the answer is not out", "", None
        named = answer._asdict() if isinstance(answer, tuple) else {"result": answer}
        got = {name: np.array(x) for name, x in named.items()}
        bits = b"".join(x.tobytes() for x in got.values())
        changed = [
            memory.changed(
                self.allowed if self.out is not None and memory is self.out.memory else None
            )
            for memory in self.memories
        ]
        for memory in self.memories:
            memory.restore()
        if any(changed):
            return "wrote to an input, or beside out", "", bits
        for name, x in got.items():
            if name != "max_key" and x.dtype != (np.float64 if self.wide else np.float32):
                return "dtype", f"{name}: {x.dtype}", bits
        with np.errstate(all="ignore"):
            return (*self.judge(got), bits)

    def judge(self, got: dict[str, Array]) -> tuple[str, str]:
        """Return the kind of a difference and its details, or empty strings.

        A weight has the relative error that its score and its row's log-sum-exp have as numbers: of
        16 units in the last place, and 8 times the bound of the scores.
        """
        exact, plain = self.expected(np.float64), None
        eps = 2.0**-52 if self.wide else 2.0**-23
        scores = self.truth.sizes()[0]
        size = float(scores.max(initial=0, where=np.isfinite(scores))) + self.lse_size
        part = eps * ((64 if self.wide else 16) + (8 + self.truth.bias()) * size)
        # A given lse of that size, as of masks of finfo.min, holds no digit of a sum.
        if part > 1 and self.more.get("stage") is None:
            part = 1e30 if self.lse_size else 1.0
        least = 2.0 ** (-1015 if self.wide else -120)  # smaller weights may be 0
        lowest = np.finfo(np.float64 if self.wide else np.float32).min  # of a sum with a mask
        for name, want in exact.items():
            if name == "weights":
                continue
            want = np.where(np.isneginf(want), want, np.maximum(want, lowest))
            x = got[name].astype(float)
            if x.shape != want.shape:
                return "shape", f"{name}: {x.shape} instead of {want.shape}"
            floor = part * (np.abs(want) if self.more.get("stage") is None else 1.0) + least
            if name == "entropy":
                floor = part * (np.abs(want) + 2) + least
            elif name == "mean_distance":
                offset = np.abs(np.asarray(self.truth.options.get("query_offset", 0))).astype(float)
                far = float(offset.max(initial=0)) + sum(self.truth.query.shape[-2:-1])
                far += self.truth.key.shape[-2]
                floor = 2 * floor + far * (4 * eps + least)
            elif name == "result" and self.function == "attention_received":
                floor = floor + self.truth.query.shape[-2] * least
            odd = ~np.isfinite(want)
            if name != "result":  # a row with a NaN: where it shows is in the docstring
                odd = odd | np.isnan(exact["weights"]).any(axis=-1)
                wrong = np.zeros(want.shape, bool)
            else:
                wrong = odd & ~((x == want) | (np.isnan(x) & np.isnan(want)))
            wrong |= ~odd & ~(np.abs(x - want) <= floor)
            if wrong.any():
                plain = plain or self.expected(np.float64 if self.wide else np.float32)
                off = np.abs(plain[name].astype(float) - want)
                off = np.max(off, where=np.isfinite(off) & ~odd, initial=0.0)
                wrong &= odd | ~(np.abs(x - want) <= 2 * off + floor)
            if wrong.any():
                return "result", f"{name}: " + first(wrong, x, want)
        if "max_key" not in got:
            return "", ""
        w, key = exact["weights"], got["max_key"]
        top = w.max(axis=-1, initial=0)
        compared = (key >= 0) & (top > least)
        if key.size and ((key < -1) | (key >= max(1, w.shape[-1]))).any():
            return "result", f"max_key is out of range: {key.min()} to {key.max()}"
        if ((key < 0) & (top > least) & ~np.isnan(top)).any():
            return "result", "max_key is -1 in a row that sees keys"
        if compared.any():
            there = np.take_along_axis(w, np.maximum(key, 0)[..., None], axis=-1)[..., 0]
            wrong = compared & ~(there >= (1 - 2 * part) * top)
            if wrong.any():
                return "result", "max_key: " + first(wrong, there, top)
        return "", ""

    def describe(self) -> str:
        lines = [f"{self.function} {self.note}, {self.threads} threads"]
        lines += [f"  {name} = {described(x)}" for name, x in self.arguments.items()]
        return "\n".join(lines)


# --- Parts of the keys ----------------------------------------------------------------------------


class PartsCase:
    """Calls over parts of the keys, merged, against one call over all of them."""

    function = "merge_attention of parts"

    def __init__(self, draw: Draw) -> None:
        s = Sizes(draw)
        name = self.name = draw.pick(FLOATS)
        self.bits = name == "bfloat16" and (ml_dtypes is None or draw.chance(0.5))
        self.wide, self.threads = name == "float64", draw.pick((2, 3))
        self.memories: list[Memory] = []
        self.note = name
        shapes = {"query": (*s.batch, s.heads, s.q_len, s.d)}
        shapes["key"] = (*s.batch, s.kv_heads, s.kv_len, s.d)
        shapes["value"] = (*s.batch, s.kv_heads, s.kv_len, s.dv)
        raw = {part: encode(numbers(draw, shape), name) for part, shape in shapes.items()}
        exact = {part: decode(data, name) for part, data in raw.items()}
        self.arguments = {
            part: place(draw, self.memories, data, name, bits=self.bits).array
            for part, data in raw.items()
        }
        truth: Options = {"query_offset": draw.whole(-2, s.kv_len + 2)}
        truth["is_causal"] = draw.chance(0.4)
        if draw.chance(0.3):
            truth["window"] = draw.pick((5, 0, 70, None)), draw.pick((3, 0, None))
        if draw.chance(0.2):
            truth["softcap"] = 5.0
        if draw.chance(0.2):
            truth["alibi_slopes"] = draw.rng.random(s.heads) * 0.3
        if draw.chance(0.3):
            share = draw.pick((0.1, 0.5, 0.9))
            truth["attn_mask"] = draw.rng.random((s.q_len, s.kv_len)) < share
        self.options = dict(truth)
        self.sinks = draw.rng.standard_normal(s.heads) if draw.chance(0.3) and s.heads else None
        if self.sinks is not None:
            truth["sinks"] = self.sinks
        self.truth = Truth(exact["query"], exact["key"], exact["value"], truth)
        cuts = sorted(draw.whole(0, s.kv_len) for _ in range(draw.pick((1, 1, 2, 4))))
        self.cuts = [0, *cuts, s.kv_len]

    def run(self, choices: Sequence[_select.Choice]) -> Iterator[Difference]:
        for memory in self.memories:
            memory.seal()
        for choice in suited(choices, self.name, self.wide):
            what, detail = self.attempt(choice)
            if what:
                yield Difference(what, label(choice), detail)

    def attempt(self, choice: _select.Choice) -> tuple[str, str]:
        q, k, v = (self.arguments[part] for part in ("query", "key", "value"))
        outs, lses = [], []
        more: Options = {"dtype": "bfloat16"} if self.bits else {}
        if self.name in ("float16", "bfloat16"):
            more["out_dtype"] = "float32"
        merging: Options = {"out_dtype": self.name} if not self.wide else {}
        if self.sinks is not None:
            merging["sinks"] = self.sinks
        try:
            with in_force(choice):
                for begin, end in itertools.pairwise(self.cuts):
                    options = dict(self.options)
                    options["query_offset"] -= begin
                    if "attn_mask" in options:
                        options["attn_mask"] = options["attn_mask"][:, begin:end]
                    arrays = q, k[..., begin:end, :], v[..., begin:end, :]
                    options |= more | {"num_threads": self.threads, "enable_gqa": True}
                    out, lse = call(
                        qkv_fast.scaled_dot_product_attention,
                        dict(zip(("query", "key", "value"), arrays, strict=True), return_lse=True)
                        | options,
                    )
                    outs.append(out)
                    lses.append(lse)
                out, lse = call(
                    qkv_fast.merge_attention,
                    {"outputs": outs, "lses": lses, "num_threads": self.threads} | merging,
                )
        except Exception as error:
            return f"raised {type(error).__name__}", str(error)
        if any(memory.changed() for memory in self.memories):
            return "wrote to an input", ""
        paired = self.name == "bfloat16" and choice.isa in PAIRED
        detail = judge(self.truth, decode(out, self.name), self.name, self.wide, paired)
        if detail:
            return "result", detail
        detail = judge_lse(self.truth, lse, self.wide, paired)
        return ("lse", detail) if detail else ("", "")

    def describe(self) -> str:
        lines = [f"{self.function} {self.note}, cut at {self.cuts}, {self.options}"]
        lines += [f"  {name} = {described(x)}" for name, x in self.arguments.items()]
        return "\n".join(lines)


# --- The cache and its model ----------------------------------------------------------------------


class CacheWalk:
    """Random operations on a KVCache and on its model, the rows of each sequence in float64."""

    function = "KVCache"

    def __init__(self, draw: Draw) -> None:
        self.draw, self.log = draw, [""]
        self.batch, self.heads = draw.pick((1, 2, 3, 4, 4)), draw.pick((1, 1, 2, 3))
        self.d, self.dv = draw.pick((1, 3, 4, 8, 12, 16, 33)), draw.pick((1, 2, 4, 9, 16, 33))
        self.capacity = draw.pick((1, 2, 5, 16, 40, 90, 200))
        self.name = draw.pick((*FLOATS, "int8"))
        options: Options = {"dtype": self.name}
        self.window = draw.pick((0, 1, 3, 10, 30)) if draw.chance(0.25) else None
        self.limited = self.window is not None
        self.size = self.capacity
        self.fixed = not draw.chance(0.6) and self.window is None
        if not self.fixed:
            self.size = 64 if self.window is not None else 0
            if not self.size or draw.chance(0.8):
                self.size = options["page_size"] = draw.pick((1, 2, 3, 5, 16, 64, 300))
            if self.window is not None:
                options["window"] = self.window
            if draw.chance(0.4):
                options["num_pages"] = draw.whole(0, 3 * -(-self.capacity // self.size))
                self.limited = True
        shape = (self.batch, self.heads, self.capacity)
        self.memories: list[Memory] = []
        if self.fixed and draw.chance(0.4):
            arrays = [
                place(draw, self.memories, np.zeros((*shape, n), RAW[self.name]), self.name,
                      bits=True, swap=0, read_only=0).array
                for n in (self.d, self.dv)
            ]  # fmt: skip
            scales = {}
            if self.name == "int8":
                for part in ("key_scales", "value_scales"):
                    one = place(draw, self.memories, np.zeros(shape, "f4"), swap=0, read_only=0)
                    scales[part] = one.array
            self.log[0] = f"KVCache.from_arrays({', '.join(map(described, arrays))})"
            self.cache = qkv_fast.KVCache.from_arrays(*arrays, **scales)
        else:
            args = (self.batch, self.heads, self.capacity, self.d, self.dv)
            self.log[0] = f"KVCache(*{args}, **{options})"
            self.cache = qkv_fast.KVCache(*args, **options)
        empty = np.zeros((self.heads, 0, self.d)), np.zeros((self.heads, 0, self.dv))
        self.rows = [empty] * self.batch
        self.lost = [0] * self.batch  # leading blocks that a window has given back

    def describe(self) -> str:
        return "\n  ".join(self.log)

    def last(self) -> str:
        return self.log[-1].split("\n")[0]

    def length(self, i: int) -> int:
        return self.rows[i][0].shape[1]

    def run(self, choices: Sequence[_select.Choice]) -> Iterator[Difference]:
        self.choices = choices
        steps = {"append": 5, "attend": 5, "truncate": 1, "fork": 1, "reorder": 1, "reset": 0.2,
                 "extend": 0.6, "views": 0.6, "wrong": 1.5}  # fmt: skip
        names = [n for n, weight in steps.items() for _ in range(int(5 * weight))]
        for number in range(self.draw.pick((4, 8, 16))):
            step = "append" if number == 0 else self.draw.pick(names)
            found = getattr(self, step)()
            for what, where, detail in found or ():
                yield Difference(what, where, f"step {number}, {self.last()}: {detail}")
            if found:
                return  # later steps would report the same
            if self.cache.lengths.tolist() != [self.length(i) for i in range(self.batch)]:
                yield Difference("lengths", "all", f"step {number}, {self.last()}")
                return
            if not self.fixed:
                table = self.cache.block_table
                taken = np.unique(table[table >= 0])
                if len(taken) + self.cache.free_pages != self.cache.num_pages:
                    yield Difference("pages lost", "all", f"step {number}, {self.last()}")
                    return

    def state(self) -> tuple[Any, ...]:
        c = self.cache
        return (c.lengths.tolist(), c.block_table.tolist(), c.free_pages, c.key_pages.tobytes(),
                c.value_pages.tobytes())  # fmt: skip

    def refusal(self, step: Callable[[], Any], kinds: Any) -> list[Difference]:
        """Run a step that must raise one of these kinds and change nothing."""
        before = self.state()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                step()
        except kinds:
            changed = self.state() != before
            return [Difference("refused, but changed the cache", "all", "")] if changed else []
        except Exception as error:
            return [Difference(f"raised {type(error).__name__}", "all", str(error))]
        return [Difference("not refused", "all", "")]

    def some(self) -> list[int]:
        return self.draw.order(self.batch)[: self.draw.whole(1, self.batch)]

    def new_rows(self, shape: tuple[int, ...]) -> tuple[Array, Array]:
        """Return raw rows of a random type, and in float64 what the cache stores of them."""
        name = self.draw.pick(FLOATS)
        raw = encode(numbers(self.draw, shape), name)
        real = decode(raw, name)
        if self.name == "int8":
            data, scales = quantize(real.astype(np.float32))
            return self.placed(raw, name), data * scales[..., None].astype(float)
        return self.placed(raw, name), decode(encode(real, self.name), self.name)

    def placed(self, raw: Array, name: str) -> Array:
        return place(self.draw, [], raw, name, bits=True).array

    def blocks(self, tokens: int) -> int:
        return -(-tokens // self.size)

    def grow(self, chosen: Sequence[int], counts: Sequence[int], step: Callable[[], Any]) -> Any:
        """Run a step that lengthens sequences: return True, or differences, or None if refused."""
        after = [self.length(i) + n for i, n in zip(chosen, counts, strict=True)]
        if max(after, default=0) > self.capacity:
            return self.refusal(step, ValueError) or None
        before = self.state()
        try:
            step()
        except MemoryError as error:
            if not self.limited:
                return [Difference("raised MemoryError", "all", str(error))]
            if self.state() != before:
                return [Difference("refused, but changed the cache", "all", "")]
            return None
        except Exception as error:
            return [Difference(f"raised {type(error).__name__}", "all", str(error))]
        for i, n in zip(chosen, counts, strict=True):
            if n and self.window is not None:
                gone = max(0, self.length(i) - self.window) // self.size
                self.lost[i] = max(self.lost[i], gone)
        return True

    def append(self) -> list[Difference] | None:
        draw = self.draw
        chosen, new = self.some(), draw.pick((0, 1, 1, 2, 5, 16, 33))
        counts = [new] * len(chosen)
        options: Options = {"sequences": chosen}
        if len(chosen) == self.batch and draw.chance(0.5):
            chosen, options = list(range(self.batch)), {}
        if draw.chance(0.5):
            counts = [draw.whole(0, new) for _ in chosen]
            options["counts"] = draw.pick((list, np.array))(counts)
        k, exact_k = self.new_rows((len(chosen), self.heads, new, self.d))
        v, exact_v = self.new_rows((len(chosen), self.heads, new, self.dv))
        self.log.append(f"append({described(k)}, {described(v)}, **{options})")
        grown = self.grow(chosen, counts, lambda: self.cache.append(k, v, **options))
        if grown is not True:
            return grown
        for at, (i, n) in enumerate(zip(chosen, counts, strict=True)):
            old_k, old_v = self.rows[i]
            self.rows[i] = (
                np.concatenate([old_k, exact_k[at, :, :n]], 1),
                np.concatenate([old_v, exact_v[at, :, :n]], 1),
            )
        return None

    def extend(self) -> list[Difference] | None:
        if self.name == "int8":
            return None
        i, n = self.draw.whole(0, self.batch - 1), self.draw.pick((0, 1, 3, 20))
        self.log.append(f"extend({n}, sequences=[{i}])")
        grown = self.grow([i], [n], lambda: self.cache.extend(n, sequences=[i]))
        if grown is not True:
            return grown
        data = [encode(numbers(self.draw, (self.heads, n, size)), self.name)
                for size in (self.d, self.dv)]  # fmt: skip
        at = 0
        for pair in self.cache.views(i, self.length(i)):
            step = pair[0].shape[1]
            for view, rows in zip(pair, data, strict=True):
                raw_view(view)[...] = rows[:, at : at + step]
            at += step
        if at != n:
            return [Difference("views", "all", f"{at} tokens instead of {n}")]
        self.rows[i] = tuple(
            np.concatenate([old, decode(x, self.name)], 1)
            for old, x in zip(self.rows[i], data, strict=True)
        )
        return None

    def views(self) -> list[Difference] | None:
        if self.name == "int8":
            return None
        i = self.draw.whole(0, self.batch - 1)
        n = self.length(i)
        start, stop = self.draw.whole(0, n), self.draw.pick((None, n, n // 2, n + 5))
        self.log.append(f"views({i}, {start}, {stop})")
        pairs = self.cache.views(i, start, stop)
        end = n if stop is None else min(stop, n)
        kept = [j for j in range(start, end) if j // self.size >= self.lost[i]]
        for at in range(2):
            expected = self.rows[i][at][:, kept]
            shown = [decode(pair[at], self.name) for pair in pairs]
            got = np.concatenate([expected[:, :0], *shown], 1)
            if got.shape != expected.shape or not np.array_equal(got, expected, equal_nan=True):
                return [Difference("views", "all", f"{got.shape}, {expected.shape}")]
        return None

    def hidden(self, i: int, position: int, length: int) -> bool:
        """Return whether a query from a position on would see blocks that were given back."""
        if self.window is None:
            return False
        block = max(0, position - self.window) // self.size
        return block < min(self.lost[i], self.blocks(length))

    def truncate(self) -> list[Difference] | None:
        i = self.draw.whole(0, self.batch - 1)
        n = self.draw.whole(0, self.length(i))
        self.log.append(f"truncate({n}, sequences={i})")
        if self.hidden(i, n, n):
            return self.refusal(lambda: self.cache.truncate(n, sequences=i), ValueError)
        self.cache.truncate(n, sequences=i)
        self.cut(i, n)
        return None

    def cut(self, i: int, n: int) -> None:
        k, v = self.rows[i]
        self.rows[i] = k[:, :n], v[:, :n]
        self.lost[i] = min(self.lost[i], self.blocks(n))

    def fork(self) -> list[Difference] | None:
        i, j = (self.draw.whole(0, self.batch - 1) for _ in "ij")
        n = self.draw.pick((None, self.draw.whole(0, self.length(i))))
        self.log.append(f"fork({i}, {j}, {n})")
        kept = self.length(i) if n is None else n
        if self.hidden(i, kept, kept):
            return self.refusal(lambda: self.cache.fork(i, j, n), ValueError)
        self.cache.fork(i, j, n)
        self.rows[j], self.lost[j] = self.rows[i], self.lost[i]
        self.cut(j, kept)
        return None

    def reorder(self) -> None:
        index = [self.draw.whole(0, self.batch - 1) for _ in range(self.batch)]
        self.log.append(f"reorder({index})")
        self.cache.reorder(index)
        self.rows = [self.rows[i] for i in index]
        self.lost = [self.lost[i] for i in index]

    def reset(self) -> None:
        chosen = self.draw.pick((None, self.some()))
        self.log.append(f"reset(sequences={chosen})")
        self.cache.reset(sequences=chosen)
        for i in range(self.batch) if chosen is None else chosen:
            self.cut(i, 0)

    def attend(self) -> list[Difference]:
        draw = self.draw
        chosen = self.some()
        if draw.chance(0.5):
            chosen = list(range(self.batch))
        case = Case("attend", {}, [], draw.pick(FLOATS), threads=draw.pick((2, 3, 4)))
        case.wide = "float64" in (case.dtype, self.name)
        case.note = f"{case.dtype}/{self.name}"
        s = Sizes.__new__(Sizes)
        s.kv_heads, s.group = self.heads, draw.pick((1, 1, 2, 3, 5))
        s.q_len, s.d, s.dv = draw.pick((0, 1, 1, 1, 2, 3, 5, 16, 17)), self.d, self.dv
        lengths = np.array([self.length(i) for i in chosen])
        s.kv_len, s.batch = int(lengths.max(initial=0)), (len(chosen),)
        raw = encode(numbers(draw, (len(chosen), s.heads, s.q_len, s.d)), case.dtype)
        query = place(draw, case.memories, raw, case.dtype, bits=True)
        case.arguments["query"] = query.array
        if chosen != list(range(self.batch)) or draw.chance(0.3):
            case.arguments["sequences"] = draw.pick((list, np.array))(chosen)
        truth: Options = {"key_lengths": lengths}
        if draw.chance(0.25):
            add_mask(draw, case, truth, (len(chosen), s.heads, s.q_len, s.kv_len), True)
        if draw.chance(0.15):
            add_bias(draw, case, truth, (len(chosen), s.heads, s.q_len, s.kv_len), True)
        add_modifiers(draw, case, truth, (len(chosen),), s, lengths - s.q_len, False)
        exact = [np.zeros((len(chosen), self.heads, s.kv_len, n)) for n in (self.d, self.dv)]
        for at, i in enumerate(chosen):
            for dense, rows in zip(exact, self.rows[i], strict=True):
                dense[at, :, : rows.shape[1]] = rows
        if self.window is not None:
            left, right = truth.get("window", (None, None))
            truth["window"] = (self.window if left is None else min(left, self.window)), right
        case.truth = Truth(decode(raw, case.dtype), *exact, truth)
        add_out(draw, case, (len(chosen), s.heads, s.q_len, s.dv), True, query)
        self.log.append(case.describe().replace("\n", "\n  "))
        gone = [self.hidden(i, self.length(i) - s.q_len, self.length(i)) for i in chosen]
        if any(gone):
            case.truth = None
        before = self.state()
        case.target = self.cache.attend
        found = list(case.run(self.choices))
        case.target = None
        if self.state() != before:
            found.append(Difference("attend changed the cache", "all", ""))
        return found

    def wrong(self) -> list[Difference]:
        """Call a method with an invalid argument."""
        draw, c, b = self.draw, self.cache, self.batch
        k, v = np.ones((b, self.heads, 1, self.d), "f4"), np.ones((b, self.heads, 1, self.dv), "f4")
        q = np.ones((b, self.heads, 1, self.d), "f4")
        n = int(c.lengths.max())
        absurd = (
            2**63 - 1,
            2**63 - 1,
            2**63,
            2**64,
            2**70,
            1.5,
            math.nan,
            "1",
            None,
            [0.0],
            -1,
            -(2**63),
        )
        bad = draw.pick(absurd)
        wrong: list[tuple[str, Callable[[], Any]]] = [
            ("append to", lambda: c.append(k, v, sequences=[bad])),
            ("append to", lambda: c.append(k, v, sequences=[0] * (b + 1))),
            ("append counts", lambda: c.append(k, v, counts=[bad] * b)),
            ("append counts 2", lambda: c.append(k, v, counts=2)),
            ("append shape", lambda: c.append(k[..., :0], v)),
            ("append shape", lambda: c.append(k, v[0])),
            ("append type", lambda: c.append(k.astype("i4"), v)),
            ("append type", lambda: c.append(k.tolist(), v)),
            *[("extend", lambda: c.extend([bad] * b))] * 3,
            *[("extend", lambda: c.extend(bad))] * 3,
            ("extend", lambda: c.extend([1] * (b + 1))),
            ("truncate", lambda: c.truncate([bad] * b)),
            ("truncate", lambda: c.truncate(n + 1)),
            ("reorder", lambda: c.reorder([bad] * b)),
            ("reorder", lambda: c.reorder([0] * (b + 1))),
            ("reorder", lambda: c.reorder(b)),
            ("fork", lambda: c.fork(0, b)),
            ("fork", lambda: c.fork(bad if bad is not None else -1, 0)),
            ("fork", lambda: c.fork(0, 0, n + 1 if bad is None else bad)),
            ("views", lambda: c.views(bad if bad is not None else -1)),
            ("views", lambda: c.views(0, bad if not huge(bad) else -1)),
            ("reset", lambda: c.reset(sequences=[bad])),
            ("attend", lambda: c.attend(q[..., :0])),
            ("attend", lambda: c.attend(q[0])),
            ("attend", lambda: c.attend(np.repeat(q, 2, 0))),
            ("attend", lambda: c.attend(q, sequences=[bad])),
            ("attend", lambda: c.attend(q, window=(bad, 0) if not huge(bad) and bad is not None
                                        else (-1, 0))),
            ("attend", lambda: c.attend(q, num_threads=bad if not huge(bad) and bad is not None
                                        else 0)),
            ("attend", lambda: c.attend(q, np.ones((1, n + 2), bool))),
            ("attend", lambda: c.attend(q, np.ones((n,), int))),
        ]  # fmt: skip
        if self.name == "int8":
            wrong.append(("append NaN", lambda: c.append(k * np.float32(np.nan), v)))
        name, step = draw.pick(wrong)
        self.log.append(f"wrong {name}, {bad!r}")
        return self.refusal(step, (TypeError, ValueError, MemoryError))


def huge(x: Any) -> bool:
    return isinstance(x, int) and x > 2**32


def raw_view(x: Array) -> Array:
    return x if x.dtype.kind != "V" else x.view(np.uint16)


# --- Invalid arguments ----------------------------------------------------------------------------

NOT_INTS = (1.5, math.nan, "1", 1j, [1.5], {})
NOT_FLAGS = (1, 0, "yes", None, np.ones(2, bool), 1.0)
BEYOND = (2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**70, -(2**62), -(2**63), -(2**63) - 1)


def beyond(draw: Draw, shape: tuple[int, ...]) -> Any:
    """Return ints, one of them far out of range, as an int, a list or an array."""
    value = draw.pick(BEYOND)
    if draw.chance(0.4):
        return value
    filled = np.zeros(shape, object)
    if filled.size:
        filled.flat[draw.whole(0, filled.size - 1)] = value
    if draw.chance(0.5):
        return filled.tolist()
    if 0 <= value < 2**64:
        return filled.astype(np.uint64)
    return filled.astype(np.int64) if -(2**63) <= value < 2**63 else filled


def wrong_modifiers(draw: Draw, case: Case, heads: int, batch: tuple[int, ...]) -> Options:
    """Return an invalid value for each argument that the functions share."""
    pick = draw.pick
    shape = case.arguments["query"].shape
    result = (*shape[:-1], case.arguments["value_pages" if case.function == "paged_attention"
                                          else "value"].shape[-1])  # fmt: skip
    dtype = case.arguments["query"].dtype.newbyteorder("=")
    frozen = np.zeros(result, dtype)
    frozen.flags.writeable = False
    return {
        "is_causal": pick(NOT_FLAGS),
        "enable_gqa": pick(NOT_FLAGS),
        "return_lse": pick(NOT_FLAGS),
        "scale": pick(("1", 1j, [1.0, 2.0], {}, 10**400, np.ones((2, 2)), b"1")),
        "query_offset": pick(
            (pick(NOT_INTS), True, beyond(draw, batch), np.zeros((len(batch) + 5, *batch, 3), int))
        ),
        "window": pick((3, (1,), (1, 2, 3), (-1, 0), (0, -1), (1.5, 0), (math.nan, 0), "ab",
                        (0, "1"), (-(2**63), 0), (-(2**70), None), [[1], 2])),
        "softcap": pick((-1e-9, -1.0, math.inf, math.nan, "1", 1j, 10**400, [2.0, 3.0])),
        "alibi_slopes": pick((np.ones(heads + 2), [1j] * heads, "a", [None] * heads,
                              [[1.0], [1.0, 2.0]], np.ones((3, 1, 1, 1, 1, 1, heads)),
                              np.ones(heads, bool))),
        "sinks": pick((1.0, np.ones(heads + 1), np.ones((1, heads)), [1j] * heads, [None] * heads,
                       "a", ["a"] * heads, np.ones(heads, bool))),
        "attn_bias": pick((np.ones(shape[-1], bool), np.ones(1, int), [0.0], "x", 1.0,
                           np.broadcast_to(1.0, (*shape, 100_003)), np.ones(1, "c8"),
                           np.ma.ones(1), np.ones(77))),
        "key_ranges": pick((3, (1,), (1, 2, 3), "abc", (0.5, None), (None, np.ones(1)),
                            (True, None), (0, "1"), (None, [[1], [1, 2]]), (2**70, None),
                            (0, np.zeros(77, int)), (np.ma.zeros(1, int), 5), (-(2**64), 2),
                            (np.zeros((2,) * 5, int), None), (np.full(1, 2**63, "u8"), None))),
        "num_threads": pick((0, -1, 1.5, True, "2", math.nan, -(2**70), [2])),
        "dtype": pick(("float32", 3, np.float32, object(), "bf16", [])),
        "out_dtype": pick(("int8", 3, object(), [], "c8", np.float32 if dtype.itemsize == 8
                           else np.float64)),
        "out": pick((np.zeros(result).tolist(), np.zeros((*result, 1), dtype),
                     np.zeros(result, "i4"), np.zeros(result, "c8"), frozen,
                     np.zeros((*result[:-1], result[-1] + 1), dtype), np.ma.zeros(result, dtype),
                     np.zeros(result, "f4" if dtype.itemsize == 8 else "f8"), memoryview(b"1"))),
        "key_lengths": pick((pick(NOT_INTS), True, -1, beyond(draw, batch), math.inf)),
    }  # fmt: skip


def wrong_tensors(draw: Draw, case: Case, names: Sequence[str]) -> Options:
    """Return for each tensor an invalid one, of another type or shape."""
    wrong = {}
    for name in names:
        x = np.array(case.arguments[name])
        other = "f4" if x.itemsize == 8 else "f8"
        choices: list[Any] = [
            None, x.tolist(), np.zeros(x.shape, int), x.astype("c8"), x.astype(object),
            x.astype("g"), np.ma.array(x), x[..., :0], x.ravel(), x.reshape(-1)[:1].reshape(()),
            np.zeros(x.shape, "i1"), np.zeros(x.shape, "M8[s]"), "x", 1.0,
            np.concatenate([x] * 2, -1), np.zeros(x.shape, [("a", "f4")]), np.zeros(x.shape, "U3"),
        ]  # fmt: skip
        if not name.endswith("_pages"):
            if case.function != "paged_attention":  # paged_attention takes a query of any dtype
                choices.append(x.astype(other))
            if len(x) > 1:  # one batch entry broadcasts
                choices.append(np.concatenate([x] * 7)[: 5 * len(x) + 2])
        if name in ("value", "value_pages"):
            any_head_size = (7, 14)
            for index in any_head_size:
                choices[index] = np.concatenate([x, x], -2)
        wrong[name] = draw.pick(choices)
    return wrong


def draw_refused(draw: Draw) -> Case:
    """Return a call in which one argument is invalid."""
    s = Sizes(draw)
    s.batch, s.long = draw.pick(((1,), (2,), (2, 3))), False
    s.kv_heads, s.group = draw.pick((1, 2)), draw.pick((1, 2))
    s.q_len, s.kv_len, s.d, s.dv = draw.whole(1, 4), draw.whole(2, 5), draw.whole(1, 4), 3
    function = draw.pick(("dense", "dense", "varlen", "paged", "merge", "cache"))
    if function == "merge":
        return refused_merge(draw)
    if function == "cache":
        return refused_cache(draw)
    name = draw.pick(("float32", "float64", "float16"))
    case = Case(f"{function}_attention", {}, [], name, name == "float64")
    given = case.arguments
    raw = RAW[name]
    if function == "dense":
        case.function = "scaled_dot_product_attention"
        tensors = {"query": np.ones((*s.batch, s.heads, s.q_len, s.d), raw)}
        tensors["key"] = np.ones((*s.batch, s.kv_heads, s.kv_len, s.d), raw)
        tensors["value"] = np.ones((*s.batch, s.kv_heads, s.kv_len, s.dv), raw)
        given["enable_gqa"] = True
        batch, shape = s.batch, (*s.batch, s.heads, s.q_len, s.dv)
    elif function == "varlen":
        counts = draw.rng.integers(0, 4, draw.whole(1, 4))
        counts[0] += 2
        total, batch = int(counts.sum()), counts.shape
        tensors = {"query": np.ones((total, s.heads, s.d), raw)}
        tensors["key"] = np.ones((total, s.kv_heads, s.d), raw)
        tensors["value"] = np.ones((total, s.kv_heads, s.dv), raw)
        cu = np.concatenate([[0], np.cumsum(counts)])
        shape = (total, s.heads, s.dv)
        given["cu_seqlens_q"] = cu
        if draw.chance(0.5):
            given["cu_seqlens_k"] = cu.copy()
    else:
        b, size, pages = draw.whole(1, 3), draw.whole(1, 4), draw.whole(2, 5)
        batch, shape = (b,), (b, s.heads, s.q_len, s.dv)
        tensors = {"query": np.ones((b, s.heads, s.q_len, s.d), raw)}
        tensors["key_pages"] = np.ones((pages, s.kv_heads, size, s.d), raw)
        tensors["value_pages"] = np.ones((pages, s.kv_heads, size, s.dv), raw)
        given["block_table"] = draw.rng.integers(0, pages, (b, 3))
        given["key_lengths"] = np.full(b, 2 * size)
    placed = add_tensors(draw, case, tensors, dict.fromkeys(tensors, name), True)
    if draw.chance(0.8):
        strides, start, size_ = layout(draw, shape, np.dtype(raw).itemsize)
        memory = Memory(size_)
        case.memories.append(memory)
        given["out"] = np.ndarray(shape, raw, memory.bytes, start, strides)
    wrong = wrong_modifiers(draw, case, s.heads, batch) | wrong_tensors(draw, case, list(placed))
    if function == "dense":
        mask = (s.heads, s.q_len, s.kv_len)
        wrong["attn_mask"] = draw.pick((
            np.ones(mask, int), np.ones((*mask[:2], s.kv_len + 2), bool), "x", 1.0,
            np.ones((2,) * 5 + mask, bool), np.ones(mask, "c8"), np.ones(mask).tolist(),
            np.ma.ones(mask, bool), np.ones((s.q_len + 2, s.kv_len), raw), np.ones(mask, "u2"),
        ))  # fmt: skip
        wrong["dropout_p"] = draw.pick((0.1, math.nan, None, "0", 1j, 10**400, [0.0, 1.0], -1))
        wrong["key_lengths"] = draw.pick((wrong["key_lengths"], s.kv_len + 1))
        if s.group > 1:
            wrong["enable_gqa"] = draw.pick((wrong["enable_gqa"], False))
    elif function == "varlen":
        for part in ("cu_seqlens_q", "cu_seqlens_k"):
            wrong[part] = wrong_starts(draw, cu)
        wrong["key_lengths"] = draw.pick((wrong["key_lengths"], int(counts.max()) + 1))
    else:
        table = given["block_table"]
        off = np.array(table)
        # Queries see key 0: the call has no window and no is_causal, and offsets of at least 0.
        off[draw.whole(0, b - 1), 0] = draw.pick((-1, pages, 2**31, 2**32, 2**62, -(2**63)))
        wide = table.astype(np.uint64)
        wide[0, 0] = draw.pick((2**63, 2**64 - 1, 2**63 + 1, pages))
        mask = (s.heads, s.q_len, 2 * size)
        wrong["block_table"] = draw.pick((
            off, off.tolist(), wide, table.astype(float), table[0], table[:, :0],
            table[:1, :1, None], np.concatenate([table] * 2), "x", None, 1, table.astype(bool),
            np.ma.array(table), off, wide,
        ))  # fmt: skip
        wrong["key_lengths"] = draw.pick((wrong["key_lengths"], 3 * size + 1, None))
        wrong["attn_mask"] = draw.pick((np.ones((2 * size + 2,), bool), np.ones(mask, int), "x"))
        wrong["key_scales"] = np.ones((pages, s.kv_heads, size), "f4")
        wrong["value_scales"] = draw.pick((np.ones(3), "x", 1.0))
    # Arguments that give the shape are drawn more often than modifiers.
    ours = [name for name in wrong if name in ("cu_seqlens_q", "cu_seqlens_k", "block_table")]
    argument = draw.pick(ours if ours and draw.chance(0.35) else list(wrong))
    given[argument] = wrong[argument]
    case.note = f"{argument} = {described(wrong[argument])}"
    if isinstance(wrong[argument], np.ndarray) and argument != "out":
        case.note = f"{argument} is wrong"
    return case


def wrong_starts(draw: Draw, cu: Array) -> Any:
    """Return invalid cumulative lengths."""
    total, at = int(cu[-1]), draw.whole(0, len(cu) - 1)
    kind = draw.whole(0, 8)
    if kind == 0:
        return cu.astype(float)
    if kind == 1:
        return draw.pick(([], "x", 3, [[0, total]], np.array(total), [math.nan, total], None if
                          draw.chance(0) else {}, cu.astype(bool), np.ma.array(cu)))  # fmt: skip
    if kind == 2:
        return cu + 1
    if kind == 3:
        return [*cu.tolist(), total + 1]
    if kind == 4:
        return [*cu.tolist()[:-1], total + draw.pick((-1, 1, 2**32, 2**62))]
    # A sum of lengths that wraps around, or a negative length.
    middle = draw.pick((total + 1, 2**31, 2**32, 2**62, 2**63 - 1, -1, -(2**62), -(2**63), 2**63,
                        2**64 - 1, 2**63 + 5))  # fmt: skip
    starts = cu.tolist()
    if kind == 5:
        starts[-1:] = [middle, total]
    elif kind == 6:
        starts[at] = middle
    else:  # each length in int64 is positive: differences of more than 2**63 wrap around
        first, second = draw.pick((
            (2**63 - 1, total + 1 - 2**63), (2**62 + 9, -(2**62)),
            (2**63 - 1, total + 1 + 2**63), (2**62 + 9, 3 * 2**62),
        ))  # fmt: skip
        starts = [0, first, second, total]
    if draw.chance(0.5):
        return starts
    unsigned = max(starts) >= 2**63
    if unsigned and min(starts) < 0:
        return starts
    return np.array(
        starts, np.uint64 if unsigned or (min(starts) >= 0 and draw.chance(0.3)) else "i8"
    )


def refused_merge(draw: Draw) -> Case:
    out, lse = np.ones((2, 3, 4), "f4"), np.ones((2, 3), "f4")
    wrong = draw.pick((
        ([], []), ([out, out], [lse]), ([out.astype(int)], [lse]), ([out, out.astype(float)],
        [lse, lse]), ([out], [lse.astype(int)]), ([out, out[:, :2]], [lse, lse]),
        ([out], [lse[:, :2]]), ([[1.0]], [lse]), (None, [lse]), ([out], None), (1, 2),
        ([out], [lse[0]]), ([np.ones((), "f4")], [np.ones((), "f4")]), ([out], [None]),
        ([out.astype("c8")], [lse]), ([out], ["x"]), ([np.ma.array(out)], [lse]),
        ([out.astype("u2")], [lse]), ([out.astype(object)], [lse]), (out, lse[..., None]),
        ([out], [lse.astype("c8")]), ("ab", "cd"), ([out], [lse.astype(object)]),
    ))  # fmt: skip
    case = Case("merge_attention", {"outputs": wrong[0], "lses": wrong[1]}, [])
    if draw.chance(0.1):
        case.arguments = {"outputs": [out], "lses": [lse], "dtype": draw.pick(("f4", 3, object()))}
    elif draw.chance(0.3):
        case.arguments = {"outputs": [out, out], "lses": [lse, lse]} | draw.pick((
            {"sinks": 1.0}, {"sinks": [1.0]}, {"sinks": np.ones((3, 3))}, {"sinks": "x"},
            {"out": out[:1]}, {"out": out.astype("f8")}, {"out": "x"}, {"out": out.tolist()},
            {"out": np.broadcast_to(out[:1], out.shape)}, {"lse_out": out}, {"lse_out": 1},
            {"lse_out": lse.astype("f8")}, {"out": out, "lse_out": out[..., 0]},
            {"out_dtype": "float64"}, {"out_dtype": "x"}, {"out_dtype": 3}, {"num_threads": 0},
            {"out": out, "out_dtype": "float16"}, {"num_threads": "1"}, {"num_threads": 1.5},
        ))  # fmt: skip
    case.note = case.describe().replace("\n", ";")
    return case


def refused_cache(draw: Draw) -> Case:
    given: Options = {"batch": 2, "num_kv_heads": 1, "capacity": 5, "head_dim": 4}
    size = draw.pick(
        (0, -1, 1.5, math.nan, True, "1", 2**63, 2**63 - 1, 2**62, 2**70, [1], -(2**63))
    )
    name = draw.pick((*given, "v_dim", "page_size", "num_pages", "window", "dtype"))
    if name in ("batch", "window", "num_pages") and size == 0:
        size = -1
    if name in ("window", "page_size") and huge(size):
        size = -1  # these accept any size
    if name == "capacity" and huge(size):
        given["page_size"] = draw.pick((1, 7, 64))
    if name == "num_pages":
        given["page_size"] = 2
    given[name] = size
    if name == "dtype":
        given[name] = draw.pick(("int16", "f16", 3, np.complex64, object, [], "x", np.uint8))
    case = Case("KVCache", given, [])
    if draw.chance(0.4):
        case.arguments = refused_arrays(draw)
        case.target = qkv_fast.KVCache.from_arrays
    case.note = case.describe().replace("\n", ";")
    return case


def refused_arrays(draw: Draw) -> Options:
    k, v, scales = (
        np.ones((2, 1, 5, 4), "f4"),
        np.ones((2, 1, 5, 3), "f4"),
        np.ones((2, 1, 5), "f4"),
    )
    given: Options = {"key": k, "value": v, "lengths": draw.whole(0, 5)}
    return given | draw.pick((
        {"lengths": beyond(draw, (2,))}, {"lengths": 6}, {"lengths": -1}, {"lengths": [1.5, 1]},
        {"lengths": math.nan}, {"lengths": [1, 2, 3]}, {"lengths": None}, {"lengths": "1"},
        {"key": k[0]}, {"value": v[:1]}, {"key": k.astype("f8")}, {"key": k.astype(">f4")},
        {"key": k.tolist()}, {"key": None}, {"key": k[..., :0]}, {"key_scales": scales},
        {"value_scales": scales}, {"key": k.astype("i1"), "value": v.astype("i1")},
        {"key": k.astype("i1"), "value": v.astype("i1"), "key_scales": scales},
        {"key": k.astype("i1"), "value": v.astype("i1"), "key_scales": scales,
         "value_scales": scales[:1]},
        {"key": k.astype("i4"), "value": v.astype("i4")},
        {"key": k.astype("i1"), "value": v.astype("i1"), "key_scales": scales,
         "value_scales": scales.astype("f8")},
    ))  # fmt: skip


# --- Running -------------------------------------------------------------------------------------


def make(seed: int, number: int) -> Any:
    """Return case `number` of a seed."""
    draw = Draw(seed, number)
    kind = draw.uniform()
    if kind < 0.38:
        return draw_dense(draw)
    if kind < 0.56:
        return draw_varlen(draw)
    if kind < 0.70:
        return draw_paged(draw)
    if kind < 0.76:
        return CacheWalk(draw)
    if kind < 0.79:
        return MergeCase(draw)
    if kind < 0.82:
        return PartsCase(draw)
    if kind < 0.91:
        return WeightsCase(draw)
    return draw_refused(draw)


def features(case: Any) -> list[str]:
    """Return what a case is about: its function, types, arguments, layouts and sizes."""
    note = getattr(case, "note", getattr(case, "name", ""))
    found = {case.function, *note.split("/")} if getattr(case, "truth", True) else set()
    if isinstance(case, CacheWalk):
        calls = (line.split("(")[0].split(" ")[0] for line in case.log)
        return sorted({case.function, case.name, *calls})
    if not found:
        return ["refused", f"refused: {case.function}", "refused: " + case.note.split(" ")[0]]
    threads = getattr(case, "threads", 1)
    found.add(f"{threads} threads")
    shapes = {}
    for name, x in case.arguments.items():
        found.add(name)
        if not isinstance(x, np.ndarray):
            continue
        shapes[name.removesuffix("_pages")] = x.shape
        traits = {"big-endian": not x.dtype.isnative, "unaligned": not x.flags.aligned,
                  "strided": x.ndim > 0 and x.strides[-1] not in (0, x.itemsize),
                  "broadcast": 0 in x.strides and x.size > 1}  # fmt: skip
        if x.dtype == bool:
            found.add(f"bool {name}")
        if name in ("query", "key", "value", "key_pages", "value_pages", "attn_mask", "out"):
            found |= {f"{trait} {name}" for trait, holds in traits.items() if holds}
    if "key" in shapes and "query" in shapes and "" not in shapes:
        axes = {"Lq": shapes["query"][-2], "Lk": shapes["key"][-2], "D": shapes["key"][-1]}
        if "value" in shapes:
            axes["Dv"] = shapes["value"][-1]
        for axis, n in axes.items():
            bound = next((b for b in (0, 1, 16, 64, 256, 2048) if n <= b), math.inf)
            found.add(f"{axis} <= {bound}")
    if isinstance(case, Case) and case.truth is not None:
        tensors = (case.truth.query, case.truth.key, case.truth.value)
        if not all(np.isfinite(x).all() for x in tensors):
            found.add("not finite")
    return sorted(found)


def differences(
    seed: int, number: int, choices: Sequence[_select.Choice]
) -> tuple[Any, list[Difference]]:
    """Run one case; return it and its differences."""
    case = make(seed, number)
    return case, list(case.run(choices))


def by_kind(case: Any, found: list[Difference], choices: int) -> dict[str, str]:
    """Return details by kind: the difference, function and engines, without numbers."""
    where: dict[str, list[Difference]] = collections.defaultdict(list)
    about = ""
    if getattr(case, "truth", True) is None:
        about = f" | {case.note.split(' = ')[0].split(' is wrong')[0].splitlines()[0]}"
    for difference in found:
        what = difference.what
        if what.startswith("raised"):
            message = "".join("#" if c.isdigit() else c for c in difference.detail)
            what += f" {message[:60].splitlines()[0]!r}" if message else ""
        where[f"{what} | {case.function}{about}"].append(difference)
    kinds = {}
    for kind, differences_ in where.items():
        labels = list(dict.fromkeys(d.choice for d in differences_))
        on = "all" if len(labels) >= choices else ", ".join(labels)
        note = getattr(case, "note", "").splitlines()
        detail = differences_[0].detail
        kinds[f"{kind} | {on}"] = f"{note[0] if note and not about else ''} {detail}".strip()
    return kinds


def child(arguments: argparse.Namespace, choices: list[_select.Choice]) -> int:
    """Run cases; write each number to a file before the case, and print differences as JSON."""
    faulthandler.enable()
    use_many_threads()
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    corpus = fuzz_state.Corpus(Path(arguments.corpus)) if arguments.corpus else None
    counts: collections.Counter[str] = collections.Counter()
    with open(arguments.child, "r+b", buffering=0) as progress:
        for number in range(arguments.first, arguments.first + arguments.cases):
            os.pwrite(progress.fileno(), f"{number:020d}".encode(), 0)
            if hasattr(signal, "alarm"):
                signal.alarm(SECONDS)
            try:
                case, found = differences(arguments.seed, number, choices)
                number_of = len(
                    suited(choices, getattr(case, "dtype", ""), getattr(case, "wide", False))
                )
                facts = list(by_kind(case, found, number_of).items())
                counts[case.function] += 1
                truth = getattr(case, "truth", None)
                counts["torch"] += truth is not None and truth.has_torch()
                if corpus is not None:
                    shown = features(case)
                    if corpus.is_new(shown):
                        print(json.dumps([number, NEW_PAIR, shown]), flush=True)
            except Exception as error:  # an error in this file
                trace = error.__traceback__
                while trace is not None and trace.tb_next is not None:
                    trace = trace.tb_next
                line = trace.tb_lineno if trace is not None else 0
                facts = [(f"the fuzz failed: {type(error).__name__}, line {line}", str(error))]
            for kind, detail in facts:
                print(json.dumps([number, kind, detail]), flush=True)
            if any(kind.startswith("not refused") for kind, _ in facts):
                print(json.dumps([number, COUNTS, counts]), flush=True)
                os._exit(AGAIN)  # a call with invalid arguments may have overwritten any memory
    print(json.dumps([number, COUNTS, counts]), flush=True)
    return 0


def run_chunk(
    arguments: argparse.Namespace, begin: int, end: int
) -> Iterator[tuple[int, str, Any]]:
    """Run cases in child processes; start a new one after a crash.

    Yield the number of a case, a kind of difference and its details; or COUNTS or NEW_PAIR, and
    what `child` prints with them.
    """
    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder) / "number"
        while begin < end:
            progress.write_text(f"{begin:020d}")
            command = [sys.executable, __file__, "--seed", str(arguments.seed), "--first"]
            command += [str(begin), "--cases", str(end - begin), "--child", str(progress)]
            if arguments.engines:
                command += ["--engines", arguments.engines]
            if arguments.torch:
                command += ["--torch"]
            if arguments.corpus:
                command += ["--corpus", arguments.corpus]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            for line in done.stdout.splitlines():
                number, kind, detail = json.loads(line)
                yield number, kind, detail
            for line in dict.fromkeys(done.stderr.splitlines()):
                if "runtime error:" in line:  # UBSan reported and continued
                    yield begin, f"in this chunk:{crash_site(line)}", excerpt(done.stderr, line)
            if done.returncode == 0:
                return
            number = int(progress.read_text())
            if done.returncode == AGAIN:
                begin = number + 1
                continue
            code = -done.returncode
            name = signal.Signals(code).name if code > 0 else f"exit status {done.returncode}"
            name = "hang" if name == "SIGALRM" else name
            function = make(arguments.seed, number).function
            kind = f"crash: {name}{crash_site(done.stderr)} | {function}"
            yield number, kind, excerpt(done.stderr)
            begin = number + 1


def crash_site(text: str) -> str:
    """Return the line of a sanitizer's report that names the error, without addresses."""
    lines = text.splitlines()
    fatal = [line for line in lines if "ERROR: AddressSanitizer" in line]
    for line in fatal or [line for line in lines if "runtime error:" in line][-1:]:
        line = line.split(" on address")[0].split("==ERROR: ")[-1]
        return " " + line.split(" 0x")[0][:140]
    return ""


def excerpt(text: str, mark: str = "ERROR: AddressSanitizer", count: int = 12) -> str:
    """Return lines from the one that has the mark on, or the last lines."""
    lines = text.splitlines()
    begin = next((i for i, line in enumerate(lines) if mark in line), max(0, len(lines) - count))
    return "\n        ".join(line[:160] for line in lines[begin : begin + count])


def run_all(arguments: argparse.Namespace) -> int:
    """Run all cases; print the differences by kind; return the exit status."""
    state = fuzz_state.State(arguments.seed, arguments.first, arguments.cases, next=arguments.first)
    file = Path(arguments.resume) if arguments.resume else None
    if file is not None and file.exists():
        state = fuzz_state.load_state(file)
        state.cases = max(state.cases, arguments.cases)
        arguments.seed = state.seed
        print(f"{file}: {state.done} cases of seed {state.seed} are done")
    corpus = fuzz_state.Corpus(Path(arguments.corpus)) if arguments.corpus else None
    bad = 0
    for seed, number in corpus.cases() if corpus is not None and not state.done else ():
        case, found = differences(seed, number, chosen(arguments))
        for kind, detail in by_kind(case, found, len(all_choices())).items():
            print(f"CORPUS {kind}\n    seed {seed}, case {number}: {detail}", flush=True)
            bad += 1
    start, last = time.perf_counter(), 0.0
    before, end = state.done, state.first + state.cases
    for begin in range(state.next, end, arguments.chunk):
        stop, begun = min(end, begin + arguments.chunk), time.perf_counter()
        counts: collections.Counter[str] = collections.Counter()
        for number, kind, detail in run_chunk(arguments, begin, stop):
            if kind == COUNTS:
                counts.update(detail)
            elif kind == NEW_PAIR:
                if corpus is not None and corpus.is_new(detail):
                    corpus.add(state.seed, number, detail)
            else:
                if state.add_difference(kind, number, detail):
                    print(f"NEW {kind}\n    case {number}: {detail}\n    "
                          f"{again(arguments, number)}", flush=True)  # fmt: skip
                    if corpus is not None:
                        corpus.add_failure(state.seed, number, kind)
        state.add_cases(stop, time.perf_counter() - begun, counts)
        if file is not None:
            state.save(file)
        seconds = time.perf_counter() - start
        if seconds - last > 10:
            last, rate = seconds, (state.done - before) / seconds
            print(f"{state.done} cases, {rate:.0f} a second, {len(state.kinds)} kinds of "
                  "differences", flush=True)  # fmt: skip
        if arguments.seconds and seconds > arguments.seconds:
            break
    print(f"\n{state.done} cases of seed {state.seed} in {state.seconds:.0f} s, "
          f"{state.done / max(state.seconds, 1e-9):.0f} a second")  # fmt: skip
    print(", ".join(f"{name}: {count}" for name, count in sorted(state.counts.items())))
    for kind, known in sorted(state.kinds.items(), key=lambda item: -item[1]["count"]):
        shown = ", ".join(map(str, known["cases"][:4]))
        print(f"{known['count']:6d}  {kind}\n        cases {shown}")
    if not state.kinds and not bad:
        print("no differences")
    return 1 if state.kinds or bad else 0


def chosen(arguments: argparse.Namespace) -> list[_select.Choice]:
    """Return the engines that the arguments name, or all."""
    choices = all_choices()
    words = arguments.engines.split(",") if arguments.engines else []
    return [choice for choice in choices if not words or label(choice) in words]


def again(arguments: argparse.Namespace, number: int) -> str:
    command = f"python tests/fuzz.py --seed {arguments.seed} --case {number}"
    command += f" --engines {arguments.engines}" if arguments.engines else ""
    return command + (" --torch" if arguments.torch else "")


def use_many_threads() -> None:
    """Let calls use 4 threads on a machine with fewer CPUs too."""
    native = _loader.load_native()
    if native is not None:
        native.assume_cpus(4)


def run_one(arguments: argparse.Namespace, choices: list[_select.Choice]) -> int:
    faulthandler.enable()
    use_many_threads()
    case = make(arguments.seed, arguments.case)
    if not isinstance(case, CacheWalk):
        print(case.describe(), flush=True)
    found = list(case.run(choices))
    if isinstance(case, CacheWalk):  # its steps are drawn as it goes
        print(case.describe(), flush=True)
    for difference in found:
        print(f"{difference.what} | {difference.choice}: {difference.detail}")
    print("no difference" if not found else f"{len(found)} differences")
    return 1 if found else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--case", type=int, help="run this one alone, here, and print what it is")
    parser.add_argument(
        "--engines", default="", help="such as python,native-simd-avx2,native-auto-auto"
    )
    parser.add_argument("--chunk", type=int, default=1000, help="cases of one child process")
    parser.add_argument("--resume", help="file of counts and differences, to stop and continue")
    parser.add_argument("--corpus", help="folder of cases to run first, which new ones join")
    parser.add_argument("--seconds", type=float, help="start no more chunks after this time")
    parser.add_argument("--torch", action="store_true", help="judge by torch too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = set(filter(None, arguments.engines.split(","))) - set(map(label, all_choices()))
    if unknown:
        parser.error(f"no such engine here: {unknown}; there are {[*map(label, all_choices())]}")
    choices = chosen(arguments)
    if arguments.torch:
        import torch

        torch.set_num_threads(1)
        global judge_by_torch
        judge_by_torch = True
    if arguments.case is not None:
        return run_one(arguments, choices)
    if arguments.child:
        return child(arguments, choices)
    print("engines: " + ", ".join(map(label, choices)))
    return run_all(arguments)


if __name__ == "__main__":
    faulthandler.enable()
    sys.exit(main())
