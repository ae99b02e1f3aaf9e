"""Pictures of a run's statistics. Each returns the axes that it drew into. Imports no jax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybrimoe_jax.engine.stats import RunStats
from hybrimoe_jax.engine.stats_table import by_expert, by_layer, by_step
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.figures import LANE_COLOURS, SHADES, axes_of, bar_style, line_style


class StatsPlots:
    """`stats.plot`. `ax`: where to draw; a new figure without it. UserError where the run has nothing to show."""

    def __init__(self, stats: RunStats):
        self._stats = stats

    def hit_rate(self, ax: Any = None) -> Any:
        """The share of activated experts that were resident, step by step; prompts' steps are open dots."""
        rows = [row for row in by_step(self._stats) if row["hit_rate"] is not None]
        _some(rows)
        with axes_of(ax) as axes:
            _by_phase(axes, rows, "hit_rate", 100)
            mean = 100 * (self._stats.hit_rate or 0)
            axes.axhline(mean, color="0.4", ls="--", lw=0.8, label=f"all steps: {mean:.1f} %")
            axes.set(xlabel="step", ylabel="activated experts\nfound resident [%]", ylim=(0, 102))
            self._end(axes)
        return axes

    def times(self, ax: Any = None) -> Any:
        """Milliseconds of every step, without compiling."""
        rows = list(by_step(self._stats))
        _some(rows)
        with axes_of(ax) as axes:
            _by_phase(axes, rows, "ms", 1)
            axes.set(xlabel="step", ylabel="time of a step [ms]")
            axes.set_ylim(0)
            self._end(axes)
        return axes

    def lanes(self, ax: Any = None) -> Any:
        """How long each lane was busy in every decode step, beside the step's time."""
        rows = [row for row in by_step(self._stats) if row["phase"] == "decode"]
        _some(rows)
        at = [row["step"] for row in rows]
        with axes_of(ax) as axes:
            axes.plot(at, [row["ms"] for row in rows], color="black", lw=1, label="the step")
            for place, lane in enumerate(LANE_COLOURS):
                style = {**line_style(place), "color": LANE_COLOURS[lane], "marker": ""}
                axes.plot(at, [row[f"{lane}_ms"] for row in rows], label=lane, **style)
            axes.set(xlabel="decode step", ylabel="busy [ms]")
            axes.set_ylim(0)
            self._end(axes, columns=4)
        return axes

    def layers(self, ax: Any = None) -> Any:
        """Who computed each MoE layer's experts, in the mean of a step."""
        rows = list(by_layer(self._stats))
        _some(rows)
        steps = max(1, sum(bool(step.layers) for step in self._stats.steps))
        at = [row["layer"] for row in rows]
        coming = [max(row["late"], row["device"] - row["fetched"] - row["hits"]) for row in rows]
        bars = {
            "CPU": [row["cpu"] / steps for row in rows],
            "device, resident": [(row["device"] - row["fetched"] - n) / steps for row, n in zip(rows, coming)],
            "device, fetched": [row["fetched"] / steps for row in rows],
            "device, on its way": [n / steps for n in coming],
        }
        with axes_of(ax) as axes:
            below = [0.0] * len(rows)
            for place, (name, heights) in enumerate(bars.items()):
                axes.bar(at, heights, bottom=below, label=name, **bar_style((1, 0, 2, 3)[place]))
                below = [low + high for low, high in zip(below, heights)]
            axes.set(xlabel="MoE layer", ylabel="experts of a step")
            axes.xaxis.get_major_locator().set_params(integer=True)
            self._end(axes, columns=2)
        return axes

    def experts(self, ax: Any = None) -> Any:
        """In how many steps each expert was activated: a row a layer, darker is oftener."""
        rows = list(by_expert(self._stats))
        _some(rows)
        counts = [[0] * (1 + max(row["expert"] for row in rows)) for _ in range(1 + max(row["layer"] for row in rows))]
        for row in rows:
            counts[row["layer"]][row["expert"]] = row["steps"]
        with axes_of(ax) as axes:
            image = axes.imshow(counts, aspect="auto", cmap=SHADES, vmin=0, interpolation="nearest")
            axes.set(xlabel="expert", ylabel="MoE layer")
            axes.yaxis.get_major_locator().set_params(integer=True)
            axes.figure.colorbar(image, ax=axes, label=f"steps of {len(self._stats.steps)} that activated it")
            axes.set_title(self._stats.system, fontsize=6)
        return axes

    def _end(self, axes: Any, columns: int = 3) -> None:
        axes.set_title(f"{self._stats.system}; {self._stats.times}", fontsize=6)
        axes.legend(ncols=columns, fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.22))


def _by_phase(axes: Any, rows: Sequence[dict[str, Any]], name: str, factor: float) -> None:
    for phase, style in (("prefill", {"mfc": "white", "ls": ""}), ("decode", {"ls": "-"})):
        chosen = [row for row in rows if row["phase"] == phase]
        if chosen:
            style = {**line_style(0), "marker": "o", "ms": 3 if len(chosen) < 100 else 1.5, **style}
            axes.plot([row["step"] for row in chosen], [factor * row[name] for row in chosen], label=phase, **style)


def _some(rows: Sequence[Any]) -> None:
    if not rows:
        raise UserError("the run has no steps of which this could be drawn")
