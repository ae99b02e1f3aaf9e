"""Traces as tables: what additions they hold, and that a small file costs no more than it holds."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc

import numpy as np
import pytest
from test_trace_command import recorded

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.trace.export import export_trace
from hybrimoe_jax.trace.importers import open_trace

COLUMNS = "step,layer,phase,sequence,position,expert_0,expert_1"
HEAD = {
    "format": "hybrimoe-trace",
    "version": 2,
    "facts": {"model_type": "toy", "layers": 2, "experts": 32, "top_k": 2, "expert_bytes": {}},
}
MOST = 200 << 20
"""Bytes that reading one of these files may take."""


def csv_file(path, rows=3, columns=COLUMNS, change=None, **head):
    lines = [f"{step},0,1,0,{step},0,1" for step in range(rows)]
    lines[-1] = (change or str)(lines[-1])
    path.write_text("\n".join((f"# {json.dumps({**HEAD, **head})}", columns, *lines)) + "\n")
    return path


def jsonl_file(path, rows: int, ahead, layers: int = 2, experts: int = 32):
    lines = [{**HEAD, "facts": {**HEAD["facts"], "layers": layers, "experts": experts}}]
    for step in range(rows):
        row = {"step": step, "layer": 0, "phase": "decode", "sequence": 0, "position": step, "ids": [0, 1]}
        lines.append({**row, "lookahead": {ahead(step): [0.5] * experts}})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def refused(path, said: str) -> None:
    """Within the memory that a file of this size may ask for."""
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=said):
            open_trace(path)
        assert tracemalloc.get_traced_memory()[1] < MOST
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "columns, change, said",
    [
        (COLUMNS, lambda line: "0" * 100_000 + "x" + line, r"column step, line 6002: .*is not a whole number"),
        (COLUMNS, lambda line: line + "_0", "column expert_1, line 6002: '1_0' is not a number"),
        (COLUMNS, lambda line: line[:-1] + "\u0661", "column expert_1, line 6002: '\u0661' is not a number"),
        (f"{COLUMNS},step", lambda line: line + ",0", "line 2: column step is there twice"),
        (COLUMNS.replace("1", "\u0661"), lambda line: line, "line 2: column 'expert_\u0661' is not known"),
        (COLUMNS.replace("_1", "_01"), lambda line: line, "line 2: column 'expert_01' is not known"),
    ],
)
def test_a_cell_that_is_no_number_is_named(tmp_path, columns, change, said):
    path = csv_file(tmp_path / "t.csv", 6000 if columns == COLUMNS else 1, columns, change)
    refused(path, f"t.csv: {said}")


def test_a_wide_number_is_a_number(tmp_path):
    path = csv_file(tmp_path / "t.csv", 6000, COLUMNS + ",weight_0,weight_1", lambda line: line)
    text = path.read_text().replace(",0,1\n", ",0,1,0.5,0.5\n").replace("0.5\n", "0." + "25" * 50_000 + "\n", 1)
    path.write_text(text)
    tracemalloc.start()
    assert open_trace(path).weights[0, 1] == np.float32(25 / 99)
    assert tracemalloc.get_traced_memory()[1] < MOST
    tracemalloc.stop()


@pytest.mark.parametrize(
    "layers, ahead, said",
    [
        (2, lambda step: str(step + 1), "line 3: .*lookahead '2': a distance from 1 to 1 layers is needed"),
        (4096, lambda step: str(step + 1), "lookahead_[0-9]+: so few lines have it that the table would be far larger"),
        (2, lambda step: "01", "line 2: .*lookahead '01': a distance from 1"),
        (2, lambda step: "\u0661", "line 2: .*a distance from 1"),
        (2, lambda step: "x", "line 2: .*lookahead 'x': a distance from 1"),
    ],
)
def test_lookahead_is_of_layers_that_there_are(tmp_path, layers, ahead, said):
    refused(jsonl_file(tmp_path / "t.jsonl", 3000, ahead, layers), f"t.jsonl: {said}")


def test_a_distance_that_few_rows_have_is_absent_elsewhere(tmp_path):
    trace = open_trace(jsonl_file(tmp_path / "t.jsonl", 40, lambda step: str(1 + step % 8), 9))
    assert sorted(trace.lookahead) == [*range(1, 9)]
    for distance, rows in trace.lookahead.items():
        assert np.array_equal(~np.isnan(rows).any(axis=1), np.arange(40) % 8 == distance - 1)


@pytest.mark.parametrize(
    "dtype, values, said",
    [
        ("U100000", ["a"] * 20_000, "20000 values of <U100000 would take far more memory than the file"),
        *(
            (kind, [1], "its dtype is .*numbers or texts is needed")
            for kind in ("O", "T", "i4,i4", "M8[s]", "(((", None)
        ),
        ("U2", ["abc"], "'abc' stands among values of <U2"),
        ("i4", [1.5], "1.5 stands among values of int32"),
        ("i4", [[1], [1, 2]], r"\[1\] stands among values of int32"),
        ("i1", [300], "300 out of bounds"),
        ("f4", ["x"], "could not convert"),
    ],
)
def test_an_addition_is_what_its_type_says(tmp_path, dtype, values, said):
    path = csv_file(tmp_path / "t.csv", extra={"more": {"dtype": dtype, "values": values}})
    refused(path, f"t.csv: its `extra` is damaged .*{said}")


@pytest.mark.parametrize("layout", ["csv", "jsonl"])
def test_additions_come_back_as_they_were_or_are_refused_by_name(tmp_path, layout):
    held = {
        "text": np.array("hello"),
        "texts": np.array([["a", ""], ["\u00e9", "bcd"]]),
        "odd": np.array([np.nan, np.inf, -np.inf, 0.1], np.float32),
        "half": np.array(np.nan, np.float16),
        "none": np.zeros((0, 3), np.int8),
        "big": np.array([2**64 - 1], np.uint64),
        "other order": np.arange(3, dtype=">i4"),
        "flags": np.array([True, False]),
    }
    path = tmp_path / f"t.{layout}"
    export_trace(dataclasses.replace(recorded(), extra=held), path)
    back = open_trace(path).extra
    for name, array in held.items():
        assert back[name].dtype == array.dtype, name
        np.testing.assert_array_equal(back[name], array, strict=True)
    path.unlink()
    for array in (np.zeros(3, "i4,f4"), np.ones(2, np.complex64), np.array([b"a"]), np.zeros(2, "M8[s]")):
        with pytest.raises(
            UserError, match=r"array x_odd holds .*; a table has numbers and texts only, so leave it out"
        ):
            export_trace(dataclasses.replace(recorded(), extra={"odd": array}), path)
    assert not path.exists()


def test_parquet_columns_are_judged_before_they_are_read(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    export_trace(recorded(), tmp_path / "t.parquet")
    table = parquet.read_table(tmp_path / "t.parquet")
    rows = table.num_rows
    texts = arrow.array(["a" * 1_000_000] * rows).dictionary_encode()
    changed = {
        "column 'junk' is not known": table.append_column("junk", texts),
        "column ids holds dictionary": table.drop_columns(["ids"]).append_column("ids", texts),
        "column step holds double": table.drop_columns(["step"]).append_column("step", arrow.array(np.zeros(rows))),
        "column weights holds fixed_size_list.*int32": table.drop_columns(["weights"]).append_column(
            "weights", table["ids"]
        ),
        "a column is there twice": table.append_column("step", table["step"]),
        "would unpack to": table.append_column("lookahead_9", arrow.nulls(rows, arrow.list_(arrow.float32(), 10**7))),
    }
    for said, other in changed.items():
        parquet.write_table(other, tmp_path / "other.parquet")
        refused(tmp_path / "other.parquet", f"other.parquet: its columns are not those of a trace .*{said}")
