"""Predictors in the live engine: never a different token, the routers they ask for and no others, and statistics
that say what they were worth."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny

from hybrimoe_jax.engine.recording import EngineTrace

NEW = 10


@pytest.fixture(scope="module")
def prompts():
    return tiny.prompts(tiny.weights("qwen2_moe")[0], (5, 19), seed=3)


def dear_cpu():
    """Where the CPU is slow, the link quick and no miss is fetched on demand, prefetching pays."""
    return tiny.costs(tiny.weights("qwen2_moe")[0], cpu=20.0, transfer=0.5)


def run(prompts, **options):
    engine = tiny.engine(
        "qwen2_moe", **{"cache_ratio": 0.5, "profile": dear_cpu(), "scheduler": "cpu-misses", **options}
    )
    out = engine.generate(prompts, max_new_tokens=NEW)
    engine.close()
    return engine, out


@pytest.fixture(scope="module")
def truth(prompts):
    return run(prompts, executor="dense", cache_ratio=None)[1].token_ids


@pytest.fixture(scope="module")
def recording(prompts, tmp_path_factory):
    engine = tiny.engine("qwen2_moe", cache_ratio=0.5, profile=dear_cpu())
    recorder = EngineTrace(engine)
    engine.record(recorder, None)
    engine.generate(prompts, max_new_tokens=NEW)
    engine.close()
    path = tmp_path_factory.mktemp("live") / "run.npz"
    recorder.save(path)
    return path


@pytest.mark.parametrize(
    "options",
    [
        {"predictor": "router-reuse"},
        {"predictor": "router-input", "executor": "callback"},
        {"predictor": "corrected", "lookahead": "adaptive"},
        {"predictor": "co-activation", "debug": True},
        {"predictor": "previous", "lookahead": 1},
        {"predictor": "recorded:"},
    ],
    ids=lambda options: options["predictor"],
)
def test_every_predictor_gives_the_dense_models_tokens(options, prompts, truth, recording):
    if options["predictor"] == "recorded:":
        options = {"predictor": f"recorded:{recording}"}
    engine, out = run(prompts, **options)
    assert out.token_ids == truth
    prefetch = out.stats.summary()["prefetch"]
    counters = engine.planner.counters
    assert prefetch["issued"] == counters.prefetch_issued == sum(prefetch[k] for k in ("useful", "late", "wasted"))
    assert prefetch["issued"] > 0
    held = prefetch["useful_s"] + prefetch["late_s"] + prefetch["wasted_s"]
    assert held > 0 and (prefetch["late"] > 0 or prefetch["late_s"] == 0)
    depth = engine.planner.depth(1)
    assert set(prefetch["accuracy"]) <= {str(d) for d in range(1, max(2, engine.planner.system.max_distance) + 1)}
    assert "1" in prefetch["accuracy"] and all(0 <= share <= 1 for share in prefetch["accuracy"].values())
    assert depth >= 1 and json.loads(json.dumps(prefetch)) == prefetch


def seen_ahead(prompts, **options) -> list[tuple]:
    engine = tiny.engine("qwen2_moe", cache_ratio=0.5, profile=dear_cpu(), **options)
    seen = []
    recorder = EngineTrace(engine)
    recorder.recorder.add = lambda layer, *args, scores, lookahead, **rest: seen.append((layer, scores, lookahead))
    engine.record(recorder, None)
    engine.generate(prompts[:1], max_new_tokens=3)
    engine.close()
    return seen


def test_both_forms_of_router_reuse_apply_the_routers_they_name(prompts):
    """Past the end the last layer's router stands in: on its own layer it must give the layer's own scores, in
    either form."""
    through_norms, literal = (seen_ahead(prompts, predictor=name) for name in ("router-reuse", "router-input"))
    differ = 0
    for (layer, scores, ahead), (same, other_scores, other) in zip(through_norms, literal, strict=True):
        assert layer == same
        np.testing.assert_allclose(scores, other_scores, atol=1e-5)
        if layer == 2:
            np.testing.assert_allclose(ahead[1], scores, atol=1e-5)
            np.testing.assert_allclose(other[1], scores, atol=1e-5)
        else:
            differ += not np.allclose(ahead[1], other[1], atol=1e-4)
    assert differ == 2 * len(through_norms) // 3, "layers have norms of their own"


def test_routers_are_applied_early_only_for_those_who_read_them(prompts):
    for predictor, wanted in (("previous", 0), ("router-reuse", 2)):
        engine = tiny.engine("qwen2_moe", cache_ratio=0.5, profile=dear_cpu(), lookahead=2, predictor=predictor)
        asked = []
        routers = engine._parts.model.lookahead_routers
        engine._parts.model.lookahead_routers = lambda layer, d, r=routers, a=asked: (a.append(d), r(layer, d))[1]
        engine.generate(prompts[:1], max_new_tokens=3)
        engine.close()
        assert asked and set(asked) == {wanted}
