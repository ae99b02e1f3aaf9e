"""Rows for a person and for further work: a pandas DataFrame where pandas is installed, plain rows where it is not.

Both give a column by its name (`t["hit_rate"]`), their length, and a table in a notebook.
"""

from __future__ import annotations

import html
import importlib
import math
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any

MOST_ROWS = 60
"""Rows that a text or HTML table shows at most; the middle is left out."""


class Table(list[dict[str, Any]]):
    """Rows as dicts, all with the same names. `t["name"]` is a column, `t[0]` a row.

    Attributes: columns: the names, in order.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], columns: Iterable[str] = ()):
        rows = [dict(row) for row in rows]
        self.columns = list(columns) or list(dict.fromkeys(name for row in rows for name in row))
        super().__init__({name: row.get(name) for name in self.columns} for row in rows)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            if key not in self.columns:
                raise KeyError(f"{key!r} is no column (columns: {', '.join(self.columns)})")
            return [row[key] for row in self]
        return Table(super().__getitem__(key), self.columns) if isinstance(key, slice) else super().__getitem__(key)

    def __repr__(self) -> str:
        """Lines of text, numbers to the right."""
        lines = [self.columns, *self._shown()]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        right = [all(_is_number(row[name]) for row in self) for name in self.columns]
        cells = ([c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right)] for line in lines)
        return "\n".join("  ".join(line).rstrip() for line in cells)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(name)}</th>" for name in self.columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in self._shown()
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def _shown(self) -> list[list[str]]:
        lines = [[as_text(row[name]) for name in self.columns] for row in self]
        if len(lines) <= MOST_ROWS:
            return lines
        half = MOST_ROWS // 2
        return [*lines[:half], ["..."] * len(self.columns), *lines[-half:]]


def table(rows: Iterable[Mapping[str, Any]], columns: Iterable[str] = ()) -> Any:
    """A DataFrame of the rows, or a `Table`. `columns`: their names in order, where there may be no row."""
    plain = Table(rows, columns)
    if find_spec("pandas") is None:
        return plain
    return importlib.import_module("pandas").DataFrame(list(plain), columns=plain.columns)


def as_text(value: Any) -> str:
    """A cell: floats with four digits, nothing as "-"."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
