"""Echo: keeps the experts that followed earlier tokens which were routed like this one.

Text repeats itself, and a token's routing is a fingerprint of the token and its context. `Memory` holds which experts
each of the last `window` steps chose in each layer, as bit masks, and knows at any moment how much each of those steps
resembles the current one: experts in common, over the layers of this step so far and, with less weight, over the steps
before it. A layer's policy asks which experts were used *after* the most similar steps: the value of an expert is the
similarity-weighted mean of its discounted uses in the steps that followed,

    value(e) = sum_m w_m sum_h d^(h-1) [e used at step m + h] / sum_m w_m,    w_m = exp(sharpness * similarity(now, m)),

which is a kernel regression of the discounted number of coming uses. The horizon grows with capacity over top-k, that
is with how long an unused expert can stay. Where nothing similar is remembered, decayed frequencies at two time scales
take over, as one more neighbour of similarity `floor`. So the work of a step is constant, nothing is trained, and no
parameter depends on the model or the task.

Ours. Related: FineMoE (EuroSys 2026) searches expert maps of earlier iterations for prefetching; kNN language models
(Khandelwal et al., ICLR 2020) predict tokens in this way.
"""

# NumPy 2.5 types some functions by what its stubs leave unknown.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Self

import numpy as np

from hybrimoe_jax.decide.cache.policy import CachePolicy
from hybrimoe_jax.errors import UserError

# Fixed on the development halves of the public traces (docs/log); the results are flat around all of them.
SHARPNESS = 19.0
NEAREST = 64  # neighbours at most; those with less than e^-CUT of the nearest one's weight are left out
CUT = 4.0
PAST, PAST_DECAY = 0.25, 0.25  # weight of the steps before this one
OWN = 3.0  # further weight of the layer that asks
FLOOR = 0.4
HORIZON = 1.2  # discount time constant, in units of capacity / top-k steps
TIME_SCALES = (20.0, 200.0)  # of the frequencies, steps
NEGLIGIBLE = 1e-3  # share of the weight that is not worth computing
WINDOW = 4096


class Memory:
    """Which experts the last `window` steps chose in each layer, and how like the current step each of them is.

    Args:
      num_layers, num_experts, top_k: of the model. A step that activates more than 2 top-k experts of a layer (many
        tokens at once) says little about any one token: that layer of it is left blank.
      horizon: how many steps after a remembered one are asked for at most.
      window: steps remembered; a ring of `window` slots and `horizon` blank ones, so that what has not happened yet
        reads as nothing.
    """

    def __init__(self, num_layers: int, num_experts: int, top_k: int, horizon: int, window: int = WINDOW):
        if window < 1:
            raise UserError(f"cache echo: window {window} must be at least 1")
        self.num_experts, self.top_k, self.horizon = num_experts, top_k, horizon
        self.size = window + 1 + horizon
        self.masks = np.zeros((num_layers, -(-num_experts // 64), self.size), np.uint64)
        self.slot = 0  # of the current step
        self._layer, self._chosen = num_layers, 0  # the last layer, experts of this step so far
        self._here = np.zeros(self.size, np.float32)  # by slot: experts in common with this step so far
        self._past = np.zeros(
            self.size, np.float32
        )  # the same for the steps before, discounted, as seen from the slot after
        self._ahead = np.arange(1, horizon + 1)
        self._own = np.float32(OWN)
        self._extra = OWN + PAST / (1 - PAST_DECAY) * num_layers

    def observe(self, layer: int, experts: Collection[int]) -> tuple[np.ndarray, np.ndarray, float] | None:
        """Adds a layer of the current step; a layer not behind the last one begins the next step.

        Returns:
          slots of the most similar earlier steps, their weights (1 for the most similar) and the similarity of that one
          (0..1); None where no step has anything in common.
        """
        if layer <= self._layer:
            self._next_step()
        self._layer = layer
        if not 0 < len(experts) <= 2 * self.top_k:
            return None
        rows, query = self.masks[layer], [0] * self.masks.shape[1]
        for expert in experts:
            query[expert >> 6] |= 1 << (expert & 63)
        common = [np.bitwise_count(row & np.uint64(word)) for row, word in zip(rows, query) if word]
        common = common[0] if len(common) == 1 else sum(common)
        for row, word in zip(rows, query):
            row[self.slot] = word
        self._here += common
        self._chosen += len(experts)
        total = common * self._own
        total += self._here
        total += self._past
        nearest = float(total[total.argmax()])
        if nearest <= 0:
            return None
        whole = self._chosen + len(experts) * self._extra
        scale = SHARPNESS / whole
        (slots,) = (total > max(0.0, nearest - CUT / scale)).nonzero()
        if len(slots) > NEAREST:
            slots = slots[np.argpartition(total[slots], len(slots) - NEAREST)[-NEAREST:]]
        return slots, np.exp((total[slots] - nearest) * scale), nearest / whole

    def followers(self, layer: int, slots: np.ndarray, weights: np.ndarray, discounts: np.ndarray) -> np.ndarray:
        """[num_experts] float32: uses in the steps after `slots`, weighted.

        They are discounted by the number of steps after (from 1).
        """
        after = slots[:, None] + self._ahead[: len(discounts)]
        rows = self.masks[layer].take(after.ravel(), axis=1, mode="wrap").T
        bits = np.unpackbits(np.ascontiguousarray(rows).view(np.uint8), bitorder="little")
        bits = bits.astype(np.float32).reshape(after.size, -1)
        return ((weights[:, None] * discounts).ravel() @ bits)[: self.num_experts]

    def _next_step(self) -> None:
        past, here = self._past, self._here
        past *= PAST_DECAY
        here *= PAST
        past += here
        past[:] = np.roll(past, 1)
        here[:] = 0
        self._chosen = 0
        self.slot = (self.slot + 1) % self.size
        ahead = (self.slot + self.horizon) % self.size
        self.masks[:, :, ahead] = 0


class Echo(CachePolicy):
    """One layer's share of it; see the module's docstring. Alone, it remembers its own layer only.

    Args:
      memory, layer: shared by the layers of a model, see `for_layers`.
      window: steps remembered, where no memory is given.
    """

    sees = "capacity"

    def __init__(
        self,
        num_experts: int,
        capacity: int,
        top_k: int,
        *,
        memory: Memory | None = None,
        layer: int = 0,
        window: int = WINDOW,
        **common: Any,
    ):
        super().__init__(num_experts, capacity, top_k, **common)
        self.discounts = discounts(capacity, top_k)
        self.memory = Memory(1, num_experts, top_k, len(self.discounts), window) if memory is None else memory
        self.layer = layer
        self._reach = float(self.discounts.sum())
        self._usual = [Frequencies(num_experts, scale) for scale in TIME_SCALES]

    @classmethod
    def for_layers(
        cls,
        num_experts: int,
        capacities: Sequence[int],
        top_k: int,
        *,
        frequencies: Sequence[Sequence[float]] | None = None,
        window: int = WINDOW,
        **parameters: Any,
    ) -> Sequence[Self]:
        horizon = max((len(discounts(slots, top_k)) for slots in capacities), default=1)
        memory = Memory(len(capacities), num_experts, top_k, horizon, window)
        known = frequencies or [None] * len(capacities)
        return [
            cls(num_experts, slots, top_k, frequencies=known[layer], memory=memory, layer=layer, **parameters)
            for layer, slots in enumerate(capacities)
        ]

    def update(self, scores: Sequence[float] | None, loads: Mapping[int, int]) -> None:
        for frequencies in self._usual:
            frequencies.add(loads)
        near = self.memory.observe(self.layer, loads)
        if near is None:
            self.heat = self._prior(1.0).tolist()
            return
        slots, weights, similarity = near
        value = self.memory.followers(self.layer, slots, weights, self.discounts)
        total = float(weights.sum())
        floor = math.exp(SHARPNESS * (FLOOR - similarity))
        if floor > NEGLIGIBLE * total:
            value += self._prior(floor)
            total += floor
        value /= total
        self.heat = value.tolist()

    def _prior(self, weight: float) -> np.ndarray:
        """[num_experts]: discounted coming uses if each expert went on as usual, times `weight`."""
        weight *= self._reach / len(self._usual)
        usual = np.zeros(self.num_experts)
        for frequencies in self._usual:
            usual += np.array(frequencies.counts) * (weight / frequencies.steps)
        return usual


class Frequencies:
    """Uses of each expert, decayed with a time constant of `scale` steps.

    `counts` over `steps` is the share of steps that use it.

    Later steps count more instead of earlier ones less, so that a step touches only the experts that it uses.
    """

    def __init__(self, num_experts: int, scale: float):
        self.counts, self.steps = [0.0] * num_experts, 0.0
        self._gain, self._growth = 1.0, 1 / (1 - 1 / scale)

    def add(self, experts: Collection[int]) -> None:
        self._gain *= self._growth
        self.steps += self._gain
        for expert in experts:
            self.counts[expert] += self._gain
        if self._gain > 1e100:
            self.counts = [count / self._gain for count in self.counts]
            self.steps /= self._gain
            self._gain = 1.0


def discounts(capacity: int, top_k: int) -> np.ndarray:
    """[horizon] float32: what a use in 1, 2, ... steps counts."""
    constant = HORIZON * max(1.0, capacity / top_k)
    return np.exp(-np.arange(math.ceil(3 * constant)) / constant).astype(np.float32)
