"""What can be refused before weights are read: options that do not fit the model, the machine or each other."""

from __future__ import annotations

import os
from typing import NamedTuple

import jax

from hybrimoe_jax.decide.prefetch.predictors import RECORDED
from hybrimoe_jax.engine.config import EngineConfig
from hybrimoe_jax.engine.request import context_limit
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.formats.layout import is_format
from hybrimoe_jax.formats.packing import packed_refusal
from hybrimoe_jax.host_kernels import get_kernel
from hybrimoe_jax.machine.costs import CostModel
from hybrimoe_jax.machine.profile import MachineCosts, load_costs
from hybrimoe_jax.machine.shapes import ModelShape, parse_cost_shape, shape_of


class Given(NamedTuple):
    """The model whose times and bytes count, its experts' format, and the profile's costs of it, if there is one."""

    shape: ModelShape
    format: str
    costs: CostModel | MachineCosts | None


def check_options(options: EngineConfig, config, stored_format: str) -> None:
    """UserError where no engine can be made; what its memory must hold is counted when it is made.

    Args: config: a ModelConfig. stored_format: of the routed experts.
    """
    context_limit(options, config)
    if options.executor == "dense":
        if options.vram_budget is not None:
            raise UserError("the dense executor keeps every expert on the device: it takes no vram_budget")
        return
    device = jax.devices()[0]
    on_device = device_format(stored_format, device.platform)
    check_device_kernel(options.device_kernel, device.platform, on_device)
    if options.host_kernel == "onednn" and is_format(stored_format):
        raise packed_refusal(stored_format, options.host_kernel)
    get_kernel(options.host_kernel)
    given_costs(options, config, on_device)
    recording = (options.predictor or "").partition(RECORDED)[2]
    if recording and not os.path.exists(recording):
        raise UserError(f"predictor {options.predictor}: there is no such file")


def device_format(stored_format: str, platform: str) -> str:
    """The format of experts on the device: the stored one, but float32 for plain ones on the CPU backend."""
    return "f32" if platform == "cpu" and not is_format(stored_format) else stored_format


def given_costs(options: EngineConfig, config, expert_format: str) -> Given:
    """What the options say of costs. The model is the one that runs, or the `cost_shape`."""
    shape, fmt = shape_of(config, config.model_type), expert_format
    if options.cost_shape is not None:
        shape, fmt = parse_cost_shape(options.cost_shape)
    costs, size = options.profile, shape.expert_bytes(fmt)
    if costs is None:
        return Given(shape, fmt, None)
    if not isinstance(costs, CostModel):
        costs = load_costs(costs, shape, fmt)
    if costs.expert_bytes != size:
        raise UserError(
            f"profile {costs.source}: measured with experts of {costs.expert_bytes} bytes, those of {shape.name} have "
            f"{size}; measure it again with that model"
        )
    return Given(shape, fmt, costs)


def check_device_kernel(kernel: str, platform: str, expert_format: str) -> None:
    """UserError where `kernel` cannot compute experts of this format on the device."""
    if kernel == "xla":
        return
    if not is_format(expert_format):
        raise UserError(f"device kernel {kernel!r} computes quantised experts, and these are {expert_format}; use xla")
    from hybrimoe_jax.models import packed_triton

    if not packed_triton.available():
        raise UserError(
            f"device kernel {kernel!r} needs the Triton backend of Pallas, which jax {jax.__version__} has not; use xla"
        )
    if kernel == "pallas" and platform == "cpu":
        raise UserError("device kernel 'pallas' needs a GPU, and jax finds none; use xla")
