"""Schedulers: the paper's worked instance, every rule's contract, and timing against an independent three-lane
simulator.
"""

import dataclasses
import random
import statistics

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from schedule_cases import costs, simulate

from hybrimoe_jax.decide.schedule import SCHEDULERS, Problem, get_scheduler, replay
from hybrimoe_jax.errors import UserError

A, B, C, D, E = range(5)


def figure_5(shared: float) -> Problem:
    return Problem({A: 1, B: 1, C: 3, D: 4, E: 1}, {D, E}, costs(shared=shared))


def test_paper_figure_5():
    s = get_scheduler("paper").schedule(figure_5(shared=2.0))
    assert (s.cpu, s.fetch, s.device) == ((A, B, E), (C,), (D, C))
    assert (s.makespan, s.cpu_seconds, s.device_seconds, s.link_seconds) == (4.0, 3.0, 4.0, 3.0)


def test_paper_figure_5_with_shorter_shared_experts():
    s = get_scheduler("paper").schedule(figure_5(shared=1.0))
    assert (s.cpu, s.fetch, s.device, s.makespan) == ((A, B), (C,), (D, E, C), 4.0)


SLOW_CPU, MIDDLE = costs(cpu=(100.0, 0.0, 0.0)), costs(cpu=(2.9, 0.0, 0.0))
STEALS = costs(cpu=(1.7, 0.0, 0.0), shared=1.0)


def ones(*experts: int) -> dict[int, int]:
    return dict.fromkeys(experts, 1)


@pytest.mark.parametrize(
    ("rule", "problem", "cpu", "device", "fetch"),
    [
        # Two lanes would finish their next expert at one moment.
        ("paper", Problem({0: 1}, {0}, costs(shared=0.0)), (), (0,), ()),
        ("paper", Problem({0: 3}, (), costs()), (0,), (), ()),
        ("paper", Problem({0: 1, 1: 5}, {0}, SLOW_CPU), (), (0, 1), (1,)),
        ("released", Problem({0: 1}, {0}, costs(shared=0.0)), (), (0,), ()),
        ("released", Problem({0: 4}, (), costs(shared=0.0)), (), (0,), (0,)),
        ("cheaper", Problem({0: 4}, (), costs(shared=0.0)), (0,), (), ()),
        ("optimal", Problem({0: 4}, (), costs(shared=0.0)), (0,), (), ()),
        # Loads are equal: the CPU takes the lower score, the link the higher, then the lower id.
        ("paper", Problem(ones(0, 1, 2), (), MIDDLE, 1, [0.2, 0.5, 0.3]), (0, 2), (1,), (1,)),
        ("paper", Problem(ones(4, 2, 7), (), MIDDLE), (2, 7), (4,), (4,)),
        ("optimal", Problem(ones(0, 1, 2), (), MIDDLE, 1, [0.2, 0.5, 0.3]), (0, 2), (1,), (1,)),
        ("fetch-misses", Problem(ones(0, 1, 2), (), costs(), 1, [0.2, 0.5, 0.2]), (), (1, 0, 2), (1, 0, 2)),
        # Of residents too the CPU takes the lower score, then the lower id.
        ("paper", Problem(ones(3, 1, 2), {1, 2, 3}, STEALS, 1, [0, 0.5, 0.2, 0.2]), (2,), (1, 3), ()),
        # The device takes what is ready first, then as the link; the CPU leaves it what is under way.
        ("paper", Problem(ones(2, 5, 6, 7), {6, 7}, SLOW_CPU, in_flight={2: 2.5, 5: 2.4}), (), (6, 7, 5, 2), ()),
        ("paper", Problem({0: 1, 1: 1}, (), costs(), in_flight={0: 9.0}), (1, 0), (), ()),
        ("cheaper", Problem({0: 2, 1: 1, 2: 9}, (), costs(shared=0.0)), (1, 0), (2,), (2,)),
        # What is under way needs no fetching.
        ("released", Problem(ones(0, 1, 2), {0}, MIDDLE, in_flight={1: 0.5}, allow_fetch=False), (2,), (0, 1), ()),
        # All of the misses that the bandwidths' ratio gives, where it is a whole number but for rounding.
        ("bandwidth-split", Problem({0: 1, 1: 1, 2: 1}, (), costs(cpu=(0.1, 0, 0), transfer=0.2)), (2, 1), (0,), (0,)),
    ],
)  # fmt: skip
def test_between_equals(rule, problem, cpu, device, fetch):
    s = get_scheduler(rule).schedule(problem)
    assert (s.cpu, s.device, s.fetch) == (cpu, device, fetch)


@pytest.mark.parametrize(("rule", "idle_from"), [("paper", 3.5), ("released", 2.5), ("optimal", 2.5)])
def test_a_busy_link_is_left_idle_from_the_moment_that_the_rule_says(rule, idle_from):
    """The CPU takes 6.5 s for all three; a transfer 3 s, and the device 1 s more."""
    scheduler, problem = get_scheduler(rule), Problem(ones(0, 1, 2), (), costs(cpu=(2.0, 0.0, 0.5), shared=0.5))
    assert scheduler.link_idle_from(problem) == idle_from
    busy = [dataclasses.replace(problem, link_busy=idle_from + later) for later in (-0.01, 0.01)]
    assert [len(scheduler.schedule(each).fetch) for each in busy] == [1, 0]
    assert scheduler.link_idle_from(dataclasses.replace(problem, allow_fetch=False)) == 0
    assert scheduler.link_idle_from(dataclasses.replace(problem, allow_cpu=False)) == float("inf")


def test_paper_does_not_wait_for_a_prefetch_that_the_cpu_beats():
    far = Problem({0: 1}, set(), costs(), in_flight={0: 50.0}, allow_fetch=False)
    near = Problem({0: 1}, set(), costs(shared=0.0, cpu=(5.0, 0.0, 0.0)), in_flight={0: 0.5})
    assert get_scheduler("paper").schedule(far).cpu == (0,)
    s = get_scheduler("paper").schedule(near)
    assert (s.awaited, s.device, s.fetch, s.makespan) == ((0,), (0,), (), 1.5)


def test_a_queued_transfer_delays_the_demand_fetches():
    free = get_scheduler("fetch-misses").schedule(Problem({0: 1}, set(), costs(shared=0.0)))
    queued = get_scheduler("fetch-misses").schedule(Problem({0: 1}, set(), costs(shared=0.0), in_flight={5: 10.0}))
    assert (free.makespan, queued.makespan) == (4.0, 14.0)


def test_a_transfer_is_slower_only_while_the_cpu_computes():
    both = costs(shared=0.0, cpu=(4.0, 0.0, 0.0), transfer=2.0, transfer_busy=8.0)
    problem = Problem({0: 1, 1: 1, 2: 1}, set(), both)
    alone, beside = replay(problem, (), (0, 1, 2), (0, 1, 2)), replay(problem, (2,), (0, 1), (0, 1))
    assert (alone.link_seconds, alone.device_seconds) == (6.0, 7.0)
    assert (beside.cpu_seconds, beside.link_seconds) == (4.0, 4.0 + 1.5 * 2.0)  # half a transfer, then one and a half
    assert beside.device_seconds == beside.makespan == 8.0
    queued = replay(dataclasses.replace(problem, link_busy=5.0), (2,), (0, 1), (0, 1))
    assert queued.link_seconds == 9.0


def test_bandwidth_split_shares_the_misses_as_the_bandwidth():
    """Link 37 and CPU 38 of 75 GB/s together: floor(9 * 37 / 75) of nine misses, the heavy ones, cross the link."""
    model = costs(cpu=(1 / 38, 0.0, 0.0), transfer=1 / 57, transfer_busy=1 / 37)
    problem = Problem({e: 1 + (e == 7) for e in range(12)}, {0, 1, 2}, model)
    s = get_scheduler("bandwidth-split").schedule(problem)
    assert s.fetch == (7, 3, 4, 5) and set(s.cpu) == {6, 8, 9, 10, 11} and set(s.device) == {0, 1, 2, *s.fetch}
    for flags, fetched in (({"allow_cpu": False}, 9), ({"allow_fetch": False}, 0)):
        flagged = dataclasses.replace(problem, **flags)
        assert len(get_scheduler("bandwidth-split").schedule(flagged).fetch) == fetched


def test_paper_balances_where_the_single_lane_rules_cannot():
    problem = Problem({e: 1 for e in range(8)}, {0, 1}, costs(cpu=(1.0, 0.0, 0.5), shared=0.0, transfer=1.5))
    paper, cpu, link = (get_scheduler(n).schedule(problem).makespan for n in ("paper", "cpu-misses", "fetch-misses"))
    assert paper < min(cpu, link)


def test_released_gives_the_cpu_the_lowest_load():
    problem = Problem({0: 9, 1: 5, 2: 1}, {0}, costs(cpu=(0.0, 1.0, 0.79), device=(0.5, 0.0), shared=0.0, transfer=1.0))
    s = get_scheduler("released").schedule(problem)
    assert (s.device, s.cpu, s.fetch) == ((0, 1), (2,), (1,))


def test_device_only_takes_ids_in_order_and_fetch_misses_takes_loads():
    problem = Problem({3: 1, 7: 9, 5: 4, 1: 2}, {1, 5}, costs())
    plain = get_scheduler("device-only").schedule(problem)
    ranked = get_scheduler("fetch-misses").schedule(problem)
    assert (plain.fetch, plain.device) == ((3, 7), (1, 5, 3, 7))
    assert (ranked.fetch, ranked.device) == ((7, 3), (5, 1, 7, 3))


@pytest.mark.parametrize(
    ("rule", "flags"),
    [
        ("paper", {"allow_cpu": False, "allow_fetch": False}),
        ("released", {"allow_cpu": False, "allow_fetch": False}),
        ("cpu-misses", {"allow_cpu": False}),
        ("fetch-misses", {"allow_fetch": False}),
        ("device-only", {"allow_fetch": False}),
    ],
)
def test_a_miss_without_a_lane_is_refused_but_residents_are_not(rule, flags):
    with pytest.raises(UserError, match="expert 1 is not in device memory"):
        get_scheduler(rule).schedule(Problem({0: 1, 1: 1}, {0}, costs(), **flags))
    assert get_scheduler(rule).schedule(Problem({0: 1}, {0}, costs(), **flags)).device == (0,)


seconds = st.floats(0.0, 5.0).map(lambda x: round(x, 3))


@st.composite
def problems(draw, max_experts=10):
    loads = draw(st.dictionaries(st.integers(0, 15), st.integers(1, 40) | st.just(1), max_size=max_experts))
    resident = draw(st.sets(st.integers(0, 15)))
    others = sorted(set(range(16)) - resident)
    in_flight = draw(st.dictionaries(st.sampled_from(others), seconds, max_size=3)) if others else {}
    model = costs(
        cpu=draw(st.tuples(seconds, seconds, seconds)),
        device=draw(st.tuples(seconds, st.just(0.0) | seconds)),
        shared=draw(seconds),
        transfer=draw(st.floats(0.05, 9.0)),
        transfer_busy=draw(st.floats(9.0, 20.0)),
    )
    scores = draw(st.none() | st.lists(st.floats(0.0, 1.0), min_size=16, max_size=16))
    busy = draw(st.none() | seconds)
    flags = {name: draw(st.booleans()) for name in ("allow_cpu", "allow_fetch", "allow_steal")}
    return Problem(loads, resident, model, draw(st.integers(1, 99)), scores, in_flight, busy, **flags)


@pytest.mark.parametrize("rule", SCHEDULERS)
@given(problem=problems())
@example(problem=Problem({}, set(), costs()))
def test_every_expert_once_and_the_times_are_true(rule, problem):
    scheduler = get_scheduler(rule)
    try:
        s = scheduler.schedule(problem)
    except UserError:
        stranded = set(problem.loads) - problem.resident - problem.in_flight.keys()
        assert stranded and not (
            problem.allow_cpu and scheduler.uses_cpu and problem.allow_fetch and scheduler.uses_link
        )
        return
    assert sorted(s.cpu + s.device) == sorted(problem.loads)
    assert set(s.fetch) == {e for e in s.device if e not in problem.resident and e not in problem.in_flight}
    assert set(s.awaited) == {e for e in s.device if e not in problem.resident and e in problem.in_flight}
    assert len(set(s.fetch)) == len(s.fetch) and len(set(s.awaited)) == len(s.awaited)
    if not (problem.allow_cpu and scheduler.uses_cpu):
        assert not s.cpu
    if not (problem.allow_fetch and scheduler.uses_link):
        assert not s.fetch
    if not problem.allow_steal:
        assert not problem.resident.intersection(s.cpu)
    cpu, device, link = simulate(problem, s)
    assert (s.cpu_seconds, s.device_seconds, s.link_seconds) == pytest.approx((cpu, device, link))
    assert s.makespan == pytest.approx(max(cpu, device))


@pytest.mark.parametrize("rule", SCHEDULERS)
@given(problem=problems(), shared=st.floats(1e-9, 3.0), device=st.floats(1e-9, 0.5))
def test_residents_that_a_rule_promises_to_keep_are_never_the_cpus(rule, problem, shared, device):
    """Short device times, so that the promise of a rule that steals is often given."""
    problem.loads, problem.tokens = dict.fromkeys(problem.loads, 1), 1
    problem.costs = dataclasses.replace(problem.costs, shared_base=shared, device_expert=device, device_token=0.0)
    problem.allow_cpu = problem.allow_fetch = True
    scheduler = get_scheduler(rule)
    if scheduler.keeps_residents(problem.costs, 1, len(problem.loads)):
        assert not problem.resident.intersection(scheduler.schedule(problem).cpu)


def best_makespan(problem: Problem, transfer: float) -> float:
    """The optimum by brute force where all loads are equal: only how many go where matters."""
    load = next(iter(problem.loads.values()))
    here = len(problem.resident & problem.loads.keys())
    absent = len(problem.loads) - here
    best = float("inf")
    for stolen in range(here + 1):
        for fetched in range(absent + 1):
            on_cpu = stolen + absent - fetched
            cpu = sum(problem.costs.cpu(load, first=i == 0) for i in range(on_cpu))
            device = problem.costs.shared(problem.tokens) + (here - stolen) * problem.costs.device(load)
            for i in range(fetched):
                device = max(device, (i + 1) * transfer) + problem.costs.device(load)
            best = min(best, max(cpu, device))
    return best


def test_at_decode_loads_released_is_optimal_and_paper_close():
    generator, ratios = random.Random(0), []
    for _ in range(400):
        here, absent = generator.randint(0, 8), generator.randint(1, 8)
        cpu, transfer = generator.uniform(0.5, 4), generator.uniform(0.5, 4)
        model = costs(
            cpu=(cpu, 0.0, generator.uniform(0, 0.5) * cpu),
            device=(generator.uniform(0.05, 0.5), 0.0),
            shared=generator.uniform(0, 1),
            transfer=transfer,
        )
        problem = Problem({e: 1 for e in range(here + absent)}, set(range(here)), model)
        best = best_makespan(problem, transfer)
        assert get_scheduler("released").schedule(problem).makespan == pytest.approx(best)
        ratios.append(get_scheduler("paper").schedule(problem).makespan / best)
    assert min(ratios) >= 1 - 1e-9 and statistics.mean(ratios) < 1.01 and max(ratios) < 2
