"""How many threads a call may use: an argument, a context, a setting, or what the machine gives."""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterator

from ._problem.arguments import integer

_process_wide: int | None = None
_local: contextvars.ContextVar[int | None] = contextvars.ContextVar("threads", default=None)
_default: tuple[int, str] | None = None


def checked(num_threads: object) -> int:
    """Return `num_threads` as an int of at least 1, or raise."""
    return min(integer("num_threads", num_threads, what="an int of at least 1"), 1 << 16)


def set_num_threads(num_threads: int | None) -> None:
    """Set the number of threads of later calls, in the whole process.

    Parameters
    ----------
    num_threads : int or None
        At least 1; calls use no more than there are CPUs for. None returns to the default:
        ``OMP_NUM_THREADS``, else the CPUs that the process may use by its affinity and its
        cgroup's quota.

    Examples
    --------
    >>> import qkv_fast
    >>> qkv_fast.set_num_threads(2)
    >>> qkv_fast.get_num_threads()
    2
    >>> qkv_fast.set_num_threads(None)
    """
    global _process_wide
    _process_wide = None if num_threads is None else checked(num_threads)


def get_num_threads() -> int:
    """Return the number of threads that a call in this context may use.

    Returns
    -------
    int
        From `threads`, else `set_num_threads`, else the default.

    Examples
    --------
    >>> import qkv_fast
    >>> qkv_fast.get_num_threads() >= 1
    True
    """
    return _local.get() or _process_wide or default()[0]


@contextlib.contextmanager
def threads(num_threads: int) -> Iterator[None]:
    """Limit the threads of calls within a ``with`` block, in this Python thread or task alone.

    Parameters
    ----------
    num_threads : int
        At least 1.

    Examples
    --------
    >>> import qkv_fast
    >>> with qkv_fast.threads(1):
    ...     qkv_fast.get_num_threads()
    1
    """
    token = _local.set(checked(num_threads))
    try:
        yield
    finally:
        _local.reset(token)


def source() -> str:
    """Return where the number of `get_num_threads` comes from."""
    if _local.get():
        return "qkv_fast.threads"
    return "qkv_fast.set_num_threads" if _process_wide else default()[1]


def default() -> tuple[int, str]:
    """Return the number of threads of a call that asks for none, and where it comes from."""
    global _default
    if _default is None:
        _default = _find_default()
    return _default


def _find_default() -> tuple[int, str]:
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if first.isdecimal() and int(first) >= 1:
        return int(first), "OMP_NUM_THREADS"
    count, what = cpus(), "CPU affinity" if hasattr(os, "sched_getaffinity") else "CPUs"
    quota = cgroup_quota()
    if quota is not None and quota < count:
        return max(1, int(quota)), "cgroup CPU quota"
    return count, what


def cpus() -> int:
    """Return the number of CPUs that the process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def cgroup_quota(
    mount: str = "/sys/fs/cgroup", membership: str = "/proc/self/cgroup"
) -> float | None:
    """Return how many CPUs the cgroups of the process grant time of; None if unlimited."""
    try:
        lines = _read(membership).splitlines()
    except OSError:
        return None
    quotas: list[float] = []
    for line in lines:
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0":  # version 2: one tree, "quota period" or "max period"
            root, names = mount, ["cpu.max"]
        elif "cpu" in controllers.split(","):
            root, names = f"{mount}/cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        parts = path.split("/")
        for depth in range(len(parts), 0, -1):
            folder = "/".join([root, *parts[1:depth]])
            with contextlib.suppress(OSError, ValueError):
                fields = " ".join(_read(f"{folder}/{name}") for name in names).split()
                quota, period = float(fields[0]), float(fields[1])
                if quota > 0 and period > 0:
                    quotas.append(quota / period)
    return min(quotas, default=None)


def _read(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()
