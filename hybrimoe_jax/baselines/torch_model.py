"""A model's dense part in torch: everything but the routed experts, for every family, by its `ModelConfig`.

Shapes: B batch, T tokens of this call, N = B T, D model width, E experts, k experts per token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional

from hybrimoe_jax.baselines.torch_attention import GroupedAttention, LatentAttention, Places, RotaryTable
from hybrimoe_jax.baselines.torch_linear import Linear, Norm, Tensor, as_type, plain, tensor_of
from hybrimoe_jax.formats.layout import PackedMatrix
from hybrimoe_jax.models.registry import family_of


class Routed(NamedTuple):
    """A MoE layer's router input x [N, D], and float32 [N, 2k + E (1 + distances)]: see `engine.routing`."""

    x: Tensor
    packed: Tensor


class SwiGLU:
    """`down(silu(gate(x)) * up(x))`, gate and up as one product; times sigmoid(`mix` x) where that is given, [1, D]."""

    def __init__(self, weights: Mapping[str, Any], dtype: torch.dtype, device: torch.device, mix: Any = None):
        names = ("gate_proj", "up_proj")
        biases = [weights.get(f"{name}.bias") for name in names]
        matrices = [weights[f"{name}.weight"] for name in names]
        self.hidden = matrices[0].shape[0]
        together = mix is not None and not any(isinstance(matrix, PackedMatrix) for matrix in matrices)
        self.mix = None if mix is None or together else Linear([mix], [None], dtype, device)
        self.sizes = [self.hidden, self.hidden, 1] if together else None
        self.gate_up = Linear([*matrices, mix] if together else matrices, biases, dtype, device)
        self.down = Linear([weights["down_proj.weight"]], [weights.get("down_proj.bias")], dtype, device)

    @property
    def nbytes(self) -> int:
        return self.gate_up.nbytes + self.down.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """Of x [N, D]: float32 [N, D]."""
        both = self.gate_up(x)
        if self.sizes is not None:
            gate, up, mix = both.split_with_sizes(self.sizes, -1)
        else:
            gate, up = both.chunk(2, -1)
            mix = None if self.mix is None else self.mix(x)
        y = as_type(self.down(functional.silu(gate).mul_(up)), torch.float32)
        return y if mix is None else y * torch.sigmoid(mix)


class Router:
    """Scores, the chosen experts and their weights. Args: config: a ModelConfig."""

    def __init__(self, config: Any):
        self.experts, self.top_k = config.num_experts, config.num_experts_per_tok
        self.normalise = bool(getattr(config, "norm_topk_prob", True))  # mixtral has no such key
        self.scaling, self.groups, self.kept = 1.0, 1, 1
        if hasattr(config, "routed_scaling_factor"):
            self.normalise = self.normalise and self.top_k > 1
            self.scaling = 1.0 if self.normalise else config.routed_scaling_factor
            if config.topk_method == "group_limited_greedy":
                self.groups, self.kept = config.n_group or 1, config.topk_group or 1

    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [N, E] -> weights [N, k], ids [N, k]."""
        if self.groups > 1:
            grouped = scores.view(len(scores), self.groups, -1)
            best = grouped.amax(-1).topk(self.kept).indices
            kept = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=scores.device).scatter_(1, best, True)
            scores = (grouped * kept[..., None]).view(scores.shape)
        weights, ids = scores.topk(self.top_k)
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        elif self.scaling != 1:
            weights = weights * self.scaling
        return weights, ids


class Layer:
    """One decoder layer. `moe_layer` counts MoE layers only; None for a dense one."""

    def __init__(self, config: Any, index: int, weights: Mapping[str, Any], dtype: torch.dtype, device: torch.device):
        block = family_of(config.model_type).block

        def below(stem: str) -> dict[str, Any]:
            return {name.removeprefix(stem): array for name, array in weights.items() if name.startswith(stem)}

        def norm(name: str) -> Tensor:
            return tensor_of(weights[f"{name}.weight"], torch.float32).to(device)

        attention = below("self_attn.")
        kind = LatentAttention if "kv_a_proj_with_mqa.weight" in attention else GroupedAttention
        self.attention = kind(config, index, attention, dtype, device, norm("input_layernorm"))
        self.normed, self.dtype = Norm(config.hidden_size, config.rms_norm_eps, device), dtype
        self.ffn_norm = norm("post_attention_layernorm")
        self.moe_layer: int | None = None
        self.mlp: SwiGLU | None = None
        self.gate: Tensor | None = None
        if not config.is_moe(index):
            self.mlp = SwiGLU(below(f"{block}."), dtype, device)
            return
        self.gate = plain(weights[f"{block}.gate.weight"], torch.float32).to(device)
        for name in ("shared_expert.", "shared_experts."):
            if shared := below(f"{block}.{name}"):
                self.mlp = SwiGLU(shared, dtype, device, weights.get(f"{block}.shared_expert_gate.weight"))

    @property
    def nbytes(self) -> int:
        parts = (self.attention, self.mlp, self.ffn_norm, self.gate)
        return sum(part.nbytes for part in parts if part is not None)

    def attend(self, h: Tensor, cache: dict[str, Tensor], places: Places) -> Tensor:
        """H [B, T, D] -> h with the attention's part."""
        return h + self.attention(self.normed(h.view(-1, h.shape[-1])).view(h.shape), cache, places)

    def ffn_input(self, h: Tensor) -> Tensor:
        """The normed input [N, D] of the residual stream [B, T, D]."""
        return as_type(self.normed(h.view(-1, h.shape[-1])) * self.ffn_norm, self.dtype)

    def shared(self, x: Tensor) -> Tensor | None:
        """The shared experts' part [N, D] of a MoE layer, or a dense layer's; None where there is none."""
        return None if self.mlp is None else self.mlp(x)


class TorchModel:
    """The dense part on a device.

    Args:
      config: a ModelConfig. dense: every dense weight by its checkpoint name, as the checkpoint stores it.
      dtype: of the activations that matrices are given; sums that leave a layer are float32 in any case.
      capacity: positions at most.
      own_norm: routers of later layers read this layer's router input, instead of its residual stream through their
        own norms.
    """

    def __init__(
        self, config: Any, dense: Mapping[str, Any], dtype: torch.dtype, device: torch.device, capacity: int, own_norm
    ):
        self.config, self.device, self.dtype, self.own_norm = config, device, dtype, own_norm
        self.table = plain(dense["model.embed_tokens.weight"], dtype).to(device)
        self.norm = tensor_of(dense["model.norm.weight"], torch.float32).to(device)
        tied = config.tie_word_embeddings
        self.head = Linear([dense["model.embed_tokens.weight" if tied else "lm_head.weight"]], [None], dtype, device)
        self.router, self.rotary = Router(config), RotaryTable(config.rope, capacity + 1, device)
        self.layers: list[Layer] = []
        moe_layers = 0
        for index in range(config.num_hidden_layers):
            stem = f"model.layers.{index}."
            weights = {name.removeprefix(stem): dense[name] for name in dense if name.startswith(stem)}
            layer = Layer(config, index, weights, dtype, device)
            if config.is_moe(index):
                layer.moe_layer, moe_layers = moe_layers, moe_layers + 1
            self.layers.append(layer)
        self.moe_layers = [layer for layer in self.layers if layer.moe_layer is not None]
        self._routers: dict[int, list[Tensor]] = {}

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.table, self.norm, self.head, *self.layers))

    def cache_bytes(self, batch: int, capacity: int) -> int:
        """Bytes of the caches of all layers, float32."""
        shapes = (layer.attention.cache_shapes(batch, capacity) for layer in self.layers)
        return sum(4 * int(np.prod(shape)) for layer in shapes for shape in layer.values())

    def workspace_bytes(self, tokens: int, context: int, distances: int) -> int:
        """Device bytes of the most intermediate results that a step has at once: in a layer, or for a token's logits.

        Of routed experts no more than `tokens` rows are computed together. Args: distances: layers whose routers look
        ahead.
        """
        config, hidden = self.config, self.config.hidden_size
        held = 6 * hidden + 2 * config.num_experts_per_tok + config.num_experts * (1 + distances)
        wide = max(layer.mlp.gate_up.rows if layer.mlp else 0 for layer in self.layers)
        routed = 3 * hidden + 4 * config.moe_width
        beside = max(layer.attention.workspace_bytes(tokens, context) for layer in self.layers) + 4 * tokens * hidden
        return max(
            4 * tokens * (held + max(hidden + 2 * wide, routed)), 4 * tokens * held + beside, 4 * config.vocab_size
        )

    def init_cache(self, batch: int, capacity: int) -> list[dict[str, Tensor]]:
        return [
            {
                name: torch.zeros(shape, device=self.device)
                for name, shape in layer.attention.cache_shapes(batch, capacity).items()
            }
            for layer in self.layers
        ]

    def embed(self, ids: np.ndarray) -> Tensor:
        """Ids [B, T] -> float32 [B, T, D]."""
        return as_type(self.table[torch.from_numpy(ids).to(self.device)], torch.float32)

    def front(self, layer: Layer, h: Tensor, cache: dict, places: Places, distance: int) -> tuple[Tensor, Routed]:
        """Attention, norm and router, and the next `distance` MoE layers' routers on the same state."""
        h = layer.attend(h, cache, places)
        normed = layer.normed(h.view(-1, h.shape[-1]))
        rows, experts = normed.shape[0], self.router.experts
        logits = functional.linear(normed, self._stacked(layer, distance))
        scores = torch.softmax(logits.view(rows, distance + 1, experts) if distance else logits, -1)
        weights, ids = self.router.select(scores[:, 0] if distance else scores)
        packed = torch.cat([ids.float(), weights, scores.view(rows, -1)], 1)
        return h, Routed(as_type(normed * layer.ffn_norm, self.dtype), packed)

    def logits(self, h: Tensor, last: np.ndarray | None) -> Tensor:
        """float32 [B, V] of each row's token `last`, or [B, T, V] of all."""
        if last is not None:
            h = h[torch.arange(len(h), device=self.device), torch.from_numpy(last).to(self.device)]
        x = functional.rms_norm(h, self.norm.shape, self.norm, self.config.rms_norm_eps)
        return as_type(self.head(x), torch.float32)

    def _stacked(self, layer: Layer, distance: int) -> Tensor:
        """The routers of this layer and the coming ones behind one another, [(1 + distance) E, D], norms folded in.

        Past the end the last layer stands in; predictors ignore those.
        """
        if distance not in self._routers:
            last = len(self.moe_layers) - 1
            made = []
            for first in range(last + 1):
                parts = []
                for d in range(distance + 1):
                    of = self.moe_layers[min(first + d, last)]
                    assert of.gate is not None
                    parts.append(of.gate * (self.moe_layers[first] if self.own_norm else of).ffn_norm)
                made.append(torch.cat(parts))
            self._routers[distance] = made
        assert layer.moe_layer is not None
        return self._routers[distance][layer.moe_layer]
