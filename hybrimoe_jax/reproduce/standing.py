"""What the page claims, what each claim rests on, and how it stands: solid, an assumption, or not shown."""

from __future__ import annotations

from collections.abc import Callable

from hybrimoe_jax.reproduce import experiments as e
from hybrimoe_jax.reproduce.figures import NUMBERS, Figures, Missing, least_and_most, markdown
from hybrimoe_jax.reproduce.sayings import (
    depth_verdict,
    gained,
    gives,
    knob_range,
    leads,
    live_range,
    prefill_leads,
    tokens,
)  # fmt: skip


def standing(f: Figures) -> str:
    """What each claim rests on."""
    rows = [[claim, say(make, f), rests, kind] for claim, make, rests, kind in CLAIMS]
    return markdown(["claim", "here", "rests on", "standing"], rows)


def say(make: Callable[[Figures], str], f: Figures) -> str:
    try:
        return make(f)
    except Missing:
        return "(not run)"


CLAIMS: tuple[tuple[str, Callable[[Figures], str], str, str], ...] = (
    (
        "hybrimoe decodes faster than ktransformers on the paper's machine, cache 25 %",
        lambda f: f"{least_and_most(leads(f, e.PAPER), '.2f')} times, placement from other text",
        "real routing; the profile's fits are of the released code",
        "solid in sign; the size is the baseline's placement (next row)",
    ),
    (
        "by 1.7 times on average, as the paper has it",
        lambda f: f"{least_and_most(leads(f, e.PAPER, other=e.BLIND), '.2f')} times over a blind placement",
        "how the paper's baseline was placed, which it does not say; its models' decode routing, which is not public",
        "not shown",
    ),
    (
        "the same with kernels bound by bandwidth",
        lambda f: f"{least_and_most(leads(f, e.ENGINEERED), '.2f')} times",
        "real routing; bandwidths of data sheets",
        "solid: hardly any lead is left",
    ),
    (
        "DeepSeek-V2-Lite's tokens per second agree with the paper's",
        lambda f: (
            f"{tokens(f, 'deepseek-v2-lite, law')} against "
            f"{NUMBERS['fig8_decode_tokens_per_second']['deepseek-v2-lite']['cache25']['hybrimoe']}"
        ),
        "constants of the same source as the paper's figure",
        "assumption: no independent confirmation",
    ),
    (
        "prompts are read faster than by ktransformers",
        lambda f: f"{least_and_most([x for n in e.LENGTHS for x in prefill_leads(f, e.PAPER, n)], '.1f')} times",
        "a baseline that computes every missing expert of a prompt on the CPU",
        "assumption; the size follows the prompt's length",
    ),
    (
        "scheduling alone decodes faster than the baseline, on every trace",
        lambda f: (
            f"{gives(f, 'baseline', '+scheduling')} the baseline's speed, all parts {gives(f, 'baseline', 'all')}"
        ),
        "real routing, and synthetic",
        "solid on this profile",
    ),
    (
        "MRS and prefetching add to it (Table III)",
        lambda f: (
            f"MRS instead of LRU {gives(f, '+scheduling, LRU', '+scheduling, +caching')} the speed, prefetching on top "
            f"{gives(f, '+scheduling, +caching', 'all')}"
        ),
        "the same; predictions by co-activation on real traces",
        "not shown: next to nothing",
    ),
    (
        "MRS has 5 to 8 points more hits than LRU at 25 %",
        lambda f: f"{least_and_most(gained(f), '+.1f')} points on real traces",
        "traces with the weights of the selected experts only",
        "not shown",
    ),
    (
        "rows of Mixtral and Qwen2-57B",
        lambda f: f"the lead goes from {knob_range(f)} with the knobs",
        "made-up routing",
        "assumption",
    ),
    (
        "three layers of lookahead are the right number",
        lambda f: depth_verdict(f).partition(". ")[2].removesuffix("."),
        "co-activation predictions on real traces",
        "not shown",
    ),
    (
        "the simulated lead is one that an engine has",
        lambda f: f"paced {live_range(f, 'paced')}, computed {live_range(f, 'computed')}",
        "the bundled model on a paced device",
        "solid for the engine; no GPU was measured",
    ),
)
"""(claim, what we find, what it rests on, its standing)."""
