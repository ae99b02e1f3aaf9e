"""The routed experts of a MoE layer at decode on an NVIDIA GPU: two kernels of our own (`cuda/experts.cu`).

XLA's form (`models.packed`) reads codes four bytes or fewer at a time, computes experts that are not here, and takes
kernels for each. These read packed bytes once, 16 at a time, of the experts that are here only.

The kernels are CUDA C++, compiled to PTX by `scripts/make_ptx.py` when they change; the PTX is part of the package, and
the GPU's driver turns it into machine code. So nothing has to be compiled or installed on a user's machine: XLA takes
PTX as a custom call.

Shapes: N rows, k experts a row, S slots, D model width, F expert width.
"""

from __future__ import annotations

import functools
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np

from hybrimoe_jax.formats.layout import PANEL, STEP, ExpertLayout, Format, MatrixLayout, PackedExpert
from hybrimoe_jax.models.packed import packed_forward, rounded_activations

MOST_ROWS = 8
MOST_PAIRS = 128
"""Of N * k; the kernels keep a table of them."""
GATE_UP_THREADS, DOWN_THREADS = 256, 512
TARGET = "__gpu$xla.gpu.ptx"


def fits(rows: int, top: int = 1) -> bool:
    """Whether a call with that many rows and experts a row is for these kernels."""
    return rows <= MOST_ROWS and rows * top <= MOST_PAIRS


def add_expert(acc: jax.Array, x: jax.Array, weights: jax.Array, expert: PackedExpert) -> jax.Array:
    """acc [N, D] plus one expert, in a buffer of its own, of the rows of x whose weight [N] is not 0."""
    slots = jnp.where(weights == 0, -1, 0)[:, None]
    return routed(acc, x, slots, weights[:, None], PackedExpert(expert.data[None], expert.layout))


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


def _shape(layout: MatrixLayout, rows: int, top: int, expert_bytes: int, at: tuple[int, int], pitch: int) -> np.ndarray:
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
def refusal() -> str | None:
    """Why this process's GPU can't be given the kernels, None where it can: they are tried on a small pool."""
    if jax.default_backend() != "gpu":
        return "it needs a GPU, and jax finds none"
    layout, rng = ExpertLayout(Format.parse("int4-g32"), 64, 32), np.random.default_rng(0)
    pool = rng.integers(0, 40, (2, layout.nbytes), np.uint8)  # scales are finite
    acc, x = rng.standard_normal((2, 1, layout.width), np.float32)
    slots, weights = np.array([[1, -1]]), np.ones((1, 2), np.float32)
    try:
        have = np.asarray(jax.jit(routed)(acc, x, slots, weights, PackedExpert(pool, layout)))
    except Exception as error:  # whatever XLA or the driver says
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
    want = acc + np.asarray(packed_forward(PackedExpert(jnp.asarray(pool[1]), layout), x))
    if not np.abs(have - want).max() <= 1e-4 * np.abs(want).max():
        return "its result differs from XLA's"
    return None


@functools.cache
def ptx(kernels: str) -> str:
    """The PTX of both kernels: `int4-1` is that for int4 codes and one row."""
    return Path(__file__).parent.joinpath("cuda", f"{kernels}.ptx").read_text()
