"""Reading a layer's routing on the host, against a brute-force oracle."""

from __future__ import annotations

import numpy as np
from grids import examples
from hypothesis import given
from hypothesis import strategies as st

from hybrimoe_jax.decide.prefetch.prediction import predict
from hybrimoe_jax.engine.routing import read_routing


@st.composite
def routings(draw):
    """(ids [N, k], weights [N, k], scores [N, E], ahead [distance][N, E], valid rows), as a front program would
    make them."""
    experts = draw(st.integers(2, 9))
    top_k = draw(st.integers(1, experts))
    rows = draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(rows)])
    weights = rng.random((rows, top_k), np.float32)
    scores = rng.random((rows, experts), np.float32)
    ahead = [rng.random((rows, experts), np.float32) for _ in range(draw(st.integers(0, 3)))]
    if rows == 1:
        valid = [0]
    else:
        valid = sorted(draw(st.sets(st.integers(0, rows - 1), min_size=1)))
    return ids, weights, scores, ahead, np.array(valid)


def packed(ids, weights, scores, ahead) -> np.ndarray:
    return np.concatenate([ids.astype(np.float32), weights, scores, *ahead], axis=1)


@examples(200)
@given(routings())
def test_it_says_who_is_needed_by_which_rows_with_which_weights(routing):
    ids, weights, scores, ahead, valid = routing
    top_k, experts = ids.shape[1], scores.shape[1]
    x = np.arange(len(ids) * 3, dtype=np.float32).reshape(-1, 3)
    read = read_routing(packed(ids, weights, scores, ahead), top_k, experts, valid)
    behind = read_routing(np.hstack([x, packed(ids, weights, scores, ahead)]), top_k, experts, valid, width=3)
    assert read.x is None and behind.loads == read.loads
    np.testing.assert_array_equal(behind.x, x)
    for mine, other in zip([behind.scores, *behind.ahead], [read.scores, *ahead], strict=True):
        np.testing.assert_array_equal(mine, other)

    wanted: dict[int, list[tuple[int, float]]] = {}
    for row in valid.tolist():
        for expert, weight in zip(ids[row].tolist(), weights[row].tolist(), strict=True):
            wanted.setdefault(expert, []).append((row, weight))
    assert read.loads == {expert: len(pairs) for expert, pairs in wanted.items()}
    assert all(type(expert) is int and type(load) is int for expert, load in read.loads.items())
    for expert, pairs in wanted.items():
        have = list(zip(read.rows[expert].tolist(), read.weights[expert].tolist(), strict=True))
        assert have == pairs, "rows as they come"
    assert set(read.rows) == set(read.weights) == set(wanted)
    np.testing.assert_allclose(read.scores, scores[valid].mean(axis=0), rtol=1e-6)
    np.testing.assert_array_equal(read.ids, ids)
    np.testing.assert_array_equal(read.row_weights, weights)
    np.testing.assert_array_equal(read.row_scores, scores)


@examples(200)
@given(routings())
def test_predictions_are_each_tokens_best_experts_of_the_later_layer(routing):
    ids, weights, scores, ahead, valid = routing
    top_k, experts = ids.shape[1], scores.shape[1]
    predictions = [
        predict(rows, top_k)
        for rows in read_routing(packed(ids, weights, scores, ahead), top_k, experts, valid).shown().ahead
    ]
    assert len(predictions) == len(ahead)
    for (loads, means), later in zip(predictions, ahead, strict=True):
        wanted: dict[int, int] = {}
        for row in valid.tolist():
            for expert in sorted(range(experts), key=lambda e: -later[row, e])[:top_k]:
                wanted[expert] = wanted.get(expert, 0) + 1
        assert dict(loads) == wanted
        np.testing.assert_allclose(means, later[valid].mean(axis=0), rtol=1e-5)


def test_padding_is_routed_nowhere():
    ids, weights = np.array([[0], [1], [1], [3]]), np.ones((4, 1), np.float32)
    read = read_routing(packed(ids, weights, np.eye(4, dtype=np.float32), []), 1, 4, np.array([0, 2]))
    assert read.loads == {0: 1, 1: 1}
    assert read.rows[1].tolist() == [2]
    np.testing.assert_array_equal(read.scores, [0.5, 0, 0.5, 0])
