"""Writing a trace for other programs: as a table of ours, which holds everything, or in a public layout."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterable
from pathlib import Path

from hybrimoe_jax.errors import UserError
from hybrimoe_jax.files import replacing
from hybrimoe_jax.trace import rows
from hybrimoe_jax.trace.file import Trace


def export_trace(trace: Trace, path: str | Path, layout: str | None = None) -> list[str]:
    """Writes a trace in a layout of `EXPORTS`, by default the one that the name's end tells.

    A text file whose name ends in .gz is packed. Returns what the layout cannot hold, in words. UserError where it
    cannot hold a trace of this model at all, and where the file cannot be written.
    """
    path = Path(path)
    layout = layout or layout_of(path)
    if layout not in EXPORTS:
        raise UserError(f"trace layout {layout!r} is unknown (known: {', '.join(EXPORTS)})")
    return EXPORTS[layout](trace, path)


def layout_of(path: Path) -> str:
    """The layout that a file's name tells; UserError where it tells none."""
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    layout = suffixes[-1][1:] if suffixes else ""
    if layout not in EXPORTS:
        raise UserError(f"{path}: its name does not tell a layout; say it with --to ({', '.join(EXPORTS)})")
    return layout


def write_text(path: Path, lines: Iterable[str]) -> None:
    """Lines as a file, packed where its name ends in .gz."""
    with replacing(path, "wb") as file:
        if path.suffix != ".gz":
            file.writelines(line.encode() for line in lines)
            return
        with gzip.GzipFile(path.stem, "wb", fileobj=file, mtime=0) as packed:
            packed.writelines(line.encode() for line in lines)


def _csv(trace: Trace, path: Path) -> list[str]:
    write_text(path, rows.csv_lines(trace, f"trace for {path}"))
    return []


def _jsonl(trace: Trace, path: Path) -> list[str]:
    write_text(path, rows.json_lines(trace, f"trace for {path}"))
    return []


EXPORTS: dict[str, Callable[[Trace, Path], list[str]]] = {
    "csv": _csv,
    "jsonl": _jsonl,
}
"""By name: what writes a layout, and says what that cannot hold."""
