"""DeepSeek-V2 and V2-Lite: multi-head latent attention, shared experts, group-limited routing.

Latent attention keeps per token only a compressed vector c (`kv_lora_rank` wide, normed) and one rotary key shared by
all heads, instead of H keys and values: 576 numbers a token instead of 4,096 in V2-Lite. Keys and values are linear in
c, so their up-projections can be *absorbed*: q.(W_k c) = (W_k^T q).c scores the latents directly, and the weighted sum
of latents is turned into values once per query. Absorbed work grows with the latent's width per (query, key) pair;
expanding every cached latent first costs a fixed amount per call and less per pair. `LatentAttention` picks by the
count.

Source: DeepSeek-AI, arXiv 2405.04434 (sections 2.1, 2.2), and the published checkpoints' keys and weight names.
Shapes: B batch, T tokens of this call, S cache capacity, D model width, H heads, r latent width, R rotary width,
n un-rotated query/key width, v value width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from hybrimoe_jax.errors import UserError, shown
from hybrimoe_jax.formats.packing import PANEL, PackedMatrix
from hybrimoe_jax.host_kernels.native import attention as native
from hybrimoe_jax.models import one_token
from hybrimoe_jax.models.attention import cache_write, visible
from hybrimoe_jax.models.config import ModelConfig
from hybrimoe_jax.models.decoder import CausalLM, assemble
from hybrimoe_jax.models.layers import Linear, RMSNorm, SwiGLU, apply_fused, rotate_pairs
from hybrimoe_jax.models.moe import MoEBlock
from hybrimoe_jax.models.one_token import NEG_INF
from hybrimoe_jax.models.packed import dequantise
from hybrimoe_jax.models.precision import einsum
from hybrimoe_jax.models.products import calls_native, product
from hybrimoe_jax.models.rope import yarn_mscale

LATENT_EPS = 1e-6  # the published model's latent norms keep their class's default, whatever `rms_norm_eps` says
METHODS = ("greedy", "group_limited_greedy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepseekV2Config(ModelConfig):
    """DeepSeek-V2's own keys of config.json, with their defaults."""

    n_routed_experts: int
    moe_intermediate_size: int
    kv_lora_rank: int = 512
    q_lora_rank: int | None = 1536
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    n_shared_experts: int | None = 2
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    topk_method: str = "greedy"
    n_group: int | None = None
    topk_group: int | None = None
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    attention_bias: bool = False
    mlp_bias: bool = False
    max_position_embeddings: int = 2048
    eos_token_id: int | list[int] | None = 2

    aliases: ClassVar[Mapping[str, str]] = {"num_experts": "n_routed_experts", "num_local_experts": "n_routed_experts"}
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"rope_interleave": (True, None)}

    def check(self, raw: Mapping[str, Any]) -> None:
        if self.moe_layer_freq < 1:
            raise UserError(f"config.json: moe_layer_freq must be at least 1, not {self.moe_layer_freq}")
        super().check(raw)
        _ = self.attention_scale  # needs the numbers of its scaling rule
        if self.topk_method not in METHODS:
            known = ", ".join(METHODS)
            raise UserError(
                f"config.json: topk_method {shown(self.topk_method)} is not supported for deepseek_v2 ({known} are)"
            )
        if self.kv_heads != self.num_attention_heads:
            raise UserError("config.json: num_key_value_heads must equal num_attention_heads in latent attention")
        if self.norm_topk_prob:  # no published one sets it; the model's own code, transformers and llama.cpp differ
            raise UserError(
                "config.json: norm_topk_prob true is not supported for deepseek_v2: programs differ in what it does to "
                "routed_scaling_factor"
            )
        for name in ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            if getattr(self, name) == 0:
                raise UserError(f"config.json: {name} must be at least 1, not 0")
        if self.topk_method == "group_limited_greedy":
            groups, kept = self.n_group or 0, self.topk_group or 0
            if groups < 1 or not 1 <= kept <= groups or self.num_experts % groups:
                raise UserError(
                    f"config.json: group_limited_greedy needs n_group that divides {self.num_experts} experts and "
                    f"1 <= topk_group <= n_group, not n_group {self.n_group}, topk_group {self.topk_group}"
                )
            if self.num_experts_per_tok > kept * (self.num_experts // groups):
                raise UserError("config.json: num_experts_per_tok exceeds the experts in topk_group groups")

    @property
    def num_experts(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]  config.json has another name
        return self.n_routed_experts

    @property
    def moe_width(self) -> int:
        return self.moe_intermediate_size

    @property
    def rope_width(self) -> int:
        return self.qk_rope_head_dim

    @property
    def attention_scale(self) -> float:
        """1 / sqrt(n + R), times YaRN's temperature squared where `mscale_all_dim` asks for it."""
        scale = (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        scaling = self.rope_scaling or {}
        all_dim = scaling.get("mscale_all_dim")
        return scale * yarn_mscale(scaling["factor"], all_dim) ** 2 if all_dim else scale

    def is_moe(self, layer: int) -> bool:
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0


class LatentAttention(nnx.Module):
    """Multi-head latent attention with a cache of `latent` [B, S, r] and `rope` [B, S, R]."""

    def __init__(self, config: DeepseekV2Config, rngs: nnx.Rngs | None):
        width, bias = config.hidden_size, config.attention_bias
        self.heads, self.nope, self.rotary = (
            config.num_attention_heads,
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
        )
        self.latent, self.value = config.kv_lora_rank, config.v_head_dim
        self.rope, self.scale = config.rope, config.attention_scale
        query = self.heads * (self.nope + self.rotary)
        self.q_lora_rank = config.q_lora_rank
        if self.q_lora_rank is None:
            self.q_proj = Linear(width, query, rngs=rngs)
        else:
            self.q_a_proj = Linear(width, self.q_lora_rank, bias=bias, rngs=rngs)
            self.q_a_layernorm = RMSNorm(self.q_lora_rank, LATENT_EPS)
            self.q_b_proj = Linear(self.q_lora_rank, query, rngs=rngs)
        self.kv_a_proj_with_mqa = Linear(width, self.latent + self.rotary, bias=bias, rngs=rngs)
        self.kv_a_layernorm = RMSNorm(self.latent, LATENT_EPS)
        self.kv_b_proj = Linear(self.latent, self.heads * (self.nope + self.value), rngs=rngs)
        self.o_proj = Linear(self.heads * self.value, width, bias=bias, rngs=rngs)

    def cache_shapes(self, batch: int, capacity: int) -> dict[str, tuple[int, ...]]:
        """Shapes of a cache for positions 0..capacity-1, with one place more as in `Attention.cache_shapes`."""
        return {"latent": (batch, capacity + 1, self.latent), "rope": (batch, capacity + 1, self.rotary)}

    def absorbs(self, tokens: int, capacity: int) -> bool:
        """Whether scoring latents directly takes fewer multiply-adds per head than expanding the cache first."""
        absorbed = tokens * self.latent * (self.nope + self.value) + tokens * capacity * 2 * self.latent
        expanded = capacity * self.latent * (self.nope + self.value) + tokens * capacity * (self.nope + self.value)
        return absorbed <= expanded

    def native_takes(self, up: jax.Array | PackedMatrix, latents: jax.Array) -> bool:
        aligned = self.nope % PANEL == 0 == self.value % PANEL
        return latents.dtype == jnp.float32 and (aligned or not isinstance(up, PackedMatrix))

    def __call__(
        self,
        x: jax.Array,
        cache: dict,
        positions: jax.Array,
        span: int | None = None,
        absorb: bool | None = None,
    ) -> tuple[jax.Array, dict]:
        """x [B, T, D], positions [B, T] (>= S marks padding) -> ([B, T, D], the cache); `span` as in `Attention`."""
        chex.assert_rank(x, 3)
        chex.assert_shape(positions, x.shape[:2])
        batch, tokens, _ = x.shape
        if self.q_lora_rank is None:
            q, compressed = apply_fused(x, self.q_proj, self.kv_a_proj_with_mqa)
        else:
            q, compressed = apply_fused(x, self.q_a_proj, self.kv_a_proj_with_mqa)
            q = self.q_b_proj(self.q_a_layernorm(q))
        q = q.reshape(batch, tokens, self.heads, self.nope + self.rotary)
        q, q_rope = q[..., : self.nope], q[..., self.nope :]
        latent, k_rope = self.kv_a_layernorm(compressed[..., : self.latent]), compressed[..., self.latent :]
        cos, sin = self.rope(positions)
        q_rope, k_rope = rotate_pairs(q_rope, cos, sin), rotate_pairs(k_rope[:, :, None], cos, sin)[:, :, 0]
        up = self.kv_b_proj.weight.get_value()
        if tokens == 1 and absorb is None and calls_native() and self.native_takes(up, cache["latent"]):
            new, at = (q[:, 0], q_rope[:, 0], latent[:, 0], k_rope[:, 0]), positions[:, 0]
            span = span or cache["latent"].shape[1]
            out, *cached = native.latent(*new, up, at, cache["latent"], cache["rope"], span, self.scale)
            return self.o_proj(out.reshape(batch, 1, -1)), dict(zip(("latent", "rope"), cached))
        cache = {
            "latent": cache_write(cache["latent"], latent, positions),
            "rope": cache_write(cache["rope"], k_rope, positions),
        }
        span = span or cache["latent"].shape[1]
        absorb = self.absorbs(tokens, span) if absorb is None else absorb
        attend = absorbed_attention if absorb else expanded_attention
        mask = visible(positions, span, None)
        out = attend(q, q_rope, cache, up, mask, self.scale)
        return self.o_proj(out.reshape(batch, tokens, self.heads * self.value)), cache


def absorbed_attention(
    q: jax.Array, q_rope: jax.Array, cache: dict, up: jax.Array | PackedMatrix, mask: jax.Array, scale: float
) -> jax.Array:
    """q [B, T, H, n], q_rope [B, T, H, R], up [H * (n + v), r], mask [B, T, P] -> [B, T, H, v].

    The first P places of the cache are read. A head's key rows come first in `up`.

    Both products take all of `up`, with zeros for the value rows, or values dropped: XLA:CPU copies a slice of it at 2
    GB/s (measured on DeepSeek-V2-Lite, one token: 2 ms for each of 54 slices, four fifths of a token's time).
    """
    _check_latent(q, q_rope, cache, mask)
    nope, heads = q.shape[-1], q.shape[2]
    up = dequantise(up) if isinstance(up, PackedMatrix) else up.astype(jnp.float32)
    up = up.reshape(heads, -1, cache["latent"].shape[-1])
    q = einsum("bthm,hmr->bthr", jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, up.shape[1] - nope))), up)
    if one_token.in_place(q.shape[1]):
        found = one_token.latent(q, q_rope, cache["latent"], cache["rope"], mask, scale)
    else:
        latent, rope = (cache[name][:, : mask.shape[2]].astype(jnp.float32) for name in ("latent", "rope"))
        logits = (einsum("bthr,bsr->bhts", q, latent) + einsum("bthr,bsr->bhts", q_rope, rope)) * scale
        probs = jax.nn.softmax(jnp.where(mask[:, None], logits, NEG_INF), axis=-1)
        found = einsum("bhts,bsr->bthr", probs, latent)
    return einsum("bthr,hmr->bthm", found, up)[..., nope:]


def expanded_attention(
    q: jax.Array, q_rope: jax.Array, cache: dict, up: jax.Array | PackedMatrix, mask: jax.Array, scale: float
) -> jax.Array:
    """The same answer with keys and values of every head expanded from the latents."""
    _check_latent(q, q_rope, cache, mask)
    latent, rope = (cache[name][:, : mask.shape[2]].astype(jnp.float32) for name in ("latent", "rope"))
    nope, heads = q.shape[-1], q.shape[2]
    both = product(latent, up).reshape(*latent.shape[:2], heads, -1)
    keys, values = both[..., :nope], both[..., nope:]
    logits = (einsum("bthn,bshn->bhts", q, keys) + einsum("bthr,bsr->bhts", q_rope, rope)) * scale
    probs = jax.nn.softmax(jnp.where(mask[:, None], logits, NEG_INF), axis=-1)
    return einsum("bhts,bshv->bthv", probs, values)


def _check_latent(q: jax.Array, q_rope: jax.Array, cache: dict, mask: jax.Array) -> None:
    batch, tokens, heads, _ = q.shape
    chex.assert_shape(mask, (batch, tokens, None))
    chex.assert_shape(q_rope, (batch, tokens, heads, cache["rope"].shape[-1]))
    chex.assert_shape((cache["latent"], cache["rope"]), (batch, None, None))


class DeepseekV2Block(MoEBlock):
    """Group-limited routing (device-limited in the paper) and `n_shared_experts` experts merged into one SwiGLU."""

    def __init__(self, config: DeepseekV2Config, rngs: nnx.Rngs | None):
        sizes = config.hidden_size, config.num_experts, config.num_experts_per_tok
        super().__init__(*sizes, normalise=False, rngs=rngs)
        limited = config.topk_method == "group_limited_greedy"
        self.groups, self.kept_groups = (config.n_group or 1, config.topk_group or 1) if limited else (1, 1)
        self.scaling = config.routed_scaling_factor
        hidden = (config.n_shared_experts or 0) * config.moe_intermediate_size
        self.shared_experts = SwiGLU(config.hidden_size, hidden, bias=config.mlp_bias, rngs=rngs) if hidden else None

    def select(self, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Top-k within the `kept_groups` groups whose best expert scores highest, scaled and not normalised."""
        if self.groups > 1:
            grouped = scores.reshape(-1, self.groups, self.num_experts // self.groups)
            _, best = jax.lax.top_k(jnp.max(grouped, axis=-1), self.kept_groups)
            kept = jnp.any(jax.nn.one_hot(best, self.groups, dtype=jnp.bool_), axis=-2)
            scores = jnp.where(kept[..., None], grouped, 0.0).reshape(scores.shape)
        ids, weights = super().select(scores)
        return ids, weights * self.scaling

    def shared(self, x: jax.Array) -> jax.Array | None:
        return None if self.shared_experts is None else self.shared_experts(x)


def build(config: DeepseekV2Config, rngs: nnx.Rngs | None) -> CausalLM:
    def attention(layer: int) -> LatentAttention:
        return LatentAttention(config, rngs)

    return assemble(config, rngs, attention, lambda: DeepseekV2Block(config, rngs), mlp_bias=config.mlp_bias)
