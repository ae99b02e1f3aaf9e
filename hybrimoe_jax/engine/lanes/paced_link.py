"""The link of a paced device: real copies in a thread of their own, each of which lasts as `LinkPace` says.

Demand fetches and prefetches stand in one queue.
"""

from __future__ import annotations

import jax

from hybrimoe_jax.engine.lanes.clock import PacedClock
from hybrimoe_jax.engine.lanes.host_memory import HostMemory
from hybrimoe_jax.engine.lanes.transfer import Link, Transfer
from hybrimoe_jax.engine.programs import Device
from hybrimoe_jax.formats.packing import HostExpert
from hybrimoe_jax.models.moe import DeviceExpert


class PacedLink(Link):
    """See `Link`. Where the profile says that copies wait, each waits for the device's work queued before it."""

    def __init__(self, device: Device, clock: PacedClock, memory: HostMemory | None = None):
        self._pace, self._waits = clock.link, clock.costs.copies_wait
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
        self._pace.start(transfer.layer, transfer.expert, issued)
        try:
            super()._copy(transfer)
        except BaseException:
            self._pace.clear()
            raise
        if not transfer.done.is_set():  # else it was given up meanwhile: another thread has the lane
            transfer.began, _ = self._pace.wait()

    def _give_up(self, stuck: Transfer) -> None:
        super()._give_up(stuck)
        self._pace.clear()

    def _lost(self, transfer: Transfer, error: BaseException) -> None:
        self._pace.clear()
        super()._lost(transfer, error)
