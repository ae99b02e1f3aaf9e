"""bfloat16 experts stay so on the CPU backend where the native kernels compute them, and answers stay exact."""

from __future__ import annotations

import numpy as np
import pytest
import tiny

from hybrimoe_jax.engine import checks
from hybrimoe_jax.engine.config import EngineConfig
from hybrimoe_jax.engine.load import read_model
from hybrimoe_jax.models import moe
from hybrimoe_jax.models.products import native_here

needs_native = pytest.mark.skipif(not native_here(), reason="the package was installed without its native kernels")
PROMPTS = [[5, 9, 2, 40, 7, 33, 61, 8], [17, 3, 90]]


@pytest.fixture(scope="module")
def dense():
    engine = tiny.engine(format="bf16", executor="dense")
    return engine.generate(PROMPTS, max_new_tokens=8).token_ids, engine.logits(PROMPTS[0])


@needs_native
@pytest.mark.parametrize(
    ("options", "small"),
    [
        ({"system": "cpu-only", "host_kernel": "native"}, False),
        ({"system": "on-demand", "cache_ratio": 0.5}, False),
        ({"system": "on-demand", "cache_ratio": 0.5}, True),
        ({"cache_ratio": 0.5, "slots": "stacked"}, False),
        ({"cache_ratio": 0.5, "host_kernel": "native"}, False),
    ],
)
def test_wherever_they_are_computed_the_answer_is_the_dense_models(options, small, dense, monkeypatch):
    if not small:
        monkeypatch.setattr(moe, "SMALL_BYTES", 0)
    engine = tiny.engine(format="bf16", debug=True, **options)
    tokens, logits = dense
    assert engine.generate(PROMPTS, max_new_tokens=8).token_ids == tokens
    assert np.abs(engine.logits(PROMPTS[0]) - logits).max() < 2e-5 * np.abs(logits).max()
    wide = tiny.engine(cache_ratio=0)
    assert 2 * engine.store.nbytes == wide.store.nbytes and engine.store.get(0, 0).down.dtype == "bfloat16"
    assert engine.stats is not None
    narrow = options.get("slots") != "stacked" and not small  # those are XLA's, which would widen them at every call
    assert engine.stats.expert_format == ("bf16" if narrow else "f32")
    engine.close()


@needs_native
def test_a_bfloat16_checkpoint_keeps_its_experts_narrow_in_host_memory():
    narrow = read_model(None, EngineConfig(lazy=True)).store
    wide = read_model(None, EngineConfig(lazy=True, host_kernel="onednn")).store  # it would widen them itself
    assert (narrow.format, wide.format) == ("bf16", "f32") and 2 * narrow.nbytes == wide.nbytes
    same = narrow.get(2, 3), wide.get(2, 3)
    assert all(np.array_equal(np.asarray(one, np.float32), other) for one, other in zip(*same, strict=True))


def test_without_native_kernels_they_are_widened_once(monkeypatch):
    monkeypatch.setattr(checks, "native_here", lambda: False)
    config = tiny.weights("mixtral")[0]
    monkeypatch.setattr(moe, "SMALL_BYTES", 0)
    assert checks.host_format("bf16", EngineConfig()) == "f32"
    assert checks.device_format("bf16", "cpu", EngineConfig(), config) == "f32"
    assert checks.host_format("int4-g64", EngineConfig()) == "int4-g64"
