"""What must fit on the device, in bytes, and how many expert slots remain of a budget. Imports no jax.

Device memory holds the dense weights, the KV (or latent) cache, the staging slots with their transfers, the
workspace of one step (see `workspace`), and the experts' slots; a budget is met when their sum is at most the budget.
"""

from __future__ import annotations

import dataclasses

from hybrimoe_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Device bytes by purpose."""

    dense: int
    kv: int
    staging: int
    workspace: int
    slots: int = 0

    @property
    def total(self) -> int:
        return self.dense + self.kv + self.staging + self.workspace + self.slots

    def __str__(self) -> str:
        return ", ".join(
            f"{f.name} {readable(size)}"
            for f in dataclasses.fields(self)
            if f.name != "slots" and (size := getattr(self, f.name))
        )


def readable(size: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size} B"


def slots_within(budget: int, fixed: Footprint, expert_bytes: int, num_experts: int) -> int:
    """Slots in all, at most `num_experts` (of all layers).

    UserError with the breakdown where not even the fixed part fits. A fixed part without a workspace is not yet all.
    """
    room = budget - fixed.total
    if room < 0:
        needed = f"{'' if fixed.workspace else 'at least '}{readable(fixed.total)}"
        raise UserError(
            f"vram_budget {readable(budget)} is too small: {needed} are needed before any expert is "
            f"cached ({fixed}); raise it, or lower max_context, max_batch or prefill_chunk"
        )
    return min(num_experts, room // expert_bytes)
