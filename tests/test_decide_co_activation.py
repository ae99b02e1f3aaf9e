"""Co-activation: the formula counted by hand, its tables learnt online or recorded, and its worth on real routing."""

from __future__ import annotations

import numpy as np
import pytest
from predictor_cases import DISTANCES, EXPERTS, LAYERS, MODEL, TOP_K, recorded_file, recorded_predictor, steps
from public_traces import shared

from hybrimoe_jax.decide.prefetch.prediction import RouterOutlook
from hybrimoe_jax.decide.prefetch.predictors import CoActivation, build_predictor
from hybrimoe_jax.trace.facts import TraceFacts
from hybrimoe_jax.trace.importers import open_trace
from hybrimoe_jax.trace.recorder import TraceRecorder
from hybrimoe_jax.trace.tokens import by_token, load_recording


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    return recorded_file(tmp_path_factory.mktemp("recorded"))


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
