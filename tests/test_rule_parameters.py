"""A parameter of a built-in rule is refused, or the rule holds to its contract with it: no number is silently none."""

from __future__ import annotations

import inspect

import pytest

import hybrimoe_jax
from hybrimoe_jax.decide import POLICIES, PREDICTORS, SCHEDULERS
from hybrimoe_jax.errors import RuleError, UserError
from hybrimoe_jax.simulate.synthetic import synthetic_of

ODD = ("nan", "inf", "-inf", "-1", "0", "1e-310", "1e308", "1e11", "true", "x", "[1]")


PARAMETERS = [
    f"{name}:{parameter.name}"
    for table in (POLICIES, SCHEDULERS, PREDICTORS)
    for name, rule in table.items()
    for parameter in inspect.signature(rule).parameters.values()
    if isinstance(parameter.default, (int, float))
]
"""`name:parameter` of keywords with a number or a truth as their usual value."""


def test_there_are_parameters_of_every_kind():
    assert {"mrs:alpha", "optimal:nodes", "corrected:rate", "co-activation:smoothing"} <= set(PARAMETERS)


@pytest.mark.parametrize("parameter", PARAMETERS)
def test_an_odd_number_is_refused_or_harmless(parameter):
    """A warning of NumPy's is an error here."""
    refused = 0
    for value in ODD:
        try:
            hybrimoe_jax.check(f"{parameter}={value}", runs=10)
        except RuleError:
            raise  # it was taken, and then the rule broke its contract
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused >= 4, "words and what is no number"


@pytest.mark.parametrize("knob", ["skew", "stay", "noise"])
@pytest.mark.parametrize("value", ["nan", "inf", "-1", "1e308"])
def test_a_knob_of_synthetic_routing_that_is_no_number_is_refused(knob, value):
    with pytest.raises(UserError, match="must be at least 0"):
        synthetic_of(f"mixtral-8x7b:{knob}={value},sequences=1,tokens=2")
