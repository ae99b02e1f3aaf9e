"""A decode step as one program, for machines without a device of their own: nothing has to be decided between its layers.

Where the planner says that a step of one token gives every expert to the CPU whatever the routing (`Planner.foregone`), the layers
need not come back to Python in turn: attention, routers, shared experts and, through an XLA FFI handler, the host experts run as
one executable, which hands out every layer's routing at its end. The planner then plans each layer as ever, so that caches learn and
statistics count the same; the program has done what those plans say.

Where the next step takes this one's likeliest token, it is started before this one has ended: the program hands the token on
by itself, and handing the program to XLA (0.4 ms of a 466 M model's token, with cold caches), sampling and everything between two
steps happen meanwhile. Whatever the next step turns out to be, the caches serve it: what was written ahead lies at its own
position, which it writes first.

Measured (bundled model, 2 cores, AVX-512, one run): 0.35 ms a token as one program, 0.44 ms as one per layer, 1.14 ms layer by layer
through Python.

Shapes: D model width, E experts, k experts per token, L MoE layers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hybrimoe_jax.host_kernels.native.routed import routed, table
from hybrimoe_jax.models.layers import rms_norm
from hybrimoe_jax.models.parameters import merge
from hybrimoe_jax.models.products import product
from hybrimoe_jax.record.stats import Lanes, Late, LayerStats, StepStats
from hybrimoe_jax.runtime.compilation import compile_clock
from hybrimoe_jax.runtime.device_model import DeviceModel
from hybrimoe_jax.runtime.gathered import gather, restore
from hybrimoe_jax.runtime.programs import _program
from hybrimoe_jax.runtime.routing import read_routing
from hybrimoe_jax.runtime.step import StepInput

REPEATS = 9


class _Results(NamedTuple):
    """What a step gives beside the caches. `likeliest` [1, 1]: the token with the greatest logit; the others as in `WholeStep.logits`."""

    logits: jax.Array
    packed: jax.Array
    likeliest: jax.Array


class _Ahead(NamedTuple):
    """A step that runs before it was asked for: its token and position, what it writes into (by one array: the caches are the caller's)."""

    token: jax.Array
    position: int
    cache: weakref.ref
    results: _Results


class WholeStep:
    """Args: the device model; for each MoE layer the addresses of its experts' records (`HostKernel.record`); the kernel's instruction set."""

    def __init__(self, model: DeviceModel, addresses: Sequence[Sequence[int]], isa: int):
        self.model = model
        self._params, places = gather([layer.params for layer in model.layers], model.device)
        kinds = tuple((layer.graphdef, layer.ordinal is not None) for layer in model.layers)
        self._program = whole_program(kinds, places, model.eps, isa)
        self._table = jax.device_put(table([address for layer in addresses for address in layer]), model.device)
        self.threads = jax.device_put(np.int32(1), model.device)
        self._owed: Late | None = None
        self._ahead: _Ahead | None = None
        self._latest: list[_Results] = []
        """Of the step that XLA was given last; those before it are done when it is, since XLA's CPU backend runs a thread's programs in order."""
        weakref.finalize(self, _wait, self._latest)  # the interpreter must not end under it
        self._handed_out = 0.0
        """When the latest step's logits were."""
        self._waited_s = 0.0
        """What the latest step took that was waited for."""

    def _start(self, ids, caches, positions, span: int) -> tuple[_Results, list]:
        model = self.model
        outer = (model.table, model.norm, model.head)
        ids = jax.device_put(ids, model.device)  # as it comes from a step before, so that there is one executable
        *results, caches = self._program(self._params, outer, self._table, ids, caches, positions, self.threads, span)
        made = _Results(*results)
        self._latest[:] = [made]
        return made, caches

    def rest(self) -> None:
        """Returns when no step that XLA was given is being computed any more: one that was started ahead and not asked for, or whose
        waiting was broken off, reads experts by their addresses, whatever becomes of their owner."""
        self._ahead = None
        _wait(self._latest)

    def _started(self, step: StepInput, caches) -> _Results | None:
        """The step's results, if it was started ahead."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead.cache() is not _some(caches) or ahead.position != step.positions.item():
            return None
        return ahead.results if ahead.token.item() == step.ids.item() else None

    def _results(self, step: StepInput, caches, results: _Results | None) -> tuple[np.ndarray, list, np.ndarray]:
        """Starts the step, unless it was, and the one after it, if that is known, and waits for it."""
        if results is None:
            results, caches = self._start(step.ids, caches, step.positions, step.span)
        after = dataclasses.replace(step, positions=step.positions + 1)
        if step.greedy and len(after.valid) and after.span == step.span:
            coming, caches = self._start(results.likeliest, caches, after.positions, after.span)
            self._ahead = _Ahead(results.likeliest, after.positions.item(), weakref.ref(_some(caches)), coming)
        self.settle()  # the step before's, while this one runs
        return np.array(results.logits, copy=True), caches, np.array(results.packed, copy=True)

    def logits(self, step: StepInput, caches: list) -> tuple[np.ndarray, list, np.ndarray]:
        """A step of one token -> logits [1, V], the caches (donated), and per MoE layer its packed routing and, last, the
        seconds of its experts, [L, 2k + E + 1]."""
        return self._results(step, caches, self._started(step, caches))

    def calibrate(self, clock, capacity: int, most_threads: int) -> None:
        """Sets `threads`, of those that run a layer's experts: one or `most_threads`, whichever makes the step faster."""
        caches = self.model.init_cache(1, capacity)
        ids, positions = np.zeros((1, 1), np.int32), np.full((1, 1), capacity // 2, np.int32)
        step = StepInput(ids, positions, capacity, "decode", np.zeros(1, np.int64))
        best: dict[int, float] = {}
        for threads in (1, most_threads) * (REPEATS + 1):  # in turns; the first of all compiles
            self.threads = jax.device_put(np.int32(threads), self.model.device)
            start = clock.now()
            _, caches, _ = self.logits(step, caches)
            seconds = clock.now() - start
            best[threads] = min(best.get(threads, seconds), seconds)
        self.threads = jax.device_put(np.int32(min(best, key=best.__getitem__)), self.model.device)

    def step(self, step: StepInput, caches, planner, clock) -> tuple[np.ndarray, list, StepStats]:
        """Runs a decode step of one sequence. Its layers are planned while the next step's program runs, or when they are looked
        at. Layers' times are shares: what the program took beside the experts is divided among them.

        A step that was started ahead counts from when the one before was handed out. If it was done before it was asked for, it waited
        for the caller; then it counts no longer than the latest that was waited for.
        """
        start, compiled = clock.now(), compile_clock().seconds
        results = self._started(step, caches)
        waits = results is None or not results.logits.is_ready()
        if results is not None:
            start = self._handed_out
        logits, caches, packed = self._results(step, list(caches), results)
        compile_s = compile_clock().seconds - compiled
        self._handed_out = clock.now()
        ran = self._handed_out - start
        if waits:
            self._waited_s = ran - compile_s
        else:
            ran = min(ran, self._waited_s + compile_s)
        self._owed = Late(functools.partial(self._plan, packed, ran - compile_s, step.valid, planner))
        return logits, caches, StepStats(step.phase, 1, ran, compile_s, self._owed)

    def settle(self) -> None:
        """Plans what a step has left to be planned."""
        if self._owed is not None:
            owed, self._owed = self._owed, None
            owed.settle()

    def _plan(self, packed: np.ndarray, seconds: float, valid: np.ndarray, planner) -> list[LayerStats]:
        config, layers = self.model.config, []
        experts_s = packed[:, -1].tolist()
        share = max(0.0, seconds - sum(experts_s)) / len(experts_s)
        for ordinal, busy in enumerate(experts_s):
            row = packed[ordinal : ordinal + 1, :-1]
            routing = read_routing(row, config.num_experts_per_tok, config.num_experts, valid)
            plan = planner.plan(ordinal, routing.loads, routing.scores, 1)
            if len(plan.cpu) != len(routing.loads):
                raise RuntimeError(f"MoE layer {ordinal}: the plan of a foregone step leaves experts to the device")
            hits, misses, lanes = len(plan.hits), len(plan.misses), Lanes(busy, share, 0.0)
            layers.append(LayerStats(ordinal, routing.loads, hits, misses, plan.cpu, (), (), 0, share + busy, lanes))
        planner.finish_step()
        return layers


def _wait(latest: list[_Results]) -> None:
    """Until they are there or have failed: whoever asked for the step was told, and of one that nobody asked for nobody wants to know."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        jax.block_until_ready(latest)
    latest.clear()


def _some(caches: list) -> jax.Array:
    """An array that tells caches from others."""
    return next(iter(caches[0].values()))


@functools.cache
def whole_program(layers: tuple, places: tuple, eps: float, isa: int):
    """The jitted step of a model whose layers have these (graphdef, whether it has experts) and places of their parameters."""

    def run(params, outer, experts, ids, caches, positions, threads, span):
        embedding, norm, head = outer
        h = embedding[ids].astype(jnp.float32)
        kept, packed = [], []
        count = len(experts) // sum(is_moe for _, is_moe in layers)
        for index, ((graphdef, is_moe), cache) in enumerate(zip(layers, caches)):
            layer = merge(graphdef, restore(params, index, places[index]))
            h, cache = layer.attend(h, cache, positions, span)
            kept.append(cache)
            x = layer.ffn_input(h)
            if not is_moe:
                h = h + layer.ffn(x).reshape(h.shape)
                continue
            routing = layer.ffn.route(x)
            y, seconds = routed(x, routing.ids, routing.weights, experts, threads, isa, len(packed) * count, count)
            shared = layer.ffn.shared(x)
            h = h + (y if shared is None else y + shared).reshape(h.shape)
            parts = [routing.ids.astype(jnp.float32), routing.weights, routing.scores, seconds[None]]
            packed.append(jnp.concatenate(parts, axis=-1))
        logits = product(rms_norm(h[:, -1], norm, eps), head)
        return logits, jnp.concatenate(packed), jnp.argmax(logits, -1, keepdims=True).astype(jnp.int32), kept

    return _program(run, donate_argnums=4, static_argnums=7)
