"""Parameters in few arrays: every one is found again, and a step computes with them what it computed without."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import tiny
from test_whole_step import whole_engine

from hybrimoe_jax.host_kernels.native import ffi
from hybrimoe_jax.runtime import gathered

pytestmark = pytest.mark.skipif(not ffi.available(), reason="no native kernels for jitted programs here")


@pytest.fixture
def small_ones_too(monkeypatch):
    """So that a tiny model's matrices are found by their addresses."""
    monkeypatch.setattr(gathered, "LARGE", 1)


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "deepseek_v2"])
def test_every_parameter_is_found_again(small_ones_too, family):
    layers = [layer.params for layer in whole_engine(family)._forward.model.layers]
    handed, places = gathered.gather(layers, jax.devices("cpu")[0])
    assert len(jax.tree.leaves(handed)) < len(jax.tree.leaves(layers)) / 2
    for index, params in enumerate(layers):
        found = gathered.restore(handed, index, places[index])
        assert list(found) == list(params)
        for name, value in params.items():
            assert found[name].shape == value.shape
            if isinstance(found[name], ffi.AddressedMatrix):
                x = np.random.default_rng(0).standard_normal((1, value.shape[1]), np.float32)
                np.testing.assert_array_equal(ffi.matmul(x, found[name]), ffi.matmul(x, value))
            else:
                np.testing.assert_array_equal(found[name], value)
        assert not isinstance(found.get("self_attn." + gathered.READ_APART), ffi.AddressedMatrix)


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "deepseek_v2"])
def test_the_dense_models_tokens(small_ones_too, family):
    engine, dense = whole_engine(family), tiny.engine(family, executor="dense")
    assert len(engine._forward.whole._params.addresses) > 0
    prompts = tiny.prompts(engine.config, (37,), seed=3)
    assert engine.generate(prompts, max_new_tokens=24).token_ids == dense.generate(prompts, max_new_tokens=24).token_ids
