"""The tables of docs/reproduction.md: the paper's figures beside ours, from records as `experiments` makes them.

Under some tables stands a line of averages, or of the least and the most over its rows.

People write the document. Code renews what stands between `<!-- table: NAME -->` and `<!-- end -->` in it.
"""

from __future__ import annotations

import functools
import json
import re
import statistics
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from hybrimoe_jax.machine.profile import load_profile
from hybrimoe_jax.machine.shapes import get_shape
from hybrimoe_jax.reproduce.experiments import CONTROLS, DEPTHS, PROFILES, RULES, VARIANTS

PAPER = json.loads((Path(__file__).parent / "paper-numbers.json").read_text(encoding="utf-8"))
NAMES = {"deepseek-v2-lite": "deepseek-v2-lite", "mixtral-8x7b": "mixtral", "qwen2-57b-a14b": "qwen2"}
"""Our models' names in PAPER."""
TABLE_III = {
    "baseline, blind": "baseline",
    "baseline": "baseline",
    "+scheduling": "scheduling",
    "+prefetching": "prefetching",
    "all": "all",
}
"""Our rows' names in the paper's Table III."""
LOADS = (1, 8, 32, 128, 512)
PLACE = re.compile(r"(?<=<!-- table: )(?P<name>[^>]+?)(?P<mark> -->\n).*?(?=<!-- end -->)", re.DOTALL)


def places(text: str) -> list[str]:
    """Names of the tables that a document has a place for, in order."""
    return [match["name"] for match in PLACE.finditer(text)]


def renewed(text: str, tables: Mapping[str, str]) -> str:
    """The document with these tables in their places; a place without one is left as it is."""

    def place(match: re.Match) -> str:
        table = tables.get(match["name"])
        return match[0] if table is None else f"{match['name']}{match['mark']}\n{table}\n"

    return PLACE.sub(place, text)


def all_tables(results: Mapping[str, Sequence[dict]]) -> dict[str, str]:
    """Every table, by name, that these records suffice for. `results`: records by experiment."""
    made = {}
    for name, (experiment, make) in TABLES.items():
        if records := results.get(experiment):
            made[name] = make(records)
    made["costs"] = costs()
    return made


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def decode(records: Sequence[dict], profile: str) -> str:
    rows, named, gains = [], {}, {"ktransformers": [], "ktransformers, blind": []}
    for same in groups([r for r in records if r["profile"] == profile], "trace", "cache_ratio"):
        first, ratio = same[0], same[0]["cache_ratio"]
        paper = PAPER["fig8_decode_tokens_per_second"].get(NAMES.get(first["model"], ""), {})
        printed = paper.get(f"cache{100 * ratio:.0f}", {})
        named = {run_name(r): r for r in same}
        theirs = [printed.get({"llamacpp": "llama.cpp"}.get(name, name)) for name in named]
        cells = [beside(f"{1 / seconds(r):.1f}", figure) for r, figure in zip(named.values(), theirs)]
        rows.append([model_name(first), f"{ratio:.0%}", *cells, f"{1 / first['bound_seconds_per_step']:.1f}"])
        for name, found in gains.items():
            found += [seconds(named[name]) / seconds(named["hybrimoe"])] if name in named else []
    known, blind = (f"{statistics.mean(found):.2f}x" if found else "-" for found in gains.values())
    said = PAPER["headline_speedup_over_ktransformers"]["decode"]
    table = markdown(["model", "cache", *named, "bound"], rows)
    return table + paragraph(
        f"How much faster hybrimoe is, on average over these rows: {known} over ktransformers, {blind} over the same "
        f"placed blindly (paper: {said}x)."
    )


def prefill(records: Sequence[dict], profile: str) -> str:
    rows, times, gains, streams = [], {}, [], []
    for same in groups([r for r in records if r["profile"] == profile], "trace", "prompt_tokens"):
        times = {run_name(r): seconds(r) for r in same}
        gains.append(times["ktransformers"] / times["hybrimoe"])
        streams.append(times["hybrimoe"] / times["hybrimoe, streamed"])
        length = str(same[0]["prompt_tokens"])
        rows.append([model_name(same[0]), length, *(f"{time:.2f}" for time in times.values()), f"{gains[-1]:.2f}x"])
    said = PAPER["headline_speedup_over_ktransformers"]["prefill"]
    table = markdown(["model", "tokens", *times, "over ktransformers"], rows)
    return table + paragraph(
        f"Average over ktransformers: {statistics.mean(gains):.2f}x (paper: {said}x). Speed with whole layers streamed "
        f"against scheduled: {least_and_most(streams, '.2f')} times."
    )


def ablation(records: Sequence[dict]) -> str:
    blocks = groups(records, "profile", "prompt_tokens")
    paper, head, columns = PAPER["table_iii_qwen2_cache25_seconds"], ["seconds (paper)"], []
    for block in blocks:
        prompt, profile = block[0]["prompt_tokens"], block[0]["profile"]
        printed = paper["prefill" if prompt else "decode"] if profile == "a6000-paper" else {}
        theirs = [printed.get(TABLE_III.get(name, "")) for name in VARIANTS]
        head.append((f"prompt of {prompt}" if prompt else "decode") + f", {profile}")
        columns.append([beside(f"{seconds(r):.3f}", figure) for r, figure in zip(block, theirs)])
    return markdown(head, [[name, *cells] for name, *cells in zip(VARIANTS, *columns)])


def baseline(records: Sequence[dict]) -> str:
    """How much of the paper's gain in its Table III is its baseline: decoding on its own machine."""
    block = groups(records, "profile", "prompt_tokens")[0]
    run = dict(zip(VARIANTS, block))
    paper, ours = PAPER["table_iii_qwen2_cache25_seconds"]["decode"], seconds(run["all"])
    rows = [["the paper", str(paper["all"]), str(paper["baseline"]), f"{paper['baseline'] / paper['all']:.2f}x", ""]]
    for what, name in (("here", "baseline"), ("here, placed blindly", "baseline, blind")):
        time, found = seconds(run[name]), run[name]["hit_rate"]["mean"]
        rows.append([what, f"{ours:.3f}", f"{time:.3f}", f"{time / ours:.2f}x", f"{found:.0%}"])
    return markdown(["", "hybrimoe, s a token", "baseline, s a token", "ratio", "the baseline's hits"], rows)


def hits(records: Sequence[dict]) -> str:
    rows = []
    for same in groups(records, "trace", "cache_ratio"):
        ratio = same[0]["cache_ratio"]
        paper = PAPER["hit_rate_percent"].get(f"cache{100 * ratio:.0f}", {}).get(NAMES.get(same[0]["model"], ""), {})
        theirs = [paper.get(r["choices"]["cache"]) if r["system"] == "on-demand" else None for r in same]
        cells = [beside(f"{100 * r['hit_rate']['mean']:.1f}", figure) for r, figure in zip(same, theirs)]
        rows.append([model_name(same[0]), f"{ratio:.0%}", *cells])
    return markdown(["model", "cache", "LRU", "LFU", "MRS", "echo", "Belady"], rows)


def reuse(records: Sequence[dict]) -> str:
    ranks = max(len(r["share_by_rank"]) for r in records)
    rows = []
    for r in records:
        shares = [f"{100 * share:.0f}" for share in r["share_by_rank"]]
        rows.append([r["model"], *shares, *["-"] * (ranks - len(shares))])
    return markdown(["model", *(f"rank {i + 1}" for i in range(ranks))], rows)


def similarity(records: Sequence[dict]) -> str:
    rows = [
        ["cosine of the router's probabilities", *(f"{r['cosine']:.2f}" for r in records)],
        ["experts named rightly, per cent", *(f"{100 * r['named']:.0f}" for r in records)],
    ]
    return markdown(["layers between", *(str(r["distance"]) for r in records)], rows)


def costs() -> str:
    """Of one DeepSeek-V2-Lite expert, as the released fits have it."""
    fits = load_profile("a6000-paper").costs(get_shape("deepseek-v2-lite"), "int4")
    rows = [
        ["CPU", *(f"{1e3 * fits.cpu(n):.2f}" for n in LOADS)],
        ["device", *(f"{1e3 * fits.device(n):.2f}" for n in LOADS)],
        ["link", *[f"{1e3 * fits.transfer():.2f}"] * len(LOADS)],
    ]
    return markdown(["lane", *map(str, LOADS)], rows)


def depth(records: Sequence[dict]) -> str:
    rows, best, spread = [], [], 0.0
    for same in groups(records, "trace", "profile"):
        counts = [r["prefetch"] for r in same]
        useful = [f"{count['useful'] / count['issued']:.0%}" if count["issued"] else None for count in counts]
        cells = [beside(f"{1e3 * seconds(r):.2f}", share) for r, share in zip(same, useful)]
        rows.append([model_name(same[0]), same[0]["profile"], *cells])
        times = [seconds(r) for r in same]
        best.append(str(DEPTHS[times.index(min(times))]))
        spread = max(spread, max(times) / min(times) - 1)
    table = markdown(["model", "profile", *map(str, DEPTHS)], rows)
    return table + paragraph(
        f"Fastest depth, row by row: {', '.join(best)}. The largest spread over depths is {spread:.1%}."
    )


def rules(records: Sequence[dict]) -> str:
    rows, same, over = [], [], {}
    for same in groups(records, "trace", "profile", "prompt_tokens"):
        prompt, least = same[0]["prompt_tokens"], seconds(same[RULES.index("optimal")])
        for rule, r in zip(RULES, same):
            over.setdefault(rule, []).append(100 * (seconds(r) / least - 1))
        what = "decode" if prompt is None else f"prompt of {prompt}"
        rows.append([model_name(same[0]), same[0]["profile"], what, *(f"{1e3 * seconds(r):.2f}" for r in same)])
    said = "; ".join(f"`{rule}` {least_and_most(x, '.1f')} %" for rule, x in over.items() if rule != "optimal")
    table = markdown(["model", "profile", "rows", *(r["choices"]["scheduler"] for r in same)], rows)
    return table + paragraph(f"How much slower than `optimal` over whole runs, least and most: {said}.")


def links(records: Sequence[dict]) -> str:
    rows = [[r["machine"], r["belief"], f"{1e3 * r['seconds_per_token']:.2f}"] for r in records]
    return markdown(["machine", "the planner believes", "ms a token"], rows)


def streamed(records: Sequence[dict]) -> str:
    rows, gains, moved, busy = [], {}, {}, {}
    for same in groups(records, "trace", "profile", "prompt_tokens"):
        scheduled, whole = map(seconds, same)
        times = [f"{1e3 * scheduled:.0f}", f"{1e3 * whole:.0f}", f"{scheduled / whole:.2f}x"]
        length = same[0]["prompt_tokens"]
        rows.append([model_name(same[0]), same[0]["profile"], str(length), *times])
        gains.setdefault(length, []).append(scheduled / whole)
        moved.setdefault(length, []).append(100 * same[0]["bytes_h2d"] / same[1]["bytes_h2d"])
        busy.setdefault(length, []).append(100 * same[0]["occupancy"]["link"])
    said = ", ".join(f"{least_and_most(x, '.2f')} times at {length} tokens" for length, x in gains.items())
    most = max(gains)
    table = markdown(["model", "profile", "tokens", "scheduled", "streamed", "gain of streaming"], rows)
    return table + paragraph(
        f"Speed of streaming against scheduling: {said} (below 1: slower). At {most} tokens the schedule moves "
        f"{least_and_most(moved[most], '.0f')} % of the bytes, and its link is busy "
        f"{least_and_most(busy[most], '.0f')} % of the time."
    )


TABLES: dict[str, tuple[str, Callable[[Sequence[dict]], str]]] = {
    **{f"decode, {profile}": ("decode", functools.partial(decode, profile=profile)) for profile in PROFILES},
    **{f"prefill, {profile}": ("prefill", functools.partial(prefill, profile=profile)) for profile in PROFILES},
    **{make.__name__: (make.__name__, make) for make in (ablation, hits, reuse, similarity, depth, rules, links)},
    "streamed": ("streamed", streamed),
    "baseline": ("ablation", baseline),
}
"""By name: the experiment that a table takes its records from, and what makes it. `costs` needs no records."""


def groups(records: Sequence[dict], *keys: str) -> list[list[dict]]:
    """Records that agree in `keys`, in the order in which each first appears."""
    found: dict[tuple, list[dict]] = {}
    for record in records:
        found.setdefault(tuple(record[key] for key in keys), []).append(record)
    return list(found.values())


def seconds(record: dict) -> float:
    return record["seconds_per_step"]["mean"]


def paragraph(text: str) -> str:
    """It, under a table, in lines of the document's width."""
    return "\n" + textwrap.fill(text, 110, break_long_words=False, break_on_hyphens=False) + "\n"


def least_and_most(values: Sequence[float], form: str) -> str:
    return f"{min(values):{form}} to {max(values):{form}}"


def beside(ours: str, other: object) -> str:
    """Our figure, and in brackets the other where there is one."""
    return f"{ours} ({other})" if other else ours


def run_name(record: dict) -> str:
    """The system, or what was made of it."""
    choices, name = record["choices"], record["system"]
    if name == "hybrimoe":
        named = {rule: control for control, rule in CONTROLS.items()}
        name = named.get(choices["scheduler"], name)
        if name == "hybrimoe" and choices["stream_prefill"]:
            name = "hybrimoe, streamed"
    return f"{name}, blind" if choices["blind"] else name


def model_name(record: dict) -> str:
    """The model; made-up routing says so."""
    return record["model"] + (" (synthetic)" if record["trace"].startswith("synthetic:") else "")
