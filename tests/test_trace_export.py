"""`trace export`: what was written is read back, and what a layout cannot hold is said."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys

import golden
import numpy as np
import pytest
from test_trace_command import recorded, written

from hybrimoe_jax.__main__ import command_main
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.simulate.recorded import replay_run
from hybrimoe_jax.trace.columns import Trace
from hybrimoe_jax.trace.export import export_trace
from hybrimoe_jax.trace.facts import MODELS, TraceFacts
from hybrimoe_jax.trace.file import arrays_of, save_trace
from hybrimoe_jax.trace.importers import open_trace
from hybrimoe_jax.trace.tokens import by_token

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
    said = json.loads(out.out.splitlines()[-1])
    golden.check(said)
    assert said["left_out"] == [] and out.err == ""
    same(open_trace(tmp_path / name), trace)
    assert command_main("trace")(["check", str(tmp_path / name)]) == 0
    golden.check(json.loads(capsys.readouterr().out.splitlines()[-1]))


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


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_a_number_beyond_float32_is_refused(name, tmp_path):
    export_trace(whole(), tmp_path / name)
    lines = (tmp_path / name).read_text().splitlines(keepends=True)
    if name == "t.csv":
        cells = lines[3].split(",")
        cells[lines[1].split(",").index("weight_0")] = "1e300"
        lines[3] = ",".join(cells)
    else:
        row = json.loads(lines[3])
        lines[3] = json.dumps({**row, "weights": [1e300, *row["weights"][1:]]}) + "\n"
    (tmp_path / name).write_text("".join(lines))
    with pytest.raises(UserError, match="a number in it is beyond what float32 holds"):
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
    with pytest.raises(UserError, match="it is empty: no token"):
        replay_run(nothing)
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


def without_pyarrow(monkeypatch) -> None:
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)


def test_parquet_without_pyarrow_is_the_pip_line(tmp_path, monkeypatch):
    without_pyarrow(monkeypatch)
    (tmp_path / "t.parquet").write_bytes(b"PAR1...")
    save_trace(recorded(), tmp_path / "t.npz")
    for arguments in (["export", "t.npz", "new.parquet"], ["check", "t.parquet"]):
        with pytest.raises(UserError, match=r"Parquet needs the extra: pip install 'hybrimoe-jax\[parquet\]'"):
            command_main("trace")([arguments[0], *(str(tmp_path / name) for name in arguments[1:])])
    assert not (tmp_path / "new.parquet").exists()


def test_parquet_holds_everything(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    trace = whole()
    assert export_trace(trace, tmp_path / "t.parquet") == []
    same(open_trace(tmp_path / "t.parquet"), trace)
    table = parquet.read_table(tmp_path / "t.parquet")
    assert table["ids"][0].as_py() == trace.ids[0].tolist() and table["scores"].null_count == (trace.step == 1).sum()
    parquet.write_table(table.replace_schema_metadata(None), tmp_path / "other.parquet")
    parquet.write_table(table.slice(0, 0), tmp_path / "none.parquet")
    parquet.write_table(table.drop_columns(["ids"]), tmp_path / "no-ids.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "t.parquet").read_bytes()[:900])
    refused = {
        "other": "without the metadata",
        "none": "it is empty",
        "no-ids": "lacks the array ids",
        "cut": "readable",
    }
    for name, said in refused.items():
        with pytest.raises(UserError, match=f"{name}.parquet: .*{said}"):
            open_trace(tmp_path / f"{name}.parquet")


PUBLIC = {
    "esft": ("esft", "task"),
    "esft-npz": ("esft.npz", "new.npz"),
    "fingerprint": ("fingerprint", "new.json"),
    "fingerprint-npz": ("fingerprint.npz", "one/new.npz"),
    "route-csv": ("route", "new.csv.gz"),
}
"""Layout: as `written` calls it, and where it is exported to."""


@pytest.mark.parametrize("layout", PUBLIC)
def test_what_came_from_a_public_layout_goes_back_to_it(layout, tmp_path):
    """Every column; of a file of that layout nothing is left out."""
    source, out = PUBLIC[layout]
    (tmp_path / "from").mkdir()
    (tmp_path / "to" / "one").mkdir(parents=True)
    trace = open_trace(written(source, tmp_path / "from"))
    assert export_trace(trace, tmp_path / "to" / out, layout) == []
    back = open_trace(tmp_path / "to" / out)
    same(back, dataclasses.replace(trace, about={**trace.about, **{k: back.about[k] for k in ("file", "model")}}))


def live(name: str, model: str | None = None) -> Trace:
    """A run of a model's shape with all that a live trace has: two sequences side by side, prompts of 3 and 2."""
    facts = MODELS[model] if model else TraceFacts(name, 3, 8, 2)
    trace = recorded(((3, 2), (1, 1), (1, 1)), facts.layers, facts.experts, facts.top_k)
    return dataclasses.replace(
        trace,
        facts=facts,
        batch=np.zeros(len(trace), np.int32),
        about={"system": "hybrimoe"},
        extra={"own": np.ones(1)},
    )


COMMON = [
    "full router scores",
    "lookahead predictions",
    "which sequences ran side by side",
    "additions: own",
    "what the trace says of its origin",
]
LIVE = {
    "esft": ("DeepSeek-V2-Lite", ["that 4 tokens were decoded: each sequence is one prefill step"]),
    "esft-npz": (
        "DeepSeek-V2-Lite",
        ["that 4 tokens were decoded: each sequence is one prefill step", "digits of weights behind the fourth"],
    ),
    "fingerprint": (
        "gpt-oss-20b",
        ["5 tokens of prompts: a reply has decoded tokens only", "which tokens ran in one step"],
    ),
    "fingerprint-npz": (
        "gpt-oss-20b",
        ["5 tokens of prompts: a reply has decoded tokens only", "which tokens ran in one step"],
    ),
    "route-csv": (None, ["which tokens ran in one step", "that residency is unknown: its column is 0 throughout"]),
}


@pytest.mark.parametrize("layout", LIVE)
def test_of_a_live_run_what_is_left_out_is_said_and_the_rest_kept(layout, tmp_path, capsys):
    model, left_out = LIVE[layout]
    trace = live("toy", model)
    save_trace(trace, tmp_path / "t.npz")
    command_main("trace")(["export", str(tmp_path / "t.npz"), str(tmp_path / "out"), "--to", layout])
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1])["left_out"] == COMMON + left_out
    assert printed.err.splitlines() == [f"{layout} cannot hold {what}" for what in COMMON + left_out]
    back = open_trace(tmp_path / "out")
    kept = trace.select(trace.phase == 1) if "fingerprint" in layout else trace
    mine, others = by_token(kept), by_token(back)
    for name in ("sequence", "position", "ids"):
        assert np.array_equal(getattr(mine, name), getattr(others, name)), name
    np.testing.assert_allclose(others.weights, mine.weights, atol=6e-5 if layout == "esft-npz" else 0)
    if "esft" not in layout:
        assert np.array_equal(mine.phase, others.phase)
    assert back.facts.layers == trace.facts.layers and back.facts.model_type == trace.facts.model_type


def refusals():
    prompts = live("toy", "gpt-oss-20b")
    prompts = prompts.select(prompts.phase == 0)
    gap = live("toy", "gpt-oss-20b")
    gap.position[gap.step == 2] += 3
    missing = live("toy")
    missing = missing.select(~((missing.step == 1) & (missing.layer == 1)))
    engine = live("toy")
    rows = (len(engine), 2)
    unfit = [
        ("residency", np.zeros(3, int)),
        ("residency", np.full(rows, 200)),
        ("residency", np.full(rows, "a")),
        ("residency", np.array(1)),
        ("layer_bytes", np.full(3, np.nan)),
        ("layer_bytes", np.full(3, -1)),
        ("layer_bytes", np.ones(4, int)),
        ("layer_bytes", np.full(3, 2**31)),
    ]
    heavy = dataclasses.replace(engine.facts, expert_bytes={"as-stored": 2**31})
    return [
        *(
            (
                "route-csv",
                dataclasses.replace(engine, extra={name: array}),
                rf"array x_{name} is \S+ \[.*: leave it out",
            )
            for name, array in unfit
        ),
        ("route-csv", dataclasses.replace(engine, facts=heavy), "an expert of 2147483648 bytes; the layout holds"),
        ("esft", live("toy"), "the ESFT layout is of DeepSeek-V2-Lite alone: 26 MoE layers of 64 experts, 6 a token"),
        ("fingerprint", live("toy"), "of gpt-oss alone .*this trace has 3 MoE layers of 8 experts, 2 a token"),
        ("fingerprint", prompts, "the trace lacks decode steps"),
        ("fingerprint-npz", gap, "position 7 of sequence 0 comes after 3"),
        ("route-csv", missing, "the trace lacks layer 1 of position 3, sequence 0; the layout needs all layers"),
        ("route-csv", dataclasses.replace(live("toy"), weights=None), "lacks router weights, which the layout needs"),
    ]


@pytest.mark.parametrize(("layout", "trace", "said"), refusals())
def test_what_a_layout_cannot_be_given_is_said(layout, trace, said, tmp_path):
    with pytest.raises(UserError, match=said):
        export_trace(trace, tmp_path / "out", layout)
    assert not any(tmp_path.iterdir())


def test_files_of_others_are_not_taken_over(tmp_path):
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="the folder is not empty"):
        export_trace(live("toy", "DeepSeek-V2-Lite"), tmp_path / "task", "esft")
    (tmp_path / "meta.jsonl").write_text("mine")
    with pytest.raises(UserError, match="it would be taken for this trace's"):
        export_trace(live("toy", "gpt-oss-20b"), tmp_path / "t.npz", "fingerprint-npz")
