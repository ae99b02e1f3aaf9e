"""Remembered answers for loads of 1 are the rules' own; a planner that remembers plans as one that does not."""

import random

import pytest
from planner_cases import planner_of, prefetch
from schedule_cases import costs

from hybrimoe_jax.decide.schedule import SCHEDULERS, Problem, get_scheduler
from hybrimoe_jax.decide.schedule.shared_cores import SharedCoresScheduler
from hybrimoe_jax.decide.schedule.unit_load_cache import UnitLoadCache, apply
from hybrimoe_jax.decide.systems import SYSTEMS

RULES = [name for name, rule in SCHEDULERS.items() if rule.depends_on_counts_only]


def machine(generator: random.Random):
    uniform = generator.uniform
    transfer = uniform(0.3, 5)
    return costs(
        cpu=(uniform(0.3, 4), 0.0, generator.choice((0.0, uniform(0, 1)))),
        device=(uniform(0.05, 1), 0.0),
        shared=uniform(0, 2),
        transfer=transfer,
        transfer_busy=transfer * generator.choice((1.0, uniform(1, 2))),
    )


@pytest.mark.parametrize("shared_cores", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_a_pattern_filled_in_is_the_rules_own_answer(name, shared_cores):
    generator, answered, without_fetch = random.Random(name), 0, 0
    for _ in range(150):
        model = machine(generator)
        rule = get_scheduler(name)
        allow_fetch = generator.random() < 0.8 or not rule.uses_cpu
        if shared_cores:
            model = model.__class__(**{**model.describe(), "alone_expert": generator.uniform(0.2, 3)})
            rule = SharedCoresScheduler(rule)
        cache = UnitLoadCache(rule, model, allow_fetch)
        for _ in range(4):
            experts = generator.sample(range(32), generator.randint(1, 8))
            resident = {e for e in range(32) if generator.random() < 0.4}
            scored = not cache.by_id and generator.random() < 0.7
            scores = [generator.random() for _ in range(32)] if scored else None
            busy = generator.choice((0.0, generator.uniform(0, 4), 100.0))
            loads = dict.fromkeys(experts, 1)
            problem = Problem(loads, resident, model, 1, scores, {}, busy, allow_fetch=allow_fetch)
            groups = [e for e in experts if e in resident], [e for e in experts if e not in resident]
            order = [e for g in groups for e in sorted(g, key=lambda e: (-scores[e] if scored else 0, e))]
            want = rule.schedule(problem)
            pattern = cache.find(len(groups[0]), len(groups[1]), not scored, busy)
            if pattern is None:
                assert busy > 0
                continue
            answered += 1
            without_fetch += busy > 0 and bool(groups[1])
            assert apply(pattern, order, busy) == want
            assert pattern.resident(order) == tuple(e for e in want.device if e in resident)
    assert answered > 150
    if name in ("paper", "released", "cpu-misses", "optimal"):
        assert without_fetch > 10, "a busy link must not always go the long way"


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_planner_that_remembers_plans_as_one_that_does_not(system):
    generator = random.Random(system)
    for _ in range(12):
        model = machine(generator)
        options = {"max_in_flight": 2, "prefetch": generator.choice((None, "impact"))}
        quick, plain = (planner_of(system, 3, 16, 4, 5, model, predictor="previous", **options) for _ in range(2))
        plain._schedule_cache._unit_loads = None
        under_way = []
        for _ in range(12):
            for layer in range(3):
                while under_way and generator.random() < 0.4:
                    transfer = under_way.pop(0)
                    assert quick.landed(*transfer) == plain.landed(*transfer)
                experts = generator.sample(range(16), 4)
                scores = [generator.choice((generator.random(), 0.25)) for _ in range(16)]
                loads = dict.fromkeys(experts, 1)
                plans = [p.plan(layer, loads, scores if layer else None, 1) for p in (quick, plain)]
                assert plans[0] == plans[1]
                under_way = [t for t in under_way if t not in {(layer, f.expert) for f in plans[0].awaited}]
                ahead = [(dict.fromkeys(generator.sample(range(16), 4), 1), None) for _ in range(2)]
                started = prefetch(quick, layer, ahead)
                assert started == prefetch(plain, layer, ahead)
                under_way += [(p.layer, p.expert) for p in started]
            quick.finish_step(), plain.finish_step()
        assert quick.counters == plain.counters


def test_a_link_that_is_busy_is_not_asked_for_where_it_is_idle_from_time_0():
    """`released` fetches where the CPU and the link would end at one moment."""
    model = costs(cpu=(3.0, 0.0, 0.0), device=(1.0, 0.0), shared=0.0, transfer=2.0)
    rule = get_scheduler("released")
    want = rule.schedule(Problem({0: 1}, set(), model, 1, None, {}, 50.0))
    pattern = UnitLoadCache(rule, model).find(0, 1, True, 50.0)
    assert want.cpu == (0,) and pattern is not None and apply(pattern, [0], 50.0) == want
