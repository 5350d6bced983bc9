"""Write the figures of a comparison as the pages of this machine's CPU, and list all pages.

``python -m qkv_fast bench --json run.json && python benches/report.py run.json`` writes
docs/benchmarks/CPU.md with plots from shapes of prefill, and docs/decode/CPU.md from those of
decoding. Pages of other CPUs stay as they are. docs/benchmarks.md and docs/decode.md list the
pages that are there, each with the date and the machine that it names.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

from qkv_fast.bench.compare import best_ratio
from qkv_fast.bench.peers import UNLIMITED

DOCS = Path(__file__).parents[1] / "docs"
NAMES = {
    "qkv_fast": "qkv_fast",
    "torch": "PyTorch",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "llama.cpp": "llama.cpp",
    "vllm": "vLLM",
    "jax": "JAX",
    "numpy": "NumPy",
}
COLORS = {
    "qkv_fast": "#c0392b",
    "torch": "#e08e0b",
    "onnxruntime": "#2c7fb8",
    "openvino": "#6a51a3",
    "llama.cpp": "#31a354",
    "vllm": "#8c510a",
    "jax": "#d1589f",
    "numpy": "#777777",
}
TITLES = {"benchmarks": "Prefill", "decode": "Decoding"}  # by folder and page of docs/
LIMITED = (
    f"All were limited to one instruction set, but {' and '.join(NAMES[n] for n in UNLIMITED)}, "
    "which can't be."
)
STORED = (
    "The dtype is that of keys and values. llama.cpp takes float32 queries and returns float32 "
    "in every row; the others hold queries and results in the dtype too, but for int8, where they "
    "are float32. int8 is each library's own format: qkv_fast has a factor for each key, llama.cpp "
    "(q8_0) one for 32 numbers. vLLM's plan of a step is made outside the time."
)
MEASURED = re.compile(r"^(\d{4}-\d\d-\d\d), (.+ \(family .+\)), (\d+) threads, (.+)\.$", re.M)
Row = dict[str, Any]


def families(rows: list[Row]) -> dict[tuple[str, bool, int], list[Row]]:
    """Return the rows of batch 1 by dtype, causality and head size, where they span lengths."""
    found: dict[tuple[str, bool, int], list[Row]] = defaultdict(list)
    for row in rows:
        shape = row["shape"]
        if shape["batch"] == 1 and shape["q_len"] == (shape["kv_len"] or shape["q_len"]):
            found[row["dtype"], shape["is_causal"], shape["head_dim"]].append(row)
    return {
        key: sorted(some, key=lambda r: r["shape"]["q_len"])
        for key, some in found.items()
        if len({r["shape"]["q_len"] for r in some}) >= 3
    }


def plot(key: tuple[str, bool, int], rows: list[Row], folder: Path, stem: str) -> str:
    """Draw a family, GFLOP/s over the length with the limit; return the file's name."""
    dtype, causal, head_dim = key
    figure, axes = plt.subplots(figsize=(7.2, 3.8))
    lengths = [row["shape"]["q_len"] for row in rows]
    for name, label in NAMES.items():
        points = [(n, r["gflops"][name]) for n, r in zip(lengths, rows, strict=True)
                  if name in r["gflops"]]  # fmt: skip
        if points:
            width = 2.2 if name == "qkv_fast" else 1.3
            axes.plot(*zip(*points, strict=True), "o-", label=label, color=COLORS[name],
                      linewidth=width, markersize=4)  # fmt: skip
    peaks = [row["peak_gflops"] for row in rows]
    fastest = max(max(row["gflops"].values()) for row in rows)
    axes.plot(lengths, peaks, "--", color="black", linewidth=1, label="multiply-add peak")
    if min(peaks) < 3 * fastest:
        axes.set_ylim(bottom=0)
    else:  # far above: so that it is on the page at all
        axes.set_yscale("log")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(set(lengths)), [str(n) for n in sorted(set(lengths))])
    axes.set_xlabel("length (queries = keys)")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(f"{dtype}, {'causal' if causal else 'full'}, head size {head_dim}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    file = f"{stem}-{dtype}-{'causal' if causal else 'full'}-{head_dim}.svg"
    figure.tight_layout()
    figure.savefig(folder / file, metadata={"Date": None})
    plt.close(figure)
    return file


def markdown(columns: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a table."""
    lines = ["| " + " | ".join(row) + " |" for row in [columns, *rows]]
    return [lines[0], "|" + "---|" * len(columns), *lines[1:]]


def table(rows: list[Row]) -> list[str]:
    """Return a Markdown table of the rows."""
    peers = [name for name in NAMES if any(name in row["gflops"] for row in rows)]
    columns = ["batch, heads, length, head size", *(NAMES[name] for name in peers)]
    lines = []
    for row in rows:
        s, gflops = row["shape"], row["gflops"]
        label = f"{s['batch']}, {s['num_heads']}, {s['q_len']}, {s['head_dim']}"
        lines.append([
            label + (" causal" if s["is_causal"] else ""),
            *(f"{gflops[name]:.0f}" if name in gflops else "-" for name in peers),
            f"{row['peak_gflops']:.0f}",
            f"{gflops.get('qkv_fast', 0) / row['peak_gflops']:.2f}",
            f"{row['read_gb_per_s']:.0f}",
            ratio_cell(row),
        ])  # fmt: skip
    return markdown([*columns, "peak", "share", "GB/s", "to the best peer"], lines)


def decode_table(rows: list[Row]) -> list[str]:
    """Return a Markdown table of rows with few queries: times, and how fast memory is read."""
    peers = [name for name in NAMES if any(name in row["seconds"] for row in rows)]
    columns = ["batch, key heads, keys", "queries", *(NAMES[name] for name in peers)]
    lines = []
    for row in rows:
        s, seconds = row["shape"], row["seconds"]
        own = seconds.get("qkv_fast")
        lines.append([
            f"{s['batch']}, {s['num_kv_heads']}, {s['kv_len']}",
            f"{s['q_len']}",
            *(f"{1e6 * seconds[name]:.0f}" if name in seconds else "-" for name in peers),
            f"{row['read_gigabytes'] / own:.0f}" if own else "-",
            f"{row['read_gb_per_s']:.0f}",
            ratio_cell(row),
        ])  # fmt: skip
    return markdown([*columns, "GB/s", "of", "to the best peer"], lines)


def ratio_cell(row: Row) -> str:
    """Return the ratio to the best peer, if there is one."""
    ratio = best_ratio(row)
    return "-" if ratio is None else f"{ratio:.2f}"


def cpu(machine: dict[str, Any]) -> str:
    """Return the CPU's name, and the instruction set that it was limited to."""
    name = (
        f"{machine.get('model name', machine['config']['platform'])} (family "
        f"{machine.get('cpu family', '?')}, model {machine.get('model', '?')})"
    )
    return f"{name} with {machine['isa']} only" if machine.get("isa") else name


def stem_of(machine: dict[str, Any]) -> str:
    """Return the CPU as the stem of a file's name.

    >>> stem_of({"model name": "Intel(R) Xeon(R) Processor", "cpu family": "6", "model": "167"})
    'intel-xeon-6-167'
    """
    name = machine.get("model name", "cpu").lower()
    name = re.sub(r"\((r|tm)\)|\bprocessor\b|\bcpu\b", " ", name)
    parts = name, machine.get("cpu family", ""), machine.get("model", ""), machine.get("isa") or ""
    return "-".join(re.findall(r"[a-z0-9.]+", " ".join(parts)))


def listing(docs: Path, folder: str) -> str:
    """Return the text of the page that lists a folder's pages, newest first."""
    entries = []
    for file in (docs / folder).glob("*.md"):
        found = MEASURED.search(file.read_text(encoding="utf-8"))
        if found is None:
            raise ValueError(f"{file} does not say when and on what it was measured")
        date, name, threads, system = found.groups()
        entries.append([date, f"[{name}]({folder}/{file.name})", threads, system, file.stem])
    entries.sort(reverse=True)
    what = TITLES[folder].lower()
    return "\n".join([
        f"# {TITLES[folder]} beside other libraries",
        "",
        f"A page for each CPU on which {what} was measured. Compare within a row only: machines, "
        "and the versions of libraries that their pages name, differ. How to measure, and to add "
        "the page of your CPU: [benches/README.md](../benches/README.md).",
        "",
        *markdown(["date", "CPU", "threads", "system and compiler"], [e[:4] for e in entries]),
        "",
        "```{toctree}",
        ":hidden:",
        "",
        *(f"{folder}/{entry[4]}" for entry in entries),
        "```",
        "",
    ])  # fmt: skip


def preface(result: dict[str, Any], title: str) -> list[str]:
    """Return a page's first lines: where its figures come from."""
    machine = result["machine"]
    versions = ", ".join(
        f"{NAMES[name]} {version}" for name, version in machine["versions"].items() if version
    )
    config = machine["config"]
    return [
        f"# {title} on {cpu(machine)}",
        "",
        "Written by `benches/report.py` from runs of `python -m qkv_fast bench`; do not edit.",
        "",
        f"{machine['date']}, {cpu(machine)}, {result['rows'][0]['threads']} threads, "
        f"{machine['system']}; {config['compiler']}.",
        f"{versions}.",
        *([LIMITED] if machine.get("isa") else []),
        "",
    ]


def decode_page(result: dict[str, Any]) -> str:
    """Return the text of the page on few queries against many keys."""
    lines = [
        *preface(result, TITLES["decode"]),
        "Microseconds of a call with few queries for each of 32 query heads of size 128: each "
        "library in a process of its own, in turns; medians of rounds. Every answer was held "
        "against float64 first. GB/s: keys and values read, by qkv_fast; of: reading memory "
        "(256 MB, some of it from the last cache), measured beside each row. What fits in the "
        "caches is read faster than that. -: it can't, or not in the machine's memory.",
        "",
        STORED,
        "",
    ]  # fmt: skip
    for dtype in dict.fromkeys(row["dtype"] for row in result["rows"]):
        lines += [f"## {dtype}", ""]
        lines += [*decode_table([row for row in result["rows"] if row["dtype"] == dtype]), ""]
    return "\n".join(lines)


def page(result: dict[str, Any], folder: Path) -> str:
    """Draw the plots and return the page's text."""
    rows = result["rows"]
    lines = [
        *preface(result, TITLES["benchmarks"]),
        "GFLOP/s: 4·B·H·Lq·Lk·D operations, half of that when causal. Each library runs in a "
        "process of its own, in turns; medians of rounds. Every answer was held against float64 "
        "first. Peak: multiply-adds in registers with the instructions that qkv_fast uses for "
        "the dtype, measured beside each row; share: qkv_fast's part of it. GB/s: reading "
        "memory, likewise.",
        "",
        STORED,
        "",
        "The peak is that of a loop without loads; right after a real product a CPU may clock "
        "lower (10 % on the Xeon where this was looked at). For bfloat16 on a matrix unit (AMX) "
        "it is the softmax, in float32 vectors, that takes most of the time, not the products.",
        "",
    ]  # fmt: skip
    stem = stem_of(result["machine"])
    for key, family in families(rows).items():
        file = plot(key, family, folder, stem)
        what = file.removesuffix(".svg").removeprefix(f"{stem}-").replace("-", " ")
        lines += [f"![benchmarks {what}]({file})", ""]
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        lines += [f"## {dtype}", ""]
        lines += [*table([row for row in rows if row["dtype"] == dtype]), ""]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("json", nargs="*", help="what python -m qkv_fast bench --json wrote")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder to write to")
    options = parser.parse_args(arguments)
    mpl.rcParams["svg.hashsalt"] = "qkv_fast"
    results = [json.loads(Path(file).read_text(encoding="utf-8")) for file in options.json]
    for folder in TITLES:
        (options.docs / folder).mkdir(exist_ok=True)
    for result in results:
        write_pages(result, options.docs)
    for folder in TITLES:
        text = listing(options.docs, folder)
        (options.docs / f"{folder}.md").write_text(text, encoding="utf-8")


def write_pages(result: dict[str, Any], docs: Path) -> None:
    """Write the pages of a run's machine."""
    decoding = [row for row in result["rows"] if row["shape"]["kv_len"]]
    others = [row for row in result["rows"] if not row["shape"]["kv_len"]]
    name = f"{stem_of(result['machine'])}.md"
    if decoding:
        text = decode_page(result | {"rows": decoding})
        (docs / "decode" / name).write_text(text, encoding="utf-8")
    if others:
        text = page(result | {"rows": others}, docs / "benchmarks")
        (docs / "benchmarks" / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
