"""Llama-style decoders in NumPy, with their tokenizers. Import it by name.

    Decoder.from_gguf(find_smollm2())          SmolLM2-135M, from its package
    Decoder.from_state_dict(state, config)     weights by their names in Transformers
    Decoder.random(config)                     random weights, to try it out
    decoder(ids, caches)                       logits of the token that follows
    decoder.stream(ids, count)                 new tokens one by one
    Tokenizer.from_gguf(path)                  text to ids and back

A decoder is Llama's: RMSNorm, `MultiHeadAttention` with rotary positions and grouped heads, a gated
MLP. ``help`` of each name has its parameters and an example.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, NamedTuple

import numpy as np

from ._dtypes import CODES, FLOAT32, FLOAT64, SWAPPED, Array, code_of, reals
from ._gguf import Tokenizer, find_smollm2, open_gguf, read_model
from ._kv_cache import KVCache
from ._layer import MultiHeadAttention
from ._layer_call import restored
from ._layer_weights import readable, weight_code
from ._linear import linear
from ._llama import SMALL, Config, random_state
from ._norm import rms_norm
from ._options import Ints
from ._problem.arguments import as_array, flag, integer, integers, real

__all__ = ["Decoder", "DecoderLayer", "Tokenizer", "find_smollm2", "open_gguf"]

# Tokens whose hidden vectors of the MLP are computed at a time. From 128 to 1024 a prefill of
# SmolLM2 in float32 takes the same time within 5 %.
MLP_ROWS = 512


class DecoderLayer(NamedTuple):
    """The weights of a layer; norms are reals, matrices of the decoder's element type."""

    attention_norm: Array
    attention: MultiHeadAttention
    mlp_norm: Array
    gate_up: Array  # the rows of the gate, then those of what it gates
    gate_up_bias: Array | None
    down: Array
    down_bias: Array | None
    window: tuple[int, int] | None


class Decoder:
    r"""A Llama-style language model: token ids in, logits of the next token out.

    Each layer adds to the token vectors x

    .. math::
        \mathrm{attention}(\mathrm{norm}(x)) \quad\text{and then}\quad
        W_{down} (\mathrm{silu}(W_{gate}\, y) \odot W_{up}\, y), \; y = \mathrm{norm}(x),

    where norm divides by the root of the mean square (Zhang and Sennrich 2019), the MLP is SwiGLU
    (Shazeer 2020), heads share keys in groups (Ainslie et al. 2023) and positions are rotary (Su et
    al. 2021): Touvron et al., *LLaMA* (2023), section 2.2.

    Make one by `from_gguf`, `from_state_dict` or `random`.

    Attributes
    ----------
    layers : tuple
        The weights of each layer.
    embedding : ndarray, shape (vocab_size, hidden_size)
    output : ndarray, shape (vocab_size, hidden_size)
        What gives the logits: `embedding` itself where the two are tied.
    norm : ndarray, shape (hidden_size,)
        Of the last norm.
    rotary : Rotary
    config : mapping
        As it was given.

    Notes
    -----
    Weights in float16 or bfloat16 take half the memory, and as decoding reads them all for each
    token, about half its time; the arithmetic is in float32. Weights in float64 are computed in
    float64.

    Examples
    --------
    >>> from qkv_fast.decoder import Decoder
    >>> decoder = Decoder.random(rng=0)
    >>> decoder
    <Decoder layers=2, hidden_size=64, vocab_size=256, dtype=float32, weights=106816>
    >>> decoder([3, 1, 4]).shape
    (256,)
    >>> list(decoder.stream([3, 1, 4], 5))
    [220, 183, 204, 216, 125]

    With caches, the tokens of a call continue those of the calls before:

    >>> caches = decoder.new_caches(100)
    >>> logits = decoder([3, 1], caches)
    >>> bool(abs(decoder([4], caches) - decoder([3, 1, 4])).max() < 1e-4)
    True
    """

    def __init__(self, state: Mapping[str, Any], config: Any, *, dtype: Any = None) -> None:
        c = Config.of(config)
        self.config, self.rotary, self._epsilon = c.given, c.rotary, c.epsilon
        body = "model." if "model.embed_tokens.weight" in state else ""
        weights = _Weights(state, f"{body}embed_tokens.weight", dtype)
        self._code, self._real = weights.code, weights.real
        self.embedding = weights.matrix(f"{body}embed_tokens.weight", c.vocab, c.hidden)
        self.output = self.embedding
        if not c.tied:
            self.output = weights.matrix("lm_head.weight", c.vocab, c.hidden)
        self.norm = weights.vector(f"{body}norm.weight", c.hidden)
        layers = []
        for i in range(c.layers):
            at = f"{body}layers.{i}."
            attention = weights.attention(f"{at}self_attn", c)
            gate, up = (weights.matrix(f"{at}mlp.{part}_proj.weight", c.inner, c.hidden)
                        for part in ("gate", "up"))  # fmt: skip
            biases = [f"{at}mlp.{part}_proj.bias" for part in ("gate", "up", "down")]
            gate_up_bias = down_bias = None
            if biases[0] in state:
                gate_up_bias = np.concatenate([weights.vector(b, c.inner) for b in biases[:2]])
                down_bias = weights.vector(biases[2], c.hidden)
            layers.append(DecoderLayer(
                weights.vector(f"{at}input_layernorm.weight", c.hidden), attention,
                weights.vector(f"{at}post_attention_layernorm.weight", c.hidden),
                np.concatenate([gate, up]), gate_up_bias,
                weights.matrix(f"{at}mlp.down_proj.weight", c.hidden, c.inner), down_bias,
                c.windows[i],
            ))  # fmt: skip
        self.layers = tuple(layers)
        weights.check_all_used()

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Any], config: Any, *, dtype: Any = None
    ) -> Decoder:
        """Return the decoder of weights that have the names of Transformers' Llama.

        Parameters
        ----------
        state : mapping of str to array
            Arrays or tensors of torch, as ``model.state_dict()`` gives, with or without "model."
            before the names of the body.
        config : mapping or config of Transformers
            What config.json holds. The model types llama, mistral, qwen2 and qwen3 are known.
        dtype : {"float32", "float64", "float16", "bfloat16"} or dtype of NumPy or torch, optional
            Of the matrices; that of the embedding by default. Norms are float32, or float64.

        Returns
        -------
        Decoder
            Matrices are shared with the state where they have the dtype and lie in rows, but
            those of query, key and value, and those of the gate and what it gates, are joined.

        Raises
        ------
        TypeError, ValueError
            Weights that are missing, unknown or don't fit; a config that isn't supported.

        Examples
        --------
        >>> import numpy as np
        >>> from qkv_fast.decoder import Decoder
        >>> at = "model.layers.0."
        >>> shapes = {"model.embed_tokens": (50, 8), "model.norm": 8, f"{at}input_layernorm": 8,
        ...           f"{at}post_attention_layernorm": 8, f"{at}mlp.down_proj": (8, 16)}
        >>> shapes |= {f"{at}self_attn.{part}_proj": (8, 8) for part in "qkvo"}
        >>> shapes |= {f"{at}mlp.{part}_proj": (16, 8) for part in ("gate", "up")}
        >>> state = {f"{name}.weight": np.ones(shape, "f4") for name, shape in shapes.items()}
        >>> Decoder.from_state_dict(state, {
        ...     "vocab_size": 50, "hidden_size": 8, "intermediate_size": 16,
        ...     "num_hidden_layers": 1, "num_attention_heads": 2, "tie_word_embeddings": True})
        <Decoder layers=1, hidden_size=8, vocab_size=50, dtype=float32, weights=1064>

        Of a model of Transformers: ``Decoder.from_state_dict(model.state_dict(), model.config)``.
        """
        return cls(state, config, dtype=dtype)

    @classmethod
    def from_gguf(cls, path: str | PathLike[str] | Any, *, dtype: Any = "float32") -> Decoder:
        """Return the decoder of a GGUF file, quantised or not. Needs the package gguf.

        Parameters
        ----------
        path : path or gguf.GGUFReader
        dtype : {"float32", "float64", "float16", "bfloat16"} or dtype of NumPy or torch
            Of the matrices, which are dequantised once, here.

        Raises
        ------
        ImportError
            If gguf is missing.
        ValueError
            Another architecture than llama, qwen2 and qwen3, or options that aren't supported.

        See Also
        --------
        find_smollm2 : has an example.
        """
        state, config = read_model(path)
        return cls(state, config, dtype=dtype)

    @classmethod
    def random(
        cls,
        config: Mapping[str, Any] | None = None,
        *,
        rng: int | np.random.Generator | None = None,
        dtype: Any = "float32",
    ) -> Decoder:
        """Return a decoder with random weights, whose text means nothing.

        Parameters
        ----------
        config : mapping, optional
            Keys as in `from_state_dict`, which replace those of a small default.
        rng : int or numpy.random.Generator, optional
        dtype
            Of the matrices, as in `from_state_dict`.

        Examples
        --------
        >>> from qkv_fast.decoder import Decoder
        >>> Decoder.random({"num_hidden_layers": 1, "vocab_size": 100}, rng=0)
        <Decoder layers=1, hidden_size=64, vocab_size=100, dtype=float32, weights=49856>
        """
        full = SMALL | dict(config or {})
        return cls(random_state(full, rng), full, dtype=dtype)

    def __repr__(self) -> str:
        vocab, hidden = self.embedding.shape
        name = next(name for name, code in CODES.items() if code == self._code)
        count = sum(array.size for array in self._arrays())
        return (f"<Decoder layers={len(self.layers)}, hidden_size={hidden}, vocab_size={vocab}, "
                f"dtype={name}, weights={count}>")  # fmt: skip

    def _arrays(self) -> Iterator[Array]:
        yield from (self.embedding, self.norm)
        if self.output is not self.embedding:
            yield self.output
        for layer in self.layers:
            yield from layer.attention.state_dict().values()
            yield from (part for part in layer if isinstance(part, np.ndarray))

    @property
    def nbytes(self) -> int:
        """The memory of all weights, which decoding a token reads."""
        return sum(array.nbytes for array in self._arrays())

    # --- The model --------------------------------------------------------------------------------

    def new_caches(self, capacity: int, batch: int = 1, **options: Any) -> list[KVCache]:
        """Return an empty cache for each layer.

        Parameters
        ----------
        capacity : int
            Tokens that a sequence can have.
        batch : int
        **options
            dtype, page_size and num_pages, as in `KVCache`.
        """
        return [layer.attention.new_cache(batch, capacity, **options) for layer in self.layers]

    def __call__(
        self,
        ids: Ints,
        caches: Sequence[KVCache] | None = None,
        *,
        all_tokens: bool = False,
        num_threads: int | None = None,
    ) -> Array:
        """Compute the logits of what follows.

        Parameters
        ----------
        ids : ints, shape (length,) or (batch, length)
            Tokens, the whole sequences without caches.
        caches : sequence of KVCache, optional
            Of `new_caches`. The tokens continue those that they have, and are added to them.
        all_tokens : bool
            Return the logits after each token, not only after the last.
        num_threads : int, optional
            As in `scaled_dot_product_attention`.

        Returns
        -------
        ndarray of float32 or float64, shape (vocab_size,) or (batch, vocab_size)
            With `all_tokens`, (length, vocab_size) or (batch, length, vocab_size).

        Raises
        ------
        TypeError, ValueError
            Ids of the wrong kind, shape or range; caches that don't fit or are full. They are left
            as they were.
        """
        rows = self._checked(ids)
        batch = rows.reshape(-1, rows.shape[-1])
        all_tokens = flag("all_tokens", all_tokens)
        if caches is not None and len(caches) != len(self.layers):
            raise ValueError(f"caches has length {len(caches)}: it must be {len(self.layers)}, "
                             "one for each layer")  # fmt: skip
        x: Array = reals(self.embedding[batch], self._code, self._real)
        with np.errstate(over="ignore", under="ignore"), restored(caches or ()):
            for i, layer in enumerate(self.layers):
                y = rms_norm(x, layer.attention_norm, self._epsilon)
                x += layer.attention(
                    y, is_causal=True, cache=None if caches is None else caches[i],
                    rotary=self.rotary, window=layer.window, out=y, num_threads=num_threads,
                )  # fmt: skip
                if i == len(self.layers) - 1 and not all_tokens:
                    x = np.ascontiguousarray(x[:, -1:])
                self._add_mlp(x.reshape(-1, x.shape[-1]), layer, num_threads)
            x = rms_norm(x, self.norm, self._epsilon)
            logits = self._product(x.reshape(-1, x.shape[-1]), self.output, None, num_threads)
        shape = rows.shape if all_tokens else rows.shape[:-1]
        return logits.reshape(*shape, -1)

    def _checked(self, ids: Ints) -> Array:
        most = len(self.embedding) - 1
        what = "ints of shape (length,) or (batch, length)"
        rows = integers("ids", ids, what, 0, most, f"each must be from 0 to {most}")
        if rows.ndim not in (1, 2) or not rows.size:
            raise ValueError(
                f"ids has shape {rows.shape}: it must be (length,) or (batch, length), with tokens"
            )
        return rows

    def _product(
        self, x: Array, weight: Array, bias: Array | None, num_threads: int | None
    ) -> Array:
        y: Array = np.empty((len(x), len(weight)), self._real)
        linear(x, weight, self._code, bias, y, num_threads)
        return y

    def _add_mlp(self, x: Array, layer: DecoderLayer, num_threads: int | None) -> None:
        """X += W_down (silu(W_gate y) * (W_up y)), where y = norm(x); in blocks of rows."""
        for begin in range(0, len(x), MLP_ROWS):
            rows = x[begin : begin + MLP_ROWS]
            y = rms_norm(rows, layer.mlp_norm, self._epsilon)
            both = self._product(y, layer.gate_up, layer.gate_up_bias, num_threads)
            gate, up = both.reshape(len(rows), 2, -1).swapaxes(0, 1)
            inner = np.exp(-gate)
            inner += 1
            np.divide(gate, inner, inner)
            inner *= up
            rows += self._product(inner, layer.down, layer.down_bias, num_threads)

    # --- Token by token ---------------------------------------------------------------------------

    def stream(
        self,
        ids: Ints,
        count: int,
        *,
        temperature: float = 0.0,
        rng: int | np.random.Generator | None = None,
        stop: Collection[int] = (),
        caches: Sequence[KVCache] | None = None,
        num_threads: int | None = None,
    ) -> Iterator[int]:
        """Return an iterator over the tokens that follow a prompt.

        Parameters
        ----------
        ids : ints, shape (length,)
            The prompt. The first new token takes its whole work, each other one that of a token.
        count : int
            Tokens at most.
        temperature : float
            0 takes the likeliest token. Else one is drawn by the softmax of logits / temperature.
        rng : int or numpy.random.Generator, optional
            Draws the tokens.
        stop : collection of int
            Tokens that end the text. They are not yielded.
        caches : sequence of KVCache, optional
            To continue what they have, or store in another dtype; by default new ones of float32.
            They lack the last token that was yielded, which a next call's ids must begin with.
        num_threads : int, optional

        Yields
        ------
        int

        Raises
        ------
        TypeError, ValueError
            As calling the decoder; at once, except for caches that are full.

        Examples
        --------
        >>> from qkv_fast.decoder import Decoder
        >>> decoder = Decoder.random(rng=0)
        >>> list(decoder.stream([3, 1, 4], 4, temperature=0.5, rng=0))
        [216, 92, 33, 8]
        """
        rows = self._checked(ids)
        if rows.ndim != 1:
            raise ValueError(f"ids has shape {rows.shape}: it must be (length,)")
        count = integer("count", count, 0)
        temperature = real("temperature", temperature)
        if not 0 <= temperature < np.inf:
            raise ValueError(f"temperature is {temperature}: it must be finite and at least 0")
        if caches is None:
            caches = self.new_caches(len(rows) + count)
        generator = np.random.default_rng(rng)
        return self._stream(rows, count, temperature, generator, stop, caches, num_threads)

    def _stream(
        self,
        ids: Array,
        count: int,
        temperature: float,
        rng: np.random.Generator,
        stop: Collection[int],
        caches: Sequence[KVCache],
        num_threads: int | None,
    ) -> Iterator[int]:
        for _ in range(count):
            logits = self(ids, caches, num_threads=num_threads)
            token = _choose(logits, temperature, rng)
            if token in stop:
                return
            yield token
            ids = np.array([token])


def _choose(logits: Array, temperature: float, rng: np.random.Generator) -> int:
    """Return the likeliest token, or with a temperature draw one by its probability."""
    if temperature == 0:
        return int(logits.argmax())
    shares = np.exp((logits - logits.max()).astype(np.float64) / temperature)
    bounds = np.cumsum(shares)
    return int(np.searchsorted(bounds, rng.random() * bounds[-1], side="right"))


# --- Weights --------------------------------------------------------------------------------------


class _Weights:
    """Reads a state dict: checks shapes, rounds to the element type, notes what was used."""

    def __init__(self, state: Mapping[str, Any], first: str, dtype: Any) -> None:
        self.state = state
        self.used: set[str] = set()
        if dtype is None:
            self.code = code_of(self._found(first).dtype, uint16_is_bf16=True) & ~SWAPPED
        else:
            self.code = weight_code(dtype)
        self.real_code = FLOAT64 if self.code == FLOAT64 else FLOAT32
        self.real: type[np.floating[Any]] = np.float64 if self.code == FLOAT64 else np.float32

    def _found(self, name: str) -> Array:
        if name not in self.state:
            raise ValueError(f"the state has no {name}")
        self.used.add(name)
        return as_array(name, self.state[name])

    def _shaped(self, name: str, *shape: int) -> Array:
        array = self._found(name)
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}: the config says {shape}")
        return array

    def matrix(self, name: str, rows: int, columns: int) -> Array:
        """Return a matrix of the element type."""
        return readable(self._shaped(name, rows, columns), self.code)

    def vector(self, name: str, size: int) -> Array:
        """Return a vector of reals."""
        return readable(self._shaped(name, size), self.real_code)

    def attention(self, prefix: str, config: Config) -> MultiHeadAttention:
        """Return the attention of a layer."""
        names = [f"{prefix}.{part}_proj.{kind}" for part in "qkvo" for kind in ("weight", "bias")]
        names += [f"{prefix}.{part}_norm.weight" for part in "qk"]
        own = {n: readable(self._found(n), self.code) for n in names if n in self.state}
        layer = MultiHeadAttention.from_state_dict(
            own, config.heads, prefix=prefix, norm_eps=config.epsilon
        )
        config.check_heads(prefix, layer)
        return layer

    def check_all_used(self) -> None:
        """Raise if the state has weights that a decoder of another kind would need."""
        ignored = ("lm_head.weight", "inv_freq")  # of tied ones; of old versions
        others = [n for n in self.state if n not in self.used and not n.endswith(ignored)]
        if others:
            raise ValueError(f"the state has unknown weights: {', '.join(others[:6])}")
