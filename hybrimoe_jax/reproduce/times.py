"""Tables of times; all are simulated but those of `live`. `figures` says how intervals are made."""

from __future__ import annotations

from typing import Any

from hybrimoe_jax.machine.profile import load_profile
from hybrimoe_jax.machine.shapes import get_shape
from hybrimoe_jax.reproduce import experiments as e
from hybrimoe_jax.reproduce.figures import (
    NONE,
    NUMBERS,
    Figures,
    Missing,
    beside,
    cell,
    count,
    hit_rate,
    markdown,
    paper_tokens,
    said_speedup,
    seconds,
    speedup,
)  # fmt: skip
from hybrimoe_jax.reproduce.sources import ONE_SEQUENCE, QWEN2

PRINTED = {
    "baseline, blind": "baseline", "baseline": "baseline", "+scheduling": "scheduling", "+prefetching": "prefetching",
    "all": "all",
}  # fmt: skip
"""Our rows' names in the paper's Table III."""
LOADS = (1, 8, 32, 128, 512)


def decode(f: Figures, profile: str) -> str:
    """Tokens per second."""
    rows = []
    for row in f.rows("decode"):
        for ratio in [ratio for at, ratio in e.DECODED if at == profile]:
            where = {"profile": profile, "ratio": ratio}
            if ratio != 0.25 and row not in e.PRINTED:
                continue
            ours = f.get("decode", "hybrimoe", row, **where)
            cells = [cell(per_second, f, name, row, **where) for name in e.SYSTEMS]
            cells.append(f"{1 / ours['bound_seconds_per_step']:.1f}")
            cells += [cell(lead, f, "decode", name, row, **where) for name in ("ktransformers", e.BLIND)]
            rows.append([row, f"{ratio:.0%}", str(count(ours)), *cells])
    head = ["model", "cache", "sequences", *e.SYSTEMS, "bound", "over ktransformers", "over the same, blind"]
    return markdown(*without_empty(head, rows))


def per_second(f: Figures, name: str, row: str, profile: str, ratio: float) -> str:
    """Tokens per second, and the paper's figure where it is of this machine."""
    found = f.get("decode", name, row, profile, ratio)
    printed = paper_tokens(found["model"], ratio, name) if profile == e.PAPER else None
    return beside(f"{1 / seconds(found):.1f}", printed)


def lead(f: Figures, experiment: str, other: str, row: str, **where: Any) -> str:
    """How many times faster hybrimoe is than another run."""
    return said_speedup(f.get(experiment, other, row, **where), f.get(experiment, "hybrimoe", row, **where))


def without_empty(head: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Without the columns in which nothing ran."""
    kept = [i for i in range(len(head)) if any(row[i] != NONE for row in rows)]
    return [head[i] for i in kept], [[row[i] for i in kept] for row in rows]


def placement(f: Figures) -> str:
    """The baseline's hits, and hybrimoe's lead over it, by how many other sequences it was placed by."""
    rows = []
    for row in f.rows("placement"):
        ours = f.get("placement", "hybrimoe", row)
        found = [f.get("placement", name, row) for name in ("0", *map(str, e.OTHERS), "all")]
        rows.append([row, *(f"{said_speedup(r, ours)}; {hit_rate(r):.0f} %" for r in found)])
    return markdown(["model", "none", *map(str, e.OTHERS), "all the others"], rows)


def prefill(f: Figures, profile: str) -> str:
    """Seconds to the first token."""
    rows = []
    for row in f.rows("prefill"):
        for length in e.LENGTHS:
            try:
                found = {name: f.get("prefill", name, row, profile, prompt=length) for name in e.READERS}
            except Missing:
                continue
            times = [f"{seconds(r):.2f}" for r in found.values()]
            gain = said_speedup(found["ktransformers"], found["hybrimoe"])
            rows.append([row, str(length), str(count(found["hybrimoe"])), *times, gain])
    return markdown(["model", "tokens", "prompts", *e.READERS, "over ktransformers"], rows)


def ablation(f: Figures, prompt: int | None = None) -> str:
    """Milliseconds a token (a prompt: to the first one) on the paper's machine, a column a trace; first how many."""
    traces = [row for row in f.rows("ablation") if prompt is None or row not in ONE_SEQUENCE]
    paper = NUMBERS["table_iii_qwen2_cache25_seconds"]["prefill" if prompt else "decode"]
    names = e.OF_PROMPTS if prompt else (*e.TABLE_III, *e.BEYOND)
    counted = [cell(lambda row: f"n = {count(f.get('ablation', names[1], row, prompt=prompt))}", row) for row in traces]
    rows = [["prompts" if prompt else "sequences", NONE, *counted]]
    for name in names:
        printed = paper.get(PRINTED.get(name, ""))
        cells = [cell(milliseconds, f, name, row, prompt) for row in traces]
        rows.append([name, NONE if printed is None else f"{1e3 * printed:.0f}", *cells])
    return markdown(["milliseconds", "the paper, Qwen2", *traces], rows)


def milliseconds(f: Figures, name: str, row: str, prompt: int | None) -> str:
    return f"{1e3 * seconds(f.get('ablation', name, row, prompt=prompt)):.1f}"


def contributions(f: Figures) -> str:
    """How many times faster than the baseline each row is, decoding on the paper's machine."""
    paper, rows = NUMBERS["table_iii_qwen2_cache25_seconds"]["decode"], []
    for name in e.TABLE_III:
        printed = paper.get(PRINTED.get(name, ""))
        cells = [cell(over_baseline, f, name, row) for row in f.rows("ablation")]
        rows.append([name, NONE if printed is None else f"{paper['baseline'] / printed:.2f}x", *cells])
    return markdown(["times as fast as the baseline", "the paper, Qwen2", *f.rows("ablation")], rows)


def over_baseline(f: Figures, name: str, row: str) -> str:
    return said_speedup(f.get("ablation", "baseline", row), f.get("ablation", name, row))


def engineered(f: Figures) -> str:
    """Synthetic routing on both profiles."""
    rows = [
        [name, *(f"{1e3 * seconds(f.get('ablation', name, QWEN2, profile)):.1f}" for profile in e.PROFILES)]
        for name in (*e.TABLE_III, *e.BEYOND)
    ]
    return markdown(["milliseconds a token", *e.PROFILES], rows)


def live(f: Figures) -> str:
    """The bundled model's own rows: three ways, which are three clocks or devices and never one column."""
    found: dict[str, dict[str, dict]] = {}
    for r in f.plain("live"):
        found.setdefault(r["way"], {})[r["run"]] = r
    rows = []
    for name, computed in found["computed"].items():
        cells = []
        for way in found.values():
            cells += [f"{1e3 * seconds(way[name]):.2f}", said_speedup(way["baseline"], way[name])]
        rows.append([name, *cells, f"{hit_rate(computed):.0f}"])
    heads = [head for way in found for head in (f"{way}: ms a token", "times as fast as the baseline")]
    return markdown(["", *heads, "hits, per cent (computed)"], rows)


def baseline(f: Figures) -> str:
    """How much of the paper's gain in its Table III is its baseline: decoding on its own machine."""
    paper = NUMBERS["table_iii_qwen2_cache25_seconds"]["decode"]
    rows = [["the paper", str(paper["all"]), str(paper["baseline"]), f"{paper['baseline'] / paper['all']:.2f}x", ""]]
    ours = f.get("ablation", "all", QWEN2)
    for what, name in (("here, synthetic", "baseline"), ("here, synthetic, placed blindly", "baseline, blind")):
        other = f.get("ablation", name, QWEN2)
        times = [f"{seconds(ours):.3f}", f"{seconds(other):.3f}", said_speedup(other, ours)]
        rows.append([what, *times, f"{hit_rate(other):.0f} %"])
    return markdown(["", "hybrimoe, s a token", "baseline, s a token", "ratio", "the baseline's hits"], rows)


def costs(f: Figures | None = None) -> str:
    """Of one DeepSeek-V2-Lite expert, as the released fits have it. Needs no records."""
    fits = load_profile(e.PAPER).costs(get_shape("deepseek-v2-lite"), "int4")
    rows = [
        ["CPU", *(f"{1e3 * fits.cpu(n):.2f}" for n in LOADS)],
        ["device", *(f"{1e3 * fits.device(n):.2f}" for n in LOADS)],
        ["link", *[f"{1e3 * fits.transfer():.2f}"] * len(LOADS)],
    ]
    return markdown(["lane", *map(str, LOADS)], rows)


def depth(f: Figures) -> str:
    rows = []
    for row in f.rows("depth"):
        for profile in (e.PAPER, e.FAST):
            found = [f.get("depth", str(d), row, profile) for d in e.DEPTHS]
            issued = [r["prefetch"]["issued"] for r in found]
            useful = [f"{r['prefetch']['useful'] / n:.0%}" if n else None for r, n in zip(found, issued)]
            rows.append([row, profile, *(beside(f"{1e3 * seconds(r):.2f}", share) for r, share in zip(found, useful))])
    return markdown(["model", "profile", *map(str, e.DEPTHS)], rows)


def rules(f: Figures) -> str:
    rows = []
    for row in f.rows("rules"):
        for profile in (e.PAPER, e.FAST):
            for prompt in (None, 128):
                times = [f"{1e3 * seconds(f.get('rules', r, row, profile, prompt=prompt)):.2f}" for r in e.RULES]
                rows.append([row, profile, "decode" if prompt is None else f"prompt of {prompt}", *times])
    return markdown(["model", "profile", "rows", *e.RULES], rows)


def links(f: Figures) -> str:
    rows = [[r["machine"], r["belief"], f"{1e3 * r['seconds_per_token']:.2f}"] for r in f.plain("links")]
    return markdown(["machine", "the planner believes", "ms a token"], rows)


def streamed(f: Figures) -> str:
    rows = []
    for row in f.rows("streamed"):
        for profile in e.STREAMED_PROFILES:
            for length in e.STREAMED_LENGTHS:
                one, other = (f.get("streamed", n, row, profile, prompt=length) for n in e.WAYS)
                times = [f"{1e3 * seconds(r):.0f}" for r in (one, other)]
                rows.append([row, profile, str(length), str(count(one)), *times, f"{speedup(one, other):.2f}x"])
    return markdown(["model", "profile", "tokens", "prompts", "scheduled", "streamed", "gain of streaming"], rows)
