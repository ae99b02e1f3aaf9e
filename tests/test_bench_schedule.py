"""`bench schedule` as a user runs it, and the problems it draws."""

import json
import random

import golden
import pytest

from hybrimoe_jax.bench import schedule as bench
from hybrimoe_jax.bench.__main__ import main
from hybrimoe_jax.decide.schedule import SCHEDULERS
from hybrimoe_jax.errors import UserError


def test_the_last_line_is_the_record(capsys):
    assert main(["schedule", "--instances", "12", "--seed", "3"]) == 0
    out, error = capsys.readouterr()
    assert error == ""
    record = json.loads(out.splitlines()[-1])
    golden.check(record)
    assert set(record["gap"]) == {workload.name for workload in bench.WORKLOADS}
    for name, gaps in record["gap"].items():
        assert set(gaps) == set(SCHEDULERS)
        for gap in gaps.values():
            assert 0 <= gap["mean"] <= gap["worst"] and gap["p99"] <= gap["worst"] and 0 <= gap["optimal"] <= 1
        if "by load" not in name:
            assert gaps["optimal"]["worst"] < 1e-9
    assert all(set(times) >= set(SCHEDULERS) and min(times.values()) > 0 for times in record["cpu_us"].values())


def test_bad_numbers_are_refused(capsys):
    with pytest.raises(UserError, match="--instances must be at least 1"):
        main(["schedule", "--instances", "0"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("workload", bench.WORKLOADS, ids=lambda workload: workload.name)
def test_problems_are_what_they_are_called(workload):
    generator = random.Random(1)
    problems = [bench.draw_problem(generator, workload) for _ in range(30)]
    for problem in problems:
        assert sum(problem.loads.values()) == workload.tokens * bench.TOP_K
        assert max(problem.loads.values()) <= workload.tokens
        assert not problem.in_flight.keys() & problem.resident and problem.in_flight.keys() <= problem.loads.keys()
        assert (problem.costs.transfer(True) == problem.costs.transfer(False)) == workload.one_speed
    assert any(problem.costs.device_token > 0 for problem in problems) == workload.by_load
    assert any(problem.in_flight for problem in problems) == (workload.in_flight > 0)
