"""A calibration: the costs of a machine, the measurements behind them, and how far they can be trusted."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any

from hybrimoe_jax.machine.costs import ORIGIN, POINTS, CostModel
from hybrimoe_jax.machine.fit import KINDS, Point, predicted
from hybrimoe_jax.machine.origin import Origin

UNFITTED = {
    "threads": ("load", "threads"),
    "cpu_alone": ("load", "experts"),
    "cpu_link_busy": ("load", "experts"),
    "again": ("load", "experts"),
}
"""Measurements that no figure of the cost model comes from: an expert by threads; experts on the CPU and the same
beside transfers; the first of all measurements once more, at the end."""
NOISY = 0.3
"""Where half of all points spread by more than this, or the first one has moved by it at the end, the machine is noisy:
other work has its share of it."""
FAR = 0.25
"""A measurement that lies further from the cost model is named."""


@dataclasses.dataclass(frozen=True)
class Calibration:
    """`points` are the measurements, in the order in which they were taken.

    `memory`: seconds of an expert's copy to a GPU by the kind of host memory that it comes from.
    """

    costs: CostModel
    origin: Origin
    points: tuple[Point, ...]
    memory: dict[str, float] = dataclasses.field(default_factory=dict[str, float])

    def residual(self, point: Point) -> float | None:
        """By what share of the measurement the cost model is above it; None for what it does not tell."""
        if point.kind not in KINDS:
            return None
        return predicted(self.costs, point.kind, point.at) / point.seconds - 1

    def of(self, kind: str) -> list[Point]:
        """The points of one kind."""
        return [point for point in self.points if point.kind == kind]

    @property
    def spread(self) -> float:
        """The median of the points' spreads."""
        return statistics.median([point.spread for point in self.points])

    @property
    def drift(self) -> float:
        """By what share the first measurement took longer at the end (less than 0: shorter)."""
        again, first = self.of("again"), self.points[0]
        return again[0].seconds / first.seconds - 1 if again else 0.0

    @property
    def misfit(self) -> float:
        """The median of the residuals, whatever their sign."""
        return statistics.median([abs(r) for r in map(self.residual, self.points) if r is not None])

    @property
    def slower_beside_link(self) -> float:
        """By what factor host experts take longer while experts cross the link; 1 where that was not measured."""
        before = {point.at: point.seconds for point in self.of("cpu_alone")}
        ratios = [point.seconds / before[point.at] for point in self.of("cpu_link_busy") if point.at in before]
        return statistics.median(ratios) if ratios else 1.0

    def warnings(self) -> list[str]:
        """What a reader must know before using the figures, a line each; none where all is well."""
        said: list[str] = []
        if self.spread > NOISY or abs(self.drift) > NOISY:
            said.append(
                f"the machine is noisy: repeats spread by {self.spread:.0%} (median), the first measurement took "
                f"{self.drift:+.0%} at the end; stop other work and measure again"
            )
        if self.misfit > FAR:
            said.append(f"the cost model is a rough guide: measurements lie {self.misfit:.0%} from it (median)")
        return said

    def save(self, path: str | Path) -> None:
        """Writes a profile that `--profile`, `--clock virtual` and the simulator read, the measurements included."""
        self.costs.save(path, {ORIGIN: self.origin.describe(), POINTS: [self.row(point) for point in self.points]})

    def row(self, point: Point) -> dict[str, Any]:
        """A measurement as plain values."""
        names = (KINDS | UNFITTED)[point.kind]
        residual = self.residual(point)
        return {
            "kind": point.kind,
            **dict(zip(names, point.at)),
            "seconds": point.seconds,
            "low": point.low,
            "high": point.high,
            "repeats": point.repeats,
            **({} if residual is None else {"residual": residual}),
        }
