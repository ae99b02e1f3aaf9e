"""The link of a paced device: real copies, each of which lasts as long as a profile says.

`machine.link.LinkLane` says when a transfer ends: first come, first served, demand fetches and prefetches in one queue,
slower while the host lane computes. The link's own thread copies, then waits for that moment; when the host lane starts
to compute, the end of the transfer under way is worked out anew. It copies in the middle of the transfer's time: a
link's engine takes no interpreter, and the thread that has just issued the transfer needs it to dispatch programs.
"""

from __future__ import annotations

import threading
import time

import jax

from hybrimoe_jax.engine.lanes.clock import PacedClock
from hybrimoe_jax.engine.lanes.host_memory import HostMemory
from hybrimoe_jax.engine.lanes.transfer import Link, Transfer
from hybrimoe_jax.engine.programs import Device
from hybrimoe_jax.formats.packing import HostExpert
from hybrimoe_jax.machine.link import LinkLane
from hybrimoe_jax.models.moe import DeviceExpert


class PacedLink(Link):
    """See `Link`. Where the profile says that copies wait, each waits for the device's work queued before it."""

    def __init__(self, device: Device, clock: PacedClock, memory: HostMemory | None = None):
        costs = clock.costs
        self._lane, self._waits, self._late = LinkLane(costs), costs.copies_wait, clock.link
        self._changed, self._ended = threading.Condition(), []
        if clock.host is not None:
            clock.host.watchers.append(self._cpu_computes)
        super().__init__(device, clock, memory)

    def fetch(self, layer: int, expert: int, weights: HostExpert, after: jax.Array | None = None) -> Transfer:
        """A demand fetch, which queues behind everything under way; `after` as of `Link.fetch`."""
        transfer = Transfer(layer, expert, self.clock.now(), weights, after)
        self._worker.put(transfer)
        return transfer

    def arrived(self, transfer: Transfer) -> DeviceExpert:
        """The arrays of a demand fetch, once it has landed."""
        self._join(transfer)
        if transfer.error is not None:
            raise transfer.error
        return transfer.staged

    def _copy(self, transfer: Transfer) -> None:
        issued = transfer.issued
        if self._waits and transfer.after is not None:
            jax.block_until_ready(transfer.after)
            issued = self.clock.now()
        with self._changed:
            self._lane.send(("", transfer.layer, transfer.expert), issued)
            half = (self._lane.next_end() - self.clock.now()) / 2
        time.sleep(max(0.0, half))
        try:
            super()._copy(transfer)
        except BaseException:
            self._clear()
            raise
        if transfer.done.is_set():  # given up meanwhile: another thread has the lane
            return
        transfer.began, end = self._hold()
        self._late.note(max(0.0, self.clock.now() - end))

    def _give_up(self, stuck: Transfer) -> None:
        super()._give_up(stuck)
        self._clear()

    def _lost(self, transfer: Transfer, error: BaseException) -> None:
        self._clear()
        super()._lost(transfer, error)

    def _clear(self) -> None:
        with self._changed:
            self._lane.clear()
            self._ended.clear()

    def _hold(self) -> tuple[float, float]:
        """Waits for the end of the one transfer in the lane: when it began and ended."""
        with self._changed:
            while True:
                self._ended += self._lane.advance(self.clock.now())
                if self._ended:
                    _, began, end = self._ended.pop()
                    return began, end
                self._changed.wait(max(0.0, self._lane.next_end() - self.clock.now()))

    def _cpu_computes(self, now: float, until: float) -> None:
        with self._changed:
            self._ended += self._lane.advance(now)
            self._lane.cpu_until = until
            self._changed.notify()
