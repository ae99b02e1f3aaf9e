"""One run described, and what it needs at hand: its trace, its system, what the machine takes.

A trace's sequences are split in two halves (every second one). Each half is run with frequencies counted on the other.
Or some whole sequences, evenly spread, are run with frequencies counted on all the others (`Case.sequences`).
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hybrimoe_jax.decide.cache_state import load_state
from hybrimoe_jax.decide.systems import RULE_PARTS, SYSTEMS, System, get_system
from hybrimoe_jax.errors import UserError, printable, shown
from hybrimoe_jax.machine.profile import load_costs
from hybrimoe_jax.machine.shapes import ModelShape, find_shape, get_shape
from hybrimoe_jax.simulate.bound import CLAIRVOYANT, CLAIRVOYANTS, knows_the_future
from hybrimoe_jax.simulate.synthetic import PREFIX, synthetic_of
from hybrimoe_jax.simulate.workload import TokenSteps
from hybrimoe_jax.trace.importers import open_trace

STARTS = ("warm", "cold")
LOADED = "loaded"
"""The start of a case that goes on from a cache state."""
ORACLE = CLAIRVOYANT.name
OVERRIDES = ("cache", "scheduler", "prefetch", "lookahead", "predictor", "scope", "stream_prefill")


@dataclasses.dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
      trace: a file that `open_trace` reads.
      profile: name or file.
      fmt: weight format of the experts.
      system: its name, or one of yours; `parts` replace some of its parts (names in OVERRIDES).
      system_name: what results call it.
      ratio: share of the experts that the device holds.
      start: "warm" (the most frequent experts of other sequences are loaded) or "cold".
      prompt: tokens of a prompt, one step each time; None for token by token.
      prompts: how many prompts in each half.
      shape: a name in `shapes.SHAPES`, where the trace alone does not tell.
      steps: at most so many steps of each half, None for all.
      sequences: run so many sequences, evenly spread, half of them where there are fewer than twice as many, and take
        frequencies of the others; None for both halves.
      sequence_tokens: of each sequence the first so many tokens, None for all.
      others: frequencies are of so many of the other sequences, evenly spread; None for all. Used with `sequences`.
      blind: static placements and the warm start know no frequencies: each layer's lowest ids, as good as any.
      name: what results call the trace; None for the end of its path.
      load_state: a file with a cache state to begin with, `start` being "loaded". save_state: a file for the one at the
        end. With either all sequences are run one after another, once, and no frequencies are known.
    """

    trace: str
    profile: str
    system: str | System
    ratio: float
    fmt: str = "int4"
    start: str = "warm"
    prompt: int | None = None
    prompts: int = 8
    parts: tuple[tuple[str, Any], ...] = ()
    shape: str | None = None
    steps: int | None = None
    blind: bool = False
    name: str | None = None
    sequences: int | None = None
    sequence_tokens: int | None = None
    others: int | None = None
    load_state: str | None = None
    save_state: str | None = None

    @property
    def keeps_state(self) -> bool:
        """Whether it begins or ends with a file."""
        return self.load_state is not None or self.save_state is not None

    def __post_init__(self) -> None:
        resolved = [(part, RULE_PARTS[part](value) if part in RULE_PARTS else value) for part, value in self.parts]
        object.__setattr__(self, "parts", tuple(resolved))

    @property
    def system_name(self) -> str:
        return self.system if isinstance(self.system, str) else self.system.name


def tokens_of(path: str) -> TokenSteps:
    """A trace, token by token; "synthetic:" and what `synthetic_of` reads stand for made-up routing.

    The latest few are kept, as long as their files stay as they were.
    """
    return _tokens_of(path, *version_of(path))


def version_of(path: str) -> tuple[Any, ...]:
    """What changes with a file that is written anew: of a folder, and a layout of two files, that of each."""
    place = Path(path)
    files = sorted(place.rglob("*")) if place.is_dir() else [place, place.with_name("meta.jsonl")]
    known = [(file, file.stat()) for file in files if file.is_file()]
    return tuple((os.path.abspath(file), *_IDENTITY(status)) for file, status in known)


_IDENTITY = operator.attrgetter("st_ino", "st_size", "st_mtime_ns")


@functools.lru_cache(maxsize=4)
def _tokens_of(path: str, *version: Any) -> TokenSteps:
    if path.startswith(PREFIX):
        return TokenSteps(synthetic_of(path.removeprefix(PREFIX)))
    return TokenSteps(open_trace(path))


def trace_names(paths: Iterable[str]) -> dict[str, str]:
    """What results call traces: the last two parts of their paths, or as many more as it takes to tell them apart."""
    paths = list(dict.fromkeys(paths))

    def ends(path: str, count: int) -> str:
        return path if path.startswith(PREFIX) else str(Path(*Path(path).parts[-count:]))

    names = {}
    for path in paths:
        longest = max(2, len(Path(path).parts))
        others = [other for other in paths if other != path]
        unique = (n for n in range(2, longest) if ends(path, n) not in [ends(other, n) for other in others])
        names[path] = printable(ends(path, next(unique, longest)))
    return names


def trace_name(case: Case) -> str:
    """What results call the case's trace."""
    return case.name or trace_names([case.trace])[case.trace]


def system_of(case: Case, tokens: TokenSteps) -> System:
    """The case's system, parts replaced. Where a trace has no router predictions the co-activation table predicts."""
    known = knows_the_future(case.system)
    if known is not None:
        return known
    if isinstance(case.system, str) and case.system not in SYSTEMS:
        known = ", ".join([*SYSTEMS, *CLAIRVOYANTS])
        raise UserError(f"system {shown(case.system)} is unknown (known: {known})")
    system = get_system(case.system).override(**dict(case.parts))
    return system.override(predictor="co-activation") if learns_instead(case, system, tokens) else system


def learns_instead(case: Case, system: System, tokens: TokenSteps) -> bool:
    """Whether the system's own predictor, which wants routers, finds none in the trace."""
    asked = "predictor" in dict(case.parts)
    return bool(system.lookahead) and not asked and not tokens.has_lookahead and system.predictor.made_by.needs_routers


def shape_for(tokens: TokenSteps, case: Case) -> ModelShape:
    """The model's sizes; UserError where neither the trace nor the case tells."""
    facts = tokens.facts
    shape = get_shape(case.shape) if case.shape else find_shape(facts.layers, facts.experts, facts.top_k)
    if shape is None:
        raise UserError(
            f"trace {case.trace}: no known model has {facts.layers} MoE layers of {facts.experts} experts, "
            f"{facts.top_k} a token; name one with --shape"
        )
    if (shape.layers, shape.experts) != (facts.layers, facts.experts):
        raise UserError(
            f"shape {shape.name}: {shape.layers} layers of {shape.experts} experts; "
            f"the trace has {facts.layers} of {facts.experts}"
        )
    return shape


def halves(tokens: TokenSteps) -> list[tuple[list[int], list[list[int]] | None]]:
    """(sequences to run, frequencies of the others or None) of each half."""
    first, second = tokens.sequences[::2], tokens.sequences[1::2]
    if not second:
        return [(first, None)]
    return [(first, tokens.frequencies(second)), (second, tokens.frequencies(first))]


def samples(tokens: TokenSteps, case: Case) -> list[tuple[list[int], list[list[int]] | None]]:
    """(sequences to run, frequencies of others or None) of each run that the case takes."""
    if case.keeps_state:
        return [(tokens.sequences, None)]
    if case.sequences is None:
        return halves(tokens)
    number = len(tokens.sequences)
    count = min(case.sequences, (number + 1) // 2)
    chosen = {i * number // count for i in range(count)}
    others = [sequence for i, sequence in enumerate(tokens.sequences) if i not in chosen]
    if case.others is not None:
        others = [others[i * len(others) // case.others] for i in range(min(case.others, len(others)))]
    return [([tokens.sequences[i] for i in sorted(chosen)], tokens.frequencies(others) if others else None)]


def prepared(case: Case) -> tuple[TokenSteps, System, Any]:
    """(trace, system, costs); UserError where they do not fit together."""
    if case.start not in STARTS and (case.start != LOADED or case.load_state is None):
        raise UserError(f"start {shown(case.start)} is unknown (known: {', '.join(STARTS)})")
    tokens = tokens_of(case.trace)
    system = system_of(case, tokens)
    if case.keeps_state:
        _check_state(case, tokens, system)
    return tokens, system, load_costs(case.profile, shape_for(tokens, case), case.fmt)


def _check_state(case: Case, tokens: TokenSteps, system: System) -> None:
    if case.prompt is not None:
        raise UserError("a cache state goes from token to token; prompts (--prompt-lengths) begin anew each time")
    if knows_the_future(case.system):
        raise UserError(f"system {case.system} knows the future of its own run: its state is of no use to another")
    if case.load_state is not None:
        facts = tokens.facts
        load_state(case.load_state).check(
            facts, system, system.slots_per_layer(case.ratio, facts.layers, facts.experts)
        )


def cases_of(
    traces: Iterable[str], profile: str, systems: Iterable[str | System], ratios: Iterable[float], *, fmt: str = "int4",
    starts: Iterable[str] = STARTS, lengths: Iterable[int] = (), **common: Any,
) -> list[Case]:  # fmt: skip
    """The whole grid: every trace, ratio, start and system.

    Each has a token-by-token case, and one for every prompt length.
    """
    names = trace_names(traces)
    return [
        Case(trace, profile, system, ratio, fmt, start, length, name=names[trace], **common)
        for trace in names
        for ratio in ratios
        for start in starts
        for system in systems
        for length in (None, *lengths)
    ]


def parts_of(given: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Those replacements that are given, for `Case.parts`."""
    return tuple((name, given[name]) for name in OVERRIDES if given.get(name) is not None)
