"""The reproduction's sections that set the paper's figures beside ours: decoding, prompts, Table III, hit rates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from hybrimoe_jax.reproduce.experiments import LENGTHS, VARIANTS
from hybrimoe_jax.reproduce.markdown import mean, model_name, run_name, slower, table, tokens_per_second

PAPER = json.loads((Path(__file__).parent / "paper-numbers.json").read_text(encoding="utf-8"))
BLIND = "ktransformers, blind"
NAMES = {"deepseek-v2-lite": "deepseek-v2-lite", "mixtral-8x7b": "mixtral", "qwen2-57b-a14b": "qwen2"}


def decode(records: list[dict]) -> str:
    lines = [
        "## Decoding (paper: figure 8)\n",
        "Tokens per second; in brackets the paper's, where it prints one. Last column: what no system with hybrimoe's slots can beat.\n",
    ]
    for profile in dict.fromkeys(r["profile"] for r in records):
        rows = []
        for record in [
            r
            for r in records
            if r["profile"] == profile and r["system"] == "hybrimoe" and r["choices"]["scheduler"] == "paper"
        ]:
            same = {
                run_name(r): r
                for r in records
                if (r["trace"], r["profile"], r["cache_ratio"]) == (record["trace"], profile, record["cache_ratio"])
            }
            printed = (
                PAPER["fig8_decode_tokens_per_second"]
                .get(NAMES.get(record["model"], ""), {})
                .get(f"cache{record['cache_ratio'] * 100:.0f}", {})
            )
            cells = []
            for name, r in same.items():
                theirs = printed.get({"llamacpp": "llama.cpp"}.get(name, name))
                cells.append(tokens_per_second(r) + (f" ({theirs})" if theirs else ""))
            rows.append(
                [
                    model_name(record),
                    f"{record['cache_ratio']:.0%}",
                    *cells,
                    f"{1 / record['bound_seconds_per_step']:.1f}",
                ]
            )
        names = list(same)
        lines += [f"### {profile}\n", table(["model", "cache", *names, "bound"], rows)]
        own = [r for r in records if r["profile"] == profile and run_name(r) == "hybrimoe"]
        known, blind = (mean([slower(records, r, name) for r in own]) for name in ("ktransformers", BLIND))
        said = PAPER["headline_speedup_over_ktransformers"]["decode"]
        lines.append(
            f"hybrimoe over ktransformers: {known:.2f}x on average over these rows, {blind:.2f}x over the same placed blindly (paper: {said}x).\n"
        )
    lines.append(_baseline_said(records))
    lines.append(
        "Why they differ: the fits of `a6000-paper` are for DeepSeek-V2-Lite and carry over to it; for the other models overheads are kept and bytes and operations scaled, "
        "and attention is charged by bytes alone, since no figure was published. With bandwidth-bound kernels (`a6000-engineered`) the CPU beats "
        "a PCIe 3.0 link for every missing expert: hybrimoe then demands next to nothing over the link, only prefetching refills the cache, and its lead over a static placement is gone but for gpt-oss-20b at 25 %, where prefetching pays. "
        "The control with `fetch-misses`, which keeps every miss, is among the slowest there.\n"
    )
    return "\n".join(lines)


def _baseline_said(records: Sequence[dict]) -> str:
    """Why ours is less than the paper's 1.7x, by the one baseline that it prints."""
    paper = PAPER["table_iii_qwen2_cache25_seconds"]["decode"]
    same = {
        run_name(r): r
        for r in records
        if (r["model"], r["profile"], r["cache_ratio"]) == ("qwen2-57b-a14b", "a6000-paper", 0.25)
    }
    seconds = {name: r["seconds_per_step"]["mean"] for name, r in same.items()}
    hits = {name: r["hit_rate"]["mean"] for name, r in same.items()}
    return (
        f"**Why less than {PAPER['headline_speedup_over_ktransformers']['decode']}x on the paper's own machine?** Mostly the baseline, as far as the one that is printed tells. For Qwen2 at 25 % (Table III) hybrimoe "
        f"takes {paper['all']} s there and {seconds['hybrimoe']:.3f} here (DeepSeek agrees too, above), but the baseline {paper['baseline']} s there and {seconds['ktransformers']:.3f} here: our `ktransformers` places the "
        f"experts that other sequences used most and so finds {hits['ktransformers']:.0%} of those it needs. Placed blindly it finds {hits[BLIND]:.0%} and takes {seconds[BLIND]:.3f} s, so the paper's is what a placement that knows little "
        f"would take: {paper['baseline'] / paper['all']:.2f}x there, {seconds['ktransformers'] / seconds['hybrimoe']:.2f}x and {seconds[BLIND] / seconds['hybrimoe']:.2f}x here. The rest: at 75 % little is left to "
        "schedule; Mixtral's times of ours are about half the paper's, for hybrimoe and llama.cpp alike, since the fits are another model's; and the popularity in synthetic routing is a guess. The paper does not say how its baseline "
        "chooses residents, so this is an inference.\n"
    )


def prefill(records: list[dict]) -> str:
    lines = [
        "## Reading prompts (paper: figure 7, average 1.33x over ktransformers)\n",
        "Time to first token in seconds at 25 %; a prompt is consecutive tokens of a trace in one step, warm start. Last column: ktransformers' time over hybrimoe's.\n",
    ]
    for profile in dict.fromkeys(r["profile"] for r in records):
        rows, speedups, streamed = [], [], []
        for trace in dict.fromkeys(r["trace"] for r in records):
            for length in LENGTHS:
                key = (profile, trace, length)
                same = {run_name(r): r for r in records if (r["profile"], r["trace"], r["prompt_tokens"]) == key}
                if not same:
                    continue
                seconds = {name: r["seconds_per_step"]["mean"] for name, r in same.items()}
                speedups.append(seconds["ktransformers"] / seconds["hybrimoe"])
                streamed.append(seconds["hybrimoe"] / seconds["hybrimoe, streamed"])
                cells = [f"{value:.2f}" for value in seconds.values()]
                rows.append([model_name(same["hybrimoe"]), str(length), *cells, f"{speedups[-1]:.2f}x"])
        lines += [f"### {profile}\n", table(["model", "tokens", *seconds, "over ktransformers"], rows)]
        lines.append(
            f"Average {mean(speedups):.2f}x over ktransformers; paper {PAPER['headline_speedup_over_ktransformers']['prefill']}x. Streaming whole layers instead of "
            f"scheduling changes hybrimoe's time by {min(streamed):.2f}x to {max(streamed):.2f}x (above 1: streaming is faster).\n"
        )
    lines.append(
        "Ours is larger than the paper's because our `ktransformers` computes every missing expert of a prompt on the CPU; the paper does not say how its baseline read prompts, and llama.cpp for one uploads weights for batches of 32 and more. "
        "`freetoken` reads a prompt as its authors describe it: the device computes everything, and while it computes a layer the next layer's experts cross the link into the other of two buffers, "
        "asked for or not; residents are not moved again, and the two buffers' memory comes on top of the slots that are compared. With a PCIe 3.0 link "
        "it takes what the link takes, whatever the prompt's length, and a schedule that leaves a part of the experts to the CPU is faster; longer prompts and faster links are at the end of this page.\n"
    )
    return "\n".join(lines)


def ablation(records: list[dict]) -> str:
    lines = ["## Table III: what each part gives (Qwen2-57B at 25 %; synthetic routing)\n"]
    paper = PAPER["table_iii_qwen2_cache25_seconds"]
    printed = {
        "baseline, blind": "baseline",
        "baseline": "baseline",
        "+scheduling": "scheduling",
        "+prefetching": "prefetching",
        "all": "all",
    }
    count, rows = len(VARIANTS), []
    blocks = [records[i * count : (i + 1) * count] for i in range(4)]
    for number, name in enumerate(VARIANTS):
        row = [name]
        for block, phase in zip(blocks, ("decode", "prefill") * 2):
            theirs = paper[phase].get(printed.get(name, ""))
            row.append(
                f"{block[number]['seconds_per_step']['mean']:.3f}"
                + (f" ({theirs})" if theirs and block in blocks[:2] else "")
            )
        rows.append(row)
    lines.append(
        table(
            [
                "seconds (paper)",
                "decode, a6000-paper",
                "prompt of 256, a6000-paper",
                "decode, a6000-engineered",
                "prompt of 256, a6000-engineered",
            ],
            rows,
        )
    )
    lines.append(
        f"The paper's `+caching` at decode is {paper['decode']['caching']} s. It has no row of its own here: with misses on the CPU nothing is ever fetched, so a cache policy alone changes nothing; what it adds to "
        'scheduling is the difference between the rows with LRU and with MRS. "Blind" rows place experts without frequencies. The paper does not print its prompt\'s length; ours is 256 tokens.\n'
    )
    return "\n".join(lines)


def hits(records: list[dict]) -> str:
    lines = [
        "## Hit rates (paper: figure 9)\n",
        "Per cent, every miss fetched and kept, cold start; in brackets the paper's.\n",
    ]
    rows = []
    for trace in dict.fromkeys(r["trace"] for r in records):
        for ratio in (0.25, 0.75):
            same = [r for r in records if r["trace"] == trace and r["cache_ratio"] == ratio]
            paper = (
                PAPER["hit_rate_percent"].get(f"cache{ratio * 100:.0f}", {}).get(NAMES.get(same[0]["model"], ""), {})
            )
            cells = []
            for r in same:
                theirs = paper.get(r["choices"]["cache"]) if r["system"] == "on-demand" else None
                cells.append(f"{100 * r['hit_rate']['mean']:.1f}" + (f" ({theirs})" if theirs else ""))
            rows.append([model_name(same[0]), f"{ratio:.0%}", *cells])
    lines.append(table(["model", "cache", "LRU", "LFU", "MRS", "echo", "Belady"], rows))
    lines.append(
        "MRS gains less over LRU here than in the paper where a trace holds the selected experts' weights only: p = k makes it a weighted recency score. Where a layer has as many slots as a "
        "token needs experts (Mixtral at 25 %) and every miss is kept, all policies hold the last token's experts and cannot differ; the paper's gain there needs misses that are not kept.\n"
    )
    return "\n".join(lines)
