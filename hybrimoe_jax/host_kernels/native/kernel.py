"""The native kernel: one call computes a run of experts, without the interpreter lock, on as many threads as asked.

Shapes: N tokens, D model width, m experts. Weights are used where they lie: float32, bfloat16, or packed (layout.py).

A token's result does not depend on the other tokens, on which experts share its call, or on the number of threads:
every dot product is summed in one fixed order. (Another instruction set has another order.)

What Python adds to a call counts at decode, where an expert takes microseconds: a handle is the address of its record,
and the short lists of a call are packed into bytes, which ctypes passes without copying.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import itertools
import operator
import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats.packing import PackedExpert, PackedMatrix
from hybrimoe_jax.formats.plain import F32, ExpertWeights, check_expert
from hybrimoe_jax.host_kernels.kernel import HostKernel
from hybrimoe_jax.host_kernels.native.library import PLAIN, format_code, isas, library

I64 = np.dtype(np.int64)
_byref = ctypes.byref
_char: Callable[[Any], ctypes.c_char] = ctypes.c_char.from_buffer
_given: Any = partial(operator.is_not, None)
_ERRORS = {
    1: ValueError("experts of another width than x's"),
    2: IndexError("a row that x does not have"),
    3: MemoryError("native experts: scratch does not fit into memory"),
}


class NativeExpert:
    """A prepared expert: its weights, and the address of the record that the library reads (struct Expert)."""

    __slots__ = ("address", "record", "weights")

    def __init__(self, weights: ExpertWeights | PackedExpert):
        self.weights = weights
        if isinstance(weights, PackedExpert):
            pointers, code = (weights.data.ctypes.data, 0), format_code(weights.layout.format)
        else:
            pointers = (weights.gate_up.ctypes.data, weights.down.ctypes.data)
            code = PLAIN[weights.down.dtype.name]
        self.record = np.array([*pointers, weights.width, weights.hidden, code], np.uint64)
        self.address = self.record.ctypes.data


class NativeKernel(HostKernel):
    """Args: `threads` that `expert` uses; `isa`, an instruction set instead of the best one that the processor has.

    Raises UserError where the library is absent or the instruction set is not there.
    """

    name = "native"
    teams = True

    def __init__(self, threads: int = 1, isa: str | None = None):
        self._library, known = library(), isas()
        self.isa = next(iter(known)) if isa is None else isa
        if self.isa not in known:
            raise UserError(f"host kernel 'native': no {isa!r} on this processor (there are: {', '.join(known)})")
        self.number, self.threads = known[self.isa], threads

    def prepare(self, weights: ExpertWeights | PackedExpert) -> NativeExpert:
        if isinstance(weights, PackedExpert):
            return NativeExpert(dataclasses.replace(weights, data=_bytes_of(weights)))
        check_expert(weights)
        return NativeExpert(ExpertWeights(*(np.ascontiguousarray(w) for w in weights)))

    def native_handle(self, handle: NativeExpert) -> tuple[int, int]:
        return self.number, handle.address

    def expert(self, handle: NativeExpert, x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        load = len(x)
        if out is None:
            out = np.zeros((load, handle.weights.width), np.float32)
        else:
            out.fill(0)
        return self.run_experts([handle], x, [None], [_ones(load)], out, self.threads)

    def run_experts(
        self,
        handles: Sequence[NativeExpert],
        x: np.ndarray,
        tokens: Sequence[np.ndarray | None],
        weights: Sequence[np.ndarray],
        out: np.ndarray,
        threads: int = 1,
    ) -> np.ndarray:
        total, width = x.shape
        if out.shape != x.shape or out.dtype != F32:
            raise ValueError(f"out is {out.dtype} {out.shape}; float32 {x.shape} is needed")
        if total == 1:
            if 0 in map(len, filter(_given, tokens)):
                chosen = [i for i, rows in enumerate(tokens) if rows is None or len(rows)]
                handles, weights = [handles[i] for i in chosen], [weights[i] for i in chosen]
            failed = self._library.experts_run_one(
                self.number,
                len(handles),
                _integers(len(handles))(*[handle.address for handle in handles]),
                width,
                x.tobytes()
                if x.dtype == F32
                else x.astype(F32).tobytes(),  # copying it is quicker than asking for its address
                _joined(weights, F32, len(handles)),
                _byref(_char(out)),
                threads,
            )
        elif len(handles):
            if x.dtype != F32 or not x.flags.c_contiguous:
                x = np.ascontiguousarray(x, F32)
            tokens = [np.arange(total) if rows is None else rows for rows in tokens]
            starts = [0, *itertools.accumulate(map(len, tokens))]
            failed = self._library.experts_run(
                self.number,
                len(handles),
                _integers(len(handles))(*[handle.address for handle in handles]),
                total,
                width,
                x.ctypes.data,
                _integers(len(starts))(*starts),
                _joined(tokens, I64, starts[-1]),
                _joined(weights, F32, starts[-1]),
                _byref(_char(out)),
                threads,
            )
        else:
            return out
        if failed:
            raise _ERRORS[failed]
        return out

    def product(
        self,
        matrix: PackedMatrix | np.ndarray,
        x: np.ndarray,
        out: np.ndarray | None = None,
        threads: int | None = None,
    ) -> np.ndarray:
        """x [N, K] float32 times the transpose of a matrix [R, K] (packed, float32 or bfloat16) -> [N, R] float32.

        Written into `out` where given (C-contiguous). `threads`: instead of the kernel's own. Others: UserError.
        """
        if isinstance(matrix, PackedMatrix):
            code, data = format_code(matrix.layout.format), _bytes_of(matrix)
            rows, columns = matrix.layout.rows, matrix.layout.columns
        else:
            if matrix.ndim != 2 or matrix.dtype.name not in PLAIN:
                raise UserError(f"a matrix of {matrix.dtype} {matrix.shape}; float32 or bfloat16 with rows and columns")
            code, data, (rows, columns) = PLAIN[matrix.dtype.name], np.ascontiguousarray(matrix), matrix.shape
        x = np.ascontiguousarray(x, F32)
        if x.ndim != 2 or x.shape[1] != columns:
            raise ValueError(f"x is {x.shape}; [N, {columns}] is needed")
        out = np.empty((len(x), rows), F32) if out is None else out
        if out.shape != (len(x), rows) or out.dtype != F32 or not out.flags.c_contiguous:
            raise ValueError(f"out is {out.dtype} {out.shape}; float32 {(len(x), rows)} is needed")
        pointers = (data.ctypes.data, len(x), x.ctypes.data, out.ctypes.data)
        failed = self._library.matrix_run(self.number, code, rows, columns, *pointers, threads or self.threads)
        if failed:
            raise _ERRORS[failed]
        return out

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "isa": self.isa}


def _bytes_of(packed: PackedExpert | PackedMatrix) -> np.ndarray:
    data, needed = np.ascontiguousarray(packed.data), packed.layout.nbytes
    if data.dtype != np.uint8 or data.shape != (needed,):
        raise UserError(f"{packed.layout}: {needed} bytes are needed; these are {data.dtype} {data.shape}")
    return data


def _joined(arrays: Sequence[np.ndarray], dtype: np.dtype, count: int) -> bytes:
    """The arrays behind one another; ValueError unless they hold `count` values in all."""
    try:
        if [array.dtype for array in arrays].count(dtype) != len(arrays):
            raise BufferError
        joined = b"".join(arrays)  # pyright: ignore[reportArgumentType]  # in the stubs arrays are buffers from 3.12 on
    except (BufferError, TypeError, ValueError):  # another type, or strided
        joined = np.concatenate(arrays, dtype=dtype, casting="unsafe").tobytes()
    if len(joined) != count * dtype.itemsize:
        raise ValueError(f"{len(joined) // dtype.itemsize} rows or routing weights where {count} are needed")
    return joined


@functools.cache
def _integers(count: int):
    return struct.Struct(f"={count}q").pack


@functools.lru_cache(64)
def _ones(count: int) -> np.ndarray:
    return np.ones(count, np.float32)
