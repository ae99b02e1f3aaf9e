"""Branch and bound for the least makespan where device time depends on the load.

It can be stopped at any time, and says how far off it may be.

The number q of demand fetches is fixed first, so that the link's end depends on the CPU's alone. For each q

  makespan >= CPU end,  >= shared + device work,  >= landing of the last demand fetch + the least device time,

and for any weight w in 0..1 also >= w CPU end + (1 - w) device end, whose minimum is a sum of independent choices once
the q best absent experts are found by sorting (Lagrangian relaxation; w is bisected for the greatest bound, and each w
tried gives a choice too). Then depth first per q, the most promising q first. Identical experts are interchangeable: of
them the device takes the first ones.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

from hybrimoe_jax.decide.schedule.instance import Choice, Instance

FEW_ITEMS, FEWEST_WEIGHTS, ITEMS_PER_WEIGHT = 8, 2, 6
"""Weights tried: none for so few experts, which are sooner enumerated than bounded well.

Else the second, and one more for so many experts.
"""
_HERE, _IN_FLIGHT, _ABSENT = range(3)
_CLOSE = 1.0 - 1e-12
_NEVER = float("inf")


class _Item(NamedTuple):
    cpu: float
    device: float
    group: int
    ready: float
    position: int


class _Relaxed(NamedTuple):
    """The best weight found for a number of demand fetches; `price`: of a place among the fetched."""

    bound: float
    weight: float
    price: float


def refine(instance: Instance, choice: Choice, nodes: int) -> tuple[Choice, float]:
    """A choice at least as good as the given one, and a lower bound on every makespan.

    Infinity: the choice is the optimum.

    Looks at `nodes` partial choices at most.
    """
    items = _items(instance)
    relaxed, choice, best = _relax(instance, items, choice)
    left, open_bound = nodes, float("inf")
    for fetched in sorted(relaxed, key=lambda q: relaxed[q].bound):
        if relaxed[fetched].bound >= best * _CLOSE:
            break
        if left <= 0:
            open_bound = min(open_bound, relaxed[fetched].bound)
            break
        choice, best, left, bound = _dive(instance, items, fetched, relaxed[fetched], choice, best, left)
        open_bound = min(open_bound, bound)
    return choice, open_bound


def _items(instance: Instance) -> list[_Item]:
    """Experts of which there is a choice or work; the heaviest first, identical ones side by side."""
    i = instance
    items = [_Item(c, d, _HERE, 0.0, k) for k, (c, d) in enumerate(zip(i.cpu_here, i.device_here))]
    items += [
        _Item(c, d, _IN_FLIGHT, r, k) for k, (c, d, r) in enumerate(zip(i.cpu_in_flight, i.device_in_flight, i.ready))
    ]
    items += [_Item(c, d, _ABSENT, 0.0, k) for k, (c, d) in enumerate(zip(i.cpu_absent, i.device_absent))]
    return sorted(items, key=lambda item: (-item.cpu, -item.device, item[2:]))


def _may_cpu(instance: Instance, group: int) -> bool:
    if group == _HERE:
        return instance.steals > 0
    return not instance.awaits if group == _IN_FLIGHT else instance.fetches[0] == 0


class _Relaxation:
    """The bounds of every number q of demand fetches, raised by one weight after the other.

    Each number has an interval, `low` to `high`, that holds its best weight.
    """

    def __init__(self, instance: Instance, items: list[_Item]):
        self.instance = instance
        self.on_cpu, self.on_device = [item.cpu for item in items], [item.device for item in items]
        self.absent = [i for i, item in enumerate(items) if item.group == _ABSENT]
        self.others: list[int] = []
        self.fixed_mask, self.fixed_device = 0, instance.shared
        for i, item in enumerate(items):
            if item.group == _ABSENT:
                continue
            if _may_cpu(instance, item.group):
                self.others.append(i)
            else:
                self.fixed_mask |= 1 << i
                self.fixed_device += item.device
        self.cpu_absent = sum([self.on_cpu[i] for i in self.absent])
        size = instance.fetches[1] + 1
        self.bounds, self.weights, self.prices = [_NEVER] * size, [1.0] * size, [0.0] * size
        self.low, self.high = [0.0] * size, [1.0] * size
        self._bound_by_lanes()

    def _bound_by_lanes(self) -> None:
        """The bounds that need no weight: each lane's least end."""
        instance, count = self.instance, len(self.absent)
        least_cpu = [0.0, *accumulate(sorted([self.on_cpu[i] for i in self.absent]))]
        least_device = min([self.on_device[i] for i in self.absent], default=0.0)
        for q in range(instance.fetches[0], instance.fetches[1] + 1):
            cpu = least_cpu[count - q] + (instance.first if q < count else 0.0)
            end = instance.landing(q, cpu) + least_device if q else 0.0
            self.bounds[q] = max(cpu, end, self.fixed_device)

    def halve(self, chosen: int) -> int:
        """Tries the middle of the interval of `chosen`, which tells the others something too; -> its choice (bits)."""
        on_cpu, on_device, bounds, low, high = self.on_cpu, self.on_device, self.bounds, self.low, self.high
        count, most, first = len(self.absent), self.instance.fetches[1], self.instance.first
        w = (low[chosen] + high[chosen]) / 2
        v = 1.0 - w
        keys = sorted([(v * on_device[i] - w * on_cpu[i], i) for i in self.absent])
        cpu, device, mask, found = self.cpu_absent, self.fixed_device, self.fixed_mask, 0
        for i in self.others:
            if w * on_cpu[i] < v * on_device[i]:
                cpu += on_cpu[i]
            else:
                device += on_device[i]
                mask |= 1 << i
        for q in range(most + 1):
            if q:
                i = keys[q - 1][1]
                cpu, device, mask = cpu - on_cpu[i], device + on_device[i], mask | 1 << i
            if q == chosen:
                found = mask
            end = cpu + first if q < count else cpu
            bound = w * end + v * device
            if bound > bounds[q]:
                bounds[q], self.weights[q], self.prices[q] = bound, w, keys[q - 1 if q else 0][0] if keys else 0.0
            if low[q] < w < high[q]:
                (low if end > device else high)[q] = w
        return found


def _relax(instance: Instance, items: list[_Item], choice: Choice) -> tuple[dict[int, _Relaxed], Choice, float]:
    """-> (the bound of each number of demand fetches, the best choice seen, its makespan).

    The number with the lowest bound is halved next. Every weight tried gives a choice too.
    """
    relaxation = _Relaxation(instance, items)
    bounds, best, seen = relaxation.bounds, instance.makespan(choice), set[int]()
    for _ in range(FEWEST_WEIGHTS + len(items) // ITEMS_PER_WEIGHT if len(items) > FEW_ITEMS else 0):
        lowest = bounds.index(min(bounds))
        if bounds[lowest] >= best * _CLOSE:
            break
        mask = relaxation.halve(lowest)
        if mask not in seen:
            seen.add(mask)
            candidate = _choice(items, mask)
            value = instance.makespan(candidate)
            if value < best:
                choice, best = candidate, value
    fewest, found = instance.fetches[0], zip(bounds, relaxation.weights, relaxation.prices)
    return {q: _Relaxed(*one) for q, one in enumerate(found) if q >= fewest}, choice, best


def _rank(
    items: list[_Item], mays: tuple[bool, ...], relaxed: _Relaxed
) -> tuple[list[tuple[_Item, float, float]], list[float], list[int]]:
    """(items with what each lane adds, those that matter most first; by place, the least added and the absent left)."""
    w, prices = relaxed.weight, (0.0, 0.0, relaxed.price)
    ranked = [(item, w * item.cpu, (1.0 - w) * item.device - prices[item.group]) for item in items]
    ranked.sort(key=lambda entry: -abs(entry[1] - entry[2]))
    rest, absent_left = [0.0] * (len(items) + 1), [0] * (len(items) + 1)
    for i in range(len(items) - 1, -1, -1):
        item, on_cpu, on_device = ranked[i]
        rest[i] = rest[i + 1] + (on_cpu if mays[item.group] and on_cpu < on_device else on_device)
        absent_left[i] = absent_left[i + 1] + (item.group == _ABSENT)
    return ranked, rest, absent_left


def _dive(
    instance: Instance, items: list[_Item], fetched: int, relaxed: _Relaxed, choice: Choice, best: float, left: int
) -> tuple[Choice, float, int, float]:
    """Depth first over the items for one number of demand fetches.

    -> (choice, its makespan, nodes left, bound of what was not looked at).
    """
    mays = tuple([_may_cpu(instance, group) for group in range(3)])
    ranked, rest, absent_left = _rank(items, mays, relaxed)
    items, count = [entry[0] for entry in ranked], len(ranked)
    first, shared, landing = instance.first, instance.shared, instance.landing
    least_device = min(instance.device_absent, default=0.0)
    start = (1.0 - relaxed.weight) * shared + fetched * relaxed.price
    if fetched < absent_left[0]:
        start += relaxed.weight * first
    # Bound, item, CPU end, device work, fetched, on device (bits), weighed.
    stack = [(relaxed.bound, 0, 0.0, shared, 0, 0, start)]
    while stack:
        if left <= 0:
            return choice, best, 0, min(node[0] for node in stack)
        bound, i, cpu, work, taken, mask, weighed = stack.pop()
        if bound >= best * _CLOSE:
            continue
        left -= 1
        if i == count:
            candidate = _choice(items, mask)
            value = instance.makespan(candidate)
            if value < best:
                choice, best = candidate, value
            continue
        item, on_cpu, on_device = ranked[i]
        absent = item.group == _ABSENT
        limit, left_over = best * _CLOSE, rest[i + 1]
        lower = other = _NEVER
        cpu_then, work_then = cpu + item.cpu if cpu else first + item.cpu, work + item.device
        then, other_then = weighed + on_cpu, weighed + on_device
        if mays[item.group] and taken + absent_left[i + 1] >= fetched:
            end = landing(fetched, cpu_then) + least_device if fetched else 0.0
            lower = max(bound, cpu_then, work, end, then + left_over)
        same = i > 0 and items[i - 1][:4] == item[:4] and not mask >> (i - 1) & 1
        if not (absent and taken == fetched) and not same:
            other = max(bound, cpu, work_then, item.ready + item.device, other_then + left_over)
        if other < limit and other > lower:  # the lower bound is looked at first
            stack.append((other, i + 1, cpu, work_then, taken + absent, mask | 1 << i, other_then))
        if lower < limit:
            stack.append((lower, i + 1, cpu_then, work, taken, mask, then))
        if other < limit and other <= lower:
            stack.append((other, i + 1, cpu, work_then, taken + absent, mask | 1 << i, other_then))
    return choice, best, left, float("inf")


def _choice(items: list[_Item], mask: int) -> Choice:
    groups: tuple[list[int], list[int], list[int]] = ([], [], [])
    for i, item in enumerate(items):
        if mask >> i & 1:
            groups[item.group].append(item.position)
    return Choice(*(sorted(group) for group in groups))
