"""The reference kernel: NumPy, whose BLAS does the products. Every other kernel is tested against it.

Shapes: n load, D model width, F expert width. float32 weights are used where they lie; bfloat16 weights are widened
block by block as they are used, so a block is still in the cache when BLAS reads it and no float32 copy is kept.

Three forms of `W x^T` are used, by what was measured with one OpenBLAS thread (AVX-512 server core, [1024, 1024] float32,
microseconds; a GEMM call for few columns runs far below memory bandwidth):

| load | 1 | 2 | 4 | 8 | 32 | 128 |
| --- | --- | --- | --- | --- | --- | --- |
| `x @ W.T` | 255 | 839 | 902 | 1198 | 1408 | 3478 |
| `W @ x.T` | 251 | 459 | 527 | 707 | 1098 | 3136 |
| one GEMV per token and block of rows | 248 | 339 | 477 | 806 | - | - |

So: a GEMV at load 1, blocked GEMVs at loads 2 to 5 of large matrices (the block stays in the cache for the next token),
otherwise `W @ x.T`, which leaves gate and up as two contiguous halves.

Quantised experts are computed by `dequantised`.
"""

from __future__ import annotations

import numpy as np

from hybrimoe_jax.host_kernels.dequantised import packed_expert
from hybrimoe_jax.formats.plain import BF16, check_expert, to_f32
from hybrimoe_jax.host_kernels.kernel import HostKernel, Scratch
from hybrimoe_jax.formats.packing import HostExpert, PackedExpert, check_packed

GEMV_LOADS = range(2, 6)
GEMV_BYTES = 512 * 1024  # smaller matrices are cached whole
BLOCK_ROWS = 64
BLOCK_FLOATS = 32 * 1024  # of a widened bfloat16 block: 128 KB
# exp(88) is the last power that float32 holds; silu below -88 is zero to 1e-36.
EXP_LIMIT = np.float32(88.0)
ONE = np.float32(1.0)

_scratch = Scratch()


def silu_times(gate: np.ndarray, up: np.ndarray, out: np.ndarray) -> np.ndarray:
    """`silu(gate) * up` in float32 without overflow; `out` may be `up` but not `gate`."""
    scale = _scratch.view("silu", 1, gate.size)[0].reshape(gate.shape)
    np.negative(gate, scale)
    np.minimum(scale, EXP_LIMIT, out=scale)
    np.exp(scale, scale)
    np.add(scale, ONE, scale)
    np.divide(gate, scale, scale)
    return np.multiply(scale, up, out)


class ReferenceKernel(HostKernel):
    """NumPy float32; the handle is the expert itself, plain or packed."""

    name = "reference"

    def prepare(self, weights: HostExpert) -> HostExpert:
        (check_packed if isinstance(weights, PackedExpert) else check_expert)(weights)
        return weights

    def expert(self, handle: HostExpert, x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        load = x.shape[0]
        if out is None:
            out = np.empty((load, handle.width), np.float32)
        if isinstance(handle, PackedExpert):
            return packed_expert(handle, x, out, silu_times)
        gate_up, down = handle
        width, hidden = down.shape
        if gate_up.dtype == BF16:
            return _widened_expert(gate_up, down, x, out)
        if load == 1:
            both = _scratch.view("both", 1, 2 * hidden)[0]
            np.dot(gate_up, x[0], both)
            up = both[hidden:]
            np.dot(down, silu_times(both[:hidden], up, up), out[0])
            return out
        if load in GEMV_LOADS and gate_up.nbytes >= GEMV_BYTES and not (2 * hidden % BLOCK_ROWS or width % BLOCK_ROWS):
            both = _blocked_gemv(gate_up, x, _scratch.view("both", load, 2 * hidden))
            act = silu_times(both[:, :hidden], both[:, hidden:], _scratch.view("act", load, hidden))
            return _blocked_gemv(down, act, out)
        both = _scratch.view("both", 2 * hidden, load)
        np.matmul(gate_up, x.T, out=both)
        up = both[hidden:]
        y = _scratch.view("y", width, load)
        np.matmul(down, silu_times(both[:hidden], up, up), out=y)
        np.copyto(out, y.T)
        return out


def _blocked_gemv(weight: np.ndarray, x: np.ndarray, out: np.ndarray) -> np.ndarray:
    """weight [M, K], x [n, K] -> out [n, M]: a stacked product [M/64, n] of GEMVs, tokens innermost."""
    rows, columns = weight.shape
    blocks = weight.reshape(rows // BLOCK_ROWS, 1, BLOCK_ROWS, columns)
    stacked = out.reshape(len(x), rows // BLOCK_ROWS, BLOCK_ROWS).transpose(1, 0, 2)
    np.matmul(blocks, x[None, :, :, None], out=stacked[..., None])
    return out


def _widened_expert(gate_up: np.ndarray, down: np.ndarray, x: np.ndarray, out: np.ndarray) -> np.ndarray:
    """bfloat16 weights, any load."""
    width, hidden = down.shape
    both = _scratch.view("both", 2 * hidden, x.shape[0])
    _widened_product(gate_up, x.T, both)
    up = both[hidden:]
    y = _scratch.view("y", width, x.shape[0])
    _widened_product(down, silu_times(both[:hidden], up, up), y)
    np.copyto(out, y.T)
    return out


def _widened_product(weight: np.ndarray, x: np.ndarray, out: np.ndarray) -> None:
    """weight [M, K] bfloat16 times x [K, n] -> out [M, n], a block of rows at a time."""
    rows, columns = weight.shape
    step = max(1, BLOCK_FLOATS // columns) if x.shape[1] <= 16 else max(1, 8 * BLOCK_FLOATS // columns)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        block = to_f32(weight[start:stop], _scratch.view("block", stop - start, columns))
        np.matmul(block, x, out=out[start:stop])
