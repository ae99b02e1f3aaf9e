"""How prompts are multiplied on a GPU's tensor cores: emulated in NumPy for the error, compiled elsewhere.

The split is what `jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X6` and its kin say. What a tensor core's own sums add to
the error only a GPU can tell.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny

from hybrimoe_jax.engine.checks import check_precision
from hybrimoe_jax.engine.config import EngineConfig
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.models import precision
from hybrimoe_jax.models.target import traced_for

ROWS, INPUTS, OUTPUTS = 64, 2048, 96


def parts_of(matrix: np.ndarray, rounded, count: int) -> list[np.ndarray]:
    """float32 numbers as sums of `count` numbers that `rounded` keeps, the largest first."""
    parts, rest = [], matrix
    for _ in range(count):
        parts.append(rounded(rest))
        rest = rest - parts[-1]
    return parts


def bf16(x: np.ndarray) -> np.ndarray:
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def tf32(x: np.ndarray) -> np.ndarray:
    """Rounded to 10 mantissa bits."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & np.uint32(0xFFFFE000)).view(np.float32)


def by_parts(x: np.ndarray, weight: np.ndarray, rounded, count: int, most: int) -> np.ndarray:
    """x times the transpose of a weight: products of parts i and j with i + j <= `most`, the smallest added first."""
    left, right = parts_of(x, rounded, count), parts_of(weight, rounded, count)
    pairs = sorted(((i, j) for i in range(count) for j in range(count) if i + j <= most), key=sum, reverse=True)
    return sum((left[i] @ right[j].T for i, j in pairs), np.zeros((), np.float32))


FORMS = {
    "float32": lambda x, w: x @ w.T,
    "bf16 x6": lambda x, w: by_parts(x, w, bf16, 3, 2),
    "bf16 x3": lambda x, w: by_parts(x, w, bf16, 2, 1),
    "tf32 x3": lambda x, w: by_parts(x, w, tf32, 2, 1),
    "bf16": lambda x, w: by_parts(x, w, bf16, 1, 0),
}
LIMITS = {"float32": 4e-7, "bf16 x6": 4e-7, "bf16 x3": 1e-5, "tf32 x3": 6e-7, "bf16": 5e-3}
"""Largest error allowed, as a share of the results' root mean square."""


def errors(weight_is_bf16: bool) -> dict[str, float]:
    """Root mean square error of each form against float64, over the results' own; a residual stream has outliers."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((ROWS, INPUTS), np.float32)
    x[:, rng.integers(0, INPUTS, 8)] *= 60
    weight = 0.02 * rng.standard_normal((OUTPUTS, INPUTS), np.float32)
    weight = bf16(weight) if weight_is_bf16 else weight
    exact = x.astype(np.float64) @ weight.T.astype(np.float64)
    size = np.sqrt(np.mean(exact**2))
    return {name: float(np.sqrt(np.mean((form(x, weight) - exact) ** 2)) / size) for name, form in FORMS.items()}


@pytest.mark.parametrize("weight_is_bf16", [True, False], ids=["bf16 weights", "f32 weights"])
def test_six_products_of_parts_are_as_accurate_as_float32(weight_is_bf16):
    found = errors(weight_is_bf16)
    assert all(found[name] < limit for name, limit in LIMITS.items()), found
    assert found["bf16 x6"] < 1.2 * found["float32"]
    assert found["bf16 x3"] > 5 * found["float32"] and found["bf16"] > 1e-3  # what is not enough, and what peers do


def algorithm(rows: int) -> object:
    """What a product of so many rows is traced with."""
    x, weight = jnp.zeros((rows, 32)), jnp.zeros((48, 32), jnp.bfloat16)
    made = jax.make_jaxpr(lambda *operands: precision.einsum("nk,rk->nr", *operands))(x, weight)
    (dot,) = (e for e in made.eqns if e.primitive.name == "dot_general")
    return dot.params["precision"]


def test_only_prompts_on_a_gpu_are_multiplied_by_parts():
    exact = (jax.lax.Precision.HIGHEST,) * 2
    assert algorithm(64) == exact
    with traced_for("gpu"):
        assert algorithm(8) == exact and algorithm(16) == precision.FLOAT32_BY_PARTS
        with jax.default_matmul_precision("bfloat16"):
            assert algorithm(8) == exact and algorithm(16) == precision.ROUNDED


@pytest.mark.parametrize(
    ("spec", "left", "right", "side"),
    [
        ("...i,oi->...o", (2, 5, 7), (11, 7), 10),
        ("bkqd,bksd->bkqs", (2, 3, 8, 4), (2, 3, 9, 4), 8),
        ("nk,nke->ne", (5, 2), (5, 2, 9), 1),
    ],
)
def test_the_sides_of_a_product(spec, left, right, side):
    assert precision.smallest_side(spec, jnp.zeros(left), jnp.zeros(right)) == side


def test_bfloat16_is_refused_on_the_cpu_and_set_for_steps_elsewhere(monkeypatch):
    with pytest.raises(UserError, match="precision bfloat16 is for a GPU"):
        check_precision(EngineConfig(precision="bfloat16"))
    with pytest.raises(UserError, match="precision 'half' is unknown"):
        EngineConfig(precision="half")

    seen = []
    with tiny.engine() as engine:
        engine.options = dataclasses.replace(engine.options, precision="bfloat16")
        forward = engine._forward.forward

        def noting(*step):
            seen.append(jax.config.jax_default_matmul_precision)
            return forward(*step)

        monkeypatch.setattr(engine._forward, "forward", noting)
        engine.generate([[3, 1, 4]], max_new_tokens=2)
    assert seen == ["bfloat16"] * 2
    assert jax.config.jax_default_matmul_precision != "bfloat16"
