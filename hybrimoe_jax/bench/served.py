"""What contenders of benchmarks answer with: how a run went, by the same words whoever ran."""

from __future__ import annotations

import abc
import gc
import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np


def prompt(tokens: int, vocab: int) -> list[int]:
    """The same prompt for every contender."""
    return np.random.default_rng(1).integers(0, min(vocab, 2000), tokens).tolist()


def ran(stats: Any, made: list[int], costs: Any = None) -> dict[str, Any]:
    """What a run's `RunStats` say of it, as a record holds it; `costs`: of a paced device's lanes."""
    told = stats.summary()
    kept = (
        "hit_rate",
        "cpu_experts",
        "device_experts",
        "demand_fetches",
        "bytes_h2d",
        "prefetch",
        "lanes",
        "compile_s",
    )
    kept += ("hits", "misses", "peak_device_bytes", "host_bytes", "cores", "slots", "overshoot", "device")
    decoded = [step.seconds - step.compile_s for step in stats.steps if step.phase == "decode"]
    phases = {phase: phase_work(stats, phase, costs) for phase in ("prefill", "decode")}
    return {"token_ids": made, "tbt_s": decoded, "phases": phases, **{key: told[key] for key in kept}}


def phase_work(stats: Any, phase: str, costs: Any = None) -> dict[str, Any]:
    """What the lanes did in the steps of a phase: experts computed, tokens through them, bytes moved, busy seconds.

    With `costs`, also the seconds that each lane needs by them.
    """
    steps = [step for step in stats.steps if step.phase == phase]
    layers = [layer for step in steps for layer in step.layers]
    by_costs = {} if costs is None else {"lane_floor_s": planned_seconds(steps, costs)}
    return {
        **by_costs,
        "steps": len(steps),
        "seconds": sum(step.seconds - step.compile_s for step in steps),
        "experts": {lane: sum(len(getattr(layer, lane)) for layer in layers) for lane in ("cpu", "device")},
        "loads": {
            lane: sum(layer.loads[expert] for layer in layers for expert in getattr(layer, lane))
            for lane in ("cpu", "device")
        },
        "bytes_h2d": sum(layer.bytes_h2d for layer in layers),
        "busy_s": {lane: sum(getattr(layer.lanes, lane) for layer in layers) for lane in ("cpu", "device", "link")},
    }


def planned_seconds(steps: list[Any], costs: Any) -> dict[str, float]:
    """What each lane needs for what it did, by a cost model; attention to the cache is left out."""
    needed = {"cpu": 0.0, "device": 0.0, "link": 0.0}
    for step in steps:
        needed["device"] += costs.step(step.tokens)
        for layer in step.layers:
            needed["cpu"] += sum(costs.cpu(layer.loads[expert], i == 0) for i, expert in enumerate(layer.cpu))
            needed["device"] += costs.layer(step.tokens) + costs.shared(step.tokens)
            needed["device"] += sum(costs.device(layer.loads[expert]) for expert in layer.device)
            needed["link"] += layer.bytes_h2d / costs.expert_bytes * costs.transfer()
    return needed


IN_DETAIL = ("ttft_s", "tbt_s", "phases")


class Served(abc.ABC):
    """What all contenders have: `generate` says how it went, and the other requests are made of it."""

    vocab: int
    about: dict[str, Any]

    @abc.abstractmethod
    def names(self) -> list[str]: ...

    @abc.abstractmethod
    def generate(self, name: str, ids: list[int], new: int) -> dict[str, Any]:
        """Greedy: the first token and `new` more."""

    def prefill(self, name: str, tokens: int) -> dict[str, Any]:
        return {"seconds": self.generate(name, prompt(tokens, self.vocab), 0)["ttft_s"]}

    def decode(self, name: str, tokens: int, new: int) -> dict[str, Any]:
        made = self.generate(name, prompt(tokens, self.vocab), new)
        seconds = made.pop("decode_s") / new
        return {"seconds": seconds, **{key: value for key, value in made.items() if key not in IN_DETAIL}}

    def open(self, name: str, options: dict[str, Any]) -> dict[str, Any]:
        """What there is to say of a name from now on; where a process has one form only, nothing."""
        return {}

    def close(self, name: str) -> dict[str, Any]:
        return {}


def stepwise(ids: list[int], new: int, step: Callable[[list[int]], int]) -> dict[str, Any]:
    """How it went where every token is a call of `step`: the prompt's first, then the last token's."""
    seen, made = [time.perf_counter()], []
    for _ in range(new + 1):
        made.append(step(made[-1:] or ids))
        seen.append(time.perf_counter())
    times = [after - before for before, after in itertools.pairwise(seen)]
    return {"ttft_s": times[0], "decode_s": seen[-1] - seen[1], "tbt_s": times[1:], "token_ids": made}


class StepsContender(Served):
    """What has engines with `steps`, `stats` and `costs`: ours and PyTorch's. `engines`: those that are open."""

    engines: dict[str, Any]

    @abc.abstractmethod
    def make(self, options: dict[str, Any]) -> Any:
        """An engine with these options beside the process's own."""

    def names(self) -> list[str]:
        return list(self.engines)

    def open(self, name: str, options: dict[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        self.engines[name] = self.make(options)
        return {"load_s": time.perf_counter() - start}

    def close(self, name: str) -> dict[str, Any]:
        self.engines.pop(name).close()
        gc.collect()
        return {}

    def generate(self, name: str, ids: list[int], new: int) -> dict[str, Any]:
        engine = self.engines[name]
        made, seen = [], [time.perf_counter()]
        for emitted in engine.steps([ids], max_new_tokens=new + 1):
            if emitted.tokens:
                seen.append(time.perf_counter())
            made += [token for _, token in emitted.tokens]
        done = {"ttft_s": seen[1] - seen[0], "decode_s": time.perf_counter() - seen[1]}
        for name, phase in (("ttft_s", "prefill"), ("decode_s", "decode")):  # compiling is told apart
            done[name] -= sum(step.compile_s for step in engine.stats.steps if step.phase == phase)
        by_costs = engine.stats.device != "cpu" or engine.options.clock == "virtual"
        return {**done, **ran(engine.stats, made, engine.costs if by_costs else None)}
