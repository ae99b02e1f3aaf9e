"""Which resident expert makes room.

`policy` is the contract; `scored` and `queues` hold the known policies, `echo` our own, `clairvoyant` what knows the
future.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hybrimoe_jax.decide.cache.clairvoyant import Belady
from hybrimoe_jax.decide.cache.echo import Echo
from hybrimoe_jax.decide.cache.policy import CachePolicy
from hybrimoe_jax.decide.cache.queues import S3FIFO, SLRU
from hybrimoe_jax.decide.cache.scored import LFRU, LFU, LRU, MRS, Random, Static
from hybrimoe_jax.decide.cache.watched import watch_policies
from hybrimoe_jax.decide.registry import Kind, Rule
from hybrimoe_jax.errors import UserError

__all__ = [
    "CACHES",
    "LFRU",
    "LFU",
    "LRU",
    "MRS",
    "POLICIES",
    "S3FIFO",
    "SLRU",
    "Belady",
    "CachePolicy",
    "Echo",
    "Random",
    "Static",
    "build_policies",
    "policy_class",
    "policy_rule",
]

POLICIES: dict[str, type[CachePolicy]] = {
    "mrs": MRS,
    "lru": LRU,
    "lfu": LFU,
    "lfru": LFRU,
    "slru": SLRU,
    "s3-fifo": S3FIFO,
    "echo": Echo,
    "static": Static,
    "random": Random,
}
"""The policies by name. A policy of one's own need not be here, see `registry`."""


def _try_out(policy: type[CachePolicy], parameters: Mapping[str, Any]) -> Sequence[CachePolicy]:
    return policy.for_layers(8, [4, 4], 2, **parameters)


CACHES = Kind(
    "cache policy",
    "cache",
    CachePolicy,
    POLICIES,
    {
        "update": ("scores", "loads"),
        "observe": ("scores", "loads"),
        "victim": ("resident", "protected"),
        "expected": ("expert", "score", "load"),
        "value": ("expert",),
        "admits": ("expert", "victim"),
        "loaded": ("experts",),
        "moved": ("entered", "left"),
        "initial": (),
    },
    ("num_experts", "capacity", "top_k", "frequencies"),
    _try_out,
)


def policy_rule(spec: Any) -> Rule:
    """The cache policy that `spec` names, see `registry`; UserError where there is none."""
    if isinstance(spec, str) and spec == "belady":
        raise UserError("cache policy 'belady' knows the future: it runs in replays only (bench cache)")
    return CACHES.resolve(spec)


def policy_class(spec: Any) -> type[CachePolicy]:
    """The class that `spec` names, see `policy_rule`."""
    return policy_rule(spec).made_by


def build_policies(
    spec: Any, num_experts: int, capacities: Sequence[int], top_k: int, **known: Any
) -> Sequence[CachePolicy]:
    """The policies of all layers, as `spec` names them.

    Args as of `CachePolicy.for_layers`; `known`: what only some callers know, frequencies or Belady's future.
    """
    rule = spec if isinstance(spec, Rule) else policy_rule(spec)
    made = rule.made_by.for_layers(num_experts, capacities, top_k, **known, **rule.parameters)
    if len(made) != len(capacities):
        raise UserError(f"cache {rule}: for_layers gave {len(made)} policies for {len(capacities)} layers")
    return watch_policies(made)
