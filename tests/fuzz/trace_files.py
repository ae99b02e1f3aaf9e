"""Routing traces, in every form they are written in, and cache states. The reference is what NumPy reads in the file.

What is accepted holds those arrays, keeps every rule of the format (written down again below), says the same after it
is saved again, and can be replayed.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from fuzz.mutate import NUMBERS, change_bytes, change_json
from fuzz.trace_changes import PUBLIC, bomb, changed_public, changed_text, packed
from fuzz.worker import Case, Wrong

TEXTS = ("t.csv", "t.jsonl")
TABLES = ("t.parquet",) if importlib.util.find_spec("pyarrow") else ()
SYSTEMS: dict[str, dict[str, Any]] = {
    "hybrimoe": {},
    "lfru": {"cache": "lfru", "predictor": "previous"},
    "slru": {"cache": "slru", "predictor": "corrected"},
    "s3-fifo": {"cache": "s3-fifo", "predictor": "co-activation"},
    "echo": {"cache": "echo"},
    "random": {"cache": "random"},
}
"""The parts whose states are changed."""


def small(layers: int = 2, experts: int = 6, top_k: int = 2) -> Any:
    """Four steps of two sequences, with everything that a trace may hold."""
    from hybrimoe_jax.trace.columns import Trace
    from hybrimoe_jax.trace.facts import TraceFacts

    rng = np.random.default_rng(0)
    places = {0: (0, 1), 1: (2,), 2: (3,), 3: (4,)}
    rows = [(s, m, q, p) for s, at in places.items() for m in range(layers) for q in range(2) for p in at]
    step, layer, sequence, position = np.array(rows, np.int32).T
    scores, ahead = rng.random((2, len(rows), experts), np.float32)
    ids = np.argsort(-scores, axis=1)[:, :top_k].astype(np.int32)
    ahead[layer == layers - 1] = np.nan
    facts = TraceFacts("qwen2_moe", layers, experts, top_k, {"int4-g64": 1000})
    phase, weights = (step > 0).astype(np.uint8), np.take_along_axis(scores, ids, 1)
    about, extra = {"clock": "wall"}, {"note": np.arange(3.0)}
    return Trace(facts, step, layer, phase, sequence, position, ids, weights, scores, {1: ahead}, about, extra)


class Kind:
    """Traces of a few rows."""

    def __init__(self, base: Path):
        from hybrimoe_jax.decide.cache_state import take_state
        from hybrimoe_jax.trace.export import export_trace
        from hybrimoe_jax.trace.file import save_trace

        trace = small()
        save_trace(trace, base / "t.npz")
        for name in TEXTS + TABLES:
            export_trace(trace, base / name)
        self.files = {name: (base / name).read_bytes() for name in ("t.npz", *TEXTS, *TABLES)}
        self.facts = trace.facts
        self.states = {}
        for system in SYSTEMS:
            planner = self.planner(system)
            self.go_on(planner)
            take_state(planner, trace.facts).save(base / "state.npz")
            self.state(base / "state.npz", system)
            with np.load(base / "state.npz") as archive:
                self.states[system] = {name: archive[name] for name in archive.files}
        take_state(self.planner(), trace.facts).save(base / "state.npz")
        self.files["state.npz"] = (base / "state.npz").read_bytes()
        with np.load(base / "t.npz") as archive:
            self.arrays = {name: archive[name] for name in archive.files}
        for name in self.files:
            if name != "state.npz":
                self.compare(base, base / name, None, True)

    def case(self, rng: random.Random, folder: Path) -> Case:
        name = rng.choice(("t.npz",) * 6 + (*TEXTS, *PUBLIC, *TABLES) + ("state.npz",) * 3)
        arrays, harmless = None, False
        if name == "t.npz" and rng.random() < 0.85:
            arrays, what = self.changed(rng)
            harmless = what.startswith("harmless")
            data = packed(arrays, rng)
            if rng.random() < 0.05:
                data, arrays, harmless = bomb(rng), None, False
                what = "an array that is said to be huge, or inflates to it"
        elif name == "state.npz" and rng.random() < 0.9:
            data, what = self.changed_state(rng)
        elif name in PUBLIC:
            data, what = changed_public(rng, name)
        elif name in TEXTS and rng.random() < 0.8:
            data, what = changed_text(rng, self.files[name])
        else:
            data, what = change_bytes(rng, self.files[name])
        if name in TEXTS and rng.random() < 0.1:
            name, data = name + ".gz", gzip.compress(data)
        path = folder / name
        path.write_bytes(data)
        if name == "state.npz":
            system = what.split(":")[0] if ":" in what else "hybrimoe"
            return Case(what, lambda: self.state(path, system if system in SYSTEMS else "hybrimoe"), (name,))
        return Case(f"{name}: {what}", lambda: self.compare(folder, path, arrays, harmless), (name, "trace facts"))

    def changed(self, rng: random.Random) -> tuple[dict[str, np.ndarray], str]:
        arrays = {name: array.copy() for name, array in self.arrays.items()}
        how = rng.choice(("value",) * 5 + ("meta",) * 3 + ("type", "shape", "drop", "add", "rows", "harmless"))
        name = rng.choice([n for n in arrays if n != "meta"])
        array = arrays[name]
        if how == "meta":
            meta, what = change_json(rng, json.loads(str(arrays["meta"])), ("format", "version", "facts", "about"))
            arrays["meta"] = np.array(json.dumps(meta).replace("\x00", "x"))
            return arrays, f"meta: {what}"
        if how == "value":
            at = rng.randrange(array.size)
            near = (array.flat[at] + 1, array.flat[at] - 1, array.flat[at - 1], 0, 1, 127)
            values = [n for n in NUMBERS if abs(n) < 2**31 and n == int(n)] if array.dtype.kind in "iu" else [*NUMBERS]
            value = rng.choice((*near, *values, *[np.nan, np.inf] * (array.dtype.kind == "f")))
            with np.errstate(all="ignore"):
                array.flat[at] = np.array(value).astype(array.dtype)
            return arrays, f"{name}[{at}] = {array.flat[at]}"
        if how == "harmless":
            arrays["x_more"] = rng.choice((np.arange(3), np.array("a"), np.zeros((0, 3)), np.array(np.nan)))
            arrays["ids"] = arrays["ids"].astype(rng.choice((np.int64, np.int16, np.uint8)))
            return arrays, f"harmless: ids as {arrays['ids'].dtype}, an addition"
        kinds = ("f8", "i8", "u8", "S3", "U3", "?", "c8", "M8[s]", "f2", ">i4")
        with np.errstate(all="ignore"):
            arrays[name] = {
                "type": lambda: array.astype("f4" if array.dtype.kind == "f" else "i8").astype(rng.choice(kinds)),
                "shape": lambda: rng.choice((array[:-1], array[None], array.ravel(), array[..., None], array[:0])),
                "rows": lambda: array[::-1],
                "drop": lambda: array[0],
                "add": lambda: array,
            }[how]()
        if how == "drop":
            del arrays[name]
        if how == "add":
            arrays[rng.choice(("more", "lookahead_2", "lookahead_0", "lookahead_99", "x_", "batch", "../x"))] = array
        return arrays, f"{how} {name}: {arrays[name].dtype if name in arrays else ''}"

    def compare(self, folder: Path, path: Path, arrays: dict | None, harmless: bool) -> None:
        from hybrimoe_jax.errors import UserError
        from hybrimoe_jax.trace.file import save_trace
        from hybrimoe_jax.trace.importers import open_trace
        from hybrimoe_jax.trace.info import info

        try:
            trace = open_trace(path)
        except UserError as error:
            if harmless:
                raise Wrong(f"a sound trace is refused: {error}") from None
            raise
        sound(trace)
        names = ("step", "layer", "phase", "sequence", "position", "ids", "weights", "scores")
        for name in names if arrays is not None else ():
            assert arrays is not None
            have, want = getattr(trace, name), arrays.get(name)
            if have is None or want is None:
                if have is not want:
                    raise Wrong(f"{name}: in the file or in the trace alone")
            elif not np.array_equal(have, want, equal_nan=name in ("weights", "scores")):
                raise Wrong(f"{name}: other values than in the file")
        (folder / "out").mkdir(exist_ok=True)
        save_trace(trace, folder / "out" / "again.npz")
        again = open_trace(folder / "out" / "again.npz")
        if again.facts != trace.facts or not np.array_equal(again.ids, trace.ids):
            raise Wrong("saved and read again it is another trace")
        if {*again.select(np.zeros(1, int)).extra} != {*trace.extra}:
            raise Wrong("an addition is lost in a selection")
        json.dumps(info(trace), allow_nan=False)

    def changed_state(self, rng: random.Random) -> tuple[bytes, str]:
        """A state with one place of its JSON, or one of its arrays, changed."""
        system = rng.choice(list(SYSTEMS))
        arrays = dict(self.states[system])
        names = [name for name in arrays if name != "meta"]
        if names and rng.random() < 0.3:
            name = rng.choice(names)
            array = arrays[name].copy()
            how = rng.choice(("value", "value", "shape", "type", "drop"))
            if how == "value" and array.size:
                with np.errstate(all="ignore"):
                    value = rng.choice((-1, 0, 1, 99, *[np.nan, np.inf, 1e38] * (array.dtype.kind == "f")))
                    array.flat[rng.randrange(array.size)] = np.array(value).astype(array.dtype)
            arrays[name] = array[None] if how == "shape" else array.astype("c16") if how == "type" else array
            if how == "drop":
                del arrays[name]
            return packed(arrays, rng), f"{system}: {how} of {name}"
        meta = json.loads(str(arrays["meta"]))
        part = rng.choice(("learned", "learned", "learned", None))
        if part is None:
            meta, what = change_json(rng, meta, tuple(meta))
        else:
            meta[part], what = change_json(rng, meta[part])
        arrays["meta"] = np.array(json.dumps(meta).replace("\x00", "x"))
        return packed(arrays, rng), f"{system}: {part or ''} {what}"

    def planner(self, system: str = "hybrimoe") -> Any:
        from hybrimoe_jax.decide.planner import Planner
        from hybrimoe_jax.decide.systems import get_system
        from hybrimoe_jax.machine.profile import load_costs
        from hybrimoe_jax.machine.shapes import get_shape

        costs, facts = load_costs("laptop-8gb", get_shape("bundled"), "int4-g64"), self.facts
        chosen = get_system("hybrimoe").override(**SYSTEMS[system])
        return Planner(chosen, facts.layers, facts.experts, facts.top_k, 2, costs)

    def go_on(self, planner: Any) -> None:
        """The steps of the trace, and what is under way after them."""
        from hybrimoe_jax.machine.virtual import VirtualMachine
        from hybrimoe_jax.simulate.replay import replay, settle
        from hybrimoe_jax.simulate.workload import recorded_steps

        machine = VirtualMachine(planner.costs)
        replay(planner, machine, list(recorded_steps(small())))
        settle(planner, machine)

    def state(self, path: Path, system: str = "hybrimoe") -> None:
        from hybrimoe_jax.decide.cache_state import load_state, take_state
        from hybrimoe_jax.errors import UserError

        planner, state = self.planner(system), load_state(path)
        before = take_state(planner, self.facts).digest
        try:
            state.restore(planner, self.facts)
        except UserError:
            if take_state(planner, self.facts).digest != before:
                raise Wrong("a state that is refused has changed the planner") from None
            raise
        have = [sorted(planner.resident(layer)) for layer in range(self.facts.layers)]
        if have != [sorted(layer) for layer in state.meta["resident"]] or planner.back_off != state.meta["back_off"]:
            raise Wrong(f"experts {have} are resident, not those of the file")
        clean = self.planner(system)
        take_state(planner, self.facts).restore(clean, self.facts)
        if take_state(clean, self.facts).digest != take_state(planner, self.facts).digest:
            raise Wrong("taken and restored again it is another state")
        for each in (planner, clean):
            self.go_on(each)
        if take_state(clean, self.facts).meta["resident"] != take_state(planner, self.facts).meta["resident"]:
            raise Wrong("what goes on from it does not go on from the same state taken again")
        accuracy = planner.accuracy
        if any(not 0 <= accuracy.probability(d) <= 1 for d in range(1, len(accuracy.predicted))):
            raise Wrong("a share of predictions that came true is none")


def sound(trace: Any) -> None:
    """Every rule of the format, row by row."""
    facts, seen, last = trace.facts, set(), (0, 0)
    for row, ids in enumerate(trace.ids.tolist()):
        here = int(trace.step[row]), int(trace.layer[row])
        token = (*here, int(trace.sequence[row]), int(trace.position[row]))
        if min(token) < 0 or here[1] >= facts.layers or here < last or token in seen or trace.phase[row] not in (0, 1):
            raise Wrong(f"row {row} is taken: {token}")
        if len(ids) != facts.top_k or len(set(ids)) != len(ids) or not all(0 <= e < facts.experts for e in ids):
            raise Wrong(f"row {row} is taken with experts {ids}")
        last = here
        seen.add(token)
    for array in (trace.weights, trace.scores, *trace.lookahead.values()):
        rows = np.zeros((0, 1)) if array is None else array[~np.isnan(array).all(axis=1)]
        if len(rows) and not (np.isfinite(rows).all() and (rows >= 0).all()):
            raise Wrong("probabilities that are none are taken")
