"""`replay`, a public name: systems on a routing trace and a machine's profile, as a table and pictures."""

from __future__ import annotations

import dataclasses
import json
import numbers
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hybrimoe_jax import arguments, tables
from hybrimoe_jax.decide.systems import System
from hybrimoe_jax.errors import UserError, shown
from hybrimoe_jax.figures import LANE_COLOURS, LANE_HATCHES, axes_of, line_style
from hybrimoe_jax.files import replacing
from hybrimoe_jax.progress import track
from hybrimoe_jax.simulate import grid, plots, records
from hybrimoe_jax.simulate.cases import OVERRIDES, STARTS, Case, cases_of, parts_of, prepared
from hybrimoe_jax.trace.columns import Trace
from hybrimoe_jax.trace.file import save_trace
from hybrimoe_jax.trace.timeline import Timeline


def replay(
    trace: Trace | str | os.PathLike[str] | Sequence[Trace | str | os.PathLike[str]],
    *,
    machine: str = "a6000-engineered",
    ratios: Sequence[float] = (0.25,),
    systems: Sequence[str | System] = ("hybrimoe",),
    format: str = "int4",
    starts: Sequence[str] = ("warm",),
    prompt_lengths: Sequence[int] = (),
    prompts: int = 8,
    steps: int | None = None,
    shape: str | None = None,
    jobs: int = 1,
    **parts: Any,
) -> Runs:
    """Replays every system at every cache ratio, under the virtual clock of `machine`: all times are computed.

    As `python -m hybrimoe_jax.simulate` does: static placements and the warm start are learned on the half of the
    sequences that is not run.

    Args:
      trace: one or several, recorded or as files of any layout that `trace info` reads.
      machine: a profile, by name or file.
      ratios: shares of the experts that the device holds.
      systems: names, or systems of your own (`system`).
      format: weight format of the experts, whose bytes and times these are.
      starts: "warm", "cold".
      prompt_lengths: also prompts of so many tokens, in one step each; `prompts` of them in each half.
      steps: at most so many tokens of each half.
      shape: the model's sizes by name, where the trace does not tell.
      jobs: runs at once, in processes of their own.
      parts: replaced in every system: cache, scheduler, prefetch, lookahead, predictor, scope, stream_prefill.

    UserError for what is unknown or does not fit together, before anything runs.
    """
    jobs, machine = arguments.workers("jobs", jobs), arguments.path("machine", machine)
    ratios = [arguments.number("ratios", ratio) for ratio in arguments.several("ratios", ratios, numbers.Real)]
    given = [one if isinstance(one, System) else arguments.text("systems", one) for one in _several("systems", systems)]
    given = list(dict.fromkeys(given))
    names = [one if isinstance(one, str) else one.name for one in given]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"replay: two different systems are called {shown(twice)}; give yours another name")
    starts = [arguments.choice("starts", start, STARTS) for start in _several("starts", starts)]
    lengths = [
        arguments.whole("prompt_lengths", length, 1)
        for length in _several("prompt_lengths", prompt_lengths, numbers.Integral)
    ]
    if shape is not None:
        shape = arguments.text("shape", shape)
    folder = Folder()
    paths = [_path(one, number, folder.path) for number, one in enumerate(_several("trace", trace, *TRACES))]
    cases = cases_of(
        paths, machine, given, ratios, fmt=arguments.text("format", format), starts=starts, lengths=lengths,
        prompts=arguments.whole("prompts", prompts, 1), parts=_parts(parts), shape=shape,
        steps=None if steps is None else arguments.whole("steps", steps, 1),
    )  # fmt: skip
    here = Path(folder.path)
    cases = [
        dataclasses.replace(case, name=Path(case.trace).name) if Path(case.trace).parent == here else case
        for case in cases
    ]
    if not cases:
        raise UserError("nothing to replay: give at least one trace, one ratio and one system")
    for case in cases:
        if not 0 <= case.ratio <= 1:
            raise UserError(f"cache ratio {case.ratio} is outside 0..1")
        prepared(case)  # what cannot be is said before anything runs
    found = list(track(grid.run_cases(cases, jobs), len(cases), "replaying"))
    return Runs(found, cases, folder)


TRACES = (str, os.PathLike, Trace)


class Folder:
    """A temporary folder that vanishes with the last object that holds it."""

    def __init__(self) -> None:
        self.path = tempfile.mkdtemp(prefix="hybrimoe-replay-")
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def _several(name: str, given: Any, *kinds: type) -> list[Any]:
    """One thing stands for a list of it."""
    return arguments.several(name, given, kinds or (str, System))


def _path(trace: Trace | str | os.PathLike[str], number: int, folder: str) -> str:
    if not isinstance(trace, Trace):
        return arguments.path("trace", trace)
    path = Path(folder, f"trace {number}" if number else "trace")
    save_trace(trace, path)
    return str(path)


def _parts(given: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    arguments.names("replay", given, OVERRIDES)
    return parts_of(given)


class Runs:
    """What replays gave. All times are of the virtual clock.

    Attributes: records: a dict each, those that `simulate --out` writes.
    """

    def __init__(self, found: Sequence[dict[str, Any]], cases: Sequence[Case] = (), folder: Folder | None = None):
        self.records = list(found)
        self._cases, self._folder = list(cases), folder

    def table(self) -> Any:
        """A DataFrame, or rows where pandas is not installed: a row a run, times in milliseconds a step."""
        return tables.table(map(_row, self.records))

    @property
    def plot(self) -> RunsPlots:
        """Pictures: `plot.tbt()`, `ttft()`, `hit_rate()`, `lanes()`."""
        return RunsPlots(self)

    def where(self, **equal: Any) -> Runs:
        """The runs whose records have these values, as in `where(start="warm", cache_ratio=0.25)`."""
        if self.records:
            arguments.names("a run", equal, list(dict.fromkeys(key for one in self.records for key in one)), "entry ")
        for key, value in equal.items():
            if getattr(value, "ndim", 0):
                raise UserError(f"where: {key} is one value, not {shown(value)}")
        chosen = [n for n, record in enumerate(self.records) if all(record.get(k) == v for k, v in equal.items())]
        cases = [self._cases[n] for n in chosen] if self._cases else ()
        return Runs([self.records[n] for n in chosen], cases, self._folder)

    def timeline(self, steps: int = 4) -> Timeline:
        """The first steps of every system's first run side by side, each with lanes of its own."""
        steps = arguments.whole("steps", steps, 1)
        if not self._cases:
            raise UserError("these runs have no traces any more: replay them again")
        return grid.timeline_of(self._cases, steps)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON lines, a record a run."""
        with replacing(arguments.path("path", path)) as file:
            file.writelines(json.dumps(record) + "\n" for record in self.records)

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.records)

    def __repr__(self) -> str:
        profiles = dict.fromkeys(record["profile"] for record in self.records)
        systems = dict.fromkeys(record["system"] for record in self.records)
        return f"<Runs: {len(self)} of {', '.join(systems)} on {', '.join(profiles)}, virtual clock>"

    def __str__(self) -> str:
        """The tables of `python -m hybrimoe_jax.simulate`."""
        return records.table(self.records)

    def _repr_html_(self) -> str:
        return tables.Table(map(_row, self.records))._repr_html_()


def _row(record: dict[str, Any]) -> dict[str, Any]:
    seconds, hits, steps = record["seconds_per_step"], record["hit_rate"], record["steps"]
    low, high = seconds["ci95"] or (None, None)
    return {
        "trace": record["trace"],
        "model": record["model"],
        "machine": record["profile"],
        "format": record["format"],
        "system": record["system"],
        "cache_ratio": record["cache_ratio"],
        "start": record["start"],
        "prompt_tokens": record["prompt_tokens"],
        "sequences": record["sequences"],
        "steps": steps,
        "ms": 1e3 * seconds["mean"],
        "ms_low": None if low is None else 1e3 * low,
        "ms_high": None if high is None else 1e3 * high,
        "ms_p90": 1e3 * seconds["p90"],
        "bound_ms": 1e3 * record["bound_seconds_per_step"],
        "hit_rate": hits["mean"],
        "MB": record["bytes_h2d"] / steps / 1e6,
        **{fate: record["prefetch"][fate] / steps for fate in ("useful", "late", "wasted")},
        **{f"{lane}_busy": record["occupancy"][lane] for lane in ("cpu", "device", "link")},
        "clock": record["clock"],
    }


class RunsPlots:
    """`runs.plot`. `ax`: where to draw; a new figure without it."""

    def __init__(self, runs: Runs):
        self._runs = runs

    def tbt(self, ax: Any = None) -> Any:
        """Mean time between tokens by system and cache ratio, with its 95 % interval over sequences, and the bound."""
        return self._times(ax, prompts=False)

    def ttft(self, ax: Any = None) -> Any:
        """The same of prompts."""
        return self._times(ax, prompts=True)

    def hit_rate(self, ax: Any = None) -> Any:
        """Activated experts found resident by cache ratio, a line a system."""
        found = self._of_one_kind([r for r in self._runs.records if r["hit_rate"]["mean"] is not None])
        with axes_of(ax) as axes:
            for place, system in enumerate(dict.fromkeys(r["system"] for r in found)):
                mine = sorted((r["cache_ratio"], r["hit_rate"]["mean"]) for r in found if r["system"] == system)
                at, rates = [100 * ratio for ratio, _ in mine], [100 * rate for _, rate in mine]
                axes.plot(at, rates, label=system, **line_style(place))
            axes.set(xlabel="experts that the device holds [%]", ylabel="hit rate [%]")
            axes.set_title(plots.title_of(found[0]), fontsize=6)
            axes.legend(ncols=4, fontsize=5.5, loc="upper center", bbox_to_anchor=(0.5, -0.26))
        return axes

    def lanes(self, ax: Any = None) -> Any:
        """The share of the time that each lane was busy, by system and cache ratio."""
        found = self._of_one_kind(self._runs.records)
        several = len({record["cache_ratio"] for record in found}) > 1
        names = [f"{r['system']} {r['cache_ratio']:.0%}" if several else r["system"] for r in found]
        width = 0.8 / len(LANE_COLOURS)
        with axes_of(ax) as axes:
            for place, (lane, colour) in enumerate(LANE_COLOURS.items()):
                at = [number + (place - 1) * width for number in range(len(found))]
                style = {"color": colour, "hatch": LANE_HATCHES[lane], "edgecolor": "white"}
                axes.bar(at, [100 * r["occupancy"][lane] for r in found], width, label=lane, **style)
            turned = {"rotation": 40, "ha": "right"} if len(names) > 4 else {}
            axes.set_xticks(range(len(names)), names, fontsize=6, **turned)
            axes.set_ylabel("busy, simulated [%]")
            axes.set_title(plots.title_of(found[0]), fontsize=6)
            axes.legend(ncols=3, fontsize=6, loc="lower center", bbox_to_anchor=(0.5, 1.08))
        return axes

    def _times(self, ax: Any, prompts: bool) -> Any:
        found = [record for record in self._runs.records if (record["prompt_tokens"] is not None) == prompts]
        found = self._of_one_kind(found)
        with axes_of(ax) as axes:
            plots.draw_times(axes, found)
        return axes

    def _of_one_kind(self, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """UserError where there is nothing to draw, or runs that are not to be compared in one picture."""
        if not found:
            raise UserError("none of these runs has what this picture shows")
        for name in ("trace", "profile", "format", "start", "prompt_tokens"):
            values = list(dict.fromkeys(record[name] for record in found))
            if len(values) > 1:
                raise UserError(f"runs of several {name}s ({', '.join(map(str, values))}): runs.where({name}=...).plot")
        return found
