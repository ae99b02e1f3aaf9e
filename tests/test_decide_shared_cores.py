"""Cores that device and CPU share: all experts on the CPU where that is sooner, and nowhere else."""

import dataclasses

import pytest
from grids import examples
from hypothesis import given
from hypothesis import strategies as st
from own_rules import Half

from hybrimoe_jax.decide.planner import Planner
from hybrimoe_jax.decide.schedule import SCHEDULERS, Problem, get_scheduler
from hybrimoe_jax.decide.schedule.shared_cores import with_shared_cores
from hybrimoe_jax.machine.costs import CostModel
from hybrimoe_jax.machine.fit import Samples, fit

COSTS = CostModel(
    cpu_expert=4.0, cpu_token=1.0, cpu_first=1.0, device_expert=5.0, device_token=0.5, shared_base=2.0,
    shared_token=0.0, layer_base=0.0, layer_token=0.0, transfer_latency=0.0, bandwidth=1.0, bandwidth_cpu_busy=1.0,
    expert_bytes=3,
)  # fmt: skip
SHARED = dataclasses.replace(COSTS, alone_expert=2.0, alone_token=0.5, alone_first=0.5)


@examples(200)
@given(
    st.sampled_from(sorted(SCHEDULERS)),
    st.dictionaries(st.integers(0, 9), st.integers(1, 40), min_size=1),
    st.sets(st.integers(0, 9)),
    st.floats(0.1, 20.0),
    st.booleans(),
)
def test_every_expert_once_and_alone_only_where_it_is_sooner(name, loads, resident, per_expert, allow_steal):
    rule, costs = get_scheduler(name), dataclasses.replace(SHARED, alone_expert=per_expert)
    problem = Problem(loads, resident, costs, allow_steal=allow_steal)
    plain, shared = rule.schedule(problem), with_shared_cores(rule, costs).schedule(problem)
    assert sorted(shared.cpu + shared.device) == sorted(loads)
    alone = costs.shared(1) + costs.alone_first + sum(costs.alone(load) for load in loads.values())
    if not shared.uses_all_cores:
        assert shared == plain
        return
    assert shared.cpu and not shared.device and not shared.fetch and shared.makespan == pytest.approx(alone)
    work = plain.device_seconds + costs.alone_first + sum(costs.alone(loads[e]) for e in plain.cpu)
    assert alone < max(plain.makespan, work)
    assert rule.uses_cpu and (not plain.device or (rule.steals and allow_steal))


def test_a_fast_cpu_gets_everything_and_a_slow_one_does_not():
    rule, loads = get_scheduler("paper"), {e: 8 for e in range(8)}
    for alone, expected in ((1.0, True), (100.0, False)):
        costs = dataclasses.replace(SHARED, alone_expert=alone)
        schedule = with_shared_cores(rule, costs).schedule(Problem(loads, {0, 1}, costs))
        assert schedule.uses_all_cores is expected


def test_lanes_of_their_own_are_kept_where_all_cores_are_no_sooner():
    """On the CPU 2 + 1 s behind the shared experts, with all cores `alone_expert` and 1 s."""
    costs = dataclasses.replace(SHARED, cpu_expert=2.0, cpu_first=0.0, alone_token=1.0, alone_first=0.0)
    for alone, expected in ((2.0, False), (1.5, True)):
        costs = dataclasses.replace(costs, alone_expert=alone, shared_base=0.0)
        found = with_shared_cores(get_scheduler("cpu-misses"), costs).schedule(Problem({0: 1}, (), costs))
        assert found.uses_all_cores is expected


def test_the_device_is_not_called_where_the_cpu_takes_all():
    """So what calling it takes is no part of that schedule, and is part of any that gives it an expert."""
    costs = dataclasses.replace(SHARED, alone_expert=6.0, device_expert=1.0, device_token=0.0)
    rule, problem = with_shared_cores(get_scheduler("paper"), costs), Problem({0: 1}, {0}, costs)
    assert not rule.schedule(problem).uses_all_cores
    dear = dataclasses.replace(costs, device_block=100.0)
    found = rule.schedule(Problem({0: 1}, {0}, dear))
    assert found.uses_all_cores and found.makespan == pytest.approx(2.0 + 0.5 + 6.5)


@pytest.mark.parametrize(("resident", "beside"), [({0}, 0.5 + 22), ((), -0.25 + 0.5 + 21 + 22), ({0, 1}, 0.0)])
def test_a_rule_s_schedule_is_charged_for_both_lanes_with_all_cores(resident, beside):
    """The CPU's experts in the device's time; calling the device is left out where it gets none."""
    costs = dataclasses.replace(SHARED, alone_expert=20.0, device_block=0.25)
    rule, problem = with_shared_cores(get_scheduler("cpu-misses"), costs), Problem({0: 2, 1: 4}, resident, costs)
    found = rule.rule.schedule(problem)
    assert rule.charged(problem, found) == found.device_seconds + beside


def test_what_the_handover_must_be_is_what_the_rule_saves_at_most():
    rule = with_shared_cores(get_scheduler("paper"), SHARED)
    dear, cheap = (dataclasses.replace(SHARED, alone_expert=alone, device_expert=0.1) for alone in (9.0, 0.1))
    needed, known = rule.prove_all_on_cpu(dear, 4, 2)
    assert needed > 0 and known is None
    for handover, proven in ((needed, True), (needed * 0.999, False)):
        assert (rule.prove_all_on_cpu(dataclasses.replace(dear, handover=handover), 4, 2)[1] is not None) is proven
    assert rule.prove_all_on_cpu(cheap, 4, 2) == (0.0, None), "nothing is saved, and the handover is not known"
    needed, known = rule.prove_all_on_cpu(dataclasses.replace(cheap, handover=1e-9), 4, 2)
    assert needed == 0 and known.cpu == (0, 1, 2, 3)


def test_residents_stay_on_the_device_where_the_rule_keeps_them_there():
    rule = with_shared_cores(get_scheduler("cpu-misses"), SHARED)
    assert not rule.schedule(Problem({0: 8, 1: 8}, {0}, SHARED)).uses_all_cores
    assert rule.schedule(Problem({0: 8, 1: 8}, (), SHARED)).uses_all_cores


def test_a_machine_with_a_device_of_its_own_is_planned_as_before():
    assert not COSTS.shares_cores and SHARED.shares_cores
    rule = get_scheduler("paper")
    assert with_shared_cores(rule, COSTS) is rule
    idle = get_scheduler("fetch-misses")
    assert with_shared_cores(idle, SHARED) is idle


def test_the_planner_uses_it_and_a_profile_keeps_it(tmp_path):
    SHARED.save(tmp_path / "p.json")
    costs = CostModel.load(tmp_path / "p.json")
    assert costs == SHARED
    planner = Planner("cpu-only", 1, 8, 2, 0, costs)
    plan = planner.plan(0, {1: 8, 2: 8}, None, 8)
    assert plan.schedule.uses_all_cores and plan.makespan == pytest.approx(2.0 + 0.5 + 2 * (2.0 + 4.0))


def test_the_fit_finds_the_line():
    samples = Samples(3)
    for kind, once in (("cpu", 0.0), ("device", 0.0), ("alone", 0.25)):
        for load in (1, 16, 64):
            for experts in (1, 2):
                samples.add(kind, (load, experts), once + experts * (2.0 + 0.5 * load))
    samples.add("transfer", (1,), 1.0)
    samples.add("transfer", (3,), 3.0)
    costs = fit(samples)
    assert (costs.alone_expert, costs.alone_token, costs.alone_first) == pytest.approx((2.0, 0.5, 0.25))


def planner_for(costs, system="hybrimoe", slots=2):
    return Planner(system, num_layers=2, num_experts=8, top_k=4, slots_per_layer=slots, costs=costs)


def test_a_step_is_all_on_the_cpu_only_where_no_routing_is_worth_leaving_the_program():
    """Residents would save more than the handover here: only a dearer handover makes the step all on the CPU."""
    costs = dataclasses.replace(SHARED, device_expert=0.1, device_token=0.0, look=1e6)
    rule = with_shared_cores(get_scheduler("paper"), costs)
    saved = max(
        rule.all_on_cpu(p).makespan - rule.charged(p, rule.rule.schedule(p))
        for p in (Problem(dict.fromkeys(range(4), 1), range(hits), costs) for hits in range(3))
    )
    assert saved > 0
    for handover, expected in ((0.0, False), (saved * 0.99, False), (saved * 1.01, True)):
        planner = planner_for(dataclasses.replace(costs, handover=handover))
        assert planner.all_on_cpu is expected and planner.handover_for_all_on_cpu == saved
        plan = planner.plan(0, {0: 1, 1: 1, 5: 1, 6: 1}, None, 1)
        assert (sorted(plan.cpu) == [0, 1, 5, 6] and not plan.fetch) or not expected


def test_residents_that_must_stay_on_the_device_leave_nothing_all_on_the_cpu():
    costs = dataclasses.replace(SHARED, handover=1e6, look=1e6)
    assert planner_for(costs).all_on_cpu and planner_for(costs, "cpu-only", 0).all_on_cpu
    assert not planner_for(costs, "ktransformers").all_on_cpu and not planner_for(costs, "on-demand").all_on_cpu
    assert not planner_for(dataclasses.replace(COSTS, handover=1e6)).all_on_cpu  # a device with cores of its own


def test_a_step_of_several_tokens_is_planned_as_ever():
    costs = dataclasses.replace(SHARED, alone_expert=100.0, handover=1e6, look=1e6)
    planner = planner_for(costs)
    assert planner.all_on_cpu
    assert planner.plan(0, {0: 2, 5: 1}, None, 3).schedule.uses_all_cores is False


def test_a_rule_of_ones_own_needs_no_name():
    assert Half.name == with_shared_cores(Half(), SHARED).name == "Half" and type("Mine", (Half,), {}).name == "Mine"
