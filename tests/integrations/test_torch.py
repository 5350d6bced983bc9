"""torch's scaled_dot_product_attention computed by qkv_fast: torch's own function judges."""

from __future__ import annotations

import contextlib
import copy
import doctest
import gc
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
from helpers import run_python

import qkv_fast
from qkv_fast import _dispatch

torch = pytest.importorskip("torch", minversion="2.13", reason="torch 2.13 is not installed")

import torch.nn.functional as F  # noqa: E402

import qkv_fast.integrations.torch as adapter  # noqa: E402
from qkv_fast.integrations.torch import Patch, patch  # noqa: E402
from qkv_fast.integrations.torch import scaled_dot_product_attention as sdpa  # noqa: E402

own = torch._C._nn.scaled_dot_product_attention
DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16,
          "bfloat16": torch.bfloat16}  # fmt: skip


def warm() -> None:
    """Connect the shortcut, as the first call of a dtype does."""
    for dtype in DTYPES.values():
        sdpa(*torch.ones(3, 1, 1, 1, 1, dtype=dtype))


@pytest.fixture(params=["python", "native"])
def engine(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "native":
        request.getfixturevalue("native")
    with qkv_fast.backend(request.param):
        warm()
        yield


@pytest.fixture(autouse=True)
def no_warning_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "_warned", set())


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    warm()
    yield
    assert F.scaled_dot_product_attention is own
    assert not adapter._active


def array(x: Any) -> np.ndarray:
    """Return a tensor as an array, of ml_dtypes for bfloat16."""
    if x.dtype == torch.bfloat16:
        return x.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


def tokens_first(*shape: int) -> Any:
    """Return (B, H, L, D) as models have it: (B, L, H, D) in memory."""
    return torch.randn(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2)


def packed(*shape: int) -> Any:
    """Return (B, H, L, D) as a slice of queries, keys and values side by side."""
    b, h, n, d = shape
    return torch.randn(b, n, 3, h, d)[:, :, 1].transpose(1, 2)


def strided(*shape: int) -> Any:
    return torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]


def bools(*shape: int) -> Any:
    mask = torch.rand(shape) < 0.6
    mask[..., 0] = True
    return mask


def biases(*shape: int) -> Any:
    return torch.randn(shape).masked_fill(torch.rand(shape) < 0.2, -torch.inf)


r = torch.randn

# Each gives query, key, value and options. The cases are those of PyTorch's own tests of forward
# calls on CPUs by kind: layouts, lengths, head sizes, masks of each rank, causal, groups, empty.
CASES: dict[str, Callable[[], tuple[Any, Any, Any, dict[str, Any]]]] = {
    "one token": lambda: (*r(3, 1, 1, 1, 64), {}),
    "decoding": lambda: (r(2, 4, 1, 64), *r(2, 2, 4, 300, 64), {}),
    "small": lambda: (*r(3, 2, 3, 5, 8), {}),
    "long": lambda: (*r(3, 1, 2, 300, 64), {}),
    "cross": lambda: (r(2, 3, 17, 16), *r(2, 2, 3, 70, 16), {}),
    "odd sizes": lambda: (*r(2, 2, 3, 67, 33), r(2, 3, 67, 17), {}),
    "wide": lambda: (*r(3, 1, 1, 20, 300), {}),
    "size 1": lambda: (*r(3, 2, 3, 5, 1), {}),
    "two axes": lambda: (*r(3, 7, 8), {}),
    "three axes": lambda: (*r(3, 4, 7, 8), {}),
    "five axes": lambda: (*r(3, 2, 2, 3, 5, 8), {}),
    "tokens first": lambda: (*(tokens_first(2, 3, 65, 16) for _ in "qkv"), {}),
    "tokens first, another value size": lambda: (
        *(tokens_first(2, 3, 65, n) for n in (16, 16, 8)), {}),
    "packed": lambda: (*(packed(2, 3, 9, 16) for _ in "qkv"), {}),
    "strided": lambda: (*(strided(2, 3, 9, 16) for _ in "qkv"), {}),
    "expanded query": lambda: (r(1, 1, 9, 16).expand(2, 3, 9, 16), *r(2, 2, 3, 9, 16), {}),
    "expanded keys": lambda: (r(2, 4, 9, 16), *(r(2, 1, 9, 16).expand(2, 4, 9, 16) for _ in "kv"),
                              {}),
    "causal": lambda: (*r(3, 2, 3, 70, 16), {"is_causal": True}),
    "causal, more keys": lambda: (r(2, 3, 5, 16), *r(2, 2, 3, 9, 16), {"is_causal": True}),
    "causal, fewer keys": lambda: (r(2, 3, 9, 16), *r(2, 2, 3, 5, 16), {"is_causal": True}),
    "causal and mask": lambda: (*r(3, 2, 3, 9, 16), {"attn_mask": bools(9, 9), "is_causal": True}),
    "scale": lambda: (*r(3, 2, 3, 9, 16), {"scale": 0.7}),
    "scale 0": lambda: (*r(3, 2, 3, 9, 16), {"scale": 0.0}),
    "scale below 0": lambda: (*r(3, 2, 3, 9, 16), {"scale": -0.7}),
    "scale of an int": lambda: (*r(3, 2, 3, 9, 16), {"scale": 1}),
    "mask of 2 axes": lambda: (*r(3, 2, 3, 9, 16), {"attn_mask": bools(9, 9)}),
    "mask of 3 axes": lambda: (*r(3, 2, 3, 9, 16), {"attn_mask": bools(3, 9, 9)}),
    "mask of 4 axes": lambda: (*r(3, 2, 3, 9, 16), {"attn_mask": bools(2, 3, 9, 9)}),
    "padding mask": lambda: (*r(3, 2, 3, 70, 16), {"attn_mask": bools(2, 1, 1, 70)}),
    "mask of rows": lambda: (*r(3, 2, 3, 9, 16), {"attn_mask": bools(9, 1)}),
    "mask beside 3 axes": lambda: (*r(3, 3, 9, 16), {"attn_mask": bools(3, 9, 9)}),
    "mask of other strides": lambda: (*r(3, 2, 3, 9, 16), {"attn_mask": bools(9, 2, 9)[:, 1]}),
    "bias": lambda: (*r(3, 2, 3, 9, 16), {"attn_mask": biases(9, 9)}),
    "bias of 4 axes": lambda: (*r(3, 2, 3, 70, 16), {"attn_mask": biases(1, 3, 70, 70)}),
    "bias of finfo.min": lambda: (
        *r(3, 2, 3, 9, 16), {"attn_mask": torch.full((9, 9), torch.finfo(torch.float32).min)}),
    "rows without keys": lambda: (
        *r(3, 2, 3, 9, 16), {"attn_mask": torch.arange(9)[:, None] > torch.arange(9)}),
    "bias of -inf": lambda: (*r(3, 2, 3, 9, 16), {"attn_mask": torch.full((9, 9), -torch.inf)}),
    "mask of strides 0": lambda: (
        r(2, 3, 9, 16), *r(2, 2, 3, 12, 16),
        {"attn_mask": bools(12).as_strided((2, 3, 9, 12), (0, 0, 0, 1))}),
    "tokens as queries, keys of strides 0": lambda: (
        r(3, 1, 18, 128).transpose(1, 2)[:, :16],
        *(r(3, 14, 1, 128).expand(3, 14, 16, 128).transpose(1, 2) for _ in "kv"),
        {"attn_mask": bools(3, 1, 1, 14)}),
    "large products": lambda: (*torch.full((3, 1, 4, 23, 80), 256.0), {}),
    "large scale below 0": lambda: (*r(1, 1, 3, 64, 64).expand(3, 1, 3, 64, 64), {"scale": -1e4}),
    "groups": lambda: (r(2, 6, 9, 16), *r(2, 2, 3, 9, 16), {"enable_gqa": True}),
    "groups, causal": lambda: (
        r(2, 6, 70, 16), *r(2, 2, 2, 70, 16), {"enable_gqa": True, "is_causal": True}),
    "groups, mask": lambda: (
        r(2, 6, 9, 16), *r(2, 2, 3, 9, 16), {"enable_gqa": True, "attn_mask": bools(2, 6, 9, 9)}),
    "groups of 3 axes": lambda: (r(6, 9, 16), *r(2, 3, 9, 16), {"enable_gqa": True}),
    "no groups": lambda: (*r(3, 2, 3, 9, 16), {"enable_gqa": True}),
    "batch broadcast": lambda: (r(2, 3, 9, 16), *r(2, 1, 3, 9, 16), {}),
    "query broadcast": lambda: (r(1, 3, 9, 16), *r(2, 2, 3, 9, 16), {}),
    "one key head": lambda: (r(2, 3, 9, 16), *r(2, 2, 1, 9, 16), {}),
    "one query head": lambda: (r(2, 1, 9, 16), *r(2, 2, 3, 9, 16), {}),
    "one value head": lambda: (*r(2, 2, 3, 9, 16), r(2, 1, 9, 16), {}),
    "fewer axes of keys": lambda: (r(2, 3, 9, 16), *r(2, 3, 9, 16), {}),
    "fewer axes of the query": lambda: (r(9, 16), *r(2, 2, 3, 9, 16), {}),
    "no batch": lambda: (*r(3, 0, 3, 9, 16), {}),
    "no heads": lambda: (*r(3, 2, 0, 9, 16), {}),
    "no queries": lambda: (r(2, 3, 0, 16), *r(2, 2, 3, 9, 16), {}),
    "no keys": lambda: (r(2, 3, 9, 16), *r(2, 2, 3, 0, 16), {}),
    "no value size": lambda: (*r(2, 2, 3, 9, 16), r(2, 3, 9, 0), {}),
}  # fmt: skip


def make(case: str, dtype: str) -> tuple[list[Any], dict[str, Any]]:
    query, key, value, options = CASES[case]()
    return [x.to(DTYPES[dtype]) for x in (query, key, value)], options


def check(actual: Any, given: list[Any], options: dict[str, Any]) -> None:
    """Check that the error is at most twice torch's own."""
    expected = own(*given, **options)
    assert type(actual) is torch.Tensor
    assert actual.dtype == given[0].dtype
    assert actual.shape == expected.shape
    if not actual.numel():
        return
    wide = {name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for name, x in options.items()}  # fmt: skip
    exact = own(*(x.double() for x in given), **wide).numpy()
    with np.errstate(all="ignore"):
        oracle.assert_error_at_most_twice(array(actual), array(expected), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_results_are_torchs(engine, case, dtype):
    given, options = make(case, dtype)
    kept = [x.clone() for x in given]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none is left to torch
        check(sdpa(*given, **options), given, options)
    assert all(map(torch.equal, given, kept))


@pytest.mark.parametrize("case", ["small", "one token", "tokens first", "packed", "two axes",
                                  "three axes", "five axes", "odd sizes", "no keys", "groups",
                                  "tokens first, another value size"])  # fmt: skip
def test_the_layout_is_torchs(engine, case):
    given, options = make(case, "float32")
    assert sdpa(*given, **options).stride() == own(*given, **options).stride()


def test_a_result_of_tokens_first_needs_no_copy(engine):
    out = sdpa(*(tokens_first(2, 3, 5, 8) for _ in "qkv"))
    assert out.transpose(1, 2).reshape(2, 5, 24).data_ptr() == out.data_ptr()


@pytest.mark.parametrize("mask", ["float32", "float64", "float16", "bfloat16", "bool", "int32"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_of_each_dtype(engine, dtype, mask):
    given, _ = make("small", dtype)
    options = {"attn_mask": bools(5, 5).to(getattr(torch, mask))}
    if mask in ("bool", "float32", dtype):
        check(sdpa(*given, **options), given, options)
    else:
        with pytest.raises(RuntimeError, match="Expected attn_mask dtype"):
            sdpa(*given, **options)


REFUSED: dict[str, Callable[[Any], Any]] = {
    "one axis": lambda f: f(*r(3, 8)),
    "dtypes": lambda f: f(r(2, 3, 8), r(2, 3, 8).double(), r(2, 3, 8)),
    "ints": lambda f: f(*torch.ones(3, 2, 3, 8, dtype=torch.int64)),
    "head sizes": lambda f: f(r(2, 3, 8), *r(2, 2, 3, 7)),
    "batch": lambda f: f(r(2, 3, 5, 8), *r(2, 4, 3, 5, 8)),
    "heads": lambda f: f(r(2, 6, 5, 8), *r(2, 2, 3, 5, 8)),
    "groups": lambda f: f(r(2, 4, 5, 8), *r(2, 2, 3, 5, 8), enable_gqa=True),
    "groups of the query": lambda f: f(r(2, 1, 5, 8), *r(2, 2, 3, 5, 8), enable_gqa=True),
    "mask of one axis": lambda f: f(*r(3, 2, 3, 5, 8), torch.ones(5)),
    "mask's shape": lambda f: f(*r(3, 2, 3, 5, 8), torch.ones(4, 5)),
    "mask of more axes": lambda f: f(*r(3, 2, 3, 5, 8), torch.ones(1, 2, 3, 5, 5)),
    "mask of a larger batch": lambda f: f(*r(3, 1, 3, 5, 8), torch.ones(2, 1, 5, 5)),
    "mask of another kind": lambda f: f(*r(3, 2, 3, 5, 8), np.ones((5, 5))),
    "array": lambda f: f(np.ones((2, 3, 8)), *r(2, 2, 3, 8)),
    "is_causal": lambda f: f(*r(3, 2, 3, 8), is_causal=1),
    "is_causal None": lambda f: f(*r(3, 2, 3, 8), is_causal=None),
    "enable_gqa": lambda f: f(*r(3, 2, 3, 8), enable_gqa="yes"),
    "scale": lambda f: f(*r(3, 2, 3, 8), scale="large"),
    "dropout": lambda f: f(*r(3, 2, 3, 8), dropout_p=None),
}


@pytest.mark.parametrize("case", REFUSED)
def test_errors_are_torchs(engine, case):
    with pytest.raises(Exception) as expected:  # noqa: PT011 - the next check says which
        REFUSED[case](own)
    accepted = (expected.type, TypeError) if case == "scale" else expected.type
    with pytest.raises(accepted):
        REFUSED[case](sdpa)


def test_fewer_values_than_keys_are_refused(engine):
    """Torch reads past the end of value."""
    with pytest.raises(ValueError, match="value has length 4 on axis -2, but key has 5"):
        sdpa(*r(2, 2, 3, 5, 8), r(2, 3, 4, 8))


def test_excluded_nan_has_no_influence(engine):
    q, k, v = r(3, 2, 3, 5, 8)
    k[..., 0, :] = v[..., 0, :] = torch.nan
    mask = torch.arange(5) > 0
    out = sdpa(q, k, v, mask[None])
    torch.testing.assert_close(out, own(q, k[:, :, 1:], v[:, :, 1:]))


def test_plain_calls_take_the_shortcut(native):
    """It makes the result itself, and leaves all other calls alone."""
    if qkv_fast._select.current().tiles != "simd":
        pytest.skip("BLAS tiles take no shortcut")
    made: list[Any] = []

    def note(like: Any) -> Any:
        made.append(torch.empty_like(like))
        return made[-1]

    attend = _dispatch.shortcuts.attend_tensors
    for case in ("one token", "tokens first", "packed", "bias", "padding mask", "causal", "groups"):
        (query, key, value), options = make(case, "bfloat16")
        more = [options.get("attn_mask"), options.get("is_causal", False), options.get("scale"),
                options.get("enable_gqa", False)]  # fmt: skip
        out = attend(query, key, value, *more, note)
        assert out is made.pop()
        check(out, [query, key, value], options)
    q, k, v = r(3, 1, 2, 5, 8)
    before = [sys.getrefcount(x) for x in (q, k, v)]
    for _ in range(3):
        attend(q, k, v, None, False, None, False, note)
    assert [sys.getrefcount(x) for x in (q, k, v)] == before
    for wrong in (
        (q, k, v.double(), None, False, None, False),
        (q, k[:, :1], v[:, :1], None, False, None, False),
        (q.requires_grad_(), k, v, None, False, None, False),
        (k, k, v, torch.ones(5, dtype=torch.bool), False, None, False),
        (k, k, v, torch.ones(5, 5).double(), False, None, False),
        (k, k, v, torch.ones(5, 5, requires_grad=True), False, None, False),
        (k, k, v, torch.ones(4, 5), False, None, False),
        (k, k, v, None, 1, None, False),
        (k, k, v, None, False, 2, False),
        (k.bool(), k.bool(), v.bool(), None, False, None, False),
        (k.numpy(), k, v, None, False, None, False),
    ):
        assert attend(*wrong, torch.empty_like) is None


def test_nothing_is_copied(engine, monkeypatch):
    """Outside the shortcut too: the op gets the caller's memory and the result's."""
    monkeypatch.setattr(_dispatch, "shortcuts", _dispatch._NoShortcuts)
    seen: list[int] = []
    attention = qkv_fast.scaled_dot_product_attention

    def note(*given: Any, out: Any, **options: Any) -> Any:
        seen.extend(x.data_ptr() for x in (*given[:4], out))
        return attention(*given, out=out, **options)

    monkeypatch.setattr(qkv_fast, "scaled_dot_product_attention", note)
    for dtype in DTYPES:
        for case in ("padding mask", "groups, mask"):
            given, options = make(case, dtype)
            seen.clear()
            out = sdpa(*given, **options)
            expected = [*given, options["attn_mask"], out]
            assert seen == [x.data_ptr() for x in expected]
            check(out, given, options)


@pytest.mark.parametrize("is_patched", [False, True])
@pytest.mark.parametrize("name", ["causal_upper_left", "causal_lower_right"])
def test_the_biases_of_torch(engine, name, is_patched):
    """They are subclasses of Tensor that look for torch's function by its name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch.nn.attention.bias as biases
    q, k, v = r(2, 3, 5, 8), *r(2, 2, 3, 9, 8)
    lower = torch.ones(5, 9, dtype=torch.bool).tril(4 if name == "causal_lower_right" else 0)
    bias = getattr(biases, name)(5, 9)
    with patch() if is_patched else contextlib.nullcontext():
        result = sdpa(q, k, v, bias)
        with pytest.raises(ValueError, match="CausalBias should not be used with causal=True"):
            sdpa(q, k, v, bias, is_causal=True)
    torch.testing.assert_close(result, own(q, k, v, lower))


def test_negated_views(engine):
    x = torch.randn(2, 5, 8, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    torch.testing.assert_close(sdpa(x, x, x), own(x, x, x))


# --- Calls that are left to torch ---------------------------------------------------------------


def caught(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        result = call()
    assert all(record.filename == __file__ for record in records)
    return result, [str(record.message) for record in records]


def with_grad() -> list[Any]:
    return [x.requires_grad_() for x in r(3, 2, 3, 5, 8)]


class Subclass(torch.Tensor):
    pass


LEFT: dict[str, tuple[Callable[[], tuple[list[Any], dict[str, Any]]], str]] = {
    "grad": (lambda: (with_grad(), {}), "requires grad"),
    "grad of the mask": (
        lambda: ([*r(3, 2, 5, 8)], {"attn_mask": torch.zeros(5, 5, requires_grad=True)}),
        "requires grad"),
    "dropout": (lambda: ([*r(3, 2, 3, 5, 8)], {"dropout_p": 1.0}), "dropout"),
    "subclass": (lambda: ([x.as_subclass(Subclass) for x in r(3, 2, 5, 8)], {}), "subclass"),
    "nested": (
        lambda: ([torch.nested.nested_tensor([r(3, 2, 8), r(5, 2, 8)], layout=torch.jagged)
                  .transpose(1, 2)] * 3, {}), "subclass"),
    "kv heads": (lambda: ([r(2, 6, 5, 8), r(2, 3, 5, 8), r(2, 2, 5, 8)], {"enable_gqa": True}),
                 "shapes"),
    "size 0": (lambda: ([*r(2, 2, 3, 5, 0), r(2, 3, 5, 8)], {}), "shapes"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("case", LEFT)
def test_calls_are_left_to_torch_with_one_warning(engine, case):
    make, reason = LEFT[case]
    given, options = make()
    expected = own(*given, **options)
    results, messages = caught(lambda: [sdpa(*given, **options) for _ in range(3)])
    assert len(messages) == 1
    assert reason in messages[0]
    assert messages[0].startswith("torch's own scaled_dot_product_attention computed a call")
    for result in results:
        assert type(result) is type(expected)
        if not expected.is_nested:
            torch.testing.assert_close(result, expected, equal_nan=True)


def test_each_reason_warns_once():
    q, k, v = with_grad()
    _, messages = caught(lambda: [sdpa(q, k, v), sdpa(q, k, v, dropout_p=1.0), sdpa(q, k, v)])
    assert len(messages) == 2


def test_what_is_not_on_the_cpu_is_torchs():
    x = r(2, 3, 5, 8, device="meta")
    result, messages = caught(lambda: sdpa(x, x, x))
    assert result.device.type == "meta"
    assert len(messages) == 1
    assert "not on the CPU" in messages[0]


def test_what_is_not_dense_is_torchs():
    x = r(2, 3, 8).to_sparse()
    with pytest.raises(Exception) as expected:  # noqa: PT011 - the next check says which
        own(x, x, x)
    with pytest.raises(expected.type):
        sdpa(x, x, x)


def test_gradients_are_torchs():
    given = with_grad()
    _, messages = caught(lambda: sdpa(*given, is_causal=True).square().sum().backward())
    assert len(messages) == 1
    grads = [x.grad for x in given]
    again = [x.detach().requires_grad_() for x in given]
    own(*again, is_causal=True).square().sum().backward()
    for x, grad in zip(again, grads, strict=True):
        torch.testing.assert_close(grad, x.grad)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_parameters_without_grad_mode(engine, mode):
    q, k, v = (torch.nn.Parameter(x) for x in r(3, 2, 3, 5, 8))
    with mode():
        for given in ((q, k, v), with_grad()):
            out = sdpa(*given)
            assert not out.requires_grad
            torch.testing.assert_close(out, own(*given))


# --- What torch does with operators -------------------------------------------------------------


def test_transforms_of_torch_func():
    q, k, v = r(3, 2, 3, 5, 8)

    def transformed(function: Any) -> list[Any]:
        return [
            torch.func.vmap(function)(q, k, v),
            torch.func.grad(lambda x: function(x, k, v).sum())(q),
            torch.func.functionalize(function)(q, k, v),
        ]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = transformed(sdpa)
    torch.testing.assert_close(results, transformed(own))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forward_mode_derivatives_are_torchs():
    """A direct call would drop the tangent."""
    q, k, v = r(3, 2, 3, 5, 8)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        with math, pytest.warns(RuntimeWarning, match="forward-mode"):
            out = sdpa(dual, k, v)
        assert torch.autograd.forward_ad.unpack_dual(out).tangent is not None


@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast(engine, dtype):
    given, options = make("bias", dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if dtype == "float64":  # stays so, but the mask does not
            for function in (sdpa, own):
                with pytest.raises(RuntimeError, match="Expected attn_mask dtype"):
                    function(*given, **options)
            options = {}
        out = sdpa(*given, **options)
        assert out.dtype == own(*given, **options).dtype
        mixed = sdpa(given[0].float(), given[1].half(), given[2].bfloat16())
        assert mixed.dtype == torch.bfloat16
    cast = [x.to(out.dtype) for x in given]
    check(out, cast, {name: x.to(out.dtype) for name, x in options.items()})


def test_make_fx_and_fake_tensors_see_the_operator():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    q, k, v = r(3, 2, 3, 5, 8)
    graph = make_fx(lambda q, k, v: sdpa(q, k, v))(q, k, v)
    assert "qkv_fast.scaled_dot_product_attention" in graph.code
    torch.testing.assert_close(graph(*r(3, 2, 3, 5, 8)).shape, q.shape)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(q)
        assert sdpa(fake, fake, fake[..., :6]).shape == (2, 3, 5, 6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit traces it:RuntimeWarning")
def test_torch_jit_gets_torchs_own():
    q, k, v = r(3, 2, 3, 5, 8)
    model = Model()
    with patch():
        traced, scripted = torch.jit.trace(model, (q, k, v)), torch.jit.script(model)
    for graph in (traced, scripted):
        assert "aten::scaled_dot_product_attention" in str(graph.graph)
        torch.testing.assert_close(graph(k, q, v), model(k, q, v))


OPERATOR_CASES = ["small", "tokens first", "tokens first, another value size", "two axes",
                  "three axes", "five axes", "packed", "strided", "expanded query", "bias",
                  "padding mask", "causal", "groups", "one key head", "one value head",
                  "query broadcast", "no keys", "no queries", "scale"]  # fmt: skip


@pytest.mark.parametrize("case", OPERATOR_CASES)
def test_opcheck(engine, case):
    (query, key, value), options = make(case, "float32")
    names = ("attn_mask", "is_causal", "scale", "enable_gqa")
    defaults = (None, False, None, False)
    more = [options.get(name, x) for name, x in zip(names, defaults, strict=True)]
    operator = torch.ops.qkv_fast.scaled_dot_product_attention.default
    checks = torch.library.opcheck(operator, (query, key, value, *more))
    assert set(checks.values()) == {"SUCCESS"}


class Model(torch.nn.Module):
    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(query * 2, key, value, is_causal=True) + 1


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def graphs_of(function: Any, **options: Any) -> tuple[Any, list[str]]:
    """Return a compiled function, without graph breaks, and the list of its graphs' code."""
    from torch._dynamo.backends.debugging import aot_eager

    graphs: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph.code)
        return aot_eager(graph, inputs)

    return torch.compile(function, backend=backend, fullgraph=True, **options), graphs


@pytest.mark.parametrize("case", OPERATOR_CASES)
def test_compiled_calls(engine, dynamo, case):
    given, options = make(case, "bfloat16")
    function, graphs = graphs_of(lambda *given: sdpa(*given, **options) * 1)
    check(function(*given), given, options)
    assert len(graphs) == 1
    assert graphs[0].count("qkv_fast.scaled_dot_product_attention") == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_calls_of_any_length(dynamo):
    function, graphs = graphs_of(
        lambda q, k, v: sdpa(q, k, v).transpose(1, 2).flatten(2), dynamic=True
    )
    counts = []
    for length in (5, 9, 17):
        given = [tokens_first(2, 3, length, 8) for _ in "qkv"]
        torch.testing.assert_close(function(*given), own(*given).transpose(1, 2).flatten(2))
        counts.append(len(graphs))
    assert len(set(counts)) == 1  # all graphs are the first call's
    assert all("qkv_fast" in graph for graph in graphs)


def test_compiled_models_follow_the_patch(dynamo):
    model, (q, k, v) = Model(), r(3, 2, 3, 5, 8)
    expected = model(q, k, v)
    compiled, graphs = graphs_of(model)
    for _ in range(2):
        torch.testing.assert_close(compiled(q, k, v), expected)
        with patch():
            torch.testing.assert_close(compiled(q, k, v), expected)
    assert ["qkv_fast" in graph for graph in graphs] == [False, True]


def test_compiled_gradients_are_torchs(dynamo):
    q, k, v = r(3, 2, 3, 5, 8)
    compiled, graphs = graphs_of(lambda q: sdpa(q, k, v) * 2)
    given = q.clone().requires_grad_()
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        compiled(given).sum().backward()
    assert ["requires grad" in str(record.message) for record in records
            if record.category is RuntimeWarning] == [True]  # fmt: skip
    again = q.clone().requires_grad_()
    (own(again, k, v) * 2).sum().backward()
    torch.testing.assert_close(given.grad, again.grad)
    with torch.no_grad():
        compiled(given)
    assert ["qkv_fast" in graph for graph in graphs] == [False, True]


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", ["causal_upper_left", "causal_lower_right"])
def test_compiled_calls_with_the_biases_of_torch(dynamo, monkeypatch, name, requires_grad):
    monkeypatch.setattr(adapter, "_warned", {"a tensor requires grad, and grad mode is on"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch.nn.attention.bias as biases
    q, k, v = r(2, 3, 5, 8, requires_grad=requires_grad), *r(2, 2, 3, 9, 8)
    bias = getattr(biases, name)(5, 9)
    compiled, graphs = graphs_of(lambda *given: sdpa(*given) * 1)
    torch.testing.assert_close(compiled(q, k, v, bias), own(q, k, v, bias._materialize()))
    assert ["qkv_fast" in graph for graph in graphs] == [not requires_grad]


def test_the_biases_of_torch_on_other_devices():
    import torch.nn.attention.bias as biases

    q, k = r(2, 3, 5, 8, device="meta"), r(2, 3, 9, 8, device="meta")
    with pytest.warns(RuntimeWarning, match="not on the CPU"):
        assert sdpa(q, k, k, biases.causal_lower_right(5, 9)).shape == q.shape


def test_compiled_under_autocast(dynamo):
    q, k, v = r(3, 2, 3, 5, 8)
    compiled, graphs = graphs_of(lambda *given: sdpa(*given) * 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = compiled(q, k, v)
    assert out.dtype == torch.bfloat16
    assert "qkv_fast" in graphs[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(out, own(q, k, v))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_inductor(dynamo, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    given = [tokens_first(2, 3, 9, 16) for _ in "qkv"]
    with patch(), torch.no_grad():
        compiled = torch.compile(Model(), backend="inductor", fullgraph=True)
        out = compiled(*given)
    torch.testing.assert_close(out, Model()(*given))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("strict", [False, True])
def test_exported_models_hold_the_operator(dynamo, strict):
    q, k, v = r(3, 2, 3, 5, 8)
    with patch():
        program = torch.export.export(Model(), (q, k, v), strict=strict)
    assert "qkv_fast.scaled_dot_product_attention" in program.graph_module.code
    torch.testing.assert_close(program.module()(q, k, v), Model()(q, k, v))


# --- patch() ------------------------------------------------------------------------------------


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets an entry for each call that this library computes."""
    calls: list[int] = []
    compute = adapter._compute

    def count(*given: Any) -> Any:
        calls.append(len(given))
        return compute(*given)

    monkeypatch.setattr(adapter, "_compute", count)
    monkeypatch.setattr(_dispatch, "shortcuts", _dispatch._NoShortcuts)
    return calls


@pytest.fixture
def slow_path() -> Iterator[None]:
    """Switch off the fast path of torch's layers, which calls no function of Python."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def padding(batch: int, length: int) -> Any:
    return torch.arange(length) >= torch.arange(length - batch + 1, length + 1)[:, None]


LAYERS: dict[str, tuple[Callable[[], Any], Callable[[Any, Any], Any], int]] = {
    "MultiheadAttention": (
        lambda: torch.nn.MultiheadAttention(48, 3, batch_first=True),
        lambda m, x: m(x, x, x, need_weights=False, key_padding_mask=padding(*x.shape[:2]))[0], 1),
    "MultiheadAttention, lengths first": (
        lambda: torch.nn.MultiheadAttention(48, 3, add_bias_kv=True),
        lambda m, x: m(x, x, x, need_weights=False)[0], 1),
    "TransformerEncoderLayer": (
        lambda: torch.nn.TransformerEncoderLayer(48, 3, 96, batch_first=True),
        lambda m, x: m(x, is_causal=True,
                       src_mask=torch.nn.Transformer.generate_square_subsequent_mask(x.shape[1])),
        1),
    "TransformerEncoder": (
        lambda: torch.nn.TransformerEncoder(
            torch.nn.TransformerEncoderLayer(48, 3, 96, batch_first=True), 3,
            enable_nested_tensor=False),
        lambda m, x: m(x, src_key_padding_mask=padding(*x.shape[:2])), 3),
    "TransformerDecoder": (
        lambda: torch.nn.TransformerDecoder(
            torch.nn.TransformerDecoderLayer(48, 3, 96, batch_first=True), 2),
        lambda m, x: m(x, x + 1), 4),
}  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_of_torch(engine, slow_path, monkeypatch, layer, dtype):
    build, run, count = LAYERS[layer]
    model, x = build().eval().to(DTYPES[dtype]), r(2, 7, 48).to(DTYPES[dtype])
    with torch.no_grad():
        expected = run(model, x)
        calls = counting(monkeypatch)
        with patch():
            result = run(model, x)
    assert len(calls) == count
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == "bfloat16" else {}
    torch.testing.assert_close(result, expected, **close)


def test_training_goes_on_under_a_patch(slow_path):
    model = LAYERS["TransformerEncoderLayer"][0]()
    with patch(), warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        for _ in range(2):
            model(r(2, 7, 48)).sum().backward()
    assert len(records) == 1  # of two reasons the first: dropout
    assert "dropout" in str(records[0].message)
    assert all(p.grad is not None for p in model.parameters())


def test_patch_and_undo():
    applied = patch()
    assert isinstance(applied, Patch)
    assert F.scaled_dot_product_attention is sdpa
    assert applied.original is own
    applied.undo()
    assert F.scaled_dot_product_attention is own
    applied.undo()
    assert F.scaled_dot_product_attention is own
    with applied as again:
        assert again is applied
        assert F.scaled_dot_product_attention is sdpa
    with pytest.raises(ZeroDivisionError), patch():
        raise ZeroDivisionError
    assert F.scaled_dot_product_attention is own


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_patches_end_in_any_order(order):
    patches = [patch() for _ in order]
    for i, which in enumerate(order):
        assert F.scaled_dot_product_attention is sdpa
        patches[which].undo()
        patches[which].undo()
        assert (F.scaled_dot_product_attention is sdpa) == (i < 2)
    with patch() as outer, patch() as inner:
        assert inner.original is outer.original is own


def test_what_others_put_there_stays(monkeypatch):
    def theirs(*given: Any, **options: Any) -> Any:
        return before(*given, **options)

    before = own
    monkeypatch.setattr(F, "scaled_dot_product_attention", theirs)
    with patch() as applied:
        assert applied.original is theirs
        assert F.scaled_dot_product_attention is sdpa
    assert F.scaled_dot_product_attention is theirs
    applied = patch()
    before = sdpa
    F.scaled_dot_product_attention = theirs  # over the patch
    applied.undo()
    assert F.scaled_dot_product_attention is theirs
    with patch(), pytest.warns(RuntimeWarning, match="dropout"):  # which calls no one in turn
        F.scaled_dot_product_attention(*r(3, 2, 5, 8), dropout_p=1.0)
    monkeypatch.undo()


def test_threads_patch_and_call():
    model, given = Model(), r(3, 2, 3, 5, 8)
    expected = model(*given)
    barrier, wrong = threading.Barrier(8), []

    def work() -> None:
        barrier.wait()
        for _ in range(50):
            with patch():
                if F.scaled_dot_product_attention is not sdpa:
                    wrong.append("not patched")
                if not torch.allclose(model(*given), expected, atol=1e-5):
                    wrong.append("another result")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_nothing_is_kept(engine):
    q, k, v = r(3, 2, 3, 5, 8)
    gc.collect()
    counts = [sys.getrefcount(x) for x in (q, k, v)]
    for _ in range(3):
        sdpa(q, k, v)
        sdpa(q, k[:, :1], v[:, :1])
    assert [sys.getrefcount(x) for x in (q, k, v)] == counts


def test_a_copied_model_is_patched_too(engine):
    model = copy.deepcopy(LAYERS["TransformerDecoder"][0]().eval())
    x = r(2, 7, 48)
    with torch.no_grad():
        expected = model(x, x)
        with patch():
            torch.testing.assert_close(model(x, x), expected)


def test_only_this_module_imports_torch():
    code = """
import sys, qkv_fast, qkv_fast.integrations
assert "torch" not in sys.modules
sys.modules["torch"] = None
for name in ("torch", "flash_attn"):
    try:
        __import__(f"qkv_fast.integrations.{name}")
    except ImportError as error:
        assert "pip install" in str(error), error
    else:
        raise AssertionError(name)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_docstrings():
    result = doctest.testmod(adapter)
    assert result.attempted > 5
    assert result.failed == 0
