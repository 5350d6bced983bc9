"""What tests/fuzz.py keeps in files: how far a run has come, and a corpus of cases.

A state file holds counts and the differences that a run has found, so that it can be resumed.
A corpus is a folder with two files, of a JSON object in each line:

    pairs.jsonl      cases that were the first to have some pair of features (see `pairs`)
    failures.jsonl   cases in which a difference was found

A case is a seed and a number. It is another case after a change of how cases are drawn: replay it
all the same, since it still is one, and let a run with ``--corpus`` fill the gaps.

`python tests/fuzz_state.py FROM TO` copies a corpus with no more cases than its pairs need.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CORPUS = HERE / "corpus" / "fuzz"


def digest() -> str:
    """Return a hash of the files that decide which cases are drawn."""
    files = [HERE / name for name in ("fuzz.py", "oracle.py", "statistics_oracle.py")]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:12]


@dataclasses.dataclass
class State:
    """How far a run has come. Its cases are `first` to `first + cases - 1` of a seed."""

    seed: int
    first: int
    cases: int
    next: int
    seconds: float = 0.0
    # Cases by function, and under "torch" those that torch has judged too.
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    # For each kind of difference: how many cases, the first of them, and details of the first.
    kinds: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    # Cases run, by the digest of the files that drew them.
    sources: dict[str, int] = dataclasses.field(default_factory=dict)

    def add_difference(self, kind: str, number: int, detail: str) -> bool:
        """Count a difference; return whether it is the first of its kind."""
        known = self.kinds.setdefault(kind, {"count": 0, "cases": [], "detail": detail})
        known["count"] += 1
        if number not in known["cases"] and len(known["cases"]) < 20:
            known["cases"].append(number)
        return bool(known["count"] == 1)

    def add_cases(self, end: int, seconds: float, counts: dict[str, int]) -> None:
        source = digest()
        self.sources[source] = self.sources.get(source, 0) + end - self.next
        self.next, self.seconds = end, self.seconds + seconds
        for name, count in counts.items():
            self.counts[name] = self.counts.get(name, 0) + count

    @property
    def done(self) -> int:
        return self.next - self.first

    def save(self, path: Path) -> None:
        """Write the file anew; an interrupted write leaves the old one."""
        new = path.with_name(path.name + ".new")
        new.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")
        os.replace(new, path)


def load_state(path: Path) -> State:
    return State(**json.loads(path.read_text()))


def pairs(features: Iterable[str]) -> set[tuple[str, str]]:
    """Return all pairs of a case's features, such as ("attn_mask bool", "paged_attention")."""
    return set(itertools.combinations(sorted(set(features)), 2))


def entries(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def append(path: Path, entry: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")


class Corpus:
    """The cases of a folder, and the pairs of features that they have."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: set[tuple[str, str]] = set()
        self._known = set()
        for entry in entries(folder / "pairs.jsonl"):
            self.seen |= pairs(entry["features"])
        for entry in entries(folder / "failures.jsonl"):
            self._known.add((entry["seed"], entry["number"]))

    def cases(self) -> list[tuple[int, int]]:
        """Return (seed, number) of each case: failures first."""
        found = [
            (entry["seed"], entry["number"])
            for name in ("failures.jsonl", "pairs.jsonl")
            for entry in entries(self.folder / name)
        ]
        return list(dict.fromkeys(found))

    def is_new(self, features: Iterable[str]) -> bool:
        """Return whether no case has some pair of these features; they count as seen then."""
        before = len(self.seen)
        self.seen |= pairs(features)
        return len(self.seen) > before

    def add(self, seed: int, number: int, features: list[str]) -> None:
        entry = {"seed": seed, "number": number, "features": sorted(set(features))}
        append(self.folder / "pairs.jsonl", entry)

    def add_failure(self, seed: int, number: int, kind: str) -> None:
        if (seed, number) not in self._known:
            self._known.add((seed, number))
            entry = {"seed": seed, "number": number, "kind": kind}
            append(self.folder / "failures.jsonl", entry)


def smallest(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return some of the cases that have all pairs: in turn the one that adds the most."""
    missing = {i: pairs(case["features"]) for i, case in enumerate(cases)}
    chosen = []
    while missing:
        best = max(missing, key=lambda i: len(missing[i]))
        added = missing.pop(best)
        if added:
            chosen.append(best)
        missing = {i: rest for i, x in missing.items() if (rest := x - added)}
    return [cases[i] for i in sorted(chosen)]


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    kept = smallest(entries(source / "pairs.jsonl") + entries(target / "pairs.jsonl"))
    (target / "pairs.jsonl").unlink(missing_ok=True)
    for entry in kept:
        append(target / "pairs.jsonl", entry)
    known = Corpus(target)
    for entry in entries(source / "failures.jsonl"):
        known.add_failure(entry["seed"], entry["number"], entry["kind"])
    print(f"{target}: {len(known.cases())} cases")


if __name__ == "__main__":
    main()
