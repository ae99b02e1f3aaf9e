"""Dense weights stored as bfloat16, on the CPU backend: large matrices stay so and are multiplied natively, and no
answer changes."""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from grids import few

from hybrimoe_jax.checkpoint.convert import save
from hybrimoe_jax.checkpoint.export import export_hf
from hybrimoe_jax.checkpoint.hugging_face import open_hf
from hybrimoe_jax.checkpoint.reader import open_checkpoint
from hybrimoe_jax.engine import assembly, device_model
from hybrimoe_jax.engine.config import EngineConfig
from hybrimoe_jax.engine.load import load
from hybrimoe_jax.models import products
from hybrimoe_jax.models.families.deepseek_v2 import absorbed_attention

BF16 = np.dtype(ml_dtypes.bfloat16)
TOLERANCE = 2e-5  # of the logits' scale
pytestmark = pytest.mark.skipif(not products.native_here(), reason="no native kernels for jitted programs here")


@pytest.fixture(autouse=True)
def every_matrix_is_large(monkeypatch):
    monkeypatch.setattr(device_model, "LARGE", 0)


def checkpoint(folder, family: str, tied: bool = False):
    config, dense, layers = tiny.CONFIGS[family], *tiny.weights(family)[1:]
    if tied:
        config = {**config, "tie_word_embeddings": True}
        dense = {name: array for name, array in dense.items() if name != "lm_head.weight"}
    experts = [(np.asarray(gate_up), np.asarray(down)) for gate_up, down in layers]
    return save(folder / "checkpoint", config, {n: np.asarray(a).astype(BF16) for n, a in dense.items()}, experts)


def types_of(engine) -> dict[str, np.dtype]:
    """The dense weights' types by name."""
    model = engine._parts.model
    types = {"table": model.table.dtype, "head": model.head.dtype, "norm": model.norm.dtype}
    return types | {f"{i}.{n}": a.dtype for i, layer in enumerate(model.layers) for n, a in layer.params.items()}


def answers(folder, **options):
    """The dense weights' types by name, the device's bytes and theirs, the logits of a prompt, tokens of a
    sequence and of a batch."""
    engine = load(folder, EngineConfig(max_context=128, **options))
    types = types_of(engine)
    ids = [(5 * i) % engine.config.vocab_size for i in range(50)]
    tokens = [engine.generate(prompts, max_new_tokens=6).token_ids for prompts in ([ids], [ids, ids[:5]])]
    held = engine.stats.peak_device_bytes, engine._parts.footprint.dense
    found = types, *held, engine.logits(ids), tokens
    engine.close()
    return found


@pytest.mark.parametrize(
    ("family", "tied"),
    few([], [("qwen2_moe", False), ("deepseek_v2", False), ("mixtral", True)]),
)
def test_every_executor_gives_the_widened_models_answer(family, tied, tmp_path, monkeypatch):
    folder = checkpoint(tmp_path, family, tied)
    *_, logits, tokens = answers(folder, executor="dense")
    for options in ({"cache_ratio": 0.0}, {"cache_ratio": 0.5}, {"executor": "callback", "cache_ratio": 0.5}):
        types, *_, found, made = answers(folder, **options)
        assert types["head"] == types["table"] == types["0.self_attn.o_proj.weight"] == BF16
        assert made == tokens, options
        assert np.abs(found - logits).max() <= TOLERANCE * np.abs(logits).max()


@pytest.mark.slow
def test_only_what_is_multiplied_or_looked_up_stays_narrow_and_takes_half_the_memory(tmp_path, monkeypatch):
    folder = checkpoint(tmp_path, "qwen2_moe")
    types, held, dense, _, tokens = answers(folder)
    assert all(
        (dtype == BF16) == ("_proj.weight" in name or name in ("table", "head")) for name, dtype in types.items()
    )
    monkeypatch.setattr(assembly, "native_here", lambda: False)
    widened, more, wide, _, same = answers(folder)
    assert set(widened.values()) == {np.dtype(np.float32)} and same == tokens
    sizes = open_checkpoint(folder).dense()
    saved = 2 * sum(array.size for name, array in sizes.items() if device_model.stays_narrow(name, array))
    assert wide - dense == more - held == saved > 0.4 * wide


@pytest.mark.slow
def test_small_matrices_and_those_of_the_reference_are_widened(tmp_path, monkeypatch):
    folder = checkpoint(tmp_path, "qwen2_moe")

    def types(**options) -> set:
        engine = load(folder, EngineConfig(max_context=128, **options))
        found = set(types_of(engine).values())
        engine.close()
        return found

    assert types(executor="dense") == {np.dtype(np.float32)}
    monkeypatch.setattr(device_model, "LARGE", products.LARGE)
    assert types() == {np.dtype(np.float32)}


def test_latent_attention_means_the_same_by_narrow_up_projections():
    heads, nope, rotary, value, latent, tokens, span = 4, 8, 8, 8, 16, 5, 12
    draw = np.random.default_rng(0).standard_normal
    q, q_rope = draw((1, tokens, heads, nope), np.float32), draw((1, tokens, heads, rotary), np.float32)
    cache = {"latent": draw((1, span, latent), np.float32), "rope": draw((1, span, rotary), np.float32)}
    mask = np.tril(np.ones((1, tokens, span), bool), span - tokens)
    up = draw((heads * (nope + value), latent), np.float32).astype(BF16)
    made = [absorbed_attention(q, q_rope, cache, jnp.asarray(up, t), mask, 0.25) for t in (BF16, np.float32)]
    np.testing.assert_array_equal(*made)


def test_the_checkpoint_and_its_export_keep_the_type(tmp_path):
    folder = checkpoint(tmp_path, "qwen2_moe")
    exported = open_hf(export_hf(folder, tmp_path / "hf"))
    assert {tensor.dtype for shard in exported.shards for tensor in shard.dense.values()} == {BF16}
