"""Tiny random models for engine tests: three families, a few layers, experts of a few hundred weights."""

from __future__ import annotations

import functools

import jax
import numpy as np

from hybrimoe_jax.engine import programs
from hybrimoe_jax.engine.config import EngineConfig
from hybrimoe_jax.formats.plain import BF16
from hybrimoe_jax.formats.sizes import expert_bytes
from hybrimoe_jax.machine.costs import CostModel
from hybrimoe_jax.models.parameters import split
from hybrimoe_jax.models.registry import build_model, parse_config

COMMON = dict(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=512,
)
CONFIGS = {
    "qwen2_moe": dict(
        COMMON,
        model_type="qwen2_moe",
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        norm_topk_prob=False,
    ),
    "mixtral": dict(COMMON, model_type="mixtral", num_local_experts=8, num_experts_per_tok=2, intermediate_size=24),
    "deepseek_v2": dict(
        COMMON,
        model_type="deepseek_v2",
        num_key_value_heads=4,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_intermediate_size=24,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=None,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        norm_topk_prob=False,
        scoring_func="softmax",
    ),
}


def executables() -> int:
    """How many executables the process holds for engine steps."""
    return sum(program._cache_size() for program in programs._PROGRAMS)


@functools.lru_cache
def weights(family: str, seed: int = 0):
    """-> (config, dense weights by name, [(gate_up [E, 2F, D], down [E, D, F])] per MoE layer). Routers are spread,
    so that routing is no near-tie, and so are the other weights, so that greedy tokens vary."""
    config = parse_config(CONFIGS[family])
    rng = np.random.default_rng(seed)
    _, abstract = split(build_model(config))
    dense = {}
    for name, leaf in abstract.items():
        scale = 1.0 if "gate.weight" in name and "shared" not in name else leaf.shape[-1] ** -0.5
        drawn = rng.standard_normal(leaf.shape, np.float32) * scale
        dense[name] = 1 + 0.1 * drawn if "norm" in name else drawn * (20 if name == "lm_head.weight" else 1)
    width, hidden, count = config.moe_width, config.hidden_size, config.num_experts
    experts = [
        (
            rng.standard_normal((count, 2 * width, hidden), np.float32) * hidden**-0.5,
            rng.standard_normal((count, hidden, width), np.float32) * width**-0.5,
        )
        for _ in config.moe_layers
    ]
    return config, dense, experts


def costs(config, *, cpu=1.0, device=1.0, transfer=1.0, format: str = "f32") -> CostModel:
    """An invented machine whose CPU, device and link are of similar speed, so that plans mix them."""
    size = expert_bytes(config.hidden_size, config.moe_width, format)
    base = CostModel(
        cpu_expert=1e-4,
        cpu_token=5e-5,
        cpu_first=5e-5,
        device_expert=8e-5,
        device_token=1e-6,
        shared_base=5e-5,
        shared_token=1e-6,
        layer_base=2e-4,
        layer_token=1e-6,
        transfer_latency=2e-5,
        bandwidth=size / 1e-4,
        bandwidth_cpu_busy=size / 1.5e-4,
        expert_bytes=size,
        source="invented for tests",
    )
    return base.scaled(cpu=cpu, device=device, transfer=transfer)


def engine(family: str = "qwen2_moe", *, seed: int = 0, eos=(), tokenizer=None, format: str = "f32", **options):
    """An engine over `weights(family)`, experts rounded to `format`; costs are the invented machine's unless a
    profile is given."""
    from hybrimoe_jax.checkpoint.expert_store import ExpertStore
    from hybrimoe_jax.engine.checks import device_format
    from hybrimoe_jax.engine.engine import Engine

    config, dense, experts = weights(family, seed)
    on_device = format
    if format == "bf16":
        experts = [tuple(matrix.astype(BF16) for matrix in layer) for layer in experts]
        on_device = device_format(format, "cpu", EngineConfig(slots=options.get("slots", "auto")), config)
    options = {"host_kernel": "reference", "prefill_chunk": 16, **options}
    if options.get("executor") != "dense":
        options.setdefault("profile", costs(config, format=on_device))
    return Engine(
        config,
        dense,
        ExpertStore.from_arrays(experts, format=None if format in ("f32", "bf16") else format),
        EngineConfig(**options),
        tokenizer=tokenizer,
        eos=eos,
    )


def prompts(config, lengths, seed: int = 1) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, config.vocab_size, n).tolist() for n in lengths]


def in_turns(runs: list) -> list:
    """Takes a step of each run in turn, to their ends; their statistics, the first to end first."""
    stats = []
    while len(stats) < len(runs):
        for run in runs:
            try:
                next(run)
            except StopIteration as end:
                stats += [end.value] if end.value is not None else []
    return stats


def on_cpu() -> bool:
    return jax.devices()[0].platform == "cpu"
