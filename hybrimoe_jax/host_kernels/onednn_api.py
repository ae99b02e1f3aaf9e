"""The few calls of oneDNN's C API that an expert needs, through ctypes: inner products, and reorders.

Written against the API of oneDNN 3 (the PyPI wheel `onednn-cpu-gomp` 2023.2.0 carries 3.2). The constants are those of
its public C headers. Three properties matter here: ctypes releases the interpreter lock during a call;
`format_tag::any` lets the library choose a blocked weight layout; and scratchpads are given by the caller, so that one
primitive may run on several threads at once. The wheel's OpenMP runtime is libgomp, whose thread count is set per
calling thread.

Shapes: n load, K inputs, M outputs of one inner product.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
from ctypes import c_char_p, c_float, c_int, c_int64, c_size_t, c_uint, c_void_p
from pathlib import Path

import numpy as np

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats.plain import aligned_empty

WHEEL = "onednn-cpu-gomp"
ENGINE_CPU, STREAM_IN_ORDER, F32, FORMAT_ANY, FORWARD_INFERENCE = 1, 1, 3, 1, 96
SWISH, BINARY_MUL, SCRATCHPAD_USER = 0x2C, 0x1FFF1, 1
QUERY_WEIGHTS, QUERY_SCRATCHPAD = 131, 136
ARG_SRC, ARG_DST, ARG_WEIGHTS, ARG_SCRATCHPAD = 1, 17, 33, 80
ARG_SECOND_POST_OP_SRC = 32768 * 2 | 2  # src_1 of the post-operation with index 1
ISA_AVX512_BIT = 0x20
MAX_DIMS = 12

_SIGNATURES = {
    "dnnl_engine_create": (c_void_p, c_int, c_size_t),
    "dnnl_stream_create": (c_void_p, c_void_p, c_uint),
    "dnnl_memory_desc_create_with_strides": (c_void_p, c_int, c_void_p, c_int, c_void_p),
    "dnnl_memory_desc_create_with_tag": (c_void_p, c_int, c_void_p, c_int, c_int),
    "dnnl_memory_desc_clone": (c_void_p, c_void_p),
    "dnnl_memory_create": (c_void_p, c_void_p, c_void_p, c_void_p),
    "dnnl_memory_set_data_handle": (c_void_p, c_void_p),
    "dnnl_post_ops_create": (c_void_p,),
    "dnnl_post_ops_append_eltwise": (c_void_p, c_int, c_float, c_float),
    "dnnl_post_ops_append_binary": (c_void_p, c_int, c_void_p),
    "dnnl_primitive_attr_create": (c_void_p,),
    "dnnl_primitive_attr_set_scratchpad_mode": (c_void_p, c_int),
    "dnnl_primitive_attr_set_post_ops": (c_void_p, c_void_p),
    "dnnl_inner_product_forward_primitive_desc_create": (c_void_p, c_void_p, c_int, *[c_void_p] * 5),
    "dnnl_reorder_primitive_desc_create": (c_void_p,) * 6,
    "dnnl_primitive_create": (c_void_p, c_void_p),
    "dnnl_primitive_execute": (c_void_p, c_void_p, c_int, c_void_p),
}


class _Version(ctypes.Structure):
    _fields_ = [("major", c_int), ("minor", c_int), ("patch", c_int), ("hash", c_char_p)]


class Argument(ctypes.Structure):
    """One entry of a primitive's argument list; writing `memory` swaps an operand."""

    _fields_ = [("index", c_int), ("memory", c_void_p)]


class Owned:
    """A library object, destroyed with the Python object."""

    __slots__ = ("_destroy", "keep", "pointer")

    def __init__(self, pointer: int | None, destroy, keep=None):
        self.pointer, self._destroy, self.keep = pointer, destroy, keep

    def __del__(self):
        self._destroy(self.pointer)


class Api:
    """The loaded library and its CPU engine. One per process: `api()`."""

    def __init__(self, path: str):
        try:
            self.lib = ctypes.CDLL(path)
            self._gomp = ctypes.CDLL("libgomp.so.1")
        except OSError as error:
            raise UserError(
                f"host kernel 'onednn': {path} does not load ({error}); use host kernel 'reference'"
            ) from error
        self.lib.dnnl_version.restype = ctypes.POINTER(_Version)
        version = self.lib.dnnl_version().contents
        self.version = f"{version.major}.{version.minor}.{version.patch}"
        if version.major != 3:
            raise UserError(
                f"host kernel 'onednn': {path} is oneDNN {self.version}; version 3 is needed (pip install {WHEEL})"
            )
        for name, types in _SIGNATURES.items():
            function = getattr(self.lib, name)
            function.argtypes, function.restype = types, c_int
        self.lib.dnnl_primitive_desc_query_md.argtypes = (c_void_p, c_int, c_int)
        self.lib.dnnl_primitive_desc_query_md.restype = c_void_p
        self.lib.dnnl_memory_desc_get_size.argtypes = (c_void_p,)
        self.lib.dnnl_memory_desc_get_size.restype = c_size_t
        self.execute = self.lib.dnnl_primitive_execute
        self.set_pointer = self.lib.dnnl_memory_set_data_handle
        self.engine = self._make("engine", ENGINE_CPU, 0)
        self.avx512 = bool(self.lib.dnnl_get_effective_cpu_isa() & ISA_AVX512_BIT)

    def _make(self, kind: str, *args, by: str | None = None, keep=None) -> Owned:
        """A new object of `kind`, made by `dnnl_{by}(&pointer, *args)` (default `{kind}_create`)."""
        pointer, by = c_void_p(), by or f"{kind}_create"
        self.check(getattr(self.lib, f"dnnl_{by}")(ctypes.byref(pointer), *args), by)
        destroy = getattr(self.lib, f"dnnl_{kind}_destroy")
        destroy.argtypes = (c_void_p,)
        return Owned(pointer.value, destroy, keep)

    @staticmethod
    def check(status: int, what: str) -> None:
        if status:
            raise RuntimeError(f"oneDNN: {what} failed with status {status}")

    def set_threads(self, threads: int) -> None:
        """OpenMP threads of the calling thread."""
        self._gomp.omp_set_num_threads(threads)

    def stream(self) -> Owned:
        return self._make("stream", self.engine.pointer, STREAM_IN_ORDER)

    def layout(self, rows: int, columns: int) -> Owned:
        """Row-major float32 [rows, columns]."""
        dims, strides = (c_int64 * MAX_DIMS)(rows, columns), (c_int64 * MAX_DIMS)(columns, 1)
        return self._make("memory_desc", 2, dims, F32, strides, by="memory_desc_create_with_strides")

    def any_layout(self, rows: int, columns: int) -> Owned:
        """float32 [rows, columns] in whatever layout the primitive likes best."""
        return self._make(
            "memory_desc", 2, (c_int64 * MAX_DIMS)(rows, columns), F32, FORMAT_ANY, by="memory_desc_create_with_tag"
        )

    def size(self, layout: Owned) -> int:
        """Bytes of a layout."""
        return self.lib.dnnl_memory_desc_get_size(layout.pointer)

    def memory(self, layout: Owned, address: int, keep=None) -> Owned:
        """A view of caller-owned memory; `keep` is kept alive with it."""
        return self._make("memory", layout.pointer, self.engine.pointer, address, keep=keep)

    def inner_product(self, load: int, weights: Owned, outputs: int, inputs: int, gated: bool = False) -> InnerProduct:
        """dst [n, M] = src [n, K] W^T, with `gated` dst = swish(src W^T) * other [n, M]."""
        attr = self._make("primitive_attr")
        self.check(self.lib.dnnl_primitive_attr_set_scratchpad_mode(attr.pointer, SCRATCHPAD_USER), "scratchpad mode")
        src, dst = self.layout(load, inputs), self.layout(load, outputs)
        if gated:
            post = self._make("post_ops")
            self.check(self.lib.dnnl_post_ops_append_eltwise(post.pointer, SWISH, 1.0, 0.0), "swish")
            self.check(self.lib.dnnl_post_ops_append_binary(post.pointer, BINARY_MUL, dst.pointer), "binary product")
            self.check(self.lib.dnnl_primitive_attr_set_post_ops(attr.pointer, post.pointer), "post-operations")
        described = self._make(
            "primitive_desc",
            *(self.engine.pointer, FORWARD_INFERENCE, src.pointer, weights.pointer, None, dst.pointer, attr.pointer),
            by="inner_product_forward_primitive_desc_create",
        )
        primitive = self._make("primitive", described.pointer)
        packed, scratchpad = self._query(described, QUERY_WEIGHTS), self._query(described, QUERY_SCRATCHPAD)
        return InnerProduct(primitive, src, dst, packed, scratchpad)

    def _query(self, described: Owned, what: int) -> Owned:
        found = self.lib.dnnl_primitive_desc_query_md(described.pointer, what, 0)
        return self._make("memory_desc", found, by="memory_desc_clone")

    def reorder(self, stream: Owned, source: Owned, array: np.ndarray, target: Owned) -> Owned:
        """Copies `array`, laid out as `source`, into fresh memory laid out as `target`."""
        buffer = aligned_empty(-(-self.size(target) // 4))
        out = self.memory(target, buffer.ctypes.data, keep=buffer)
        described = self._make(
            "primitive_desc",
            *(source.pointer, self.engine.pointer, target.pointer, self.engine.pointer, None),
            by="reorder_primitive_desc_create",
        )
        primitive = self._make("primitive", described.pointer)
        given = self.memory(source, array.ctypes.data, keep=array)
        args = (Argument * 2)(Argument(ARG_SRC, given.pointer), Argument(ARG_DST, out.pointer))
        self.check(self.execute(primitive.pointer, stream.pointer, 2, args), "reorder")
        return out


class InnerProduct:
    """A compiled inner product and the layouts of its operands."""

    __slots__ = ("dst", "primitive", "scratchpad", "src", "weights")

    def __init__(self, primitive: Owned, src: Owned, dst: Owned, weights: Owned, scratchpad: Owned):
        self.primitive, self.src, self.dst, self.weights, self.scratchpad = primitive, src, dst, weights, scratchpad


def find_dnnl() -> str | None:
    """Where the wheel put `libdnnl.so.3` (outside site-packages, in the environment's lib), or None."""
    try:
        files = importlib.metadata.files(WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [Path(str(f.locate())) for f in files if f.name == "libdnnl.so.3"]
    return str(found[0]) if found and found[0].is_file() else None


@functools.cache
def api() -> Api:
    """Loads the library once. Raises UserError where the wheel is absent or does not load."""
    path = find_dnnl()
    if path is None:
        raise UserError(
            f"host kernel 'onednn' needs the {WHEEL} wheel (Linux x86-64), which is not installed: "
            "pip install 'hybrimoe-jax[onednn]', or use host kernel 'reference'"
        )
    return Api(path)
