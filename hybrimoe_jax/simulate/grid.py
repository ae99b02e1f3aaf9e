"""Many runs: every system at every cache ratio on every trace, decoding and reading prompts, from a warm and from a cold start.

A trace's sequences are split in two halves (every second one). Each half is run with frequencies counted on the other, which static
placements and the warm start take; a run's figures are those of both halves. State is kept from one sequence to the next. A prompt begins
with a fresh cache each time.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

from hybrimoe_jax.decide.cache import policy_class
from hybrimoe_jax.decide.layer_stream import BUFFERED_LAYERS
from hybrimoe_jax.decide.planner import Planner
from hybrimoe_jax.decide.systems import System, get_system
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.machine.profile import load_costs
from hybrimoe_jax.machine.shapes import ModelShape, find_shape, get_shape
from hybrimoe_jax.machine.virtual import VirtualMachine
from hybrimoe_jax.simulate.bound import CLAIRVOYANT, clairvoyant_policies, knows_the_future, least_seconds
from hybrimoe_jax.simulate.records import measures, versions
from hybrimoe_jax.simulate.replay import Result, replay
from hybrimoe_jax.simulate.synthetic import KNOBS, PREFIX, synthetic_trace
from hybrimoe_jax.simulate.workers import workers
from hybrimoe_jax.simulate.workload import Step, TokenSteps
from hybrimoe_jax.trace.importers import open_trace
from hybrimoe_jax.trace.timeline import Timeline
from hybrimoe_jax.trace.tokens import load_recording

KIND, VERSION = "hybrimoe-jax simulation", 1
STARTS = ("warm", "cold")
OVERRIDES = ("cache", "scheduler", "prefetch", "lookahead", "predictor", "scope", "stream_prefill")
FLAGS = {"scope": "cache-scope", "stream_prefill": "stream-prefill"}
"""Flags of `simulate` that are not called as their override is."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
      trace: a file that `open_trace` reads. profile: name or file. fmt: weight format of the experts.
      system: its name; `parts` replace some of its parts (names in OVERRIDES).
      ratio: share of the experts that the device holds.
      start: "warm" (the most frequent experts of other sequences are loaded) or "cold".
      prompt: tokens of a prompt, one step each time; None for token by token.
      prompts: how many prompts in each half. shape: a name in `shapes.SHAPES`, where the trace alone does not tell.
      steps: at most so many steps of each half, None for all.
      blind: static placements and the warm start know no frequencies: each layer's lowest ids, as good as any.
      name: what results call the trace; None for the end of its path.
    """

    trace: str
    profile: str
    system: str
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


ORACLE = CLAIRVOYANT.name


@functools.lru_cache(maxsize=4)
def tokens_of(path: str) -> TokenSteps:
    """A trace, token by token; "synthetic:" and a model's name stand for made-up routing."""
    if path.startswith(PREFIX):
        name = path.removeprefix(PREFIX)
        if name not in KNOBS:
            raise UserError(f"trace {path}: there is synthetic routing of {', '.join(KNOBS)} only")
        return TokenSteps(synthetic_trace(name))
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
        names[path] = ends(path, next(unique, longest))
    return names


def trace_name(case: Case) -> str:
    """What results call the case's trace."""
    return case.name or trace_names([case.trace])[case.trace]


def system_of(case: Case, tokens: TokenSteps) -> System:
    """The case's system, parts replaced. Where a trace has no router predictions the co-activation table predicts."""
    known = knows_the_future(case.system)
    if known is not None:
        return known
    system = get_system(case.system).override(**dict(case.parts))
    asked = dict(case.parts).get("predictor")
    if system.lookahead and asked is None and not tokens.has_lookahead:
        return system.override(predictor="co-activation")
    return system


def shape_for(tokens: TokenSteps, case: Case) -> ModelShape:
    """The model's sizes; UserError where neither the trace nor the case tells."""
    facts = tokens.facts
    shape = get_shape(case.shape) if case.shape else find_shape(facts.layers, facts.experts, facts.top_k)
    if shape is None:
        raise UserError(
            f"trace {case.trace}: no known model has {facts.layers} MoE layers of {facts.experts} experts, {facts.top_k} a token; "
            "name one with --shape"
        )
    if (shape.layers, shape.experts) != (facts.layers, facts.experts):
        raise UserError(
            f"shape {shape.name}: {shape.layers} layers of {shape.experts} experts; the trace has {facts.layers} of {facts.experts}"
        )
    return shape


def halves(tokens: TokenSteps) -> list[tuple[list[int], list[list[int]] | None]]:
    """(sequences to run, frequencies of the others or None) of each half."""
    first, second = tokens.sequences[::2], tokens.sequences[1::2]
    if not second:
        return [(first, None)]
    return [(first, tokens.frequencies(second)), (second, tokens.frequencies(first))]


def prepared(case: Case) -> tuple[TokenSteps, System, Any]:
    """(trace, system, costs); UserError where they do not fit together."""
    if case.start not in STARTS:
        raise UserError(f"start {case.start!r} is unknown (known: {', '.join(STARTS)})")
    tokens = tokens_of(case.trace)
    system = system_of(case, tokens)
    return tokens, system, load_costs(case.profile, shape_for(tokens, case), case.fmt)


def planner_for(case: Case, system: System, costs: Any, tokens: TokenSteps, frequencies, steps) -> Planner:
    """A fresh planner of a case; `steps` are those to come, which only the oracle looks at."""
    facts = tokens.facts
    slots = system.slots_per_layer(case.ratio, facts.layers, facts.experts, frequencies)
    policies = None
    if knows_the_future(case.system):
        policies = clairvoyant_policies(steps, facts.experts, slots, facts.top_k, frequencies)
    return Planner(
        system,
        facts.layers,
        facts.experts,
        facts.top_k,
        slots,
        costs,
        frequencies=frequencies,
        policies=policies,
        recording=load_recording(system.recording),
        cold=case.start == "cold",
    )


def run_case(case: Case, timeline: Timeline | None = None) -> dict:
    """Runs one case: its record, see `simulate`. `timeline` gets the events of the first half."""
    tokens, system, costs = prepared(case)
    began, result, bound, notes = time.process_time(), None, 0.0, []
    for sequences, frequencies in halves(tokens):
        if case.blind:
            frequencies = None
        elif frequencies is None and case.start == "warm":
            notes.append("one sequence: static placement and warm start take the lowest ids, not frequencies")
        for part, least in _runs(case, system, costs, tokens, sequences, frequencies, timeline):
            result = part if result is None else result + part
            bound += least
        timeline = None
    if result is None:
        raise UserError(f"trace {case.trace}: {len(tokens)} tokens do not hold a prompt of {case.prompt}")
    if not tokens.has_scores and system.cache == "mrs":
        notes.append("the trace has no full scores: MRS with p = k")
    if system.lookahead and not result.counters.prefetch_issued:
        notes.append("no prefetch was issued: none was found worth its while, or nothing was predicted")
    moved = result.counters.fetched + result.counters.layer_streamed + result.counters.prefetch_issued
    if system.fetches and not moved:
        notes.append("no expert was ever moved to the device: the slots stayed as they started")
    if system.predictor == "co-activation" and not dict(case.parts).get("predictor"):
        notes.append("the trace has no router predictions: the co-activation table predicts, learned online")
    if case.trace.startswith(PREFIX):
        notes.append("synthetic routing, see hybrimoe_jax/simulate/synthetic.py")
    if knows_the_future(case.system) and case.parts:
        flags = ", ".join(f"--{FLAGS.get(name, name)}" for name, _ in case.parts)
        notes.append(f"parts are fixed: {flags} replaced nothing")
    if case.blind:
        notes.append("placed without frequencies: each layer's lowest ids")
    buffers = BUFFERED_LAYERS * tokens.facts.experts * costs.expert_bytes if system.stream_prefill else 0
    if buffers and case.prompt is not None:
        notes.append(f"prompts are streamed through two buffers of {buffers / 2e6:.4g} MB each, beside the slots")
    facts, slots = tokens.facts, system.slots_per_layer(case.ratio, tokens.facts.layers, tokens.facts.experts)
    return {
        "kind": KIND,
        "version": VERSION,
        "clock": "virtual",
        "trace": trace_name(case),
        "model": costs.describe().get("model", facts.model_type),
        "profile": case.profile if not Path(case.profile).exists() else Path(case.profile).name,
        "format": case.fmt,
        "system": case.system,
        "cache_ratio": case.ratio,
        "start": case.start,
        "rows": tokens.phase if case.prompt is None else f"prompt of {case.prompt} consecutive tokens",
        "prompt_tokens": case.prompt,
        **measures(result, costs.expert_bytes, sum(slots) * costs.expert_bytes),
        "slots": sum(slots),
        "buffer_bytes": buffers,
        "bound_seconds_per_step": bound / len(result.steps),
        "choices": {
            **dataclasses.asdict(system),
            **({"cache": "belady"} if knows_the_future(case.system) else {}),
            "steps_limit": case.steps,
            "blind": case.blind,
        },
        "notes": notes,
        "costs": costs.describe(),
        "versions": versions(),
        "replay_cpu_s": time.process_time() - began,
    }


def _runs(case, system, costs, tokens, sequences, frequencies, timeline) -> Iterator[tuple[Result, float]]:
    def run(steps: Iterable[Step]) -> Result:
        if knows_the_future(case.system):
            steps = list(steps)
        planner = planner_for(case, system, costs, tokens, frequencies, steps)
        return replay(planner, VirtualMachine(costs, timeline), steps)

    def least(steps: Iterable[Step]) -> float:
        slots = system.slots_per_layer(case.ratio, tokens.facts.layers, tokens.facts.experts, frequencies)
        cold = case.start == "cold" and not policy_class(system.cache).fixed
        return least_seconds(steps, slots, costs, cold=cold, pooled=system.scope == "pooled")

    if case.prompt is None:
        yield run(tokens.steps(sequences, case.steps)), least(tokens.steps(sequences, case.steps))
        return
    first = sequences[0] == tokens.sequences[0]
    for number, step in enumerate(tokens.prompts(sequences, case.prompt, case.prompts)):
        step = step._replace(sequence=number if first else -1 - number)
        yield run([step]), least([step])
        timeline = None


def run_cases(cases: Iterable[Case], jobs: int = 1) -> Iterator[dict]:
    """Runs all cases, `jobs` at a time; records come in the order of the cases."""
    cases = list(cases)
    if jobs <= 1 or len(cases) == 1:
        yield from map(run_case, cases)
        return
    with workers(min(jobs, len(cases))) as pool:
        numbers = {pool.submit(run_case, case): number for number, case in enumerate(cases)}
        done: dict[int, dict] = {}
        following = 0
        for future in as_completed(numbers):
            done[numbers[future]] = future.result()
            while following in done:
                yield done.pop(following)
                following += 1


def cases_of(
    traces: Iterable[str], profile: str, systems: Iterable[str], ratios: Iterable[float], *, fmt: str = "int4",
    starts: Iterable[str] = STARTS, lengths: Iterable[int] = (), **common: Any,
) -> list[Case]:  # fmt: skip
    """The whole grid: for every trace, ratio, start and system a token-by-token case, and one for every prompt length."""
    names = trace_names(traces)
    return [
        Case(trace, profile, system, ratio, fmt, start, length, name=names[trace], **common)
        for trace in names
        for ratio in ratios
        for start in starts
        for system in systems
        for length in (None, *lengths)
    ]


def timeline_of(cases: Iterable[Case], steps: int) -> Timeline:
    """The first steps of every system's first case side by side, each with lanes of its own from time 0."""
    first = {case.system: case for case in reversed([c for c in cases if c.prompt is None])}
    lanes = ("cpu", "device", "link")
    names = [case for case in reversed(first.values())]
    whole = Timeline(
        tuple(f"{case.system} {lane}" for case in names for lane in lanes),
        clock="virtual",
        cases=[dataclasses.asdict(case) for case in names],
    )
    for case in names:
        own = Timeline()
        run_case(dataclasses.replace(case, steps=steps), own)
        for lane in lanes:
            for start, end, name, args in own.events(lane):
                whole.add(f"{case.system} {lane}", name, start, end, **args)
    return whole


def parts_of(given: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Those replacements that are given, for `Case.parts`."""
    return tuple((name, given[name]) for name in OVERRIDES if given.get(name) is not None)
