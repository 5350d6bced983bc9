"""Attention of five tokens step by step, in numbers small enough to check by hand.

    python examples/by_hand.py

Embeddings and projections are made by hand, so that each number has a meaning; in a model they are
learnt. The last step computes the same with qkv_fast and checks that nothing differs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

import qkv_fast

Matrix = npt.NDArray[np.float64]

TOKENS = ["The", "cat", "sat", "on", "mat"]
FEATURES = ["grammar", "living", "action", "place"]
EMBEDDINGS = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1], [0, 0, 0, 1]], float)
TOPICS = ["doer", "place", "deed"]  # the three numbers of a query, a key and a value
# A row for each feature: what such a token looks for, what it can be found by, what it passes on.
TO_QUERY = np.array([[1, 1, 0], [0, 0, 2], [2, 1, 0], [0, 0, 1]], float)
TO_KEY = np.array([[0, 0, 0], [2, 0, 0], [0, 0, 2], [0, 2, 0]], float)
TO_VALUE = np.array([[0, 0, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0]], float)


def show(sentence: str, matrix: Matrix, columns: list[str], decimals: int = 0) -> None:
    """Print a sentence and a matrix with a row for each token."""
    print(f"\n{sentence}\n")
    print(" " * 6 + "".join(f"{column:>9}" for column in columns))
    for token, row in zip(TOKENS, matrix, strict=True):
        print(f"{token:>6}" + "".join(f"{number:9.{decimals}f}" for number in row))


def main() -> Matrix:
    """Print each step; return the result."""
    print("Tokens:", " ".join(TOKENS))
    show("1. Embeddings: each token is a row of features.", EMBEDDINGS, FEATURES)

    query, key, value = EMBEDDINGS @ TO_QUERY, EMBEDDINGS @ TO_KEY, EMBEDDINGS @ TO_VALUE
    show("2. Queries = embeddings @ TO_QUERY: what each token looks for.", query, TOPICS)
    show("3. Keys = embeddings @ TO_KEY: what each token can be found by.", key, TOPICS)
    show("4. Values = embeddings @ TO_VALUE: what each token passes on.", value, TOPICS)

    scores = query @ key.T
    show("5. Scores = queries @ keys.T: how well each key (column) fits each query (row).",
         scores, TOKENS)  # fmt: skip

    scaled = scores / np.sqrt(query.shape[1])
    show("6. Scaled by 1 / sqrt(3), for keys of 3 numbers: longer keys would give larger scores.",
         scaled, TOKENS, 2)  # fmt: skip

    powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    weights = powers / powers.sum(axis=1, keepdims=True)
    show("7. Softmax makes positive weights of each row; their sum is 1.", weights, TOKENS, 2)

    mixed = weights @ value
    show("8. Result = weights @ values: each token's mixture of what the others pass on.",
         mixed, TOPICS, 2)  # fmt: skip

    result: Matrix = qkv_fast.scaled_dot_product_attention(query, key, value)
    np.testing.assert_allclose(result, mixed, rtol=1e-12)
    print("\n9. qkv_fast.scaled_dot_product_attention(query, key, value) gives the same.")
    sat = TOKENS.index("sat")
    best = TOKENS[int(weights[sat].argmax())]
    print(f'   "sat" looks at "{best}" most, with {weights[sat].max():.0%} of its weight.')
    return result


if __name__ == "__main__":
    main()
