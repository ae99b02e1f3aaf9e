"""Dividing the cores: XLA's pool and the host experts' workers are sized on purpose, before jax starts.

XLA:CPU reads `NPROC` once, when its client is created; afterwards its pool cannot be changed. On two cores one for each
side hides host experts behind device work at decode, where two pools of two fight (measured; see docs/log.md).
This module imports no jax.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import warnings


@dataclasses.dataclass(frozen=True)
class CoreSplit:
    """Cores given to each side. `fixed` is False where jax had already started and its pool kept another size."""

    total: int
    device: int
    host: int
    fixed: bool


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def jax_started() -> bool:
    """Whether jax has created its client (asked without importing jax)."""
    bridge = sys.modules.get("jax._src.xla_bridge")
    return bool(bridge is not None and getattr(bridge, "_backends", None))


def divide(threads: int | None, executor: str) -> CoreSplit:
    """Sizes both sides and, where jax has not started yet, makes XLA's pool obey. Half each; the dense executor gets all.

    Raises nothing; warns once if `threads` was asked for too late.
    """
    total = threads or available_cores()
    device = total if executor == "dense" else max(1, total // 2)
    host = max(1, total - device)
    current = os.environ.get("NPROC")
    if not jax_started():
        os.environ["NPROC"] = str(device)
        return CoreSplit(total, device, host, True)
    matches = current == str(device)
    if threads is not None and not matches:
        warnings.warn(
            f"threads={threads} came after jax started: XLA keeps its pool; load the engine before any other use of jax",
            stacklevel=3,
        )
    return CoreSplit(total, device, host, matches)


def limit_blas(threads: int) -> None:
    """Threads of numpy's BLAS, for the whole process: workers are parallel across experts, not inside one."""
    from threadpoolctl import ThreadpoolController

    ThreadpoolController().limit(limits=threads, user_api="blas")
