"""`python -m hybrimoe_jax.bench engine|e2e|paced|llamacpp|cache|schedule|kernels|formats|start`: measured comparisons.

A table for people, then one JSON line for programs.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

from hybrimoe_jax.arguments import workers
from hybrimoe_jax.cli import Parser, first_paragraph, progress, run
from hybrimoe_jax.encoding import show
from hybrimoe_jax.errors import UserError, shown
from hybrimoe_jax.files import check_folder_to_be
from hybrimoe_jax.records import stamped


def main(argv: list[str] | None = None) -> int:
    top = Parser(prog="python -m hybrimoe_jax.bench", description=first_paragraph(__doc__))
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
    _e2e_arguments(commands.add_parser("e2e", help="whole runs of our systems beside PyTorch's and others, in turns"))
    _llamacpp_arguments(
        commands.add_parser("llamacpp", help="the engine against llama.cpp at the same bits a weight, in turns")
    )
    _paced_arguments(commands.add_parser("paced", help="systems in real time on paced devices, and what is computed"))
    _cache_arguments(commands.add_parser("cache", help="cache policies on recorded routing: hits, misses, bound"))
    schedule = commands.add_parser("schedule", help="each rule's gap to the least makespan, and what a decision costs")
    schedule.add_argument(
        "--instances", type=int, default=1000, metavar="N", help="problems of each kind (default 1000)"
    )
    schedule.add_argument("--seed", type=int, default=0, metavar="N", help="of the problems (default 0)")
    schedule.add_argument(
        "--own", nargs="+", metavar="CLASS", help="rules of yours beside the built-in ones, as package.module:Class"
    )
    _kernel_arguments(commands.add_parser("kernels", help="host expert kernels by format and load against peers"))
    _format_arguments(commands.add_parser("formats", help="size, logits error and perplexity of each weight format"))
    start = commands.add_parser("start", help="seconds of a process's start by part, with and without what is kept")
    start.add_argument("--model", metavar="DIR", help="folder of a converted checkpoint (default: the bundled model)")
    start.add_argument("--rounds", type=int, default=5, metavar="N", help="processes of each kind (default 5)")
    args = top.parse_args(argv)
    run_one = {
        "engine": _engine,
        "e2e": _e2e,
        "llamacpp": _llamacpp,
        "cache": _cache,
        "schedule": _schedule,
        "kernels": _kernels,
        "formats": _formats,
        "start": _start,
        "paced": _paced,
    }
    return run_one[args.command](args)


def _schedule(args: argparse.Namespace) -> int:
    if args.instances < 1:
        raise UserError("--instances must be at least 1")

    from hybrimoe_jax.bench import schedule

    _print("schedule", schedule.run(args.instances, args.seed, progress, args.own or ()))
    return 0


def _start(args: argparse.Namespace) -> int:
    if args.rounds < 1:
        raise UserError("--rounds must be at least 1")

    from hybrimoe_jax.bench import start

    record = start.run(args.model, args.rounds, _note)
    _note("")
    print(start.table(record) + "\n")
    _print("start", record)
    return 0


def _engine(args: argparse.Namespace) -> int:
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
    _print("engine", record)
    return 0


def _e2e_arguments(e2e) -> None:
    from hybrimoe_jax.bench.e2e.grid import Options

    usual = Options()
    for name in ("models", "formats", "ratios", "prompts", "systems", "peers"):
        value = ",".join(map(str, getattr(usual, name)))
        e2e.add_argument(f"--{name}", metavar=f"{name[0].upper()},..", help=f"default {value}")
    e2e.add_argument("--threads", type=int, default=usual.threads, metavar="N", help="of every contender (default 2)")
    e2e.add_argument("--rounds", type=int, metavar="N", help=f"measured rounds (default {usual.rounds})")
    e2e.add_argument("--new", type=int, metavar="N", help=f"tokens decoded a run (default {usual.new})")
    e2e.add_argument("--device", metavar="D", help='"paced:PROFILE[:SLOWDOWN]": ours and torch\'s on a paced device')
    e2e.add_argument("--quick", action="store_true", help="a small part of it, and a paced one, in under 8 minutes")
    e2e.add_argument("--workdir", metavar="DIR", help="keep the models here for the next run")


def _e2e(args: argparse.Namespace) -> int:
    from hybrimoe_jax.bench.e2e import command, table

    workers("--threads", args.threads)
    parts = command.parts_of(vars(args))
    record = command.run(parts, Path(args.workdir) if args.workdir else None, _note)
    _note("")
    print(table.text(record) + "\n")
    _print("e2e", record)
    return 0


def _check_models(args: argparse.Namespace) -> None:
    """What both benchmarks of models have; UserError before models are written or read."""
    for name in ("threads", "rounds", "new"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1")
    if not 0 <= args.cache_ratio <= 1:
        raise UserError(f"--cache-ratio {args.cache_ratio} is outside 0..1")
    if args.workdir is not None:
        check_folder_to_be(args.workdir, "--workdir")


def _print(name: str, record: dict) -> None:
    """The line for programs."""
    print(json.dumps(stamped(f"bench {name}", record)))


def _note(text: str) -> None:
    """What is going on, for who watches a terminal."""
    if sys.stderr.isatty():
        show(f"\r\x1b[K{text}")


def _llamacpp_arguments(peer) -> None:
    peer.add_argument("--models", default="mid,deepseek-v2-lite", metavar="M,..", help="default both")
    peer.add_argument("--formats", metavar="F,..", help="f32, int8-g32-a8, int4-g32-a8; default: what fits the model")
    peer.add_argument("--threads", type=int, default=2, metavar="N", help="of either (default 2)")
    peer.add_argument("--cache-ratio", type=float, default=0.25, metavar="R")
    peer.add_argument("--rounds", type=int, default=5, metavar="N", help="measured rounds (default 5)")
    peer.add_argument("--new", type=int, default=32, metavar="N", help="tokens per decode run (default 32)")
    peer.add_argument("--workdir", metavar="DIR", help="keep the models (21 GB) here for the next run")


def _llamacpp(args: argparse.Namespace) -> int:
    from hybrimoe_jax.bench import llamacpp as benchmark

    models, formats = args.models.split(","), tuple(args.formats.split(",")) if args.formats else None
    for option, names, known in (("models", models, benchmark.MODELS), ("formats", formats or (), benchmark.TYPES)):
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"--{option} {shown(unknown[0])} is not known (known: {', '.join(known)})")
    _check_models(args)
    workers("--threads", args.threads)
    options = benchmark.Options(formats, args.threads, args.rounds, args.new, args.cache_ratio)
    _print("llamacpp", benchmark.run(models, options, Path(args.workdir) if args.workdir else None, _note))
    return 0


def _paced_arguments(paced) -> None:
    from hybrimoe_jax.bench.paced import Options

    usual = Options()
    paced.add_argument("--machines", default=",".join(usual.machines), metavar="P:S,..", help="default: three of them")
    paced.add_argument("--systems", default=",".join(usual.systems), metavar="S,..", help="default: seven of them")
    paced.add_argument("--rounds", type=int, default=usual.rounds, metavar="N", help=f"default {usual.rounds}")
    paced.add_argument("--new", type=int, default=usual.new, metavar="N", help=f"tokens a run (default {usual.new})")


def _paced(args: argparse.Namespace) -> int:
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
    _print("paced", record)
    return 0


def _cache_arguments(cache) -> None:
    cache.add_argument("--trace", required=True, nargs="+", metavar="FILE", help="traces of any layout `trace` reads")
    cache.add_argument("--ratios", default="0.125,0.25,0.5,0.75", metavar="R,..", help="slots over experts of a layer")
    cache.add_argument(
        "--policies",
        nargs="+",
        metavar="NAME",
        help="default: all; also with parameters (mrs:alpha=0.3), belady, or a class of yours "
        "(package.module:Class:param=1)",
    )
    cache.add_argument("--sequences", default="all", choices=("all", "even", "odd"), help="every second one only")
    cache.add_argument("--layers", type=int, metavar="N", help="the first N layers only")
    cache.add_argument("--pooled", action="store_true", help="all layers share their slots")
    cache.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (default 1)")


def _cache(args: argparse.Namespace) -> int:
    from hybrimoe_jax.bench import cache as benchmark

    for name in ("layers", "jobs"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1")
    workers("--jobs", args.jobs)
    try:
        ratios = tuple(float(part) for part in args.ratios.split(","))
    except ValueError:
        raise UserError(f'--ratios {shown(args.ratios)}: write numbers separated by commas, e.g. "0.25,0.5"') from None
    if not all(0 < ratio <= 1 for ratio in ratios):
        raise UserError(f"--ratios {args.ratios}: a ratio is above 0 and at most 1")
    policies = tuple(args.policies or benchmark.DEFAULT)
    options = benchmark.Options(ratios, policies, args.sequences, args.layers, args.pooled)
    _print("cache", {"traces": benchmark.run(args.trace, options, args.jobs, progress)})
    return 0


def _kernel_arguments(kernels) -> None:
    kernels.add_argument(
        "--peers",
        default="",
        metavar="NAME,..",
        help="ggml (pip install llama-cpp-python: compiled on the spot, some 15 minutes), torch, onednn, numpy; "
        "default none",
    )
    kernels.add_argument("--formats", metavar="F,..", help="f32, bf16, or packed ones like int4-g64-a8")
    kernels.add_argument(
        "--shapes", metavar="S,..", help="mixtral, qwen2-57b, deepseek-v2-lite, or DxF; default all three"
    )
    kernels.add_argument("--loads", default="1,2,4,8,32,128", metavar="N,..")
    kernels.add_argument("--threads", default="1,2", metavar="N,..")
    kernels.add_argument(
        "--seconds", type=float, default=1.5, metavar="S", help="for each shape, load and thread count (default 1.5)"
    )


def _kernels(args: argparse.Namespace) -> int:
    from hybrimoe_jax.bench import kernels as benchmark
    from hybrimoe_jax.bench.kernel_contenders import PEERS
    from hybrimoe_jax.formats.layout import check_format

    peers = tuple(filter(None, args.peers.split(",")))
    for peer in peers:
        if peer not in PEERS:
            raise UserError(f"--peers {shown(peer)} is not known (known: {', '.join(PEERS)})")
    formats = tuple(args.formats.split(",")) if args.formats else benchmark.FORMATS
    for format in formats:
        check_format(format)
    shapes = benchmark.parse_shapes(args.shapes) if args.shapes else benchmark.SHAPES
    loads, threads = _numbers("--loads", args.loads), _numbers("--threads", args.threads)
    for count in threads:
        workers("--threads", count)
    if not 0 < args.seconds < math.inf:
        raise UserError(f"--seconds {args.seconds} must be a number above 0")
    options = benchmark.Options(peers, formats, shapes, loads, threads, args.seconds)
    _print("kernels", benchmark.run(options, lambda line: print(line, flush=True)))
    return 0


def _numbers(option: str, text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(f"{option} {shown(text)}: write numbers of at least 1 separated by commas")
    return tuple(int(part) for part in parts)


def _format_arguments(formats) -> None:
    formats.add_argument("--formats", metavar="F,..", help="default: f32, bf16 and the quantised ones in common use")
    formats.add_argument("--model", metavar="DIR", help="a converted float checkpoint (default: the bundled model)")
    formats.add_argument("--text", metavar="FILE", help="text to read (default: scenes of the held-out plays)")
    formats.add_argument(
        "--calibrate", metavar="FILE", help="text to calibrate 4-bit formats by (default: scenes of the training text)"
    )
    formats.add_argument("--no-calibrate", action="store_true", help="round to nearest only")


def _formats(args: argparse.Namespace) -> int:
    if args.calibrate and args.no_calibrate:
        raise UserError("--calibrate does not go with --no-calibrate")

    from hybrimoe_jax.bench import formats

    def path(text: str | None) -> Path | None:
        return Path(text) if text else None

    names = tuple(args.formats.split(",")) if args.formats else formats.DEFAULT
    texts = path(args.model), path(args.text), path(args.calibrate)
    _print("formats", formats.run(formats.Options(names, not args.no_calibrate, *texts), progress))
    return 0


def _need_transformers() -> None:
    from importlib.util import find_spec

    if find_spec("transformers") is None or find_spec("torch") is None:
        raise UserError(
            "the baseline needs torch and transformers: install the extra [baseline], or pass --no-baseline"
        )


if __name__ == "__main__":
    run(main)
