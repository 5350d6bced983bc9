"""torch's own sample inputs of attention, computed through a patch: torch's own answers judge.

They come with torch's wheel: those of its OpInfo and ModuleInfo tables, which torch's tests run.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import qkv_fast
from qkv_fast import _dispatch

torch = pytest.importorskip("torch", minversion="2.13", reason="torch 2.13 is not installed")
pytest.importorskip("expecttest", reason="expecttest is missing, which torch's samples import")

from torch.utils._pytree import tree_map_only  # noqa: E402

import qkv_fast.integrations.torch as adapter  # noqa: E402

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

OPERATORS = {x.name.removeprefix("nn.functional."): x for x in op_db if "attention" in x.name}
LAYERS = {x.module_cls.__name__: x for x in module_db}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16,
          "bfloat16": torch.bfloat16}  # fmt: skip
TOLERANCES = {torch.float32: (5e-5, 5e-6), torch.float64: (1e-7, 1e-7),
              torch.float16: (1e-2, 1e-2), torch.bfloat16: (5e-2, 5e-2)}  # fmt: skip
DROPOUT = "dropout is asked for"


class Record:
    """Who computed the calls of attention.

    Attributes
    ----------
    count : int
        Calls that this library computed.
    reasons : list of str
        Why torch's own function computed each other call.
    """

    def __init__(self) -> None:
        self.count = 0
        self.reasons: list[str] = []

    def counted(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that counts its calls that have an answer."""

        def call(*given: Any, **options: Any) -> Any:
            answer = compute(*given, **options)
            self.count += answer is not None
            return answer

        return call


class Counted:
    """A module one of whose functions counts its calls."""

    def __init__(self, module: Any, name: str, record: Record) -> None:
        self._module = module
        setattr(self, name, record.counted(getattr(module, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@pytest.fixture(params=["python", "native"])
def record(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Record]:
    """Run a test on each engine, without the fast path of torch's layers, which calls no Python."""
    if request.param == "native":
        request.getfixturevalue("native")
    result = Record()
    with qkv_fast.backend(request.param):
        for dtype in DTYPES.values():  # connects the shortcut
            adapter.scaled_dot_product_attention(*torch.ones(3, 1, 1, 1, 1, dtype=dtype))
        shortcuts = Counted(_dispatch.shortcuts, "attend_tensors", result)
        monkeypatch.setattr(_dispatch, "shortcuts", shortcuts)
        library = Counted(qkv_fast, "scaled_dot_product_attention", result)
        monkeypatch.setattr(adapter, "qkv_fast", library)
        monkeypatch.setattr(adapter, "_warn_once", result.reasons.append)
        before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        torch.manual_seed(0)
        yield result
        torch.backends.mha.set_fastpath_enabled(before)


def samples_of(name: str, dtype: str) -> list[Any]:
    torch.manual_seed(0)
    return list(OPERATORS[name].sample_inputs("cpu", DTYPES[dtype]))


def double(x: Any) -> Any:
    """Return what is given with tensors of floats in float64."""
    return tree_map_only(torch.Tensor, lambda x: x.double() if x.is_floating_point() else x, x)


def check(
    run: Callable[..., Any], samples: list[tuple[Any, bool]], record: Record, calls: int
) -> None:
    """Assert that computations through a patch have torch's answers, and who computed them.

    `samples` are arguments of `run`, and whether torch's own function computes the call because of
    dropout: then both answers have equal bits. The other answers are equal by the tolerances that
    torch's tests of the function have; where numbers exceed 1, the absolute one grows with them.
    Beside torch's float64 answer, the largest error among all samples, as a share of the sample's
    largest number, is at most twice torch's own.
    """
    errors = []
    for given, has_dropout in samples:
        record.count = 0
        record.reasons.clear()
        with torch.no_grad():
            expected, exact = run(given), run(double(given))
            assert not record.count
            with adapter.patch():
                result = run(given)
        if has_dropout:
            assert (record.count, record.reasons) == (0, [DROPOUT])
            torch.testing.assert_close(result, expected, rtol=0, atol=0)
            continue
        assert (record.count, record.reasons) == (calls, [])
        assert (result.shape, result.stride()) == (expected.shape, expected.stride())
        size = exact.abs().max()
        atol, rtol = TOLERANCES[result.dtype]
        torch.testing.assert_close(result, expected, atol=atol * max(1, size), rtol=rtol)
        errors.append([(x - exact).abs().max() / size for x in (result, expected)])
    if result.dtype != torch.float64:
        error, torchs_error = torch.tensor(errors).amax(0)
        assert error <= 2 * torchs_error


def run_operator(name: str, **options: Any) -> Callable[[Any], Any]:
    """Return a function that calls one of torch's functions with the arguments of a sample."""

    def run(given: Any) -> Any:
        (argument, *more), named = given
        result = OPERATORS[name].op(argument, *more, **named, **options)
        return result[0] if isinstance(result, tuple) else result

    return run


@pytest.mark.parametrize("is_contiguous", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_samples_of_the_function(record, dtype, is_contiguous):
    name = "scaled_dot_product_attention"
    samples = samples_of(name, dtype)
    assert len(samples) > 20
    if not is_contiguous:
        samples = [x.noncontiguous() for x in samples]
    given = [(((x.input, *x.args), x.kwargs), x.kwargs["dropout_p"] > 0) for x in samples]
    check(run_operator(name), given, record, 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_samples_of_multi_head_attention(record, dtype):
    """It returns no weights: for them, torch computes attention without its function."""
    name = "multi_head_attention_forward"
    samples = samples_of(name, dtype)
    assert len(samples) > 100
    given = [(((x.input, *x.args), x.kwargs), x.kwargs["training"]) for x in samples]
    check(run_operator(name, need_weights=False), given, record, 1)


# The calls of attention of each layer in torch's samples.
CALLS = {"MultiheadAttention": 1, "TransformerEncoderLayer": 1, "TransformerEncoder": 2,
         "TransformerDecoderLayer": 2, "Transformer": 3}  # fmt: skip


def run_layer(given: Any) -> Any:
    """Return what a layer makes of inputs, in their dtype."""
    layer, inputs, options = given
    result = copy.deepcopy(layer).to(inputs[0].dtype)(*inputs, **options)
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
def test_samples_of_layers(record, name, dtype):
    """torch has more samples for training, which fit evaluation as well."""
    info = LAYERS[name]
    torch.manual_seed(0)
    samples = info.module_inputs_func(info, "cpu", DTYPES[dtype], False, training=True)
    assert len(samples) > 30
    given = []
    for sample in samples:
        made, forward = sample.constructor_input, sample.forward_input
        layer = info.module_cls(*made.args, **made.kwargs).to(DTYPES[dtype]).eval()
        options = dict(forward.kwargs)
        if name == "MultiheadAttention":
            options["need_weights"] = False
        given.append(((layer, forward.args, options), False))
    check(run_layer, given, record, CALLS[name])
