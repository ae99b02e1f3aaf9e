"""Steps of a timeline as bars and as HTML; a timeline that is read back."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.trace.timeline import Timeline
from hybrimoe_jax.trace.timeline_view import as_html, view


@pytest.fixture
def timeline():
    made = Timeline(clock="virtual", system="<mine>", costs="profile p")
    for step in range(3):
        begin = 10.0 + step
        made.add("device", "step", begin, begin + 0.1)
        for layer in (0, 1):
            at = begin + 0.1 + 0.4 * layer
            made.add("device", f"attention {layer}", at, at + 0.1)
            made.add("device", "shared and residents", at + 0.1, at + 0.3, layer=layer, experts=[4, 5])
            made.add("cpu", f"expert {layer}.1", at + 0.1, at + 0.4, layer=layer, expert=1)
            made.add("cpu", f"expert {layer}.2", at + 0.2, at + 0.4, layer=layer, expert=2)
            made.add("link", f"prefetch {layer}.7", at, at + 0.2, layer=layer, expert=7, kind="prefetch")
    return made


def test_steps_begin_where_their_first_event_does(timeline):
    assert [round(start, 6) for start, _ in timeline.steps()] == [0, 1, 2]
    assert Timeline().steps() == []


def test_a_view_is_of_the_steps_that_are_wanted(timeline):
    assert view(timeline).seconds == pytest.approx(0.9)
    assert view(timeline, last=2).seconds == pytest.approx(1.9)
    assert view(timeline, 1).title == "<mine>; profile p: step 1"
    assert view(timeline, -3).title == view(timeline, 0).title
    first = view(timeline, 1, layers=1)
    assert first.seconds == pytest.approx(0.5) and {bar.name for bar in first.bars if bar.lane == "cpu"} == {
        "expert 0.1",
        "expert 0.2",
    }
    assert first.kind == "computed, not measured"
    with pytest.raises(UserError, match="steps 0 to 2"):
        view(timeline, 3)
    with pytest.raises(UserError, match="no events"):
        view(Timeline())
    for name in ("step", "last", "layers"):
        for odd in ("x", 1.5, [1], np.array([1, 2]), True, 10**5000, -10 if name != "step" else 10**30):
            with pytest.raises(UserError, match=name):
                view(timeline, **{name: odd})
    for ask in (timeline.busy, timeline.events):
        for lane in ("nope", None, []):
            with pytest.raises(UserError, match=r"the timeline has no lane .*cpu"):
                ask(lane)


def test_events_that_overlap_share_the_row(timeline):
    bars = {bar.name: bar for bar in view(timeline, 0, layers=1).bars}
    assert (bars["expert 0.1"].low, bars["expert 0.1"].high) == (0.5, 1)
    assert (bars["expert 0.2"].low, bars["expert 0.2"].high) == (0, 0.5)
    assert bars["shared and residents"].experts == [4, 5]
    kinds = {name: bar.kind for name, bar in bars.items()}
    assert kinds["prefetch 0.7"] == "prefetch" and kinds["attention 0"] == "plain"


def test_the_html_is_whole_and_says_what_it_shows(timeline):
    picture = ElementTree.fromstring(as_html(view(timeline)))
    said = [text for text in picture.itertext() if text.strip()]
    assert "<mine>; profile p: step 2; computed, not measured" in said
    assert "shared and residents: experts 4 5, 200 ms" in said
    assert timeline._repr_html_().startswith("<svg") and "no" not in Timeline()._repr_html_()


def test_a_timeline_is_read_back(timeline, tmp_path):
    timeline.write(tmp_path / "t.json")
    again = Timeline.read(tmp_path / "t.json")
    assert again.about == timeline.about and again.lanes == timeline.lanes
    for lane in timeline.lanes:
        for one, two in zip(timeline.events(lane), again.events(lane), strict=True):
            assert two[:2] == pytest.approx(one[:2], abs=1e-8) and two[2:] == one[2:]
    assert again.tracks(event[:2] for event in again.events("device")) == [0] * len(again.events("device"))
    (tmp_path / "other.json").write_text('{"traceEvents": [{}]}')
    with pytest.raises(UserError, match=r"other\.json"):
        Timeline.read(tmp_path / "other.json")


def test_a_table_has_a_row_an_event(timeline):
    rows = timeline.table()
    assert len(rows) == len(timeline)
    assert list(rows["event"][:2]) == ["step", "prefetch 0.7"] or list(rows["event"][:2]) == ["step", "attention 0"]


def test_a_plot_shows_lanes_and_whose_times(timeline):
    pytest.importorskip("matplotlib")
    assert "99 layers" not in timeline.plot(0, layers=99).get_title()
    axes = timeline.plot(last=2)
    assert axes.get_xlabel() == "milliseconds, computed, not measured"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["link", "device", "CPU"]
    from matplotlib import pyplot

    pyplot.close("all")
