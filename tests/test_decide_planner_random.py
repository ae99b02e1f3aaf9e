"""The planner through random steps: each expert runs once, and a model of the slots agrees with it."""

import pytest
from grids import examples
from hypothesis import given
from hypothesis import strategies as st
from planner_cases import EXPERTS, LAYERS, TOP_K, fetched, planner_of, prefetch, residents

from hybrimoe_jax.decide.cache import POLICIES, policy_class
from hybrimoe_jax.decide.plan import REFUSED
from hybrimoe_jax.decide.prefetch.prediction import predict
from hybrimoe_jax.decide.schedule import SCHEDULERS
from hybrimoe_jax.decide.systems import SYSTEMS, get_system
from hybrimoe_jax.machine.costs import CostModel


def score_vectors():
    return st.lists(st.floats(0, 1), min_size=EXPERTS, max_size=EXPERTS)


@st.composite
def engines(draw):
    times = st.just(0.0) | st.floats(1e-9, 4.0)
    busy, alone = sorted((draw(st.floats(0.2, 20)), draw(st.floats(0.2, 20))))
    costs = CostModel(
        *(draw(times) for _ in range(9)),
        transfer_latency=draw(times),
        bandwidth=alone,
        bandwidth_cpu_busy=busy,
        expert_bytes=1,
    )
    system, cache = draw(st.sampled_from(sorted(SYSTEMS))), draw(st.none() | st.sampled_from(sorted(POLICIES)))
    comparable = policy_class(cache or get_system(system).cache).comparable
    return planner_of(
        system,
        LAYERS,
        EXPERTS,
        TOP_K,
        draw(st.lists(st.integers(0, EXPERTS), min_size=LAYERS, max_size=LAYERS)),
        costs,
        cache=cache,
        scope=draw(st.sampled_from(["layer", "pooled"])) if comparable else "layer",
        scheduler=draw(st.none() | st.sampled_from(sorted(SCHEDULERS))),
        prefetch=draw(st.none() | st.sampled_from(["impact", "next-layer"])),
        guard=draw(st.none() | st.sampled_from(["value", "expected", "none"])),
        max_in_flight=draw(st.integers(0, 4)),
        cold=draw(st.booleans()),
    )


@examples(200)
@given(engine=engines(), data=st.data())
def test_whatever_happens_each_expert_runs_once_and_slots_stay_true(engine, data):
    """A model of the slots, moved only by what plans and landings say, agrees with the planner through random steps."""
    slots = [set(experts) for experts in residents(engine)]
    under_way: set[tuple[int, int]] = set()

    def move(layer, entered, victim):
        if victim is not None:
            owner, left = (layer, victim) if isinstance(victim, int) else victim
            slots[owner].remove(left)
        assert entered not in slots[layer]
        slots[layer].add(entered)
        if engine.system.scope == "layer":
            assert len(slots[layer]) <= engine.slots[layer]
        assert sum(map(len, slots)) <= sum(engine.slots)

    for _ in range(data.draw(st.integers(1, 4), "steps")):
        needed = {}
        for layer in range(LAYERS):
            for transfer in sorted(under_way):
                if data.draw(st.booleans(), "landed"):
                    under_way.remove(transfer)
                    outcome = engine.landed(*transfer)
                    if outcome is not REFUSED:
                        owner, left = outcome if isinstance(outcome, tuple) else (transfer[0], outcome)
                        assert left not in needed.get(owner, ())
                        move(*transfer, outcome)
            tokens = data.draw(st.integers(1, 5), "tokens")
            rows = data.draw(st.lists(score_vectors(), min_size=tokens, max_size=tokens), "scores")
            loads, scores = predict(rows, TOP_K)
            needed[layer] = set(loads)
            before = set(slots[layer])
            plan = engine.plan(layer, loads, scores if data.draw(st.booleans(), "scored") else None, tokens)

            assert sorted([*plan.device, *fetched(plan), *plan.cpu]) == sorted(loads)
            assert set(plan.hits) == before & loads.keys() and set(plan.misses) == loads.keys() - before
            assert set(plan.device) <= before
            assert {(layer, f.expert) for f in plan.awaited} <= under_way
            assert not {(layer, f.expert) for f in plan.fetch} & under_way
            under_way -= {(layer, f.expert) for f in plan.awaited}
            for f in (*plan.awaited, *plan.fetch):
                assert f.victim not in loads and f.victim not in [(layer, expert) for expert in loads]
                if f.stream:
                    assert f.victim is None
                else:
                    move(layer, f.expert, f.victim)
            assert engine.resident(layer) == slots[layer]

            ahead = data.draw(st.lists(score_vectors(), max_size=3), "lookahead")
            started = prefetch(engine, layer, [predict(row, TOP_K) for row in ahead])
            for p in started:
                assert layer < p.layer == layer + p.distance < LAYERS
                assert p.expert not in slots[p.layer] and (p.layer, p.expert) not in under_way
                under_way.add((p.layer, p.expert))
            assert len(under_way) <= engine.max_in_flight
        engine.finish_step()
        c = engine.counters
        assert c.prefetch_issued == c.prefetch_useful + c.prefetch_late + c.prefetch_wasted
        seconds = c.prefetch_useful_s + c.prefetch_late_s + c.prefetch_wasted_s
        assert seconds == pytest.approx(
            (c.prefetch_issued - len(under_way)) * engine.costs.transfer(engine.scheduler.uses_cpu)
        )
        assert c.activated == c.hits + c.misses == c.cpu + c.device
    assert [engine.resident(layer) for layer in range(LAYERS)] == slots
