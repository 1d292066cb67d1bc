"""Input of a store: files of one table of interactions. Text files are converted to Parquet block by block."""

from __future__ import annotations

import glob
import io
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from metarec_jax.core import MetarecError
from metarec_jax.data.io import bounds, formats, json_rows, layouts, parquet
from metarec_jax.data.io.columns import Roles, find_roles
from metarec_jax.messages import listed, shown

_BLOCK = 1 << 23
_TABLE = re.compile(r"\.(parquet|pq|(csv|tsv|txt|dat)(\.gz|\.bz2)?)$")
_LAYOUTS = ("ratings.dat", "ratings.csv", "ratings.parquet", "u.data")


class Source(NamedTuple):
    """Files of one table.

    Attributes:
      dialect: of text files, the same for all; None for Parquet.
      names: the columns; roles: the column of each role.
      notes: assumptions, one line each.
    """

    files: tuple[Path, ...]
    dialect: formats.Dialect | None
    names: tuple[str, ...]
    roles: Roles
    notes: tuple[str, ...]


def source(
    paths: Sequence[str | Path],
    *,
    user_col: str | None = None,
    item_col: str | None = None,
    rating_col: str | None = None,
    timestamp_col: str | None = None,
    implicit: bool = False,
) -> Source:
    """The files of the paths (files, folders or patterns with ``*``), and their columns.

    Raises:
      MetarecError: no such file, files of different kinds or columns, or a missing column.
    """
    files = find(paths)
    asked = [user_col, item_col, rating_col, timestamp_col]
    notes: list[str] = []
    is_parquet = {formats.kind(path) == "parquet" for path in files}
    if len(is_parquet) > 1:
        raise MetarecError(f"{files[0]} and the other files are partly Parquet, partly text. Use files of one kind")
    if (json_file := next((p for p in files if is_parquet == {False} and json_rows.is_json(p)), None)) is not None:
        target = json_file.with_name(f"{json_file.name.split('.')[0]}.parquet")
        raise MetarecError(
            f"{json_file}: expected CSV or Parquet, got JSON. Convert it, for example with: "
            f"duckdb -c \"COPY (FROM '{json_file}') TO '{target}'\""
        )
    dialect = None
    if is_parquet == {True}:
        names = parquet.columns(files[0])
        others = ((path, parquet.columns(path)) for path in files[1:])
    else:
        wanted = tuple(c for c in asked if c)
        dialect = formats.sniff(files[0], asked=wanted)
        names = list(dialect.names)
        others = ((path, _same_layout(path, files[0], dialect, wanted)) for path in files[1:])
        if not dialect.header:
            if layouts.layout(files[0]) == "csv":
                notes.append(f"no header: the columns are read as {listed(names)}")
            by_position = {str(k + 1): name for k, name in enumerate(names)}
            asked = [None if c is None else by_position.get(c, c) for c in asked]
    roles = find_roles(names, asked[0], asked[1], asked[2], asked[3], None, implicit, str(files[0]))
    for path, theirs in others:
        if missing := [c for c in roles if c is not None and c not in theirs]:
            raise MetarecError(
                f"{path} has no column {shown(missing[0])}, which {files[0]} has; its columns are: {listed(theirs)}. "
                "Use files of one table"
            )
    if roles.rating is None:
        notes.append("ratings are ignored (implicit)" if implicit else "no rating column: implicit feedback")
    if unused := [name for name in names if name not in roles]:
        notes.append(f"columns not used: {listed(unused, 10)}")
    return Source(files, dialect, tuple(names), roles, tuple(notes))


def find(paths: Sequence[str | Path]) -> tuple[Path, ...]:
    """The files of paths and patterns; a folder gives its known layout (`layouts.find`), or all tables in it."""
    files: list[Path] = []
    for name in paths:
        path = bounds.local(name)
        if path.is_dir():
            files += _in_folder(path)
        elif path.exists():
            files.append(path)
        elif matches := sorted(glob.glob(str(path), recursive=True)):
            files += [file for match in matches for file in ([Path(match)] if Path(match).is_file() else find([match]))]
        else:
            raise MetarecError(f"there is no file {path}. Check the path")
    if not files:
        raise MetarecError(
            "expected a file of interactions, got none. Name a CSV or Parquet file, a folder, or a pattern"
        )
    return tuple(dict.fromkeys(files))


def _in_folder(folder: Path) -> list[Path]:
    """The interactions of a known layout in a folder, else all tables below it except hidden files and markers."""
    if any(p.name.removesuffix(".gz") in _LAYOUTS or ".inter" in p.suffixes for p in folder.iterdir()):
        return [layouts.find(folder)]

    def seen(path: Path) -> bool:
        return not any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)

    files = [p for p in folder.rglob("*") if _TABLE.search(p.name.lower()) and p.is_file() and seen(p)]
    return sorted(files) or [layouts.find(folder)]


def _same_layout(path: Path, first: Path, dialect: formats.Dialect, asked: tuple[str, ...]) -> list[str]:
    other = formats.sniff(path, asked=asked)
    if other[:6] != dialect[:6]:
        raise MetarecError(
            f"{path} has another layout than {first}: columns {listed(other.names)} separated by "
            f"{shown(other.delimiter)}, not {listed(dialect.names)} separated by {shown(dialect.delimiter)}. "
            "Use files of one table"
        )
    return list(other.names)


def text_to_parquet(table: Source, out: Path, progress: Callable[[int], None]) -> None:
    """Write the required columns of text files to one Parquet file of text, block by block.

    Args:
      progress: called with the number of rows so far.

    Raises:
      MetarecError: a line has too few or too many fields, or is not UTF-8; the message names it.
    """
    assert table.dialect is not None
    columns = list(dict.fromkeys(c for c in table.roles if c is not None))
    schema = pa.schema([(name, pa.string()) for name in columns])
    done = 0
    with pq.ParquetWriter(out, schema, compression="zstd", compression_level=1) as writer:
        for path in table.files:
            for batch in _blocks(path, table.dialect, columns):
                writer.write_batch(batch, row_group_size=1 << 20)
                done += batch.num_rows
                progress(done)


def _blocks(path: Path, dialect: formats.Dialect, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """A text file in record batches. If a line does not parse and the file has quotes, fields may contain line ends."""
    yielded = 0
    for newlines in (False, True) if dialect.quoted else (False,):
        try:
            seen = 0
            for batch in _reader(path, dialect, columns, newlines):
                seen += batch.num_rows
                if seen > yielded:  # rows of the first attempt are not repeated
                    batch = batch.slice(max(0, batch.num_rows - (seen - yielded)))
                    yielded = seen
                    yield batch
            return
        except (pa.ArrowException, UnicodeError, OSError, EOFError) as error:
            failed = error
            if not isinstance(error, pa.ArrowInvalid):
                break
    raise formats._refusal(path, dialect, failed) from failed


def _reader(path: Path, dialect: formats.Dialect, columns: list[str], newlines: bool) -> Any:
    packed = formats.kind(path)
    stream: Any = pa.OSFile(str(path)) if packed == "text" else bounds.opened(path, packed)
    delimiter = dialect.delimiter
    if len(delimiter) > 1:
        stream, delimiter = _Parted(bounds.opened(path, packed), delimiter.encode()), _Parted.BY.decode()
    return pa.csv.open_csv(
        stream,
        pa.csv.ReadOptions(
            column_names=list(dialect.names), skip_rows=dialect.skip, block_size=_BLOCK, encoding=dialect.encoding
        ),
        pa.csv.ParseOptions(
            delimiter=delimiter, quote_char='"' if dialect.quoted else False, newlines_in_values=newlines
        ),
        pa.csv.ConvertOptions(include_columns=columns, column_types=dict.fromkeys(columns, pa.string())),
    )


class _Parted(io.RawIOBase):
    """A stream that replaces a delimiter of two equal bytes by one byte that text does not contain."""

    BY = b"\x1f"

    def __init__(self, stream: Any, delimiter: bytes) -> None:
        self._stream, self._delimiter = stream, delimiter

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        block = self._stream.read(size)
        while block.endswith(self._delimiter[:1]) and (more := self._stream.read(1)):
            block += more  # never split a delimiter
        return block.replace(self._delimiter, self.BY)

    def close(self) -> None:
        self._stream.close()
        super().close()
