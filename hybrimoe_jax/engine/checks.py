"""What can be refused before weights are read: options that do not fit the model, the machine or each other."""

from __future__ import annotations

import os
import warnings
from typing import NamedTuple

import numpy as np

from hybrimoe_jax.checkpoint.reader import Checkpoint
from hybrimoe_jax.checkpoint.shards import DTYPES
from hybrimoe_jax.decide.prefetch.predictors import RECORDED
from hybrimoe_jax.engine.budget import Footprint, slots_within
from hybrimoe_jax.engine.config import AUTO, EngineConfig
from hybrimoe_jax.engine.device_memory import budget_on
from hybrimoe_jax.engine.device_model import TABLE, stays_narrow
from hybrimoe_jax.engine.programs import Device
from hybrimoe_jax.engine.request import context_limit
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats.layout import is_format
from hybrimoe_jax.formats.packing import Format, MatrixLayout, packed_refusal
from hybrimoe_jax.formats.plain import F32
from hybrimoe_jax.host_kernels import get_kernel
from hybrimoe_jax.host_kernels.native import pace
from hybrimoe_jax.machine.costs import CostModel
from hybrimoe_jax.machine.origin import this_machine
from hybrimoe_jax.machine.profile import MachineCosts, load_costs
from hybrimoe_jax.machine.shapes import ModelShape, parse_cost_shape, shape_of
from hybrimoe_jax.models import moe, packed_cuda
from hybrimoe_jax.models.products import native_here
from hybrimoe_jax.models.registry import build_model
from hybrimoe_jax.models.target import default_device


class Given(NamedTuple):
    """The model whose times and bytes count, its experts' format, and the profile's costs of it, if there is one."""

    shape: ModelShape
    format: str
    costs: CostModel | MachineCosts | None


def check_options(options: EngineConfig, config, held_format: str) -> None:
    """UserError where no engine can be made; what its memory must hold is counted when it is made.

    Args: config: a ModelConfig. held_format: of the routed experts in host memory.
    """
    context_limit(options, config)
    check_precision(options)
    if options.executor == "dense":
        if options.vram_budget is not None:
            raise UserError("the dense executor keeps every expert on the device: it takes no vram_budget")
        return
    if options.paced is not None:
        check_paced(options.device)
    device = default_device()
    on_device = device_format(held_format, device.platform, options, config)
    device_kernel(options.device_kernel, on_device)
    if options.host_kernel == "onednn" and is_format(held_format):
        raise packed_refusal(held_format, options.host_kernel)
    get_kernel(options.host_kernel)
    given_costs(options, config, on_device)
    recording = options.chosen_system.recording
    if recording and not os.path.exists(recording):
        raise UserError(f"predictor {RECORDED}{recording}: there is no such file")


def check_precision(options: EngineConfig) -> None:
    """UserError where products are to be rounded that are not, or that others are compared with."""
    if options.precision == "float32":
        return
    if default_device().platform == "cpu":
        raise UserError(f"precision {options.precision} is for a GPU: the CPU backend multiplies in float32")
    if options.executor == "dense":
        raise UserError(f"the dense executor is the reference: it takes no precision {options.precision}")


def check_budget(options: EngineConfig, checkpoint: Checkpoint) -> None:
    """UserError where a vram_budget does not even hold the dense weights and the cache."""
    device = default_device()
    budget = budget_on(device, options, warn=False)
    if budget is None:
        return
    sizes = dense_bytes(checkpoint, device.platform)
    dtype = F32 if device.platform == "cpu" else DTYPES[_records(checkpoint)[TABLE]["dtype"]]
    kv = cache_bytes(checkpoint.config, options.max_batch, context_limit(options, checkpoint.config), dtype)
    slots_within(budget, Footprint(dense=sum(sizes.values()), kv=kv, staging=0, workspace=0), 1, 0)


def dense_bytes(checkpoint: Checkpoint, platform: str) -> dict[str, int]:
    """Bytes that each dense tensor will have on the device (see `DeviceModel`), by the manifest."""
    sizes = {}
    for name, record in _records(checkpoint).items():
        if "format" in record:
            sizes[name] = MatrixLayout(Format.parse(record["format"]), *record["matrix"]).nbytes
            continue
        stored = np.broadcast_to(np.empty((), DTYPES[record["dtype"]]), record["shape"])  # takes no memory
        narrow = platform != "cpu" or (native_here() and stays_narrow(name, stored))
        sizes[name] = stored.size * (stored.dtype if narrow else F32).itemsize
    return sizes


def cache_bytes(config, batch: int, capacity: int, dtype: np.dtype) -> int:
    """Bytes of the KV (or latent) cache of all layers."""
    shapes = (layer.self_attn.cache_shapes(batch, capacity) for layer in build_model(config).model.layers)
    return sum(int(np.prod(shape)) * dtype.itemsize for layer in shapes for shape in layer.values())


def _records(checkpoint: Checkpoint) -> dict[str, dict]:
    return {name: record for shard in checkpoint.shards.values() for name, record in shard["dense"].items()}


def host_format(stored_format: str, options: EngineConfig) -> str:
    """The format of experts in host memory: the stored one, but float32 for bfloat16 where it must be widened anyway.

    That is on the CPU backend without the native kernels, which alone compute with bfloat16 weights as they lie.
    """
    if default_device().platform != "cpu" or stored_format != "bf16":
        return stored_format
    return "bf16" if native_here() and options.host_kernel in (AUTO, "native") else "f32"


def device_format(held_format: str, platform: str, options: EngineConfig, config) -> str:
    """The format of experts on the device: the host's, but float32 for bfloat16 where XLA:CPU would widen every call.

    The native kernels take bfloat16 in separate slots. Small experts are left to XLA, see `moe.SMALL_BYTES`: prompts of
    512 that fetch each expert of 147 KB took it 0.6 times the CPU time (2 cores, AVX-512).
    """
    if platform != "cpu" or held_format != "bf16":
        return held_format
    for_xla = options.slots == "stacked" or options.paced is not None or options.executor == "dense"
    small = 3 * config.hidden_size * config.moe_width * F32.itemsize < moe.SMALL_BYTES
    return "f32" if for_xla or small or not native_here() else "bf16"


def device_name(device: Device, options: EngineConfig) -> str:
    """What a profile calls it: "cpu" for the CPU backend, else its kind, or which machine's pace it keeps."""
    if options.paced is not None:
        return options.device
    return "cpu" if device.platform == "cpu" else device.device_kind


def given_costs(options: EngineConfig, config, expert_format: str) -> Given:
    """What the options say of costs. The model is the one that runs, or the `cost_shape`."""
    shape, fmt = shape_of(config, config.model_type), expert_format
    if options.cost_shape is not None:
        shape, fmt = parse_cost_shape(options.cost_shape)
    costs, size, paced = options.profile, shape.expert_bytes(fmt), options.paced
    if paced is not None:
        return Given(shape, fmt, load_costs(paced.profile, shape, fmt).slowed(paced.slowdown))
    if costs is None:
        return Given(shape, fmt, None)
    if not isinstance(costs, CostModel):
        here = this_machine(device_name(default_device(), options)) if options.clock == "wall" else None
        costs = load_costs(costs, shape, fmt, here)
    if costs.expert_bytes != size:
        raise UserError(
            f"profile {costs.source}: measured with experts of {costs.expert_bytes} bytes, those of {shape.name} have "
            f"{size}; measure it again with that model"
        )
    return Given(shape, fmt, costs)


def check_paced(device: str) -> None:
    """UserError where this process cannot have a paced device."""
    if default_device().platform != "cpu":
        raise UserError(f"device {device} is XLA's CPU backend, slowed: start with JAX_PLATFORMS=cpu")
    if not pace.available():
        raise UserError(
            f"device {device} needs the native kernels for jitted programs, which this installation lacks (no C++ "
            "compiler, or an older jaxlib)"
        )


def device_kernel(kernel: str, expert_format: str) -> str:
    """`kernel`, an `EngineConfig.device_kernel`, with "auto" decided: "xla" or "cuda".

    UserError where it cannot compute experts of this format on the device.
    """
    if kernel == "xla" or (kernel == AUTO and (not is_format(expert_format) or default_device().platform != "gpu")):
        return "xla"
    if not is_format(expert_format):
        raise UserError(f"device kernel {kernel} computes quantised experts, and these are {expert_format}; use xla")
    refused = packed_cuda.refusal()
    if refused is None:
        return "cuda"
    if kernel == AUTO:
        warnings.warn(f"device kernel 'cuda' is left out: {refused}. XLA computes quantised experts", stacklevel=2)
        return "xla"
    raise UserError(f"device kernel {kernel} cannot run: {refused}; use xla")
