"""A fault for each kind, put into the package in the worker's memory: what the campaign must find.

Four of them are no wrong answers: one hangs, one takes memory, one aborts the process, one writes beside its input.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def after(owner: Any, name: str, change: Callable[..., Any]) -> None:
    """`owner.name` gives what `change(result, *args)` makes of its result."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def changed(*args: Any, **more: Any) -> Any:
        return change(original(*args, **more), *args)

    setattr(owner, name, changed)


def config() -> None:
    """Keys that change the numbers are not looked at."""
    from hybrimoe_jax.models.config import ModelConfig

    ModelConfig.check = lambda self, raw: None


def safetensors() -> None:
    """A tensor's last row is its first."""
    from hybrimoe_jax.checkpoint.safetensors import FileTensor

    def change(array: np.ndarray, *_: Any) -> np.ndarray:
        if array.ndim and len(array) > 1:
            array[-1] = array[0]
        return array

    after(FileTensor, "read", change)


def gguf() -> None:
    """The process ends at a file of which it cannot make sense."""
    from hybrimoe_jax.checkpoint.gguf import file

    original = file.open_gguf

    def changed(path: Any) -> Any:
        try:
            return original(path)
        except Exception:
            os.abort()

    file.open_gguf = changed


def tokenizer() -> None:
    """The last token of a long text is lost."""
    from hybrimoe_jax.text import Tokenizer

    after(Tokenizer, "encode", lambda ids, *_: ids[:-1] if len(ids) > 40 else ids)


def template() -> None:
    """What a template with a macro gives never comes."""
    from hybrimoe_jax.text import Tokenizer

    def change(text: str, *_: Any) -> str:
        while "<y>" in text:
            pass
        return text

    after(Tokenizer, "apply_chat_template", change)


def profile() -> None:
    """Costs that are read fill memory."""
    from hybrimoe_jax.machine.costs import CostModel

    def change(costs: Any, *_: Any) -> Any:
        np.ones(3 << 26)
        return costs

    load = CostModel.load.__func__
    setattr(CostModel, "load", classmethod(lambda cls, path: change(load(cls, path))))  # noqa: B010  # for pyright


def trace() -> None:
    """A trace that is opened leaves a file beside it."""
    from hybrimoe_jax.trace import importers

    def change(trace: Any, path: Any) -> Any:
        if Path(path).parent.name.startswith("trace-"):
            Path(path).with_name("stray").touch()
        return trace

    after(importers, "open_trace", change)


def converted() -> None:
    """Checksums are not compared."""
    from hybrimoe_jax.checkpoint import reader

    after(reader, "damage", lambda *_: None)


def flags() -> None:
    """A refusal has a second line."""
    from hybrimoe_jax import cli

    after(cli, "fail", lambda code, *_: (print("see the manual", file=sys.stderr), code)[1])


def api() -> None:
    """A text that is to be continued loses its last character."""
    from hybrimoe_jax.engine.engine import Engine

    original = Engine.generate

    def changed(self: Any, prompts: Any, **more: Any) -> Any:
        return original(self, prompts[:-1] if isinstance(prompts, str) else prompts, **more)

    Engine.generate = changed


def policy() -> None:
    """Whether a class is a policy is not checked."""
    from hybrimoe_jax.decide.registry import Kind

    Kind._check = lambda self, rule: None
    Kind._check_class = lambda self, name, made_by: None


FAULTS = {
    "config": config,
    "safetensors": safetensors,
    "gguf": gguf,
    "tokenizer": tokenizer,
    "template": template,
    "profile": profile,
    "trace": trace,
    "converted": converted,
    "flags": flags,
    "api": api,
    "policy": policy,
}
