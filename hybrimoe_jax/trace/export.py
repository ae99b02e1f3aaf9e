"""Writing a trace for other programs: as a table of ours, which holds everything, or in a public layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hybrimoe_jax import arguments
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.trace import public_exports, rows
from hybrimoe_jax.trace.columns import Trace
from hybrimoe_jax.trace.file import check_trace
from hybrimoe_jax.trace.parquet import write_parquet


def export_trace(trace: Trace, path: str | Path, layout: str | None = None) -> list[str]:
    """Writes a trace in a layout of `EXPORTS`, by default the one that the name's end tells.

    A text file whose name ends in .gz is packed. Returns what the layout cannot hold, in words. UserError where it
    cannot hold this trace at all, and where the file cannot be written.
    """
    path = Path(arguments.path("path", path))
    layout = layout_of(path) if layout is None else arguments.choice("layout", layout, EXPORTS)
    check_trace(trace, f"trace for {path}")
    return EXPORTS[layout](trace, path)


def layout_of(path: Path) -> str:
    """The layout that a file's name tells; UserError where it tells none."""
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    layout = suffixes[-1][1:] if suffixes else ""
    if layout not in ("csv", "jsonl", "parquet"):
        raise UserError(f"{path}: its name does not tell a layout; say it with --to ({', '.join(EXPORTS)})")
    return layout


def _csv(trace: Trace, path: Path) -> list[str]:
    rows.write_lines(path, rows.csv_lines(trace, f"trace for {path}"))
    return []


def _jsonl(trace: Trace, path: Path) -> list[str]:
    rows.write_lines(path, rows.json_lines(trace, f"trace for {path}"))
    return []


def _parquet(trace: Trace, path: Path) -> list[str]:
    write_parquet(trace, path)
    return []


EXPORTS: dict[str, Callable[[Trace, Path], list[str]]] = {
    "csv": _csv,
    "jsonl": _jsonl,
    "parquet": _parquet,
    "esft": public_exports.esft_folder,
    "esft-npz": public_exports.esft_arrays,
    "fingerprint": public_exports.fingerprint_json,
    "fingerprint-npz": public_exports.fingerprint_arrays,
    "route-csv": public_exports.route_csv,
}
"""By name: what writes a layout, and says what that cannot hold."""
