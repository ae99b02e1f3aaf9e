"""`config.json` and `generation_config.json`. The reference is the file itself: what it says is what is used.

What is accepted is in the configuration as it stands in the file; a key that changes a model's answer in transformers
and that the configuration does not hold is refused; what no engine looks at changes nothing.
"""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import checkpoint_folders
from fuzz.mutate import brief, change_json, json_text
from fuzz.worker import Case, Wrong

MATTERS = {
    "attention_bias": True,
    "mlp_bias": True,
    "use_qk_norm": True,
    "clip_qkv": 3.0,
    "partial_rotary_factor": 0.5,
    "is_causal": False,
    "logits_scaling": 8.0,
    "logit_scale": 0.5,
    "residual_multiplier": 0.22,
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.5,
    "attn_logit_softcapping": 30.0,
    "final_logit_softcapping": 30.0,
    "hidden_act": "gelu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "n_group": 2,
    "routed_scaling_factor": 2.5,
    "n_shared_experts": 1,
    "sliding_window": 16,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [0],
    "rope_scaling": {"rope_type": "longrope", "factor": 2.0},
    "rope_parameters": {"rope_type": "nonsense"},
    "per_layer_config": {"0": {"num_experts": 2}},
}
"""Values of keys that change what transformers computes, for this model or for another."""
HARMLESS = {
    "torch_dtype": "bfloat16",
    "dtype": "float16",
    "transformers_version": "4.99.0",
    "_name_or_path": "\u202ex",
    "use_cache": False,
    "initializer_range": 0.5,
    "attention_dropout": 0.1,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.1,
    "pad_token_id": None,
    "architectures": ["X"],
    "id2label": {"0": "a"},
    "task_specific_params": None,
}
"""Keys that say nothing about the numbers."""
USED = ("rope_theta", "rms_norm_eps", "norm_topk_prob", "num_experts_per_tok", "max_position_embeddings", "head_dim")
MORE = (*MATTERS, *HARMLESS, *USED, "eos_token_id", "bos_token_id", "quantization_config", "layer_types", "model_type")
COUNTS = ("num_hidden_layers", "num_experts", "vocab_size", "hidden_size", "moe_intermediate_size")


class Kind:
    """Folders of a tiny Qwen2-MoE, its weights always the same."""

    def __init__(self, base: Path):
        from hybrimoe_jax.checkpoint.hugging_face import open_hf

        self.source = checkpoint_folders.write_hf(
            base / "hf", checkpoint_folders.tensors(layers=1), num_hidden_layers=1
        )
        self.config = json.loads((self.source / "config.json").read_text())
        self.plain = open_hf(self.source).config

    def case(self, rng: random.Random, folder: Path) -> Case:
        raw: Any = json.loads(json.dumps(self.config))
        how = rng.choice(("any", "any", "any", "counts", "matters", "harmless"))
        said = []
        if how == "any":
            for _ in range(rng.choice((1, 1, 2))):
                raw, what = change_json(rng, raw, MORE)
                said.append(what)
        elif how == "counts":
            key = rng.choice(COUNTS)
            raw[key] = rng.choice((10**9, 2**31, 2**40, 10**12, 2**63, 10**30, 1e9, 65_537, -1, 0))
            said.append(f"{key} = {raw[key]}")
        else:
            known = MATTERS if how == "matters" else HARMLESS
            key = rng.choice(list(known))
            raw[key] = known[key]
            said.append(f"{key} = {brief(raw[key])}")
        text, spoilt = json_text(rng, raw) if how == "any" else (json.dumps(raw).encode(), "")
        source = folder / "hf"
        source.mkdir()
        (source / "config.json").write_bytes(text)
        (source / "model.safetensors").hardlink_to(self.source / "model.safetensors")
        exact = raw if not spoilt and isinstance(raw, dict) else None
        return Case(
            f"{how}: {'; '.join([*said, spoilt])}", lambda: self.compare(source, exact, how), ("config.json", "hf")
        )

    def compare(self, source: Path, raw: dict | None, how: str) -> None:
        from hybrimoe_jax.checkpoint.hugging_face import open_hf
        from hybrimoe_jax.errors import UserError

        try:
            config = open_hf(source).config
        except UserError as error:
            if how == "harmless":
                raise Wrong(f"what says nothing about the numbers is refused: {error}") from None
            raise
        if how == "matters" and config == self.plain:
            raise Wrong("what changes the numbers is taken and not looked at")
        if how == "harmless" and config != self.plain:
            raise Wrong("what says nothing about the numbers changes the model")
        if raw is not None:
            self.says(config, raw)
        hash(config)

    def says(self, config: Any, raw: dict) -> None:
        """The configuration holds what the file says."""
        for field in dataclasses.fields(config):
            said, used = raw.get(field.name), getattr(config, field.name)
            if said is None or isinstance(said, (dict, list)) or field.name in ("rope_theta", "rope_scaling"):
                continue
            if isinstance(said, float) and isinstance(used, float) and said != said and used != used:
                raise Wrong(f"{field.name}: a NaN is taken")
            if said != used or isinstance(said, bool) != isinstance(used, bool):
                raise Wrong(f"{field.name}: {brief(said)} in the file, {brief(used)} used")
