"""One link of the virtual machine: transfers of one size, first come, first served, slower while the CPU computes.

What a transfer means is what `decide.schedule.problem` says: it goes on at one over `costs.transfer(True)` a second
while the CPU computes and at one over `costs.transfer()` otherwise; the rate changes exactly when the CPU stops, in the
middle of a transfer if need be.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator
from typing import Any

Key = tuple[str, int, int]


@dataclasses.dataclass(slots=True)
class _Transfer:
    key: Key
    issued: float
    left: float = 1.0  # of it, down to 0
    began: float | None = None


class LinkLane:
    """Args: costs: seconds of a transfer, beside a computing CPU and alone.

    Attributes: `busy`: seconds spent transferring; `cpu_until`: when the CPU, computing since the time advanced to,
    will stop.
    """

    def __init__(self, costs: Any):
        self._beside, self._alone = costs.transfer(True), costs.transfer(False)
        self._queue: deque[_Transfer] = deque()
        self._at = 0.0
        self.cpu_until = self.busy = 0.0

    def __len__(self) -> int:
        return len(self._queue)

    def keys(self) -> Iterator[Key]:
        """What is queued, in order."""
        return (job.key for job in self._queue)

    def send(self, key: Key, issued: float) -> None:
        self._queue.append(_Transfer(key, issued))

    def clear(self) -> None:
        self._queue.clear()

    def finish_first(self) -> tuple[Key, float, float]:
        """Carries the first transfer to its end: (key, begin, end)."""
        job = self._queue.popleft()
        start = max(self._at, job.issued)
        self._at = end = self._end(start, job.left)
        self.busy += end - start
        return job.key, start if job.began is None else job.began, end

    def next_end(self) -> float:
        """When the first transfer of the queue ends if the CPU stops when it should."""
        job = self._queue[0]
        return self._end(max(self._at, job.issued), job.left)

    def advance(self, until: float) -> list[tuple[Key, float, float]]:
        """Moves on to `until`; the transfers that end by then as (key, begin, end)."""
        done: list[tuple[Key, float, float]] = []
        while self._queue:
            job = self._queue[0]
            start = max(self._at, job.issued)
            if start >= until:
                break
            if self._end(start, job.left) <= until:
                done.append(self.finish_first())
                continue
            if job.began is None:
                job.began = start
            beside = max(0.0, min(self.cpu_until, until) - start)
            job.left -= beside / self._beside + (until - start - beside) / self._alone
            self.busy += until - start
            self._at = until
        return done

    def _end(self, start: float, left: float) -> float:
        stop = self.cpu_until
        if start >= stop:
            return start + left * self._alone
        end = start + left * self._beside
        return end if end <= stop else stop + (left - (stop - start) / self._beside) * self._alone
