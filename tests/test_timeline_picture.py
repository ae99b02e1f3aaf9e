"""`scripts/timeline_picture.py`: a picture that says what it shows, and whether it was measured, paced or computed."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from hybrimoe_jax.trace.timeline import Timeline

ROOT = Path(__file__).parents[1]


PACED = "by the wall clock, on a paced device; not measured on that machine"


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"clock": "virtual"}, "computed, not measured"),
        ({"clock": "wall"}, "milliseconds, measured"),
        ({"clock": "wall", "device": "paced"}, PACED),
    ],
)
def test_a_picture_names_its_lanes_its_system_and_its_clock(about, said, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(ROOT / "scripts")
    script = importlib.import_module("timeline_picture")
    timeline = Timeline(**about, system="hybrimoe", costs="profile p, model m")
    for step in (0.0, 1.0):
        if about["clock"] == "virtual":
            timeline.add("device", "step", step, step + 0.01)
        timeline.add("device", "attention 0", step + 0.01, step + 0.1)
        timeline.add("device", "shared and residents", step + 0.1, step + 0.5, layer=0, experts=[14, 17])
        timeline.add("cpu", "expert 0.3", step + 0.1, step + 0.9, expert=3, layer=0)
        timeline.add("link", "prefetch 1.5", step + 0.1, step + 0.5, expert=5, layer=1, kind="prefetch")
    timeline.write(tmp_path / "t.json")
    script.main([str(tmp_path / "t.json"), str(tmp_path / "t.svg"), "--step", "1", "--layers", "1"])
    text = (tmp_path / "t.svg").read_text(encoding="utf-8")
    for word in (
        said,
        "CPU",
        "device",
        "link",
        "prefetch",
        "14 17",
        "hybrimoe; profile p, model m: 1 layers of step 1",
    ):
        assert word in text


def test_the_readme_s_picture_says_that_it_is_paced():
    assert PACED in (ROOT / "docs/images/timeline.svg").read_text(encoding="utf-8")
    assert "](docs/images/timeline.svg)" in (ROOT / "README.md").read_text(encoding="utf-8")
