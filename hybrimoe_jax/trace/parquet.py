"""A trace as a Parquet file, which holds all that the `.npz` file holds. Needs pyarrow, the extra `parquet`.

A row is one token in one MoE layer of one step. Columns are those of the trace: numbers, and lists for `ids`,
`weights`, `scores` and `lookahead_<distance>`, null where they were not recorded. The metadata has, under the key
`hybrimoe-trace`, what the first line of a file of `rows` says.
"""

from __future__ import annotations

import importlib
import io
from pathlib import Path
from typing import Any

import numpy as np

from hybrimoe_jax.errors import UserError, said, shown
from hybrimoe_jax.files import replacing
from hybrimoe_jax.npz import most_bytes
from hybrimoe_jax.trace.columns import BATCH, INDEX_COLUMNS, Trace
from hybrimoe_jax.trace.file import EMPTY, FORMAT, LOOKAHEAD
from hybrimoe_jax.trace.rows import CELLS, described, tables_of, undescribed


def need_pyarrow(where: str) -> Any:
    """The module pyarrow, with its parquet; UserError with the line that installs it where it is missing."""
    try:
        importlib.import_module("pyarrow.parquet")
        return importlib.import_module("pyarrow")
    except ImportError:
        raise UserError(f"{where}: Parquet needs the extra: pip install 'hybrimoe-jax[parquet]'") from None


def write_parquet(trace: Trace, path: Path) -> None:
    """Writes a trace. UserError where it is unsound, or pyarrow is missing."""
    where = f"trace for {path}"
    arrow = need_pyarrow(where)
    meta = {FORMAT: described(trace, where)}
    columns = {name: _column(arrow, array) for name, array in tables_of(trace).items()}
    with replacing(path, "wb") as file:
        arrow.parquet.write_table(arrow.table(columns, metadata=meta), file)


def _column(arrow: Any, array: np.ndarray) -> Any:
    if array.ndim == 1:
        return arrow.array(array)
    absent = np.isnan(array[:, 0]) if array.dtype.kind == "f" else np.zeros(len(array), bool)
    flat = arrow.array(np.ascontiguousarray(array).ravel())
    return arrow.FixedSizeListArray.from_arrays(flat, array.shape[1], mask=arrow.array(absent))


def read_parquet(data: bytes, where: str) -> Trace:
    """What `write_parquet` wrote; UserError for any other Parquet file."""
    arrow = need_pyarrow(where)
    try:
        file = arrow.parquet.ParquetFile(io.BytesIO(data))
        check_counts(file.metadata, len(data))
        meta = (file.schema_arrow.metadata or {})[FORMAT.encode()].decode()
    except KeyError:
        raise UserError(f"{where}: a Parquet file without the metadata {FORMAT!r}, so not a trace of ours") from None
    except Exception as error:  # a damaged file fails in Arrow, Thrift, or a codec
        raise UserError(f"{where}: not a readable Parquet file ({said(error)})") from None
    if not file.metadata.num_rows:
        raise UserError(f"{where}: {EMPTY}")
    try:
        check_columns(arrow, file.schema_arrow, file.metadata.num_rows, len(data))
        table = file.read()
        arrays = {name: _array(name, table[name].combine_chunks()) for name in table.column_names}
    except Exception as error:  # as above: pages are read here
        raise UserError(f"{where}: its columns are not those of a trace ({said(error)})") from None
    return undescribed(meta, arrays, where)


def check_counts(metadata: Any, size: int) -> None:
    """ValueError where a file of `size` bytes says that it holds far more values than a real one."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    values = sum(group.column(place).num_values for group in groups for place in range(group.num_columns))
    if 4 * values > most_bytes(size):
        raise ValueError(f"its {size} bytes would unpack to {values} values")


def check_columns(arrow: Any, schema: Any, rows: int, size: int) -> None:
    """ValueError for a column that a trace does not have, one of other values, and for rows far wider than the file.

    Before any is read: one of texts may unpack to a thousand times as much.
    """
    width = 0
    for field in schema:
        single, kind = field.name in (*INDEX_COLUMNS, BATCH), field.type
        if not single and not (field.name in CELLS or field.name.startswith(LOOKAHEAD)):
            raise ValueError(f"column {shown(field.name)} is not known")
        listed = arrow.types.is_fixed_size_list(kind)
        number = kind.value_type if listed else kind
        whole = single or field.name == "ids"
        if listed == single or not (arrow.types.is_integer if whole else arrow.types.is_floating)(number):
            wanted = "integers" if single else f"lists of a fixed number of {'integers' if whole else 'floats'}"
            raise ValueError(f"column {field.name} holds {kind}; {wanted} are needed")
        width += kind.list_size if listed else 1
    if len(set(schema.names)) < len(schema.names):
        raise ValueError("a column is there twice")
    if 4 * width * rows > most_bytes(size):
        raise ValueError(f"its {size} bytes would unpack to {rows} rows of {width} values")


def _array(name: str, column: Any) -> np.ndarray:
    if name in (*INDEX_COLUMNS, BATCH):
        return column.to_numpy(zero_copy_only=False)
    width = column.type.list_size
    present = column.is_valid().to_numpy(zero_copy_only=False)
    values = column.flatten().to_numpy(zero_copy_only=False)  # of the rows that are not null
    if name == "ids":
        return values.reshape(-1, width)
    array = np.full((len(present), width), np.nan, np.float32)
    array[present] = values.reshape(-1, width)
    return array
