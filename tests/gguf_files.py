"""Writers of GGUF files with PyPI's `gguf`, of tiny random models, as llama.cpp's converter lays them out."""

from typing import Any

import numpy as np
import pytest

from hybrimoe_jax.models.parameters import split
from hybrimoe_jax.models.registry import build_model, parse_config

gguf = pytest.importorskip("gguf")

COMMON = dict(
    vocab_size=48,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts_per_tok=2,
    max_position_embeddings=128,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    eos_token_id=7,
    bos_token_id=None,
)
MODELS = {
    "qwen2moe": dict(
        model_type="qwen2_moe",
        num_experts=4,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=96,
        intermediate_size=64,
    ),
    "qwen3moe": dict(
        model_type="qwen3_moe",
        num_experts=4,
        moe_intermediate_size=32,
        intermediate_size=64,
        head_dim=32,
        norm_topk_prob=True,
    ),
    "olmoe": dict(model_type="olmoe", num_experts=4, intermediate_size=32, clip_qkv=3.0),
    "llama": dict(model_type="mixtral", num_local_experts=4, intermediate_size=32, rope_theta=1e6),
    "deepseek2": dict(
        model_type="deepseek_v2",
        num_key_value_heads=4,
        n_routed_experts=4,
        n_shared_experts=2,
        moe_intermediate_size=32,
        intermediate_size=96,
        first_k_dense_replace=1,
        kv_lora_rank=32,
        q_lora_rank=None,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=24,
        rope_scaling=dict(
            type="yarn", factor=4.0, original_max_position_embeddings=32, mscale=0.707, mscale_all_dim=0.707
        ),
    ),
}


def model(arch: str, seed: int = 0) -> tuple[Any, dict, dict]:
    """-> config, dense tensors by name, {(layer, expert): (gate, up, down)}."""
    config = parse_config({**COMMON, **MODELS[arch]})
    rng = np.random.default_rng(seed)
    dense = {}
    for name, leaf in split(build_model(config))[1].items():
        drawn = rng.standard_normal(leaf.shape).astype(np.float32)
        dense[name] = 1 + 0.1 * drawn if "norm" in name else drawn * leaf.shape[-1] ** -0.5
    width, hidden = config.hidden_size, config.moe_width
    shapes = ((hidden, width), (hidden, width), (width, hidden))
    experts = {
        (layer, e): [rng.standard_normal(s).astype(np.float32) * s[1] ** -0.5 for s in shapes]
        for layer in config.moe_layers
        for e in range(config.num_experts)
    }
    return config, dense, experts


NAMES = [
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("self_attn.kv_a_proj_with_mqa", "attn_kv_a_mqa"),
    ("self_attn.kv_a_layernorm", "attn_kv_a_norm"),
    ("self_attn.kv_b_proj", "attn_kv_b"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("shared_expert_gate", "ffn_gate_inp_shexp"),
    ("shared_expert.gate_proj", "ffn_gate_shexp"),
    ("shared_expert.up_proj", "ffn_up_shexp"),
    ("shared_expert.down_proj", "ffn_down_shexp"),
    ("shared_experts.gate_proj", "ffn_gate_shexp"),
    ("shared_experts.up_proj", "ffn_up_shexp"),
    ("shared_experts.down_proj", "ffn_down_shexp"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("mlp.gate", "ffn_gate_inp"),
    ("block_sparse_moe.gate", "ffn_gate_inp"),
]


def gguf_name(name: str) -> str:
    outer = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if not name.startswith("model.layers."):
        return outer.get(name, "output.weight")
    _, _, layer, rest = name.split(".", 3)
    stem, part = rest.rsplit(".", 1)
    return next(f"blk.{layer}.{theirs}.{part}" for ours, theirs in NAMES if stem.endswith(ours))


def metadata(writer, arch: str, config) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_eos_token_id(7)
    if arch in ("qwen2moe", "qwen3moe", "deepseek2"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if arch == "qwen2moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if arch == "qwen3moe":
        writer.add_key_length(config.head_dim)
    if arch == "olmoe":
        writer.add_clamp_kqv(config.clip_qkv)
    if arch == "llama":
        writer.add_rope_dimension_count(config.head_width)
    if arch == "deepseek2":
        writer.add_rope_dimension_count(config.qk_rope_head_dim)
        writer.add_leading_dense_block_count(config.first_k_dense_replace)
        writer.add_kv_lora_rank(config.kv_lora_rank)
        writer.add_key_length(config.qk_nope_head_dim + config.qk_rope_head_dim)
        writer.add_value_length(config.v_head_dim)
        writer.add_expert_shared_count(config.n_shared_experts)
        writer.add_expert_weights_scale(1.0)
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(32)
        writer.add_rope_scaling_yarn_log_mul(0.0707)


def pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the rows of q and k of llama models."""
    half = weight.shape[0] // heads // 2
    out = np.empty_like(weight)
    for h in range(heads):
        for i in range(half):
            for j in range(2):
                out[h * 2 * half + 2 * i + j] = weight[h * 2 * half + j * half + i]
    return out


def write(path, arch: str, kind: str, *, dense_kind: str = "F32", split_kv=None, tamper=lambda writer: None):
    """Writes the file; returns config, dense tensors and experts as the file's numbers stand for them.

    `split_kv(keys, values)`: the two as they are written, where `attn_kv_b` is split.
    """
    config, dense, experts = model(arch)
    writer = gguf.GGUFWriter(path, arch)
    metadata(writer, arch, config)
    tamper(writer)

    def add(name, array, kind) -> np.ndarray:
        type = gguf.GGMLQuantizationType[kind]
        if kind in ("F32", "F16"):
            writer.add_tensor(name, array.astype(np.float32 if kind == "F32" else np.float16))
            return array.astype(np.float32 if kind == "F32" else np.float16).astype(np.float32)
        data = gguf.quants.quantize(array, type)
        writer.add_tensor(name, data, raw_dtype=type)
        return gguf.quants.dequantize(data, type)

    for name, array in list(dense.items()):
        matrix = array.ndim == 2 and ".gate.weight" not in name and "shared_expert_gate" not in name
        stored = array
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            stored = pairs(array, config.num_attention_heads if "q_proj" in name else config.kv_heads)
        if split_kv and "kv_b_proj" in name:
            layer, heads = name.split(".")[2], config.num_attention_heads
            both = array.reshape(heads, config.qk_nope_head_dim + config.v_head_dim, config.kv_lora_rank)
            for part, array in zip("kv", split_kv(both[:, :16].transpose(0, 2, 1), both[:, 16:])):
                writer.add_tensor(f"blk.{layer}.attn_{part}_b.weight", np.ascontiguousarray(array))
            continue
        back = add(gguf_name(name), stored.squeeze(), dense_kind if matrix else "F32").reshape(stored.shape)
        if dense_kind != "F32" and stored is array:
            dense[name] = back
    for layer in config.moe_layers:
        for part, name in enumerate(("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")):
            stack = np.stack([experts[layer, e][part] for e in range(config.num_experts)])
            back = add(f"blk.{layer}.{name}.weight", stack, kind)
            for e in range(config.num_experts):
                experts[layer, e][part] = back[e]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return config, dense, experts
