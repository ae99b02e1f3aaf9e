"""How the models multiply: float32 in, float32 sums.

A GPU computes float32 products on its ordinary cores. Its tensor cores take bfloat16, at many times the rate, and sum
in float32. A float32 number is the sum of three bfloat16 numbers to its last bit, so a float32 product is a sum of nine
bfloat16 products, of which the six largest matter (`FLOAT32_BY_PARTS`). Where weights are bfloat16 nothing is left out.
Products of prompts use that form; a few rows are bound by reading the weights, and keep the ordinary cores.

XLA's CPU backend ignores such a choice silently, so it is made where a product is traced, by `target.backend`.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from hybrimoe_jax.models.target import backend

PRECISION = jax.lax.Precision.HIGHEST
"""float32 products as float32: a GPU's default rounds them to TF32 (10 mantissa bits), which moves greedy tokens."""
FLOAT32_BY_PARTS = jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X6
ROUNDED = jax.lax.DotAlgorithmPreset.BF16_BF16_F32
"""Operands rounded to bfloat16 (8 bits), as most engines compute: `EngineConfig.precision` "bfloat16"."""
SMALLEST_SIDE = 16
"""Rows and columns from which a product is for tensor cores: theirs are tiles of 16."""


def einsum(spec: str, *operands: jax.Array) -> jax.Array:
    """`jnp.einsum` with float32 operands kept and results accumulated in float32."""
    precision = PRECISION
    if backend() == "gpu" and smallest_side(spec, *operands) >= SMALLEST_SIDE:
        # jax's own setting is part of what it keeps a traced program by, so engines of both kinds live side by side.
        rounded = getattr(jax.config, "jax_default_matmul_precision") == "bfloat16"  # noqa: B009  its types lack it
        precision = ROUNDED if rounded else FLOAT32_BY_PARTS
        operands = tuple(operand.astype(jnp.float32) for operand in operands)
    return jnp.einsum(spec, *operands, precision=precision, preferred_element_type=jnp.float32)


def smallest_side(spec: str, left: jax.Array, right: jax.Array) -> int:
    """Rows or columns of the matrices that a product is made of, whichever are fewer; `spec` as in `einsum`.

    Only the left operand's may begin with an ellipsis.
    """
    lefts, rights = spec.partition("->")[0].split(",")
    shared = math.prod(size for letter, size in zip(rights, right.shape, strict=True) if letter in lefts)
    return min(left.size, right.size) // max(shared, 1)
