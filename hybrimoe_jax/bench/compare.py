"""`compare`, a public name: systems of ours beside the PyTorch engine on one model, in turns, in this process.

For a quick look, and for rules of your own. `bench e2e` gives each contender a process of its own, compares with other
libraries too, and checks threads and memory: quote that.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hybrimoe_jax import arguments, tables
from hybrimoe_jax.baselines.torch_offload import MODES, TorchOffload, require_torch
from hybrimoe_jax.bench.e2e.grid import Files, prompt_maker
from hybrimoe_jax.decide.systems import System, get_system
from hybrimoe_jax.engine.config import EngineConfig
from hybrimoe_jax.engine.generation import Generation
from hybrimoe_jax.engine.load import bundled_model, read_model
from hybrimoe_jax.engine.stats import RunStats
from hybrimoe_jax.errors import UserError, shown
from hybrimoe_jax.figures import draw_bars
from hybrimoe_jax.progress import Progress

TORCH = "torch "
Given = str | System | TorchOffload
ONE = (str, System, TorchOffload)


def compare(
    checkpoint: str | Path | None = None,
    *,
    against: Given | Sequence[Given] = "torch hybrid",
    systems: str | System | Sequence[str | System] = ("hybrimoe",),
    budget: int | str | None = None,
    cache_ratio: float | None = None,
    machine: str | None = None,
    prompt_tokens: int = 64,
    max_new_tokens: int = 32,
    rounds: int = 3,
    **options: Any,
) -> Comparison:
    """Runs all on the same prompts with the same device memory: a round that warms up, then `rounds` in turns.

    Args:
      checkpoint: a converted checkpoint; the bundled model if None.
      against: "torch MODE", a `TorchOffload` (whatever it was opened on, its mode and options are taken), or systems.
      systems: of ours, by name or your own.
      budget, cache_ratio: device bytes (int or "4GiB") or a share of the experts, the same for all; 0.25 if neither.
      machine: a profile: times of all are computed for it, under the virtual clock.
      prompt_tokens, max_new_tokens: of each round, whose prompt is another one.
      options: of all of them: `device`, `threads`, `cost_shape`, `profile` ...; see `EngineConfig`.

    UserError for what cannot be, before weights are read.
    """
    rounds, prompt_tokens = arguments.whole("rounds", rounds), arguments.whole("prompt_tokens", prompt_tokens)
    max_new_tokens = arguments.whole("max_new_tokens", max_new_tokens)
    if rounds < 1 or prompt_tokens < 1 or max_new_tokens < 2:
        raise UserError("compare wants at least 1 round, 1 prompt token and 2 new tokens")
    sizes = {"vram_budget": budget, "cache_ratio": cache_ratio}
    sizes |= {} if machine is None else {"profile": machine, "clock": "virtual"}
    common = options | {name: value for name, value in sizes.items() if value is not None}
    path = Path(arguments.path("checkpoint", checkpoint)) if checkpoint is not None else bundled_model()
    given = [*arguments.several("systems", systems, ONE), *arguments.several("against", against, ONE)]
    for one in given:
        if not isinstance(one, ONE):
            raise UserError(f"compare: {shown(one)} is neither a system nor a TorchOffload")
    descriptions = {_name(one): _description(one, common) for one in given}
    if len(descriptions) < len(given):
        raise UserError("compare: two of them bear the same name; give your system another one")
    make, limit = prompt_maker(Files(path.name, "", path, None))
    if prompt_tokens + max_new_tokens > limit:
        raise UserError(f"{prompt_tokens} and {max_new_tokens} new tokens exceed the model's {limit}; ask for fewer")
    with Progress("loading", at_once=True) as progress:
        progress.to(0)
        opened = [one.checkpoint for one in given if isinstance(one, TorchOffload)]
        same = next((checkpoint for checkpoint in opened if checkpoint.path == path), path)  # its experts are held
        engines = _opened(path, same, descriptions)
        try:
            progress.restart("comparing", (rounds + 1) * len(engines))
            runs = _turns(engines, lambda turn: make(prompt_tokens, turn), rounds, max_new_tokens, progress)
        finally:
            for engine in engines.values():
                engine.close()
    return Comparison(runs)


def _name(given: Given) -> str:
    if isinstance(given, TorchOffload):
        mode = given.given["mode"]
        return TORCH + (mode if isinstance(mode, str) else mode.name)
    return given if isinstance(given, str) else given.name


def _description(given: Given, common: dict[str, Any]) -> EngineConfig | dict[str, Any]:
    """Our engine's options, or the arguments of `TorchOffload`."""
    if isinstance(given, TorchOffload):
        all_have = EngineConfig(**common)
        for name in ("clock", "profile", "cache_ratio", "vram_budget", "cost_shape"):
            own = given.given.get(name)
            if name not in common and own is not None and own != getattr(all_have, name):
                raise UserError(
                    f"compare: the TorchOffload has {name}={shown(own)}, which the others lack; give it to all as "
                    f"compare(..., {name}={shown(own)}), or leave it out"
                )
        return {**given.given, **common}
    if isinstance(given, str) and given.startswith(TORCH):
        require_torch()
        mode = given.removeprefix(TORCH)
        if mode not in MODES:
            get_system(mode)
        return {"mode": mode, **common}
    return EngineConfig(system=given, **common)


def _opened(path: Path, for_torch: Any, descriptions: dict[str, Any]) -> dict[str, Any]:
    ours = [options for options in descriptions.values() if isinstance(options, EngineConfig)]
    model = read_model(path, ours[0]) if ours else None  # one copy of the weights for all of ours
    engines: dict[str, Any] = {}
    try:
        for name, options in descriptions.items():
            if isinstance(options, EngineConfig):
                assert model is not None
                engines[name] = model.engine(options)
            else:
                engines[name] = TorchOffload(for_torch, **options)
    except BaseException:
        for engine in engines.values():
            engine.close()
        raise
    return engines


def _turns(
    engines: dict[str, Any], prompt: Callable[[int], list[int]], rounds: int, new: int, progress: Progress
) -> dict[str, list[Generation]]:
    names, runs, done = list(engines), {name: [] for name in engines}, 0
    for turn in range(rounds + 1):
        shift = turn % len(names)
        for name in [*names[shift:], *names[:shift]]:
            progress.to(done)
            made = engines[name].generate(prompt(turn), max_new_tokens=new)
            done += 1
            if turn:
                runs[name].append(made)
    return runs


@dataclasses.dataclass(repr=False)
class Comparison:
    """What a comparison gave. `runs`: of each contender, the rounds that count."""

    runs: dict[str, list[Generation]]

    def table(self) -> Any:
        """A DataFrame, or rows where pandas is not installed: medians over rounds, beside the first contender's."""
        return tables.table(self._rows())

    def plot(self, ax: Any = None) -> Any:
        """Bars of the time between tokens; returns the axes."""
        axes = draw_bars(tables.Table(self._rows()), "contender", "tbt_ms", ax=ax)
        axes.set_ylabel(f"time between tokens [ms]\n{self._first.stats.times}")
        return axes

    @property
    def _first(self) -> Generation:
        return next(iter(self.runs.values()))[0]

    def _rows(self) -> Iterator[dict[str, Any]]:
        reference = next(iter(self.runs.values()))
        first = _median(run.stats for run in reference)
        for name, runs in self.runs.items():
            stats, times = [run.stats for run in runs], _median(run.stats for run in runs)
            hits, misses = (sum(one.total(what) for one in stats) for what in ("hits", "misses"))
            steps = sum(len(one.steps) for one in stats)
            yield {
                "contender": name,
                "ttft_ms": times["ttft_ms"],
                "tbt_ms": times["tbt_ms"],
                "tbt_ratio": times["tbt_ms"] / first["tbt_ms"],
                "tokens_s": 1e3 / times["tbt_ms"],
                "hit_rate": hits / (hits + misses) if hits + misses else None,
                "MB_a_step": sum(one.total("bytes_h2d") for one in stats) / steps / 1e6,
                "slots": sum(stats[-1].slots),
                "device_MiB": stats[-1].peak_device_bytes / 2**20,
                "same_tokens": all(a.token_ids == b.token_ids for a, b in zip(runs, reference)),
                "rounds": len(runs),
                "clock": stats[-1].times,
            }

    def __repr__(self) -> str:
        rounds = len(next(iter(self.runs.values())))
        return f"<Comparison of {', '.join(self.runs)}: {rounds} rounds, {self._first.stats.times}>"

    def _repr_html_(self) -> str:
        return tables.Table(self._rows())._repr_html_()


def _median(runs: Iterator[RunStats]) -> dict[str, float]:
    """Milliseconds of a prompt and of a token: the median over rounds, of a round's prompt and median token."""
    every = list(runs)
    tokens = [between["median"] for one in every if (between := one.tbt_ms()) is not None]
    return {
        "ttft_ms": statistics.median(1e3 * (one.ttft_s or 0.0) for one in every),
        "tbt_ms": statistics.median(tokens) if tokens else float("nan"),
    }
