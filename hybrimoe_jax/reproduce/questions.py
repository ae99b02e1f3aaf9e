"""The reproduction's section on the slides' open questions, as far as a trace can answer them."""

from __future__ import annotations

from collections.abc import Sequence

from hybrimoe_jax.reproduce.experiments import DEPTHS, MIXED, SYNTHETIC
from hybrimoe_jax.reproduce.markdown import model_name, table
from hybrimoe_jax.reproduce.mixed_formats import Reloads


def questions(
    results: dict[str, list[dict]],
    links: Sequence[tuple[str, str, float]],
    mixed: Sequence[tuple[str, float, list[Reloads]]],
) -> str:
    lines = [
        "## The slides' open questions\n",
        "### Why three layers of lookahead?\n",
        "Milliseconds a token by depth (0: no prefetch); in brackets the share of prefetches that was useful.\n",
    ]
    rows = []
    for key in dict.fromkeys((r["trace"], r["profile"]) for r in results["depth"]):
        same = [r for r in results["depth"] if (r["trace"], r["profile"]) == key]
        cells = [
            f"{1e3 * r['seconds_per_step']['mean']:.2f}"
            + (f" ({r['prefetch']['useful'] / r['prefetch']['issued']:.0%})" if r["prefetch"]["issued"] else "")
            for r in same
        ]
        rows.append([model_name(same[0]), key[1], *cells])
    lines.append(table(["model", "profile", *map(str, DEPTHS)], rows))
    best, spread = [], 0.0
    for key in dict.fromkeys((r["trace"], r["profile"]) for r in results["depth"]):
        times = [r["seconds_per_step"]["mean"] for r in results["depth"] if (r["trace"], r["profile"]) == key]
        best.append(DEPTHS[times.index(min(times))])
        spread = max(spread, max(times) / min(times) - 1)
    lines.append(
        f"Fastest depth, row by row: {', '.join(map(str, best))}; the largest spread over depths is {spread:.1%}. Nothing singles out three. Real traces here predict "
        "by co-activation, synthetic ones by noisy gates.\n"
    )
    lines += ["### Can the fixed priorities be made optimal?\n", "Milliseconds, hybrimoe without prefetch, 25 %:\n"]
    rows = []
    for key in dict.fromkeys((r["trace"], r["profile"], r["prompt_tokens"]) for r in results["rules"]):
        same = [r for r in results["rules"] if (r["trace"], r["profile"], r["prompt_tokens"]) == key]
        rows.append(
            [
                model_name(same[0]),
                key[1],
                "decode" if key[2] is None else f"prompt of {key[2]}",
                *(f"{1e3 * r['seconds_per_step']['mean']:.2f}" for r in same),
            ]
        )
    lines.append(table(["model", "profile", "rows", *(r["choices"]["scheduler"] for r in same)], rows))
    lines.append(_rules_said(results["rules"]))
    lines += [
        "### Can the constant transfer time be refined?\n",
        "The link slows down beside a computing CPU; the planner knows both rates or believes in one (Qwen2-57B, synthetic, 25 %):\n",
    ]
    lines.append(
        table(["machine", "the planner believes", "ms a token"], [[m, b, f"{1e3 * s:.2f}"] for m, b, s in links])
    )
    lines += [_mixed(mixed), _streamed(results["streamed"])]
    lines += [
        "### Not answered here\n",
        "Several machines, and training for locality, are no questions for a trace (`docs/log.md` has what training says).\n",
    ]
    return "\n".join(lines)


def _mixed(mixed: Sequence[tuple[str, float, list[Reloads]]]) -> str:
    """Cost-aware MRS where experts have two sizes."""
    rows, change = [], {"cost": [], "cost per byte": []}
    for model, ratio, parts in mixed:
        plain = parts[0]
        cells = []
        for part in parts:
            cells += [f"{100 * part.hit_rate:.1f}", f"{1e3 * part.seconds_per_step:.2f}"]
            if part.rule in change:
                change[part.rule].append(part.seconds_per_step / plain.seconds_per_step - 1)
        rows.append([model + (" (synthetic)" if model in SYNTHETIC else ""), f"{ratio:.0%}", *cells])
    head = [f"{part.rule}: {what}" for part in parts for what in ("hits %", "link ms")]
    said = "; ".join(f"`{rule}` {min(x):+.1%} to {max(x):+.1%}" for rule, x in change.items())
    return (
        "### Should MRS weigh the cost of reloading?\n\n"
        f"Where all experts have one size there is nothing to weigh. Here even layers are {MIXED[0]} and odd ones {MIXED[1]}, all layers share one budget of bytes, every miss is fetched and kept, "
        "cold start, profile a6000-engineered; the value of an expert is its MRS score, alone, times its transfer time, or that by its bytes (`hybrimoe_jax/simulation/mixed_formats.py`). Link time a token:\n\n"
        + table(["model", "cache", *head], rows)
        + f"\nLink time against `plain`, least and most: {said}. The larger expert costs more to fetch, but it also takes more room: by the byte the two nearly cancel, "
        "since a transfer's latency is a small part of it.\n"
    )


def _streamed(records: Sequence[dict]) -> str:
    """Whole layers through two buffers against scheduling, for prompts of growing length."""
    if not records:
        return ""
    rows, gains = [], {}
    for key in dict.fromkeys((r["trace"], r["profile"], r["prompt_tokens"]) for r in records):
        schedule, stream = (
            r["seconds_per_step"]["mean"] for r in records if (r["trace"], r["profile"], r["prompt_tokens"]) == key
        )
        first = next(r for r in records if r["trace"] == key[0])
        gains.setdefault(key[2], []).append(schedule / stream)
        cells = [f"{1e3 * schedule:.0f}", f"{1e3 * stream:.0f}", f"{schedule / stream:.2f}x"]
        rows.append([model_name(first), key[1], str(key[2]), *cells])
    said = ", ".join(f"{min(x):.2f}x to {max(x):.2f}x at {length} tokens" for length, x in gains.items())
    longest = [r for r in records if r["prompt_tokens"] == max(gains)]
    planned, whole = ([r for r in longest if r["choices"]["stream_prefill"] is on] for on in (False, True))
    busy = [r["occupancy"]["link"] for r in planned]
    moved = [r["bytes_h2d"] / other["bytes_h2d"] for r, other in zip(planned, whole)]
    return (
        "### Beyond the paper: when does a prompt want whole layers?\n\n"
        "hybrimoe's schedule moves experts of one layer at a time, so its link rests during attention; FreeToken's stream never rests, but moves everything that is not resident and leaves the CPU idle. Milliseconds to the first token, 25 %:\n\n"
        + table(["model", "profile", "tokens", "scheduled", "streamed", "gain of streaming"], rows)
        + f"\nStreaming gains {said} (below 1: it is slower). It takes what the link takes, whatever the length, and loses while the CPU does a good part of the work. At {max(gains)} tokens the schedule still moves only {min(moved):.0%} to {max(moved):.0%} of the bytes, "
        f"but its link is busy {min(busy):.0%} to {max(busy):.0%} of the time, and slower beside a computing CPU, so that the stream catches up with it. `--stream-prefill` turns it on for any system.\n"
    )


def _rules_said(records: Sequence[dict]) -> str:
    rows: dict[tuple, dict[str, float]] = {}
    for r in records:
        row = rows.setdefault((r["trace"], r["profile"], r["prompt_tokens"]), {})
        row[r["choices"]["scheduler"]] = r["seconds_per_step"]["mean"]
    over = {rule: [row[rule] / row["optimal"] - 1 for row in rows.values()] for rule in next(iter(rows.values()))}
    said = "; ".join(f"`{rule}` {min(x):+.1%} to {max(x):+.1%}" for rule, x in over.items() if rule != "optimal")
    return (
        f"Whole runs against `optimal`, least and most: {said}. What a rule fetches also fills the cache for the steps to come, which one "
        "layer's objective does not see.\n"
    )
