"""What a model asks of a machine: weights, attention and cache of each layer, from its configuration.

Only sizes are needed, so a shape is a handful of integers. `SHAPES` holds those of models that public traces or the
paper speak of, from their Hugging Face `config.json`; `shape_of` makes one from any configuration with the same field
names.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

from hybrimoe_jax.errors import UserError, shown, shown_name
from hybrimoe_jax.files import is_object
from hybrimoe_jax.formats.sizes import expert_bytes


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """Sizes of one model; "weights" are numbers of parameters, not bytes. UserError where one is no size.

    Attributes:
      name: what it is called in results.
      layers, experts, top_k: MoE layers, routed experts in each, experts per token.
      hidden, moe_width: width of the residual stream and of one routed expert.
      shared: weights of a layer's shared experts together.
      attention: weights of a MoE layer's attention and router.
      kv: values that one token adds to a layer's cache.
      scores: multiply-adds of attention per token and place of context.
      leading: weights of the dense layers before the MoE layers.
      head: weights of the logits.
    """

    name: str
    layers: int
    experts: int
    top_k: int
    hidden: int
    moe_width: int
    shared: int = 0
    attention: int = 0
    kv: int = 0
    scores: int = 0
    leading: int = 0
    head: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self)[1:]:
            value, least = getattr(self, field.name), 1 if field.default is dataclasses.MISSING else 0
            if type(value) is not int or not least <= value < 2**62:
                raise UserError(
                    f"model shape {shown_name(self.name)}: {field.name} must be a whole number of at least {least}, "
                    f"not {shown(value)}"
                )

    @property
    def expert(self) -> int:
        """Weights of one routed expert."""
        return 3 * self.hidden * self.moe_width

    def expert_bytes(self, fmt: str) -> int:
        """Bytes of one routed expert in weight format `fmt`."""
        return expert_bytes(self.hidden, self.moe_width, fmt)


def shape_of(config: dict[str, Any] | Any, name: str) -> ModelShape:
    """The shape of a configuration: a mapping, or an object with attributes, with Hugging Face's field names."""
    fields = SimpleNamespace(**config) if is_object(config) else config

    def get(*names: str, default: Any = None) -> Any:
        for field in names:
            value = getattr(fields, field, None)
            if value is not None:
                return value
        return default

    hidden, heads = get("hidden_size"), get("num_attention_heads")
    experts = get("num_experts", "num_local_experts", "n_routed_experts")
    moe_width = get("moe_width", "moe_intermediate_size", "intermediate_size")
    dense_layers = get("first_k_dense_replace", default=0)
    if get("moe_layers") is not None:
        dense_layers = get("num_hidden_layers") - len(get("moe_layers"))
    layers = get("num_hidden_layers") - dense_layers
    if get("kv_lora_rank"):
        rank, rope, nope, value = (
            get(n) for n in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
        )
        query = heads * (nope + rope)
        queries = hidden * get("q_lora_rank") + get("q_lora_rank") * query if get("q_lora_rank") else hidden * query
        attention = queries + hidden * (rank + rope) + rank * heads * (nope + value) + heads * value * hidden
        kv, scores = rank + rope, heads * (2 * rank + rope)
    else:
        groups = get("num_key_value_heads", default=heads)
        dim = get("head_dim", default=hidden // heads)
        attention = 2 * hidden * heads * dim + 2 * hidden * groups * dim
        kv, scores = 2 * groups * dim, 2 * heads * dim
    shared = get("shared_expert_intermediate_size", default=0)
    shared = shared or (get("n_shared_experts", default=0) or 0) * moe_width
    leading = dense_layers * (attention + 3 * hidden * get("intermediate_size", default=0))
    return ModelShape(
        name,
        layers,
        experts,
        get("num_experts_per_tok"),
        hidden,
        moe_width,
        shared=3 * hidden * shared,
        attention=attention + hidden * experts,
        kv=kv,
        scores=scores,
        leading=leading,
        head=hidden * get("vocab_size", default=0),
    )


_GQA = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "num_experts",
        "num_experts_per_tok", "moe_intermediate_size", "vocab_size")  # fmt: skip
_CONFIGS: dict[str, dict[str, int]] = {
    "mixtral-8x7b": dict(zip(_GQA, (4096, 32, 32, 8, 128, 8, 2, 14336, 32000))),
    "qwen2-57b-a14b": dict(zip(_GQA, (3584, 28, 28, 4, 128, 64, 8, 2560, 151936)))
    | {"shared_expert_intermediate_size": 20480},
    "qwen3-30b-a3b": dict(zip(_GQA, (2048, 48, 32, 4, 128, 128, 8, 768, 151936))),
    "gpt-oss-20b": dict(zip(_GQA, (2880, 24, 64, 8, 64, 32, 4, 2880, 201088))),
    "gpt-oss-120b": dict(zip(_GQA, (2880, 36, 64, 8, 64, 128, 4, 2880, 201088))),
    "olmoe-1b-7b": dict(zip(_GQA, (2048, 16, 16, 16, 128, 64, 8, 1024, 50304))),
    "deepseek-v2-lite": dict(
        hidden_size=2048, num_hidden_layers=27, first_k_dense_replace=1, num_attention_heads=16, n_routed_experts=64,
        num_experts_per_tok=6, n_shared_experts=2, moe_intermediate_size=1408, intermediate_size=10944,
        kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, vocab_size=102400,
    ),
    "bundled": dict(zip(_GQA, (192, 6, 4, 2, 48, 32, 4, 64, 2048))) | {"shared_expert_intermediate_size": 192},
}  # fmt: skip
"""The fields that count of each model's public config.json; the bundled model's lies in
`hybrimoe_jax/assets/bundled`."""

COST_FORMAT = "int4-g64"
"""Of the experts of a shape that is named without one."""

SHAPES: dict[str, ModelShape] = {name: shape_of(config, name) for name, config in _CONFIGS.items()}
"""The shapes by name."""


def get_shape(name: str) -> ModelShape:
    """The shape called `name`; UserError listing the names."""
    if name not in SHAPES:
        raise UserError(f"model shape {shown(name)} is unknown (known: {', '.join(SHAPES)})")
    return SHAPES[name]


def parse_cost_shape(text: str) -> tuple[ModelShape, str]:
    """`NAME[:FORMAT]` -> the shape, and its experts' weight format; UserError for an unknown one."""
    name, colon, fmt = text.partition(":")
    shape, fmt = get_shape(name), fmt if colon else COST_FORMAT
    shape.expert_bytes(fmt)
    return shape, fmt


def find_shape(layers: int, experts: int, top_k: int) -> ModelShape | None:
    """The known shape with this routing; None where there is none.

    A smaller top-k than the model's own still fits it.
    """
    fits = [s for s in SHAPES.values() if (s.layers, s.experts) == (layers, experts) and top_k <= s.top_k]
    return dataclasses.replace(fits[0], top_k=top_k) if fits else None
