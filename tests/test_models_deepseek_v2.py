"""DeepSeek-V2's own parts: the latent cache, absorbed against expanded attention, group-limited routing."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.models.families.deepseek_v2 import DeepseekV2Block, DeepseekV2Config, LatentAttention

RAW = dict(
    model_type="deepseek_v2",
    vocab_size=32,
    hidden_size=16,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_experts_per_tok=3,
    n_routed_experts=8,
    moe_intermediate_size=6,
    intermediate_size=24,
    kv_lora_rank=10,
    q_lora_rank=None,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=5,
)
GROUPS = dict(topk_method="group_limited_greedy", n_group=4, topk_group=2)


def config(**more):
    return DeepseekV2Config.from_dict(RAW | more)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def latent_attention(**more):
    attention = LatentAttention(config(**more), nnx.Rngs(0))
    for number, module in enumerate(
        m for _, m in nnx.iter_graph(attention) if hasattr(m, "weight") and not isinstance(m, nnx.Variable)
    ):
        module.weight[...] = jnp.asarray(normal(number, *module.weight.shape)) / module.weight.shape[-1] ** 0.5
    return attention


def empty_cache(attention, batch, capacity):
    return {name: jnp.zeros(shape) for name, shape in attention.cache_shapes(batch, capacity).items()}


def test_the_cache_holds_latents_only():
    """r + R numbers per token and layer, nothing per head."""
    assert LatentAttention(config(), nnx.Rngs(0)).cache_shapes(2, 7) == {"latent": (2, 8, 10), "rope": (2, 8, 4)}


@pytest.mark.parametrize("q_lora_rank", [None, 9])
def test_absorbed_equals_expanded_equals_a_loop(q_lora_rank):
    attention = latent_attention(q_lora_rank=q_lora_rank, attention_bias=q_lora_rank is not None)
    x, positions = jnp.asarray(normal(7, 2, 5, 16)), jnp.array([[0, 1, 2, 3, 4], [0, 1, 2, 9, 9]])
    absorbed, cache = attention(x, empty_cache(attention, 2, 6), positions, absorb=True)
    expanded, _ = attention(x, empty_cache(attention, 2, 6), positions, absorb=False)
    scale = np.abs(expanded).max()
    np.testing.assert_allclose(absorbed, expanded, atol=2e-6 * scale)
    # one head of one query by hand, from the cache
    up = np.asarray(attention.kv_b_proj.weight[...], np.float64).reshape(4, 11, 10)
    q = (
        attention.q_proj(x)
        if q_lora_rank is None
        else attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(x)))
    )
    q = np.asarray(q[0, 3], np.float64).reshape(4, 10)
    angle = 3 * 10000.0 ** (-np.arange(2) / 2)
    heads = []
    for head in range(4):
        turned = (q[head, 6::2] + 1j * q[head, 7::2]) * np.exp(1j * angle)
        rotated = np.stack([turned.real, turned.imag], -1).reshape(-1)
        latents, ropes = np.asarray(cache["latent"][0, :4]), np.asarray(cache["rope"][0, :4])
        logits = (latents @ up[head, :6].T @ q[head, :6] + ropes @ rotated) / math.sqrt(10)
        probs = np.exp(logits) / np.exp(logits).sum()
        heads.append(probs @ (latents @ up[head, 6:].T))
    np.testing.assert_allclose(absorbed[0, 3], attention.o_proj(jnp.asarray(np.concatenate(heads))), atol=1e-5 * scale)
    assert not np.asarray(cache["latent"][1, 3:]).any(), "padding was written to the cache"


def test_decoding_absorbs_and_long_chunks_expand():
    """By multiply-adds: V2-Lite expands from chunks of about 170 tokens on."""
    attention = LatentAttention(
        config(
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            v_head_dim=128,
            qk_rope_head_dim=64,
            num_attention_heads=1,
            hidden_size=8,
        ),
        nnx.Rngs(0),
    )
    assert attention.absorbs(1, 4096) and attention.absorbs(128, 4096)
    assert not attention.absorbs(256, 4096)


def test_yarn_sharpens_the_attention_once():
    yarn = dict(type="yarn", factor=40, original_max_position_embeddings=4096, mscale=0.707, mscale_all_dim=0.707)
    scaled = config(rope_scaling=yarn)
    assert scaled.attention_scale == pytest.approx(10**-0.5 * (0.1 * 0.707 * math.log(40) + 1) ** 2)
    assert scaled.rope.attention_factor == 1.0
    assert config().attention_scale == pytest.approx(10**-0.5)


def by_hand(scores, groups, kept, top_k):
    """Group-limited greedy selection for one token, in plain Python."""
    size = len(scores) // groups
    order = sorted(range(groups), key=lambda g: -max(scores[g * size : (g + 1) * size]))[:kept]
    allowed = [e for e in range(len(scores)) if e // size in order]
    return sorted(allowed, key=lambda e: -scores[e])[:top_k]


def test_group_limited_selection_against_brute_force():
    block = DeepseekV2Block(config(**GROUPS, routed_scaling_factor=3.0), nnx.Rngs(0))
    scores = np.random.default_rng(0).dirichlet(np.ones(8), size=200).astype(np.float32)
    ids, weights = map(np.asarray, block.select(jnp.asarray(scores)))
    differs = 0
    for row, chosen, weight in zip(scores, ids, weights):
        assert chosen.tolist() == by_hand(row.tolist(), 4, 2, 3)
        np.testing.assert_allclose(weight, 3.0 * row[chosen], rtol=1e-6)
        differs += chosen.tolist() != np.argsort(-row)[:3].tolist()
    assert differs > 20, "the group limit never mattered"


def test_shared_experts_are_one_wide_mlp_or_absent():
    x = jnp.asarray(normal(0, 3, 16))
    block = DeepseekV2Block(config(n_shared_experts=2), nnx.Rngs(0))
    assert block.shared_experts.gate_proj.weight.shape == (12, 16)
    np.testing.assert_array_equal(block.shared(x), block.shared_experts(x))
    assert DeepseekV2Block(config(n_shared_experts=None), nnx.Rngs(0)).shared(x) is None


def test_which_layers_have_experts():
    assert config(first_k_dense_replace=1).moe_layers == (1, 2, 3)
    assert config(first_k_dense_replace=1, moe_layer_freq=2).moe_layers == (2,)


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(topk_method="noaux_tc"), "topk_method 'noaux_tc'"),
        (dict(norm_topk_prob=True), "norm_topk_prob true"),
        (dict(qk_rope_head_dim=0), "qk_rope_head_dim must be at least 1"),
        (dict(scoring_func="sigmoid"), "scoring_func 'sigmoid'"),
        (dict(topk_method="group_limited_greedy", n_group=3, topk_group=1), "n_group 3"),
        (dict(topk_method="group_limited_greedy", n_group=None, topk_group=None), "n_group None"),
        (dict(topk_method="group_limited_greedy", n_group=4, topk_group=1), "num_experts_per_tok"),
        (dict(num_key_value_heads=2), "num_key_value_heads"),
        (dict(moe_layer_freq=0), "moe_layer_freq"),
        (dict(num_nextn_predict_layers=1), "num_nextn_predict_layers"),
    ],
)
def test_what_it_cannot_honour_is_refused_by_name(bad, message):
    with pytest.raises(UserError, match=message):
        config(**bad)
