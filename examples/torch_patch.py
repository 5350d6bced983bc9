"""Run a causal encoder of PyTorch with its own attention and with qkv_fast, and compare the two.

    python examples/torch_patch.py [--length 1024] [--dtype float32]

The weights are random: the model has 2 layers of 8 heads of 64.
"""

from __future__ import annotations

import argparse
import contextlib
import time

import torch

from qkv_fast.integrations.torch import patch


def make_model(dtype: torch.dtype, layers: int = 2) -> torch.nn.TransformerEncoder:
    """Return an encoder whose layers call scaled_dot_product_attention."""
    torch.backends.mha.set_fastpath_enabled(False)  # a way of torch that calls no such function
    layer = torch.nn.TransformerEncoderLayer(512, 8, 1024, batch_first=True, dtype=dtype)
    return torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).eval()


def main(arguments: list[str] | None = None) -> None:
    """Run the model both ways and print the times and the difference."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--length", type=int, default=1024, help="number of tokens")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    model = make_model(dtype)
    tokens = torch.randn(1, options.length, 512, dtype=dtype)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(options.length, dtype=dtype)

    results = []
    with torch.inference_mode():
        for name, way in (("torch", contextlib.nullcontext), ("qkv_fast", patch)):
            with way():
                model(tokens, mask, is_causal=True)  # the first call also prepares
                start = time.perf_counter()
                results.append(model(tokens, mask, is_causal=True))
                print(f"{name:8} {1000 * (time.perf_counter() - start):8.1f} ms")
    print(f"largest difference: {(results[0] - results[1]).abs().max():.1e}")


if __name__ == "__main__":
    main()
