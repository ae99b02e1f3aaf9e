"""Parameters in few arrays: every one is found again, and a step computes with them what it computed without."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import tiny
from grids import few
from test_fused_decode import all_on_cpu_costs, found_faster, fused_engine  # noqa: F401  # a fixture

from hybrimoe_jax.checkpoint.dense import format_of, is_projection, pack_tensor
from hybrimoe_jax.checkpoint.expert_store import ExpertStore
from hybrimoe_jax.checkpoint.weights import ArrayTensor
from hybrimoe_jax.engine import device_model
from hybrimoe_jax.engine.config import EngineConfig
from hybrimoe_jax.engine.engine import Engine
from hybrimoe_jax.engine.fused import arguments
from hybrimoe_jax.formats.packing import Format
from hybrimoe_jax.formats.plain import BF16, aligned_copy
from hybrimoe_jax.host_kernels.native import ffi

pytestmark = pytest.mark.skipif(not ffi.available(), reason="no native kernels for jitted programs here")


@pytest.fixture
def small_ones_too(monkeypatch):
    """So that a tiny model's matrices are found by their addresses."""
    monkeypatch.setattr(arguments, "LARGE", 1)


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "deepseek_v2"])
def test_every_parameter_is_found_again(small_ones_too, family):
    layers = [layer.params for layer in fused_engine(family)._parts.model.layers]
    handed, places = arguments.pack_args(layers, jax.devices("cpu")[0])
    assert len(jax.tree.leaves(handed)) < len(jax.tree.leaves(layers)) / 2
    for index, params in enumerate(layers):
        found = arguments.restore(handed, index, places[index])
        assert list(found) == list(params)
        for name, value in params.items():
            assert found[name].shape == value.shape
            if isinstance(found[name], ffi.AddressedMatrix):
                x = np.random.default_rng(0).standard_normal((1, value.shape[1]), np.float32)
                np.testing.assert_array_equal(ffi.matmul(x, found[name]), ffi.matmul(x, value))
            else:
                np.testing.assert_array_equal(found[name], value)
        if family == "deepseek_v2":
            assert not isinstance(found["self_attn." + arguments.READ_APART], ffi.AddressedMatrix)


def engine_of(family: str, dense_format: str) -> Engine:
    """An engine whose steps are fused, with projections in this format."""
    config, dense, experts = tiny.weights(family)
    dense = dict(dense)
    for name, array in dense.items():
        if dense_format == "bf16" and is_projection(name, array.shape):
            dense[name] = aligned_copy(array, BF16)
        elif dense_format != "f32" and is_projection(name, array.shape):
            dense[name] = pack_tensor(ArrayTensor(array), format_of(name, Format.parse(dense_format)))
    options = EngineConfig(host_kernel="native", profile=all_on_cpu_costs(config), prefill_chunk=16)
    return Engine(config, dense, ExpertStore.from_arrays(experts), options)


FAMILIES = ("qwen2_moe", "mixtral", "deepseek_v2")
# From 1000 weights on only query matrices are found by address beside keys' and values' that are handed over.
FORMATS = [("f32", 1), ("f32", 1000), ("bf16", 1), ("int8-g32", 1), ("int4-g32-a8", 1)]
FEW = [
    ("qwen2_moe", "f32", 1000),
    ("qwen2_moe", "int8-g32", 1),
    ("mixtral", "int4-g32-a8", 1),
    ("deepseek_v2", "bf16", 1),
]


@pytest.mark.parametrize(
    ("family", "dense_format", "large"), few(FEW, [(family, *case) for family in FAMILIES for case in FORMATS])
)
def test_the_layer_by_layer_tokens(monkeypatch, family, dense_format, large):
    monkeypatch.setattr(arguments, "LARGE", large)
    monkeypatch.setattr(device_model, "LARGE", 1)  # so that bfloat16 stays what it is
    engine = engine_of(family, dense_format)
    fused, steps = engine._forward.fused, []
    assert len(fused._params.addresses) > 0
    step = fused.step
    fused.step = lambda *args: steps.append(1) or step(*args)
    prompts = tiny.prompts(engine.config, (21,), seed=3)
    made = engine.generate(prompts, max_new_tokens=10).token_ids
    assert len(steps) == 9
    engine._forward = engine._forward.layered
    assert engine.generate(prompts, max_new_tokens=10).token_ids == made
