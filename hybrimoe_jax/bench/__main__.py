"""`python -m hybrimoe_jax.bench engine|e2e|paced|llamacpp|start|cache|schedule|kernels|formats`: measured comparisons.

A table for people, then one JSON line for programs.
"""

from __future__ import annotations

import json

from hybrimoe_jax.bench import engine_commands, part_commands
from hybrimoe_jax.cli import Parser, first_paragraph, run
from hybrimoe_jax.records import stamped

COMMANDS = {**engine_commands.COMMANDS, **part_commands.COMMANDS}


def main(argv: list[str] | None = None) -> int:
    top = Parser(prog="python -m hybrimoe_jax.bench", description=first_paragraph(__doc__))
    commands = top.add_subparsers(dest="command", required=True)
    for name, (about, add_arguments, _) in COMMANDS.items():
        add_arguments(commands.add_parser(name, help=about))
    args = top.parse_args(argv)
    record = COMMANDS[args.command][-1](args)
    print(json.dumps(stamped(f"bench {args.command}", record)))
    return 0


if __name__ == "__main__":
    run(main)
