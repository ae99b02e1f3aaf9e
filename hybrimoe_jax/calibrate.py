"""`python -m hybrimoe_jax.calibrate`: measures what things take on this machine, and says what that means.

Experts on the CPU and on the device, transfers, attention: each by all that it depends on. The file that `--out` writes
is what `--profile`, `--clock virtual`, `--device paced` and the simulator read.

A table, then one JSON line for programs.
"""

from __future__ import annotations

import argparse
import json
import textwrap
import time

from hybrimoe_jax import cli
from hybrimoe_jax.encoding import say
from hybrimoe_jax.engine.config import KERNELS, EngineConfig
from hybrimoe_jax.machine.calibration import Calibration
from hybrimoe_jax.machine.calibration_text import SCREEN, calibration_text
from hybrimoe_jax.records import stamped

DEFAULT_RATIO = 0.25


def parser() -> cli.Parser:
    top = cli.Parser(prog="python -m hybrimoe_jax.calibrate", description=cli.first_paragraph(__doc__))
    add = top.add_argument
    add("--model", metavar="DIR", help="folder written by hybrimoe_jax.convert (default: the bundled model)")
    add("--out", metavar="FILE", help="write the profile (.json)")
    add("--plot", metavar="FILE", help="draw CPU and device time by experts and by load (.png); needs matplotlib")
    add(
        "--cache-ratio",
        type=float,
        default=DEFAULT_RATIO,
        metavar="R",
        help=f"of what is expected (default {DEFAULT_RATIO})",
    )
    add("--threads", type=int, metavar="N", help="cores for XLA and the host experts together (default all)")
    add("--host-kernel", choices=KERNELS, help="CPU expert kernel (default auto)")
    add("--device", metavar="D", help="paced:PROFILE[:SLOWDOWN]: a device that keeps another machine's pace")
    add("--cost-shape", metavar="NAME[:FORMAT]", help="of a paced device: the full-size model whose times it keeps")
    add("--lazy", action="store_true", help="read experts from disk on first use")
    return top


def main(argv: list[str] | None = None) -> int:
    args, start = parser().parse_args(argv), time.perf_counter()
    check_files(args)
    options = engine_config(args)
    from hybrimoe_jax.engine.calibration import calibrate, record_routing
    from hybrimoe_jax.engine.load import load

    engine = load(args.model, options)
    found = calibrate(engine, cli.progress)
    fused = type(engine._forward).__name__ == "FusedForward"
    meaning = what_it_means(found, record_routing(engine), args.cache_ratio)
    engine.close()
    if args.out:
        found.save(args.out)
    if args.plot:
        from hybrimoe_jax.machine.plots import draw

        draw(found, args.plot)
    for warning in found.warnings():
        say(f"warning: {warning}")
    print(calibration_text(found) + "\n\n" + meaning_text(meaning, found) + "\n", flush=True)
    record = {
        "seconds": time.perf_counter() - start,
        **found.origin.describe(),
        "costs": found.costs.describe(),
        "spread": found.spread,
        "drift": found.drift,
        "misfit": found.misfit,
        "slower_beside_link": found.slower_beside_link,
        "memory": found.memory,
        "warnings": found.warnings(),
        "decode_as_one_program": fused,
        **meaning,
        "points": [found.row(point) for point in found.points],
    }
    print(json.dumps(stamped("calibration", record)), flush=True)
    return 0


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """The engine that is measured: its measurements are not kept, and none that were kept are used."""
    named = ("cache_ratio", "threads", "host_kernel", "device", "cost_shape", "lazy")
    chosen = {name: getattr(args, name) for name in named if getattr(args, name) is not None}
    return EngineConfig(**chosen, start_cache="default", measure_again=True)


def check_files(args: argparse.Namespace) -> None:
    """UserError for files that could not be written at the end."""
    cli.check_results(args, ("out", "plot"), [args.model])
    if args.plot:
        from hybrimoe_jax.figures import check_picture

        check_picture(args.plot, "--plot")


def what_it_means(found: Calibration, trace, ratio: float) -> dict:
    """Break-even points, and what each system is expected to take a token; JSON values."""
    from hybrimoe_jax.machine import break_even
    from hybrimoe_jax.simulate.expected import expected

    costs, systems = found.costs, expected(trace, found.costs, ratio)
    layers = trace.facts.layers
    hybrid = next(each for each in systems if each.system == "hybrimoe")
    return {
        "fetch_from_load": break_even.fetch_from_load(costs),
        "device_from_load": break_even.device_from_load(costs),
        "lookahead": break_even.layers_to_hide(costs, hybrid.seconds / layers),
        "cache_ratio": ratio,
        "expected": [each._asdict() for each in systems],
    }


def meaning_text(meaning: dict, found: Calibration) -> str:
    """The same in a few lines, no wider than 80 columns."""
    load, resident, systems = meaning["fetch_from_load"], meaning["device_from_load"], meaning["expected"]
    first, others = systems[0], systems[1:]
    equal = [each["system"] for each in others if each["seconds"] < 1.01 * first["seconds"]]
    behind = next((each for each in others if each["system"] not in equal), None)
    wins = f"{first['system']} wins here" if not equal else f"{', '.join([first['system'], *equal])} are equal here"
    if behind is not None:
        wins += f", {behind['seconds'] / first['seconds']:.2f} times as fast as {behind['system']}"
    lines = [
        "worth fetching: "
        + ("no expert, at any load" if load is None else f"an expert of load {load} or more")
        + "; sooner on the device if it is there: "
        + ("none" if resident is None else f"from load {resident} on"),
        f"a transfer is hidden by {meaning['lookahead']} layers of lookahead",
        f"expected with {meaning['cache_ratio']:.0%} of the experts on the device, milliseconds a token: "
        + ", ".join(f"{each['system']} {1e3 * each['seconds']:.3g}" for each in systems),
        wins,
    ]
    if found.costs.shares_cores:
        lines.append("this machine has no device but its CPU: its lanes take turns, and moving an expert gains nothing")
    wrap = textwrap.TextWrapper(SCREEN, subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(row for line in lines for row in wrap.wrap(line))


if __name__ == "__main__":
    cli.run(main)
