"""The dense model, the oracle: every expert on the device, one program a step."""

from __future__ import annotations

import jax
import numpy as np

from hybrimoe_jax.decide.systems import get_system
from hybrimoe_jax.engine import budget
from hybrimoe_jax.engine.checks import device_format
from hybrimoe_jax.engine.config import EngineConfig
from hybrimoe_jax.engine.device_model import DeviceModel
from hybrimoe_jax.engine.lanes.clock import WallClock
from hybrimoe_jax.engine.lanes.host_memory import parts_of
from hybrimoe_jax.engine.lanes.threads import ThreadBudget
from hybrimoe_jax.engine.parts import Parts
from hybrimoe_jax.engine.programs import Device
from hybrimoe_jax.engine.step import DenseForward
from hybrimoe_jax.formats.plain import to_f32
from hybrimoe_jax.models.parameters import split
from hybrimoe_jax.models.registry import build_model


def dense_parts(
    model: DeviceModel, store, options: EngineConfig, device: Device, cores: ThreadBudget, max_context: int
) -> Parts:
    """The parts of an engine without slots, lanes and planner. Args as of `assembly.assemble`."""
    config, clock = model.config, WallClock()
    graphdef, abstract = split(build_model(config))
    flat = {"model.embed_tokens.weight": model.table, "model.norm.weight": model.norm, "lm_head.weight": model.head}
    for index, layer in enumerate(model.layers):
        flat |= {f"model.layers.{index}.{name}": array for name, array in layer.params.items()}
    weights, on_device = [], device_format(store.format, device.platform, options, model.config)
    for layer in model.layers:
        if layer.moe_layer is None:
            weights.append(None)
            continue
        experts = [store.get(layer.moe_layer, expert) for expert in range(config.num_experts)]
        stacked = jax.tree.map(lambda *parts: np.stack(parts), *map(parts_of, experts))
        if on_device == "f32":
            stacked = jax.tree.map(to_f32, stacked)
        weights.append(jax.device_put(stacked, device))
    held = sum(a.nbytes for a in jax.tree.leaves(weights))
    return Parts(
        options=options,
        system=get_system(options.system),
        device=device,
        model=model,
        forward=DenseForward(graphdef, {name: flat[name] for name in abstract}, weights, clock),
        clock=clock,
        footprint=budget.Footprint(model.nbytes, model.cache_bytes(1, max_context), 0, 0, held),
        cores=cores,
        expert_format=on_device,
        device_kernel="xla",
        slots=[config.num_experts] * len(model.moe_layers),
    )
