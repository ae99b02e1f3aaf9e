"""Benchmarks that run whole engines, as commands."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from hybrimoe_jax.arguments import workers
from hybrimoe_jax.encoding import show
from hybrimoe_jax.errors import UserError, shown
from hybrimoe_jax.files import check_folder_to_be


def _engine_arguments(engine) -> None:
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


def _engine(args: argparse.Namespace) -> dict[str, Any]:
    from hybrimoe_jax.bench import engine as benchmark

    _check_models(args)
    for model in args.models.split(","):
        if model not in ("bundled", "mid") and not Path(model).is_dir():
            raise UserError(f"--models {shown(model)}: neither bundled, mid nor a folder")
    if not args.no_baseline:
        _need_transformers()
    workers("--threads", args.threads)
    options = benchmark.Options(args.threads, args.cache_ratio, args.rounds, args.new, not args.no_baseline)
    workdir = Path(args.workdir) if args.workdir else None
    record = benchmark.run(args.models.split(","), options, workdir, _note)
    _note("")
    return record


def _need_transformers() -> None:
    from importlib.util import find_spec

    if find_spec("transformers") is None or find_spec("torch") is None:
        raise UserError(
            "the baseline needs torch and transformers: install the extra [baseline], or pass --no-baseline"
        )


def _e2e_arguments(e2e) -> None:
    from hybrimoe_jax.bench.e2e.grid import OWN, PARTS, Options

    usual = Options()
    for name in ("models", "formats", "ratios", "prompts", "systems", "peers"):
        value = ",".join(map(str, getattr(usual, name)))
        e2e.add_argument(f"--{name}", metavar=f"{name[0].upper()},..", help=f"default {value}")
    e2e.add_argument("--threads", type=int, default=usual.threads, metavar="N", help="of every contender (default 2)")
    e2e.add_argument("--rounds", type=int, metavar="N", help=f"measured rounds (default {usual.rounds})")
    e2e.add_argument("--new", type=int, metavar="N", help=f"tokens decoded a run (default {usual.new})")
    e2e.add_argument("--device", metavar="D", help='"paced:PROFILE[:SLOWDOWN]": ours and torch\'s on a paced device')
    own = "a name, with parameters if wanted, or a class of yours as package.module:Class:param=1"
    for part in PARTS:
        e2e.add_argument(
            f"--{part}", metavar="NAME", help=f'"{OWN}": hybrimoe with this {part}, in both engines: {own}'
        )
        own = "likewise"
    e2e.add_argument("--quick", action="store_true", help="a small part of it, and a paced one, in under 10 minutes")
    e2e.add_argument("--workdir", metavar="DIR", help="keep the models here for the next run")


def _e2e(args: argparse.Namespace) -> dict[str, Any]:
    from hybrimoe_jax.bench.e2e import command, table

    workers("--threads", args.threads)
    parts = command.parts_of(vars(args))
    record = command.run(parts, Path(args.workdir) if args.workdir else None, _note)
    _note("")
    print(table.text(record) + "\n")
    return record


def _paced_arguments(paced) -> None:
    from hybrimoe_jax.bench.paced import Options

    usual = Options()
    paced.add_argument("--machines", default=",".join(usual.machines), metavar="P:S,..", help="default: three of them")
    paced.add_argument("--systems", default=",".join(usual.systems), metavar="S,..", help="default: seven of them")
    paced.add_argument("--rounds", type=int, default=usual.rounds, metavar="N", help=f"default {usual.rounds}")
    paced.add_argument("--new", type=int, default=usual.new, metavar="N", help=f"tokens a run (default {usual.new})")


def _paced(args: argparse.Namespace) -> dict[str, Any]:
    from hybrimoe_jax.bench import paced
    from hybrimoe_jax.decide.systems import get_system
    from hybrimoe_jax.machine.paced import PREFIX, check_device

    for name, least in (("rounds", 1), ("new", 3)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} must be at least {least}")
    machines, systems = tuple(args.machines.split(",")), tuple(args.systems.split(","))
    for machine in machines:
        check_device(PREFIX + machine)
    for system in systems:
        get_system(system)
    record = paced.run(paced.Options(machines, systems, rounds=args.rounds, new=args.new), _note)
    _note("")
    print(paced.tables(record) + "\n")
    return record


def _llamacpp_arguments(peer) -> None:
    peer.add_argument("--models", default="mid,deepseek-v2-lite", metavar="M,..", help="default both")
    peer.add_argument("--formats", metavar="F,..", help="f32, int8-g32-a8, int4-g32-a8; default: what fits the model")
    peer.add_argument("--threads", type=int, default=2, metavar="N", help="of either (default 2)")
    peer.add_argument("--cache-ratio", type=float, default=0.25, metavar="R")
    peer.add_argument("--rounds", type=int, default=5, metavar="N", help="measured rounds (default 5)")
    peer.add_argument("--new", type=int, default=32, metavar="N", help="tokens per decode run (default 32)")
    peer.add_argument("--workdir", metavar="DIR", help="keep the models (21 GB) here for the next run")


def _llamacpp(args: argparse.Namespace) -> dict[str, Any]:
    from hybrimoe_jax.bench import llamacpp as benchmark

    models, formats = args.models.split(","), tuple(args.formats.split(",")) if args.formats else None
    for option, names, known in (("models", models, benchmark.MODELS), ("formats", formats or (), benchmark.TYPES)):
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"--{option} {shown(unknown[0])} is not known (known: {', '.join(known)})")
    _check_models(args)
    workers("--threads", args.threads)
    options = benchmark.Options(formats, args.threads, args.rounds, args.new, args.cache_ratio)
    return benchmark.run(models, options, Path(args.workdir) if args.workdir else None, _note)


def _start_arguments(start) -> None:
    start.add_argument("--model", metavar="DIR", help="folder of a converted checkpoint (default: the bundled model)")
    start.add_argument("--rounds", type=int, default=5, metavar="N", help="processes of each kind (default 5)")


def _start(args: argparse.Namespace) -> dict[str, Any]:
    if args.rounds < 1:
        raise UserError("--rounds must be at least 1")

    from hybrimoe_jax.bench import start

    record = start.run(args.model, args.rounds, _note)
    _note("")
    print(start.table(record) + "\n")
    return record


def _check_models(args: argparse.Namespace) -> None:
    """What both benchmarks of models have; UserError before models are written or read."""
    for name in ("threads", "rounds", "new"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1")
    if not 0 <= args.cache_ratio <= 1:
        raise UserError(f"--cache-ratio {args.cache_ratio} is outside 0..1")
    if args.workdir is not None:
        check_folder_to_be(args.workdir, "--workdir")


def _note(text: str) -> None:
    """What is going on, for who watches a terminal."""
    if sys.stderr.isatty():
        show(f"\r\x1b[K{text}")


COMMANDS = {
    "engine": ("the engine against transformers on the same weights, in turns", _engine_arguments, _engine),
    "e2e": ("whole runs of our systems beside PyTorch's and others, in turns", _e2e_arguments, _e2e),
    "paced": ("systems in real time on paced devices, and what is computed", _paced_arguments, _paced),
    "llamacpp": ("the engine against llama.cpp at the same bits a weight, in turns", _llamacpp_arguments, _llamacpp),
    "start": ("seconds of a process's start by part, with and without what is kept", _start_arguments, _start),
}
"""By name: help, what adds the flags, and what carries it out and returns the record."""
