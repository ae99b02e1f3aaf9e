"""What a refusal of a rule's answer says: which layer answered, about which, and what was wrong with it."""

from __future__ import annotations

import numpy as np
import pytest
from own_rules import Half, Popular
from schedule_cases import costs

from hybrimoe_jax.decide import Prediction, Problem
from hybrimoe_jax.decide.prefetch.prediction import RouterOutlook
from hybrimoe_jax.decide.prefetch.watched import watch_predictor
from hybrimoe_jax.decide.schedule.watched import watch_scheduler
from hybrimoe_jax.errors import RuleError

RIGHT = Prediction({0: 1}, None)
NAN = float("nan")


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ([0], r"gave \[0\] for layer 3, which is no Prediction"),
        (Prediction({4: 1}, None), r"foresaw in layer 3 expert 4; experts are 0..3"),
        (Prediction({0.5: 1}, None), r"foresaw in layer 3 0.5, which is no whole number"),
        (Prediction({0: 1.5}, None), r"foresaw in layer 3 loads of 1.5, which is no whole number"),
        (Prediction({3: 0}, None), r"foresaw in layer 3 expert 3 with a load of 0; a load is at least 1"),
        (Prediction({3: 1}, [1.0]), "gave 1 scores for 4 experts"),
        (Prediction({3: 1}, [0.0, 0.0, NAN, 0.0]), r"foresaw in layer 3 the score nan of expert 2; scores are finite"),
    ],
)
def test_a_refusal_of_a_prediction_names_who_foresaw_and_what(second, said):
    predictor = Popular(8, 4, 2, 3)
    predictor.predict = lambda layer, shown, depth: [RIGHT, second]
    watch_predictor(predictor, every=True)
    with pytest.raises(RuleError, match=f"^predictor own_rules:Popular, layer 1: predict {said}$"):
        predictor.predict(1, RouterOutlook(np.array([[0, 1]])), 2)
    assert predictor.predict(1, RouterOutlook(np.array([[0, 1]])), 1) == [RIGHT], "what was not asked for is not read"


@pytest.mark.parametrize(
    ("flags", "changes", "said"),
    [
        ({"uses_link": False}, {}, "fetched expert 1, but `uses_link` is False"),
        ({"uses_cpu": False}, {}, "gave the CPU expert 2, but `uses_cpu` is False"),
        ({}, {"bound": 7.0}, "gave the bound 7, but a makespan of 5 s"),
        ({}, {"uses_all_cores": True}, "gave `uses_all_cores`, which only SharedCoresScheduler's plans do"),
    ],
)
def test_a_refusal_of_a_schedule_names_what_does_not_fit(flags, changes, said):
    class Mine(Half):
        def schedule(self, problem):
            return super().schedule(problem)._replace(**changes)

    for name, value in flags.items():
        setattr(Mine, name, value)
    problem = Problem({0: 1, 1: 1, 2: 1}, {0}, costs(shared=4.0, transfer=1.0, device=(0.5, 0.0)), 1)
    watched = watch_scheduler(Mine())
    with pytest.raises(RuleError, match=f": schedule {said}$"):
        watched.schedule(problem)


def test_a_bound_may_be_the_makespan():
    class Mine(Half):
        def schedule(self, problem):
            found = super().schedule(problem)
            return found._replace(bound=found.makespan)

    problem = Problem({0: 1, 1: 1}, {0}, costs(), 1)
    assert watch_scheduler(Mine()).schedule(problem).makespan > 0
