"""`check`: a wrong rule is found whenever it is wrong, a right one never is, and the package's own are right."""

from __future__ import annotations

import re

import numpy as np
import pytest
from own_rules import Fading, Half, Popular
from wrong_rules import WRONG, faults

import hybrimoe_jax
from hybrimoe_jax.decide import POLICIES, PREDICTORS, SCHEDULERS, replay
from hybrimoe_jax.decide.check import check
from hybrimoe_jax.decide.schedule.problem import split
from hybrimoe_jax.errors import RuleError, UserError


@pytest.mark.parametrize("rule", WRONG)
def test_a_wrong_rule_is_caught_by_the_check(rule):
    with faults(rule):
        hybrimoe_jax.check(rule)


OWN = (Fading(decay=0.5), Half, "own_rules:Popular:step=2")


@pytest.mark.parametrize("rule", [*POLICIES, *SCHEDULERS, *PREDICTORS, *OWN])
def test_a_right_rule_passes_the_check(rule):
    """The package's own, which runs do not watch, are proven here."""
    report = check(rule, runs=8)
    said = rf"(cache|scheduler|predictor) {re.escape(report.rule)}: nothing wrong in \d+ calls .*"
    assert re.fullmatch(said, repr(report))
    asked = {"cache": "victim", "scheduler": "schedule", "predictor": "predict"}[report.kind]
    assert report.calls[asked] > 50


class CountsAreNotAll(Half):
    """Even experts cross the link."""

    depends_on_counts_only = True

    def schedule(self, problem):
        here, moving, absent = split(problem)
        fetch = [expert for expert in absent if expert % 2 == 0]
        return replay(problem, [e for e in absent if e % 2], here + moving + fetch, fetch)


class SeesResidents(Fading):
    sees = "routing"

    def moved(self, entered, left):
        if entered is not None:
            self.heat[entered] += 1


class SeesCapacity(Fading):
    sees = "routing"

    def update(self, scores, loads):
        self.heat[0] += self.capacity


class SeesTheStart(Fading):
    sees = "routing"

    def loaded(self, experts):
        self.heat[experts[0]] = 9


def test_what_a_class_says_of_itself_is_tried():
    with pytest.raises(RuleError, match=r"CountsAreNotAll: schedule gave the CPU .* `depends_on_counts_only` says"):
        check(CountsAreNotAll)
    for rule in (SeesResidents, SeesCapacity, SeesTheStart):
        with pytest.raises(RuleError, match=rf"{rule.__name__}: update left other heats .*`sees` says"):
            check(rule)
    with pytest.raises(UserError, match=r"int is derived from none of CachePolicy, Scheduler, Predictor"):
        check(int)
    with pytest.raises(UserError, match=r"rule 'nope' is unknown \(known: mrs, .*paper, .*previous"):
        check("nope")


PROBLEMS = {
    "heavy": lambda p: max(p.loads.values(), default=0) > 30,
    "prompt": lambda p: p.tokens == sum(p.loads.values()) > 1,
    "decode": lambda p: p.tokens == 1 and set(p.loads.values()) == {1},
    "two in flight": lambda p: len({seconds for seconds in p.in_flight.values() if seconds > 0}) == 2,
    "no fetching": lambda p: not p.allow_fetch,
    "no scores": lambda p: p.scores is None,
    "scores": lambda p: p.scores is not None,
    "all resident": lambda p: p.loads.keys() <= set(p.resident),
    "none resident": lambda p: not p.resident,
    "one expert": lambda p: len(p.loads) == 1,
    "a start": lambda p: p.costs.cpu(1, True) > p.costs.cpu(1),
    "no start": lambda p: p.costs.cpu(1, True) == p.costs.cpu(1),
    "a busy link": lambda p: p.costs.transfer(True) > p.costs.transfer(),
    "slow transfers": lambda p: p.costs.transfer() > p.costs.cpu(1),
    "slow experts": lambda p: p.costs.cpu(1) > p.costs.transfer(),
}


class MeetsProblem(Half):
    def __init__(self, where):
        super().__init__()
        self.where = where

    def schedule(self, problem):
        assert not PROBLEMS[self.where](problem), "met"
        return super().schedule(problem)


STEPS = {
    "no slots": lambda policy, scores, loads: policy.capacity == 0,
    "all slots": lambda policy, scores, loads: policy.capacity == policy.num_experts,
    "known": lambda policy, scores, loads: policy.frequencies is not None,
    "unknown": lambda policy, scores, loads: policy.frequencies is None,
    "one a token": lambda policy, scores, loads: policy.top_k == 1,
    "several a token": lambda policy, scores, loads: policy.top_k > 1,
    "no scores": lambda policy, scores, loads: scores is None,
    "scores": lambda policy, scores, loads: scores is not None,
    "prompt": lambda policy, scores, loads: max(loads.values()) > 9,
    "warm": lambda policy, scores, loads: policy.at_start and policy.step == 1,
    "cold": lambda policy, scores, loads: policy.capacity and not policy.at_start and policy.step == 1,
    "late": lambda policy, scores, loads: policy.step == 8,
    "landed": lambda policy, scores, loads: policy.foreseen,
    "shared slots": lambda policy, scores, loads: policy.lent,
}


class MeetsStep(Fading):
    def __init__(self, *model, where, **common):
        super().__init__(*model, **common)
        self.where, self.at_start, self.recent, self.foreseen, self.lent = where, (), {}, False, False

    def loaded(self, experts):
        self.at_start = tuple(experts)

    def moved(self, entered, left):
        self.foreseen |= entered is not None and entered not in self.recent
        self.lent |= entered is None

    def update(self, scores, loads):
        super().update(scores, loads)
        assert not STEPS[self.where](self, scores, loads), "met"
        self.recent = loads


@pytest.mark.parametrize(
    "rule", [*map(MeetsProblem, PROBLEMS), *(MeetsStep(where=where) for where in STEPS)], ids=[*PROBLEMS, *STEPS]
)
def test_a_rule_that_is_wrong_in_one_situation_only_is_found(rule):
    with pytest.raises(RuleError, match="raised AssertionError: met"):
        check(rule)


class Counts(Fading):
    asked = 0

    def update(self, scores, loads):
        super().update(scores, loads)
        Counts.asked += 1


def test_a_report_counts_what_was_asked():
    report = check(Counts, runs=1)
    assert report.calls["observe"] == Counts.asked == 4 * 8


class PlausibleProblems(Half):
    def schedule(self, problem):
        cpu, transfer = problem.costs.cpu, problem.costs.transfer
        start = cpu(1, True) - cpu(1)
        assert transfer(True) >= transfer() > 0 and cpu(9) > cpu(1) > 0 and start >= 0
        assert cpu(9, True) - cpu(9) == pytest.approx(start)
        if problem.loads:  # of a layer to come nothing may be foreseen
            assert max(problem.loads.values()) <= problem.tokens <= sum(problem.loads.values())
        assert 0 <= min(problem.in_flight.values(), default=0) <= problem.link_start
        return super().schedule(problem)


class PlausibleSteps(Fading):
    def update(self, scores, loads):
        super().update(scores, loads)
        tokens, odd = divmod(sum(loads.values()), self.top_k)
        assert not odd and max(loads.values()) <= tokens
        if scores is not None and tokens == 1:
            others = [score for expert, score in enumerate(scores) if expert not in loads]
            assert min(scores[expert] for expert in loads) >= max(others, default=0.0)


class PlausibleRouters(Popular):
    known, finished = None, True

    def finish_step(self):
        self.finished = True

    def predict(self, layer, shown, depth):
        assert self.finished or layer, "one step is over before the next begins"
        self.finished = False
        if layer and self.known is not None:
            np.testing.assert_array_equal(shown.scores, self.known)
        self.known = next(iter(shown.ahead), None)
        return super().predict(layer, shown, depth)


@pytest.mark.parametrize("rule", [PlausibleProblems, PlausibleSteps, PlausibleRouters])
def test_what_rules_are_tried_with_could_be_a_run(rule):
    """Costs as `Problem.costs` promises them, loads and scores of a router, what the next layer will be."""
    assert sum(check(rule, runs=3).calls.values()) > 50
