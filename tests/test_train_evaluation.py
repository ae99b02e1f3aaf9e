"""Evaluation: nats per byte over whole works, and router statistics that see a collapse."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_train_loop import CONFIG, VERSES

from hybrimoe_jax.models import parameters
from hybrimoe_jax.models.moe import DenseExperts
from hybrimoe_jax.models.registry import build_model
from hybrimoe_jax.train import evaluation, loop, tokens
from hybrimoe_jax.train.corpus import Text

WORKS = [Text("one", "modern", VERSES), Text("two", "modern", VERSES[::-1] + "\u00e9\n")]


@pytest.fixture(scope="module")
def model():
    return loop.init_params(CONFIG, 0), tokens.train_tokenizer([WORKS[0]], 300)


def test_loss_equals_that_of_the_dense_model_over_the_bytes(model):
    params, tokenizer = model
    result = evaluation.evaluate(CONFIG, params, tokenizer, WORKS, context=256, rows=2)
    graphdef, _ = parameters.split(build_model(CONFIG))

    @jax.jit
    def nats(params, ids):
        decoder = parameters.merge(graphdef, params["dense"])
        experts = DenseExperts(loop.expert_weights(params))
        cache, positions = decoder.init_cache(1, ids.shape[1] - 1), jnp.arange(ids.shape[1] - 1)[None]
        logits, _ = decoder(ids[:, :-1], cache, positions, experts)
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).sum()

    expected = sum(float(nats(params, tokens.encode(tokenizer, work)[None])) for work in WORKS)
    assert result.bytes == sum(len(w.text.encode()) for w in WORKS)
    assert result.loss == pytest.approx(expected / result.bytes, rel=1e-5)
    assert result.works["one"] != result.works["two"]


def test_short_windows_predict_every_id_once(model):
    params, tokenizer = model
    ids = tokens.encode(tokenizer, WORKS[0])
    predicted = [w.targets[w.valid] for w in tokens.windows(ids, 7)]
    np.testing.assert_array_equal(np.concatenate(predicted), ids[1:])
    result = evaluation.evaluate(CONFIG, params, tokenizer, WORKS[:1], context=7, rows=4)
    assert result.tokens == len(ids) - 1


def test_statistics_see_a_collapsed_router(model):
    params, tokenizer = model
    healthy = evaluation.evaluate(CONFIG, params, tokenizer, WORKS, context=64, rows=2)
    count, top_k = CONFIG.num_experts, CONFIG.num_experts_per_tok
    gates = {k: v * (0 if k.endswith("mlp.gate.weight") else 1) for k, v in params["dense"].items()}
    collapsed = evaluation.evaluate(CONFIG, {**params, "dense": gates}, tokenizer, WORKS, context=64, rows=2)
    assert collapsed.least_share == [0.0, 0.0] and collapsed.largest_share == [count / top_k] * 2
    assert collapsed.overlap == pytest.approx([1.0, 1.0]) and collapsed.chance == pytest.approx([1.0, 1.0])
    for load in (*healthy.load, *collapsed.load):
        assert sum(load) == healthy.tokens * top_k and len(load) == count
    assert 0 < min(healthy.least_share) and max(healthy.largest_share) < count / top_k


def test_description_has_the_loss_and_a_row_a_layer():
    result = evaluation.Evaluation(
        1.5, {"w": 1.5}, 10, 5, 64, [0.2, 0.5], [2.0, 2.0], [0.3, 0.3], [0.15, 0.15], [[1, 1], [1, 1]]
    )
    lines = evaluation.describe(evaluation.summary(result)).splitlines()
    assert "1.5000 nats/byte" in lines[0] and len(lines) == 4


def test_rounding_is_that_of_bfloat16():
    rounded = evaluation.round_bf16({"dense": {"w": jnp.asarray([1.0, 1.001, 3.14159])}})["dense"]["w"]
    assert rounded.dtype == jnp.float32
    np.testing.assert_array_equal(rounded, np.float32([1.0, 1.0, 3.140625]))
    assert jax.tree.leaves(rounded)
