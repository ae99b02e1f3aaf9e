"""The scheduler that looks beyond its layer: against brute force over its objective, and what it is for."""

import dataclasses
import itertools
import random

import pytest
from schedule_cases import costs, random_problem

from hybrimoe_jax.decide.schedule import Coming, Problem, get_scheduler, landings, replay


def random_view(generator: random.Random, problem: Problem) -> Problem:
    """The problem with fills and a next layer of equal loads."""
    fill = {e: generator.uniform(-1, 2) for e in problem.loads}
    here, absent = generator.randint(0, 4), generator.randint(0, 4)
    coming = Coming([1] * here, [1] * absent, 1, generator.uniform(0, 4), generator.randint(0, 4), generator.random())
    return dataclasses.replace(problem, fill=fill, coming=generator.choice((coming, coming, None)))


def beyond(problem: Problem, schedule) -> float:
    """What the objective adds to the makespan, from its definition."""
    saved = sum(problem.fill[e] for e in schedule.fetch)
    coming = problem.coming
    if coming is None:
        return -saved
    count = len(schedule.fetch) + len(coming.absent)
    beside, alone = problem.costs.transfer(True), problem.costs.transfer(False)
    landed = landings(problem.link_start, schedule.cpu_seconds, count, beside, alone)[len(schedule.fetch) :]
    moved = sum(t <= schedule.makespan + coming.gap for t in landed) if problem.allow_fetch else 0
    moved = min(moved, coming.room)
    least = []
    for ahead in range(moved + 1):
        loads = dict(enumerate([*coming.resident, *sorted(coming.absent, reverse=True)]))
        flags = {name: getattr(problem, name) for name in ("allow_cpu", "allow_fetch", "allow_steal")}
        layer = Problem(loads, set(range(len(coming.resident) + ahead)), problem.costs, coming.tokens, **flags)
        least.append(get_scheduler("optimal").schedule(layer).makespan)
    return least[0] + coming.chance * (min(least) - least[0]) - saved


def least_objective(problem: Problem) -> float:
    best = float("inf")
    for lanes in itertools.product((0, 1), repeat=len(problem.loads)):
        cpu = [e for e, lane in zip(problem.loads, lanes) if lane == 0]
        device = [e for e, lane in zip(problem.loads, lanes) if lane == 1]
        fetch = [e for e in device if e not in problem.resident and e not in problem.in_flight]
        fetch.sort(key=lambda e: -problem.costs.device(problem.loads[e]))
        if (cpu and not problem.allow_cpu) or (fetch and not problem.allow_fetch):
            continue
        if not problem.allow_steal and problem.resident.intersection(cpu):
            continue
        here = [e for e in device if e in problem.resident]
        cpu_end = replay(problem, cpu, (), ()).cpu_seconds
        beside, alone = problem.costs.transfer(True), problem.costs.transfer(False)
        ready = dict(zip(fetch, landings(problem.link_start, cpu_end, len(fetch), beside, alone))) | problem.in_flight
        others = sorted([e for e in device if e not in problem.resident], key=ready.__getitem__)
        schedule = replay(problem, cpu, here + others, fetch)
        best = min(best, schedule.makespan + beyond(problem, schedule))
    return best


def test_with_equal_loads_the_objective_is_least():
    generator, scheduler = random.Random(0), get_scheduler("lookahead-optimal")
    for _ in range(250):
        problem = random_problem(generator, generator.randint(1, 6), True)
        problem = random_view(generator, dataclasses.replace(problem, loads=dict.fromkeys(problem.loads, 1)))
        s = scheduler.schedule(problem)
        assert s.later == pytest.approx(beyond(problem, s)) == scheduler.later(problem, s)
        assert s.makespan + s.later == pytest.approx(least_objective(problem))


def test_with_any_loads_it_is_seldom_off_and_never_behind_optimal():
    generator, scheduler = random.Random(1), get_scheduler("lookahead-optimal")
    exact = 0
    for _ in range(150):
        problem = random_view(generator, random_problem(generator, generator.randint(2, 6), generator.random() < 0.5))
        s, optimal = scheduler.schedule(problem), get_scheduler("optimal").schedule(problem)
        least = least_objective(problem)
        assert s.later == pytest.approx(beyond(problem, s)) and s.makespan + s.later >= least - 1e-9
        assert s.makespan + s.later <= optimal.makespan + beyond(problem, optimal) + 1e-9
        exact += s.makespan + s.later <= least + 1e-9
    assert exact > 120


def test_without_a_view_it_is_optimal():
    generator = random.Random(2)
    for _ in range(50):
        problem = random_problem(generator, generator.randint(1, 9), False)
        assert get_scheduler("lookahead-optimal").schedule(problem) == get_scheduler("optimal").schedule(problem)


def test_a_fill_is_worth_a_longer_layer_and_the_next_layer_may_want_the_link_more():
    model = costs(cpu=(1.0, 0.0, 0.0), device=(0.5, 0.0), shared=0.0, transfer=2.0)
    rule = get_scheduler("lookahead-optimal")
    alone = Problem({0: 1}, set(), model)
    assert get_scheduler("optimal").schedule(alone).cpu == (0,)
    assert rule.schedule(dataclasses.replace(alone, fill={0: 1.0})).cpu == (0,)
    assert rule.schedule(dataclasses.replace(alone, fill={0: 1.6})).fetch == (0,)
    # Fetching pays here (2.5 against 3), but then the next layer's miss comes too late for it.
    slow = dataclasses.replace(model, cpu_expert=3.0)
    layer = Problem({0: 1}, set(), slow)
    assert rule.schedule(dataclasses.replace(layer, coming=Coming([], [], 1, 0.0, 1))).fetch == (0,)
    assert rule.schedule(dataclasses.replace(layer, coming=Coming([], [1], 1, 0.0, 1))).cpu == (0,)
    for doubtful in (
        Coming([], [1], 1, 0.0, 0),
        Coming([], [1], 1, 0.0, 1, chance=0.1),
    ):  # no room; an unlikely prediction
        assert rule.schedule(dataclasses.replace(layer, coming=doubtful)).fetch == (0,)
