"""Finding a figure among the records, and saying it: ratios with intervals over sequences, shares, seconds.

Intervals are 95 % percentile bootstraps over whole sequences (of prompts: over prompts), a pair of runs resampled
together. With fewer than `ENOUGH` there is none, and the number of sequences is said instead.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hybrimoe_jax.reproduce.experiments import PAPER
from hybrimoe_jax.simulate.records import interval

NUMBERS = json.loads((Path(__file__).parent / "paper-numbers.json").read_text(encoding="utf-8"))
"""The paper's figures."""
NAMES = {"deepseek-v2-lite": "deepseek-v2-lite", "mixtral-8x7b": "mixtral", "qwen2-57b-a14b": "qwen2"}
"""Our models' names there."""
NONE = "-"
"""A cell of what did not run."""
ENOUGH = 8
"""Sequences from which on an interval is given: percentile bootstraps of fewer are too narrow."""
Results = Mapping[str, Sequence[dict]]
"""Records by experiment."""


class Missing(LookupError):
    """No record of the run."""


class Figures:
    """The records, found by experiment, run, row and what else tells them apart."""

    def __init__(self, results: Results):
        self.results = results
        self._found = {
            (name, r["run"], r["trace"], r["profile"], r["cache_ratio"], r["prompt_tokens"]): r
            for name, rows in results.items()
            for r in rows
            if "run" in r and "trace" in r
        }

    def get(
        self, experiment: str, run: str, row: str, profile: str = PAPER, ratio: float = 0.25, prompt: int | None = None
    ) -> dict:
        """The record; `Missing` where there is none."""
        try:
            return self._found[experiment, run, row, profile, ratio, prompt]
        except KeyError:
            raise Missing(f"{experiment}: {run} on {row}") from None

    def rows(self, experiment: str) -> list[str]:
        """The traces that the experiment has, in order; `Missing` where there are none."""
        return list(dict.fromkeys(r["trace"] for r in self.plain(experiment)))

    def plain(self, experiment: str) -> Sequence[dict]:
        """All records of an experiment; `Missing` where there are none."""
        if not self.results.get(experiment):
            raise Missing(experiment)
        return self.results[experiment]


def seconds(record: dict) -> float:
    return record["seconds_per_step"]["mean"]


def hit_rate(record: dict) -> float:
    """In per cent."""
    return 100 * record["hit_rate"]["mean"]


def count(record: dict) -> int:
    """Sequences, or prompts."""
    return record["sequences"]


def speedup(slow: dict, fast: dict) -> float:
    return seconds(slow) / seconds(fast)


def said_speedup(slow: dict, fast: dict, brackets: bool = True) -> str:
    """How many times faster `fast` is, with its interval or the number of sequences."""
    return f"{speedup(slow, fast):.2f}x" + spread(slow, fast, "seconds", "seconds", brackets)


def spread(above: dict, below: dict, name: str, per: str, brackets: bool = True, form: str = ".2f") -> str:
    """The interval of a ratio of sums over sequences, or how many sequences there are."""
    tops, bottoms = above["by_sequence"][name], below["by_sequence"][per]
    found = interval(tops, bottoms) if len(tops) >= ENOUGH else None
    said = f"n = {len(tops)}" if found is None else f"{found[0]:{form}} to {found[1]:{form}}"
    return f" ({said})" if brackets else f", {said}"


def paper_tokens(model: str, ratio: float, system: str) -> float | None:
    """Tokens per second in figure 8, where it prints one."""
    printed = NUMBERS["fig8_decode_tokens_per_second"].get(NAMES.get(model, ""), {}).get(f"cache{100 * ratio:.0f}", {})
    return printed.get({"llamacpp": "llama.cpp"}.get(system, system))


def cell(make: Callable[..., str], *args: Any, **more: Any) -> str:
    """What `make` says; a dash where a record is not there."""
    try:
        return make(*args, **more)
    except Missing:
        return NONE


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def beside(ours: str, other: object) -> str:
    """Our figure, and in brackets the other where there is one."""
    return f"{ours} ({other})" if other else ours


def mean(values: Iterable[float]) -> float:
    """`Missing` where there are no values."""
    values = list(values)
    if not values:
        raise Missing("values")
    return statistics.mean(values)


def least_and_most(values: Sequence[float], form: str, unit: str = "") -> str:
    """The range in words; `Missing` where there are no values."""
    if not values:
        raise Missing("values")
    low, high = f"{min(values):{form}}", f"{max(values):{form}}"
    return f"{low}{unit}" if low == high else f"{low} to {high}{unit}"
