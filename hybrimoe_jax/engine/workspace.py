"""The programs of a step, and the device memory that they need beside what stays there: the compiler's own figure.

Programs are compiled for arguments that are only described, so nothing need be on the device. What a step then runs is
not compiled again.

Shapes: B rows of T tokens, N = B*T, D model width, E experts, k experts per token, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from hybrimoe_jax.engine import programs
from hybrimoe_jax.engine.inputs import bucket
from hybrimoe_jax.engine.lanes import stacked
from hybrimoe_jax.engine.lanes.slots import write_slot
from hybrimoe_jax.engine.programs import Routed
from hybrimoe_jax.engine.steps.callback import moe_program
from hybrimoe_jax.models.moe import DeviceExpert

COMPILERS = 8
"""Programs compiled at once, at most."""
POOL = 2
"""Slots of the stack that is described; what a program needs does not depend on how many there are."""


@dataclasses.dataclass(frozen=True)
class StepProgram:
    """One program of a step.

    Attributes:
      part: what it does in a step.
      jitted, arguments, options: what to compile; positional arguments and named ones.
      beside: bytes of the step's own arrays that live while it runs, its results left out.
    """

    part: str
    jitted: Any
    arguments: tuple
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    beside: int = 0

    def compile(self, *platforms: str) -> Any:
        """-> `jax.stages.Compiled`, for the device that the arguments are described on.

        `platforms`: of a device that this process has not.
        """
        return self.jitted.trace(*self.arguments, **self.options).lower(lowering_platforms=platforms or None).compile()


@dataclasses.dataclass(frozen=True)
class StepShape:
    """A step's size: B, T, places of the cache, and how many coming layers' routers it applies."""

    batch: int
    tokens: int
    capacity: int
    lookahead: int

    @property
    def rows(self) -> int:
        return self.batch * self.tokens


class StepPrograms:
    """Every kind of program that steps of a model call, each once.

    Args:
      model: a `DeviceModel`, or what has its attributes with arrays that are only described.
      slot: an expert in a slot, described or not.
      executor: an `EngineConfig.executor`. kernel: an `EngineConfig.device_kernel`.
    """

    def __init__(self, model: Any, slot: DeviceExpert, executor: str = "overlapped", kernel: str = "xla"):
        self.model, self.config, self.executor, self.kernel = model, model.config, executor, kernel
        self._on = jax.sharding.SingleDeviceSharding(model.device)
        self.slot = jax.tree.map(self.described, slot)

    def described(self, array: Any) -> jax.ShapeDtypeStruct:
        """An array on the device."""
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=getattr(array, "sharding", None) or self._on)

    def array(self, *shape: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._on)

    def of(self, shape: StepShape) -> Iterator[StepProgram]:
        """Those of a step of this size that takes the last token's logits of each row."""
        model, line = self.model, 4 * shape.rows * self.config.hidden_size
        ids = jax.ShapeDtypeStruct((shape.batch, shape.tokens), jnp.int32)
        yield StepProgram("embed", programs.embed, (self.described(model.table), ids, None))
        kinds = set()
        for layer in model.layers:
            if (layer.moe_layer is None, layer.graphdef) not in kinds:
                kinds.add((layer.moe_layer is None, layer.graphdef))
                yield from self._layer(layer, shape)
        yield from self._experts(shape, self._routing_bytes(shape) + 5 * line)
        last = jax.ShapeDtypeStruct((shape.batch,), jnp.int32)
        arguments = (self.described(model.norm), self.described(model.head), *self._stream(shape), last)
        yield StepProgram("last logits", programs.last_logits, arguments, {"eps": model.eps}, 3 * line)
        if model.sends_input:
            yield StepProgram("last token", programs.last_token, arguments, {"eps": model.eps}, 3 * line)

    def all_logits(self, tokens: int) -> StepProgram:
        """Logits of every token of a chunk."""
        stream = self._stream(StepShape(1, tokens, 0, 0))
        arguments = (self.described(self.model.norm), self.described(self.model.head), *stream)
        beside = 3 * 4 * tokens * self.config.hidden_size
        return StepProgram("all logits", programs.all_logits, arguments, {"eps": self.model.eps}, beside)

    def _stream(self, shape: StepShape) -> tuple:
        part = self.array(shape.rows, self.config.hidden_size)
        return self.array(shape.batch, shape.tokens, self.config.hidden_size), part, part

    def _routed(self, rows: int) -> Routed:
        chosen = rows, self.config.num_experts_per_tok
        return Routed(
            self.array(rows, self.config.hidden_size), self.array(*chosen, dtype=jnp.int32), self.array(*chosen)
        )

    def _routing_bytes(self, shape: StepShape) -> int:
        """Of the packed routing, and of the routing that stays on the device."""
        config, whole = self.config, self.model.sends_input
        packed = 2 * config.num_experts_per_tok + config.num_experts * (1 + shape.lookahead)
        return 4 * shape.rows * (packed + 2 * config.num_experts_per_tok + (config.hidden_size if whole else 0))

    def _layer(self, layer: Any, shape: StepShape) -> Iterator[StepProgram]:
        model, rows, width = self.model, shape.rows, self.config.hidden_size
        parameters = jax.tree.map(self.described, layer.params)
        sizes = layer.cache_shapes(shape.batch, shape.capacity)
        cache = {name: self.array(*size, dtype=model.cache_dtype) for name, size in sizes.items()}
        places = self.array(shape.batch, shape.tokens, dtype=jnp.int32)
        line, stream = 4 * rows * width, self._stream(shape)
        if layer.moe_layer is None:
            arguments = (parameters, *stream, cache, places, shape.capacity)
            yield StepProgram("dense layer", layer.programs.dense, arguments, beside=3 * line)
            return
        ahead = jax.tree.map(self.described, model.lookahead_routers(layer.moe_layer, shape.lookahead))
        arguments = (parameters, ahead, *stream, cache, places, shape.capacity, model.sends_input, None)
        yield StepProgram("front", layer.programs.front, arguments, beside=3 * line)
        beside = self._routing_bytes(shape) + 4 * line
        if self.executor == "callback":
            yield self._callback(layer, parameters, rows, beside)
            return
        has_shared = layer.programs.shared is not None
        if model.sends_input and rows <= programs.DENSE_ROWS:
            table, number = self._table(), self.array(dtype=jnp.int32)
            others = (number,) * self.config.num_experts_per_tok
            block = stacked.block_program(layer.graphdef, has_shared, self.kernel)
            arguments = (parameters, self._routed(rows), table, number, others, self._stack(), None)
            yield StepProgram("block", block, arguments, beside=beside)
        elif has_shared:
            yield StepProgram("shared experts", layer.programs.shared, (parameters, stream[1], None), beside=beside)

    def _experts(self, shape: StepShape, beside: int) -> Iterator[StepProgram]:
        """Of those that cross the link, and of residents where they are programs of their own."""
        rows, part, options = shape.rows, self.array(shape.rows, self.config.hidden_size), {"kernel": self.kernel}
        few, number = rows <= programs.DENSE_ROWS, self.array(dtype=jnp.int32)
        chosen = jax.ShapeDtypeStruct((rows,), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.float32)
        if self.executor == "callback":
            pass
        elif self.model.sends_input:
            options |= {"pace": None}
            if few:
                arguments = (part, self._routed(rows), number, number, self._stack())
                yield StepProgram("an expert", stacked.add_chosen, arguments, options, beside)
            else:
                arguments = (part, part, *chosen, number, self._stack())
                yield StepProgram("an expert", stacked.add_gathered, arguments, options, beside)
            arguments = (self._stack(), self._table(), number, self.slot, *(number,) * 4)
            yield StepProgram("write", stacked.write_stacked, arguments, beside=beside)
            return
        elif few or programs.runs(self.slot, self.kernel) == "native":
            mix = jax.ShapeDtypeStruct((programs.SLOTS_PER_CALL, rows), jnp.float32)
            arguments = (part, part, mix, *[self.slot] * programs.SLOTS_PER_CALL)
            yield StepProgram("experts", programs.dense_rows, arguments, options, beside)
        else:
            yield StepProgram("an expert", programs.gathered_rows, (part, part, *chosen, self.slot), options, beside)
        yield StepProgram("write", write_slot, (self.slot, self.slot), beside=beside)

    def _callback(self, layer: Any, parameters: Any, rows: int, beside: int) -> StepProgram:
        """With as many slots as a layer has experts, and a part for the host."""
        config = self.config
        count = bucket(min(config.num_experts, rows * config.num_experts_per_tok))
        number = jax.ShapeDtypeStruct((), jnp.int32)
        chosen = [jax.ShapeDtypeStruct((rows, config.num_experts_per_tok), kind) for kind in (jnp.int32, jnp.float32)]
        mix, part = jax.ShapeDtypeStruct((count, rows), jnp.float32), self.array(rows, config.hidden_size)
        arguments = (parameters, part, part, mix, (self.slot,) * count, (number, number, *chosen))
        return StepProgram("block", moe_program(layer.graphdef, self.kernel), arguments, beside=beside)

    def _stack(self) -> DeviceExpert:
        return jax.tree.map(lambda part: self.array(POOL, *part.shape, dtype=part.dtype), self.slot)

    def _table(self) -> Any:
        return self.array(len(self.model.moe_layers), self.config.num_experts, dtype=jnp.int32)


def program_bytes(compiled: Any, beside: int = 0) -> int:
    """Temporaries and results of a compiled program, and what lives beside it."""
    memory = compiled.memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes + beside


def workspace_bytes(steps: Iterable[StepProgram]) -> int:
    """What the hungriest of these programs needs; they run one after another. Compiles them, several at once."""
    every = list(steps)
    with ThreadPoolExecutor(min(COMPILERS, os.cpu_count() or 1)) as pool:
        return max(pool.map(lambda step: program_bytes(step.compile(), step.beside), every), default=0)
