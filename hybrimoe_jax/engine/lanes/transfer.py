"""The link lane: host experts on their way to the device.

Whole layers that a prompt's chunk is streamed through cross it like prefetches, but go into no slot: the staged arrays
themselves are the buffer, which is freed when nobody holds them any more.

A demand fetch is issued and committed by the thread that owns the slots; data dependencies make its reader wait. A
prefetch is staged by the link's own thread and committed, at a layer boundary, only once it has landed. On the CPU
backend an aligned `device_put` would alias the host array; there the staged copy is made explicitly, so that a fetch
costs a real copy. A quantised expert is one buffer of bytes, the same on both sides: its fetch is one copy.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Mapping

import jax
import numpy as np

from hybrimoe_jax.engine.lanes.clock import WallClock
from hybrimoe_jax.engine.lanes.host_memory import HostMemory
from hybrimoe_jax.engine.lanes.workers import PATIENCE, SLICES, Worker, ended
from hybrimoe_jax.engine.programs import Device
from hybrimoe_jax.errors import DeviceError
from hybrimoe_jax.formats.packing import HostExpert
from hybrimoe_jax.formats.plain import aligned_copy
from hybrimoe_jax.models.moe import DeviceExpert


@dataclasses.dataclass
class Transfer:
    """A transfer under way; `staged` is set once it has landed on the device.

    `began`: when it got the link; `free`: when the link's thread was done with the one before.
    """

    layer: int
    expert: int
    issued: float
    weights: HostExpert
    after: jax.Array | None = None
    staged: DeviceExpert = dataclasses.field(init=False)
    began: float = 0.0
    free: float = 0.0
    landed: float = 0.0
    error: BaseException | None = None
    done: threading.Event = dataclasses.field(default_factory=threading.Event)

    @property
    def seconds(self) -> float:
        """How long it held the link, once it has landed: without the wait for transfers before it."""
        return self.landed - self.began


class Link:
    """Transfers from host memory to `device`. One worker thread, first come first served.

    `memory`: of the experts that it is given; it is closed with the link. Plain memory if None.

    Attributes: `patience_s`: how long a transfer may take before the link gives it up, with all that is under way, and
    goes on with a new thread; None: as long as it takes. `lends_arrays`: on the CPU backend a demand fetch gives the
    host's own arrays to the program that writes the slot; False: it is a copy as on any other device.
    """

    patience_s: float | None = None
    lends_arrays = True

    def __init__(self, device: Device, clock: WallClock, memory: HostMemory | None = None):
        self.device, self.clock, self.memory = device, clock, memory or HostMemory(device)
        self._copies = device.platform == "cpu"
        self._in_flight: dict[tuple[int, int], Transfer] = {}
        self._streamed: dict[int, dict[int, Transfer]] = {}  # by layer and expert
        self._gave_up = False
        self._oldest: tuple[int, int, float] | None = None
        self._seen_s = self._looked = self._free = 0.0
        self._worker = Worker(self._serve, "link", self._lost)

    def put(self, weights: HostExpert) -> DeviceExpert:
        """Demand fetch: device arrays, asynchronously.

        On the CPU backend the arrays of `weights` themselves, which are read-only: writing them into a slot is the
        copy, and a `device_put` of each before it takes five times as long as that for a small expert.
        """
        source = self.memory.source(weights)
        if self._copies and self.lends_arrays and self.memory.name != "pinned":
            return source
        return jax.device_put(source, self.memory.target)

    def fetch(self, layer: int, expert: int, weights: HostExpert, after: jax.Array | None = None) -> Transfer:
        """The same as a transfer whose arrays `arrived` gives. All of a layer's are issued before any is asked for.

        `after`: a small result, never donated, of the device's latest program. Only a link that says so waits for it.
        """
        transfer = Transfer(layer, expert, self.clock.now(), weights, after)
        transfer.staged = self.put(weights)
        return transfer

    def arrived(self, transfer: Transfer) -> DeviceExpert:
        """A demand fetch's arrays, which may still be on their way."""
        return transfer.staged

    def settle(self, array: jax.Array) -> None:
        """Waits for an array that a demand fetch was written to. DeviceError where that takes longer than it may.

        jax cannot wait for a limited time, so this looks at it again and again, after pauses of a tenth of the wait.
        The CPU backend's copies cannot hang, and pauses there cost a fetch 0.3 ms.
        """
        if self.patience_s is None or self._copies:
            jax.block_until_ready(array)
            return
        pause, waited = self.patience_s / PATIENCE, 0.0
        while not (array.is_deleted() or array.is_ready()):  # pyright: ignore[reportAttributeAccessIssue]  # as of read
            if waited >= self.patience_s:
                self._gave_up = True
                raise DeviceError(f"a demand fetch has not reached the device{self._limit()}")
            time.sleep(pause)
            waited += pause
            pause = min(0.1 * waited + pause, self.patience_s / SLICES)

    def prefetch(self, layer: int, expert: int, weights: HostExpert) -> None:
        transfer = Transfer(layer, expert, self.clock.now(), weights)
        self._worker.put(transfer)  # first: an interrupt may come at any line, and `drain` waits for all that is noted
        self._in_flight[layer, expert] = transfer

    def stream(self, layer: int, experts: Mapping[int, HostExpert]) -> None:
        """Starts to move a layer's experts into a buffer, in order."""
        now, noted = self.clock.now(), {}
        self._streamed[layer] = noted
        for expert, weights in experts.items():
            transfer = Transfer(layer, expert, now, weights)
            self._worker.put(transfer)
            noted[expert] = transfer

    def streamed(self, layer: int, expert: int) -> Transfer:
        """Waits for one expert of a layer under way to its buffer, and takes it out.

        The buffer's place is free once the arrays are dropped.
        """
        transfer = self._streamed[layer][expert]
        self._join(transfer)
        del self._streamed[layer][expert]
        if transfer.error is not None:
            raise transfer.error
        return transfer

    def end_stream(self, layer: int) -> float:
        """Frees what is left in a layer's buffer.

        Returns how many seconds the link took for what has landed of it; what is still on its way lands for nobody.
        """
        left = self._streamed.pop(layer, {}).values()
        return sum(transfer.seconds for transfer in left if transfer.done.is_set())

    @property
    def busy(self) -> bool:
        """Whether anything that was started has not been taken out."""
        return bool(self._in_flight or self._streamed)

    def moves(self, layer: int | None) -> bool:
        """Whether a prefetch for that MoE layer, or for any, has not been taken out."""
        return bool(self._in_flight) if layer is None else any(to == layer for to, _ in self._in_flight)

    def landed(self) -> list[Transfer]:
        """Takes out the prefetches that have landed since the last call, oldest first.

        DeviceError where one has been on its way for too long, though nobody waits for it: others stand behind it.
        """
        self._look_after()
        ready = [t for t in self._in_flight.values() if t.done.is_set()]
        for transfer in ready:
            self._take(transfer)
        return ready

    def wait(self, layer: int, expert: int) -> Transfer:
        """Waits for one prefetch and takes it out."""
        transfer = self._in_flight[layer, expert]
        self._join(transfer)
        return self._take(transfer)

    def drain(self) -> None:
        """Waits for everything under way and forgets it."""
        for transfers in (self._in_flight, *self._streamed.values()):
            for transfer in transfers.values():
                self._join(transfer)
        self._in_flight.clear()
        self._streamed.clear()

    def close(self) -> None:
        self.drain()
        self._worker.stop()
        if not self._gave_up:  # else a copy may still read it
            self.memory.close()

    def _join(self, transfer: Transfer) -> None:
        """Waits until a transfer has ended, well or not."""
        if not ended(transfer.done, self.patience_s):
            self._give_up(transfer)

    def _look_after(self) -> None:
        """Gives up the oldest prefetch once it has been seen under way for too long, in slices as of `_join`."""
        oldest, now = next(iter(self._in_flight.values()), None), self.clock.now()
        which = None if oldest is None else (oldest.layer, oldest.expert, oldest.issued)
        if which != self._oldest:
            self._oldest, self._seen_s = which, 0.0
        elif oldest is not None and self.patience_s is not None and not oldest.done.is_set():
            self._seen_s += min(now - self._looked, self.patience_s / SLICES)
            if self._seen_s >= self.patience_s:
                self._give_up(oldest)
        self._looked = now

    def _give_up(self, stuck: Transfer) -> None:
        error = DeviceError(
            f"expert {stuck.expert} of MoE layer {stuck.layer} has not reached the device{self._limit()}"
        )
        self._gave_up = True
        self._worker.abandon()
        for transfer in (stuck, *self._in_flight.values(), *(t for of in self._streamed.values() for t in of.values())):
            if not transfer.done.is_set():
                transfer.error = error
                transfer.done.set()

    def _limit(self) -> str:
        return f" in {self.patience_s:.3g} s, {PATIENCE:,} times what a transfer takes: the device may hang"

    def _take(self, transfer: Transfer) -> Transfer:
        del self._in_flight[transfer.layer, transfer.expert]
        if transfer.error is not None:
            raise transfer.error
        return transfer

    def _serve(self, transfer: Transfer) -> None:
        transfer.began, transfer.free = self.clock.now(), self._free
        try:
            self._copy(transfer)
        except BaseException as error:  # handed to the thread that commits, which raises it
            transfer.error = error
        transfer.landed = self._free = self.clock.now()
        transfer.done.set()

    def _lost(self, transfer: Transfer, error: BaseException) -> None:
        """The link's thread has died and left a transfer undone."""
        if not transfer.done.is_set():
            where = f"expert {transfer.expert} of MoE layer {transfer.layer}"
            transfer.error = DeviceError(f"{where} has not reached the device: {error}")
            transfer.done.set()

    def _copy(self, transfer: Transfer) -> None:
        parts = self.memory.source(transfer.weights)
        if self._copies:
            parts = jax.tree.map(_own_copy, parts)
        transfer.staged = jax.block_until_ready(jax.device_put(parts, self.memory.target))


def _own_copy(part):
    """Memory that the array on the CPU backend may have as its own. One in `pinned_host` memory is copied anyway."""
    return aligned_copy(part) if isinstance(part, np.ndarray) else part
