"""The routed experts of a MoE layer at decode on an NVIDIA GPU: two kernels of our own (`cuda/experts.cu`).

XLA's form (`models.packed`) reads codes four bytes or fewer at a time, computes experts that are not here, and takes
kernels for each. These read packed bytes once, 16 at a time, of the experts that are here only.

The kernels are CUDA C++, compiled to PTX by `scripts/make_ptx.py` when they change; the PTX is part of the package, and the
GPU's driver turns it into machine code. So nothing has to be compiled or installed on a user's machine: XLA takes PTX
as a custom call.

Shapes: N rows, k experts a row, S slots, D model width, F expert width.
"""

from __future__ import annotations

import functools
from importlib import resources

import chex
import jax
import jax.numpy as jnp
import numpy as np

from hybrimoe_jax.formats.packing import PANEL, STEP, MatrixLayout, PackedExpert
from hybrimoe_jax.models.packed import rounded_activations

MOST_ROWS = 8
MOST_PAIRS = 128
"""Of N * k; the kernels keep a table of them."""
GATE_UP_THREADS, DOWN_THREADS = 256, 512
TARGET = "__gpu$xla.gpu.ptx"


def fits(rows: int, top: int) -> bool:
    """Whether a call with that many rows and experts a row is for these kernels."""
    return rows <= MOST_ROWS and rows * top <= MOST_PAIRS


def routed(acc: jax.Array, x: jax.Array, slots: jax.Array, weights: jax.Array, pool: PackedExpert) -> jax.Array:
    """acc [N, D] plus the weighted experts of x [N, D], on a GPU.

    Args:
      slots: [N, k] int32, places in the pool; -1 for an expert that is not there, of which nothing is read.
      weights: [N, k], of the experts' outputs.
      pool: `data` [S, nbytes], its layout that of one expert.
    """
    layout, (rows, top) = pool.layout, slots.shape
    chex.assert_shape((acc, x), (rows, layout.width))
    chex.assert_equal_shape((slots, weights))
    chex.assert_shape(pool.data, (None, layout.nbytes))
    inward, outward, format = layout.inward, layout.outward, layout.format
    kernels = f"int{format.bits}-{1 if rows == 1 else MOST_ROWS}"
    slots = slots.astype(jnp.int32)

    shape = _shape(inward, rows, top, layout.nbytes, (0, inward.nbytes), outward.depth)
    seen = _padded(rounded_activations(x, format), inward.depth)
    inner = jax.ShapeDtypeStruct((rows * top, outward.depth), jnp.float32)
    grid = (outward.depth // PANEL, rows * top)
    inner = _call(kernels, "silu_gate_up", grid, GATE_UP_THREADS, inner, seen, slots, pool.data, shape)

    shape = _shape(outward, rows, top, layout.nbytes, (2 * inward.nbytes, 0), layout.width)
    if format.a8:
        inner = _padded(rounded_activations(inner[:, : layout.hidden], format), outward.depth)
    out = jax.ShapeDtypeStruct(acc.shape, jnp.float32)
    grid = (outward.panels, 1)
    return _call(kernels, "add_down", grid, DOWN_THREADS, out, acc, inner, slots, weights, pool.data, shape)


def _shape(
    layout: MatrixLayout, rows: int, top: int, expert_bytes: int, at: tuple[int, int], pitch: int
) -> np.ndarray:
    """The kernels' `Shape`. at: where the matrices begin in an expert."""
    format = layout.format
    inputs = STEP * 8 // format.bits
    wide = format.scale_dtype.itemsize == 4
    zeros_at = layout.zeros_at if format.zeros else 0
    shift = (format.group // inputs).bit_length() - 1
    matrix = (layout.rows, layout.panels, layout.depth, layout.depth // inputs, layout.groups, shift)
    parts = (layout.scales_at, wide, zeros_at, format.middle)
    return np.array([rows, top, expert_bytes, *at, *matrix, *parts, pitch], np.int32)


def _padded(x: jax.Array, depth: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, depth - x.shape[1])))


def _call(kernels: str, name: str, grid: tuple[int, int], threads: int, out: jax.ShapeDtypeStruct, *operands):
    """Launches a kernel: its arguments are the operands and then the result."""
    launch = dict(grid_x=grid[0], grid_y=grid[1], grid_z=1, block_x=threads, block_y=1, block_z=1, shared_mem_bytes=0)
    call = jax.ffi.ffi_call(TARGET, out)
    numbers = {key: np.int32(value) for key, value in launch.items()}
    return call(*operands, name=name, kernel_type="ptx", kernel_data=ptx(kernels), **numbers)


@functools.cache
def ptx(kernels: str) -> str:
    """The PTX of both kernels: `int4-1` is that for int4 codes and one row."""
    return resources.files("hybrimoe_jax.models").joinpath("cuda", f"{kernels}.ptx").read_text()
