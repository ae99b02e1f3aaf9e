"""`bench kernels`: one SwiGLU expert at a time, weights from memory, by our native kernels and by the peers, all in turns.

The machine's limits come first: read bandwidth (whole vectors, summed) and the multiply-adds that registers alone can do, by the native
library's own loops. A row's limit is the larger of its bytes over that bandwidth and its operations over that peak; formats with quantised
activations multiply bytes, for which the float32 peak is no limit, so that theirs can pass 1 at large loads.

In every turn each contender computes a burst of experts (the first of them, unmeasured, wakes its threads), then the others have theirs;
bandwidth is read between the turns. Medians of the turns. Before each burst the threads of the contender before have gone to sleep.

Bars are geometric means over the shapes at the most threads; a bar whose peer is absent, or not all of whose shapes or loads were
measured, is not met.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from hybrimoe_jax.benchmarks.kernel_contenders import SHAPES, Contender, Shape, Weights, native, peers_of
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.host_kernels.native.library import isas, library

LOADS = (1, 2, 4, 8, 32, 128)
FORMATS = (
    *("f32", "bf16"),
    *("int8-g32-a8", "int8-g128-a8", "int8-g64", "int4-g32-a8", "int4-g64-a8", "int4-g64", "int4z-g64-a8"),
)
PROBE_BYTES = 192 << 20
BURST_SECONDS = 0.004
PAUSE, LONGEST_PAUSE = 0.012, 0.3
TURNS = (3, 25)  # at least, at most


@dataclasses.dataclass(frozen=True)
class Options:
    """`seconds`: of each shape, load and number of threads, all contenders together, beyond the least number of turns."""

    peers: tuple[str, ...] = ()
    formats: tuple[str, ...] = FORMATS
    shapes: tuple[Shape, ...] = SHAPES
    loads: tuple[int, ...] = LOADS
    threads: tuple[int, ...] = (1, 2)
    seconds: float = 1.5


@dataclasses.dataclass(frozen=True)
class Row:
    """Median seconds an expert; `share`: of the machine's limit; `bandwidth` in bytes a second, read between the turns."""

    shape: str
    load: int
    threads: int
    contender: str
    seconds: float
    nbytes: int
    flops: int
    bandwidth: float
    share: float

    def record(self) -> dict:
        return {
            **{name: getattr(self, name) for name in ("shape", "load", "threads", "contender")},
            "ms": round(self.seconds * 1e3, 4),
            "gb_s": round(self.nbytes / self.seconds / 1e9, 2),
            "gflop_s": round(self.flops / self.seconds / 1e9, 1),
            "bandwidth": round(self.bandwidth / 1e9, 1),
            "share": round(self.share, 3),
        }


class Machine:
    """Its limits by number of threads, measured."""

    def __init__(self, threads: Sequence[int]):
        self._library, self._isa = library(), next(iter(isas().values()))
        self._memory = np.ones(PROBE_BYTES // 4, np.float32)
        self.bandwidth = {n: statistics.median(self.read(n) for _ in range(7)) for n in threads}
        self.peak = {n: max(self._multiply(n) for _ in range(5)) for n in threads}

    def read(self, threads: int) -> float:
        """Bytes a second."""
        address, size = self._memory.ctypes.data, self._memory.nbytes
        self._library.probe_read(self._isa, address, 1 << 20, threads)  # wakes the helpers
        start = time.perf_counter()
        return self._library.probe_read(self._isa, address, size, threads) / (time.perf_counter() - start)

    def _multiply(self, threads: int) -> float:
        """Floating-point operations a second."""
        start = time.perf_counter()
        return self._library.probe_arithmetic(self._isa, 10**9, threads) / (time.perf_counter() - start)


def rest() -> None:
    """Returns when no thread of this process computes or spins any more (OpenBLAS's helpers spin for some 30 ms after a call, and the
    next contender took ten times as long); gives up after LONGEST_PAUSE. Linux may count processor time by ticks of 4 ms."""
    until = time.perf_counter() + LONGEST_PAUSE
    while time.perf_counter() < until:
        used = time.process_time()
        time.sleep(PAUSE)
        if time.process_time() - used < 0.1 * PAUSE:
            return


def race(contenders: list[Contender], shape: Shape, load: int, threads: int, machine: Machine, seconds: float):
    """-> rows, one a contender."""
    x = np.random.default_rng(load).standard_normal((load, shape.width), np.float32)
    bursts, times, reads = [], [[] for _ in contenders], []
    for contender in contenders:
        contender.set_threads(threads)
        contender.run(0, x)
        start = time.perf_counter()
        contender.run(1, x)
        took = time.perf_counter() - start
        bursts.append(max(1, min(contender.count - 1, math.ceil(BURST_SECONDS / took))))
    deadline, turn = time.perf_counter() + seconds, 0
    while turn < TURNS[0] or (turn < TURNS[1] and time.perf_counter() < deadline):
        rest()
        reads.append(machine.read(threads))
        for i, contender in enumerate(contenders):
            place = turn * (bursts[i] + 1)
            contender.set_threads(threads)
            rest()
            contender.run(place % contender.count, x)
            start = time.perf_counter()
            for j in range(bursts[i]):
                contender.run((place + 1 + j) % contender.count, x)
            times[i].append((time.perf_counter() - start) / bursts[i])
        turn += 1
    bandwidth, flops = statistics.median(reads), shape.flops(load)
    rows = []
    for contender, samples in zip(contenders, times):
        taken = statistics.median(samples)
        limit = max(contender.nbytes / bandwidth, flops / machine.peak[threads])
        rows.append(
            Row(shape.name, load, threads, contender.name, taken, contender.nbytes, flops, bandwidth, limit / taken)
        )
    return rows


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
    return row.nbytes / row.seconds / row.bandwidth


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


def run(options: Options, say: Callable[[str], None] = print) -> dict:
    """Measures, says a table, returns the record."""
    machine = Machine(options.threads)
    for n in options.threads:
        say(
            f"limits on {n} thread{'s' * (n > 1)}: reads {machine.bandwidth[n] / 1e9:.1f} GB/s, "
            f"multiply-adds {machine.peak[n] / 1e9:.0f} GFLOP/s ({next(iter(isas()))})"
        )
    rows, absent = [], {}
    for shape in options.shapes:
        weights, contenders = Weights(shape), []
        try:
            contenders += [native(format, weights) for format in options.formats]
            for peer in options.peers:
                try:
                    contenders += peers_of(peer, weights)
                except UserError as error:
                    absent[peer] = str(error)
            for threads in options.threads:
                for load in options.loads:
                    found = race(contenders, shape, load, threads, machine, options.seconds)
                    _table(found, say)
                    rows += found
        finally:
            for contender in contenders:
                contender.close()
        del weights, contenders
    for peer, why in absent.items():
        say(f"{peer}: absent ({why})")
    most = max(options.threads)
    at_most = [row for row in rows if row.threads == most]
    judged = [judge(bar, at_most, [shape.name for shape in SHAPES]) for bar in bars(machine.peak[most])]
    for result in judged:
        value = "not measured" if result["value"] is None else f"{result['value']:.2f}"
        say(
            f"{'met  ' if result['met'] else 'UNMET'} {result['bar']}: {value} (bar {result['need']}, aim {result['aim']})"
        )
    return {
        "bandwidth_gb_s": {n: round(value / 1e9, 1) for n, value in machine.bandwidth.items()},
        "peak_gflop_s": {n: round(value / 1e9) for n, value in machine.peak.items()},
        "isa": next(iter(isas())),
        "rows": [row.record() for row in rows],
        "absent": absent,
        "bars": judged,
    }


def _table(rows: list[Row], say: Callable[[str], None]) -> None:
    first = rows[0]
    say(
        f"\n{first.shape}, load {first.load}, {first.threads} thread{'s' * (first.threads > 1)}: "
        f"{first.bandwidth / 1e9:.1f} GB/s between the turns"
    )
    for row in sorted(rows, key=lambda row: row.seconds):
        one = row.record()
        say(
            f"  {row.contender:22} {one['ms']:10.3f} ms {one['gb_s']:7.1f} GB/s {one['gflop_s']:8.1f} GFLOP/s {row.share:6.2f} of the limit"
        )


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Names of SHAPES or DxF, separated by commas."""
    known = {shape.name: shape for shape in SHAPES}
    found = []
    for part in text.split(","):
        sizes = part.split("x")
        if part in known:
            found.append(known[part])
        elif len(sizes) == 2 and all(size.isdigit() and int(size) for size in sizes):
            found.append(Shape(part, int(sizes[0]), int(sizes[1])))
        else:
            raise UserError(f"--shapes {part!r}: say {', '.join(known)} or widths like 1024x512")
    return tuple(found)
