"""A small share of the fuzz, always the same cases; tests/fuzz.py runs any number of others.

`python tests/fuzz.py --seed SEED --case N` repeats one of these alone.
"""

from __future__ import annotations

import zlib

import fuzz
import numpy as np
import pytest

SEED = 20261120
CASES = 120  # of each engine, and of each its own
CHUNK = 20


@pytest.mark.parametrize("begin", range(0, CASES, CHUNK))
def test_cases_agree_with_the_oracle(engine, begin):
    """Calls, cache walks and refusals: results, the bytes around them, and threads."""
    first = zlib.crc32(fuzz.label(engine).encode()) % 1_000_000 + begin
    found = []
    for number in range(first, first + CHUNK):
        case, differences = fuzz.differences(SEED, number, [engine])
        repeat = f"python tests/fuzz.py --seed {SEED} --case {number}"
        found += [f"{repeat}: {case.function}, {d.what}: {d.detail}" for d in differences]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("number", range(0, 40))
def test_a_case_is_always_the_same(number):
    one, other = (fuzz.make(SEED, number) for _ in range(2))
    assert one.describe() == other.describe()
    for a, b in zip(one.memories, other.memories, strict=True):
        np.testing.assert_array_equal(a.bytes, b.bytes)


def test_the_judge_sees_a_key_too_many_and_a_key_too_few():
    """The tolerance is narrow enough: of moderate scores, each of 4096 keys counts."""
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((1, n, 16)).astype(np.float32) for n in (3, 4096, 4096))
    exact = fuzz.Truth(*(x.astype(float) for x in (q, k, v)), {})
    for lengths, seen in ((4096, True), (4095, False)):
        out = fuzz.oracle.attention(q, k, v, key_lengths=lengths, real=np.float32)[0]
        problem = fuzz.judge(exact, out.astype(float), "float32", False, False)
        assert (problem == "") is seen
