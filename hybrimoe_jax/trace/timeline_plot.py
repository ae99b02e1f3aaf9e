"""Some steps of a timeline, drawn with matplotlib."""

from __future__ import annotations

import importlib
from typing import Any

from hybrimoe_jax.figures import LANE_COLOURS, WIDTH, axes_of
from hybrimoe_jax.trace.timeline_view import PLAIN, View, lane_kind

NAMES = {"cpu": "CPU", "device": "device", "link": "link"}


def draw(shown: View, ax: Any = None) -> Any:
    """Draws a row a lane; expert numbers where they fit. Returns the axes."""
    with axes_of(ax, height=0.9 + 0.4 * len(shown.lanes), width=2 * WIDTH) as axes:
        for bar in shown.bars:
            _bar(axes, bar, shown)
        for start in shown.layers:
            axes.axvline(1e3 * start, color="0.6", lw=0.5, ls=":")
        axes.set_yticks(
            [len(shown.lanes) - 1 - row for row in range(len(shown.lanes))],
            [" ".join([*lane.split()[:-1], NAMES.get(lane_kind(lane), lane)]) for lane in shown.lanes],
        )
        axes.set_xlim(0, 1e3 * shown.seconds)
        axes.set_ylim(-0.5, len(shown.lanes) - 0.5)
        axes.set_xlabel(f"milliseconds, {shown.kind}")
        axes.set_title(shown.title, fontsize=7)
        _legend(axes, -0.9 / len(shown.lanes))
    return axes


def _bar(axes: Any, bar: Any, shown: View) -> None:
    lane = lane_kind(bar.lane)
    colour = PLAIN if bar.kind == "plain" else LANE_COLOURS.get(lane, PLAIN)
    row = len(shown.lanes) - 1 - shown.lanes.index(bar.lane) - 0.4
    place = {"bottom": row + 0.8 * bar.low, "height": 0.8 * (bar.high - bar.low)}
    middle, begin, width = place["bottom"] + place["height"] / 2, 1e3 * bar.start, 1e3 * (bar.end - bar.start)
    share = (bar.end - bar.start) / (shown.seconds or 1.0)
    style = {"height": place["height"], "left": begin, "lw": 0.4 if share > 0.004 else 0}
    if bar.kind == "prefetch":
        axes.barh(middle, width, color="white", edgecolor=colour, hatch="/////", **style)
    else:
        axes.barh(middle, width, color=colour, edgecolor="white", **style)
    text = " ".join(map(str, bar.experts))
    if bar.kind == "expert" and share > 0.011 * len(text) and place["height"] > 0.25:
        colour = "white" if lane == "device" else "black"
        axes.text(begin + width / 2, middle, text, ha="center", va="center", fontsize=5.5, color=colour)


def _legend(axes: Any, below: float) -> None:
    patch = importlib.import_module("matplotlib.patches").Patch
    handles = [
        patch(color=LANE_COLOURS["cpu"], label="expert on the CPU"),
        patch(color=LANE_COLOURS["device"], label="expert on the device"),
        patch(color=LANE_COLOURS["link"], label="fetch"),
        patch(facecolor="white", edgecolor=LANE_COLOURS["link"], hatch="/////", label="prefetch"),
        patch(color=PLAIN, label="attention, shared experts, head"),
    ]
    axes.legend(handles=handles, ncols=5, fontsize=6, loc="upper center", bbox_to_anchor=(0.5, below))
