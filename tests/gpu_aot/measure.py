"""What the compiler says of a step's programs, one JSON file a step, which the table of docs/gpu.md is made of."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from pathlib import Path

from hlo import FLOATS, Instruction, Module
from step_programs import Program

RESULTS = Path(__file__).parents[2] / "build/gpu-aot/steps"


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of one program.

    Attributes:
      kernels: launches of one call. temporary, arguments, outputs: bytes, without what is donated.
      largest: bytes of the largest float array that a kernel writes. copies: kernels that write what attention reads
        of the cache once more.
      products: how many products of each arithmetic there are, see `arithmetic`.
    """

    part: str
    kernels: int
    temporary: int
    arguments: int
    outputs: int
    largest: int
    copies: int
    products: dict[str, int]


def measure(program: Program) -> Measured:
    compiled = program.compile()
    module, memory = Module(compiled.as_text()), compiled.memory_analysis()
    return Measured(
        program.part,
        len(module.kernels),
        memory.temp_size_in_bytes,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        module.float_bytes(),
        sum(copies(kernel, program) for kernel in module.written()),
        dict(Counter(filter(None, (arithmetic(i, module) for i in module.kernels)))),
    )


def copies(kernel: Instruction, program: Program) -> bool:
    """Whether a kernel writes an array of the size of what attention reads, with its places."""
    return any(
        kind in FLOATS and program.context in shape and math.prod(shape) in program.read
        for kind, shape in kernel.shapes
    )


def arithmetic(kernel: Instruction, module: Module) -> str | None:
    """How a kernel multiplies matrices.

    "bf16x6" and the like name a split on tensor cores, "bf16" plain bfloat16 there, "f32" float32 without tensor cores,
    "tf32" float32 rounded to it. None: no matrix product, or one with a vector, which is a sum.
    """
    for inner in module.inside(kernel):
        if inner.opcode == "dot":
            algorithm = re.search(r"algorithm=dot_(\w+?)_\w+_f32(_x\d)?", inner.rest)
            if algorithm:
                return algorithm[1] + (algorithm[2] or "").replace("_", "")
            operands = {kind for kind, _ in _operand_types(inner, module, kernel)}
            if operands <= {"bf16", "f16"}:
                return "bf16"
            return "f32" if "operand_precision={highest,highest}" in inner.rest else "tf32"
        if "gemm" in inner.target or "matmul" in inner.target:
            return "library " + ("f32" if '"precision_config":{"operand_precision":["HIGHEST"' in inner.rest else "")
    return None


def _operand_types(dot: Instruction, module: Module, kernel: Instruction) -> list[tuple[str, int]]:
    names = re.findall(r"%([\w.\-]+)", dot.rest.split(")")[0])
    types = {inner.name: inner.arrays for inner in module.inside(kernel)}
    return [types[name][0] for name in names if types.get(name)]


def file_of(model: str, step) -> Path:
    return RESULTS / f"{model} {step}.json".replace(" ", "-")


def save(model: str, step, measured: list[Measured]) -> None:
    path = file_of(model, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([dataclasses.asdict(m) for m in measured], indent=1))


def load(model: str, step) -> list[Measured]:
    return [Measured(**entry) for entry in json.loads(file_of(model, step).read_text())]
