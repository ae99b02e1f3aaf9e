"""How an expert lies in host memory: two row-major matrices per expert, 64-byte aligned, float32 or bfloat16.

Shapes: D model width, F expert width. `gate_up` [2F, D] holds the gate rows first, so that one matrix product gives
both halves; `down` [D, F]. The alignment is a cache line: kernels stream from it with aligned loads, and XLA's CPU
backend can take such an array without copying it.

Weights that stay lie side by side in an `Arena`, on pages of 2 MB: separate arrays begin and end on small ones, and
small experts then wait for address translation (measured on a virtual machine, one thread, DeepSeek-V2-Lite's expert at
load 1: int4 35.4 instead of 29.5 GB/s, int8 36 instead of 32).

bfloat16 is the upper half of a float32, so widening is a 16-bit shift and always exact; narrowing rounds to nearest
even.
"""

# NumPy 2.5 types some functions by what its stubs leave unknown.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from hybrimoe_jax.errors import UserError

ALIGNMENT = 64
HUGE_PAGE = 2 << 20
BLOCK = 32 << 20  # of an arena: what lies unused at its end no page is made for
BF16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.dtype(np.float32)


FINITE_AT_ONCE = 1 << 20


def is_finite(array: np.ndarray) -> bool:
    """Whether a C-contiguous array holds neither NaN nor infinities; takes a megabyte beside it."""
    flat = array.reshape(-1)
    if array.dtype == BF16:
        flat = flat.view(np.uint16)
    for start in range(0, flat.size, FINITE_AT_ONCE):
        part = flat[start : start + FINITE_AT_ONCE]
        fine = (part & 0x7F80) != 0x7F80 if array.dtype == BF16 else np.isfinite(part)
        if not fine.all():
            return False
    return True


class ExpertWeights(NamedTuple):
    """One routed expert in host memory, float32 or bfloat16: `down(silu(gate x) * (up x))`."""

    gate_up: np.ndarray  # [2F, D], gate rows first
    down: np.ndarray  # [D, F]

    @property
    def width(self) -> int:
        """D, the model width."""
        return self.down.shape[0]

    @property
    def hidden(self) -> int:
        """F, the expert width."""
        return self.down.shape[1]

    @property
    def nbytes(self) -> int:
        return self.gate_up.nbytes + self.down.nbytes


def aligned_bytes(nbytes: int) -> int:
    """`nbytes` rounded up to the alignment."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def aligned_empty(shape: int | Sequence[int], dtype: DTypeLike = F32) -> np.ndarray:
    """Uninitialised C-contiguous array whose first byte lies on a 64-byte boundary."""
    dtype = np.dtype(dtype)
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


class Arena:
    """Hands out aligned arrays side by side from blocks of memory on huge pages.

    The system may have none (NumPy asks Linux for them). Blocks stay as long as the arena and their arrays, so this is
    for arrays that stay. Safe from any thread.

    Attributes: `blocks`: uint8 arrays, in the order in which they were made; `block_bytes`: of the next one, at least.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._used, self.block_bytes = 0, BLOCK
        self.blocks: list[np.ndarray] = []
        self._watchers: list[Callable[[np.ndarray], None]] = []

    def watch(self, note: Callable[[np.ndarray], None]) -> None:
        """Calls `note` with each block that there is now, and with each later one before it is used."""
        with self._lock:
            for block in self.blocks:
                note(block)
            self._watchers.append(note)

    def unwatch(self, note: Callable[[np.ndarray], None]) -> None:
        with self._lock:
            self._watchers.remove(note)

    def empty(self, shape: int | Sequence[int], dtype: DTypeLike = F32) -> np.ndarray:
        """As `aligned_empty`."""
        dtype = np.dtype(dtype)
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        with self._lock:
            if not self.blocks or self._used + nbytes > self.blocks[-1].size:
                size = max(self.block_bytes, nbytes)
                raw = np.empty(size + HUGE_PAGE, np.uint8)
                start = -raw.ctypes.data % HUGE_PAGE
                self.blocks.append(raw[start : start + size])
                self._used = 0
                for note in self._watchers:
                    note(self.blocks[-1])
            start, self._used = self._used, self._used + aligned_bytes(nbytes)
            return self.blocks[-1][start : start + nbytes].view(dtype).reshape(shape)


def aligned_copy(array: np.ndarray, dtype: DTypeLike | None = None, arena: Arena | None = None) -> np.ndarray:
    """A copy in aligned memory, of an arena where one is given; `dtype` may widen or round to bfloat16."""
    dtype = array.dtype if dtype is None else np.dtype(dtype)
    out = (arena.empty if arena else aligned_empty)(array.shape, dtype)
    if array.dtype == BF16 and dtype == F32:
        return to_f32(array, out)
    np.copyto(out, array, casting="unsafe")
    return out


def to_f32(array: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Exact float32 values of a float32 or bfloat16 array; float32 passes through uncopied unless `out` is given."""
    if array.dtype == F32:
        if out is None:
            return array
        np.copyto(out, array)
        return out
    if array.dtype != BF16:
        raise UserError(f"expert weights: dtype {array.dtype} is not supported (float32 and bfloat16 are)")
    if out is None:
        out = aligned_empty(array.shape, F32)
    np.left_shift(array.view(np.uint16), 16, out=out.view(np.uint32), dtype=np.uint32)
    return out


def check_expert(weights: ExpertWeights, where: str = "expert") -> None:
    """Raises UserError naming what is wrong where the two matrices are not one float32 or bfloat16 expert."""
    gate_up, down = weights
    for name, array in (("gate_up", gate_up), ("down", down)):
        if array.ndim != 2 or 0 in array.shape:
            raise UserError(
                f"{where}: {name} has shape {array.shape}; a matrix with at least one row and column is needed"
            )
        if array.dtype not in (F32, BF16):
            raise UserError(f"{where}: {name} has dtype {array.dtype}; float32 or bfloat16 is needed")
    if gate_up.dtype != down.dtype:
        raise UserError(f"{where}: gate_up is {gate_up.dtype} but down is {down.dtype}; both need one dtype")
    width, hidden = down.shape
    if gate_up.shape != (2 * hidden, width):
        raise UserError(f"{where}: gate_up has shape {gate_up.shape}, down {down.shape}; [2F, D] and [D, F] are needed")
