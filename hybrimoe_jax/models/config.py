"""What every family's configuration shares: field names are the `config.json` keys, unknown keys are dropped.

A key that would change the answer is either a field (honoured) or in `config_keys.NEUTRAL` with the values that change
nothing (anything else is refused by name): a checkpoint never loads into a model that silently computes something else.
Defaults are those of Hugging Face transformers' class of the family, for a `config.json` that leaves a key out.
"""

from __future__ import annotations

import abc
import dataclasses
import json
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from flax.core import FrozenDict

from hybrimoe_jax.errors import UserError, shown, shown_name
from hybrimoe_jax.models.config_keys import NEUTRAL, unknown_keys
from hybrimoe_jax.models.rope import LARGEST, PARAMETERS, Rope, make_rope

KINDS = {"int": int, "float": (int, float), "bool": bool, "str": str}
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_experts_per_tok",
    "num_experts",
    "moe_width",
    "max_position_embeddings",
)


MOST = {"num_hidden_layers": 2**12, "max_position_embeddings": 2**40}
MOST |= dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 2**16)
MOST_OF_ANY = 2**24
"""Of a size: no model comes near it, and what is made for that many is made within a second."""
MOST_EXPERTS = 2**18
"""Of all layers together."""


class RoutedExperts:
    """`num_experts` for type checkers: a field where a family's `config.json` spells it so, else a property."""

    num_experts: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(RoutedExperts, abc.ABC):
    """What the engine asks of every model; hashable. A family adds its own keys, spelled as in `config.json`.

    Derived values are properties. Every family gives `num_experts`, `moe_width` and `is_moe(layer)`.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_experts_per_tok: int
    intermediate_size: int
    num_key_value_heads: int | None = None
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    eos_token_id: int | list[int] | None = None

    aliases: ClassVar[Mapping[str, str]] = {}
    """Other spellings of a key -> the field it fills."""
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """What this family has beside `NEUTRAL`, or instead."""

    def __post_init__(self):
        for field in dataclasses.fields(self):  # lists and dictionaries of JSON become hashable
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
            elif isinstance(value, Mapping):
                object.__setattr__(self, field.name, FrozenDict(value))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Parses a `config.json` mapping; raises UserError naming a missing key or an unsupported value."""
        raw = unify_rope(raw)
        for other, name in cls.aliases.items():
            if other in raw and raw.setdefault(name, raw[other]) != raw[other]:
                raise UserError(
                    f"config.json: {name} {shown(raw[name])} and {other} {shown(raw[other])} are one number and differ"
                )
        fields = dataclasses.fields(cls)
        nullable = {f.name for f in fields if "None" in str(f.type) or f.type == "bool"}
        if empty := [f.name for f in fields if f.name in raw and raw[f.name] is None and f.name not in nullable]:
            raise UserError(f"config.json: {', '.join(empty)} must not be null; give a value, or leave it out")
        false = {f.name for f in fields if f.type == "bool" and f.name in raw and raw[f.name] is None}
        values: dict[str, Any] = {f.name: raw[f.name] for f in fields if f.name in raw}
        values.update(dict.fromkeys(false, False))
        missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in values]
        if missing:
            raise UserError(
                f"config.json lacks {', '.join(missing)} (needed for model_type {shown(raw.get('model_type'))})"
            )
        for field in fields:
            if values.get(field.name) is not None:
                check_kind(field.name, str(field.type).removesuffix(" | None"), values[field.name])
        config = cls(**values)
        config.check(raw)
        return config

    @classmethod
    def passed_over(cls, raw: Mapping[str, Any]) -> list[str]:
        """The keys of a `config.json` that nothing here knows. No code of transformers reads them for this family."""
        return unknown_keys(raw, {*(f.name for f in dataclasses.fields(cls)), *cls.aliases, *cls.neutral})

    def check(self, raw: Mapping[str, Any]) -> None:
        """Refuses what the family cannot honour; families extend it. `raw` is the whole `config.json` mapping."""
        self._check_keys(raw)
        self._check_sizes(raw)
        self._check_layer_types(raw.get("layer_types") or ())
        if not all(type(token) is int and token >= 0 for token in self.eos_ids):
            raise UserError(
                f"config.json: eos_token_id must be an id or a list of ids, not {shown(raw['eos_token_id'])}"
            )
        if not self.moe_layers:
            raise UserError("config.json: no layer has routed experts; this engine runs mixture-of-experts models")
        _ = self.rope  # refuses an unknown scaling rule by name

    def _check_keys(self, raw: Mapping[str, Any]) -> None:
        if self.hidden_act not in ("silu", "swish"):
            raise UserError(f"config.json: hidden_act {shown(self.hidden_act)} is not supported (silu is)")
        if settings := raw.get("quantization_config"):
            method = settings.get("quant_method", "unknown") if isinstance(settings, Mapping) else settings
            raise UserError(
                f"config.json: quantization_config ({shown_name(method)}) is not supported; "
                "use an unquantised checkpoint"
            )
        honoured = {f.name for f in dataclasses.fields(self)}
        for key, neutral in (NEUTRAL | dict(self.neutral)).items():
            if key in raw and key not in honoured and raw[key] not in neutral:
                raise UserError(
                    f"config.json: {key} {shown(raw[key])} is not supported for model_type {shown(self.model_type)} "
                    f"({' or '.join(json.dumps(value) for value in neutral)} is)"
                )

    def _check_sizes(self, raw: Mapping[str, Any]) -> None:
        for field in dataclasses.fields(self):
            value, most = getattr(self, field.name), MOST.get(field.name, MOST_OF_ANY)
            if type(value) is int and value > most:
                raise UserError(f"config.json: {field.name} is {shown(value)}; no model has more than {most:,}")
        if self.num_hidden_layers * self.num_experts > MOST_EXPERTS:
            raise UserError(
                f"config.json: {self.num_hidden_layers} layers of {self.num_experts} experts are more than any model "
                f"has; at most {MOST_EXPERTS} experts are read"
            )
        for name in SIZES:
            if getattr(self, name) < 1:
                raise UserError(f"config.json: {name} must be at least 1, not {getattr(self, name)}")
        if self.rms_norm_eps < 0:
            raise UserError(f"config.json: rms_norm_eps must be at least 0, not {self.rms_norm_eps}")
        if self.num_experts_per_tok > self.num_experts:
            raise UserError(
                f"config.json: num_experts_per_tok {self.num_experts_per_tok} exceeds the {self.num_experts} experts"
            )
        if self.num_attention_heads % self.kv_heads:
            raise UserError(
                f"config.json: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.kv_heads}"
            )
        if getattr(self, "head_dim", None) == 0:
            raise UserError("config.json: head_dim must be at least 1, not 0")
        if "head_dim" in raw and raw["head_dim"] is None and self.hidden_size % self.num_attention_heads:
            raise UserError(
                "config.json: hidden_size is not a multiple of num_attention_heads and head_dim is not given"
            )

    def _check_layer_types(self, kinds: object) -> None:
        if not isinstance(kinds, (list, tuple)):
            raise UserError(f"config.json: layer_types must be a list, not {shown(kinds)}")
        if kinds and len(kinds) != self.num_hidden_layers:
            raise UserError(f"config.json: layer_types has {len(kinds)} entries for {self.num_hidden_layers} layers")
        for layer, kind in enumerate(kinds):
            if kind not in ("full_attention", "sliding_attention"):
                raise UserError(
                    f"config.json: layer_types[{layer}] {shown(kind)} is not supported (full or sliding attention is)"
                )
            if (kind == "sliding_attention") != (self.window(layer) is not None):
                window = "none" if self.window(layer) is None else self.window(layer)
                raise UserError(
                    f"config.json: layer_types[{layer}] is {shown(kind)}, but the layer's window is {window}"
                )

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_width(self) -> int:
        """d: `head_dim` where the family has that key and it is set, else D / H."""
        return getattr(self, "head_dim", None) or self.hidden_size // self.num_attention_heads

    @property
    def rope_width(self) -> int:
        """How many of a head's dimensions are rotated with the position."""
        return self.head_width

    @property
    def rope(self) -> Rope:
        return make_rope(self.rope_width, self.rope_theta, self.rope_scaling, self.max_position_embeddings)

    def window(self, layer: int) -> int | None:
        """Sliding-window width of a layer's attention in tokens; None where it sees everything."""
        return None

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.num_hidden_layers) if self.is_moe(i))

    @property
    def eos_ids(self) -> tuple[int, ...]:
        eos = self.eos_token_id
        return () if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)

    @abc.abstractmethod
    def is_moe(self, layer: int) -> bool:
        """Whether decoder layer `layer` has routed experts."""

    @property
    @abc.abstractmethod
    def moe_width(self) -> int:
        """F, an expert's hidden width."""


def check_kind(name: str, kind: str, value: Any) -> None:
    """Raises UserError where the value of a key is not of its field's type or not a sensible number."""
    if kind == "list[int]":
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise UserError(f"config.json: {name} must be a list of whole numbers, not {shown(value)}")
    elif kind in KINDS:
        if not isinstance(value, KINDS[kind]) or (kind != "bool" and isinstance(value, bool)):
            raise UserError(f"config.json: {name} must be of type {kind}, not {shown(value)}")
        if kind == "int" and value < 0 and not name.endswith("token_id"):
            raise UserError(f"config.json: {name} must be at least 0, not {value}")
        if kind == "float" and not abs(value) <= LARGEST:
            raise UserError(f"config.json: {name} must be a number that float32 holds, not {shown(value)}")


def unify_rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """transformers 5 writes theta and scaling into one dictionary, `rope_parameters`; older files use two keys.

    Returns a copy with `rope_theta` and `rope_scaling` (None where nothing is scaled) only.
    """
    raw = dict(raw)
    rope = raw.pop("rope_parameters", None)
    rope = raw.get("rope_scaling") or rope or {}
    if not isinstance(rope, Mapping):
        raise UserError(f"config.json: rope_scaling must be an object, not {shown(rope)}")
    rope = dict(rope)
    nested = [key for key, value in rope.items() if isinstance(value, Mapping)]
    if nested:
        raise UserError(f"config.json: rope_parameters per layer type ({', '.join(nested)}) are not supported")
    if unknown := [key for key in rope if key not in PARAMETERS and rope[key] is not None]:
        raise UserError(f"config.json: rope_scaling has {shown(unknown[0])}, which no rule here reads; take it out")
    theta = rope.pop("rope_theta", None)
    if theta is not None:
        raw["rope_theta"] = theta
    partial = rope.pop("partial_rotary_factor", None)
    if partial is not None:
        raw["partial_rotary_factor"] = partial
    if rope and "original_max_position_embeddings" in raw:  # a few files keep it outside
        rope["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
    kind = rope.get("rope_type", rope.get("type", "default"))
    raw["rope_scaling"] = None if kind == "default" else rope
    return raw


@dataclasses.dataclass(frozen=True, kw_only=True)
class QwenConfig(ModelConfig):
    """What Qwen's families have in common: every `decoder_sparse_step`-th layer has experts, but `mlp_only_layers`."""

    num_experts: int
    moe_intermediate_size: int
    head_dim: int | None = None
    max_position_embeddings: int = 32768
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: list[int] | None = None
    use_sliding_window: bool = False
    sliding_window: int | None = 4096

    aliases: ClassVar[Mapping[str, str]] = {"num_local_experts": "num_experts"}

    def check(self, raw: Mapping[str, Any]) -> None:
        if self.decoder_sparse_step < 1:
            raise UserError(f"config.json: decoder_sparse_step must be at least 1, not {self.decoder_sparse_step}")
        if self.use_sliding_window and not self.sliding_window:
            raise UserError("config.json: use_sliding_window is true but sliding_window is not given")
        super().check(raw)

    @property
    def moe_width(self) -> int:
        return self.moe_intermediate_size

    def is_moe(self, layer: int) -> bool:
        return layer not in (self.mlp_only_layers or ()) and (layer + 1) % self.decoder_sparse_step == 0
