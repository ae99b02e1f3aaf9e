"""The order of rooms, read from the package's import statements: those inside functions count too."""

from __future__ import annotations

import ast
import functools
import graphlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "hybrimoe_jax"

FLOORS = (
    ("demo", "generate", "record", "convert", "calibrate"),
    ("bench",),
    ("train", "reproduce", "baselines"),
    ("engine",),
    ("simulate",),
    ("checkpoint",),
    ("machine",),
    ("decide",),
    ("models",),
    ("host_kernels",),
    ("trace",),
    ("formats",),
    (
        "arguments",
        "cli",
        "encoding",
        "errors",
        "figures",
        "files",
        "interrupts",
        "npz",
        "progress",
        "records",
        "tables",
        "text",
    ),
)
"""From top to bottom: a room may import from its own floor and those below."""

WITHOUT_JAX = ("decide", "formats", "machine")


class Import(NamedTuple):
    """One imported name: `target` is a module of the package, or the top-level name of another."""

    source: str
    target: str
    line: int
    at_module_level: bool


def modules() -> dict[str, Path]:
    paths = sorted((ROOT / PACKAGE).rglob("*.py"))
    named = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}
    return {name.removesuffix(".__init__"): path for name, path in named.items()}


MODULES = modules()


def statements(node: ast.AST, at_module_level: bool = True) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, at_module_level
        runs_later = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) or for_types_only(child)
        yield from statements(child, at_module_level and not runs_later)


def for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports_of(name: str, path: Path) -> Iterator[Import]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for statement, outside in statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(statement, ast.Import):
            found = [alias.name for alias in statement.names]
        else:
            above = package.split(".")[: len(package.split(".")) + 1 - statement.level] if statement.level else []
            base = ".".join([*above, *([statement.module] if statement.module else [])])
            names = [alias.name for alias in statement.names if alias.name != "__version__"]  # which is for everybody
            found = [f"{base}.{name}" for name in names]
            found = [module if module in MODULES else base for module in found]
        for module in found:
            own = module.split(".")[0] == PACKAGE
            yield Import(name, module if own else module.split(".")[0], statement.lineno, outside)


@functools.cache
def imports() -> list[Import]:
    return [found for name, path in MODULES.items() for found in imports_of(name, path)]


def inside() -> list[Import]:
    return [found for found in imports() if found.target.split(".")[0] == PACKAGE]


def room(module: str) -> str:
    """The first name below the package's; empty for the package itself and for commands: they stand above all rooms."""
    names = module.split(".")[1:]
    return "" if not names or names[-1] == "__main__" else names[0]


def floor(name: str) -> int:
    """Counted from the top; the package itself is above all."""
    return next((number for number, rooms in enumerate(FLOORS) if name in rooms), -1)


def where(found: Import) -> str:
    return f"{MODULES[found.source].relative_to(ROOT)}:{found.line} imports {found.target}"


def test_every_module_is_in_a_room():
    assert {room(name) for name in MODULES} - {""} <= set(itertools.chain(*FLOORS))


def test_every_import_inside_the_package_names_a_module_of_it():
    assert not [where(found) for found in inside() if found.target not in MODULES]


def test_rooms_import_only_downwards():
    upwards = [
        found for found in inside() if room(found.source) and floor(room(found.target)) < floor(room(found.source))
    ]
    assert not [where(found) for found in upwards]


def test_files_make_no_circle():
    """At module level: a file that is imported while it runs would be seen half."""
    graph: dict[str, set[str]] = {name: set() for name in MODULES}
    for found in inside():
        if found.at_module_level:
            graph[found.source].add(found.target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("name", WITHOUT_JAX)
def test_rooms_without_jax_reach_none(name):
    """Nothing in the room, and nothing that it imports, names jax, wherever in its file."""
    reached, waiting = set(), [module for module in MODULES if room(module) == name]
    assert waiting
    while waiting:
        module = waiting.pop()
        reached.add(module)
        mine = [found for found in imports() if found.source == module]
        assert not [where(found) for found in mine if found.target in ("jax", "jaxlib", "flax")]
        waiting += [found.target for found in mine if found.target in MODULES and found.target not in reached]
