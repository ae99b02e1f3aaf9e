"""An `EngineConfig` as flags of a command."""

from __future__ import annotations

import argparse

from hybrimoe_jax.cli import lookahead
from hybrimoe_jax.decide.cache import POLICIES
from hybrimoe_jax.decide.prefetch.predictors import PREDICTORS
from hybrimoe_jax.decide.schedule import SCHEDULERS
from hybrimoe_jax.decide.systems import PREFETCH_MODES, SCOPES, SYSTEMS
from hybrimoe_jax.engine.config import (
    CLOCKS,
    DEVICE_KERNELS,
    EXECUTORS,
    HOST_MEMORY,
    KERNELS,
    PRECISIONS,
    SLOTS,
    EngineConfig,
)
from hybrimoe_jax.machine.paced import example
from hybrimoe_jax.machine.profile import PROFILES
from hybrimoe_jax.machine.shapes import SHAPES

ENGINE_FLAGS = {
    "system": dict(metavar="NAME", help=f"policies: {', '.join(SYSTEMS)}"),
    "cache_ratio": dict(
        type=float, metavar="R", help="fraction of each layer's experts kept on the device (default 0.25)"
    ),
    "vram_budget": dict(metavar="SIZE", help='device memory instead of a ratio, e.g. "4GiB"'),
    "cache": dict(
        metavar="NAME",
        help=f"replace the system's cache policy: {', '.join(POLICIES)}, with parameters if wanted (mrs:alpha=0.3), "
        "or a class of yours as package.module:Class:param=1",
    ),
    "cache_scope": dict(choices=SCOPES, help="pooled: all layers share their slots"),
    "scheduler": dict(metavar="NAME", help=f"replace its scheduler, likewise: {', '.join(SCHEDULERS)}"),
    "prefetch": dict(metavar="MODE", help=f"replace its prefetcher: {', '.join(PREFETCH_MODES)}"),
    "lookahead": dict(type=lookahead, metavar="N", help='layers predicted ahead, or "adaptive"'),
    "predictor": dict(
        metavar="NAME",
        help=f"what predicts them, likewise: {', '.join(name for name in PREDICTORS if name != 'perfect')}, "
        "recorded:TRACE",
    ),
    "stream_prefill": dict(
        action=argparse.BooleanOptionalAction,
        help="prompts run on the device, whole layers streamed through two buffers (default as the system has it)",
    ),
    "executor": dict(choices=EXECUTORS, help="how plans are carried out (default overlapped)"),
    "host_kernel": dict(choices=KERNELS, help="CPU expert kernel (default auto)"),
    "device_kernel": dict(
        choices=DEVICE_KERNELS, help="what computes quantised experts on the device (default auto); cuda wants a GPU"
    ),
    "host_memory": dict(
        choices=HOST_MEMORY, help="of experts, for copies to a GPU (default auto: registered with it, mapped)"
    ),
    "slots": dict(
        choices=SLOTS, help="how slots lie in device memory (default: stacked on a GPU and on a paced device)"
    ),
    "precision": dict(choices=PRECISIONS, help="of prompts' products on a GPU (default float32)"),
    "threads": dict(type=int, metavar="N", help="cores for XLA and the host experts together (default all)"),
    "max_context": dict(type=int, metavar="N", help="longest prompt and reply together"),
    "max_batch": dict(type=int, metavar="N", help="sequences whose cache --vram-budget reserves"),
    "prefill_chunk": dict(type=int, metavar="N", help="prompt tokens computed at once (default 512)"),
    "profile": dict(
        metavar="P",
        help=f"costs: a file (read if it exists, else measured and written) or a machine: {', '.join(PROFILES)}",
    ),
    "clock": dict(choices=CLOCKS, help="virtual: times are those of the profile's machine, computed (default wall)"),
    "device": dict(
        metavar="DEVICE",
        help="paced:PROFILE[:SLOWDOWN]: this machine slowed, in real time, until its device, its transfers and its "
        f"host experts take what the profile says, times the slowdown, as in {example()} (default auto: jax's device)",
    ),
    "cost_shape": dict(
        metavar="NAME[:FORMAT]",
        help="virtual clock, paced device: times and bytes are those of a full-size model, e.g. "
        f"deepseek-v2-lite:int4-g64; one of {', '.join(SHAPES)} (format int4-g64 if none is given)",
    ),
    "start_cache": dict(
        metavar="DIR",
        help="where compiled programs and measurements are kept for the next start (default: the platform's cache "
        'folder, or $HYBRIMOE_START_CACHE); "off" keeps nothing',
    ),
    "measure_again": dict(action="store_true", help="measure this machine anew, whatever is kept"),
    "lazy": dict(action="store_true", help="read experts from disk on first use"),
    "verify": dict(action="store_true", help="check the hash of all that is read, not its checksum alone"),
    "debug": dict(action="store_true", help="check the slots' contents at every step (slow)"),
}


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """All of them, in a group of their own; None where they are not given."""
    group = parser.add_argument_group("engine")
    for name, options in ENGINE_FLAGS.items():
        group.add_argument("--" + name.replace("_", "-"), default=None, dest=name, **options)


def engine_config(args: argparse.Namespace) -> EngineConfig:
    chosen = {name: getattr(args, name) for name in ENGINE_FLAGS if getattr(args, name) is not None}
    return EngineConfig(**{"start_cache": "default", **chosen}, seed=args.seed)
