"""When the transfers of a paced device end: first come, first served, slower while its host experts are computed.

`machine.link.LinkLane` says when; the thread that copies waits for it. Imports no jax.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable

from hybrimoe_jax.engine.lanes.host_pace import HostPace
from hybrimoe_jax.engine.lanes.pacing import Lateness, sleep_until
from hybrimoe_jax.machine.costs import CostModel
from hybrimoe_jax.machine.link import LinkLane
from hybrimoe_jax.machine.profile import MachineCosts

SOON_S = 200e-6
"""So long before its end a transfer is waited for by the clock alone, which is more exact."""


class LinkPace:
    """One thread's transfers, one at a time.

    Args: costs: seconds, as they are to last. now: the clock. host: the host experts that slow them, if there are any.
    Attributes: late: how well ends were kept.
    """

    def __init__(self, costs: CostModel | MachineCosts, now: Callable[[], float], host: HostPace | None):
        self.now, self.late = now, Lateness()
        self._lane, self._changed = LinkLane(costs), threading.Condition()
        self._ended: list[tuple[Hashable, float, float]] = []
        if host is not None:
            host.watchers.append(self._cpu_computes)

    def start(self, layer: int, expert: int, issued: float) -> None:
        """A transfer starts, and this waits for the middle of its time.

        There the copy is done: a link's engine takes no interpreter, and the thread that has just issued the transfer
        needs it to dispatch programs.
        """
        with self._changed:
            self._lane.send(("", layer, expert), issued)
            half = (self._lane.next_end() - self.now()) / 2
        time.sleep(max(0.0, half))

    def wait(self) -> tuple[float, float]:
        """Waits for the transfer's end: when it began and ended."""
        while True:
            with self._changed:
                self._ended += self._lane.advance(self.now())
                if self._ended:
                    _, began, end = self._ended.pop()
                    break
                end = self._lane.next_end()
                if self._changed.wait(max(0.0, end - SOON_S - self.now())):
                    continue  # the end may be another one now
            sleep_until(end)
        self.late.note(max(0.0, self.now() - end))
        return began, end

    def clear(self) -> None:
        """Forgets the transfer under way."""
        with self._changed:
            self._lane.clear()
            self._ended.clear()

    def _cpu_computes(self, now: float, until: float) -> None:
        with self._changed:
            self._ended += self._lane.advance(now)
            self._lane.cpu_until = until
            self._changed.notify()
