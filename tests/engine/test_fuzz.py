"""The same few cases of tests/fuzz.py in every run.

`python tests/fuzz.py --seed SEED --case N` repeats one of them alone.
"""

from __future__ import annotations

import zlib

import fuzz
import numpy as np
import pytest

SEED = 20261120
CASES = 120  # for each engine, tile kind and ISA, which all have other cases
CHUNK = 20


@pytest.mark.parametrize("begin", range(0, CASES, CHUNK))
def test_cases_agree_with_the_oracle(engine, begin):
    """Calls, walks of a cache and refusals: results, bytes beside them, numbers of threads."""
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


def test_judge_refuses_a_result_that_lacks_one_key():
    """With moderate scores the tolerance is narrower than the effect of one key among 4096."""
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((1, n, 16)).astype(np.float32) for n in (3, 4096, 4096))
    exact = fuzz.Truth(*(x.astype(float) for x in (q, k, v)), {})
    for lengths, seen in ((4096, True), (4095, False)):
        out = fuzz.oracle.attention(q, k, v, key_lengths=lengths, real=np.float32)[0]
        problem = fuzz.judge(exact, out.astype(float), "float32", False, False)
        assert (problem == "") is seen
