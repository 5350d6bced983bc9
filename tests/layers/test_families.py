"""MultiHeadAttention against torch.nn.MultiheadAttention and the attention modules of Transformers.

All weights are random; nothing is downloaded.
"""

from __future__ import annotations

import copy

import ml_dtypes
import numpy as np
import pytest
from helpers import normal

from qkv_fast import MultiHeadAttention
from qkv_fast.rotary import Rotary

torch = pytest.importorskip("torch")
CLOSE = {"rtol": 1e-5, "atol": 5e-6}  # float32 of two libraries; outputs are about 1


def randomized(module):
    """Return a module in eval mode whose biases and norms are not those of the start."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
                if "norm" in name:
                    parameter += 1
            else:
                limit = parameter.shape[-1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * limit)
    return module.eval()


def computed(module, *arguments, **options):
    """Return what a module of torch computes of arrays, as an array."""
    tensors = [torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in arguments]
    with torch.no_grad():
        got = module(*tensors, **options)
    return (got[0] if isinstance(got, tuple) else got).numpy()


# --- torch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 24, "vdim": 40}], ids=str)
def test_torch(engine, rng, sizes, bias):
    theirs = randomized(
        torch.nn.MultiheadAttention(48, 4, batch_first=True, bias=bias, **sizes)
    )  # fmt: skip
    layer = MultiHeadAttention.from_state_dict(theirs.state_dict(), 4)
    x = normal(rng, (3, 20, 48))
    key, value = normal(rng, (3, 31, layer.kdim)), normal(rng, (3, 31, layer.vdim))
    padding = np.zeros((3, 31), bool)
    padding[0, 20:], padding[1, :4] = True, True
    hidden = rng.random((20, 31)) < 0.3  # torch's True hides
    for options, ours in (
        ({}, {}),
        ({"key_padding_mask": padding}, {"key_padding_mask": padding}),
        ({"attn_mask": hidden}, {"attn_mask": ~hidden}),
        ({"attn_mask": hidden, "key_padding_mask": padding},
         {"attn_mask": ~hidden, "key_padding_mask": padding}),
        ({"attn_mask": normal(rng, (20, 31))},) * 2,
        ({"attn_mask": normal(rng, (12, 20, 31))},) * 2,
    ):  # fmt: skip
        given = {name: torch.from_numpy(array) for name, array in options.items()}
        expected = computed(theirs, x, key, value, need_weights=False, **given)
        if "attn_mask" in ours and ours["attn_mask"].ndim == 3:
            ours = ours | {"attn_mask": ours["attn_mask"].reshape(3, 4, 20, 31)}
        np.testing.assert_allclose(layer(x, (key, value), **ours), expected, **CLOSE)
    if not sizes:
        mask = torch.nn.Transformer.generate_square_subsequent_mask(20)
        expected = computed(theirs, x, x, x, attn_mask=mask, is_causal=True, need_weights=False)
        np.testing.assert_allclose(layer(x, is_causal=True), expected, **CLOSE)
        with torch.inference_mode():  # the fast path
            fast = theirs(*[torch.from_numpy(x)] * 3, need_weights=False)[0].numpy()
        np.testing.assert_allclose(layer(x), fast, **CLOSE)


def test_tensors_go_in_and_out(rng):
    theirs = randomized(torch.nn.MultiheadAttention(16, 2, batch_first=True))
    layer = MultiHeadAttention.from_state_dict(theirs.state_dict(), 2)
    with torch.no_grad():  # the weights are shared, not copied
        theirs.in_proj_weight[0, 0] = 5
    assert layer.in_proj_weight[0, 0] == 5
    x = torch.from_numpy(normal(rng, (2, 5, 16)))
    out = torch.empty(2, 5, 16)
    assert layer(x, out=out) is out
    np.testing.assert_array_equal(out.numpy(), layer(x.numpy()))
    narrow = x.bfloat16()
    bits = layer(narrow)
    assert bits.dtype == np.uint16
    out = torch.empty(2, 5, 16, dtype=torch.bfloat16)
    layer(narrow, out=out)
    np.testing.assert_array_equal(out.view(torch.int16).numpy().view(np.uint16), bits)
    wide = layer(narrow.float())
    np.testing.assert_allclose(out.float().numpy(), wide, rtol=2**-8, atol=1e-6)


def test_bfloat16_state(rng):
    theirs = randomized(torch.nn.MultiheadAttention(16, 2, batch_first=True))
    state = {name: tensor.bfloat16() for name, tensor in theirs.state_dict().items()}
    layer = MultiHeadAttention.from_state_dict(state, 2)
    theirs.load_state_dict(state)
    x = normal(rng, (2, 5, 16))
    np.testing.assert_allclose(layer(x), computed(theirs, x, x, x), **CLOSE)


# --- Transformers ---------------------------------------------------------------------------------


def models():
    return pytest.importorskip("transformers").models


def test_bert(engine, rng):
    module = models().bert.modeling_bert
    config = models().bert.configuration_bert.BertConfig(
        hidden_size=48, num_attention_heads=4, attn_implementation="eager"
    )
    theirs = randomized(module.BertAttention(config))
    layer = MultiHeadAttention.from_state_dict(theirs.state_dict(), 4)
    x = normal(rng, (3, 20, 48))
    padding = np.zeros((3, 20), bool)
    padding[0, 13:] = True
    mask = torch.zeros(3, 1, 1, 20).masked_fill_(torch.from_numpy(padding)[:, None, None], -1e30)
    norm = theirs.output.LayerNorm
    for options, ours in (({}, {}), ({"attention_mask": mask}, {"key_padding_mask": padding})):
        expected = computed(theirs, x, **options)
        got = norm(torch.from_numpy(layer(x, **ours) + x)).detach().numpy()
        np.testing.assert_allclose(got, expected, **CLOSE)


def test_gpt2(engine, rng):
    module = models().gpt2.modeling_gpt2
    config = models().gpt2.configuration_gpt2.GPT2Config(
        n_embd=48, n_head=4, attn_implementation="eager"
    )
    theirs = randomized(module.GPT2Attention(config, layer_idx=0))
    layer = MultiHeadAttention.from_state_dict(theirs.state_dict(), 4)
    x = normal(rng, (2, 20, 48))
    mask = torch.full((1, 1, 20, 20), -torch.inf).triu_(1)
    expected = computed(theirs, x, attention_mask=mask)
    np.testing.assert_allclose(layer(x, is_causal=True), expected, **CLOSE)
    cache = layer.new_cache(2, 20)
    parts = [layer(x[:, i : i + 4], is_causal=True, cache=cache) for i in range(0, 20, 4)]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, **CLOSE)


LLAMAS = {
    "llama": {},
    "grouped": {"num_key_value_heads": 2},
    "head_dim": {"num_key_value_heads": 1, "head_dim": 20, "attention_bias": True},
    "llama3": {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16}},
    "yarn": {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": 16}},
}  # fmt: skip


@pytest.mark.parametrize("kind", LLAMAS)
def test_llama(engine, rng, kind):
    module = models().llama.modeling_llama
    config = models().llama.configuration_llama.LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=64,
        attn_implementation="eager", **LLAMAS[kind],
    )  # fmt: skip
    theirs = randomized(module.LlamaAttention(config, layer_idx=0))
    layer = MultiHeadAttention.from_state_dict(theirs.state_dict(), 4)
    rotary = Rotary.from_config(config.to_dict())
    x = normal(rng, (2, 30, 64))
    angles = module.LlamaRotaryEmbedding(config)
    mask = torch.full((1, 1, 30, 30), -torch.inf).triu_(1)

    def expected_at(positions):
        embeddings = angles(torch.from_numpy(x), torch.from_numpy(positions))
        return computed(theirs, x, position_embeddings=embeddings, attention_mask=mask)

    expected = expected_at(np.arange(30)[np.newaxis])
    np.testing.assert_allclose(layer(x, is_causal=True, rotary=rotary), expected, **CLOSE)
    cache = layer.new_cache(2, 30)
    parts = [layer(x[:, :7], is_causal=True, rotary=rotary, cache=cache)]
    parts += [layer(x[:, i : i + 1], is_causal=True, rotary=rotary, cache=cache)
              for i in range(7, 30)]  # fmt: skip
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, **CLOSE)
    positions = np.stack([np.arange(30), np.arange(30) * 2])  # of each sequence
    got = layer(x, is_causal=True, rotary=rotary, positions=positions)
    np.testing.assert_allclose(got, expected_at(positions), **CLOSE)


def test_qwen3_normalises_queries_and_keys(engine, rng):
    module = models().qwen3.modeling_qwen3
    config = models().qwen3.configuration_qwen3.Qwen3Config(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_hidden_layers=1, attn_implementation="eager",
    )  # fmt: skip
    theirs = randomized(module.Qwen3Attention(config, layer_idx=0))
    layer = MultiHeadAttention.from_state_dict(theirs.state_dict(), 4, norm_eps=config.rms_norm_eps)
    x = normal(rng, (2, 20, 64))
    positions = torch.arange(20)[None]
    embeddings = module.Qwen3RotaryEmbedding(config)(torch.from_numpy(x), positions)
    mask = torch.full((1, 1, 20, 20), -torch.inf).triu_(1)
    expected = computed(theirs, x, position_embeddings=embeddings, attention_mask=mask)
    got = layer(x, is_causal=True, rotary=Rotary.from_config(config.to_dict()))
    np.testing.assert_allclose(got, expected, **CLOSE)


def test_bart_translates(engine, rng):
    module = models().bart.modeling_bart
    config = models().bart.configuration_bart.BartConfig(d_model=48, attn_implementation="eager")
    theirs = randomized(module.BartAttention(48, 4, is_decoder=True, config=config, layer_idx=0))
    layer = MultiHeadAttention.from_state_dict(theirs.state_dict(), 4)
    x, source = normal(rng, (2, 9, 48)), normal(rng, (2, 20, 48))
    expected = computed(theirs, x, key_value_states=torch.from_numpy(source))
    np.testing.assert_allclose(layer(x, source), expected, **CLOSE)
    cache = layer.new_cache(2, 20)
    layer.fill(cache, source)
    np.testing.assert_allclose(layer(x[:, 4:5], cache), expected[:, 4:5], **CLOSE)


# --- Weights in and out ---------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["torch", "bert", "gpt2", "llama", "bart", "vit", "distilbert"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_every_layout_comes_back(rng, layout, dtype):
    layer = MultiHeadAttention(32, 4, num_kv_heads=2, head_dim=6, qk_norm=True, dtype=dtype, rng=1)
    state = layer.state_dict(layout, prefix="a.b")
    assert all(name.startswith("a.b.") for name in state)
    again = MultiHeadAttention.from_state_dict(state | {"other": np.ones(3)}, 4, prefix="a.b")
    assert repr(again) == repr(layer)
    x = normal(rng, (2, 9, 32))
    np.testing.assert_array_equal(again(x), layer(x))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_safetensors(rng, tmp_path, dtype):
    pytest.importorskip("safetensors")
    layer = MultiHeadAttention(32, 4, dtype=dtype, rng=1)
    layer.save_safetensors(tmp_path / "layer.safetensors", "llama", prefix="model.0")
    again = MultiHeadAttention.from_safetensors(tmp_path / "layer.safetensors", 4, prefix="model.0")
    assert repr(again) == repr(layer)
    for name, array in layer.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name], array)


def test_states_that_are_refused():
    state = MultiHeadAttention(32, 4, rng=1).state_dict("llama")
    eye = np.eye(32, dtype=np.float32)
    for change, message in (
        ({"q_proj.weight": None}, "the state has none of"),
        ({"k_proj.weight": None}, "the state has no k_proj.weight"),
        ({"o_proj.weight": None}, "the state has none of"),
        ({"k_proj.weight": eye[:31]}, "there are 3 key heads"),
        ({"v_proj.weight": eye[:31]}, "value has shape"),
        ({"k_proj.bias": eye[0, :31]}, "bias has shape"),
        ({"q_proj.weight": eye[:, :30]}, "query has shape"),
        ({"o_proj.bias": eye}, "output_bias has shape"),
        ({"o_proj.weight": eye.astype(int)}, "floating"),
        ({"q_norm.weight": eye[0]}, "query_norm has shape"),
    ):
        other = {name: array for name, array in (state | change).items() if array is not None}
        with pytest.raises((TypeError, ValueError), match=message):
            MultiHeadAttention.from_state_dict(other, 4)
    with pytest.raises(ValueError, match="num_heads is 5"):
        MultiHeadAttention.from_state_dict(state, 5)
    theirs = torch.nn.MultiheadAttention(32, 4, add_bias_kv=True)
    with pytest.raises(ValueError, match="add_bias_kv"):
        MultiHeadAttention.from_state_dict(theirs.state_dict(), 4)
    with pytest.raises(ValueError, match="layout is 'gpt3'"):
        MultiHeadAttention(32, 4).state_dict("gpt3")
    with pytest.raises(ValueError, match="one matrix"):
        MultiHeadAttention(32, 4, kdim=8).state_dict("gpt2")


def test_weights_of_any_layout_and_dtype(rng):
    layer = MultiHeadAttention(32, 4, rng=1)
    x = normal(rng, (2, 9, 32))
    expected = layer(x)
    state = layer.state_dict("bert")
    for change in (
        lambda w: np.asfortranarray(w),
        lambda w: w.astype(">f4"),
        lambda w: np.repeat(w, 2, axis=-1)[..., ::2],
        lambda w: np.frombuffer(b"x" + w.tobytes(), np.uint8)[1:].view(np.float32).reshape(w.shape),
    ):
        again = MultiHeadAttention.from_state_dict(
            {name: change(array) for name, array in state.items()}, 4
        )
        np.testing.assert_array_equal(again(x), expected)
    mixed = copy.copy(state)
    mixed["self.key.weight"] = state["self.key.weight"].astype(np.float64)
    np.testing.assert_array_equal(MultiHeadAttention.from_state_dict(mixed, 4)(x), expected)
    half = {name: array.astype(ml_dtypes.bfloat16) for name, array in state.items()}
    assert "bfloat16" in repr(MultiHeadAttention.from_state_dict(half, 4))
