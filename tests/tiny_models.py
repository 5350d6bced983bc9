"""Small random models of Transformers, and how far their results differ from those of eager.

    python tests/tiny_models.py

prints the table of docs/integrations/transformers.md. Nothing is downloaded.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import transformers as hf
from transformers.generation import GenerationMixin

from qkv_fast.integrations.transformers import register

register()

BATCH, LENGTH, NEW_TOKENS = 3, 12, 10
CACHES = ("dynamic", "static")
PADDINGS = (None, "left", "right")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

WORDS = {"vocab_size": 60, "max_position_embeddings": 64, "pad_token_id": 0}
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
BODY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
ENCODER = {**WORDS, **BODY}
DECODER = {**WORDS, **ENDS, **BODY}
GROUPED = {**DECODER, "num_key_value_heads": 2, "head_dim": 8}
WINDOWED = {**GROUPED, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
BOTH = {
    **WORDS, **ENDS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "decoder_start_token_id": 1,
}  # fmt: skip
IMAGE = {"image_size": 16, "patch_size": 4}


class Architecture(NamedTuple):
    model: Any
    config: Any
    sizes: dict[str, Any]
    has_sdpa: bool = True  # whether Transformers lets it run with sdpa


ARCHITECTURES = {
    "BERT": Architecture(hf.BertModel, hf.BertConfig, ENCODER),
    "RoBERTa": Architecture(hf.RobertaModel, hf.RobertaConfig, ENCODER),
    "DistilBERT": Architecture(
        hf.DistilBertModel, hf.DistilBertConfig,
        {**WORDS, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    ),
    "GPT-2": Architecture(
        hf.GPT2LMHeadModel, hf.GPT2Config,
        {**WORDS, **ENDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    "GPT-NeoX": Architecture(hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, DECODER),
    "Llama": Architecture(hf.LlamaForCausalLM, hf.LlamaConfig, GROUPED),
    "Mistral": Architecture(
        hf.MistralForCausalLM, hf.MistralConfig, {**GROUPED, "sliding_window": 5}
    ),
    "Qwen2": Architecture(hf.Qwen2ForCausalLM, hf.Qwen2Config, GROUPED),
    "Qwen3": Architecture(hf.Qwen3ForCausalLM, hf.Qwen3Config, GROUPED),
    "Gemma 2": Architecture(
        hf.Gemma2ForCausalLM, hf.Gemma2Config,
        {**WINDOWED, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}, has_sdpa=False,
    ),
    "Gemma 3": Architecture(
        hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, {**WINDOWED, "query_pre_attn_scalar": 8}
    ),
    "gpt-oss": Architecture(
        hf.GptOssForCausalLM, hf.GptOssConfig,
        {**WINDOWED, "num_local_experts": 2, "num_experts_per_tok": 2, "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0}}, has_sdpa=False,
    ),
    "Llama 4": Architecture(
        hf.Llama4ForCausalLM, hf.Llama4TextConfig,
        {**GROUPED, "intermediate_size_mlp": 48, "num_local_experts": 1, "attention_chunk_size": 5,
         "layer_types": ["chunked_attention", "full_attention"]},
    ),
    "T5": Architecture(
        hf.T5ForConditionalGeneration, hf.T5Config,
        {"vocab_size": 60, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 1,
         "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    ),
    "BART": Architecture(hf.BartForConditionalGeneration, hf.BartConfig, BOTH),
    "Marian": Architecture(hf.MarianMTModel, hf.MarianConfig, BOTH),
    "Whisper": Architecture(
        hf.WhisperForConditionalGeneration, hf.WhisperConfig,
        {**BOTH, "num_mel_bins": 8, "max_source_positions": 24, "max_target_positions": 64,
         "suppress_tokens": [], "begin_suppress_tokens": []},
    ),
    "NLLB-MoE, dense": Architecture(  # its decoder's layers do not say that they are causal
        hf.NllbMoeForConditionalGeneration, hf.NllbMoeConfig,
        {**BOTH, "encoder_sparse_step": 0, "decoder_sparse_step": 0}, has_sdpa=False,
    ),
    "ViT": Architecture(hf.ViTModel, hf.ViTConfig, {**BODY, **IMAGE}),
    "CLIP": Architecture(
        hf.CLIPModel, hf.CLIPConfig,
        {"text_config": {**DECODER, "projection_dim": 32}, "projection_dim": 32,
         "vision_config": {**BODY, **IMAGE, "projection_dim": 32}},
    ),
}  # fmt: skip


def implementations(name: str) -> tuple[str, ...]:
    return ("eager", "sdpa", "qkv_fast") if ARCHITECTURES[name].has_sdpa else ("eager", "qkv_fast")


@functools.cache
def model_of(name: str, dtype: str) -> Any:
    """Return a model whose weights are large enough that attention is far from uniform."""
    kind, config, sizes, _ = ARCHITECTURES[name]
    torch.manual_seed(len(name))
    model = kind._from_config(config(**sizes), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim >= 2 or parameter_name.endswith("sinks"):
                parameter.normal_(0.0, 0.25)
    if (generation := getattr(model, "generation_config", None)) is not None:
        generation.eos_token_id = None  # so that all generate to the end
    return model.to(DTYPES[dtype])


def inputs_of(name: str, dtype: str, padding: str | None) -> tuple[dict[str, Any], torch.Tensor]:
    """Return what a model is called with, and (batch, length) that is 1 where a result counts."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 60, (BATCH, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    for row, count in enumerate((0, 5, 3)):
        if padding == "left":
            mask[row, :count] = 0
        elif padding == "right":
            mask[row, LENGTH - count :] = 0
    floats = functools.partial(torch.rand, generator=generator)
    words = {"input_ids": ids * mask, "attention_mask": mask}
    decoder = {"decoder_input_ids": ids.flip(0)}
    pixels = {"pixel_values": floats((BATCH, 3, 16, 16)).to(DTYPES[dtype])}
    everything = torch.ones_like(mask)
    if name == "ViT":
        return pixels, torch.ones(BATCH, 17)
    if name == "CLIP":
        return {**words, **pixels}, mask
    if name == "Whisper":
        features = floats((BATCH, 8, 48)).to(DTYPES[dtype])
        return {"input_features": features, **decoder}, everything
    if name in ("T5", "BART", "Marian", "NLLB-MoE, dense"):
        return {**words, **decoder}, everything
    return words, mask


def can_be_padded(name: str) -> bool:
    return name not in ("ViT", "Whisper")


def can_generate(name: str) -> bool:
    return issubclass(ARCHITECTURES[name].model, GenerationMixin)


def forward(name: str, dtype: str, implementation: str, padding: str | None) -> torch.Tensor:
    """Return logits or last states, 0 where the result is that of padding."""
    model = model_of(name, dtype)
    model.set_attn_implementation(implementation)
    inputs, counts = inputs_of(name, dtype, padding)
    with torch.inference_mode():
        result = model(**inputs)
    if name == "CLIP":
        result = (result.text_model_output.last_hidden_state, result.vision_model_output[0])
        return torch.cat([(result[0] * counts[..., None]).flatten(), result[1].flatten()]).float()
    return result[0].float() * counts[..., None]


def difference(name: str, dtype: str, implementation: str, padding: str | None) -> float:
    """Return the largest difference from eager, relative to the largest number."""
    expected = forward(name, dtype, "eager", padding)
    got = forward(name, dtype, implementation, padding)
    return float((got - expected).abs().max() / expected.abs().max())


def generate(
    name: str, dtype: str, implementation: str, cache: str, padding: str | None = "left"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens that follow greedily, (batch, new), and their logits."""
    model = model_of(name, dtype)
    model.set_attn_implementation(implementation)
    inputs, _ = inputs_of(name, dtype, padding if can_be_padded(name) else None)
    inputs.pop("decoder_input_ids", None)
    with torch.inference_mode():
        result = GenerationMixin.generate(
            model, **inputs, max_new_tokens=NEW_TOKENS, do_sample=False,
            cache_implementation=cache, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    logits = torch.stack(result.logits, dim=1).float()
    return result.sequences[:, -logits.shape[1] :], logits


def first_doubt(name: str, dtype: str, implementation: str, cache: str) -> float:
    """Return 0.0 if the tokens are those of eager.

    Otherwise how much eager prefers its token where they first differ, relative to the largest
    logit: a number of the size of rounding errors is no mistake.
    """
    expected, logits = generate(name, dtype, "eager", cache)
    got, _ = generate(name, dtype, implementation, cache)
    worst = 0.0
    for row in range(BATCH):
        wrong = (got[row] != expected[row]).nonzero()
        if len(wrong):
            step = int(wrong[0])
            at = logits[row, step]
            margin = at[expected[row, step]] - at[got[row, step]]
            worst = max(worst, float(margin / at.abs().max()), 1e-9)
    return worst


def table() -> str:
    """Return the table of the documentation."""
    lines = ["| | prefill | padded | prefill, bfloat16 | padded, bfloat16 | tokens generated |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for name in ARCHITECTURES:
        cells = []
        for dtype in DTYPES:
            for paddings in ((None,), ("left", "right")):
                if paddings[0] and not can_be_padded(name):
                    cells.append("")
                    continue
                pair = [
                    f"{max(difference(name, dtype, how, padding) for padding in paddings):.0e}"
                    for how in implementations(name)[:0:-1]
                ]
                cells.append(pair[0] + (f" ({pair[1]})" if pair[1:] else ""))
        tokens = ""
        if can_generate(name):
            doubts = {
                d: max(first_doubt(name, d, "qkv_fast", cache) for cache in CACHES) for d in DTYPES
            }
            tokens = "different" if doubts["float32"] else "equal"
            if doubts["bfloat16"]:
                tokens += f"; bfloat16: {'near ties' if doubts['bfloat16'] < 0.03 else 'different'}"
        lines.append(f"| {name} | {' | '.join(cells)} | {tokens} |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table())
