"""Experts rounded with a text in hand.

The float model is run over it layer by layer, and each expert's rounding errors are compensated for the inputs that its
tokens gave it (`formats.gptq`).

Nothing the size of a model exists. The residual stream of all calibration tokens is carried from layer to layer in
float32 (three arrays of tokens x width), one layer's dense weights and one expert are in memory at a time. Layers must
be asked for in order, which is how a conversion walks them; experts of a layer that nobody asked for (a resumed
conversion has them already) are only run.

What an expert sees is H = sum over its tokens of (w x)(w x)^T, w being the weight its output is multiplied with, so
that errors count as much as they reach the residual stream. An expert of few tokens, or none, must not follow these
alone: H also gets `PRIOR` * K tokens' worth of the layer's average, K being the number of inputs. The same holds for
down, whose inputs are those that the rounded gate and up give.

Shapes: N calibration tokens, D model width, F expert width, E experts, k experts per token.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from hybrimoe_jax.checkpoint.weights import Experts, PackedExperts, Shard, Weights
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats.gptq import compensated
from hybrimoe_jax.formats.packing import ExpertLayout, Format, PackedExpert, dequantise, pack
from hybrimoe_jax.formats.plain import aligned_empty, is_finite
from hybrimoe_jax.models.decoder import CausalLM
from hybrimoe_jax.models.parameters import merge, split
from hybrimoe_jax.models.registry import build_model
from hybrimoe_jax.models.target import default_device

WINDOW, TOKENS, LEAST = 512, 32768, 64
"""Tokens of a window, at most of all windows, and at least."""
PRIOR = 0.1
ROWS = 2048  # tokens to a call


def windows(ids: Sequence[int], longest: int) -> np.ndarray:
    """Token ids of the text [n] -> windows [W, T], spread over the text.

    As many as are filled, and no more than `TOKENS` tokens in all.

    Raises UserError for a text too short to say anything.
    """
    length = min(WINDOW, longest, len(ids))
    if length < min(LEAST, longest):
        raise UserError(f"the calibration text has {len(ids)} tokens; give at least {LEAST}, better some thousands")
    starts = np.arange(len(ids) // length) * length
    if len(starts) > TOKENS // length:
        starts = starts[np.linspace(0, len(starts) - 1, max(1, TOKENS // length)).astype(int)]
    return np.asarray(ids, np.int32)[starts[:, None] + np.arange(length)]


def calibrated(weights: Weights, format: Format, ids: np.ndarray) -> Weights:
    """The model with its routed experts rounded to `format` by what they do on the windows `ids` [W, T].

    Experts must be asked for layer by layer. `calibration` of the result identifies the windows.
    """
    if any(isinstance(shard.experts, PackedExperts) for shard in weights.shards):
        raise ValueError("experts that are quantised already cannot be calibrated")
    default_device()
    run = _Run(weights, format, ids)
    layout = ExpertLayout(format, weights.config.hidden_size, weights.config.moe_width)

    def rounded(shard: Shard) -> Shard:
        if shard.experts is None or shard.layer is None:
            return shard
        packed = PackedExperts(shard.experts.count, layout, functools.partial(run.packed, shard.layer))
        return dataclasses.replace(shard, experts=packed)

    mark = hashlib.blake2b(np.ascontiguousarray(ids).tobytes(), digest_size=16).hexdigest()
    return dataclasses.replace(weights, shards=tuple(map(rounded, weights.shards)), calibration=mark)


@dataclasses.dataclass
class _Layer:
    """A MoE layer under way: router inputs x [N, D], chosen ids and weights [N, k], the routed sum y [N, D] so far."""

    index: int
    experts: Experts
    x: np.ndarray
    ids: np.ndarray
    weights: np.ndarray
    y: np.ndarray
    run: set[int] = dataclasses.field(default_factory=set)

    @functools.cached_property
    def average(self) -> np.ndarray:
        """The mean over all tokens of x x^T, [D, D]."""
        return self.x.T @ self.x / len(self.x)

    @functools.cached_property
    def strength(self) -> float:
        """The mean square of the weights that outputs are multiplied with."""
        return float(np.mean(np.square(self.weights)))

    def compute(self, expert: int, matrices: tuple[np.ndarray, ...]) -> None:
        """Adds an expert's float output to `y`, once."""
        if expert in self.run:
            return
        self.run.add(expert)
        rows, choice = np.nonzero(self.ids == expert)
        gate, up, down = matrices
        inner = _inner(self.x[rows], gate, up)
        self.y[rows] += self.weights[rows, choice][:, None] * (inner @ down.T)

    def finish(self) -> None:
        for expert in range(self.experts.count):
            if expert not in self.run:
                self.compute(expert, _floats(self.experts, expert))


class _Run:
    """The float model on its way through the layers."""

    def __init__(self, weights: Weights, format: Format, ids: np.ndarray):
        self.shards = {shard.layer: shard for shard in weights.shards}
        self.format, self.ids, self.config = format, ids, weights.config
        self.model = build_model(weights.config)
        self.next, self.layer = 0, None

    @functools.cached_property
    def stream(self) -> np.ndarray:
        """The residual stream [W, T, D], before layer 0 the rows of the token table."""
        table = self.shards[None].dense["model.embed_tokens.weight"]
        used, places = np.unique(self.ids, return_inverse=True)
        rows = np.stack([table.read(int(i), int(i) + 1)[0] for i in used]).astype(np.float32)
        return rows[places].reshape(*self.ids.shape, -1)

    def packed(self, layer: int, expert: int) -> PackedExpert:
        """One expert of a layer, rounded."""
        current = self._at(layer)
        matrices = gate, up, down = _floats(current.experts, expert)
        current.compute(expert, matrices)
        rows, choice = np.nonzero(current.ids == expert)
        weight = current.weights[rows, choice][:, None]
        layout = ExpertLayout(self.format, *down.shape)
        out = PackedExpert(aligned_empty(layout.nbytes, np.uint8), layout)
        x = current.x[rows]
        seen = _hessian(x * weight, current.average, current.strength)
        places = out.matrices
        codes, scales, zeros = compensated(np.concatenate([gate, up]), seen, self.format)
        cut = len(gate)
        for half, place in ((slice(None, cut), places[0]), (slice(cut, None), places[1])):
            pack(self.format, codes[half], scales[half], None if zeros is None else zeros[half], out=place.data)
        gate, up = dequantise(places[0]), dequantise(places[1])
        sample = _inner(current.x[:: max(1, len(current.x) // down.shape[1])], gate, up)
        average = sample.T @ sample / len(sample)
        seen = _hessian(_inner(x, gate, up) * weight, average, current.strength)
        pack(self.format, *compensated(down, seen, self.format), out=places[2].data)
        return out

    def _at(self, layer: int) -> _Layer:
        """The layer, its router applied; the ones before it are run."""
        if self.layer is not None and self.layer.index == layer:
            return self.layer
        if layer < self.next:
            raise ValueError(f"layer {layer} was asked for after layer {self.next - 1}")
        while self.next <= layer:
            self._leave()
            self.layer = self._enter(self.next)
            self.next += 1
        if self.layer is None:
            raise ValueError(f"layer {layer} has no routed experts")
        return self.layer

    def _leave(self) -> None:
        """Adds what the current MoE layer's experts gave to the residual stream."""
        if self.layer is not None:
            self.layer.finish()
            self.stream += self.layer.y.reshape(self.stream.shape)

    def _enter(self, index: int) -> _Layer | None:
        """Attention and router of layer `index`, or all of it where it is dense (None), window by window."""
        shard = self.shards[index]
        prefix = f"model.layers.{index}."
        graph, _ = split(self.model.model.layers[index])
        params = {n.removeprefix(prefix): jnp.asarray(t.read(), jnp.float32) for n, t in shard.dense.items()}
        capacity = self.ids.shape[1]
        forward = _forward(graph, capacity)
        step = max(1, ROWS // capacity)
        parts = []
        for start in range(0, len(self.stream), step):
            block = self.stream[start : start + step]
            filled = len(block)
            if filled < step:  # one shape, one compilation
                block = np.concatenate([block, np.zeros((step - filled, *block.shape[1:]), np.float32)])
            stream, *routed = jax.device_get(forward(params, block, _empty_cache(self.model, index, step, capacity)))
            self.stream[start : start + step] = stream[:filled]
            parts.append([part.reshape(step, capacity, -1)[:filled].reshape(filled * capacity, -1) for part in routed])
        if shard.experts is None:
            return None
        x, ids, weights = (np.concatenate(part) for part in zip(*parts, strict=True))
        if not is_finite(x):
            raise UserError(f"layer {index} gets NaN or infinite inputs on the calibration text: weights are damaged")
        return _Layer(index, shard.experts, x, ids, weights, np.zeros_like(x))


def _empty_cache(model: CausalLM, index: int, batch: int, capacity: int) -> dict[str, jax.Array]:
    shapes = model.model.layers[index].self_attn.cache_shapes(batch, capacity)
    return {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}


@functools.lru_cache(maxsize=8)
def _forward(graph, capacity: int):
    """-> jitted (params, h [B, T, D], cache) -> the stream after attention and all that is not routed.

    Where the layer has routed experts, also x [N, D], ids [N, k] and weights [N, k].
    """

    @jax.jit
    def forward(params, h, cache):
        layer = merge(graph, params)
        positions = jnp.broadcast_to(jnp.arange(capacity), h.shape[:2])
        h, _ = layer.attend(h, cache, positions, capacity)
        x = layer.ffn_input(h)
        if not layer.is_moe:
            return (h + layer.ffn(x).reshape(h.shape),)
        routing, shared = layer.ffn.route(x), layer.ffn.shared(x)
        if shared is not None:
            h = h + shared.reshape(h.shape)
        return h, x, routing.ids, routing.weights

    return forward


def _hessian(inputs: np.ndarray, average: np.ndarray, strength: float) -> np.ndarray:
    """Of an expert's inputs [n, K], with the layer's average as if it had seen some tokens more."""
    more = PRIOR * inputs.shape[1]
    return (inputs.T @ inputs + more * strength * average) / (len(inputs) + more)


def _inner(x: np.ndarray, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """silu(gate x) * (up x), [n, F]."""
    g = x @ gate.T
    with np.errstate(over="ignore"):  # exp(-g) of a very negative g: g / inf is 0, as it should be
        return g / (1 + np.exp(-g)) * (x @ up.T)


def _floats(experts: Experts, expert: int) -> tuple[np.ndarray, ...]:
    return tuple(np.asarray(matrix, np.float32) for matrix in experts.read(expert))
