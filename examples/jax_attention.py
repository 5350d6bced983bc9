"""Run a causal model of JAX with jax.nn's attention and with qkv_fast's, and compare the two.

    python examples/jax_attention.py [--length 1024] [--dtype float32]

The weights are random: the model has 2 layers of 8 heads of 64, which a compiled program scans.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qkv_fast.integrations.jax import dot_product_attention

LAYERS, HEADS, SIZE = 2, 8, 64
Weights = dict[str, jax.Array]


def make_weights(dtype: str) -> Weights:
    """Return the weights of all layers, along the first axis."""
    width = HEADS * SIZE
    shapes = {"qkv": (width, 3 * width), "out": (width, width), "up": (width, 2 * width),
              "down": (2 * width, width)}  # fmt: skip
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        name: jax.random.normal(key, (LAYERS, *shape), dtype) * shape[0] ** -0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def run(attend: Callable[..., jax.Array], weights: Weights, tokens: jax.Array) -> jax.Array:
    """Return what the model makes of tokens (batch, length, width)."""

    def layer(x: jax.Array, own: Weights) -> tuple[jax.Array, None]:
        heads = (normed(x) @ own["qkv"]).reshape(*x.shape[:-1], 3 * HEADS, SIZE)
        query, key, value = jnp.split(heads, 3, axis=-2)
        x = x + attend(query, key, value, is_causal=True).reshape(x.shape) @ own["out"]
        return x + jax.nn.gelu(normed(x) @ own["up"]) @ own["down"], None

    return jax.lax.scan(layer, tokens, weights)[0]


def normed(x: jax.Array) -> jax.Array:
    """Return vectors divided by their root mean square."""
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def main(arguments: list[str] | None = None) -> None:
    """Run the model both ways and print the times and the difference."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--length", type=int, default=1024, help="number of tokens")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args(arguments)

    weights = make_weights(options.dtype)
    shape = (1, options.length, HEADS * SIZE)
    tokens = jax.random.normal(jax.random.key(1), shape, options.dtype)
    ways: dict[str, Any] = {
        "jax.nn": jax.nn.dot_product_attention,
        "qkv_fast": dot_product_attention,
    }
    results = []
    for name, attend in ways.items():
        model = jax.jit(run, static_argnums=0)
        model(attend, weights, tokens).block_until_ready()  # the first call compiles
        start = time.perf_counter()
        results.append(model(attend, weights, tokens).block_until_ready())
        print(f"{name:8} {1000 * (time.perf_counter() - start):8.1f} ms")
    print(f"largest difference: {float(abs(results[0] - results[1]).max()):.1e}")


if __name__ == "__main__":
    main()
