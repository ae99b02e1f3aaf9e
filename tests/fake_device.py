"""What crosses to the device, and what the device is told: a client that notes which memory is registered with it, and
a recorder of copies and program calls in their order. Everything else is the real engine on the CPU backend."""

from __future__ import annotations

import dataclasses
import threading

import jax
import numpy as np

from hybrimoe_jax.engine import programs
from hybrimoe_jax.engine.lanes import host_memory, slots, stacked
from hybrimoe_jax.engine.lanes.transfer import Link

JITTED = type(jax.jit(lambda: None))


class FakeClient:
    """A client that has `dma_map`. It refuses what a driver refuses, and from the `refuse`d call on everything."""

    def __init__(self, refuse: int | None = None):
        self.ranges: dict[int, int] = {}  # registered now: address -> bytes
        self.mapped: list[tuple[int, int]] = []
        self.unmapped: list[int] = []
        self.refuse = refuse

    def dma_map(self, address: int, size: int) -> None:
        if self.refuse is not None and len(self.mapped) >= self.refuse:
            raise RuntimeError("RESOURCE_EXHAUSTED: no more pages can be locked\nmore of it")
        for start, length in self.ranges.items():
            if address < start + length and start < address + size:
                raise RuntimeError("host memory is already registered")
        self.ranges[address] = size
        self.mapped.append((address, size))

    def dma_unmap(self, address: int) -> None:
        del self.ranges[address]
        self.unmapped.append(address)

    def holds(self, array: np.ndarray) -> bool:
        """Whether the whole array lies in one registered range."""
        start = array.ctypes.data
        return any(low <= start and start + array.nbytes <= low + size for low, size in self.ranges.items())


@dataclasses.dataclass
class Event:
    """`kind`: "copy" of an expert by the `thread` ("link" is the link's own), or "call" of a program of that `name`.

    A copy's `sizes` are the bytes of its arrays, `memory` the kinds that they lie in, `ahead` how many copies of the
    link's thread were under way when it was asked for.
    """

    kind: str
    name: str
    thread: str
    sizes: tuple[int, ...] = ()
    memory: tuple[str, ...] = ()
    ahead: int = 0


def sizes_of(parts) -> tuple[int, ...]:
    return tuple(getattr(leaf, "nbytes", 0) for leaf in jax.tree.leaves(parts))


class Recorder:
    """Notes what the engine that it `watch`es does. Args: client: tells which memory is registered."""

    def __init__(self, monkeypatch, client: FakeClient | None = None):
        self.events: list[Event] = []
        self.client, self._patch = client, monkeypatch
        self._sizes: tuple[int, ...] | None = None
        self._moving = 0
        self._put = jax.device_put
        monkeypatch.setattr(jax, "device_put", self._device_put)
        monkeypatch.setattr(Link, "lends_arrays", False)
        if client is not None:
            monkeypatch.setattr(host_memory, "client_of", lambda device: client)
        for module in (programs, slots, stacked):
            for name, value in vars(module).items():
                if isinstance(value, JITTED):
                    monkeypatch.setattr(module, name, self._noted(name, value))
        block_program = stacked.block_program
        monkeypatch.setattr(stacked, "block_program", lambda *key: self._noted("block", block_program(*key)))

    def watch(self, engine) -> None:
        """From now on."""
        self._sizes = sizes_of(engine.store.get(0, 0))
        for layer in engine._parts.model.layers if hasattr(engine, "_parts") else ():
            fields = layer.programs._asdict().items()
            noted = {name: program and self._noted(name, program) for name, program in fields}
            self._patch.setattr(layer, "programs", layer.programs._replace(**noted))

    @property
    def copies(self) -> list[Event]:
        return [event for event in self.events if event.kind == "copy"]

    def _noted(self, name: str, program):
        def call(*args, **kwargs):
            if self._sizes is not None:
                self.events.append(Event("call", name, threading.current_thread().name))
            return program(*args, **kwargs)

        return call

    def _device_put(self, parts, target=None, **kwargs):
        to_host = getattr(target, "memory_kind", None) == "pinned_host"
        if self._sizes is None or to_host or sizes_of(parts) != self._sizes:
            return self._put(parts, target, **kwargs)
        thread = threading.current_thread().name
        memory = tuple(map(self._memory, jax.tree.leaves(parts)))
        self.events.append(Event("copy", "expert", thread, self._sizes, memory, self._moving))
        if thread != "link":
            return self._put(parts, target, **kwargs)
        self._moving += 1
        try:
            return jax.block_until_ready(self._put(parts, target, **kwargs))
        finally:
            self._moving -= 1

    def _memory(self, leaf) -> str:
        if isinstance(leaf, jax.Array):
            return str(leaf.sharding.memory_kind)
        return "mapped" if self.client is not None and self.client.holds(leaf) else "plain"


class Fault:
    """Breaks copies of experts of an engine: the `call`-th one that a thread makes, "link" or "MainThread".

    `how`: "raises", or "hangs" until `release`d. `met`: whether the copy was asked for. `copies`: that the thread made.
    """

    def __init__(self, monkeypatch, engine, thread: str, how: str, call: int = 1):
        self._sizes, self._call, self._thread, self._how = sizes_of(engine.store.get(0, 0)), call, thread, how
        self._released, self._put, self._patch = threading.Event(), jax.device_put, monkeypatch
        self.met, self.copies = False, 0
        monkeypatch.setattr(jax, "device_put", self._device_put)
        monkeypatch.setattr(Link, "lends_arrays", False)

    def mend(self) -> None:
        """Copies work again; what hangs goes on hanging."""
        self._patch.setattr(jax, "device_put", self._put)

    def release(self) -> None:
        self._released.set()

    def _device_put(self, parts, target=None, **kwargs):
        if sizes_of(parts) == self._sizes and threading.current_thread().name == self._thread:
            self.copies += 1
            if self.copies == self._call:
                self.met = True
                if self._how == "raises":
                    raise RuntimeError("INTERNAL: the copy failed")
                self._released.wait()
        return self._put(parts, target, **kwargs)
