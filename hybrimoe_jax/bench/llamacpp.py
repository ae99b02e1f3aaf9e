"""`bench llamacpp`: the engine on a CPU-only machine against llama.cpp, end to end, in turns.

Both have the same bits a weight.

Every matrix has the one format on both sides, embedding apart: here float32, or int8 and int4 in groups of 32 with a
float16 scale and activations rounded to int8 likewise; there F32, Q8_0 and Q4_0. "mid" is one checkpoint of random
weights rounded by either side, so that its float32 tokens can be compared; larger models are random on each side for
itself: the shapes, and so the work, are the same.

llama.cpp comes with `pip install llama-cpp-python` (compiled on the spot), its files are written with `gguf`. Each
contender is a process of its own; only one computes at a time, and the order rotates. Wall-clock times.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from hybrimoe_jax.bench.engine import SETTLE_S, Contender, read_bandwidth
from hybrimoe_jax.bench.random_models import DEEPSEEK_V2_LITE, MID, write_random_hf
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.models.registry import parse_config

TYPES = {"f32": "F32", "int8-g32-a8": "Q8_0", "int4-g32-a8": "Q4_0"}
"""Our format -> llama.cpp's of the same bits."""
MODELS = {"mid": tuple(TYPES), "deepseek-v2-lite": ("int4-g32-a8",)}
"""What is run by default; in float32 DeepSeek-V2-Lite would take 63 GB."""
PROMPT = 128
OURS, THEIRS = "hybrimoe", "llama.cpp"


@dataclasses.dataclass
class Options:
    """What is measured.

    Args: formats, of TYPES (None: those of MODELS); threads of each side; rounds measured; new tokens per decode;
    cache_ratio of ours.
    """

    formats: tuple[str, ...] | None = None
    threads: int = 2
    rounds: int = 5
    new: int = 32
    cache_ratio: float = 0.25


def require_peer() -> None:
    """Raises UserError where llama.cpp or `gguf` is not installed."""
    for module, package in (("llama_cpp", "llama-cpp-python"), ("gguf", "gguf")):
        if find_spec(module) is None:
            raise UserError(
                f"bench llamacpp needs {package}: pip install llama-cpp-python gguf (compiles for some 15 minutes)"
            )


def prepare(model: str, format: str, base: Path) -> tuple[Path, Path]:
    """Our checkpoint and llama.cpp's file, made in `base` unless they are there."""
    from hybrimoe_jax.bench.gguf_writer import write_gguf
    from hybrimoe_jax.checkpoint.convert import convert, convert_random

    ours, theirs = base / f"{model}-{format}", base / f"{model}-{TYPES[format]}.gguf"
    dense = None if format == "f32" else format
    if model == "mid":
        hf = base / "mid-hf"
        if not hf.exists():
            write_random_hf(hf)
        if not ours.exists():
            convert(hf, ours, format, dense_format=dense)
        if not theirs.exists():
            from safetensors import safe_open

            with safe_open(hf / "model.safetensors", "np") as tensors:
                write_gguf(theirs, parse_config(MID), TYPES[format], tensors.get_tensor)
        return ours, theirs
    if not ours.exists():
        source = base / f"{model}.json"
        source.write_text(json.dumps(DEEPSEEK_V2_LITE))
        convert_random(source, ours, format, dense_format=dense)
    if not theirs.exists():
        write_gguf(theirs, parse_config(DEEPSEEK_V2_LITE), TYPES[format])
    return ours, theirs


def measure(model: str, format: str, base: Path, options: Options, note: Callable[[str], None]) -> dict:
    """One model in one format, both contenders in turns."""
    note(f"{model} {format}: writing both files")
    ours, theirs = prepare(model, format, base)
    note(f"{model} {format}: loading both")
    with contextlib.ExitStack() as running:  # one that failed must not leave the other with its memory
        contenders = {}
        for name, kind, about in (
            (OURS, "engine", {"model": str(ours), "systems": [OURS], "cache_ratio": options.cache_ratio}),
            (THEIRS, "llama.cpp", {"file": str(theirs)}),
        ):
            contenders[name] = Contender(kind, threads=options.threads, **about)
            running.callback(contenders[name].close)
        return compared(model, format, contenders, options, note)


def compared(
    model: str, format: str, contenders: dict[str, Contender], options: Options, note: Callable[[str], None]
) -> dict:
    """The rounds, and what they gave."""
    seconds: dict[tuple[str, str], list[float]] = {}
    tokens, bandwidth = {}, []
    for turn in range(options.rounds + 1):
        note(f"{model} {format}: " + (f"round {turn} of {options.rounds}" if turn else "warming up"))
        for name in sorted(contenders, reverse=turn % 2 == 1):
            time.sleep(SETTLE_S)
            bandwidth.append(read_bandwidth(0.2))
            prefill = contenders[name].ask("prefill", name=name, tokens=PROMPT)
            decode = contenders[name].ask("decode", name=name, tokens=PROMPT, new=options.new)
            tokens[name] = decode["token_ids"]
            if turn:
                seconds.setdefault((name, "prefill"), []).append(prefill["seconds"])
                seconds.setdefault((name, "decode"), []).append(decode["seconds"])
    about = {key: value for c in contenders.values() for key, value in c.about.items() if key != "names"}
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    agreed = [a == b for a, b in zip(tokens[OURS], tokens[THEIRS])]
    return {
        "model": model,
        "format": format,
        "gguf_type": TYPES[format],
        **about,
        "read_bandwidth_gb_s": statistics.median(bandwidth) / 1e9,
        "prefill_tokens_s": {name: PROMPT / medians[name, "prefill"] for name in contenders},
        "decode_tokens_s": {name: 1 / medians[name, "decode"] for name in contenders},
        "ratios": {  # of each round, since a machine's speed drifts over rounds and both with it
            what: statistics.median(b / a for a, b in zip(seconds[OURS, what], seconds[THEIRS, what], strict=True))
            for what in ("prefill", "decode")
        },
        "ratios_of_medians": {what: medians[THEIRS, what] / medians[OURS, what] for what in ("prefill", "decode")},
        "ratio_ranges": {
            what: [
                min(seconds[THEIRS, what]) / max(seconds[OURS, what]),
                max(seconds[THEIRS, what]) / min(seconds[OURS, what]),
            ]
            for what in ("prefill", "decode")
        },
        "tokens_agreed": [*agreed, False].index(False) if model == "mid" else None,
    }


def table(results: list[dict]) -> str:
    """Tokens a second of both, medians, and the median of the rounds' ratios."""
    lines = [
        f"{'':34}{'prefill of ' + str(PROMPT) + ', tokens/s':^34}{'decode, tokens/s':^34}",
        f"{'model and format':34}{OURS:>11}{THEIRS:>12}{'ratio':>9}  {OURS:>11}{THEIRS:>12}{'ratio':>9}",
    ]
    for row in results:
        cells = ""
        for what in ("prefill", "decode"):
            both = row[f"{what}_tokens_s"]
            cells += f"{both[OURS]:>11.1f}{both[THEIRS]:>12.1f}{row['ratios'][what]:>8.2f}x  "
        lines.append(f"{row['model'] + ' ' + row['format']:34}{cells.rstrip()}")
    for row in results:
        if row["format"] == "f32" and row["tokens_agreed"] is not None:
            lines.append(f"{row['model']} f32: the first {row['tokens_agreed']} greedy tokens agree")
    return "\n".join(lines)


def run(models: list[str], options: Options, workdir: Path | None, note: Callable[[str], None]) -> dict:
    """Measures each model in each format and prints a table."""
    require_peer()
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        base = workdir or Path(scratch)
        base.mkdir(parents=True, exist_ok=True)
        for model in models:
            for format in options.formats or MODELS[model]:
                results.append(measure(model, format, base, options, note))
    note("")
    print(table(results), flush=True)
    return {"benchmark": "llamacpp", "clock": "wall", **dataclasses.asdict(options), "results": results}
