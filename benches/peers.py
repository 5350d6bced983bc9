"""Every library on the same tensors, each in a process of its own, taking turns.

    pip install ".[bench]" && pip install torch==2.13.0     # the CPU build
    python benches/peers.py [--shapes bert-128 ...] [--peers torch ...] [--rounds 7] [--json FILE]

The same as ``python -m qkv_fast bench``; how it is done is in src/qkv_fast/bench/.
"""

from __future__ import annotations

import sys

from qkv_fast.bench.compare import main

if __name__ == "__main__":
    sys.exit(main())
