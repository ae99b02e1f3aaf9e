"""`bench engine`: our engine against transformers on the same weights, interleaved, medians and ratios.

Every contender sits in a process of its own and is asked in turns that rotate, so that a disturbance of the machine
hits all of them alike; only one computes at a time. Prefill is the time to the first token, decode the time between
tokens after a prompt of 128. Times are wall-clock and without compilation (a first round is thrown away).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from hybrimoe_jax.bench.peers import DECODE_ONLY, IMPLEMENTATIONS
from hybrimoe_jax.errors import UserError

SYSTEMS = ("hybrimoe", "cpu-only", "device-only", "on-demand")
PREFILLS = (128, 512)
MEASURES = (*(f"prefill {size}" for size in PREFILLS), "decode")
DECODE_PROMPT = 128
SETTLE_S = 0.3
"""Pause before each contender: the OpenMP threads of the one before go on spinning for some 0.2 s after their work."""


@dataclasses.dataclass
class Options:
    """Args: threads each contender may use; cache_ratio of our engine; rounds measured; new tokens per decode."""

    threads: int = 2
    cache_ratio: float = 0.25
    rounds: int = 5
    new: int = 32
    baseline: bool = True


class Contender:
    """A running contender process."""

    def __init__(self, kind: str, **options):
        command = [sys.executable, "-m", "hybrimoe_jax.bench.contenders", kind, json.dumps(options)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin and self._process.stdout
        self._requests, self._answers = self._process.stdin, self._process.stdout
        self.about = self._read()

    def ask(self, run: str, **request) -> dict:
        self._requests.write(json.dumps({"run": run, **request}) + "\n")
        self._requests.flush()
        return self._read()

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended
            self._requests.close()
        self._answers.close()
        self._process.wait()

    def _read(self) -> dict:
        line = self._answers.readline()
        answer = json.loads(line or '{"error": "a benchmark process ended early; its own error is above"}')
        if "error" in answer:
            self.close()
            raise UserError(answer["error"])
        return answer


def read_bandwidth(seconds: float = 0.5) -> float:
    """Bytes per second of reading memory with numpy on all cores: the limit of decoding in float32."""
    matrix = np.ones((16384, 4096), np.float32)
    vector, out = np.ones(4096, np.float32), np.empty(16384, np.float32)
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        np.dot(matrix, vector, out)
        times.append(time.perf_counter() - start)
    return matrix.nbytes / statistics.median(times)


def measure(hf_folder: Path | None, checkpoint: Path, options: Options, note: Callable[[str], None]) -> dict:
    """Runs one model's comparison. `hf_folder` None leaves transformers out."""
    ours = Contender(
        "engine",
        model=str(checkpoint),
        systems=list(SYSTEMS),
        threads=options.threads,
        cache_ratio=options.cache_ratio,
    )
    contenders = [ours]
    if hf_folder is not None:
        contenders.append(
            Contender(
                "transformers", folder=str(hf_folder), implementations=list(IMPLEMENTATIONS), threads=options.threads
            )
        )
    times: dict[tuple[str, str], list[float]] = {}
    tokens: dict[str, list[int]] = {}
    details: dict[str, dict] = {}
    bandwidth = []
    for turn in range(options.rounds + 1):
        note(f"round {turn} of {options.rounds}" if turn else "warming up")
        bandwidth.append(read_bandwidth())
        turns = [(contender, name) for contender in contenders for name in contender.about["names"]]
        shift = turn % len(turns)
        for contender, name in turns[shift:] + turns[:shift]:
            time.sleep(SETTLE_S)
            for size in () if name.endswith(DECODE_ONLY) else PREFILLS:
                seconds = contender.ask("prefill", name=name, tokens=size)["seconds"]
                if turn:
                    times.setdefault((name, f"prefill {size}"), []).append(seconds)
            answer = contender.ask("decode", name=name, tokens=DECODE_PROMPT, new=options.new)
            if turn:
                times.setdefault((name, "decode"), []).append(answer["seconds"])
            tokens[name] = answer.pop("token_ids")
            details[name] = answer
    overhead = ours.ask("overhead", name="hybrimoe", tokens=DECODE_PROMPT, new=options.new)
    for contender in contenders:
        contender.close()
    medians = {key: statistics.median(values) for key, values in times.items()}
    rows = {
        name: {f"{what}_ms": 1e3 * medians[name, what] for what in MEASURES if (name, what) in medians}
        for name in dict.fromkeys(name for name, _ in medians)
    }
    reference = tokens["hybrimoe"]
    result = {
        "model": checkpoint.name,
        **{k: v for contender in contenders for k, v in contender.about.items() if k != "names"},
        "read_bandwidth_gb_s": statistics.median(bandwidth) / 1e9,
        "medians": rows,
        "same_tokens": {name: ids == reference for name, ids in tokens.items()},
        "details": {name: details[name] for name in ours.about["names"]},
        **overhead,
    }
    peers = [name for name in rows if name.startswith("transformers")]
    if peers:
        result["ratios"] = {
            what: min(medians[name, what] for name in peers if (name, what) in medians) / medians["hybrimoe", what]
            for what in MEASURES
        }
    return result


def table(result: dict) -> str:
    """What theory says, then what was measured."""
    limit = 1e3 * result["bytes_per_token"] / (1e9 * result["read_bandwidth_gb_s"])
    lines = [
        f"{result['model']}: {result['parameters'] / 1e6:.0f} M parameters; a token reads "
        f"{result['bytes_per_token'] / 1e6:.1f} MB in "
        f"float32, at {result['read_bandwidth_gb_s']:.1f} GB/s measured at least {limit:.2f} ms",
        f"{'':28}{'prefill 128':>14}{'prefill 512':>14}{'decode':>14}{'same tokens':>14}",
    ]
    for name, row in result["medians"].items():
        cells = "".join(f"{row[f'{m}_ms']:>11.2f} ms" if f"{m}_ms" in row else f"{'-':>14}" for m in MEASURES)
        lines.append(f"{name:28}{cells}{'yes' if result['same_tokens'][name] else 'no':>14}")
    if "ratios" in result:
        shown = ", ".join(f"{what} {ratio:.2f}x" for what, ratio in result["ratios"].items())
        lines.append(f"hybrimoe against the best transformers implementation (above 1 is faster): {shown}")
    lines.append(f"the engine's own time per MoE layer at decode: {result['overhead_us_per_layer']:.0f} us")
    return "\n".join(lines)


def run(models: list[str], options: Options, workdir: Path | None, note: Callable[[str], None]) -> dict:
    """Benchmarks "bundled", "mid" (random, 466 M parameters) or a converted checkpoint folder; prints a table each."""
    from hybrimoe_jax.bench.random_models import write_random_hf
    from hybrimoe_jax.checkpoint.convert import convert
    from hybrimoe_jax.checkpoint.export import export_hf
    from hybrimoe_jax.engine.load import bundled_model

    results = []
    with tempfile.TemporaryDirectory() as scratch:
        base = workdir or Path(scratch)
        for model in models:
            hf = base / f"{Path(model).name}-hf"
            if model == "mid":
                checkpoint = base / "mid"
                if not hf.exists():
                    note("writing a random model")
                    write_random_hf(hf)
                if not checkpoint.exists():
                    convert(hf, checkpoint)
            else:
                checkpoint = bundled_model() if model == "bundled" else Path(model)
                if options.baseline and not hf.exists():
                    export_hf(checkpoint, hf)
            result = measure(hf if options.baseline else None, checkpoint, options, note)
            print(table(result) + "\n", flush=True)
            results.append(result)
    about = {
        "machine": platform.machine(),
        "processor": processor(),
        "python": platform.python_version(),
        "clock": "wall",
    }
    return {"benchmark": "engine", **about, **dataclasses.asdict(options), "results": results}


def processor(cpuinfo: str = "/proc/cpuinfo") -> str:
    """The processor's name and, where the system tells them, family, model and stepping.

    A virtual machine's name may stand for several.
    """
    try:
        lines = Path(cpuinfo).read_text().splitlines()
    except OSError:
        lines = []
    told = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]))
    name = told.get("model name") or platform.processor() or platform.machine()
    return " ".join([name, *(f"{what} {told[what]}" for what in ("cpu family", "model", "stepping") if what in told)])
