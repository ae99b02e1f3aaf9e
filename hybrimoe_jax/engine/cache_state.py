"""A running engine's cache state: saved between two calls, loaded into an engine of the same model and system.

What it holds: `decide.cache_state`. Saving first waits for the prefetches under way and gives them their slots, as the
next step would have. So the engine that saved and one that loads begin their next step alike.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from hybrimoe_jax.decide.cache_state import CacheState, load_state, take_state
from hybrimoe_jax.engine.step import Forward
from hybrimoe_jax.trace.facts import TraceFacts

ROUTER = ".gate.weight"
"""How the name of a router's matrix ends in a checkpoint of any family."""


def routers_of(dense: Mapping[str, Any]) -> dict[str, Any]:
    """The routers among a checkpoint's dense weights."""
    return {name: array for name, array in dense.items() if name.endswith(ROUTER)}


def digest(routers: Mapping[str, Any]) -> str:
    """Tells two checkpoints of one shape apart: a cache state follows the routers."""
    said = hashlib.sha256()
    for name, array in sorted(routers.items()):
        said.update(name.encode() + np.ascontiguousarray(array).tobytes())
    return said.hexdigest()[:16]


def facts_of(config: Any) -> TraceFacts:
    """What a state asks of a model, by its configuration."""
    return TraceFacts(config.model_type, len(config.moe_layers), config.num_experts, config.num_experts_per_tok)


def save(path: str | os.PathLike[str], forward: Forward, config: Any, routers: Mapping[str, Any]) -> None:
    """Args as of `Engine`; UserError where a rule's state cannot be written, or the file."""
    planner = forward.between_steps()
    take_state(planner, facts_of(config), f"cache state {path}", digest(routers)).save(path)


def load(state: CacheState | str | os.PathLike[str], forward: Forward, config: Any, routers: Mapping[str, Any]) -> None:
    """UserError for a state of another model, checkpoint, system or number of slots; nothing has changed then."""
    state = state if isinstance(state, CacheState) else load_state(state)
    planner = forward.between_steps()
    state.restore(planner, facts_of(config), digest(routers))
    forward.fill()
