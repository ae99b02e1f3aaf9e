"""What docs/reproduction.md reports: its runs by name, and the figures that no single run gives."""

from __future__ import annotations

from collections.abc import Mapping

from hybrimoe_jax.decide.planner import Planner
from hybrimoe_jax.machine.profile import load_profile
from hybrimoe_jax.machine.shapes import get_shape
from hybrimoe_jax.machine.virtual import VirtualMachine
from hybrimoe_jax.simulate.bound import BELADY
from hybrimoe_jax.simulate.cases import ORACLE, Case, halves, tokens_of
from hybrimoe_jax.simulate.replay import replay
from hybrimoe_jax.trace.file import Trace
from hybrimoe_jax.trace.importers import open_trace

SYNTHETIC = {model: f"synthetic:{model}" for model in ("mixtral-8x7b", "qwen2-57b-a14b")}
PROFILES = ("a6000-paper", "a6000-engineered")
RIVALS = ("ktransformers", "llamacpp", "adapmoe", "on-demand", "fiddler", "powerinfer", "freetoken")
CONTROLS = {"hybrimoe with cpu-misses": "cpu-misses", "hybrimoe with fetch-misses": "fetch-misses"}
LENGTHS = (32, 128, 512, 1024)
PROMPT_READERS = (
    *((system, ()) for system in ("hybrimoe", "ktransformers", "llamacpp", "adapmoe", "freetoken")),
    ("hybrimoe", (("stream_prefill", True),)),
)
"""(system, parts replaced): freetoken streams whole layers; the last row gives hybrimoe that way of reading prompts."""
QWEN = SYNTHETIC["qwen2-57b-a14b"]

STATIC = (("cache", "static"), ("prefetch", "none"))
VARIANTS: dict[str, tuple[str, tuple, bool]] = {
    "baseline, blind": ("ktransformers", (), True),
    "+scheduling, blind": ("hybrimoe", STATIC, True),
    "baseline": ("ktransformers", (), False),
    "+scheduling": ("hybrimoe", STATIC, False),
    "+prefetching": ("hybrimoe", (("cache", "lru"), ("scheduler", "cpu-misses")), False),
    "+scheduling, LRU": ("hybrimoe", (("cache", "lru"), ("prefetch", "none")), False),
    "+scheduling, +caching": ("hybrimoe", (("prefetch", "none"),), False),
    "all": ("hybrimoe", (), False),
    "beyond: echo cache": ("hybrimoe", (("cache", "echo"),), False),
    "beyond: optimal": ("hybrimoe", (("scheduler", "optimal"),), False),
    "beyond: adaptive depth": ("hybrimoe", (("lookahead", "adaptive"),), False),
    "beyond: pooled slots": ("hybrimoe", (("scope", "pooled"),), False),
    "oracle": (ORACLE, (), False),
}
"""Rows of Table III and ours: (system, parts replaced, blind). Under cpu-misses nothing is ever fetched, so a cache
policy alone changes nothing and has no row."""
DEPTHS = (0, 1, 2, 3, 4, 5, 6)
STREAMED_LENGTHS = (32, 512, 2048)
STREAMED_PROFILES = ("a6000-engineered", "rtx4090-pcie4", "h100-pcie5", "laptop-8gb")
RULES = ("released", "paper", "optimal", "bandwidth-split")
CACHES = ("lru", "lfu", "mrs", "echo")


def all_cases(traces: Mapping[str, str], steps: int) -> dict[str, list[Case]]:
    """Every experiment's cases. `traces`: model -> file of the real ones at hand."""
    sources = {**traces, **SYNTHETIC}
    decode = [
        Case(trace, profile, system, ratio, parts=parts, steps=steps, blind=blind)
        for trace in sources.values()
        for profile in PROFILES
        for ratio in (0.25, 0.75)
        for system, parts, blind in [
            ("hybrimoe", (), False),
            *((name, (), False) for name in RIVALS),
            ("ktransformers", (), True),
            *(("hybrimoe", (("scheduler", rule),), False) for rule in CONTROLS.values()),
            (ORACLE, (), False),
        ]
    ]
    prefill = [
        Case(trace, profile, system, 0.25, prompt=length, prompts=1, parts=parts)
        for profile in PROFILES
        for model, trace in sources.items()
        for length in LENGTHS
        if model not in SYNTHETIC or length <= 256
        for system, parts in PROMPT_READERS
    ]
    ablation = [
        Case(QWEN, profile, system, 0.25, parts=parts, prompt=prompt, prompts=2, steps=steps, blind=blind)
        for profile in PROFILES
        for prompt in (None, 256)
        for system, parts, blind in VARIANTS.values()
    ]
    hits = [
        Case(trace, "a6000-paper", *system, start="cold", parts=parts, steps=2 * steps)
        for trace in sources.values()
        for ratio in (0.25, 0.75)
        for system, parts in [*((("on-demand", ratio), (("cache", c),)) for c in CACHES), ((BELADY.name, ratio), ())]
    ]
    depth = [
        Case(trace, profile, "hybrimoe", 0.25, parts=(("lookahead", d), ("prefetch", "impact")), steps=steps)
        for trace in (*traces.values(), QWEN)
        for profile in ("a6000-paper", "h100-pcie5")
        for d in DEPTHS
    ]
    rules = [
        Case(
            trace,
            profile,
            "hybrimoe",
            0.25,
            parts=(("scheduler", rule), ("prefetch", "none")),
            prompt=prompt,
            prompts=1,
            steps=steps,
        )
        for trace in sources.values()
        for profile in ("a6000-paper", "h100-pcie5")
        for prompt in (None, 128)
        for rule in RULES
    ]
    streamed = [
        Case(trace, profile, "hybrimoe", 0.25, parts=parts, prompt=length, prompts=1)
        for trace in traces.values()
        for profile in STREAMED_PROFILES
        for length in STREAMED_LENGTHS
        for parts in ((), (("stream_prefill", True),))
    ]
    return {
        "decode": decode, "prefill": prefill, "ablation": ablation, "hits": hits, "depth": depth, "rules": rules,
        "streamed": streamed,
    }  # fmt: skip


def link_beliefs(steps: int) -> list[dict]:
    """A link that slows down beside the CPU, planned with and without knowing: a record for each belief."""
    rows = []
    tokens = tokens_of(QWEN)
    shape = get_shape("qwen2-57b-a14b")
    for name in ("h100-pcie5", "rtx4090-pcie4"):
        profile = load_profile(name)
        f = profile.figures
        truth = profile.costs(shape, "int4")
        for belief, factors in [
            ("both rates", {}),
            ("always the rate alone", {"link_bandwidth_cpu_busy": f.link_bandwidth / f.link_bandwidth_cpu_busy}),
            ("always the rate beside the CPU", {"link_bandwidth": f.link_bandwidth_cpu_busy / f.link_bandwidth}),
        ]:
            seconds = count = 0.0
            for sequences, frequencies in halves(tokens):
                planner = Planner(
                    "hybrimoe",
                    shape.layers,
                    shape.experts,
                    shape.top_k,
                    shape.experts // 4,
                    profile.changed(**factors).costs(shape, "int4"),
                    frequencies=frequencies,
                )
                result = replay(planner, VirtualMachine(truth), tokens.steps(sequences, steps))
                seconds, count = seconds + result.seconds, count + len(result.steps)
            rows.append({"machine": name, "belief": belief, "seconds_per_token": seconds / count})
    return rows


def layer_similarity(trace: Trace, distances: int = 6) -> list[dict]:
    """A record for each distance: `cosine` is `Trace.similarity`, `named` is `Trace.recall`."""
    held = [d for d in sorted(trace.lookahead) if d <= distances]
    return [{"distance": d, "cosine": trace.similarity(d), "named": trace.recall(d)} for d in held]


def reuse_by_rank(traces: Mapping[str, str]) -> list[dict]:
    """Per model, the chance that the expert of each score rank (first the highest) is chosen by the next token too."""
    return [
        {"model": model, "share_by_rank": open_trace(path).reuse_by_rank().tolist()} for model, path in traces.items()
    ]
