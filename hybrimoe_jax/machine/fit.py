"""Fitting the cost model to a warm-up: non-negative lines through medians, errors weighed by the measured time.

Units: seconds, bytes; loads in tokens.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.machine.costs import CostModel

Points = Sequence[tuple[float, float]]
_Loads = list[tuple[int, float]]


@dataclasses.dataclass
class Samples:
    """What a warm-up measured: (load, seconds) points per kind of work, and (bytes, seconds) for transfers.

    `cpu` are experts that followed another one, `cpu_first` those that opened a run; `shared` and `layer` are by tokens
    in the step. `alone` are experts on the CPU with the device's cores too, (load, seconds), and `alone_first` those
    that opened a run. `transfer_cpu_busy` are transfers beside a computing CPU. `fetch_host`, `look` and `handover` are
    seconds, see `CostModel`. Points may repeat: the median of each load is what is fitted.
    """

    expert_bytes: int
    cpu: _Loads = dataclasses.field(default_factory=_Loads)
    cpu_first: _Loads = dataclasses.field(default_factory=_Loads)
    alone: _Loads = dataclasses.field(default_factory=_Loads)
    alone_first: _Loads = dataclasses.field(default_factory=_Loads)
    device: _Loads = dataclasses.field(default_factory=_Loads)
    shared: _Loads = dataclasses.field(default_factory=_Loads)
    layer: _Loads = dataclasses.field(default_factory=_Loads)
    transfer: _Loads = dataclasses.field(default_factory=_Loads)
    transfer_cpu_busy: _Loads = dataclasses.field(default_factory=_Loads)
    fetch_host: float = 0.0
    look: float = 0.0
    handover: float = 0.0


def fit(samples: Samples, source: str = "warm-up") -> CostModel:
    """The non-negative least-squares cost model of a warm-up; UserError where a measurement is missing or unusable.

    Errors are weighed relative to the measured time: a decode step at load 1 matters as much as a prefill at load 500,
    and so does its error in per cent. Within each load the median counts, so that a stray interruption does not.
    """
    for name in ("cpu", "device", "transfer"):
        if not getattr(samples, name):
            raise UserError(f"warm-up: no {name} time was measured, so no cost model can be fitted")
    cpu_expert, cpu_token = _line("cpu", samples.cpu)
    alone_expert, alone_token = _line("alone", samples.alone)
    device_expert, device_token = _line("device", samples.device)
    shared_base, shared_token = _line("shared", samples.shared)
    layer_base, layer_token = _line("layer", samples.layer)
    latency, per_byte = _line("transfer", samples.transfer)
    if per_byte <= 0:  # noise hid the slope: charge the whole time to the bytes
        size, seconds = _medians("transfer", samples.transfer)[-1]
        latency, per_byte = 0.0, seconds / size
    busy = [(size, seconds - latency) for size, seconds in _medians("transfer_cpu_busy", samples.transfer_cpu_busy)]
    slopes = [max(seconds, 0.0) / size for size, seconds in busy]
    return CostModel(
        cpu_expert=cpu_expert,
        cpu_token=cpu_token,
        cpu_first=_first("cpu_first", samples.cpu_first, cpu_expert, cpu_token),
        device_expert=device_expert,
        device_token=device_token,
        shared_base=shared_base,
        shared_token=shared_token,
        layer_base=layer_base,
        layer_token=layer_token,
        transfer_latency=latency,
        bandwidth=1.0 / per_byte,
        bandwidth_cpu_busy=1.0 / (max(per_byte, statistics.median(slopes)) if slopes else per_byte),
        expert_bytes=samples.expert_bytes,
        source=source,
        fetch_host=samples.fetch_host,
        look=samples.look,
        alone_expert=alone_expert,
        alone_token=alone_token,
        alone_first=_first("alone_first", samples.alone_first, alone_expert, alone_token),
        handover=samples.handover,
    )


def _first(name: str, points: Points, base: float, per_token: float) -> float:
    """How much longer the first expert of a run takes than the line says."""
    extra = [seconds - (base + per_token * load) for load, seconds in _medians(name, points)]
    return max(0.0, statistics.median(extra)) if extra else 0.0


def _medians(name: str, points: Points) -> list[tuple[float, float]]:
    """One point per load: its median time. UserError for a time or a load that cannot be."""
    by_load: dict[float, list[float]] = {}
    for load, seconds in points:
        if not (math.isfinite(seconds) and seconds > 0 and load > 0):
            raise UserError(f"warm-up: {name} measured {seconds!r} s at {load!r}; both must be above 0")
        by_load.setdefault(load, []).append(seconds)
    return [(load, statistics.median(times)) for load, times in sorted(by_load.items())]


def _line(name: str, points: Points) -> tuple[float, float]:
    """(a, b), neither negative, that minimise the relative squared error of a + b x; (0, 0) without points."""
    points = _medians(name, points)
    if not points:
        return 0.0, 0.0
    if len(points) == 1:  # nothing tells the slope: bytes scale, a single load does not
        (x, y) = points[0]
        return (0.0, y / x) if name == "transfer" else (y, 0.0)
    # In terms of r = 1/y and q = x/y the model is a r + b q = 1.
    r = [1 / y for _, y in points]
    q = [x / y for x, y in points]
    rr, qq, rq = (math.fsum(u * v for u, v in zip(*pair)) for pair in ((r, r), (q, q), (r, q)))
    sr, sq = math.fsum(r), math.fsum(q)
    determinant = rr * qq - rq * rq
    if determinant > 0:
        a, b = (sr * qq - sq * rq) / determinant, (sq * rr - sr * rq) / determinant
        if a >= 0 and b >= 0:
            return a, b
    # The minimum lies on the border: the better of a constant and a line through the origin.
    flat, steep = (sr / rr, 0.0), (0.0, sq / qq)
    return min(flat, steep, key=lambda line: math.fsum((line[0] * u + line[1] * v - 1) ** 2 for u, v in zip(r, q)))
