"""A model of Hugging Face Transformers with qkv_fast computing its attention.

    python examples/transformers_model.py
    python examples/transformers_model.py --model FOLDER --text "Once upon a time"

Without a folder it takes a small random Llama, whose text is nonsense, and downloads nothing. It
continues a text with the attention of Transformers (sdpa) and of qkv_fast, compares the tokens, and
times the first pass over a long text with both.
"""

import argparse
from timeit import repeat

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from qkv_fast.integrations.transformers import register

SIZES = {
    "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description="Run a model with qkv_fast's attention.")
    parser.add_argument("--model", metavar="FOLDER", help="a model for text, on this disk")
    parser.add_argument("--text", default="The cat sat on the", help="what the model continues")
    parser.add_argument("--length", type=int, default=512, help="tokens to time (default 512)")
    options = parser.parse_args(arguments)

    register()
    if options.model:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        inputs = tokenizer(options.text, return_tensors="pt")
    else:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
        ids = torch.tensor([[ord(letter) for letter in options.text]])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    long = torch.randint(model.config.vocab_size, (1, options.length))
    tokens = {}
    with torch.inference_mode():
        for name in ("sdpa", "qkv_fast"):
            model.set_attn_implementation(name)
            tokens[name] = model.generate(**inputs, max_new_tokens=20, do_sample=False)
            best = min(repeat(lambda: model(long), number=1, repeat=3))
            print(f"{name:<10}{best * 1e3:8.1f} ms for {options.length} tokens, fastest of 3")
    if options.model:
        print(tokenizer.decode(tokens["qkv_fast"][0]))
    same = tokens["sdpa"].equal(tokens["qkv_fast"])
    print(f"The tokens that follow are {'the same' if same else 'different'}.")


if __name__ == "__main__":
    main()
