"""Which resident expert makes room.

`policy` is the contract; `scored` and `queues` hold the known policies, `echo` our own, `clairvoyant` what knows the
future.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from hybrimoe_jax.decide.cache.clairvoyant import Belady
from hybrimoe_jax.decide.cache.echo import Echo
from hybrimoe_jax.decide.cache.policy import CachePolicy
from hybrimoe_jax.decide.cache.queues import S3FIFO, SLRU
from hybrimoe_jax.decide.cache.scored import LFRU, LFU, LRU, MRS, Random, Static
from hybrimoe_jax.errors import UserError

__all__ = [
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
    "parse_policy",
    "policy_class",
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
"""The policies by name. A policy of one's own need not be here, see `parse_policy`."""


def policy_class(spec: str) -> type[CachePolicy]:
    """The class that `spec` names, see `parse_policy`."""
    return parse_policy(spec)[0]


def parse_policy(spec: str) -> tuple[type[CachePolicy], dict[str, Any]]:
    """A policy's class and parameters.

    Args:
      spec: a name in `POLICIES`, with parameters if wanted ("mrs:alpha=0.3,p=6"), or a class of one's own as
        "package.module:Class", which is imported from where Python looks, the current folder included under
        `python -m`.

    UserError for a name, parameter, module or class that does not exist or is no `CachePolicy`.
    """
    name, _, rest = spec.partition(":")
    if name in POLICIES:
        return POLICIES[name], _parameters(name, rest) if rest else {}
    if name == "belady":
        raise UserError("cache policy 'belady' knows the future: it runs in replays only (bench cache)")
    if not rest:
        raise UserError(
            f"cache policy {spec!r} is unknown (known: {', '.join(POLICIES)}; "
            "or a class of yours as package.module:Class)"
        )
    return _imported(spec, name, rest), {}


def _parameters(name: str, text: str) -> dict[str, Any]:
    known = _numbers(POLICIES[name])
    chosen: dict[str, Any] = {}
    for part in text.split(","):
        key, _, value = part.partition("=")
        if key not in known:
            raise UserError(f"cache {name}: unknown parameter {key!r} (known: {', '.join(known) or 'none'})")
        try:
            chosen[key] = known[key](value)
        except ValueError:
            raise UserError(f"cache {name}: {key}={value!r} is not a number") from None
    POLICIES[name](8, 4, 2, **chosen)  # values out of range are refused here
    return chosen


def _numbers(policy: type[CachePolicy]) -> dict[str, type]:
    """The policy's own number parameters, by the constructor's annotations."""
    found: dict[str, type] = {}
    for parameter in inspect.signature(policy).parameters.values():
        kinds = str(parameter.annotation).split(" | ")
        if parameter.kind is parameter.KEYWORD_ONLY and kinds[0] in ("int", "float") and parameter.name != "layer":
            found[parameter.name] = int if kinds[0] == "int" else float
    return found


def _imported(spec: str, module: str, name: str) -> type[CachePolicy]:
    try:
        found = getattr(importlib.import_module(module), name, None)
    except UserError:
        raise
    except Exception as error:  # whatever the user's module does wrong while it is imported
        raise UserError(f"cache {spec!r}: importing {module} failed ({type(error).__name__}: {error})") from None
    if found is None:
        raise UserError(f"cache {spec!r}: module {module} has no {name}")
    if not (isinstance(found, type) and issubclass(found, CachePolicy)):
        raise UserError(f"cache {spec!r}: {name} is not a class derived from hybrimoe_jax.decide.CachePolicy")
    if inspect.isabstract(found):
        raise UserError(f"cache {spec!r}: {name} lacks the method {', '.join(sorted(found.__abstractmethods__))}")
    return found
