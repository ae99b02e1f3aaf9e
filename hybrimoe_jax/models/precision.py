"""How the models multiply: float32 in, float32 sums."""

from __future__ import annotations

import jax
import jax.numpy as jnp

PRECISION = jax.lax.Precision.HIGHEST
"""float32 products as float32: a GPU's default rounds them to TF32 (10 mantissa bits), which moves greedy tokens."""


def einsum(spec: str, *operands: jax.Array) -> jax.Array:
    """`jnp.einsum` with float32 operands kept and results accumulated in float32."""
    return jnp.einsum(spec, *operands, precision=PRECISION, preferred_element_type=jnp.float32)
