"""The reference kernel: NumPy, as simple as it can be. Every other kernel is tested against it, and it runs everywhere.

Shapes: n load, D model width, F expert width.

bfloat16 and quantised weights become float32 at every call. With `-a8` the inputs of each product are first rounded as
`packing.quantise_activations` says, at every load: those of gate and up are the expert's input, those of down are
`silu(gate) * up`. A product of int8 codes summed as integers differs from this only by the rounding of float32 sums.
"""

from __future__ import annotations

import numpy as np

from hybrimoe_jax.formats.layout import Format
from hybrimoe_jax.formats.packing import (
    HostExpert,
    PackedExpert,
    check_packed,
    dequantise,
    quantise_activations,
)
from hybrimoe_jax.formats.plain import check_expert, to_f32
from hybrimoe_jax.host_kernels.kernel import HostKernel

# exp(88) is the last power that float32 holds; silu below -88 is zero to 1e-36.
EXP_LIMIT = np.float32(88.0)


def silu(x: np.ndarray) -> np.ndarray:
    """x / (1 + exp(-x)) in float32 without overflow."""
    return x / (1 + np.exp(np.minimum(-x, EXP_LIMIT)))


def rounded_activations(x: np.ndarray, format: Format) -> np.ndarray:
    """x [N, K] as a product in this format sees it: rounded to int8 codes and back with `-a8`, else x itself."""
    if not format.a8:
        return x
    codes, scales = quantise_activations(x, format.group)
    return codes.astype(np.float32) * scales[:, np.arange(x.shape[1]) // format.group]


class ReferenceKernel(HostKernel):
    """NumPy float32; the handle is the expert itself, plain or packed."""

    name = "reference"

    def prepare(self, weights: HostExpert) -> HostExpert:
        if isinstance(weights, PackedExpert):
            check_packed(weights)
        else:
            check_expert(weights)
        return weights

    def expert(self, handle: HostExpert, x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        # W x^T, not x W^T: with few columns BLAS is up to twice as fast that way round.
        if isinstance(handle, PackedExpert):
            format = handle.layout.format
            seen = rounded_activations(x, format).T
            gate, up, down = handle.matrices
            inner = silu(dequantise(gate) @ seen) * (dequantise(up) @ seen)
            y = dequantise(down) @ rounded_activations(inner.T, format).T
        else:
            gate, up = np.split(to_f32(handle.gate_up) @ x.T, 2)
            y = to_f32(handle.down) @ (silu(gate) * up)
        if out is None:
            return np.ascontiguousarray(y.T)
        np.copyto(out, y.T)
        return out
