"""Names and tables of the reproduction's text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hybrimoe_jax.reproduce.experiments import CONTROLS


def run_name(record: dict) -> str:
    """The system, or what was made of it."""
    rule = record["choices"]["scheduler"]
    named = {value: name for name, value in CONTROLS.items()}
    name = named.get(rule, "hybrimoe") if record["system"] == "hybrimoe" else record["system"]
    if name == "hybrimoe" and record["choices"]["stream_prefill"]:
        name = "hybrimoe, streamed"
    return f"{name}, blind" if record["choices"]["blind"] else name


def model_name(record: dict) -> str:
    """The model; made-up routing says so."""
    return record["model"] + (" (synthetic)" if record["trace"].startswith("synthetic:") else "")


def tokens_per_second(record: dict) -> str:
    """Of decoding a token a step."""
    return f"{1 / record['seconds_per_step']['mean']:.1f}"


def slower(records: Iterable[dict], record: dict, other: str) -> float:
    """How many times as long the run called `other` takes on the same trace, machine and capacity."""
    key = ("trace", "profile", "cache_ratio")
    rival = next(r for r in records if run_name(r) == other and all(r[k] == record[k] for k in key))
    return rival["seconds_per_step"]["mean"] / record["seconds_per_step"]["mean"]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
