"""GGUF files for llama.cpp to be timed on.

They hold a Hugging Face folder's own weights, or random blocks of a configuration's shapes.

Every matrix has the one type named, embedding and head too, as llama.cpp's `--pure` does; norms, biases and routers are
F32. Written through PyPI's `gguf`, tensor by tensor. The vocabulary is left out: token ids go in and out.

Types: F32, Q8_0 (int8 in groups of 32, a float16 scale each: 8.5 bits a weight), Q4_0 (int4 likewise: 4.5 bits).
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from hybrimoe_jax.checkpoint.gguf.file import BLOCK, BLOCK_BYTES
from hybrimoe_jax.checkpoint.random import HEAD_SPREAD, ROUTER_SPREAD, generator
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.models.config import ModelConfig
from hybrimoe_jax.models.families.deepseek_v2 import DeepseekV2Config
from hybrimoe_jax.models.families.qwen2_moe import Qwen2MoeConfig

MEAN_SQUARE = {"Q8_0": 5461.5, "Q4_0": 21.5}
"""Of a uniformly random code: -128 to 127, and -8 to 7."""
CONTEXT = 2048
ARCHITECTURES = {"qwen2_moe": "qwen2moe", "deepseek_v2": "deepseek2"}
"""llama.cpp's names of the families written here."""
Written = Qwen2MoeConfig | DeepseekV2Config
ROWS = 1 << 16
"""Rows of random blocks made at a time."""


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A tensor to write.

    name: in GGUF. shape: outputs before inputs, experts first. sources: its names in the Hugging Face checkpoint, more
    than one where experts are stacked. plain: F32 whatever the type. spread: of its outputs for inputs of unit
    variance.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...] = ()
    plain: bool = False
    spread: float = 1.0


def write_gguf(path: Path, config: ModelConfig, kind: str, read: Callable[[str], np.ndarray] | None = None) -> Path:
    """Writes and returns `path`.

    Args:
      kind: "F32", "Q8_0" or "Q4_0".
      read: gives a checkpoint's tensor by name; None writes random weights. Only
        Qwen2-MoE is written from a checkpoint.

    Raises UserError for a family that is not written here.
    """
    import gguf

    known = check_known(config)
    matrices = layout(known)
    beside = path.with_name(path.name + ".part")
    writer = gguf.GGUFWriter(beside, ARCHITECTURES[config.model_type])
    metadata(writer, known)
    types = gguf.GGMLQuantizationType
    for matrix in matrices:
        own = "F32" if matrix.plain else kind
        width, dtype = matrix.shape[-1], np.float32
        if own != "F32":
            width, dtype = width // BLOCK * BLOCK_BYTES[own], np.uint8
        shape = (*matrix.shape[:-1], width)
        writer.add_tensor_info(
            matrix.name, shape, np.dtype(dtype), math.prod(shape) * np.dtype(dtype).itemsize, types[own]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for number, matrix in enumerate(matrices):
        own = "F32" if matrix.plain else kind
        if read is None:
            data = random_blocks(matrix, own, number)
        else:
            array = np.concatenate([read(source).astype(np.float32) for source in matrix.sources]).reshape(matrix.shape)
            data = gguf.quants.quantize(array, types[own])
        writer.write_tensor_data(np.ascontiguousarray(data))
    writer.close()
    os.replace(beside, path)
    return path


def random_blocks(matrix: Matrix, kind: str, seed: int) -> np.ndarray:
    """Random weights such that outputs have variance `spread`^2 for inputs of unit variance; norms are 1."""
    rng, width = generator(seed), matrix.shape[-1]
    if matrix.name.endswith("norm.weight"):
        return np.ones(matrix.shape, np.float32)
    std = matrix.spread * width**-0.5
    if kind == "F32":
        return rng.standard_normal(matrix.shape, np.float32) * np.float32(std)
    rows, bytes_ = math.prod(matrix.shape[:-1]), width // BLOCK * BLOCK_BYTES[kind]
    out = np.empty((rows * width // BLOCK, BLOCK_BYTES[kind]), np.uint8)
    for start in range(0, len(out), ROWS):
        part = out[start : start + ROWS]
        part[:] = np.frombuffer(rng.bytes(part.size), np.uint8).reshape(part.shape)
        scale = rng.uniform(0.75, 1.25, len(part)) * rng.choice((-1.0, 1.0), len(part))  # the codes' mean is not zero
        part[:, :2] = (scale * std * MEAN_SQUARE[kind] ** -0.5).astype(np.float16)[:, None].view(np.uint8)
    return out.reshape(*matrix.shape[:-1], bytes_)


def metadata(writer, config: Written) -> None:
    """What llama.cpp must know of the model. Rotary scaling is left out: within CONTEXT tokens it changes no speed."""
    import gguf

    writer.add_context_length(CONTEXT)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(config.rope_theta))
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_width)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    if isinstance(config, Qwen2MoeConfig):
        writer.add_head_count_kv(config.kv_heads)
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
        return
    nope, rope, rank = config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank
    writer.add_head_count_kv(1)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_kv_lora_rank(rank)
    writer.add_key_length(rank + rope)
    writer.add_value_length(rank)
    writer.add_key_length_mla(nope + rope)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_rope_dimension_count(rope)
    writer.add_expert_shared_count(config.n_shared_experts or 0)
    writer.add_expert_weights_scale(float(config.routed_scaling_factor))
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)


def check_known(config: ModelConfig) -> Written:
    """The configuration given; UserError for a family other than Qwen2-MoE and DeepSeek-V2."""
    if not isinstance(config, Written) or config.tie_word_embeddings:
        raise UserError(
            f"no GGUF is written for {config.model_type} (known: {', '.join(ARCHITECTURES)}, with a head of its own)"
        )
    return config


def layout(config: Written) -> list[Matrix]:
    """The tensors that llama.cpp reads."""
    width, vocab = config.hidden_size, config.vocab_size
    found = [
        Matrix("token_embd.weight", (vocab, width), ("model.embed_tokens.weight",), spread=width**0.5),
        Matrix("output_norm.weight", (width,), ("model.norm.weight",), True),
        Matrix("output.weight", (vocab, width), ("lm_head.weight",), spread=HEAD_SPREAD),
    ]
    for i in range(config.num_hidden_layers):
        attention = qwen2_attention(config) if isinstance(config, Qwen2MoeConfig) else latent_attention(config)
        ffn = moe(config) if i in config.moe_layers else swiglu("", "mlp.", width, config.intermediate_size)
        for own in (*attention, *ffn):
            sources = tuple(f"model.layers.{i}.{source}" for source in own.sources)
            found.append(dataclasses.replace(own, name=f"blk.{i}.{own.name}", sources=sources))
    return found


def qwen2_attention(config: Qwen2MoeConfig) -> Iterator[Matrix]:
    width, head = config.hidden_size, config.head_width
    yield Matrix("attn_norm.weight", (width,), ("input_layernorm.weight",), True)
    yield Matrix("ffn_norm.weight", (width,), ("post_attention_layernorm.weight",), True)
    for name, heads in (("q", config.num_attention_heads), ("k", config.kv_heads), ("v", config.kv_heads)):
        yield Matrix(f"attn_{name}.weight", (heads * head, width), (f"self_attn.{name}_proj.weight",))
        yield Matrix(f"attn_{name}.bias", (heads * head,), (f"self_attn.{name}_proj.bias",), True)
    yield Matrix("attn_output.weight", (width, width), ("self_attn.o_proj.weight",))


def latent_attention(config: DeepseekV2Config) -> Iterator[Matrix]:
    width, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    yield Matrix("attn_norm.weight", (width,), plain=True)
    yield Matrix("ffn_norm.weight", (width,), plain=True)
    yield Matrix("attn_q.weight", (heads * (nope + rope), width))
    yield Matrix("attn_kv_a_mqa.weight", (rank + rope, width))
    yield Matrix("attn_kv_a_norm.weight", (rank,), plain=True)
    yield Matrix("attn_k_b.weight", (heads, rank, nope))
    yield Matrix("attn_v_b.weight", (heads, value, rank))
    yield Matrix("attn_output.weight", (width, heads * value))


def moe(config: Written) -> Iterator[Matrix]:
    width, hidden, count = config.hidden_size, config.moe_width, config.num_experts
    yield Matrix("ffn_gate_inp.weight", (count, width), ("mlp.gate.weight",), True, ROUTER_SPREAD)
    if isinstance(config, Qwen2MoeConfig):
        yield Matrix("ffn_gate_inp_shexp.weight", (width,), ("mlp.shared_expert_gate.weight",), True)
        yield from swiglu("_shexp", "mlp.shared_expert.", width, config.shared_expert_intermediate_size)
    else:
        yield from swiglu("_shexp", "mlp.shared_experts.", width, (config.n_shared_experts or 0) * hidden)
    for part, shape in (("gate", (hidden, width)), ("up", (hidden, width)), ("down", (width, hidden))):
        sources = tuple(f"mlp.experts.{e}.{part}_proj.weight" for e in range(count))
        yield Matrix(f"ffn_{part}_exps.weight", (count, *shape), sources)


def swiglu(suffix: str, source: str, width: int, hidden: int) -> Iterator[Matrix]:
    for part, shape in (("gate", (hidden, width)), ("up", (hidden, width)), ("down", (width, hidden))):
        yield Matrix(f"ffn_{part}{suffix}.weight", shape, (f"{source}{part}_proj.weight",))
