"""Rotary: the formula, Transformers' own functions, layouts, what is kept, what is refused."""

from __future__ import annotations

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from helpers import layouts, normal
from hypothesis import given
from hypothesis import strategies as st

from qkv_fast import rotary as rotary_module
from qkv_fast.rotary import (
    LinearScaling,
    Llama3Scaling,
    NTKScaling,
    Rotary,
    Scaling,
    YaRNScaling,
)


def turned(
    x: Any,
    positions: Any,
    *,
    base: float = 10000.0,
    dims: int | None = None,
    interleaved: bool = False,
    frequencies: Any = None,
    amplitude: float = 1.0,
    real: Any = np.float64,
) -> np.ndarray:
    """Return the formula as it stands: pairs as complex numbers times e^(i m theta)."""
    out = np.array(x).astype(real)
    dims = out.shape[-1] if dims is None else dims
    if frequencies is None:
        frequencies = base ** (-2.0 * np.arange(dims // 2) / dims)
    angles = np.asarray(positions, np.float64)[..., np.newaxis] * frequencies
    if angles.ndim > 2:
        angles = angles[..., np.newaxis, :, :]  # the heads
    turn = (amplitude * np.exp(1j * angles)).astype(np.result_type(real, np.complex64))
    first = slice(0, dims, 2) if interleaved else slice(0, dims // 2)
    second = slice(1, dims, 2) if interleaved else slice(dims // 2, dims)
    pairs = (out[..., first] + real(1) * 1j * out[..., second]).astype(turn.dtype) * turn
    out[..., first], out[..., second] = pairs.real, pairs.imag
    return out


def assert_right(got: np.ndarray, x: Any, positions: Any, **options: Any) -> None:
    """Hold the error to twice that of the formula computed in the same precision."""
    exact = turned(x, positions, **options)
    real = np.float64 if got.dtype == np.float64 else np.float32
    plain = turned(x, positions, real=real, **options).astype(got.dtype).astype(np.float64)
    error = np.abs(got.astype(np.float64) - exact).max(initial=0)
    size = np.abs(exact).max(initial=0)
    assert error <= 2 * np.abs(plain - exact).max(initial=0) + size * np.finfo(real).eps


PAIRINGS = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


def dtypes() -> list[Any]:
    return ["float32", "float64", "float16", "bfloat16"]


def as_dtype(name: str) -> Any:
    if name == "bfloat16":
        return pytest.importorskip("ml_dtypes").bfloat16
    return np.dtype(name)


@PAIRINGS
@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("dims", [None, 6, 2])
@pytest.mark.parametrize("shape", [(2, 3, 5, 16), (3, 5, 16), (5, 16), (2, 2, 1, 1, 16)])
def test_formula(rng, interleaved, dtype, dims, shape):
    x = normal(rng, shape).astype(as_dtype(dtype))
    before = x.copy()
    options = {"base": 500.0, "dims": dims, "interleaved": interleaved}
    got = Rotary(16, **options)(x, 7)
    assert got.dtype == x.dtype
    assert got.shape == x.shape
    assert_right(got, x, 7 + np.arange(shape[-2]), **options)
    if dims:
        assert np.array_equal(got[..., dims:], x[..., dims:])
    assert x.tobytes() == before.tobytes()


@PAIRINGS
def test_prefill_in_blocks(rng, interleaved, monkeypatch):
    """Blocks along the length, over several entries and within one, change no bit."""
    options = {"interleaved": interleaved, "dims": 24}
    for shape in ((2, 3, 50, 32), (40, 3, 1, 32), (2, 3, 4, 5, 32), (50, 32)):
        x = normal(rng, shape)
        positions = rng.integers(0, 1000, (*shape[:-3], shape[-2]))
        for where in (3, positions):
            whole = Rotary(32, **options)(x, where)
            for block in (1, 4 * 24 * 3 * 7, 4 * 24 * 3 * 12):
                monkeypatch.setattr(rotary_module, "BLOCK", block)
                views = layouts(x) if len(shape) > 2 else {"strided": np.repeat(x, 2, -1)[:, ::2]}
                for name, view in views.items():
                    again = Rotary(32, **options)(view, where)
                    assert again.tobytes() == whole.tobytes(), (shape, block, name)
            monkeypatch.undo()
        assert_right(whole, x, positions, **options)


@PAIRINGS
def test_tables_that_are_too_large_to_keep(rng, interleaved, monkeypatch):
    x = normal(rng, (2, 3, 50, 32))
    positions = rng.integers(0, 1000, (2, 50))
    rotary = Rotary(32, interleaved=interleaved, scaling=NTKScaling(2.0, 20))
    whole = [rotary(x, where) for where in (5, positions)]
    monkeypatch.setattr(rotary_module, "TABLE_BYTES", 32 * 8 * 7)
    other = Rotary(32, interleaved=interleaved, scaling=NTKScaling(2.0, 20))
    for where, expected in zip((5, positions), whole, strict=True):
        assert other(x, where).tobytes() == expected.tobytes()
    assert not other._tables
    assert_right(whole[0], x, 5 + np.arange(50), interleaved=interleaved,
                 frequencies=rotary.frequencies(55))  # fmt: skip


@PAIRINGS
@pytest.mark.parametrize("dims", [None, 16])
def test_in_place_in_a_fused_product(rng, interleaved, dims):
    """Queries and keys of (B, L, 3, H, D) are rotated where they are; values stay."""
    fused = normal(rng, (2, 7, 3, 4, 32))
    before = fused.copy()
    query, key, value = (fused[:, :, i].transpose(0, 2, 1, 3) for i in range(3))
    rotary = Rotary(32, dims=dims, interleaved=interleaved)
    for x in (query, key):
        expected = rotary(x.copy(), 11)
        assert rotary(x, 11, out=x) is x
        assert np.array_equal(x, expected)
    assert np.array_equal(value, before[:, :, 2].transpose(0, 2, 1, 3))
    assert_right(key, before[:, :, 1].transpose(0, 2, 1, 3), 11 + np.arange(7), dims=dims,
                 interleaved=interleaved)  # fmt: skip


@PAIRINGS
@pytest.mark.parametrize("dtype", dtypes())
def test_out_in_any_layout(rng, interleaved, dtype):
    x = normal(rng, (2, 3, 6, 8)).astype(as_dtype(dtype))
    rotary = Rotary(8, dims=6, interleaved=interleaved)
    expected = rotary(x, 2)
    for name, out in layouts(np.zeros_like(x)).items():
        if not out.flags.writeable or (dtype == "bfloat16" and name == "swapped bytes"):
            continue
        assert rotary(x, 2, out=out) is out
        assert np.array_equal(out.astype(x.dtype), expected), name
        out[...] = x
        assert rotary(out, 2, out=out) is out
        assert np.array_equal(out.astype(x.dtype), expected), name


@PAIRINGS
@pytest.mark.parametrize("shift", [1, 8, 37])
def test_out_may_overlap_x(rng, interleaved, shift, monkeypatch):
    monkeypatch.setattr(rotary_module, "BLOCK", 64)
    memory = normal(rng, (2 * 5 * 8 + shift,))
    x, out = (memory[i : i + 80].reshape(2, 5, 8) for i in (0, shift))
    rotary = Rotary(8, interleaved=interleaved)
    expected = rotary(x.copy())
    rotary(x, out=out)
    assert np.array_equal(out, expected)


def test_memory_order_of_new_results(rng):
    x = normal(rng, (2, 7, 3, 4, 8))[:, :, 0].transpose(0, 2, 1, 3)
    assert np.argsort(Rotary(8)(x).strides).tolist() == np.argsort(x.strides).tolist()
    repeated = np.broadcast_to(normal(rng, (1, 7, 8)), (4, 7, 8))
    got = Rotary(8)(repeated)
    assert got.flags.c_contiguous
    assert np.array_equal(got[3], Rotary(8)(repeated[:1])[0])


@PAIRINGS
def test_positions_of_each_batch_entry(rng, interleaved):
    x = normal(rng, (2, 3, 4, 5, 8))
    rotary = Rotary(8, interleaved=interleaved)
    for shape in ((2, 3, 5), (3, 5), (1, 5), (2, 1, 5), (5,)):
        positions = rng.integers(0, 5000, shape)
        got = rotary(x, positions)
        full = np.broadcast_to(positions, (2, 3, 5))
        assert_right(got, x, full, interleaved=interleaved)
        for index in np.ndindex(2, 3):
            assert np.array_equal(got[index], rotary(x[index], full[index]))


def test_kinds_of_positions(rng):
    x = normal(rng, (2, 3, 5, 8))
    rotary = Rotary(8)
    expected = rotary(x, 9)
    rows = np.arange(9, 14)
    for same in (np.int64(9), np.array(9), np.uint8(9), rows, rows.tolist(), rows.astype(np.uint8),
                 np.stack([rows, rows])):  # fmt: skip
        assert np.array_equal(rotary(x, same), expected)
    torch = pytest.importorskip("torch")
    assert np.array_equal(rotary(x, torch.from_numpy(rows)), expected)


@PAIRINGS
def test_a_row_does_not_depend_on_its_neighbours(rng, interleaved):
    """A token that is decoded has the bits that it has in a prompt, in every layout."""
    for dims in (2, 6, 32, 62, 64):
        rotary = Rotary(64, dims=dims, interleaved=interleaved)
        x = normal(rng, (2, 3, 67, 64))
        whole = rotary(x, 100)
        for name, view in layouts(x).items():
            assert np.array_equal(rotary(view, 100), whole), name
        for i in (0, 1, 40, 66):
            assert np.array_equal(rotary(x[:, :, i : i + 1], 100 + i), whole[:, :, i : i + 1])
            assert np.array_equal(rotary(x[1, 2, i : i + 1].copy(), 100 + i)[0], whole[1, 2, i])


@given(
    st.integers(-100_000, 1_000_000),
    st.integers(-500, 500),
    st.booleans(),
    st.sampled_from([None, LinearScaling(4), YaRNScaling(4, 64), Llama3Scaling(8, 1, 4, 512)]),
)
def test_scores_depend_on_differences_only(shift, distance, interleaved, scaling):
    rng = np.random.default_rng(abs(shift))
    query, key = rng.standard_normal((2, 1, 16))
    rotary = Rotary(16, interleaved=interleaved, scaling=scaling)
    near = rotary(query, distance) @ rotary(key, 0).T
    far = rotary(query, shift + distance) @ rotary(key, shift).T
    assert np.allclose(near, far, rtol=0, atol=1e-8)


def test_negative_positions_undo(rng):
    x = normal(rng, (3, 5, 8), np.float64)
    positions = rng.integers(0, 1000, 5)
    rotary = Rotary(8)
    assert np.allclose(rotary(rotary(x, positions), -positions), x, rtol=0, atol=1e-13)
    assert np.allclose(rotary(rotary(x[:, :1], 4), -4), x[:, :1], rtol=0, atol=1e-15)


@pytest.mark.parametrize("position", [1_000_000, 1_000_003, 2**31 - 1, -(2**31)])
def test_huge_positions(position):
    """Cosines and sines are right to float32's last bit, by arithmetic of 50 digits."""
    mpmath = pytest.importorskip("mpmath")
    ones = np.zeros((1, 1, 128), np.float32)
    ones[..., :64] = 1
    got = Rotary(128)(ones, position).astype(np.float64).reshape(2, 64)
    with mpmath.workdps(50):
        angles = [position * mpmath.mpf(10000) ** (mpmath.mpf(-2 * j) / 128) for j in range(64)]
        exact = np.array([[float(f(a)) for a in angles] for f in (mpmath.cos, mpmath.sin)])
    last_bit = np.finfo(np.float32).eps / 2
    angle_error = abs(position) * np.finfo(np.float64).eps
    assert np.abs(got - exact).max() <= last_bit / 2 + angle_error
    if abs(position) < 2e6:
        assert np.array_equal(got.astype(np.float32), exact.astype(np.float32))


@pytest.mark.parametrize("shape", [(2, 3, 0, 8), (0, 3, 5, 8), (2, 0, 5, 8), (0, 8)])
def test_nothing_to_rotate(shape):
    rotary = Rotary(8, scaling=NTKScaling(2.0, 16))
    x = np.zeros(shape, np.float32)
    assert rotary(x, 3).shape == shape
    assert rotary(x, np.zeros((*shape[:-3], shape[-2]), int), out=x) is x
    assert not rotary._tables


def test_values_that_are_not_finite(rng):
    """They stay within their pair, without a warning."""
    for dtype in (np.float32, np.float16):
        x = normal(rng, (1, 4, 8), dtype)
        x[0, 1, 2], x[0, 2, 0], x[0, 3] = np.nan, np.inf, np.finfo(dtype).max
        got = Rotary(8)(x, 1)
        assert np.isfinite(got[0, 0]).all()
        bad = ~np.isfinite(got)
        assert np.flatnonzero(bad[0, 1]).tolist() == [2, 6]
        assert np.flatnonzero(bad[0, 2]).tolist() == [0, 4]
        assert bad[0, 3].any()  # max * (cos 4 - sin 4) fits, max * (cos 4 + sin 4) does not


def test_bfloat16_bits(rng):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = normal(rng, (2, 3, 5, 8)).astype(ml_dtypes.bfloat16)
    rotary = Rotary(8)
    expected = rotary(x, 4)
    bits = rotary(x.view(np.uint16), 4, dtype="bfloat16")
    assert bits.dtype == np.uint16
    assert np.array_equal(bits, expected.view(np.uint16))
    out = np.zeros(x.shape, np.uint16)
    assert rotary(x.view(np.uint16), 4, out=out, dtype="bfloat16") is out
    assert np.array_equal(out, bits)


@pytest.mark.parametrize("dtype", dtypes())
def test_tensors(rng, dtype):
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(normal(rng, (2, 3, 5, 8))).to(getattr(torch, dtype))
    rotary = Rotary(8)
    expected = torch.from_numpy(rotary(tensor, 4))
    if dtype == "bfloat16":
        expected = expected.view(torch.bfloat16)
    assert_right(expected.double().numpy().astype(as_dtype(dtype)), tensor.double().numpy(),
                 4 + np.arange(5))  # fmt: skip
    before = tensor.clone()
    out = torch.zeros_like(tensor)
    assert rotary(tensor, 4, out=out) is out
    assert torch.equal(out, expected)
    assert torch.equal(tensor, before)
    assert rotary(tensor, 4, out=tensor) is tensor
    assert torch.equal(tensor, expected)


class TestTransformers:
    """Against the functions of Transformers, from its own config objects."""

    ROPES = {  # noqa: RUF012
        "default": {},
        "linear": {"factor": 3.0},
        "dynamic": {"factor": 3.0},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
        "yarn, all keys": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
            "beta_fast": 16, "beta_slow": 2, "mscale": 0.7, "mscale_all_dim": 1.3,
            "truncate": False,
        },
        "yarn, attention_factor": {"rope_type": "yarn", "factor": 40, "attention_factor": 1.5},
        "yarn, two far ends": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 1e6,
                               "beta_slow": 1e-9, "rope_theta": 100.0},
        "yarn, one pair": {
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 2,
            "beta_slow": 2,
            "truncate": False,
        },
        "yarn, beyond the last pair": {
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 1e-9,
            "beta_slow": 1e-9,
            "rope_theta": 100.0,
        },
        "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": 128},
        "llama3 of a config's context": {"rope_type": "llama3", "factor": 8.0,
                                         "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    }  # fmt: skip

    @pytest.fixture
    def llama(self):
        pytest.importorskip("torch")
        pytest.importorskip("transformers")
        return pytest.importorskip("transformers.models.llama.modeling_llama")

    def config(self, llama: Any, name: str, **more: Any) -> Any:
        rope = {"rope_type": name, "rope_theta": 20000.0, **self.ROPES[name], **more}
        return llama.LlamaConfig(
            hidden_size=256, num_attention_heads=4, max_position_embeddings=256,
            rope_parameters=rope,
        )  # fmt: skip

    @pytest.mark.parametrize("length", [1, 256, 300, 5000])
    @pytest.mark.parametrize("name", ROPES)
    @pytest.mark.parametrize("share", [1.0, 0.5])
    def test_frequencies(self, llama, name, length, share):
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        more = {"partial_rotary_factor": share} if share < 1 else {}
        config = self.config(llama, name, **more)
        kind = config.rope_parameters["rope_type"]
        phi = pytest.importorskip("transformers.models.phi.modeling_phi")
        default = phi.PhiRotaryEmbedding.compute_default_rope_parameters  # Llama's has no share
        expected, amplitude = ROPE_INIT_FUNCTIONS.get(kind, default)(config, seq_len=length)
        rotary = Rotary.from_config(config.to_dict())
        assert rotary.dims == 64 * share
        assert np.allclose(rotary.frequencies(length), expected.numpy(), rtol=1e-6, atol=0)
        got = 1.0 if rotary.scaling is None else rotary.scaling.amplitude
        assert got == pytest.approx(amplitude, rel=1e-12)

    @pytest.mark.parametrize("length", [40, 700])
    @pytest.mark.parametrize("name", ROPES)
    def test_rotated(self, llama, rng, name, length):
        torch = pytest.importorskip("torch")
        config = self.config(llama, name)
        query, key = normal(rng, (2, 2, 4, length, 64))
        tensors = torch.from_numpy(query), torch.from_numpy(key)
        where = torch.arange(length).expand(2, length)
        cos, sin = llama.LlamaRotaryEmbedding(config)(tensors[0], where)
        expected = llama.apply_rotary_pos_emb(*tensors, cos, sin)
        rotary = Rotary.from_config(config.to_dict())
        for x, y in zip((query, key), expected, strict=True):
            # float32 angles are off by up to length * 2**-23
            assert np.allclose(rotary(x), y.numpy(), rtol=0, atol=length * 5 * 2**-23)

    def test_gptj(self, llama, rng):
        torch = pytest.importorskip("torch")
        gptj = pytest.importorskip("transformers.models.gptj.modeling_gptj")
        x = normal(rng, (2, 4, 30, 16))
        sincos = gptj.create_sinusoidal_positions(40, 16)[None, 10:40].expand(2, -1, -1)
        sin, cos = sincos.chunk(2, dim=-1)
        heads_last = torch.from_numpy(x).transpose(1, 2)
        expected = gptj.apply_rotary_pos_emb(heads_last, sin, cos).transpose(1, 2).numpy()
        got = Rotary(16, interleaved=True)(x, 10)
        assert np.allclose(got, expected, rtol=0, atol=40 * 5 * 2**-23)


BASE = {"hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 2048}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "Rotary(64)"),
        ({"head_dim": 80}, "Rotary(80)"),
        ({"head_dim": None, "rope_scaling": None, "rope_theta": 5e5}, "Rotary(64, base=500000.0)"),
        ({"partial_rotary_factor": 0.25}, "Rotary(64, dims=16)"),
        ({"rotary_pct": 0.25, "rotary_emb_base": 500}, "Rotary(64, base=500.0, dims=16)"),
        (
            {"rope_parameters": {"rope_theta": 9.5, "partial_rotary_factor": 0.5}},
            "Rotary(64, base=9.5, dims=32)",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "Rotary(64, scaling=LinearScaling(factor=2.0))",
        ),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2}},
            "Rotary(64, scaling=NTKScaling(factor=2.0, original_context=2048))",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            "Rotary(64, scaling=Llama3Scaling(factor=8.0, low_freq_factor=1.0, "
            "high_freq_factor=4.0, original_context=2048))",
        ),
    ],
)
def test_configs(config, expected):
    assert repr(Rotary.from_config(BASE | config)) == expected


def test_yarn_configs():
    rope = {"type": "yarn", "original_max_position_embeddings": 512, "factor": None}
    scaling = Rotary.from_config(BASE | {"rope_scaling": rope}).scaling
    assert scaling == YaRNScaling(4.0, 512)
    rope |= {"factor": 3, "beta_fast": None, "beta_slow": 2, "truncate": False, "mscale": 2}
    config = BASE | {"rope_scaling": rope, "original_max_position_embeddings": 100}
    scaling = Rotary.from_config(config).scaling
    assert scaling == YaRNScaling(3, 100, beta_slow=2, mscale=2, truncate=False)


def test_configs_by_type_of_layer():
    ropes = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_type": "default"}}
    config = BASE | {"rope_parameters": ropes}
    assert Rotary.from_config(config, layer_type="full_attention").base == 1e6
    assert Rotary.from_config(config, layer_type="sliding_attention").base == 1e4
    for wrong in (None, "full"):
        with pytest.raises(ValueError, match=r"layer_type is .*: .*'full_attention', 'sliding_a"):
            Rotary.from_config(config, layer_type=wrong)
    with pytest.raises(ValueError, match=r"layer_type is 'full': .* it must be None"):
        Rotary.from_config(BASE, layer_type="full")
    assert Rotary.from_config(BASE, interleaved=True).interleaved


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"rope_scaling": {"type": "longrope"}}, ValueError, "type 'longrope', which is not supp"),
        ({"rope_scaling": {"type": "default", "mrope_section": [1]}}, ValueError, "type 'mrope'"),
        ({"rope_scaling": {"type": "linear"}}, ValueError, "config has no 'factor'"),
        ({"rope_scaling": {"type": "llama3", "factor": 2}}, ValueError, "no 'low_freq_factor'"),
        ({"rope_scaling": "yarn"}, TypeError, "config['rope_scaling'] is 'yarn'"),
        ({"hidden_size": None}, ValueError, "config has no 'hidden_size'"),
        ({"num_attention_heads": 0}, ValueError, "config['num_attention_heads'] is 0"),
        ({"head_dim": 64.0}, TypeError, "config['head_dim'] is 64.0"),
        ({"partial_rotary_factor": 1.5}, ValueError, "config['partial_rotary_factor'] is 1.5"),
        ({"partial_rotary_factor": 0.01}, ValueError, "dims is 0"),
        ({"rope_theta": "big"}, TypeError, "base must be a real number"),
    ],
)
def test_configs_that_are_refused(config, error, message):
    with pytest.raises(error) as raised:
        Rotary.from_config(BASE | config)
    assert message in str(raised.value)


def test_config_objects_are_refused():
    with pytest.raises(TypeError, match=r"config is a object: it must be a mapping.*to_dict"):
        Rotary.from_config(object())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Rotary(0), ValueError, "head_dim is 0: it must be at least 1"),
        (lambda: Rotary(7), ValueError, "head_dim is 7: all of it is rotated, so it must be even"),
        (lambda: Rotary(8.0), TypeError, "head_dim is 8.0: it must be an int"),
        (lambda: Rotary(8, dims=3), ValueError, "dims is 3: it must be even, and from 2"),
        (lambda: Rotary(8, dims=10), ValueError, "dims is 10: it must be even, and from 2"),
        (lambda: Rotary(8, dims=0), ValueError, "dims is 0: it must be even, and from 2"),
        (lambda: Rotary(8, base=1), ValueError, "base is 1: it must be finite and greater than 1"),
        (lambda: Rotary(8, base=np.inf), ValueError, "base is inf: it must be finite"),
        (lambda: Rotary(8, interleaved=1), TypeError, "interleaved must be a bool, not int"),
        (lambda: Rotary(8, scaling=2.0), TypeError, "scaling is 2.0: it must be an instance"),
        (lambda: Rotary(8, scaling=LinearScaling), TypeError, "it must be an instance"),
        (lambda: LinearScaling(0), ValueError, "factor is 0: it must be finite and greater than"),
        (lambda: LinearScaling("2"), TypeError, "factor must be a real number, not str"),
        (lambda: NTKScaling(np.nan, 5), ValueError, "factor is nan"),
        (lambda: NTKScaling(2.0, 0), ValueError, "original_context is 0"),
        (lambda: YaRNScaling(2.0, 1.5), TypeError, "original_context is 1.5"),
        (lambda: YaRNScaling(2.0, 64, 1, 2), ValueError, "beta_fast is 1.0: it must be at least"),
        (lambda: YaRNScaling(2.0, 64, mscale=np.inf), ValueError, "mscale is inf"),
        (lambda: YaRNScaling(2.0, 64, truncate=0), TypeError, "truncate must be a bool, not int"),
        (lambda: Llama3Scaling(8, 4, 4, 64), ValueError, "low_freq_factor is 4.0: it must be be"),
        (lambda: Rotary(8).frequencies(0), ValueError, "length is 0: it must be at least 1"),
    ],
)
def test_arguments_that_are_refused(make, error, message):
    with pytest.raises(error) as raised:
        make()
    assert message in str(raised.value)


def test_scalings_of_the_wrong_shape_are_refused():
    class Single(Scaling):
        def frequencies(self, dims: int, base: float, length: int) -> Any:
            return np.ones(1)

    with pytest.raises(ValueError, match=r"shape \(1,\): there must be one for each of 4 pairs"):
        Rotary(8, scaling=Single())


X = np.ones((2, 3, 5, 8), np.float32)
READ_ONLY = X.copy()
READ_ONLY.flags.writeable = False
REPEATED = np.lib.stride_tricks.as_strided(np.zeros(224, np.float32), X.shape, (480, 160, 16, 4))


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        ([1.0], {}, TypeError, "x is a list: pass a NumPy array"),
        (X.astype(int), {}, TypeError, "x has dtype int64: it must be float32, float64, float16 o"),
        (X.astype(np.uint16), {}, TypeError, "dtype='bfloat16' says that uint16 arrays hold that"),
        (X, {"dtype": "float16"}, ValueError, "dtype is 'float16': it must be 'bfloat16'"),
        (X[..., :6], {}, ValueError, "x has shape (2, 3, 5, 6): it must be (..., heads, length"),
        (X[0, 0, 0], {}, ValueError, "x has shape (8,): it must be (..., heads, length, head_dim)"),
        (X, {"positions": 1.0}, TypeError, "positions must be an int, or ints of shape"),
        (X, {"positions": True}, TypeError, "positions must be an int, or ints of shape"),
        (X, {"positions": None}, TypeError, "positions must be an int, or ints of shape"),
        (X, {"positions": np.ones(5)}, TypeError, "positions must be an int, or ints of shape"),
        (X, {"positions": 2**31}, ValueError, "the last of 5 rows is at 2147483652: positions mu"),
        (X, {"positions": 2**31 - 3}, ValueError, "positions is 2147483645, so the last of 5 row"),
        (X, {"positions": 2**70}, ValueError, "positions must be from -2147483648 to 2147483648"),
        (X, {"positions": [0, 0, 0, 0, -(2**32)]}, ValueError, "positions must be from -214748364"),
        (X, {"positions": [[0], [1]]}, ValueError, "positions has shape (2, 1): its last axis mu"),
        (X, {"positions": np.zeros((3, 5), int)}, ValueError, "broadcast to the axes of x before"),
        (X, {"positions": np.zeros((2, 2, 5), int)}, ValueError, "the length = (2, 5)"),
        (X[0], {"positions": np.zeros((2, 5), int)}, ValueError, "the length = (5,)"),
        (X, {"out": [0.0]}, TypeError, "out must be a NumPy array or a tensor, not list"),
        (X, {"out": np.ma.zeros(X.shape)}, TypeError, "out must be a NumPy array or a tensor, n"),
        (X, {"out": np.zeros((2, 3, 5, 9))}, ValueError, "out has shape (2, 3, 5, 9): it must be"),
        (X, {"out": np.zeros(X.shape)}, TypeError, "out has dtype float64: it must be that of x"),
        (X, {"out": READ_ONLY}, ValueError, "out is read-only"),
        (X, {"out": REPEATED}, ValueError, "out shows some of its memory more than once"),
    ],
)
def test_calls_that_are_refused(x, options, error, message):
    rotary = Rotary(8)
    out = options.pop("out", np.zeros(X.shape, np.float32)) if isinstance(x, np.ndarray) else None
    before = np.array(out).tobytes()
    with pytest.raises(error) as raised:
        rotary(x, out=out, **options)
    assert message in str(raised.value)
    assert np.array(out).tobytes() == before
    assert not rotary._tables


@pytest.fixture
def computed(monkeypatch):
    """Count the tables that are computed."""
    counted = []
    original = Rotary._table

    def counting(self: Rotary, *arguments: Any) -> Any:
        counted.append(arguments)
        return original(self, *arguments)

    monkeypatch.setattr(Rotary, "_table", counting)
    return counted


@PAIRINGS
def test_positions_that_were_seen_are_not_computed_again(rng, interleaved, computed):
    rotary = Rotary(8, interleaved=interleaved)
    query, key = normal(rng, (2, 6, 5, 8)), normal(rng, (2, 2, 5, 8))
    for where in (7, np.arange(10).reshape(2, 5)):
        computed.clear()
        for _layer in range(4):
            rotary(query, where)
            rotary(key, where, out=key)
        assert len(computed) == 1
    rotary(query.astype(np.float64), 7)  # whose table has more digits
    assert len(computed) == 2
    rotary(query[:, :, :4], 7)
    assert len(computed) == 3


def test_positions_that_changed_are_computed_again(rng, computed):
    rotary = Rotary(8)
    x = normal(rng, (2, 2, 1, 8))
    lengths = np.array([[3], [4]])
    first = rotary(x, lengths)
    lengths += 1
    assert np.array_equal(rotary(x, lengths), rotary(x, lengths.tolist()))
    assert len(computed) == 2
    assert not np.array_equal(rotary(x, lengths), first)


def test_memory_is_bounded(monkeypatch):
    rotary = Rotary(8)
    x = np.ones((1, 16, 8), np.float32)
    for i in range(500):
        rotary(x[:, : 1 + i % 16], i)
    assert len(rotary._tables) == rotary_module.TABLES
    assert (499, 4, False) in rotary._tables
    rows = 16 * 8 * 8
    monkeypatch.setattr(rotary_module, "TABLE_BYTES", 3 * rows + 200)
    for i in range(10):
        rotary(x, i)
    assert [key[0] for key in rotary._tables] == [7, 8, 9]
    array_keys = np.arange(16) + np.arange(10)[:, np.newaxis]
    for positions in array_keys:  # whose keys count too, 128 bytes each
        rotary(x, positions)
    assert len(rotary._tables) == 2


def test_threads(rng):
    """Threads at different positions, more than tables are kept, get what one alone gets."""
    rotary = Rotary(16, scaling=NTKScaling(2.0, 50))
    x = normal(rng, (3, 4, 16))
    expected = [Rotary(16, scaling=NTKScaling(2.0, 50))(x, i) for i in range(100)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as pool:
            order = rng.permutation(np.tile(np.arange(100), 20)).tolist()
            for i, got in zip(order, pool.map(lambda i: rotary(x, i), order), strict=True):
                assert np.array_equal(got, expected[i])
    finally:
        sys.setswitchinterval(interval)
    assert len(rotary._tables) <= rotary_module.TABLES


def test_a_call_of_another_length_has_no_influence_on_dynamic_scaling(rng):
    x = normal(rng, (2, 300, 16))
    rotary = Rotary(16, scaling=NTKScaling(2.0, 100))
    short = rotary(x[:, :50])
    assert np.array_equal(short, Rotary(16)(x[:, :50]))
    long = rotary(x)
    assert_right(long, x, np.arange(300), frequencies=rotary.frequencies(300))
    assert not np.allclose(long[:, :50], short)
    assert np.array_equal(rotary(x[:, :50]), short)
    one = rotary(x[:, 299:], 299)
    assert np.array_equal(one, long[:, 299:])


def test_scalings_at_their_limits():
    assert Rotary(2, scaling=NTKScaling(2.0, 100)).frequencies(5000).tolist() == [1.0]
    assert YaRNScaling(0.5, 100).amplitude == 1.0
    assert YaRNScaling(2.0, 100, attention_factor=0.0).amplitude == 0.0


@pytest.mark.parametrize("size", [1, 100, 2000, 10_000])
@pytest.mark.parametrize(
    "shape", [(2, 3, 50, 32), (5, 40, 3, 1, 32), (2, 3, 4, 5, 32), (50, 32), (1, 1, 1, 32)]
)
def test_blocks(shape, size):
    """They cover all once, and are as few as the size allows."""
    seen = np.zeros(shape, int)
    least = 32 * (shape[-3] if len(shape) > 2 else 1)
    blocks = [seen[i] for i in rotary_module._blocks(shape, size)]
    for block in blocks:
        block += 1
        assert block.ndim >= min(3, len(shape))
        assert block.size <= max(size, least)
    assert (seen == 1).all()
    entry = least * shape[-2]
    if entry < size:
        assert len(blocks) <= np.prod(shape[:-4]) * -(-shape[-4:][0] // (size // entry))
    else:
        assert len(blocks) == seen.size // entry * -(-shape[-2] // max(1, size // least))


def test_frequencies_are_a_copy():
    rotary = Rotary(8)
    rotary.frequencies()[...] = 0
    assert rotary.frequencies()[0] == 1


def test_copies_and_pickles(rng):
    x = normal(rng, (2, 3, 8))
    scaling = YaRNScaling(2.0, 64)
    rotary = Rotary(8, base=300, dims=4, interleaved=True, scaling=scaling)
    expected = rotary(x, 5)
    for other in (copy.copy(rotary), copy.deepcopy(rotary), pickle.loads(pickle.dumps(rotary))):
        assert repr(other) == repr(rotary)
        assert np.array_equal(other(x, 5), expected)
    assert eval(repr(rotary)).scaling == scaling
