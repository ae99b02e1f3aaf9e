"""The CPU lane: host experts on persistent worker threads, beside whatever the device is doing.

A kernel with `teams` gets a layer's experts in one call and spreads them over threads of its own; with others each
worker takes a share of the experts. Kernels release the interpreter lock, so the thread that drives the device goes on
dispatching meanwhile. Work too small to be worth waking a thread runs inline when the result is asked for. Imports no
jax.
"""

from __future__ import annotations

import dataclasses
import threading

import numpy as np

from hybrimoe_jax.decide.costs import Costs
from hybrimoe_jax.engine.lanes.clock import WallClock
from hybrimoe_jax.engine.lanes.host_pace import HostPace
from hybrimoe_jax.engine.lanes.workers import PATIENCE, SLICES, Worker, ended
from hybrimoe_jax.errors import DeviceError
from hybrimoe_jax.host_kernels.kernel import HostKernel, run_experts


@dataclasses.dataclass
class HostWork:
    """Some experts of one layer.

    `tokens` and `weights` hold, per expert, its rows of x [N, D] and their routing weights.
    """

    layer: int
    experts: list[int]
    x: np.ndarray
    tokens: list[np.ndarray]
    weights: list[np.ndarray]


@dataclasses.dataclass
class Part:
    """One worker's share: its partial sum and when each expert ran, (expert, start, end) on the clock.

    `until`: a paced share ends then, and its spans are given.
    """

    work: HostWork
    out: np.ndarray
    threads: int = 1
    until: float | None = None
    spans: list[tuple[int, float, float]] = dataclasses.field(default_factory=list)
    error: BaseException | None = None
    done: threading.Event = dataclasses.field(default_factory=threading.Event)


class HostExecutor:
    """Owns the workers and the kernel's handles.

    Args:
      kernel: the host kernel.
      weights: (layer, expert) -> HostExpert.
      workers: threads in all; work uses `usual_workers` of them (the other cores are the device's) unless it is
        `wide`.
      pace: how long experts last; None: as long as they take.

    Attributes: `detailed`: time every expert on its own (for the timeline) instead of every share. `expected`: the
    seconds that waking a thread takes, and the costs of experts, once they are known. Work that takes PATIENCE times as
    long is given up.
    """

    detailed = False
    expected: tuple[float, Costs] | None = None

    def __init__(
        self,
        kernel: HostKernel,
        weights,
        workers: int,
        usual_workers: int,
        clock: WallClock,
        pace: HostPace | None = None,
    ):
        self.kernel, self.clock, self.pace = kernel, clock, pace
        self.usual_workers = max(1, usual_workers)
        self._weights = weights
        self._handles: dict[tuple[int, int], object] = {}
        self._workers = [Worker(self._serve, f"host-experts-{index}") for index in range(max(1, workers))]

    def handle(self, layer: int, expert: int):
        key = (layer, expert)
        found = self._handles.get(key)
        if found is None:
            found = self._handles[key] = self.kernel.prepare(self._weights(layer, expert))
        return found

    def submit(self, work: HostWork, inline: bool = False, wide: bool = False) -> Pending:
        """Starts the work (or, inline, leaves it for `Pending.result`); `wide`: on all workers.

        Paced work is never inline: it would hold up the device.
        """
        threads = len(self._workers) if wide else self.usual_workers
        if inline and self.pace is None:
            return Pending(self, [Part(work, np.zeros_like(work.x), threads)], inline=True)
        shares = [work] if self.kernel.teams else self._shares(work, threads)
        parts = [Part(share, np.zeros_like(work.x), threads) for share in shares]
        if self.pace is not None and work.experts:
            spans = self.pace.start(work.experts, [len(rows) for rows in work.tokens], wide)
            parts[0].spans = spans
            for part in parts:
                part.until = spans[-1][-1]
        for part, worker in zip(parts, self._workers, strict=False):
            worker.put(part)
        return Pending(self, parts)

    def compute(self, part: Part) -> None:
        work, now = part.work, self.clock.now
        handles = [self.handle(work.layer, expert) for expert in work.experts]
        if self.pace is not None and part.until is not None:
            run_experts(self.kernel, handles, work.x, work.tokens, work.weights, part.out, part.threads)
            self.pace.wait(part.until)
            return
        if not self.detailed:
            start = now()
            run_experts(self.kernel, handles, work.x, work.tokens, work.weights, part.out, part.threads)
            part.spans.append((-1, start, now()))
            return
        for expert, handle, rows, mix in zip(work.experts, handles, work.tokens, work.weights, strict=True):
            start = now()
            run_experts(self.kernel, [handle], work.x, [rows], [mix], part.out, part.threads)
            part.spans.append((expert, start, now()))

    def join(self, number: int, part: Part) -> None:
        """Waits until the share of a worker is done, and raises what it raised; DeviceError where it does not end."""
        if self.expected is None:
            part.done.wait()
        else:
            wake_s, costs = self.expected
            if not part.done.wait(PATIENCE * wake_s / SLICES):  # most are done by then: nothing to add up
                seconds = sum(costs.cpu(len(rows), first=not i) for i, rows in enumerate(part.work.tokens))
                patience_s = PATIENCE * (wake_s + seconds)
                if not ended(part.done, patience_s):
                    self._workers[number].abandon()
                    raise DeviceError(
                        f"the host experts of MoE layer {part.work.layer} have not been computed in {patience_s:.3g} "
                        f"s, {PATIENCE:,} times what they take: the host kernel may hang"
                    )
        if part.error is not None:
            raise part.error

    def close(self) -> None:
        for worker in self._workers:
            worker.stop()

    def _shares(self, work: HostWork, workers: int) -> list[HostWork]:
        """Longest first onto the least loaded worker."""
        if workers == 1 or len(work.experts) <= 1:
            return [work]
        picks: list[list[int]] = [[] for _ in range(min(workers, len(work.experts)))]
        filled = [0] * len(picks)
        for i in sorted(range(len(work.experts)), key=lambda i: -len(work.tokens[i])):
            least = filled.index(min(filled))
            picks[least].append(i)
            filled[least] += len(work.tokens[i])
        return [
            HostWork(
                work.layer,
                [work.experts[i] for i in pick],
                work.x,
                [work.tokens[i] for i in pick],
                [work.weights[i] for i in pick],
            )
            for pick in picks
        ]

    def _serve(self, part: Part) -> None:
        try:
            self.compute(part)
        except BaseException as error:  # handed to the waiting thread, which raises it
            part.error = error
        part.done.set()


class Pending:
    """Host work under way."""

    def __init__(self, executor: HostExecutor, parts: list[Part], inline: bool = False):
        self._executor, self.parts, self._inline = executor, parts, inline

    def result(self) -> np.ndarray:
        """The sum over experts, [N, D], a fresh array each time (jax may alias it). Raises what a worker raised."""
        for number, part in enumerate(self.parts):
            if self._inline:
                self._executor.compute(part)
            else:
                self._executor.join(number, part)
        total = self.parts[0].out
        for part in self.parts[1:]:
            total += part.out
        return total

    def busy(self) -> float:
        """Seconds the workers computed, added up over workers; call after `result`."""
        return sum(end - start for part in self.parts for _, start, end in part.spans)
