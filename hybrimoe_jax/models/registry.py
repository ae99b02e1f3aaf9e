"""From a `config.json` to a model: the table of supported families and the names their checkpoints use."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from flax import nnx

from hybrimoe_jax.errors import UserError, reading, shown
from hybrimoe_jax.models.config import ModelConfig
from hybrimoe_jax.models.decoder import CausalLM
from hybrimoe_jax.models.families import deepseek_v2, mixtral, olmoe, qwen2_moe, qwen3_moe
from hybrimoe_jax.models.parameters import merge, split

FUSED_GATE_UP = "experts.gate_up_proj"
"""Below the block: all experts' gate and up rows as one tensor [E, 2F, D], gate rows first, as in transformers 5."""
FUSED_DOWN = "experts.down_proj"
"""Below the block: all experts' down matrices as one tensor [E, D, F]."""

Config = TypeVar("Config", bound=ModelConfig)


@dataclasses.dataclass(frozen=True)
class Family(Generic[Config]):
    """`block` is the MoE block's name in the checkpoint; `gate`, `up`, `down` are an expert's below `experts.{e}.`.

    These are the names the Hugging Face hub's checkpoints use and that `save_pretrained` writes. `block_aliases` are
    other names of the block found on disk: `canonical` turns a tensor name into the first spelling. Experts may also be
    on disk as the two fused tensors `FUSED_GATE_UP` and `FUSED_DOWN`, in every family.
    """

    config: type[Config]
    build: Callable[[Config, nnx.Rngs | None], CausalLM]
    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    block_aliases: tuple[str, ...] = ()

    def canonical(self, name: str) -> str:
        """A tensor's name with the block spelt as `block`.

        `model.layers.0.mlp.gate.weight` -> `...block_sparse_moe.gate.weight`.
        """
        parts = name.split(".")
        if len(parts) > 3 and parts[:2] == ["model", "layers"] and parts[3] in self.block_aliases:
            parts[3] = self.block
        return ".".join(parts)

    def expert_names(self, layer: int, expert: int) -> tuple[str, str, str]:
        """Canonical tensor names of one routed expert: gate [F, D], up [F, D], down [D, F]."""
        stem = f"model.layers.{layer}.{self.block}.experts.{expert}"
        return f"{stem}.{self.gate}.weight", f"{stem}.{self.up}.weight", f"{stem}.{self.down}.weight"

    def fused_names(self, layer: int) -> tuple[str, str]:
        """Canonical tensor names of a layer's fused experts: gate_up [E, 2F, D], down [E, D, F]."""
        stem = f"model.layers.{layer}.{self.block}"
        return f"{stem}.{FUSED_GATE_UP}", f"{stem}.{FUSED_DOWN}"


FAMILIES: dict[str, Family[Any]] = {
    "deepseek_v2": Family(deepseek_v2.DeepseekV2Config, deepseek_v2.build),
    "mixtral": Family(
        mixtral.MixtralConfig, mixtral.build, "block_sparse_moe", gate="w1", up="w3", down="w2", block_aliases=("mlp",)
    ),
    "olmoe": Family(olmoe.OlmoeConfig, olmoe.build),
    "qwen2_moe": Family(qwen2_moe.Qwen2MoeConfig, qwen2_moe.build),
    "qwen3_moe": Family(qwen3_moe.Qwen3MoeConfig, qwen3_moe.build),
}
"""The families by `model_type`."""


def family_of(model_type: str) -> Family:
    if model_type not in FAMILIES:
        supported = ", ".join(sorted(FAMILIES))
        raise UserError(f"config.json: model_type {shown(model_type)} is not supported (supported: {supported})")
    return FAMILIES[model_type]


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Parses a `config.json` mapping into its family's dataclass.

    UserError where the family or a feature is unsupported, or a value is of the wrong kind.
    """
    if not isinstance(raw, Mapping) or "model_type" not in raw:
        raise UserError("config.json: no model_type key; is this a Hugging Face model folder?")
    if not isinstance(raw["model_type"], str):
        raise UserError(f"config.json: model_type must be a text, not {shown(raw['model_type'])}")
    with reading("config.json"):
        return family_of(raw["model_type"]).config.from_dict(raw)


def build_model(config: ModelConfig, rngs: nnx.Rngs | None = None) -> CausalLM:
    """The dense part of the model (everything but the routed experts), randomly initialised; float32.

    Without `rngs` it is abstract: leaves are ShapeDtypeStructs and nothing is allocated.
    """
    if rngs is not None:
        return family_of(config.model_type).build(config, rngs)
    graphdef, leaves = _abstract(config)
    return merge(graphdef, leaves)


@functools.lru_cache(maxsize=16)
def _abstract(config: ModelConfig) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """The abstract model's two parts. Tracing it takes some 30 ms, merging the parts 2."""
    return split(nnx.eval_shape(lambda: family_of(config.model_type).build(config, None)))
