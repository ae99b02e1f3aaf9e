"""A cache state: what a planner has learned and who is resident, as a file from which another run goes on.

It is taken between two steps, when nothing is under way. It holds each layer's residents, every cache policy (heat,
last uses, step counts, queues), the predictor, how often predictions came true, and for how long prefetching is put
off. It holds no weights and no times, so it serves the same model under another profile. Whatever it says, the answers
stay the same: placement changes none.

The file is an `.npz`: `meta`, JSON text, and the arrays that it names. Reading it never unpickles. Version 1.
"""

# NumPy 2.5 types some functions by what its stubs leave unknown.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
import hashlib
import json
import operator
import os
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from hybrimoe_jax import arguments
from hybrimoe_jax.decide.cache import Belady
from hybrimoe_jax.decide.learned import are_experts, whole
from hybrimoe_jax.decide.packing import pack, unpacked
from hybrimoe_jax.decide.planner import Planner
from hybrimoe_jax.decide.prefetch.prefetch_planner import BACK_OFF_STEPS
from hybrimoe_jax.decide.systems import System
from hybrimoe_jax.errors import UserError, said, shown, shown_name
from hybrimoe_jax.files import check_plain_file, is_object, replacing
from hybrimoe_jax.npz import read_npz
from hybrimoe_jax.trace.facts import TraceFacts

FORMAT, VERSION = "hybrimoe-cache-state", 1


@dataclasses.dataclass(frozen=True)
class CacheState:
    """A state in memory. `where` begins every error about it; `digest` tells states apart."""

    meta: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]
    where: str

    @property
    def digest(self) -> str:
        found = hashlib.sha256(json.dumps({**self.meta, "model": None}, sort_keys=True).encode())
        for name, array in sorted(self.arrays.items()):
            found.update(f"{name} {array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        return found.hexdigest()[:16]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it, whole or not at all."""
        with replacing(path, "wb") as file:
            np.savez_compressed(file, meta=np.array(json.dumps(self.meta)), **cast(Any, dict(self.arrays)))

    def check(
        self, facts: TraceFacts, system: System, slots: list[int] | None = None, routers: str | None = None
    ) -> None:
        """UserError, in one line, where it is of another model, another system, or of other slots.

        Args: routers: a digest of the model's routers, which tells checkpoints of one shape apart. What is None is not
        compared.
        """
        mine, its = _model(facts, routers), self.meta["model"]
        if any(mine[name] != its.get(name) for name in mine if name != "routers"):
            raise UserError(f"{self.where}: it is of {_said(its)}; this model is {_said(mine)}")
        if routers is not None and its.get("routers") not in (None, routers):
            raise UserError(f"{self.where}: it is of another checkpoint of this shape: its routers differ")
        parts = _parts(system)
        for name, value in parts.items():
            if self.meta["system"].get(name) != value:
                there = self.meta["system"].get(name)
                raise UserError(f"{self.where}: its {name} is {shown(there)}; this run's is {shown(value)}")
        its = self.meta["slots"]
        if slots is not None and len(its) != len(slots):
            raise UserError(f"{self.where}: it is of the slots of {len(its)} layers; this run has {len(slots)}")
        for layer, (here, there) in enumerate(zip(slots or (), its)):
            if here != there:
                raise UserError(f"{self.where}: it is of {shown(there)} slots in layer {layer}; this run has {here}")

    def restore(self, planner: Planner, facts: TraceFacts, routers: str | None = None) -> None:
        """Has a planner, with nothing under way, go on from it. UserError as of `check`, and where it is damaged.

        The planner is as before then.
        """
        self.check(facts, planner.system, planner.slots, routers)
        resident, learned = self.meta["resident"], planner.learned()
        try:
            if len(resident) != planner.num_layers:
                raise ValueError(f"residents of {len(resident)} layers; this model has {planner.num_layers}")
            for layer, some in enumerate(resident):
                if not are_experts(some, planner.num_experts):
                    raise ValueError(f"the residents of layer {layer} are {shown(some)}, no experts of this model")
            if not whole(self.meta["back_off"], 0, BACK_OFF_STEPS):
                raise ValueError(f"its back_off is {shown(self.meta['back_off'])}, not 0..{BACK_OFF_STEPS}")
            found, fill = unpacked(self.meta["learned"], self.arrays, learned)
            if not _same_objects(found, learned):
                raise ValueError("what it has learned is not of this run's policies, predictor and accuracy")
            planner.go_on([set(layer) for layer in resident], self.meta["back_off"], self.digest)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.where}: it is damaged ({error}); save it again") from None
        fill()


def _same_objects(found: Any, here: Mapping[str, Any]) -> bool:
    """Whether what was read is `Planner.learned` itself, object for object."""
    if not is_object(found) or found.keys() != here.keys() or not isinstance(found["policies"], list):
        return False
    mine, its = ([*learned.pop("policies"), *learned.values()] for learned in (dict(here), dict(found)))
    return len(mine) == len(its) and all(map(operator.is_, mine, its))


def take_state(
    planner: Planner, facts: TraceFacts, where: str = "cache state", routers: str | None = None
) -> CacheState:
    """The state of a planner that is between two steps and has nothing under way (RuntimeError where it has)."""
    if planner.under_way():
        raise RuntimeError("transfers are under way: a cache state is taken when they have landed")
    for policy in planner.policies:
        if isinstance(policy, Belady):
            raise UserError(f"{where}: the cache policy knows the future of one run: its state is of no use to another")
    learned, arrays = pack(planner.learned(), where)
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "model": _model(facts, routers),
        "system": _parts(planner.system),
        "slots": list(planner.slots),
        "resident": [sorted(planner.resident(layer)) for layer in range(planner.num_layers)],
        "back_off": planner.back_off,
        "learned": learned,
    }
    return CacheState(meta, arrays, where)


def load_state(path: str | os.PathLike[str]) -> CacheState:
    """Reads a file; UserError where it is none of ours, or of a version that is not known."""
    path = arguments.path("cache state", path)
    where = f"cache state {path}"
    check_plain_file(path, where)
    try:
        arrays = read_npz(path)
        meta = json.loads(str(arrays.pop("meta")))
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # a damaged archive fails in zipfile, zlib, struct, numpy or json
        text = f"{where}: not a cache state ({said(error)}); `generate --save-cache-state FILE` writes one"
        raise UserError(text) from None
    if not is_object(meta) or meta.get("format") != FORMAT:
        raise UserError(f"{where}: not a cache state; `generate --save-cache-state FILE` writes one")
    if meta.get("version") != VERSION:
        text = f"version {shown(meta.get('version'))} is not supported (this program reads {VERSION})"
        raise UserError(f"{where}: {text}")
    kinds = {"model": dict, "system": dict, "slots": list, "resident": list, "back_off": int, "learned": list}
    for name, kind in kinds.items():
        if type(meta.get(name)) is not kind:
            there = f"is {shown(meta[name])}" if name in meta else "is missing"
            raise UserError(f"{where}: it is damaged (its {name} {there}); save it again")
    return CacheState(meta, arrays, where)


def _model(facts: TraceFacts, routers: str | None) -> dict[str, Any]:
    shape = {name: getattr(facts, name) for name in ("model_type", "layers", "experts", "top_k")}
    return {**shape, "routers": routers}


def _said(model: Mapping[str, Any]) -> str:
    layers, experts, top_k = (shown(model.get(name)) for name in ("layers", "experts", "top_k"))
    return f"{shown_name(model.get('model_type'))}, {layers} MoE layers of {experts} experts, {top_k} a token"


def _parts(system: System) -> dict[str, Any]:
    """A system's parts by name, as texts and numbers; what it is called does not count."""
    parts = {field.name: getattr(system, field.name) for field in dataclasses.fields(system) if field.name != "name"}
    return {name: str(part) if isinstance(part, str) else part for name, part in parts.items()}
