"""Run the attention of an ONNX model with qkv_fast, beside the NumPy code of the package onnx.

    python examples/onnx_attention.py [model.onnx]

Without a file it makes a model of one causal layer. The inputs are random float32 numbers.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from qkv_fast.integrations.onnx import Attention


def small_model(heads: int = 8, length: int = 512, size: int = 512) -> onnx.ModelProto:
    """A model of one causal Attention node with all heads of a token side by side."""
    node = helper.make_node(
        "Attention", ["q", "k", "v"], ["y"], is_causal=1, q_num_heads=heads, kv_num_heads=heads
    )
    tensors = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, length, size)) for name in "qkvy"
    ]
    graph = helper.make_graph([node], "layer", tensors[:3], tensors[3:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])


def main(arguments: list[str] | None = None) -> None:
    """Run the model both ways and print the times and the difference."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", nargs="?", help="an ONNX model with the operator Attention")
    path = parser.parse_args(arguments).model
    model = onnx.load(path) if path else small_model()
    count = sum(node.op_type == "Attention" for node in model.graph.node)
    print(f"{count} Attention node{'s' * (count != 1)}")

    rng = np.random.default_rng(0)
    feeds: dict[str, Any] = {}
    for given in model.graph.input:  # a symbolic dimension is 0 here: one entry will do
        shape = [dim.dim_value or 1 for dim in given.type.tensor_type.shape.dim]
        feeds[given.name] = rng.standard_normal(shape).astype(np.float32)
    results = []
    for name, new_ops in (("onnx", []), ("qkv_fast", [Attention])):
        evaluator = ReferenceEvaluator(model, new_ops=new_ops)
        evaluator.run(None, feeds)  # the first call also loads and prepares
        start = time.perf_counter()
        results.append(evaluator.run(None, feeds)[0])
        print(f"{name:8} {1000 * (time.perf_counter() - start):8.1f} ms")
    print(f"largest difference: {np.abs(results[0] - results[1]).max():.1e}")


if __name__ == "__main__":
    main()
