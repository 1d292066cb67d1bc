"""Parquet files: their columns as a table. Files are read in batches that are counted, since a footer may be wrong."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from metarec_jax.core import MetarecError
from metarec_jax.data.io import bounds
from metarec_jax.messages import one_line, shown

ERRORS = (pa.ArrowException, OSError, UnicodeError, ValueError, KeyError, OverflowError, NotImplementedError)
"""The exceptions of pyarrow and pandas on damaged files."""
_ROWS = 2**22
"""Rows that any file may have; a larger file may have `_ROWS_A_BYTE` rows per byte."""
_ROWS_A_BYTE = 100
_BATCH = 1 << 17


def columns(path: Path) -> list[str]:
    """The names of a file's columns.

    Raises:
      MetarecError: the file is damaged, two columns have the same name, or there are more than `bounds.COLUMNS`.
    """
    try:
        names = list(pq.read_schema(path).names)
    except ERRORS as error:
        raise _damaged(path, error) from error
    if len(names) > bounds.COLUMNS:
        raise MetarecError(f"{path}: expected at most {bounds.COLUMNS} columns, got {len(names)}. Remove some")
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise MetarecError(f"{path} has two columns called {shown(twice)}. Rename one of them")
    return names


def read(path: Path, wanted: list[str] | None = None) -> pd.DataFrame:
    """The ``wanted`` columns of a file, with text as categories; None: all columns, with text as objects.

    Raises:
      MetarecError: the file is damaged, or unpacks to far more than its size.
    """
    names = columns(path)
    try:
        schema = pq.read_schema(path)
        # As a dictionary, so that a long text on many rows is stored once.
        texts = [n for n in names if pa.types.is_string(schema.field(n).type)]
        frame = as_frame(counted(path, path, path.stat().st_size, wanted or names, wanted or texts))
    except ERRORS as error:
        raise _damaged(path, error) from error
    return frame.astype(dict.fromkeys(texts, object)) if wanted is None else frame


def counted(
    source: Any,
    path: Path,
    size: int,
    wanted: Sequence[str] | None = None,
    as_dictionary: Sequence[str] = (),
    footer: int | None = None,
) -> pa.Table:
    """Columns of a file of ``size`` bytes, read batch by batch up to the limits of such a file.

    Args:
      source: the path or a buffer.
      as_dictionary: the columns of text to be read as codes.
      footer: limit of the file's metadata, in bytes; default: pyarrow's 100 MB.

    Raises:
      MetarecError: there are more rows than `_ROWS` and `_ROWS_A_BYTE` allow, or more bytes than `bounds` allows.
    """
    with pq.ParquetFile(source, read_dictionary=list(as_dictionary), thrift_string_size_limit=footer) as file:
        names = list(file.schema_arrow.names if wanted is None else wanted)
        batches, rows, room = [], 0, 0
        for batch in file.iter_batches(_BATCH, columns=names):
            rows, room = rows + batch.num_rows, room + batch.nbytes
            if rows > max(_ROWS, _ROWS_A_BYTE * size) or room > max(bounds.ROOM, bounds.SWELL * size):
                raise bounds.swollen(path)
            batches.append(batch)
        if not batches:
            return pa.schema([file.schema_arrow.field(name) for name in names]).empty_table()
        return pa.Table.from_batches(batches).select(names)


def as_frame(table: pa.Table) -> pd.DataFrame:
    """A table as a frame. Integers with missing values stay integers; bytes become text; times become UTC."""
    frame = {}
    for name in table.column_names:
        column = table.column(name)
        table = table.drop_columns([name])
        column = _as_text(column)
        integers = pa.types.is_integer(column.type) and column.null_count
        if pa.types.is_timestamp(column.type) and column.type.tz is not None:
            column = column.cast(pa.timestamp(column.type.unit))  # the same moments, whatever the zone is called
        frame[name] = column.to_pandas(
            types_mapper={column.type: pd.Int64Dtype()}.get if integers else None, date_as_object=False
        )
        del column
    return pd.DataFrame(frame, copy=False)


def _as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Bytes as UTF-8 text, or as UUIDs if each value has sixteen bytes that are not UTF-8; other columns unchanged."""
    type_ = column.type
    is_uuid = isinstance(type_, pa.UuidType)
    if is_uuid:
        column = pa.chunked_array([chunk.storage for chunk in column.chunks], type_.storage_type)
    elif not (pa.types.is_binary(type_) or pa.types.is_large_binary(type_) or pa.types.is_fixed_size_binary(type_)):
        return column
    if not is_uuid:
        try:
            return column.cast(pa.binary()).cast(pa.string())
        except pa.ArrowInvalid:  # not UTF-8
            if column.type != pa.binary(16):
                return column
    spelled = [None if value is None else str(uuid.UUID(bytes=value)) for value in column.to_pylist()]
    return pa.chunked_array([spelled], pa.string())


def _damaged(path: Path, error: Exception) -> MetarecError:
    if isinstance(error, (FileNotFoundError, PermissionError, MemoryError)):
        return bounds.broken(path, error)
    return MetarecError(f"{path} is damaged or truncated ({one_line(error)}). Download or write it again")
