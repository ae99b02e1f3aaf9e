"""What a copy to the device takes from each kind of host memory, so that a calibration can name the fastest.

Nothing of the engine is touched: a block of an expert's size is allocated in each kind (see `lanes.host_memory`).
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from hybrimoe_jax.engine.lanes.host_memory import client_of
from hybrimoe_jax.engine.programs import Device
from hybrimoe_jax.formats.plain import aligned_copy

REPEATS, BLOCKS = 9, 4
"""Copies of each kind, and blocks that they rotate over, so that no cache serves them."""


def seconds_by_memory(device: Device, size: int, now: Callable[[], float]) -> dict[str, float]:
    """Median seconds of copying `size` bytes, by an `EngineConfig.host_memory`; kinds that are refused are left out."""
    blocks = [aligned_copy(np.full(size, i, np.uint8)) for i in range(BLOCKS)]
    found = {"plain": _median(device, blocks, now)}
    with contextlib.suppress(Exception):  # of whatever class the client has for it
        found["mapped"] = _mapped(device, blocks, now)
    with contextlib.suppress(Exception):
        kept = SingleDeviceSharding(device, memory_kind="pinned_host")
        found["pinned"] = _median(device, [jax.device_put(block, kept) for block in blocks], now)
    return found


def fastest(seconds: dict[str, float]) -> str | None:
    """The kind that takes least; None where nothing but plain memory was tried."""
    return min(seconds, key=seconds.__getitem__) if len(seconds) > 1 else None


def _mapped(device: Device, blocks: list[np.ndarray], now: Callable[[], float]) -> float:
    client, mapped = client_of(device), []
    try:
        for block in blocks:
            client.dma_map(block.ctypes.data, block.nbytes)
            mapped.append(block)
        return _median(device, blocks, now)
    finally:
        for block in mapped:
            client.dma_unmap(block.ctypes.data)


def _median(device: Device, blocks: list[Any], now: Callable[[], float]) -> float:
    target, times = SingleDeviceSharding(device), []
    for repeat in range(REPEATS + 1):
        block = blocks[repeat % len(blocks)]
        start = now()
        jax.block_until_ready(jax.device_put(block, target))
        times.append(now() - start)
    return statistics.median(times[1:])
