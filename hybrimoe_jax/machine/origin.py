"""Where a measured profile comes from: the machine, the model and the software. Says what it may be used for.

Its figures are those of one model's layers and experts; a profile of others is refused everywhere. Planning for this
machine with another one's figures is refused too. Computing what another machine would take (the virtual clock, the
simulator, a paced device) is what such a file is for.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from hybrimoe_jax.errors import UserError, is_name, shown
from hybrimoe_jax.files import is_object
from hybrimoe_jax.machine.costs import ORIGIN, read_profile
from hybrimoe_jax.machine.identity import cores, processor, software
from hybrimoe_jax.machine.shapes import ModelShape

NOT_OF_A_LAYER = ("name", "layers", "leading", "head")
"""Of a shape: what its layers' figures do not depend on."""


class Machine(NamedTuple):
    """What times depend on: the processor, its cores, and the device, "cpu" where that is the processor too."""

    processor: str
    cores: int
    device: str

    def __str__(self) -> str:
        device = "" if self.device == "cpu" else f", device {self.device}"
        return f"{self.processor}, {self.cores} cores{device}"


def this_machine(device: str) -> Machine:
    """Args: device: "cpu", or what a device of its own is called."""
    return Machine(processor(), cores(), device)


@dataclasses.dataclass(frozen=True)
class Origin:
    """What was measured: `format` is the experts'; `software`: versions, which nothing is refused for."""

    machine: Machine
    model: ModelShape
    format: str
    software: tuple[str, ...] = ()

    @classmethod
    def here(cls, device: str, model: ModelShape, fmt: str) -> Origin:
        """Of what is measured now on this machine."""
        return cls(this_machine(device), model, fmt, tuple(software()))

    def describe(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "machine": self.machine._asdict(),
            "model": dataclasses.asdict(self.model),
            "format": self.format,
            "software": list(self.software),
        }

    @classmethod
    def read(cls, path: str | Path) -> Origin | None:
        """Of a profile's file; None where it says nothing of it. UserError where that is damaged."""
        raw = read_profile(path).get(ORIGIN)
        if raw is None:
            return None
        try:
            if not is_object(raw) or not is_object(raw["machine"]) or not is_object(raw["model"]):
                raise TypeError("not an object")
            machine, model = Machine(**raw["machine"]), ModelShape(**raw["model"])
            names = machine.processor, machine.device, model.name, raw["format"]
            if odd := [name for name in names if not is_name(name)]:
                raise TypeError(f"{shown(odd[0])} is no name")
            return cls(machine, model, raw["format"], tuple(map(str, raw.get("software", ()))))
        except (KeyError, TypeError, UserError) as error:
            raise UserError(f"{path}: its record of where it was measured is damaged ({error})") from None

    def check_model(self, name: str | Path, model: ModelShape, fmt: str) -> None:
        """UserError, which begins with the profile's `name`, where layers or experts are others than those measured."""
        own, other = (dataclasses.asdict(shape) for shape in (self.model, model))
        differs = [field for field in own if field not in NOT_OF_A_LAYER and own[field] != other[field]]
        if self.format != fmt:
            raise UserError(
                f"profile {name}: measured with {self.format} experts, those of {model.name} are {fmt}; measure it "
                "again with this model"
            )
        if differs:
            raise UserError(
                f"profile {name}: measured with another model ({self.model.name}: {differs[0]} {own[differs[0]]}, "
                f"{model.name} has {other[differs[0]]}); measure it again with this one"
            )

    def check_machine(self, name: str | Path, here: Machine) -> None:
        """UserError where figures of another machine are to be planned with on this one."""
        if self.machine != here:
            raise UserError(
                f"profile {name}: measured on another machine ({self.machine}; this one is {here}), so it is no guide "
                "here: measure it again, or compute that machine's times with --clock virtual"
            )
