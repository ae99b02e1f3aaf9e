"""The oneDNN kernel: float32 inner products from JIT-compiled code, on packed weights once packing has paid for itself.

Shapes: n load, D model width, F expert width. An expert is three inner products: `u = x up^T`, then
`a = swish(x gate^T) * u` with both operations fused behind the product, then `a down^T`.

Weights are used where they lie (row-major) or, better, in a blocked copy: on one AVX-512 server core at D=1024, F=512
it was faster at every load, 1.3x at load 1 and 2x at loads 4 to 32. A copy takes as much memory as the expert in
float32 and some twenty decode calls of time. So an expert is packed at its first call, while all copies fit into
`pack_limit` bytes. One layout serves every load: with AVX-512 the one the library picks at load 32, elsewhere the one
it picks at load 128 (measured: the layouts it picks at loads 1 to 6 are up to 1.7x slower there).

A primitive is compiled per exact load up to 16; above, loads are padded to a bucket at most a quarter larger, and past
256 they are split, so that the number of primitives stays bounded. Compiling takes under a millisecond.

bfloat16 weights are packed as float32, and past the limit run through the NumPy kernel; quantised ones are refused.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import numpy as np

from hybrimoe_jax.formats.packing import HostExpert, refuse_packed
from hybrimoe_jax.formats.plain import F32, ExpertWeights, aligned_empty, check_expert, to_f32
from hybrimoe_jax.host_kernels import onednn_api
from hybrimoe_jax.host_kernels.kernel import HostKernel
from hybrimoe_jax.host_kernels.onednn_api import ARG_SCRATCHPAD, ARG_SECOND_POST_OP_SRC, Argument
from hybrimoe_jax.host_kernels.reference import ReferenceKernel

MAX_LOAD = 256
PACK_LIMIT = 2 << 30
COPY_BYTES = 64 * 1024  # below this, copying an operand is cheaper than pointing the library at it
PLAIN, PACKED = "plain", "packed"


def available() -> bool:
    """Whether the wheel is installed (it may still fail to load, with a UserError that says why)."""
    return onednn_api.find_dnnl() is not None


def bucket_of(load: int) -> int:
    """The load that a primitive is compiled for: exact to 16, then steps of an eighth of the next power of two."""
    if load <= 16:
        return load
    step = 1 << ((load - 1).bit_length() - 3)
    return -(-load // step) * step


class OneDnnExpert:
    """A prepared expert: its plain weights and, once packed, the library's copy; `refused`: there is no room."""

    __slots__ = ("__weakref__", "layouts", "lock", "packed_bytes", "refused", "shape", "weights")

    def __init__(self, weights: ExpertWeights):
        self.weights = weights
        self.shape = (weights.width, weights.hidden)
        self.layouts: dict[str, tuple] = {}  # PLAIN or PACKED -> memories of gate, up, down
        self.packed_bytes, self.refused, self.lock = 0, False, threading.Lock()

    @property
    def is_packed(self) -> bool:
        return PACKED in self.layouts


class OneDnnKernel(HostKernel):
    """oneDNN through its C API.

    Args:
      threads: OpenMP threads per calling thread, where the thread has not called `set_threads`.
      pack_limit: bytes that packed copies may take in all.
    """

    name = "onednn"

    def __init__(self, threads: int = 1, pack_limit: int = PACK_LIMIT):
        self._api = onednn_api.api()
        self._fallback = ReferenceKernel()
        self._lock = threading.RLock()
        self._products: dict[tuple, tuple] = {}
        self._packed: weakref.WeakSet[OneDnnExpert] = weakref.WeakSet()
        self._threads = _ThreadState(self._api, threads)
        self.pack_limit = pack_limit

    def prepare(self, weights: HostExpert) -> OneDnnExpert:
        plain = refuse_packed(weights, self.name)
        check_expert(plain)
        handle = OneDnnExpert(ExpertWeights(*(np.ascontiguousarray(w) for w in plain)))
        if handle.weights.down.dtype == F32:
            gate_up, down = handle.weights
            width, hidden = handle.shape
            inward, outward = self._api.layout(hidden, width), self._api.layout(width, hidden)
            parts = ((inward, gate_up[:hidden]), (inward, gate_up[hidden:]), (outward, down))
            handle.layouts[PLAIN] = tuple(self._api.memory(at, w.ctypes.data, keep=w) for at, w in parts)
        return handle

    def expert(self, handle: OneDnnExpert, x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        load = len(x)
        if out is None:
            out = np.empty((load, handle.shape[0]), np.float32)
        if load > MAX_LOAD:
            for start in range(0, load, MAX_LOAD):
                self.expert(handle, x[start : start + MAX_LOAD], out[start : start + MAX_LOAD])
            return out
        kind = PACKED if self.pack(handle) else PLAIN
        if kind not in handle.layouts:  # bfloat16, not packed
            return self._fallback.expert(handle.weights, x, out)
        self._plan(handle.shape, bucket_of(load), kind).run(handle.layouts[kind], x, out)
        return out

    def pack(self, handle: OneDnnExpert) -> bool:
        """Makes the packed copy where there is none; False past `pack_limit`, or where another thread is at it."""
        if handle.is_packed:
            return True
        if handle.refused or not handle.lock.acquire(blocking=False):
            return False
        try:
            if handle.is_packed:
                return True
            handle.refused = self.packed_bytes >= self.pack_limit or not self._reserve(handle)
            if handle.refused:
                return False
            inward, outward = self._packed_layouts(*handle.shape)
            width, hidden = handle.shape
            gate_up, down = (to_f32(w) for w in handle.weights)
            stream, reorder = self._threads.stream, self._api.reorder
            rows_in, rows_out = self._api.layout(hidden, width), self._api.layout(width, hidden)
            handle.layouts[PACKED] = (
                reorder(stream, rows_in, gate_up[:hidden], inward),
                reorder(stream, rows_in, gate_up[hidden:], inward),
                reorder(stream, rows_out, down, outward),
            )
            return True
        finally:
            handle.lock.release()

    def _reserve(self, handle: OneDnnExpert) -> bool:
        """Counts the copy that is about to be made, if it fits."""
        inward, outward = self._packed_layouts(*handle.shape)
        size = 2 * self._api.size(inward) + self._api.size(outward)
        with self._lock:
            if self.packed_bytes + size > self.pack_limit:
                return False
            handle.packed_bytes = size
            self._packed.add(handle)
        return True

    def set_threads(self, threads: int) -> None:
        self._threads.resize(threads)

    @property
    def packed_bytes(self) -> int:
        with self._lock:
            return sum(handle.packed_bytes for handle in self._packed)

    def describe(self) -> dict[str, Any]:
        return {
            **super().describe(),
            "library": f"oneDNN {self._api.version}",
            "primitives": 3 * len(self._products),
            "packed_experts": len(self._packed),
            "pack_limit": self.pack_limit,
        }

    def _packed_layouts(self, width: int, hidden: int) -> tuple:
        """The blocked layouts of gate and up [F, D], and of down [D, F]."""
        gate, _, down = self._compiled((width, hidden), 32 if self._api.avx512 else 128, None)
        return gate.weights, down.weights

    def _compiled(self, shape: tuple[int, int], load: int, kind: str | None) -> tuple:
        """The inner products (gate, up, down) at a load. The library sizes them for the caller's threads."""
        key = (shape, load, kind, self._threads.count)
        with self._lock:
            found = self._products.get(key)
            if found is None:
                width, hidden = shape
                if kind == PACKED:
                    inward, outward = self._packed_layouts(width, hidden)
                elif kind == PLAIN:
                    inward, outward = self._api.layout(hidden, width), self._api.layout(width, hidden)
                else:
                    inward, outward = self._api.any_layout(hidden, width), self._api.any_layout(width, hidden)
                make = self._api.inner_product
                found = self._products[key] = (
                    make(load, inward, hidden, width, gated=True),
                    make(load, inward, hidden, width),
                    make(load, outward, width, hidden),
                )
            return found

    def _plan(self, shape: tuple[int, int], load: int, kind: str) -> _Plan:
        plans = self._threads.plans
        plan = plans.get((shape, load, kind))
        if plan is None:
            products = self._compiled(shape, load, kind)
            plan = plans[shape, load, kind] = _Plan(self._api, self._threads, products, shape, load)
        return plan


class _ThreadState(threading.local):
    """Of one calling thread: OpenMP thread count, stream, argument lists, and the temporaries they point at."""

    def __init__(self, api: onednn_api.Api, threads: int):
        self.api = api
        self.stream = api.stream()
        self.resize(threads)

    def resize(self, threads: int) -> None:
        self.count = threads
        self.api.set_threads(threads)
        self.plans: dict[tuple, _Plan] = {}
        self._buffers: dict[tuple, np.ndarray] = {}

    def buffer(self, name: str, columns: int) -> np.ndarray:
        """[MAX_LOAD, columns] float32, shared by all loads; pages that no load has reached take no memory."""
        found = self._buffers.get((name, columns))
        if found is None:
            found = self._buffers[name, columns] = aligned_empty((MAX_LOAD, columns))
        return found


class _Plan:
    """Three argument lists for one (shape, load, layout) on one thread; running swaps the weights and calls them."""

    def __init__(self, api, thread: _ThreadState, products: tuple, shape: tuple[int, int], load: int):
        gate, up, down = products
        width, hidden = shape
        self._api, self._stream, self._load = api, thread.stream.pointer, load
        self._x_buffer, self._y_buffer = thread.buffer("x", width)[:load], thread.buffer("y", width)[:load]
        self._act = thread.buffer("act", hidden)
        self._up = thread.buffer("up", hidden)
        self._x = api.memory(gate.src, self._x_buffer.ctypes.data, keep=self._x_buffer)
        self._y = api.memory(down.dst, self._y_buffer.ctypes.data, keep=self._y_buffer)
        up_out = api.memory(up.dst, self._up.ctypes.data, keep=self._up)
        act_out = api.memory(gate.dst, self._act.ctypes.data, keep=self._act)
        act_in = api.memory(down.src, self._act.ctypes.data, keep=self._act)
        self._keep = [products, up_out, act_out, act_in]
        self._away = False  # whether the input and output memories point at a caller's arrays
        self._up_call = self._call(thread, up, self._x, up_out)
        self._gate_call = self._call(thread, gate, self._x, act_out, (ARG_SECOND_POST_OP_SRC, up_out))
        self._down_call = self._call(thread, down, act_in, self._y)

    def _call(self, thread: _ThreadState, product, src, dst, *extra) -> tuple:
        """(primitive, argument count, arguments, the entry of the weights)."""
        entries = [Argument(onednn_api.ARG_SRC, src.pointer), Argument(onednn_api.ARG_DST, dst.pointer)]
        entries += [Argument(index, memory.pointer) for index, memory in extra]
        size = self._api.size(product.scratchpad)
        if size:
            pad = aligned_empty(-(-size // 4))
            memory = self._api.memory(product.scratchpad, pad.ctypes.data, keep=pad)
            self._keep.append(memory)
            entries.append(Argument(ARG_SCRATCHPAD, memory.pointer))
        entries.append(Argument(onednn_api.ARG_WEIGHTS, None))
        arguments = (Argument * len(entries))(*entries)
        return product.primitive.pointer, len(entries), arguments, arguments[len(entries) - 1]

    def run(self, weights: tuple, x: np.ndarray, out: np.ndarray) -> None:
        """weights: memories of gate, up, down; x [n, D] with n at most the plan's load; fills out [n, D]."""
        load = len(x)
        direct = load == self._load and x.nbytes >= COPY_BYTES and x.flags.c_contiguous and out.flags.c_contiguous
        if direct:
            self._point(x, out)
        else:
            if self._away:
                self._point(self._x_buffer, self._y_buffer)
            self._x_buffer[:load] = x
        self._away = direct
        gate, up, down = weights
        execute, stream = self._api.execute, self._stream
        primitive, count, arguments, entry = self._up_call
        entry.memory = up.pointer
        status = execute(primitive, stream, count, arguments)
        primitive, count, arguments, entry = self._gate_call
        entry.memory = gate.pointer
        status |= execute(primitive, stream, count, arguments)
        primitive, count, arguments, entry = self._down_call
        entry.memory = down.pointer
        status |= execute(primitive, stream, count, arguments)
        if status:
            self._api.check(status, "running an expert")
        if not direct:
            out[:] = self._y_buffer[:load]

    def _point(self, x: np.ndarray, y: np.ndarray) -> None:
        self._api.check(self._api.set_pointer(self._x.pointer, x.ctypes.data), "setting the input")
        self._api.check(self._api.set_pointer(self._y.pointer, y.ctypes.data), "setting the output")
