"""Routed experts that lie quantised: which packed format holds them exactly, and the packing itself.

A packed matrix has one scale for every 32, 64 or 128 neighbouring inputs. A checkpoint whose groups are made of such
runs goes in code by code, scale by scale. Act-order checkpoints scatter a group over the inputs. For an expert's down
matrix that can be undone: its inputs are the expert's own hidden values, so sorting them by group and permuting the
rows of gate and up the same way changes nothing. The inputs of gate and up are the residual stream, whose order all
experts share; scattered groups there do not fit.

Shapes: D model width, F expert width; gate and up are [F, D], down [D, F].
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import TypeGuard

import numpy as np

from hybrimoe_jax.checkpoint.quantised.codes import Codes, Kind, QuantisedTensor, run_length
from hybrimoe_jax.checkpoint.weights import Experts, ListedExperts, PackedExperts, Shard, Tensor, Weights
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats.packing import ExpertLayout, Format, PackedExpert, pack
from hybrimoe_jax.formats.plain import aligned_empty


def coded(matrices: Iterable[Tensor]) -> list[QuantisedTensor]:
    """Those of them that lie quantised."""
    return [matrix for matrix in matrices if isinstance(matrix, QuantisedTensor)]


def is_coded(experts: Experts | None) -> TypeGuard[ListedExperts]:
    """Whether some of their matrices lie quantised."""
    return isinstance(experts, ListedExperts) and any(map(coded, experts.matrices))


def kinds_of(experts: ListedExperts) -> Iterator[Kind | None]:
    """Of every matrix; None for one that is not quantised. Down matrices count as sorted by group."""
    for matrices in map(coded, experts.matrices):
        if len(matrices) < 3:
            yield None
            continue
        gate, up, down = matrices
        yield from (gate.kind, up.kind)
        kind = down.kind
        yield kind if kind.group else dataclasses.replace(kind, group=run_length(np.sort(down.group_of())))


def packed_expert(experts: ListedExperts, format: Format, expert: int) -> PackedExpert:
    """One expert's codes, scales and zero points in the layout of `format`, which `holds` has found to fit.

    Raises UserError where a tensor's numbers are not what its checkpoint's configuration says.
    """
    tensors = coded(experts.matrices[expert])
    gate, up, down = (tensor.codes() for tensor in tensors)
    if down.grouped(format.group) is None:
        order = np.argsort(down.group_of, kind="stable")
        gate, up, down = gate.rows(order), up.rows(order), down.columns(order)
    width, hidden = down.codes.shape
    layout = ExpertLayout(format, width, hidden)
    out = PackedExpert(aligned_empty(layout.nbytes, np.uint8), layout)
    for codes, tensor, place in zip((gate, up, down), tensors, out.matrices, strict=True):
        pack(format, *fitted(codes, format, tensor.where), out=place.data)
    return out


def fitted(codes: Codes, format: Format, where: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """What `packing.pack` takes for `format`; raises UserError where a number does not fit."""

    def refuse(what: str) -> UserError:
        return UserError(f"{where}: {what}; give --format f32, which keeps its values")

    grouped = codes.grouped(format.group)
    if grouped is None:
        raise refuse(f"its groups are no runs of {format.group} inputs")
    numbers, scales, zeros = grouped
    if numbers.dtype == np.int8 and numbers.min() < -127:
        raise refuse("it has codes of -128, where -127 to 127 are used")
    if not np.isfinite(scales).all():
        raise UserError(f"{where}: its scales are not all finite numbers; download or save it again")
    if not np.array_equal(scales.astype(format.scale_dtype).astype(np.float32), scales):
        raise refuse(f"its scales are no {format.scale} numbers")
    if zeros is not None and not format.zeros:
        raise refuse("config.json calls it symmetric but its zero points are not in the middle")
    if zeros is None and format.zeros:
        zeros = np.full(scales.shape, 8, np.uint8)
    return numbers, scales, zeros


def exact_format(kinds: Iterable[Kind | None]) -> Format | str:
    """The format that holds matrices of these kinds without rounding, or why there is none."""
    every = set(kinds)
    known = [kind for kind in every if kind is not None]
    if len(known) < len(every):
        return "some of them are not quantised"
    bits = {kind.bits for kind in known}
    if len(bits) > 1:
        return "some have 4 bits and some 8"
    groups = [kind.group for kind in known if kind.group is not None]
    if len(groups) < len(known):
        return "their groups are no runs of 32 inputs (act-order, or smaller groups)"
    zeros = any(kind.zeros for kind in known)
    if zeros and bits == {8}:
        return "8 bits with zero points"
    scale = "f32" if any(kind.scale == "f32" for kind in known) else "f16"
    return Format(bits.pop(), min(groups), zeros, scale)


def holds(format: Format, exact: Format) -> bool:
    """Whether `format` holds everything that `exact` does: same bits, as fine groups, zero points and wide scales."""
    return (
        format.bits == exact.bits
        and exact.group % format.group == 0
        and format.zeros >= exact.zeros
        and (format.scale == exact.scale or format.scale == "f32")
    )


def quantised_format(weights: Weights) -> Format | None:
    """The packed format that a quantised checkpoint's experts go into exactly; None for one that is not quantised.

    Raises UserError where they are quantised but fit none.
    """
    every = [shard.experts for shard in weights.shards if shard.experts is not None]
    quantised = [experts for experts in every if is_coded(experts)]
    if not quantised:
        return None
    kinds = {kind for experts in quantised for kind in kinds_of(experts)}
    if len(quantised) < len(every):
        kinds.add(None)
    exact = exact_format(kinds)
    if isinstance(exact, str):
        raise UserError(
            f"{weights.folder}: its quantised experts fit no packed format without being rounded again: {exact}; "
            "give --format f32, which keeps their values"
        )
    return exact


def as_packed(weights: Weights, fmt: str | None) -> Weights:
    """The model with quantised experts as the `PackedExperts` of `fmt`; others pass unchanged.

    `fmt` None: the format that fits best.

    Raises UserError where the experts are quantised but `fmt`, or any format, would have to round them again.
    """
    if fmt in ("f32", "bf16") or (exact := quantised_format(weights)) is None:
        return weights
    format = exact if fmt is None else Format.parse(fmt)
    if not holds(format, exact):
        raise UserError(
            f"{weights.folder}: its experts are {exact}; rounding them again to {format} would lose accuracy twice "
            f"(give --format {exact}, f32 or bf16)"
        )
    layout = ExpertLayout(format, weights.config.hidden_size, weights.config.moe_width)

    def packed(shard: Shard) -> Shard:
        if not is_coded(shard.experts):
            return shard
        one = functools.partial(packed_expert, shard.experts, format)
        return dataclasses.replace(shard, experts=PackedExperts(shard.experts.count, layout, one))

    return dataclasses.replace(weights, shards=tuple(map(packed, weights.shards)))
