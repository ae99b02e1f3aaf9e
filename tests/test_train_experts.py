"""Grouped experts against the dense oracle: same outputs, same gradients, nothing dropped however skewed the
routing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import each_once

from hybrimoe_jax.models.moe import DenseExperts, Routing
from hybrimoe_jax.train.experts import GroupedExperts, assign_blocks

EXPERTS, TOP_K, WIDTH, HIDDEN, TOKENS = 8, 2, 16, 12, 37


def problem(skew: str):
    keys = jax.random.split(jax.random.key(3), 4)
    weights = (
        jax.random.normal(keys[0], (EXPERTS, 2 * HIDDEN, WIDTH)) * 0.3,
        jax.random.normal(keys[1], (EXPERTS, WIDTH, HIDDEN)) * 0.3,
    )
    x = jax.random.normal(keys[2], (TOKENS, WIDTH))
    logits = jax.random.normal(keys[3], (TOKENS, EXPERTS))
    if skew == "two experts take all":
        logits = logits.at[:, jnp.array([1, 6])].add(100.0)
    if skew == "last expert takes half":
        logits = logits.at[:, EXPERTS - 1].add(100.0)
    return weights, x, logits


def output(experts, x, logits):
    scores = jax.nn.softmax(logits)
    values, ids = jax.lax.top_k(scores, TOP_K)
    return experts(0, x, Routing(ids.astype(jnp.int32), values, scores))


@pytest.mark.parametrize(
    ("skew", "block"), each_once(["even", "two experts take all", "last expert takes half"], [1, 8, 64])
)
def test_grouped_equals_dense_in_value_and_gradient(skew, block):
    weights, x, logits = problem(skew)

    def total(make):
        def of(weights, x, logits):
            y = output(make(weights), x, logits)
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.value_and_grad(of, (0, 1, 2), has_aux=True))(weights, x, logits)

    (_, dense), dense_grads = total(lambda w: DenseExperts([w]))
    (_, grouped), grouped_grads = total(lambda w: GroupedExperts({0: w}, block))
    np.testing.assert_allclose(grouped, dense, atol=2e-5)
    for ours, oracle in zip(jax.tree.leaves(grouped_grads), jax.tree.leaves(dense_grads)):
        np.testing.assert_allclose(ours, oracle, atol=5e-5)
    assert np.abs(jax.tree.leaves(dense_grads)[0]).max() > 1e-3, "the gradients compared are not all zero"


def test_every_pair_has_its_own_row_in_a_block_of_its_expert():
    ids = jnp.asarray([[0, 3], [3, 1], [3, 0], [2, 3], [3, 2]], jnp.int32)
    row, token, expert = (np.asarray(part) for part in assign_blocks(ids, 5, 4))
    assert len(set(row.ravel())) == ids.size
    np.testing.assert_array_equal(expert[row // 4], ids)
    np.testing.assert_array_equal(token[row], np.arange(5)[:, None].repeat(2, axis=1))
    assert (token == 5).sum() == token.size - ids.size, "every other row is marked as padding"
