"""`bench schedule`: how far each scheduling rule is from the least makespan, and what a decision costs.

Machines are drawn at random over the ranges in `MACHINES`, in units of the device's time for one expert, so that no
rule is tuned to one; layers as 64 experts are used in decoding and in prefill. The gap is a makespan over the optimum
(over its lower bound where the search for the optimum ended unproven), minus 1. Decision times are CPU time of this
process: medians of calls on different problems.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from hybrimoe_jax.decide.schedule import RULES, SCHEDULERS, Problem, get_scheduler
from hybrimoe_jax.machine.costs import CostModel

EXPERTS, TOP_K = 64, 8
MACHINES = {
    "cpu_expert": (1.0, 30.0),
    "cpu_token_share": (0.01, 0.5),
    "cpu_first_share": (0.0, 0.5),
    "transfer": (1.0, 30.0),
    "busy_factor": (1.0, 2.0),
    "shared": (0.0, 2.0),
    "device_token": (0.0, 0.02),
}
"""What a machine is drawn from; `_share` are parts of `cpu_expert`, `busy_factor` is what a
transfer takes longer beside a busy CPU."""
TIMED = 200
_PROVEN = 1e-9
Progress = Callable[[Iterable, int, str], Iterable]


@dataclasses.dataclass(frozen=True)
class Workload:
    """Layers of one kind.

    Tokens in a step, whether device time depends on the load, at most so many experts in flight, and whether a transfer
    takes as long beside a computing CPU as alone.
    """

    name: str
    tokens: int
    by_load: bool = False
    in_flight: int = 0
    one_speed: bool = False


WORKLOADS = (
    Workload("decode, one transfer speed", 1, one_speed=True),
    Workload("decode", 1),
    Workload("decode, prefetches in flight", 1, in_flight=2),
    Workload("decode, batch of 16", 16),
    Workload("prefill of 512, one transfer speed", 512, one_speed=True),
    Workload("prefill of 512", 512),
    Workload("prefill of 512, device by load", 512, by_load=True),
)


def draw_machine(generator: random.Random, by_load: bool, one_speed: bool) -> CostModel:
    """A random machine whose device runs an expert in one unit of time; speeds are drawn log-uniformly."""

    def between(name: str) -> float:
        low, high = MACHINES[name]
        return math.exp(generator.uniform(math.log(low), math.log(high))) if low > 0 else generator.uniform(low, high)

    cpu, transfer, factor = between("cpu_expert"), between("transfer"), between("busy_factor")
    return CostModel(
        cpu_expert=cpu,
        cpu_token=cpu * between("cpu_token_share"),
        cpu_first=cpu * between("cpu_first_share"),
        device_expert=1.0,
        device_token=between("device_token") if by_load else 0.0,
        shared_base=between("shared"),
        shared_token=0.0,
        layer_base=1.0,
        layer_token=0.0,
        transfer_latency=0.0,
        bandwidth=1.0 / transfer,
        bandwidth_cpu_busy=1.0 / (transfer if one_speed else transfer * factor),
        expert_bytes=1,
        source="drawn at random",
    )


def draw_loads(generator: random.Random, tokens: int) -> dict[int, int]:
    """Tokens per expert: the top k of each token.

    They are drawn by a popularity that falls as 1 / rank (heavy-tailed, as measured loads are).
    """
    popularity = [1.0 / rank for rank in range(1, EXPERTS + 1)]
    generator.shuffle(popularity)
    # The k largest of log(u) / weight are a sample without replacement by weight (Efraimidis and Spirakis, 2006).
    uniform = np.random.default_rng(generator.getrandbits(64)).random((tokens, EXPERTS))
    keys = np.log1p(-uniform) / np.array(popularity)
    chosen = np.argpartition(keys, EXPERTS - TOP_K, axis=1)[:, EXPERTS - TOP_K :]
    counts = np.bincount(chosen.ravel(), minlength=EXPERTS).tolist()
    return {expert: load for expert, load in enumerate(counts) if load}


def draw_problem(generator: random.Random, workload: Workload, loads: dict[int, int] | None = None) -> Problem:
    """A layer on a random machine with a quarter, half or three quarters of all experts resident."""
    loads = draw_loads(generator, workload.tokens) if loads is None else loads
    resident = set(generator.sample(range(EXPERTS), generator.choice((16, 32, 48))))
    machine = draw_machine(generator, workload.by_load, workload.one_speed)
    misses = [expert for expert in loads if expert not in resident]
    moving = generator.sample(misses, min(len(misses), generator.randint(0, workload.in_flight)))
    landing, in_flight = 0.0, {}
    for expert in moving:
        landing += machine.transfer() * (generator.random() if not in_flight else 1.0)
        in_flight[expert] = landing
    scores = [generator.random() for _ in range(EXPERTS)]
    return Problem(loads, resident, machine, workload.tokens, scores, in_flight)


def gaps(
    workload: Workload, instances: int, seed: int, progress: Progress, names: Sequence[Any] = tuple(SCHEDULERS)
) -> dict[str, dict[str, float]]:
    """{rule: {mean, p99, worst, optimal}} of the gap on random problems; `optimal` is the share of them with none.

    `names`: of the rules, "optimal" among them.
    """
    generator = random.Random(f"{seed} {workload.name}")
    rules = {str(name): get_scheduler(name) for name in names}
    found: dict[str, list[float]] = {name: [] for name in rules}
    for _ in progress(range(instances), instances, workload.name):
        problem = draw_problem(generator, workload)
        schedules = {name: rule.schedule(problem) for name, rule in rules.items()}
        least = schedules["optimal"].bound
        for name, schedule in schedules.items():
            found[name].append(max(0.0, schedule.makespan / least - 1.0))
    return {name: _summary(values) for name, values in found.items()}


def _summary(values: list[float]) -> dict[str, float]:
    values = sorted(values)
    return {
        "mean": statistics.fmean(values),
        "p99": values[min(len(values) - 1, math.ceil(0.99 * len(values)) - 1)],
        "worst": values[-1],
        "optimal": sum([value < _PROVEN for value in values]) / len(values),
    }


def decision_times(
    active: int,
    loads: str,
    problems_timed: int,
    seed: int,
    progress: Progress,
    names: Sequence[Any] = tuple(SCHEDULERS),
) -> dict[str, float]:
    """{rule: microseconds of CPU time, median over problems}, for `active` experts of equal loads, or prefill's.

    `optimal` answers equal loads from memory: "optimal, first time" has nothing to remember yet.
    """
    generator = random.Random(f"{seed} {active} {loads}")
    workload = Workload(loads, 1 if loads == "equal" else 512, by_load=loads == "prefill, device by load")
    problems = []
    while len(problems) < problems_timed:
        of_all = {e: 1 for e in range(EXPERTS)} if loads == "equal" else draw_loads(generator, workload.tokens)
        chosen = generator.sample(sorted(of_all), min(active, len(of_all)))
        problems.append(draw_problem(generator, workload, {expert: of_all[expert] for expert in chosen}))
    times = {}
    labels = [*names, *(["optimal, first time"] if loads == "equal" else [])]
    for label in progress(labels, len(labels), f"timing {active} experts, {loads}"):
        name = "optimal" if label == "optimal, first time" else label
        rule, taken = get_scheduler(name), []
        for problem in problems:
            if label != "optimal, first time":
                rule.schedule(problem)
            taken.append(min(_seconds(rule, problem) for _ in range(3 if label == name else 1)))
        times[str(label)] = statistics.median(taken) * 1e6
    return times


def _seconds(rule, problem: Problem) -> float:
    start = time.process_time()
    rule.schedule(problem)
    return time.process_time() - start


TIMINGS = tuple(itertools.product((TOP_K, EXPERTS), ("equal", "prefill, device constant", "prefill, device by load")))


def run(instances: int, seed: int, progress: Progress, own: Sequence[Any] = ()) -> dict:
    """Measures all built-in rules and `own` ones (see `decide.registry`), prints two tables and returns the record."""
    names = [*SCHEDULERS, *map(RULES.resolve, own)]
    table = {workload.name: gaps(workload, instances, seed, progress, names) for workload in WORKLOADS}
    times = {
        f"{active} experts, {loads}": decision_times(active, loads, min(instances, TIMED), seed, progress, names)
        for active, loads in TIMINGS
    }
    print(
        f"gap to the least makespan in % of it, {instances} problems each; none: how often the makespan is "
        "proven to be the least"
    )
    width = max(18, *map(len, names))
    bounded = {workload.name for workload in WORKLOADS if workload.by_load}
    for name, rules in table.items():
        print(
            f"\n{name}"
            + (": gap to a lower bound, since the least makespan is not always known" if name in bounded else "")
        )
        print(f"  {'':{width}} {'mean':>9} {'p99':>9} {'worst':>9}   {'none':>6}")
        for rule, gap in rules.items():
            mean, p99, worst = (100 * gap[key] for key in ("mean", "p99", "worst"))
            print(f"  {rule:{width}} {mean:9.2f} {p99:9.1f} {worst:9.1f}   {100 * gap['optimal']:5.1f}%")
    print(
        "\nmicroseconds of CPU time a decision, median; equal: all loads 1; const: a prompt's loads, device "
        "time constant; by load: device time grows with the load"
    )
    heads = [
        name.replace(" experts, ", " ").replace("prefill, device ", "").replace("constant", "const") for name in times
    ]
    print(f"  {'active experts, loads':{width + 3}}", *(f"{head:>10}" for head in heads))
    rules = list(dict.fromkeys(rule for row in times.values() for rule in row))
    for rule in rules:
        cells = (f"{row[rule]:10.1f}" if rule in row else f"{'-':>10}" for row in times.values())
        print(f"  {rule:{width + 3}}", *cells)
    return {"instances": instances, "seed": seed, "gap": table, "cpu_us": times}
