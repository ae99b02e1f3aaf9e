"""Every family against transformers: prefill logits and greedy tokens, batch 1 and a ragged batch, chunked prefill.

Each case first shows that its seed proves something: no decision (next token, routed experts) is near a tie.
"""

from importlib.util import find_spec

import hf
import numpy as np
import pytest
from grids import few

pytestmark = pytest.mark.skipif(
    not (find_spec("torch") and find_spec("transformers")), reason="torch or transformers is not installed"
)

TOLERANCE = 2e-5
"""Allowed logit difference as a share of the logits' own scale (the largest magnitude)."""

FAMILIES = ("mixtral-window-tied", "qwen2-mixed", "qwen3-window-bias", "olmoe-clip", "deepseek-groups")
"""A case of each family, with all that is peculiar about it; the others are slow."""


def cases(names):
    return pytest.mark.parametrize("name", few(names, hf.ALL_CASES))


every_family, one_family = cases(FAMILIES), cases(FAMILIES[:1])


def rows_of(name):
    return hf.prompts(hf.ALL_CASES[name].seed)


def references(name):
    return [hf.reference(name, tuple(row)) for row in rows_of(name)]


def assert_parity(prefill, tokens, rows, expected):
    for row, ours, new, theirs in zip(rows, prefill, tokens, expected):
        logits = theirs.logits[: len(row)]
        assert ours.shape == logits.shape
        assert np.abs(ours - logits).max() <= TOLERANCE * np.abs(logits).max()
        assert new == theirs.tokens


@pytest.mark.slow
@every_family
def test_seed_has_no_near_ties(name):
    config = hf.loaded(name).config
    for row, theirs in zip(rows_of(name), references(name)):
        generated = theirs.logits[len(row) - 1 :]
        assert generated.argmax(-1).tolist() == theirs.tokens, "transformers with and without its cache disagree"
        assert hf.top_margin(generated).min() >= 20 * TOLERANCE
        assert min(hf.router_margin(config, layer).min() for layer in theirs.router) >= 5 * TOLERANCE
        assert len(set(theirs.tokens)) >= 7, "a text of few tokens hides errors"


@every_family
def test_ragged_batch(name):
    """Three prompts of three, two and one prefill chunks, padded on the right, decoded together."""
    rows = rows_of(name)
    assert max(map(len, rows)) > 2 * hf.CHUNK
    assert_parity(*hf.run_ours(name, rows), rows, references(name))


@one_family
def test_batch_of_one(name):
    rows = rows_of(name)[:1]
    assert_parity(*hf.run_ours(name, rows), rows, references(name)[:1])


@pytest.mark.parametrize("name", ["mixtral-window-tied", "deepseek-groups"])
def test_prompt_in_one_chunk(name):
    """The size of the chunk does not matter (DeepSeek expands its latents for this one, and absorbs in the others)."""
    rows = rows_of(name)[:1]
    prefill, _ = hf.run_ours(name, rows, new_tokens=1, chunk=64)
    logits = hf.reference(name, tuple(rows[0])).logits[: len(rows[0])]
    assert np.abs(prefill[0] - logits).max() <= TOLERANCE * np.abs(logits).max()
