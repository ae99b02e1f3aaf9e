"""Decode attention in the native kernels: the same answers as the jax.numpy modules, the cache written where it should
be and nowhere else."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from grids import each_once

from hybrimoe_jax.formats.packing import Format, PackedMatrix, pack, quantise
from hybrimoe_jax.models import products
from hybrimoe_jax.models.attention import Attention
from hybrimoe_jax.models.families.deepseek_v2 import DeepseekV2Config, LatentAttention
from hybrimoe_jax.models.rope import make_rope

pytestmark = pytest.mark.skipif(not products.native_here(), reason="the package was installed without its FFI handlers")
RNG = np.random.default_rng
WIDTH, CAPACITY = 48, 70


def random_cache(module, batch: int) -> dict:
    shapes = module.cache_shapes(batch, CAPACITY)
    return {name: jnp.asarray(RNG(i).standard_normal(s, np.float32)) for i, (name, s) in enumerate(shapes.items())}


def both(module, batch: int, positions: list[int], span: int | None):
    """What the module gives with its kernels and by jax.numpy: (output, cache) twice."""
    graph, params = nnx.split(module)
    x = jnp.asarray(RNG(9).standard_normal((batch, 1, WIDTH), np.float32))
    places = jnp.asarray(positions, jnp.int32)[:, None]

    def run(native: bool):
        def step(params, cache):
            own = nnx.merge(graph, params)
            if not native:
                return own(x, cache, places, span)
            with products.on_native_kernels():
                return own(x, cache, places, span)

        return jax.jit(step, donate_argnums=1)(params, random_cache(module, batch))

    return run(True), run(False)


def agree(native, reference, rows: list[int]) -> None:
    for got, want in zip(jax.tree.leaves(native), jax.tree.leaves(reference), strict=True):
        got, want = np.asarray(got), np.asarray(want)
        assert np.abs(got[rows] - want[rows]).max() <= 5e-6 * np.abs(want[rows]).max()


HEADS = [(4, 4, 16, None), (8, 2, 16, None), (7, 1, 12, None), (4, 2, 80, 9), (6, 3, 34, None), (4, 1, 8, 64)]
PLACES = [([0], 64), ([40], 64), ([63], 64), ([69], None), ([5, 33, 0], 64), ([12, 69, 70], None)]


@pytest.mark.parametrize(("shape", "place"), each_once(HEADS, PLACES))
def test_grouped_attention(shape, place):
    (heads, kv_heads, width, window), (positions, span) = shape, place
    module = Attention(
        WIDTH, heads, kv_heads, width, rope=make_rope(width, 10000.0, None), rngs=nnx.Rngs(0), window=window
    )
    agree(*both(module, len(positions), positions, span), [i for i, p in enumerate(positions) if p < CAPACITY])


def test_an_odd_position_leaves_every_other_place_alone():
    module = Attention(WIDTH, 4, 2, 16, rope=make_rope(16, 10000.0, None), rngs=nnx.Rngs(0))
    (_, cache), _ = both(module, 2, [CAPACITY + 5, 3], 64)
    before = random_cache(module, 2)
    for name in ("k", "v"):
        changed = np.argwhere(np.any(np.asarray(cache[name]) != np.asarray(before[name]), axis=(1, 3)))
        assert changed.tolist() == [[1, 3]]


def latent_module(format: str) -> LatentAttention:
    config = DeepseekV2Config(
        model_type="deepseek_v2",
        vocab_size=64,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=6,
        num_experts_per_tok=2,
        n_routed_experts=4,
        moe_intermediate_size=16,
        intermediate_size=16,
        kv_lora_rank=72,
        q_lora_rank=None,
        qk_nope_head_dim=24,
        qk_rope_head_dim=10,
        v_head_dim=8,
    )
    module = LatentAttention(config, nnx.Rngs(1))
    up = 0.2 * RNG(2).standard_normal((6 * 32, 72), np.float32)
    if format in ("f32", "bf16"):
        module.kv_b_proj.weight = nnx.Param(jnp.asarray(up, jnp.float32 if format == "f32" else jnp.bfloat16))
    else:
        packed = pack(Format.parse(format), *quantise(up, Format.parse(format)))
        module.kv_b_proj.weight = nnx.Param(PackedMatrix(jnp.asarray(packed.data), packed.layout))
    return module


@pytest.mark.parametrize(
    ("format", "place"),
    each_once(
        ["f32", "bf16", "int8-g32", "int4-g64", "int4z-g32-s32", "int4-g128"],
        [([0], 64), ([63], 64), ([5, 33, 69], None)],
    ),
)
def test_latent_attention(format, place):
    positions, span = place
    agree(*both(latent_module(format), len(positions), positions, span), list(range(len(positions))))
