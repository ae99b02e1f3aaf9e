"""The mixture-of-experts block, its dense oracle, and what makes layers share an executable."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybrimoe_jax.models import parameters
from hybrimoe_jax.models.moe import DenseExperts, MoEBlock, combine_weights, expert_forward
from hybrimoe_jax.models.registry import FAMILIES, build_model, parse_config

COMMON = dict(
    vocab_size=32,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    intermediate_size=24,
)
TINY = {
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": dict(
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        mlp_only_layers=[0],
    ),
    "qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, mlp_only_layers=[0]),
    "olmoe": dict(num_experts=4, num_experts_per_tok=2),
    "deepseek_v2": dict(
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        first_k_dense_replace=1,
        kv_lora_rank=8,
        q_lora_rank=None,
        qk_nope_head_dim=4,
        qk_rope_head_dim=4,
        v_head_dim=4,
    ),
}


def tiny(family):
    return parse_config(dict(model_type=family) | COMMON | TINY[family])


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("normalise", [False, True])
def test_router_picks_the_best_experts(normalise):
    block = MoEBlock(8, 6, 2, normalise=normalise, rngs=nnx.Rngs(0))
    x = normal(1, 5, 8) * 20
    routing = block.route(x)
    logits = np.asarray(x @ block.gate.weight[...].T, np.float64)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(routing.scores, probs, rtol=1e-4)
    best = np.argsort(-probs, axis=-1)[:, :2]
    assert (np.asarray(routing.ids) == best).all() and routing.ids.dtype == jnp.int32
    weights = np.take_along_axis(probs, best, -1)
    weights = weights / weights.sum(-1, keepdims=True) if normalise else weights
    np.testing.assert_allclose(routing.weights, weights, rtol=1e-4)


def test_dense_experts_against_a_loop():
    block = MoEBlock(8, 6, 3, normalise=False, rngs=nnx.Rngs(0))
    gate_up, down, x = normal(1, 6, 10, 8), normal(2, 6, 8, 5), normal(3, 4, 8) * 10
    routing = block.route(x)
    out = block(1, x, DenseExperts([None, (gate_up, down)]))
    expected = np.zeros((4, 8))
    for token in range(4):
        for expert, weight in zip(routing.ids[token], routing.weights[token]):
            hidden = np.asarray(gate_up[expert], np.float64) @ np.asarray(x[token])
            gate, up = hidden[:5], hidden[5:]
            expected[token] += float(weight) * (np.asarray(down[expert]) @ (gate / (1 + np.exp(-gate)) * up))
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    mix = np.asarray(combine_weights(routing, 6))
    assert ((mix > 0).sum(-1) == 3).all()
    one = expert_forward((gate_up[2], down[2]), x)
    only = DenseExperts([(gate_up, down)])(0, x, routing._replace(ids=jnp.full((4, 1), 2), weights=jnp.ones((4, 1))))
    np.testing.assert_allclose(only, one, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_one_kind_share_one_graph(family):
    """Equal static parts: one executable serves every MoE layer (and one every dense layer)."""
    config = tiny(family)
    model = build_model(config, nnx.Rngs(0))
    kinds = {config.is_moe(i): set() for i in range(3)}
    for index, layer in enumerate(model.model.layers):
        graphdef, _ = parameters.split(layer)
        kinds[config.is_moe(index)].add(graphdef)
    assert all(len(graphs) == 1 for graphs in kinds.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_split_and_merge_round_trip(family):
    config = tiny(family)
    model = build_model(config, nnx.Rngs(0))
    _, params = parameters.split(model)
    abstract_graph, abstract = parameters.split(build_model(config))
    assert {n: (a.shape, a.dtype) for n, a in abstract.items()} == {n: (a.shape, a.dtype) for n, a in params.items()}
    assert hash(config) == hash(tiny(family)) and config == tiny(family)
    experts = [
        (
            normal(i, config.num_experts, 2 * config.moe_width, 16),
            normal(9 + i, config.num_experts, 16, config.moe_width),
        )
        if config.is_moe(i)
        else None
        for i in range(3)
    ]
    ids, positions = jnp.array([[1, 2, 3]]), jnp.arange(3)[None]
    direct, _ = model(ids, model.init_cache(1, 8), positions, DenseExperts(experts))
    merged, _ = parameters.merge(abstract_graph, params)(ids, model.init_cache(1, 8), positions, DenseExperts(experts))
    np.testing.assert_array_equal(direct, merged)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_product_may_be_rounded_to_tf32(family):
    """A GPU's default precision would round float32 operands to 10 bits and change greedy tokens."""
    config = tiny(family)
    graphdef, params = parameters.split(build_model(config, nnx.Rngs(0)))
    experts = [(jnp.zeros((4, 2 * config.moe_width, 16)), jnp.zeros((4, 16, config.moe_width)))] * 3

    def forward(params, ids):
        model = parameters.merge(graphdef, params)
        return model(ids, model.init_cache(1, 4), jnp.arange(3)[None], DenseExperts(experts))

    lowered = jax.jit(forward).lower(params, jnp.array([[1, 2, 3]])).as_text()
    products = [line for line in lowered.splitlines() if "dot_general" in line]
    assert len(products) > 20
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


@pytest.mark.slow
def test_models_run_with_nnx_tree_mode():
    """`NNX_GRAPH_MODE=false` forbids shared submodules; no family has any."""
    code = """
        import jax.numpy as jnp, jax
        from flax import nnx
        from test_models_moe import tiny, FAMILIES
        from hybrimoe_jax.models import parameters
        from hybrimoe_jax.models.moe import DenseExperts
        from hybrimoe_jax.models.registry import build_model
        for family in FAMILIES:
            config = tiny(family)
            graphdef, params = parameters.split(build_model(config, nnx.Rngs(0)))
            experts = [(jnp.ones((4, 2 * config.moe_width, 16)), jnp.ones((4, 16, config.moe_width)))] * 3
            model = parameters.merge(graphdef, params)
            ids, places = jnp.array([[1, 2]]), jnp.arange(2)[None]
            logits = jax.eval_shape(lambda: model(ids, model.init_cache(1, 4), places, DenseExperts(experts))[0])
            assert logits.shape == (1, 2, 32), family
        print("ran", len(FAMILIES))
    """
    env = dict(os.environ, NNX_GRAPH_MODE="false", PYTHONPATH=os.path.dirname(__file__))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"ran {len(FAMILIES)}"
