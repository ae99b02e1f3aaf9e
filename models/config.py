"""What every family's configuration shares: field names are the `config.json` keys, unknown keys are dropped.

A family's dataclass lists the keys it honours and refuses, by name, the values it cannot honour (`check`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from hybrimoe_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Keys common to the supported families. Derived values are properties; every family gives `num_experts`,
    `moe_width` (F, an expert's hidden width) and `is_moe(layer)`."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_experts_per_tok: int
    num_key_value_heads: int | None = None
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    initializer_range: float = 0.02

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Parses a `config.json` mapping; raises UserError naming a missing key or an unsupported value."""
        raw = dict(raw)
        rope = raw.pop("rope_parameters", None)
        if rope:  # transformers 5 writes theta and scaling into one dictionary
            rope = dict(rope)
            raw["rope_theta"] = rope.pop("rope_theta", raw.get("rope_theta", 10000.0))
            kind = rope.get("rope_type", "default")
            raw["rope_scaling"] = None if kind == "default" else rope
        known = {f.name for f in dataclasses.fields(cls)}
        values = {k: v for k, v in raw.items() if k in known}
        missing = [
            f.name
            for f in dataclasses.fields(cls)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in values
        ]
        if missing:
            raise UserError(f"config.json lacks {', '.join(missing)} (needed for model_type {raw.get('model_type')!r})")
        config = cls(**values)
        config.check(raw)
        return config

    def check(self, raw: Mapping[str, Any]) -> None:
        """Refuses what the family cannot honour; families extend it."""
        if self.hidden_act not in ("silu", "swish"):
            raise UserError(f"config.json: hidden_act {self.hidden_act!r} is not supported (silu is)")
        if raw.get("quantization_config"):
            method = raw["quantization_config"].get("quant_method", "unknown")
            raise UserError(
                f"config.json: quantization_config ({method}) is not supported; use an unquantised checkpoint"
            )

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.num_hidden_layers) if self.is_moe(i))

    @property
    def eos_ids(self) -> tuple[int, ...]:
        eos = self.eos_token_id
        return () if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)

    def is_moe(self, layer: int) -> bool:
        raise NotImplementedError

    @property
    def moe_width(self) -> int:
        raise NotImplementedError
