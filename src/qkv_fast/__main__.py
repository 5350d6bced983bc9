"""``python -m qkv_fast``: ``info`` for a bug report, ``bench`` to see how fast it is here.

``view TEXT`` writes a page that shows what the heads of an encoder look at in a text. Without a
command it prints its help.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ._config import show_config
from ._progress import terminal_line
from .bench import compare


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return an exit status. Without a command, print the help."""
    parser = argparse.ArgumentParser(prog="python -m qkv_fast")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("info", help="print the configuration")
    bench = commands.add_parser("bench", help="measure against other libraries, if installed")
    compare.add_options(bench)
    view = commands.add_parser("view", help="write a page of an encoder's attention to a text")
    view.add_argument("text", help="the text, or - for standard input")
    view.add_argument("--out", default="attention.html", metavar="FILE",
                      help="the page (attention.html), or - for standard output")  # fmt: skip
    view.add_argument("--model", metavar="DIR",
                      help="a folder of a BERT model (default: all-MiniLM-L6-v2)")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.command == "bench":
        return compare.run(options)
    if options.command == "view":
        return write_view(options.text, options.out, options.model)
    if options.command == "info":
        show_config()
    else:
        parser.print_help()
    return 0


def write_view(text: str, out: str, model: str | None) -> int:
    """Write the page of `qkv_fast.plot.view` for all heads of an encoder; return an exit status."""
    from .encoder import Encoder, find_minilm
    from .plot import view
    from .plot.inputs import clipped

    if text == "-":
        text = sys.stdin.read()
    try:
        if not text.strip():
            raise ValueError("the text is empty")
        encoder = Encoder.from_folder(find_minilm() if model is None else model)
        ids = encoder.encode(text)
        _, weights = encoder(ids, need_weights=True, progress=terminal_line("encoding"))
        page = view(weights, encoder.tokens(ids), title=clipped(" ".join(text.split()), 60))
        if out == "-":
            sys.stdout.write(page.html)
        else:
            page.save(out)
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(f"qkv_fast view: {error}", file=sys.stderr)
        return 1
    if out != "-":
        layers, heads = weights.shape[:2]
        cut = ", as many as the model takes" if len(ids) == encoder.max_length else ""
        print(f"{len(ids)} tokens{cut}, {layers} layers of {heads} heads: open in a browser")
        print(Path(out).resolve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
