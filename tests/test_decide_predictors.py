"""Predictors: one contract over all of them, oracles for what each computes, and what is asked of them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from grids import examples
from hypothesis import given
from hypothesis import strategies as st
from planner_cases import COSTS, planner_of
from predictor_cases import DISTANCES, EXPERTS, LAYERS, MODEL, TOP_K, recorded_file, recorded_predictor, steps

from hybrimoe_jax.decide.prefetch.prediction import RouterOutlook
from hybrimoe_jax.decide.prefetch.predictors import PREDICTORS, build_predictor
from hybrimoe_jax.decide.systems import get_system
from hybrimoe_jax.engine.config import EngineConfig
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.trace.tokens import load_recording


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    return recorded_file(tmp_path_factory.mktemp("recorded"))


NAMES = [*PREDICTORS, "recorded"]


@pytest.mark.parametrize("name", NAMES)
@examples(25)
@given(
    sizes=st.lists(st.sampled_from([1, 1, 2, 5, 20]), min_size=1, max_size=6),
    depth=st.integers(0, DISTANCES + 1),
    gates=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_prediction_is_a_possible_demand_of_the_layers_ahead(name, recording, sizes, depth, gates, seed):
    run = steps(np.random.default_rng(seed), sizes, gates)
    predictor = recorded_predictor(recording) if name == "recorded" else build_predictor(name, *MODEL)
    for step in run:
        if name == "perfect":
            predictor.foresee({layer: shown.ids for layer, shown in enumerate(step)})
        for layer, shown in enumerate(step):
            before = [shown.ids.copy(), shown.scores.copy()]
            found = predictor.predict(layer, shown, depth)
            assert np.array_equal(before[0], shown.ids) and np.array_equal(before[1], shown.scores)
            reach = min(depth, DISTANCES, LAYERS - 1 - layer)
            assert len(found) == (reach if gates or not predictor.needs_routers else 0)
            if name == "perfect":
                wanted = [sorted(later.ids.ravel().tolist()) for later in step[layer + 1 : layer + 1 + reach]]
                assert [sorted(e for e, n in p.loads.items() for _ in range(n)) for p in found] == wanted
            for loads, scores in found:
                assert all(0 <= expert < EXPERTS and load >= 1 for expert, load in loads.items())
                assert sum(loads.values()) in (0, TOP_K, TOP_K * len(shown.ids))
                assert max(loads.values(), default=0) <= len(shown.ids)
                if scores is not None:
                    assert len(scores) == EXPERTS and sum(scores) == pytest.approx(1, abs=1e-3)
                if scores is not None and len(shown.ids) == 1:  # the best ones are meant
                    assert (
                        min(scores[e] for e in loads) >= max([s for e, s in enumerate(scores) if e not in loads]) - 1e-9
                    )
        predictor.finish_step()


def test_what_is_not_asked_for_changes_no_later_prediction():
    """A planner asks only where a transfer could start; the tables follow every step all the same."""
    rng = np.random.default_rng(8)
    for name in ("co-activation", "previous", "router-reuse"):
        always, sometimes = build_predictor(name, *MODEL), build_predictor(name, *MODEL)
        for step in steps(rng, [1] * 20 + [5, 1, 1, 3, 3]):
            for layer, shown in enumerate(step):
                depth = int(rng.integers(0, DISTANCES + 1))
                full, part = always.predict(layer, shown, DISTANCES), sometimes.predict(layer, shown, depth)
                assert [p.loads for p in full[: len(part)]] == [p.loads for p in part]
                for a, b in zip(full, part):
                    np.testing.assert_allclose(a.scores or 0, b.scores or 0, rtol=1e-12)
            always.finish_step(), sometimes.finish_step()


def test_a_planner_predicts_only_where_a_transfer_could_start(monkeypatch):
    """A layer with two misses on the CPU takes 9.5 s. Four layers, two of lookahead."""
    asked, ended = [], []

    class Spy(PREDICTORS["previous"]):
        def predict(self, layer, shown, depth):
            asked.append(depth)
            return super().predict(layer, shown, depth)

        def finish_step(self):
            ended.append(len(asked))

    monkeypatch.setitem(PREDICTORS, "spy", Spy)

    def depths(max_in_flight, transfer):
        asked.clear(), ended.clear()
        costs = dataclasses.replace(COSTS, bandwidth=1 / transfer, bandwidth_cpu_busy=1 / transfer)
        planner = planner_of(
            "hybrimoe", LAYERS, EXPERTS, TOP_K, 2, costs, scheduler="cpu-misses", predictor="spy", lookahead=2,
            max_in_flight=max_in_flight,
        )  # fmt: skip
        for ids in ([4, 5], [2, 3]):
            for layer in range(LAYERS):
                planner.plan(layer, {e: 1 for e in ids}, None, 1)
                planner.prefetch(layer, RouterOutlook(np.array([ids])))
            planner.finish_step()
        assert ended == [LAYERS, 2 * LAYERS], "a predictor is told when a step ends"
        return list(asked)

    assert depths(2, 2.5)[:LAYERS] == [2, 2, 1, 0]
    assert depths(0, 2.5) == [0] * 2 * LAYERS, "no buffer is free"
    assert depths(1, 2.5)[LAYERS:] == [2, 0, 0, 0], "the only one is taken"
    assert [depths(2, transfer)[0] for transfer in (19.0, 19.1)] == [2, 0], "two such layers and no more"
    slow = depths(2, 18.0)
    assert slow[:LAYERS] == [2, 2, 0, 0], "it lands within two layers, not within one"
    assert slow[LAYERS:] == [2, 0, 0, 0], "the link is taken by the one that layer 0 started"


def test_the_correction_finds_a_constant_shift():
    rng = np.random.default_rng(0)
    shift = rng.normal(size=(LAYERS, DISTANCES, EXPERTS)) * 2
    plain, corrected = build_predictor("router-reuse", *MODEL), build_predictor("corrected", *MODEL)
    right = {"plain": 0, "corrected": 0}
    for number in range(40):
        logits = rng.normal(size=(LAYERS, EXPERTS))
        scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        for layer in range(LAYERS):
            ahead = []
            for d in range(1, min(DISTANCES, LAYERS - 1 - layer) + 1):
                seen = np.exp(logits[layer + d] - shift[layer, d - 1])
                ahead.append((seen / seen.sum())[None])
            shown = RouterOutlook(np.argsort(-scores[layer : layer + 1])[:, :TOP_K], scores[layer : layer + 1], ahead)
            for name, predictor in (("plain", plain), ("corrected", corrected)):
                for d, found in enumerate(predictor.predict(layer, shown, DISTANCES), 1):
                    true = set(np.argsort(-scores[layer + d])[:TOP_K].tolist())
                    if number:
                        right[name] += len(true & set(found.loads))
        corrected.finish_step()
    assert right["corrected"] == 39 * 6 * TOP_K > right["plain"]


def test_the_correction_is_the_mean_difference_then_a_running_one():
    """Two layers, two experts. Layer 0 says a half each of layer 1, where in turn one expert is truly e^d likelier."""
    predictor, half = build_predictor("corrected:rate=0.5", 2, 2, 1, 1), np.full((1, 2), 0.5)
    for difference, wanted in ((1.0, 0.0), (3.0, 1.0), (0.0, 2.0), (0.0, 1.0)):
        (found,) = predictor.predict(0, RouterOutlook(np.array([[0]]), half, [half]), 1)
        assert np.log(found.scores[0] / found.scores[1]) == pytest.approx(wanted)
        truth = np.exp([[difference, 0.0]])
        assert predictor.predict(1, RouterOutlook(np.array([[0]]), truth / truth.sum()), 1) == []
        predictor.finish_step()


def test_previous_repeats_the_step_before_and_a_prompts_last_token():
    run = steps(np.random.default_rng(1), [5, 1, 1], gates=False)
    predictor = build_predictor("previous", *MODEL)
    for number, step in enumerate(run):
        for layer, shown in enumerate(step):
            found = predictor.predict(layer, shown, DISTANCES)
            for d, prediction in enumerate(found, 1):
                before = run[number - 1][layer + d].ids[-1].tolist() if number else []
                assert sorted(prediction.loads) == sorted(before)
                scores = run[number - 1][layer + d].scores[-1].tolist() if number else None
                assert prediction.scores == scores
        predictor.finish_step()


def test_names_are_checked_before_anything_runs(recording, tmp_path):
    with pytest.raises(
        UserError, match=r"predictor 'oracle' is unknown \(known: router-reuse, .*recorded:TRACE; or a class"
    ):
        get_system("hybrimoe").override(predictor="oracle")
    with pytest.raises(UserError, match="predictor 'recorded:' is unknown"):
        get_system("hybrimoe").override(predictor="recorded:")
    with pytest.raises(UserError, match="'perfect' knows the future"):
        EngineConfig(predictor="perfect")
    with pytest.raises(UserError, match=r"none.npz: cannot be read"):
        load_recording(str(tmp_path / "none.npz"))
    with pytest.raises(UserError, match=r"4 layers, 6 experts, 2 a token; this model has 4, 8 and 2"):
        build_predictor(f"recorded:{recording}", 4, 8, 2, DISTANCES, load_recording(str(recording)))
