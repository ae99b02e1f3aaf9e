"""Quantised dense tensors: which ones, and rounding one a block of rows at a time.

Quantised are the matrices that are only ever multiplied with (`Linear` through `products.product`): attention and
expert projections and the head. Kept as they are: norms and biases; the token table, of which a step reads a row;
routers, whose near-ties decide which experts run, and the one-row gate of a shared expert. DeepSeek's `kv_b_proj` is
never given rounded activations (`-a8` is taken off its format): latent attention multiplies with parts of it from
either side, and must mean the same by both.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from hybrimoe_jax.checkpoint.weights import Tensor
from hybrimoe_jax.formats.packing import PANEL, Format, MatrixLayout, PackedMatrix, pack, quantise
from hybrimoe_jax.formats.plain import aligned_empty

BLOCK_FLOATS = 1 << 22
"""Of the rows rounded at once."""


def is_projection(name: str, shape: tuple[int, ...]) -> bool:
    """Whether `--dense-format` is for the tensor of this checkpoint name."""
    last = name.removesuffix(".weight").rpartition(".")[2]
    return len(shape) == 2 and (name == "lm_head.weight" or "_proj" in last)


def format_of(name: str, format: Format) -> Format:
    """The format of the projection `name` where `--dense-format` is `format`."""
    return dataclasses.replace(format, a8=False) if name.endswith("kv_b_proj.weight") else format


def pack_tensor(tensor: Tensor, format: Format) -> PackedMatrix:
    """Rounds a tensor [R, K] to nearest; holds its packed bytes and a block of its rows."""
    layout = MatrixLayout(format, *tensor.shape)
    data = aligned_empty(layout.nbytes, np.uint8)
    data[:] = 0
    step = max(1, BLOCK_FLOATS // (PANEL * layout.columns)) * PANEL
    for start in range(0, layout.rows, step):
        block = np.asarray(tensor.read(start, min(start + step, layout.rows)), np.float32)
        part = pack(format, *quantise(block, format))
        for to, source, size in parts_of_panels(layout, part.layout, start // PANEL):
            data[to : to + size] = part.data[source : source + size]
    return PackedMatrix(data, layout)


def parts_of_panels(whole: MatrixLayout, part: MatrixLayout, first: int) -> list[tuple[int, int, int]]:
    """Where the panels of `part` lie: (in whole, in part, bytes) of codes, scales and zero points.

    They are those of `whole` from the one numbered `first` on.
    """
    codes, scales = part.codes_nbytes // part.panels, part.groups * PANEL * part.format.scale_dtype.itemsize
    places = [(0, 0, codes), (whole.scales_at, part.scales_at, scales)]
    if part.format.zeros:
        places.append((whole.zeros_at, part.zeros_at, part.groups * PANEL))
    return [(to + first * size, source, part.panels * size) for to, source, size in places]
