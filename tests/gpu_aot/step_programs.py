"""The device programs of one step of a published model, and arguments that are only described.

As on a GPU: dense weights and cache in bfloat16, stacked slots, the kernels for quantised experts, none of the CPU's
own. A step is a decode step of one or eight sequences, or a chunk of a prompt.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator
from typing import Any

import topology
from published import PUBLISHED
from topology import struct

from hybrimoe_jax.checkpoint.hugging_face import dense_shapes
from hybrimoe_jax.engine.device_model import DeviceModel
from hybrimoe_jax.engine.workspace import StepProgram, StepPrograms, StepShape
from hybrimoe_jax.formats.packing import ExpertLayout, Format, PackedExpert
from hybrimoe_jax.models.config import ModelConfig
from hybrimoe_jax.models.registry import parse_config
from hybrimoe_jax.models.target import traced_for

CONTEXT = 4096
"""Places of the cache, and how many of them attention reads."""
LOOKAHEAD = 3
"""Coming layers whose routers a decode step applies too."""
DTYPE = "bfloat16"
FORMATS = ("int4-g64", "bf16")
OF_EXPERTS = ("block", "an expert", "write")
"""Parts of a step that differ with the experts' format."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """A step's tokens: `batch` sequences, `tokens` of each."""

    batch: int
    tokens: int

    def __str__(self) -> str:
        return f"decode {self.batch}" if self.tokens == 1 else f"prefill {self.tokens}"


STEPS = (Shape(1, 1), Shape(8, 1), Shape(1, 512))


@dataclasses.dataclass(frozen=True)
class Program:
    """`part` is what it does in a step.

    `read`: numbers of values of each part of the cache that attention reads at `context` places: what must not be
    copied.
    """

    model: str
    step: Shape
    part: str
    of: StepProgram
    read: tuple[int, ...]
    context: int = CONTEXT

    def compile(self):
        """-> `jax.stages.Compiled`, for the H100."""
        with warnings.catch_warnings(), traced_for("gpu"):
            warnings.simplefilter("ignore")  # donated arguments without a place
            return self.of.compile("cuda")

    def at(self, context: int) -> Program:
        """A front of a shorter context, with the same cache."""
        arguments = tuple(context if argument == CONTEXT else argument for argument in self.of.arguments)
        read = tuple(values * context // CONTEXT for values in self.read)
        return dataclasses.replace(
            self, of=dataclasses.replace(self.of, arguments=arguments), read=read, context=context
        )


def step_programs(model: str, step: Shape) -> Iterator[Program]:
    """Every kind of device program that such a step of the model calls, each once."""
    config = parse_config(PUBLISHED[model])
    described = device_model(config)
    shapes = described.moe_layers[0].cache_shapes(step.batch, CONTEXT).values()
    read = tuple(math.prod(CONTEXT if size == CONTEXT + 1 else size for size in shape) for shape in shapes)
    shape = StepShape(step.batch, step.tokens, CONTEXT, LOOKAHEAD if step.tokens == 1 else 0)
    for name in FORMATS:
        slot = expert(config, name)
        kernel = "cuda" if isinstance(slot, PackedExpert) else "xla"
        for program in StepPrograms(described, slot, kernel=kernel).of(shape):
            if program.part in OF_EXPERTS:
                yield Program(model, step, f"{program.part} {name}", program, read)
            elif name == FORMATS[0]:
                yield Program(model, step, program.part, program, read)


def device_model(config: ModelConfig) -> DeviceModel:
    """On the H100, its weights only described."""
    dense: dict[str, Any] = {name: struct(shape, DTYPE) for name, shape in dense_shapes(config).items()}
    (device,) = topology.sharding().device_set
    model = DeviceModel(config, dense, device)
    model.sends_input = True  # as with stacked slots
    return model


def expert(config: ModelConfig, name: str) -> Any:
    """A slot of this format."""
    width, hidden = config.hidden_size, config.moe_width
    if name == "bf16":
        return struct((2 * hidden, width), DTYPE), struct((width, hidden), DTYPE)
    layout = ExpertLayout(Format.parse(name), width, hidden)
    return PackedExpert(struct((layout.nbytes,), "uint8"), layout)
