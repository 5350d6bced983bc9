"""Rotary position embedding of queries and keys, with the usual ways to lengthen a context.

    Rotary(head_dim)(query, positions)     rotates (..., heads, length, head_dim) by its positions
    Rotary.from_config(config)             reads the keys of a model's config.json

A `Scaling` changes the frequencies for contexts that are longer than those of the training:

    LinearScaling     divides all frequencies
    NTKScaling        raises the base as the sequence grows ("dynamic")
    YaRNScaling       divides the low frequencies, keeps the high ones, enlarges the scores
    Llama3Scaling     divides the low frequencies, keeps the high ones

``help`` of each name has its parameters and an example.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ._dtypes import (
    ACCEPTED,
    BFLOAT16,
    BFLOAT16_BITS,
    FLOAT32,
    FLOAT64,
    SWAPPED,
    Array,
    bfloat16_bits,
    code_of,
    named,
    reals,
    result_dtype,
    uint16_hint,
)
from ._options import Ints
from ._problem.arguments import (
    as_array,
    flag,
    integer,
    integers,
    is_tensor,
    real,
    shown,
    wants_bf16_bits,
)
from ._problem.output import may_change, overlaps_itself, repeats, same_memory
from ._rotary_config import Keys
from ._rotary_scaling import LinearScaling, Llama3Scaling, NTKScaling, Scaling, YaRNScaling

__all__ = ["LinearScaling", "Llama3Scaling", "NTKScaling", "Rotary", "Scaling", "YaRNScaling"]

# Angles in float64 are off by at most 5e-7 up to this position (test_huge_positions).
LARGEST_POSITION = 1 << 31
BLOCK = 1 << 20  # bytes that are rotated at a time; benches/bench_rotary.py chose it
TABLE_BYTES = 1 << 25  # of the tables that a Rotary keeps
TABLES = 32  # that it keeps at most: those of so many threads at different positions

Table = tuple[Array, Array]  # cos and sin as `_table` lays them out; interleaved: e^(i angle) twice


class Rotary:
    r"""Rotate pairs of elements of queries and keys by angles that grow with the position.

    A pair :math:`(a, b)` at position :math:`m` becomes the real and the imaginary part of
    :math:`(a + ib)\, e^{i m \theta}`, with a frequency :math:`\theta` for each pair. The score of a
    query and a key then depends only on the difference of their positions.

    Parameters
    ----------
    head_dim : int
        The last axis of queries and keys.
    base : float
        Pair j of `dims` / 2 has the frequency ``base ** (-2 * j / dims)``; greater than 1.
    dims : int, optional
        How many elements of a head are rotated, from the first on; even. The others stay as they
        are. By default all.
    interleaved : bool
        Which elements form pair j: 2 j and 2 j + 1 if True, as in GPT-J and the paper; j and
        j + `dims` / 2 if False, as in Llama and GPT-NeoX.
    scaling : Scaling, optional
        What changes the frequencies for long contexts.

    Raises
    ------
    TypeError, ValueError
        An argument of the wrong kind or out of range.

    Notes
    -----
    Su et al., *RoFormer: Enhanced Transformer with Rotary Position Embedding* (2021), eq. 34.
    Angles, cosines and sines are computed in float64. A Rotary keeps the tables of the positions of
    its last calls, 32 MiB at most, so the layers of a decoder share them by sharing the Rotary.
    Threads may use one at the same time.

    Examples
    --------
    >>> import numpy as np
    >>> from qkv_fast.rotary import Rotary
    >>> rng = np.random.default_rng(0)
    >>> q, k = rng.standard_normal((2, 1, 4, 6, 8), np.float32)  # 4 heads, 6 tokens
    >>> rotary = Rotary(head_dim=8)
    >>> q_rotated, k_rotated = rotary(q), rotary(k)
    >>> moved = rotary(q, positions=100) @ rotary(k, positions=100).swapaxes(-1, -2)
    >>> bool(np.allclose(q_rotated @ k_rotated.swapaxes(-1, -2), moved, atol=1e-5))
    True
    >>> rotary
    Rotary(8)
    """

    def __init__(
        self,
        head_dim: int,
        *,
        base: float = 10000.0,
        dims: int | None = None,
        interleaved: bool = False,
        scaling: Scaling | None = None,
    ) -> None:
        self.head_dim = integer("head_dim", head_dim)
        rule = f"it must be even, and from 2 to head_dim, {self.head_dim}"
        name, given = ("head_dim", head_dim) if dims is None else ("dims", dims)
        if dims is None:
            rule = "all of it is rotated, so it must be even; dims= rotates the first elements only"
        self.dims = integer(name, given, 2, self.head_dim, rule=rule)
        if self.dims % 2:
            raise ValueError(f"{name} is {self.dims}: {rule}")
        self.base = real("base", base)
        if not 1 < self.base < math.inf:
            raise ValueError(f"base is {shown(base)}: it must be finite and greater than 1")
        self.interleaved = flag("interleaved", interleaved)
        if scaling is not None and not isinstance(scaling, Scaling):
            raise TypeError(
                f"scaling is {shown(scaling)}: it must be an instance of a Scaling, as "
                "LinearScaling(2) is, or None"
            )
        self.scaling = scaling
        self._fixed = self._frequencies_at(1)
        if self._fixed.shape != (self.dims // 2,):
            raise ValueError(
                f"scaling gives frequencies of shape {self._fixed.shape}: there must be one for "
                f"each of {self.dims // 2} pairs"
            )
        self._amplitude = 1.0 if scaling is None else scaling.amplitude
        # Oldest first. Never changed but replaced, so that threads need no lock.
        self._tables: dict[Any, Table] = {}

    def __call__(self, x: Any, positions: Ints = 0, *, out: Any = None, dtype: Any = None) -> Array:
        """Return queries or keys, rotated by their positions.

        Parameters
        ----------
        x : array, shape (..., heads, length, head_dim) or (length, head_dim)
            float32, float64, float16 or bfloat16, in any layout; a CPU tensor of torch too.
        positions : int, or ints of shape (..., length)
            An int is the position of the first row, which the others follow. An array holds the
            position of each row; its other axes broadcast to those of `x` before the heads. From
            -2**31 to 2**31; a negative position rotates backwards.
        out : array, optional
            Where to write the result: of the shape and dtype of `x`, in any layout. It may be `x`
            itself.
        dtype : "bfloat16", optional
            Take a uint16 array `x` as the bit patterns of bfloat16, and return such.

        Returns
        -------
        ndarray, shape and dtype of `x`
            Computed in float32, in float64 for float64; `out` if it is given. For bfloat16 tensors,
            bit patterns in uint16.

        Raises
        ------
        TypeError
            Other dtypes, or positions that are no ints.
        ValueError
            Shapes that don't fit, positions out of range, `out` that is read-only or shows some
            memory twice.

        Notes
        -----
        Whatever raises leaves `out` as it was. A row's result depends on its elements and position
        alone, except with `NTKScaling`.

        Examples
        --------
        >>> import numpy as np
        >>> from qkv_fast.rotary import Rotary
        >>> rotary = Rotary(2)  # one pair, which turns by 1 radian a position
        >>> x = np.array([[[1.0, 0.0], [1.0, 0.0]]])  # 1 head, 2 tokens
        >>> rotary(x, positions=1).round(3).tolist()
        [[[0.54, 0.841], [-0.416, 0.909]]]
        >>> rotary(x, positions=[7, 0], out=x) is x  # in place
        True
        >>> x.round(3).tolist()
        [[[0.754, 0.657], [1.0, 0.0]]]
        >>> rotary(x, positions=[-7, 0]).round(3).tolist()
        [[[1.0, 0.0], [1.0, 0.0]]]
        """
        uint16_is_bf16 = dtype is not None and wants_bf16_bits(dtype)
        array: Array = x if type(x) is np.ndarray else as_array("x", x)
        code = code_of(array.dtype, uint16_is_bf16)
        if code < 0:
            raise TypeError(
                f"x has dtype {named(array.dtype)}: it must be {ACCEPTED}{uint16_hint(array.dtype)}"
            )
        if array.ndim < 2 or array.shape[-1] != self.head_dim:
            raise ValueError(
                f"x has shape {array.shape}: it must be (..., heads, length, head_dim), and "
                f"head_dim is {self.head_dim}"
            )
        length = array.shape[-2]
        if isinstance(positions, np.integer):
            positions = int(positions)
        if type(positions) is int and 0 <= positions <= LARGEST_POSITION - length:
            where: int | Array = positions
        else:
            where = _where(positions, array.shape[:-3], length)
        if out is None:
            target: Array = _new_like(array)
            result = target
        else:
            target, array = _given(out, array, code, uint16_is_bf16)
            result = out
        if array.size:
            with np.errstate(all="ignore"):
                self._rotate_all(array, code, where, target)
        return result

    def frequencies(self, length: int = 1) -> Array:
        """Return the angle from one position to the next, in radians, of each pair.

        Parameters
        ----------
        length : int
            The highest position of a call, plus 1; only `NTKScaling` depends on it.

        Returns
        -------
        ndarray, shape (dims / 2,), float64

        Examples
        --------
        >>> from qkv_fast.rotary import Rotary
        >>> Rotary(4, base=100).frequencies().tolist()
        [1.0, 0.1]
        """
        return self._frequencies_at(integer("length", length)).copy()

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        *,
        layer_type: str | None = None,
        interleaved: bool = False,
    ) -> Rotary:
        """Return the Rotary that a model's configuration describes.

        Parameters
        ----------
        config : mapping
            The contents of a config.json of Transformers, 4 or 5. Read are `rope_parameters`, or
            `rope_scaling` and `rope_theta`; `partial_rotary_factor`; `head_dim`, or `hidden_size`
            and `num_attention_heads`; `max_position_embeddings` and
            `original_max_position_embeddings`. GPT-NeoX's `rotary_pct` and `rotary_emb_base` are
            read too. The types of scaling are default, linear, dynamic, yarn and llama3.
        layer_type : str, optional
            Which of the `rope_parameters`, if the config has them for each type of layer.
        interleaved : bool
            As in `Rotary`. A config does not tell it: True for GPT-J, CodeGen, Cohere and GLM.

        Raises
        ------
        TypeError, ValueError
            A key that is missing or has a value of the wrong kind; a type of scaling that is not
            supported, such as longrope.

        Examples
        --------
        >>> import json
        >>> from qkv_fast.rotary import Rotary
        >>> config = json.loads('''{
        ...     "hidden_size": 4096, "num_attention_heads": 32, "rope_theta": 500000.0,
        ...     "rope_scaling": {"rope_type": "linear", "factor": 2.0}}''')
        >>> Rotary.from_config(config)
        Rotary(128, base=500000.0, scaling=LinearScaling(factor=2.0))
        """
        if not isinstance(config, Mapping):
            raise TypeError(
                f"config is a {type(config).__name__}: it must be a mapping, as "
                "config.to_dict() of Transformers gives"
            )
        keys = Keys(config, layer_type)
        head_dim = keys.get("head_dim")
        if head_dim is None:
            heads = integer("config['num_attention_heads']", keys.need("num_attention_heads"))
            head_dim = integer("config['hidden_size']", keys.need("hidden_size")) // heads
        head_dim = integer("config['head_dim']", head_dim)
        name = "rotary_pct" if keys.get("rotary_pct") is not None else "partial_rotary_factor"
        share = real(f"config['{name}']", keys.get(name, 1.0))
        if not 0 < share <= 1:
            raise ValueError(f"config['{name}'] is {share}: it must be above 0 and at most 1")
        return cls(
            head_dim,
            base=keys.get("rope_theta", keys.get("rotary_emb_base", 10000.0)),
            dims=int(head_dim * share),
            interleaved=interleaved,
            scaling=keys.scaling(),
        )

    def __repr__(self) -> str:
        given = self._arguments()
        return f"Rotary({', '.join([str(self.head_dim), *(f'{k}={given[k]!r}' for k in given)])})"

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(type(self), **self._arguments()), (self.head_dim,)

    def _arguments(self) -> dict[str, Any]:
        """Return the keyword arguments that differ from their defaults."""
        defaults = {"base": 10000.0, "dims": self.head_dim, "interleaved": False, "scaling": None}
        return {name: getattr(self, name) for name in defaults
                if getattr(self, name) != defaults[name]}  # fmt: skip

    def _frequencies_at(self, length: int) -> Array:
        scaling = Scaling() if self.scaling is None else self.scaling
        return np.asarray(scaling.frequencies(self.dims, self.base, length), np.float64)

    def _rotate_all(self, x: Array, code: int, where: int | Array, out: Array) -> None:
        """Rotate x into out, in blocks that fit into a cache."""
        dims = self.dims
        if dims < self.head_dim:
            if out is not x:
                out[..., dims:] = x[..., dims:]
            x, out = x[..., :dims], out[..., :dims]
        wide = code & ~SWAPPED == FLOAT64
        direct = _is_direct(x, code) and _is_direct(out, code_of(out.dtype))
        in_one = direct and self.interleaved  # needs no memory but that of x and out
        for span, table in self._spans(x.shape, where, wide):
            rows, to = (x, out) if span is None else (x[..., span, :], out[..., span, :])
            if in_one or rows.size * (8 if wide else 4) <= BLOCK:
                self._rotate_block(rows, code, table, to, direct)
                continue
            cos, sin = table
            heads = rows.shape[:-1] if self.interleaved else rows.shape[:-2]
            cos = np.broadcast_to(cos, (*rows.shape[:-1], cos.shape[-1]))
            sin = np.broadcast_to(sin, (*heads, *sin.shape[-1 if self.interleaved else -3 :]))
            for i in _blocks(rows.shape, BLOCK // (8 if wide else 4)):
                self._rotate_block(rows[i], code, (cos[i], sin[i]), to[i], direct)

    def _rotate_block(self, x: Array, code: int, table: Table, out: Array, direct: bool) -> None:
        if direct:
            self._rotate(x, table, out)
            return
        given = reals(x, code, np.float64 if code & ~SWAPPED == FLOAT64 else np.float32)
        rotated = np.empty(x.shape, given.dtype)
        self._rotate(np.ascontiguousarray(given), table, rotated)
        if code & ~SWAPPED == BFLOAT16:
            out.view(out.dtype.str.replace("V", "u"))[...] = bfloat16_bits(rotated)
        else:
            out[...] = rotated

    def _rotate(self, x: Array, table: Table, out: Array) -> None:
        """Rotate (..., length, dims) of real numbers; out may be x."""
        cos, sin = table
        if self.interleaved:
            np.multiply(x.view(cos.dtype), cos, out.view(cos.dtype))
            return
        # (a, b) -> (a cos - b sin, b cos + a sin), a and b being halves of a row
        halves = (*x.shape[:-1], 2, self.dims // 2)
        across = x.reshape(halves)[..., ::-1, :] * sin
        np.multiply(x, cos, out)
        out = out.reshape(halves)
        np.add(out, across, out)

    def _spans(
        self, shape: tuple[int, ...], where: int | Array, wide: bool
    ) -> Iterator[tuple[slice | None, Table]]:
        """Yield parts of the length with their tables; None is all of it, whose table is kept."""
        length = shape[-2]
        if isinstance(where, int):
            key: tuple[Any, ...] = (where, length, wide)
        else:
            key = (where.shape, where.tobytes(), wide)
        table = self._tables.get(key)
        if table is not None:
            yield None, table
            return
        entries = 1 if isinstance(where, int) else where.size // length
        row = entries * self.dims * (16 if wide else 8)
        if isinstance(where, int):
            where = np.arange(where, where + length)
        top = int(where.max()) + 1
        if row * length + where.nbytes <= TABLE_BYTES:
            table = self._table(where, top, wide)
            self._keep(key, table)
            yield None, table
            return
        step = max(1, TABLE_BYTES // row)
        for start in range(0, length, step):
            span = slice(start, start + step)
            yield span, self._table(where[..., span], top, wide)

    def _table(self, positions: Array, top: int, wide: bool) -> Table:
        """Return cos and sin of the angles of positions (*batch, length).

        Halves: cos (*batch, 1, length, dims) holds each cosine twice, for a row as it is; sin
        (*batch, 1, length, 2, dims / 2) holds -sin and sin, for a row whose halves are swapped.
        Interleaved: both are cos + i sin, (*batch, 1, length, dims / 2). Without batch axes, (1,)
        for the heads is left out.
        """
        scaling = self.scaling
        depends = scaling is not None and scaling.depends_on_length
        frequencies = self._frequencies_at(max(top, 1)) if depends else self._fixed
        if positions.ndim > 1:
            positions = positions[..., np.newaxis, :]
        angles = positions[..., np.newaxis] * frequencies
        cos, sin = np.cos(angles), np.sin(angles)
        if self._amplitude != 1:
            cos *= self._amplitude
            sin *= self._amplitude
        if self.interleaved:
            turn: Array = np.empty(angles.shape, np.complex128 if wide else np.complex64)
            turn.real, turn.imag = cos, sin
            return turn, turn
        pairs = (*angles.shape[:-1], 2, angles.shape[-1])
        both: Array = np.empty(pairs, np.float64 if wide else np.float32)
        signed: Array = np.empty_like(both)
        both[...] = cos[..., np.newaxis, :]
        signed[..., 1, :] = sin
        np.negative(sin, signed[..., 0, :], casting="same_kind")
        return both.reshape(*angles.shape[:-1], self.dims), signed

    def _keep(self, key: tuple[Any, ...], table: Table) -> None:
        """Put a table in front of those that are kept, and drop the oldest ones."""
        kept = {key: table}
        size = _table_bytes(key, table)
        for old, other in reversed(self._tables.items()):
            size += _table_bytes(old, other)
            if size > TABLE_BYTES or len(kept) == TABLES:
                break
            kept[old] = other
        self._tables = dict(reversed(kept.items()))


def _where(given: Any, batch: tuple[int, ...], length: int) -> int | Array:
    """Return the position of the first row, or an array (..., length) of all, in few axes."""
    what = "an int, or ints of shape (..., length)"
    rule = f"positions must be from {-LARGEST_POSITION} to {LARGEST_POSITION}"
    array = integers("positions", given, what, -LARGEST_POSITION, LARGEST_POSITION, rule)
    if array.ndim == 0:
        first = int(array)
        if first + length - 1 > LARGEST_POSITION:
            raise ValueError(
                f"positions is {first}, so the last of {length} rows is at {first + length - 1}: "
                f"{rule}"
            )
        return first
    if array.shape[-1] != length:
        raise ValueError(
            f"positions has shape {array.shape}: its last axis must have a position for each of "
            f"the {length} rows of x"
        )
    try:
        fits = np.broadcast_shapes(array.shape[:-1], batch) == batch
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"positions has shape {array.shape}: it must broadcast to the axes of x before the "
            f"heads, and the length = {(*batch, length)}"
        )
    return array


def _new_like(x: Array) -> Array:
    """Return a new array, laid out in memory as x is."""
    dtype = result_dtype(x.dtype)
    return np.empty(x.shape, dtype) if repeats(x) else np.empty_like(x, dtype)


def _given(out: Any, x: Array, code: int, uint16_is_bf16: bool) -> tuple[Array, Array]:
    """Check the caller's `out`; return it, and x or a copy that writing there does not change."""
    array: Array = out
    if type(out) is not np.ndarray:
        known = is_tensor(out) or isinstance(out, np.ndarray)
        if not known or isinstance(out, np.ma.MaskedArray):
            raise TypeError(f"out must be a NumPy array or a tensor, not {type(out).__name__}")
        array = as_array("out", out, in_place=True)
    if array.shape != x.shape:
        raise ValueError(f"out has shape {array.shape}: it must be that of x, {x.shape}")
    uint16_is_bf16 = uint16_is_bf16 or x.dtype.num == BFLOAT16_BITS.num
    if code_of(array.dtype, uint16_is_bf16) & ~SWAPPED != code & ~SWAPPED:
        raise TypeError(
            f"out has dtype {named(array.dtype)}: it must be that of x, {named(x.dtype)}"
        )
    if not array.flags.writeable:
        raise ValueError("out is read-only")
    if array.size and (repeats(array) or overlaps_itself(array)):
        raise ValueError("out shows some of its memory more than once")
    if array is x or not np.may_share_memory(array, x):
        return array, x
    if same_memory(array, x):
        return array, array
    return array, x.copy() if may_change(array, x) else x


def _is_direct(array: Array, code: int) -> bool:
    """Return whether an array can be rotated, or rotated into, where it is."""
    return code in (FLOAT32, FLOAT64) and array.strides[-1] == array.itemsize


def _blocks(shape: tuple[int, ...], size: int) -> Iterator[tuple[Any, ...]]:
    """Yield indices of blocks of (*batch, heads, length, dims), of about `size` elements."""
    *batch, length, dims = shape
    heads = batch.pop() if batch else 1
    entry = heads * length * dims
    lead = (slice(None),) if len(shape) > 2 else ()
    if entry < size and batch:  # several entries along the last batch axis
        step = size // entry
        for index in np.ndindex(*batch[:-1]):
            for start in range(0, batch[-1], step):
                yield (*index, slice(start, start + step))
        return
    step = max(1, size // (heads * dims))
    for index in np.ndindex(*batch):
        for start in range(0, length, step):
            yield (*index, *lead, slice(start, start + step))


def _table_bytes(key: tuple[Any, ...], table: Table) -> int:
    positions = key[1]
    extra = len(positions) if isinstance(positions, bytes) else 0
    return table[0].nbytes + (0 if table[1] is table[0] else table[1].nbytes) + extra


for _name in __all__:  # help, reprs and pickles then name this module
    globals()[_name].__module__ = __name__
