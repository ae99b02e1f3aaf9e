"""Random weights for a configuration at its real size, made shard by shard as they are read.

Nothing the size of a model exists.

For timing, and for trying a model that is not at hand. Spreads are such that activations stay finite through any number
of layers and greedy tokens are no near-ties: a matrix with K inputs has standard deviation K^-1/2, routers and the head
a few times that, norms are near 1. Quantised experts are not rounded from floats: their codes are random bytes, their
scales random numbers around the one that gives that deviation, of either sign, since the codes' own mean is not zero.

The same seed gives the same weights. Each block of rows has a generator of its own, so that reading may start anywhere.
"""

from __future__ import annotations

import dataclasses
import zlib
from pathlib import Path

import numpy as np

from hybrimoe_jax.checkpoint.hugging_face import dense_shapes, layer_of, shard_name
from hybrimoe_jax.checkpoint.weights import Experts, ListedExperts, PackedExperts, Shard, Weights, row_block
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.files import read_json
from hybrimoe_jax.formats.layout import PANEL, ExpertLayout, Format, MatrixLayout, PackedExpert
from hybrimoe_jax.formats.plain import BF16, F32, aligned_empty
from hybrimoe_jax.models.config import ModelConfig
from hybrimoe_jax.models.registry import parse_config

ROUTER_SPREAD, HEAD_SPREAD = 3.0, 5.0
"""Standard deviations of router and output logits for an input of unit variance."""
SCALE_SPREAD = 0.25
"""Scales lie between 1 - this and 1 + this times their mean."""


@dataclasses.dataclass(frozen=True)
class RandomTensor:
    """Uniform numbers of a given mean and standard deviation.

    The generator of a block of rows depends on `key` and its first row.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    mean: float
    std: float
    key: tuple[int, ...]

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        stop = self.shape[0] if stop is None else stop
        step = row_block(self.shape, F32)
        parts = []
        for block in range(start // step * step, stop, step):
            rows = min(step, self.shape[0] - block)
            half = np.float32(3**0.5 * self.std)
            drawn = generator(*self.key, block).random((rows, *self.shape[1:]), np.float32)
            drawn *= 2 * half
            drawn += np.float32(self.mean) - half
            parts.append(drawn[max(0, start - block) : stop - block].astype(self.dtype, copy=False))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def generator(*key: int) -> np.random.Generator:
    """SFC64, the fastest of NumPy's: 1.5 GB/s of bytes on one core here."""
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence(key)))


def random_weights(source: str | Path, fmt: str | None = None, seed: int = 0) -> Weights:
    """Weights of the model that a `config.json` (or the folder it lies in) describes.

    Args:
      fmt: a quantised format makes the routed experts in it; any other leaves them plain.

    Dense tensors are bfloat16 where the configuration says so, else float32. Raises UserError for a file that
    is no configuration of a supported model.
    """
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: not a JSON object")
    config = parse_config(raw)
    dtype = BF16 if (raw.get("dtype") or raw.get("torch_dtype")) == "bfloat16" else F32
    layout = None
    if fmt not in (None, "f32", "bf16"):
        layout = ExpertLayout(Format.parse(fmt), config.hidden_size, config.moe_width)
    names: dict[int | None, dict[str, RandomTensor]] = {None: {}}
    names |= {layer: {} for layer in range(config.num_hidden_layers)}
    for name, shape in dense_shapes(config).items():
        names[layer_of(name)][name] = _dense(name, shape, dtype, seed)
    shards = tuple(
        Shard(shard_name(layer), layer, tensors, _experts(config, layer, dtype, layout, seed))
        for layer, tensors in names.items()
    )
    return Weights(config, raw, shards, seed=seed)


def _dense(name: str, shape: tuple[int, ...], dtype: np.dtype, seed: int) -> RandomTensor:
    mean, std = 0.0, shape[-1] ** -0.5
    if len(shape) == 1:
        mean, std = (1.0, 0.1) if "norm" in name else (0.0, 0.05)
    elif name.endswith("embed_tokens.weight"):
        std = 1.0
    elif name == "lm_head.weight":
        std *= HEAD_SPREAD
    elif name.endswith(".gate.weight"):
        std *= ROUTER_SPREAD
    return RandomTensor(shape, dtype, mean, std, (seed, zlib.crc32(name.encode())))


def _experts(
    config: ModelConfig, layer: int | None, dtype: np.dtype, layout: ExpertLayout | None, seed: int
) -> Experts | None:
    if layer not in config.moe_layers:
        return None
    count, width, hidden = config.num_experts, config.hidden_size, config.moe_width
    if layout is not None:
        return PackedExperts(count, layout, lambda expert: random_packed(layout, (seed, layer, expert)))

    def matrix(expert: int, part: int) -> RandomTensor:
        shape = (width, hidden) if part == 2 else (hidden, width)
        return RandomTensor(shape, dtype, 0.0, shape[1] ** -0.5, (seed, layer, expert, part))

    return ListedExperts(tuple((matrix(e, 0), matrix(e, 1), matrix(e, 2)) for e in range(count)))


def random_packed(layout: ExpertLayout, key: tuple[int, ...]) -> PackedExpert:
    """A quantised expert whose weights have standard deviation (inputs)^-1/2."""
    rng = generator(*key)
    expert = PackedExpert(aligned_empty(layout.nbytes, np.uint8), layout)
    for matrix in expert.matrices:
        _fill(matrix.data, matrix.layout, rng)
    return expert


def _fill(data: np.ndarray, layout: MatrixLayout, rng: np.random.Generator) -> None:
    format, size = layout.format, layout.codes_nbytes
    codes = data[:size]
    codes.view(np.uint64)[:] = rng.integers(
        0, 2**64, size // 8, np.uint64
    )  # a row of codes is 16 bytes at least, a panel 128
    if format.bits == 8:  # -128 is no code
        np.maximum(codes.view(np.int8), -127, out=codes.view(np.int8))
    data[size:] = 0
    shape = (layout.panels, layout.groups, PANEL)
    # Codes are uniform over 2^bits steps, and the scales' own spread adds to their variance.
    step = layout.columns**-0.5 / ((4**format.bits / 12) * (1 + SCALE_SPREAD**2 / 3)) ** 0.5
    scales = rng.uniform(step * (1 - SCALE_SPREAD), step * (1 + SCALE_SPREAD), shape)
    scales *= rng.integers(0, 2, shape) * 2 - 1
    last = layout.rows - (layout.panels - 1) * PANEL
    scales[-1, :, last:] = 0  # rows that only fill up the last panel
    stored = scales.astype(format.scale_dtype)
    data[layout.scales_at :][: stored.nbytes] = stored.reshape(-1).view(np.uint8)
    if format.zeros:
        zeros = rng.integers(7, 9, shape, dtype=np.uint8)
        zeros[-1, :, last:] = 0
        data[layout.zeros_at :][: zeros.size] = zeros.reshape(-1)
