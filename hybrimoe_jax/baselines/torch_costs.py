"""What things take in torch on this machine, measured at load with the engine's own lanes, for the planner.

The same fit as that of our own warm-up (`machine.fit`). Where the device is this CPU, host experts have its cores too:
the costs say so, and the planner's rules heed it.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import threading
from collections.abc import Callable

import numpy as np
import torch

from hybrimoe_jax.baselines.torch_experts import Bank, Experts, Work
from hybrimoe_jax.baselines.torch_lanes import now
from hybrimoe_jax.baselines.torch_linear import Tensor
from hybrimoe_jax.baselines.torch_link import ThreadLink, Transfer
from hybrimoe_jax.baselines.torch_model import TorchModel
from hybrimoe_jax.engine.lanes.workers import Worker
from hybrimoe_jax.machine.costs import CostModel
from hybrimoe_jax.machine.fit import Samples, fit

REPEATS = 5
LOADS = ((1, 1), (1, 4), (16, 1), (16, 4), (64, 1), (64, 4))
"""(load, experts)."""
TOKENS, CONTEXT = (1, 16), 256


class Probe:
    """Times a model's parts. Args as of `TorchForward`."""

    def __init__(self, model: TorchModel, host: list[Bank], slots: Bank, link: ThreadLink, experts: Experts):
        self.model, self.host, self.slots, self.link, self.experts = model, host, slots, link, experts
        self.layer = model.moe_layers[0]
        self.context = min(CONTEXT, len(model.rotary.cos))
        self._turns = itertools.count()

    def costs(self, distances: int) -> CostModel:
        """The costs of a warm-up. Args: distances: layers that are predicted."""
        samples, shares = Samples(self.slots.expert_bytes), self.model.device.type == "cpu"
        with torch.inference_mode():
            for load, count in LOADS:
                on_host, on_device = min(count, self.host[0].count), min(count, self.slots.count)
                seconds = timed(functools.partial(self._run, self.host[0], load, on_host))
                samples.add("cpu", (load, on_host), seconds)
                if shares:
                    samples.add("alone", (load, on_host), seconds)
                samples.add("device", (load, on_device), self._block(load, on_device))
            for tokens in TOKENS:
                if self.layer.mlp is not None:
                    samples.add("device", (tokens, 0), self._block(tokens, 0))
                tokens = min(tokens, self.context)
                samples.add("layer", (tokens, self.context), self._front(tokens, 0))
            samples.add("transfer", (samples.expert_bytes,), timed(self._fetch))
            with Beside(lambda: self._run(self.host[0], 1, 1)):
                samples.add("transfer_cpu_busy", (samples.expert_bytes,), timed(self._fetch))
            if distances:
                samples.look = max(0.0, self._front(1, distances) - self._front(1, 0))
        return fit(samples, source="warm-up of torch on this machine")

    def _x(self, rows: int, device: torch.device) -> Tensor:
        return torch.full((rows, self.slots.kind.width), 0.01, dtype=self.slots.kind.dtype, device=device)

    def _run(self, bank: Bank, load: int, count: int) -> None:
        """Other experts each time, so that none is in the CPU's caches."""
        device, first = bank.data.device, next(self._turns) * count
        places = sorted({(first + i) % bank.count for i in range(count)})
        rows, mix = [np.arange(load)] * len(places), [np.full(load, 0.1, np.float32)] * len(places)
        out = torch.zeros((load, bank.kind.width), device=device)
        self.experts(Work(bank, places, self._x(load, device), rows, mix), out)
        synchronize(device)

    def _block(self, tokens: int, count: int) -> float:
        """Seconds of the shared experts and `count` others on the device."""
        x = self._x(tokens, self.model.device)

        def run() -> None:
            self.layer.shared(x)
            if count:
                self._run(self.slots, tokens, count)
            synchronize(self.model.device)

        return timed(run)

    def _front(self, tokens: int, distances: int) -> float:
        model, layer = self.model, self.layer
        context = self.context
        positions = np.arange(context - tokens, context, dtype=np.int32)[None]
        places = model.rotary.places(positions, context)
        shapes = layer.attention.cache_shapes(1, context)
        cache = {name: torch.zeros(shape, device=model.device) for name, shape in shapes.items()}
        h = torch.full((1, tokens, model.config.hidden_size), 0.01, device=model.device)
        return timed(lambda: model.front(layer, h, cache, places, distances)[1].packed.cpu())

    def _fetch(self) -> None:
        expert = next(self._turns) % self.host[0].count
        self.link.fetch(Transfer(0, expert, expert % self.slots.count, None)).wait()


class Beside:
    """While open, another thread calls `run` over and over."""

    def __init__(self, run: Callable[[], None]):
        self._run, self._stop = run, threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()

    def _loop(self) -> None:
        with torch.inference_mode():
            while not self._stop.is_set():
                self._run()


def wake_latency() -> float:
    """Seconds to hand a thread nothing and learn that it is done."""
    done = threading.Event()
    worker = Worker(lambda _: done.set(), "torch-wake")

    def wake() -> None:
        done.clear()
        worker.put(True)
        done.wait()

    seconds = timed(wake)
    worker.stop()
    return seconds


def timed(run: Callable[[], object]) -> float:
    """The median of a few runs, the first left out."""
    run()
    times = []
    for _ in range(REPEATS):
        start = now()
        run()
        times.append(now() - start)
    return statistics.median(times)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
