"""Experts on their way from host memory to their places on the device.

A transfer is one copy into a place that nobody reads: that of an expert which left, a staging one, or a spare one that
a prefetch becomes resident in by changing names. It waits for the last program that read the place. `ThreadLink`: a
thread of this machine copies; small experts are copied by whoever asks, since waking a thread costs more. `PacedLink`:
copies last as long as a profile says. `CudaLink`: copies from pinned memory on a stream of their own, with events.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from hybrimoe_jax.baselines.torch_experts import Bank
from hybrimoe_jax.baselines.torch_lanes import Program, now
from hybrimoe_jax.engine.lanes.clock import PacedClock
from hybrimoe_jax.engine.lanes.workers import PATIENCE, Worker, ended, tell_lost
from hybrimoe_jax.errors import DeviceError

INLINE_WAKES = 4
"""Copies shorter than this many wake-ups of a thread are made by the thread that asks."""


class Transfer:
    """Expert `expert` of MoE layer `layer` on its way to `place`.

    Args: after: a program that still reads what is there, or None. behind: one that copies must wait for where the
    machine's copies wait for compute.
    """

    def __init__(self, layer: int, expert: int, place: int, after: Program | None, behind: Program | None = None):
        self.layer, self.expert, self.place, self.after, self.behind = layer, expert, place, after, behind
        self.issued, self.began, self.landed = now(), 0.0, 0.0
        self.done = threading.Event()
        self.event: Any = None  # a GPU's
        self.error: BaseException | None = None
        self.link: ThreadLink | None = None  # that has it

    @property
    def seconds(self) -> float:
        """How long it held the link, once it has landed."""
        return self.landed - self.began

    def join(self) -> None:
        """Waits for its end, well or not. Its link gives it up where that takes too long."""
        if self.event is not None:
            self.event.synchronize()
        for program in (self.after, self.behind):  # which it waits for itself, and which may take long
            if program is not None:
                program.join()
        if self.link is not None and not ended(self.done, self.link.patience_s):
            self.link.give_up(self)

    def wait(self) -> None:
        self.join()
        if self.error is not None:
            raise self.error

    def wait_on(self, stream: Any) -> None:
        """Has a GPU's stream wait for it."""
        stream.wait_event(self.event)


class ThreadLink:
    """Args: host: by MoE layer, the bank of its experts in host memory. slots: the device's.

    Attributes: `inline_s`: copies expected to be shorter are made at once, by `expected_s` (set once measured);
    `busy_s`: seconds of copies so far; `patience_s`: how long a copy may take before it is given up, with all that is
    under way, and a new thread goes on (None: as long as it takes).
    """

    patience_s: float | None = None

    def __init__(self, host: list[Bank], slots: Bank):
        self.host, self.slots = host, slots
        self.inline_s = self.expected_s = self.busy_s = 0.0
        self._in_flight: dict[tuple[int, int], Transfer] = {}
        self._latest: Transfer | None = None
        self._worker = Worker(self._serve, "torch-link", self._lost)

    def fetch(self, transfer: Transfer) -> Transfer:
        """Starts a demand fetch."""
        if self.expected_s < self.inline_s and not self._in_flight:
            self._serve(transfer)
        else:
            self._put(transfer)
        return transfer

    def prefetch(self, transfer: Transfer) -> None:
        self._put(transfer)
        self._in_flight[transfer.layer, transfer.expert] = transfer

    def _put(self, transfer: Transfer) -> None:
        transfer.link = self
        self._latest = transfer  # first: an interrupt may come at any line, and `drain` waits for it
        self._worker.put(transfer)

    @property
    def busy(self) -> bool:
        """Whether any prefetch has not been taken out."""
        return bool(self._in_flight)

    def landed(self) -> list[Transfer]:
        """Takes out the prefetches that have landed, oldest first."""
        ready = [transfer for transfer in self._in_flight.values() if self._is_there(transfer)]
        for transfer in ready:
            self._take(transfer)
        return ready

    def wait(self, layer: int, expert: int) -> Transfer:
        """Waits for one prefetch and takes it out."""
        transfer = self._in_flight[layer, expert]
        transfer.wait()
        return self._take(transfer)

    def drain(self) -> None:
        """Waits for everything under way, demand fetches too, and forgets it."""
        for transfer in (*self._in_flight.values(), self._latest):
            if transfer is not None:
                transfer.join()
        self._in_flight.clear()
        self._latest = None

    def give_up(self, stuck: Transfer) -> None:
        """Ends what is under way with an error. A copy that comes back later is not made."""
        error = DeviceError(
            f"expert {stuck.expert} of MoE layer {stuck.layer} has not reached the device in {self.patience_s:.3g} s, "
            f"{PATIENCE:,} times what a transfer takes: the device may hang"
        )
        self._worker.abandon()
        for transfer in (stuck, *self._in_flight.values(), self._latest):
            tell_lost(transfer, error)

    def close(self) -> None:
        self._worker.stop()

    def _is_there(self, transfer: Transfer) -> bool:
        return transfer.done.is_set()

    def _take(self, transfer: Transfer) -> Transfer:
        del self._in_flight[transfer.layer, transfer.expert]
        if transfer.error is not None:
            raise transfer.error
        return transfer

    def _serve(self, transfer: Transfer) -> None:
        try:
            if transfer.after is not None:
                transfer.after.join()
            transfer.began = now()
            self._copy(transfer)
            transfer.landed = now()
            self.busy_s += transfer.seconds
        except BaseException as error:  # handed to whoever waits for it
            transfer.error = error
        transfer.done.set()

    def _lost(self, transfer: Transfer, error: BaseException) -> None:
        """The link's thread has died and left a transfer undone."""
        tell_lost(transfer, error)

    def _copy(self, transfer: Transfer) -> None:
        if not transfer.done.is_set():  # else it was given up: its place may be another's
            with torch.inference_mode():
                self.slots.data[transfer.place].copy_(self.host[transfer.layer].data[transfer.expert])


class PacedLink(ThreadLink):
    """Real copies that last as a profile says: first come, first served, slower while the host lane computes."""

    def __init__(self, host: list[Bank], slots: Bank, clock: PacedClock):
        self.pace, self._waits = clock.link, clock.costs.copies_wait
        super().__init__(host, slots)

    def fetch(self, transfer: Transfer) -> Transfer:
        self._put(transfer)
        return transfer

    def give_up(self, stuck: Transfer) -> None:
        super().give_up(stuck)
        self.pace.clear()

    def _serve(self, transfer: Transfer) -> None:
        try:
            issued = transfer.issued
            for program in (transfer.after, transfer.behind if self._waits else None):
                if program is not None and program.running:
                    program.join()
                    issued = now()
            self.pace.start(transfer.layer, transfer.expert, issued)
            self._copy(transfer)
            if not transfer.done.is_set():  # else it was given up: another thread has the lane
                transfer.began, transfer.landed = self.pace.wait()
                self.busy_s += transfer.seconds
        except BaseException as error:  # handed to whoever waits for it
            self.pace.clear()
            transfer.error = error
        transfer.done.set()

    def _lost(self, transfer: Transfer, error: BaseException) -> None:
        self.pace.clear()
        super()._lost(transfer, error)


class CudaLink(ThreadLink):
    """Copies on a stream of their own; a program that needs one waits for its event on the device."""

    def __init__(self, host: list[Bank], slots: Bank):
        super().__init__(host, slots)
        self._stream = torch.cuda.Stream()

    def fetch(self, transfer: Transfer) -> Transfer:
        self._put(transfer)
        return transfer

    def _put(self, transfer: Transfer) -> None:
        self._latest = transfer
        self._serve(transfer)

    def _serve(self, transfer: Transfer) -> None:
        if transfer.after is not None and transfer.after.event is not None:
            self._stream.wait_event(transfer.after.event)
        transfer.began = now()
        with torch.cuda.stream(self._stream):
            source = self.host[transfer.layer].data[transfer.expert]
            self.slots.data[transfer.place].copy_(source, non_blocking=True)
            transfer.event = self._stream.record_event()
        transfer.done.set()

    def _is_there(self, transfer: Transfer) -> bool:
        return transfer.event.query()

    def _take(self, transfer: Transfer) -> Transfer:
        transfer.landed = now()
        self.busy_s += transfer.seconds
        return super()._take(transfer)
