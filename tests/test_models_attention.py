"""Attention and its cache against loops: writing in place, masks, one piece and blocks alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from grids import each_once, few

from hybrimoe_jax.models.attention import (
    Attention,
    blocked_attention,
    cache_write,
    causal_attention,
    grouped_attention,
    visible,
)
from hybrimoe_jax.models.rope import make_rope


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_cache_write_drops_padding():
    cache = jnp.zeros((2, 4, 1))
    new = jnp.arange(1.0, 7.0).reshape(2, 3, 1)
    out = cache_write(cache, new, jnp.array([[1, 2, 4], [0, 4, 9]]))
    assert out[..., 0].tolist() == [[0, 1, 2, 0], [4, 0, 0, 0]]
    heads = jnp.repeat(new[:, None], 3, axis=1)
    heads = cache_write(jnp.zeros((2, 3, 4, 1)), heads, jnp.array([[1, 2, 4], [0, 4, 9]]), axis=2)
    for head in range(3):
        assert heads[:, head].tolist() == out.tolist()


@pytest.mark.parametrize("first", [0, 3, 6, 7, 8])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_cache_write_near_the_end(first, length):
    """A chunk that reaches past the capacity keeps its place: what is left of it is written where it belongs."""
    capacity, tokens = 8, 5
    valid = max(0, min(length, capacity - first))
    positions = np.full((1, tokens), capacity)
    positions[0, :valid] = np.arange(first, first + valid)
    cache, new = normal(0, 1, capacity, 2), normal(1, 1, tokens, 2)
    expected = cache.copy()
    expected[0, first : first + valid] = new[0, :valid]
    out = cache_write(jnp.asarray(cache), jnp.asarray(new), jnp.asarray(positions))
    np.testing.assert_array_equal(out, expected)


def test_cache_write_of_more_tokens_than_places():
    out = cache_write(jnp.zeros((1, 3, 1)), jnp.arange(1.0, 6.0).reshape(1, 5, 1), jnp.array([[0, 1, 2, 3, 3]]))
    assert out[0, :, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("span", [64, 128])
def test_the_cache_is_written_in_place(span):
    """No copy of the cache in a compiled decode step (of a scatter XLA made eight a layer)."""
    attention = Attention(16, 4, 2, 8, rope=make_rope(8, 10000.0, None), rngs=nnx.Rngs(0))
    shapes = attention.cache_shapes(1, 128)
    cache = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    step = jax.jit(lambda cache, x, positions: attention(x, cache, positions, span), donate_argnums=0)
    text = step.lower(cache, jnp.zeros((1, 1, 16)), jnp.zeros((1, 1), jnp.int32)).compile().as_text()
    assert f"f32[{','.join(map(str, shapes['k']))}]{{3,2,1,0}} copy(" not in text


@pytest.mark.parametrize(
    ("window", "shape"),
    each_once([None, 1, 70, 300], [(128, 128, 0), (200, 300, 0), (256, 512, 129), (130, 517, 380)]),
)
def test_blocks_give_what_one_piece_gives(window, shape):
    tokens, span, first = shape
    q, k, v = normal(0, 2, tokens, 4, 8), normal(1, 2, 2, span, 8), normal(2, 2, 2, span, 8)
    positions = np.arange(first, first + tokens)[None].repeat(2, 0)
    positions[1, tokens // 2 :] = 4096  # padding
    arguments = [jnp.asarray(a) for a in (q, k, v, positions)]
    whole = np.asarray(grouped_attention(*arguments[:3], visible(arguments[3], span, window), 0.3))
    blocks = np.asarray(blocked_attention(*arguments, window, 0.3))
    np.testing.assert_allclose(blocks[0], whole[0], rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(blocks[1, : tokens // 2], whole[1, : tokens // 2], rtol=2e-5, atol=2e-6)
    assert np.isfinite(blocks).all()


@pytest.mark.parametrize(("window", "tokens"), each_once([None, 1, 70, 300], [512, 128, 200]))
def test_prompts_from_the_start_give_what_one_piece_gives(window, tokens):
    q, k, v = normal(0, 2, tokens, 4, 8), normal(1, 2, 2, tokens, 8), normal(2, 2, 2, tokens, 8)
    positions = np.arange(tokens)[None].repeat(2, 0)
    positions[1, tokens // 2 :] = 4096  # padding
    arguments = [jnp.asarray(a) for a in (q, k, v, positions)]
    whole = np.asarray(grouped_attention(*arguments[:3], visible(arguments[3], tokens, window), 0.3))
    blocks = np.asarray(causal_attention(*arguments, window, 0.3))
    np.testing.assert_allclose(blocks[0], whole[0], rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(blocks[1, : tokens // 2], whole[1, : tokens // 2], rtol=2e-5, atol=2e-6)
    assert np.isfinite(blocks).all()


@pytest.mark.parametrize("window", [None, 1, 3])
def test_visible_keys(window):
    positions, capacity = np.array([[0, 3, 5]]), 6
    mask = np.asarray(visible(jnp.asarray(positions), capacity, window))
    for t, p in enumerate(positions[0]):
        first = 0 if window is None else max(0, p - window + 1)
        assert np.flatnonzero(mask[0, t]).tolist() == list(range(first, p + 1))


def test_grouped_attention_against_a_loop():
    q, k, v = normal(0, 1, 3, 4, 8), normal(1, 1, 2, 5, 8), normal(2, 1, 2, 5, 8)
    mask = np.asarray(visible(jnp.array([[2, 3, 4]]), 5, None))
    out = grouped_attention(*map(jnp.asarray, (q, k, v, mask)), 0.3)
    for t in range(3):
        for head in range(4):
            logits = np.where(mask[0, t], k[0, head // 2].astype(np.float64) @ q[0, t, head] * 0.3, -np.inf)
            probs = np.exp(logits - logits.max())
            np.testing.assert_allclose(out[0, t, head], probs / probs.sum() @ v[0, head // 2], rtol=2e-5, atol=1e-6)


OPTIONS = [
    {},
    dict(window=3),
    dict(qk_norm="head"),
    dict(qk_norm="full", clip=0.05),
    dict(qkv_bias=True, out_bias=True),
]


@pytest.mark.parametrize("options", few(OPTIONS[3:], OPTIONS), ids=str)
def test_attention_in_pieces_equals_attention_at_once(options):
    """Chunks, single tokens and right padding give what one whole call gives; padding leaves no trace in the cache."""
    attention = Attention(16, 4, 2, 8, rope=make_rope(8, 10000.0, None), rngs=nnx.Rngs(0), **options)
    x, capacity = jnp.asarray(normal(3, 1, 7, 16)), 8

    def empty():
        return {name: jnp.zeros(shape) for name, shape in attention.cache_shapes(1, capacity).items()}

    whole, whole_cache = attention(x, empty(), jnp.arange(7)[None])
    cache, parts = empty(), []
    for places in ([0, 1, 2], [3, 4, capacity], [5], [6]):
        real = [p for p in places if p < capacity]
        piece = jnp.pad(x[:, real[0] : real[-1] + 1], ((0, 0), (0, len(places) - len(real)), (0, 0)), constant_values=9)
        out, cache = attention(piece, cache, jnp.array([places]))
        parts.append(out[:, : len(real)])
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, rtol=1e-4, atol=1e-7)
    for name in cache:
        np.testing.assert_allclose(cache[name], whole_cache[name], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_attention_options_change_the_answer():
    """Every option matters on this input, so the parity above is not vacuous."""
    x, positions = jnp.asarray(normal(3, 1, 7, 16)), jnp.arange(7)[None]
    answers = []
    for options in [{}, dict(window=3), dict(qk_norm="head"), dict(qk_norm="full"), dict(clip=0.02)]:
        attention = Attention(16, 4, 2, 8, rope=make_rope(8, 10000.0, None), rngs=nnx.Rngs(0), **options)
        attention = jax.tree.map(lambda leaf: leaf * 20 if leaf.ndim == 2 else leaf, attention)
        cache = {name: jnp.zeros(shape) for name, shape in attention.cache_shapes(1, 7).items()}
        answers.append(np.asarray(attention(x, cache, positions)[0]))
    for i, a in enumerate(answers):
        for b in answers[:i]:
            assert np.abs(a - b).max() > 1e-3 * np.abs(b).max()
