"""Tables of hits and of what routing is like; `figures` says how intervals are made."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from hybrimoe_jax.reproduce import experiments as e
from hybrimoe_jax.reproduce.figures import (
    NAMES,
    NONE,
    NUMBERS,
    Figures,
    Missing,
    beside,
    cell,
    count,
    hit_rate,
    markdown,
    seconds,
    speedup,
    spread,
)  # fmt: skip
from hybrimoe_jax.reproduce.sources import BUNDLED, QWEN2


def hits(f: Figures) -> str:
    rows = []
    for row in f.rows("hits"):
        for ratio in e.RATIOS:
            lru, mrs = (f.get("hits", name, row, ratio=ratio) for name in ("lru", "mrs"))
            cells = [cell(hits_beside, f, name, row, ratio) for name in (*e.CACHES, e.BELADY.name)]
            rows.append([row, f"{ratio:.0%}", str(count(lru)), *cells, points(mrs, lru)])
    names = ["LRU", "LFU", "MRS", "echo", "Belady", "MRS over LRU, points"]
    return markdown(["model", "cache", "sequences", *names], rows)


def hits_beside(f: Figures, name: str, row: str, ratio: float) -> str:
    """A policy's hits, and the paper's where it prints them."""
    found = f.get("hits", name, row, ratio=ratio)
    printed = NUMBERS["hit_rate_percent"].get(f"cache{100 * ratio:.0f}", {}).get(NAMES.get(found["model"], ""), {})
    return beside(f"{hit_rate(found):.1f}", printed.get(name))


def points(better: dict, other: dict) -> str:
    """How many points more hits, with the interval over sequences."""
    gained = {**better, "by_sequence": {**better["by_sequence"], "gained": difference(better, other)}}
    return f"{hit_rate(better) - hit_rate(other):+.1f}" + spread(gained, gained, "gained", "activated", form="+.1f")


def difference(better: dict, other: dict) -> list[float]:
    """100 times the hits that each sequence gained."""
    return [100.0 * (a - b) for a, b in zip(better["by_sequence"]["hits"], other["by_sequence"]["hits"])]


def alpha(f: Figures) -> str:
    """Hits of MRS by its alpha, in per cent."""
    rows = []
    for row in f.rows("alpha"):
        found = {value: hit_rate(f.get("alpha", f"hits {value:g}", row)) for value in e.ALPHAS}
        best = max(found, key=lambda value: found[value])
        cells = [f"**{rate:.1f}**" if value == best else f"{rate:.1f}" for value, rate in found.items()]
        rows.append([row, *cells, cell(lambda row: f"{hit_rate(f.get('hits', 'lru', row)):.1f}", row)])
    return markdown(["MRS with alpha", *(f"{value:g}" for value in e.ALPHAS), "LRU"], rows)


def alpha_times(f: Figures) -> str:
    """Milliseconds a token of hybrimoe on the paper's machine, by alpha."""
    rows = []
    for row in [row for row in f.rows("alpha") if row != BUNDLED]:
        found = {value: seconds(f.get("alpha", f"time {value:g}", row)) for value in e.TIMED_ALPHAS}
        rows.append([row, *(f"{1e3 * time:.2f}" for time in found.values()), gain(found)])
    head = [*(f"{value:g}" for value in e.TIMED_ALPHAS), f"the best against {e.ALPHA:g}"]
    return markdown(["hybrimoe, ms a token, alpha", *head], rows)


def gain(found: Mapping[float, float]) -> str:
    return f"{100 * (found[e.ALPHA] / min(found.values()) - 1):.1f} % faster"


def knobs(f: Figures) -> str:
    """Synthetic Qwen2 by its two knobs, and the real traces by theirs: the same figures."""
    rows = [["the paper, Qwen2", "?", "?", *paper_knobs()]]
    for skew, stay in e.KNOBS:
        rows.append([QWEN2, f"{skew:g}", f"{stay:g}", *of_knobs(f, "knobs", f"skew {skew:g}, stay {stay:g}")])
    for r in f.plain("traces"):
        rows.append([r["trace"], f"*{r['skew']:.2f}*", f"*{r['stay']:.2f}*", *of_knobs(f, "ablation", r["trace"])])
    names = ("all over the baseline", "the same, blind", "+scheduling", "+prefetching", "+scheduling, +caching")
    return markdown(["routing", "skew", "stay", *names, "LRU", "MRS", "points"], rows)


def paper_knobs() -> list[str]:
    table, hit = NUMBERS["table_iii_qwen2_cache25_seconds"]["decode"], NUMBERS["hit_rate_percent"]["cache25"]["qwen2"]
    base = table["baseline"]
    ratios = [f"{base / table[name]:.2f}x" for name in ("all", "scheduling", "prefetching")]
    return [ratios[0], NONE, *ratios[1:], NONE, str(hit["lru"]), str(hit["mrs"]), f"{hit['mrs'] - hit['lru']:+.1f}"]


def of_knobs(f: Figures, experiment: str, row: str) -> list[str]:
    """What each part gives over the baseline, and the hits of LRU and MRS."""
    get = functools.partial(f.get, experiment, row=row)
    pairs = [("baseline", "all"), ("baseline, blind", "all")]
    pairs += [("baseline", name) for name in ("+scheduling", "+prefetching", "+scheduling, +caching")]
    cells = [cell(lambda a, b: f"{speedup(get(a), get(b)):.2f}x", a, b) for a, b in pairs]
    where = "knobs" if experiment == "knobs" else "hits"
    try:
        lru, mrs = (hit_rate(f.get(where, name, row)) for name in ("lru", "mrs"))
    except Missing:
        return [*cells, NONE, NONE, NONE]
    return [*cells, f"{lru:.1f}", f"{mrs:.1f}", f"{mrs - lru:+.1f}"]


def traces(f: Figures) -> str:
    """What the real traces have, and the knobs that give synthetic routing the same."""
    rows = [
        [r["trace"], str(r["tokens"]), f"{100 * r['hottest_quarter']:.0f} %", f"{100 * r['overlap']:.0f} %",
         f"{r['skew']:.2f}", f"{r['stay']:.2f}"]
        for r in f.plain("traces")
    ]  # fmt: skip
    return markdown(["trace", "tokens", "uses of the hottest quarter", "overlap of neighbours", "skew", "stay"], rows)


def reuse(f: Figures) -> str:
    records = f.plain("reuse")
    ranks = max(len(r["share_by_rank"]) for r in records)
    rows = []
    for r in records:
        shares = [f"{100 * share:.0f}" for share in r["share_by_rank"]]
        rows.append([r["trace"], *shares, *[NONE] * (ranks - len(shares))])
    return markdown(["model", *(f"rank {i + 1}" for i in range(ranks))], rows)


def similarity(f: Figures) -> str:
    records = f.plain("similarity")
    rows = [
        ["cosine of the router's probabilities", *(f"{r['cosine']:.2f}" for r in records)],
        ["experts named rightly, per cent", *(f"{100 * r['named']:.0f}" for r in records)],
    ]
    return markdown(["layers between", *(str(r["distance"]) for r in records)], rows)
