"""`trace export`: what was written is read back, and what a layout cannot hold is said."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from test_trace_command import recorded

from hybrimoe_jax.__main__ import command_main
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.trace.export import export_trace
from hybrimoe_jax.trace.file import Trace, arrays_of, save_trace
from hybrimoe_jax.trace.importers import open_trace

TABLES = ("t.csv", "t.csv.gz", "t.jsonl", "t.jsonl.gz")


def whole() -> Trace:
    """A trace with everything that a trace can have, some of it absent in some rows."""
    trace = recorded()
    trace.batch = np.zeros(len(trace), np.int32)
    trace.scores[trace.step == 1] = np.nan
    trace.extra = {"landed": np.array([[1, 0, 1, 3]], np.int32), "note": np.arange(len(trace)) * 0.1}
    trace.about |= {"name": 'a "name", with\nlines'}
    return trace


def same(one: Trace, other: Trace) -> None:
    assert one.facts == other.facts and one.about == other.about
    mine, others = arrays_of(one), arrays_of(other)
    assert mine.keys() == others.keys()
    for name, array in mine.items():
        assert array.dtype == others[name].dtype, name
        np.testing.assert_array_equal(array, others[name], err_msg=name)


@pytest.mark.parametrize("name", TABLES)
def test_tables_hold_everything(name, tmp_path, capsys):
    trace = whole()
    save_trace(trace, tmp_path / "t.npz")
    assert command_main("trace")(["export", str(tmp_path / "t.npz"), str(tmp_path / name)]) == 0
    out = capsys.readouterr()
    assert json.loads(out.out.splitlines()[-1])["left_out"] == [] and out.err == ""
    same(open_trace(tmp_path / name), trace)


def test_a_table_is_what_other_programs_take_it_for(tmp_path):
    trace = whole()
    export_trace(trace, tmp_path / "t.csv")
    export_trace(trace, tmp_path / "t.jsonl")
    lines = (tmp_path / "t.csv").read_text().splitlines()
    rows = list(csv.DictReader(lines[1:]))
    first = json.loads((tmp_path / "t.jsonl").read_text().splitlines()[1])
    assert len(rows) == len(trace) == len(lines) - 2
    assert [int(rows[0][f"expert_{i}"]) for i in range(2)] == first["ids"] == trace.ids[0].tolist()
    assert np.float32(rows[0]["score_7"]) == np.float32(first["scores"][7]) == trace.scores[0, 7]
    assert np.float32(rows[0]["lookahead_2_7"]) == np.float32(first["lookahead"]["2"][7]) == trace.lookahead[2][0, 7]
    assert first["phase"] == "prefill" and rows[-1]["phase"] == "1" and rows[-1]["lookahead_2_7"] == ""


@pytest.mark.parametrize(
    ("name", "at", "old", "new", "said"),
    [
        ("t.csv", 3, "0,0,0,0,1,0", "0,0,x,0,1,0", "column phase, line 4: 'x' is not a whole number"),
        ("t.csv", 3, "0,0,0,0,1,0", "0,0,0,1,0", "line 4 has"),
        ("t.csv", 1, "expert_1", "expert_2", "'expert_2' is not known, or out of order"),
        ("t.csv", 1, "weight_0", "wait_0", "'wait_0' is not known"),
        ("t.csv", 0, '"version": 2', '"version": 99', r"version 99 is not supported \(this program reads 1, 2\)"),
        ("t.jsonl", 3, '"phase": "prefill"', '"phase": "pre"', "line 4: not a row of a trace"),
        ("t.jsonl", 3, '"ids": [', '"ids": [9, ', "line 4: ids is not like those of the other lines"),
        ("t.jsonl", 3, '"step": 0', '"step": "0"', "line 4: not a row of a trace"),
        ("t.jsonl", 3, '"step": 0, ', "", "line 4: step is not like those"),
        ("t.jsonl", 3, '"ids"', '"ibs"', "line 4: .*ibs is not known"),
    ],
)
def test_a_damaged_table_names_the_line(name, at, old, new, said, tmp_path):
    export_trace(whole(), tmp_path / name)
    lines = (tmp_path / name).read_text().splitlines(keepends=True)
    assert old in lines[at]
    lines[at] = lines[at].replace(old, new, 1)
    (tmp_path / name).write_text("".join(lines))
    with pytest.raises(UserError, match=f"trace .*{name}: .*({said})"):
        open_trace(tmp_path / name)


def test_what_is_empty_is_an_error_everywhere(tmp_path):
    trace = recorded()
    nothing = trace.select(np.zeros(0, int))
    for name in ("t.csv", "t.jsonl"):
        with pytest.raises(UserError, match="it is empty: no token"):
            export_trace(nothing, tmp_path / name)
        export_trace(trace, tmp_path / name)
        head = (tmp_path / name).read_text().splitlines(keepends=True)[: 2 if name == "t.csv" else 1]
        (tmp_path / name).write_text("".join(head))
        with pytest.raises(UserError, match=f"{name}: it is empty: no token"):
            open_trace(tmp_path / name)
    with pytest.raises(UserError, match="it is empty: no token"):
        save_trace(nothing, tmp_path / "t.npz")
    (tmp_path / "t.txt").write_text("")
    for command in ("check", "info"):
        with pytest.raises(UserError, match="an empty file"):
            command_main("trace")([command, str(tmp_path / "t.txt")])
    assert not (tmp_path / "t.npz").exists()


def test_a_name_must_tell_a_layout_and_a_file_is_not_overwritten_by_itself(tmp_path):
    save_trace(recorded(), tmp_path / "t.npz")
    for out, said in (("t.xyz", "does not tell a layout; say it with --to"), ("t.npz", "one of the files to read")):
        flags = ["--to", "csv"] if out == "t.npz" else []
        with pytest.raises(UserError, match=said):
            command_main("trace")(["export", str(tmp_path / "t.npz"), str(tmp_path / out), *flags])
