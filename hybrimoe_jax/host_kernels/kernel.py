"""The seam of the host lane: what a kernel must do with one expert, and how a layer's host experts are run through it.

Shapes: N tokens of the step, n the load of one expert (its tokens), D model width, F expert width, m experts.

A kernel computes `down(silu(gate x) * (up x))` in float32, for plain weights (`formats.ExpertWeights`) and, unless it refuses them, for
quantised ones (`packing.PackedExpert`; with an `-a8` format on rounded activations, as `packing` defines). Worker threads call it side by side, so it keeps no state but
what belongs to a handle or to the calling thread, and spends its time in calls that release the interpreter lock (BLAS,
ctypes). Temporaries come from a scratch buffer per thread that only grows: fresh megabytes from malloc are page-faulted
on every call, which can cost more than the arithmetic.

BLAS has its own threads. The engine sizes them once, with `threadpoolctl`, before its workers start; a kernel whose
library takes the number per calling thread does so in `set_threads`.
"""

from __future__ import annotations

import abc
import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from hybrimoe_jax.host_kernels.choices import Measurement
from hybrimoe_jax.formats.plain import aligned_empty
from hybrimoe_jax.formats.packing import HostExpert


class Scratch(threading.local):
    """Named float32 buffers of the calling thread. A view stays valid until the same name is asked for again."""

    def __init__(self):
        self._flat: dict[str, np.ndarray] = {}
        self._views: dict[tuple, np.ndarray] = {}

    def view(self, name: str, rows: int, columns: int) -> np.ndarray:
        """An uninitialised C-contiguous float32 [rows, columns]; the same memory at every call with this name."""
        key = (name, rows, columns)
        found = self._views.get(key)
        if found is None:
            found = self._make(key, rows * columns).reshape(rows, columns)
            self._views[key] = found
        return found

    def _make(self, key: tuple, size: int) -> np.ndarray:
        flat = self._flat.get(key[0])
        if flat is None or flat.size < size:
            flat = self._flat[key[0]] = aligned_empty(1 << max(10, math.ceil(math.log2(max(size, 1)))))
            self._views = {k: v for k, v in self._views.items() if k[0] != key[0]}
        elif len(self._views) > 512:  # prefill sees many loads; keep the table small
            self._views.clear()
        return flat[:size]


class HostKernel(abc.ABC):
    """Runs experts on the CPU. Thread-safe; `expert` releases the interpreter lock in its heavy part."""

    name: str
    teams = False
    """Whether one call of `run_experts` computes several experts at once, on `threads` threads of its own."""

    @abc.abstractmethod
    def prepare(self, weights: HostExpert) -> Any:
        """A handle for `expert`, made once per expert; cheap, and keeps `weights` alive. UserError on malformed weights, and on quantised
        ones where the kernel computes none."""

    @abc.abstractmethod
    def expert(self, handle: Any, x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """x [n, D] float32 C-contiguous, n >= 1 -> [n, D] float32, written into `out` (C-contiguous, not x) where given."""

    def run_experts(
        self,
        handles: Sequence[Any],
        x: np.ndarray,
        tokens: Sequence[np.ndarray | None],
        weights: Sequence[np.ndarray],
        out: np.ndarray,
        threads: int = 1,
    ) -> np.ndarray:
        """See the function `run_experts`. Here one expert after another; a kernel with `teams` does better."""
        return _run_each(self, handles, x, tokens, weights, out)

    def pack(self, handle: Any) -> bool:
        """Makes the copy of the weights that the kernel prefers now instead of when use has earned it; whether it has one."""
        return False

    def warm(self, handle: Any, loads: Sequence[int]) -> None:
        """Builds ahead what the first calls at these loads would have built (a no-op where nothing is)."""
        return None

    def record(self, handle: Any) -> tuple[int, int] | None:
        """For jitted programs that call the native kernel themselves (`native.routed`): the number of its instruction set and the address of
        this expert's record; None where there is none."""
        return None

    def set_threads(self, threads: int) -> None:
        """Threads that one call of `expert` from the calling thread may use, for libraries that take it per thread."""
        return None

    measurement: Measurement | None = None
    """What the kernel's choices come from, for a profile to keep; None of a kernel that chooses nothing."""
    reused = False
    """Whether that is an earlier measurement, not one made now."""

    @property
    def packed_bytes(self) -> int:
        """Host memory held beside the plain weights, in bytes."""
        return 0

    def describe(self) -> dict[str, Any]:
        """What the statistics print: the name, and what the kernel chose or built."""
        return {"name": self.name, "packed_bytes": self.packed_bytes}


_scratch = Scratch()


def run_experts(
    kernel: HostKernel,
    handles: Sequence[Any],
    x: np.ndarray,
    tokens: Sequence[np.ndarray | None],
    weights: Sequence[np.ndarray],
    out: np.ndarray,
    threads: int = 1,
) -> np.ndarray:
    """Adds every expert's weighted output to `out` [N, D] float32 and returns it.

    Args:
      handles: m handles of `kernel`.
      x: [N, D] float32, C-contiguous.
      tokens: per expert the rows of x it computes (integers, no row twice), or None for all N.
      weights: per expert a routing weight for each of its rows, [n].
      out: [N, D] float32, C-contiguous; accumulated into, so that several calls may share it.
      threads: of a kernel with `teams`, the calling one included; others use none but the calling one (and BLAS's own).
    """
    return kernel.run_experts(handles, x, tokens, weights, out, threads)


def _run_each(kernel, handles, x, tokens, weights, out):
    """One expert after another: gathered rows in, weighted rows added."""
    total, width = x.shape
    if total == 1:
        return _run_single_token(kernel, handles, x, tokens, weights, out)
    for handle, rows, mix in zip(handles, tokens, weights, strict=True):
        load = total if rows is None else len(rows)
        if load == 0:
            continue
        if load == 1:
            row = 0 if rows is None else int(rows[0])
            y = kernel.expert(handle, x[row : row + 1], _scratch.view("y", 1, width))
            y *= np.float32(mix[0])
            out[row] += y[0]
            continue
        y = _scratch.view("y", load, width)
        column = np.asarray(mix, np.float32).reshape(load, 1)
        if rows is None or (load == total and np.array_equal(rows, np.arange(total))):
            kernel.expert(handle, x, y)
            y *= column
            out += y
            continue
        gathered = np.take(x, rows, axis=0, out=_scratch.view("x", load, width), mode="clip")
        kernel.expert(handle, gathered, y)
        y *= column
        y += np.take(out, rows, axis=0, out=gathered, mode="clip")
        out[rows] = y
    return out


def _run_single_token(kernel, handles, x, tokens, weights, out):
    """Decode: the m outputs [m, D] are combined by one vector-matrix product instead of m scaled additions."""
    active = [i for i, rows in enumerate(tokens) if rows is None or len(rows)]
    if not active:
        return out
    width = x.shape[1]
    ys = _scratch.view("ys", len(active), width)
    mix = _scratch.view("mix", 1, len(active))[0]
    for j, i in enumerate(active):
        kernel.expert(handles[i], x, ys[j : j + 1])
        mix[j] = weights[i][0]
    out[0] += np.dot(mix, ys, out=_scratch.view("sum", 1, width)[0])
    return out
