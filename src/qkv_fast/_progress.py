"""Telling a caller's function how much of a call is done."""

from __future__ import annotations

import sys
import time

from ._options import Progress

SECONDS = 0.1  # from one call of the function to the next, as in the native engine


class Count:
    """Counts the parts of a call that are done, for a function that may be None."""

    def __init__(self, function: Progress | None, total: int) -> None:
        self._function, self._total, self._done = function, total, 0
        self._next_call = time.perf_counter() + SECONDS

    def add(self, parts: int) -> None:
        """Count parts that are done now; tell the function of the last one, and now and then."""
        self._done += parts
        if self._function is None:
            return
        if self._done >= self._total or time.perf_counter() >= self._next_call:
            self._function(self._done, self._total)
            self._next_call = time.perf_counter() + SECONDS


def terminal_line(label: str) -> Progress | None:
    """Return a function that shows a share on the last line of a terminal.

    It returns None where standard error is no terminal. The line is wiped out in the end.
    """
    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int) -> None:
        text = "" if done == total else f"{label}: {done / total:.0%}"
        print(f"\r{text:<70}\r", end="", file=sys.stderr, flush=True)

    return show
