"""``python -m qkv_fast``: ``info`` for a bug report, ``bench`` to see how fast it is here.

Without a command it prints its help.
"""

from __future__ import annotations

import argparse
import sys

from ._config import show_config
from .bench import compare


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return an exit status. Without a command, print the help."""
    parser = argparse.ArgumentParser(prog="python -m qkv_fast")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("info", help="print the configuration")
    bench = commands.add_parser("bench", help="measure against other libraries, if installed")
    compare.add_options(bench)
    options = parser.parse_args(arguments)
    if options.command == "bench":
        return compare.run(options)
    if options.command == "info":
        show_config()
    else:
        parser.print_help()
    return 0


if __name__ == "__main__":
    sys.exit(main())
