"""Where numbers that are none come up first in the PyTorch engine: `engine.not_finite`'s second pass, by torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from hybrimoe_jax.baselines.torch_experts import Bank, Experts, Work
from hybrimoe_jax.baselines.torch_linear import Tensor
from hybrimoe_jax.baselines.torch_model import Routed, TorchModel
from hybrimoe_jax.engine.finite import CHUNK
from hybrimoe_jax.engine.generation import capacity_for, prefill_chunks


@torch.inference_mode()
def first_not_finite(
    model: TorchModel, banks: Sequence[Bank], experts: Experts, tokens: Sequence[int], context: int
) -> str | None:
    """Where NaN or an infinity comes up first while these tokens are read; None if nowhere.

    Args: banks: by MoE layer, its experts in host memory. experts: what computes them. context: the longest sequence.
    """
    capacity = capacity_for([tokens], 0, context)
    caches = model.init_cache(1, capacity)
    for ids, positions, _ in prefill_chunks([tokens], CHUNK, capacity):
        count = int(np.count_nonzero(positions[0] < capacity))  # padding comes last
        found = _in_chunk(model, banks, experts, ids[:, :count], positions[:, :count], capacity, caches)
        if found is not None:
            return found
    return None


def _in_chunk(model, banks, experts, ids: np.ndarray, positions: np.ndarray, capacity: int, caches) -> str | None:
    places = model.rotary.places(positions, capacity)
    h = model.embed(ids)
    if not _fine(h):
        return "the token table"
    for index, (layer, cache) in enumerate(zip(model.layers, caches, strict=True)):
        if layer.moe_layer is None:
            h = layer.attend(h, cache, places)
            h = h + layer.shared(layer.ffn_input(h)).view(h.shape)
            if not _fine(h):
                return f"layer {index}"
            continue
        h, routed = model.front(layer, h, cache, places, 0)
        if not _fine(h):
            return f"layer {index}, in its attention"
        if not _fine(routed.x) or not _fine(routed.packed):
            return f"layer {index}, in its norm or router"
        part = layer.shared(routed.x)
        if part is not None:
            h = h + part.view(h.shape)
            if not _fine(h):
                return f"layer {index}, in its shared experts"
        part, expert = _experts(model, banks[layer.moe_layer], experts, routed)
        if expert is not None:
            return f"layer {index}, in its expert {expert}"
        h = h + part.to(h.device).view(h.shape)
    return None if _fine(model.logits(h, None)) else "the last norm or the head"


def _experts(model: TorchModel, bank: Bank, experts: Experts, routed: Routed) -> tuple[Tensor, int | None]:
    """The sum of a layer's routed experts [N, D], or the first expert that has numbers which are none."""
    top_k, packed, x = model.router.top_k, routed.packed.cpu().numpy(), routed.x.cpu()
    ids, weights = packed[:, :top_k].astype(np.int64), packed[:, top_k : 2 * top_k]
    out = torch.zeros(x.shape, dtype=torch.float32)
    for expert in np.unique(ids).tolist():
        rows, choice = np.nonzero(ids == expert)
        experts(Work(bank, [expert], x, [rows], [weights[rows, choice]]), out)
        if not _fine(out):
            return out, expert
    return out, None


def _fine(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all())
