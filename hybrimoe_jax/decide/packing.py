"""What an object has learned, as JSON and arrays, and back into an object that was made anew.

`pack` walks through objects by their attributes. Nothing is pickled: reading a file makes numbers, texts, containers
and arrays only, and fills them into objects that are there already. What appears twice is written once, so that rules
which share what they know share it again. A function or a class is not written: the new object's own stays.
"""

# It walks through values of any type.
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import math
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from hybrimoe_jax.decide.learned import check_learned, is_own
from hybrimoe_jax.decide.prefetch.prediction import Prediction, RouterOutlook
from hybrimoe_jax.errors import UserError, said, shown, shown_name

Node = Any
"""A JSON value. Lists stand for what JSON has no word for: [kind, ...]."""
TUPLES: dict[str, type[Any]] = {"RouterOutlook": RouterOutlook, "Prediction": Prediction}


def pack(value: Any, what: str) -> tuple[Node, dict[str, np.ndarray]]:
    """(JSON, the arrays that it names). UserError, beginning with `what`, for what cannot be written."""
    writer = _Writer(what)
    return writer.node(value, ""), writer.arrays


def unpack(node: Node, arrays: Mapping[str, np.ndarray], here: Any) -> Any:
    """What was packed, filled into `here`. ValueError where it is damaged, or of other objects than these.

    `here` is as before then.
    """
    value, fill = unpacked(node, arrays, here)
    fill()
    return value


def unpacked(node: Node, arrays: Mapping[str, np.ndarray], here: Any) -> tuple[Any, Callable[[], None]]:
    """What was packed, all of it checked, and what fills it into `here`, which cannot fail. ValueError as `unpack`."""
    reader = _Reader(arrays)
    try:
        value = reader.value(node, here)
        reader.check()
    except (TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(said(error)) from None
    return value, reader.fill


class _Writer:
    def __init__(self, what: str):
        self.what, self.arrays = what, dict[str, np.ndarray]()
        self._numbers: dict[int, int] = {}
        self._kept: list[Any] = []  # so that no two objects have one id

    def node(self, value: Any, path: str) -> Node:
        if value is None or isinstance(value, (bool, int, str)):
            return value
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else ["float", str(float(value))]
        if isinstance(value, np.generic):
            return ["number", self._array(np.asarray(value), path)]
        if is_own(value):
            return ["own"]
        if id(value) in self._numbers:
            return ["same", self._numbers[id(value)]]
        number = self._numbers[id(value)] = len(self._numbers)
        self._kept.append(value)
        return self._first(value, number, path)

    def _first(self, value: Any, number: int, path: str) -> Node:
        """Of what is met for the first time."""
        if isinstance(value, np.ndarray):
            return ["array", number, self._array(cast("np.ndarray[Any, Any]", value), path)]
        if isinstance(value, tuple) and type(value).__name__ in TUPLES:
            return ["named", number, type(value).__name__, self._all(cast("tuple[Any, ...]", value), path)]
        for kind, container in (("list", list), ("tuple", tuple), ("deque", deque)):
            if type(value) is container:
                return [kind, number, self._all(value, path)]
        if type(value) in (set, frozenset):
            return [type(value).__name__, number, self._all(sorted(value), path)]
        if type(value) in (dict, OrderedDict):
            items = cast("dict[Any, Any]", value).items()
            return ["dict", number, [[self.node(k, path), self.node(v, f"{path}[{k!r}]")] for k, v in items]]
        if isinstance(value, random.Random):
            return ["random", number, self.node(value.getstate(), path)]
        if isinstance(value, np.random.Generator):
            return ["generator", number, self.node(value.bit_generator.state, path)]
        if not hasattr(value, "__dict__"):
            raise UserError(f"{self.what}: {path or 'it'} is a {type(value).__name__}, which a file cannot hold")
        attributes = {name: self.node(part, f"{path}.{name}".lstrip(".")) for name, part in vars(value).items()}
        return ["object", number, type(value).__qualname__, attributes]

    def _all(self, values: Sequence[Any] | deque[Any], path: str) -> list[Node]:
        return [self.node(value, f"{path}[{place}]") for place, value in enumerate(values)]

    def _array(self, array: np.ndarray, path: str) -> str:
        if array.dtype.hasobject:
            raise UserError(f"{self.what}: {path} is an array of objects, which a file cannot hold")
        name = f"array_{len(self.arrays)}"
        self.arrays[name] = array.copy()
        return name


FORMER = frozenset({"_called_with"})
"""Attributes that states of old have and that say nothing any more."""


class _Reader:
    """Reads first, and writes when all is read and checked."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self._arrays, self._seen = arrays, dict[int, Any]()
        self._contents: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # by id: an array here, what it will hold
        self._objects: list[tuple[Any, dict[str, Any]]] = []  # here, and their attributes
        self._states: list[Callable[[], None]] = []  # of random numbers

    def check(self) -> None:
        """ValueError for attributes that an object here cannot have."""
        for here, attributes in self._objects:
            check_learned(here, {name: self._to_be(value) for name, value in attributes.items()})

    def fill(self) -> None:
        for here, attributes in self._objects:
            for name, value in attributes.items():
                if not is_own(value):
                    object.__setattr__(here, name, value)
        for here, array in self._contents.values():
            here[...] = array
        for state in self._states:
            state()

    def _to_be(self, value: Any) -> Any:
        """A value as it will be when everything is filled in."""
        if isinstance(value, np.ndarray):
            return self._contents.get(id(value), (value, value))[1]
        if type(value) in (dict, OrderedDict):
            return type(value)((key, self._to_be(part)) for key, part in value.items())
        return [self._to_be(part) for part in value] if type(value) is list else value

    def value(self, node: Node, here: Any) -> Any:
        if isinstance(node, dict):
            raise ValueError(f"{shown(node)} stands for nothing")
        if not isinstance(node, list):
            return here if isinstance(here, (int, str)) and here == node else node  # a `Rule` is a text, and more
        kind, *rest = cast("list[Any]", node)
        if kind == "own":
            if here is not None and not is_own(here):
                raise ValueError(f"it says nothing of a {type(here).__qualname__}")
            return here
        if kind == "float":
            return float(rest[0])
        if kind == "number":
            return self._arrays[rest[0]].reshape(())[()]
        if kind == "same":
            return self._seen[rest[0]]
        number, *rest = rest
        return self._made[kind](self, number, here, *rest)

    def _array(self, number: int, here: Any, name: str) -> Any:
        array = self._arrays[name]
        fits = isinstance(here, np.ndarray) and here.shape == array.shape and here.dtype == array.dtype
        if fits and here.flags.writeable:
            self._contents[id(here)] = here, array  # in place: others may be views of it
            array = here
        return self._keep(number, array)

    def _list(self, number: int, here: Any, nodes: list[Node]) -> Any:
        made = self._keep(number, list[Any]())
        made += self._all(nodes, here)
        return made

    def _deque(self, number: int, here: Any, nodes: list[Node]) -> Any:
        longest = cast("deque[Any]", here).maxlen if isinstance(here, deque) else None
        made = self._keep(number, deque[Any](maxlen=longest))
        made.extend(self._all(nodes, None))
        return made

    def _tuple(self, number: int, here: Any, nodes: list[Node]) -> Any:
        return self._keep(number, tuple(self._all(nodes, here)))

    def _named(self, number: int, here: Any, name: str, nodes: list[Node]) -> Any:
        return self._keep(number, TUPLES[name](*self._all(nodes, None)))

    def _set(self, number: int, here: Any, nodes: list[Node]) -> Any:
        return self._keep(number, set(self._all(nodes, None)))

    def _frozenset(self, number: int, here: Any, nodes: list[Node]) -> Any:
        return self._keep(number, frozenset(self._all(nodes, None)))

    def _dict(self, number: int, here: Any, items: list[list[Node]]) -> Any:
        before = cast("dict[Any, Any]", here) if isinstance(here, dict) else {}
        made = self._keep(number, OrderedDict[Any, Any]() if isinstance(here, OrderedDict) else dict[Any, Any]())
        for key, node in items:
            key = self.value(key, None)
            made[key] = self.value(node, before.get(key))
        return made

    def _random(self, number: int, here: Any, state: Node) -> Any:
        if not isinstance(here, random.Random):
            raise ValueError(f"it holds random numbers, where there is a {type(here).__qualname__}")
        found = self.value(state, None)
        random.Random().setstate(found)  # ValueError and others where it is none
        self._states.append(lambda: here.setstate(found))
        return self._keep(number, here)

    def _generator(self, number: int, here: Any, state: Node) -> Any:
        found = self.value(state, None)
        type(here.bit_generator)().state = found
        self._states.append(lambda: setattr(here.bit_generator, "state", found))
        return self._keep(number, here)

    def _object(self, number: int, here: Any, name: str, attributes: Mapping[str, Node]) -> Any:
        if here is None or type(here).__qualname__ != name:
            raise ValueError(f"it holds a {shown_name(name)}, where there is a {type(here).__qualname__}")
        self._keep(number, here)
        read = {key: self.value(node, getattr(here, key, None)) for key, node in attributes.items()}
        self._objects.append((here, {key: value for key, value in read.items() if key not in FORMER}))
        return here

    def _all(self, nodes: Sequence[Node], here: Any) -> list[Any]:
        there = isinstance(here, (list, tuple)) and len(cast("Sequence[Any]", here)) == len(nodes)
        before: Sequence[Any] = here if there else [None] * len(nodes)
        return [self.value(node, old) for node, old in zip(nodes, before, strict=True)]

    def _keep(self, number: int, made: Any) -> Any:
        self._seen[number] = made
        return made

    _made: Mapping[str, Callable[..., Any]] = {
        "array": _array,
        "list": _list,
        "deque": _deque,
        "tuple": _tuple,
        "named": _named,
        "set": _set,
        "frozenset": _frozenset,
        "dict": _dict,
        "random": _random,
        "generator": _generator,
        "object": _object,
    }
