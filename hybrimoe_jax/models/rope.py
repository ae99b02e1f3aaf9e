"""Rotary position embedding: inverse frequencies and the scaling rules that `rope_scaling` may name.

A pair of dimensions i is rotated by `position * theta^(-2i/d)`. The scaling rules stretch a trained context: `linear`
slows every pair; `llama3` slows only long wavelengths; `yarn` blends the two per pair and also corrects the attention's
temperature. A `Rope` is a hashable static (it holds plain floats), so layers of one kind share one executable.
Frequencies are computed in float32, as the reference implementations do.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrimoe_jax.errors import UserError, shown

_override: contextvars.ContextVar[Callable[[Rope, jax.Array], tuple[jax.Array, jax.Array]] | None]
_override = contextvars.ContextVar("what stands in for ropes in what is being traced", default=None)


@contextlib.contextmanager
def override(answer: Callable[[Rope, jax.Array], tuple[jax.Array, jax.Array]]) -> Iterator[None]:
    """In what is traced inside, `answer(rope, positions)` says what a rope gives.

    For a program that knows several steps' positions beforehand. XLA's CPU backend fuses sines and cosines into what
    uses them and computes them again for every head of every layer (10 us a layer of a 466 M model).
    """
    token = _override.set(answer)
    try:
        yield
    finally:
        _override.reset(token)


@dataclasses.dataclass(frozen=True)
class Rope:
    """positions [B, T] -> cos, sin [B, T, d/2] in float32, both multiplied by `attention_factor`."""

    inverse_frequencies: tuple[float, ...]
    attention_factor: float = 1.0

    def __call__(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        answer = _override.get()
        return self.computed(positions) if answer is None else answer(self, positions)

    def computed(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        angles = positions[..., None].astype(jnp.float32) * jnp.asarray(self.inverse_frequencies, jnp.float32)
        return jnp.cos(angles) * self.attention_factor, jnp.sin(angles) * self.attention_factor


def make_rope(
    width: int, theta: float, scaling: Mapping[str, Any] | None, max_position_embeddings: int | None = None
) -> Rope:
    """The rotary embedding of a head part of `width`.

    Args:
      width: d, the dimensions that are rotated; even.
      theta: base wavelength.
      scaling: the `rope_scaling` dictionary (`rope_type` or, in older files, `type`), or None.
      max_position_embeddings: stands in for a missing `original_max_position_embeddings`.

    Raises:
      UserError: odd width, an unknown rule, or one of its numbers missing or out of range.
    """
    if width % 2:
        raise UserError(f"config.json: the rotary width {width} is odd")
    if not 0 < theta <= LARGEST:
        raise UserError(f"config.json: rope_theta must be a number above 0, not {theta}")
    with np.errstate(divide="ignore", over="ignore"):  # what is not finite is refused below
        base = (1.0 / np.float32(theta) ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))).astype(
            np.float32
        )
    scaling = dict(scaling or {})
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise UserError(f"config.json: rope_scaling type {shown(kind)} is not supported ({', '.join(SCALINGS)} are)")
    if scaling.get("original_max_position_embeddings") is None:
        scaling["original_max_position_embeddings"] = max_position_embeddings
    for name in POSITIVE:
        value = scaling.get(name)
        if value is not None and not (type(value) in (int, float) and 0 < value <= LARGEST):
            raise UserError(
                f"config.json: rope_scaling {shown(kind)}: {name} must be a number above 0, not {shown(value)}"
            )
    for name in ("mscale", "mscale_all_dim"):
        value = scaling.get(name)
        if value is not None and not (type(value) in (int, float) and 0 <= value <= LARGEST):
            raise UserError(
                f"config.json: rope_scaling {shown(kind)}: {name} must be a number of at least 0, not {shown(value)}"
            )
    try:
        frequencies, factor = SCALINGS[kind](base, width, float(theta), scaling, max_position_embeddings)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"config.json: rope_scaling {shown(kind)} is incomplete or malformed ({shown(error)})"
        ) from error
    if not (np.isfinite(frequencies).all() and math.isfinite(factor)):
        raise UserError(
            f"config.json: rope_theta {theta} and rope_scaling {shown(kind)} do not give finite frequencies"
        )
    return Rope(tuple(float(f) for f in frequencies.astype(np.float32)), float(factor))


def plain(base, width, theta, scaling, max_positions):
    return base, 1.0


def linear(base, width, theta, scaling, max_positions):
    """Positions divided by `factor`."""
    return base / np.float32(scaling["factor"]), 1.0


def llama3(base, width, theta, scaling, max_positions):
    """Llama 3.1: wavelengths beyond the trained context slowed by `factor`, short ones kept, a linear blend between."""
    factor, low, high = (np.float32(scaling[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    if low >= high:
        raise UserError(
            f"config.json: rope_scaling 'llama3': high_freq_factor {high:g} must be above low_freq_factor {low:g}; are "
            "they swapped?"
        )
    rotations = np.float32(scaling["original_max_position_embeddings"]) * base / np.float32(2 * math.pi)
    keep = np.clip((rotations - low) / (high - low), 0.0, 1.0).astype(np.float32)
    return (1 - keep) * base / factor + keep * base, 1.0


def yarn(base, width, theta, scaling, max_positions):
    """YaRN (Peng et al., arXiv 2309.00071): pairs that rotate often are kept, slow ones interpolated, a ramp between.

    The attention factor follows `attention_factor`, else `mscale` / `mscale_all_dim` if both are given, else the paper.
    """
    original = scaling["original_max_position_embeddings"]
    factor = scaling["factor"]
    factor = max_positions / original if factor is None else factor

    def pair_of(rotations: float) -> float:
        """Index of the pair that makes so many rotations within the original context."""
        return width * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_of(scaling.get("beta_fast") or 32), pair_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    high = high + 0.001 if low == high else high
    blend = np.clip((np.arange(width // 2, dtype=np.float32) - low) / (high - low), 0, 1).astype(np.float32)
    frequencies = base / np.float32(factor) * blend + base * (1 - blend)
    attention = scaling.get("attention_factor")
    if attention is None:
        mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
        both = mscale and all_dim
        attention = yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim) if both else yarn_mscale(factor)
    return frequencies, attention


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's temperature for a context stretched by `factor`: 0.1 * mscale * ln(factor) + 1."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


LARGEST = float(np.finfo(np.float32).max)
POSITIVE = (
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
)
PARAMETERS = {
    *POSITIVE,
    *("type", "rope_type", "rope_theta", "partial_rotary_factor", "mscale", "mscale_all_dim", "truncate"),
    *("short_factor", "long_factor", "mrope_section"),  # of rules that are refused, and of images' positions
}
Scaling = Callable[[np.ndarray, int, float, Mapping[str, Any], int | None], tuple[np.ndarray, float]]
"""(base frequencies [d/2], d, theta, the rule's numbers, max_position_embeddings) -> frequencies, attention factor."""
SCALINGS: dict[str, Scaling] = {"default": plain, "linear": linear, "llama3": llama3, "yarn": yarn}
