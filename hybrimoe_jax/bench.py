"""`python -m hybrimoe_jax.bench engine`: measured comparisons. A table for people, then one JSON line for programs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from hybrimoe_jax.cli import Parser, run
from hybrimoe_jax.errors import UserError


def main(argv: list[str] | None = None) -> int:
    top = Parser(prog="python -m hybrimoe_jax.bench", description=__doc__.splitlines()[0])
    commands = top.add_subparsers(dest="command", required=True)
    engine = commands.add_parser("engine", help="the engine against transformers on the same weights, in turns")
    engine.add_argument(
        "--models",
        default="bundled,mid",
        help='"bundled", "mid" (random, 466 M parameters) or folders, separated by commas',
    )
    engine.add_argument("--threads", type=int, default=2, metavar="N", help="threads of every contender (default 2)")
    engine.add_argument("--cache-ratio", type=float, default=0.25, metavar="R")
    engine.add_argument("--rounds", type=int, default=5, metavar="N", help="measured rounds (default 5)")
    engine.add_argument("--new", type=int, default=32, metavar="N", help="tokens per decode run (default 32)")
    engine.add_argument("--no-baseline", action="store_true", help="leave transformers out")
    engine.add_argument("--workdir", metavar="DIR", help="keep the random model here for the next run")
    args = top.parse_args(argv)
    for name in ("threads", "rounds", "new"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1")

    from hybrimoe_jax.benchmarks import engine as benchmark

    if not args.no_baseline:
        _need_transformers()
    options = benchmark.Options(args.threads, args.cache_ratio, args.rounds, args.new, not args.no_baseline)
    workdir = Path(args.workdir) if args.workdir else None
    note = (
        (lambda text: print(f"\r\x1b[K{text}", end="", file=sys.stderr)) if sys.stderr.isatty() else (lambda text: None)
    )
    record = benchmark.run(args.models.split(","), options, workdir, note)
    note("")
    print(json.dumps(record))
    return 0


def _need_transformers() -> None:
    from importlib.util import find_spec

    if find_spec("transformers") is None or find_spec("torch") is None:
        raise UserError(
            "the baseline needs torch and transformers: install the extra [baseline], or pass --no-baseline"
        )


if __name__ == "__main__":
    run(main)
