"""Numbers on their way into a checkpoint are finite: before they are rounded, and after."""

from __future__ import annotations

import numpy as np

from hybrimoe_jax.checkpoint.weights import Experts, ListedExperts, StackedExperts
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats.packing import PackedMatrix, scales_are_finite
from hybrimoe_jax.formats.plain import is_finite

PARTS = ("gate", "up", "down")


def called(tensor: object, otherwise: str) -> str:
    """The file and the name of a tensor, where it knows them."""
    return getattr(tensor, "where", None) or otherwise


def expert_parts(experts: Experts, expert: int, otherwise: str) -> list[str]:
    """The same of an expert's gate, up and down."""
    if isinstance(experts, StackedExperts):
        tensors: tuple[object, ...] = experts.gate_up, experts.gate_up, experts.down
    else:
        tensors = experts.matrices[expert] if isinstance(experts, ListedExperts) else (None,) * 3
    return [called(t, f"{otherwise}, {part} of expert {expert}") for t, part in zip(tensors, PARTS, strict=True)]


def narrowed(given: np.ndarray, dtype: np.dtype, where: str) -> np.ndarray:
    """The array in another type. UserError, beginning with `where`, if it has or gets numbers that are not finite."""
    with np.errstate(over="ignore"):
        made = np.ascontiguousarray(given, dtype)
    if not is_finite(made):
        raise not_finite(where, given, dtype)
    return made


def check_packed_finite(made: PackedMatrix, given, where: str) -> None:
    """The same of a matrix that was rounded; `given()` reads what it is made of."""
    if not scales_are_finite(made):
        raise not_finite(where, given(), made.layout.format)


def not_finite(where: str, given: np.ndarray, kept_as: object) -> UserError:
    """Why the numbers given are not finite as they are kept."""
    wide = np.asarray(given, np.float32)
    bad = np.argwhere(~np.isfinite(wide))
    if not len(bad):
        most = np.abs(wide).max()
        return UserError(f"{where} has numbers up to {most:.3g}, which overflow in {kept_as}; give --format f32")
    place, more = ", ".join(map(str, bad[0].tolist())), f" and {len(bad) - 1} more such" * (len(bad) > 1)
    return UserError(
        f"{where} holds {wide[tuple(bad[0])]} at [{place}]{more}, which is no finite number; download or save it again"
    )
