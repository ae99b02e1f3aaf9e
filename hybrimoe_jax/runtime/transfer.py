"""The link lane: host experts on their way to the device.

A demand load is issued and committed by the thread that owns the slots; data dependencies make its reader wait. A prefetch
is staged by the link's own thread and committed, at a layer boundary, only once it has landed. On the CPU backend an
aligned `device_put` would alias the host array; there the staged copy is made explicitly, so that a fetch costs a real copy.
"""

from __future__ import annotations

import dataclasses
import threading

import jax
import numpy as np

from hybrimoe_jax.host_kernels.formats import ExpertWeights, aligned_copy
from hybrimoe_jax.runtime.clock import WallClock
from hybrimoe_jax.runtime.workers import Worker


@dataclasses.dataclass
class Transfer:
    """A prefetch under way; `staged` is set once it has landed on the device."""

    layer: int
    expert: int
    issued: float
    weights: ExpertWeights
    staged: tuple[jax.Array, jax.Array] | None = None
    began: float | None = None
    landed: float | None = None
    error: BaseException | None = None
    done: threading.Event = dataclasses.field(default_factory=threading.Event)

    @property
    def nbytes(self) -> int:
        return self.weights.nbytes

    @property
    def seconds(self) -> float:
        """How long it held the link, once it has landed: without the wait for transfers before it."""
        return self.landed - self.began


class Link:
    """Transfers from host memory to `device`. One worker thread, first come first served."""

    def __init__(self, device: jax.Device, clock: WallClock):
        self.device, self.clock = device, clock
        self._copies = device.platform == "cpu"
        self._in_flight: dict[tuple[int, int], Transfer] = {}
        self._worker = Worker(self._serve, "link")

    def put(self, weights: ExpertWeights) -> tuple[jax.Array, jax.Array]:
        """Demand load: device arrays, asynchronously. On the CPU backend they may alias `weights`, which is read-only;
        writing them into a slot is the copy."""
        return tuple(jax.device_put(list(weights), self.device))

    def prefetch(self, layer: int, expert: int, weights: ExpertWeights) -> None:
        transfer = Transfer(layer, expert, self.clock.now(), weights)
        self._in_flight[layer, expert] = transfer
        self._worker.put(transfer)

    @property
    def busy(self) -> bool:
        return bool(self._in_flight)

    def landed(self) -> list[Transfer]:
        """Takes out the transfers that have landed since the last call, oldest first."""
        ready = [t for t in self._in_flight.values() if t.done.is_set()]
        for transfer in ready:
            self._take(transfer)
        return ready

    def wait(self, layer: int, expert: int) -> Transfer:
        """Waits for one prefetch and takes it out."""
        transfer = self._in_flight[layer, expert]
        transfer.done.wait()
        return self._take(transfer)

    def drain(self) -> None:
        """Waits for every prefetch under way and forgets it."""
        for transfer in self._in_flight.values():
            transfer.done.wait()
        self._in_flight.clear()

    def close(self) -> None:
        self._worker.stop()

    def _take(self, transfer: Transfer) -> Transfer:
        del self._in_flight[transfer.layer, transfer.expert]
        if transfer.error is not None:
            raise transfer.error
        return transfer

    def _serve(self, transfer: Transfer) -> None:
        transfer.began = self.clock.now()
        try:
            parts: list[np.ndarray] = list(transfer.weights)
            if self._copies:
                parts = [aligned_copy(part) for part in parts]
            staged = jax.device_put(parts, self.device)
            jax.block_until_ready(staged)
            transfer.staged = tuple(staged)
        except BaseException as error:  # handed to the thread that commits, which raises it
            transfer.error = error
        transfer.landed = self.clock.now()
        transfer.done.set()
