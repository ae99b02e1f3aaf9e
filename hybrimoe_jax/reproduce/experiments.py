"""The runs that docs/reproduction.md reports, by experiment and name.

Decoding replays whole sequences, 16 of each trace where it has them, with frequencies of the sequences that
are not replayed. Where many runs are compared with each other, the first tokens of the same sequences are replayed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from hybrimoe_jax.reproduce.sources import BUNDLED, ONE_SEQUENCE, QWEN2, SIZE, SYNTHETIC
from hybrimoe_jax.simulate.bound import BELADY
from hybrimoe_jax.simulate.cases import ORACLE, Case
from hybrimoe_jax.simulate.synthetic import PREFIX

SEQUENCES = 16
"""Replayed of each trace, evenly spread. (gpt-oss-20b alternates long and short ones: no even stride.)"""
FIRST_TOKENS = 16
"""Of each sequence, where many settings are compared."""
PROFILES = ("a6000-paper", "a6000-engineered")
PAPER, ENGINEERED = PROFILES
RATIOS = (0.25, 0.75)
LENGTHS = (32, 128, 512, 1024)
PROMPTS = 8
"""Of each half of a trace."""
Parts = tuple[tuple[str, Any], ...]


class Variant(NamedTuple):
    """A system with some parts replaced. `blind`: placed without frequencies."""

    system: str
    parts: Parts = ()
    blind: bool = False


BLIND = "ktransformers, blind"
SYSTEMS = {
    "hybrimoe": Variant("hybrimoe"),
    "ktransformers": Variant("ktransformers"),
    BLIND: Variant("ktransformers", blind=True),
    **{name: Variant(name) for name in ("llamacpp", "on-demand")},
}
"""Columns of the decode tables."""
FEW = ("hybrimoe", "ktransformers", BLIND, "llamacpp")
DECODED = {
    (PAPER, 0.25): tuple(SYSTEMS), (ENGINEERED, 0.25): (*FEW, "on-demand"), (PAPER, 0.75): FEW,
}  # fmt: skip
"""(profile, share of the experts that the device holds) -> the systems that run."""
PRINTED = ("deepseek-v2-lite, law", *SYNTHETIC)
"""Rows whose model the paper has: the larger cache is replayed for these."""
READERS = {name: Variant(name) for name in ("hybrimoe", "ktransformers", "llamacpp", "adapmoe", "freetoken")}
"""freetoken streams whole layers."""
WAYS = {"scheduled": Variant("hybrimoe"), "streamed": Variant("hybrimoe", (("stream_prefill", True),))}
"""The last one gives hybrimoe that way of reading prompts."""
STATIC = (("cache", "static"), ("prefetch", "none"))
TABLE_III = {
    "baseline, blind": Variant("ktransformers", blind=True),
    "baseline": Variant("ktransformers"),
    "+scheduling": Variant("hybrimoe", STATIC),
    "+prefetching": Variant("hybrimoe", (("cache", "lru"), ("scheduler", "cpu-misses"))),
    "+scheduling, LRU": Variant("hybrimoe", (("cache", "lru"), ("prefetch", "none"))),
    "+scheduling, +caching": Variant("hybrimoe", (("prefetch", "none"),)),
    "all": Variant("hybrimoe"),
}
"""Under cpu-misses nothing is ever fetched, so a cache policy alone changes nothing and has no row."""
BEYOND = {
    "+scheduling, blind": Variant("hybrimoe", STATIC, True),
    "beyond: echo cache": Variant("hybrimoe", (("cache", "echo"),)),
    "beyond: optimal": Variant("hybrimoe", (("scheduler", "optimal"),)),
    "beyond: adaptive depth": Variant("hybrimoe", (("lookahead", "adaptive"),)),
    "beyond: pooled slots": Variant("hybrimoe", (("scope", "pooled"),)),
    ORACLE: Variant(ORACLE),
}
ABLATION_PROMPT = 256
OF_PROMPTS = ("baseline, blind", "baseline", "+scheduling", "+prefetching", "all")
OTHERS = (1, 8)
"""Sequences that a static placement is learned from; besides none and all."""
CACHES = ("lru", "lfu", "mrs", "echo")
ALPHAS = (0.1, 0.3, 0.5, 0.9)
ALPHA = 0.5
"""Of the paper's released code, our default."""
TIMED_ALPHAS = (0.1, 0.3, ALPHA)
KNOBS = ((0.5, 0.25), (0.25, 0.5), (0.0, 0.55), (0.0, 0.75), (1.0, 0.25))
"""(skew, stay) of synthetic routing. The first is that of QWEN2 everywhere else."""
OF_KNOBS = ("baseline, blind", "baseline", "+scheduling", "+prefetching", "+scheduling, +caching", "all")
DEPTHS = (0, 1, 2, 3, 4, 6)
FAST = "h100-pcie5"
RULES = ("released", "paper", "optimal", "bandwidth-split")
STREAMED_LENGTHS = (32, 512, 2048)
STREAMED_PROFILES = (ENGINEERED, FAST)


def all_runs(traces: Mapping[str, str]) -> dict[str, list[tuple[str, Case]]]:
    """Every experiment's (name of the run, case).

    Args:
      traces: row -> file of the real ones at hand. The bundled model's routing serves for hits alone: its own engine
        runs it, see `live`.
    """
    public = {row: trace for row, trace in traces.items() if row != BUNDLED}
    return {
        "hits": hits(traces), "decode": decode(public), "ablation": ablation(public), "placement": placement(public),
        "prefill": prefill(public), "alpha": alpha(traces), "knobs": knobs(), "depth": depth(public),
        "rules": rules(public), "streamed": streamed(public),
    }  # fmt: skip


def case(row: str, trace: str, variant: Variant, profile: str = PAPER, ratio: float = 0.25, **more: Any) -> Case:
    """Token by token over the sequences that are replayed, unless `more` says otherwise."""
    system, parts, blind = variant
    if not more.get("prompt"):
        more = {"sequences": SEQUENCES, **more}
    # With one sequence nothing is known: what is placed by frequency is placed blindly, and is one run.
    return Case(trace, profile, system, ratio, parts=parts, blind=blind or row in ONE_SEQUENCE, name=row, **more)


def several(traces: Mapping[str, str]) -> dict[str, str]:
    """The real traces of more than one sequence."""
    return {row: trace for row, trace in traces.items() if row not in ONE_SEQUENCE}


def models(traces: Mapping[str, str]) -> dict[str, str]:
    """One real trace of each model that has several sequences: for what compares many settings."""
    first = {row.partition(",")[0]: row for row in reversed(several(traces))}
    return {row: trace for row, trace in traces.items() if row in first.values()}


def decode(traces: Mapping[str, str]) -> list[tuple[str, Case]]:
    return [
        (name, case(row, trace, SYSTEMS[name], profile, ratio))
        for row, trace in {**traces, **SYNTHETIC}.items()
        for (profile, ratio), names in DECODED.items()
        if ratio == 0.25 or row in PRINTED
        for name in names
    ]


def placement(traces: Mapping[str, str]) -> list[tuple[str, Case]]:
    """How fast the static placement is by how much other text it was learned from, beside hybrimoe."""
    runs = []
    for row, trace in several(traces).items():
        runs.append(("hybrimoe", case(row, trace, Variant("hybrimoe"))))
        runs.append(("0", case(row, trace, Variant("ktransformers", blind=True))))
        for others in (*OTHERS, None):
            found = case(row, trace, Variant("ktransformers"), others=others)
            runs.append(("all" if others is None else str(others), found))
    return runs


def prefill(traces: Mapping[str, str]) -> list[tuple[str, Case]]:
    """Prompts are taken from both halves of a trace, each read with frequencies of the other."""
    return [
        (name, case(row, trace, variant, profile, prompt=length, prompts=PROMPTS))
        for row, trace in {**models(traces), **SYNTHETIC}.items()
        for profile in PROFILES
        for length in LENGTHS
        if row not in SYNTHETIC or length <= 128
        for name, variant in READERS.items()
    ]


def ablation(traces: Mapping[str, str]) -> list[tuple[str, Case]]:
    """Table III on every trace, with more rows where it is cheap."""
    runs = []
    for row, trace in {**traces, QWEN2: SYNTHETIC[QWEN2]}.items():
        synthetic = row in SYNTHETIC
        variants = TABLE_III | BEYOND if synthetic else TABLE_III
        for profile in PROFILES if synthetic else (PAPER,):
            runs += [(name, case(row, trace, variant, profile)) for name, variant in variants.items()]
        if row not in ONE_SEQUENCE:
            prompt: dict[str, Any] = {"prompt": ABLATION_PROMPT, "prompts": PROMPTS if not synthetic else 2}
            runs += [(name, case(row, trace, TABLE_III[name], **prompt)) for name in OF_PROMPTS]
    return runs


def hits(traces: Mapping[str, str]) -> list[tuple[str, Case]]:
    """Every miss is fetched and kept, from a cold start."""
    return [
        (name, cold(row, trace, name, ratio))
        for row, trace in {**traces, **SYNTHETIC}.items()
        for ratio in RATIOS
        for name in ((*CACHES, BELADY.name) if ratio == RATIOS[0] else ("lru", "mrs"))
    ]


def cold(row: str, trace: str, cache: str, ratio: float = 0.25) -> Case:
    variant = Variant(BELADY.name) if cache == BELADY.name else Variant("on-demand", (("cache", cache),))
    return case(row, trace, variant, ratio=ratio, start="cold")


def mrs(value: float) -> str:
    return "mrs" if value == ALPHA else f"mrs:alpha={value:g}"


def alpha(traces: Mapping[str, str]) -> list[tuple[str, Case]]:
    """Hits of MRS by its alpha (`cold`), and hybrimoe's time with it on the first tokens of each sequence."""
    runs = []
    for row, trace in {**traces, QWEN2: SYNTHETIC[QWEN2]}.items():
        runs += [(f"hits {value:g}", cold(row, trace, mrs(value))) for value in ALPHAS]
        if row == BUNDLED:
            continue
        timed: dict[str, Any] = {"sequence_tokens": None if row in ONE_SEQUENCE else 2 * FIRST_TOKENS}
        for value in TIMED_ALPHAS:
            runs.append((f"time {value:g}", case(row, trace, Variant("hybrimoe", (("cache", mrs(value)),)), **timed)))
    return runs


def knobs() -> list[tuple[str, Case]]:
    """Table III's rows and the hits of LRU and MRS over the two knobs of synthetic routing."""
    runs = []
    for skew, stay in KNOBS:
        row = f"skew {skew:g}, stay {stay:g}"
        trace = f"{PREFIX}qwen2-57b-a14b:skew={skew:g},stay={stay:g},{SIZE}"
        runs += [(name, case(row, trace, TABLE_III[name])) for name in OF_KNOBS]
        runs += [(name, cold(row, trace, name)) for name in ("lru", "mrs")]
    return runs


def depth(traces: Mapping[str, str]) -> list[tuple[str, Case]]:
    return [
        (str(d), case(row, trace, Variant("hybrimoe", (("lookahead", d), ("prefetch", "impact"))), profile,
                      sequence_tokens=FIRST_TOKENS))
        for row, trace in {**models(traces), QWEN2: SYNTHETIC[QWEN2]}.items()
        for profile in (PAPER, FAST)
        for d in DEPTHS
    ]  # fmt: skip


def rules(traces: Mapping[str, str]) -> list[tuple[str, Case]]:
    runs = []
    for row, trace in {**models(traces), QWEN2: SYNTHETIC[QWEN2]}.items():
        for profile in (PAPER, FAST):
            decoded: dict[str, Any] = {"sequence_tokens": FIRST_TOKENS}
            for more in (decoded, {"prompt": 128, "prompts": PROMPTS // 4}):
                for rule in RULES:
                    variant = Variant("hybrimoe", (("scheduler", rule), ("prefetch", "none")))
                    runs.append((rule, case(row, trace, variant, profile, **more)))
    return runs


def streamed(traces: Mapping[str, str]) -> list[tuple[str, Case]]:
    return [
        (name, case(row, trace, way, profile, prompt=length, prompts=PROMPTS // 4))
        for row, trace in models(traces).items()
        for profile in STREAMED_PROFILES
        for length in STREAMED_LENGTHS
        for name, way in WAYS.items()
    ]


def shortened(runs: Mapping[str, list[tuple[str, Case]]], steps: int) -> dict[str, list[tuple[str, Case]]]:
    """The same with at most so many steps of each run, and one prompt of each half: a quick look."""
    return {
        name: [(run, dataclasses.replace(case, steps=steps, prompts=1)) for run, case in rows]
        for name, rows in runs.items()
    }
