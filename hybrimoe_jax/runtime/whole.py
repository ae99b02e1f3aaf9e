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
from hybrimoe_jax.record.stats import Lanes, LayerStats, StepStats
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

    def logits(self, ids, caches, positions, span: int) -> tuple[np.ndarray, list, np.ndarray]:
        """ids, positions [1, 1] -> logits [1, V], the caches (donated), and per MoE layer its packed routing and, last, the
        seconds of its experts, [L, 2k + E + 1]."""
        model = self.model
        outer = (model.table, model.norm, model.head)
        logits, caches, packed = self._program(
            self._params, outer, self._tables, ids, caches, positions, self.threads, span
        )
        return np.array(logits, copy=True), caches, np.asarray(packed)

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
        """Runs a decode step of one sequence, then plans its layers. Layers' times are shares: what the program took beside the
        experts is divided among them."""
        start, compiled = clock.now(), compile_clock().seconds
        config = self.model.config
        logits, caches, packed = self.logits(step.ids, list(caches), step.positions, step.span)
        ran = clock.now() - start
        record = StepStats(step.phase, 1, 0.0, 0.0, [])
        valid, experts_s = step.valid, packed[:, -1].tolist()
        share = max(0.0, ran - (compile_clock().seconds - compiled) - sum(experts_s)) / len(experts_s)
        for ordinal, seconds in enumerate(experts_s):
            routing = read_routing(
                packed[ordinal : ordinal + 1, :-1], config.num_experts_per_tok, config.num_experts, valid
            )
            plan = planner.plan(ordinal, routing.loads, routing.scores, 1)
            if len(plan.cpu) != len(routing.loads):
                raise RuntimeError(f"MoE layer {ordinal}: the plan of a foregone step leaves experts to the device")
            record.layers.append(
                LayerStats(
                    ordinal,
                    routing.loads,
                    len(plan.hits),
                    len(plan.misses),
                    plan.cpu,
                    (),
                    (),
                    0,
                    share + seconds,
                    Lanes(seconds, share, 0.0),
                )
            )
        planner.finish_step()
        record.seconds, record.compile_s = clock.now() - start, compile_clock().seconds - compiled
        return logits, caches, record


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
