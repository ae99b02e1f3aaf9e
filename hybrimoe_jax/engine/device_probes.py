"""The programs of a step that a warm-up times: a MoE layer's block, with any number of experts, and its front."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrimoe_jax.engine import programs
from hybrimoe_jax.engine.device_model import DeviceModel
from hybrimoe_jax.engine.inputs import StepInput, bucket
from hybrimoe_jax.engine.lanes.clock import Clock
from hybrimoe_jax.engine.lanes.slots import SlotPool
from hybrimoe_jax.engine.lanes.stacked import StackedSlots, finder
from hybrimoe_jax.engine.lanes.transfer import Link


class DevicePrograms:
    """Each method gives a function that starts a program.

    Args:
      model, pool, link, clock: the engine's.
      weights: (MoE layer, expert) -> HostExpert.
      count: how many slots a block's experts rotate over.
    """

    def __init__(self, model: DeviceModel, pool: SlotPool, link: Link, weights, clock: Clock, count: int):
        self.model, self.pool, self.link, self.weights, self.clock = model, pool, link, weights, clock
        self.count, self.layer, self.width = count, model.moe_layers[0], model.config.hidden_size

    def finder(self, tokens: int) -> StackedSlots | None:
        """The slots, where a block is one program that finds its experts in them."""
        pool = finder(self.pool, tokens)
        return pool if pool is not None and self.residents() else None

    def residents(self) -> list[int]:
        """Experts of the first MoE layer in slots, no more than a token has; some are put there where none are."""
        layer, most = self.layer.moe_layer or 0, self.model.config.num_experts_per_tok
        if not self.pool.residents(layer):
            for expert in range(min(self.pool.free(layer), most)):
                self.pool.write(layer, expert, self.link.put(self.weights(layer, expert)), None)
        return sorted(self.pool.residents(layer))[:most]

    def block(self, tokens: int, experts: int, shared: bool) -> Callable[[], Any]:
        """-> a function that dispatches a block, its `shared` experts too, and returns its result."""
        x = jax.device_put(jnp.ones((tokens, self.width), jnp.float32), self.model.device)
        pool = self.finder(tokens)
        if pool is not None:
            return self._block_in_one(pool, x, self.residents()[:experts])
        pacing, program = self.clock.pacing, self.layer.programs.shared if shared else None
        places = itertools.cycle(self.pool.some(self.count))  # valid until a transfer writes them
        routed = self._routed(x, list(range(self.model.config.num_experts_per_tok)))
        rows = dict.fromkeys(range(experts), np.arange(tokens))
        mix = dict.fromkeys(range(experts), np.ones(tokens, np.float32))

        def start():
            acc = x if program is None else program(self.layer.params, x, pacing.block(tokens))
            slots = [(expert, next(places)) for expert in range(experts)]
            return self.pool.add(acc, routed, slots, rows, mix, pacing)

        return start

    def _block_in_one(self, pool: StackedSlots, x: jax.Array, residents: list[int]) -> Callable[[], Any]:
        """The same as one program, which finds these residents; other experts that tokens have are left out."""
        config = self.model.config
        others = [expert for expert in range(config.num_experts) if expert not in residents]
        chosen = (residents + others)[: config.num_experts_per_tok]
        routed, there = self._routed(x, chosen), pool.residents(self.layer.moe_layer or 0)
        left_out = [expert for expert in chosen if expert in there and expert not in residents]
        return lambda: pool.block(self.layer, routed, left_out, self.clock.pacing.block(len(x)))

    def _routed(self, x: jax.Array, chosen: list[int]) -> programs.Routed:
        """Every token has the same experts."""
        ids = np.array([chosen] * len(x), np.int32)
        on_device = jax.device_put((ids, np.ones(ids.shape, np.float32)), self.model.device)
        return programs.Routed(x, *on_device)

    def front(self, tokens: int, context: int) -> Callable[[], jax.Array]:
        """-> a function that dispatches a front and returns the packed routing."""
        layer, capacity, pacing = self.layer, bucket(context, 256), self.clock.pacing
        positions = np.arange(max(0, context - tokens), max(tokens, context), dtype=np.int32)[None]
        span = StepInput(np.zeros_like(positions), positions, capacity, "decode", None).span
        positions = jax.device_put(positions, self.model.device)
        h = jax.device_put(jnp.ones((1, tokens, self.width), jnp.float32), self.model.device)
        no_host_part = jnp.zeros((tokens, self.width), jnp.float32)  # bound to no device, as in a step
        nothing = jax.device_put(no_host_part, self.model.device)
        shapes = layer.cache_shapes(1, capacity).items()
        cache = {name: jnp.zeros(shape, self.model.cache_dtype) for name, shape in shapes}
        cache = jax.device_put(cache, self.model.device)

        def start() -> jax.Array:
            nonlocal cache
            pace = pacing.front(tokens, context, False)
            parts = (h, nothing, no_host_part, cache, positions, span, self.model.sends_input, pace)
            *_, cache, packed = layer.programs.front(layer.params, (), *parts)
            return packed

        return start
