"""Check that a change to the code changes no bit of any result.

    python tests/same_bits.py --save before.json        # on the commit before the change
    python tests/same_bits.py --compare before.json     # after it; exit status 1 if bits differ

It runs cases of tests/fuzz.py: every public function, element type, modifier, mask and layout, on
every engine, tile kind and ISA of this machine, with one thread and with more. The file holds a
hash of the results of each case. Make both runs on one machine: the bits depend on the kernels
that its CPU can run, on NumPy and on BLAS.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz
import numpy as np

import qkv_fast

SEED = 13
FUNCTIONS = ("scaled_dot_product_attention", "varlen_attention", "paged_attention")


def digests(cases: int) -> dict[str, str]:
    """Run the cases; return the hash of each one's answers."""
    answers = hashlib.sha256()

    def heard(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            for array in result if isinstance(result, tuple) else (result,):
                answers.update(np.ascontiguousarray(array).tobytes())
            return result

        return call

    for name in FUNCTIONS:
        setattr(qkv_fast, name, heard(getattr(qkv_fast, name)))
    qkv_fast.KVCache.attend = heard(qkv_fast.KVCache.attend)
    choices = fuzz.all_choices()
    found = {}
    for number in range(cases):
        answers = hashlib.sha256()
        fuzz.differences(SEED, number, choices)
        found[str(number)] = answers.hexdigest()
        if number % 200 == 199:
            print(f"{number + 1} of {cases} cases", file=sys.stderr)
    return found


def main() -> int:
    """Run the command line; return an exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--save", type=Path, metavar="FILE")
    what.add_argument("--compare", type=Path, metavar="FILE")
    parser.add_argument("--cases", type=int, default=3000)
    options = parser.parse_args()
    if options.save:
        options.save.write_text(json.dumps(digests(options.cases)), encoding="utf-8")
        return 0
    before = json.loads(options.compare.read_text(encoding="utf-8"))
    now = digests(len(before))
    changed = [number for number in before if before[number] != now[number]]
    for number in changed[:20]:
        print(f"case {number} has other bits: python tests/fuzz.py --seed {SEED} --case {number}")
    print(f"{len(changed)} of {len(before)} cases have other bits")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
