"""release_scratch: gives back the memory that calls work in."""

from __future__ import annotations

from ._loader import loaded_native


def release_scratch() -> None:
    """Give back the memory that calls work in and that is kept for the next ones.

    The native engine keeps the scratch of calls, at most 32 MiB of all threads' calls together.
    This frees it, but not that of calls which are running. On Linux with glibc, free memory of the
    whole process then goes back to the system. The next call takes new scratch. The Python engine
    keeps none.

    Examples
    --------
    >>> import qkv_fast
    >>> qkv_fast.release_scratch()
    """
    native = loaded_native()
    if native is not None:
        native.release_scratch()
