"""A decode step as one program, for machines without a device of their own: nothing has to be decided between its layers.

Where the planner says that a step of one token gives every expert to the CPU whatever the routing (`Planner.foregone`), the layers
need not come back to Python in turn: attention, routers, shared experts and, through an XLA FFI handler, the host experts run as
one executable, which hands out every layer's routing at its end. The planner then plans each layer as ever, so that caches learn and
statistics count the same; the program has done what those plans say.

Measured (bundled model, 2 cores, AVX-512, one run): 0.35 ms a token as one program, 0.44 ms as one per layer, 1.14 ms layer by layer
through Python.

Shapes: D model width, E experts, k experts per token, L MoE layers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

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
from hybrimoe_jax.runtime.programs import _program
from hybrimoe_jax.runtime.routing import read_routing

REPEATS = 9


class WholeStep:
    """Args: the device model; for each MoE layer the addresses of its experts' records (`HostKernel.record`); the kernel's instruction set."""

    def __init__(self, model: DeviceModel, addresses: Sequence[Sequence[int]], isa: int):
        self.model = model
        kinds = tuple((layer.graphdef, layer.ordinal is not None) for layer in model.layers)
        self._program = whole_program(kinds, model.eps, isa)
        self._params = [layer.params for layer in model.layers]
        self._tables = [jax.device_put(table(layer), model.device) for layer in addresses]
        self.threads = jax.device_put(np.int32(1), model.device)
        self._owed: Late | None = None

    def logits(self, ids, caches, positions, span: int) -> tuple[np.ndarray, list, np.ndarray]:
        """ids, positions [1, 1] -> logits [1, V], the caches (donated), and per MoE layer its packed routing and, last, the
        seconds of its experts, [L, 2k + E + 1]."""
        model = self.model
        outer = (model.table, model.norm, model.head)
        logits, caches, packed = self._program(
            self._params, outer, self._tables, ids, caches, positions, self.threads, span
        )
        self.settle()  # the step before's, while this one runs
        return np.array(logits, copy=True), caches, np.array(packed, copy=True)

    def calibrate(self, clock, capacity: int, most_threads: int) -> None:
        """Sets `threads`, of those that run a layer's experts: one or `most_threads`, whichever makes the step faster."""
        caches = self.model.init_cache(1, capacity)
        ids, positions = np.zeros((1, 1), np.int32), np.full((1, 1), capacity // 2, np.int32)
        best: dict[int, float] = {}
        for threads in (1, most_threads) * (REPEATS + 1):  # in turns; the first of all compiles
            self.threads = jax.device_put(np.int32(threads), self.model.device)
            start = clock.now()
            _, caches, _ = self.logits(ids, caches, positions, capacity)
            seconds = clock.now() - start
            best[threads] = min(best.get(threads, seconds), seconds)
        self.threads = jax.device_put(np.int32(min(best, key=best.__getitem__)), self.model.device)

    def step(self, step, caches, planner, clock) -> tuple[np.ndarray, list, StepStats]:
        """Runs a decode step of one sequence. Its layers are planned while the next step's program runs, or when they are looked
        at. Layers' times are shares: what the program took beside the experts is divided among them."""
        start, compiled = clock.now(), compile_clock().seconds
        logits, caches, packed = self.logits(step.ids, list(caches), step.positions, step.span)
        compile_s = compile_clock().seconds - compiled
        ran = clock.now() - start
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


@functools.cache
def whole_program(layers: tuple, eps: float, isa: int):
    """The jitted step of a model whose layers have these (graphdef, whether it has experts)."""

    def run(params, outer, tables, ids, caches, positions, threads, span):
        embedding, norm, head = outer
        h = embedding[ids].astype(jnp.float32)
        tables, kept, packed = iter(tables), [], []
        for (graphdef, is_moe), own, cache in zip(layers, params, caches):
            layer = merge(graphdef, own)
            h, cache = layer.attend(h, cache, positions, span)
            kept.append(cache)
            x = layer.ffn_input(h)
            if not is_moe:
                h = h + layer.ffn(x).reshape(h.shape)
                continue
            routing = layer.ffn.route(x)
            y, seconds = routed(x, routing.ids, routing.weights, next(tables), threads, isa)
            shared = layer.ffn.shared(x)
            h = h + (y if shared is None else y + shared).reshape(h.shape)
            parts = [routing.ids.astype(jnp.float32), routing.weights, routing.scores, seconds[None]]
            packed.append(jnp.concatenate(parts, axis=-1))
        return product(rms_norm(h[:, -1], norm, eps), head), kept, jnp.concatenate(packed)

    return _program(run, donate_argnums=4, static_argnums=7)
