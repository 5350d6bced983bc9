"""ONNX's Attention in the reference evaluator, computed by qkv_fast: onnx and onnxruntime judge."""

from __future__ import annotations

import doctest
import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from helpers import normal, run_python

import qkv_fast

onnx = pytest.importorskip("onnx", minversion="1.23", reason="onnx 1.23 is not installed")

from onnx import TensorProto, helper  # noqa: E402
from onnx.backend.test.case.node import collect_testcases  # noqa: E402
from onnx.backend.test.runner import Runner  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

import qkv_fast.integrations.onnx as adapter  # noqa: E402

ROOT = Path(__file__).parents[2]
QK_OUTPUT = ["Y", "", "", "qk"]
STAGES = ["scaled", "softcapped", "masked", "softmax"]  # by qk_matmul_output_mode

with warnings.catch_warnings():  # onnx computes infinities and NaN on purpose
    warnings.simplefilter("ignore")
    # Each case is there twice, the second time with the node expanded into other operators.
    CASES = [
        case
        for case in collect_testcases("Attention")
        if any(node.op_type == "Attention" for node in case.model.graph.node)
    ]


@pytest.fixture(params=["python", "native"])
def engine(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compute with one engine: what is tested here does not depend on the instruction set."""
    if request.param == "native":
        request.getfixturevalue("native")
    with qkv_fast.backend(request.param):
        yield


def model_of(nodes: list[Any], feeds: dict[str, np.ndarray], results: list[str], opset: int) -> Any:
    """Return a model with the nodes, whose inputs have the arrays' types and shapes."""
    given = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
        for name, x in feeds.items()
    ]
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in results]
    graph = helper.make_graph(nodes, "attention", given, made)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=11)


def run(model: Any, feeds: dict[str, np.ndarray]) -> list[Any]:
    """Run a model, with qkv_fast in each of its Attention nodes."""
    evaluator = ReferenceEvaluator(model, new_ops=[adapter.Attention])
    types = [type(node) for node in evaluator.rt_nodes_ if node.op_type == "Attention"]
    assert types
    assert set(types) == {adapter.Attention}
    return evaluator.run(None, feeds)


def attend(
    inputs: list[np.ndarray | None], outputs: list[str] | None = None, opset: int = 25, **attributes
) -> list[Any]:
    """Run one Attention node; None omits an input."""
    names = ["" if x is None else f"input{i}" for i, x in enumerate(inputs)]
    feeds = {name: x for name, x in zip(names, inputs, strict=True) if x is not None}
    outputs = outputs or ["Y"]
    node = helper.make_node("Attention", names, outputs, **attributes)
    return run(model_of([node], feeds, [name for name in outputs if name], opset), feeds)


def test_all_cases_are_there():
    assert len(CASES) >= 93  # as many as in onnx 1.23.2
    assert {case.model.opset_import[0].version for case in CASES} >= {23, 24, 25}
    nodes = [case.model.graph.node[0] for case in CASES]
    modes = [
        {attribute.name: attribute.i for attribute in node.attribute}.get(
            "qk_matmul_output_mode", 0
        )
        for node in nodes
        if len(node.output) == 4
    ]
    assert set(modes) == {0, 1, 2, 3}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.removeprefix("test_attention_"))
def test_node_cases_of_onnx(engine, case):
    for inputs, expected in case.data_sets:
        names = [given.name for given in case.model.graph.input]
        got = run(case.model, dict(zip(names, inputs, strict=True)))
        Runner.assert_similar_outputs(expected, got, case.rtol, case.atol)


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # the node's, and the oracle's
    "plain": ({}, {}),
    "scale": ({"scale": -0.5}, {"scale": -0.5}),
    "causal": ({"is_causal": 1}, {"is_causal": True}),
    "softcap": ({"softcap": 0.75}, {"softcap": 0.75}),
    "window": ({"left_window_size": 4}, {"window": (4, None)}),
    "all": (
        {"is_causal": 1, "softcap": 2.0, "left_window_size": 6, "right_window_size": 3},
        {"is_causal": True, "softcap": 2.0, "window": (6, 3)},
    ),
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("axes", [3, 4])
def test_results_are_as_exact_as_a_plain_computation(engine, rng, options, dtype, axes):
    dtype = getattr(pytest.importorskip("ml_dtypes"), dtype) if dtype == "bfloat16" else dtype
    attributes, exact = OPTIONS[options]
    query, past_query = normal(rng, (2, 6, 9, 16), dtype), 5  # batch, heads, length, head size
    key, value = normal(rng, (2, 2, 12, 16), dtype), normal(rng, (2, 2, 12, 8), dtype)
    mask = normal(rng, (6, 9, 12), dtype)
    mask[1, 2] = -np.inf
    cut = [x[:, :, past_query:] for x in (key, value)]
    past = [x[:, :, :past_query] for x in (key, value)]
    given = [query, *cut]
    if axes == 3:
        given = [x.swapaxes(1, 2).reshape(2, x.shape[2], -1) for x in given]
        attributes = attributes | {"q_num_heads": 6, "kv_num_heads": 2}
    for mode in range(4):
        outputs = ["Y", "present_key", "present_value", "qk"]
        y, present_key, present_value, qk = attend(
            [*given, mask, *past], outputs, qk_matmul_output_mode=mode, **attributes
        )
        expected = {"attn_mask": mask, "query_offset": past_query, **exact}
        if axes == 3:
            assert y.shape == (2, 9, 48)
            y = y.reshape(2, 9, 6, 8).swapaxes(1, 2)
        oracle.assert_close(y, query, key, value, **expected)
        assert not y[:, 1, 2].any()
        np.testing.assert_array_equal(present_key, key)
        np.testing.assert_array_equal(present_value, value)
        real = np.float64 if dtype == "float64" else np.float32
        exact_scores, plain = (
            oracle.weights(query, key, stage=STAGES[mode], real=kind, **expected)
            for kind in (np.float64, real)
        )
        assert qk.dtype == query.dtype
        oracle.assert_error_at_most_twice(qk, plain.astype(query.dtype), exact_scores)


@pytest.mark.parametrize("mode", [0, 1])
def test_scores_before_the_mask_are_of_all_keys(engine, rng, mode):
    q, k, v = normal(rng, (3, 2, 2, 3, 4))
    qk = attend(
        [q, k, v, None, None, None, np.array([2, 0])],
        QK_OUTPUT, qk_matmul_output_mode=mode, softcap=0.5, is_causal=1,
    )[1]  # fmt: skip
    options = {"softcap": 0.5} if mode else {}
    exact = oracle.weights(q, k, stage=STAGES[mode], **options)
    np.testing.assert_allclose(qk, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", [TensorProto.DOUBLE, TensorProto.FLOAT])
def test_double_precision_of_the_softmax_is_that_of_all_sums(engine, rng, precision):
    q, k, v = normal(rng, (3, 1, 2, 40, 64)) * 3
    y, qk = attend([q, k, v], QK_OUTPUT, softmax_precision=precision, qk_matmul_output_mode=3)
    assert y.dtype == qk.dtype == np.float32
    exact = oracle.attention(q, k, v)[0].astype(np.float32)
    rounded = oracle.weights(q, k).astype(np.float32)
    same = (y == exact).mean(), (qk == rounded).mean()
    assert (min(same) > 0.999) == (precision == TensorProto.DOUBLE), same


@pytest.mark.parametrize("size", [1, 1e6])
def test_values_may_have_another_type(engine, rng, size):
    q, k = normal(rng, (2, 1, 2, 5, 8), np.float16)
    v = normal(rng, (1, 2, 5, 8)) * np.float32(size)
    y, _, present_value = attend([q, k, v, None, k, v], ["Y", "present_key", "present_value"])
    assert y.dtype == np.float16
    assert present_value.dtype == np.float32
    keys, values = (np.concatenate((x, x), axis=2) for x in (k, v))
    exact = oracle.attention(q, keys, values)[0]
    with np.errstate(over="ignore"):
        exact = exact.astype(np.float16)
    assert np.isinf(exact).any() == (size > 1)
    np.testing.assert_allclose(y, exact, rtol=2**-10, atol=2**-14)


def test_mixed_types_are_computed_in_one_that_holds_both():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    ones = {name: np.ones(1, name) for name in ("float16", "float32", "float64")}
    ones["bfloat16"] = np.ones(1, ml_dtypes.bfloat16)
    for first, second in itertools.product(ones, ones):
        wider = "float64" if "float64" in (first, second) else "float32"
        expected = first if first == second else wider
        got = adapter._common_dtype((ones[first], ones[first], ones[second]), None)
        assert got.name == expected, (first, second)


@pytest.mark.parametrize("opset", [23, 24])
def test_a_mask_of_one_key(engine, rng, opset):
    q, k, v = normal(rng, (3, 1, 2, 5, 8))
    mask = np.full((5, 1), 0.5, np.float32)
    y, qk = attend([q, k, v, mask], QK_OUTPUT, opset, qk_matmul_output_mode=2)
    if opset == 23:
        oracle.assert_close(y, q, k, v)
    else:
        np.testing.assert_allclose(y, np.repeat(v[:, :, :1], 5, axis=2), rtol=1e-6)
    assert np.isneginf(qk[..., 1:]).all() == (opset == 24)
    np.testing.assert_allclose(qk[..., 0], oracle.weights(q, k, stage="scaled")[..., 0] + 0.5,
                               rtol=1e-5, atol=1e-6)  # fmt: skip


@pytest.mark.parametrize(
    "mask", [np.array([True, True, False]), np.array([0, 3, 0]), np.array(7.0)]
)
def test_short_integer_and_scalar_masks(engine, rng, mask):
    q, k, v = normal(rng, (3, 1, 2, 5, 8))
    whole = mask
    if mask.dtype == bool:
        whole = np.pad(mask, (0, 2))
    elif mask.ndim:
        whole = np.append(mask.astype(float), [-np.inf, -np.inf])
    (y,) = attend([q, k, v, mask])
    oracle.assert_close(y, q, k, v, attn_mask=whole)


def test_excluded_keys_have_no_influence(engine, rng):
    q, k, v = normal(rng, (3, 1, 2, 3, 4))
    expected = attend([q, k, v], QK_OUTPUT, is_causal=1, qk_matmul_output_mode=2)
    k[:, :, 2], v[:, :, 2] = np.nan, np.inf
    y, qk = attend([q, k, v], QK_OUTPUT, is_causal=1, qk_matmul_output_mode=2)
    np.testing.assert_array_equal(y[:, :, :2], expected[0][:, :, :2])
    np.testing.assert_array_equal(qk[:, :, :2], expected[1][:, :, :2])
    assert np.isnan(y[:, :, 2]).all()


def test_an_omitted_input_stays_so_after_an_omitted_output(engine, rng):
    """The evaluator stores outputs by name, so an omitted one is there for later nodes."""
    q, k, v, past = normal(rng, (4, 1, 2, 3, 3))
    nodes = [
        helper.make_node("Attention", ["q", "k", "v"], ["y", "", "", "qk"]),
        helper.make_node("Attention", ["y", "k", "v", "", "past", "past"], ["z"]),
    ]
    feeds = {"q": q, "k": k, "v": v, "past": past}
    y, z = run(model_of(nodes, feeds, ["y", "z"], 23), feeds)
    oracle.assert_close(z, y, *(np.concatenate((past, x), axis=2) for x in (k, v)))


HALF = np.zeros((2, 2, 3, 4), np.float16)
FLAT = np.zeros((2, 3, 8), np.float32)
ERRORS: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "axes": ([FLAT, HALF, HALF], {}, "Q, K and V have 3, 4 and 4 axes"),
    "two axes": ([FLAT[0]] * 3, {}, r"Q has shape \(3, 8\): it must be 3-D or 4-D"),
    "no heads": ([FLAT] * 3, {}, r"q_num_heads is None, but Q has shape \(2, 3, 8\)"),
    "odd heads": ([FLAT] * 3, {"q_num_heads": 2, "kv_num_heads": 3}, "kv_num_heads is 3, but K"),
    "other heads": ([HALF] * 3, {"q_num_heads": 4}, "q_num_heads is 4, but Q has .* on axis 1"),
    "one past": ([HALF] * 3 + [None, HALF], {}, "past_key and past_value must both be given"),
    "two caches": ([HALF] * 6 + [np.array([1, 1])], {}, "only one of them may be"),
    "long": ([HALF] * 3 + [None] * 3 + [np.array([2, 4])], {}, "holds 4, but K has 3 keys"),
    "negative": ([HALF] * 3 + [None] * 3 + [np.array([2, -1])], {}, "holds -1, but K has 3 keys"),
    "lengths": ([HALF] * 3 + [None] * 3 + [np.array([2])], {}, r"nonpad_kv_seqlen has shape \(1,"),
    "softcap": ([HALF] * 3, {"softcap": -1.0}, "softcap is -1.0: it must be positive"),
    "window": ([HALF] * 3, {"left_window_size": -2}, "window's left side"),
    "mode": ([HALF] * 3, {"qk_matmul_output_mode": 4}, "qk_matmul_output_mode is 4: it must be 0"),
    "long mask": ([*[HALF] * 3, np.ones((3, 4), bool)], {}, "attn_mask has shape"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_computed_raises(name):
    inputs, attributes, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        attend(inputs, **attributes)


def test_numbers_of_heads_may_be_given_for_4d_inputs(rng):
    q, k, v = normal(rng, (3, 1, 2, 5, 8))
    (y,) = attend([q, k, v], q_num_heads=2, kv_num_heads=2)
    oracle.assert_close(y, q, k, v)


def test_a_decoder_step_gives_what_onnxruntime_gives(engine, rng):
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    feeds = {"q": normal(rng, (2, 3, 48))}  # 3 tokens after 7, 6 heads over 2
    feeds |= {name: normal(rng, (2, 3, 16)) for name in "kv"}
    feeds |= {name: normal(rng, (2, 2, 7, 8)) for name in ("past_key", "past_value")}
    outputs = ["y", "key", "value", "qk"]
    node = helper.make_node(
        "Attention", ["q", "k", "v", "", "past_key", "past_value"], outputs,
        is_causal=1, q_num_heads=6, kv_num_heads=2, softcap=1.5, qk_matmul_output_mode=3,
    )  # fmt: skip
    model = model_of([node], feeds, outputs, 23)
    session = runtime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for got, expected in zip(run(model, feeds), session.run(None, feeds), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def bert():
    """Return a tiny BERT of torch as an ONNX model, and its inputs."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    nn = torch.nn

    class Layer(nn.Module):
        def __init__(self, size: int, heads: int) -> None:
            super().__init__()
            self.heads = heads
            self.query, self.key, self.value, self.out = (nn.Linear(size, size) for _ in range(4))
            self.up, self.down = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)
            self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)

        def forward(self, x: Any, mask: Any) -> Any:
            split = (
                linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for linear in (self.query, self.key, self.value)
            )
            attended = nn.functional.scaled_dot_product_attention(*split, attn_mask=mask)
            x = self.norm1(x + self.out(attended.transpose(1, 2).flatten(-2)))
            return self.norm2(x + self.down(nn.functional.gelu(self.up(x))))

    class Bert(nn.Module):
        def __init__(self, size: int = 48) -> None:
            super().__init__()
            self.words, self.places = nn.Embedding(97, size), nn.Embedding(32, size)
            self.norm = nn.LayerNorm(size)
            self.layers = nn.ModuleList(Layer(size, heads=3) for _ in range(3))

        def forward(self, ids: Any, real_tokens: Any) -> Any:
            length = ids.shape[1]
            x = self.norm(self.words(ids) + self.places.weight[:length])
            # onnxruntime 1.32 takes no mask that broadcasts along the queries.
            mask = real_tokens.bool()[:, None, None].expand(-1, -1, length, -1)
            for layer in self.layers:
                x = layer(x, mask)
            return x

    torch.manual_seed(0)
    ids, real_tokens = torch.randint(0, 97, (2, 11)), torch.ones(2, 11, dtype=torch.int64)
    real_tokens[1, 7:] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        exported = torch.onnx.export(
            Bert().eval(), (ids, real_tokens), dynamo=True, opset_version=23, verbose=False
        )
    model = exported.model_proto
    names = [given.name for given in model.graph.input]
    return model, dict(zip(names, (ids.numpy(), real_tokens.numpy()), strict=True))


def test_an_exported_bert_gives_what_onnxruntime_gives(engine, bert):
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model, feeds = bert
    assert [node.op_type for node in model.graph.node].count("Attention") == 3
    session = runtime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (expected,) = session.run(None, feeds)
    (got,) = run(model, feeds)
    assert got.shape == (2, 11, 48)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


MISSING = """
import sys
sys.modules["onnx"] = None
import qkv_fast
try:
    import qkv_fast.integrations.onnx
except ImportError as error:
    print(error)
"""


def test_onnx_is_imported_by_its_adapter_only():
    done = run_python("import sys, qkv_fast, qkv_fast.integrations; print('onnx' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr
    done = run_python(MISSING)
    assert done.stdout.strip() == 'onnx is missing: pip install "qkv-fast[onnx]"', done.stderr


def test_docstrings():
    result = doctest.testmod(adapter)
    assert result.attempted > 0
    assert result.failed == 0
