"""What a config says about a Llama-style decoder, and random weights for one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ._dtypes import Array
from ._layer import MultiHeadAttention
from ._problem.arguments import integer, real, shown
from .rotary import Rotary

# Of Transformers, whose layers are computed by the same formulas.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
ACTIVATIONS = ("silu", "swish")

SMALL: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


class Config(NamedTuple):
    """The sizes and options of a decoder, under short names."""

    given: Mapping[str, Any]
    vocab: int
    hidden: int
    inner: int  # of the MLP
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    epsilon: float
    tied: bool
    windows: list[tuple[int, int] | None]  # of the attention of each layer
    rotary: Rotary

    @classmethod
    def of(cls, given: Any) -> Config:
        """Read a config of Transformers, as a mapping or as its object."""
        config = given if isinstance(given, Mapping) else getattr(given, "to_dict", dict)()
        if not config:
            raise TypeError(
                f"config is {shown(given)}: it must be a mapping, as a config.json holds, or a "
                "config of Transformers"
            )

        def size(name: str, default: int | None = None) -> int:
            if config.get(name) is None and default is None:
                raise ValueError(f"config has no {name!r}, which is needed")
            return integer(f"config[{name!r}]", config.get(name) or default)

        for name, default, known in (
            ("model_type", "llama", MODEL_TYPES),
            ("hidden_act", "silu", ACTIVATIONS),
        ):
            if config.get(name, default) not in known:
                raise ValueError(
                    f"config[{name!r}] is {shown(config[name])}: it must be one of "
                    f"{', '.join(known)}"
                )
        hidden, heads = size("hidden_size"), size("num_attention_heads")
        layers = size("num_hidden_layers")
        return cls(
            config, size("vocab_size"), hidden, size("intermediate_size"), layers, heads,
            size("num_key_value_heads", heads), size("head_dim", hidden // heads),
            real("config['rms_norm_eps']", config.get("rms_norm_eps", 1e-6)),
            bool(config.get("tie_word_embeddings", False)), _windows(config, layers),
            Rotary.from_config(config),
        )  # fmt: skip

    def check_heads(self, prefix: str, attention: MultiHeadAttention) -> None:
        """Raise if a layer's weights have other sizes than the config says."""
        found = (attention.embed_dim, attention.num_kv_heads, attention.head_dim)
        wanted = (self.hidden, self.kv_heads, self.head_dim)
        if found != wanted:
            raise ValueError(
                f"{prefix}self_attn has hidden size, key heads and head size {found}: the config "
                f"says {wanted}"
            )


def _windows(config: Mapping[str, Any], layers: int) -> list[tuple[int, int] | None]:
    """Return each layer's window: a token sees `sliding_window` tokens, of which it is the last."""
    size = config.get("sliding_window")
    if size is None or not config.get("use_sliding_window", True):
        return [None] * layers
    window = integer("config['sliding_window']", size) - 1, 0
    types = config.get("layer_types")
    if types is None:  # Qwen's first layers see all
        first = config.get("max_window_layers", 0)
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    return [window if kind == "sliding_attention" else None for kind in types]


def random_state(given: Any, rng: int | np.random.Generator | None) -> dict[str, Array]:
    """Draw float32 weights that keep the size of what passes through; norms do nothing."""
    c = Config.of(given)
    generator = np.random.default_rng(rng)
    query, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim

    def draw(rows: int, columns: int) -> Array:
        return generator.standard_normal((rows, columns), np.float32) * np.float32(columns**-0.5)

    state = {"model.embed_tokens.weight": draw(c.vocab, c.hidden)}
    for i in range(c.layers):
        at = f"model.layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            state[f"{at}{name}.weight"] = np.ones(c.hidden, np.float32)
        for name, rows, columns in (
            ("self_attn.q_proj", query, c.hidden), ("self_attn.k_proj", kv, c.hidden),
            ("self_attn.v_proj", kv, c.hidden), ("self_attn.o_proj", c.hidden, query),
            ("mlp.gate_proj", c.inner, c.hidden), ("mlp.up_proj", c.inner, c.hidden),
            ("mlp.down_proj", c.hidden, c.inner),
        ):  # fmt: skip
            state[f"{at}{name}.weight"] = draw(rows, columns)
    state["model.norm.weight"] = np.ones(c.hidden, np.float32)
    if not c.tied:
        state["lm_head.weight"] = draw(c.vocab, c.hidden)
    return state
