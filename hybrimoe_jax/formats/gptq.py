"""Rounding a matrix so that its products, not its weights, stay what they were: error-compensated rounding (GPTQ).

Columns are rounded one after the other. What a column's rounding does to the outputs is made up for, as well as the
activations allow, by moving the columns that are still to come: with H = X^T X over the calibration inputs and U the
upper Cholesky factor of H's inverse, an error e of column j adds -e / U[j, j] * U[j, j + 1 :] to them. Columns with
much to say go first. Scales are those of round to nearest, so that a matrix without calibration inputs comes out as
`packing.quantise` gives it.

Source: Frantar et al., arXiv 2210.17323 (algorithm 1; order and groups are options of its code).

Shapes: a matrix is [R, K], R outputs by K inputs.
"""

# NumPy 2.5 types some functions by what its stubs leave unknown.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import numpy as np

from hybrimoe_jax.formats.packing import Format, quantise, reciprocal

DAMPING = 0.01  # of H's mean diagonal, added to it: the paper's
BLOCK = 128


def compensated(
    weights: np.ndarray, hessian: np.ndarray, format: Format
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """`weights` float32 [R, K] and H [K, K] of their inputs -> codes, scales and zero points for `packing.pack`.

    Inputs that are always zero are rounded to nearest. Deterministic; where H is zero the result is
    `packing.quantise`'s.
    """
    codes, scales, zeros = quantise(weights, format)
    hessian = np.array(hessian, np.float64)
    diagonal = np.diag(hessian).copy()
    if not diagonal.any():
        return codes, scales, zeros
    columns = weights.shape[1]
    hessian[np.diag_indices(columns)] += np.where(diagonal > 0, DAMPING * diagonal.mean(), diagonal.mean())
    order = np.argsort(-diagonal, kind="stable")
    inverse = np.linalg.inv(hessian[np.ix_(order, order)])
    factor = np.linalg.cholesky((inverse + inverse.T) / 2).T.astype(np.float32)
    group = order // format.group
    scale, divisor = scales[:, group], reciprocal(scales)[:, group]
    if zeros is None:
        offset = np.full((1, columns), format.middle, np.float32)
    else:
        offset = zeros.astype(np.float32)[:, group]
    low, high = (0, 15) if format.bits == 4 else (-127, 127)
    left = weights[:, order].astype(np.float32)
    out = np.empty_like(left)
    for start in range(0, columns, BLOCK):  # within a block column by column, then all that follow at once
        stop = min(start + BLOCK, columns)
        errors = np.empty((weights.shape[0], stop - start), np.float32)
        for j in range(start, stop):
            code = np.clip(np.rint(left[:, j] * divisor[:, j]) + offset[:, j], low, high)
            out[:, j] = code
            error = (left[:, j] - (code - offset[:, j]) * scale[:, j]) / factor[j, j]
            left[:, j + 1 : stop] -= error[:, None] * factor[j, j + 1 : stop]
            errors[:, j - start] = error
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    rounded = np.empty_like(codes)
    rounded[:, order] = out.astype(codes.dtype)
    return rounded, scales, zeros
