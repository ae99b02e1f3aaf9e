"""Attention over a positional cache in torch, for every family: grouped-query, and DeepSeek's latent one.

What a layer's attention is made of is read from its weights and its `ModelConfig`, so there is one class for all
families with keys and values of their own.

Shapes: B batch, T tokens of this call, S cache capacity, D model width, H query heads, K key/value heads, d head width;
latent attention: r latent width, R rotary width, n un-rotated query/key width, v value width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from hybrimoe_jax.baselines.torch_linear import Linear, Tensor, as_type, plain, tensor_of

LATENT_EPS = 1e-6  # as in models.families.deepseek_v2


@dataclasses.dataclass
class Places:
    """Where the tokens of a step stand.

    Attributes:
      positions: [B, T]; padding has the cache's capacity.
      start: the position of the first token of a batch of one without padding; None for every other batch.
      end: places of the cache that the longest row attends to.
      cos, sin: [B, T, 1, d] for halves (`sin` signed), or `turns` complex [B, T, 1, d / 2] for pairs.
      masks: by window, [B, 1, T, end], made when first wanted.
    """

    positions: Tensor
    start: int | None
    end: int
    cos: Tensor
    sin: Tensor
    turns: Tensor
    masks: dict[int | None, Tensor] = dataclasses.field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor:
        """Key j is seen by the query at position p when p - window < j <= p."""
        if window not in self.masks:
            keys = torch.arange(self.end, device=self.positions.device)
            query = self.positions[:, :, None]
            seen = keys <= query
            if window is not None:
                seen &= keys > query - window
            self.masks[window] = seen[:, None]
        return self.masks[window]


class RotaryTable:
    """Cosines and sines of every position, made once. Args: rope: a `models.rope.Rope`; capacity: positions."""

    def __init__(self, rope: Any, capacity: int, device: torch.device):
        frequencies = torch.tensor(rope.inverse_frequencies, dtype=torch.float32)
        angles = torch.arange(capacity, dtype=torch.float32)[:, None] * frequencies
        cos, sin = torch.cos(angles) * rope.attention_factor, torch.sin(angles) * rope.attention_factor
        self.cos = torch.cat([cos, cos], 1).to(device)
        self.sin = torch.cat([-sin, sin], 1).to(device)
        self.turns = torch.complex(cos, sin).to(device)

    def places(self, positions: np.ndarray, capacity: int) -> Places:
        device = self.cos.device
        valid = positions < capacity
        end = int(positions[valid].max(initial=0)) + 1
        if len(positions) == 1 and valid.all():
            start = int(positions[0, 0])
            rows = slice(start, start + positions.shape[1])
            found = (table[None, rows, None] for table in (self.cos, self.sin, self.turns))
            return Places(torch.from_numpy(positions).to(device), start, end, *found)
        where = torch.from_numpy(np.minimum(positions, len(self.cos) - 1)).to(device)
        found = (table[where][:, :, None] for table in (self.cos, self.sin, self.turns))
        return Places(torch.from_numpy(positions).to(device), None, end, *found)


def write(cache: Tensor, new: Tensor, places: Places) -> None:
    """Puts `new` [B, K, T, d] at its places of a cache [B, K, S + 1, d]; padding goes to the last one."""
    if places.start is not None:
        cache.narrow(2, places.start, places.end - places.start).copy_(new)
        return
    rows = torch.arange(new.shape[0], device=new.device)[:, None]
    cache[rows, :, places.positions] = new.transpose(1, 2)


class GroupedAttention:
    """Grouped-query attention, with a cache of `k`, `v` [B, K, S + 1, d].

    Args:
      config: a ModelConfig. layer: the decoder layer's index.
      weights: the layer's dense weights below `self_attn.`.
      dtype: of the activations that matrices are given.
      norm: [D], the layer's norm, which x lacks.
    """

    def __init__(
        self,
        config: Any,
        layer: int,
        weights: Mapping[str, Any],
        dtype: torch.dtype,
        device: torch.device,
        norm: Tensor,
    ):
        self.heads, self.kv_heads, self.width = config.num_attention_heads, config.kv_heads, config.head_width
        self.eps, self.window, self.clip = config.rms_norm_eps, config.window(layer), getattr(config, "clip_qkv", None)
        names = ("q_proj", "k_proj", "v_proj")
        biases = [weights.get(f"{name}.bias") for name in names]
        self.qkv = Linear([weights[f"{name}.weight"] for name in names], biases, dtype, device, norm)
        self.out = Linear([weights["o_proj.weight"]], [weights.get("o_proj.bias")], dtype, device)
        norms = [weights[name] for name in ("q_norm.weight", "k_norm.weight") if name in weights]
        self.norms = [tensor_of(norm, torch.float32).to(device) for norm in norms] or None
        self.per_head = self.norms is not None and self.norms[0].numel() == self.width
        if self.norms is not None and self.per_head:
            counts = (self.heads, self.kv_heads)
            self.norms = [torch.cat([norm.expand(n, -1) for norm, n in zip(self.norms, counts, strict=True)])]

    @property
    def nbytes(self) -> int:
        return self.qkv.nbytes + self.out.nbytes + sum(norm.nbytes for norm in self.norms or ())

    def cache_shapes(self, batch: int, capacity: int) -> dict[str, tuple[int, ...]]:
        shape = (batch, self.kv_heads, capacity + 1, self.width)
        return {"k": shape, "v": shape}

    def workspace_bytes(self, tokens: int, context: int) -> int:
        """Of queries, keys and values, three times rotated, and the mask."""
        columns = (self.heads + 2 * self.kv_heads) + 3 * (self.heads + self.kv_heads)
        return 4 * tokens * columns * self.width + tokens * context

    def __call__(self, x: Tensor, cache: dict[str, Tensor], places: Places) -> Tensor:
        """Of x [B, T, D] float32, normed but for the norm's weights: float32 [B, T, D]."""
        batch, tokens, _ = x.shape
        qkv = as_type(self.qkv(x), torch.float32)
        rotated = (self.heads + self.kv_heads) * self.width
        qk, v = qkv[..., :rotated], qkv[..., rotated:]
        if self.norms is not None and not self.per_head:
            queries = self.heads * self.width
            parts = zip((qk[..., :queries], qk[..., queries:]), self.norms, strict=True)
            qk = torch.cat([functional.rms_norm(part, norm.shape, norm, self.eps) for part, norm in parts], -1)
        if self.clip is not None:
            qk, v = qk.clamp(-self.clip, self.clip), v.clamp(-self.clip, self.clip)
        qk = qk.reshape(batch, tokens, -1, self.width)
        if self.norms is not None and self.per_head:
            qk = functional.rms_norm(qk, (self.width,), None, self.eps) * self.norms[0]
        qk = torch.addcmul(qk * places.cos, qk.roll(self.width // 2, -1), places.sin).transpose(1, 2)
        write(cache["k"], qk[:, self.heads :], places)
        write(cache["v"], v.reshape(batch, tokens, self.kv_heads, self.width).transpose(1, 2), places)
        out = self._attend(qk[:, : self.heads], cache["k"], cache["v"], places)
        return as_type(self.out(out.transpose(1, 2).reshape(batch, tokens, -1)), torch.float32)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, places: Places) -> Tensor:
        """Q [B, H, T, d] over k, v [B, K, S + 1, d] -> [B, H, T, d]."""
        tokens, end = q.shape[2], places.end
        if places.start is not None and tokens == 1:
            begin = 0 if self.window is None else max(0, end - self.window)
            return one_query(q, k[:, :, begin:end], v[:, :, begin:end], self.width**-0.5)
        keys, values = k[:, :, :end], v[:, :, :end]
        if places.start == 0 and (self.window is None or end <= self.window):
            return sdpa(q, keys, values, self.width**-0.5, causal=True)
        return sdpa(q, keys, values, self.width**-0.5, mask=places.mask(self.window))


def one_query(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Q [1, H, 1, d], k and v [1, K, S, d] -> [1, H, 1, v]: two batched products, keys read once for a whole group."""
    heads, kv_heads = q.shape[1], k.shape[1]
    grouped = q.reshape(kv_heads, heads // kv_heads, -1)
    logits = torch.baddbmm(grouped[:, :, :1], grouped, k[0].transpose(1, 2), beta=0, alpha=scale)
    probabilities = torch.softmax(logits, -1)
    return torch.bmm(probabilities, v[0]).view(1, heads, 1, -1)


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Torch's own attention; keys are shared by a group of query heads."""
    shared = q.shape[1] != k.shape[1]
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=shared
    )


class LatentAttention:
    """DeepSeek-V2's attention, with a cache `latent` [B, 1, S + 1, r + R]: latents, then rotary keys.

    Few queries score latents directly (absorbed); many have keys and values expanded first. Either way the cache is
    one key/value head of torch's own attention, or the expanded ones are. Args as of `GroupedAttention`.
    """

    def __init__(
        self,
        config: Any,
        layer: int,
        weights: Mapping[str, Any],
        dtype: torch.dtype,
        device: torch.device,
        norm: Tensor,
    ):
        def linear(name: str, before: Tensor | None = None) -> Linear:
            return Linear([weights[f"{name}.weight"]], [weights.get(f"{name}.bias")], dtype, device, before)

        def own_norm(name: str) -> Tensor:
            return tensor_of(weights[f"{name}.weight"], torch.float32).to(device)

        self.heads, self.nope, self.rotary = (
            config.num_attention_heads,
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
        )
        self.latent, self.value, self.scale = config.kv_lora_rank, config.v_head_dim, config.attention_scale
        self.query: Callable[[Tensor], Tensor]
        if config.q_lora_rank is None:
            self.query = linear("q_proj", norm)
            self._parts = [self.query]
        else:
            inner, outer, weight = linear("q_a_proj", norm), linear("q_b_proj"), own_norm("q_a_layernorm")
            self._parts = [inner, outer]

            def query(x: Tensor) -> Tensor:
                return outer(functional.rms_norm(inner(x).float(), weight.shape, weight, LATENT_EPS))

            self.query = query
        self.inward, self.out = linear("kv_a_proj_with_mqa", norm), linear("o_proj")
        self.norm = own_norm("kv_a_layernorm")
        up = plain(weights["kv_b_proj.weight"], torch.float32).to(device)
        self.up = up.contiguous()
        by_head = up.view(self.heads, self.nope + self.value, self.latent)
        self.keys, self.values = by_head[:, : self.nope].contiguous(), by_head[:, self.nope :].contiguous()

    @property
    def nbytes(self) -> int:
        linears = [*self._parts, self.inward, self.out]
        return sum(part.nbytes for part in linears) + self.norm.nbytes + 2 * self.up.nbytes

    def cache_shapes(self, batch: int, capacity: int) -> dict[str, tuple[int, ...]]:
        return {"latent": (batch, 1, capacity + 1, self.latent + self.rotary)}

    def workspace_bytes(self, tokens: int, context: int) -> int:
        """Of queries and what comes out, keys and values of the whole context, expanded, and the mask."""
        own = self.heads * (2 * (self.nope + self.rotary) + self.value) + self.latent + 2 * self.rotary
        expanded = self.heads * (2 * self.nope + self.rotary + self.value)
        return 4 * (tokens * own + context * expanded) + tokens * context

    def absorbs(self, tokens: int, span: int) -> bool:
        """Whether scoring latents takes fewer multiply-adds per head than expanding the cache first."""
        absorbed = tokens * self.latent * (self.nope + self.value) + tokens * span * 2 * self.latent
        expanded = span * self.latent * (self.nope + self.value) + tokens * span * (self.nope + self.value)
        return absorbed <= expanded

    def __call__(self, x: Tensor, cache: dict[str, Tensor], places: Places) -> Tensor:
        """Of x [B, T, D] float32, normed but for the norm's weights: float32 [B, T, D]."""
        batch, tokens, _ = x.shape
        q = self.query(x).float().reshape(batch, tokens, self.heads, -1)
        inward = self.inward(x).float()
        latent = functional.rms_norm(inward[..., : self.latent], (self.latent,), self.norm, LATENT_EPS)
        rotary = rotate_pairs(inward[..., None, self.latent :], places.turns)[:, :, 0]
        write(cache["latent"], torch.cat([latent, rotary], -1)[:, None], places)
        q = torch.cat([q[..., : self.nope], rotate_pairs(q[..., self.nope :], places.turns)], -1).transpose(1, 2)
        seen = cache["latent"][:, :, : places.end]
        attend = self._absorbed if self.absorbs(tokens, places.end) else self._expanded
        out = attend(q, seen, places)
        return as_type(self.out(out.transpose(1, 2).reshape(batch, tokens, -1)), torch.float32)

    def _absorbed(self, q: Tensor, seen: Tensor, places: Places) -> Tensor:
        absorbed = torch.cat([torch.matmul(q[..., : self.nope], self.keys), q[..., self.nope :]], -1)
        return torch.matmul(self._sdpa(absorbed, seen, seen[..., : self.latent], places), self.values.transpose(1, 2))

    def _expanded(self, q: Tensor, seen: Tensor, places: Places) -> Tensor:
        both = functional.linear(seen[:, 0, :, : self.latent], self.up)
        both = both.view(*both.shape[:2], self.heads, -1).transpose(1, 2)
        rotary = seen[..., self.latent :].expand(-1, self.heads, -1, -1)
        return self._sdpa(q, torch.cat([both[..., : self.nope], rotary], -1), both[..., self.nope :], places)

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, places: Places) -> Tensor:
        if places.start is not None and q.shape[2] == 1:
            return one_query(q, k, v, self.scale)
        if places.start == 0:
            return sdpa(q, k, v, self.scale, causal=True)
        return sdpa(q, k, v, self.scale, mask=places.mask(None))


def rotate_pairs(x: Tensor, turns: Tensor) -> Tensor:
    """Dimensions 2i and 2i + 1 are a pair. x [B, T, H, d] float32; turns complex [B, T, 1, d / 2]."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * turns).flatten(-2)
