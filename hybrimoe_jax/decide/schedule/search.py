"""Branch and bound for the least makespan where device time depends on the load: anytime, and it says how far off it may be.

The number q of demand fetches is fixed first, so that the link's end depends on the CPU's alone. For each q

  makespan >= CPU end,  >= shared + device work,  >= landing of the last demand fetch + the least device time,

and for any weight w in 0..1 also >= w CPU end + (1 - w) device end, whose minimum is a sum of independent choices once the q best absent
experts are found by sorting (Lagrangian relaxation; w is bisected for the greatest bound, and each w tried gives a choice too). Then depth
first per q, the most promising q first. Identical experts are interchangeable: of them the device takes the first ones.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

from hybrimoe_jax.decide.schedule.instance import Choice, Instance

FEW_ITEMS, FEWEST_WEIGHTS, ITEMS_PER_WEIGHT = 8, 2, 6
"""Weights tried: none for so few experts, which are sooner enumerated than bounded well; else the second, and one more for so many experts."""
_HERE, _FLYING, _ABSENT = range(3)
_CLOSE = 1.0 - 1e-12
_NEVER = float("inf")


class _Item(NamedTuple):
    cpu: float
    device: float
    group: int
    ready: float
    position: int


class _Relaxed(NamedTuple):
    """The best weight found for a number of demand fetches: bound, weight, and the price of a place among the fetched."""

    bound: float
    weight: float
    price: float


def refine(instance: Instance, choice: Choice, nodes: int) -> tuple[Choice, float]:
    """A choice at least as good as the given one, and a lower bound on every makespan (infinity: the choice is the optimum).

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
        _Item(c, d, _FLYING, r, k) for k, (c, d, r) in enumerate(zip(i.cpu_in_flight, i.device_in_flight, i.ready))
    ]
    items += [_Item(c, d, _ABSENT, 0.0, k) for k, (c, d) in enumerate(zip(i.cpu_absent, i.device_absent))]
    return sorted(items, key=lambda item: (-item.cpu, -item.device, item[2:]))


def _may_cpu(instance: Instance, group: int) -> bool:
    if group == _HERE:
        return instance.steals > 0
    return not instance.awaits if group == _FLYING else instance.fetches[0] == 0


def _relax(instance: Instance, items: list[_Item], choice: Choice) -> tuple[dict[int, _Relaxed], Choice, float]:
    """The bound of each number of demand fetches, the best of the given choice and those that the relaxation makes on the way, its makespan.

    Each number has an interval that holds its best weight; the number with the lowest bound is halved next, and every weight tried tells
    all the others something.
    """
    fewest, most = instance.fetches
    on_cpu, on_device = [item.cpu for item in items], [item.device for item in items]
    absent = [i for i, item in enumerate(items) if item.group == _ABSENT]
    others, fixed_mask, fixed_device = [], 0, instance.shared
    for i, item in enumerate(items):
        if item.group != _ABSENT:
            if _may_cpu(instance, item.group):
                others.append(i)
            else:
                fixed_mask |= 1 << i
                fixed_device += item.device
    count, first = len(absent), instance.first
    cpu_absent = sum([on_cpu[i] for i in absent])
    least_cpu = [0.0, *accumulate(sorted([on_cpu[i] for i in absent]))]
    least_device = min([on_device[i] for i in absent], default=0.0)
    numbers = range(fewest, most + 1)
    bounds, weights, prices = [_NEVER] * (most + 1), [1.0] * (most + 1), [0.0] * (most + 1)
    low, high = [0.0] * (most + 1), [1.0] * (most + 1)
    for q in numbers:
        cpu = least_cpu[count - q] + (first if q < count else 0.0)
        end = instance.landing(q, cpu) + least_device if q else 0.0
        bounds[q] = max(cpu, end, fixed_device)
    best, seen = instance.makespan(choice), set()
    for _ in range(FEWEST_WEIGHTS + len(items) // ITEMS_PER_WEIGHT if len(items) > FEW_ITEMS else 0):
        lowest = bounds.index(min(bounds))
        if bounds[lowest] >= best * _CLOSE:
            break
        w = (low[lowest] + high[lowest]) / 2
        v = 1.0 - w
        keys = sorted([(v * on_device[i] - w * on_cpu[i], i) for i in absent])
        cpu, device, mask = cpu_absent, fixed_device, fixed_mask
        for i in others:
            if w * on_cpu[i] < v * on_device[i]:
                cpu += on_cpu[i]
            else:
                device += on_device[i]
                mask |= 1 << i
        for q in range(most + 1):
            if q:
                i = keys[q - 1][1]
                cpu, device, mask = cpu - on_cpu[i], device + on_device[i], mask | 1 << i
            if q < fewest:
                continue
            end = cpu + first if q < count else cpu
            bound = w * end + v * device
            if bound > bounds[q]:
                bounds[q], weights[q], prices[q] = bound, w, keys[q - 1 if q else 0][0] if keys else 0.0
            if low[q] < w < high[q]:
                if end > device:
                    low[q] = w
                else:
                    high[q] = w
            if q == lowest and mask not in seen:
                seen.add(mask)
                candidate = _choice(items, mask)
                value = instance.makespan(candidate)
                if value < best:
                    choice, best = candidate, value
    return {q: _Relaxed(bounds[q], weights[q], prices[q]) for q in numbers}, choice, best


def _dive(instance, items, fetched, relaxed, choice, best, left):
    """Depth first over the items for one number of demand fetches -> (choice, its makespan, nodes left, bound of what was not looked at)."""
    w, price = relaxed.weight, relaxed.price
    v = 1.0 - w
    count, mays = len(items), tuple([_may_cpu(instance, group) for group in range(3)])
    prices = (0.0, 0.0, price)
    ranked = []
    for item in items:
        on_cpu, on_device = w * item.cpu, v * item.device - prices[item.group]
        ranked.append((-abs(on_cpu - on_device), item, on_cpu, on_device))
    ranked.sort(key=_first)
    items = [entry[1] for entry in ranked]
    rest = [0.0] * (count + 1)  # the least that the items from here on add
    absent_left = [0] * (count + 1)
    for i in range(count - 1, -1, -1):
        _, item, on_cpu, on_device = ranked[i]
        rest[i] = rest[i + 1] + (on_cpu if mays[item.group] and on_cpu < on_device else on_device)
        absent_left[i] = absent_left[i + 1] + (item.group == _ABSENT)
    first, shared, landing = instance.first, instance.shared, instance.landing
    least_device = min(instance.device_absent, default=0.0)
    start = v * shared + fetched * price + (w * first if fetched < absent_left[0] else 0.0)
    stack = [
        (relaxed.bound, 0, 0.0, shared, 0, 0, start)
    ]  # bound, item, CPU end, device work, fetched, on device (bits), weighed
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
        _, item, on_cpu, on_device = ranked[i]
        absent = item.group == _ABSENT
        limit, left_over = best * _CLOSE, rest[i + 1]
        lower = other = _NEVER
        if mays[item.group] and taken + absent_left[i + 1] >= fetched:
            cpu_then = cpu + item.cpu if cpu else first + item.cpu
            end = landing(fetched, cpu_then) + least_device if fetched else 0.0
            then = weighed + on_cpu
            lower = max(bound, cpu_then, work, end, then + left_over)
        same = i > 0 and items[i - 1][:4] == item[:4] and not mask >> (i - 1) & 1
        if not (absent and taken == fetched) and not same:
            work_then = work + item.device
            other_then = weighed + on_device
            other = max(bound, cpu, work_then, item.ready + item.device, other_then + left_over)
        if other < limit and other > lower:  # the lower bound is looked at first
            stack.append((other, i + 1, cpu, work_then, taken + absent, mask | 1 << i, other_then))
        if lower < limit:
            stack.append((lower, i + 1, cpu_then, work, taken, mask, then))
        if other < limit and other <= lower:
            stack.append((other, i + 1, cpu, work_then, taken + absent, mask | 1 << i, other_then))
    return choice, best, left, float("inf")


def _first(entry: tuple) -> float:
    return entry[0]


def _choice(items: list[_Item], mask: int) -> Choice:
    groups = [], [], []
    for i, item in enumerate(items):
        if mask >> i & 1:
            groups[item.group].append(item.position)
    return Choice(*(sorted(group) for group in groups))
