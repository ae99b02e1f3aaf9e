"""A trace through planner and machine: against a replay that shares no code with them, and what a trace lacks."""

import collections
import dataclasses

import numpy as np
import pytest

from hybrimoe_jax.decide import Planner
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.machine.profile import load_profile
from hybrimoe_jax.machine.shapes import ModelShape
from hybrimoe_jax.machine.virtual import VirtualMachine
from hybrimoe_jax.simulate.cases import Case, halves, samples
from hybrimoe_jax.simulate.records import interval, measures
from hybrimoe_jax.simulate.replay import replay
from hybrimoe_jax.simulate.workload import TokenSteps, recorded_steps
from hybrimoe_jax.trace.columns import Trace
from hybrimoe_jax.trace.facts import facts_of
from hybrimoe_jax.trace.file import check_trace

LAYERS, EXPERTS, TOP_K, SLOTS = 4, 16, 3, 5
SHAPE = ModelShape(
    "toy", LAYERS, EXPERTS, TOP_K, 2048, 1408, shared=2 * 3 * 2048 * 1408, attention=10**7, kv=576, head=10**8
)


def routing(lengths=(9, 4, 12, 7), phase=1, seed=0, **columns) -> Trace:
    """Random skewed routing, one row a token and layer, sequence by sequence."""
    generator = np.random.default_rng(seed)
    tokens = sum(lengths)
    popularity = generator.dirichlet(np.full(EXPERTS, 0.5), LAYERS)
    ids = np.stack(
        [
            generator.choice(EXPERTS, TOP_K, False, popularity[row % LAYERS] * 0.9 + 0.1 / EXPERTS)
            for row in range(tokens * LAYERS)
        ]
    )
    sequence = np.repeat(np.repeat(np.arange(len(lengths)), lengths), LAYERS).astype(np.int32)
    position = np.repeat(np.concatenate([np.arange(n) for n in lengths]), LAYERS).astype(np.int32)
    weights = generator.dirichlet(np.ones(TOP_K), tokens * LAYERS).astype(np.float32)
    step = np.repeat(np.arange(tokens), LAYERS).astype(np.int32)
    layer = np.tile(np.arange(LAYERS), tokens).astype(np.int32)
    facts = facts_of("toy", LAYERS, EXPERTS, TOP_K, 2048, 1408)
    return Trace(
        facts,
        step,
        layer,
        np.full(len(step), phase, np.uint8),
        sequence,
        position,
        ids.astype(np.int32),
        weights,
        **columns,
    )


def independent(trace: Trace, costs, system: str, frequencies) -> tuple[int, int, float]:
    """(hits, fetches, seconds) of three systems, told without planner, policy, scheduler or machine.

    One token a step, one shared-bandwidth link.

    on-demand: least recently used, misses fetched one behind the other in the order of their ids, after the resident
    ones (by id) on the device. ktransformers: the most frequent experts stay, the CPU runs the others. cpu-only: none
    stay.
    """
    top = [sorted(range(EXPERTS), key=lambda e: (-row[e], e))[:SLOTS] for row in frequencies]
    cache = [collections.OrderedDict.fromkeys(sorted(experts)) for experts in top]
    now, hits, fetches = 0.0, 0, 0
    for row in range(len(trace)):
        layer, experts = int(trace.layer[row]), trace.ids[row].tolist()
        if layer == 0:
            now += costs.step(1)
        now += costs.layer(1, int(trace.position[row]) + 1)
        if system == "on-demand":
            here = [e for e in experts if e in cache[layer]]
            missing = sorted(set(experts) - set(here))
            device = now + costs.shared(1) + len(here) * costs.device(1)
            for number in range(1, len(missing) + 1):
                device = max(device, now + number * costs.transfer()) + costs.device(1)
            for expert in sorted(experts):  # all were used in this step: the order among them is by id
                cache[layer].pop(expert, None)
            while len(cache[layer]) + len(experts) > SLOTS:
                cache[layer].popitem(last=False)
            cache[layer].update(dict.fromkeys(sorted(experts)))
            now, fetches = device, fetches + len(missing)
        else:
            here = [e for e in experts if e in top[layer]] if system == "ktransformers" else []
            missing = len(experts) - len(here)
            cpu = sum(costs.cpu(1, first=i == 0) for i in range(missing))
            now += max(cpu, costs.shared(1) + len(here) * costs.device(1))
        hits += len(here)
    return hits, fetches, now


@pytest.mark.parametrize("system", ["on-demand", "ktransformers", "cpu-only"])
@pytest.mark.parametrize("profile", ["a6000-paper", "a6000-engineered", "laptop-8gb"])
def test_the_same_as_a_replay_that_shares_no_code(system, profile):
    costs = load_profile(profile).costs(SHAPE, "int4")
    trace = routing((40, 60, 50))
    tokens = TokenSteps(trace)
    frequencies = tokens.frequencies([1])
    slots = 0 if system == "cpu-only" else SLOTS
    planner = Planner(system, LAYERS, EXPERTS, TOP_K, slots, costs, frequencies=frequencies)
    result = replay(planner, VirtualMachine(costs), tokens.steps(tokens.sequences))
    hits, fetches, seconds = independent(trace, costs, system, frequencies)
    assert (result.counters.hits, result.counters.fetched) == (hits, fetches)
    assert result.seconds == pytest.approx(seconds, rel=1e-9)


def test_steps_hold_what_the_trace_holds():
    trace = routing()
    tokens = TokenSteps(trace)
    assert tokens.phase == "decode" and len(tokens) == 32 and tokens.sequences == [0, 1, 2, 3]
    steps = list(tokens.steps([1, 3]))
    assert [s.sequence for s in steps] == [1] * 4 + [3] * 7 and [s.context for s in steps[:4]] == [1, 2, 3, 4]
    row = 9 * LAYERS
    asked = steps[0].layers[0]
    assert set(asked.loads) == set(trace.ids[row].tolist()) and sum(asked.loads.values()) == TOP_K
    assert sum(asked.scores) == pytest.approx(1) and sum(s > 0 for s in asked.scores) == TOP_K
    assert [len(list(tokens.steps([1, 3], most))) for most in (3, 99)] == [3, 11]
    counted = np.array(tokens.frequencies([0]))
    assert (
        counted.sum() == 9 * LAYERS * TOP_K
        and (counted[0] == np.bincount(trace.ids[: 9 * LAYERS : LAYERS].ravel(), minlength=EXPERTS)).all()
    )


def test_sequences_decoded_together_are_replayed_one_after_another():
    apart = routing((5, 5, 5, 5))
    step = apart.position.copy()  # four sequences a step
    order = np.lexsort((apart.sequence, apart.layer, step))
    names = ("layer", "phase", "sequence", "position", "ids", "weights")
    together = dataclasses.replace(apart, step=step[order], **{name: getattr(apart, name)[order] for name in names})
    check_trace(together, "batch")
    assert [step.tokens for step in recorded_steps(together)] == [4] * 5
    one, other = TokenSteps(apart), TokenSteps(together)
    for sequences in ([0, 1, 2, 3], [1, 3]):
        for a, b in zip(one.steps(sequences), other.steps(sequences), strict=True):
            assert a[:4] == b[:4] and [x[:3] for x in a.layers] == [x[:3] for x in b.layers]


def test_prompts_are_consecutive_tokens_in_one_step():
    tokens = TokenSteps(routing())
    windows = tokens.prompts(tokens.sequences, 10, 2)
    assert len(windows) == 2 and all(w.tokens == 10 and w.phase == "prefill" for w in windows)
    assert all(sum(asked.loads.values()) == 10 * TOP_K for w in windows for asked in w.layers)
    one_by_one = list(tokens.steps(tokens.sequences))[:10]
    for layer in range(LAYERS):
        loads = collections.Counter(e for step in one_by_one for e in step.layers[layer].loads)
        assert windows[0].layers[layer].loads == loads
        mean = np.mean([step.layers[layer].scores for step in one_by_one], axis=0)
        assert windows[0].layers[layer].scores == pytest.approx(mean.tolist())
    assert tokens.prompts(tokens.sequences, 100, 2) == []


def test_rows_of_prompts_alone_say_so():
    assert TokenSteps(routing(phase=0)).phase == "prefill, replayed token by token"


def test_a_layer_without_rows_is_left_out():
    trace = routing((2,))
    keep = np.ones(len(trace), bool)
    keep[2] = False
    names = ("step", "layer", "phase", "sequence", "position", "ids")
    short = Trace(trace.facts, *(getattr(trace, name)[keep] for name in names))
    assert [[a.layer for a in s.layers] for s in recorded_steps(short)] == [[0, 1, 3], [0, 1, 2, 3]]
    assert next(recorded_steps(short)).layers[0].scores is None


def test_full_scores_are_used_where_the_trace_has_them():
    scores = np.random.default_rng(1).dirichlet(np.ones(EXPERTS), 32 * LAYERS).astype(np.float32)
    tokens = TokenSteps(routing(scores=scores))
    first = next(tokens.steps([0]))
    assert tokens.has_scores and first.layers[1].scores == scores[1].tolist()


def test_halves_never_run_on_their_own_frequencies():
    tokens = TokenSteps(routing())
    (one, from_two), (two, from_one) = halves(tokens)
    assert sorted([*one, *two]) == tokens.sequences and not set(one) & set(two)
    assert from_two == tokens.frequencies(two) and from_one == tokens.frequencies(one)
    assert halves(TokenSteps(routing((5,)))) == [([0], None)]


def test_intervals_cover_the_mean_of_sequences_and_need_two():
    generator = np.random.default_rng(0)
    inside = 0
    for seed in range(200):
        values = generator.exponential(1.0, 40)
        low, high = interval(values, np.ones(40), seed)
        inside += low <= 1.0 <= high
    assert 0.85 <= inside / 200 <= 0.99
    assert interval([1.0], [2.0]) is None


def test_measures_add_up():
    tokens = TokenSteps(routing())
    costs = load_profile("a6000-engineered").costs(SHAPE, "int4")
    planner = Planner("hybrimoe", LAYERS, EXPERTS, TOP_K, SLOTS, costs)
    result = replay(planner, VirtualMachine(costs), tokens.steps(tokens.sequences))
    said = measures(result, costs.expert_bytes, 1)
    assert said["steps"] == 32 and said["sequences"] == 4
    assert said["hits"] + said["misses"] == 32 * LAYERS * TOP_K == said["cpu_experts"] + said["device_experts"]
    assert said["seconds_per_step"]["mean"] * 32 == pytest.approx(result.seconds)
    low, high = said["seconds_per_step"]["ci95"]
    assert low <= said["seconds_per_step"]["mean"] <= high
    assert all(0 <= share <= 1 + 1e-9 for share in said["occupancy"].values())
    both = result + result
    assert both.counters.hits == 2 * result.counters.hits and both.seconds == 2 * result.seconds


def test_an_empty_trace_is_refused():
    trace = routing((1,))
    nothing = Trace(
        trace.facts, *(getattr(trace, n)[:0] for n in ("step", "layer", "phase", "sequence", "position", "ids"))
    )
    with pytest.raises(UserError, match="no tokens"):
        TokenSteps(nothing)


def test_whole_sequences_run_on_the_frequencies_of_the_others():
    tokens = TokenSteps(routing((5,) * 9))

    def sample(count, others=None):
        case = Case("t", "p", "hybrimoe", 0.25, sequences=count, others=others)
        ((chosen, frequencies),) = samples(tokens, case)
        return chosen, frequencies

    assert sample(4) == ([0, 2, 4, 6], tokens.frequencies([1, 3, 5, 7, 8]))
    assert sample(3) == ([0, 3, 6], tokens.frequencies([1, 2, 4, 5, 7, 8]))
    assert sample(9)[0] == sample(99)[0] == [0, 1, 3, 5, 7], "half of them where there are fewer than twice as many"
    assert sample(3, 2) == ([0, 3, 6], tokens.frequencies([1, 5])), "some of the others, evenly spread"
    case = Case("t", "p", "hybrimoe", 0.25, sequences=2)
    assert samples(TokenSteps(routing((5,))), case) == [([0], None)]
    assert [s.context for s in tokens.steps([0, 3], each=2)] == [1, 2, 1, 2]
    assert [s.sequence for s in tokens.steps([0, 3], 3, 2)] == [0, 0, 3]
