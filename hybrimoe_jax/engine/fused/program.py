"""Decode steps as one jitted program: up to `MAX_STEPS_PER_CALL` of them.

Each takes the likeliest token of the one before.

Handing a program to XLA takes a core for 0.5 ms of a 466 M model's token of 4 ms (2 cores, cold caches), whatever it
does, and as the native kernels use all cores, they lack that one. Measured without planning, programs in turns: two,
four, eight steps a call make a token 1.04, 1.14, 1.18 times as fast in int4 and 0.99, 1.02, 1.08 in float32. One
executable serves any number: unrolled, four steps took 2.6 times as long to compile and ran no faster.

Shapes: S = MAX_STEPS_PER_CALL, L MoE layers, E experts, k experts per token, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hybrimoe_jax.engine.fused.arguments import restore
from hybrimoe_jax.engine.programs import program
from hybrimoe_jax.host_kernels.native.routed import routed
from hybrimoe_jax.models.layers import rms_norm
from hybrimoe_jax.models.parameters import merge
from hybrimoe_jax.models.products import product
from hybrimoe_jax.models.rope import Rope, override

MAX_STEPS_PER_CALL = 8


class StepResults(NamedTuple):
    """What a call gives beside the caches, of which only the first `made` steps mean anything.

    Attributes:
      logits: float32 [S, V].
      packed: float32 [S, L, 2k + E + 1], of each MoE layer its ids, weights, scores, and last the seconds of its
        experts.
      tokens: int32 [S + 2]: the token that comes next, `made`, and the token that each step was given.
    """

    logits: jax.Array
    packed: jax.Array
    tokens: jax.Array


class StepArgs(NamedTuple):
    """What a call is told, as int32 [4].

    The first step's position, how many steps, how many of them whatever their tokens are, and the threads of a layer's
    experts.
    """

    position: int
    steps: int
    min_steps: int
    threads: int


def to_program_layout(embedding: jax.Array) -> jax.Array:
    """An embedding [V, D] as `decode_program` takes it: bfloat16 as its bits, uint16, in the same memory.

    Of a bfloat16 table XLA's CPU backend widens every row before it takes one, and does so once a call, since the table
    does not change in the loop (839 MB of DeepSeek-V2-Lite, 0.4 s).
    """
    if embedding.dtype != jnp.bfloat16:
        return embedding
    return jax.device_put(np.asarray(embedding).view(np.uint16), embedding.device, may_alias=True)


def row_of(embedding: jax.Array, token: jax.Array) -> jax.Array:
    """Its row of a token, float32 [1, D]."""
    row = jax.lax.dynamic_slice_in_dim(embedding, token, 1)
    if row.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(row.astype(jnp.uint32) << 16, jnp.float32)
    return row.astype(jnp.float32)


@functools.cache
def decode_program(layers: tuple, specs: tuple, eps: float, isa: int):
    """The jitted program of a model, with the specs of its parameters.

    `layers`: (graphdef, whether it has experts) of each.

    (parameters, (embedding in program layout, norm, head), table of experts, `StepResults.tokens` of the call before,
    caches (donated), `StepArgs`, tokens that end a sequence int32 [n], span (static)) -> `StepResults`, caches. Such a
    token is given to no step behind the first `min_steps`.
    """
    num_moe = sum(is_moe for _, is_moe in layers)

    def one(params, outer, experts, token, caches, position, threads, span):
        embedding, norm, head = outer
        h = row_of(embedding, token)[None]
        positions = position.reshape(1, 1)
        kept, packed, count = [], [], len(experts) // num_moe
        for index, ((graphdef, is_moe), cache) in enumerate(zip(layers, caches)):
            layer = merge(graphdef, restore(params, index, specs[index]))
            h, cache = layer.attend(h, cache, positions, span)
            kept.append(cache)
            x = layer.ffn_input(h)
            if not is_moe:
                h = h + layer.ffn(x).reshape(h.shape)
                continue
            routing = layer.ffn.route(x)
            y, seconds = routed(x, routing.ids, routing.weights, experts, threads, isa, len(packed) * count, count)
            shared = layer.ffn.shared(x)
            h = h + (y if shared is None else y + shared).reshape(h.shape)
            parts = [routing.ids.astype(jnp.float32), routing.weights, routing.scores, seconds[None]]
            packed.append(jnp.concatenate(parts, axis=-1))
        return product(rms_norm(h[:, -1], norm, eps), head), jnp.concatenate(packed), kept

    def run(params, outer, experts, before, caches, args, stop_ids, span):
        position, steps, min_steps, threads = args

        def step(token, caches, i):
            return one(params, outer, experts, token, caches, position + i, threads, span)

        ropes: dict[Rope, None] = {}

        def note(rope, positions):
            ropes[rope] = None
            return rope.computed(positions)

        with override(note):
            shapes = jax.eval_shape(step, before[0], caches, 0)[:2]
        rotary_tables = {rope: rope.computed(position + jnp.arange(MAX_STEPS_PER_CALL)) for rope in ropes}

        def goes_on(state):
            i, token, *_ = state
            return (i < steps) & ((i < min_steps) | ~jnp.any(token == stop_ids))

        def add(state):
            i, token, given, logits, packed, caches = state

            def look_up(rope, _):
                cos, sin = (jax.lax.dynamic_slice_in_dim(table_of, i, 1)[None] for table_of in rotary_tables[rope])
                return cos, sin

            with override(look_up):
                some_logits, some_packed, caches = step(token, caches, i)
            logits = jax.lax.dynamic_update_slice(logits, some_logits, (i, 0))
            packed = jax.lax.dynamic_update_slice(packed, some_packed[None], (i, 0, 0))
            given = jax.lax.dynamic_update_slice(given, token[None], (i,))
            return i + 1, jnp.argmax(some_logits[0]).astype(jnp.int32), given, logits, packed, caches

        empty = [
            jnp.zeros((MAX_STEPS_PER_CALL, *shape), jnp.float32) for shape in (shapes[0].shape[1:], shapes[1].shape)
        ]
        state = (jnp.int32(0), before[0], jnp.zeros(MAX_STEPS_PER_CALL, jnp.int32), *empty, caches)
        made, token, given, logits, packed, caches = jax.lax.while_loop(goes_on, add, state)
        return logits, packed, jnp.concatenate([jnp.stack([token, made]), given]), caches

    return program(run, donate_argnums=4, static_argnums=7)
