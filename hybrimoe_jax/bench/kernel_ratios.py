"""What `bench kernels` measured, row by row, and the ratios that it reports beside the rows."""

from __future__ import annotations

import dataclasses
import itertools
import operator
import statistics
from collections.abc import Callable, Sequence


@dataclasses.dataclass(frozen=True)
class Row:
    """Median seconds an expert.

    `bandwidth`: bytes a second, read around the contender's turns. `of_bandwidth` and `share`: how much of it, and of
    the machine's limit, medians of the turns, each against what was read around it.
    """

    shape: str
    load: int
    threads: int
    contender: str
    seconds: float
    nbytes: int
    flops: int
    bandwidth: float
    of_bandwidth: float
    share: float

    def record(self) -> dict:
        return {
            **{name: getattr(self, name) for name in ("shape", "load", "threads", "contender")},
            "ms": round(self.seconds * 1e3, 4),
            "gb_s": round(self.nbytes / self.seconds / 1e9, 2),
            "gflop_s": round(self.flops / self.seconds / 1e9, 1),
            "bandwidth": round(self.bandwidth / 1e9, 1),
            "of_bandwidth": round(self.of_bandwidth, 3),
            "share": round(self.share, 3),
        }


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Ours over the peers' at some loads.

    It is the time of the fastest of `peers` over ours, or without peers `value` of our row.
    """

    name: str
    ours: str
    loads: tuple[int, ...]
    peers: tuple[str, ...] = ()
    value: Callable[[Row], float] = operator.attrgetter("of_bandwidth")


def ratios(peak: float) -> list[Ratio]:
    """What is reported beside the rows; `peak`: floating-point operations a second."""
    q4, q8 = ("ggml q4_0", "ggml q4_0 repacked"), ("ggml q8_0", "ggml q8_0 repacked")
    int4, int8 = "native int4-g32-a8", "native int8-g32-a8"
    return [
        Ratio("load 1, int4: of read bandwidth", int4, (1,)),
        Ratio("load 1, int8: of read bandwidth", int8, (1,)),
        Ratio("load 1, bf16: of read bandwidth", "native bf16", (1,)),
        Ratio("load 1, int4 against ggml", int4, (1,), q4),
        Ratio("load 1, int8 against ggml", int8, (1,), q8),
        Ratio("loads 2-8, int4 against ggml", int4, (2, 4, 8), q4),
        Ratio("loads 2-8, int8 against ggml", int8, (2, 4, 8), q8),
        Ratio("load 128, int4 against ggml", int4, (128,), q4),
        Ratio("load 128, int8 against ggml", int8, (128,), q8),
        Ratio("load 128, int8 against torch", "native int8-g128-a8", (128,), ("torch int8 dynamic",)),
        Ratio("load 128, f32: of the peak", "native f32", (128,), value=lambda row: row.flops / row.seconds / peak),
    ]


def mean_ratio(ratio: Ratio, rows: list[Row], shapes: Sequence[str]) -> float | None:
    """The geometric mean over `shapes` and the loads; None where a row that it needs was not measured."""
    found = []
    for shape, load in itertools.product(shapes, ratio.loads):
        here = {row.contender: row for row in rows if (row.shape, row.load) == (shape, load)}
        peers = [here[name].seconds for name in ratio.peers if name in here]
        if ratio.ours not in here or (ratio.peers and not peers):
            return None
        ours = here[ratio.ours]
        found.append(min(peers) / ours.seconds if peers else ratio.value(ours))
    return statistics.geometric_mean(found)
