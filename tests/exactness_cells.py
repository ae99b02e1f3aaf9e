"""The exactness matrix: {models} x {systems} x {executors} x {cache ratios} x {kernels} x {batch 1, ragged 3} x
{formats}, one cell at a time.

`run_cell` builds the cell's engine and measures it against the dense model with the same experts, rounded to the same
format where it is a quantised one: greedy tokens, and logits relative to their scale.
As a program it reads labels from standard input, one a line, and prints one JSON object for each: the callback
executor wants jax without asynchronous dispatch on the CPU backend, and a paced device (argument "paced") two threads
of XLA's, both decided once per process, so their cells run in one of their own.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import pickle
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiny
from torch_models import offload

from hybrimoe_jax.decide.systems import SYSTEMS
from hybrimoe_jax.engine.config import EngineConfig
from hybrimoe_jax.engine.load import bundled_model

TOLERANCE = 2e-5
"""Of the logits' own scale (their largest magnitude)."""
CLEAR = 5 * TOLERANCE
"""Two logits further apart than this cannot have changed places within the tolerance; nearer ones prove nothing."""
ROUNDED_TOLERANCE = 2e-2
"""Where activations are quantised (`-a8`): x, or silu(gate) * up, of two summation orders can lie on two sides of a
rounding boundary, and one step of it is 1/127 of a group's largest, here of experts 24 to 32 wide. Seen: at most 2e-6
but for the cells of one prompt and family, where a step is taken the other way: 7.9e-3 in each of them, the same
tokens."""
NEW_TOKENS = 20
BUNDLED = "bundled"
RULES = ("hybrimoe+optimal", "hybrimoe+pooled")
"""Systems with another scheduling rule, or with slots that all layers share."""
PROMPT_SEED = 3
"""Of four, the one whose greedy tokens are furthest from ties in every family (1e-3 of the scale)."""
TINY_LENGTHS = {"one": (37,), "ragged": (5, 37, 20)}
BUNDLED_TEXTS = {
    "one": ("To be, or not to be, that is the question:",),
    "ragged": ("My lord,", "To be, or not to be, that is the question:", "Enter the King and all his train, with"),
}


class Cell(NamedTuple):
    """`executor`: one of the engine's; "stacked", the overlapped one with stacked slots; "paced", on a paced device;
    "torch", the PyTorch engine, whose kernel is torch's."""

    model: str
    system: str
    executor: str
    ratio: float
    kernel: str
    batch: str
    format: str = "f32"

    @property
    def label(self) -> str:
        return "/".join(map(str, self))

    @classmethod
    def parse(cls, label: str) -> Cell:
        model, system, executor, ratio, kernel, batch, format = label.split("/")
        return cls(model, system, executor, float(ratio), kernel, batch, format)

    @property
    def tolerance(self) -> float:
        return ROUNDED_TOLERANCE if self.format.endswith("-a8") else TOLERANCE


FORMATS = ("int8-g64", "int8-g32-s32-a8", "int4-g32", "int4-g64-a8", "bf16", "int4z-g128", "int4z-g32-a8")
"""But float32; the tiny experts are 32 wide and 24 deep, so that groups are whole, short, and fewer than one."""


def matrix(models) -> list[Cell]:
    """Every cell of the given models in float32."""
    kernels = ("reference", "onednn", "native", "auto")
    systems, executors, ratios = (*SYSTEMS, *RULES), ("overlapped", "callback"), (0.0, 0.25, 0.5, 1.0)
    axes = itertools.product(models, systems, executors, ratios, kernels, TINY_LENGTHS, ("f32",))
    stacked = itertools.product(models, systems, ("stacked",), ratios, ("reference",), TINY_LENGTHS, ("f32",))
    return [Cell(*values) for values in (*axes, *stacked)]


def quantised_matrix(models) -> list[Cell]:
    """The same over quantised formats. How experts are placed does not depend on their bytes, so two systems stand
    for the ways there are of computing one (on the host; resident, fetched or streamed), and oneDNN computes plain
    experts only."""
    systems, executors = ("hybrimoe", "on-demand"), ("overlapped", "callback", "stacked")
    axes = (models, systems, executors, (0.0, 0.5), ("reference", "native"), TINY_LENGTHS, FORMATS)
    return [Cell(*values) for values in itertools.product(*axes)]


def torch_matrix(models) -> list[Cell]:
    """The column of the PyTorch engine: its modes' systems, plain and quantised experts."""
    systems = ("on-demand", "adapmoe", "ktransformers", "hybrimoe")
    axes = (models, systems, ("torch",), (0.0, 0.25, 0.5, 1.0), ("torch",))
    return [Cell(*values) for values in itertools.product(*axes, TINY_LENGTHS, ("f32", *FORMATS))]


class Reference(NamedTuple):
    """The dense model's answer. `margin` is the smallest gap between the two best logits on the greedy path, over
    the scale."""

    prompts: list[list[int]]
    tokens: list[list[int]]
    logits: np.ndarray
    scale: float
    margin: float


@functools.lru_cache
def _bundled():
    from hybrimoe_jax.checkpoint.reader import open_checkpoint

    checkpoint = open_checkpoint(bundled_model())
    return checkpoint, checkpoint.dense(), checkpoint.experts(dtype="float32", lazy=False)


def _engine(model: str, **options):
    if model != BUNDLED:
        return tiny.engine(model, debug=True, **options)
    from hybrimoe_jax.engine.engine import Engine

    checkpoint, dense, store = _bundled()
    if options["executor"] != "dense":
        options["profile"] = tiny.costs(checkpoint.config)
    return Engine(checkpoint.config, dense, store, EngineConfig(prefill_chunk=16, **options))


def _format(format: str) -> dict:
    return {} if format == "f32" else {"format": format}


def _prompts(model: str, batch: str) -> list[list[int]]:
    if model != BUNDLED:
        return tiny.prompts(tiny.weights(model)[0], TINY_LENGTHS[batch], seed=PROMPT_SEED)
    tokenizer = _bundled()[0].tokenizer
    assert tokenizer is not None
    return [tokenizer.encode(text) for text in BUNDLED_TEXTS[batch]]


REFERENCES = "HYBRIMOE_TEST_REFERENCES"
"""The environment variable that names a folder in which processes of one run share the dense model's answers."""


@functools.lru_cache
def reference(model: str, batch: str, format: str) -> Reference:
    folder = os.environ.get(REFERENCES)
    if folder is None:
        return _reference(model, batch, format)
    file = Path(folder, f"{model}-{batch}-{format}.pickle")
    if not file.exists():
        whole = file.with_suffix(f".{os.getpid()}")
        whole.write_bytes(pickle.dumps(tuple(_reference(model, batch, format))))
        whole.replace(file)
    return Reference(*pickle.loads(file.read_bytes()))


def _reference(model: str, batch: str, format: str) -> Reference:
    prompts = _prompts(model, batch)
    engine = _engine(model, executor="dense", **_format(format))
    tokens = engine.generate(prompts, max_new_tokens=NEW_TOKENS).token_ids
    walked = [engine.logits(prompt + new[:-1]) for prompt, new in zip(prompts, tokens, strict=True)]
    best = [np.sort(row[len(prompt) - 1 :], axis=1)[:, -2:] for prompt, row in zip(prompts, walked)]
    margin = min(float((pair[:, 1] - pair[:, 0]).min()) for pair in best)
    logits = walked[max(range(len(prompts)), key=lambda i: len(prompts[i]))]
    scale = float(np.abs(logits).max())
    return Reference(prompts, tokens, logits, scale, margin / scale)


def run_cell(cell: Cell) -> dict:
    """-> whether the tokens agree, the logits' worst error over their scale, and the tokens' margin in the same
    measure."""
    want = reference(cell.model, cell.batch, cell.format)
    if cell.executor == "torch":
        options = {"mode": cell.system, "cache_ratio": cell.ratio, **_format(cell.format)}
        return compared(cell, want, offload(cell.model, debug=True, **options))
    system, _, rule = cell.system.partition("+")
    engine = _engine(
        cell.model,
        system=system,
        scheduler=rule if rule and rule != "pooled" else None,
        cache_scope="pooled" if rule == "pooled" else None,
        cache_ratio=cell.ratio,
        host_kernel=cell.kernel,
        **_executor(cell),
        **_format(cell.format),
    )
    return compared(cell, want, engine)


def compared(cell: Cell, want: Reference, engine) -> dict:
    try:
        tokens = engine.generate(want.prompts, max_new_tokens=NEW_TOKENS).token_ids
        row = max(range(len(want.prompts)), key=lambda i: len(want.prompts[i]))
        logits = engine.logits(want.prompts[row] + want.tokens[row][:-1])
    finally:
        engine.close()
    error = float(np.abs(logits - want.logits).max()) / want.scale
    return {"cell": cell.label, "same_tokens": tokens == want.tokens, "error": error, "margin": want.margin}


def _executor(cell: Cell) -> dict:
    """A "paced" cell is one of the overlapped executor on a device that is paced to the invented machine."""
    if cell.executor != "paced":
        stacked = cell.executor == "stacked"
        return {"executor": "overlapped", "slots": "stacked"} if stacked else {"executor": cell.executor}
    file = Path(tempfile.gettempdir(), f"hybrimoe-paced-{os.getpid()}-{cell.model}-{cell.format}.json")
    tiny.costs(tiny.weights(cell.model)[0], format=cell.format).save(file)
    return {"executor": "overlapped", "profile": None, "device": f"paced:{file}"}


def main() -> None:
    if sys.argv[1:] == ["paced"]:
        os.environ["NPROC"] = "2"
    else:
        import jax

        jax.config.update("jax_cpu_enable_async_dispatch", False)
    for line in sys.stdin:
        print(json.dumps(run_cell(Cell.parse(line.strip()))), flush=True)


if __name__ == "__main__":
    main()
