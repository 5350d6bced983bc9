"""Scalings of rotary embeddings: what changes the frequencies for long contexts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ._dtypes import Array
from ._problem.arguments import flag, integer, real, shown


def default_frequencies(dims: int, base: float) -> Array:
    exponents: Array = np.arange(0, dims, 2, dtype=np.float64) / dims
    return float(base) ** -exponents


def positive(name: str, given: Any) -> float:
    number = real(name, given)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} is {shown(given)}: it must be finite and greater than 0")
    return number


@dataclass(frozen=True)
class Scaling:
    """The base class of scalings, which give a `Rotary` its frequencies.

    A class of yours derives from it and overrides `frequencies`. Instances must not change.

    Attributes
    ----------
    depends_on_length : bool
        Whether `frequencies` uses `length`; False means that it is called once.

    Examples
    --------
    >>> import numpy as np
    >>> from qkv_fast.rotary import Rotary, Scaling
    >>> class FirstTwo(Scaling):  # only the first two pairs turn
    ...     def frequencies(self, dims, base, length):
    ...         return super().frequencies(dims, base, length) * (np.arange(dims // 2) < 2)
    >>> Rotary(8, base=100, scaling=FirstTwo()).frequencies().round(3).tolist()
    [1.0, 0.316, 0.0, 0.0]
    """

    depends_on_length: ClassVar[bool] = False

    def frequencies(self, dims: int, base: float, length: int) -> Array:
        """Return the angle from one position to the next, in radians, of each pair of elements.

        Parameters
        ----------
        dims : int
            How many elements of a head are rotated.
        base : float
            Of the frequencies: without scaling, pair i has ``base ** (-2 * i / dims)``.
        length : int
            The highest position of the call, plus 1.

        Returns
        -------
        ndarray, shape (dims / 2,), float64
        """
        return default_frequencies(dims, base)

    @property
    def amplitude(self) -> float:
        """The factor of all cosines and sines, 1 by default."""
        return 1.0


@dataclass(frozen=True)
class LinearScaling(Scaling):
    """Divide all frequencies by `factor`, as if the positions were that much closer.

    Chen et al., *Extending Context Window of Large Language Models via Positional Interpolation*
    (2023), eq. 4. ``"linear"`` in Transformers.

    Parameters
    ----------
    factor : float
        The longer context over that of the training.

    Examples
    --------
    >>> from qkv_fast.rotary import LinearScaling, Rotary
    >>> Rotary(4, base=100, scaling=LinearScaling(2)).frequencies().tolist()
    [0.5, 0.05]
    """

    factor: float

    def __post_init__(self) -> None:
        positive("factor", self.factor)

    def frequencies(self, dims: int, base: float, length: int) -> Array:
        """Return the frequencies as `Scaling.frequencies` says."""
        return default_frequencies(dims, base) / self.factor


@dataclass(frozen=True)
class NTKScaling(Scaling):
    r"""Raise the base once the sequence is longer than `original_context`.

    With length :math:`L` and context :math:`C` the base is multiplied by
    :math:`(\mathrm{factor} \cdot L / C - \mathrm{factor} + 1)^{d / (d - 2)}`, d being `dims`. It is
    the NTK-aware interpolation of Peng et al., *YaRN* (2023), section 3.1, with a scale that grows
    with the length (appendix B.2). ``"dynamic"`` in Transformers.

    Parameters
    ----------
    factor : float
    original_context : int
        The number of positions that the model was trained with.

    Notes
    -----
    The length is the highest position of the call plus 1, over the whole batch, and no call
    influences another. Keys that were rotated in earlier calls, as in a cache, keep the
    frequencies of these. Transformers differs in one point: after a sequence of one length it uses
    that length for shorter ones too, as long as they exceed the original context.

    Examples
    --------
    >>> from qkv_fast.rotary import NTKScaling, Rotary
    >>> rotary = Rotary(4, base=100, scaling=NTKScaling(2, original_context=1000))
    >>> [round(float(rotary.frequencies(length)[1]), 4) for length in (1, 1000, 1500, 4000)]
    [0.1, 0.1, 0.05, 0.0143]
    """

    factor: float
    original_context: int
    depends_on_length: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive("factor", self.factor)
        integer("original_context", self.original_context)

    def frequencies(self, dims: int, base: float, length: int) -> Array:
        """Return the frequencies as `Scaling.frequencies` says."""
        if length > self.original_context and dims > 2:  # a single pair has frequency 1 anyway
            growth = self.factor * length / self.original_context - (self.factor - 1)
            base *= growth ** (dims / (dims - 2))
        return default_frequencies(dims, base)


@dataclass(frozen=True)
class YaRNScaling(Scaling):
    r"""Divide low frequencies by `factor`, keep high ones, and enlarge cosines and sines.

    Peng et al., *YaRN: Efficient Context Window Extension of Large Language Models* (2023),
    section 3.2 and eq. 21-22. ``"yarn"`` in Transformers.

    Parameters
    ----------
    factor : float
        The longer context over that of the training.
    original_context : int
        The number of positions that the model was trained with.
    beta_fast, beta_slow : float
        Pairs that turn more than `beta_fast` times within the original context keep their
        frequency, those that turn less than `beta_slow` times have it divided. Between the two, the
        share of the divided frequency rises linearly with the pair's number.
    attention_factor : float, optional
        The factor of all cosines and sines; scores grow with its square. By default
        ``0.1 * log(factor) + 1``, or 1 for a `factor` of at most 1.
    mscale, mscale_all_dim : float, optional
        If both are given and not 0, the default is
        ``(0.1 * mscale * log(factor) + 1) / (0.1 * mscale_all_dim * log(factor) + 1)``.
    truncate : bool
        Round the numbers of the two pairs that bound the ramp, away from it.

    Examples
    --------
    >>> from qkv_fast.rotary import Rotary, YaRNScaling
    >>> scaling = YaRNScaling(4, original_context=32768)
    >>> round(scaling.amplitude, 4)
    1.1386
    >>> plain, scaled = Rotary(128).frequencies(), Rotary(128, scaling=scaling).frequencies()
    >>> (plain / scaled)[[0, 40, 63]].round(3).tolist()
    [1.0, 1.176, 4.0]
    """

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        positive("factor", self.factor)
        integer("original_context", self.original_context)
        fast, slow = positive("beta_fast", self.beta_fast), positive("beta_slow", self.beta_slow)
        if fast < slow:
            raise ValueError(f"beta_fast is {fast}: it must be at least beta_slow, {slow}")
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            given = getattr(self, name)
            if given is not None and not math.isfinite(real(name, given)):
                raise ValueError(f"{name} is {given}: it must be finite")
        flag("truncate", self.truncate)

    def frequencies(self, dims: int, base: float, length: int) -> Array:
        """Return the frequencies as `Scaling.frequencies` says."""
        pairs_per_log = dims / (2 * math.log(base))

        def pair_that_turns(times: float) -> float:
            return pairs_per_log * math.log(self.original_context / (2 * math.pi * times))

        first, last = pair_that_turns(self.beta_fast), pair_that_turns(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dims - 1)
        width = last - first or 0.001  # a step, if both are the same pair
        divided: Array = np.clip((np.arange(dims // 2) - first) / width, 0, 1)
        plain = default_frequencies(dims, base)
        scaled: Array = plain * (divided / self.factor + (1 - divided))
        return scaled

    @property
    def amplitude(self) -> float:
        """The factor of all cosines and sines."""
        if self.attention_factor is not None:
            return float(self.attention_factor)
        growth = 0.1 * math.log(max(self.factor, 1))
        if self.mscale and self.mscale_all_dim:
            return (growth * self.mscale + 1) / (growth * self.mscale_all_dim + 1)
        return growth + 1


@dataclass(frozen=True)
class Llama3Scaling(Scaling):
    """Divide low frequencies by `factor` and keep high ones, as Llama 3.1 does.

    ``"llama3"`` in Transformers; the scheme comes with the weights of Grattafiori et al., *The
    Llama 3 Herd of Models* (2024).

    Parameters
    ----------
    factor : float
        The divisor of low frequencies.
    low_freq_factor, high_freq_factor : float
        Pairs that turn more than `high_freq_factor` times within the original context keep their
        frequency, those that turn less than `low_freq_factor` times have it divided. Between the
        two, the share of the divided frequency falls linearly with the number of turns.
    original_context : int
        The number of positions that the model was trained with.

    Examples
    --------
    >>> from qkv_fast.rotary import Llama3Scaling, Rotary
    >>> scaling = Llama3Scaling(8, 1, 4, original_context=8192)
    >>> plain = Rotary(128, base=500000).frequencies()
    >>> (plain / Rotary(128, base=500000, scaling=scaling).frequencies())[[0, 32, 63]].round(3)
    array([1.   , 2.695, 8.   ])
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int

    def __post_init__(self) -> None:
        positive("factor", self.factor)
        low = positive("low_freq_factor", self.low_freq_factor)
        high = positive("high_freq_factor", self.high_freq_factor)
        integer("original_context", self.original_context)
        if low >= high:
            raise ValueError(f"low_freq_factor is {low}: it must be below high_freq_factor, {high}")

    def frequencies(self, dims: int, base: float, length: int) -> Array:
        """Return the frequencies as `Scaling.frequencies` says."""
        plain = default_frequencies(dims, base)
        turns = self.original_context * plain / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        kept: Array = np.clip((turns - self.low_freq_factor) / span, 0, 1)
        scaled: Array = plain * (kept + (1 - kept) / self.factor)
        return scaled
