"""From a converted checkpoint to an engine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hybrimoe_jax import arguments
from hybrimoe_jax.engine.config import EngineConfig
from hybrimoe_jax.engine.device_memory import limit_allocator
from hybrimoe_jax.engine.lanes import threads
from hybrimoe_jax.engine.start_cache import keep_programs, usable
from hybrimoe_jax.errors import UserError, shown
from hybrimoe_jax.progress import Progress

if TYPE_CHECKING:
    from hybrimoe_jax.checkpoint.reader import Checkpoint
    from hybrimoe_jax.engine.engine import Engine
    from hybrimoe_jax.engine.program_cache import ProgramCache


def bundled_model() -> Path:
    """The folder of the model that ships with the package."""
    return Path(__file__).parents[1] / "assets" / "bundled"


class Model(NamedTuple):
    """A checkpoint in host memory; any number of engines may share it.

    Attributes: as the arguments of `Engine`; `start_cache`, of all its engines; `programs`, kept for the next start.
    """

    config: Any
    dense: dict[str, Any]
    store: Any
    tokenizer: Any
    eos: tuple[int, ...]
    frequencies: list[list[float]] | None
    start_cache: str
    programs: ProgramCache | None

    def engine(self, options: EngineConfig) -> Engine:
        """UserError where the options cannot be met."""
        from hybrimoe_jax.engine.engine import Engine

        options = dataclasses.replace(options, start_cache=self.start_cache)
        more = {"tokenizer": self.tokenizer, "eos": self.eos, "frequencies": self.frequencies}
        engine = Engine(self.config, self.dense, self.store, options, **more)
        if self.programs is not None:
            self.programs.share()
        return engine


def read_model(
    checkpoint: str | Path | Checkpoint | None = None,
    options: EngineConfig | None = None,
    progress: Progress | None = None,
) -> Model:
    """Reads a folder written by `python -m hybrimoe_jax.convert`, or one that is open (the bundled model if None).

    Starts jax, as `load` does. Of the options `threads`, `executor`, `device`, `host_kernel`, `lazy`, `verify` and
    `start_cache` count, and `vram_budget` with what it must hold; the others are only checked.
    """
    options = options or EngineConfig()
    start_cache = usable(options.start_cache)
    threads.split_threads(options.threads, options.executor, options.paced is not None)
    limit_allocator(options)
    threads.set_async_dispatch(options.executor)
    programs = keep_programs(start_cache)
    from hybrimoe_jax.checkpoint.reader import Checkpoint, open_checkpoint
    from hybrimoe_jax.engine.checks import check_budget, check_options, host_format
    from hybrimoe_jax.text.replies import eos_ids, warn_of_what_is_left_out

    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(bundled_model() if checkpoint is None else checkpoint)
    held = host_format(checkpoint.format, options)
    check_options(options, checkpoint.config, held)
    check_budget(options, checkpoint)
    dtype = "float32" if held == "f32" else None  # exactly the same values
    small = {"tokenizer": checkpoint.tokenizer, "frequencies": checkpoint.frequencies()}  # refused before weights are
    eos = eos_ids(checkpoint.generation_config, checkpoint.tokenizer, checkpoint.config)
    warn_of_what_is_left_out(checkpoint.generation_config, eos, checkpoint.config.vocab_size)
    return Model(
        checkpoint.config,
        store=checkpoint.experts(
            dtype=dtype, lazy=options.lazy, verify=options.verify, progress=progress and progress.track
        ),
        dense=checkpoint.dense(verify=options.verify),
        eos=eos,
        start_cache=start_cache,
        programs=programs,
        **small,
    )


def load(
    path: str | Path | Checkpoint | None = None,
    options: EngineConfig | None = None,
    *,
    machine: str | None = None,
    **fields: Any,
) -> Engine:
    """Opens a folder written by `python -m hybrimoe_jax.convert`, the bundled model if None.

    Call it before any other use of jax: the cores are divided between XLA and the host experts when jax starts.

    Args:
      options: how it runs; `fields`, those of `EngineConfig`, replace some of its choices, or stand alone.
      machine: a profile, by name or file: times are computed for that machine (`profile=machine, clock="virtual"`).

    Raises UserError for a missing or damaged checkpoint and for options that cannot be met.
    """
    options = config_of(options, machine, fields)
    path = checked_place(path)
    with Progress("reading the checkpoint", at_once=True) as progress:
        progress.to(0)
        model = read_model(path, options, progress)
        progress.restart("compiling and measuring", None)
        progress.to(0)
        return model.engine(options)


def checked_place(checkpoint: Any) -> Any:
    """A checkpoint's folder, or an open one; None stays. UserError for anything else."""
    if checkpoint is None or hasattr(checkpoint, "generation_config"):
        return checkpoint
    return Path(arguments.path("checkpoint", checkpoint))


def config_of(options: EngineConfig | None, machine: str | None, fields: dict[str, Any]) -> EngineConfig:
    """The options of `load`; UserError for a field that there is not."""
    if options is not None and not isinstance(options, EngineConfig):
        raise UserError(f"options {shown(options)} is no EngineConfig; write EngineConfig(...), or its fields by name")
    if machine is not None:
        for name in ("profile", "clock"):
            if name in fields:
                raise UserError(f"machine {shown(machine)} sets the profile and the virtual clock: leave out {name}")
        fields = {**fields, "profile": machine, "clock": "virtual"}
    return dataclasses.replace(options or EngineConfig(), **fields)
