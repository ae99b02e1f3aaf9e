"""What decisions ask of a machine: seconds for everything a layer can do.

`machine.costs.CostModel`, fitted to a warm-up, and `machine.profile.MachineCosts`, of a model on a named machine, are
such; whoever tries an idea may pass any object that has these methods.
"""

from __future__ import annotations

from typing import Protocol


class Costs(Protocol):
    """Seconds, by loads and tokens. Read only.

    Attributes:
      shares_cores: whether the device works on the CPU's cores; then the costs are `SharedCoreCosts`.
      fetch_host: how long issuing a demand fetch keeps the CPU lane from computing.
      look: what predicting the coming layers takes in each layer.
      expert_bytes: what crosses the link with an expert.
    """

    @property
    def shares_cores(self) -> bool: ...

    @property
    def fetch_host(self) -> float: ...

    @property
    def look(self) -> float: ...

    @property
    def expert_bytes(self) -> int: ...

    def cpu(self, load: int, first: bool = False) -> float:
        """One expert on the CPU; `first` where nothing ran on it yet in this step."""
        ...

    def device(self, load: int) -> float:
        """One resident expert on the device."""
        ...

    def shared(self, tokens: int) -> float:
        """What opens the device lane of a MoE block: calling the device, and the layer's shared experts."""
        ...

    def transfer(self, cpu_busy: bool = False) -> float:
        """One expert over the link; `cpu_busy` where the CPU computes at the same time."""
        ...

    def layer(self, tokens: int) -> float:
        """Everything between two MoE blocks."""
        ...


class SharedCoreCosts(Costs, Protocol):
    """Of a machine whose device has no cores of its own.

    Attributes:
      device_block: that part of `shared` which is left out where the device gets no expert.
      alone_first: what the first expert of a run takes more on the CPU with all cores.
      handover: per layer, what leaving the device's program and coming back takes, see `machine.costs.CostModel`.
    """

    @property
    def device_block(self) -> float: ...

    @property
    def alone_first(self) -> float: ...

    @property
    def handover(self) -> float: ...

    def alone(self, load: int) -> float:
        """One expert on the CPU with the device's cores too."""
        ...
