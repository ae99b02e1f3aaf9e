"""What `bench e2e` compares: models, formats, cache ratios, prompts, and who takes part.

A contender is a process (`kind`), in which it is opened by name with its options. What is not installed is left out,
and the record says why.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from hybrimoe_jax.baselines.torch_offload import MODES as TORCH_MODES
from hybrimoe_jax.bench.engine import Contender
from hybrimoe_jax.errors import UserError

MODELS = ("bundled", "mid")
FORMATS = ("f32", "bf16", "int8-g64", "int4-g64")
RATIOS = (0.125, 0.25, 0.5, 0.75)
PROMPTS = (32, 128, 512, 1024)
SYSTEMS = ("hybrimoe", "ktransformers", "adapmoe", "fiddler", "on-demand", "device-only")
PEERS = ("torch", "transformers", "accelerate", "llama.cpp")
GGUF = {"f32": "F32", "int8-g64": "Q8_0", "int4-g64": "Q4_0"}
"""llama.cpp's types of about the same bits a weight: 8.5 and 4.5 where ours have 8.25 and 4.25."""
OTHER_PROMPTS, OTHER_TOKENS = 16, 128
"""From which static placements are learned where a model comes without counts: prompts that are not measured."""
REFERENCE, OWN = "hybrimoe", "own rules"
PARTS = ("cache", "scheduler", "predictor")


@dataclasses.dataclass(frozen=True)
class Options:
    """Args: as the command's flags.

    `own`: (part, spec) that `OWN` has instead of the reference's, in both engines. `cost_shape`: of a paced device,
    whose model has a full-size one's costs.
    """

    models: tuple[str, ...] = MODELS
    formats: tuple[str, ...] = FORMATS
    ratios: tuple[float, ...] = RATIOS
    prompts: tuple[int, ...] = PROMPTS
    systems: tuple[str, ...] = SYSTEMS
    peers: tuple[str, ...] = PEERS
    threads: int = 2
    rounds: int = 3
    new: int = 32
    device: str = "auto"
    own: tuple[tuple[str, str], ...] = ()
    cost_shape: str = "deepseek-v2-lite"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A contender.

    Its name in the tables, its process, and what it is opened with; `cached`: its slots follow the cache ratio.
    """

    name: str
    kind: str
    options: dict[str, Any]
    cached: bool = True


@dataclasses.dataclass(frozen=True)
class Files:
    """A model in one format: ours, a Hugging Face folder where it has one, a GGUF file's type where it has one."""

    name: str
    format: str
    checkpoint: Path
    hf: Path | None
    gguf: Path | None = None


def absent(peer: str) -> str | None:
    """Why a peer cannot take part; None where it can."""
    needs = {
        "torch": ("torch",),
        "transformers": ("torch", "transformers"),
        "accelerate": ("torch", "transformers", "accelerate"),
        "llama.cpp": ("llama_cpp", "gguf"),
    }
    for module in needs[peer]:
        if not found(module):
            name = "llama-cpp-python" if module == "llama_cpp" else module
            return f"{name} is not installed: pip install {name}"
    return None


def found(module: str) -> bool:
    return find_spec(module) is not None


def entries(options: Options, files: Files, ratio: float, context: int, left_out: dict[str, str]) -> list[Entry]:
    """Who takes part at a cache ratio; why others do not is added to `left_out`."""
    common = {"cache_ratio": ratio, "max_context": context}
    shape = {"cost_shape": options.cost_shape} if options.device != "auto" else {}
    own, systems = dict(options.own), {name: {"system": name} for name in options.systems}
    modes = {mode: {"mode": mode} for mode in TORCH_MODES}
    if own:
        systems[OWN], modes[OWN] = {"system": REFERENCE, **own}, {"mode": REFERENCE, **own}
    made = [Entry(name, "engine", {**chosen, **common, **shape}) for name, chosen in systems.items()]
    for peer in options.peers:
        why = absent(peer) or unfit(peer, options, files)
        if why:
            left_out[f"{peer}, {files.name} {files.format}"] = why
        elif peer == "torch":
            rounds = {} if files.format == "f32" else {"precision": "bfloat16"}  # which its fast kernels are for
            made += [
                Entry(f"torch {name}", peer, {**chosen, **rounds, **common, **shape}) for name, chosen in modes.items()
            ]
        elif ratio == reference_ratio(options):
            made.append(Entry(peer, peer, {}, cached=False))
    return made


def unfit(peer: str, options: Options, files: Files) -> str | None:
    """Why a peer has nothing to show for a model."""
    if peer == "torch":
        return None
    if options.device != "auto":
        return f"has no {options.device}"
    if peer == "llama.cpp":
        return None if files.gguf else "no GGUF file of this model and format is written"
    return None if files.hf else "has no kernel for these weights"


def reference_ratio(options: Options) -> float:
    """At which contenders without a cache take part, so that they are measured once."""
    return 0.25 if 0.25 in options.ratios else options.ratios[0]


def process_options(kind: str, files: Files, options: Options, context: int) -> dict[str, Any]:
    """What the process of a kind is started with."""
    if kind in ("engine", "torch"):
        return {"model": str(files.checkpoint), "device": options.device}
    if kind == "llama.cpp":
        return {"file": str(files.gguf), "context": context}
    dtype = {"bf16": "bfloat16"}.get(files.format, "float32")
    return {"folder": str(files.hf), "dtype": dtype}


def prepare(model: str, format: str, base: Path, peers: tuple[str, ...], threads: int) -> Files:
    """Writes what is not in `base` yet. A folder is a converted checkpoint, and keeps its own format."""
    from hybrimoe_jax.bench.random_models import write_random_hf
    from hybrimoe_jax.checkpoint.convert import convert
    from hybrimoe_jax.checkpoint.export import export_hf
    from hybrimoe_jax.engine.load import bundled_model

    base.mkdir(parents=True, exist_ok=True)
    source = base / f"{model}-hf"
    if model not in MODELS:
        checkpoint = Path(model)
        return learned(Files(checkpoint.name, format, checkpoint, None), threads)
    if not source.exists():
        write_random_hf(source) if model == "mid" else export_hf(bundled_model(), source)
    checkpoint, hf = base / f"{model}-{format}", source if format == "f32" else base / f"{model}-{format}-hf"
    if not checkpoint.exists():
        convert(source, checkpoint, format)
    plain = format in ("f32", "bf16")
    if plain and not hf.exists() and {"transformers", "accelerate"} & set(peers):
        export_hf(checkpoint, hf)
    gguf = base / f"{model}-{format}.gguf"
    written = model == "mid" and format in GGUF and "llama.cpp" in peers and not absent("llama.cpp")
    if written and not gguf.exists():
        write_peer(source, gguf, GGUF[format])
    return learned(Files(model, format, checkpoint, hf if plain else None, gguf if written else None), threads)


def write_peer(source: Path, file: Path, kind: str) -> None:
    from safetensors import safe_open

    from hybrimoe_jax.bench.gguf_writer import write_gguf
    from hybrimoe_jax.bench.random_models import MID
    from hybrimoe_jax.models.registry import parse_config

    with safe_open(source / "model.safetensors", "np") as tensors:
        write_gguf(file, parse_config(MID), kind, tensors.get_tensor)


def learned(files: Files, threads: int) -> Files:
    """The same, with counts for static placements beside the weights: learned on prompts that are not measured."""
    from hybrimoe_jax.checkpoint.reader import FREQUENCIES, open_checkpoint
    from hybrimoe_jax.files import replacing

    checkpoint = open_checkpoint(files.checkpoint)
    if checkpoint.frequencies() is None:
        texts = [random_ids(checkpoint.config.vocab_size, OTHER_TOKENS, 10_000 + i) for i in range(OTHER_PROMPTS)]
        contender = Contender("engine", model=str(files.checkpoint), threads=threads, systems=["cpu-only"])
        counts = contender.ask("counts", prompts=texts)
        contender.close()
        with replacing(files.checkpoint / FREQUENCIES) as file:
            json.dump(counts, file)
    return files


def random_ids(vocab: int, tokens: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, min(vocab, 2000), tokens).tolist()


def prompt_maker(files: Files) -> tuple[Callable[[int, int], list[int]], int]:
    """-> (tokens, round -> ids, another prompt each round; the longest sequence that the model takes).

    Text that no static placement was learned on, or random ids where there is no tokenizer.
    """
    from hybrimoe_jax.checkpoint.reader import open_checkpoint

    checkpoint = open_checkpoint(files.checkpoint)
    limit = checkpoint.config.max_position_embeddings
    if checkpoint.tokenizer is None:
        return lambda tokens, turn: random_ids(checkpoint.config.vocab_size, tokens, turn), limit
    text = (Path(__file__).parents[2] / "assets" / "text" / "held-out.txt").read_text(encoding="utf-8")
    ids = checkpoint.tokenizer.encode(text)

    def make(tokens: int, turn: int) -> list[int]:
        if len(ids) < tokens:
            raise UserError(f"the held-out text has {len(ids)} tokens, fewer than a prompt of {tokens}")
        start = turn * tokens % (len(ids) - tokens + 1)
        return ids[start : start + tokens]

    return make, limit
