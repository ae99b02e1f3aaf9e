"""The byte trigram model: a proper distribution, computed as its definition says, better than less context."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hybrimoe_jax.train.trigram import ByteTrigram

TEXT = (b"the cat sat on the mat and the dog sat on the log; " * 40)[:1800]


def test_every_context_gives_a_distribution():
    model = ByteTrigram([TEXT])
    np.testing.assert_allclose(model.trigram.sum(-1), 1.0, atol=1e-9)
    assert (model.trigram > 0).all(), "an unseen byte has infinite loss"


def test_interpolation_by_hand():
    """abab: unigram a=2, b=2 of 4 with 2 kinds; after a, b twice with 1 kind; after ab, a once with 1 kind."""
    model = ByteTrigram([b"abab"])
    unigram = (2 + 2 / 256) / 6
    after_b = (1 + 1 * unigram) / 2
    after_ab = (1 + 1 * after_b) / 2
    assert model.trigram[ord("a"), ord("b"), ord("a")] == pytest.approx(after_ab)
    after_a = (2 + 1 * unigram) / 3
    expected = -math.log(unigram) - math.log(after_a) - math.log(after_ab)
    assert model.loss(b"aba") == pytest.approx(expected)


def test_more_context_helps_on_text_not_seen():
    model = ByteTrigram([TEXT])
    unseen = b"the dog and the cat sat on the mat; the log sat on the dog"
    b = np.frombuffer(unseen, np.uint8)
    unigram = -np.log(model.unigram[b]).sum()
    bigram = -np.log(model.bigram[b[:-1], b[1:]]).sum()
    assert model.loss(unseen) < bigram < unigram
