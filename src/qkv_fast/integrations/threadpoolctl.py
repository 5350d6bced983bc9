"""threadpoolctl sees the library's threads and limits them."""

from __future__ import annotations

import functools


@functools.cache
def register() -> None:
    """Make ``threadpoolctl.threadpool_limits`` and ``threadpool_info`` know this library.

    The library does so itself if threadpoolctl has been imported before it; call this where it is
    imported later. A limit is that of `set_num_threads`, for the whole process.
    Needs the native engine: threadpoolctl looks for a shared object.

    Raises
    ------
    ModuleNotFoundError
        threadpoolctl is not installed.

    Notes
    -----
    ::

        qkv_fast.integrations.threadpoolctl.register()
        with threadpoolctl.threadpool_limits(1):
            ...  # calls use one thread
    """
    import threadpoolctl

    import qkv_fast

    class Controller(threadpoolctl.LibController):  # type: ignore[misc]
        """The pool of csrc/runtime/thread_pool.c, linked into one module."""

        user_api = "qkv_fast"
        internal_api = "qkv_fast"
        filename_prefixes = ("parallel.",)
        check_symbols = ("qkv_run_tasks",)

        def get_num_threads(self) -> int:
            """Return how many threads a call may use."""
            return qkv_fast.get_num_threads()

        def set_num_threads(self, num_threads: int) -> None:
            """Set that, for the whole process."""
            qkv_fast.set_num_threads(num_threads)

        def get_version(self) -> str:
            """Return the version of the package."""
            return qkv_fast.__version__

    threadpoolctl.register(Controller)
