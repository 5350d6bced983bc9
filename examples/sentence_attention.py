"""What the heads of a real encoder look at in a text, with qkv_fast doing the attention.

    python examples/sentence_attention.py "The cat sat on the mat."

Loads all-MiniLM-L6-v2 (6 layers of 12 heads) or any BERT folder (--model), prints one head's
attention, saves a picture of its layer, ranks sentences by their similarity to the text, and
times the attention over a text of the greatest length on each engine.
"""

import argparse
import sys
from timeit import repeat

import numpy as np

import qkv_fast.plot
from qkv_fast.encoder import Encoder, find_minilm

SENTENCES = ["A kitten was lying on a rug.", "The dog barked at the postman.", "Rates rose again."]


def plain_numpy(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Attention as one writes it by hand: softmax(QKᵀ/√d) V."""
    scores = query @ key.swapaxes(-1, -2) / np.float32(query.shape[-1] ** 0.5)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ value


def print_times(shape: tuple[int, ...]) -> None:
    """Print how long attention takes on each engine, for random inputs of a shape."""
    qkv = np.random.default_rng(0).standard_normal((3, *shape), np.float32)
    expected, attention = plain_numpy(*qkv), qkv_fast.scaled_dot_product_attention
    plain = min(repeat(lambda: plain_numpy(*qkv), number=1, repeat=5))
    print(f"  {'plain NumPy':<20}{plain * 1e3:>8.2f} ms")
    for choice in qkv_fast.available_backends():
        with qkv_fast.backend(**choice):
            error = np.abs(attention(*qkv) - expected).max()
            best = min(repeat(lambda: attention(*qkv), number=1, repeat=5))
        speed = f"{best * 1e3:>8.2f} ms, {plain / best:.1f} times as fast"
        print(f"  {' '.join(choice.values()):<20}{speed}, difference {error:.0e}")


def main(arguments: list[str] | None = None) -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description="Show what a head of an encoder looks at.")
    parser.add_argument("text", nargs="?", default="The cat sat on the mat.", help="- reads stdin")
    parser.add_argument("--model", metavar="DIR", help="a folder of a BERT model")
    parser.add_argument("--layer", type=int, default=0, help="layer to look at (default 0)")
    parser.add_argument("--head", type=int, default=0, help="head to print (default 0)")
    parser.add_argument("--png", default="attention.png", help="picture to save (attention.png)")
    options = parser.parse_args(arguments)
    try:
        encoder = Encoder.from_folder(options.model or find_minilm())
        text = sys.stdin.read() if options.text == "-" else options.text
        ids = encoder.encode(text)
    except (ImportError, OSError, ValueError) as error:
        raise SystemExit(str(error)) from None
    tokens, (_, weights) = encoder.tokens(ids), encoder(ids, need_weights=True)
    layers, heads = weights.shape[:2]
    if not (0 <= options.layer < layers and 0 <= options.head < heads):
        raise SystemExit(f"The model has layers 0 to {layers - 1} and heads 0 to {heads - 1}")

    print(f"layer {options.layer}, head {options.head}: how much each token looks at each\n")
    print(qkv_fast.plot.terminal(weights[options.layer, options.head, :32], tokens[:32], tokens))
    try:
        qkv_fast.plot.heat_map(weights[options.layer], tokens).savefig(options.png)
        print(f"\nAll heads of layer {options.layer}: {options.png}\n\nSimilarity to the text:")
    except ImportError as error:
        print(f"\nNo picture: {error}\n\nSimilarity to the text:")
    similarities = encoder.embed(SENTENCES) @ encoder.embed(text)
    for i in np.argsort(-similarities):
        print(f"  {similarities[i]:6.3f}  {SENTENCES[i]}")
    shape = (1, heads, encoder.max_length, encoder.width // heads)
    print(f"\nAttention of shape {shape}, (batch, heads, tokens, head size), fastest of 5 calls:")
    print_times(shape)


if __name__ == "__main__":
    main()
