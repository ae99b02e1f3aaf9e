"""From a converted checkpoint to an engine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from hybrimoe_jax.engine.config import EngineConfig
from hybrimoe_jax.engine.lanes import threads
from hybrimoe_jax.engine.start_cache import keep_programs, usable

if TYPE_CHECKING:
    from hybrimoe_jax.engine.engine import Engine


def bundled_model() -> Path:
    """The folder of the model that ships with the package."""
    return Path(__file__).parents[1] / "assets" / "bundled"


def load(path: str | Path | None = None, options: EngineConfig | None = None) -> Engine:
    """Opens a folder written by `python -m hybrimoe_jax.convert`, the bundled model if None.

    Call it before any other use of jax: the cores are divided between XLA and the host experts when jax starts.
    Raises UserError for a missing or damaged checkpoint and for options that cannot be met.
    """
    options = options or EngineConfig()
    options = dataclasses.replace(options, start_cache=usable(options.start_cache))
    threads.split_threads(options.threads, options.executor)
    threads.set_async_dispatch(options.executor)
    programs = keep_programs(options.start_cache)
    import jax

    from hybrimoe_jax.checkpoint.reader import open_checkpoint
    from hybrimoe_jax.engine.engine import Engine
    from hybrimoe_jax.text import eos_ids

    checkpoint = open_checkpoint(path or bundled_model())
    tokenizer = checkpoint.tokenizer()
    # XLA:CPU converts bfloat16 weights at every call, so on the CPU backend both sides hold float32 (exactly the same
    # values).
    dtype = "float32" if jax.default_backend() == "cpu" else None
    store = checkpoint.experts(dtype=dtype, lazy=options.lazy, verify=options.verify)
    engine = Engine(
        checkpoint.config,
        checkpoint.dense(verify=options.verify),
        store,
        options,
        tokenizer=tokenizer,
        eos=eos_ids(checkpoint.generation_config, tokenizer, checkpoint.config),
        frequencies=checkpoint.frequencies(),
    )
    if programs is not None:
        programs.exchange()
    return engine
