"""Decode steps as one program, for machines without a device of their own: nothing has to be decided between their layers.

Where the planner says that a step of one token gives every expert to the CPU whatever the routing (`Planner.all_on_cpu`), the layers
need not come back to Python in turn: attention, routers, shared experts and, through an XLA FFI handler, the host experts run as
one executable (`whole_program`), which hands out every layer's routing at its end. The planner then plans each layer as ever, so that caches learn and
statistics count the same; the program has done what those plans say.

Where the next step takes this one's likeliest token, it is started before this one has ended, and more steps behind it in the same call: twice
as many as in the call before, up to MOST and to as many as take `BURST_S`. So what Python does between two steps
happens while later ones run. A run that its caller stops has up to two calls' steps computed or under way that nobody wants, 15 at most. Whatever the next step turns out to
be, the caches serve it: what was written ahead lies at its own position, which it writes first.

Measured (bundled model, 2 cores, AVX-512, one run, a step a call): 0.35 ms a token as one program, 0.44 ms as one per layer, 1.14 ms layer by layer
through Python.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Sequence

import jax
import numpy as np

from hybrimoe_jax.engine.device_model import DeviceModel
from hybrimoe_jax.engine.fused.arguments import gather
from hybrimoe_jax.engine.fused.program import MOST, Numbers, Results, as_handed, whole_program
from hybrimoe_jax.engine.lanes.compilation import compile_clock
from hybrimoe_jax.engine.programs import bucket
from hybrimoe_jax.engine.routing import read_routing
from hybrimoe_jax.engine.stats import Lanes, Late, LayerStats, StepStats
from hybrimoe_jax.engine.step import StepInput
from hybrimoe_jax.host_kernels.native.routed import table

REPEATS = 9
BURST_S = 0.1
"""Of one call, whose tokens come together; what takes no longer than this seems immediate to people. A run that is stopped waits for two calls at most."""
ENDS = 8
"""Tokens that end a sequence are handed over as this many (or a power of two that holds them), so that there is one executable."""


@dataclasses.dataclass
class _Call:
    """Steps that XLA was given in one call.

    Attributes:
      before: `Results.tokens` that begin with the first step's token. position: the first step's.
      steps: how many they are at most; a token of `ends`, unless it is the `sure` first one, ends them.
      cache: an array by which the caches are known that they must be asked for with.
      handed: how many were handed out. seconds: of each.
    """

    before: jax.Array
    position: int
    steps: int
    sure: int
    ends: tuple[int, ...]
    results: Results
    cache: weakref.ref
    handed: int = 0
    seconds: float = 0.0

    def is_next(self, step: StepInput, caches: list) -> bool:
        """Whether this is the step that comes next in it; waits for nothing but the call before."""
        row, token = self.handed, step.ids.item()
        if self.cache() is not _some(caches) or step.positions.item() != self.position + row or row == self.steps:
            return False
        if row == 0:
            return np.asarray(self.before)[0] == token and (self.sure > 0 or token not in self.ends)
        tokens = np.asarray(self.results.tokens)
        return row < tokens[1] and tokens[2 + row] == token


class WholeStep:
    """Args: the device model; for each MoE layer the addresses of its experts' records (`HostKernel.native_handle`); the kernel's instruction set."""

    def __init__(self, model: DeviceModel, addresses: Sequence[Sequence[int]], isa: int):
        self.model = model
        self._params, places = gather([layer.params for layer in model.layers], model.device)
        kinds = tuple((layer.graphdef, layer.moe_layer is not None) for layer in model.layers)
        self._program = whole_program(kinds, places, model.eps, isa)
        self._embedding = as_handed(model.table)
        self._table = jax.device_put(table([address for layer in addresses for address in layer]), model.device)
        self.threads, self.most = 1, MOST
        """Those that run a layer's experts; steps in a call."""
        self._owed: collections.deque[Late] = collections.deque()
        self._call: _Call | None = None
        """The one whose steps are being handed out, and the one behind it."""
        self._ahead: _Call | None = None
        self._last_cache: weakref.ref | None = None
        """Of the step handed out last."""
        self._wary = False
        """Whether runs take turns, so that what is started ahead is wanted by none."""
        self._latest: list[Results] = []
        """Of the call that XLA was given last; those before it are done when it is, since XLA's CPU backend runs a thread's programs in order."""
        weakref.finalize(self, _wait, self._latest)  # the interpreter must not end under it
        self._handed_out = 0.0
        """When the first step of the latest call was."""
        self._waited_s = 0.0
        """What each step took of the latest call that was waited for."""

    def _start(self, before, position: int, steps: int, sure: int, step: StepInput, caches: list) -> tuple[_Call, list]:
        """Gives XLA so many steps. `before`: `Results.tokens` that begin with the first one's token."""
        model = self.model
        outer = (self._embedding, model.norm, model.head)
        numbers = np.array(Numbers(position, steps, sure, self.threads), np.int32)
        ends = np.full(bucket(len(step.ends), ENDS), -1, np.int32)
        ends[: len(step.ends)] = step.ends
        *results, caches = self._program(self._params, outer, self._table, before, caches, numbers, ends, step.span)
        made = Results(*results)
        self._latest[:] = [made]
        return _Call(before, position, steps, sure, step.ends, made, weakref.ref(_some(caches))), caches

    def _start_behind(self, call: _Call, step: StepInput, caches: list) -> list:
        """Starts what follows the call, of which `step` is the first step, if that is known."""
        position = call.position + call.steps
        steps = min(2 * call.steps, self.most, step.follow - call.steps + 1, step.span - position)
        if steps < 1:
            return caches
        self._ahead, caches = self._start(call.results.tokens, position, steps, 0, step, caches)
        call.cache = self._ahead.cache
        return caches

    def rest(self) -> None:
        """Returns when no step that XLA was given is being computed any more: one that was started ahead and not asked for, or whose
        waiting was broken off, reads experts by their addresses, whatever becomes of their owner."""
        self._call = self._ahead = None
        self._wary = False
        _wait(self._latest)

    def _find(self, step: StepInput, caches: list) -> _Call | None:
        """The call that has the step, if it was started ahead."""
        for call in (self._call, self._ahead):
            if call is not None and call.is_next(step, caches):
                return call
        return None

    def logits(self, step: StepInput, caches: list) -> tuple[np.ndarray, list, np.ndarray]:
        """A step of one token -> logits [1, V], the caches (donated), and per MoE layer its packed routing and, last, the
        seconds of its experts, [L, 2k + E + 1]."""
        return self._take(self._find(step, caches), step, caches)

    def _take(self, call: _Call | None, step: StepInput, caches: list) -> tuple[np.ndarray, list, np.ndarray]:
        """The same, from the call that has it, if one has. A call's first step waits for the call, and has the next one started before."""
        try:
            if call is None:
                self._wary = not self._continues(caches) and (self._wary or self._has_unclaimed())
                before = np.zeros(MOST + 2, np.int32)
                before[0] = step.ids.item()
                before = jax.device_put(
                    before, self.model.device
                )  # as a call gives it, so that there is one executable
                call, caches = self._start(before, step.positions.item(), 1, 1, step, caches)
            if not call.handed:
                self._call, self._ahead = call, None
                if not self._wary:
                    caches = self._start_behind(call, step, caches)
                self.settle()  # what the call before left, while this one runs
            row, call.handed, self._last_cache = call.handed, call.handed + 1, weakref.ref(_some(caches))
            logits, packed = np.asarray(call.results.logits), np.asarray(call.results.packed)
            return logits[row : row + 1].copy(), caches, packed[row].copy()
        except BaseException:
            self._call = self._ahead = None
            raise

    def _continues(self, caches: list) -> bool:
        """Whether they are those of the step handed out last."""
        return self._last_cache is not None and self._last_cache() is _some(caches)

    def _has_unclaimed(self) -> bool:
        """Whether steps were started that nobody has asked for."""
        return self._ahead is not None or (self._call is not None and self._call.handed < self._call.steps)

    def calibrate(self, clock, capacity: int, most_threads: int) -> None:
        """Sets `threads`, one or `most_threads`, whichever makes the step faster, and `most`."""
        caches = self.model.init_cache(1, capacity)
        ids, positions = np.zeros((1, 1), np.int32), np.full((1, 1), capacity // 2, np.int32)
        step = StepInput(ids, positions, capacity, "decode", np.zeros(1, np.int64))
        best: dict[int, float] = {}
        for threads in (1, most_threads) * (REPEATS + 1):  # in turns; the first of all compiles
            self.threads = threads
            start = clock.now()
            _, caches, _ = self.logits(step, caches)
            seconds = clock.now() - start
            best[threads] = min(best.get(threads, seconds), seconds)
        self.threads = min(best, key=best.__getitem__)
        self.most = max(1, min(MOST, int(BURST_S / best[self.threads])))

    def step(self, step: StepInput, caches, planner, clock) -> tuple[np.ndarray, list, StepStats]:
        """Runs a decode step of one sequence. Its layers are planned while the next call's program runs, or when they are looked
        at. Layers' times are shares: what the program took beside the experts is divided among them, and what a call took among its steps.

        A call that was started ahead counts from when the one before was there. If it was done before it was asked for, it waited
        for the caller; then its steps count no longer than the latest that were waited for.
        """
        start, compiled = clock.now(), compile_clock().seconds
        call = self._find(step, caches)
        waits = call is None or not call.results.logits.is_ready()
        if call is not None:
            start = self._handed_out
        logits, caches, packed = self._take(call, step, list(caches))
        compile_s, call = compile_clock().seconds - compiled, self._call
        if call.handed == 1:
            self._handed_out = clock.now()
            call.seconds = (self._handed_out - start - compile_s) / int(np.asarray(call.results.tokens)[1])
            if waits:
                self._waited_s = call.seconds
            else:
                call.seconds = min(call.seconds, self._waited_s)
        late = self._owe(lambda: self._plan(packed, call.seconds, step.valid, planner))
        return logits, caches, StepStats(step.phase, 1, call.seconds + compile_s, compile_s, late)

    def _owe(self, plan: Callable[[], list[LayerStats]]) -> Late:
        """Steps are planned in their order, whichever of them is looked at first."""

        def make() -> list[LayerStats]:
            while self._owed and self._owed[0] is not late:
                self._owed[0].settle()
            self._owed.popleft()
            return plan()

        late = Late(make)
        self._owed.append(late)
        return late

    def settle(self) -> None:
        """Plans what the steps have left to be planned."""
        while self._owed:
            late = self._owed[0]
            late.settle()
            if (
                self._owed and self._owed[0] is late
            ):  # its planning was interrupted once, when a later step was looked at
                self._owed.popleft()

    def _plan(self, packed: np.ndarray, seconds: float, valid: np.ndarray, planner) -> list[LayerStats]:
        config, layers = self.model.config, []
        experts_s = packed[:, -1].tolist()
        share = max(0.0, seconds - sum(experts_s)) / len(experts_s)
        for moe_layer, busy in enumerate(experts_s):
            row = packed[moe_layer : moe_layer + 1, :-1]
            routing = read_routing(row, config.num_experts_per_tok, config.num_experts, valid)
            plan = planner.plan(moe_layer, routing.loads, routing.scores, 1)
            if len(plan.cpu) != len(routing.loads):
                raise RuntimeError(
                    f"MoE layer {moe_layer}: the plan of an all-on-CPU step leaves experts to the device"
                )
            hits, misses, lanes = len(plan.hits), len(plan.misses), Lanes(busy, share, 0.0)
            layers.append(LayerStats(moe_layer, routing.loads, hits, misses, plan.cpu, (), (), 0, share + busy, lanes))
        planner.finish_step()
        return layers


def _wait(latest: list[Results]) -> None:
    """Until they are there or have failed: whoever asked for the step was told, and of one that nobody asked for nobody wants to know."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        jax.block_until_ready(latest)
    latest.clear()


def _some(caches: list) -> jax.Array:
    """An array that tells caches from others."""
    return next(iter(caches[0].values()))
