"""Replaying a live run: the same counts again, from what its trace carries.

`generate --trace` writes the planner's parts, its costs and, since under the wall clock they cannot be computed, when
each prefetch landed. Under the virtual clock the times come out equal as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from hybrimoe_jax.decide.cache_state import CacheState, take_state
from hybrimoe_jax.decide.learned import whole
from hybrimoe_jax.decide.plan import LayerPlan
from hybrimoe_jax.decide.planner import Planner
from hybrimoe_jax.decide.systems import System
from hybrimoe_jax.errors import UserError, said, shown
from hybrimoe_jax.machine.costs import CostModel
from hybrimoe_jax.machine.profile import Figures, MachineCosts, MachineProfile
from hybrimoe_jax.machine.shapes import ModelShape
from hybrimoe_jax.machine.virtual import VirtualMachine
from hybrimoe_jax.simulate.replay import Result, replay, settle
from hybrimoe_jax.simulate.workload import recorded_steps
from hybrimoe_jax.trace.columns import Trace
from hybrimoe_jax.trace.facts import TraceFacts
from hybrimoe_jax.trace.file import EMPTY
from hybrimoe_jax.trace.tokens import load_recording


class Landings:
    """Stands in for the virtual machine under the wall clock: prefetches land when the trace's `x_landed` says so.

    Times are the planner's own. UserError where `x_landed` is malformed or tells of what cannot land.

    Args: where: begins every error.
    """

    now = None
    cpu = device = link = attention = 0.0

    def __init__(self, trace: Trace, planner: Planner, where: str | Path):
        self._due: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self._planner, self._where, rows = planner, where, trace.extra.get("landed", np.zeros((0, 4), np.int32))
        if rows.dtype.kind not in "iu" or rows.ndim != 2 or rows.shape[1] != 4:
            found = f"{rows.dtype} {list(rows.shape)}"
            raise UserError(f"{where}: x_landed is {found}; integers [n, 4] are needed; record it again")
        facts = trace.facts
        ends = int(trace.step[-1]) + 1, facts.layers - 1, facts.layers - 1, facts.experts - 1
        for name, column, end in zip(("step", "layer before which it landed", "layer", "expert"), rows.T, ends):
            for row in np.flatnonzero((column < 0) | (column > end))[:1].tolist():
                raise UserError(
                    f"{where}: x_landed row {row} has the {name} {column[row]}, outside 0..{end}; record it again"
                )
        for step, before, layer, expert in rows.tolist():
            self._due.setdefault((step, before), []).append((layer, expert))
        self._at = (-1, 0)

    def step(self, tokens: int, stream: Sequence[int] = ()) -> None:
        self._at = (self._at[0] + 1, 0)

    def front(self, layer: int, tokens: int, context: int, looked: bool) -> None:
        self._at = (self._at[0], layer)

    def landed(self) -> list[tuple[int, int]]:
        return self._landing(self._at)

    def run(self, plan: LayerPlan, loads: Mapping[int, int], tokens: int) -> None:
        pass

    def prefetch(self, layer: int, expert: int) -> None:
        pass

    def settle(self) -> list[tuple[int, int]]:
        return self._landing((self._at[0] + 1, 0))

    def _landing(self, at: tuple[int, int]) -> list[tuple[int, int]]:
        due = self._due.get(at, [])
        under_way = self._planner.under_way() if due else []
        for number, (layer, expert) in enumerate(due):
            if (layer, expert) not in under_way or (layer, expert) in due[:number]:
                raise UserError(
                    f"{self._where}: x_landed has expert {expert} of layer {layer} land before layer {at[1]} of step "
                    f"{at[0]}, where no prefetch of it is under way; record it again"
                )
        return due


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
            f"{where}: recording began after {shown(run['steps_before'])} layers had been planned; start it with the "
            "run"
        )
    broken_off, facts = run.get("broken_off"), trace.facts
    if broken_off is not None and (not whole(broken_off) or int(trace.step[-1]) >= broken_off):
        raise UserError(
            f"{where}: the run went on after a step that was broken off, before step {shown(broken_off)}: "
            "it cannot be repeated"
        )
    planner = _planner(run, facts, where)
    _begin(planner, run.get("cache_state"), state, facts, where)
    machine = (
        VirtualMachine(planner.costs) if trace.about.get("clock") == "virtual" else Landings(trace, planner, where)
    )
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


def _planner(run: dict, facts: TraceFacts, where: str | Path) -> Planner:
    """The run's planner, anew. UserError for what cannot be in the record of a run."""
    try:
        costs = _costs(run)
        system = System(**run["system"])
        for name, most in (("slots", facts.experts), ("max_in_flight", facts.layers * facts.experts)):
            for value in run[name] if name == "slots" else [run[name]]:
                if not whole(value, 0, most):
                    raise UserError(f"{name} {shown(value)} is no whole number within 0..{most}")
    except UserError as error:
        raise _damaged(where, str(error)) from None
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise _damaged(where, said(error)) from None
    recording = load_recording(system.recording)
    try:
        return Planner(
            system,
            facts.layers,
            facts.experts,
            facts.top_k,
            run["slots"],
            costs,
            frequencies=run["frequencies"],
            recording=recording,
            max_in_flight=run["max_in_flight"],
        )
    except UserError as error:
        raise _damaged(where, str(error)) from None
    except (LookupError, TypeError, AttributeError) as error:
        raise _damaged(where, said(error)) from None


def _damaged(where: str | Path, what: str) -> UserError:
    return UserError(f"{where}: its record of the run, about.run, is damaged ({what}); record it again")


def _costs(run: dict) -> CostModel | MachineCosts:
    found = run["costs"]
    if "figures" not in found:
        return CostModel(**found)
    profile = MachineProfile(found["profile"], "", Figures(**found["figures"]), {}, found["combine"])
    return MachineCosts(profile, ModelShape(**run["shape"]), found["format"])
