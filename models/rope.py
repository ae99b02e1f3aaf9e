"""Rotary position embedding: inverse frequencies and the scaling rules that `rope_scaling` may name.

A `Rope` is a hashable static (it holds plain floats), so layers of one kind share one executable.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from hybrimoe_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Rope:
    """positions [B, T] -> cos, sin [B, T, d/2] in float32, both multiplied by `attention_factor`."""

    inverse_frequencies: tuple[float, ...]
    attention_factor: float = 1.0

    def __call__(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        angles = positions[..., None].astype(jnp.float32) * jnp.asarray(self.inverse_frequencies, jnp.float32)
        return jnp.cos(angles) * self.attention_factor, jnp.sin(angles) * self.attention_factor


def make_rope(width: int, theta: float, scaling: Mapping[str, Any] | None) -> Rope:
    """The rotary embedding of a head part of `width`; raises UserError for a scaling rule it does not know."""
    base = tuple(float(theta) ** (-2.0 * i / width) for i in range(width // 2))
    kind = "default" if not scaling else scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return Rope(base)
    if kind == "linear":
        return Rope(tuple(f / float(scaling["factor"]) for f in base))
    raise UserError(f"config.json: rope_scaling type {kind!r} is not supported (default, linear)")
