"""A small GPT-2 in NumPy that writes token after token, with its keys and values in a KVCache.

    python examples/generate.py --tokens 50 --dtype int8
    python examples/generate.py --weights model.safetensors --tokenizer tokenizer.json --prompt "Hi"

Without --weights the weights are random, and what comes out means nothing; the work is the same.
A decoder computes the keys and values of a token once and keeps them: each new token then costs one
row of attention. --no-cache computes everything again for every token, to compare.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import qkv_fast

Array = npt.NDArray[np.float32]

INSTALL = 'pip install ".[demo]"'
HEAD_DIM = 64  # of GPT-2 in all its sizes; the file of weights doesn't tell
EPSILON = np.float32(1e-5)
DTYPES = ["float32", "float16", "bfloat16", "int8"]


def weight_shapes(layers: int, hidden: int, vocab: int, context: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of GPT-2's weights, as Hugging Face stores them; matrices are (in, out)."""
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (vocab, hidden),  # token embeddings, which also give the logits
        "wpe.weight": (context, hidden),  # position embeddings
    }
    linears = {
        "attn.c_attn": (hidden, 3 * hidden),  # query, key and value side by side
        "attn.c_proj": (hidden, hidden),
        "mlp.c_fc": (hidden, 4 * hidden),
        "mlp.c_proj": (4 * hidden, hidden),
    }
    norms = ["ln_f"]
    for layer in range(layers):
        norms += [f"h.{layer}.ln_1", f"h.{layer}.ln_2"]
        for name, (size_in, size_out) in linears.items():
            shapes[f"h.{layer}.{name}.weight"] = (size_in, size_out)
            shapes[f"h.{layer}.{name}.bias"] = (size_out,)
    for name in norms:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (hidden,)
    return shapes


def random_weights(
    layers: int, hidden: int, vocab: int, context: int, seed: int = 0
) -> dict[str, Array]:
    """Draw matrices that keep the size of what passes through; norms and biases do nothing.

    Position embeddings are larger, else the likeliest tokens of an untrained model soon repeat.
    """
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in weight_shapes(layers, hidden, vocab, context).items():
        if len(shape) == 1:
            weights[name] = np.full(shape, name.endswith(".weight"), np.float32)
        else:
            size_in = {"wte.weight": hidden, "wpe.weight": 1}.get(name, shape[0])
            weights[name] = rng.standard_normal(shape, np.float32) * np.float32(size_in**-0.5)
    return weights


def need(package: str) -> None:
    """Say what to install where a package is missing that only some options need."""
    if importlib.util.find_spec(package) is None:
        raise SystemExit(f"{package} is missing. Install the demo's needs:\n  {INSTALL}")


def load_weights(path: str | Path) -> dict[str, Array]:
    """Read a safetensors file of GPT-2."""
    need("safetensors")
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        weights = load_file(path)
    except (OSError, TypeError, SafetensorError) as error:  # TypeError: an unknown dtype
        raise SystemExit(f"{path} can't be read as safetensors: {error}") from None
    return {
        name.removeprefix("transformer."): array.astype(np.float32, copy=False)
        for name, array in weights.items()
    }


class Model:
    """GPT-2 in NumPy: weights by their names in the file, attention by qkv_fast."""

    def __init__(self, weights: dict[str, Array], heads: int | None = None) -> None:
        for name in ("wte.weight", "wpe.weight"):
            if name not in weights or weights[name].ndim != 2:
                raise ValueError(f"the weights have no matrix {name}: they are not those of GPT-2")
        self.weights = weights
        self.vocab, self.hidden = weights["wte.weight"].shape
        self.context = len(weights["wpe.weight"])
        self.layers = sum(name.endswith(".attn.c_attn.weight") for name in weights)
        self.heads = max(1, self.hidden // HEAD_DIM) if heads is None else heads
        if self.heads < 1 or self.hidden % self.heads:
            raise ValueError(f"{self.heads} heads can't share a hidden size of {self.hidden}")
        shapes = weight_shapes(self.layers, self.hidden, self.vocab, self.context)
        for name, shape in shapes.items():
            found = weights[name].shape if name in weights else "missing"
            if found != shape:
                raise ValueError(f"the weight {name} is {found}: its shape must be {shape}")

    def new_caches(self, capacity: int, dtype: str = "float32") -> list[qkv_fast.KVCache]:
        """One empty cache for each layer, with room for so many tokens."""
        shape = (1, self.heads, capacity, self.hidden // self.heads)
        return [qkv_fast.KVCache(*shape, dtype=dtype) for _ in range(self.layers)]

    def forward(self, tokens: list[int], caches: list[qkv_fast.KVCache] | None = None) -> Array:
        """Return the logits of what follows the tokens, (vocab,).

        With caches, the tokens continue those that the caches have; without, they are the whole.
        """
        start = int(caches[0].lengths[0]) if caches else 0
        x = self.weights["wte.weight"][tokens]
        x = x + self.weights["wpe.weight"][start : start + len(tokens)]
        for layer in range(self.layers):
            name = f"h.{layer}"
            cache = caches[layer] if caches else None
            x = x + self.attention(self.norm(x, f"{name}.ln_1"), f"{name}.attn", cache)
            y = gelu(self.linear(self.norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc"))
            x = x + self.linear(y, f"{name}.mlp.c_proj")
        logits: Array = self.weights["wte.weight"] @ self.norm(x[-1], "ln_f")
        return logits

    def attention(self, x: Array, name: str, cache: qkv_fast.KVCache | None) -> Array:
        """Let every token look at itself and those before it; (tokens, hidden) in and out."""
        qkv = self.linear(x, f"{name}.c_attn").reshape(1, len(x), 3, self.heads, -1)
        query, key, value = qkv.transpose(2, 0, 3, 1, 4)  # each (1, heads, tokens, head size)
        if cache is None:
            out = qkv_fast.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            # A prompt and a single token go the same way: what is new is cached, then looks back.
            cache.append(key, value)
            out = cache.attend(query, is_causal=True)
        return self.linear(out[0].swapaxes(0, 1).reshape(x.shape), f"{name}.c_proj")

    def linear(self, x: Array, name: str) -> Array:
        """X W + b."""
        return x @ self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def norm(self, x: Array, name: str) -> Array:
        """Layer normalisation."""
        x = x - x.mean(axis=-1, keepdims=True)
        x /= np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPSILON)
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]


def gelu(x: Array) -> Array:
    """GELU in the tanh form that GPT-2 was trained with."""
    inner = np.float32((2 / np.pi) ** 0.5) * (x + np.float32(0.044715) * x * x * x)
    result: Array = np.float32(0.5) * x * (1 + np.tanh(inner))
    return result


def choose(logits: Array, temperature: float, rng: np.random.Generator) -> int:
    """Return the likeliest token, or with a temperature draw one by its probability."""
    if temperature == 0:
        return int(logits.argmax())
    weights = np.exp((logits - logits.max()).astype(np.float64) / temperature)
    return int(rng.choice(len(logits), p=weights / weights.sum()))


def stream(
    model: Model,
    prompt: list[int],
    count: int,
    use_cache: bool = True,
    dtype: str = "float32",
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[int]:
    """Yield new tokens one by one; the first takes the whole prompt's work, others one token's."""
    if not prompt or min(prompt) < 0 or max(prompt) >= model.vocab:
        raise ValueError(f"the prompt must have tokens, all from 0 to {model.vocab - 1}")
    if len(prompt) + count > model.context:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens and {count} are to follow, "
            f"but the model's context holds {model.context}"
        )
    rng = np.random.default_rng(seed)
    caches = model.new_caches(len(prompt) + count, dtype) if use_cache else None
    tokens = list(prompt)
    unseen = tokens
    for _ in range(count):
        token = choose(model.forward(unseen, caches), temperature, rng)
        yield token
        tokens.append(token)
        unseen = [token] if use_cache else tokens


def generate(
    model: Model, prompt: list[int], count: int, use_cache: bool = True, **options: Any
) -> list[int]:
    """Return so many new tokens; the options are those of `stream`."""
    return list(stream(model, prompt, count, use_cache, **options))


def load_tokenizer(path: str) -> Any:
    """Read a tokenizer.json."""
    need("tokenizers")
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(path)
    except Exception as error:  # the package raises nothing more special
        raise SystemExit(f"{path} can't be read as a tokenizer: {error}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def token_ids(text: str) -> list[int]:
    """Read "1 2 3"."""
    try:
        return [int(word) for word in text.split()]
    except ValueError:
        raise SystemExit("Without --tokenizer, --prompt must be token ids: '1 2 3'") from None


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--prompt", default="1 2 3 4 5 6 7 8", help="token ids, or with --tokenizer any text")
    add("--tokens", type=int, default=32, help="new tokens (default 32)")
    add("--dtype", choices=DTYPES, default="float32", help="what the cache stores")
    add("--no-cache", action="store_true", help="compute the whole sequence for every token")
    add("--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token")
    add("--seed", type=int, default=0, help="of the sampling and of random weights")
    add("--weights", metavar="FILE", help="GPT-2 in safetensors; else the weights are random")
    add("--tokenizer", metavar="FILE", help="tokenizer.json, for a prompt of text")
    add("--heads", type=int, help=f"default: heads of size {HEAD_DIM}")
    sizes = parser.add_argument_group("sizes of the model with random weights")
    for name, size in {"layers": 4, "hidden": 256, "vocab": 1000, "context": 512}.items():
        sizes.add_argument(f"--{name}", type=int, default=size, help=f"default {size}")
    options = parser.parse_args(arguments)
    for name in ("tokens", "layers", "hidden", "vocab", "context"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if not 0 <= options.temperature < float("inf"):
        parser.error("--temperature must be finite and at least 0")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run the example."""
    options = parse(arguments)
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None
    prompt = tokenizer.encode(options.prompt).ids if tokenizer else token_ids(options.prompt)
    if options.weights:
        weights = load_weights(options.weights)
    else:
        sizes = (options.layers, options.hidden, options.vocab, options.context)
        weights = random_weights(*sizes, seed=options.seed)

    how = {"use_cache": not options.no_cache, "dtype": options.dtype}
    how |= {"temperature": options.temperature, "seed": options.seed}
    new: list[int] = []
    try:
        model = Model(weights, options.heads)
        generate(model, prompt[:1], 1, **how)  # what the first call sets up is not to be timed
        times = [time.perf_counter()]
        for token in stream(model, prompt, options.tokens, **how):
            new.append(token)
            times.append(time.perf_counter())
    except ValueError as error:
        raise SystemExit(str(error)) from error

    print(tokenizer.decode(prompt + new) if tokenizer else " ".join(map(str, new)))
    cache = "no cache" if options.no_cache else f"a cache of {options.dtype}"
    print(f"\n{model.layers} layers, {model.heads} heads, hidden size {model.hidden}, {cache}")
    print(f"prefill {len(prompt):>5} tokens: {len(prompt) / (times[1] - times[0]):>8.1f} tokens/s")
    if len(new) > 1:
        speed = (len(new) - 1) / (times[-1] - times[1])
        print(f"decode  {len(new) - 1:>5} tokens: {speed:>8.1f} tokens/s")


if __name__ == "__main__":
    main()
