"""Attention over keys that Dask holds in chunks, and a cache of keys on the workers of a cluster.

    python examples/dask_attention.py [--workers 2] [--keys 32768]

It starts a cluster of processes on this machine. The inputs are random float32 numbers.
"""

from __future__ import annotations

import argparse

import dask.array as da
import numpy as np
from distributed import Client, LocalCluster

import qkv_fast
from qkv_fast.integrations.dask import DistributedKVCache, scaled_dot_product_attention


def main(arguments: list[str] | None = None) -> None:
    """Compute both ways and print the tasks and the differences from the op."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--keys", type=int, default=32768)
    options = parser.parse_args(arguments)
    rng = np.random.default_rng(0)
    key, value = rng.standard_normal((2, 4, options.keys, 64), np.float32)  # 4 heads
    query = rng.standard_normal((4, 256, 64), np.float32)
    offset = options.keys - 256  # the queries are the last tokens
    chunk = options.keys // 8

    with (
        LocalCluster(n_workers=options.workers, threads_per_worker=1, dashboard_address=None) as c,
        Client(c) as client,
    ):
        chunks = (4, chunk, 64)
        k, v = (da.from_array(x, chunks=chunks) for x in (key, value))
        lazy = scaled_dot_product_attention(query, k, v, is_causal=True, query_offset=offset)
        parts = sum(name[0].startswith("attention-part") for name in lazy.dask.to_dict())
        print(f"{parts} parts")
        expected = qkv_fast.scaled_dot_product_attention(
            query, key, value, is_causal=True, query_offset=offset
        )
        print(f"largest difference: {np.abs(lazy.compute() - expected).max():.1e}")

        with DistributedKVCache(client, 1, 4, chunk_size=chunk, head_dim=64) as cache:
            cache.append(key[np.newaxis], value[np.newaxis])
            out = cache.attend(query[np.newaxis, :, -1:])
        print(f"decoding a token:   {np.abs(out[0, :, 0] - expected[:, -1]).max():.1e}")


if __name__ == "__main__":
    main()
