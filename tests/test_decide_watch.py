"""Rules are watched: a wrong one is caught wherever it runs, and the package's own run unwatched."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
import tiny
from grids import few
from own_rules import Fading, Half, Popular
from schedule_cases import costs
from wrong_rules import PARTS, WRONG, EvictsNeeded, Flatters, Foresees999, LeavesOut, faults, part_of

import hybrimoe_jax
from hybrimoe_jax.decide import POLICIES, PREDICTORS, SCHEDULERS, Planner
from hybrimoe_jax.decide.schedule import PaperScheduler
from hybrimoe_jax.decide.systems import get_system
from hybrimoe_jax.decide.watch import Watch, listed
from hybrimoe_jax.errors import RuleError
from hybrimoe_jax.simulate.cases import Case
from hybrimoe_jax.simulate.grid import run_case, run_cases


@pytest.mark.parametrize("rule", WRONG)
def test_a_wrong_rule_is_caught_in_a_replay(rule):
    system = hybrimoe_jax.system("mine", base="adapmoe", **{part_of(rule): rule})
    with faults(rule):
        run_case(Case("synthetic:mixtral-8x7b", "a6000-paper", system, 0.25, steps=20))


@pytest.mark.parametrize("rule", few([EvictsNeeded, LeavesOut, Foresees999], WRONG))
def test_a_wrong_rule_is_caught_live(rule):
    with faults(rule):
        generated(system="adapmoe", **{part_of(rule): rule})


@pytest.mark.parametrize("rule", few([EvictsNeeded, LeavesOut, Foresees999], WRONG))
def test_a_wrong_rule_is_caught_under_the_virtual_clock(rule):
    with faults(rule):
        generated(system="adapmoe", clock="virtual", **{part_of(rule): rule})


@pytest.mark.parametrize("rule", few([EvictsNeeded, LeavesOut, Foresees999], WRONG))
@pytest.mark.parametrize("clock", ["wall", "virtual", "paced"])
def test_a_wrong_rule_is_caught_in_the_pytorch_engine(rule, clock, tmp_path):
    pytest.importorskip("torch")
    from torch_models import offload

    options: dict = {"clock": clock}
    if clock == "paced":
        tiny.costs(tiny.weights("mixtral")[0]).save(tmp_path / "m.json")
        options = {"device": f"paced:{tmp_path / 'm.json'}:2"}
    prompts = tiny.prompts(tiny.weights("mixtral")[0], (9,), seed=1)
    with faults(rule), offload("mixtral", mode="lru", cache_ratio=0.5, **options, **{part_of(rule): rule}) as engine:
        for _ in range(2):
            engine.generate(prompts, max_new_tokens=8)


def generated(**options) -> list[list[int]]:
    """What an engine with these options says to one prompt, twice."""
    prompts = tiny.prompts(tiny.weights("mixtral")[0], (9,), seed=1)
    engine = tiny.engine("mixtral", cache_ratio=0.5, **options)
    try:
        return [engine.generate(prompts, max_new_tokens=8).token_ids for _ in range(2)]
    finally:
        engine.close()


class LeavesOutOnce(Half):
    """Right but for one call, after which the engine goes on."""

    calls, wrong = 0, False

    def schedule(self, problem):
        own = LeavesOutOnce
        own.calls += 1
        if own.wrong or own.calls < 30 or problem.loads.keys() <= set(problem.resident):
            return super().schedule(problem)
        own.wrong = True
        return LeavesOut.schedule(self, problem)


def test_an_engine_goes_on_after_a_wrong_answer():
    prompts = tiny.prompts(tiny.weights("mixtral")[0], (9,), seed=1)
    engine = tiny.engine("mixtral", cache_ratio=0.5, scheduler=LeavesOutOnce)
    with pytest.raises(RuleError, match=r"LeavesOutOnce, layer \d+: schedule left out expert \d+"):
        for _ in range(9):
            engine.generate(prompts, max_new_tokens=8)
    after = engine.generate(prompts, max_new_tokens=8).token_ids
    engine.close()
    assert after == generated(system="cpu-only")[0]


def planner(**parts) -> Planner:
    system = get_system("hybrimoe").override(**parts)
    return Planner(system, 3, 8, 2, 4, costs())


def test_the_package_s_own_are_not_watched_and_all_others_are(monkeypatch):
    """What a run with built-in rules pays for the checks: nothing."""

    def watched(made: Planner) -> list[bool]:
        return ["_watched" in vars(rule) for rule in (*made.policies, made.scheduler, made.predictor)]

    for cache, scheduler, predictor in itertools.zip_longest(POLICIES, SCHEDULERS, PREDICTORS):
        assert not any(watched(planner(cache=cache, scheduler=scheduler, predictor=predictor)))
    assert watched(planner(cache=Fading)) == [True] * 3 + [False] * 2
    assert watched(planner(scheduler=Half, predictor=Popular)) == [False] * 3 + [True] * 2
    handed = Planner("hybrimoe", 3, 8, 2, 4, costs(), policies=Fading.for_layers(8, [4] * 3, 2))
    assert watched(handed)[:3] == [True] * 3
    monkeypatch.setattr(PaperScheduler, "schedule", LeavesOut.schedule)
    with pytest.raises(RuleError, match="schedule left out expert"):
        planner().plan(0, {6: 1, 7: 1}, None, 1)


def test_messages_show_eight_experts():
    eight = "0, 1, 2, 3, 4, 5, 6, 7"
    assert [listed(range(n)) for n in (0, 1, 8, 10)] == ["none", "0", eight, f"{eight} and 2 more"]


class NumPyNumbers(Fading):
    def victim(self, resident, protected):
        free = np.array(sorted(resident - protected))
        return free[np.argmin(np.array(self.heat)[free])] if len(free) else None


def test_numpy_s_numbers_become_plain_ones():
    made = planner(cache=NumPyNumbers, scheduler="device-only")
    fetch = [made.plan(0, {expert: 1}, None, 1).fetch[0] for expert in (6, 7)]
    assert {type(one.victim) for one in fetch} == {int}


def test_a_fault_goes_from_worker_to_starter():
    error = RuleError("cache mine:Mine", "update", "left expert 1 the heat nan", 3)
    assert str(pickle.loads(pickle.dumps(error))) == "cache mine:Mine, layer 3: update left expert 1 the heat nan"
    system = hybrimoe_jax.system("mine", scheduler=Flatters)
    cases = [Case("synthetic:mixtral-8x7b", "a6000-paper", system, ratio, steps=2) for ratio in (0.25, 0.5)]
    with faults(Flatters):
        list(run_cases(cases, 2))


@pytest.mark.parametrize("answer", [10**400, 10**5000, -(10**5000)], ids=["no float", "no text", "negative"])
def test_numbers_of_any_size_are_refused_in_one_short_line(answer):
    watch = Watch("cache", PARTS["cache"]())
    for refuse in (lambda: watch.number("heat", answer), lambda: watch.expert("victim", "gave", answer, 8)):
        with pytest.raises(RuleError) as fault:
            refuse()
        assert len(str(fault.value)) < 300 and "\n" not in str(fault.value)
