"""Attaching the recorders of `trace/` to a running engine.

Device work finishes when nobody looks. For a timeline a watcher thread waits for each dispatched array in turn and
notes when it was ready, so an event on the device or link lane begins when its work was dispatched, or when the one
before it on that lane ended, and ends when its result was seen. The watcher disturbs what it measures a little: a
timeline is for looking at, the statistics of a run without one are for quoting.
"""

from __future__ import annotations

import dataclasses
import threading
from typing import Any, cast

import jax

from hybrimoe_jax.decide.planner import Planner
from hybrimoe_jax.engine.lanes.workers import Worker
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.machine.costs import CostModel
from hybrimoe_jax.machine.profile import MachineCosts
from hybrimoe_jax.trace.columns import Trace
from hybrimoe_jax.trace.facts import facts_of
from hybrimoe_jax.trace.recorder import TraceRecorder
from hybrimoe_jax.trace.timeline import Timeline


class EngineTimeline:
    """Collects a run's events; `write` saves them. Under the virtual clock its machine adds them.

    Args: engine: whose clock, system and executor are named in the file.
    """

    def __init__(self, engine):
        self._clock = engine.clock
        about = {
            "clock": engine.clock.name,
            "system": engine.options.chosen_system.name,
            "executor": engine.options.executor,
        }
        if engine.costs is not None:
            about["costs"] = engine.costs.source
        if engine.options.paced is not None:
            about |= {"clock": "wall", "device": "paced", **engine.options.paced._asdict()}
        elif engine.clock.name == "virtual":
            about["profile"] = engine.options.profile
        self._timeline = Timeline(**about)
        self._ends: dict[str, float] = {}
        self._worker = Worker(self._serve, "timeline", self._lost)
        self._finished = False
        self.add = self._timeline.add

    def watch(self, lane: str, name: str, issued: float, arrays, **args) -> None:
        """Notes an event that ends when `arrays` are ready."""
        self._worker.put((lane, name, issued, arrays, args))

    def expert(self, lane: str, layer: int, expert: int, start: float, end: float, **args) -> None:
        """Notes an expert that ran from `start` to `end`."""
        self._timeline.add(lane, f"expert {layer}.{expert}", start, end, layer=layer, expert=expert, **args)

    def moe_block(self, layer: int, start: float, end: float, **args) -> None:
        """Notes a MoE block that ran as one executable."""
        self._timeline.add("device", f"moe {layer}", start, end, layer=layer, **args)

    def transfer(self, kind: str, layer: int, expert: int, began: float, landed: float) -> None:
        """Notes a transfer whose landing was observed by the link itself."""
        self._timeline.add("link", f"{kind} {layer}.{expert}", began, landed, layer=layer, expert=expert, kind=kind)

    def finish(self) -> Timeline:
        """Waits until every watched event has ended; none is watched any more."""
        self._worker.stop()
        self._finished = True
        return self._timeline

    def so_far(self) -> Timeline:
        """Waits until every event watched so far has ended."""
        if not self._finished:
            served = threading.Event()
            self._worker.put(served)
            served.wait()
        return self._timeline

    def write(self, path) -> None:
        """Chrome trace-event JSON, which Perfetto opens."""
        self.finish().write(path)

    def _lost(self, task, error: BaseException) -> None:
        """The watcher has died: an event that it watched is not in the timeline, and nobody waits for it."""
        if isinstance(task, threading.Event):
            task.set()

    def _serve(self, task) -> None:
        if isinstance(task, threading.Event):
            task.set()
            return
        lane, name, issued, arrays, args = task
        start = max(issued, self._ends.get(lane, 0.0))
        for array in jax.tree.leaves(arrays):
            if not array.is_deleted():
                try:
                    array.block_until_ready()
                except RuntimeError:  # donated while we waited: whoever took it over has seen it ready
                    pass
        self._ends[lane] = end = max(start, self._clock.now())
        self._timeline.add(lane, name, start, end, **args)


class EngineTrace:
    """Feeds a TraceRecorder from the engine's steps; called once per MoE layer and step.

    Full scores and lookahead included. Each prompt is a sequence, each call of the engine a batch.
    """

    def __init__(self, engine):
        config, planner = engine.config, engine.planner
        facts = facts_of(
            config.model_type,
            len(config.moe_layers),
            config.num_experts,
            config.num_experts_per_tok,
            config.hidden_size,
            config.moe_width,
        )
        self.recorder = TraceRecorder(
            facts,
            clock=engine.clock.name,
            system=engine.options.chosen_system.name,
            seed=engine.options.seed,
            lookahead="router-input" if engine.options.chosen_system.predictor == "router-input" else "router-reuse",
        )
        if planner is not None:
            self.recorder.about["run"] = run_record(planner, engine.options.profile)
        self._calls: dict[int, tuple[int, int]] = {}  # by the engine's first sequence: ours, and the batch
        self._sequences = 0

    def begin_step(self) -> None:
        """A step begins."""
        self.recorder.next_step()

    def abandon_step(self) -> None:
        """The current step was broken off: nothing of it is kept, as the run's statistics keep nothing.

        What the planner saw of it stays with the planner, so a run that goes on after it cannot be repeated exactly:
        its record says so.
        """
        step = self.recorder.step
        self.recorder.drop_from(step)
        if "run" in self.recorder.about:
            self.recorder.about["run"].setdefault("broken_off", step)

    def landed(self, before: int, layer: int, expert: int) -> None:
        """Notes a prefetch that was committed before layer `before` of the current step was planned."""
        self.recorder.note("landed", (self.recorder.step, before, layer, expert))

    def landed_between_steps(self, layer: int, expert: int) -> None:
        """Notes a prefetch that was committed after the current step, and so before the next one's first layer."""
        self.recorder.note("landed", (self.recorder.step + 1, 0, layer, expert))

    def __call__(self, layer: int, step, routing) -> None:
        rows = routing.valid
        count, width = step.ids.shape
        if step.first_sequence not in self._calls:
            self._calls[step.first_sequence] = self._sequences, len(self._calls)
            self._sequences += count
        first, batch = self._calls[step.first_sequence]
        self.recorder.add(
            layer,
            step.phase,
            batch=batch,
            sequence=first + rows // width,
            position=step.positions.ravel()[rows],
            ids=routing.ids[rows],
            weights=routing.row_weights[rows],
            scores=routing.row_scores[rows],
            lookahead={d + 1: ahead[rows] for d, ahead in enumerate(routing.ahead)},
        )

    def save(self, path) -> None:
        self.recorder.save(path)


class Recording:
    """What `Engine.recording` records; complete once its block has ended.

    Attributes: engine_trace, engine_timeline: the recorders, None where that is not recorded.
    """

    def __init__(self, engine: Any, trace: bool, timeline: bool):
        self.engine_trace = EngineTrace(engine) if trace else None
        self.engine_timeline = EngineTimeline(engine) if timeline else None
        self._trace: Trace | None = None

    @property
    def trace(self) -> Trace:
        """The routing of the calls so far; UserError where there is none."""
        if self._trace is not None:
            return self._trace
        if self.engine_trace is None:
            raise UserError("this recording has no trace: engine.recording(trace=True)")
        trace = self.engine_trace.recorder.trace()
        if not len(trace):
            raise UserError("nothing was recorded: generate in the recording's block")
        return trace

    @property
    def timeline(self) -> Timeline:
        """What each lane did in the calls so far, on the engine's clock; UserError where there is none."""
        if self.engine_timeline is None:
            raise UserError("this recording has no timeline: engine.recording(timeline=True)")
        timeline = self.engine_timeline.so_far()
        if not len(timeline):
            raise UserError("nothing was recorded: generate in the recording's block")
        return timeline

    def finish(self) -> None:
        """The block has ended: nothing is recorded any more."""
        if self.engine_timeline is not None:
            self.engine_timeline.finish()
        if self.engine_trace is not None:
            trace = self.engine_trace.recorder.trace()
            self._trace = trace if len(trace) else None

    def __repr__(self) -> str:
        parts = [self._trace, self.engine_timeline and self.engine_timeline.so_far()]
        return f"<Recording: {', '.join(repr(part) for part in parts if part is not None) or 'nothing yet'}>"


def run_record(planner: Planner, profile: Any) -> dict:
    """What a trace says of the run it was taken from; JSON values."""
    costs = cast(CostModel | MachineCosts, planner.costs)
    frequencies = [policy.frequencies for policy in planner.policies]
    return {
        "system": dataclasses.asdict(planner.system),
        "slots": planner.slots,
        "max_in_flight": planner.max_in_flight,
        "frequencies": None if None in frequencies else frequencies,
        "steps_before": planner.counters.steps,
        "cache_state": planner.began_with,
        "profile": profile if isinstance(profile, (str, type(None))) else "given",
        "costs": costs.describe(),
        "shape": dataclasses.asdict(costs.shape) if isinstance(costs, MachineCosts) else None,
    }
