"""Numbers that are none in a model's answers: noticed at once, and then looked for layer by layer.

A step looks at two numbers of its logits, and at one of each router's probabilities: a softmax of anything that is not
finite is NaN throughout. Only where one is not finite a second pass, which no cache, slot or planner takes part in,
runs the sequence again and looks at everything.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from hybrimoe_jax.checkpoint.expert_store import ExpertStore
from hybrimoe_jax.engine import programs
from hybrimoe_jax.engine.device_model import DeviceLayer, DeviceModel
from hybrimoe_jax.engine.finite import CHUNK
from hybrimoe_jax.engine.generation import capacity_for, prefill_chunks
from hybrimoe_jax.engine.inputs import StepInput
from hybrimoe_jax.formats.packing import plain_expert


def first_not_finite(model: DeviceModel, store: ExpertStore, tokens: Sequence[int], context: int) -> str | None:
    """Where NaN or an infinity comes up first while these tokens are read; None if nowhere."""
    capacity = capacity_for([tokens], 0, context)
    caches = model.init_cache(1, capacity)
    for ids, positions, _ in prefill_chunks([tokens], CHUNK, capacity):
        found = _in_chunk(model, store, StepInput(ids, positions, capacity, "prefill", None), caches)
        if found is not None:
            return found
    return None


def _in_chunk(model: DeviceModel, store: ExpertStore, step: StepInput, caches: list) -> str | None:
    count = len(step.valid)

    def fine(array) -> bool:
        return bool(np.isfinite(np.asarray(array, np.float32).reshape(step.ids.size, -1)[:count]).all())

    h = programs.embed(model.table, step.ids)
    if not fine(h):
        return "the token table"
    part = zeros = jnp.zeros((step.ids.size, model.config.hidden_size), jnp.float32)
    for index, layer in enumerate(model.layers):
        given = (h, part, zeros, caches[index], step.positions, step.span)
        if layer.moe_layer is None:
            h, caches[index] = layer.programs.dense(layer.params, *given)
            part = zeros
            if not fine(h):
                return f"layer {index}"
            continue
        h, routed, caches[index], _ = layer.programs.front(layer.params, (), *given)
        if not fine(h):
            return f"layer {index}, in its attention"
        if not fine(routed.x) or not fine(routed.weights):
            return f"layer {index}, in its norm or router"
        part = zeros if layer.programs.shared is None else layer.programs.shared(layer.params, routed.x)
        if not fine(part):
            return f"layer {index}, in its shared experts"
        routed_part, expert = _experts(layer, store, routed, count)
        if expert is not None:
            return f"layer {index}, in its expert {expert}"
        part = part + routed_part
    logits = programs.all_logits(model.norm, model.head, h, part, zeros, eps=model.eps)
    return None if fine(logits) else "the last norm or the head"


def _experts(
    layer: DeviceLayer, store: ExpertStore, routed: programs.Routed, count: int
) -> tuple[np.ndarray, int | None]:
    """The sum of a layer's routed experts [N, D], in NumPy, or the first expert that has numbers which are none."""
    x, ids, weights = (np.asarray(part)[:count] for part in routed)
    out = np.zeros(routed.x.shape, np.float32)
    for expert in np.unique(ids).tolist():
        rows, choice = np.nonzero(ids == expert)
        gate_up, down = (np.asarray(m, np.float32) for m in plain_expert(store.get(layer.moe_layer or 0, expert)))
        with np.errstate(all="ignore"):
            inner = x[rows] @ gate_up.T
            gate, up = np.split(inner, 2, axis=1)
            y = weights[rows, choice][:, None] * ((gate / (1 + np.exp(-gate)) * up) @ down.T)
        if not np.isfinite(y).all():
            return out, expert
        out[rows] += y
    return out, None
