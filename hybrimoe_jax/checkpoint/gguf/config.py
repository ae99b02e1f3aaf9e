"""What a GGUF file's metadata says, as the `config.json` of the same model.

GGUF does not carry everything: whether a family normalises its expert weights is part of the architecture
there, as llama.cpp computes it (qwen2moe and olmoe do not, qwen3moe and Mixtral do, deepseek2 says). What
cannot be known is refused, not guessed.
Source: the key names and tables of PyPI's `gguf`, and llama.cpp's converter for what they mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from hybrimoe_jax.checkpoint.gguf.header import Array
from hybrimoe_jax.errors import UserError, shown, shown_name

ARCHITECTURES = {
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
    "olmoe": "olmoe",
    "llama": "mixtral",
    "deepseek2": "deepseek_v2",
}
Get = Callable[..., Any]
"""(key below the architecture's, default) -> value."""
Need = Callable[[str], Any]
"""The same for a key that must be there."""
SOFTMAX = 1  # of `expert_gating_func`
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.alpha": (0, 1),
    "rope.dimension_sections": (),
    "expert_gating_func": (0, SOFTMAX),
    "expert_weights_scale": (0, 1),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_group_scale": (0, 1),
    "experts_per_group": (0,),
    "expert_shared_count": (0,),
    "expert_chunk_feed_forward_length": (0,),
    "leading_dense_block_count": (0,),
    "moe_every_n_layers": (0, 1),
    "interleave_moe_layer_step": (0, 1),
    "moe_latent_size": (0,),
    "nextn_predict_layers": (0,),
    "swiglu_clamp_exp": (0,),
    "swiglu_clamp_shexp": (0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.output_scale": (0, 1),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0,),
    "attention.shared_kv_layers": (0,),
    "attention.sliding_window_pattern": (0,),
    "attn_logit_softcapping": (0,),
    "router_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "use_parallel_residual": (False,),
}
"""Keys that would change the answer and that no configuration here can say -> the
values under which they change nothing. `check_rest` adds those that depend on other keys."""
HONOURED = {
    "deepseek2": (
        *("expert_weights_scale", "expert_gating_func", "expert_group_count", "expert_group_used_count"),
        *("expert_shared_count", "leading_dense_block_count", "rope.dimension_count"),
        *("attention.key_length", "attention.value_length"),
    ),
    "olmoe": ("attention.clamp_kqv",),
    "qwen2moe": ("expert_shared_count",),
}
"""By architecture: those that are read all the same."""
READ = (
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "expert_feed_forward_length"),
    *("expert_shared_feed_forward_length", "expert_count", "expert_used_count"),
    *("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"),
    *("attention.kv_lora_rank", "attention.q_lora_rank", "attention.key_length_mla", "attention.value_length_mla"),
    *("rope.freq_base", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor"),
    *("rope.scaling.original_context_length", "rope.scaling.yarn_log_multiplier"),
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
)
"""By some architecture; another one's tensors would not fit."""
HARMLESS = {
    "says how the file was made": ("tensor_data_layout", "rope.scaling.finetuned"),
    "of embeddings and classifiers": ("pooling_type", "classifier.output_labels"),
    "of layers that slide, which are refused": (
        *("rope.freq_base_swa", "rope.dimension_count_swa", "attention.key_length_swa", "attention.value_length_swa"),
    ),
    "of norms that these architectures do not have": (
        *("attention.layer_norm_epsilon", "attention.group_norm_epsilon", "attention.group_norm_groups"),
    ),
}
"""Why it changes nothing -> the keys."""


def hf_config(fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: object) -> dict[str, Any]:
    """`fields`: the metadata by key; `shapes`: of the tensors under their GGUF names.

    Raises UserError for what is not supported.
    """
    arch = fields.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise UserError(f"{where}: GGUF architecture {shown(arch)} is not supported ({', '.join(ARCHITECTURES)} are)")
    if fields.get("split.count") not in (None, 0, 1):
        raise UserError(f"{where}: one part of a split GGUF; join the parts with llama.cpp's gguf-split --merge")

    def get(key: str, default: Any = None) -> Any:
        value = fields.get(f"{arch}.{key}", default)
        if isinstance(value, Array):
            raise UserError(f"{where}: {arch}.{key} differs from layer to layer, which is not supported")
        return value

    def need(key: str) -> Any:
        if (value := get(key)) is None:
            raise UserError(f"{where}: no {arch}.{key} in its metadata; it is incomplete, make it again")
        return value

    if not get("expert_count"):
        raise UserError(f"{where}: no experts ({arch}.expert_count); this engine runs mixture-of-experts models")
    if "rope_freqs.weight" in shapes:
        raise UserError(f"{where}: rope_freqs (llama3 rope scaling) is not supported in GGUF; convert the original")
    layers, heads, width = need("block_count"), need("attention.head_count"), need("embedding_length")
    if layers > len(shapes):
        raise UserError(f"{where}: {arch}.block_count {layers}, but the file has {len(shapes)} tensors; make it again")
    raw = {
        "model_type": ARCHITECTURES[arch],
        "vocab_size": shapes.get("token_embd.weight", (0,))[0],
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "num_experts_per_tok": need("expert_used_count"),
        "max_position_embeddings": need("context_length"),
        "rms_norm_eps": rounded(need("attention.layer_norm_rms_epsilon")),
        "rope_theta": rounded(get("rope.freq_base", 10000.0)),
        "rope_scaling": rope_scaling(get, where),
        "tie_word_embeddings": "output.weight" not in shapes,
        "hidden_act": "silu",
        **{f"{role}_token_id": token_id(fields, f"tokenizer.ggml.{role}_token_id", where) for role in ("bos", "eos")},
    }
    raw |= family_keys(arch, get, need, shapes, where)
    own = [key.removeprefix(f"{arch}.") for key in fields if key.startswith(f"{arch}.")]
    check_rest(arch, own, get, raw, where)
    return raw


def token_id(fields: Mapping[str, Any], key: str, where: object) -> int | None:
    value = fields.get(key)
    if value is not None and (type(value) is not int or value < 0):
        raise UserError(f"{where}: {key} is {shown(value)}, no token id; make the file again")
    return value


def family_keys(
    arch: str, get: Get, need: Need, shapes: Mapping[str, tuple[int, ...]], where: object
) -> dict[str, Any]:
    """The keys that only this architecture's family has."""
    experts = need("expert_count")
    if arch == "deepseek2":
        return deepseek(get, need, need("attention.head_count"), experts, where)
    raw = {"intermediate_size": need("feed_forward_length")}
    if arch == "llama":
        head = get("attention.key_length", get("rope.dimension_count"))
        return raw | {"num_local_experts": experts, "head_dim": head}
    raw |= {"num_experts": experts, "norm_topk_prob": arch == "qwen3moe"}
    if arch == "olmoe":
        return raw | {"clip_qkv": get("attention.clamp_kqv") or None}
    raw |= {
        "moe_intermediate_size": get("expert_feed_forward_length"),
        "mlp_only_layers": [i for i in range(need("block_count")) if f"blk.{i}.ffn_gate_exps.weight" not in shapes],
        "head_dim": get("attention.key_length"),
    }
    if arch == "qwen2moe":
        shared = shapes.get("blk.0.ffn_up_shexp.weight", (0,))[0]
        raw["shared_expert_intermediate_size"] = get("expert_shared_feed_forward_length", shared)
        raw["qkv_bias"] = "blk.0.attn_q.bias" in shapes
    return raw


def check_rest(arch: str, keys: Iterable[str], get: Get, raw: Mapping[str, Any], where: object) -> None:
    """Refuses by name what `raw` does not say and what would change the answer. `keys`: of the architecture."""
    head = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    if arch == "deepseek2":
        head = raw["qk_nope_head_dim"] + raw["qk_rope_head_dim"]
    yarn = get("rope.scaling.type") == "yarn"
    neutral = NEUTRAL | {
        "rope.dimension_count": (head,),
        "attention.sliding_window": (0, max(get("attention.sliding_window", 0), raw["max_position_embeddings"])),
        "attention.scale": (0, rounded(head**-0.5)),
        "attention.key_length": (head,),
        "attention.value_length": (head,),
        "embedding_length_out": (raw["hidden_size"],),
        "features_length": (raw["hidden_size"],),
        "vocab_size": (raw["vocab_size"],),
        "rope.scaling.yarn_ext_factor": (-1, int(yarn)),
        "expert_weights_norm": (raw.get("norm_topk_prob", True),),
    }
    for key, values in neutral.items():
        value = get(key)
        if value is None or key in HONOURED.get(arch, ()):
            continue
        if (rounded(value) if isinstance(value, float) else value) not in values:
            raise UserError(f"{where}: {arch}.{key} {shown(value)} is not supported for this architecture")
    known = {*neutral, *READ, *(key for keys in HARMLESS.values() for key in keys)}
    for key in keys:
        if key not in known and get(key) not in (None, 0, ""):
            raise UserError(f"{where}: {arch}.{shown_name(key)} {shown(get(key))} is a key that no rule here reads")


def deepseek(get: Get, need: Need, heads: int, experts: int, where: object) -> dict[str, Any]:
    """DeepSeek-V2's own keys."""
    if get("expert_gating_func", SOFTMAX) not in (0, SOFTMAX):
        raise UserError(f"{where}: deepseek2 with sigmoid routing (DeepSeek-V3) is not supported")
    groups, kept = get("expert_group_count") or 1, get("expert_group_used_count") or 1
    if groups == 1 and experts == 160:
        raise UserError(
            f"{where}: 160 experts but no deepseek2.expert_group_count: DeepSeek-V2 routes within groups, which this "
            "file does not describe; convert the original"
        )
    rotary = need("rope.dimension_count")
    key = get("attention.key_length_mla") or need("attention.key_length")
    limited = {"topk_method": "group_limited_greedy", "n_group": groups, "topk_group": kept}
    return {
        "num_key_value_heads": heads,  # 1 in files for absorbed attention, which is the same model
        "n_routed_experts": experts,
        "n_shared_experts": get("expert_shared_count") or None,
        "moe_intermediate_size": need("expert_feed_forward_length"),
        "intermediate_size": need("feed_forward_length"),
        "first_k_dense_replace": get("leading_dense_block_count", 0),
        "kv_lora_rank": need("attention.kv_lora_rank"),
        "q_lora_rank": get("attention.q_lora_rank") or None,
        "qk_rope_head_dim": rotary,
        "qk_nope_head_dim": key - rotary,
        "v_head_dim": get("attention.value_length_mla") or need("attention.value_length"),
        "norm_topk_prob": False,  # llama.cpp normalises and scales, others do one of the two: refused in `check_rest`
        "routed_scaling_factor": rounded(get("expert_weights_scale") or 1.0),
        **(limited if groups > 1 else {}),
    }


def rope_scaling(get: Get, where: object) -> dict[str, Any] | None:
    """The scaling of rotary positions by llama.cpp's rules.

    Without a type scaling is linear, a factor of 0 is none, and `rope.scale_linear` is the factor's old name.
    """
    factor = rounded(get("rope.scaling.factor", get("rope.scale_linear", 0.0)) or 1.0)
    kind = get("rope.scaling.type", "linear" if factor != 1 else "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise UserError(f"{where}: rope scaling {shown(kind)} is not supported in GGUF (linear and yarn are)")
    scaling = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = get("rope.scaling.original_context_length")
        for key, name in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
            if (value := get(f"rope.scaling.{key}")) is not None:
                scaling[name] = rounded(value)
        if (log := get("rope.scaling.yarn_log_multiplier")) is not None:  # 0.1 * mscale_all_dim, and mscale is the same
            scaling["mscale"] = scaling["mscale_all_dim"] = rounded(log * 10)
    return scaling


def rounded(value: float) -> float:
    """The shortest decimal of a number stored as float32: 1e-6, not 9.99999997e-07."""
    return float(f"{value:.7g}")
