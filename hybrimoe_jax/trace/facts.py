"""What a replay must know of a model, and where imported traces take it from: the model's own config.json.

`MODELS` are the models of the public traces that `importers` reads, with the figures of their config.json files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from hybrimoe_jax.errors import UserError, is_name, shown
from hybrimoe_jax.formats.sizes import FORMATS, expert_bytes

MOST = {"layers": 2**12, "experts": 2**14, "top_k": 2**14}
MOST_EXPERTS = 2**20
"""Of all layers together. No model comes near any of these, and tables of that size still fit memory."""


@dataclasses.dataclass(frozen=True)
class TraceFacts:
    """What a replay must know of the model.

    `layers` counts MoE layers; `expert_bytes` maps a weight format to bytes.
    """

    model_type: str
    layers: int
    experts: int
    top_k: int
    expert_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for name in ("layers", "experts", "top_k"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"trace facts: {name} is {shown(value)}; a positive integer is needed")
            if value > MOST[name]:
                raise UserError(f"trace facts: {name} is above {MOST[name]}")
        if self.layers * self.experts > MOST_EXPERTS:
            raise UserError(
                f"trace facts: {self.layers} layers of {self.experts} experts are above {MOST_EXPERTS} experts together"
            )
        if self.top_k > self.experts:
            raise UserError(f"trace facts: top_k is {self.top_k} of only {self.experts} experts")
        sizes = self.expert_bytes
        if not isinstance(sizes, Mapping) or not all(
            is_name(f) and isinstance(b, int) and 0 < b < 2**63 for f, b in sizes.items()
        ):
            raise UserError(f"trace facts: expert_bytes is {shown(sizes)}; a mapping of format to bytes is needed")
        if not is_name(self.model_type):
            raise UserError(f"trace facts: model_type is {shown(self.model_type)}; a name is needed")


def facts_of(model_type: str, layers: int, experts: int, top_k: int, hidden: int, moe_width: int) -> TraceFacts:
    """Facts with the bytes of an expert of these sizes in every format of `formats.sizes.FORMATS`."""
    return TraceFacts(
        model_type, layers, experts, top_k, {fmt: expert_bytes(hidden, moe_width, fmt) for fmt in FORMATS}
    )


MODELS: dict[str, TraceFacts] = {
    "DeepSeek-V2-Lite": facts_of("deepseek_v2", 26, 64, 6, hidden=2048, moe_width=1408),
    "gpt-oss-20b": facts_of("gpt_oss", 24, 32, 4, hidden=2880, moe_width=2880),
    "gpt-oss-120b": facts_of("gpt_oss", 36, 128, 4, hidden=2880, moe_width=2880),
    "Qwen3-30B-A3B": facts_of("qwen3_moe", 48, 128, 8, hidden=2048, moe_width=768),
}
