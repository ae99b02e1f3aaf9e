"""docs/reproduction.md: the paper's figures, ours, on which trace and profile, and why they differ."""

from __future__ import annotations

from collections.abc import Sequence

from hybrimoe_jax.machine.profile import load_profile
from hybrimoe_jax.machine.shapes import get_shape
from hybrimoe_jax.reproduce.comparisons import ablation, decode, hits, prefill
from hybrimoe_jax.reproduce.markdown import table
from hybrimoe_jax.reproduce.mixed_formats import Reloads
from hybrimoe_jax.reproduce.questions import questions

INTRO = """# The paper, side by side

Written by `python -m hybrimoe_jax.reproduce`; do not edit. The paper is HybriMoE (DAC 2025, arXiv 2504.05897); its figures are in
`hybrimoe_jax/simulation/paper-numbers.json`. **All times of ours are simulated** on a machine's profile (`hybrimoe_jax/simulation/profiles`, a source for every
figure), none is measured. `a6000-paper` is the paper's machine as its released code timed it, `a6000-engineered` the same hardware with kernels bound by
bandwidth. Experts are 4-bit; warm start, {steps} tokens of each half of a trace, frequencies from the other half, unless a section says otherwise.

What is replayed: DeepSeek-V2-Lite, the `law` task of ESFT (**prefill, replayed token by token**: no decode trace of it is public); gpt-oss-20b, real decode steps.
**Mixtral-8x7B and Qwen2-57B: no trace by token is public. Their rows, marked "synthetic", come from made-up routing** whose statistics
`hybrimoe_jax/simulation/synthetic.py` states; they show what the rules do on such shapes, not what those models do. Traces without gates' predictions let the
co-activation table predict, and MRS runs with p = k where there are no full scores.
"""


def document(
    results: dict[str, list[dict]],
    links: Sequence[tuple[str, str, float]],
    reuse: dict[str, list[float]],
    similarity: Sequence[tuple[float, float]],
    mixed: Sequence[tuple[str, float, list[Reloads]]],
    steps: int,
) -> str:
    """The whole text. `results`: records by experiment; the rest as `experiments` returns it (empty: what it needs was not at hand)."""
    parts = [
        INTRO.format(steps=steps),
        decode(results["decode"]),
        prefill(results["prefill"]),
        ablation(results["ablation"]),
        hits(results["hits"]),
        _character(reuse, similarity),
        questions(results, links, mixed),
    ]
    return "\n".join(parts)


def _character(reuse: dict[str, list[float]], similarity: Sequence[tuple[float, float]]) -> str:
    lines = ["## Characterisation\n"]
    if reuse:
        longest = max(map(len, reuse.values()))
        rows = [
            [model, *(f"{100 * share:.0f}" for share in shares), *["-"] * (longest - len(shares))]
            for model, shares in reuse.items()
        ]
        lines += [
            "Chance that the next token uses an expert again, by its score rank, per cent (paper: falls with the rank):\n",
            table(["model", *(f"rank {i + 1}" for i in range(longest))], rows),
        ]
    if similarity:
        lines += [
            "How alike a layer's router judges its own state and the state of a layer before it, by distance: the bundled model (9 million parameters, 6 layers), run here on a text of its own. The paper draws the cosine of "
            "hidden states; what decides is what the router makes of them:\n",
            table(
                ["layers between", *map(str, range(1, 1 + len(similarity)))],
                [
                    ["cosine of the router's probabilities", *(f"{cosine:.2f}" for cosine, _ in similarity)],
                    ["experts named rightly, per cent", *(f"{100 * share:.0f}" for _, share in similarity)],
                ],
            ),
        ]
    costs = load_profile("a6000-paper").costs(get_shape("deepseek-v2-lite"), "int4")
    loads = (1, 8, 32, 128, 512)
    rows = [
        ["CPU", *(f"{1e3 * costs.cpu(n):.2f}" for n in loads)],
        ["device", *(f"{1e3 * costs.device(n):.2f}" for n in loads)],
        ["link", *[f"{1e3 * costs.transfer():.2f}"] * len(loads)],
    ]
    lines += [
        "Milliseconds of one DeepSeek-V2-Lite expert by load, profile a6000-paper (the released fits); n experts of load 1 take n times the first column, on the CPU 0.79 ms more:\n",
        table(["lane", *map(str, loads)], rows),
    ]
    return "\n".join(lines)
