"""Dividing the cores: XLA's pool and the host experts' workers are sized on purpose, before jax starts.

XLA:CPU reads `NPROC` once, when its client is created; afterwards its pool cannot be changed. It gets all cores,
since prefill is bound by arithmetic; host experts use half of them, or all where the plan gives them the layer
(docs/log), and all of them beside a GPU. Importing this module imports no jax.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import warnings

from hybrimoe_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ThreadBudget:
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


_forked = False
"""Whether this process is a fork of one in which jax had started."""


def _note_fork() -> None:
    global _forked
    _forked = jax_started()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def split_threads(threads: int | None, executor: str, paced: bool = False) -> ThreadBudget:
    """Sizes both sides and, where jax has not started yet, makes XLA's pool obey.

    The host's experts get half of the cores beside the device's work. XLA gets all of them where programs and host
    experts take turns (prefill is bound by arithmetic: 1.2 times faster so), half under the callback executor, which
    is never without both. A `paced` device's programs sleep in XLA's pool, which therefore has two threads at least.

    Warns once if `threads` was asked for too late. UserError where a paced device comes after jax started with a
    smaller pool, and in a process that was forked after jax started.
    """
    if _forked:
        raise UserError(
            "this process is a fork of one that had started jax, whose threads are not here; load engines in a fresh "
            "process (multiprocessing's spawn)"
        )
    total = threads or available_cores()
    device = max(1, total // 2) if executor == "callback" else max(2, total) if paced else total
    host = max(1, total - total // 2)
    current = os.environ.get("NPROC")
    if not jax_started():
        os.environ["NPROC"] = str(device)
        return ThreadBudget(total, device, host, True)
    if paced and int(current if current and current.isdecimal() else available_cores()) < 2:
        raise UserError(
            "a paced device needs two threads of XLA's pool, and jax has started with one; load its engine before any "
            "other use of jax, or set NPROC=2"
        )
    matches = current == str(device)
    if threads is not None and not matches:
        warnings.warn(
            f"threads={threads} came after jax started: XLA keeps its pool; load the engine before any other use of "
            "jax",
            stacklevel=3,
        )
    return ThreadBudget(total, device, host, matches)


def beside(budget: ThreadBudget, platform: str) -> ThreadBudget:
    """The same beside a device of this platform: on a GPU XLA needs no cores, so the host's experts get all."""
    return budget if platform == "cpu" else dataclasses.replace(budget, device=0, host=budget.total)


def set_async_dispatch(executor: str) -> None:
    """Before jax starts, for the callback executor: on the CPU backend a callback can hang under asynchronous dispatch.

    Raises UserError where jax has started asynchronously on one core, the case that was seen to hang.
    """
    if executor != "callback":
        return
    import jax

    if not jax_started():
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    elif available_cores() == 1 and jax.config.read("jax_cpu_enable_async_dispatch"):
        raise UserError(
            "executor callback can hang on one core once jax runs asynchronously; start it in a fresh process"
        )


def limit_blas(threads: int) -> None:
    """Threads of numpy's BLAS, for the whole process: workers are parallel across experts, not inside one."""
    from threadpoolctl import ThreadpoolController

    ThreadpoolController().limit(limits=threads, user_api="blas")
