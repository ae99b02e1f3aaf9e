"""Sending classes and functions to another process of the same Python, those of a notebook too.

`pickle` sends a class as its module and name. A class that was defined in a notebook's cell, or inside a function, is
found nowhere else. So such classes and functions are sent whole: their code, and the global names that the code uses.
"""

from __future__ import annotations

import abc
import dis
import importlib
import io
import marshal
import pickle
import sys
import types
from collections.abc import Iterator
from typing import Any, cast

FAILURES = (pickle.PicklingError, TypeError, AttributeError, ValueError)
"""What `dumps` raises for an object that neither way can send."""
_LEFT_OUT = ("__dict__", "__weakref__", "_abc_impl", "__abstractmethods__", "__signature__", "__annotations__")


def dumps(value: Any) -> bytes:
    """As `pickle.dumps`; one of FAILURES where there is no way."""
    file = io.BytesIO()
    _Pickler(file, pickle.HIGHEST_PROTOCOL).dump(value)
    return file.getvalue()


loads = pickle.loads


def importable(value: Any) -> bool:
    """Whether another process finds a class or function by its name. The program that runs is not looked at."""
    found: Any = None if value.__module__ == "__main__" else sys.modules.get(value.__module__)
    for part in value.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is value


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, protocol: int):
        super().__init__(file, protocol)
        self._globals: dict[str, dict[str, Any]] = {}  # of each module, as its functions will share them

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, types.ModuleType):
            return importlib.import_module, (obj.__name__,)
        if isinstance(obj, types.FunctionType) and not importable(obj):
            return self._function(obj)
        if isinstance(obj, type) and not importable(obj):
            return self._class(obj)
        if isinstance(obj, (classmethod, staticmethod)):
            return type(cast(Any, obj)), (cast(Any, obj).__func__,)
        if isinstance(obj, property):
            return property, (obj.fget, obj.fset, obj.fdel, obj.__doc__)
        return NotImplemented

    def _function(self, function: types.FunctionType) -> Any:
        code, known = function.__code__, function.__globals__
        shared = self._globals.setdefault(function.__module__ or "", {"__name__": function.__module__})
        used = {name: known[name] for name in dict.fromkeys(_global_names(code)) if name in known}
        cells = [_content(cell) for cell in function.__closure__ or ()]
        made = (marshal.dumps(code), shared, function.__name__, len(cells))
        attributes = {name: getattr(function, name) for name in ("__defaults__", "__kwdefaults__", "__qualname__")}
        return _bare_function, made, (used, cells, attributes, dict(vars(function))), None, None, _fill_function

    def _class(self, made: type[Any]) -> Any:
        contents = {name: value for name, value in vars(made).items() if name not in _LEFT_OUT}
        named = {"__module__": contents.pop("__module__"), "__qualname__": made.__qualname__}
        return _bare_class, (type(made), made.__name__, made.__bases__, named), contents, None, None, _fill_class


def _global_names(code: types.CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _global_names(constant)


def _content(cell: types.CellType) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:
        return ()


def _bare_function(code: bytes, names: dict[str, Any], name: str, cells: int) -> types.FunctionType:
    closure = tuple([types.CellType() for _ in range(cells)])
    return types.FunctionType(marshal.loads(code), names, name, None, closure)


def _fill_function(function: types.FunctionType, state: tuple[Any, ...]) -> None:
    used, cells, attributes, more = state
    function.__globals__.update(used)
    for cell, content in zip(function.__closure__ or (), cells):
        if content:
            cell.cell_contents = content[0]
    for name, value in attributes.items():
        setattr(function, name, value)
    vars(function).update(more)


def _bare_class(meta: Any, name: str, bases: tuple[type[Any], ...], named: dict[str, Any]) -> type[Any]:
    return meta(name, bases, named)


def _fill_class(made: type[Any], contents: dict[str, Any]) -> None:
    for name, value in contents.items():
        setattr(made, name, value)
    abc.update_abstractmethods(made)
