"""The device programs of one step of a published model, and arguments that are only described.

As on a GPU: dense weights and cache in bfloat16, none of the CPU's own kernels. A step is a decode step of one or
eight sequences, or a chunk of a prompt.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import topology
from published import PUBLISHED
from topology import struct

from hybrimoe_jax.engine import programs
from hybrimoe_jax.formats.packing import ExpertLayout, Format, PackedExpert
from hybrimoe_jax.models.config import ModelConfig
from hybrimoe_jax.models.parameters import split
from hybrimoe_jax.models.registry import build_model, parse_config
from hybrimoe_jax.models.target import traced_for

CONTEXT = 4096
"""Places of the cache, and how many of them attention reads."""
LOOKAHEAD = 3
"""Coming layers whose routers a decode step applies too."""
SLOTS = 4
DTYPE = "bfloat16"
FORMATS = ("int4-g64", "bf16")


@dataclasses.dataclass(frozen=True)
class Shape:
    """A step's tokens: `batch` sequences, `tokens` of each."""

    batch: int
    tokens: int

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    def __str__(self) -> str:
        return f"decode {self.batch}" if self.tokens == 1 else f"prefill {self.tokens}"


STEPS = (Shape(1, 1), Shape(8, 1), Shape(1, 512))


@dataclasses.dataclass(frozen=True)
class Program:
    """`part` is what it does in a step. `arguments` are positional, `options` named.

    `read`: numbers of values of each part of the cache that attention reads at `context` places: what must not be
    copied.
    """

    model: str
    step: Shape
    part: str
    jitted: Any
    arguments: tuple
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    read: tuple[int, ...] = ()
    context: int = CONTEXT

    def compile(self):
        """-> `jax.stages.Compiled`, for the H100."""
        with traced_for("gpu"):
            return topology.compile_for_gpu(self.jitted, *self.arguments, **self.options)


def step_programs(model: str, step: Shape, context: int = CONTEXT) -> Iterator[Program]:
    """Every kind of device program that such a step of the model calls, each once."""
    config = parse_config(PUBLISHED[model])
    yield _embed(model, config, step)
    kinds = set()
    for layer in build_model(config).model.layers:
        if layer.is_moe not in kinds:
            kinds.add(layer.is_moe)
            yield from _layer(model, config, layer, step, context)
    yield from _experts(model, config, step)
    yield _logits(model, config, step)


def _embed(model: str, config: ModelConfig, step: Shape) -> Program:
    table = struct((config.vocab_size, config.hidden_size), DTYPE)
    return Program(model, step, "embed", programs.embed, (table, struct((step.batch, step.tokens), "int32")))


def _layer(model: str, config: ModelConfig, layer, step: Shape, context: int) -> Iterator[Program]:
    graphdef, abstract = split(layer)
    parameters = {name: struct(array.shape, DTYPE) for name, array in abstract.items()}
    made = programs.layer_programs(graphdef, layer.is_moe and any("shared" in name for name in parameters))
    width = config.hidden_size
    part = struct((step.rows, width))
    stream = (struct((step.batch, step.tokens, width)), part, part)
    shapes = layer.self_attn.cache_shapes(step.batch, CONTEXT)
    cache = {name: struct(shape, DTYPE) for name, shape in shapes.items()}
    read = tuple(math.prod(context if n == max(shape) else n for n in shape) for shape in shapes.values())
    places = struct((step.batch, step.tokens), "int32")
    if not layer.is_moe:
        arguments = (parameters, *stream, cache, places, context)
        yield Program(model, step, "dense layer", made.dense, arguments, read=read, context=context)
        return
    router = (parameters["post_attention_layernorm.weight"], parameters[f"{layer.mlp_name}.gate.weight"])
    ahead = (router,) * (LOOKAHEAD if step.tokens == 1 else 0)
    arguments = (parameters, ahead, *stream, cache, places, context)
    yield Program(model, step, "front", made.front, arguments, read=read, context=context)
    if made.shared is not None:
        yield Program(model, step, "shared experts", made.shared, (parameters, part))


def _experts(model: str, config: ModelConfig, step: Shape) -> Iterator[Program]:
    part = struct((step.rows, config.hidden_size))
    few = step.rows <= programs.DENSE_ROWS
    for name in FORMATS:
        slot, options = expert(config, name), {}
        if few:
            options = {"kernel": "cuda"} if isinstance(slot, PackedExpert) else {}
            jitted, arguments = programs.dense_rows, (struct((SLOTS, step.rows)), *[slot] * SLOTS)
            label = f"{SLOTS} experts {name}"
        else:
            load = programs.bucket(2 * step.rows * config.num_experts_per_tok // config.num_experts, 8)
            load = min(load, step.rows)
            jitted, arguments = programs.gathered_rows, (struct((load,), "int32"), struct((load,)), slot)
            label = f"an expert {name}"
        yield Program(model, step, label, jitted, (part, part, *arguments), options)


def expert(config: ModelConfig, name: str):
    """A slot of this format."""
    width, hidden = config.hidden_size, config.moe_width
    if name == "bf16":
        return struct((2 * hidden, width), DTYPE), struct((width, hidden), DTYPE)
    layout = ExpertLayout(Format.parse(name), width, hidden)
    return PackedExpert(struct((layout.nbytes,), "uint8"), layout)


def _logits(model: str, config: ModelConfig, step: Shape) -> Program:
    width, part = config.hidden_size, struct((step.rows, config.hidden_size))
    weights = (struct((width,), DTYPE), struct((config.vocab_size, width), DTYPE))
    stream = (struct((step.batch, step.tokens, width)), part, part)
    arguments = (*weights, *stream, struct((step.batch,), "int32"))
    return Program(model, step, "last logits", programs.last_logits, arguments, {"eps": config.rms_norm_eps})
