"""Fused decode, for machines without a device of their own: nothing has to be decided between a step's layers.

Where a plan gives every expert of a one-token step to the CPU whatever the routing (`Planner.all_on_cpu`), the layers
need not come back to Python in turn: attention, routers, shared experts and, through an XLA FFI handler, the host
experts run as one executable (`decode_program`), which hands out every layer's routing at its end. The planner then
plans each layer as ever, so that caches learn and statistics count the same; the program has done what those plans
say.

Where the next step takes this one's likeliest token, it is started before this one has ended, and more steps behind it
in the same call: twice as many as in the call before, up to MAX_STEPS_PER_CALL and to as many as take `BURST_S`. So
what Python does between two steps happens while later ones run. A run that its caller stops has up to two calls' steps
computed or under way that nobody wants, 15 at most. Whatever the next step turns out to be, the caches serve it: what
was written ahead lies at its own position, which it writes first.

Measured (bundled model, 2 cores, AVX-512, one run, a step a call): 0.35 ms a token as one program, 0.44 ms as one per
layer, 1.14 ms layer by layer through Python.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Sequence

import jax
import numpy as np

from hybrimoe_jax.decide.planner import Planner
from hybrimoe_jax.engine.device_model import DeviceModel
from hybrimoe_jax.engine.fused.arguments import pack_args
from hybrimoe_jax.engine.fused.program import (
    MAX_STEPS_PER_CALL,
    StepArgs,
    StepResults,
    decode_program,
    to_program_layout,
)
from hybrimoe_jax.engine.inputs import StepInput, bucket
from hybrimoe_jax.engine.lanes.clock import Clock
from hybrimoe_jax.engine.routing import read_routing
from hybrimoe_jax.engine.stats import Lanes, LayerStats, StepStats
from hybrimoe_jax.host_kernels.native.routed import table

REPEATS = 9
BURST_S = 0.1
"""Of one call, whose tokens come together; what takes no longer seems immediate to people. A run that is stopped waits
for two calls at most."""
STOP_IDS = 8
"""Tokens that end a sequence are handed over as this many (or a power of two that holds them), so that there is one
executable."""


@dataclasses.dataclass
class _Call:
    """Steps that XLA was given in one call.

    Attributes:
      before: `StepResults.tokens` that begin with the first step's token. position: the first step's.
      steps: how many they are at most; a token of `stop_ids` ends them, unless it is among the first `min_steps`.
      cache: weakly, the array that tells the caches with which they must be asked for.
      given: how many were handed out. seconds: of each.
    """

    before: jax.Array
    position: int
    steps: int
    min_steps: int
    stop_ids: tuple[int, ...]
    results: StepResults
    cache: weakref.ref
    given: int = 0
    seconds: float = 0.0

    def is_next(self, step: StepInput, caches: list) -> bool:
        """Whether this is the step that comes next in it; waits for nothing but the call before."""
        row, token = self.given, step.ids.item()
        if self.cache() is not cache_id(caches) or step.positions.item() != self.position + row or row == self.steps:
            return False
        if row == 0:
            return np.asarray(self.before)[0] == token and (self.min_steps > 0 or token not in self.stop_ids)
        tokens = np.asarray(self.results.tokens)
        return row < tokens[1] and tokens[2 + row] == token


class FusedDecode:
    """Decode steps of one engine as one program.

    Args:
      model: the device model.
      addresses: for each MoE layer those of its experts' records (`HostKernel.native_handle`).
      isa: the kernel's instruction set.
    """

    def __init__(self, model: DeviceModel, addresses: Sequence[Sequence[int]], isa: int):
        self.model = model
        self._params, specs = pack_args([layer.params for layer in model.layers], model.device)
        kinds = tuple((layer.graphdef, layer.moe_layer is not None) for layer in model.layers)
        self._program = decode_program(kinds, specs, model.eps, isa)
        self._embedding = to_program_layout(model.table)
        self._table = jax.device_put(table([address for layer in addresses for address in layer]), model.device)
        self.threads, self.max_steps = 1, MAX_STEPS_PER_CALL
        """Those that run a layer's experts; steps in a call."""
        self._deferred: tuple | None = None
        """What is left to be planned of the step handed out last."""
        self._call: _Call | None = None
        """The one whose steps are being handed out, and the one behind it."""
        self._next_call: _Call | None = None
        self._last_cache: weakref.ref | None = None
        """Of the step handed out last."""
        self._interleaved = False
        """Whether runs take turns, so that what is started ahead is wanted by none."""
        self._latest: list[StepResults] = []
        """Of the call that XLA was given last; those before it are done when it is, since XLA's CPU backend runs a
        thread's programs in order."""
        weakref.finalize(self, _wait, self._latest)  # the interpreter must not end under it
        self._given_at = 0.0
        """When the first step of the latest call was handed out."""
        self._waited_s = 0.0
        """What each step took of the latest call that was waited for."""

    def logits(self, step: StepInput, caches: list) -> tuple[np.ndarray, list, np.ndarray]:
        """A step of one token -> logits [1, V], the caches (donated), and what each MoE layer did.

        That is its packed routing and, last, the seconds of its experts, [L, 2k + E + 1].
        """
        return self._take(self._find(step, caches), step, caches)[1]

    def step(self, step: StepInput, caches, planner: Planner, clock: Clock) -> tuple[np.ndarray, list, StepStats]:
        """Runs a decode step of one sequence and plans its layers, while the program of the next call runs.

        Where the next token is drawn nothing runs meanwhile: then planning is left until the next step's program does,
        or the run ends, and the record's layers are filled in then. Layers' times are shares: what the program took
        beside the experts is divided among them, and what a call took among its steps.

        A call that was started ahead counts from when the one before was there. If it was done before it was asked
        for, it waited for the caller; then its steps count no longer than the latest that were waited for.
        """
        start, compiled = clock.now(), clock.compile_seconds()
        call = self._find(step, caches)
        waits = call is None or not call.results.logits.is_ready()  # pyright: ignore[reportAttributeAccessIssue]  # jax's stubs lack it
        if call is not None:
            start = self._given_at
        call, (logits, caches, packed) = self._take(call, step, list(caches))
        compile_s = clock.compile_seconds() - compiled
        if call.given == 1:
            self._given_at = clock.now()
            call.seconds = (self._given_at - start - compile_s) / int(np.asarray(call.results.tokens)[1])
            if waits:
                self._waited_s = call.seconds
            else:
                call.seconds = min(call.seconds, self._waited_s)
        record = StepStats(step.phase, 1, call.seconds + compile_s, compile_s, [])
        self._deferred = (record, packed, call.seconds, step.valid, planner)
        if step.follow is not None:
            self.flush_deferred()
        return logits, caches, record

    def flush_deferred(self) -> None:
        """Plans what the latest step has left to be planned. An interrupt leaves its record without layers."""
        deferred, self._deferred = self._deferred, None
        if deferred is not None:
            record, *rest = deferred
            record.layers[:] = self._plan(*rest)

    def synchronize(self) -> None:
        """Returns when no step that XLA was given is being computed any more.

        One that was started ahead and not asked for, or whose waiting was broken off, reads experts by their
        addresses, whatever becomes of their owner.
        """
        self._call = self._next_call = None
        self._interleaved = False
        _wait(self._latest)

    def calibrate(self, clock: Clock, capacity: int, all_threads: int) -> None:
        """Sets `threads`, one or `all_threads`, whichever makes the step faster, and `max_steps`."""
        caches = self.model.init_cache(1, capacity)
        ids, positions = np.zeros((1, 1), np.int32), np.full((1, 1), capacity // 2, np.int32)
        step = StepInput(ids, positions, capacity, "decode", np.zeros(1, np.int64))
        best: dict[int, float] = {}
        for threads in (1, all_threads) * (REPEATS + 1):  # in turns; the first of all compiles
            self.threads = threads
            start = clock.now()
            _, caches, _ = self.logits(step, caches)
            seconds = clock.now() - start
            best[threads] = min(best.get(threads, seconds), seconds)
        self.threads = min(best, key=best.__getitem__)
        self.max_steps = max(1, min(MAX_STEPS_PER_CALL, int(BURST_S / best[self.threads])))

    def _start(self, before, position: int, steps: int, min_steps: int, step: StepInput, caches) -> tuple[_Call, list]:
        """Gives XLA so many steps. `before`: `StepResults.tokens` that begin with the first one's token."""
        model = self.model
        outer = (self._embedding, model.norm, model.head)
        args = np.array(StepArgs(position, steps, min_steps, self.threads), np.int32)
        stop_ids = np.full(bucket(len(step.stop_ids), STOP_IDS), -1, np.int32)
        stop_ids[: len(step.stop_ids)] = step.stop_ids
        *results, caches = self._program(self._params, outer, self._table, before, caches, args, stop_ids, step.span)
        made = StepResults(*results)
        self._latest[:] = [made]
        return _Call(before, position, steps, min_steps, step.stop_ids, made, weakref.ref(cache_id(caches))), caches

    def _start_behind(self, call: _Call, step: StepInput, caches: list) -> list:
        """Starts what follows the call, of which `step` is the first step, if that is known."""
        position, follow = call.position + call.steps, step.follow or 0
        steps = min(2 * call.steps, self.max_steps, follow - call.steps + 1, step.span - position)
        if steps < 1:
            return caches
        self._next_call, caches = self._start(call.results.tokens, position, steps, 0, step, caches)
        call.cache = self._next_call.cache
        return caches

    def _find(self, step: StepInput, caches: list) -> _Call | None:
        """The call that has the step, if it was started ahead."""
        for call in (self._call, self._next_call):
            if call is not None and call.is_next(step, caches):
                return call
        return None

    def _take(
        self, call: _Call | None, step: StepInput, caches: list
    ) -> tuple[_Call, tuple[np.ndarray, list, np.ndarray]]:
        """-> the call that has the step, and what `logits` gives.

        A call's first step waits for the call, and has the next one started before.
        """
        try:
            if call is None:
                self._interleaved = not self._continues(caches) and (self._interleaved or self._has_unclaimed())
                before = np.zeros(MAX_STEPS_PER_CALL + 2, np.int32)
                before[0] = step.ids.item()
                before = jax.device_put(before, self.model.device)  # as a call gives it: one executable
                call, caches = self._start(before, step.positions.item(), 1, 1, step, caches)
            if not call.given:
                self._call, self._next_call = call, None
                if not self._interleaved:
                    caches = self._start_behind(call, step, caches)
                self.flush_deferred()  # while this one runs
            row, call.given, self._last_cache = call.given, call.given + 1, weakref.ref(cache_id(caches))
            logits, packed = np.asarray(call.results.logits), np.asarray(call.results.packed)
            return call, (logits[row : row + 1].copy(), caches, packed[row].copy())
        except BaseException:
            self._call = self._next_call = None
            raise

    def _continues(self, caches: list) -> bool:
        """Whether they are those of the step handed out last."""
        return self._last_cache is not None and self._last_cache() is cache_id(caches)

    def _has_unclaimed(self) -> bool:
        """Whether steps were started that nobody has asked for."""
        return self._next_call is not None or (self._call is not None and self._call.given < self._call.steps)

    def _plan(self, packed: np.ndarray, seconds: float, valid: np.ndarray, planner: Planner) -> list[LayerStats]:
        config, layers = self.model.config, []
        if np.isnan(packed[:, 2 * config.num_experts_per_tok]).any():
            return []  # its logits are refused, and caches learn nothing from it
        experts_s = packed[:, -1].tolist()
        share = max(0.0, seconds - sum(experts_s)) / len(experts_s)
        for moe_layer, busy in enumerate(experts_s):
            row = packed[moe_layer : moe_layer + 1, :-1]
            routing = read_routing(row, config.num_experts_per_tok, config.num_experts, valid)
            plan = planner.plan(moe_layer, routing.loads, routing.scores, 1)
            if len(plan.cpu) != len(routing.loads):
                raise RuntimeError(f"MoE layer {moe_layer}: the plan of a fused step leaves experts to the device")
            hits, misses, lanes = len(plan.hits), len(plan.misses), Lanes(busy, share, 0.0)
            layers.append(LayerStats(moe_layer, routing.loads, hits, misses, plan.cpu, (), (), 0, share + busy, lanes))
        planner.finish_step()
        return layers


def _wait(latest: list[StepResults]) -> None:
    """Waits until they are there or have failed, and tells nobody.

    Whoever asked for the step was told, and of one that nobody asked for nobody wants to know.
    """
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        jax.block_until_ready(latest)
    latest.clear()


def cache_id(caches: list) -> jax.Array:
    """An array that tells caches from others."""
    return next(iter(caches[0].values()))
