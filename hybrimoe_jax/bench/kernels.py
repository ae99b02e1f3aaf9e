"""`bench kernels`: one SwiGLU expert at a time, by our native kernels and by the peers, in turns.

Weights come from memory.

The machine's limits come first, by the native library's own loops: read bandwidth (whole vectors, summed, as one stream
a thread or as four, whichever is faster) and the multiply-adds that registers alone can do. A row's limit is the larger
of its bytes over that bandwidth and its operations over that peak. Formats with quantised activations multiply bytes,
for which the float32 peak is no limit, so theirs can pass 1 at large loads.

In every turn each contender computes a burst of experts, then the others have theirs. The first of a burst, where one
is short, is unmeasured: it wakes the threads. At small loads memory is the limit and a virtual machine's bandwidth may
halve from one second to the next, so memory is read before and after each burst; at large ones between the turns. Rows
are medians of the turns. Before each burst the threads of the contender before have gone to sleep.

Ratios are geometric means over the shapes and loads at the most threads, against the
fastest of the peers where they have any.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from hybrimoe_jax.bench.kernel_contenders import SHAPES, Contender, Shape, Weights, native, peers_of
from hybrimoe_jax.bench.kernel_ratios import Row, mean_ratio, ratios
from hybrimoe_jax.errors import UserError, shown
from hybrimoe_jax.host_kernels.native.library import isas, library

LOADS = (1, 2, 4, 8, 32, 128)
FORMATS = (
    *("f32", "bf16"),
    *("int8-g32-a8", "int8-g128-a8", "int8-g64", "int4-g32-a8", "int4-g64-a8", "int4-g64", "int4z-g64-a8"),
)
PROBE_BYTES = 192 << 20
STREAMS = (1, 4)
"""In which a thread may read memory."""
BURST_SECONDS = 0.004
LONG = 0.05
"""Seconds of a call from which on what came before it does not matter."""
READ_EACH = 8
"""The largest load at which memory is read around each burst."""
PAUSE, LONGEST_PAUSE = 0.012, 0.3
TURNS = (3, 25)  # at least, at most


@dataclasses.dataclass(frozen=True)
class Options:
    """What is timed, and for how long.

    `seconds`: of each shape, load and number of threads, all contenders together, beyond the least number of turns.
    """

    peers: tuple[str, ...] = ()
    formats: tuple[str, ...] = FORMATS
    shapes: tuple[Shape, ...] = SHAPES
    loads: tuple[int, ...] = LOADS
    threads: tuple[int, ...] = (1, 2)
    seconds: float = 1.5


class Machine:
    """Its limits by number of threads, measured."""

    def __init__(self, threads: Sequence[int]):
        self._library, self._isa = library(), next(iter(isas().values()))
        self._memory = np.ones(PROBE_BYTES // 4, np.float32)
        self.bandwidth, self.streams = {}, {}
        for n in threads:
            found = {ways: [] for ways in STREAMS}
            for _ in range(7):
                for ways in STREAMS:
                    found[ways].append(self._read(n, ways))
            median = {ways: statistics.median(rates) for ways, rates in found.items()}
            self.streams[n] = max(median, key=median.__getitem__)
            self.bandwidth[n] = median[self.streams[n]]
        self.peak = {n: max(self._multiply(n) for _ in range(5)) for n in threads}

    def read(self, threads: int) -> float:
        """Bytes a second, in the way that was the faster."""
        return self._read(threads, self.streams[threads])

    def _read(self, threads: int, streams: int) -> float:
        address, size, several = self._memory.ctypes.data, self._memory.nbytes, streams > 1
        self._library.probe_read(self._isa, address, 1 << 20, threads, several)  # wakes the helpers
        start = time.perf_counter()
        return self._library.probe_read(self._isa, address, size, threads, several) / (time.perf_counter() - start)

    def _multiply(self, threads: int) -> float:
        """Floating-point operations a second."""
        start = time.perf_counter()
        return self._library.probe_arithmetic(self._isa, 10**9, threads) / (time.perf_counter() - start)


def rest() -> None:
    """Returns when no thread of this process computes or spins any more; gives up after LONGEST_PAUSE.

    OpenBLAS's helpers spin for some 30 ms after a call, and the next contender took ten times as long. Linux may count
    processor time by ticks of 4 ms.
    """
    until = time.perf_counter() + LONGEST_PAUSE
    while time.perf_counter() < until:
        used = time.process_time()
        time.sleep(PAUSE)
        if time.process_time() - used < 0.1 * PAUSE:
            return


def race(contenders: list[Contender], shape: Shape, load: int, threads: int, machine: Machine, seconds: float):
    """-> rows, one a contender."""
    x = np.random.default_rng(load).standard_normal((load, shape.width), np.float32)
    bursts, long, times, reads = [], [], [[] for _ in contenders], [[] for _ in contenders]
    for contender in contenders:
        contender.set_threads(threads)
        contender.run(0, x)
        start = time.perf_counter()
        contender.run(1, x)
        took = time.perf_counter() - start
        bursts.append(max(1, min(contender.count - 1, math.ceil(BURST_SECONDS / took))))
        long.append(took > LONG)
    deadline, turn = time.perf_counter() + seconds, 0
    while turn < TURNS[0] or (turn < TURNS[1] and time.perf_counter() < deadline):
        rest()
        read = machine.read(threads)
        for i, contender in enumerate(contenders):
            place = turn * (bursts[i] + 1)
            contender.set_threads(threads)
            rest()
            if load <= READ_EACH:
                read = machine.read(threads)
            if not long[i]:
                contender.run(place % contender.count, x)
            start = time.perf_counter()
            for j in range(bursts[i]):
                contender.run((place + 1 + j) % contender.count, x)
            times[i].append((time.perf_counter() - start) / bursts[i])
            if load <= READ_EACH:
                rest()
                read = (read + machine.read(threads)) / 2
            reads[i].append(read)
        turn += 1
    flops, peak = shape.flops(load), machine.peak[threads]
    rows = []
    for contender, taken, read in zip(contenders, times, reads, strict=True):
        size = contender.nbytes
        of_bandwidth = statistics.median(size / b / t for b, t in zip(read, taken, strict=True))
        share = statistics.median(max(size / b, flops / peak) / t for b, t in zip(read, taken, strict=True))
        measured = (statistics.median(taken), size, flops, statistics.median(read), of_bandwidth, share)
        rows.append(Row(shape.name, load, threads, contender.name, *measured))
    return rows


def run(options: Options, say: Callable[[str], None] = print) -> dict:
    """Measures, says a table, returns the record."""
    machine = Machine(options.threads)
    for n in options.threads:
        say(
            f"limits on {n} thread{'s' * (n > 1)}: reads {machine.bandwidth[n] / 1e9:.1f} GB/s "
            f"({machine.streams[n]} stream{'s' * (machine.streams[n] > 1)} a thread), "
            f"multiply-adds {machine.peak[n] / 1e9:.0f} GFLOP/s ({next(iter(isas()))})"
        )
    say(
        "of limit: the time that the weights' bytes take to read, or the multiply-adds, whichever is longer, "
        "over the time taken"
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
                    _table(shape, found, absent, say)
                    rows += found
        finally:
            for contender in contenders:
                contender.close()
        del weights, contenders
    most = max(options.threads)
    at_most = [row for row in rows if row.threads == most]
    names = [shape.name for shape in SHAPES]
    means = {ratio.name: mean_ratio(ratio, at_most, names) for ratio in ratios(machine.peak[most])}
    say(f"\nratios, geometric means over the shapes, {most} thread{'s' * (most > 1)}")
    for name, mean in means.items():
        say(f"  {name:34} {'not measured' if mean is None else f'{mean:.2f}':>12}")
    return {
        "bandwidth_gb_s": {n: round(value / 1e9, 1) for n, value in machine.bandwidth.items()},
        "peak_gflop_s": {n: round(value / 1e9) for n, value in machine.peak.items()},
        "isa": next(iter(isas())),
        "rows": [row.record() for row in rows],
        "absent": absent,
        "ratios": {name: mean and round(mean, 3) for name, mean in means.items()},
    }


def _table(shape: Shape, rows: list[Row], absent: dict[str, str], say: Callable[[str], None]) -> None:
    first, bandwidth = rows[0], statistics.median(row.bandwidth for row in rows)
    say(
        f"\n{shape.name} {shape.width}x{shape.hidden}, load {first.load}, {first.threads} "
        f"thread{'s' * (first.threads > 1)}"
        f" (memory reads at {bandwidth / 1e9:.1f} GB/s meanwhile)"
    )
    say(f"  {'':22} {'ms':>10} {'GB/s':>8} {'GFLOP/s':>9} {'of limit':>9}")
    for row in sorted(rows, key=lambda row: row.seconds):
        one = row.record()
        say(f"  {row.contender:22} {one['ms']:10.3f} {one['gb_s']:8.1f} {one['gflop_s']:9.1f} {row.share:9.2f}")
    for peer, why in absent.items():
        say(f"  {peer}: absent ({why})")


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Names of SHAPES or DxF, separated by commas."""
    known = {shape.name: shape for shape in SHAPES}
    found = []
    for part in text.split(","):
        sizes = part.split("x")
        if part in known:
            found.append(known[part])
        elif len(sizes) == 2 and all(size.isdecimal() and int(size) for size in sizes):
            found.append(Shape(part, int(sizes[0]), int(sizes[1])))
        else:
            raise UserError(f"--shapes {shown(part)}: say {', '.join(known)} or widths like 1024x512")
    return tuple(found)
