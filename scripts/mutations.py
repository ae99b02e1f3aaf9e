"""The mutants of a file: changes of one line each, for `scripts/mutants.py`, which says what they are."""

from __future__ import annotations

import ast
import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent

BOUNDARY = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
OPPOSITE = {
    ast.Lt: ast.GtE, ast.LtE: ast.Gt, ast.Gt: ast.LtE, ast.GtE: ast.Lt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div, ast.Mod: ast.Mult,
    ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.Pow: ast.Mult,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}


class Mutant(NamedTuple):
    """A change. `function`: (qualified name, first line) of the outermost function that it is in; `source`: its text.

    `key` tells it from all others, whatever else changes in its file.
    """

    path: str
    line: int
    function: tuple[str, int]
    source: str
    key: str


def mutants_of(path: str, share: float = 1.0, seed: int = 0) -> Iterator[tuple[Mutant, ast.Module]]:
    """A share of the mutants of a file, each with the tree, which is the mutant's until the next one is asked for."""
    tree = ast.parse((ROOT / path).read_text())
    for function, name in functions_of(tree):
        first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
        source = digest_of(function)
        changes = ((node, *change) for node in [function, *_nodes(function.body)] for change in list(_changes(node)))
        for number, (node, owner, field, new) in enumerate(changes):
            if random.Random(f"{seed} {path} {name} {number}").random() >= share:
                continue
            old = owner[field] if isinstance(field, int) else getattr(owner, field)
            left_out = isinstance(new, ast.Pass)
            said = [ast.unparse(old if left_out else node)]
            _put(owner, field, new)
            ast.fix_missing_locations(node)
            said.append("left out" if left_out else ast.unparse(node))
            key = f"{path}:{name}: {number}: " + " -> ".join(text[:160] for text in said)
            yield Mutant(path, old.lineno if left_out else node.lineno, (name, first), source, key), tree
            _put(owner, field, old)


def _put(owner: Any, field: Any, new: Any) -> None:
    if isinstance(field, int):
        owner[field] = new
    else:
        setattr(owner, field, new)


def digest_of(function: ast.AST) -> str:
    """Tells the text of a function from others."""
    return hashlib.sha256(ast.unparse(function).encode()).hexdigest()[:12]


def functions_of(node: ast.AST, prefix: str = "") -> Iterator[tuple[Any, str]]:
    """A module's functions and methods, by qualified name."""
    for child in getattr(node, "body", ()):
        if isinstance(child, ast.FunctionDef):
            yield child, prefix + child.name
        elif isinstance(child, ast.ClassDef):
            yield from functions_of(child, f"{prefix}{child.name}.")


def _nodes(values: list[Any]) -> Iterator[Any]:
    """Expressions and statements that may be changed."""
    for node in values:
        if not isinstance(node, ast.AST) or isinstance(node, (ast.Raise, ast.JoinedStr)) or _only_says(node):
            continue
        if hasattr(node, "lineno"):
            yield node
        for field, value in ast.iter_fields(node):
            if field not in ("annotation", "returns"):
                yield from _nodes(value if isinstance(value, list) else [value])


def _only_says(node: Any) -> bool:
    """Docstrings, and calls that only say what is wrong."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) or _only_says(node.value)
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "fault"


def _changes(node: Any) -> Iterator[tuple[Any, Any, Any]]:
    """(list or node, place in it, what to put there)."""
    if isinstance(node, ast.Compare):
        for i, operator in enumerate(node.ops):
            for table in (BOUNDARY, OPPOSITE):
                if type(operator) in table:
                    yield node.ops, i, table[type(operator)]()
    elif isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in ARITHMETIC:
        yield node, "op", ARITHMETIC[type(node.op)]()
    elif isinstance(node, ast.BoolOp):
        yield node, "op", ast.Or() if isinstance(node.op, ast.And) else ast.And()
    elif isinstance(node, ast.UnaryOp):
        yield (node, "op", ast.UAdd()) if isinstance(node.op, ast.USub) else (node, "operand", _negated(node.operand))
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        yield node, "value", not node.value if isinstance(node.value, bool) else node.value + 1
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in NAMES:
        yield node.func, "id", NAMES[node.func.id]
    yield from _changes_of_statements(node)


def _changes_of_statements(node: Any) -> Iterator[tuple[Any, Any, Any]]:
    if isinstance(node, (ast.If, ast.While, ast.IfExp)) and not isinstance(node.test, (ast.Compare, ast.UnaryOp)):
        yield node, "test", _negated(node.test)
    for field in ("body", "orelse"):
        statements = getattr(node, field, None)
        for i, one in enumerate(statements if isinstance(statements, list) else ()):
            if _may_go(one):
                yield statements, i, ast.Pass()


def _negated(node: Any) -> ast.UnaryOp:
    return ast.UnaryOp(ast.Not(), node)


def _may_go(node: Any) -> bool:
    """Statements that can be left out without a name going missing."""
    if isinstance(node, ast.Assign):
        return all(isinstance(target, (ast.Attribute, ast.Subscript)) for target in node.targets)
    if isinstance(node, ast.Expr):  # without `super` a function would have another closure, and could not be exchanged
        return not _only_says(node) and not ast.unparse(node).startswith("super()")
    return isinstance(node, (ast.AugAssign, ast.Continue, ast.Break))
