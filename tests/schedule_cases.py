"""Scheduling problems for tests, and two oracles that share nothing with the code under test: a lane simulator and
brute force.
"""

from __future__ import annotations

import itertools
import random
from typing import cast

from hybrimoe_jax.decide.schedule import Problem
from hybrimoe_jax.machine.costs import CostModel


def costs(*, cpu=(0.0, 1.0, 0.0), device=(1.0, 0.0), shared=2.0, transfer=3.0, transfer_busy=None) -> CostModel:
    """cpu is (per expert, per token, first), device (per expert, per token); all in seconds."""
    return CostModel(
        cpu_expert=cpu[0],
        cpu_token=cpu[1],
        cpu_first=cpu[2],
        device_expert=device[0],
        device_token=device[1],
        shared_base=shared,
        shared_token=0.0,
        layer_base=0.0,
        layer_token=0.0,
        transfer_latency=0.0,
        bandwidth=1.0 / transfer,
        bandwidth_cpu_busy=1.0 / (transfer_busy or transfer),
        expert_bytes=1,
    )


def simulate(problem: Problem, schedule) -> tuple[float, float, float]:
    """(cpu, device, link) finish times by stepping through events: a lane starts its next job at the first event where
    it is idle and the job's expert is there. The link's progress is an integral over its two speeds. Shares nothing
    with the code under test.
    """
    model = cast(CostModel, problem.costs)
    jobs = {
        "cpu": [
            (
                model.cpu_expert + model.cpu_token * problem.loads[e] + (model.cpu_first if i == 0 else 0),
                None,
                e,
            )
            for i, e in enumerate(schedule.cpu)
        ],
        "device": [(model.shared_base + model.shared_token * problem.tokens, None, None)]
        + [(model.device_expert + model.device_token * problem.loads[e], e, e) for e in schedule.device],
    }
    there = {e: 0.0 for e in problem.resident} | dict(problem.in_flight)
    link_start = problem.link_busy if problem.link_busy is not None else max([0.0, *problem.in_flight.values()])
    cpu_end = sum(seconds for seconds, _, _ in jobs["cpu"])
    beside, alone = model.transfer(True), model.transfer(False)
    moved_beside = max(0.0, cpu_end - link_start) / beside  # transfers, by the time the CPU is done
    for i, expert in enumerate(schedule.fetch, 1):
        slow, fast = min(i, moved_beside), i - min(i, moved_beside)
        there[expert] = link_start + slow * beside + fast * alone
    link_end = max([link_start, *(there[e] for e in schedule.fetch)])
    idle_since = {"cpu": 0.0, "device": 0.0}
    while any(jobs.values()):
        startable = []
        for lane, queue in jobs.items():
            if queue and (queue[0][1] is None or queue[0][1] in there):
                startable.append((max(idle_since[lane], there.get(queue[0][1], 0.0)), lane))
        start, lane = min(startable)
        length, _, expert = jobs[lane].pop(0)
        idle_since[lane] = start + length
    return idle_since["cpu"], idle_since["device"], link_end


def least_makespan(problem: Problem) -> float:
    """The optimum by brute force: every assignment of experts to CPU and device, timed in the order that is proven best
    elsewhere (`test_no_order_beats_the_one_that_brute_force_takes`).
    """
    loads, model = problem.loads, cast(CostModel, problem.costs)
    cpu_time = {e: model.cpu_expert + model.cpu_token * loads[e] for e in loads}
    device_time = {e: model.device_expert + model.device_token * loads[e] for e in loads}
    beside, alone = model.transfer(True), model.transfer(False)
    in_flight = problem.in_flight
    link_start = problem.link_busy if problem.link_busy is not None else max([0.0, *in_flight.values()])
    shared = model.shared_base + model.shared_token * problem.tokens
    best = float("inf")
    lanes = []
    for e in sorted(loads, key=lambda e: -device_time[e]):
        absent = e not in problem.resident and e not in in_flight
        may_cpu = problem.allow_cpu and (problem.allow_steal or e not in problem.resident)
        may_device = problem.allow_fetch or not absent
        lanes.append([(e, lane) for lane, may in (("cpu", may_cpu), ("device", may_device)) if may])
    for assignment in itertools.product(*lanes):
        cpu = sum([cpu_time[e] for e, lane in assignment if lane == "cpu"])
        if any([lane == "cpu" for _, lane in assignment]):
            cpu += model.cpu_first
        moved = max(0.0, cpu - link_start) / beside
        device, fetched, arrivals = shared, 0, []
        for e, lane in assignment:
            if lane == "device":
                if e in problem.resident:
                    device += device_time[e]
                elif e in in_flight:
                    arrivals.append((in_flight[e], device_time[e]))
                else:
                    fetched += 1
                    slow = min(fetched, moved)
                    arrivals.append((link_start + slow * beside + (fetched - slow) * alone, device_time[e]))
        for ready, seconds in sorted(arrivals):
            device = max(device, ready) + seconds
        best = min(best, max(cpu, device))
    return best


def random_problem(generator: random.Random, experts: int, constant: bool, flags: bool = True) -> Problem:
    """A layer of any regime: equal, few and heavy-tailed loads, fast and slow links, transfers in flight, a busy link,
    limits.

    `constant`: device time that does not depend on the load. `flags`: with limits on who may do what, now and then.
    """
    uniform, chance = generator.uniform, generator.random
    kind = generator.choice(("equal", "batch", "tail"))
    draw = {
        "equal": lambda: 1,
        "batch": lambda: generator.choice((1, 1, 1, 2, 2, 3)),
        "tail": lambda: int(min(400.0, 1 + 3 * generator.paretovariate(1.0))),
    }[kind]
    loads = {e: draw() for e in range(experts)}
    resident = set(generator.sample(range(experts), generator.randint(0, experts)))
    others = [e for e in range(experts) if e not in resident]
    in_flight = {}
    if chance() < 0.5:
        in_flight = {e: uniform(0, 6) for e in generator.sample(others, generator.randint(0, min(len(others), 3)))}
    alone = uniform(0.1, 6)
    model = costs(
        cpu=(uniform(0, 3), generator.choice((0.0, uniform(0, 0.5))), generator.choice((0.0, uniform(0, 2)))),
        device=(uniform(0.05, 2), 0.0 if constant else uniform(0, 0.2)),
        shared=uniform(0, 2),
        transfer=alone,
        transfer_busy=alone * generator.choice((1.0, uniform(1, 3))),
    )
    limits = {}
    if flags:
        limits = {name: chance() < 0.9 for name in ("allow_cpu", "allow_fetch")} | {"allow_steal": chance() < 0.8}
        if not limits["allow_fetch"]:
            limits["allow_cpu"] = True
    return Problem(loads, resident, model, 1, None, in_flight, generator.choice((None, 0.0, uniform(0, 5))), **limits)
