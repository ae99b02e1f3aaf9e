"""Pictures of simulations: times, hits by capacity, lanes of one layer or step, how often predictors are right.

Needs matplotlib (the extra `plots`). Colours are Okabe and Ito's, which colour-blind readers can tell apart; widths fit
a column of 3.4 inches. Every title says that times are simulated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hybrimoe_jax.decide.prefetch.predictors import RECORDED, Perfect, build_predictor, predictor_rule
from hybrimoe_jax.decide.systems import System
from hybrimoe_jax.figures import LANE_COLOURS, STYLE, WIDTH, bar_style, line_style
from hybrimoe_jax.files import replacing
from hybrimoe_jax.simulate import grid
from hybrimoe_jax.simulate.bound import BELADY
from hybrimoe_jax.simulate.cases import Case, halves, tokens_of, trace_name
from hybrimoe_jax.simulate.workload import TokenSteps
from hybrimoe_jax.trace.timeline import Timeline
from hybrimoe_jax.trace.tokens import load_recording

CAPACITIES = (0.125, 0.25, 0.375, 0.5, 0.75)
POLICIES = ("lru", "lfu", "mrs", "echo")
"""What the hit-rate picture draws, beside those that are asked for."""
PREDICTED = ("co-activation", "previous", "router-reuse", "corrected")
"""What the picture of predictions draws, likewise."""
GANTT_STEPS, GANTT_LAYERS, PROMPT = 6, 4, 128
DISTANCES = 6


def write_all(
    records: Sequence[dict],
    cases: Sequence[Case],
    folder: str | Path,
    policies: Iterable[Any] = (),
    predictors: Iterable[Any] = (),
) -> list[Path]:
    """Writes what the records and their cases give: PNG files in `folder`, which is made.

    `policies`, `predictors`: what the pictures of hits and of predictions compare. Without them: a few built-in ones,
    and those that the cases ask for.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    policies = list(policies) or [*POLICIES, *asked(cases, "cache", POLICIES)]
    predictors = list(predictors) or [*PREDICTED, *asked(cases, "predictor", PREDICTED)]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []

    def save(figure, name: str) -> None:
        path = folder / f"{name}.png"
        with replacing(path, "wb") as file:
            figure.savefig(file, format="png", bbox_inches="tight")
        plt.close(figure)
        written.append(path)

    cases = [dataclasses.replace(case, save_state=None) for case in cases]  # that was of the whole run
    with plt.rc_context(STYLE):
        words = _words(dict.fromkeys(map(trace_name, cases)))
        for key in dict.fromkeys((r["trace"], r["rows"], r["start"], r["profile"]) for r in records):
            chosen = [r for r in records if (r["trace"], r["rows"], r["start"], r["profile"]) == key]
            what = "ttft" if chosen[0]["prompt_tokens"] else "tbt"
            save(times(plt, chosen), "-".join([what, words[key[0]], *map(_word, key[1:])]))
        for trace in dict.fromkeys(case.trace for case in cases):
            case = next(c for c in cases if c.trace == trace and c.prompt is None)
            word = words[trace_name(case)]
            save(capacity(plt, case, policies), f"hits-{word}")
            tokens = tokens_of(trace)
            prompt = min(PROMPT, *(tokens.count(sequences) for sequences, _ in halves(tokens)))
            for length, name in ((None, "decode"), (prompt, "prefill")):
                save(gantt(plt, case, length), f"lanes-{name}-{word}")
            save(accuracy(plt, case, predictors), f"prediction-{word}")
    return written


def asked(cases: Iterable[Case], part: str, known: Iterable[str]) -> list[Any]:
    """The rules that the cases name beside those of built-in systems, but for the `known`."""
    given = [dict(case.parts).get(part) for case in cases]
    given += [getattr(case.system, part) for case in cases if isinstance(case.system, System)]
    return [rule for rule in dict.fromkeys(given) if rule is not None and rule not in known]


def times(plt, records: Sequence[dict]):
    """Bars of the mean time a step, with intervals, grouped by cache ratio."""
    figure, axes = plt.subplots(figsize=(WIDTH, 2.1))
    draw_times(axes, records)
    return figure


def draw_times(axes, records: Sequence[dict]) -> None:
    """The same into axes."""
    systems = list(dict.fromkeys(r["system"] for r in records))
    ratios = sorted({r["cache_ratio"] for r in records})
    width = 0.8 / len(systems)
    for place, system in enumerate(systems):
        rows = {r["cache_ratio"]: r["seconds_per_step"] for r in records if r["system"] == system}
        heights = [1e3 * rows[ratio]["mean"] for ratio in ratios]
        low_high = [rows[ratio]["ci95"] or [rows[ratio]["mean"]] * 2 for ratio in ratios]
        errors = [
            [max(0.0, h - 1e3 * lh[0]) for h, lh in zip(heights, low_high)],
            [max(0.0, 1e3 * lh[1] - h) for h, lh in zip(heights, low_high)],
        ]
        at = [i + (place - (len(systems) - 1) / 2) * width for i in range(len(ratios))]
        axes.bar(
            at,
            heights,
            width * 0.95,
            yerr=errors,
            label=system,
            error_kw={"lw": 0.6},
            **bar_style(place),
        )
    for i, ratio in enumerate(ratios):
        least = 1e3 * min(r["bound_seconds_per_step"] for r in records if r["cache_ratio"] == ratio)
        label = None if i else "lower bound"
        axes.hlines(least, i - 0.45, i + 0.45, color="black", lw=0.9, ls="--", label=label, zorder=3)
    axes.set_xticks(range(len(ratios)), [f"{ratio:.0%}" for ratio in ratios])
    axes.set_xlabel("experts that the device holds")
    axes.set_ylabel(("TTFT" if records[0]["prompt_tokens"] else "TBT") + " [ms], simulated")
    axes.set_title(title_of(records[0]), fontsize=6)
    axes.legend(ncols=3, fontsize=5.5, loc="upper center", bbox_to_anchor=(0.5, -0.28))


def title_of(record: dict) -> str:
    return f"{record['model']}, {record['profile']}, {record['rows']}, {record['start']}"


def capacity(plt, case: Case, policies: Iterable[Any] = POLICIES):
    """Hit rate against capacity with every miss fetched and kept, of `policies` and under Belady's rule."""
    figure, axes = plt.subplots(figsize=(WIDTH, 2.2))
    for place, policy in enumerate((*policies, BELADY)):
        ends = policy is BELADY
        rates = []
        for ratio in CAPACITIES:
            one = Case(
                case.trace,
                case.profile,
                BELADY.name if ends else "on-demand",
                ratio,
                case.fmt,
                parts=() if ends else (("cache", policy),),
                shape=case.shape,
                steps=case.steps or 300,
            )
            rates.append(100 * grid.run_case(one)["hit_rate"]["mean"])
        style = {**line_style(place), **({"color": "0.2", "ls": "--"} if ends else {})}
        label = BELADY.name if ends else str(policy)
        axes.plot([100 * ratio for ratio in CAPACITIES], rates, **style, label=label)
    axes.set_xlabel("slots [% of a layer's experts]")
    axes.set_ylabel("hit rate [%]")
    axes.set_title(f"{trace_name(case)}: one token a step, every miss kept, warm start", fontsize=6)
    axes.legend()
    return figure


def gantt(plt, case: Case, prompt: int | None):
    """Lanes of a few layers of one step, or of one layer of a prompt, where the link does most."""
    timeline = Timeline()
    state = None if prompt else case.load_state  # which goes from token to token
    grid.run_case(dataclasses.replace(case, prompt=prompt, prompts=1, steps=GANTT_STEPS, load_state=state), timeline)
    fronts = [event for event in timeline.events("device") if event[2].startswith("attention")]
    layers = len({event[2] for event in fronts})
    span = GANTT_LAYERS if prompt is None else 1
    possible = range((GANTT_STEPS - 1) * layers if prompt is None else 0, len(fronts) - span)
    moves = [event[:2] for event in timeline.events("link")]

    def link_seconds(first: int) -> float:
        begin, end = fronts[first][0], fronts[first + span][0]
        return sum(max(0.0, min(stop, end) - max(start, begin)) for start, stop in moves)

    first = max(possible, key=lambda first: (link_seconds(first), -abs(first - possible[len(possible) // 2])))
    begin, end = fronts[first][0], fronts[first + span][0]
    figure, axes = plt.subplots(figsize=(WIDTH, 1.6))
    for row, lane in enumerate(("link", "device", "cpu")):
        for start, stop, name, args in timeline.events(lane):
            if stop <= begin or start >= end:
                continue
            start, stop = max(start, begin), min(stop, end)
            plain = name.startswith(("attention", "step", "shared"))
            prefetch = args.get("kind") == "prefetch"
            axes.barh(
                row,
                1e3 * (stop - start),
                left=1e3 * (start - begin),
                height=0.7,
                color="0.8" if plain else LANE_COLOURS[lane],
                edgecolor="white",
                lw=0.4 if stop - start > 0.01 * (end - begin) else 0,
                hatch="////" if prefetch else None,
            )
            label = name.split()[0][0] if plain else str(args.get("expert", ""))
            narrow = stop - start < 0.03 * (end - begin)
            if stop - start > 0.014 * (end - begin):
                axes.text(
                    1e3 * ((start + stop) / 2 - begin),
                    row,
                    label,
                    ha="center",
                    va="center",
                    fontsize=4 if narrow else 4.5,
                    rotation=90 if narrow else 0,
                    color="white" if lane == "device" and not plain else "black",
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6} if prefetch else None,
                )
    axes.set_yticks(range(3), ("link", "device", "CPU"))
    axes.set_xlim(0, 1e3 * (end - begin))
    axes.set_ylim(-0.5, 2.5)
    axes.set_xlabel("simulated time [ms]")
    what = f"{GANTT_LAYERS} layers of a decode step" if prompt is None else f"one layer of a prompt of {prompt} tokens"
    keys = "expert numbers; a attention, s shared; hatched: prefetch"
    axes.set_title(f"{case.system_name}, {case.profile}: {what}\n{keys}", fontsize=6)
    return figure


def accuracy(plt, case: Case, predictors: Iterable[Any]):
    """Share of predicted experts that were asked for, by distance, for each predictor that the trace allows."""
    figure, axes = plt.subplots(figsize=(WIDTH, 2.0))
    tokens = tokens_of(case.trace)
    found = recall_by_distance(tokens, steps=case.steps or 300, predictors=predictors)
    for place, (name, shares) in enumerate(found.items()):
        axes.plot(range(1, len(shares) + 1), [100 * share for share in shares], **line_style(place), label=name)
    axes.axhline(100 * tokens.facts.top_k / tokens.facts.experts, color="0.4", ls=":", lw=0.8, label="chance")
    axes.set_xlabel("lookahead distance [layers]")
    axes.set_ylabel("activated experts\nthat were predicted [%]")
    axes.set_ylim(0, 100)
    axes.set_title(trace_name(case), fontsize=6)
    axes.legend(fontsize=5.5, ncols=2)
    return figure


def recall_by_distance(
    tokens: TokenSteps, steps: int = 300, distances: int = DISTANCES, predictors: Iterable[Any] = PREDICTED
) -> dict[str, list[float]]:
    """Per predictor that the trace allows, the share of activated experts that it named, at distances 1, 2, ...

    One token a step; nothing is planned.
    """
    facts, shares = tokens.facts, {}
    for rule in map(predictor_rule, predictors):
        if rule.made_by is Perfect or (rule.made_by.needs_routers and not tokens.has_lookahead):
            continue
        recording = load_recording(rule.removeprefix(RECORDED)) if rule.startswith(RECORDED) else None
        predictor = build_predictor(rule, facts.layers, facts.experts, facts.top_k, distances, recording)
        hits, asked = [0] * distances, [0] * distances
        for step in tokens.steps(tokens.sequences, steps):
            loads = {a.layer: a.loads for a in step.layers}
            for one in step.layers:
                for d, prediction in enumerate(predictor.predict(one.layer, one.shown, distances), 1):
                    wanted = loads.get(one.layer + d)
                    if wanted and prediction.loads:
                        hits[d - 1] += len(wanted.keys() & prediction.loads.keys())
                        asked[d - 1] += len(wanted)
            predictor.finish_step()
        shares[str(rule)] = [h / a for h, a in zip(hits, asked) if a]
    return shares


def _words(names: Iterable[str]) -> dict[str, str]:
    """Each trace's part of a file name, no two alike."""
    words: dict[str, str] = {}
    for name in names:
        word, number = _word(name), 2
        while word in words.values():
            word, number = f"{_word(name)}-{number}", number + 1
        words[name] = word
    return words


def _word(text: str) -> str:
    parts = [part.strip("/") for part in Path(str(text)).with_suffix("").parts]
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in "-".join(filter(None, parts)))[:60]
