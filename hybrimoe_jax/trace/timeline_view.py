"""Some steps of a timeline as bars, and as an HTML picture that needs nothing but a browser or a notebook."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import NamedTuple

from hybrimoe_jax import arguments
from hybrimoe_jax.errors import UserError, shown
from hybrimoe_jax.figures import LANE_COLOURS
from hybrimoe_jax.trace.timeline import Timeline

CLOCKS = {
    "virtual": "computed, not measured",
    "paced": "by the wall clock, on a paced device; not measured on that machine",
    "wall": "measured",
}
PLAIN = "#BFBFBF"
"""Attention, shared experts, the head: what is no routed expert."""

WIDTH, LEFT, ROW, NARROWEST = 900, 60, 30, 14


class Bar(NamedTuple):
    """One event in the window, in seconds from its begin. `low`, `high`: its place within the lane's row, 0 to 1.

    `experts`: the routed ones that it is of; `kind`: "expert", "prefetch" or "plain".
    """

    lane: str
    low: float
    high: float
    start: float
    end: float
    name: str
    experts: list[int]
    kind: str


class View(NamedTuple):
    """Steps of a timeline. `seconds` in all; `layers`: where layers begin; `title`: what is shown, and whose times."""

    lanes: tuple[str, ...]
    bars: list[Bar]
    seconds: float
    layers: list[float]
    title: str
    kind: str


def view(timeline: Timeline, step: int | None = None, last: int = 1, layers: int | None = None) -> View:
    """The `last` steps, or step number `step` (0 is the first, -1 the last), of which `layers` are shown.

    UserError where there is no such step.
    """
    begin, end, said = window(timeline, step, last, layers)
    about = timeline.about
    whose = "; ".join(str(about[name]) for name in ("system", "costs") if about.get(name))
    lanes = tuple(reversed(timeline.lanes))
    return View(
        lanes,
        [bar for lane in lanes for bar in bars_of(timeline, lane, begin, end)],
        end - begin,
        sorted({start - begin for start in layer_starts(timeline) if begin < start < end}),
        f"{whose + ': ' if whose else ''}{said}",
        CLOCKS.get(about.get("device", about.get("clock", "")), "clock not told"),
    )


def window(timeline: Timeline, step: int | None, last: int, layers: int | None) -> tuple[float, float, str]:
    """(begin, end, what it is) of the steps that are wanted."""
    steps = timeline.steps()
    if not len(timeline):
        raise UserError("the timeline has no events")
    if not steps:
        return 0.0, timeline.span, "all of it"
    if step is None:
        last = arguments.whole("last", last, 1)
        first = max(0, len(steps) - last)
        begin, end = steps[first][0], steps[-1][1]
        said = f"step {first}" if first == len(steps) - 1 else f"steps {first} to {len(steps) - 1}"
    else:
        step = arguments.whole("step", step)
        if not -len(steps) <= step < len(steps):
            raise UserError(f"step {shown(step)}: the timeline has steps 0 to {len(steps) - 1}")
        begin, end = steps[step]
        said = f"step {step % len(steps)}"
    if layers is not None:
        layers = arguments.whole("layers", layers, 1)
        later = sorted(start for start in layer_starts(timeline) if begin <= start < end)
        end, said = (later[layers] if layers < len(later) else end), f"{min(layers, len(later))} layers of {said}"
    return begin, end, said


def layer_starts(timeline: Timeline) -> list[float]:
    """When attention begins."""
    device = timeline.events(timeline.device_lane)
    return [start for start, _, name, _ in device if name.startswith("attention")]


def bars_of(timeline: Timeline, lane: str, begin: float, end: float) -> Iterator[Bar]:
    """A lane's events in the window; those that overlap share the row's height."""
    shown = [event for event in timeline.events(lane) if event[1] > begin and event[0] < end]
    tracks = timeline.tracks((start, stop) for start, stop, _, _ in shown)
    count = 1 + max(tracks, default=0)
    for (start, stop, name, args), track in zip(shown, tracks):
        experts = [args["expert"]] if args.get("expert") is not None else [*args.get("experts", args.get("device", ()))]
        kind = "plain" if not experts else "prefetch" if args.get("kind") == "prefetch" else "expert"
        place = (1 - (track + 1) / count, 1 - track / count)
        yield Bar(lane, *place, max(start, begin) - begin, min(stop, end) - begin, name, experts, kind)


def lane_kind(lane: str) -> str:
    """The last word, "cpu", "device" or "link": a lane of a timeline of several systems begins with its system."""
    return lane.split()[-1]


def as_html(shown: View) -> str:
    """An SVG picture; each bar says what it is where the mouse rests on it."""
    scale = (WIDTH - LEFT - 10) / (shown.seconds or 1.0)
    height = ROW * len(shown.lanes)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height + 40}" width="100%" '
        'style="max-width: 1100px; background: white" font-family="sans-serif" font-size="11">'
        '<defs><pattern id="hm-prefetch" width="5" height="5" patternUnits="userSpaceOnUse" '
        f'patternTransform="rotate(45)"><rect width="2" height="5" fill="{LANE_COLOURS["link"]}"/></pattern></defs>',
        f'<text x="{LEFT}" y="12">{html.escape(shown.title)}; {html.escape(shown.kind)}</text>',
    ]
    for row, lane in enumerate(shown.lanes):
        parts.append(f'<text x="{LEFT - 6}" y="{20 + ROW * row + 18}" text-anchor="end">{html.escape(lane)}</text>')
    for bar in shown.bars:
        parts.append(_rectangle(bar, 20 + ROW * shown.lanes.index(bar.lane), scale))
    for start in shown.layers:
        x = LEFT + scale * start
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="18" y2="{height + 20}" stroke="#999" stroke-dasharray="2 3"/>'
        )
    for part in range(5):
        x, ms = LEFT + scale * shown.seconds * part / 4, 1e3 * shown.seconds * part / 4
        anchor, unit = ("end", " ms") if part == 4 else ("middle", "")
        parts.append(f'<text x="{x:.1f}" y="{height + 34}" text-anchor="{anchor}">{ms:.3g}{unit}</text>')
    return "".join(parts) + "</svg>"


def _rectangle(bar: Bar, top: float, scale: float) -> str:
    by_lane = LANE_COLOURS.get(lane_kind(bar.lane), PLAIN)
    colour = {"plain": PLAIN, "prefetch": "url(#hm-prefetch)"}.get(bar.kind, by_lane)
    height = (ROW - 6) * (bar.high - bar.low)
    x, y = LEFT + scale * bar.start, top + 2 + (ROW - 6) * (1 - bar.high)
    width = max(scale * (bar.end - bar.start), 0.5)
    text = " ".join(map(str, bar.experts))
    label = ""
    if bar.kind == "expert" and width > max(NARROWEST, 7 * len(text)) and height > 11:
        fill = "white" if lane_kind(bar.lane) == "device" else "black"
        middle = f'x="{x + width / 2:.1f}" y="{y + height / 2 + 4:.1f}"'
        label = f'<text {middle} text-anchor="middle" fill="{fill}" pointer-events="none">{text}</text>'
    said = html.escape(f"{bar.name}{': experts ' + text if len(bar.experts) > 1 else ''}")
    return (
        f'<rect x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" height="{height:.1f}" fill="{colour}" stroke="white" '
        f'stroke-width="0.5"><title>{said}, {1e3 * (bar.end - bar.start):.4g} ms</title></rect>{label}'
    )
