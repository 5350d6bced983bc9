"""Tensors of torch: read without a copy, or refused with the name of the argument."""

from __future__ import annotations

import copy
import sys

import ml_dtypes
import numpy as np
import pytest
from helpers import assert_same, counted, make, normal, run_python, without_shortcut

import qkv_fast
from qkv_fast import KVCache, merge_attention, paged_attention, varlen_attention
from qkv_fast import scaled_dot_product_attention as sdpa

torch = pytest.importorskip("torch")


def tensors(arrays):
    """Return tensors that share the arrays' memory."""
    return [
        torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
        if x.dtype == ml_dtypes.bfloat16
        else torch.from_numpy(x)
        for x in arrays
    ]


def bits(tensor):
    return tensor.view(torch.int16).numpy().view(np.uint16)


def assert_plain(array, dtype):
    """Check that a result is an ndarray of this dtype, without metadata."""
    assert type(array) is np.ndarray
    assert array.dtype == dtype
    assert array.dtype.metadata is None


def test_tensors_are_read_as_arrays(engine, rng):
    q, k, v = make(rng, "odd")
    out = sdpa(*tensors((q, k, v)), is_causal=True)
    assert_plain(out, np.float32)
    np.testing.assert_array_equal(out, sdpa(q, k, v, is_causal=True))
    expected = torch.nn.functional.scaled_dot_product_attention(*tensors((q, k, v)), is_causal=True)
    np.testing.assert_allclose(out, expected.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_every_function_takes_every_dtype(engine, rng, dtype):
    q, k, v = make(rng, (2, 4, 2, 5, 9, 16, 8), dtype)
    tq, tk, tv = tensors((q, k, v))
    of_bits = np.uint16 if dtype == ml_dtypes.bfloat16 else dtype
    for function, given, more in (
        (sdpa, (q, k, v), {"enable_gqa": True}),
        (varlen_attention, (q[0], k[0, :, :5].repeat(2, 0), v[0, :, :5].repeat(2, 0)),
         {"cu_seqlens_q": [0, 1, 4]}),
        (paged_attention, (q, k, v), {"block_table": [[1], [0]], "key_lengths": [9, 3]}),
    ):  # fmt: skip
        out, lse = function(*tensors(given), **more, return_lse=True)
        expected, expected_lse = function(*given, **more, return_lse=True)
        assert_plain(out, of_bits)
        np.testing.assert_array_equal(out, expected.view(of_bits))
        np.testing.assert_array_equal(lse, expected_lse)
    merged, _ = merge_attention([tq[0], tq[1]], [torch.zeros(4, 5)] * 2)
    assert_plain(merged, of_bits)
    expected, _ = merge_attention([q[0], q[1]], [np.zeros((4, 5), np.float32)] * 2)
    np.testing.assert_array_equal(merged, expected.view(of_bits))
    name = np.dtype(dtype).name
    cache, model = (KVCache(2, 2, 9, 16, 8, dtype=name) for _ in range(2))
    cache.append(tk, tv)
    model.append(k, v)
    out = cache.attend(tq)
    assert_plain(out, of_bits)
    np.testing.assert_array_equal(out, model.attend(q).view(of_bits))
    windowed = KVCache(2, 2, 9, 16, 8, dtype=name, window=20)
    windowed.append(tk, tv)
    assert_plain(windowed.attend(tq), of_bits)


def test_nothing_is_copied(engine, rng):
    """`from_arrays` writes to the tensors' memory; expanded and sliced tensors stay views."""
    k, v = (torch.zeros(1, 2, 8, 4, dtype=torch.bfloat16) for _ in range(2))
    cache = KVCache.from_arrays(k, v)
    assert_plain(cache.key_pages, np.uint16)
    cache.append(torch.ones(1, 2, 3, 4), 2 * torch.ones(1, 2, 3, 4))
    assert (k[:, :, :3] == 1).all()
    assert (v[:, :, :3] == 2).all()
    assert (k[:, :, 3:] == 0).all()
    q, k, v = tensors(make(rng, (2, 1, 1, 6, 9, 16, 16), ml_dtypes.bfloat16))
    wide = [x.expand(2, 3, -1, -1)[..., ::2] for x in (q, k, v)]
    expected = sdpa(*(bits(x) for x in wide), dtype="bfloat16")
    np.testing.assert_array_equal(sdpa(*wide), expected)


def test_every_other_argument_may_be_a_tensor(engine, rng):
    q, k, v = make(rng, (2, 4, 4, 5, 9, 16, 8), ml_dtypes.bfloat16)
    given = tensors((q, k, v))
    options = {
        "attn_mask": normal(rng, (5, 9), ml_dtypes.bfloat16),
        "alibi_slopes": normal(rng, (4,), ml_dtypes.bfloat16),
        "sinks": normal(rng, (4,), ml_dtypes.bfloat16),
        "key_lengths": np.array([4, 9]),
        "query_offset": np.array([0, 3]),
    }
    expected = sdpa(q, k, v, **options, is_causal=True)
    out = sdpa(*given, **dict(zip(options, tensors(options.values()), strict=True)), is_causal=True)
    np.testing.assert_array_equal(out, expected.view(np.uint16))
    pages = np.ones((2, 4, 9, 16), np.int8)
    scales = normal(rng, (2, 4, 9))
    arguments = [pages, pages, np.array([[0], [1]]), np.array([9, 2])]
    np.testing.assert_array_equal(
        paged_attention(given[0], *tensors(arguments),
                        key_scales=torch.from_numpy(scales), value_scales=torch.from_numpy(scales)),
        paged_attention(q, *arguments, key_scales=scales, value_scales=scales).view(np.uint16),
    )  # fmt: skip
    cache = KVCache.from_arrays(
        *tensors((pages, pages.copy())), torch.tensor([3, 4]),
        key_scales=torch.from_numpy(scales), value_scales=torch.from_numpy(scales.copy()),
    )  # fmt: skip
    assert cache.lengths.tolist() == [3, 4]
    cache.append(torch.ones(1, 4, 1, 16), torch.ones(1, 4, 1, 16), sequences=torch.tensor([1]),
                 counts=torch.tensor([1]))  # fmt: skip
    assert scales[1, 0, 4] == np.float32(1 / 127)
    assert cache.lengths.tolist() == [3, 5]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_out_is_written_in_place_and_returned(engine, rng, dtype):
    q, k, v = make(rng, (1, 2, 2, 5, 9, 8, 8), dtype)
    given = tensors((q, k, v))
    expected = sdpa(*given)
    for out in (torch.zeros_like(given[0]), torch.zeros(1, 5, 2, 8, dtype=given[0].dtype)):
        out = out.reshape(1, 2, 5, 8) if out.shape[1] == 2 else out.transpose(1, 2)
        result, lse = sdpa(*given, out=out, return_lse=True)
        assert result is out
        assert type(lse) is np.ndarray
        np.testing.assert_array_equal(out.view(torch.int16).numpy() if dtype != np.float32
                                      else out.numpy(), expected.view(np.int16)
                                      if dtype != np.float32 else expected)  # fmt: skip
    packed = [x[0].transpose(0, 1) for x in given]
    cu = [0, 5], [0, 9]
    out = torch.zeros(5, 2, 8, dtype=given[0].dtype)
    assert varlen_attention(*packed, *cu, out=out) is out
    np.testing.assert_array_equal(
        out.float().numpy(), torch.from_numpy(varlen_attention(*packed, *cu).view(
            np.int16 if dtype != np.float32 else dtype)).view(out.dtype).float().numpy()
    )  # fmt: skip
    cache = KVCache(1, 2, 9, 8)
    cache.append(*given[1:])
    out = torch.zeros_like(given[0])
    assert cache.attend(given[0], out=out) is out
    assert out.any()
    two = torch.zeros(5, 8, dtype=given[0].dtype)
    assert sdpa(*(x[0, 0] for x in given), out=two) is two
    assert torch.equal(two, sdpa(*given, out=torch.empty_like(given[0]))[0, 0])


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_out_may_overlap_inputs(engine, rng, dtype):
    q, k, v = make(rng, (1, 2, 2, 70, 70, 16, 16), dtype)
    for which in range(3):
        given = [x.clone() for x in tensors((q, k, v))]
        expected = sdpa(*given, out=torch.empty_like(given[0]))
        assert sdpa(*given, out=given[which]) is given[which]
        assert torch.equal(given[which], expected)
    flat = torch.zeros(71, 16, dtype=given[0].dtype)
    flat[:70] = tensors([q])[0][0, 0]
    tk, tv = (x[0, 0] for x in tensors((k, v)))
    expected = sdpa(flat[:70].clone(), tk, tv, out=torch.empty_like(flat[:70]))
    shifted = flat[1:]
    assert sdpa(flat[:70], tk, tv, out=shifted) is shifted
    assert torch.equal(flat[1:], expected)


def test_out_of_bfloat16_may_be_an_array_of_either_kind(engine, rng):
    q, k, v = tensors(make(rng, (1, 2, 2, 5, 9, 8, 8), ml_dtypes.bfloat16))
    expected = sdpa(q, k, v)
    for out in (np.zeros((1, 2, 5, 8), np.uint16), np.zeros((1, 2, 5, 8), ml_dtypes.bfloat16)):
        assert sdpa(q, k, v, out=out) is out
        np.testing.assert_array_equal(out.view(np.uint16), expected)
    swapped = np.zeros((1, 2, 5, 8), ">u2")
    assert sdpa(q, k, v, out=swapped) is swapped
    np.testing.assert_array_equal(swapped, expected)
    with pytest.raises(TypeError, match="out has dtype float32: the result's dtype is bfloat16"):
        sdpa(q, k, v, out=torch.zeros(1, 2, 5, 8))
    with pytest.raises(TypeError, match="out has dtype bfloat16: the result's dtype is float32"):
        sdpa(*(x.float() for x in (q, k, v)), out=q)


def test_bits_in_an_overlapping_out_of_the_other_kind(engine, rng):
    """The temporary copy holds bit patterns: they must not be converted as numbers."""
    memory = normal(rng, (1, 2, 9, 8), ml_dtypes.bfloat16)
    raw = memory.view(np.uint16)
    expected = sdpa(raw, raw, raw, dtype="bfloat16")
    assert sdpa(raw, raw, raw, dtype="bfloat16", out=memory) is memory
    np.testing.assert_array_equal(memory.view(np.uint16), expected)


def test_a_negated_view_is_resolved_but_not_written(engine, rng):
    z = torch.randn(2, 5, 8, dtype=torch.complex64)
    lazy = z.conj().imag
    assert lazy.is_neg()
    np.testing.assert_array_equal(sdpa(lazy, lazy, lazy), sdpa(*[-z.imag.numpy()] * 3))
    real = lazy.clone()
    with pytest.raises(TypeError, match=r"out is a tensor that shows .* negated"):
        sdpa(real, real, real, out=lazy)
    with pytest.raises(TypeError, match=r"key is a tensor that shows .* negated"):
        KVCache.from_arrays(lazy[None], lazy[None])


def test_grad_is_refused_unless_it_is_off(engine):
    x = torch.ones(2, 3, 4, requires_grad=True)
    y = torch.ones(2, 3, 4)
    for i, name in enumerate(("query", "key", "value")):
        given = [x if i == j else y for j in range(3)]
        with pytest.raises(TypeError, match=rf"{name} is .* requires grad.*{name}\.detach\(\)"):
            sdpa(*given)
    for name, shape in (("attn_mask", (3, 3)), ("sinks", (2,)), ("alibi_slopes", (2,))):
        with pytest.raises(TypeError, match=f"{name} is a tensor that requires grad"):
            sdpa(y, y, y, **{name: torch.zeros(shape, requires_grad=True)})
    with pytest.raises(TypeError, match="out is a tensor that requires grad"):
        sdpa(y, y, y, out=x)
    np.testing.assert_array_equal(sdpa(*[x.detach()] * 3), sdpa(y, y, y))
    with torch.no_grad():
        np.testing.assert_array_equal(sdpa(x, x, x), sdpa(y, y, y))
        assert sdpa(y, y, y, out=x) is x
    with torch.inference_mode():
        z = torch.ones(2, 3, 4, dtype=torch.bfloat16)
        assert sdpa(z, z, z).dtype == np.uint16
    assert sdpa(z, z, z).dtype == np.uint16


def refused():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **options: None)
        x = torch.ones(3, 4)
        return {
            "on device meta": torch.ones(3, 4, device="meta"),
            "on device meta ": torch.ones(3, 4, device="meta", dtype=torch.bfloat16),
            "of layout torch.sparse_coo": x.to_sparse(),
            "of layout torch.sparse_coo ": x.bfloat16().to_sparse(),
            "of layout torch._mkldnn": x.to_mkldnn(),
            "that NumPy can't view: .*Float8": torch.ones(3, 4).to(torch.float8_e4m3fn),
        }


@pytest.mark.parametrize("message", list(refused()))
def test_tensors_that_numpy_cannot_view_are_refused_by_name(message):
    wrong = refused()[message]
    right = np.ones((3, 4), np.float32)
    for name in ("query", "key", "value", "attn_mask", "out"):
        given = {"query": right, "key": right, "value": right} | {name: wrong}
        with pytest.raises(TypeError, match=rf"^{name} is a .*{message.strip()}"):
            sdpa(**given)
    with pytest.raises(TypeError, match=r"^outputs\[0\] is a "):
        merge_attention([wrong], [np.ones(3, np.float32)])
    with pytest.raises(TypeError, match=r"^sinks is a "):
        sdpa(right, right, right, sinks=wrong)
    with pytest.raises(TypeError, match=r"^cu_seqlens_q is a "):
        varlen_attention(*[right[None]] * 3, wrong)


@pytest.mark.filterwarnings("ignore")
def test_quantized_numbers_are_refused_by_name():
    wrong = torch.quantize_per_tensor(torch.ones(3, 4), 1.0, 0, torch.qint8)
    with pytest.raises(TypeError, match="query is a tensor of quantized numbers"):
        sdpa(wrong, wrong, wrong)


def test_messages_call_bit_patterns_bfloat16():
    x = torch.ones(2, 3, 4, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="dtypes bfloat16, float32 and bfloat16: all three"):
        sdpa(x, x.float(), x)
    with pytest.raises(TypeError, match=r"outputs\[1\] has dtype bfloat16, but .* float32"):
        merge_attention([x.float(), x], [np.ones((2, 3), np.float32)] * 2)
    with pytest.raises(TypeError, match="key_pages has dtype bfloat16 and key_scales is given"):
        paged_attention(x[None], x[None], x[None], [[0]], [3], key_scales=x[None])
    with pytest.raises(ValueError, match="block_table is an array of bfloat16"):
        paged_attention(x[None], x[None], x[None], x[0, :1], [3])
    with pytest.raises(TypeError, match=r"key_lengths must be .*, not an array of bfloat16"):
        sdpa(x, x, x, key_lengths=x[0, 0])
    with pytest.raises(TypeError, match="both must be the same"):
        KVCache.from_arrays(x[None], x[None].float())


def test_dtypes_of_torch_equal_their_names(rng):
    for dtype in ("float32", "float64", "float16", "bfloat16", "int8"):
        by_name, given = (KVCache(1, 1, 2, 2, dtype=x) for x in (dtype, getattr(torch, dtype)))
        assert by_name.key_pages.dtype == given.key_pages.dtype
        assert repr(by_name) == repr(given)
    with pytest.raises(ValueError, match=r"dtype is torch\.int32: it must be one of float32"):
        KVCache(1, 1, 2, 2, dtype=torch.int32)
    x = normal(rng, (2, 3, 4), ml_dtypes.bfloat16)
    raw = x.view(np.uint16)
    expected = sdpa(x, x, x).view(np.uint16)
    np.testing.assert_array_equal(sdpa(raw, raw, raw, dtype=torch.bfloat16), expected)
    np.testing.assert_array_equal(sdpa(*tensors([x] * 3), dtype="bfloat16"), expected)
    unsigned = torch.from_numpy(raw)
    np.testing.assert_array_equal(sdpa(*[unsigned] * 3, dtype=torch.bfloat16), expected)
    with pytest.raises(TypeError, match=r"uint16, uint16 and uint16.*dtype='bfloat16'"):
        sdpa(unsigned, unsigned, unsigned)
    with pytest.raises(ValueError, match=r"dtype is torch\.float32: it must be 'bfloat16'"):
        sdpa(x, x, x, dtype=torch.float32)


def test_torch_is_not_imported():
    code = "import sys, numpy, qkv_fast; x = numpy.ones((2, 3)); "
    code += "qkv_fast.scaled_dot_product_attention(x, x, x); assert 'torch' not in sys.modules"
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_a_half_imported_torch_is_ignored(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", type(sys)("torch"))
    with pytest.raises(TypeError, match="query is a list"):
        sdpa([1.0], [1.0], [1.0])
    with pytest.raises(ValueError, match="dtype is 'int4'"):
        qkv_fast.KVCache(1, 1, 1, 1, dtype="int4")


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_plain_calls_take_the_shortcut(native, rng, dtype):
    """_native/tensor_views.pyx reads tensors as the stages do, and keeps no reference to them."""
    q, k, v = given = tensors(make(rng, (2, 4, 2, 5, 9, 16, 16), dtype))
    tokens_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in given]
    mask = torch.from_numpy(rng.random((2, 1, 1, 9)) < 0.7)
    parts = torch.complex(*(x.float() for x in (q, q))).conj().imag if dtype == np.float32 else q
    out = torch.empty_like(q)
    for arguments, options in (
        (given, {}),
        (tokens_first, {"is_causal": True, "return_lse": True}),
        ((*given, mask), {}),
        ((*given, torch.zeros(5, 9, dtype=q.dtype)), {}),
        ((q[0, :, 1:], k[0], v[0]), {}),
        ((q.clone().requires_grad_(), k, v), {}),
        ((parts, k, v), {}),
        ((q[:, :, :0], k, v), {}),
        (given, {"out": out}),
        (given, {"out": q.clone()}),
    ):
        with torch.no_grad():
            with without_shortcut():
                expected = copy.deepcopy(sdpa(*arguments, enable_gqa=True, **options))
            answer = sdpa(*arguments, enable_gqa=True, **options)
        if "out" in options:
            assert answer is options["out"]
            assert torch.equal(answer, expected)
        else:
            assert_same(answer, expected)
    with counted() as taken:
        sdpa(q, k, v, mask, enable_gqa=True, out=out)
    if hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        assert taken == [qkv_fast._select.current().tiles == "simd"]
    counts = [sys.getrefcount(x) for x in (*given, mask, out)]
    for _ in range(3):
        sdpa(*given, mask, enable_gqa=True, out=out)
    assert [sys.getrefcount(x) for x in (*given, mask, out)] == counts
    with pytest.raises(TypeError, match="must have the same one of"):
        sdpa(q, k.to(torch.int32), v, enable_gqa=True)
    with pytest.raises(TypeError, match="ZeroTensor"):
        sdpa(q, k, torch._efficientzerotensor(v.shape, dtype=v.dtype), enable_gqa=True)
    if dtype == ml_dtypes.bfloat16:
        patterns = bits(q)
        for mixed in ((q, bits(k), v), (patterns, k, v), (patterns, bits(k), bits(v))):
            with pytest.raises(TypeError, match="must have the same one of"):
                sdpa(*mixed, enable_gqa=True)
            assert_same(
                sdpa(*mixed, enable_gqa=True, dtype="bfloat16"), sdpa(*given, enable_gqa=True)
            )
