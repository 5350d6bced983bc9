"""Attention over a long document: the sentences that a question looks at.

    python examples/long_document.py "Who repaired the clockwork?"
    python examples/long_document.py "What was decided?" --file minutes.txt --top 3 --layer 2

Each sentence of the document is a key: its vector by all-MiniLM-L6-v2, of length 1. A question is
the query, and softmax(scale · q·k) says how its attention is shared among the sentences. That
ranks them by similarity to the question: a sentence with the answer need not be the first.
With --layer the encoder reads the question and its first sentence as one text, and a picture
shows which words of the sentence the words of the question look at in that layer.
"""

import argparse
import re
import sys
from pathlib import Path

import numpy as np

import qkv_fast.plot
from qkv_fast.encoder import Encoder, find_minilm

DOCUMENT = Path(__file__).with_name("long_document.txt")
QUESTIONS = ["Who repaired the clockwork?", "Which animals can be seen there?"]


def show_progress(done: int, total: int) -> None:
    """Show on the terminal's last line how many sentences the encoder has read."""
    if sys.stderr.isatty():
        text = f"reading: {done} of {total} sentences" if done < total else ""
        print(f"\r{text:<70}\r", end="", file=sys.stderr, flush=True)


def print_words(encoder: Encoder, question: str, sentence: str, layer: int) -> None:
    """Print what the words of a question look at in a sentence, as the mean of a layer's heads."""
    first = encoder.encode(question)
    ids = (first + encoder.encode(sentence)[1:])[: encoder.max_length]
    _, weights = encoder(ids, need_weights=True)
    words, context = slice(1, len(first) - 1), slice(len(first), -1)  # without [CLS] and [SEP]
    tokens = encoder.tokens(ids)
    mean = weights[layer].mean(axis=0)[words, context]
    print(f"\n{qkv_fast.plot.terminal(mean, tokens[words], tokens[context])}")


def main(arguments: list[str] | None = None) -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description="Find the sentences that a question looks at.")
    parser.add_argument("questions", nargs="*", default=QUESTIONS)
    parser.add_argument("--file", type=Path, default=DOCUMENT, help="a UTF-8 text")
    parser.add_argument("--scale", type=float, default=10, help="1 / temperature (default 10)")
    parser.add_argument("--top", type=int, default=5, help="sentences to print (default 5)")
    parser.add_argument("--layer", type=int, help="also show what the words look at in a layer")
    parser.add_argument("--model", metavar="DIR", help="a folder of a BERT model")
    options = parser.parse_args(arguments)
    try:
        text = " ".join(options.file.read_text(encoding="utf-8").split())
        sentences = re.split(r"(?<=[.!?…]) ", text)
        encoder = Encoder.from_folder(options.model or find_minilm())
        query = encoder.embed(options.questions)
        key = encoder.embed(sentences, progress=show_progress)
    except (ImportError, OSError, ValueError) as error:
        raise SystemExit(str(error)) from None
    if options.layer is not None and not 0 <= options.layer < len(encoder.layers):
        raise SystemExit(f"The model has layers 0 to {len(encoder.layers) - 1}")

    weights = qkv_fast.attention_weights(query, key, scale=options.scale)
    for question, shares in zip(options.questions, weights, strict=True):
        print(f"{question}  (shares of {len(sentences)} sentences)")
        top = np.argsort(-shares)[: options.top]
        for i in top:
            bar = "#" * round(20 * shares[i] / shares.max())
            print(f"{shares[i]:>6.1%} {bar:<20} {i:>3} {sentences[i]}")
        print(f"{1 - shares[top].sum():>6.1%} all others")
        if options.layer is not None:
            print_words(encoder, question, sentences[shares.argmax()], options.layer)
        print()
    print("Where in the document, from its first sentence to its last:\n")
    print(qkv_fast.plot.terminal(weights, options.questions, list(map(str, range(len(sentences))))))


if __name__ == "__main__":
    main()
