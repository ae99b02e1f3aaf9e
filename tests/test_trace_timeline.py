"""Timelines: busy time is a union, and the file is one that Perfetto can show: named tracks, no partial overlap."""

from __future__ import annotations

import itertools
import json
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.files import replacing
from hybrimoe_jax.trace.timeline import LANES, Timeline


def written(timeline: Timeline, path) -> dict:
    timeline.write(path)
    return json.loads(path.read_text(encoding="utf-8"))


def test_file_has_lanes_events_and_says_which_clock(tmp_path):
    timeline = Timeline(clock="virtual", system="hybrimoe", executor="overlapped")
    timeline.add("cpu", "expert 0.3", 100.001, 100.004, layer=0, expert=np.int64(3), load=np.float32(2))
    timeline.add("device", "shared", 100.0, 100.0025)
    timeline.add("link", "prefetch 1.7", 100.002, 100.005)
    raw = written(timeline, tmp_path / "t.json")
    assert raw["otherData"]["clock"] == "virtual" and raw["otherData"]["system"] == "hybrimoe"
    assert raw["otherData"]["span_s"] == pytest.approx(0.005)
    assert raw["otherData"]["busy_s"] == pytest.approx({"cpu": 0.003, "device": 0.0025, "link": 0.003})
    names = {e["tid"]: e["args"]["name"] for e in raw["traceEvents"] if e["name"] == "thread_name"}
    assert sorted(names.values()) == sorted(LANES)
    shown = {e["name"]: e for e in raw["traceEvents"] if e["ph"] == "X"}
    assert {n: names[e["tid"]] for n, e in shown.items()} == {
        "expert 0.3": "cpu",
        "shared": "device",
        "prefetch 1.7": "link",
    }
    assert shown["shared"]["ts"] == 0 and shown["shared"]["dur"] == 2500
    assert shown["expert 0.3"]["ts"] == 1000 and shown["expert 0.3"]["dur"] == 3000
    assert shown["expert 0.3"]["args"] == {"layer": 0, "expert": 3, "load": 2.0}
    assert {e["pid"] for e in raw["traceEvents"]} == {1}


def test_busy_is_the_union_of_intervals():
    timeline = Timeline()
    for start, end in ((5, 7), (1, 3), (2, 4), (2.5, 2.6), (4, 4.5), (6, 6)):
        timeline.add("cpu", "work", start, end)
    assert timeline.busy("cpu") == pytest.approx(3.5 + 2)
    assert timeline.busy("link") == 0
    assert timeline.span == 6


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 10)), max_size=30))
def test_busy_agrees_with_counting_and_tracks_never_overlap(tmp_path_factory, spans):
    timeline = Timeline()
    for start, length in spans:
        timeline.add("cpu", "work", start * 1e-3, (start + length) * 1e-3)
    covered = {tick for start, length in spans for tick in range(start, start + length)}
    assert timeline.busy("cpu") == pytest.approx(len(covered) * 1e-3)
    raw = written(timeline, tmp_path_factory.mktemp("t") / "t.json")
    shown = [e for e in raw["traceEvents"] if e["ph"] == "X"]
    assert len(shown) == len(spans) == len(timeline)
    key = lambda e: e["tid"]  # noqa: E731
    for _, track in itertools.groupby(sorted(shown, key=key), key):
        ordered = sorted(track, key=lambda e: (e["ts"], e["ts"] + e["dur"]))
        assert all(a["ts"] + a["dur"] <= b["ts"] + 1e-6 for a, b in itertools.pairwise(ordered))


def test_overlapping_work_gets_a_second_named_track(tmp_path):
    timeline = Timeline()
    timeline.add("cpu", "a", 0.0, 2.0)
    timeline.add("cpu", "b", 1.0, 3.0)
    timeline.add("cpu", "c", 2.0, 4.0)
    raw = written(timeline, tmp_path / "t.json")
    names = {e["tid"]: e["args"]["name"] for e in raw["traceEvents"] if e["name"] == "thread_name"}
    tracks = {e["name"]: names[e["tid"]] for e in raw["traceEvents"] if e["ph"] == "X"}
    assert tracks == {"a": "cpu", "b": "cpu 2", "c": "cpu"}


def test_threads_may_add_at_once():
    timeline = Timeline()

    def work(lane: str) -> None:
        for i in range(2000):
            timeline.add(lane, "x", i, i + 0.5)

    workers = [threading.Thread(target=work, args=(lane,)) for lane in (*LANES, "cpu")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(timeline) == 8000 and timeline.busy("cpu") == pytest.approx(1000)


def test_events_are_relative_and_ordered():
    timeline = Timeline(lanes=("link 1", "link 2"))
    timeline.add("link 2", "late", 12.0, 13.0)
    timeline.add("link 2", "early", 11.0, 12.0, bytes=5)
    timeline.add("link 1", "first", 10.0, 10.5)
    assert timeline.events("link 2") == [(1.0, 2.0, "early", {"bytes": 5}), (2.0, 3.0, "late", {})]


def test_wrong_events_are_refused():
    timeline = Timeline()
    with pytest.raises(ValueError, match=r"'back' on lane cpu ends at 1.0 before"):
        timeline.add("cpu", "back", 2.0, 1.0)
    with pytest.raises(ValueError, match="ends at nan"):
        timeline.add("cpu", "nan", 2.0, float("nan"))
    with pytest.raises(ValueError, match="no lane 'gpu'"):
        timeline.add("gpu", "x", 0.0, 1.0)
    assert len(timeline) == 0


def test_empty_timeline_is_a_valid_file(tmp_path):
    raw = written(Timeline(clock="wall"), tmp_path / "t.json")
    assert raw["otherData"]["span_s"] == 0 and not [e for e in raw["traceEvents"] if e["ph"] == "X"]


def test_writing_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "t.json"
    path.write_text("kept")
    broken = Timeline()
    broken.add("cpu", "x", 0.0, 1.0, value=float("inf"))
    with pytest.raises(ValueError):
        broken.write(path)
    assert path.read_text() == "kept" and [p.name for p in tmp_path.iterdir()] == ["t.json"]
    with pytest.raises(UserError, match=r"nowhere/t.json: cannot be written \(No such file"):
        Timeline().write(tmp_path / "nowhere" / "t.json")
    with pytest.raises(FileNotFoundError, match="source"), replacing(path):  # not what was to be written
        (tmp_path / "source").read_text()
    assert path.read_text() == "kept" and [p.name for p in tmp_path.iterdir()] == ["t.json"]
