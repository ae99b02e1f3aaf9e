"""Many runs: every system at every cache ratio on every trace, decoding and reading prompts, warm and cold.

Static placements and the warm start take frequencies of the half that is not run; a run's figures are those of both
halves, or of the sequences that `Case.sequences` takes. State is kept from one sequence to the next. A prompt begins
with a fresh cache each time.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

from hybrimoe_jax.decide.cache import MRS
from hybrimoe_jax.decide.cache_state import load_state, take_state
from hybrimoe_jax.decide.layer_stream import BUFFERED_LAYERS
from hybrimoe_jax.decide.planner import Planner
from hybrimoe_jax.decide.systems import System, get_system
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.machine.virtual import VirtualMachine
from hybrimoe_jax.records import stamped
from hybrimoe_jax.simulate.bound import clairvoyant_policies, knows_the_future, least_seconds
from hybrimoe_jax.simulate.cases import Case, learns_instead, prepared, samples, trace_name, version_of
from hybrimoe_jax.simulate.records import measures, versions
from hybrimoe_jax.simulate.replay import Result, replay, settle
from hybrimoe_jax.simulate.synthetic import PREFIX
from hybrimoe_jax.simulate.workers import workers
from hybrimoe_jax.simulate.workload import Step, TokenSteps
from hybrimoe_jax.trace.timeline import Timeline
from hybrimoe_jax.trace.tokens import load_recording

FLAGS = {"scope": "cache-scope", "stream_prefill": "stream-prefill"}
"""Flags of `simulate` that are not called as their override is."""


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
    for sequences, frequencies in samples(tokens, case):
        if case.keeps_state:
            notes.append(
                "all sequences in one run, without frequencies of others: it begins or ends with a cache state"
            )
        elif case.blind:
            frequencies = None
        elif frequencies is None and case.start == "warm":
            notes.append("one sequence: static placement and warm start take the lowest ids, not frequencies")
        for part, least in _runs(case, system, costs, tokens, sequences, frequencies, timeline):
            result = part if result is None else result + part
            bound += least
        timeline = None
    if result is None:
        raise UserError(f"trace {case.trace}: {len(tokens)} tokens do not hold a prompt of {case.prompt}")
    buffers = BUFFERED_LAYERS * tokens.facts.experts * costs.expert_bytes if system.stream_prefill else 0
    notes += _notes(case, system, tokens, result, buffers)
    facts, slots = tokens.facts, system.slots_per_layer(case.ratio, tokens.facts.layers, tokens.facts.experts)
    record = {
        "clock": "virtual",
        "trace": trace_name(case),
        "model": costs.describe().get("model", facts.model_type),
        "profile": case.profile if not Path(case.profile).exists() else Path(case.profile).name,
        "format": case.fmt,
        "system": case.system_name,
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
            "sequences": case.sequences,
            "sequence_tokens": case.sequence_tokens,
            "others": case.others,
            "blind": case.blind,
        },
        "notes": notes,
        "costs": costs.describe(),
        "versions": versions(),
        "replay_cpu_s": time.process_time() - began,
    }
    return stamped("simulation", record)


def _notes(case: Case, system: System, tokens: TokenSteps, result: Result, buffers: int) -> list[str]:
    """What a reader of the figures must know."""
    counters, future = result.counters, knows_the_future(case.system)
    moved = counters.fetched + counters.layer_streamed + counters.prefetch_issued
    learned = not future and learns_instead(case, get_system(case.system).override(**dict(case.parts)), tokens)
    flags = ", ".join(f"--{FLAGS.get(name, name)}" for name, _ in case.parts)
    size = f"{buffers / 2e6:.4g} MB each"
    said = {
        "the trace has no full scores: MRS with p = k": not tokens.has_scores and system.cache.made_by is MRS,
        "no prefetch was issued: none was found worth its while, or nothing was predicted": (
            system.lookahead and not counters.prefetch_issued
        ),
        "no expert was ever moved to the device: the slots stayed as they started": system.fetches and not moved,
        "the trace has no router predictions: the co-activation table predicts, learned online": learned,
        "synthetic routing, see hybrimoe_jax/simulate/synthetic.py": case.trace.startswith(PREFIX),
        f"parts are fixed: {flags} replaced nothing": future and case.parts,
        "placed without frequencies: each layer's lowest ids": case.blind,
        f"prompts are streamed through two buffers of {size}, beside the slots": buffers and case.prompt is not None,
    }
    return [note for note, applies in said.items() if applies]


def _runs(case, system, costs, tokens, sequences, frequencies, timeline) -> Iterator[tuple[Result, float]]:
    def run(steps: Iterable[Step]) -> Result:
        if knows_the_future(case.system):
            steps = list(steps)
        planner, machine = planner_for(case, system, costs, tokens, frequencies, steps), VirtualMachine(costs, timeline)
        if case.load_state is not None:
            load_state(case.load_state).restore(planner, tokens.facts)
        result = replay(planner, machine, steps)
        if case.save_state is not None:
            settle(planner, machine)
            take_state(planner, tokens.facts, f"cache state {case.save_state}").save(case.save_state)
        return result

    slots = tuple(system.slots_per_layer(case.ratio, tokens.facts.layers, tokens.facts.experts, frequencies))
    cold = case.start == "cold" and not system.cache.made_by.fixed
    pooled = system.scope == "pooled"

    if case.prompt is None:
        known = version_of(case.trace), version_of(case.profile)
        least = _least(_steps_of(case), tuple(sequences), slots, cold, pooled, known)
        yield run(tokens.steps(sequences, case.steps, case.sequence_tokens)), least
        return
    first = sequences[0] == tokens.sequences[0]
    for number, step in enumerate(tokens.prompts(sequences, case.prompt, case.prompts)):
        step = step._replace(sequence=number if first else -1 - number)
        yield run([step]), least_seconds([step], slots, costs, cold=cold, pooled=pooled)
        timeline = None


def _steps_of(case: Case) -> Case:
    """The case, but for what does not change its steps and their costs."""
    usual = dict(system="on-demand", parts=(), ratio=0.0, start="cold", blind=False, name=None, others=None)
    return dataclasses.replace(case, **usual, load_state=None, save_state=None)


@functools.lru_cache(maxsize=256)
def _least(
    steps: Case, sequences: tuple[int, ...], slots: tuple[int, ...], cold: bool, pooled: bool, known: Any
) -> float:
    """`least_seconds` of a case's steps, which systems with the same slots share, of one version of its files."""
    tokens, _, costs = prepared(steps)
    chosen = tokens.steps(sequences, steps.steps, steps.sequence_tokens)
    return least_seconds(chosen, slots, costs, cold=cold, pooled=pooled)


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


def timeline_of(cases: Iterable[Case], steps: int) -> Timeline:
    """The first steps of every system's first case side by side, each with lanes of its own from time 0."""
    first = {case.system_name: case for case in reversed([c for c in cases if c.prompt is None])}
    lanes = ("cpu", "device", "link")
    names = [case for case in reversed(first.values())]
    whole = Timeline(
        tuple(f"{case.system_name} {lane}" for case in names for lane in lanes),
        clock="virtual",
        cases=[dataclasses.asdict(case) for case in names],
    )
    for case in names:
        own = Timeline()
        run_case(dataclasses.replace(case, steps=steps, save_state=None), own)
        for lane in lanes:
            for start, end, name, args in own.events(lane):
                whole.add(f"{case.system_name} {lane}", name, start, end, **args)
    return whole
