"""examples/generate.py with and without a cache, against stored values of GPT-2."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import numpy as np
import pytest
from helpers import load_example

SIZES = (2, 48, 61, 40)  # layers, hidden, vocab, context
HEADS = 3
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 35]

# From GPT2LMHeadModel of transformers 5.23, in float64 with the weights below: the first logits
# after the prompt, and 20 greedy tokens.
LOGITS = [2.2730, 0.2373, 0.7829, -0.2456, -0.3306, 0.4076, -0.7969, 0.8929]
TOKENS = [39, 0, 15, 54, 54, 44, 44, 11, 0, 0, 0, 0, 0, 0, 15, 0, 44, 11, 11, 46]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load_example("generate")


@pytest.fixture(scope="module")
def weights(example):
    """Return weights of which none is 0 or 1: a model that ignores one gives other logits."""
    rng = np.random.default_rng(0)
    drawn = {}
    for name, shape in sorted(example.weight_shapes(*SIZES).items()):
        noise = (rng.random(shape) - 0.5).astype(np.float32)
        if len(shape) == 2:
            noise *= np.float32(0.5)
        elif name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")):
            noise += 1
        drawn[name] = noise
    return drawn


@pytest.fixture(scope="module")
def model(example, weights):
    return example.Model(weights, HEADS)


def largest_difference(model, dtype: str) -> float:
    """Return the largest difference in logits between a cache, fed token by token, and none."""
    tokens = np.random.default_rng(1).integers(0, model.vocab, model.context).tolist()
    caches = model.new_caches(model.context, dtype)
    seen, largest = 0, 0.0
    for length in range(len(PROMPT), model.context + 1):
        cached = model.forward(tokens[seen:length], caches)
        largest = max(largest, float(np.abs(cached - model.forward(tokens[:length])).max()))
        seen = length
    assert all(cache.lengths.tolist() == [model.context] for cache in caches)
    return largest


@pytest.mark.parametrize("use_cache", [True, False])
def test_tokens_and_logits_are_those_of_transformers(engine, example, model, use_cache):
    caches = model.new_caches(len(PROMPT)) if use_cache else None
    np.testing.assert_allclose(model.forward(PROMPT, caches)[: len(LOGITS)], LOGITS, atol=2e-4)
    assert example.generate(model, PROMPT, len(TOKENS), use_cache) == TOKENS


def test_random_weights_give_the_same_tokens_with_and_without_a_cache(example):
    model = example.Model(example.random_weights(2, 64, 101, 40, seed=1), heads=4)
    tokens = example.generate(model, PROMPT, 20)
    assert tokens == example.generate(model, PROMPT, 20, use_cache=False)
    assert len(set(tokens)) > 5  # a model that repeats itself would hide errors


def test_logits_are_the_same_at_every_step(engine, model):
    assert largest_difference(model, "float32") < 1e-4


# The logits' standard deviation is 1.2. Over ten other token sequences the largest differences are
# 9e-4, 9e-3 and 2.5e-2.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float16", 3e-3), ("bfloat16", 3e-2), ("int8", 8e-2)]
)
def test_logits_of_smaller_caches_are_close(engine, model, dtype, tolerance):
    assert 0 < largest_difference(model, dtype) < tolerance


def test_a_prompt_in_parts_changes_nothing(model):
    caches = model.new_caches(len(PROMPT))
    for part in (PROMPT[:1], PROMPT[1:6], PROMPT[6:]):
        logits = model.forward(part, caches)
    np.testing.assert_allclose(logits, model.forward(PROMPT), atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_weights_from_a_file(example, weights, tmp_path, capsys, prefix):
    numpy_files = pytest.importorskip("safetensors.numpy")
    stored = {prefix + name: array for name, array in weights.items()}
    # Files of GPT-2 hold its causal masks too, and some the output matrix, equal to the embedding.
    stored[f"{prefix}h.0.attn.bias"] = np.ones((1, 1, 4, 4), np.float32)
    stored["lm_head.weight"] = weights["wte.weight"]
    path = tmp_path / "model.safetensors"
    numpy_files.save_file(stored, path)

    model = example.Model(example.load_weights(path), HEADS)
    assert example.generate(model, PROMPT, 20) == TOKENS
    prompt = " ".join(map(str, PROMPT))
    example.main(["--weights", str(path), "--heads", "3", "--prompt", prompt, "--tokens", "20"])
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == " ".join(map(str, TOKENS))
    assert "2 layers, 3 heads, hidden size 48" in shown[2]


def test_half_precision_weights_become_float32(example, weights, tmp_path):
    numpy_files = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "half.safetensors"
    numpy_files.save_file({name: w.astype(np.float16) for name, w in weights.items()}, path)
    loaded = example.load_weights(path)
    assert {array.dtype for array in loaded.values()} == {np.dtype(np.float32)}


def test_the_default_head_size_is_64(example):
    weights = example.random_weights(1, 128, 11, 8)
    assert example.Model(weights).heads == 2
    with pytest.raises(ValueError, match="5 heads can't share a hidden size of 128"):
        example.Model(weights, heads=5)


@pytest.mark.parametrize("mode", [[], ["--no-cache"], ["--dtype", "int8"]])
def test_the_printed_output(example, capsys, mode):
    example.main(["--tokens", "5", *mode])
    shown = capsys.readouterr().out.splitlines()
    assert len(shown[0].split()) == 5
    prefill, decode = shown[-2:]
    assert prefill.startswith("prefill     8 tokens")
    assert decode.startswith("decode      4 tokens")
    assert all(line.endswith("tokens/s") for line in (prefill, decode))


def test_sampling_depends_on_the_seed_alone(example, model):
    def sample(seed: int, **options) -> list[int]:
        return example.generate(model, PROMPT, 20, temperature=1.0, seed=seed, **options)

    assert sample(0) == sample(0, use_cache=False)
    assert sample(0) != sample(1)
    cold = example.generate(model, PROMPT, 20, temperature=1e-9)
    assert cold == TOKENS


def test_a_prompt_of_text(example, tmp_path, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    words = ["the", "cat", "sat", "on", "mat"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="the"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.enable_padding(length=50)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    example.main(["--tokenizer", str(path), "--prompt", "the cat", "--vocab", "5", "--tokens", "3"])
    first, *_, prefill, _ = capsys.readouterr().out.splitlines()
    assert first.startswith("the cat ")
    assert len(first.split()) == 5
    assert set(first.split()) <= set(words)
    assert prefill.startswith("prefill     2 tokens")  # no padding


def test_refused_prompts(example, model):
    message = "prompt has 41 tokens and 1 are to follow, but the model's context holds 40"
    with pytest.raises(ValueError, match=message):
        example.generate(model, [1] * 41, 1)
    example.generate(model, [1] * 39, 1)
    with pytest.raises(ValueError, match="30 tokens and 11 are to follow"):
        example.generate(model, [1] * 30, 11, use_cache=False)
    for prompt in ([], [61], [-1]):
        with pytest.raises(ValueError, match="must have tokens, all from 0 to 60"):
            example.generate(model, prompt, 1)
    with pytest.raises(SystemExit, match="context holds 8"):
        example.main(["--context", "8"])
    with pytest.raises(SystemExit, match="must be token ids"):
        example.main(["--prompt", "the cat"])


def test_wrong_options_are_refused(example, capsys):
    for option, value in (("--tokens", "0"), ("--temperature", "-1"), ("--dtype", "float8")):
        with pytest.raises(SystemExit, match="2"):
            example.main([option, value])
        assert option in capsys.readouterr().err


def test_wrong_weights_are_refused(example, weights):
    with pytest.raises(ValueError, match=r"no matrix wte\.weight"):
        example.Model({})
    some = {name: array for name, array in weights.items() if name != "h.1.ln_2.bias"}
    with pytest.raises(ValueError, match=r"h\.1\.ln_2\.bias is missing"):
        example.Model(some, HEADS)
    transposed = weights | {"h.0.mlp.c_fc.weight": weights["h.0.mlp.c_fc.weight"].T}
    with pytest.raises(ValueError, match=r"c_fc\.weight is \(192, 48\).* must be \(48, 192\)"):
        example.Model(transposed, HEADS)


@pytest.mark.parametrize("option", ["--weights", "--tokenizer"])
def test_files_that_cannot_be_read(example, tmp_path, monkeypatch, option):
    package = {"--weights": "safetensors", "--tokenizer": "tokenizers"}[option]
    file = tmp_path / "file"
    file.write_text("neither", encoding="utf-8")
    if importlib.util.find_spec(package) is not None:
        for path in (file, tmp_path / "none"):
            with pytest.raises(SystemExit, match="can't be read"):
                example.main([option, str(path)])
    monkeypatch.setattr(example.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=f"{package} is missing"):
        example.main([option, str(file)])
