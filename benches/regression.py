"""Check whether the kernels have become slower, by their speed relative to NumPy's.

    python benches/regression.py --save base.json       # on the commit to compare with
    python benches/regression.py --compare base.json    # exit status 1 if a figure fell

Each round is a run of bench_attention.py by pytest-benchmark. A figure is the median over rounds of
the ratio of NumPy's time to the kernels' in the same round; its spread is half the range between
quartiles. A figure has fallen when it is lower than the saved one by more than 10 % plus the
larger of both spreads, or when its benchmark is missing.

With --instructions, valgrind's callgrind counts the instructions of a call at five small shapes
instead, which other load does not change. Then a figure has fallen when it is lower by over 2 %.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
SHAPES = ["bert-128", "bert-512", "causal-12x512x64", "16x1024x80", "8x1024x128"]
SMALL = ["1,1,16,64", "1,2,64,64", "1,1,100,40", "1,2,128,64,causal", "1,1,64,128"]
MOST_FALL = 0.10
MOST_INSTRUCTIONS = 0.02
Figures = dict[str, dict[str, float]]


def one_round(shapes: list[str], seconds: float) -> dict[str, float]:
    """Run the benchmarks once; return each one's speed over that of NumPy at the same shape."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "round.json")
        command = [sys.executable, "-m", "pytest", "-q", str(HERE / "bench_attention.py")]
        command += ["-k", " or ".join(f"{shape}]" for shape in shapes), "-p", "no:cacheprovider"]
        command += [f"--benchmark-json={file}", f"--benchmark-max-time={seconds}"]
        command += ["--benchmark-min-rounds=3", "--benchmark-disable-gc", "--benchmark-quiet"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"the benchmarks failed:\n{done.stdout}{done.stderr}")
        runs = json.loads(file.read_text(encoding="utf-8"))["benchmarks"]
    return ratios(runs)


def ratios(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Return NumPy's median time over each benchmark's, of pytest-benchmark's list of them."""
    numpy = {r["group"]: r["stats"]["median"] for r in runs if r["extra_info"]["choice"] == "numpy"}
    return {
        f"{r['group']} {r['extra_info']['dtype']} {r['extra_info']['choice']}": (
            numpy[r["group"]] / r["stats"]["median"]
        )
        for r in runs
        if r["extra_info"]["choice"] != "numpy"
    }


def summary(rounds: list[dict[str, float]]) -> Figures:
    """Return the median over rounds, and half the range between quartiles as a share of it."""
    figures = {}
    for key in rounds[0]:
        values = [r[key] for r in rounds]
        low, high = np.quantile(values, [0.25, 0.75])
        median = statistics.median(values)
        figures[key] = {"ratio": median, "spread": float(high - low) / 2 / median}
    return figures


COUNT = """
import sys
import numpy as np
import qkv_fast
from qkv_fast.bench.shapes import parse
shape = parse(sys.argv[1])
q, k, v = shape.tensors()
out = np.empty_like(q)
for _ in range(int(sys.argv[2])):
    qkv_fast.scaled_dot_product_attention(
        q, k, v, is_causal=shape.is_causal, out=out, num_threads=1
    )
"""


def instructions(shape: str) -> Figures:
    """Count a call's instructions: those of 12 calls less those of 2, by ten. Fewer is better."""
    totals = []
    for calls in (2, 12):
        with tempfile.TemporaryDirectory() as folder:
            command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={folder}/out"]
            command += [sys.executable, "-c", COUNT, shape, str(calls)]
            environment = os.environ | {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"}
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, env=environment
            )
            if done.returncode:
                raise SystemExit(f"valgrind failed:\n{done.stderr}")
            lines = Path(folder, "out").read_text(encoding="utf-8").splitlines()
        totals.append(next(int(line.split()[1]) for line in lines if line.startswith("totals:")))
    each = (totals[1] - totals[0]) / 10
    return {f"{shape}, calls in a million instructions": {"ratio": 1e6 / each, "spread": 0.0}}


def compare(before: Figures, now: Figures, most_fall: float) -> list[str]:
    """Return a line for each figure that has fallen, or is gone."""
    lines = []
    for key, old in before.items():
        new = now.get(key)
        if new is None:
            lines.append(f"{key:<50} {old['ratio']:>10.3g} {'gone':>10}")
            continue
        allowed = most_fall + max(old["spread"], new["spread"])
        change = new["ratio"] / old["ratio"] - 1
        if change < -allowed:
            lines.append(
                f"{key:<50} {old['ratio']:>10.3g} {new['ratio']:>10.3g} {change:>+8.1%}"
                f"   allowed {-allowed:+.1%}"
            )
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return an exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--save", metavar="FILE", help="measure, and write the ratios")
    what.add_argument("--compare", metavar="FILE", help="measure, and compare with those saved")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="NAME")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.1, help="of a benchmark in a round")
    parser.add_argument("--instructions", action="store_true", help="count them, by callgrind")
    options = parser.parse_args(arguments)
    now: Figures = {}
    if options.instructions:
        if not shutil.which("valgrind"):
            print("valgrind is not installed", file=sys.stderr)
            return 2
        for shape in SMALL:
            print(f"counting {shape}", file=sys.stderr)
            now |= instructions(shape)
    else:
        rounds = []
        for i in range(options.rounds):
            print(f"round {i + 1} of {options.rounds}", file=sys.stderr)
            rounds.append(one_round(options.shapes, options.seconds))
        now = summary(rounds)
    if options.save:
        Path(options.save).write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
        print(f"{len(now)} figures in {options.save}")
        return 0
    before = json.loads(Path(options.compare).read_text(encoding="utf-8"))
    fallen = compare(before, now, MOST_INSTRUCTIONS if options.instructions else MOST_FALL)
    if fallen:
        print(f"{'':<50} {'before':>10} {'now':>10} {'change':>8}")
        print("\n".join(fallen))
        return 1
    print(f"none of {len(before)} figures has fallen")
    return 0


if __name__ == "__main__":
    sys.exit(main())
