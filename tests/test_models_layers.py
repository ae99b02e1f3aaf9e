"""The decoder's parts one by one, against plain NumPy loops in float64 (and transformers' rotary tables)."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.models.layers import (
    Linear,
    RMSNorm,
    SwiGLU,
    rotate_half,
    rotate_pairs,
)
from hybrimoe_jax.models.rope import make_rope

YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_linear_and_swiglu():
    linear = Linear(5, 3, bias=True, rngs=nnx.Rngs(0))
    linear.bias[...] = jnp.asarray(normal(1, 3))
    x = normal(2, 4, 5)
    expected = x @ np.asarray(linear.weight[...]).T + np.asarray(linear.bias[...])
    np.testing.assert_allclose(linear(x), expected, rtol=1e-5, atol=1e-6)
    mlp = SwiGLU(5, 7, rngs=nnx.Rngs(1))
    gate, up, down = (np.asarray(m.weight[...], np.float64) for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    g = x @ gate.T
    np.testing.assert_allclose(mlp(x), (g / (1 + np.exp(-g)) * (x @ up.T)) @ down.T, rtol=1e-5, atol=1e-8)


def test_rms_norm():
    norm = RMSNorm(6, 1e-3)
    norm.weight[...] = jnp.asarray(normal(0, 6))
    x = normal(1, 2, 6) * 0.05  # small enough that eps matters
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-3) * np.asarray(norm.weight[...])
    np.testing.assert_allclose(norm(x), expected, rtol=1e-6)
    assert norm(x.astype(jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("rotate, pairs", [(rotate_half, "half"), (rotate_pairs, "interleaved")])
def test_rotation_turns_each_pair_by_its_angle(rotate, pairs):
    width, positions = 8, np.array([[0, 1, 700, 4000]])
    rope = make_rope(width, 10000.0, None)
    x = normal(0, 1, 4, 2, width)
    out = np.asarray(rotate(jnp.asarray(x), *rope(jnp.asarray(positions))))
    for i in range(width // 2):
        a, b = (i, i + width // 2) if pairs == "half" else (2 * i, 2 * i + 1)
        angle = positions[0][:, None] * 10000.0 ** (-2 * i / width)
        turned = (x[0, ..., a] + 1j * x[0, ..., b]) * np.exp(1j * angle)
        # float32 angles of up to 4000 radians are good to 4000 * 2^-24
        np.testing.assert_allclose(out[0, ..., a] + 1j * out[0, ..., b], turned, atol=1e-3)
        np.testing.assert_allclose(out[0, :2, :, a], turned.real[:2], atol=1e-6)


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        dict(rope_type="linear", factor=3.0),
        LLAMA3,
        YARN,
        YARN | dict(mscale=0.707, mscale_all_dim=0.5),
        YARN | dict(attention_factor=1.5, beta_fast=8, beta_slow=2),
        YARN | dict(truncate=False),
        YARN | dict(factor=None),
        {k: v for k, v in YARN.items() if k != "original_max_position_embeddings"},
    ],
)
def test_rotary_tables_match_transformers(scaling):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

    rope_parameters = dict(scaling or dict(rope_type="default"), rope_theta=50000.0)
    config = transformers.Qwen3MoeConfig(head_dim=32, max_position_embeddings=512, rope_parameters=rope_parameters)
    theirs = Qwen3MoeRotaryEmbedding(config)
    ours = make_rope(32, 50000.0, scaling, 512)
    np.testing.assert_allclose(ours.inverse_frequencies, theirs.inv_freq.numpy(), rtol=5e-7)
    assert ours.attention_factor == pytest.approx(theirs.attention_scaling, rel=1e-12)


def test_yarn_keeps_fast_pairs_and_slows_slow_ones():
    plain, scaled = make_rope(32, 10000.0, None), make_rope(32, 10000.0, YARN)
    ratio = np.array(scaled.inverse_frequencies) / np.array(plain.inverse_frequencies)
    assert ratio[0] == 1.0 and ratio[-1] == pytest.approx(1 / 4) and (np.diff(ratio) <= 1e-7).all()
    assert scaled.attention_factor == pytest.approx(0.1 * math.log(4) + 1)


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "mrope", "proportional"])
def test_unknown_rotary_scaling_is_refused_by_name(kind):
    with pytest.raises(UserError, match=kind):
        make_rope(32, 10000.0, dict(type=kind, factor=2.0))


def test_incomplete_rotary_scaling_is_refused():
    with pytest.raises(UserError, match=r"yarn.*factor"):
        make_rope(32, 10000.0, dict(rope_type="yarn"), 512)
    with pytest.raises(UserError, match="odd"):
        make_rope(31, 10000.0, None)
