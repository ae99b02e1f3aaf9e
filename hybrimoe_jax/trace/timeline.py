"""When each lane did what: events in memory, busy time per lane, and a Chrome trace-event file that Perfetto opens.

The lanes are those of the schedule: `cpu` (experts on the host), `device` (experts and dense work on the accelerator)
and `link` (transfers between them). An event is (lane, name, start, end) in seconds on one clock, wall or virtual; the
file names the clock, since a computed timeline looks just like a measured one. Everything is shown relative to the
first start.

In the file, one process holds a named track per lane. Tracks can show nested events but not events that overlap in
part, so a lane that did two things at once (two workers, two transfers in flight) gets further tracks, "cpu 2" and so
on: each event goes onto the first track that is free.
"""

from __future__ import annotations

import html
import itertools
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hybrimoe_jax import arguments
from hybrimoe_jax.encoding import LONGEST_TEXT
from hybrimoe_jax.errors import reading
from hybrimoe_jax.files import read_json, replacing
from hybrimoe_jax.tables import table

LANES = ("cpu", "device", "link")
STEP_MARKS = ("step", "attention 0", "moe 0")
"""Names of the event on the device's lane that a step begins with, the first of them that there is."""

TRACKS_PER_LANE = 1000  # track numbers: lane i owns 1000 i + 1 and up


class Timeline:
    """Collects events.

    `about` is written into the file: the clock, the system, the executor and whatever else says what this is.

    `add` is one comparison and one append, so that it may be called from worker threads in the middle of a step.
    """

    def __init__(self, lanes: tuple[str, ...] = LANES, **about: Any):
        self.lanes = tuple(lanes)
        self.about = about
        self._events: dict[str, list[tuple[float, float, str, dict]]] = {lane: [] for lane in self.lanes}

    def add(self, lane: str, name: str, start_s: float, end_s: float, **args: Any) -> None:
        """Notes an event, in seconds; `args` show when it is clicked on.

        ValueError for an end before the start or an unknown lane.
        """
        if not end_s >= start_s:
            raise ValueError(f"timeline: {name!r} on lane {lane} ends at {end_s} before it starts at {start_s}")
        try:
            self._events[lane].append((start_s, end_s, name, args))
        except KeyError:
            raise ValueError(f"timeline: no lane {lane!r} (lanes: {', '.join(self.lanes)})") from None

    def __len__(self) -> int:
        return sum(len(events) for events in self._events.values())

    def events(self, lane: str) -> list[tuple[float, float, str, dict]]:
        """(start, end, name, args) of a lane by start time, in seconds from the first event of any lane."""
        origin = self.origin
        return [(s - origin, e - origin, name, args) for s, e, name, args in self._ordered(lane)]

    @property
    def origin(self) -> float:
        """Clock reading of the first start; 0 where there is no event."""
        return min((event[0] for events in self._events.values() for event in events), default=0.0)

    @property
    def span(self) -> float:
        """Seconds from the first start to the last end."""
        return max((event[1] for events in self._events.values() for event in events), default=0.0) - self.origin

    def busy(self, lane: str) -> float:
        """Seconds in which the lane did at least one thing: the length of the union of its events."""
        total, until = 0.0, float("-inf")
        for start, end, _, _ in self._ordered(lane):
            if end > until:
                total += end - max(start, until)
                until = end
        return total

    @property
    def device_lane(self) -> str:
        """The lane by which steps and layers are told: the first system's, where there are several."""
        return next((lane for lane in self.lanes if lane.endswith("device")), self.lanes[0])

    def steps(self) -> list[tuple[float, float]]:
        """(start, end) of every step, in seconds from the first event, by the event that each begins with."""
        device = self.events(self.device_lane)
        names = {name for _, _, name, _ in device}
        mark = next((name for name in STEP_MARKS if name in names), None)
        begins = [start for start, _, name, _ in device if name == mark]
        return list(itertools.pairwise([*begins, self.span])) if begins else []

    def table(self) -> Any:
        """A row an event, by its start: lane, name, times in milliseconds, its layer and expert."""
        rows = [(start, end, lane, name, args) for lane in self.lanes for start, end, name, args in self.events(lane)]
        return table(
            (
                {
                    "lane": lane,
                    "event": name,
                    "start_ms": 1e3 * start,
                    "ms": 1e3 * (end - start),
                    "layer": args.get("layer"),
                    "expert": args.get("expert"),
                }
                for start, end, lane, name, args in sorted(rows, key=lambda row: row[:2])
            ),
            ("lane", "event", "start_ms", "ms", "layer", "expert"),
        )

    def plot(self, step: int | None = None, *, last: int = 1, layers: int | None = None, ax: Any = None) -> Any:
        """Draws the last steps, or step number `step` (0 is the first), its first `layers` alone; returns the axes.

        Needs matplotlib. UserError where there is no such step.
        """
        from hybrimoe_jax.trace import timeline_plot, timeline_view

        return timeline_plot.draw(timeline_view.view(self, step, last, layers), ax)

    def _repr_html_(self) -> str:
        """The last step, as a picture that needs no matplotlib."""
        from hybrimoe_jax.trace import timeline_view

        said = f"<p>{html.escape(repr(self)[1:-1])}</p>"
        return timeline_view.as_html(timeline_view.view(self)) + said if len(self) else said

    def __repr__(self) -> str:
        busy = ", ".join(f"{lane} {1e3 * self.busy(lane):.4g}" for lane in self.lanes)
        return f"<Timeline: {len(self)} events in {1e3 * self.span:.4g} ms, busy ms: {busy}>"

    @classmethod
    def read(cls, path: str | os.PathLike) -> Timeline:
        """What `write` wrote; UserError for any other file."""
        file = read_json(Path(arguments.path("timeline", path)), most=LONGEST_TEXT)  # as long as the run was
        with reading(f"{path}: the timeline"):
            events = [event for event in file["traceEvents"] if event["ph"] == "X"]
            lanes = dict.fromkeys([*LANES, *(event["cat"] for event in events)])
            about = {name: value for name, value in file["otherData"].items() if name not in ("span_s", "busy_s")}
            timeline = cls(tuple(lanes), **about)
            for event in events:
                start, took = round(1e3 * event["ts"]), round(1e3 * event["dur"])  # what touched touches again
                timeline.add(event["cat"], event["name"], start / 1e9, (start + took) / 1e9, **event["args"])
        return timeline

    def write(self, path: str | os.PathLike) -> None:
        """Writes Chrome trace-event JSON (times in microseconds), whole or not at all; UserError where it cannot."""
        events: list[dict] = [{"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "args": {"name": "hybrimoe"}}]
        for index, lane in enumerate(self.lanes):
            events += self._lane_events(lane, TRACKS_PER_LANE * index + 1)
        about = {**self.about, "span_s": self.span, "busy_s": {lane: self.busy(lane) for lane in self.lanes}}
        with replacing(path) as file:
            json.dump(
                {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about},
                file,
                default=_plain,
                allow_nan=False,
            )

    def _ordered(self, lane: str) -> list[tuple[float, float, str, dict]]:
        """By start; of events that start together the longest first, as nesting wants it. UserError: no such lane."""
        arguments.names("the timeline", [lane], self.lanes, "lane ")
        return sorted(self._events[lane], key=lambda event: (event[0], -event[1]))

    @staticmethod
    def tracks(spans: Iterable[tuple[float, float]]) -> list[int]:
        """For each (start, end), in order, the first track that is free."""
        free: list[float] = []
        chosen = []
        for start, end in spans:
            track = next((i for i, until in enumerate(free) if until <= start), len(free))
            if track == len(free):
                free.append(end)
            free[track] = end
            chosen.append(track)
        return chosen

    def _lane_events(self, lane: str, first_track: int) -> list[dict]:
        """One complete event each, on the first track that is free, after the tracks' names."""
        origin, events, ordered = self.origin, [], self._ordered(lane)
        tracks = self.tracks((start, end) for start, end, _, _ in ordered)
        for (start, end, name, args), track in zip(ordered, tracks):
            # nanoseconds, rounded at both ends so that neighbours which touch still touch
            begin_ns, end_ns = round((start - origin) * 1e9), round((end - origin) * 1e9)
            events.append(
                {"ph": "X", "name": name, "cat": lane, "pid": 1, "tid": first_track + track,
                 "ts": begin_ns / 1e3, "dur": (end_ns - begin_ns) / 1e3, "args": args}
            )  # fmt: skip
        names = []
        for track in range(1 + max(tracks, default=0)):
            title = lane if track == 0 else f"{lane} {track + 1}"
            where = {"ph": "M", "pid": 1, "tid": first_track + track}
            names.append({**where, "name": "thread_name", "args": {"name": title}})
            names.append({**where, "name": "thread_sort_index", "args": {"sort_index": first_track + track}})
        return names + events


def _plain(value: Any) -> Any:
    """NumPy scalars and arrays, and anything else that knows its plain form."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)
