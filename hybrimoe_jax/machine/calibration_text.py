"""A calibration for a person: a table of the machine's figures, how well they are known, and what they mean."""

from __future__ import annotations

import statistics
import textwrap

from hybrimoe_jax.machine.calibration import Calibration

LANES = {
    "cpu": "CPU expert",
    "alone": "  on all cores",
    "device": "device expert",
    "layer": "attention, router",
}
LOADS = (1, 16, 128)
SCREEN = 80


def calibration_text(found: Calibration) -> str:
    """No wider than 80 columns. Times in microseconds."""
    costs, origin = found.costs, found.origin
    about = f"{origin.machine}; {origin.model.name}, {origin.format} experts of {costs.expert_bytes / 1e6:.3g} MB"
    lines = [
        *textwrap.wrap(about, SCREEN, subsequent_indent="  "),
        "",
        f"{'microseconds':18}{'load 1':>9}{'load 16':>9}{'load 128':>9} {'once':>8}  points  spread  residual",
    ]
    times = {
        "cpu": (costs.cpu, costs.cpu_first),
        "alone": (costs.alone, costs.alone_first),
        "device": (costs.device, costs.shared(1)),
        "layer": (costs.layer, None),
    }
    for kind, (seconds, once) in times.items():
        if found.of(kind):
            cells = [f"{1e6 * seconds(load):9.1f}" for load in LOADS]
            opening = "-" if once is None else f"{1e6 * once:.1f}"
            lines.append(f"{LANES[kind]:18}{''.join(cells)} {opening:>8}{_trust(found, kind)}")
    lines.append("")
    for text in (*_context(found), *_link(found), *_threads(found)):
        lines += textwrap.wrap(text, SCREEN, subsequent_indent="  ")
    return "\n".join(lines)


def _trust(found: Calibration, kind: str) -> str:
    points = found.of(kind)
    residuals = [abs(r) for r in map(found.residual, points) if r is not None]
    spread = statistics.median([point.spread for point in points])
    return f"{len(points):8} {spread:7.0%} {statistics.median(residuals):9.0%}"


def _context(found: Calibration) -> list[str]:
    places: dict[int, list[float]] = {}
    for point in found.of("layer"):
        if point.at[0] == 1:
            places.setdefault(point.at[1], []).append(point.seconds)
    if len(places) < 2:
        return []
    each = [f"{context}: {1e6 * statistics.median(times):.0f} us" for context, times in sorted(places.items())]
    return ["attention by context: " + ", ".join(each)]


def _link(found: Calibration) -> list[str]:
    costs = found.costs
    alone, busy = (1e6 * costs.transfer(beside) for beside in (False, True))
    kinds = ", ".join(f"{name} {1e6 * seconds:.0f} us" for name, seconds in found.memory.items())
    memory = [f"an expert's copy by host memory: {kinds}"] if kinds else []
    return [
        *memory,
        f"link: {1e6 * costs.transfer_latency:.1f} us and {costs.bandwidth / 1e9:.3g} GB/s, beside host experts "
        f"{costs.bandwidth_cpu_busy / 1e9:.3g} GB/s; an expert takes {alone:.0f} us alone, {busy:.0f} us beside host "
        f"experts, which take {found.slower_beside_link:.2f} times as long beside transfers",
    ]


def _threads(found: Calibration) -> list[str]:
    lines: list[str] = []
    for load in dict.fromkeys(point.at[0] for point in found.of("threads")):
        each = [(p.at[1], 1e6 * p.seconds / 4) for p in found.of("threads") if p.at[0] == load]
        lines.append(f"CPU expert of load {load} by threads: " + ", ".join(f"{t}: {us:.1f} us" for t, us in each))
    return lines
