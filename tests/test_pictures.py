"""Pictures of schedules and tables show the numbers that they are given."""

from __future__ import annotations

import itertools
import random

import pytest
from schedule_cases import costs

from hybrimoe_jax.bench.schedule import WORKLOADS, draw_problem
from hybrimoe_jax.decide.schedule import Problem, get_scheduler
from hybrimoe_jax.simulate.gantt import Operation, operations
from hybrimoe_jax.tables import Table

A, B, C, D, E = range(5)
FIGURE_5 = Problem({A: 1, B: 1, C: 3, D: 4, E: 1}, {D, E}, costs(shared=2.0))


@pytest.fixture
def pyplot():
    pytest.importorskip("matplotlib", reason="the extra `plots` is not installed").use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


def test_the_paper_s_example_is_decided_step_by_step():
    steps = operations(FIGURE_5, get_scheduler("paper").schedule(FIGURE_5))
    assert steps == [
        Operation("cpu", A, 0, 1),
        Operation("device", None, 0, 2),
        Operation("cpu", B, 1, 2),
        Operation("device", D, 2, 3),
        Operation("cpu", E, 2, 3),
        Operation("link", C, 0, 3),
        Operation("device", C, 3, 4),
    ]


@pytest.mark.parametrize("name", ["paper", "optimal", "fetch-misses"])
def test_operations_end_when_the_schedule_says(name):
    generator = random.Random(0)
    for workload in WORKLOADS * 4:
        problem = draw_problem(generator, workload)
        schedule = get_scheduler(name).schedule(problem)
        steps = operations(problem, schedule)
        for lane, seconds in (("cpu", schedule.cpu_seconds), ("device", schedule.device_seconds)):
            mine = sorted((one for one in steps if one.lane == lane), key=lambda one: one.start)
            assert max((one.end for one in mine), default=0.0) == pytest.approx(seconds)
            assert all(one.end <= other.start + 1e-9 for one, other in itertools.pairwise(mine))
        assert [one.expert for one in steps if one.lane == "link"] == list(schedule.fetch)
        landed = [one.end for one in steps if one.lane == "link"]
        assert not landed or landed[-1] == pytest.approx(schedule.link_seconds)


def test_a_schedule_is_drawn_up_to_a_step(pyplot):
    from hybrimoe_jax.simulate.gantt import draw_schedule

    schedule = get_scheduler("paper").schedule(FIGURE_5)
    axes = draw_schedule(FIGURE_5, schedule, first=4, names="ABCDE")
    assert [text.get_text() for text in axes.texts] == ["A", "shared", "B", "D"]
    assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [(0, 1), (0, 2), (1, 1), (2, 1)]


def test_a_table_is_drawn_by_a_column(pyplot):
    from hybrimoe_jax.figures import draw_bars, draw_lines

    rows = [dict(x=x, y=10 * x + n, rule=rule) for n, rule in enumerate("ab") for x in (1, 2)]
    rows = Table([*rows, dict(x=3, y=None, rule="a"), dict(x=3, y=7, rule="b")])
    lines = {line.get_label(): line for line in draw_lines(rows, "x", "y", by="rule").lines}
    assert list(lines["a"].get_ydata()) == [10, 20] and list(lines["b"].get_xdata()) == [1, 2, 3]
    assert [bar.get_height() for bar in draw_bars(rows, "x", "y", by="rule").patches] == [10, 20, 0, 11, 21, 7]
    stacked = draw_bars(rows, "x", "y", by="rule", stacked=True).patches
    assert [bar.get_y() for bar in stacked] == [0, 0, 0, 10, 20, 0]
    assert len(draw_bars(rows[:2] and Table(rows[:2]), "rule", "y").patches) == 1
