"""`python scripts/timeline_picture.py run.json timeline.svg`: a picture of some layers of a timeline file.

The file is what `generate --timeline` or `simulate --timeline` wrote. Needs matplotlib (the extra `plots`).
The picture says whether its times were measured, paced or computed. That of the README:

    python -m hybrimoe_jax.generate --prompt "To be, or not to be" --max-tokens 64 --device paced:a6000-paper:8 \
        --cost-shape qwen2-57b-a14b --timeline run.json
    python scripts/timeline_picture.py run.json docs/images/timeline.svg --step 23 --layers 6
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # the backend comes first
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from hybrimoe_jax.cli import first_paragraph

LANES = ("link", "device", "cpu")
COLOURS = {"cpu": "#E69F00", "device": "#0072B2", "link": "#009E73"}
PLAIN = "0.75"
"""Attention, shared experts, the head: what is no routed expert."""
CLOCKS = {
    "virtual": "computed, not measured",
    "paced": "by the wall clock, on a paced device; not measured on that machine",
    "wall": "measured",
}
Event = dict[str, Any]


def read(path: Path) -> tuple[list[Event], dict[str, Any]]:
    """The events with times in milliseconds, and what the file says of itself."""
    file = json.loads(path.read_text(encoding="utf-8"))
    events = [event for event in file["traceEvents"] if event["ph"] == "X"]
    for event in events:
        event["start"], event["end"] = event["ts"] / 1e3, (event["ts"] + event["dur"]) / 1e3
    return events, file["otherData"]


def window(events: list[Event], step: int, layers: int) -> tuple[float, float]:
    """Begin and end of the first `layers` layers of a step."""
    first = "step" if any(event["name"] == "step" for event in events) else "attention 0"
    begins = sorted(event["start"] for event in events if event["name"] == first)
    begin = begins[step]
    last = max(event["end"] for event in events)
    step_end = begins[step + 1] if step + 1 < len(begins) else last
    later = [e["start"] for e in events if e["name"].startswith("attention") and begin <= e["start"] < step_end]
    return begin, sorted(later)[layers] if layers < len(later) else step_end


def experts_of(event: Event) -> list[int]:
    """The routed experts that an event is of: a program may have run several."""
    about = event["args"]
    return [about["expert"]] if "expert" in about else about.get("experts", [])


def draw(axes: Axes, events: list[Event], begin: float, end: float) -> None:
    for event in events:
        start, stop = max(event["start"], begin), min(event["end"], end)
        if stop <= start:
            continue
        row, routed = LANES.index(event["cat"]), experts_of(event)
        prefetch = event["args"].get("kind") == "prefetch"
        colour = COLOURS[event["cat"]] if routed else PLAIN
        if prefetch:
            axes.barh(row, stop - start, left=start - begin, color="white", edgecolor=colour, hatch="/////", lw=0.6)
        else:
            axes.barh(row, stop - start, left=start - begin, color=colour, edgecolor="white", lw=0.6)
        if routed and not prefetch and stop - start > 0.018 * (end - begin):
            middle = (start + stop) / 2 - begin
            text = " ".join(map(str, routed))
            axes.text(middle, row, text, ha="center", va="center", fontsize=6.5, color="white")


def picture(path: Path, out: Path, step: int, layers: int) -> None:
    """Writes the picture; its format is that of the name's ending."""
    events, about = read(path)
    begin, end = window(events, step, layers)
    plt.rcParams.update({"font.size": 8, "hatch.linewidth": 0.8, "svg.hashsalt": "timeline", "svg.fonttype": "none"})
    figure, axes = plt.subplots(figsize=(8.4, 2.5))
    draw(axes, events, begin, end)
    for event in events:
        if event["name"].startswith("attention") and begin < event["start"] < end:
            axes.axvline(event["start"] - begin, color="0.6", lw=0.6, ls=":")
    kind = CLOCKS[about.get("device", about["clock"])]
    axes.set_yticks(range(len(LANES)), ["link", "device", "CPU"])
    axes.set_xlim(0, end - begin)
    axes.set_xlabel(f"milliseconds, {kind}")
    axes.set_title(f"{about['system']}: {layers} layers of one decode step; {about['costs']}", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        handles=[
            Patch(color=COLOURS["cpu"], label="expert on the CPU"),
            Patch(color=COLOURS["device"], label="expert on the device"),
            Patch(color=COLOURS["link"], label="fetch"),
            Patch(facecolor="white", edgecolor=COLOURS["link"], hatch="/////", label="prefetch"),
            Patch(color=PLAIN, label="attention, shared experts, head"),
        ],
        ncols=5, fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.25),
    )  # fmt: skip
    figure.savefig(out, bbox_inches="tight", metadata={"Date": None} if out.suffix == ".svg" else None)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=first_paragraph(__doc__))
    parser.add_argument("timeline", type=Path, help="a file that --timeline wrote")
    parser.add_argument("out", type=Path, help="the picture, .svg or .png")
    parser.add_argument("--step", type=int, default=1, help="the step that is shown; 0 is the prompt (default 1)")
    parser.add_argument("--layers", type=int, default=4, help="its first layers (default 4)")
    args = parser.parse_args(argv)
    picture(args.timeline, args.out, args.step, args.layers)


if __name__ == "__main__":
    main()
