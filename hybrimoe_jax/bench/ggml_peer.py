"""ggml's expert for `bench kernels`, called with ctypes: `mul_mat_id` for gate, up and down, as llama.cpp builds it.

ggml comes with `pip install llama-cpp-python` (compiled for the machine it is installed on; no dependency of
this project). Weights lie in its CPU buffer, or, `repack`, in the buffer type in which it rearranges them for
its fastest kernels. That buffer type ends the process for a format that it has no kernel for here, so whether it
has one is asked in a process of its own.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from hybrimoe_jax.errors import UserError

TYPES = {"f32": 0, "q4_0": 2, "q8_0": 8, "bf16": 30}
BITS = {"f32": 32, "q4_0": 4.5, "q8_0": 8.5, "bf16": 16}
F32, I32 = 0, 26
NAMES = ("libggml-base", "libggml-cpu", "libggml")
_P, _SIZE, _I64, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, ctypes.c_int


_QUIET = ctypes.CFUNCTYPE(None, _INT, ctypes.c_char_p, _P)(lambda level, text, data: None)


class _Init(ctypes.Structure):
    _fields_ = (("mem_size", _SIZE), ("mem_buffer", _P), ("no_alloc", ctypes.c_bool))


_SIGNATURES = {
    "ggml_init": (_P, [_Init]),
    "ggml_free": (None, [_P]),
    "ggml_new_tensor_2d": (_P, [_P, _INT, _I64, _I64]),
    "ggml_new_tensor_3d": (_P, [_P, _INT, _I64, _I64, _I64]),
    "ggml_mul_mat_id": (_P, [_P, _P, _P, _P]),
    "ggml_silu": (_P, [_P, _P]),
    "ggml_mul": (_P, [_P, _P, _P]),
    "ggml_new_graph": (_P, [_P]),
    "ggml_build_forward_expand": (None, [_P, _P]),
    "ggml_nbytes": (_SIZE, [_P]),
    "ggml_quantize_chunk": (_SIZE, [_INT, _P, _P, _I64, _I64, _I64, _P]),
    "ggml_backend_cpu_init": (_P, []),
    "ggml_backend_cpu_set_n_threads": (None, [_P, _INT]),
    "ggml_backend_cpu_buffer_type": (_P, []),
    "ggml_backend_cpu_reg": (_P, []),
    "ggml_backend_reg_get_proc_address": (_P, [_P, ctypes.c_char_p]),
    "ggml_backend_get_device": (_P, [_P]),
    "ggml_backend_buft_name": (ctypes.c_char_p, [_P]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_P, [_P, _P]),
    "ggml_backend_buffer_free": (None, [_P]),
    "ggml_backend_tensor_set": (None, [_P, _P, _SIZE, _SIZE]),
    "ggml_backend_tensor_get": (None, [_P, _P, _SIZE, _SIZE]),
    "ggml_backend_graph_compute": (_INT, [_P, _P]),
}


def folder() -> Path | None:
    """Where the libraries lie, or None."""
    found = find_spec("llama_cpp")
    place = Path(found.origin).parent / "lib" if found and found.origin else None
    return place if place and (place / f"{NAMES[0]}.so").is_file() else None


@functools.cache
def _functions() -> dict:
    """The library's functions by name. UserError where it is not installed."""
    place = folder()
    if place is None:
        raise UserError("llama-cpp-python is not installed")
    libraries = [ctypes.CDLL(str(place / f"{name}.so"), mode=ctypes.RTLD_GLOBAL) for name in NAMES]
    found = {}
    for name, (result, arguments) in _SIGNATURES.items():
        function = next(getattr(library, name) for library in libraries if hasattr(library, name))
        function.restype, function.argtypes = result, arguments
        found[name.removeprefix("ggml_")] = function
    log_set = next(library.ggml_log_set for library in libraries if hasattr(library, "ggml_log_set"))
    log_set(_QUIET, None)
    return found


class GgmlExperts:
    """`count` experts of one format, all with the same weights.

    They are quantised from float32 gate, up [F, D] and down [D, F].
    """

    def __init__(self, type: str, repack: bool, weights: tuple[np.ndarray, np.ndarray, np.ndarray], count: int):
        self._call, self._graphs = _functions(), {}
        call, number = self._call, TYPES[type]
        self._backend = call["backend_cpu_init"]()
        self._context = call["init"](_Init(1 << 20, None, True))
        self._matrices = [call["new_tensor_3d"](self._context, number, *w.shape[::-1], count) for w in weights]
        kind = self._repacking() if repack else call["backend_cpu_buffer_type"]()
        self._buffer = kind and call["backend_alloc_ctx_tensors_from_buft"](self._context, kind)
        if not self._buffer:
            raise RuntimeError(f"ggml does not take {type} there")
        for tensor, w in zip(self._matrices, weights):
            size = call["nbytes"](tensor) // count
            packed = np.empty(size, np.uint8)
            if type == "f32":
                packed = w.reshape(-1).view(np.uint8)
            else:
                call["quantize_chunk"](number, w.ctypes.data, packed.ctypes.data, 0, *w.shape, None)
            every = np.tile(packed, count)  # that buffer type takes a tensor whole
            call["backend_tensor_set"](tensor, every.ctypes.data, 0, every.nbytes)
        self.count, self.width = count, weights[0].shape[1]

    def _repacking(self):
        """The buffer type that rearranges, or None where ggml was built without."""
        call = self._call
        address = call["backend_reg_get_proc_address"](call["backend_cpu_reg"](), b"ggml_backend_dev_get_extra_bufts")
        if not address:
            return None
        kinds = ctypes.CFUNCTYPE(ctypes.POINTER(_P), _P)(address)(call["backend_get_device"](self._backend))
        i = 0
        while kinds and kinds[i]:
            if call["backend_buft_name"](kinds[i]) == b"CPU_REPACK":
                return kinds[i]
            i += 1
        return None

    def set_threads(self, threads: int) -> None:
        self._call["backend_cpu_set_n_threads"](self._backend, threads)

    def run(self, index: int, x: np.ndarray) -> None:
        """Computes x [n, D] float32 through expert `index`; `read` gives the result."""
        call = self._call
        graph, place, ids, _, _ = self._graph(len(x))
        chosen = np.full(len(x), index, np.int32)
        call["backend_tensor_set"](place, x.ctypes.data, 0, x.nbytes)
        call["backend_tensor_set"](ids, chosen.ctypes.data, 0, chosen.nbytes)
        if call["backend_graph_compute"](self._backend, graph):
            raise RuntimeError("ggml failed to compute")

    def read(self, load: int) -> np.ndarray:
        out = np.empty((load, self.width), np.float32)
        self._call["backend_tensor_get"](self._graphs[load][3], out.ctypes.data, 0, out.nbytes)
        return out

    def _graph(self, load: int):
        if load not in self._graphs:
            call, (gate, up, down) = self._call, self._matrices
            context = call["init"](_Init(1 << 22, None, True))
            x = call["new_tensor_3d"](context, F32, self.width, 1, load)
            ids = call["new_tensor_2d"](context, I32, 1, load)
            product = functools.partial(call["mul_mat_id"], context)
            act = call["mul"](context, call["silu"](context, product(gate, x, ids)), product(up, x, ids))
            y, graph = product(down, act, ids), call["new_graph"](context)
            call["build_forward_expand"](graph, y)
            buffer = call["backend_alloc_ctx_tensors_from_buft"](context, call["backend_cpu_buffer_type"]())
            self._graphs[load] = (graph, x, ids, y, (context, buffer))
        return self._graphs[load]

    def close(self) -> None:
        for *_, (context, buffer) in self._graphs.values():
            self._call["backend_buffer_free"](buffer)
            self._call["free"](context)
        self._call["backend_buffer_free"](self._buffer)
        self._call["free"](self._context)


@functools.cache
def repacks(type: str) -> bool:
    """Whether ggml has a rearranged layout for this format on this processor."""
    command = [sys.executable, "-m", "hybrimoe_jax.bench.ggml_peer", type]
    return subprocess.run(command, capture_output=True, timeout=120).returncode == 0


if __name__ == "__main__":
    small = np.random.default_rng(0).standard_normal((3, 256, 256), np.float32)
    experts = GgmlExperts(sys.argv[1], True, tuple(small), 2)
    x = np.ones((1, 256), np.float32)
    experts.run(1, x)
    gate, up, down = small.astype(np.float64)
    g, u = x @ gate.T, x @ up.T
    want = (g / (1 + np.exp(-g)) * u) @ down.T
    sys.exit(0 if np.abs(experts.read(1) - want).max() < 0.5 * np.abs(want).max() else 1)
