"""The GPU's form of decode attention, run on the CPU: the same answers, and the same cache, as the usual products."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from grids import each_once

from hybrimoe_jax.models import one_token
from hybrimoe_jax.models.parameters import merge, split
from hybrimoe_jax.models.registry import build_model
from hybrimoe_jax.models.target import traced_for

CAPACITY = 301
FAMILIES = ["deepseek_v2", "qwen2_moe", "mixtral"]


@pytest.mark.parametrize(("family", "span"), each_once(FAMILIES, [256, CAPACITY]))
def test_reading_in_place_gives_the_same_answers(family, span):
    """A row near the start, one that sees all that is read, and one that is only padding."""
    config = tiny.weights(family)[0]
    layer = build_model(config, nnx.Rngs(0)).model.layers[-1]
    graphdef, parameters = split(layer)
    rng = np.random.default_rng(0)
    cache = {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32)
        for name, shape in layer.self_attn.cache_shapes(3, CAPACITY).items()
    }
    h = jnp.asarray(rng.normal(size=(3, 1, config.hidden_size)), jnp.float32)
    positions = jnp.asarray([[3], [span - 1], [CAPACITY]], jnp.int32)

    def attend(h, cache, positions):
        return merge(graphdef, parameters).attend(h, cache, positions, span)

    want, kept = jax.jit(attend)(h, cache, positions)
    with traced_for("gpu"):
        assert one_token.in_place(1) and not one_token.in_place(2)
        got, written = jax.jit(lambda *arguments: attend(*arguments))(h, cache, positions)
    np.testing.assert_allclose(got[:2], want[:2], rtol=2e-5, atol=2e-5)
    for name in cache:
        axis = kept[name].shape.index(CAPACITY + 1)
        ours, theirs = (np.moveaxis(np.asarray(part[name]), axis, 0)[:CAPACITY] for part in (written, kept))
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
