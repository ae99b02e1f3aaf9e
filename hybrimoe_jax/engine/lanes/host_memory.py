"""The host memory that experts are copied to the device from.

A GPU's copy engine reads pages that cannot move. From ordinary memory every expert is therefore copied twice: by the
CPU into a small buffer of such pages, and from there to the device. Two ways around it, and `plain` without either:

    mapped   the blocks that experts lie in are registered with the device's client, once (`dma_map`)
    pinned   each expert lies in an array of the device's `pinned_host` memory; what the host's kernels read is the
             same memory

Neither copies an expert for good: host memory holds it once. XLA's CPU backend has no `dma_map`, and needs none.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import warnings
import weakref
from typing import Any

import jax
import numpy as np

from hybrimoe_jax.checkpoint.expert_store import ExpertStore
from hybrimoe_jax.engine.programs import Device
from hybrimoe_jax.formats.packing import HostExpert, PackedExpert
from hybrimoe_jax.formats.plain import Arena
from hybrimoe_jax.models.moe import DeviceExpert


def parts_of(weights: HostExpert):
    """An expert's arrays in the form that a slot has: (gate_up, down), or a PackedExpert."""
    return weights if isinstance(weights, PackedExpert) else tuple(weights)


def client_of(device: Device) -> Any:
    """The client that owns a device."""
    return device.client


class HostMemory:
    """Ordinary memory: experts are copied from where the store has them.

    Attributes: `name`; `target`, what `jax.device_put` is told.
    """

    name = "plain"

    def __init__(self, device: Device):
        self.target: Any = device

    def source(self, weights: HostExpert) -> Any:
        """What to copy from, in the form that a slot has."""
        return parts_of(weights)

    def close(self) -> None:
        """Gives back what was registered. Nothing may be on its way any more."""


class MappedMemory(HostMemory):
    """Blocks of the store's arena, registered with the client that owns the device.

    Engines that share a store share the registration, which ends with the last of them. RuntimeError (or what the
    client raises) where a block cannot be registered; none is then left.
    """

    name = "mapped"

    def __init__(self, device: Device, arena: Arena):
        super().__init__(device)
        self._release = weakref.finalize(self, _release, *_register(client_of(device), arena))
        self._release.atexit = False  # the process's end frees all

    def close(self) -> None:
        if self._release.alive:
            for array in jax.live_arrays():  # what a copy may still be on its way to
                with contextlib.suppress(Exception):  # of a step that was broken off
                    array.block_until_ready()
            self._release()


class PinnedMemory(HostMemory):
    """Experts in arrays of `pinned_host` memory. The store hands out views of them, and keeps them.

    What the client raises where there is not enough of it for the experts read so far.
    """

    name = "pinned"

    def __init__(self, device: Device, store: ExpertStore):
        super().__init__(device)
        self.device = device
        self._pinned = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
        self.target = jax.sharding.SingleDeviceSharding(device, memory_kind=device.default_memory().kind)
        self._arrays: dict[int, tuple[HostExpert, DeviceExpert]] = {}
        self._began = False
        store.place(self._pin)
        self._began = True

    def source(self, weights: HostExpert) -> Any:
        found = self._arrays.get(id(weights))
        return parts_of(weights) if found is None else found[1]

    def _pin(self, weights: HostExpert) -> HostExpert:
        try:
            return self._pinned_copy(weights)
        except Exception as error:
            if not self._began:
                raise
            _warn(self.name, error)  # an expert read later, in the middle of a step
            return weights

    def _pinned_copy(self, weights: HostExpert) -> HostExpert:
        arrays = jax.block_until_ready(jax.device_put(parts_of(weights), self._pinned))
        views = [_view(array) for array in jax.tree.leaves(arrays)]
        same = PackedExpert(views[0], weights.layout) if isinstance(weights, PackedExpert) else type(weights)(*views)
        self._arrays[id(same)] = same, arrays  # held, so that the number stays its own
        return same


def open_host_memory(wanted: str, found: str | None, store: ExpertStore, device: Device) -> HostMemory:
    """The memory that an engine's experts are copied from. Call it before anything holds the store's arrays.

    Args:
      wanted: an `EngineConfig.host_memory`.
      found: what a calibration has found to be the fastest, if one has; "auto" takes it, or else `mapped` on a GPU.

    Warns, once for an engine, where the device refuses; memory is then plain.
    """
    if isinstance(store.placed_by, PinnedMemory) and store.placed_by.device == device:
        return store.placed_by
    kind = choose(wanted, found, device.platform)
    try:
        if kind == "mapped":
            if store.arena is None:
                raise RuntimeError("the experts are not kept in memory")
            return MappedMemory(device, store.arena)
        if kind == "pinned":
            return PinnedMemory(device, store)
    except Exception as error:  # of whatever class the client has for it
        _warn(kind, error)
    return HostMemory(device)


def choose(wanted: str, found: str | None, platform: str) -> str:
    """The kind of memory to try, see `open_host_memory`."""
    return wanted if wanted != "auto" else found or ("plain" if platform == "cpu" else "mapped")


def _warn(kind: str, error: Exception) -> None:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    warnings.warn(f"host memory stays plain: {kind} memory was refused ({reason})", stacklevel=2)


class _Registration:
    """One arena's blocks with one client, and how many use them. Holds the blocks: they must not be freed before."""

    def __init__(self, client: Any):
        self.client, self.users = client, 0
        self.blocks: list[np.ndarray] = []

    def note(self, block: np.ndarray) -> None:
        try:
            self.client.dma_map(block.ctypes.data, block.nbytes)
        except Exception as error:
            if self.users == 0:
                raise
            _warn("mapped", error)  # experts read later, in the middle of a step
            return
        self.blocks.append(block)

    def end(self) -> None:
        while self.blocks:
            self.client.dma_unmap(self.blocks[-1].ctypes.data)
            self.blocks.pop()


_LOCK = threading.RLock()  # a finalizer may run at any line
_REGISTERED: dict[tuple[Any, Arena], _Registration] = {}
"""Of the process: a driver refuses to register a block twice."""


def _register(client: Any, arena: Arena) -> tuple[Any, Arena]:
    key = client, arena
    with _LOCK:
        entry = _REGISTERED.get(key)
        if entry is None:
            entry = _Registration(client)
            try:
                arena.watch(entry.note)
            except BaseException:
                entry.end()
                raise
            _REGISTERED[key] = entry
        entry.users += 1
    return key


def _release(client: Any, arena: Arena) -> None:
    with _LOCK:
        entry = _REGISTERED[client, arena]
        entry.users -= 1
        if entry.users == 0:
            del _REGISTERED[client, arena]
            arena.unwatch(entry.note)
            entry.end()


def _view(array: jax.Array) -> np.ndarray:
    """The host's own view of an array in host memory: no copy. The array must outlive it."""
    memory = (ctypes.c_uint8 * array.nbytes).from_address(array.unsafe_buffer_pointer())
    view = np.ctypeslib.as_array(memory).view(array.dtype).reshape(array.shape)
    view.flags.writeable = False
    return view
