"""What must fit on the device, in bytes, and how many expert slots remain of a budget. Imports no jax.

Device memory holds the dense weights, the KV (or latent) cache, the staging slots with their transfers, the
activations of one step, and the experts' slots; a budget is met when their sum is at most the budget.
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


def workspace_bytes(
    config, batch: int, chunk: int, context: int, distances: int, logit_rows: int, quantised: bool = False
) -> int:
    """Bound on one step's activations in float32: the widest moment of attention or of the routed part, and the logits.

    Args:
      config: a ModelConfig.
      batch, chunk: rows and tokens a row in one step. context: cache capacity. distances: lookahead depth.
      logit_rows: tokens whose logits are alive at once.
      quantised: whether experts are, so that one exists in float32 while it is computed.
    """
    tokens = batch * chunk
    heads = config.num_attention_heads
    attention = tokens * (heads * context + 4 * heads * _head_width(config))
    stream = 8 * tokens * config.hidden_size
    routed = tokens * (2 * config.num_experts_per_tok + config.num_experts * (1 + distances) + 3 * config.moe_width)
    logits = 2 * max(batch, logit_rows) * config.vocab_size
    expert = 3 * config.hidden_size * config.moe_width if quantised else 0
    return 4 * (attention + stream + routed + logits + expert)


def _head_width(config) -> int:
    return max(
        config.hidden_size // config.num_attention_heads,
        getattr(config, "head_dim", None) or 0,
        getattr(config, "kv_lora_rank", 0) + getattr(config, "qk_rope_head_dim", 0),
    )
