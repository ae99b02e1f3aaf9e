"""What an optimised HLO text says of a program: the kernels it launches, the buffers it writes, its products.

Kernels are instructions of the entry computation, and of the bodies of loops and branches, that launch something. What
lies inside a fusion is one kernel.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

LAUNCHING = frozenset(
    "fusion custom-call copy copy-start sort dynamic-update-slice dynamic-slice reduce scatter gather memset transpose "
    "dot convert slice concatenate pad broadcast iota reduce-window select-and-scatter".split()
)
WIDTHS = {"f64": 8, "f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8, "u16": 2, "s16": 2}
FLOATS = ("f64", "f32", "bf16", "f16")
_LINE = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (\([^=]*?\)|[\w\[\],{}:()]+) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `type` as HLO writes it, `rest` what follows the opening bracket of its operands."""

    name: str
    type: str
    opcode: str
    rest: str

    @functools.cached_property
    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Element type and shape of each result."""
        return [(kind, tuple(map(int, filter(None, dims.split(","))))) for kind, dims in _SHAPE.findall(self.type)]

    @property
    def arrays(self) -> list[tuple[str, int]]:
        """Element type and number of elements of each result."""
        return [(kind, math.prod(shape)) for kind, shape in self.shapes]

    @property
    def target(self) -> str:
        """Of a custom call."""
        found = re.search(r'custom_call_target="([^"]+)"', self.rest)
        return found[1] if found else ""

    def called(self) -> list[str]:
        """Computations that it runs as they stand: bodies of loops, branches, command buffers."""
        if self.opcode in ("while", "conditional", "call"):
            return re.findall(r"(?:condition|body|to_apply|computation)=%([\w.\-]+)", self.rest) + [
                name
                for group in re.findall(r"branch_computations=\{([^}]*)\}", self.rest)
                for name in re.findall(r"%([\w.\-]+)", group)
            ]
        return []


class Module:
    """A compiled program's computations by name, each a list of instructions."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        for part in re.split(r"\n(?=(?:ENTRY )?%[\w.\-]+ \()", text):
            head = re.match(r"(ENTRY )?%([\w.\-]+) \(", part)
            if head is None:
                continue
            if head[1]:
                self.entry = head[2]
            found = (_LINE.match(line) for line in part.splitlines()[1:])
            self.computations[head[2]] = [Instruction(*m.groups()) for m in found if m]

    def scheduled(self, name: str | None = None) -> Iterator[Instruction]:
        """Instructions that are steps of the program: of the entry and of what it calls, not of fusions."""
        for instruction in self.computations[name or self.entry]:
            yield instruction
            for inner in instruction.called():
                yield from self.scheduled(inner)

    def inside(self, instruction: Instruction) -> Iterator[Instruction]:
        """Instructions of the fusion that it calls, and itself."""
        yield instruction
        if found := re.search(r"calls=%([\w.\-]+)", instruction.rest):
            for inner in self.computations[found[1]]:
                yield from self.inside(inner)

    @functools.cached_property
    def kernels(self) -> list[Instruction]:
        return [i for i in self.scheduled() if i.opcode in LAUNCHING]

    def written(self) -> list[Instruction]:
        """Kernels whose results are arrays of their own: all but updates in place."""
        return [i for i in self.kernels if not self.updates_in_place(i)]

    def float_bytes(self) -> int:
        """Of the largest float array that a kernel writes, but for updates in place."""
        return max((n * WIDTHS[kind] for i in self.written() for kind, n in i.arrays if kind in FLOATS), default=0)

    def updates_in_place(self, kernel: Instruction) -> bool:
        """Whether all that it gives is an array that it was given, with a part of it written."""
        updates = [i for i in self.inside(kernel) if i.opcode in ("dynamic-update-slice", "scatter")]
        return any(i.arrays == kernel.arrays for i in updates)
