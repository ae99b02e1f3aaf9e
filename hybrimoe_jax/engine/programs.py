"""The jitted pieces of a step. Few executables: one per (layer kind, token bucket, slot count), shared by all engines.

Shapes: B batch, T tokens a row, N = B*T, D model width, E experts, k experts per token, n slots in a call, C gathered
rows. The residual stream between layers is kept in parts `(h, acc, host)`: the stream before the MoE, the device's
part [N, D] and the host's part [N, D]; the next program adds them up, so that combining costs no call of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hybrimoe_jax.engine.finite import NO_TOKEN
from hybrimoe_jax.engine.inputs import bucket
from hybrimoe_jax.engine.lanes.pacing import NO_PACING, NoPacing
from hybrimoe_jax.host_kernels.native.pace import begin, end
from hybrimoe_jax.models.layers import rms_norm
from hybrimoe_jax.models.moe import add_experts, expert_forward, native_for
from hybrimoe_jax.models.parameters import merge
from hybrimoe_jax.models.products import native_here, on_native_kernels, product

Device = Any
"""`jax.Device`, which jax's own types know as a variable only."""
SLOTS_PER_CALL = 4
DENSE_ROWS = 8
"""Up to this many rows an expert is computed for every row (weight zero where it was not chosen): decode is bound by
reading the weights, and a gather would cost a call's worth of time. The native kernels, which skip such rows, take any
number (1.1 to 3.8 times faster than a call an expert, prompts of 64 to 512 tokens)."""

_PROGRAMS: list = []


def program(function, **options):
    """`function` jitted, as a part of an engine's step."""

    @functools.wraps(function)
    def traced(*args, **kwargs):
        with on_native_kernels():
            return function(*args, **kwargs)

    jitted = jax.jit(traced, **options)
    _PROGRAMS.append(jitted)
    return jitted


class Routed(NamedTuple):
    """A MoE layer's input on the device: x [N, D], and who computes it: ids [N, k] int32, weights [N, k]."""

    x: jax.Array
    ids: jax.Array
    weights: jax.Array


class LayerPrograms(NamedTuple):
    """The jitted pieces of one kind of layer.

    front(params, lookahead, h, acc, host, cache, positions, span, whole, pace) -> (h, routed, cache, packed) for a MoE
      layer, with packed [N, 2k + E * (1 + distances)]: ids, weights, scores, then each distance's scores (one array, so
      one read-back); where `whole` (static), [N, D + ...], x first;
    shared(params, x, pace) -> [N, D]; None where the family has no shared experts;
    dense(params, h, acc, host, cache, positions, span) -> (h, cache) for a layer without experts.

    `span` (static) bounds the cache that attention reads: a power of two past the last position. `pace`: how long the
    program must last, see `lanes.pacing`; None: as long as it takes.
    """

    front: Callable
    shared: Callable | None
    dense: Callable


def _join(h, acc, host):
    return h + (acc + host).reshape(h.shape)


def router_scores(h: jax.Array, norm: jax.Array, gate: jax.Array, eps: float) -> jax.Array:
    """Router reuse: a later layer's own norm and router applied to this residual stream [B, T, D] -> [N, E]."""
    x = rms_norm(h, norm, eps).reshape(-1, h.shape[-1])
    return jax.nn.softmax(product(x, gate), axis=-1)


@functools.cache
def layer_programs(graphdef, has_shared: bool) -> LayerPrograms:
    """Programs of every layer whose static part equals `graphdef`."""

    def front(params, lookahead, h, acc, host, cache, positions, span, whole=False, pace=None):
        with jax.named_scope("route"):
            layer = merge(graphdef, params)
            h, cache = layer.attend(begin(_join(h, acc, host), pace), cache, positions, span)
            x = layer.ffn_input(h)
            routing = layer.ffn.route(x)
            eps = layer.post_attention_layernorm.eps
            ahead = [router_scores(h, norm, gate, eps) for norm, gate in lookahead]
            packed = [routing.ids.astype(jnp.float32), routing.weights, routing.scores, *ahead]
            packed = jnp.concatenate([x, *packed] if whole else packed, axis=-1)
            return h, Routed(x, routing.ids, routing.weights), cache, end(packed, pace)

    def shared(params, x, pace=None):
        with jax.named_scope("shared"):
            return end(merge(graphdef, params).ffn.shared(begin(x, pace)), pace)

    def dense(params, h, acc, host, cache, positions, span):
        with jax.named_scope("dense_layer"):
            layer = merge(graphdef, params)
            h, cache = layer.attend(_join(h, acc, host), cache, positions, span)
            return h + layer.ffn(layer.ffn_input(h)).reshape(h.shape), cache

    return LayerPrograms(
        program(front, donate_argnums=5, static_argnums=(7, 8)),
        program(shared) if has_shared else None,
        program(dense, donate_argnums=4, static_argnums=6),
    )


def _embed(table, ids, pace=None):
    """[B, T, D]. `pace`: of all that a step does outside its MoE layers."""
    return end(begin(table[ids].astype(jnp.float32), pace), pace)


def _last_logits(norm, head, h, acc, host, last, eps):
    """Logits [B, V] of each row's token `last` [B]."""
    h = _join(h, acc, host)[jnp.arange(h.shape[0]), last]
    return product(rms_norm(h, norm, eps), head)


def _last_token(norm, head, h, acc, host, last, eps):
    """The likeliest token [B] int32 after each row's token `last` [B]; NO_TOKEN where logits are not finite."""
    logits = _last_logits(norm, head, h, acc, host, last, eps)
    return jnp.where(jnp.isfinite(logits).all(axis=-1), jnp.argmax(logits, axis=-1), NO_TOKEN).astype(jnp.int32)


def _all_logits(norm, head, h, acc, host, eps):
    return product(rms_norm(_join(h, acc, host), norm, eps), head)


def _dense_rows(acc, x, weights, *slots, kernel="xla", pace=None):
    """`acc` [N, D] + sum over the given slots of weights [n, N] times the expert of every row."""
    with jax.named_scope("device_experts"):
        return end(add_experts(acc, begin(x, pace), weights, *slots, kernel=kernel), pace)


def _gathered_rows(acc, x, rows, weights, slot, kernel="xla", pace=None):
    """`acc` [N, D] with one expert added for the rows [C] routed to it (padding: row 0 with weight 0)."""
    with jax.named_scope("device_experts"):
        x = begin(x, pace)
        return end(acc.at[rows].add(weights[:, None] * expert_forward(slot, x[rows], kernel)), pace)


embed = program(_embed)
last_logits = program(_last_logits, static_argnames="eps")
last_token = program(_last_token, static_argnames="eps")
all_logits = program(_all_logits, static_argnames="eps")
dense_rows = program(_dense_rows, static_argnames="kernel")
gathered_rows = program(_gathered_rows, static_argnames="kernel")


def runs(slot, kernel: str) -> str:
    """What computes an expert in such a slot for few tokens where `kernel` is asked for.

    That one, `xla`, or `native` in its place.
    """
    return "native" if kernel == "xla" and native_here() and native_for(slot) else kernel


def add_device_experts(acc, x, experts, rows_of, weights_of, kernel="xla", pacing: NoPacing = NO_PACING):
    """Adds device experts to acc [N, D], asynchronously.

    Args:
      experts: list of (expert id, its slot: (gate_up, down) or a PackedExpert).
      rows_of, weights_of: per expert id, the rows [load] routed to it and their weights [load] (numpy).
      kernel: an `EngineConfig.device_kernel`.
      pacing: how long they must last.
    """
    rows_in_call = x.shape[0]
    few = rows_in_call <= DENSE_ROWS
    if few or (experts and runs(experts[0][1], kernel) == "native"):
        for start in range(0, len(experts), SLOTS_PER_CALL):
            part = experts[start : start + SLOTS_PER_CALL]
            slots = [slot for _, slot in part]
            if not few:  # one executable for any number of experts: the last one again, for no row
                slots += slots[-1:] * (SLOTS_PER_CALL - len(slots))
            weights = np.zeros((len(slots), rows_in_call), np.float32)
            for i, (expert, _) in enumerate(part):
                weights[i, rows_of[expert]] = weights_of[expert]
            pace = pacing.experts([len(rows_of[expert]) for expert, _ in part])
            acc = dense_rows(acc, x, weights, *slots, kernel=kernel, pace=pace)
        return acc
    for expert, slot in experts:
        rows, weights = padded_rows(rows_of[expert], weights_of[expert], rows_in_call)
        pace = pacing.experts([len(rows_of[expert])])
        acc = gathered_rows(acc, x, rows, weights, slot, kernel=kernel, pace=pace)
    return acc


def padded_rows(rows: np.ndarray, weights: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """An expert's rows and their weights, filled up to a power of two, or to `most`, with row 0 at weight 0."""
    load = len(rows)
    size = min(bucket(load, 8), most)
    filled, mix = np.zeros(size, np.int32), np.zeros(size, np.float32)
    filled[:load], mix[:load] = rows, weights
    return filled, mix
