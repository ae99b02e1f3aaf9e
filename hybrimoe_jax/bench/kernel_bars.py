"""What `bench kernels` measured, and the bars that its rows are held against.

Bars are geometric means over the shapes at the most threads; a bar whose peer is absent, or not all of whose shapes or loads were
measured, is not met.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence


@dataclasses.dataclass(frozen=True)
class Row:
    """Median seconds an expert. `bandwidth`: bytes a second, read around the contender's turns; `of_bandwidth`, `share`: how much
    of it, and of the machine's limit, medians of the turns, each against what was read around it."""

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
class Bar:
    """`value(row, best)`: what one shape and load gives, from our row and the fastest of the peers' rows, if it has peers."""

    name: str
    ours: str
    loads: tuple[int, ...]
    peers: tuple[str, ...]
    need: float
    aim: float
    value: Callable[[Row, Row | None], float]


def _read(row: Row, best: Row | None) -> float:
    return row.of_bandwidth


def _faster(row: Row, best: Row | None) -> float:
    return best.seconds / row.seconds


_Q4, _Q8 = ("ggml q4_0", "ggml q4_0 repacked"), ("ggml q8_0", "ggml q8_0 repacked")
_BF16, _INT8 = "native bf16", "native int8-g128-a8"
_G4, _G8 = "native int4-g32-a8", "native int8-g32-a8"


def bars(peak: float) -> list[Bar]:
    """The measures that this project set itself; `peak`: floating-point operations a second."""
    return [
        Bar("load 1, int4: of read bandwidth", _G4, (1,), (), 0.70, 0.85, _read),
        Bar("load 1, int8: of read bandwidth", _G8, (1,), (), 0.78, 0.85, _read),
        Bar("load 1, bf16: of read bandwidth", _BF16, (1,), (), 0.82, 0.88, _read),
        Bar("load 1, int4 against ggml", _G4, (1,), _Q4, 1.2, 1.3, _faster),
        Bar("load 1, int8 against ggml", _G8, (1,), _Q8, 1.2, 1.3, _faster),
        Bar("loads 2-8, int4 against ggml", _G4, (2, 4, 8), _Q4, 1.8, 1.8, _faster),
        Bar("loads 2-8, int8 against ggml", _G8, (2, 4, 8), _Q8, 1.8, 1.8, _faster),
        Bar("load 128, int4 against ggml", _G4, (128,), _Q4, 2.0, 2.0, _faster),
        Bar("load 128, int8 against ggml", _G8, (128,), _Q8, 2.0, 2.0, _faster),
        Bar("load 128, int8 against torch", _INT8, (128,), ("torch int8 dynamic",), 0.85, 1.1, _faster),
        Bar(
            "load 128, f32: of the peak", "native f32", (128,), (), 0.65, 0.75, lambda r, _: r.flops / r.seconds / peak
        ),
    ]


def judge(bar: Bar, rows: list[Row], shapes: Sequence[str]) -> dict:
    """The bar's record; `value` is None where something it needs was not measured."""
    found = []
    for shape in shapes:
        for load in bar.loads:
            here = [row for row in rows if (row.shape, row.load) == (shape, load)]
            ours = [row for row in here if row.contender == bar.ours]
            theirs = [row for row in here if row.contender in bar.peers]
            if not ours or (bar.peers and not theirs):
                return {"bar": bar.name, "value": None, "need": bar.need, "aim": bar.aim, "met": False}
            found.append(bar.value(ours[0], min(theirs, key=lambda row: row.seconds, default=None)))
    value = statistics.geometric_mean(found)
    return {"bar": bar.name, "value": round(value, 3), "need": bar.need, "aim": bar.aim, "met": value >= bar.need}
