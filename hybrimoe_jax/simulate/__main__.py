"""`python -m hybrimoe_jax.simulate`: systems on a recorded trace and a machine's profile, under a virtual clock.

A table for people, one JSON record a run with `--out`. All times are computed, none is measured.
"""

from __future__ import annotations

import argparse
import json

from hybrimoe_jax.arguments import workers
from hybrimoe_jax.cli import Parser, check_results, first_paragraph, lookahead, progress, run
from hybrimoe_jax.decide.cache import policy_rule
from hybrimoe_jax.decide.cache_state import load_state
from hybrimoe_jax.decide.prefetch.predictors import predictor_rule
from hybrimoe_jax.decide.systems import SCOPES, check_lookahead
from hybrimoe_jax.encoding import say
from hybrimoe_jax.errors import UserError, printable, shown
from hybrimoe_jax.figures import check_matplotlib
from hybrimoe_jax.files import check_folder_to_be, replacing
from hybrimoe_jax.machine.profile import PROFILES
from hybrimoe_jax.records import stamped
from hybrimoe_jax.simulate import grid, plots
from hybrimoe_jax.simulate.cases import LOADED, cases_of, parts_of, prepared, trace_names
from hybrimoe_jax.simulate.recorded import replay_run
from hybrimoe_jax.simulate.records import table
from hybrimoe_jax.trace.importers import open_trace

TIMELINE_STEPS = 4
"""Steps of every system that `--timeline` shows."""

REPEATED = ("trace", "as_recorded", "load_cache_state", "save_cache_state", "out")
"""What goes with `--as-recorded`."""


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="python -m hybrimoe_jax.simulate", description=first_paragraph(__doc__))
    top.add_argument(
        "--trace", nargs="+", required=True, metavar="T", help="routing traces, of any layout `trace info` reads"
    )
    top.add_argument(
        "--profile", default="a6000-engineered", metavar="P", help=f"a machine ({', '.join(PROFILES)}) or a file"
    )
    top.add_argument("--systems", default="hybrimoe,ktransformers,adapmoe,llamacpp,on-demand", metavar="S,...")
    top.add_argument("--cache-ratios", default="0.25,0.5,0.75", metavar="R,...")
    top.add_argument("--format", default="int4", metavar="F", help="weight format of the experts (default int4)")
    top.add_argument("--prompt-lengths", default="", metavar="N,...", help="also prompts of N tokens, in one step each")
    top.add_argument("--prompts", type=int, default=8, metavar="N", help="prompts of each length and half (default 8)")
    top.add_argument("--starts", default="warm,cold", metavar="S,...", help="warm, cold or both (default)")
    top.add_argument("--steps", type=int, metavar="N", help="at most N tokens of each half of the sequences")
    top.add_argument(
        "--sequences",
        type=int,
        metavar="N",
        help="run N whole sequences, evenly spread, with frequencies of all others (default: both halves)",
    )
    top.add_argument("--shape", metavar="NAME", help="the model's sizes, where the trace does not tell")
    top.add_argument("--as-recorded", action="store_true", help="repeat the live runs that the traces were taken from")
    top.add_argument(
        "--load-cache-state", metavar="FILE", help="begin with what --save-cache-state wrote; one run only"
    )
    top.add_argument(
        "--save-cache-state",
        metavar="FILE",
        help="who is resident and what the cache has learned at the end; one run only",
    )
    top.add_argument("--out", metavar="FILE", help="one JSON record a run (.jsonl)")
    top.add_argument("--plots", metavar="DIR", help="pictures; needs matplotlib")
    top.add_argument(
        "--policies",
        nargs="+",
        metavar="NAME",
        help=f"cache policies that --plots compares, with Belady's (default {', '.join(plots.POLICIES)} and --cache)",
    )
    top.add_argument(
        "--predictors",
        nargs="+",
        metavar="NAME",
        help=f"predictors that --plots compares (default {', '.join(plots.PREDICTED)} and --predictor)",
    )
    top.add_argument(
        "--timeline", metavar="FILE", help=f"the first {TIMELINE_STEPS} steps of every system, for Perfetto"
    )
    top.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once (default 1)")
    parts = top.add_argument_group("parts, replaced in every system")
    own = "a name, with parameters if wanted (mrs:alpha=0.3), or a class of yours as package.module:Class:param=1"
    parts.add_argument("--cache", metavar="NAME", help=f"cache policy: {own}")
    parts.add_argument("--cache-scope", dest="scope", choices=SCOPES, help="pooled: all layers share their slots")
    parts.add_argument("--scheduler", metavar="NAME", help="likewise")
    parts.add_argument("--prefetch", metavar="MODE")
    parts.add_argument("--lookahead", type=lookahead, metavar="N", help='layers, or "adaptive"')
    parts.add_argument(
        "--stream-prefill",
        action=argparse.BooleanOptionalAction,
        help="prompts run on the device, whole layers streamed through two buffers (FreeToken's way)",
    )
    parts.add_argument("--predictor", metavar="NAME", help="likewise; perfect, too, which knows what is to come")
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    check_flags(args)
    if args.as_recorded:
        return repeat(args.trace, args.load_cache_state, args.save_cache_state, args.out)
    cases = cases_of(
        args.trace,
        args.profile,
        _words(args.systems, "--systems"),
        [_number(word, "--cache-ratios", 0, 1) for word in _words(args.cache_ratios, "--cache-ratios")],
        fmt=args.format,
        starts=[LOADED] if args.load_cache_state else _words(args.starts, "--starts"),
        lengths=[_whole(word, "--prompt-lengths") for word in args.prompt_lengths.split(",") if word.strip()],
        prompts=args.prompts,
        parts=parts_of(vars(args)),
        shape=args.shape,
        steps=args.steps,
        sequences=args.sequences,
        load_state=args.load_cache_state,
        save_state=args.save_cache_state,
    )
    if len(cases) > 1 and cases[0].keeps_state:
        raise UserError(
            f"a cache state is of one run, and these flags ask for {len(cases)}: give one --trace, --systems, "
            "--cache-ratios and --starts"
        )
    if args.plots:
        check_matplotlib("--plots")
    for case in {(c.trace, c.system, c.start): c for c in cases}.values():
        prepared(case)  # what cannot be is said before anything runs
    records = list(progress(grid.run_cases(cases, args.jobs), len(cases), "simulating"))
    if args.out:
        with replacing(args.out) as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    print(printable(table(records)), flush=True)
    if args.timeline:
        grid.timeline_of(cases, TIMELINE_STEPS).write(args.timeline)
    if args.plots:
        written = plots.write_all(records, cases, args.plots, args.policies or (), args.predictors or ())
        say(f"{len(written)} pictures in {args.plots}")
    return 0


def check_flags(args: argparse.Namespace) -> None:
    """UserError for the first flag that cannot be."""
    check_results(args, ("out", "timeline", "save_cache_state"), args.trace)
    if args.as_recorded:
        for action in parser()._actions:
            name, flag = action.dest, action.option_strings[-1]
            if name not in REPEATED and name != "help" and getattr(args, name) != action.default:
                raise UserError(
                    f"{flag} is not for --as-recorded, which repeats the run that the trace tells of: leave one out"
                )
    if args.as_recorded and (args.load_cache_state or args.save_cache_state) and len(args.trace) > 1:
        raise UserError("a cache state is of one run: give one --trace")
    if args.plots is not None:
        check_folder_to_be(args.plots, "--plots")
    for flag, resolve in (("policies", policy_rule), ("predictors", predictor_rule)):
        if getattr(args, flag):
            if not args.plots:
                raise UserError(f"--{flag} is for --plots")
            setattr(args, flag, list(map(resolve, getattr(args, flag))))
    if args.lookahead is not None:
        check_lookahead(args.lookahead)
    for name in ("prompts", "jobs", "steps", "sequences"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1")
    workers("--jobs", args.jobs)


def repeat(paths: list[str], load: str | None = None, save: str | None = None, out: str | None = None) -> int:
    """Replays the very runs that traces were recorded from: a JSON line each, in the file `out`, too."""
    lines: list[str] = []
    state = None if load is None else load_state(load)
    for path, name in trace_names(paths).items():
        trace = open_trace(path)
        planner, result = replay_run(trace, path, state, save)
        c = result.counters
        times = {phase: sum(s.seconds for s in result.steps if s.phase == phase) for phase in ("prefill", "decode")}
        virtual = trace.about.get("clock") == "virtual"
        record = {
            "trace": name,
            "system": planner.system.name,
            "clock": "virtual" if virtual else "none: counts only, a replay measures nothing",
            "hits": c.hits,
            "misses": c.misses,
            "cpu_experts": c.cpu,
            "device_experts": c.device,
            "demand_fetches": c.fetched,
            "layer_streamed": c.layer_streamed,
            "prefetch": {name: getattr(c, f"prefetch_{name}") for name in ("issued", "useful", "late", "wasted")},
            "prefill_s": times["prefill"] if virtual else None,
            "decode_s": times["decode"] if virtual else None,
        }
        lines.append(json.dumps(stamped("repeated run", record)))
        print(lines[-1], flush=True)
    if out is not None:
        with replacing(out) as file:
            file.writelines(line + "\n" for line in lines)
    return 0


def _words(text: str, flag: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise UserError(f"{flag} is empty")
    return words


def _whole(word: str, flag: str) -> int:
    if not word.strip().isdecimal() or len(word) > 9 or int(word) < 1:
        raise UserError(f"{flag}: {shown(word.strip())} is not a number of tokens, at least 1")
    return int(word)


def _number(word: str, flag: str, low: float, high: float = float("inf")) -> float:
    try:
        value = float(word)
    except ValueError:
        raise UserError(f"{flag}: {shown(word)} is not a number") from None
    if not low <= value <= high:
        raise UserError(f"{flag}: {word} is outside {low:g}..{high:g}")
    return value


if __name__ == "__main__":
    run(main)
