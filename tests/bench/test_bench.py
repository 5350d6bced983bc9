"""`python -m qkv_fast bench` on a tiny shape, and the arithmetic of benches/regression.py."""

from __future__ import annotations

import json

import numpy as np
import pytest

from qkv_fast import __main__, _dtypes
from qkv_fast.bench import compare, peers, probes, shapes


@pytest.fixture
def regression():
    return pytest.importorskip("regression", reason="needs benches/")


def run_of(group: str, choice: str, median: float) -> dict:
    info = {"choice": choice, "dtype": "float32"}
    return {"group": group, "extra_info": info, "stats": {"median": median}}


def test_ratios_are_to_numpy_at_the_same_shape(regression):
    runs = [run_of("a", "numpy", 8.0), run_of("b", "numpy", 3.0)]
    runs += [run_of("a", "native", 2.0), run_of("b", "native", 6.0)]
    assert regression.ratios(runs) == {"a float32 native": 4.0, "b float32 native": 0.5}


def test_summary_is_median_and_spread(regression):
    figures = regression.summary([{"x": r} for r in (4.0, 1.0, 2.0, 3.0, 5.0)])
    assert figures == {"x": {"ratio": 3.0, "spread": pytest.approx(1 / 3)}}


@pytest.mark.parametrize(
    ("now", "spread", "falls"),
    [(9.1, 0.0, False), (8.9, 0.0, True), (8.9, 0.05, False), (8.0, 0.05, True), (12, 0, False)],
)
def test_a_fall_is_beyond_ten_percent_and_the_spread(regression, now, spread, falls):
    before = {"x": {"ratio": 10.0, "spread": 0.0}}
    lines = regression.compare(before, {"x": {"ratio": now, "spread": spread}}, 0.10)
    assert bool(lines) == falls


def test_a_benchmark_that_is_gone_has_fallen(regression):
    before = {"x": {"ratio": 1.0, "spread": 0.0}}
    now = {"renamed": {"ratio": 1.0, "spread": 0.0}}
    assert "gone" in regression.compare(before, now, 0.10)[0]


def test_regression_exits_with_1_on_a_fall(regression, tmp_path, monkeypatch, capsys):
    speed = [4.0]
    monkeypatch.setattr(regression, "one_round", lambda *_: {"x": speed[0]})
    base = str(tmp_path / "base.json")
    assert regression.main(["--save", base]) == 0
    assert regression.main(["--compare", base]) == 0
    speed[0] = 3.0
    assert regression.main(["--compare", base]) == 1
    assert "-25.0%" in capsys.readouterr().out


def test_shapes_by_name_and_by_numbers():
    assert shapes.parse("bert-128") == shapes.Shape(1, 12, 128, 64)
    assert shapes.parse("2,3,5,8") == shapes.Shape(2, 3, 5, 8)
    assert shapes.parse("2,3,5,8,causal").gflop == pytest.approx(4e-9 * 2 * 3 * 25 * 8 / 2)
    for wrong in ("1,2,3", "1,2,3,x", "causal", "0,1,1,1", "1,2,3,4,full"):
        with pytest.raises(ValueError, match="shape is"):
            shapes.parse(wrong)


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("quux", None),
        ("Bert-128", "bert-128"),
        ("gpt2-1024", "gpt2-causal-1024"),
        ("prefil", "prefill"),
    ],
)
def test_a_bad_shape_is_answered_with_the_form_and_the_nearest_name(capsys, wrong, nearest):
    assert __main__.main(["bench", "--shapes", wrong]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"shape is {wrong!r}: ")
    assert "batch,heads,length,head_dim[,causal]" in told
    assert "a group (prefill, decode, tokens)" in told
    assert "python -m qkv_fast bench --list" in told
    assert len(told) < 300
    if nearest is None:
        assert "nearest" not in told
    else:
        assert f"nearest: {nearest}" in told


def test_the_list_has_every_name_with_its_sizes(monkeypatch, capsys):
    monkeypatch.setattr(compare, "Peer", None)  # nothing is measured
    assert __main__.main(["bench", "--list"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line]
    assert {row[0] for row in rows} == {*shapes.GROUPS, *shapes.SHAPES, *shapes.DECODE}
    assert ["gpt2-causal-1024", "1", "12", "12", "1024", "1024", "64", "causal"] in rows
    assert ["decode-8x512-q2", "8", "32", "8", "2", "512", "128"] in rows


def test_the_help_of_shapes_is_short(capsys):
    with pytest.raises(SystemExit) as stop:
        __main__.main(["bench", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "batch,heads,length,head_dim[,causal]" in shown
    assert "--list" in shown
    assert not any(name in shown for name in (*shapes.SHAPES, *shapes.DECODE))


def test_bfloat16_bits_round_to_even():
    x = np.array([1.0, 1.00390625, 1.01171875, -2.5], np.float32)
    bits = _dtypes.bfloat16_bits(x)
    np.testing.assert_array_equal(bits, [0x3F80, 0x3F80, 0x3F82, 0xC020])
    np.testing.assert_array_equal(_dtypes.reals(bits, _dtypes.BFLOAT16), [1.0, 1.0, 1.015625, -2.5])


def test_the_comparison_runs_and_writes_json(tmp_path, capsys):
    file = tmp_path / "run.json"
    command = ["bench", "--shapes", "1,2,20,8,causal", "--peers", "qkv_fast", "numpy"]
    command += ["--rounds", "2", "--turn", "0.01", "--threads", "1", "--json", str(file)]
    assert __main__.main(command) == 0
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert [row["dtype"] for row in rows] == ["float32", "bfloat16", "float16"]
    assert set(rows[0]["gflops"]) == {"qkv_fast", "numpy"}
    assert set(rows[1]["gflops"]) == {"qkv_fast"}
    assert rows[0]["error"]["qkv_fast"] < 1e-5
    assert rows[1]["error"]["qkv_fast"] < 4e-2
    assert compare.best_ratio(rows[0]) == pytest.approx(
        rows[0]["gflops"]["qkv_fast"] / rows[0]["gflops"]["numpy"]
    )
    assert "1,2,20,8,causal bfloat16" in capsys.readouterr().out


def test_a_peer_with_a_wrong_result_is_named_and_not_timed(monkeypatch):
    class Wrong:
        name = "torch"

        def ask(self, kind, *_):
            return ("ready", 0.5) if kind == "prepare" else ("time", 1e-9)

    row = compare.measure("x", shapes.parse("1,1,8,8"), "float32", [Wrong()], 1, 0.01, 1)
    assert row["failed"] == {"torch": "wrong by 0.5"}
    assert row["gflops"] == {}


def test_unknown_shapes_and_missing_peers_exit_with_2(monkeypatch, capsys):
    assert __main__.main(["bench", "--shapes", "nonsense"]) == 2
    monkeypatch.setattr(compare, "version", lambda name: None)
    assert __main__.main(["bench", "--peers", "torch"]) == 2
    assert "torch is not installed here" in capsys.readouterr().err


def test_peers_that_are_not_installed_are_left_out(monkeypatch, capsys):
    monkeypatch.setattr(compare, "version", lambda name: "1" if name == "numpy" else None)
    command = ["bench", "--shapes", "1,1,8,8", "--dtypes", "float32", "int8"]
    assert __main__.main([*command, "--rounds", "1", "--turn", "0.01", "--threads", "1"]) == 0
    shown = capsys.readouterr().out
    assert not any(name in shown for name in peers.PREPARE if name != "numpy")
    assert "int8" not in shown  # it is no shape of decoding


@pytest.mark.parametrize(
    ("name", "dtypes"),
    [
        ("qkv_fast", ("float32", "bfloat16", "float16", "int8")),
        ("llama.cpp", ("float32", "bfloat16", "float16", "int8")),
        ("vllm", ("float32", "bfloat16", "float16")),
        ("jax", ("float32", "bfloat16")),
    ],
)
def test_a_peer_answers_as_float64_does(name, dtypes):
    if peers.version(name) is None:
        pytest.skip(f"{name} is not installed")
    peer = peers.Peer(name, 1)
    grouped = shapes.Shape(2, 4, 1, 64, False, 70, 2)
    try:
        for shape in (shapes.parse("2,2,33,64"), shapes.parse("1,2,40,64,causal"), grouped):
            for dtype in peers.DTYPES:
                if dtype == "int8" and not shape.kv_len:
                    continue
                kind, value = peer.ask("prepare", shape, dtype)
                if dtype in dtypes:
                    assert (kind, value) == ("ready", pytest.approx(0, abs=peers.TOLERANCE[dtype]))
                    assert peer.ask("run", 0.001)[0] == "time"
                else:
                    assert kind == "error"
                    assert value.startswith("NotImplementedError")
    finally:
        peer.close()


def test_the_peak_of_int8_is_that_of_float32(monkeypatch):
    monkeypatch.setenv("QKV_FAST_ISA", "auto")
    peak, bandwidth = probes.limits("int8", 1)
    assert (peak > 0) == (bandwidth > 0)


def test_a_report_keeps_the_pages_of_other_cpus(tmp_path):
    report = pytest.importorskip("report", exc_type=ImportError)
    for folder in report.TITLES:
        (tmp_path / folder).mkdir()
        line = "2020-01-02, Old CPU (family 1, model 2), 3 threads, Linux; gcc 1."
        (tmp_path / folder / "old.md").write_text(line, encoding="utf-8")
    machine = {"date": "2021-01-02", "system": "Linux", "isa": None, "versions": {"numpy": "2"}}
    machine |= {"config": {"compiler": "gcc 2", "platform": "x"}, "cpu family": "6", "model": "7"}
    machine["model name"] = "New(R) CPU"
    row = {"name": "x", "dtype": "int8", "threads": 2, "gflops": {"qkv_fast": 1.0}}
    row |= {"shape": shapes.DECODE["decode-1x128-q1"]._asdict(), "seconds": {"qkv_fast": 1e-6}}
    row |= {"peak_gflops": 2.0, "read_gb_per_s": 3.0, "read_gigabytes": 1e-6}
    run = tmp_path / "run.json"
    run.write_text(json.dumps({"machine": machine, "rows": [row]}), encoding="utf-8")
    report.main([str(run), "--docs", str(tmp_path)])
    index = (tmp_path / "decode.md").read_text(encoding="utf-8")
    assert index.index("](decode/new-6-7.md)") < index.index("](decode/old.md)")
    assert "| 2020-01-02 | [Old CPU (family 1, model 2)](decode/old.md) | 3 |" in index
    assert "new" not in (tmp_path / "benchmarks.md").read_text(encoding="utf-8")
    assert "## int8" in (tmp_path / "decode" / "new-6-7.md").read_text(encoding="utf-8")


def test_without_a_command_the_help_is_printed(capsys):
    assert __main__.main([]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: python -m qkv_fast")
    assert "print the configuration" in shown
    assert "measure against other libraries" in shown


def test_an_unknown_command_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        __main__.main(["unknown"])
    assert stop.value.code == 2
    assert "invalid choice: 'unknown'" in capsys.readouterr().err
