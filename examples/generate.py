"""SmolLM2-135M answers a question in NumPy and prints its words as they come.

    python examples/generate.py "Why is the sky blue?"
    python examples/generate.py --random               a small decoder of random weights: token ids

Each layer keeps the keys and values of the tokens so far in a KVCache, so that a new token costs
one row of attention. Decoding reads all weights for each token: --dtype bfloat16 halves them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

from qkv_fast.decoder import Decoder, Tokenizer, find_smollm2, open_gguf

DTYPES = ["float32", "float16", "bfloat16"]


def main(arguments: list[str] | None = None) -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("prompt", nargs="?", default="Why is the sky blue?")
    add("--tokens", type=int, default=200, help="at most (default 200)")
    add("--dtype", choices=DTYPES, default="float32", help="of the weights")
    add("--cache", choices=[*DTYPES, "int8"], default="float32", help="of keys and values")
    add("--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token")
    add("--seed", type=int, default=0, help="of the sampling")
    add("--random", action="store_true", help="random weights; the prompt is ids below 256")
    options = parser.parse_args(arguments)
    if options.tokens < 1 or not 0 <= options.temperature < float("inf"):
        parser.error("--tokens must be at least 1, --temperature finite and at least 0")
    if options.random:
        decoder, tokenizer = Decoder.random(rng=0, dtype=options.dtype), None
        ids = [int(word) % 256 for word in options.prompt.split() if word.isdigit()] or [3, 1, 4]
    else:
        try:
            file = open_gguf(find_smollm2())
            tokenizer = Tokenizer.from_gguf(file)
            decoder = Decoder.from_gguf(file, dtype=options.dtype)
            ids = tokenizer.chat(options.prompt)
        except ImportError as error:
            raise SystemExit(f"{error}\nor try --random") from error
    decoder([0])  # what the first call sets up is not to be timed
    stream = decoder.stream(
        ids, options.tokens, temperature=options.temperature, rng=options.seed,
        caches=decoder.new_caches(len(ids) + options.tokens, dtype=options.cache),
        stop=tokenizer.stop if tokenizer else (),
    )  # fmt: skip
    times = [time.perf_counter()]

    def timed() -> Iterator[int]:
        for token in stream:
            times.append(time.perf_counter())
            yield token

    for piece in tokenizer.stream(timed()) if tokenizer else map("{} ".format, timed()):
        print(piece, end="", flush=True)
    print(f"\n\n{decoder}")
    if len(times) > 1:
        print(f"prefill {len(ids):>5} tokens:{len(ids) / (times[1] - times[0]):>9.1f} tokens/s")
    if len(times) > 2:
        speed = (len(times) - 2) / (times[-1] - times[1])
        print(f"decode  {len(times) - 2:>5} tokens:{speed:>9.1f} tokens/s")


if __name__ == "__main__":
    main()
