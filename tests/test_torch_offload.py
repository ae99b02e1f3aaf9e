"""The PyTorch engine: its answers and its counts are those of our own."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tiny

pytest.importorskip("torch", reason="the PyTorch baseline needs torch")

from torch_models import offload

from hybrimoe_jax.baselines.torch_offload import MODES, TorchOffload
from hybrimoe_jax.engine.config import EngineConfig
from hybrimoe_jax.engine.load import load

LENGTHS = (5, 37, 20)


@pytest.fixture(scope="module")
def bundled():
    """The bundled model's dense answer: prompt, tokens, logits."""
    engine = load(None, EngineConfig(executor="dense"))
    assert engine.tokenizer is not None
    ids = engine.tokenizer.encode("To be, or not to be, that is the question:")
    tokens = engine.generate([ids], max_new_tokens=12).token_ids
    return ids, tokens, engine.logits(ids)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_the_bundled_model_gives_the_dense_tokens(mode, bundled):
    ids, tokens, logits = bundled
    with TorchOffload(mode=mode, threads=1) as torch_engine:
        assert torch_engine.generate([ids], max_new_tokens=12).token_ids == tokens
        assert np.abs(torch_engine.logits(ids) - logits).max() < 2e-5 * np.abs(logits).max()


@pytest.mark.parametrize("mode", MODES)
def test_counts_are_those_of_our_engine(mode):
    """On the clock of a profile's machine every decision is ours, whatever it depends on."""
    options = {"clock": "virtual", "cache_ratio": 0.5}
    ours = tiny.engine("qwen2_moe", system=MODES[mode], **options)
    prompts = tiny.prompts(ours.config, LENGTHS)
    want = ours.generate(prompts, max_new_tokens=6)
    ours.close()
    with offload("qwen2_moe", mode=mode, debug=True, **options) as theirs:
        got = theirs.generate(prompts, max_new_tokens=6)
    assert got.token_ids == want.token_ids
    for mine, other in zip(want.stats.steps, got.stats.steps, strict=True):
        assert (mine.phase, mine.tokens) == (other.phase, other.tokens)
        for layer, there in zip(mine.layers, other.layers, strict=True):
            first, second = dataclasses.asdict(layer), dataclasses.asdict(there)
            assert first | {"seconds": 0, "lanes": 0} == second | {"seconds": 0, "lanes": 0}
            assert there.seconds == pytest.approx(layer.seconds)
    assert got.stats.prefetch.issued == want.stats.prefetch.issued
