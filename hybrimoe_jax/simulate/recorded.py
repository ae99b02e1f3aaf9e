"""Replaying a live run: the same counts again, from what its trace carries.

`generate --trace` writes the planner's parts, its costs and, since under the wall clock they cannot be computed, when
each prefetch landed. Under the virtual clock the times come out equal as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hybrimoe_jax.decide.cache_state import CacheState, take_state
from hybrimoe_jax.decide.plan import LayerPlan
from hybrimoe_jax.decide.planner import Planner
from hybrimoe_jax.decide.systems import System
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.machine.costs import CostModel
from hybrimoe_jax.machine.profile import Figures, MachineCosts, MachineProfile
from hybrimoe_jax.machine.shapes import ModelShape
from hybrimoe_jax.machine.virtual import VirtualMachine
from hybrimoe_jax.simulate.replay import Result, replay, settle
from hybrimoe_jax.simulate.workload import recorded_steps
from hybrimoe_jax.trace.columns import Trace
from hybrimoe_jax.trace.file import EMPTY
from hybrimoe_jax.trace.tokens import load_recording


class Landings:
    """Stands in for the virtual machine under the wall clock: prefetches land when the trace says so.

    Times are the planner's own.
    """

    now = None
    cpu = device = link = attention = 0.0

    def __init__(self, trace: Trace):
        self._due: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for step, before, layer, expert in trace.extra.get("landed", ()):
            self._due.setdefault((int(step), int(before)), []).append((int(layer), int(expert)))
        self._at = (-1, 0)

    def step(self, tokens: int, stream: Sequence[int] = ()) -> None:
        self._at = (self._at[0] + 1, 0)

    def front(self, layer: int, tokens: int, context: int, looked: bool) -> None:
        self._at = (self._at[0], layer)

    def landed(self) -> list[tuple[int, int]]:
        return self._due.get(self._at, [])

    def run(self, plan: LayerPlan, loads: Mapping[int, int], tokens: int) -> None:
        pass

    def prefetch(self, layer: int, expert: int) -> None:
        pass

    def settle(self) -> list[tuple[int, int]]:
        return self._due.get((self._at[0] + 1, 0), [])


def replay_run(
    trace: Trace, where: str | Path = "trace", state: CacheState | None = None, save: str | Path | None = None
) -> tuple[Planner, Result]:
    """Replays the very run that a trace was recorded from; UserError where it does not carry what that takes.

    Under the wall clock the result's times are all 0: a replay measures nothing.

    Args: state: the cache state that the run began with, if it did. save: a file for the one that it ended with.
    """
    if not len(trace):
        raise UserError(f"{where}: {EMPTY}")
    run = trace.about.get("run")
    if not isinstance(run, dict):
        raise UserError(f"{where}: carries no run to repeat; `generate --trace` writes one")
    if run.get("steps_before"):
        raise UserError(
            f"{where}: recording began after {run['steps_before']} layers had been planned; start it with the run"
        )
    try:
        broken_off = run.get("broken_off")
        if broken_off is not None and int(trace.step[-1]) >= broken_off:
            raise UserError(
                f"{where}: the run went on after a step that was broken off, before step {broken_off}: "
                "it cannot be repeated"
            )
        costs = _costs(run, where)
        system = System(**run["system"])
        facts = trace.facts
        planner = Planner(
            system,
            facts.layers,
            facts.experts,
            facts.top_k,
            run["slots"],
            costs,
            frequencies=run["frequencies"],
            recording=load_recording(system.recording),
            max_in_flight=run["max_in_flight"],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: its record of the run is damaged ({error})") from None
    _begin(planner, run.get("cache_state"), state, facts, where)
    machine = VirtualMachine(costs) if trace.about.get("clock") == "virtual" else Landings(trace)
    result = replay(planner, machine, recorded_steps(trace))
    if save is not None:
        settle(planner, machine)
        take_state(planner, facts, f"cache state {save}").save(save)
    return planner, result


def _begin(planner: Planner, began: str | None, state: CacheState | None, facts, where: str | Path) -> None:
    """Has a planner begin with the cache state that the run began with."""
    if state is None:
        if began is not None:
            raise UserError(f"{where}: its run began with a cache state; give that file with --load-cache-state")
        return
    if began is None:
        raise UserError(f"{where}: its run began with no cache state; leave out --load-cache-state")
    if state.digest != began:
        raise UserError(f"{state.where}: it is not the cache state that the run of {where} began with")
    state.restore(planner, facts)


def _costs(run: dict, where: str | Path) -> CostModel | MachineCosts:
    said = run["costs"]
    try:
        if "figures" not in said:
            return CostModel(**said)
        profile = MachineProfile(said["profile"], "", Figures(**said["figures"]), {}, said["combine"])
        return MachineCosts(profile, ModelShape(**run["shape"]), said["format"])
    except UserError as error:
        raise UserError(f"{where}: its record of the run is damaged ({error})") from None
