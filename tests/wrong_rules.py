"""Rules with one thing wrong each: `WRONG` says of each class what is said of it, and `faults` expects it."""

# What is wrong here is meant to be.
# pyright: reportIncompatibleMethodOverride=false, reportAttributeAccessIssue=false

from __future__ import annotations

import pytest
from own_rules import Fading, Half, Popular

from hybrimoe_jax.decide import Prediction, replay
from hybrimoe_jax.decide.schedule.problem import split
from hybrimoe_jax.errors import RuleError


class EvictsNeeded(Fading):
    def victim(self, resident, protected):
        return next((expert for expert in resident if expert in protected), None)


class EvictsAbsent(Fading):
    def victim(self, resident, protected):
        return next(expert for expert in range(self.num_experts) if expert not in resident)


class EvictsHalf(Fading):
    def victim(self, resident, protected):
        return 0.5


class EvictsByItself(Fading):
    def victim(self, resident, protected):
        resident.discard(min(resident))
        return super().victim(resident, protected)


class HeatNotANumber(Fading):
    def update(self, scores, loads):
        self.heat[1] = float("nan")


class HeatOfFewer(Fading):
    def update(self, scores, loads):
        self.heat = [1.0]


class ForgetsTheStep(Fading):
    def observe(self, scores, loads):
        self.update(scores, loads)


class StartsTwice(Fading):
    def initial(self):
        return [0, 0]


class DividesByZero(Fading):
    def update(self, scores, loads):
        self.heat[0] /= len(loads) - len(loads)


class LeavesOut(Half):
    def schedule(self, problem):
        here, moving, absent = split(problem)
        return replay(problem, absent[1:], here + moving, ())


class RunsTwice(Half):
    def schedule(self, problem):
        here, moving, absent = split(problem)
        return replay(problem, absent, here + moving + absent, absent)


class RunsAbsent(Half):
    def schedule(self, problem):
        here, moving, absent = split(problem)
        return super().schedule(problem)._replace(cpu=(), fetch=(), device=(*here, *moving, *absent))


class RunsAbsentToo(Half):
    """Where another one is under way, too."""

    def schedule(self, problem):
        here, moving, absent = split(problem)
        return replay(problem, (), here + moving + absent, ())


class FetchesResident(Half):
    def schedule(self, problem):
        here, moving, absent = split(problem)
        return super().schedule(problem)._replace(fetch=tuple(here), cpu=tuple(absent), device=(*here, *moving))


class Invents(Half):
    def schedule(self, problem):
        found = super().schedule(problem)
        other = next(expert for expert in range(100) if expert not in problem.loads)
        return found._replace(cpu=(*found.cpu, other))


class Flatters(Half):
    def schedule(self, problem):
        found = super().schedule(problem)
        return found._replace(makespan=0.9 * found.makespan)


class Steals(Half):
    def schedule(self, problem):
        here, moving, absent = split(problem)
        return replay(problem, absent + here, moving, ())


class SaysNothing(Half):
    def schedule(self, problem):
        super().schedule(problem)


class Foresees999(Popular):
    def best(self, seen):
        return [999]


class ForeseesBefore0(Popular):
    def best(self, seen):
        return [-1]


class ForeseesNothingOf(Popular):
    def predict(self, layer, shown, depth):
        return [Prediction(dict.fromkeys(each.loads, 0)) for each in super().predict(layer, shown, depth)]


class ForeseesNoNumber(Popular):
    def predict(self, layer, shown, depth):
        scores = [float("nan")] * self.num_experts
        return [Prediction(each.loads, scores) for each in super().predict(layer, shown, depth)]


class ForeseesLists(Popular):
    def predict(self, layer, shown, depth):
        return [list(each.loads) for each in super().predict(layer, shown, depth)]


class WritesOver(Popular):
    def predict(self, layer, shown, depth):
        shown.ids[:] = 0
        return super().predict(layer, shown, depth)


WRONG = {
    EvictsNeeded: r"victim gave expert \d+, which must stay \(needed or promised: \d",
    EvictsAbsent: r"victim gave expert \d+, which is not resident \(resident: \d",
    EvictsHalf: "victim gave 0.5, which is no whole number",
    EvictsByItself: "victim raised AttributeError: 'frozenset' object has no attribute 'discard'",
    HeatNotANumber: "update left expert 1 the heat nan; heat is finite",
    HeatOfFewer: r"update left the heat of 1 experts; the layer has \d+",
    ForgetsTheStep: r"observe left the step at 0 after 0; .*call super",
    StartsTwice: "initial gave expert 0 twice",
    DividesByZero: r"update raised ZeroDivisionError: .*wrong_rules.py:\d+",
    LeavesOut: r"schedule left out expert \d+ \(activated: \d.*; cpu: .*; device: ",
    RunsTwice: r"schedule ran expert \d+ twice",
    RunsAbsent: r"schedule gave the device expert \d+, which is neither resident nor in flight nor fetched",
    RunsAbsentToo: r"schedule gave the device expert \d+, which is neither resident nor in flight nor fetched",
    FetchesResident: r"schedule fetched expert \d+, which is resident",
    Invents: r"schedule gave the CPU expert \d+, which no token chose",
    Flatters: r"schedule gave makespan \S+, but its lanes take \S+ s",
    Steals: r"schedule gave the CPU the resident expert \d+, but `steals` is False",
    SaysNothing: "schedule gave None, which is no Schedule",
    Foresees999: r"predict foresaw in layer \d+ expert 999; experts are 0..\d+",
    ForeseesBefore0: r"predict foresaw in layer \d+ expert -1; experts are 0..\d+",
    ForeseesNothingOf: r"predict foresaw in layer \d+ expert \d+ with a load of 0; a load is at least 1",
    ForeseesNoNumber: r"predict foresaw in layer \d+ the score nan of expert 0; scores are finite",
    ForeseesLists: r"predict gave \[\d.*\] for layer \d+, which is no Prediction",
    WritesOver: "predict raised ValueError: assignment destination is read-only",
}
PARTS = {"cache": Fading, "scheduler": Half, "predictor": Popular}


def part_of(rule: type) -> str:
    return next(part for part, base in PARTS.items() if issubclass(rule, base))


def faults(rule: type):
    """`RuleError` as it is wanted: part, class, layer, method and an example."""
    where = rf"{part_of(rule)} wrong_rules:{rule.__name__}(, layer (\d+|to come))?"
    return pytest.raises(RuleError, match=f"^{where}: {WRONG[rule]}")
