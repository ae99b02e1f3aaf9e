"""Contenders in turns: a warm-up round, which counts for nothing, then rounds in which the order rotates.

Each process holds the host's weights once, whatever is opened in it. Only one contender computes at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from hybrimoe_jax.bench.e2e.floor import machine_figures, work_floor
from hybrimoe_jax.bench.e2e.grid import (
    REFERENCE,
    TORCH_MODES,
    Entry,
    Files,
    Options,
    entries,
    process_options,
    prompt_maker,
)
from hybrimoe_jax.bench.engine import SETTLE_S, Contender
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.machine.paced import parse_device

Note = Callable[[str], None]
VIRTUAL = "virtual"
CONTEXT = 512
"""Tokens of the longest sequence at least: engines time attention at load."""
PHASES = ("prefill", "decode")
EXTRA_CORES = 0.25
"""By which the cores that a contender was seen to use may be above its threads."""


@dataclasses.dataclass
class Session:
    """The running processes of one model in one format; `sizes`: of the model, once an engine is open."""

    files: Files
    options: Options
    context: int
    running: dict[str, Contender] = dataclasses.field(default_factory=dict)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)
    opened: dict[str, dict] = dataclasses.field(default_factory=dict)
    sizes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def open(self, entry: Entry, ids: list[int]) -> bool:
        """Starts its process where it does not run, and opens it. What it refuses leaves it out."""
        try:
            if entry.kind not in self.running:
                asked = process_options(entry.kind.removesuffix(VIRTUAL), self.files, self.options, self.context)
                if entry.kind.endswith(VIRTUAL):
                    asked["device"] = "auto"
                kind = entry.kind.removesuffix(VIRTUAL)
                self.running[entry.kind] = Contender(kind, threads=self.options.threads, **asked)
            given = entry.options if entry.cached else {"ids": ids}
            self.opened[entry.name] = self.running[entry.kind].ask("open", name=entry.name, options=given)
        except UserError as error:
            self.running.pop(entry.kind, None)
            self.left_out[f"{entry.name}, {self.files.name} {self.files.format}"] = str(error)
            return False
        if entry.kind == "engine":
            self.sizes = self.running["engine"].ask("sizes")
        return True

    def close(self) -> None:
        for contender in self.running.values():
            contender.close()


def measure(files: Files, options: Options, note: Note) -> dict[str, Any]:
    """-> {"rows": one of each cache ratio, prompt and contender, "figures", "left_out", "versions"}."""
    make, limit = prompt_maker(files)
    prompts = [tokens for tokens in options.prompts if tokens + options.new < limit]
    context = min(limit, max(CONTEXT, max(prompts, default=0) + options.new + 1))
    session, rows = Session(files, options, context), []
    figures: dict[str, float] = {}
    versions: dict[str, dict] = {}
    for tokens in sorted(set(options.prompts) - set(prompts)):
        session.left_out[f"a prompt of {tokens}, {files.name}"] = f"the model takes {limit} tokens in all"
    with contextlib.closing(session):
        for ratio in options.ratios if prompts else ():
            wanted = entries(options, files, ratio, context, session.left_out)
            wanted += computed(wanted, options)
            note(f"{files.name} {files.format}, cache {ratio:.1%}: loading")
            taking = [entry for entry in wanted if session.open(entry, make(min(prompts), 99))]
            before = machine_figures(session.sizes["bytes_per_token"])
            answers = turns(session, taking, prompts, make, ratio, note)
            after = machine_figures(session.sizes["bytes_per_token"])
            figures = {key: max(figures.get(key, 0.0), before[key], after[key]) for key in before}
            for entry in taking:
                if entry.cached:
                    session.running[entry.kind].ask("close", name=entry.name)
            versions |= {kind: run.about for kind, run in session.running.items()}
            for tokens in prompts:
                rows += cell(session, taking, tokens, ratio, answers, figures)
    return {"rows": rows, "figures": figures, "left_out": session.left_out, "versions": versions}


def computed(wanted: Sequence[Entry], options: Options) -> list[Entry]:
    """On a paced device: what the virtual clock says of the same runs."""
    device = parse_device(options.device)
    if device is None:
        return []
    clock = {"clock": "virtual", "profile": device.profile}
    return [
        Entry(f"{entry.name} {VIRTUAL}", f"engine{VIRTUAL}", {**entry.options, **clock})
        for entry in wanted
        if entry.kind == "engine"
    ]


def turns(
    session: Session,
    taking: Sequence[Entry],
    prompts: Sequence[int],
    make: Callable[[int, int], list[int]],
    ratio: float,
    note: Note,
) -> dict[tuple[str, int], list[dict]]:
    """What each contender answered for each prompt's length, in order of the rounds that count."""
    answers: dict[tuple[str, int], list[dict]] = {}
    options, where = session.options, f"{session.files.name} {session.files.format}, cache {ratio:.1%}"
    for turn in range(options.rounds + 1):
        note(f"{where}: " + (f"round {turn} of {options.rounds}" if turn else "warming up"))
        for number, tokens in enumerate(prompts):
            ids = make(tokens, turn)
            shift = (turn * len(prompts) + number) % len(taking)
            for entry in [*taking[shift:], *taking[:shift]]:
                time.sleep(SETTLE_S)
                made = session.running[entry.kind].ask("generate", name=entry.name, ids=ids, new=options.new)
                if turn:
                    answers.setdefault((entry.name, tokens), []).append(made)
    return answers


def cell(
    session: Session,
    taking: Sequence[Entry],
    tokens: int,
    ratio: float,
    answers: dict[tuple[str, int], list[dict]],
    figures: dict[str, float],
) -> list[dict[str, Any]]:
    """The rows of one prompt's length at one cache ratio."""
    options = session.options
    device = parse_device(options.device)
    slowdown = 1.0 if device is None else device.slowdown
    names = [entry.name for entry in taking]
    reference = answers[REFERENCE if REFERENCE in names else names[0], tokens]
    rows = []
    for entry in taking:
        if entry.kind.endswith(VIRTUAL):
            continue
        runs = answers[entry.name, tokens]
        row: dict[str, Any] = {
            "model": session.files.name,
            "format": session.files.format,
            "device": options.device,
            "clock": "wall",
            "cache_ratio": ratio if entry.cached else None,
            "prompt_tokens": tokens,
            "contender": entry.name,
            "kind": entry.kind,
            **times(runs, options.new, slowdown),
            **counts(runs, options.threads),
            **session.opened[entry.name],
            "token_differences": sum(map(differences, reference, runs)),
            "tokens": sum(len(made["token_ids"]) for made in runs),
        }
        work = runs if "phases" in runs[0] else reference
        row["floor_ms"] = {
            phase: 1e3
            * statistics.median(floor(session, made["phases"][phase], phase, tokens, figures) for made in work)
            for phase in PHASES
        }
        row["floor_ms"] = {
            "ttft": row["floor_ms"]["prefill"] / slowdown,
            "tbt": row["floor_ms"]["decode"] / options.new / slowdown,
        }
        row["times_floor"] = {
            "ttft": row["ttft_ms"] / row["floor_ms"]["ttft"],
            "tbt": 1e3 / row["tokens_s"] / row["floor_ms"]["tbt"],
        }
        if device is not None:
            same = f"{TORCH_MODES.get(entry.name.removeprefix('torch '), entry.name)} {VIRTUAL}"
            if (same, tokens) in answers:
                row["computed"] = computed_times(answers[same, tokens], options.new)
        rows.append(row)
    same_bytes(rows)
    return rows


def same_bytes(rows: Sequence[dict[str, Any]]) -> None:
    """Adds what share of the first one's device bytes each other takes, slots, buffers, cache and dense weights."""
    told = [row for row in rows if row.get("peak_device_bytes")]
    for row in told:
        row["device_bytes_share"] = row["peak_device_bytes"] / told[0]["peak_device_bytes"]


def floor(session: Session, phase: dict, name: str, tokens: int, figures: dict[str, float]) -> float:
    """Seconds: by the lanes' costs on a GPU or a paced device, else by the machine's figures."""
    if "lane_floor_s" in phase:
        return max(phase["lane_floor_s"].values())
    shown = {key: value for key, value in figures.items() if key != "peak" or "-a8" not in session.files.format}
    return work_floor(session.sizes, phase, name == "decode", tokens, shown)


def times(runs: Sequence[dict], new: int, slowdown: float) -> dict[str, Any]:
    """Medians, percentiles and each round's own, milliseconds of the machine that is shown."""
    each = sorted(1e3 * second / slowdown for made in runs for second in made["tbt_s"])
    ttft = [1e3 * made["ttft_s"] / slowdown for made in runs]
    tbt = [1e3 * made["decode_s"] / new / slowdown for made in runs]
    picked = {f"p{part}": each[min(len(each) - 1, len(each) * part // 100)] for part in (90, 99)}
    return {
        "ttft_ms": statistics.median(ttft),
        "tbt_ms": {"median": statistics.median(each), **picked, "tokens": len(each)},
        "tokens_s": 1e3 / statistics.median(tbt),
        "rounds": {"ttft_ms": ttft, "tbt_ms": tbt},
    }


def computed_times(runs: Sequence[dict], new: int) -> dict[str, float]:
    """The virtual clock's of the same prompts: a prompt, and a token on average."""
    return {
        "ttft_ms": 1e3 * statistics.median(made["phases"]["prefill"]["seconds"] for made in runs),
        "tbt_ms": 1e3 * statistics.median(made["phases"]["decode"]["seconds"] / new for made in runs),
    }


def counts(runs: Sequence[dict], threads: int) -> dict[str, Any]:
    """Memory, cores, and where it is told what the lanes did."""
    last = runs[-1]
    cores = statistics.median(made["cpu_s"] / (made["ttft_s"] + made["decode_s"]) for made in runs)
    told: dict[str, Any] = {
        "process_peak_bytes": last["process_peak_bytes"],
        "cores_used": cores,
        "threads_kept": cores <= threads + EXTRA_CORES,
    }
    if "phases" not in last:
        return told
    told |= {key: last[key] for key in ("peak_device_bytes", "host_bytes", "slots") if key in last}
    told["ran_on"] = last["device"]
    for name in ("hits", "misses", "bytes_h2d", "compile_s"):
        told[name] = sum(made[name] for made in runs)
    told["hit_rate"] = told["hits"] / max(1, told["hits"] + told["misses"])
    told["lanes"] = {phase: occupancy([made["phases"][phase] for made in runs]) for phase in PHASES}
    return told


def occupancy(phases: Sequence[dict]) -> dict[str, float]:
    """Busy seconds of each lane over those of the steps."""
    seconds = sum(phase["seconds"] for phase in phases) or 1.0
    return {lane: sum(phase["busy_s"][lane] for phase in phases) / seconds for lane in phases[0]["busy_s"]}


def differences(one: dict, other: dict) -> int:
    """Places at which the tokens of two runs differ."""
    return sum(a != b for a, b in zip(one["token_ids"], other["token_ids"], strict=True))
