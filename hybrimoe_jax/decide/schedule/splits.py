"""Rules that sort the misses once and simulate nothing: all to one lane, or shared out by bandwidth."""

from __future__ import annotations

from hybrimoe_jax.decide.schedule.problem import Problem, Schedule, Scheduler, replay, require_lane, split


class CpuMissesScheduler(Scheduler):
    """Resident experts on the device, every miss on the CPU, as in kTransformers and llama.cpp.

    What is in flight is awaited.
    """

    name = "cpu-misses"
    depends_on_counts_only = True
    uses_link = False

    def schedule(self, problem: Problem) -> Schedule:
        here, in_flight, absent = split(problem)
        require_lane(problem, absent, problem.allow_cpu)
        return replay(problem, absent[::-1], here + in_flight, ())


class FetchMissesScheduler(Scheduler):
    """Every expert on the device: resident ones by falling load while the misses cross the link.

    Misses go highest load (then score) first.
    """

    name = "fetch-misses"
    depends_on_counts_only = True
    uses_cpu = False

    def schedule(self, problem: Problem) -> Schedule:
        here, in_flight, absent = split(problem)
        require_lane(problem, absent, problem.allow_fetch)
        return replay(problem, (), here + in_flight + absent, absent)


class DeviceOnlyScheduler(Scheduler):
    """Every expert on the device as a system without a scheduler has it.

    Experts and their transfers come in the order of their ids.
    """

    name = "device-only"
    depends_on_counts_only = True
    by_id = True
    uses_cpu = False

    def schedule(self, problem: Problem) -> Schedule:
        here, in_flight, absent = (sorted(group) for group in split(problem))
        require_lane(problem, absent, problem.allow_fetch)
        return replay(problem, (), here + in_flight + absent, absent)


class CheaperScheduler(Scheduler):
    """Each miss where it alone would be done first: on the CPU, or over the link and on the device.

    Between equals on the CPU. It looks at no other miss (Fiddler's rule, arXiv 2402.07033).

    What is in flight is awaited.
    """

    name = "cheaper"
    depends_on_counts_only = True

    def schedule(self, problem: Problem) -> Schedule:
        costs, loads = problem.costs, problem.loads
        here, in_flight, absent = split(problem)
        require_lane(problem, absent, problem.allow_cpu or problem.allow_fetch)
        transfer = self.transfer_seconds(problem)
        fetch = [e for e in absent if costs.cpu(loads[e]) > transfer + costs.device(loads[e])]
        if not problem.allow_fetch or not problem.allow_cpu:
            fetch = absent if problem.allow_fetch else []
        cpu = [e for e in absent if e not in fetch]
        return replay(problem, cpu[::-1], here + in_flight + fetch, fetch)


class BandwidthSplitScheduler(Scheduler):
    """FreeToken's rule: misses are split between link and CPU by bandwidth.

    Of m misses the link takes floor(m B_link / B_host), highest load (then score) first, and the CPU the rest.

    B_link is the link's bandwidth beside a computing CPU, and B_host what CPU and link draw from host memory together:
    the CPU reads an expert once, in the time of its smallest load. What is in flight is awaited.
    """

    name = "bandwidth-split"
    depends_on_counts_only = True

    def schedule(self, problem: Problem) -> Schedule:
        here, in_flight, absent = split(problem)
        require_lane(problem, absent, problem.allow_cpu or problem.allow_fetch)
        if not problem.allow_fetch:
            fetched = 0
        elif not problem.allow_cpu:
            fetched = len(absent)
        else:
            read = problem.costs.cpu(1)
            fetched = int(len(absent) * read / (read + problem.costs.transfer(True)) + 1e-9)
        return replay(problem, absent[fetched:][::-1], here + in_flight + absent[:fetched], absent[:fetched])
