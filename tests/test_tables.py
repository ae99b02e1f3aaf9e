"""Tables with pandas and without, and how pictures say that matplotlib is missing."""

from __future__ import annotations

import sys
import types

import pytest

from hybrimoe_jax import figures, tables
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.tables import Table, table

ROWS = [{"system": "hybrimoe", "hit_rate": 0.51234567}, {"system": "<lru>", "hit_rate": None, "steps": 12}]


@pytest.fixture
def without_pandas(monkeypatch):
    monkeypatch.setattr(tables, "find_spec", lambda name: None)


def test_plain_rows_give_columns_and_rows(without_pandas):
    found = table(ROWS)
    assert found.columns == ["system", "hit_rate", "steps"]
    assert found["steps"] == [None, 12]
    assert found[1] == {"system": "<lru>", "hit_rate": None, "steps": 12}
    with pytest.raises(KeyError, match=r"hits.*hit_rate"):
        found["hits"]


def test_plain_rows_are_readable(without_pandas):
    assert repr(table(ROWS)).splitlines() == [
        "system    hit_rate  steps",
        "hybrimoe    0.5123      -",
        "<lru>            -     12",
    ]
    assert "<td>&lt;lru&gt;</td>" in table(ROWS)._repr_html_()
    assert table([], ["system", "steps"]).columns == ["system", "steps"]


def test_a_long_table_leaves_out_its_middle():
    lines = repr(Table({"step": step} for step in range(1000))).splitlines()
    assert len(lines) < 100 and lines[1].strip() == "0" and lines[-1].strip() == "999"


def test_pandas_is_used_where_it_is_there(monkeypatch):
    stand_in = types.ModuleType("pandas")
    stand_in.DataFrame = lambda rows, columns: ("DataFrame", rows, columns)
    monkeypatch.setitem(sys.modules, "pandas", stand_in)
    monkeypatch.setattr(tables, "find_spec", lambda name: name == "pandas")
    kind, rows, columns = table(ROWS)
    assert (kind, rows[0]["steps"], columns) == ("DataFrame", None, ["system", "hit_rate", "steps"])


def test_a_plot_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install"), figures.axes_of():
        pass
