"""Measures every library on the same tensors, each in a process of its own, in turns.

Thread pools that spin slow each other tenfold in one process; here the others sleep while one
runs. In each round every peer has one turn of at least --turn seconds; the figure is the
median over rounds of a turn's median. Each answer is first held against float64. The peak of
multiply-adds in registers and the read bandwidth are measured again beside every row, since a
machine's speed drifts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from .peers import DTYPES, ISAS, PREPARE, TOLERANCE, UNLIMITED, Peer, version
from .probes import limits
from .shapes import FORM, GROUPS, Shape, listing, named

Row = dict[str, Any]


def measure(
    name: str, shape: Shape, dtype: str, peers: list[Peer], rounds: int, turn: float, threads: int
) -> Row:
    """Return a row: what each peer reached, its error, and the machine's limits meanwhile."""
    row: Row = {"name": name, "shape": shape._asdict(), "dtype": dtype, "threads": threads}
    row |= {"gflops": {}, "seconds": {}, "spread": {}, "error": {}, "failed": {}}
    times: dict[str, list[float]] = {}
    for peer in peers:
        progress(f"{name} {dtype}: preparing {peer.name}")
        kind, value = peer.ask("prepare", shape, dtype)
        if kind == "ready" and value < TOLERANCE[dtype]:
            row["error"][peer.name] = value
            times[peer.name] = []
        else:
            row["failed"][peer.name] = value if kind == "error" else f"wrong by {value}"
    ready = [peer for peer in peers if peer.name in times]
    peaks, bandwidths = [], []
    for i in range(rounds):
        progress(f"{name} {dtype}: round {i + 1} of {rounds}")
        for peer in ready if i % 2 == 0 else ready[::-1]:
            time.sleep(0.06)  # until the threads of the previous peer sleep
            kind, value = peer.ask("run", turn)
            if kind == "time":
                times[peer.name].append(value)
            else:
                row["failed"][peer.name] = value
        time.sleep(0.06)
        peak, bandwidth = limits(dtype, threads)
        peaks.append(peak)
        bandwidths.append(bandwidth)
    progress("")
    row["peak_gflops"] = statistics.median(peaks)
    row["read_gb_per_s"] = statistics.median(bandwidths)
    row["read_gigabytes"] = shape.read_gigabytes(dtype)
    for peer_name, seconds in times.items():
        if peer_name not in row["failed"]:
            row["gflops"][peer_name] = shape.gflop / statistics.median(seconds)
            row["seconds"][peer_name] = statistics.median(seconds)
            low, high = np.quantile(seconds, [0.25, 0.75])
            row["spread"][peer_name] = float((high - low) / statistics.median(seconds))
    return row


def progress(text: str) -> None:
    """Show where it is on the terminal's last line, if standard error is a terminal."""
    if sys.stderr.isatty():
        print(f"\r{text:<70}\r", end="", file=sys.stderr, flush=True)


def best_ratio(row: Row) -> float | None:
    """Return qkv_fast's speed over that of the best peer."""
    others = [speed for name, speed in row["gflops"].items() if name != "qkv_fast"]
    ours = row["gflops"].get("qkv_fast")
    return ours / max(others) if ours and others else None


def header(names: list[str]) -> str:
    """Return the table's first line."""
    return f"{'':<29}" + "".join(f"{n:>13}" for n in names) + f"{'peak':>8}{'GB/s':>6}{'ratio':>7}"


def line(row: Row, names: list[str]) -> str:
    """Return a row of the table: GFLOP/s and the share of the peak."""
    cells = ""
    for name in names:
        speed = row["gflops"].get(name)
        share = f" ({speed / row['peak_gflops']:.2f})" if speed and row["peak_gflops"] else ""
        cells += f"{'-' if speed is None else f'{speed:.0f}{share}':>13}"
    ratio = best_ratio(row)
    label = f"{row['name']} {row['dtype']}"
    limit = f"{row['peak_gflops']:>8.0f}{row['read_gb_per_s']:>6.0f}"
    return f"{label:<29}{cells}{limit}{'-' if ratio is None else f'{ratio:.2f}':>7}"


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    from qkv_fast import show_config

    facts: dict[str, Any] = {"config": show_config("dicts"), "system": platform.platform()}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for entry in cpuinfo.read_text(encoding="utf-8").splitlines():
            if entry.startswith(("model name", "cpu family", "model\t")):
                facts.setdefault(entry.split(":")[0].strip(), entry.split(":")[1].strip())
    facts["versions"] = {name: version(name) for name in PREPARE}
    facts["date"] = time.strftime("%Y-%m-%d")
    facts["isa"] = os.environ.get("QKV_FAST_ISA")
    return facts


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the comparison."""
    parser.add_argument(
        "--shapes",
        nargs="+",
        metavar="SHAPE",
        default=["prefill"],
        help=f"{FORM}, a group ({', '.join(GROUPS)}) or a name of --list; default: prefill",
    )
    parser.add_argument(
        "--list", action="store_true", help="print the names of shapes with their sizes, and exit"
    )
    parser.add_argument(
        "--peers", nargs="+", choices=list(PREPARE), help="default: those that are installed"
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=DTYPES,
        default=list(DTYPES),
        help="of keys and values; int8 is for shapes of decoding, and left out of others",
    )
    parser.add_argument(
        "--isa",
        choices=list(ISAS),
        help=f"instruction set for all libraries but {', '.join(UNLIMITED)}",
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--turn", type=float, default=0.15, help="seconds of a turn")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", metavar="FILE", help="file to write machine and rows to")


def run(options: argparse.Namespace) -> int:
    """Run the comparison, or print the shapes for --list; return an exit status."""
    if options.list:
        print(listing())
        return 0
    try:
        shapes = named(options.shapes)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    installed = [name for name in PREPARE if version(name)]
    names = options.peers or installed
    for name in names:
        if name not in installed:
            print(f"{name} is not installed here", file=sys.stderr)
            return 2
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    os.environ.update(ISAS.get(options.isa, {}))
    peers = [Peer(name, options.threads) for name in names]
    result: dict[str, Any] = {"machine": machine(), "rows": []}
    print(f"GFLOP/s (share of the multiply-add peak), {options.threads} threads")
    if options.isa:
        free = ", ".join(name for name in UNLIMITED if name in names)
        print(f"instruction set: {options.isa}" + (f"; {free} can't be limited to it" * bool(free)))
    print(header(names))
    for name, shape in shapes.items():
        for dtype in options.dtypes:
            if dtype == "int8" and not shape.kv_len:
                continue
            row = measure(name, shape, dtype, peers, options.rounds, options.turn, options.threads)
            result["rows"].append(row)
            print(line(row, names), flush=True)
            for peer_name, why in row["failed"].items():
                if not why.startswith("NotImplementedError"):
                    print(f"    {peer_name}: {why}")
            if options.json:  # after each row, so that a run that is cut short leaves its figures
                Path(options.json).write_text(json.dumps(result, indent=1), encoding="utf-8")
    for peer in peers:
        peer.close()
    return 0
