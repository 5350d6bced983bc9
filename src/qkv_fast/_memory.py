"""How much memory a new array may take."""

from __future__ import annotations

import contextlib


def available_memory(
    meminfo: str = "/proc/meminfo", limit: str = "/sys/fs/cgroup/memory.max"
) -> int | None:
    """Return the bytes that can be had without swapping; None where the system does not say.

    They are no more than the limit of the process' cgroup, whose other contents do not count: most
    of these are caches that the kernel drops.
    """
    found = []
    with contextlib.suppress(OSError, ValueError), open(meminfo, encoding="utf-8") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError), open(limit, encoding="utf-8") as file:
        found.append(int(file.read()))  # a ValueError for "max"
    return min(found, default=None)
