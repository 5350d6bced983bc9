"""Functions that tests run in other processes, such as Dask's workers, which import them here."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np

import qkv_fast


def attended(seed: int) -> tuple[int, bytes]:
    """Return the process, and the bits of two calls on numbers drawn from a seed."""
    x = np.random.default_rng(seed).standard_normal((1, 8, 200, 64), np.float32)
    prefill = qkv_fast.scaled_dot_product_attention(x, x, x, is_causal=True, num_threads=2)
    decode = qkv_fast.scaled_dot_product_attention(x[:, :, -1:], x, x, num_threads=2)
    return os.getpid(), prefill.tobytes() + decode.tobytes()


def slowly(array: np.ndarray, seconds: float) -> np.ndarray:
    """Return the array after a while."""
    time.sleep(seconds)
    return array


def received(dask_worker: Any) -> list[tuple[str, int]]:
    """Return the names and bytes of what a worker got from others."""
    from dask.utils import key_split

    return [(key_split(key), size) for entry in dask_worker.transfer_incoming_log
            for key, size in entry["keys"].items()]  # fmt: skip


def peak_memory(reset: bool) -> int:
    """Return the largest memory of this process since it was reset, in bytes."""
    if reset:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["VmHWM"].split()[0]) * 1024
