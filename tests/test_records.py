"""The promise of stability: files and records of every version there ever was are read, and none changes unsaid."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from cache_state_cases import costs, planner_for
from golden import FOLDER, check
from test_trace_export import whole

from hybrimoe_jax.decide import cache_state
from hybrimoe_jax.decide.systems import get_system
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.machine.virtual import VirtualMachine
from hybrimoe_jax.records import PREFIX, VERSIONS, read_records, stamped
from hybrimoe_jax.simulate.replay import replay, settle
from hybrimoe_jax.simulate.workload import recorded_steps
from hybrimoe_jax.trace import file as trace_file
from hybrimoe_jax.trace.file import arrays_of, save_trace
from hybrimoe_jax.trace.importers import open_trace

FORMATS = Path(__file__).parent / "data" / "formats"
ELSEWHERE = {"bench llamacpp"}
"""Kinds that need another program to be made: none is kept."""


def kept_trace():
    trace = whole()
    trace.about = {"clock": "virtual", "name": "kept"}
    return trace


@pytest.mark.parametrize("path", sorted(FORMATS.glob("trace-*")), ids=lambda path: path.name)
def test_a_trace_of_every_version_is_read(path):
    if path.suffix == ".parquet":
        pytest.importorskip("pyarrow.parquet")
    trace, kept = open_trace(path), kept_trace()
    assert trace.facts == kept.facts and trace.about == kept.about
    mine, others = arrays_of(kept), arrays_of(trace)
    if path.name.startswith("trace-1"):
        del mine["batch"]
    assert mine.keys() == others.keys()
    for name, array in mine.items():
        np.testing.assert_array_equal(array, others[name], err_msg=name)


def test_a_trace_is_written_as_its_version_says(tmp_path):
    """Arrays, their types and the keys of `meta`: a change asks for a new version, and for a file of it."""
    kept = FORMATS / f"trace-{trace_file.VERSION}.npz"
    assert kept.exists() and {f"trace-{n}.npz" for n in range(1, trace_file.VERSION + 1)} <= {
        path.name for path in FORMATS.iterdir()
    }
    save_trace(kept_trace(), tmp_path / "t.npz")
    made, before = np.load(tmp_path / "t.npz"), np.load(kept)
    assert made.files == before.files
    assert [made[name].dtype for name in made.files[1:]] == [before[name].dtype for name in before.files[1:]]
    assert made["meta"] == before["meta"]


def test_a_cache_state_of_every_version_is_read(tmp_path):
    trace, system = kept_trace(), get_system("hybrimoe").override(cache="slru", predictor="previous")
    steps = list(recorded_steps(trace))
    planner, machine = planner_for(system, trace.facts), VirtualMachine(costs())
    replay(planner, machine, steps[:2])
    settle(planner, machine)
    state = cache_state.take_state(planner, trace.facts)
    for version in range(1, cache_state.VERSION + 1):
        kept = cache_state.load_state(FORMATS / f"cache-state-{version}.npz")
        other, again = planner_for(system, trace.facts), planner_for(system, trace.facts)
        kept.restore(other, trace.facts)
        state.restore(again, trace.facts)
        assert [other.resident(n) for n in range(3)] == [planner.resident(n) for n in range(3)]
        for mine, its in zip(planner.policies, other.policies, strict=True):
            values = [(p.step, p.last_used, [p.value(expert) for expert in range(8)]) for p in (mine, its)]
            assert values[0] == values[1]
        went_on = [replay(p, VirtualMachine(costs()), steps[2:]).steps[-1].hits for p in (again, other)]
        assert went_on[0] == went_on[1]
    assert kept.meta.keys() == state.meta.keys()


def test_a_record_of_every_kind_and_version_is_kept_and_read():
    versions = {(kind, n) for kind, newest in VERSIONS.items() if kind not in ELSEWHERE for n in range(1, newest + 1)}
    found = set()
    for path in FOLDER.iterdir():
        (record,) = read_records(path)
        kind = record["kind"].removeprefix(PREFIX)
        found.add((kind, record["version"]))
        assert path.name == f"{kind.replace(' ', '-')}-{record['version']}.json"
    assert found == versions


def test_other_keys_without_a_new_version_are_noticed():
    record = json.loads((FOLDER / "trace-overlap-1.json").read_text())
    check(record)
    row = record["side_by_side"][0]
    for changed in ({**record, "more": 1}, {**record, "side_by_side": [{**row, "more": 1}]}):
        with pytest.raises(AssertionError, match=r"other keys at .*: this asks for a new version"):
            check(changed)
    with pytest.raises(AssertionError, match="no record of this version is kept"):
        check({**record, "version": 99})


def test_what_is_no_record_is_named(tmp_path):
    path, good = tmp_path / "r.jsonl", json.dumps(stamped("trace check", {"rows": 1}))
    refused = {
        "": "it holds no records",
        f"{good}\n{{": "line 2: not JSON",
        f"{good}\n[1]": "line 2: not a record of ours",
        '{"kind": "another", "version": 1}': "its kind is 'another'",
        good.replace('"version": 1', '"version": 2'): r"check version 2 is not known \(this program reads 1 to 1\)",
        good.replace('"version": 1', '"version": true'): "version True is not known",
    }
    for text, said in refused.items():
        path.write_text(text)
        with pytest.raises(UserError, match=said):
            read_records(path)
    path.write_text(f"{good}\n\n{good}\n")
    assert [record["rows"] for record in read_records(path)] == [1, 1]


def test_the_page_names_every_kind_and_version():
    page = (Path(__file__).parents[1] / "docs" / "records.md").read_text()
    rows = re.findall(r"^\| `([a-z0-9 ]+)` \| (\d+) \|", page, re.MULTILINE)
    assert {kind: int(version) for kind, version in rows} == VERSIONS
    assert (
        f"version {trace_file.VERSION} of traces" in page and f"version {cache_state.VERSION} of cache states" in page
    )
