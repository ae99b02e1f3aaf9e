"""The dense part of a model on the device.

It is split once into static graphs and flat parameters; the programs call it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrimoe_jax.checkpoint.dense import is_projection
from hybrimoe_jax.engine.programs import Device, LayerPrograms, layer_programs
from hybrimoe_jax.formats.packing import PackedMatrix
from hybrimoe_jax.formats.plain import BF16, F32, Arena, aligned_copy
from hybrimoe_jax.models.parameters import split
from hybrimoe_jax.models.products import LARGE
from hybrimoe_jax.models.registry import build_model

TABLE = "model.embed_tokens.weight"


@dataclasses.dataclass
class DeviceLayer:
    """One decoder layer. `moe_layer` counts MoE layers only; None for a dense one."""

    moe_layer: int | None
    graphdef: object
    params: dict[str, jax.Array | PackedMatrix]
    programs: LayerPrograms
    cache_shapes: Callable[[int, int], dict[str, tuple[int, ...]]]


class DeviceModel:
    """A model's dense part on the device.

    Args: config, and every dense weight by its checkpoint name (numpy, float32 or bfloat16, or a PackedMatrix; one that
    is only described stays so, for programs that are compiled and not run);
    `native`: whether the programs that will read them may call the native kernels.

    On the CPU backend weights are widened to float32, since XLA:CPU converts bfloat16 weights at every call (0.9 GB/s
    measured); but with `native` the large matrices stay bfloat16 (`stays_narrow`).
    `own_norm`: routers of later layers read this layer's router input, instead of its residual stream through their
    own norms. `device_kernel`: "xla" or "cuda". `sends_input`: a layer's routing is read together with its input.
    """

    own_norm = sends_input = False
    device_kernel = "xla"

    def __init__(self, config, dense: Mapping[str, Any], device: Device, native: bool = False):
        self.config, self.device = config, device
        model = build_model(config)
        self.eps = config.rms_norm_eps

        arena = Arena() if device.platform == "cpu" else None  # XLA's CPU backend takes aligned memory as it is

        def put(name: str) -> Any:
            # A copy, so that no device array aliases (and keeps alive) the loader's memory.
            array = dense[name]
            if isinstance(array, jax.ShapeDtypeStruct):
                return array
            if isinstance(array, PackedMatrix):
                array = dataclasses.replace(array, data=aligned_copy(array.data, arena=arena))
            elif arena:
                array = aligned_copy(array, None if native and stays_narrow(name, array) else F32, arena)
            return jax.device_put(array, device)

        self.table = put(TABLE)
        self.norm = put("model.norm.weight")
        self.head = self.table if config.tie_word_embeddings else put("lm_head.weight")
        self.layers: list[DeviceLayer] = []
        self._own_routers: list[tuple] = []
        moe_layer = 0
        for index, layer in enumerate(model.model.layers):
            graphdef, abstract = split(layer)
            params = {name: put(f"model.layers.{index}.{name}") for name in abstract}
            if layer.is_moe:
                gate = params[f"{layer.mlp_name}.gate.weight"]
                self._own_routers.append((params["post_attention_layernorm.weight"], gate))
            has_shared = layer.is_moe and any("shared" in name for name in params)
            self.layers.append(
                DeviceLayer(
                    moe_layer if layer.is_moe else None,
                    graphdef,
                    params,
                    layer_programs(graphdef, has_shared),
                    layer.self_attn.cache_shapes,
                )
            )
            moe_layer += layer.is_moe
        self.moe_layers = [layer for layer in self.layers if layer.moe_layer is not None]
        self._routers: dict[int, list[tuple]] = {}

    @property
    def nbytes(self) -> int:
        arrays = {id(a): a for layer in self.layers for a in layer.params.values()}
        arrays |= {id(a): a for a in (self.table, self.norm, self.head)}
        return sum(a.nbytes for a in arrays.values())

    def cache_bytes(self, batch: int, capacity: int) -> int:
        """Bytes of the KV (or latent) cache of all layers, float32 on the CPU backend."""
        return sum(
            int(np.prod(shape)) * self.cache_dtype.itemsize
            for layer in self.layers
            for shape in layer.cache_shapes(batch, capacity).values()
        )

    @property
    def cache_dtype(self) -> np.dtype:
        return np.dtype(np.float32) if self.device.platform == "cpu" else np.dtype(self.table.dtype)

    def init_cache(self, batch: int, capacity: int) -> list[dict[str, jax.Array]]:
        shapes = tuple(tuple(layer.cache_shapes(batch, capacity).items()) for layer in self.layers)
        return jax.device_put(_empty_caches(shapes, self.cache_dtype), self.device)

    def lookahead_routers(self, moe_layer: int, distance: int) -> tuple[tuple[jax.Array, jax.Array], ...]:
        """(norm, gate) of the MoE layers moe_layer+1 .. moe_layer+distance.

        Past the end the last layer stands in, so that every layer runs the same executable; predictors ignore those.
        """
        if distance not in self._routers:
            routers, last = self._own_routers, len(self.moe_layers) - 1
            self._routers[distance] = [
                tuple(
                    (routers[layer][0] if self.own_norm else norm, gate)
                    for norm, gate in (routers[min(layer + d, last)] for d in range(1, distance + 1))
                )
                for layer in range(last + 1)
            ]
        return self._routers[distance][moe_layer]


def stays_narrow(name: str, array: np.ndarray) -> bool:
    """Whether a dense weight is a large bfloat16 matrix that needs no other form.

    It is only multiplied with, through `products`, or looked up by row.
    """
    read = name == TABLE or is_projection(name, array.shape)
    return read and array.dtype == BF16 and array.size >= LARGE


@functools.partial(jax.jit, static_argnums=(0, 1))
def _empty_caches(shapes, dtype) -> list[dict[str, jax.Array]]:
    """Zeros in one call: an array at a time they took 6 ms of a short prompt's 30."""
    return [{name: jnp.zeros(shape, dtype) for name, shape in layer} for layer in shapes]
