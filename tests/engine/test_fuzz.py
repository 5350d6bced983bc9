"""The same few cases of tests/fuzz.py in every run.

`python tests/fuzz.py --seed SEED --case N` repeats one of them alone.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import fuzz
import fuzz_state
import fuzz_torch
import numpy as np
import oracle
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


def test_the_cases_of_the_corpus(engine):
    """Cases that once failed, and one for each pair of features (tests/fuzz_state.py)."""
    cases = fuzz_state.Corpus(fuzz_state.CORPUS).cases()
    assert cases
    found = []
    for seed, number in cases:
        case, differences = fuzz.differences(seed, number, [engine])
        repeat = f"python tests/fuzz.py --seed {seed} --case {number}"
        found += [f"{repeat}: {case.function}, {d.what}: {d.detail}" for d in differences]
    assert not found, "\n".join(found)


def test_a_run_continues_where_it_stopped(tmp_path):
    """The counts of two runs with one state file are those of one run."""
    parts = [fuzz_state.State(3, 10, 100, next=10) for _ in range(2)]
    whole, part = parts
    whole.add_cases(60, 2.0, {"a": 40, "b": 10})
    file = tmp_path / "state"
    part.add_cases(30, 1.0, {"a": 20})
    assert part.add_difference("wrong", 12, "by 3")
    part.save(file)
    part = fuzz_state.load_state(file)
    assert (part.done, part.next) == (20, 30)
    assert not part.add_difference("wrong", 14, "by 4")
    assert part.kinds["wrong"] == {"count": 2, "cases": [12, 14], "detail": "by 3"}
    part.add_cases(60, 1.0, {"a": 20, "b": 10})
    part.kinds = {}
    assert part == whole


def test_a_corpus_grows_by_pairs_that_are_new(tmp_path):
    corpus = fuzz_state.Corpus(tmp_path)
    assert corpus.is_new(["a", "b"])
    corpus.add(1, 2, ["a", "b"])
    corpus.add_failure(1, 7, "wrong")
    corpus.add_failure(1, 7, "late")
    corpus = fuzz_state.Corpus(tmp_path)
    assert corpus.cases() == [(1, 7), (1, 2)]
    assert not corpus.is_new(["b", "a"])
    assert corpus.is_new(["a", "b", "c"])
    assert len((Path(tmp_path) / "failures.jsonl").read_text().splitlines()) == 1


def test_a_reduced_corpus_has_all_pairs():
    cases = [{"features": list(x)} for x in ("ab", "cd", "abc", "bd", "abcd")]
    assert fuzz_state.smallest(cases) == cases[4:]
    assert fuzz_state.smallest(cases[:4]) == cases[1:4]


def test_a_resumed_run_finds_what_a_whole_run_finds(tmp_path, monkeypatch, capsys):
    """Two runs of 10 cases, with children, a state file and a corpus."""
    state, corpus = tmp_path / "state.json", tmp_path / "corpus"
    for cases in (10, 20):
        words = ["fuzz.py", "--seed", "3", "--cases", str(cases), "--chunk", "10", "--engines",
                 "python", "--resume", str(state), "--corpus", str(corpus)]  # fmt: skip
        monkeypatch.setattr("sys.argv", words)
        assert fuzz.main() == 0
        assert fuzz_state.load_state(state).done == cases
    assert "10 cases of seed 3 are done" in capsys.readouterr().out
    counts = fuzz_state.load_state(state).counts
    assert sum(counts.values()) == 20
    assert len(fuzz_state.Corpus(corpus).cases()) > 5


def test_torch_agrees_with_the_oracle():
    """So a result within the tolerance of one is within that of the other."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    compared = 0
    for number in range(150):
        case = fuzz.make(SEED, number)
        if not isinstance(case, fuzz.Case) or case.truth is None:
            continue
        problem = case.truth.by_torch()
        if problem is None:
            continue
        compared += 1
        out, exact = problem.exact()[0], case.truth.exact()[0]
        detail = fuzz.judge(case.truth, out, "float64", True, False)
        assert not detail, (number, detail, np.abs(out - exact).max())
    assert compared > 50


def test_torch_is_not_asked_for_what_it_lacks():
    pytest.importorskip("torch")
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 5, 4))
    options = {"sinks": np.array([0.5, -1.0]), "window": (2, None), "key_lengths": 4}
    exact = oracle.attention(q, k, v, **options)[0]
    np.testing.assert_allclose(fuzz_torch.attention(q, k, v, options), exact, rtol=1e-12)
    assert fuzz_torch.attention(q, k, v, {"softcap": 3.0}) is None
    k[0, 0, 0] = np.nan
    assert fuzz_torch.attention(q, k, v, {}) is None
