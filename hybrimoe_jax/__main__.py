"""The console script: `hybrimoe-jax COMMAND ...` runs a command as `python -m` does."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable

from hybrimoe_jax.cli import Parser, run

COMMANDS = {
    "demo": "a text by the bundled model, and three systems beside each other",
    "generate": "text from a prompt",
    "convert": "a checkpoint into the form that is run, or back",
    "calibrate": "what this machine takes, and what that means",
    "simulate": "recorded routing on the machine of a profile",
    "trace": "routing traces: record, import, export, info, overlap, check",
    "bench": "measured comparisons",
    "reproduce": "the paper's experiments",
    "train": "the bundled model, from its texts",
}


def command_main(name: str) -> Callable[[list[str] | None], int | None]:
    """The `main` of a command, whether it is a module or a room of its own."""
    module = importlib.import_module(f"hybrimoe_jax.{name}")
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"hybrimoe_jax.{name}.__main__")
    return module.main


def main(argv: list[str] | None = None) -> int | None:
    listed = "\n".join(f"  {name:10} {what}" for name, what in COMMANDS.items())
    parser = Parser(
        prog="hybrimoe-jax",
        usage="hybrimoe-jax COMMAND ...",
        epilog=f"commands:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below; each has its --help")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv[:1])
    return command_main(args.command)(argv[1:])


def console() -> None:
    """The console script. Rules of one's own in the current folder are found, as by `python -m`."""
    if not sys.flags.safe_path:
        sys.path.insert(0, "")
    run(main)


if __name__ == "__main__":
    console()
