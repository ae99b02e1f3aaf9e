"""Benchmarks of one part alone, as commands: a policy, a rule, a kernel, a format."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from hybrimoe_jax.arguments import workers
from hybrimoe_jax.cli import progress
from hybrimoe_jax.errors import UserError, shown


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


def _cache(args: argparse.Namespace) -> dict[str, Any]:
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
    return {"traces": benchmark.run(args.trace, options, args.jobs, progress)}


def _schedule_arguments(schedule) -> None:
    schedule.add_argument(
        "--instances", type=int, default=1000, metavar="N", help="problems of each kind (default 1000)"
    )
    schedule.add_argument("--seed", type=int, default=0, metavar="N", help="of the problems (default 0)")
    schedule.add_argument(
        "--own", nargs="+", metavar="CLASS", help="rules of yours beside the built-in ones, as package.module:Class"
    )


def _schedule(args: argparse.Namespace) -> dict[str, Any]:
    if args.instances < 1:
        raise UserError("--instances must be at least 1")

    from hybrimoe_jax.bench import schedule

    return schedule.run(args.instances, args.seed, progress, args.own or ())


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


def _kernels(args: argparse.Namespace) -> dict[str, Any]:
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
    return benchmark.run(options, lambda line: print(line, flush=True))


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


def _formats(args: argparse.Namespace) -> dict[str, Any]:
    if args.calibrate and args.no_calibrate:
        raise UserError("--calibrate does not go with --no-calibrate")

    from hybrimoe_jax.bench import formats

    def path(text: str | None) -> Path | None:
        return Path(text) if text else None

    names = tuple(args.formats.split(",")) if args.formats else formats.DEFAULT
    texts = path(args.model), path(args.text), path(args.calibrate)
    return formats.run(formats.Options(names, not args.no_calibrate, *texts), progress)


COMMANDS = {
    "cache": ("cache policies on recorded routing: hits, misses, bound", _cache_arguments, _cache),
    "schedule": ("each rule's gap to the least makespan, and what a decision costs", _schedule_arguments, _schedule),
    "kernels": ("host expert kernels by format and load against peers", _kernel_arguments, _kernels),
    "formats": ("size, logits error and perplexity of each weight format", _format_arguments, _formats),
}
"""By name: help, what adds the flags, and what carries it out and returns the record."""
