"""Fitting the cost model to measurements: non-negative least squares, errors weighed by the measured time.

Each lane is linear in what was asked of it: k experts of load n on the CPU take `first + k (expert + token n)`; a MoE
block with k of them on the device `block + k (expert + token n)` behind its shared experts; a layer's front at n tokens
and c places of context `base + token n + context n c`. Where that fits badly, a floor is fitted besides: up to some
load an expert takes as long as reading its weights, and a front as reading its own and the cache, `floor + place c`.

Units: seconds, bytes; loads in tokens.
"""

# NumPy 2.5 types some functions by what its stubs leave unknown.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.machine.costs import DURATIONS, RATES, CostModel

KINDS = {
    "cpu": ("load", "experts"),
    "alone": ("load", "experts"),
    "device": ("tokens", "experts"),
    "layer": ("tokens", "context"),
    "transfer": ("bytes",),
    "transfer_cpu_busy": ("bytes",),
}
"""What is measured, and by what. `cpu`: experts of one load, one behind the other; `alone`: with the device's cores
too, where it has none of its own. `device`: a MoE block there, 0 experts: its shared ones alone. `layer`: its front."""
BADLY, BETTER = 0.03, 0.6
"""A floor is tried where a lane's relative error is above the first, and kept where each brings it to this share."""


@dataclasses.dataclass(frozen=True)
class Point:
    """One measurement. `at`: the numbers that `KINDS` names; `low`, `high`: quartiles of its `repeats`."""

    kind: str
    at: tuple[int, ...]
    seconds: float
    low: float = 0.0
    high: float = 0.0
    repeats: int = 1

    @property
    def spread(self) -> float:
        """Of the repeats: how far the quartiles lie apart, as a share of the median."""
        return (self.high - self.low) / self.seconds


@dataclasses.dataclass
class Samples:
    """What was measured. Points may repeat: their median counts.

    `fetch_host`, `look` and `handover` are seconds, see `CostModel`.
    """

    expert_bytes: int
    points: list[Point] = dataclasses.field(default_factory=list[Point])
    fetch_host: float = 0.0
    look: float = 0.0
    handover: float = 0.0

    def add(self, kind: str, at: Sequence[int], seconds: float) -> None:
        """One measurement without repeats."""
        self.points.append(Point(kind, tuple(at), seconds, seconds, seconds))

    def medians(self, kind: str) -> list[tuple[tuple[int, ...], float]]:
        """(at, seconds) of each place, in order. UserError for a time or a place that cannot be."""
        found: dict[tuple[int, ...], list[float]] = {}
        for point in self.points:
            if point.kind != kind:
                continue
            if not (math.isfinite(point.seconds) and point.seconds > 0 and point.at[0] > 0 and min(point.at) >= 0):
                raise UserError(f"warm-up: {kind} measured {point.seconds!r} s at {point.at}; it must be above 0")
            found.setdefault(point.at, []).append(point.seconds)
        return [(at, statistics.median(times)) for at, times in sorted(found.items())]


def fit(samples: Samples, source: str = "warm-up") -> CostModel:
    """The cost model of measurements; UserError where one is missing or unusable.

    Errors are weighed relative to the measured time: a decode step at load 1 matters as much as a prefill at load 500,
    and so does its error in per cent.
    """
    measured = {kind: samples.medians(kind) for kind in KINDS}
    for kind in ("cpu", "device", "transfer"):
        if not any(len(at) < 2 or at[1] for at, _ in measured[kind]):
            raise UserError(f"warm-up: no {kind} time was measured, so no cost model can be fitted")
    cpu, alone = (_experts(measured[kind]) for kind in ("cpu", "alone"))
    device = _experts(measured["device"], shared=any(not experts for (_, experts), _ in measured["device"]))
    layer = _front(measured["layer"])
    latency, per_byte, busy = _link(measured["transfer"], measured["transfer_cpu_busy"])
    return CostModel(
        cpu_expert=cpu["expert"],
        cpu_token=cpu["token"],
        cpu_floor=cpu["floor"],
        cpu_first=cpu["once"],
        alone_expert=alone["expert"],
        alone_token=alone["token"],
        alone_floor=alone["floor"],
        alone_first=alone["once"],
        device_expert=device["expert"],
        device_token=device["token"],
        device_floor=device["floor"],
        device_block=device["once"],
        shared_base=device["shared"],
        shared_token=device["shared_token"],
        shared_floor=device["shared_floor"],
        layer_base=layer["base"],
        layer_token=layer["token"],
        layer_context=layer["context"],
        layer_floor=layer["floor"],
        layer_place=layer["place"],
        transfer_latency=latency,
        bandwidth=1.0 / per_byte,
        bandwidth_cpu_busy=1.0 / busy,
        expert_bytes=samples.expert_bytes,
        source=source,
        fetch_host=samples.fetch_host,
        look=samples.look,
        handover=samples.handover,
    )


def predicted(costs: CostModel, kind: str, at: Sequence[int]) -> float:
    """Seconds that the cost model gives for a measurement of `KINDS`."""
    if kind == "cpu":
        return costs.cpu(at[0], True) + (at[1] - 1) * costs.cpu(at[0])
    if kind == "alone":
        return costs.alone_first + at[1] * costs.alone(at[0])
    if kind == "device":
        return costs.shared(at[0]) + (at[1] * costs.device(at[0]) if at[1] else -costs.device_block)
    if kind == "layer":
        return costs.layer(*at)
    bandwidth = costs.bandwidth if kind == "transfer" else costs.bandwidth_cpu_busy
    return costs.transfer_latency + at[0] / bandwidth


_Medians = Sequence[tuple[tuple[int, ...], float]]
_Columns = dict[str, Callable[[int, int], float]]
"""By name: how often a coefficient counts at a place (its second number is 0 if it has but one)."""


_COMPUTING: _Columns = {"base": lambda n, c: 1.0, "token": lambda n, c: n, "context": lambda n, c: n * c}
_READING: _Columns = {"floor": lambda n, c: 1.0, "place": lambda n, c: c}
_LINK: _Columns = {"byte": lambda size, _: size, "latency": lambda size, _: 1.0}
_NAMES = ("once", "expert", "token", "floor", "shared", "shared_token", "shared_floor")


def _lane(last: int, shared: int | None) -> _Columns:
    """A floor up to load `last`, a line behind it; and so for shared experts up to `shared` tokens if there are any."""
    columns: _Columns = {
        "floor": lambda n, k: k * (n <= last),
        "expert": lambda n, k: k * (n > last),
        "token": lambda n, k: k * n * (n > last),
        "once": lambda n, k: k > 0,
    }
    if shared is not None:
        columns |= {
            "shared_floor": lambda n, k: n <= shared,
            "shared": lambda n, k: n > shared,
            "shared_token": lambda n, k: n * (n > shared),
        }
    return columns


def _experts(points: _Medians, shared: bool = False) -> dict[str, float]:
    """Coefficients of a lane that runs experts, `_NAMES`."""
    plain, error = _solve(points, _lane(0, 0 if shared else None))
    best, score = plain, error
    loads = [0, *sorted({at[0] for at, _ in points})[:-2]] if error > BADLY else [0]
    for last, bend in itertools.product(loads, loads if shared else [0]):
        found, error = _solve(points, _lane(last, bend if shared else None))
        lines = (found["expert"], found["token"], last, found["floor"])
        others = (found["shared"], found["shared_token"], bend, found["shared_floor"]) if shared else (0.0, 0.0, 0, 0.0)
        error *= (1 / BETTER) ** ((last > 0) + (bend > 0))
        if error < score and all(a + b * n <= floor * (1 + BADLY) for a, b, n, floor in (lines, others) if n):
            best, score = found, error
    return {name: best.get(name, 0.0) for name in _NAMES}


def _front(points: _Medians) -> dict[str, float]:
    """base, token, context; floor, place: of the larger of computing and reading."""
    none = dict.fromkeys((*_COMPUTING, *_READING), 0.0)
    best, score = _solve(points, _COMPUTING)
    if score <= BADLY:
        return none | best
    for last in sorted({at[0] for at, _ in points})[:-1]:
        reads = {at for at, _ in points if at[0] <= last}
        found = none
        for _ in range(4):  # whichever is the larger
            reading, _ = _solve([point for point in points if point[0] in reads], _READING)
            computing, _ = _solve([point for point in points if point[0] not in reads], _COMPUTING)
            found = none | reading | computing
            reads = {at for at, _ in points if _value(found, _READING, at) >= _value(found, _COMPUTING, at)}
        times = [(max(_value(found, _READING, at), _value(found, _COMPUTING, at)), seconds) for at, seconds in points]
        error = math.sqrt(sum((model / seconds - 1) ** 2 for model, seconds in times) / len(times)) / BETTER
        if error < score:
            best, score = found, error
    return none | best


def _value(found: dict[str, float], columns: _Columns, at: tuple[int, ...]) -> float:
    return sum(found[name] * column(at[0], at[1]) for name, column in columns.items())


def _link(alone: _Medians, busy: _Medians) -> tuple[float, float, float]:
    """(latency, seconds a byte, seconds a byte beside a computing CPU)."""
    found, _ = _solve(alone, _LINK)
    latency, per_byte = found["latency"], found["byte"]
    if per_byte * RATES[1] <= 1:  # noise hid the slope: charge the whole time to the bytes
        (size, *_), seconds = alone[-1]
        latency, per_byte = 0.0, seconds / size
    slopes = [max(seconds - latency, 0.0) / at[0] for at, seconds in busy]
    return latency, per_byte, max(per_byte, statistics.median(slopes)) if slopes else per_byte


def _solve(points: _Medians, columns: _Columns) -> tuple[dict[str, float], float]:
    """Coefficients, none negative, of the least relative squared error, and the root of its mean.

    A column that the points cannot tell from those before it gets 0; so does all where there are no points.
    """
    found = dict.fromkeys(columns, 0.0)
    if not points:
        return found, 0.0
    rows = [[column(*(*at, 0)[:2]) / seconds for column in columns.values()] for at, seconds in points]
    table = np.array(rows, np.float64)
    scale = np.linalg.norm(table, axis=0)
    table = table / np.where(scale, scale, 1.0)
    kept: list[int] = []
    for i in range(len(columns)):
        if scale[i] and int(np.linalg.matrix_rank(table[:, [*kept, i]], 1e-9)) > len(kept):
            kept.append(i)
    names, least = list(columns), math.inf
    for count in range(len(kept), 0, -1):
        if count == len(kept) - 1 and least < math.inf:
            break  # all of them together are the best if none is negative
        for chosen in map(list, itertools.combinations(kept, count)):
            values, error = _least_squares(table[:, chosen])
            if min(values) >= 0 and error < least:
                least = error
                sure = {names[i]: v / float(scale[i]) for i, v in zip(chosen, values)}
                found = dict.fromkeys(columns, 0.0) | {n: v for n, v in sure.items() if v >= DURATIONS[0]}
    return found, math.sqrt(least / len(points))


def _least_squares(table: NDArray[np.float64]) -> tuple[list[float], float]:
    """The coefficients that bring each row's sum nearest to 1, and the squared error."""
    values = np.linalg.lstsq(table, np.ones(len(table)), rcond=None)[0]
    return [float(value) for value in values], float(np.square(table @ values - 1.0).sum())
