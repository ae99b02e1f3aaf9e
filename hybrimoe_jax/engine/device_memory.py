"""The device's memory: how much jax's allocator may take of it, and how much of that is free.

XLA reads the share of the card that its allocator may take when its client is created (`XLA_CLIENT_MEM_FRACTION`, under
that name in jax 0.10 to 0.12). Without a word it takes three quarters at once. So `limit_allocator` must run before jax
starts. It asks CUDA's driver for the size of the card; importing this module imports no jax.

The driver's own context and the libraries' handles (some hundred megabytes) lie outside the allocator and the budget.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from typing import Any, NamedTuple

from hybrimoe_jax.engine.budget import readable
from hybrimoe_jax.engine.config import AUTO, EngineConfig, parse_bytes
from hybrimoe_jax.engine.lanes.threads import jax_started
from hybrimoe_jax.errors import UserError

FRACTION, OLD_FRACTION, PREALLOCATE = (
    "XLA_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
)
AUTO_SHARE = 0.9
"""Of the memory that is free, what "auto" gives the allocator; vLLM's default share. The driver and the libraries need
some of the rest for programs and handles."""
TOLERANCE = 0.01
"""By which a limit may differ from the budget: the fraction travels as a float."""


class Card(NamedTuple):
    """Bytes of the first device that CUDA shows this process: all, and what nobody holds."""

    total: int
    free: int


def limit_allocator(options: EngineConfig) -> None:
    """Has jax's allocator keep to the budget of the options: call it before jax starts, later it does nothing.

    With a budget the allocator takes all of it at once, so that it is there when it is needed. Without one it grows as
    it must. What the environment says already stays. Raises UserError where the card is smaller than the budget.
    """
    if jax_started() or not _looks_for_cuda():
        return
    if options.vram_budget is None or options.executor == "dense":
        os.environ.setdefault(PREALLOCATE, "false")
        return
    found = None if os.environ.get(FRACTION) or os.environ.get(OLD_FRACTION) else card()
    if found is None:
        return
    budget = options.budget_bytes or int(AUTO_SHARE * found.free)
    if budget > found.total:
        raise UserError(f"vram_budget {readable(budget)} is more than the device has: {readable(found.total)}")
    os.environ[FRACTION] = f"{budget / found.total:.9f}"


def _looks_for_cuda() -> bool:
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return not platforms or bool({"cuda", "gpu"} & set(platforms.split(",")))


def driver() -> Any:
    """CUDA's driver as a library; None where there is none, or no device."""
    try:
        found = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return found if found.cuInit(0) == 0 else None


def card() -> Card | None:
    """The first device's memory by CUDA's driver, with this process's context in it; None where there is no such."""
    cuda = driver()
    if cuda is None:
        return None
    device, context, popped = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    if cuda.cuDeviceGet(ctypes.byref(device), 0) or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device):
        return None
    try:
        cuda.cuCtxPushCurrent_v2(context)
        failed = cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
        cuda.cuCtxPopCurrent_v2(ctypes.byref(popped))
    finally:
        cuda.cuDevicePrimaryCtxRelease_v2(device)
    return None if failed else Card(total.value, free.value)


def budget_on(device: Any, options: EngineConfig, warn: bool = True) -> int | None:
    """The options' budget in bytes, by what the device's allocator may take; None where there is none.

    Ask before anything is put on the device: "auto" is what is free. Warns once where the allocator keeps to another
    limit than the budget. Raises UserError for "auto" where the device does not say what is free.
    """
    if options.vram_budget is None:
        return None
    stats = device.memory_stats() or {}
    limit = stats.get("bytes_limit")
    if options.vram_budget == AUTO:
        if limit is None:
            raise UserError(
                f'vram_budget "{AUTO}" takes what is free on a GPU, and here the device is the {device.platform}, '
                "whose memory holds the experts already; give a size or a cache_ratio"
            )
        return max(1, limit - stats["bytes_in_use"])
    budget = parse_bytes(options.vram_budget, "vram_budget")
    if limit is None:
        return budget
    if warn and abs(limit - budget) > TOLERANCE * budget:
        but = "and the budget is cut to that" if limit < budget else "more than the budget"
        warnings.warn(
            f"vram_budget {readable(budget)}: jax's allocator may take {readable(limit)}, {but}, since jax had started "
            f"or {FRACTION} is set; load the engine before any other use of jax",
            stacklevel=3,
        )
    return min(budget, limit)


def peak_bytes(device: Any) -> int | None:
    """The most that was in use since the process began, by the device's allocator; None where it does not say."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use")
