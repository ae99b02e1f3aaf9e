"""The seam of the host kernels: what a kernel must do with one expert, and how a layer's experts are run through it.

Shapes: N tokens of the step, n the load of one expert (its tokens), D model width, F expert width, m experts.

A kernel computes `down(silu(gate x) * (up x))` in float32, for plain weights (`formats.plain.ExpertWeights`) and,
unless it refuses them, for quantised ones (`formats.layout.PackedExpert`; with an `-a8` format on rounded activations,
as `formats.packing` defines). Worker threads call it side by side, so it keeps no state but what belongs to a handle or
to the calling thread, and spends its time in calls that release the interpreter lock (BLAS, ctypes).

BLAS has its own threads. The engine sizes them once, with `threadpoolctl`, before its workers start; a kernel whose
library takes the number per calling thread does so in `set_threads`.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import numpy as np

from hybrimoe_jax.formats.packing import HostExpert


class HostKernel(abc.ABC):
    """Runs experts on the CPU. Thread-safe; `expert` releases the interpreter lock in its heavy part."""

    name: str
    teams = False
    """Whether one call of `run_experts` computes several experts at once, on `threads` threads of its own."""
    unavailable: Sequence[str] = ()
    """Where `auto` took this kernel: why it took none of those that it prefers."""

    @abc.abstractmethod
    def prepare(self, weights: HostExpert) -> Any:
        """A handle for `expert`, made once per expert; cheap, and keeps `weights` alive.

        UserError on malformed weights, and on quantised ones where the kernel computes none.
        """

    @abc.abstractmethod
    def expert(self, handle: Any, x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """x [n, D] float32 C-contiguous, n >= 1 -> [n, D] float32, into `out` (C-contiguous, not x) if given."""

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
        for handle, rows, mix in zip(handles, tokens, weights, strict=True):
            if rows is None:
                out += self.expert(handle, x) * mix[:, None]
            elif len(rows):
                out[rows] += self.expert(handle, x[rows]) * mix[:, None]
        return out

    def pack(self, handle: Any) -> bool:
        """Makes now the copy of the weights that the kernel prefers; whether it has one."""
        return False

    def native_handle(self, handle: Any) -> tuple[int, int] | None:
        """A handle for jitted programs that call the native kernel themselves (`native.routed`).

        The number of its instruction set and the address of this expert's record; None where there is none.
        """
        return None

    def set_threads(self, threads: int) -> None:
        """Threads that one call of `expert` from the calling thread may use, for libraries that take it per thread."""
        return None

    @property
    def packed_bytes(self) -> int:
        """Host memory held beside the plain weights, in bytes."""
        return 0

    def describe(self) -> dict[str, Any]:
        """What the statistics print: the name, and what the kernel chose or built."""
        told = {"name": self.name, "packed_bytes": self.packed_bytes}
        return told | ({"unavailable": list(self.unavailable)} if self.unavailable else {})


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
