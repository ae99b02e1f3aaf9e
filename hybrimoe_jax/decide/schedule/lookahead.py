"""Beyond one layer: the makespan, and what the choice of demand fetches means for the coming layer and for later steps.

The paper's objective ends with the layer (HybriMoE, equation 2). But a demand fetch also fills a slot, which saves time when its expert is
asked for again (`Problem.fill`), and holds the link, which could be moving what the next layer will miss (`Problem.coming`):

  makespan + the next layer's least makespan, after the transfers that the link has time for until then - the fills of the experts fetched

Transfers for the next layer queue behind the demand fetches, highest load first, and count where they land before its MoE block starts, by
the probability that its prediction comes true.
"""

from __future__ import annotations

from itertools import accumulate

from hybrimoe_jax.decide.schedule.instance import Choice, Instance
from hybrimoe_jax.decide.schedule.optimal import OptimalScheduler, awaited
from hybrimoe_jax.decide.schedule.problem import Problem, Schedule, Scheduler

_MEMO_LIMIT = 8192


class LookaheadOptimalScheduler(Scheduler):
    """The least sum of this layer, the next layer and minus the fills. Without `fill` and `coming` it is `optimal`.

    Every number of demand fetches and of residents on the CPU is tried. Where loads are equal and at most some interchangeable experts are in
    flight that is exact: the experts fetched are those with the highest fills. Elsewhere the experts fetched are the first by load, by
    fill, or by the sum of CPU time and fill; `optimal`'s choice stands beside them. `Schedule.later` is what the makespan is added to.
    """

    name = "lookahead-optimal"
    looks_ahead = True
    steals = True

    def __init__(self):
        self._optimal = OptimalScheduler()
        self._quick = OptimalScheduler(nodes=0)
        self._costs, self._memo = None, {}

    def forecaster(self) -> Scheduler:
        return self._quick

    def schedule(self, problem: Problem) -> Schedule:
        best = self._optimal.schedule(problem)
        if not problem.fill and problem.coming is None:
            return best
        instance = Instance.of(problem)
        beyond = self._beyond(problem, instance)
        best = best._replace(later=beyond.later(best), bound=0.0)
        found = _scan(instance, beyond, best.makespan + best.later)
        if found is None:
            return best
        other = instance.build(problem, found)
        return other._replace(later=beyond.later(other))

    def later(self, problem: Problem, schedule: Schedule) -> float:
        """Seconds to be expected beyond this layer under a schedule of any rule: the next layer's, less what the fills save."""
        return self._beyond(problem, Instance.of(problem)).later(schedule)

    def _beyond(self, problem: Problem, instance: Instance) -> _Beyond:
        if problem.costs is not self._costs or len(self._memo) > _MEMO_LIMIT:
            self._costs, self._memo = problem.costs, {}
        coming, known = problem.coming, {}
        if coming is not None:
            flags = problem.allow_cpu, problem.allow_fetch, problem.allow_steal
            key = (tuple(sorted(coming.resident)), tuple(sorted(coming.absent, reverse=True)), coming.tokens, flags)
            known = self._memo.setdefault(key, {})
        return _Beyond(problem, instance, self._quick, known)


class _Beyond:
    """What lies beyond one problem's layer. `known` remembers the next layer's makespans by the number of experts moved ahead."""

    def __init__(self, problem: Problem, instance: Instance, rule: Scheduler, known: dict[int, float]):
        self.problem, self.instance, self.rule, self.known = problem, instance, rule, known
        self.coming, self.fill = problem.coming, problem.fill or {}

    def later(self, schedule: Schedule) -> float:
        saved = sum([self.fill.get(expert, 0.0) for expert in schedule.fetch])
        return self.next(len(schedule.fetch), schedule.cpu_seconds, schedule.makespan) - saved

    def next(self, fetched: int, cpu: float, makespan: float) -> float:
        """The next layer's makespan when this one fetches so many and takes so long."""
        if self.coming is None:
            return 0.0
        landing, start = self.instance.landing, makespan + self.coming.gap
        most = min(self.coming.room, len(self.coming.absent)) if self.problem.allow_fetch else 0
        moved = 0
        while moved < most and landing(fetched + moved + 1, cpu) <= start:
            moved += 1
        unaided = self._least(0)
        return unaided - self.coming.chance * (unaided - self._least(moved))

    def _least(self, moved: int) -> float:
        """The next layer's least makespan once the heaviest of its absent experts, `moved` at most, are there."""
        if moved in self.known:
            return self.known[moved]
        problem, coming = self.problem, self.coming
        loads = dict(enumerate([*coming.resident, *sorted(coming.absent, reverse=True)]))
        layer = Problem(loads, range(len(coming.resident) + moved), problem.costs, coming.tokens)
        layer.allow_cpu, layer.allow_fetch = problem.allow_cpu, problem.allow_fetch
        layer.allow_steal = problem.allow_steal
        least = self.rule.schedule(layer).makespan
        self.known[moved] = min(least, self._least(moved - 1)) if moved else least
        return self.known[moved]


def _scan(instance: Instance, beyond: _Beyond, best: float) -> Choice | None:
    """The best choice found with an objective below `best`, if there is one."""
    fills = [beyond.fill.get(expert, 0.0) for expert in instance.absent]
    absent, here, first = len(instance.absent), len(instance.here), instance.first
    fewest, most = instance.fetches
    cpu_here = [0.0, *accumulate(reversed(instance.cpu_here))]
    device_here = [0.0, *accumulate(instance.device_here)]
    found = None
    for order in _orders(instance, fills):
        saved = [0.0, *accumulate([fills[i] for i in order])]
        cpu_absent = [0.0, *accumulate([instance.cpu_absent[i] for i in reversed(order)])]
        for in_flight in awaited(instance):
            left_in_flight = len(instance.in_flight) - len(in_flight)
            cpu_in_flight = sum(instance.cpu_in_flight) - sum([instance.cpu_in_flight[i] for i in in_flight])
            for fetched in range(fewest, most + 1):
                link = instance.link_order(order[:fetched])
                for stolen in range(instance.steals + 1):
                    cpu = cpu_absent[absent - fetched] + cpu_in_flight + cpu_here[stolen]
                    if fetched < absent or left_in_flight or stolen:
                        cpu += first
                    if cpu - saved[fetched] >= best:
                        break
                    work = instance.shared + device_here[here - stolen]
                    makespan = max(cpu, instance.device_seconds(work, in_flight, link, cpu))
                    value = makespan - saved[fetched]
                    if value < best:
                        value += beyond.next(fetched, cpu, makespan)
                    if value < best:
                        best, found = value, Choice(range(here - stolen), in_flight, sorted(order[:fetched]))
    return found


def _orders(instance: Instance, fills: list[float]) -> list[list[int]]:
    """Rankings of the absent experts whose first ones are worth fetching; equal rankings once."""
    positions = range(len(fills))
    both = sorted(positions, key=lambda i: -(instance.cpu_absent[i] + fills[i]))
    orders = [both]
    for order in (sorted(positions, key=lambda i: -fills[i]), list(positions)):
        if order not in orders and not len(set(instance.cpu_absent)) == 1:
            orders.append(order)
    return orders
