"""The optimal scheduler against brute force, against mixed-integer programming, and its stated gap."""

import itertools
import random

import numpy as np
import pytest
from schedule_cases import costs, least_makespan, random_problem, simulate

from hybrimoe_jax.decide.schedule import SCHEDULERS, Problem, get_scheduler
from hybrimoe_jax.decide.schedule.instance import Choice, Instance
from hybrimoe_jax.decide.schedule.optimal import OptimalScheduler
from hybrimoe_jax.decide.schedule.search import _choice, _items, _Relaxation
from hybrimoe_jax.errors import UserError

CLOSE = 1e-9


def check(problem: Problem, schedule, least: float) -> None:
    assert schedule.makespan == pytest.approx(max(simulate(problem, schedule)[:2]), rel=CLOSE)
    assert schedule.makespan == pytest.approx(least, rel=CLOSE)
    assert schedule.bound == pytest.approx(least, rel=CLOSE)


@pytest.mark.parametrize("constant", [True, False], ids=["device constant", "device by load"])
def test_optimal_is_what_brute_force_finds(constant):
    generator, scheduler = random.Random(constant), get_scheduler("optimal")
    for _ in range(800):
        problem = random_problem(generator, generator.choice((1, 2, 3, 4, 4, 5, 5, 6, 6, 7, 8)), constant)
        check(problem, scheduler.schedule(problem), least_makespan(problem))


def test_optimal_is_what_brute_force_finds_where_weights_are_tried():
    """They are for more than eight experts."""
    generator, scheduler = random.Random(2), get_scheduler("optimal")
    for number in range(30):
        problem = random_problem(generator, 9 + number % 2, False)
        check(problem, scheduler.schedule(problem), least_makespan(problem))


def subsets(count: int):
    return [some for size in range(count + 1) for some in itertools.combinations(range(count), size)]


def test_the_bound_is_that_of_the_best_weight():
    """Of each weight: the least weighted sum of both lanes' work over all choices with so many demand fetches."""
    generator, weights = random.Random(4), np.linspace(0, 1, 257)[:, None]
    for _ in range(40):
        i = Instance.of(random_problem(generator, 5, False))
        items = _items(i)
        relaxation = _Relaxation(i, items)
        lanes, (fewest, most) = list(relaxation.bounds), i.fetches
        here = [some for some in subsets(len(i.here)) if i.steals or len(some) == len(i.here)]
        coming = [some for some in subsets(len(i.in_flight)) if not i.awaits or len(some) == len(i.in_flight)]
        for q in range(fewest, most + 1):
            choices = [Choice(*c) for c in itertools.product(here, coming, subsets(len(i.absent))) if len(c[2]) == q]
            cpu = np.full(len(choices), i.first if q < len(i.absent) else 0.0)  # others than absent ones may add it
            device, others = np.full(len(choices), i.shared), np.full(len(choices), i.shared)
            for n, chosen in enumerate(choices):
                for group in Choice._fields:
                    for k, seconds in enumerate(getattr(i, f"cpu_{group}")):
                        on_device = getattr(i, f"device_{group}")[k]
                        cpu[n] += 0 if k in getattr(chosen, group) else seconds
                        device[n] += on_device if k in getattr(chosen, group) else 0
                        others[n] += on_device if k in getattr(chosen, group) and group != "absent" else 0
            landed = i.landing(q, min(cpu)) + min(i.device_absent) if q else 0.0
            assert lanes[q] == pytest.approx(max(min(cpu), min(others), landed))
            for _ in range(12):
                w = (relaxation.low[q] + relaxation.high[q]) / 2
                chosen = choices.index(Choice(*map(tuple, _choice(items, relaxation.halve(q)))))
                weighed = w * cpu + (1 - w) * device
                assert weighed[chosen] == pytest.approx(min(weighed))
            best = max((weights * cpu + (1 - weights) * device).min(axis=1))
            assert 0.999 <= relaxation.bounds[q] / max(lanes[q], best) <= 1.01
            assert relaxation.bounds[q] <= min(map(i.makespan, choices)) * (1 + CLOSE)


def test_no_order_beats_the_one_that_brute_force_takes():
    """All orders of all lanes, timed by the lane simulator: what `least_makespan` takes for granted."""
    generator = random.Random(5)
    for _ in range(60):
        problem = random_problem(generator, generator.randint(1, 4), False)
        best = float("inf")
        for lanes in itertools.product(("cpu", "device"), repeat=len(problem.loads)):
            cpu = [e for e, lane in enumerate(lanes) if lane == "cpu"]
            device = [e for e, lane in enumerate(lanes) if lane == "device"]
            fetch = [e for e in device if e not in problem.resident and e not in problem.in_flight]
            if (cpu and not problem.allow_cpu) or (fetch and not problem.allow_fetch):
                continue
            if not problem.allow_steal and problem.resident.intersection(cpu):
                continue
            for order, link in itertools.product(itertools.permutations(device), itertools.permutations(fetch)):
                lanes_of = _Lanes(cpu, order, link)
                best = min(best, max(simulate(problem, lanes_of)[:2]))
        assert least_makespan(problem) == pytest.approx(best, rel=CLOSE)


class _Lanes:
    def __init__(self, cpu, device, fetch):
        self.cpu, self.device, self.fetch = cpu, device, fetch


def test_no_rule_is_ever_better():
    generator, scheduler = random.Random(7), get_scheduler("optimal")
    for _ in range(150):
        constant = generator.random() < 0.5
        problem = random_problem(generator, generator.randint(9, 40), constant)
        best = scheduler.schedule(problem)
        assert best.bound == best.makespan if constant else best.bound <= best.makespan
        for name in SCHEDULERS:
            try:
                other = get_scheduler(name).schedule(problem).makespan
            except UserError:
                continue
            assert other >= best.bound * (1 - CLOSE)
            if best.gap < CLOSE:
                assert other >= best.makespan * (1 - CLOSE)


def test_an_exhausted_budget_is_admitted():
    generator = random.Random(3)
    stated, proven = [], 0
    for _ in range(40):
        problem = random_problem(generator, 14, False, flags=False)
        hasty, thorough = OptimalScheduler(nodes=3).schedule(problem), OptimalScheduler(nodes=10**6).schedule(problem)
        assert thorough.gap < CLOSE
        assert hasty.bound * (1 - CLOSE) <= thorough.makespan <= hasty.makespan * (1 + CLOSE)
        forecast = OptimalScheduler().forecaster().schedule(problem)
        one_load = len(set(problem.loads.values())) == 1  # which needs no search
        assert forecast.bound == (forecast.makespan if one_load else 0), "no search and no bound"
        assert forecast.makespan >= thorough.makespan * (1 - CLOSE)
        stated.append(hasty.gap)
        proven += hasty.gap < CLOSE
    assert 0 < proven < 40 and max(stated) < 0.5


@pytest.mark.parametrize("experts, proven, gap", [(9, 40, 0.0), (16, 34, 0.005), (40, 28, 0.003)])
def test_the_usual_budget_proves_most_and_leaves_little_open(experts, proven, gap):
    """Of 40 problems, and what is left on average."""
    generator, scheduler = random.Random(13), get_scheduler("optimal")
    gaps = [scheduler.schedule(random_problem(generator, experts, False, flags=False)).gap for _ in range(40)]
    assert sum(each < CLOSE for each in gaps) >= proven and np.mean(gaps) < gap + CLOSE


@pytest.mark.parametrize("seed", [207, 300, 322])
def test_what_a_budget_leaves_open_is_bounded_by_the_least_of_it(seed):
    """Here that is not the bound of the next number of demand fetches, but what is left of the number before."""
    problem = random_problem(random.Random(seed), 12, False, flags=False)
    least = OptimalScheduler(nodes=10**6).schedule(problem)
    assert least.gap < CLOSE and OptimalScheduler(nodes=4).schedule(problem).bound <= least.makespan * (1 + CLOSE)


def test_equal_loads_are_remembered_without_mixing_machines_or_flags():
    scheduler = OptimalScheduler()
    cheap, dear = costs(cpu=(0.0, 1.0, 0.0), shared=0.0), costs(cpu=(8.0, 1.0, 0.0), shared=0.0)
    for model, flags in itertools.product(
        (cheap, dear, cheap), ({}, {"allow_fetch": False}, {"allow_steal": False}, {"link_busy": 50.0})
    ):
        for here, other in itertools.product((0, 3, 6), (1, 5, 2)):  # loads that differ are not remembered
            problem = Problem({e: other if e > 4 else 1 for e in range(7)}, set(range(here)), model, **flags)
            check(problem, scheduler.schedule(problem), least_makespan(problem))


def test_the_fewest_demand_fetches_among_equals():
    """The heavy expert lands at 10 s and takes the device 1 s, wherever the light one runs."""
    model = costs(cpu=(0.0, 1.0, 0.0), device=(1.0, 0.0), shared=1.0, transfer=2.0)
    found = get_scheduler("optimal").schedule(Problem({0: 100, 1: 1}, (), model, 1, None, {0: 10.0}, 0.0))
    assert (found.makespan, found.cpu, found.fetch) == (11.0, (1,), ())


def test_many_transfers_in_flight_are_still_solved():
    generator = random.Random(11)
    for _ in range(40):
        problem = random_problem(generator, 8, True, flags=False)
        resident = set(list(problem.resident)[:2])
        in_flight = {e: generator.uniform(0, 8) for e in range(8) if e not in resident}
        problem = Problem(problem.loads, resident, problem.costs, 1, None, in_flight, 0.0)
        s = get_scheduler("optimal").schedule(problem)
        least = least_makespan(problem)
        assert s.bound <= least * (1 + CLOSE) and s.makespan >= least * (1 - CLOSE)
        check(problem, OptimalScheduler(nodes=10**6).schedule(problem), least)


def test_the_sets_of_four_transfers_in_flight_are_tried():
    generator = random.Random(12)
    for _ in range(60):
        problem = random_problem(generator, 6, True, flags=False)
        in_flight = {e: generator.uniform(0, 8) for e in generator.sample(range(6), 4)}
        problem = Problem(problem.loads, set(range(6)) - {*in_flight}, problem.costs, 1, None, in_flight, 0.0)
        check(problem, OptimalScheduler(nodes=0).schedule(problem), least_makespan(problem))


def milp(problem: Problem) -> float:
    """The optimum as a mixed-integer programme: x of each expert on the device, y of each absent expert and its place
    on the link.

    The landing of the k-th transfer is link + min(k beside, k alone + (1 - alone / beside) max(0, CPU end - link)): one
    binary a place.
    """
    from scipy.optimize import Bounds, LinearConstraint
    from scipy.optimize import milp as solve

    model, loads = problem.costs, problem.loads
    experts = list(loads)
    absent = [e for e in experts if e not in problem.resident and e not in problem.in_flight]
    coming = {e: ready for e, ready in problem.in_flight.items() if e in loads}
    beside, alone = model.transfer(True), model.transfer(False)
    ratio = 1 - alone / beside
    link = problem.link_start
    cpu = {e: model.cpu(loads[e]) for e in experts}
    device = {e: model.device(loads[e]) for e in experts}
    shared = model.shared(problem.tokens)
    big = sum(cpu.values()) + model.cpu_first + link + shared + sum(device.values()) + len(experts) * beside + 10
    big = big + max([0.0, *problem.in_flight.values()])
    places = range(1, len(absent) + 1)
    names = ["M", "T", "any", *[("x", e) for e in experts], *[("y", e, k) for e in absent for k in places]]
    names += [("z", k) for k in places]
    column = {name: i for i, name in enumerate(names)}
    rows, lower = [], []

    def at_least(terms: dict, bound: float) -> None:
        row = np.zeros(len(names))
        for name, factor in terms.items():
            row[column[name]] += factor
        rows.append(row)
        lower.append(bound)

    # T is the CPU's end: the sum of what is not on the device, and more for the first.
    for sign in (1, -1):
        terms = {"T": sign, "any": -sign * model.cpu_first} | {("x", e): sign * cpu[e] for e in experts}
        at_least(terms, sign * sum(cpu.values()))
    for e in experts:
        at_least({"any": 1, ("x", e): 1}, 1)
    at_least({"M": 1, "T": -1}, 0)
    at_least({"M": 1} | {("x", e): -device[e] for e in experts}, shared)
    for e in absent:
        for sign in (1, -1):
            at_least({("x", e): -sign} | {("y", e, k): sign for k in places}, 0)
    for k in places:
        at_least({("y", e, k): -1 for e in absent}, -1)
        if k > 1:
            at_least({("y", e, k - 1): 1 for e in absent} | {("y", e, k): -1 for e in absent}, 0)
        after = {("y", e, j): -device[e] for e in absent for j in places if j >= k}
        # With transfers in flight both speeds are the same.
        after |= {("x", e): -device[e] for e, ready in coming.items() if ready >= link + k * alone}
        used = {("y", e, k): after.get(("y", e, k), 0.0) - big for e in absent}
        at_least({"M": 1, ("z", k): big} | after | used, link + k * beside - big)
        at_least({"M": 1, ("z", k): -big} | after | used, link + k * alone - 2 * big)
        at_least({"M": 1, "T": -ratio, ("z", k): -big} | after | used, link + k * alone - ratio * link - 2 * big)
    for e, ready in coming.items():
        after = {("y", a, k): -device[a] for a in absent for k in places if link + k * alone >= ready}
        after |= {("x", f): -device[f] for f, later in coming.items() if (later, f) > (ready, e)}
        at_least({"M": 1, ("x", e): -big - device[e]} | after, ready - big)
    integral = np.array([name not in ("M", "T") for name in names])
    result = solve(
        np.array([name == "M" for name in names], float),
        constraints=LinearConstraint(np.array(rows), np.array(lower), np.inf),
        integrality=integral,
        bounds=Bounds(np.zeros(len(names)), np.where(integral, 1.0, np.inf)),
        options={"mip_rel_gap": 1e-9},
    )
    assert result.success, result.message
    return result.fun


def larger(generator: random.Random, experts: int) -> Problem:
    problem = random_problem(generator, experts, generator.random() < 0.5, flags=False)
    if problem.in_flight:
        speed = problem.costs.bandwidth
        model = costs(
            cpu=(problem.costs.cpu_expert, problem.costs.cpu_token, problem.costs.cpu_first),
            device=(problem.costs.device_expert, problem.costs.device_token),
            shared=problem.costs.shared_base,
            transfer=1 / speed,
        )
        problem = Problem(problem.loads, problem.resident, model, 1, None, problem.in_flight, problem.link_busy)
    return problem


def compare_with_milp(seeds, sizes) -> None:
    for seed in seeds:
        generator = random.Random(seed)
        problem = larger(generator, generator.randint(*sizes))
        least = milp(problem)
        quick, thorough = get_scheduler("optimal").schedule(problem), OptimalScheduler(nodes=10**6).schedule(problem)
        assert quick.bound <= least * (1 + 1e-6) and quick.makespan >= least * (1 - 1e-6)
        assert thorough.gap < CLOSE and thorough.makespan == pytest.approx(least, rel=1e-6)


def test_the_programme_agrees_with_brute_force():
    for seed in range(6):
        generator = random.Random(seed)
        problem = larger(generator, generator.randint(3, 6))
        assert milp(problem) == pytest.approx(least_makespan(problem), rel=1e-6)


@pytest.mark.slow
def test_larger_problems_against_mixed_integer_programming():
    compare_with_milp(range(50), (10, 16))
