"""From a `config.json` to a model: the table of supported families and the names their checkpoints use."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx
from hybrimoe_jax.models import qwen2_moe
from hybrimoe_jax.models.config import ModelConfig
from hybrimoe_jax.models.decoder import CausalLM

from hybrimoe_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Family:
    """`block` is the MoE block's name in the checkpoint; `gate`, `up`, `down` an expert's matrices below `experts.{e}.`."""

    config: type[ModelConfig]
    build: Callable[[ModelConfig, nnx.Rngs], CausalLM]
    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


FAMILIES: dict[str, Family] = {
    "qwen2_moe": Family(qwen2_moe.Qwen2MoeConfig, qwen2_moe.build),
}


def family_of(model_type: str) -> Family:
    if model_type not in FAMILIES:
        supported = ", ".join(sorted(FAMILIES))
        raise UserError(f"config.json: model_type {model_type!r} is not supported (supported: {supported})")
    return FAMILIES[model_type]


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Parses a `config.json` mapping into its family's dataclass; UserError where the family or a feature is unsupported."""
    if "model_type" not in raw:
        raise UserError("config.json: no model_type key; is this a Hugging Face model folder?")
    return family_of(raw["model_type"]).config.from_dict(raw)


def build_model(config: ModelConfig, rngs: nnx.Rngs | None = None) -> CausalLM:
    """The dense part of the model (everything but the routed experts), randomly initialised; float32.

    Without `rngs` it is abstract: leaves are ShapeDtypeStructs and nothing is allocated.
    """
    build = family_of(config.model_type).build
    if rngs is not None:
        return build(config, rngs)
    return nnx.eval_shape(lambda: build(config, nnx.Rngs(0)))
