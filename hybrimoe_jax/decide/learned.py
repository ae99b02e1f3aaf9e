"""What a cache state may say of the package's own rules: the attributes that steps change, and what these can be.

All their other attributes are settings, which are the same here. Of somebody else's rule only what it inherits is
known; what else it says of itself is its own affair, and it is watched while it runs.
"""

# It compares values of any type.
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownLambdaType=false

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

import numpy as np

from hybrimoe_jax.decide.cache.echo import Frequencies, Memory
from hybrimoe_jax.decide.cache.policy import CachePolicy
from hybrimoe_jax.decide.cache.queues import S3FIFO, SLRU
from hybrimoe_jax.decide.cache.scored import LFRU
from hybrimoe_jax.decide.prefetch.co_activation import CoActivation
from hybrimoe_jax.decide.prefetch.prediction import Accuracy, Predictor, RouterOutlook
from hybrimoe_jax.decide.prefetch.predictors import Corrected, Perfect, Previous
from hybrimoe_jax.decide.watch import trusted
from hybrimoe_jax.errors import shown

MOST, COUNTED = 1e120, 2**53
"""No number that a rule of ours learns is beyond the one, no count beyond the other."""
_INHERITED = frozenset({"num_experts", "capacity", "top_k", "num_layers", "distances"})


def check_learned(here: Any, said: Mapping[str, Any]) -> None:
    """ValueError, which names the attribute, where an object such as `here` cannot have the attributes `said`.

    Objects inside them are those of `here` itself. What cannot be compared at all raises TypeError, IndexError and so
    on.
    """
    kind, new = type(here).__qualname__, {name: value for name, value in said.items() if not is_own(value)}
    there = {name: value for name, value in vars(here).items() if not is_own(value)}
    changing = {name: fits for own in type(here).__mro__ for name, fits in _LEARNED.get(own, {}).items()}
    ours = trusted(here, ())
    wanted = there.keys() if ours else there.keys() & (_INHERITED | changing.keys())
    if missing := sorted(wanted - new.keys()):
        raise ValueError(f"it lacks {kind}.{missing[0]}")
    if unknown := sorted(n for n in new.keys() - there.keys() if ours or not n.isidentifier() or hasattr(here, n)):
        raise ValueError(f"no {kind} has the attribute {shown(unknown[0])}")
    for name, value in new.items():
        if name in changing:
            if not changing[name](value, here, new):
                raise ValueError(f"{kind}.{name} is {shown(value)}, which it never is")
        elif name in wanted and not _same(value, there[name]):
            raise ValueError(f"{kind}.{name} is {shown(value)}; here it is {shown(there[name])}")


def is_own(value: Any) -> bool:
    """Whether it is a function or a class, of which a file says nothing: the object's own stays."""
    function = type(value).__module__ in ("builtins", "functools", "types") and callable(value)
    return function or isinstance(value, type) or (callable(value) and not hasattr(value, "__dict__"))


def _same(value: Any, here: Any) -> bool:
    """Whether a setting is as it is here: plain values and arrays by what they are, others by being the same object."""
    if isinstance(here, np.ndarray):
        alike = isinstance(value, np.ndarray) and (value.dtype, value.shape) == (here.dtype, here.shape)
        return alike and np.array_equal(value, here)
    if isinstance(here, (list, tuple)):
        alike = type(value) is type(here) and len(value) == len(here)
        return alike and all(map(_same, value, cast("Collection[Any]", here)))
    if isinstance(here, np.generic):
        return type(value) is type(here) and bool(value == here)
    if isinstance(here, (bool, int, float, str)):
        return isinstance(value, bool) == isinstance(here, bool) and bool(value == here)
    return value is here


def _number(value: Any, least: float = -MOST, most: float = MOST) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and bool(least <= value <= most)


def whole(value: Any, least: int = 0, most: int = COUNTED) -> bool:
    """Whether it is a whole number, and no bool, in these bounds."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(least <= value <= most)


def _each(values: Any, size: int, fits: Callable[[Any], bool]) -> bool:
    return isinstance(values, (list, tuple, np.ndarray)) and len(values) == size and all(map(fits, values))


def _numbers(values: Any, size: int, least: float = -MOST) -> bool:
    return _each(values, size, lambda value: _number(value, least))


def _counts(values: Any, size: int, most: int = COUNTED) -> bool:
    return _each(values, size, lambda value: whole(value, 0, most))


def _array(value: Any, like: np.ndarray, least: float, most: float) -> bool:
    alike = isinstance(value, np.ndarray) and (value.dtype, value.shape) == (like.dtype, like.shape)
    return alike and bool(((value >= least) & (value <= most)).all())


def are_experts(values: Any, num_experts: int, kind: type = list) -> bool:
    """Whether it is a container of this kind of experts, each of them once."""
    return (
        type(values) is kind
        and all(whole(expert, 0, num_experts - 1) for expert in values)
        and len(set(values)) == len(values)
    )


def _experts(values: Any, here: Any, kind: type) -> bool:
    return are_experts(values, here.num_experts, kind)


def _ids(value: Any, here: Any) -> bool:
    """The experts of one layer's tokens, [N, k]."""
    whole_rows = isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.ndim == 2 and value.size > 0
    return whole_rows and value.shape[1] == here.top_k and bool(((value >= 0) & (value < here.num_experts)).all())


def _by_layer(values: Any, here: Any, fits: Callable[[Any, Any], bool]) -> bool:
    return type(values) is dict and all(
        whole(layer, 0, here.num_layers - 1) and fits(value, here) for layer, value in values.items()
    )


def _outlook(value: Any, here: Any) -> bool:
    if not isinstance(value, RouterOutlook) or not _ids(value.ids, here):
        return False
    scores: Any = value.scores
    shape = len(value.ids), here.num_experts
    return scores is None or (scores.dtype.kind == "f" and _array(scores, np.empty(shape, scores.dtype), 0, 1e30))


def _rows_before(value: Any, here: Any) -> bool:
    return value is None or _array(value, np.empty((here.num_layers, here.top_k), np.int64), 0, len(here._rows) - 1)


def _weighed(place: int) -> Callable[[Any, Any, Mapping[str, Any]], bool]:
    def as_counted(value: Any, here: Any, new: Mapping[str, Any]) -> bool:
        wanted = here.weighed(new["_count"], new["_tokens"])[place]
        return value.shape == wanted.shape and np.allclose(value, wanted)

    return as_counted


_LEARNED: Mapping[type, Mapping[str, Callable[[Any, Any, Mapping[str, Any]], bool]]] = {
    CachePolicy: {
        "frequencies": lambda v, o, new: v is None or _numbers(v, o.num_experts, 0),
        "heat": lambda v, o, new: _numbers(v, o.num_experts),
        "step": lambda v, o, new: whole(v),
        "last_used": lambda v, o, new: _counts(v, o.num_experts, new["step"]),
    },
    LFRU: {"uses": lambda v, o, new: _counts(v, o.num_experts, new["step"])},
    SLRU: {
        "_inside": lambda v, o, new: _experts(v, o, set),
        "_safe": lambda v, o, new: (
            _experts(v, o, OrderedDict) and len(v) <= o.limit and v.keys() <= new["_inside"] and {*v.values()} <= {None}
        ),
    },
    S3FIFO: {
        "_small": lambda v, o, new: _experts(v, o, list),
        "_main": lambda v, o, new: _experts(v, o, list) and not {*v} & {*new["_small"]},
        "_ghost": lambda v, o, new: _experts(v, o, OrderedDict) and {*v.values()} <= {None},
        "_uses": lambda v, o, new: (
            _experts(v, o, dict)
            and v.keys() == {*new["_small"], *new["_main"]}
            and all(whole(uses, 0, 3) for uses in v.values())
        ),
    },
    Memory: {
        "masks": lambda v, o, new: _array(v, o.masks, 0, 2**64 - 1),
        "slot": lambda v, o, new: whole(v, 0, o.size - 1),
        "_layer": lambda v, o, new: whole(v, 0, len(o.masks)),
        "_chosen": lambda v, o, new: whole(v, 0, o.masks.shape[0] * o.num_experts),
        "_here": lambda v, o, new: _array(v, o._here, 0, 1e9),
        "_past": lambda v, o, new: _array(v, o._past, 0, 1e9),
    },
    Frequencies: {
        "counts": lambda v, o, new: _numbers(v, len(o.counts), 0),
        "steps": lambda v, o, new: _number(v, 0),
        "_gain": lambda v, o, new: _number(v, 1),
    },
    Predictor: {},
    Corrected: {
        "_shift": lambda v, o, new: _array(v, o._shift, -100, 100),
        "_seen": lambda v, o, new: _array(v, o._seen, 0, COUNTED),
        "_reused": lambda v, o, new: v == {},
    },
    CoActivation: {
        "_count": lambda v, o, new: _array(v, o._count, 0, COUNTED) and bool((v <= new["_tokens"][:, None]).all()),
        "_tokens": lambda v, o, new: _array(v, o._tokens, 0, COUNTED),
        "_rows": lambda v, o, new: _array(v, o._rows, 0, new["_tokens"].max()),
        "_across": lambda v, o, new: (
            _array(v, o._across, 0, COUNTED)
            and np.array_equal(v, new["_rows"][: v[..., 0].size].reshape(o._across.shape))
        ),
        "_after": lambda v, o, new: (
            _array(v, o._after, 0, COUNTED)
            and np.array_equal(v, new["_rows"][-v[..., 0].size :].reshape(o._after.shape))
        ),
        "_step": lambda v, o, new: v == {},
        "_before": lambda v, o, new: _by_layer(v, o, _ids),
        "_before_rows": lambda v, o, new: _rows_before(v, o),
        "_both": lambda v, o, new: v.shape == o._both.shape and v.dtype == o._both.dtype,  # scratch
        **{name: _weighed(place) for place, name in enumerate(("_prior", "_weight", "_floor"))},
    },
    Previous: {"_chosen": lambda v, o, new: _by_layer(v, o, _outlook)},
    Perfect: {"_coming": lambda v, o, new: v == {}},
    Accuracy: {
        "_tries": lambda v, o, new: _numbers(v, len(o._tries), 0),
        "_hits": lambda v, o, new: (
            _numbers(v, len(o._hits), 0) and all(hits <= tries for hits, tries in zip(v, new["_tries"], strict=True))
        ),
        "predicted": lambda v, o, new: _counts(v, len(o.predicted)),
        "came_true": lambda v, o, new: (
            _counts(v, len(o.came_true)) and all(true <= all_ for true, all_ in zip(v, new["predicted"], strict=True))
        ),
    },
}
"""By class and attribute: whether (value, the object, all new attributes) can be."""
