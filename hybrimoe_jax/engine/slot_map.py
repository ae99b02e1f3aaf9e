"""Which experts lie in device memory now, layer by layer: `Engine.slots`. Imports no jax."""

from __future__ import annotations

import dataclasses
from typing import Any

from hybrimoe_jax import tables

CELL, GAP, LEFT = 12, 1, 62


@dataclasses.dataclass(frozen=True, repr=False)
class SlotMap:
    """A picture of the slots at one moment.

    Attributes:
      resident: of each MoE layer, the experts in its slots.
      slots: of each MoE layer, how many it has.
      num_experts: of a layer.
    """

    resident: tuple[frozenset[int], ...]
    slots: tuple[int, ...]
    num_experts: int

    def table(self) -> Any:
        """A row a MoE layer."""
        return tables.table(
            {"layer": layer, "slots": slots, "resident": sorted(experts)}
            for layer, (slots, experts) in enumerate(zip(self.slots, self.resident))
        )

    def __repr__(self) -> str:
        held = sum(map(len, self.resident))
        return (
            f"<SlotMap: {held} of {len(self.slots) * self.num_experts} experts resident in {sum(self.slots)} slots, "
            f"{len(self.slots)} MoE layers>"
        )

    def __str__(self) -> str:
        """A line a layer: # is resident."""
        lines = [
            f"layer {layer:<4}" + "".join("#" if expert in experts else "." for expert in range(self.num_experts))
            for layer, experts in enumerate(self.resident)
        ]
        return "\n".join([repr(self)[1:-1], *lines])

    def _repr_html_(self) -> str:
        step, height = CELL + GAP, (CELL + GAP) * len(self.resident)
        cells = []
        for layer, experts in enumerate(self.resident):
            cells.append(f'<text x="{LEFT - 6}" y="{step * layer + 10}" text-anchor="end">layer {layer}</text>')
            for expert in range(self.num_experts):
                fill, said = ("#222", "resident") if expert in experts else ("#e4e4e4", "on the host only")
                cells.append(
                    f'<rect x="{LEFT + step * expert}" y="{step * layer}" width="{CELL}" height="{CELL}" fill="{fill}">'
                    f"<title>expert {layer}.{expert}: {said}</title></rect>"
                )
        width = LEFT + step * self.num_experts
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'style="max-width: 100%; background: white" font-family="sans-serif" font-size="10">{"".join(cells)}</svg>'
            f"<p>{repr(self)[1:-1]}</p>"
        )
