"""``python -m qkv_fast info``: what is installed here, to paste into a bug report."""

from __future__ import annotations

import argparse

from ._config import show_config


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m qkv_fast", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="print the configuration")
    parser.parse_args(arguments)
    show_config()


if __name__ == "__main__":
    main()
