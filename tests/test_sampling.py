"""From logits to a token: the distribution's properties, and streams that belong to a sequence."""

from __future__ import annotations

import numpy as np
import pytest
from grids import examples
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hybrimoe_jax.engine.sampling import Sampler, Sampling, distribution
from hybrimoe_jax.errors import UserError

LOGITS = arrays(np.float32, st.integers(1, 30), elements=st.floats(-60, 60, width=32))
TEMPERATURES = st.floats(0.01, 50)
each = examples(150)


@each
@given(LOGITS, TEMPERATURES)
def test_without_cuts_it_is_the_softmax(logits, temperature):
    have = distribution(logits, Sampling(temperature))
    scaled = np.exp(logits.astype(np.float64) / temperature - logits.max() / temperature)
    np.testing.assert_allclose(have, scaled / scaled.sum(), rtol=1e-4, atol=1e-12)


@each
@given(LOGITS, TEMPERATURES, st.integers(0, 40), st.floats(0.001, 1))
def test_whatever_the_cuts_it_is_a_distribution_that_keeps_the_best(logits, temperature, top_k, top_p):
    have = distribution(logits, Sampling(temperature, top_k, top_p))
    assert have.dtype == np.float64 and have.shape == logits.shape
    assert abs(have.sum() - 1) < 1e-9 and (have >= 0).all()
    assert have[np.argmax(logits)] == have.max()
    kept, whole = have > 0, distribution(logits, Sampling(temperature))
    if kept.any() and not kept.all():  # what is dropped is never likelier than what is kept
        assert whole[~kept].max() <= whole[kept].min() + 1e-12


@each
@given(LOGITS, TEMPERATURES, st.integers(1, 40))
def test_top_k_keeps_the_k_best_in_their_proportions(logits, temperature, top_k):
    have, whole = distribution(logits, Sampling(temperature, top_k)), distribution(logits, Sampling(temperature))
    kept = np.argsort(-logits, kind="stable")[:top_k]
    np.testing.assert_allclose(have[kept], whole[kept] / whole[kept].sum(), rtol=1e-6, atol=1e-300)
    assert have.sum() == pytest.approx(have[kept].sum())


@each
@given(LOGITS, TEMPERATURES, st.floats(0.001, 0.999))
def test_top_p_keeps_the_fewest_that_reach_p(logits, temperature, top_p):
    whole = distribution(logits, Sampling(temperature))
    have = distribution(logits, Sampling(temperature, top_p=top_p))
    kept = have > 0
    assert whole[kept].sum() >= top_p - 1e-9
    if kept.sum() > 1:  # without the least likely one, p is not reached
        assert whole[kept].sum() - whole[kept].min() < top_p + 1e-9


@pytest.mark.parametrize(
    ("weights", "cuts", "kept"),
    [
        ([0.4, 0.3, 0.2, 0.1], {"top_p": 0.55}, [4 / 7, 3 / 7, 0, 0]),
        ([0.4, 0.3, 0.2, 0.1], {"top_p": 0.55, "top_k": 2}, [1, 0, 0, 0]),  # of 0.4 and 0.3 alone the first is 0.57
        ([1, 1], {"top_p": 0.5}, [1, 0]),  # reached exactly, and the lower id of two equals
        ([1, 1, 1, 1], {"top_p": 0.5}, [0.5, 0.5, 0, 0]),
        ([1, 1, 1, 1], {"top_p": 0.5, "top_k": 4}, [0.5, 0.5, 0, 0]),  # as many as there are
        ([1, 1e-18], {"top_p": 1.0}, [1, 1e-18]),  # every token
        ([1, 2, 1, 2], {"top_k": 3}, [0.2, 0.4, 0, 0.4]),
        ([1, 2, 1, 2], {"top_k": 1}, [0, 1, 0, 0]),
    ],
)
def test_a_cut_keeps_the_token_that_reaches_it_and_of_equals_the_lower_id(weights, cuts, kept):
    logits = np.log(np.array(weights, np.float32))
    np.testing.assert_allclose(distribution(logits, Sampling(1.0, **cuts)), kept, rtol=1e-5)


def test_draws_follow_the_distribution():
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    sampler = Sampler(Sampling(1.0, seed=1), 1)
    counts = np.bincount([sampler(0, logits) for _ in range(4000)], minlength=3) / 4000
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.2], atol=0.03)


def test_greedy_takes_the_first_of_the_best():
    assert Sampler(Sampling(), 1)(0, np.array([1.0, 3.0, 3.0])) == 1


def test_a_sequences_stream_is_its_own():
    logits = np.zeros(1000, np.float32)
    alone, together = Sampler(Sampling(1.0, seed=3), 1), Sampler(Sampling(1.0, seed=3), 3)
    drawn = [alone(0, logits) for _ in range(5)]
    mixed = []
    for _ in range(5):
        together(2, logits), together(1, logits)
        mixed.append(together(0, logits))
    assert mixed == drawn
    assert [together(1, logits) for _ in range(5)] != drawn


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"seed": -1},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.01},
        {"top_p": float("nan")},
    ],
)
def test_impossible_options_are_refused_by_name(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-30, 1e30])
def test_extreme_temperatures_are_still_distributions(temperature):
    have = distribution(np.array([1.0, 2.0, -3.0], np.float32), Sampling(temperature))
    assert abs(have.sum() - 1) < 1e-9
