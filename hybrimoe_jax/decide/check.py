"""Checking a rule before it runs: random layers on random machines, watched as every run is (see `watch`).

    import hybrimoe_jax as hj; hj.check(MyRule)

says what a run would say, and tries what the class says of itself: answers that depend on counts only, values that
depend on the routing only.
"""

# NumPy 2.5 types some functions by what its stubs leave unknown.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import collections
import dataclasses
import inspect
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np

from hybrimoe_jax import arguments
from hybrimoe_jax.decide.cache import CACHES, build_policies
from hybrimoe_jax.decide.cache.watched import watch_policies
from hybrimoe_jax.decide.planner import Planner
from hybrimoe_jax.decide.prefetch.prediction import RouterOutlook, loads_of
from hybrimoe_jax.decide.prefetch.predictors import FORESEEING
from hybrimoe_jax.decide.prefetch.watched import watch_predictor
from hybrimoe_jax.decide.registry import Kind, Rule
from hybrimoe_jax.decide.schedule import RULES, Problem, Scheduler
from hybrimoe_jax.decide.schedule.unit_load_cache import UnitLoadCache, apply
from hybrimoe_jax.decide.schedule.watched import watch_scheduler
from hybrimoe_jax.decide.systems import get_system
from hybrimoe_jax.errors import RuleError, UserError, shown

KINDS: dict[str, Kind] = {"cache": CACHES, "scheduler": RULES, "predictor": FORESEEING}
LAYERS, STEPS, PROBLEMS_A_RUN, MOST_RUNS = 4, 8, 20, 10**6
EXPERTS, TOKENS = (4, 8, 24, 60), (1, 1, 1, 2, 30)
"""Of one random run; of a layer and of a step, by chance."""
RANGES = {"cpu_expert": (1, 30), "cpu_token": (0.01, 1), "moe": (0.1, 2), "link": (1, 10), "busy": (1, 2)}
"""Of a machine made up, in seconds of an expert on its device; `busy` is a factor."""


@dataclasses.dataclass(frozen=True)
class CheckReport:
    """Nothing was found wrong with a rule.

    Attributes: kind: "cache", "scheduler" or "predictor"; rule: its name; calls: of each method.
    """

    kind: str
    rule: str
    calls: Mapping[str, int]

    def __str__(self) -> str:
        said = ", ".join(f"{method} {count}" for method, count in sorted(self.calls.items()))
        return f"{self.kind} {self.rule}: nothing wrong in {sum(self.calls.values())} calls ({said})"

    __repr__ = __str__


@dataclasses.dataclass(frozen=True)
class _Machine:
    """A machine made up: seconds of an expert on each lane, and so on, see `costs.Costs`."""

    cpu_expert: float
    cpu_token: float
    moe: float
    link: float
    busy: float
    cpu_first: float
    device_expert: float = 1.0
    shares_cores: bool = False
    fetch_host: float = 0.0
    look: float = 0.0
    expert_bytes: int = 1

    @classmethod
    def draw(cls, draws: random.Random) -> _Machine:
        figures: dict[str, Any] = {
            name: math.exp(draws.uniform(math.log(low), math.log(high))) for name, (low, high) in RANGES.items()
        }
        return cls(**figures, cpu_first=draws.choice((0.0, 0.5)))

    def cpu(self, load: int, first: bool = False) -> float:
        return self.cpu_expert + self.cpu_token * load + (self.cpu_first if first else 0.0)

    def device(self, load: int) -> float:
        return self.device_expert

    def shared(self, tokens: int) -> float:
        return self.moe

    def transfer(self, cpu_busy: bool = False) -> float:
        return self.link * (self.busy if cpu_busy else 1.0)

    def layer(self, tokens: int) -> float:
        return 2 * self.moe


def check(rule: Any, runs: int = 40, seed: int = 0) -> CheckReport:
    """Runs a rule of any kind on random layers of random models.

    Args: rule: a name, a class or a class with parameters, see `registry`; runs: random models.

    Returns what was asked of it; `RuleError` for the first thing that it did wrong, UserError for what is no rule.
    """
    runs, seed = arguments.whole("runs", runs, 1, MOST_RUNS), arguments.whole("seed", seed)
    part, known = _kind_of(rule)
    draws, calls = random.Random(seed), collections.Counter[str]()
    for _ in range(runs):
        for watch in _run(part, known, draws):
            calls.update(watch)
    return CheckReport(part, str(known), dict(calls))


def _kind_of(rule: Any) -> tuple[str, Rule]:
    """(the part of a system that it is, the rule)."""
    if isinstance(rule, str) and not isinstance(rule, Rule):
        name, _, rest = rule.partition(":")
        for part, kind in KINDS.items():
            if name in kind.known:
                return part, kind.resolve(rule)
        if not rest:
            known = ", ".join(name for kind in KINDS.values() for name in kind.known)
            raise UserError(
                f"rule {shown(rule)} is unknown (known: {known}; or a class of yours as package.module:Class)"
            )
        made: Any = CACHES.imported(rule)
    else:
        made = rule.made_by if isinstance(rule, Rule) else cast(Any, rule if inspect.isclass(rule) else type(rule))
    for part, kind in KINDS.items():
        if issubclass(made, kind.base):
            return part, kind.resolve(rule)
    bases = ", ".join(kind.base.__name__ for kind in KINDS.values())
    raise UserError(f"{made.__name__} is derived from none of {bases} (hybrimoe_jax.decide)")


def _run(part: str, rule: Rule, draws: random.Random) -> Iterator[Mapping[str, int]]:
    """One random model: the calls of every object that was made for it."""
    experts = draws.choice(EXPERTS)
    top_k, slots = draws.randint(1, max(1, experts // 4)), [draws.randint(0, experts) for _ in range(LAYERS)]
    base = draws.choice(("hybrimoe", "on-demand", "adapmoe"))
    system = get_system(base).override(**cast(dict[str, Any], {part: rule}))
    machine, policies = _Machine.draw(draws), None
    if part == "cache":
        known = [[draws.random() for _ in range(experts)] for _ in slots] if draws.random() < 0.5 else None
        policies = watch_policies(build_policies(rule, experts, slots, top_k, frequencies=known), every=True)
        if all(policy.comparable for policy in policies) and draws.random() < 0.3:
            system = system.override(scope="pooled")
    planner = Planner(system, LAYERS, experts, top_k, slots, machine, policies=policies, cold=draws.random() < 0.5)
    if part == "scheduler":
        watch_scheduler(planner.scheduler, every=True)
        _try_problems(planner.scheduler, experts, draws)
    if part == "predictor":
        watch_predictor(planner.predictor, every=True)
    for _ in range(STEPS):
        _step(planner, draws)
    if policies is not None:
        _try_what_it_sees(rule, experts, top_k, draws)
    found = {"cache": planner.policies, "scheduler": [planner.scheduler], "predictor": [planner.predictor]}[part]
    yield from (each.__dict__["_watched"]() for each in found)


def _step(planner: Planner, draws: random.Random) -> None:
    """One step of random routing, as an engine takes it; transfers land when they like."""
    tokens, experts = draws.choice(TOKENS), planner.num_experts
    planner.begin_step("decode" if tokens == 1 else "prefill")
    looks, under_way = planner.should_predict(tokens), set[tuple[int, int]]()
    scores = np.random.default_rng(draws.getrandbits(32)).dirichlet(np.full(experts, 0.5), (planner.num_layers, tokens))
    for layer in range(planner.num_layers):
        for landed in sorted(under_way):
            if draws.random() < 0.5:
                planner.landed(*landed)
                under_way.discard(landed)
        ids = np.argsort(-scores[layer], axis=1, kind="stable")[:, : planner.top_k]
        mean = scores[layer].mean(axis=0) if draws.random() < 0.8 else None
        plan = planner.plan(layer, loads_of(ids, experts), mean, tokens)
        under_way -= {(layer, fetch.expert) for fetch in plan.awaited}
        if looks:
            outlook = RouterOutlook(ids, scores[layer], list(scores[layer + 1 :]))
            under_way |= {(each.layer, each.expert) for each in planner.prefetch(layer, outlook)}
    if under_way:
        planner.abandon_step()
    else:
        planner.finish_step()


def _try_problems(rule: Scheduler, experts: int, draws: random.Random) -> None:
    """Problems that runs meet rarely: several experts in flight, heavy loads, no fetching."""
    for _ in range(PROBLEMS_A_RUN):
        machine, most = _Machine.draw(draws), draws.choice((1, 1, 40))
        active = draws.sample(range(experts), draws.randint(1, experts))
        loads = {expert: draws.randint(1, most) for expert in active}
        resident = set(draws.sample(range(experts), draws.randint(0, experts)))
        absent = [expert for expert in active if expert not in resident]
        moving = draws.sample(absent, draws.randint(0, min(2, len(absent))))
        in_flight = {expert: machine.link * (i + draws.random()) for i, expert in enumerate(moving)}
        scores = [draws.random() for _ in range(experts)] if draws.random() < 0.7 else None
        tokens = 1 if most == 1 else sum(loads.values())
        allow_fetch = not rule.uses_cpu or draws.random() < 0.8
        rule.schedule(Problem(loads, resident, machine, tokens, scores, in_flight, allow_fetch=allow_fetch))
        if rule.depends_on_counts_only and tokens == 1:
            _try_counts_only(rule, Problem(loads, resident, machine, 1, [draws.random() for _ in range(experts)]))


def _try_counts_only(rule: Scheduler, problem: Problem) -> None:
    """`depends_on_counts_only` lets answers be remembered: they must then be the rule's own."""
    score = cast(Sequence[float], problem.scores).__getitem__
    groups = ([e for e in problem.loads if (e in problem.resident) is here] for here in (True, False))
    hits, misses = (sorted(group) if rule.by_id else sorted(group, key=score, reverse=True) for group in groups)
    problem.link_busy = 0.0
    pattern = UnitLoadCache(rule, problem.costs).find(len(hits), len(misses), rule.by_id, 0.0)
    if pattern is None:
        return
    remembered, found = apply(pattern, hits + misses, 0.0), rule.schedule(problem)
    if (set(remembered.cpu), set(remembered.fetch)) != (set(found.cpu), set(found.fetch)):
        raise RuleError(
            f"scheduler {type(rule).__module__}:{type(rule).__qualname__}",
            "schedule",
            f"gave the CPU {sorted(found.cpu)}, but {sorted(remembered.cpu)} where the experts have other numbers; "
            "`depends_on_counts_only` says that their numbers do not matter",
        )


def _try_what_it_sees(rule: Rule, experts: int, top_k: int, draws: random.Random) -> None:
    """A policy that sees the routing alone serves caches of several sizes at once."""
    few, many = build_policies(rule, experts, [min(top_k, experts), experts], top_k)
    if few.sees != "routing":
        return
    few.loaded([0])
    for _ in range(STEPS):
        scores = [draws.random() for _ in range(experts)]
        loads = dict.fromkeys(draws.sample(range(experts), top_k), 1)
        for policy in (few, many):
            policy.observe(scores, loads)
        few.moved(draws.randrange(experts), None)
        if list(few.heat) != list(many.heat):
            raise RuleError(
                f"cache {type(few).__module__}:{type(few).__qualname__}",
                "update",
                "left other heats with other residents, or another capacity; `sees` says that only the routing matters",
            )
