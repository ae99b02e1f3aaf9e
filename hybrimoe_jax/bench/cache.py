"""`bench cache`: hits and misses of cache policies on recorded routing, replayed token by token from a cold start.

Rules: event-atomic; every miss is kept (and, apart, only those that the policy admits: bypass); slots = max(top-k,
round(ratio * experts)) a layer; one token a step, one sequence after another; a policy's state lives on from one
sequence to the next. `gap_closed` is the share of the misses between MRS and Belady's rule that a policy saves.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np

from hybrimoe_jax.decide.cache import Belady, CachePolicy, Static, build_policies, policy_rule
from hybrimoe_jax.decide.plan import Counters
from hybrimoe_jax.decide.registry import Rule
from hybrimoe_jax.decide.residency.inflight import InflightTransfers
from hybrimoe_jax.decide.residency.residency import Residency
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.simulate.workers import workers
from hybrimoe_jax.trace.importers import open_trace
from hybrimoe_jax.trace.tokens import by_token, token_of_row

# MRS and LFU with the parameters that are best, on average, on the development
# halves of the public traces (docs/log).
DEFAULT = "lru lfu:decay=0.99 lfru slru s3-fifo mrs:alpha=0.05 echo static random belady".split()
PARTS = {"all": slice(None), "even": slice(0, None, 2), "odd": slice(1, None, 2)}


class Visit(NamedTuple):
    """One layer of one step: the experts it needs (distinct), and the router's score of every expert where known."""

    layer: int
    experts: Sequence[int]
    scores: Sequence[float] | None = None


class Outcome(NamedTuple):
    """Activated experts found resident and not, and how many of the latter were not kept."""

    hits: int
    misses: int
    bypassed: int


def slots_for(ratio: float, num_experts: int, top_k: int) -> int:
    """Slots of a layer: max(top_k, round(ratio * num_experts)), so that a step's own experts always fit."""
    return max(top_k, round(ratio * num_experts))


def cache_of(policies: Sequence[CachePolicy], slots: int, *, bypass: bool = False, pooled: bool = False) -> Residency:
    """The planner's own slots, `slots` a layer, without transfers; cold but for a fixed placement."""
    layers, cold = len(policies), not policies[0].fixed
    transfers = InflightTransfers(layers, Counters())
    return Residency([slots] * layers, policies, transfers, "none", cold=cold, pooled=pooled, bypass=bypass)


def replay(policies: Sequence[CachePolicy], visits: Iterable[Visit], caches: Sequence[Residency]) -> list[Outcome]:
    """Runs `visits`, in order, through the policies of all layers, and every cache by what they say.

    No scheduler, no clock: every miss is fetched. Several caches over the same policies need policies that do not see
    residents (`CachePolicy.sees`): each decides as if alone.
    """
    if len(caches) > 1 and any(policy.sees == "residents" for policy in policies):
        raise ValueError("a policy that sees residents serves one cache")
    hits, misses, bypassed = ([0] * len(caches) for _ in range(3))
    for layer, experts, scores in visits:
        loads = dict.fromkeys(experts, 1)
        policies[layer].observe(scores, loads)
        for i, cache in enumerate(caches):
            resident, order = cache.resident[layer], experts
            cache.needed[layer] = loads.keys()
            if cache.bypass:  # the hottest miss is offered a slot first: one never used again must not take the last
                order = sorted(experts, key=policies[layer].value, reverse=True)
            for expert in order:
                if expert in resident:
                    hits[i] += 1
                else:
                    misses[i] += 1
                    bypassed[i] += cache.admit(layer, expert).stream
    return [Outcome(*counts) for counts in zip(hits, misses, bypassed)]


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured.

    policies: as for `cache.policy_rule`, and "belady". part: which sequences. layers: the first so many; None for
    all.
    """

    ratios: tuple[float, ...] = (0.125, 0.25, 0.5, 0.75)
    policies: tuple[Any, ...] = tuple(DEFAULT)
    part: str = "all"
    layers: int | None = None
    pooled: bool = False


class Routing:
    """What a trace asks for.

    `ids` [T, L, k] (-1: a layer of a token that was not recorded; it is passed over), and the router's scores [T, L, E]
    or, where it lacks them, the weights of the selected [T, L, k].
    """

    def __init__(self, path: str, part: str, layers: int | None):
        trace = open_trace(path)
        self.num_experts, self.top_k = trace.facts.experts, trace.facts.top_k
        tokens = by_token(trace, f"trace {path}")
        if not len(tokens.ids):
            raise UserError(f"trace {path}: holds no tokens")
        names = np.unique(tokens.sequence)
        chosen = np.isin(tokens.sequence, names[PARTS[part]])
        if not chosen.any():
            raise UserError(f"trace {path}: has one sequence only, none in --sequences {part}")
        self.ids = tokens.ids[chosen][:, :layers]
        self.weights = None if tokens.weights is None else tokens.weights[chosen][:, :layers]
        self.scores = None
        if trace.scores is not None and not np.isnan(trace.scores[:, 0]).any():
            self.scores = np.empty((*tokens.ids.shape[:2], self.num_experts), np.float32)
            self.scores[token_of_row(trace)[0], trace.layer] = trace.scores
            self.scores = self.scores[chosen][:, :layers]
        sequence = tokens.sequence[chosen]
        self.fold = np.isin(sequence, np.unique(sequence)[::2])  # the tokens of every second sequence

    def visits(self, keep: np.ndarray | None = None) -> Iterator[Visit]:
        """Every (token, layer) in order; of the tokens in the mask `keep` only."""
        num_experts = self.num_experts
        for token in range(len(self.ids)) if keep is None else np.flatnonzero(keep).tolist():
            ids = self.ids[token].tolist()
            scores = None if self.scores is None else self.scores[token].tolist()
            weights = None if self.weights is None else self.weights[token].tolist()
            for layer, experts in enumerate(ids):
                if experts[0] < 0:
                    continue
                if scores is not None or weights is None:
                    yield Visit(layer, experts, scores and scores[layer])
                    continue
                selected = [0.0] * num_experts
                for expert, weight in zip(experts, weights[layer]):
                    selected[expert] = weight
                yield Visit(layer, experts, selected)

    def frequencies(self, keep: np.ndarray) -> list[list[int]]:
        """[L][E] uses by the tokens in the mask."""
        layers = self.ids[keep].swapaxes(0, 1)
        return [np.bincount(layer[layer >= 0], minlength=self.num_experts).tolist() for layer in layers]


@functools.lru_cache(maxsize=1)
def routing(path: str, part: str, layers: int | None) -> Routing:
    """One trace at a time is kept: tasks of one trace follow one another."""
    return Routing(path, part, layers)


def rule_of(spec: Any) -> Rule:
    """The policy that `spec` names."""
    return Rule(Belady, {}, "belady") if spec == "belady" else policy_rule(spec)


def hindrance(path: str, spec: Any, options: Options) -> str | None:
    """Why a policy cannot be measured on a trace; None where it can."""
    policy = rule_of(spec).made_by
    if options.pooled and not policy.comparable:
        return "its layers cannot share slots (--pooled)"
    fold = routing(path, options.part, options.layers).fold
    if policy is Static and fold.all():
        return "it is counted on other sequences, and there is one only"
    return None


def measure(path: str, spec: Any, options: Options) -> dict[float, tuple[Outcome, Outcome]] | None:
    """One policy on one trace: for each ratio the outcome with every miss kept, and with bypass.

    None where it cannot be measured.
    """
    if hindrance(path, spec, options):
        return None
    trace = routing(path, options.part, options.layers)
    num_layers = trace.ids.shape[1]
    rule = rule_of(spec)
    policy = rule.made_by
    slots = {ratio: slots_for(ratio, trace.num_experts, trace.top_k) for ratio in options.ratios}
    cells = [(ratio, bypass) for ratio in options.ratios for bypass in (False, True)]

    def run(cells: Sequence[tuple[float, bool]], keep: np.ndarray | None = None, **known) -> list[Outcome]:
        """All cells by the same policies."""
        most = max(slots[ratio] for ratio, _ in cells)
        policies = build_policies(rule, trace.num_experts, [most] * num_layers, trace.top_k, **known)
        caches = [cache_of(policies, slots[ratio], bypass=bypass, pooled=options.pooled) for ratio, bypass in cells]
        return replay(policies, trace.visits(keep), caches)

    if policy is Static:
        halves = [run(cells, fold, frequencies=trace.frequencies(~fold)) for fold in (trace.fold, ~trace.fold)]
        found = [Outcome(*map(sum, zip(*pair))) for pair in zip(*halves)]
    elif policy is Belady:
        future = [layer[layer[:, 0] >= 0].tolist() for layer in trace.ids.swapaxes(0, 1)]
        found = run(cells, future=future)
    elif policy.sees == "routing":
        found = run(cells)
    elif policy.sees == "capacity":
        found = [outcome for ratio in options.ratios for outcome in run([(ratio, False), (ratio, True)])]
    else:
        found = [outcome for cell in cells for outcome in run([cell])]
    return {ratio: (found[2 * i], found[2 * i + 1]) for i, ratio in enumerate(options.ratios)}


def run(paths: Sequence[str], options: Options, jobs: int = 1, progress=lambda items, total, label: items) -> dict:
    """Hits and misses of every policy, with and without bypass; prints a table of each trace.

    Returns {trace: {ratio: {policy: {"hits", "misses", "gap_closed", "bypass": {"hits", "misses", "bypassed"}}}}}.

    A policy's key is its name as given, without the parameters where that leaves no two
    alike; those are then under "parameters".
    """
    # what is none is refused before anything runs
    options = dataclasses.replace(options, policies=tuple(map(rule_of, options.policies)))
    for path in paths:
        hindrances = {spec: hindrance(path, spec, options) for spec in options.policies}
        if all(hindrances.values()):
            said = "; ".join(f"{spec}: {reason}" for spec, reason in hindrances.items())
            raise UserError(f"trace {path}: no policy can be measured ({said})")
    with ExitStack() as stack:
        pool = jobs > 1 and stack.enter_context(workers(jobs))
        record = {}
        for path in paths:
            results = (pool.map if pool else map)(measure, repeat(path), options.policies, repeat(options))
            found = dict(zip(options.policies, progress(results, len(options.policies), path)))
            outcomes = {spec: outcome for spec, outcome in found.items() if outcome is not None}
            record[path] = {f"{ratio:g}": _row(ratio, outcomes) for ratio in options.ratios}
            shape, missing = routing(path, options.part, options.layers).ids.shape, _missing(path, options)
            print(f"\n{path}: {shape[0]} tokens, {shape[1]} layers, sequences: {options.part}{missing}")
            print(table(record[path]), flush=True)
    return record


def _row(ratio: float, outcomes: dict[Rule, dict]) -> dict[str, dict]:
    labels = [rule.label for rule in outcomes]
    mrs = next((found[ratio][0] for rule, found in outcomes.items() if rule.label == "mrs"), None)
    best = next((found[ratio][0] for rule, found in outcomes.items() if rule == "belady"), None)
    gap = mrs.misses - best.misses if mrs and best else 0
    row = {}
    for rule, found in outcomes.items():
        kept, bypass = found[ratio]
        short = labels.count(rule.label) == 1 and rule.said
        row[rule.label if short else str(rule)] = {
            "hits": kept.hits,
            "misses": kept.misses,
            "gap_closed": round((mrs.misses - kept.misses) / gap, 4) if mrs and gap > 0 else None,
            "bypass": {"hits": bypass.hits, "misses": bypass.misses, "bypassed": bypass.bypassed},
            **({"parameters": rule.said} if short else {}),
        }
    return row


def _missing(path: str, options: Options) -> str:
    trace = routing(path, options.part, options.layers)
    if trace.scores is not None:
        return ""
    return "; no scores of experts not selected, so MRS has p = k" + (
        "" if trace.weights is not None else ", no weights"
    )


def table(rows: dict[str, dict[str, dict]]) -> str:
    """Hit rates in per cent by ratio.

    In brackets the share of the gap between MRS and Belady that is closed; behind a bar, with bypass.
    """
    names = list(next(iter(rows.values())))
    width = max(map(len, names))
    lines = ["hit rate % (per cent of the gap MRS-Belady closed) | with bypass"]
    lines.append(" " * width + "".join(f"  {'at ' + ratio:>22}" for ratio in rows))
    for name in names:
        cells = []
        for row in rows.values():
            entry = row[name]
            total = entry["hits"] + entry["misses"]
            gap = "" if entry["gap_closed"] is None else f"({100 * entry['gap_closed']:.0f})"
            cells.append(f"{100 * entry['hits'] / total:.1f} {gap:>7} | {100 * entry['bypass']['hits'] / total:.1f}")
        lines.append(f"{name:<{width}}" + "".join(f"  {cell:>22}" for cell in cells))
    if "belady" in names:
        lines.append(
            "belady: the fewest misses where every one is kept; with bypass a heuristic, near the fewest but "
            "not always there"
        )
    return "\n".join(lines)
