"""Table files: what a file is, how its fields are parted, and its columns. What is wrong with one is a `MetarecError`.

Delimited text (comma, tab, semicolon, "|" or "::"; plain, gzip or bzip2; UTF-8, or Latin-1 where the caller allows it)
and Parquet. A RecBole atomic file is tab-parted text whose header names types (``user_id:token``).
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from metarec_jax.core import MetarecError
from metarec_jax.data.columns import ALIASES, MISSING, is_integer, plain

_DELIMITERS = ("::", "\t", ",", ";", "|")
_TYPED = re.compile(r"(.+):(token|float|token_seq|float_seq)")
_HEAD = 1 << 18
_SAMPLE = 100
_BLOCK = 1 << 23
_READ_ERRORS = (OSError, EOFError, zlib.error)


class Dialect(NamedTuple):
    """How a text file is laid out.

    Attributes:
      delimiter: what parts the fields; quoted: whether ``"..."`` may hold it.
      names: of the columns; without a header user_id, item_id, rating, timestamp, column_5, ... by position.
      types: RecBole's type of each column, or "".
      header: whether the file names its columns; skip: lines before the first row.
      sample: fields of the first rows.
    """

    delimiter: str
    quoted: bool
    names: tuple[str, ...]
    types: tuple[str, ...]
    header: bool
    skip: int
    encoding: str
    sample: tuple[tuple[str, ...], ...]


def kind(path: Path) -> str:
    """What the first bytes say: "parquet", "gzip", "bz2" or "text". Refuses what is none of them."""
    head = _head(path, raw=True)[:4096]
    if head[:4] == b"PAR1":
        return "parquet"
    if path.suffix == ".parquet":
        raise MetarecError(f"{path} is not a Parquet file (it does not begin with PAR1). Write it again")
    if head[:2] == b"PK":
        raise MetarecError(f"{path} is a zip archive; a table or a folder was wanted. Unzip it first")
    if head[:2] == b"\x1f\x8b":
        return "gzip"
    return "bz2" if head[:3] == b"BZh" else "text"


def _open(path: Path) -> Any:
    openers: dict[str, Callable[..., Any]] = {"gzip": gzip.open, "bz2": bz2.open}
    return openers.get(kind(path), open)(path, "rb")


def _head(path: Path, raw: bool = False) -> bytes:
    try:
        with open(path, "rb") if raw else _open(path) as file:
            return file.read(_HEAD)
    except _READ_ERRORS as error:
        raise _broken(path, error) from error


def _broken(path: Path, error: Exception) -> MetarecError:
    if isinstance(error, FileNotFoundError):
        return MetarecError(f"there is no file {path}. Check the path")
    if isinstance(error, PermissionError):
        return MetarecError(f"{path} may not be read by this user. Change its permissions (chmod +r)")
    if isinstance(error, EOFError) or "runcated" in str(error) or "end-of-stream" in str(error):
        return MetarecError(f"{path} ends in the middle of its compressed data: it was cut off. Get it again")
    return MetarecError(f"{path} cannot be read ({str(error).splitlines()[0][:200]}). Get or write it again")


def sniff(
    path: Path, names: tuple[str, ...] | None = None, asked: tuple[str, ...] = (), latin: bool = False
) -> Dialect:
    """The layout of a text file, from its first lines.

    The first line is a header if it holds a column name that people use (or one of ``asked``), or if all of it is text
    where a later row has a number.

    Args:
      names: where given, the columns of a file that is known to have no header.
      asked: column names that the caller will want.
      latin: take bytes that are not UTF-8 as Latin-1.
    """
    head = _head(path)
    if b"\0" in head:
        raise MetarecError(
            f"{path} is not a table (it holds binary data). CSV, TSV, Parquet or a RecBole file was wanted"
        )
    encoding = "utf-8"
    try:
        text = _decode(head)
    except UnicodeDecodeError as error:
        if not latin:
            raise _not_utf8(path, head[: error.start].count(b"\n") + 1, head[error.start : error.start + 1]) from error
        encoding, text = "latin-1", head.decode("latin-1")
    lines = text.splitlines(keepends=True)
    lines = lines[:-1] if len(head) == _HEAD and len(lines) > 1 else lines
    if not any(line.strip() for line in lines):
        raise MetarecError(f"{path} is empty. A table with one row an interaction was wanted")
    delimiter = _delimiter(path, lines[:_SAMPLE])
    quoted = delimiter in ",;" or (
        names is None and any(_is_quoted(f) for _, row in _fields(lines[:_SAMPLE], delimiter, False) for f in row)
    )
    rows = list(_first(_fields(lines, delimiter, quoted), _SAMPLE))
    first = [field.strip() for field in rows[0][1]]
    typed = [_TYPED.fullmatch(field) for field in first]
    types = tuple(match[2] if match else "" for match in typed)
    first = [match[1] if match else field for match, field in zip(typed, first, strict=True)]
    header = names is None and (any(typed) or _is_header(first, [row for _, row in rows[1:]], asked))
    if names is None and not header:
        usual = ["user_id", "item_id", "rating", "timestamp"]
        if len(first) == 3 and all(_looks_like_time(row[2]) for _, row in rows if len(row) == 3):
            usual.remove("rating")
        first = [usual[k] if k < len(usual) else f"column_{k + 1}" for k in range(len(first))]
    sample = rows[1:] if header else rows
    if not sample:
        raise MetarecError(f"{path} holds a header ({', '.join(first)}) and no rows. At least one row was wanted")
    columns = tuple(names) if names is not None else _unique(first)
    if len(columns) != len(first):
        raise MetarecError(
            f"line 1 of {path} has {len(first)} fields where {len(columns)} were wanted ({', '.join(columns)})"
        )
    fields = tuple(tuple(row) for _, row in sample)
    return Dialect(delimiter, quoted, columns, types, header, rows[0][0] if header else 0, encoding, fields)


def _decode(head: bytes) -> str:
    try:
        return head.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3 or len(head) < _HEAD:  # not merely a character cut at the end of the head
            raise
        return head[: error.start].decode("utf-8-sig")


def _not_utf8(path: Path, line: int, byte: bytes) -> MetarecError:
    return MetarecError(
        f"line {line} of {path} is not UTF-8 text (byte 0x{byte.hex()}). Convert it, say with: iconv -f latin1 -t utf-8"
    )


def _is_quoted(field: str) -> bool:
    return len(field) > 1 and field.strip().startswith('"') and field.strip().endswith('"')


def _delimiter(path: Path, lines: list[str]) -> str:
    """The one that parts most lines into equally many fields, two or more."""
    scores = []
    for delimiter in _DELIMITERS:
        counts = Counter(len(row) for _, row in _fields(lines, delimiter, delimiter in ",;"))
        width, times = max(((w, n) for w, n in counts.items() if w > 1), key=lambda p: p[1], default=(1, 0))
        scores.append((round(times / sum(counts.values()), 1), width if times else 0, delimiter))
    share, width, best = max(scores, key=lambda score: score[:2])
    if share < 0.5 or width < 2:
        raise MetarecError(
            f"{path}: the fields of its lines are not parted by a comma, tab, semicolon, '|' or '::' "
            f"(line 1: {lines[0].strip()[:60]!r}). A table with a user and an item column was wanted"
        )
    return best


def _fields(lines: Any, delimiter: str, quoted: bool) -> Iterator[tuple[int, list[str]]]:
    """Line number (from 1; of a quoted field's last line) and fields of each line that is not blank."""
    if len(delimiter) > 1:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, line.rstrip("\r\n").split(delimiter)
        return
    reader = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE)
    for row in reader:
        if row:
            yield reader.line_num, row


def _first(rows: Iterator[Any], count: int) -> Iterator[Any]:
    for _, row in zip(range(count), rows, strict=False):
        yield row


def number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _looks_like_time(text: str) -> bool:
    return (number(text) or 0.0) > 1e8


def _is_header(first: list[str], rest: list[list[str]], asked: tuple[str, ...]) -> bool:
    usual = {alias for aliases in ALIASES.values() for alias in aliases}
    if any(name in asked or plain(name) in usual for name in first):
        return True
    text = [k for k, name in enumerate(first) if number(name) is None]
    return len(text) == len(first) and any(number(row[k]) is not None for row in rest for k in text if k < len(row))


def _unique(names: list[str]) -> tuple[str, ...]:
    out: list[str] = []
    for k, name in enumerate(names):
        name = name or f"column_{k + 1}"
        out.append(name if name not in out else f"{name}_{k + 1}")
    return tuple(out)


def read_columns(path: Path, dialect: Dialect, types: Mapping[str, pa.DataType]) -> pd.DataFrame:
    """Some columns of a text file. A numeric column in which something is no number comes back as text.

    Raises:
      MetarecError: a line has too few or too many fields, or the file is cut off or not UTF-8; the line is named.
    """
    text = pa.dictionary(pa.int32(), pa.string())
    attempts = [(types, False), (dict.fromkeys(types, text), False)]
    if dialect.quoted:
        attempts = [(wanted, lines) for lines in (False, True) for wanted, _ in attempts]
    failed: Exception | None = None
    for wanted, newlines in attempts:
        try:
            table = _parse(path, dialect, wanted, newlines)
        except (pa.ArrowInvalid, UnicodeError, *_READ_ERRORS) as error:
            failed = error
            if not isinstance(error, pa.ArrowInvalid):
                break
            continue
        return _frame(table)
    assert failed is not None
    raise _refusal(path, dialect, failed) from failed


def _parse(path: Path, dialect: Dialect, types: Mapping[str, pa.DataType], newlines: bool) -> pa.Table:
    packed = kind(path)
    source: Any = pa.input_stream(str(path), compression=None if packed == "text" else packed)
    delimiter = dialect.delimiter
    if len(delimiter) > 1:  # one byte that no text holds, for a reader that wants one
        source, delimiter = pa.BufferReader(source.read().replace(delimiter.encode(), b"\x1f")), "\x1f"
    return pa.csv.read_csv(
        source,
        pa.csv.ReadOptions(
            column_names=list(dialect.names), skip_rows=dialect.skip, block_size=_BLOCK, encoding=dialect.encoding
        ),
        pa.csv.ParseOptions(
            delimiter=delimiter, quote_char='"' if dialect.quoted else False, newlines_in_values=newlines
        ),
        pa.csv.ConvertOptions(
            include_columns=list(types), column_types=types, null_values=list(MISSING), strings_can_be_null=True
        ),
    )


def _frame(table: pa.Table) -> pd.DataFrame:
    """Integers with missing values stay integers; text comes as categories or objects."""
    columns = {}
    for name in table.column_names:
        column = table.column(name)
        table = table.drop_columns([name])
        integers = pa.types.is_integer(column.type) and column.null_count
        columns[name] = column.to_pandas(types_mapper={column.type: pd.Int64Dtype()}.get if integers else None)
        del column
    return pd.DataFrame(columns, copy=False)


def lines(path: Path, dialect: Dialect) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of each row of a text file, slowly: to name what is wrong."""
    with _open(path) as file, io.TextIOWrapper(file, dialect.encoding, "surrogateescape", newline="") as stream:
        for number, row in _fields(stream, dialect.delimiter, dialect.quoted):
            if number > dialect.skip:
                yield number, row


def line_of(path: Path, dialect: Dialect, row: int) -> int:
    """The line (from 1) on which row ``row`` (from 0) stands."""
    for k, (number, _) in enumerate(lines(path, dialect)):
        if k == row:
            return number
    raise IndexError(f"{path} has no row {row}")


def _refusal(path: Path, dialect: Dialect, error: Exception) -> MetarecError:
    """What to say of a text file that would not parse: its first bad line, if there is one."""
    number, wanted = dialect.skip, len(dialect.names)
    try:
        for number, row in lines(path, dialect):
            if dialect.encoding == "utf-8" and (bad := re.search("[\udc80-\udcff]", "".join(row))):
                return _not_utf8(path, number, bytes([ord(bad[0]) - 0xDC00]))
            if len(row) != wanted:
                cut = " The file may have been cut off:" if len(row) < wanted else " A field may hold the delimiter:"
                return MetarecError(
                    f"line {number} of {path} has {len(row)} fields where {wanted} were wanted "
                    f"({', '.join(dialect.names[:8])}{', ...' if wanted > 8 else ''}).{cut} correct or delete the line"
                )
    except _READ_ERRORS as broken:
        return _broken(path, broken)
    except csv.Error as broken:
        return MetarecError(f"line {number + 1} of {path} cannot be parted into fields ({broken}). Correct it")
    return _broken(path, error)


def read_text(path: Path, dialect: Dialect) -> pd.DataFrame:
    """A whole text file, for side features: numbers where all of a column is, lists where RecBole says so, or text."""
    rows = []
    try:
        for number, row in lines(path, dialect):
            if len(row) != len(dialect.names):
                raise _refusal(path, dialect, ValueError(f"line {number}"))
            rows.append(row)
    except (*_READ_ERRORS, csv.Error) as error:
        raise _refusal(path, dialect, error) from error
    columns = {}
    for name, type_, values in zip(dialect.names, dialect.types, zip(*rows, strict=True), strict=True):
        columns[name] = _typed([None if v.strip() in MISSING else v.strip() for v in values], type_)
    return pd.DataFrame(columns)


def _typed(values: list[str | None], type_: str) -> pd.Series:
    if type_.endswith("_seq"):
        make: Any = float if type_ == "float_seq" else str
        return pd.Series([[make(part) for part in (v or "").split()] for v in values], dtype=object)
    given = [v for v in values if v is not None]
    if given and all(map(is_integer, given)):
        return pd.Series([None if v is None else int(v) for v in values], dtype="Int64")
    # a number with a leading zero ("02139") is a label
    if given and all(number(v) is not None and not re.match("0[0-9]", v) for v in given):
        return pd.Series([np.nan if v is None else float(v) for v in values], dtype=np.float64)
    return pd.Series(values, dtype=object)


def parquet_columns(path: Path) -> list[str]:
    """The names of a Parquet file's columns."""
    try:
        return list(pa.parquet.read_schema(path).names)
    except (pa.ArrowException, OSError) as error:
        raise _parquet_broken(path, error) from error


def read_parquet(path: Path, columns: list[str] | None = None) -> pd.DataFrame:
    """Some columns of a Parquet file, or all; text as categories where only some are read."""
    try:
        table = pa.parquet.read_table(path, columns=columns, read_dictionary=columns or [])
    except (pa.ArrowException, OSError) as error:
        raise _parquet_broken(path, error) from error
    return _frame(table)


def _parquet_broken(path: Path, error: Exception) -> MetarecError:
    if isinstance(error, (FileNotFoundError, PermissionError)):
        return _broken(path, error)
    return MetarecError(f"{path} is damaged or cut off ({str(error).splitlines()[0][:200]}). Get or write it again")
