"""Predictors: one contract over all of them, oracles for what each computes, and their worth on real routing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from grids import examples
from hypothesis import given
from hypothesis import strategies as st
from planner_cases import COSTS, planner_of
from public_traces import shared

from hybrimoe_jax.decide.prefetch.prediction import RouterOutlook
from hybrimoe_jax.decide.prefetch.predictors import PREDICTORS, CoActivation, build_predictor
from hybrimoe_jax.decide.systems import get_system
from hybrimoe_jax.engine.config import EngineConfig
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.trace.facts import TraceFacts
from hybrimoe_jax.trace.file import save_trace
from hybrimoe_jax.trace.importers import open_trace
from hybrimoe_jax.trace.recorder import TraceRecorder
from hybrimoe_jax.trace.tokens import by_token, load_recording

LAYERS, EXPERTS, TOP_K, DISTANCES = 4, 6, 2, 3
MODEL = (LAYERS, EXPERTS, TOP_K, DISTANCES)


def recorded_predictor(path):
    return build_predictor(f"recorded:{path}", *MODEL, load_recording(str(path)))


def steps(rng, sizes, gates: bool = True, skew: float = 1.0):
    """[step][layer] -> Shown of random tokens; what routers say early is the truth with noise."""
    found = []
    for tokens in sizes:
        logits = rng.normal(size=(LAYERS, tokens, EXPERTS)) * skew
        scores = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        noisy = np.exp(logits + rng.normal(size=logits.shape))
        noisy /= noisy.sum(axis=-1, keepdims=True)
        found.append(
            [
                RouterOutlook(
                    np.argsort(-scores[layer], axis=1)[:, :TOP_K],
                    scores[layer],
                    [noisy[min(layer + d, LAYERS - 1)] for d in range(1, DISTANCES + 1)] if gates else (),
                )
                for layer in range(LAYERS)
            ]
        )
    return found


def recorded_file(folder, tokens=6):
    rng = np.random.default_rng(5)
    recorder = TraceRecorder(TraceFacts("toy", LAYERS, EXPERTS, TOP_K))
    for position, step in enumerate(steps(rng, [1] * tokens)):
        recorder.next_step()
        for layer, shown in enumerate(step):
            recorder.add(layer, "decode", sequence=[0], position=[position], ids=shown.ids)
    save_trace(recorder.trace(), folder / "recorded.npz")
    return folder / "recorded.npz"


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


def test_co_activation_is_the_formula_counted_by_hand():
    """One token a step, tables as dictionaries, the smoothed lifts multiplied one by one."""
    run = steps(np.random.default_rng(3), [1] * 30, gates=False)
    predictor = CoActivation(*MODEL)
    across, after, count, tokens, m = {}, {}, {}, [0] * LAYERS, predictor.smoothing
    previous = None
    for step in run:
        ids = [shown.ids[0].tolist() for shown in step]
        for layer, shown in enumerate(step):
            found = predictor.predict(layer, shown, DISTANCES)
            for d in range(1, min(DISTANCES, layer) + 1):
                for i in ids[layer - d]:
                    for j in ids[layer]:
                        across[layer - d, d, i, j] = across.get((layer - d, d, i, j), 0) + 1
            for j in ids[layer]:
                count[layer, j] = count.get((layer, j), 0) + 1
                for i in previous[layer] if previous else ():
                    after[layer, i, j] = after.get((layer, i, j), 0) + 1
            tokens[layer] += 1
            for d, prediction in enumerate(found, 1):
                to, scores = layer + d, []
                for j in range(EXPERTS):
                    prior = (count.get((to, j), 0) + TOP_K / EXPERTS) / (tokens[to] + 1)
                    product = 1.0
                    for i in ids[layer]:
                        joint = (across.get((layer, d, i, j), 0) + m * prior) / (count[layer, i] + m)
                        product *= joint / prior
                    for i in previous[to] if previous else ():
                        joint = (after.get((to, i, j), 0) + m * prior) / (count.get((to, i), 0) + m)
                        product *= joint / prior
                    scores.append(prior * product**0.5)
                np.testing.assert_allclose(prediction.scores, np.array(scores) / sum(scores), rtol=1e-4)
        predictor.finish_step()
        previous = ids


TABLES = ("_across", "_after", "_count", "_tokens")


@pytest.mark.parametrize("rows, follow", [(3, True), (16, True), (17, False)])
def test_rows_of_a_step_are_counted_as_tokens_that_follow_those_of_the_step_before(rows, follow):
    """Up to sixteen rows; more are a prompt's."""
    run = steps(np.random.default_rng(5), [rows] * 3, gates=False)
    together, apart = CoActivation(*MODEL), [CoActivation(*MODEL) for _ in range(rows)]
    for step in run:
        for layer, shown in enumerate(step):
            together.predict(layer, shown, 0)
            for row, predictor in enumerate(apart):
                predictor.predict(layer, RouterOutlook(shown.ids[row : row + 1]), 0)
        for predictor in (together, *apart):
            predictor.finish_step()
    for table in TABLES if follow else TABLES[:1] + TABLES[2:]:
        np.testing.assert_array_equal(getattr(together, table), sum(getattr(one, table) for one in apart))
    assert together._after.any() == follow


@pytest.mark.parametrize("rows, follow", [(3, True), (16, True), (17, False)])
def test_rows_of_a_step_are_predicted_as_tokens_that_follow_those_of_the_step_before(rows, follow, recording):
    first, second = steps(np.random.default_rng(7), [rows] * 2, gates=False)
    known = load_recording(str(recording))

    def found(part, told=True):
        predictor = build_predictor(f"recorded:{recording}", *MODEL, known)
        for layer, shown in enumerate(first if told else ()):
            predictor.predict(layer, RouterOutlook(shown.ids[part]), 0)
        predictor.finish_step()
        return [predictor.predict(layer, RouterOutlook(shown.ids[part]), 9) for layer, shown in enumerate(second)]

    apart = [found(slice(row, row + 1), follow) for row in range(rows)]
    for layer, together in enumerate(found(slice(None))):
        for d, prediction in enumerate(together):
            means = np.mean([one[layer][d].scores for one in apart], axis=0)
            np.testing.assert_allclose(prediction.scores, means, rtol=1e-4)


def test_only_what_follows_or_lies_beside_each_other_is_counted_as_such():
    run = steps(np.random.default_rng(9), [1, 1, 1], gates=False)
    predictor = CoActivation(*MODEL)
    for step, layers in zip(run, (LAYERS, 2, LAYERS)):  # the one in the middle is broken off
        after = predictor._after.copy()
        for layer, shown in enumerate(step[:layers]):
            predictor.predict(layer, shown, 0)
        predictor.finish_step()
    assert (predictor._after - after).sum(axis=(1, 2)).tolist() == [TOP_K**2] * 2 + [0] * 2
    across = predictor._across.copy()
    (prompt,) = steps(np.random.default_rng(9), [5], gates=False)
    for layer in (0, 1, 3):  # the last layer shows the last token only, the third nothing
        predictor.predict(layer, RouterOutlook(prompt[layer].ids[-1 if layer == 3 else 0 :]), 0)
    predictor.finish_step()
    added = (predictor._across - across).sum(axis=(2, 3))
    assert added[0].tolist() == [5 * TOP_K**2, 0, 0] and not added[1:].any()
    assert predictor._tokens.tolist() == [3 + 5, 3 + 5, 2, 2 + 1]


def test_after_a_step_broken_off_the_token_before_counts_where_all_layers_in_reach_have_it():
    run = steps(np.random.default_rng(6), [1] * 9, gates=False)
    found = {}
    for layers, told in ((LAYERS, True), (2, True), (2, False)):
        predictor = CoActivation(*MODEL)
        for number, step in enumerate(run):
            for layer, shown in enumerate(step[: layers if number == 8 else LAYERS]):
                predictor.predict(layer, shown, 0)
            predictor.finish_step()
        if not told:
            predictor._before = {}
        found[layers, told] = [predictor.predict(0, run[0][0], depth)[0].scores for depth in (1, 3)]
    near, far = found[2, True]
    assert near != found[2, False][0] and far == found[2, False][1]
    assert found[2, False][0] == pytest.approx(found[2, False][1])
    assert found[LAYERS, True][0] == pytest.approx(found[LAYERS, True][1])


def test_one_token_alone_and_the_same_token_among_others_are_predicted_alike():
    run = steps(np.random.default_rng(4), [20] * 8, gates=False, skew=3.0)
    predictor = CoActivation(*MODEL)
    for step in run:
        for layer, shown in enumerate(step):
            predictor.predict(layer, shown, DISTANCES)
        predictor.finish_step()
    predictor.learn = False
    many = predictor.predict(0, run[0][0], DISTANCES)
    alone = [predictor.predict(0, RouterOutlook(run[0][0].ids[n : n + 1]), DISTANCES) for n in range(20)]
    for d in range(DISTANCES):
        means = np.mean([one[d].scores for one in alone], axis=0)
        np.testing.assert_allclose(many[d].scores, means, rtol=1e-4)
        loads = {}
        for one in alone:
            for expert in one[d].loads:
                loads[expert] = loads.get(expert, 0) + 1
        assert dict(many[d].loads) == loads


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


def test_a_recorded_table_is_what_learning_online_would_have_counted(recording):
    online, recorded = CoActivation(*MODEL), recorded_predictor(recording)
    for record in open_trace(recording).records():
        online.predict(record.layer, RouterOutlook(record.ids), DISTANCES)
        if record.layer == LAYERS - 1:
            online.finish_step()
    for table in TABLES:
        assert np.array_equal(getattr(online, table), getattr(recorded, table)), table
    before = recorded._count.copy()
    recorded.predict(0, RouterOutlook(np.array([[0, 1]])), DISTANCES)
    recorded.finish_step()
    assert np.array_equal(recorded._count, before), "it learns no further"


def test_a_recording_of_one_expert_a_token_is_counted_as_any():
    ids = np.random.default_rng(7).integers(0, EXPERTS, (9, LAYERS, 1))
    recorded, online = (CoActivation(LAYERS, EXPERTS, 1, DISTANCES) for _ in range(2))
    recorded.count(ids, np.ones(8))
    for token in ids:
        for layer in range(LAYERS):
            online.predict(layer, RouterOutlook(token[layer : layer + 1]), 0)
        online.finish_step()
    for table in TABLES:
        np.testing.assert_array_equal(getattr(recorded, table), getattr(online, table))


def test_a_recorded_table_of_a_batch_is_that_of_its_sequences_one_by_one(tmp_path):
    rng = np.random.default_rng(6)
    runs = [steps(rng, [1] * 5) for _ in range(3)]
    tables = []
    for name, passes in {
        "apart": [([number], at) for number in range(3) for at in range(5)],
        "together": [([0, 1, 2], at) for at in range(5)],
    }.items():
        recorder = TraceRecorder(TraceFacts("toy", LAYERS, EXPERTS, TOP_K))
        for sequences, at in passes:
            recorder.next_step()
            for layer in range(LAYERS):
                ids = np.concatenate([runs[number][at][layer].ids for number in sequences])
                recorder.add(layer, "decode", sequence=sequences, position=[at] * len(sequences), ids=ids)
        recorder.save(tmp_path / f"{name}.npz")
        tables.append(recorded_predictor(tmp_path / f"{name}.npz"))
    for table in TABLES:
        assert np.array_equal(getattr(tables[0], table), getattr(tables[1], table)), table


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


def share_come_true(name: str, trace, tokens: int) -> list[float]:
    """The share of experts foreseen at distance 1 and 3, over the second half of the tokens."""
    facts = trace.facts
    ids = by_token(trace).ids[:tokens]
    predictor = build_predictor(name, facts.layers, facts.experts, facts.top_k, 3)
    hits = {1: [], 3: []}
    for number, token in enumerate(ids):
        for layer in range(facts.layers):
            found = predictor.predict(layer, RouterOutlook(token[layer : layer + 1]), 3)
            for d in (1, 3) if number >= tokens // 2 else ():
                if d <= len(found):
                    hits[d].append(np.mean([e in found[d - 1].loads for e in token[layer + d].tolist()]))
        predictor.finish_step()
    return [float(np.mean(hits[d])) for d in (1, 3)]


def test_on_real_routing_co_activation_foresees_half_of_the_experts_three_layers_ahead():
    trace = open_trace(shared("trace-deepseek-v2-lite-esft/intent.npz"))
    learned, repeated = (share_come_true(name, trace, 500) for name in ("co-activation", "previous"))
    assert min(learned) > 0.5 > max(repeated) + 0.1


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
