"""Attention as a soft dictionary: a query finds all keys, each in a share.

    python examples/soft_dictionary.py
    python examples/soft_dictionary.py kitten fruit --scale 20 --save dictionary.html

A dict finds the one key that equals the query: {"cat": "chat", "apple": "pomme"}["apple"]. It has
no answer for "kitten". Attention compares the query q with every key k, turns the similarities
into shares, and returns the values v mixed in these shares (cross-attention):

    shares = softmax(scale · q·k)        mix = sum of shares · v

Words become vectors by all-MiniLM-L6-v2. The vectors have length 1, so q·k is 1 for equal words and
less for others. `scale`, the inverse of a temperature, says how much a lead in similarity counts:
with 0 all keys have equal shares, and with an infinite scale the most similar key has everything,
as in a dict. 1/√d, which suits the longer vectors inside a transformer, is nearly 0 for these.
"""

import argparse

import numpy as np

import qkv_fast.plot
from qkv_fast.encoder import Encoder, find_minilm

DICTIONARY = {"cat": "chat", "apple": "pomme", "tree": "arbre", "juice": "jus"}
QUERIES = ["apple", "cat", "kitten", "fruit", "cider", "orchard"]


def main(arguments: list[str] | None = None) -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description="Look words up in a soft dictionary.")
    parser.add_argument("queries", nargs="*", help=f"words to look up; else {' '.join(QUERIES)}")
    parser.add_argument("--scale", type=float, default=10, help="1 / temperature (default 10)")
    parser.add_argument("--model", metavar="DIR", help="a folder of a BERT model")
    parser.add_argument("--save", metavar="FILE", help="a picture: .html, or .png by matplotlib")
    options = parser.parse_args(arguments)
    words, values = list(DICTIONARY), list(DICTIONARY.values())
    queries = options.queries or QUERIES
    try:
        encoder = Encoder.from_folder(options.model or find_minilm())
        q, k, v = encoder.embed(queries), encoder.embed(words), encoder.embed(values)
    except (ImportError, OSError, ValueError) as error:
        raise SystemExit(str(error)) from None

    weights = qkv_fast.attention_weights(q, k, scale=options.scale)
    mixes = qkv_fast.scaled_dot_product_attention(q, k, v, scale=options.scale)
    print(f"scale {options.scale:g}: the share of each key, and the values nearest to the mix\n")
    print(" " * 10 + "".join(f"{word:>8}" for word in words))
    for query, shares, mix in zip(queries, weights, mixes, strict=True):
        nearness = v @ mix / np.linalg.norm(mix)  # cosines
        nearest = [f"{values[i]} {nearness[i]:.2f}" for i in np.argsort(-nearness)[:2]]
        row = f"{query:>10}" + "".join(f"{share:>8.1%}" for share in shares)
        print(f"{row}   {', '.join(nearest)}")
    print(f"\nThe same as a picture, with the keys {', '.join(words)}:\n")
    print(qkv_fast.plot.terminal(weights, queries, words))

    softest = weights.max(axis=1).argmin()
    print(f"\n{queries[softest]}, from soft to hard:")
    for scale in (q.shape[1] ** -0.5, 1, 10, 100):
        shares = qkv_fast.attention_weights(q[softest, None], k, scale=scale)[0]
        parts = ", ".join(f"{word} {share:.1%}" for word, share in zip(words, shares, strict=True))
        print(f"  scale {scale:>6.2f}: {parts}")

    try:
        if options.save and options.save.endswith(".html"):
            qkv_fast.plot.view(weights, queries, words, title="Soft dictionary").save(options.save)
        elif options.save:
            qkv_fast.plot.heat_map(weights, queries, words, vmax=1).savefig(options.save)
    except (ImportError, OSError, ValueError) as error:  # no matplotlib, folder or such format
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
