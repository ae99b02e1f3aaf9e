"""What the page's sentences say in numbers, each from the records: see `page`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hybrimoe_jax.machine.profile import load_profile
from hybrimoe_jax.machine.shapes import get_shape
from hybrimoe_jax.reproduce import experiments as e
from hybrimoe_jax.reproduce import figures, live
from hybrimoe_jax.reproduce.figures import (
    NUMBERS,
    Figures,
    count,
    hit_rate,
    least_and_most,
    mean,
    said_speedup,
    seconds,
    speedup,
)  # fmt: skip
from hybrimoe_jax.reproduce.routing import points
from hybrimoe_jax.reproduce.sources import BUNDLED, ONE_SEQUENCE, SYNTHETIC


def standing_rows(f: Figures, experiment: str = "decode") -> list[str]:
    """Those that stand on their own: real routing of enough sequences."""
    return [row for row in f.rows(experiment) if row not in (*SYNTHETIC, *ONE_SEQUENCE, BUNDLED)]


def leads(f: Figures, profile: str, ratio: float = 0.25, other: str = "ktransformers") -> list[float]:
    runs = ((f.get("decode", name, row, profile, ratio) for name in (other, "hybrimoe")) for row in standing_rows(f))
    return [speedup(*pair) for pair in runs]


def prefill_leads(f: Figures, profile: str, length: int) -> list[float]:
    pairs = [
        [f.get("prefill", name, row, profile, prompt=length) for name in ("ktransformers", "hybrimoe")]
        for row in standing_rows(f, "prefill")
    ]
    return [speedup(*pair) for pair in pairs]


def paper(f: Figures, path: str) -> str:
    """A figure of the paper's, by the keys that lead to it."""
    found: Any = NUMBERS
    while path:  # a key may hold a dot
        key = next(key for key in found if path == key or path.startswith(f"{key}."))
        found, path = found[key], path[len(key) + 1 :]
    return str(found)


def constant(f: Figures, name: str) -> str:
    return str(getattr(e, name, None) or getattr(figures, name))


def tokens(f: Figures, row: str, run: str = "hybrimoe") -> str:
    return f"{1 / seconds(f.get('decode', run, row)):.1f}"


def all_against_scheduling(f: Figures) -> str:
    """Where everything together is slower than scheduling alone, and where it is not."""
    slower, faster = [], []
    for row in f.rows("ablation"):
        whole, part = (1e3 * seconds(f.get("ablation", name, row)) for name in ("all", "+scheduling"))
        (slower if whole > part else faster).append(f"{row} ({whole:.1f} against {part:.1f} ms)")
    said = []
    if slower:
        said.append(f"`all` is slower than `+scheduling` on {and_(slower)}.")
    if faster:
        said.append(f"It is faster on {and_(faster)}." if slower else f"`all` is faster on {and_(faster)}.")
    return " ".join(said)


def and_(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def gives(f: Figures, slow: str, fast: str) -> str:
    """How many times as fast one row of Table III is as another, over all traces."""
    pairs = [[f.get("ablation", run, row) for run in (slow, fast)] for row in f.rows("ablation")]
    return least_and_most([speedup(*pair) for pair in pairs], ".2f", " times")


def knob_range(f: Figures) -> str:
    found = [speedup(f.get("knobs", "baseline", row), f.get("knobs", "all", row)) for row in f.rows("knobs")]
    return least_and_most(found, ".2f", "x")


def knob_gains(f: Figures) -> list[float]:
    return [hit_rate(f.get("knobs", "mrs", row)) - hit_rate(f.get("knobs", "lru", row)) for row in f.rows("knobs")]


def gained(f: Figures, ratio: float = 0.25) -> list[float]:
    return [
        hit_rate(f.get("hits", "mrs", row, ratio=ratio)) - hit_rate(f.get("hits", "lru", row, ratio=ratio))
        for row in standing_rows(f, "hits")
    ]


def paper_gained() -> dict[str, float]:
    """Points of MRS over LRU at 25 %, by model."""
    return {model: found["mrs"] - found["lru"] for model, found in NUMBERS["hit_rate_percent"]["cache25"].items()}


def paper_baseline(f: Figures) -> str:
    """Table III's lead, decoding."""
    table = NUMBERS["table_iii_qwen2_cache25_seconds"]["decode"]
    return f"{table['baseline']} against {table['all']} s, {table['baseline'] / table['all']:.2f}x"


def first_expert(f: Figures) -> str:
    """Milliseconds that the first expert on the CPU takes more."""
    fits = load_profile(e.PAPER).costs(get_shape("deepseek-v2-lite"), "int4")
    return f"{1e3 * (fits.cpu(1, True) - fits.cpu(1)):.2f}"


def alpha_verdict(f: Figures) -> str:
    """Which alpha is best where, and what the best one of the other traces would give each."""
    rows = f.rows("alpha")
    rates = {row: {a: hit_rate(f.get("alpha", f"hits {a:g}", row)) for a in e.ALPHAS} for row in rows}
    best, elsewhere = [], []
    for row, found in rates.items():
        top = max(found, key=lambda a: found[a])
        best.append(f"{top:g} on {row} ({found[top]:.1f} instead of {found[e.ALPHA]:.1f})")
        others = [rates[other] for other in rows if other.partition(",")[0] != row.partition(",")[0]]
        if others:
            chosen = max(e.ALPHAS, key=lambda a: mean(other[a] - other[e.ALPHA] for other in others))
            elsewhere.append(f"{found[chosen] - found[e.ALPHA]:+.1f} on {row} (alpha {chosen:g})")
    said = f"The best is {and_(best)}."
    if elsewhere:
        said += (
            " An alpha that suits a trace is easy to find afterwards. So, for each, the one that is best on average on "
            f"the other models: it changes hits, in points, by {and_(elsewhere)}."
        )
    return said


def depth_verdict(f: Figures) -> str:
    best, spread = [], 0.0
    for row in f.rows("depth"):
        for profile in (e.PAPER, e.FAST):
            times = [seconds(f.get("depth", str(d), row, profile)) for d in e.DEPTHS]
            best.append(str(e.DEPTHS[times.index(min(times))]))
            spread = max(spread, max(times) / min(times) - 1)
    return f"Fastest depth, row by row: {', '.join(best)}. The largest spread over depths is {spread:.1%}."


def rules_verdict(f: Figures) -> str:
    over: dict[str, list[float]] = {}
    for row in f.rows("rules"):
        for profile in (e.PAPER, e.FAST):
            for prompt in (None, 128):
                found = {rule: seconds(f.get("rules", rule, row, profile, prompt=prompt)) for rule in e.RULES}
                for rule, time in found.items():
                    over.setdefault(rule, []).append(100 * (time / found["optimal"] - 1))
    return "; ".join(f"`{rule}` {least_and_most(x, '.1f')} %" for rule, x in over.items() if rule != "optimal")


def streamed_verdict(f: Figures) -> str:
    said = []
    for length in e.STREAMED_LENGTHS:
        gains = [
            speedup(*(f.get("streamed", name, row, profile, prompt=length) for name in e.WAYS))
            for row in f.rows("streamed")
            for profile in e.STREAMED_PROFILES
        ]
        said.append(f"{least_and_most(gains, '.2f')} times at {length} tokens")
    return ", ".join(said)


def streams(f: Figures, profile: str) -> str:
    gains = [
        seconds(r) / seconds(f.get("prefill", "hybrimoe", r["trace"], profile, prompt=r["prompt_tokens"]))
        for r in f.plain("prefill")
        if r["run"] == "freetoken" and r["profile"] == profile
    ]
    return least_and_most(gains, ".2f", " times")


def live_where(f: Figures) -> str:
    first = f.plain("live")[0]
    return f"{first['processor']}, {first['cores']} cores, load average {first['load']}"


def live_range(f: Figures, way: str) -> str:
    """How many times as fast as the baseline `all` is, one way."""
    found = {r["run"]: r for r in f.plain("live") if r["way"] == way}
    return said_speedup(found["baseline"], found["all"])


SAYINGS: dict[str, Callable[..., str]] = {
    "paper": paper,
    "set": constant,
    "n": lambda f, row: str(count(f.get("decode", "hybrimoe", row))),
    "steps": lambda f, row: f"{f.get('decode', 'hybrimoe', row)['steps']:,}",
    "standing rows": lambda f: "; ".join(standing_rows(f)),
    "range": lambda f, profile: least_and_most(leads(f, profile), ".2f", " times"),
    "average": lambda f, profile: f"{mean(leads(f, profile)):.2f} times",
    "tokens": tokens,
    "placed": lambda f, row, n: said_speedup(f.get("placement", n, row), f.get("placement", "hybrimoe", row)),
    "prefill": lambda f, profile, n: least_and_most(prefill_leads(f, profile, int(n)), ".1f", " times"),
    "streams": streams,
    "all against scheduling": all_against_scheduling,
    "gives": gives,
    "knob range": knob_range,
    "knob points": lambda f: least_and_most(knob_gains(f), "+.1f"),
    "paper baseline": paper_baseline,
    "paper points": lambda f: f"{paper_gained()['qwen2']:+.1f}",
    "gained": lambda f: least_and_most(gained(f), "+.1f"),
    "paper gained": lambda f: least_and_most(list(paper_gained().values()), "+.1f"),
    "points": lambda f, row: points(f.get("hits", "mrs", row), f.get("hits", "lru", row)),
    "alpha verdict": alpha_verdict,
    "depth verdict": depth_verdict,
    "rules verdict": rules_verdict,
    "streamed verdict": streamed_verdict,
    "first expert": first_expert,
    "few prompts": lambda f: f"at most {2 * (e.PROMPTS // 4)}",
    "live": lambda f, name: str(getattr(live, name)),
    "live n": lambda f: str(f.plain("live")[0]["sequences"]),
    "live where": live_where,
}
"""By name: what says it, from the records and the arguments that the text gives."""
