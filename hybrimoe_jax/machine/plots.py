"""The paper's characterisation of CPU and device, drawn for the machine that was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hybrimoe_jax.figures import COLOURS, LINES, STYLE, WIDTH, matplotlib_pyplot, picture_kind
from hybrimoe_jax.files import replacing
from hybrimoe_jax.machine.calibration import Calibration
from hybrimoe_jax.machine.fit import predicted

LANES = {"cpu": "CPU", "alone": "CPU, all cores", "device": "device"}


def draw(found: Calibration, path: str | Path) -> None:
    """Writes the picture, without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    figure = figure_of(found)
    with replacing(path, "wb") as file:
        figure.savefig(file, format=picture_kind(path))
    matplotlib_pyplot().close(figure)


def figure_of(found: Calibration) -> Any:
    """Time by number of experts at one load, by load for one expert, and of a transfer by size. Dots are measured."""
    plt = matplotlib_pyplot()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(2 * WIDTH, 2.2), dpi=200, layout="constrained")
        _by(axes[0], found, changing=1)
        axes[0].set_xlabel("experts of one token each")
        axes[0].set_ylabel("time [ms]")
        axes[0].legend(fontsize=6)
        _by(axes[1], found, changing=0)
        axes[1].set_xscale("log", base=2)
        axes[1].set_yscale("log")
        axes[1].set_xlabel("load of one expert [tokens]")
        _by_size(axes[2], found)
        machine, model = found.origin.machine, found.origin.model
        figure.suptitle(f"{machine}; {model.name}, {found.origin.format}", fontsize=6)
    return figure


def _by(axes: Any, found: Calibration, changing: int) -> None:
    """The paper's figures: experts of one token each, one behind the other (1), or one expert by its tokens (0)."""
    for place, (kind, name) in enumerate(LANES.items()):
        points = [point for point in found.of(kind) if point.at[1 - changing] == 1 and point.at[changing]]
        if points:
            tried = [point.at[changing] for point in points]
            at = range(1, max(tried) + 1) if changing else tried
            places = [(1, n) if changing else (n, 1) for n in at]
            line = [1e3 * predicted(found.costs, kind, one) for one in places]
            _series(axes, name, place, list(zip(tried, points)))
            axes.plot(at, line, lw=0.8, color=_colour(place), ls=LINES[place])


def _by_size(axes: Any, found: Calibration) -> None:
    names = {"transfer": "alone", "transfer_cpu_busy": "beside the CPU"}
    for place, (kind, name) in enumerate(names.items()):
        points = found.of(kind)
        sizes = sorted(point.at[0] for point in points)
        _series(axes, name, place + 3, [(p.at[0] / 1e6, p) for p in points])
        line = [1e3 * predicted(found.costs, kind, (size,)) for size in sizes]
        axes.plot([size / 1e6 for size in sizes], line, lw=0.8, color=_colour(place + 3), ls=LINES[place])
    axes.set_xlabel("transfer [MB]")
    axes.legend(fontsize=6)


def _series(axes: Any, name: str, place: int, points: list[tuple[float, Any]]) -> None:
    """Medians with their quartiles."""
    middle = [1e3 * p.seconds for _, p in points]
    errors = [[1e3 * (p.seconds - p.low) for _, p in points], [1e3 * (p.high - p.seconds) for _, p in points]]
    style = {"fmt": "osv^D"[place], "ms": 3, "lw": 0.6, "color": _colour(place)}
    axes.errorbar([x for x, _ in points], middle, yerr=errors, label=name, **style)


def _colour(place: int) -> str:
    return COLOURS[(1, 5, 0, 2, 3)[place]]
