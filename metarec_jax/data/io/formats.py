"""Table files: the kind of a file, its delimiter, and its columns. Every fault of a file is a `MetarecError`.

Delimited text (comma, tab, semicolon, "|" or "::"; plain, gzip or bzip2; UTF-8, or Latin-1 if the caller allows it)
and Parquet. A RecBole atomic file is tab-separated text whose header names types (``user_id:token``).
"""

from __future__ import annotations

import csv
import io
import re
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv

from metarec_jax.core import MetarecError
from metarec_jax.data.io import bounds, parquet, spelling
from metarec_jax.data.io.columns import ALIASES, MISSING, plain
from metarec_jax.messages import listed, one_line, shown

_DELIMITERS = ("::", "\t", ",", ";", "|")
_TYPED = re.compile(r"(.+):(token|float|token_seq|float_seq)")
_HEAD = 1 << 18
_SAMPLE = 100
READ_ERRORS = (OSError, EOFError, zlib.error, MemoryError)
_TEXT = pa.dictionary(pa.int32(), pa.string())
_DIGITS = re.compile(r"0|-?[1-9][0-9]{0,4000}")
_SEPARATOR = re.compile('"?sep=(.)"?', re.IGNORECASE)
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_PART = "\x1f"
"""A byte that text does not contain, which replaces a two-byte delimiter for readers that require one byte."""


class Dialect(NamedTuple):
    """The layout of a text file.

    Attributes:
      delimiter: separates the fields; quoted: whether fields may be quoted, ``"..."``.
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
    """The kind of a file by its first bytes: "parquet", "gzip", "bz2" or "text".

    Raises:
      MetarecError: the file is none of these.
    """
    if "\0" in str(path):
        raise MetarecError(f"{shown(str(path))} is not a path: it contains a zero byte. Check the path")
    if path.exists() and not path.is_file():  # a pipe or a device may never end
        raise MetarecError(f"{path} is not a regular file. Save its content to a file and pass that")
    head = first_bytes(path, raw=True)[:4096]
    if head[:4] == b"PAR1":
        return "parquet"
    if path.suffix == ".parquet":
        raise MetarecError(f"{path} is not a Parquet file (it does not begin with PAR1). Write it again")
    if head[:2] == b"PK":
        raise MetarecError(f"{path}: expected a table or a folder, got a zip archive. Unzip it first")
    if head[:2] == b"\x1f\x8b":
        return "gzip"
    return "bz2" if head[:3] == b"BZh" else "text"


def first_bytes(path: Path, raw: bool = False) -> bytes:
    """The first bytes of a file, unpacked unless ``raw``."""
    try:
        with bounds.opened(path, "text" if raw else kind(path)) as file:
            return file.read(_HEAD)
    except READ_ERRORS as error:
        raise bounds.broken(path, error) from error


def sniff(
    path: Path, names: tuple[str, ...] | None = None, asked: tuple[str, ...] = (), latin: bool = False
) -> Dialect:
    """The layout of a text file, from its first lines.

    The first line is a header if it contains a usual column name (or one of ``asked``), or if all of its fields are
    text and a later row has a number.

    Args:
      names: the columns of a file that is known to have no header.
      asked: column names that the caller requires.
      latin: read bytes that are not UTF-8 as Latin-1.
    """
    head = first_bytes(path)
    if head[:2] in _UTF16:
        raise MetarecError(f"{path} is UTF-16 text. Convert it, for example with: iconv -f utf-16 -t utf-8")
    if b"\0" in head:
        raise MetarecError(f"{path}: expected CSV, TSV, Parquet or a RecBole file, got binary data. Check the path")
    encoding = "utf-8"
    try:
        text = _decode(head)
    except UnicodeDecodeError as error:
        if not latin:
            raise _not_utf8(path, head[: error.start].count(b"\n") + 1, head[error.start : error.start + 1]) from error
        encoding, text = "latin-1", head.decode("latin-1")
    lines = list(io.StringIO(text, newline=""))  # str.splitlines also splits at other characters
    lines = lines[:-1] if len(head) == _HEAD and len(lines) > 1 else lines
    separator = _SEPARATOR.fullmatch(lines[0].rstrip("\r\n")) if lines else None
    if separator is not None:  # Excel's "sep=" line, which is neither a header nor a row
        lines[0] = "\n"
    if not any(line.strip() for line in lines):
        raise MetarecError(f"{path} is empty, expected a table with one row per interaction. Check the file")
    delimiter = _delimiter(path, lines[:_SAMPLE]) if separator is None else separator[1]
    try:
        quoted = delimiter in ",;" or (
            names is None
            and len(delimiter) == 1
            and any(_is_quoted(f) for _, row in _fields(lines[:_SAMPLE], delimiter, False) for f in row)
        )
        rows = list(_first(_fields(lines, delimiter, quoted), _SAMPLE))
    except csv.Error as error:
        raise MetarecError(f"{path}: its first lines cannot be split into fields ({one_line(error)})") from error
    if (width := len(rows[0][1])) > bounds.COLUMNS:
        raise MetarecError(f"line 1 of {path}: expected at most {bounds.COLUMNS} fields, got {width}. Remove some")
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
        raise MetarecError(f"{path} has a header ({listed(first)}) and no rows. At least one row is required")
    columns = tuple(names) if names is not None else _unique(first)
    if len(columns) != len(first):
        raise MetarecError(f"line 1 of {path}: expected {len(columns)} fields ({listed(columns)}), got {len(first)}")
    fields = tuple(tuple(row) for _, row in sample)
    skip = rows[0][0] if header else int(separator is not None)
    return Dialect(delimiter, quoted, columns, types, header, skip, encoding, fields)


def _decode(head: bytes) -> str:
    try:
        return head.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3 or len(head) < _HEAD:  # not just a character cut at the end of the head
            raise
        return head[: error.start].decode("utf-8-sig")


def _not_utf8(path: Path, line: int, byte: bytes) -> MetarecError:
    return MetarecError(
        f"line {line} of {path} is not UTF-8 text (byte 0x{byte.hex()}). Convert it, for example with: "
        "iconv -f latin1 -t utf-8"
    )


def _is_quoted(field: str) -> bool:
    return len(field) > 1 and field.strip().startswith('"') and field.strip().endswith('"')


def _delimiter(path: Path, lines: list[str]) -> str:
    """The delimiter that splits most lines into the same number of fields, two or more."""
    scores = []
    for delimiter in _DELIMITERS:
        try:
            counts = Counter(len(row) for _, row in _fields(lines, delimiter, delimiter in ",;"))
        except csv.Error:  # an unclosed quote, or a field that is too long
            continue
        width, times = max(((w, n) for w, n in counts.items() if w > 1), key=lambda p: p[1], default=(1, 0))
        scores.append((round(times / sum(counts.values()), 1), width if times else 0, delimiter))
    share, width, best = max(scores, key=lambda score: score[:2], default=(0.0, 0, ""))
    if share < 0.5 or width < 2:
        raise MetarecError(
            f"{path}: expected fields separated by a comma, tab, semicolon, '|' or '::', got line 1: "
            f"{shown(lines[0].strip())}. A table requires a user and an item column"
        )
    return best


def _fields(lines: Any, delimiter: str, quoted: bool) -> Iterator[tuple[int, list[str]]]:
    """Line number (from 1; the last line of a quoted field) and fields of each line that is not blank."""
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


def _looks_like_time(text: str) -> bool:
    return (spelling.number(text) or 0.0) > 1e8


def _is_header(first: list[str], rest: list[list[str]], asked: tuple[str, ...]) -> bool:
    usual = {alias for aliases in ALIASES.values() for alias in aliases}
    if any(name in asked or plain(name) in usual for name in first):
        return True
    text = [k for k, name in enumerate(first) if spelling.number(name) is None]
    return len(text) == len(first) and any(
        spelling.number(row[k]) is not None for row in rest for k in text if k < len(row)
    )


def _unique(names: list[str]) -> tuple[str, ...]:
    out: dict[str, None] = {}
    for k, name in enumerate(names):
        name = name or f"column_{k + 1}"
        while name in out:
            name = f"{name}_{k + 1}"
        out[name] = None
    return tuple(out)


def read_columns(path: Path, dialect: Dialect, types: Mapping[str, pa.DataType], missing: bool = True) -> pd.DataFrame:
    """Some columns of a text file. A numeric column with a value that is not a number is returned as text.

    Args:
      missing: whether text such as NA is a missing value.

    Raises:
      MetarecError: a line has too few or too many fields, or the file is truncated or not UTF-8; the line is named.
    """
    attempts = [(types, False), (dict.fromkeys(types, _TEXT), False)]
    if dialect.quoted:
        attempts = [(wanted, lines) for lines in (False, True) for wanted, _ in attempts]
    failed: Exception | None = None
    for wanted, newlines in attempts:
        try:
            table = _parse(path, dialect, wanted, newlines, missing)
        except (pa.ArrowException, UnicodeError, *READ_ERRORS) as error:
            failed = error
            if not isinstance(error, pa.ArrowInvalid):
                break
            continue
        return parquet.as_frame(table)
    assert failed is not None
    raise _refusal(path, dialect, failed) from failed


def _parse(path: Path, dialect: Dialect, types: Mapping[str, pa.DataType], newlines: bool, missing: bool) -> pa.Table:
    packed = kind(path)
    source: Any = pa.OSFile(str(path)) if packed == "text" else bounds.opened(path, packed)
    delimiter = dialect.delimiter
    if len(delimiter) > 1:
        whole = source.read()
        if _PART.encode() in whole:
            raise MetarecError(f"{path} contains the control character {shown(_PART)}. Delete it")
        source, delimiter = pa.BufferReader(whole.replace(delimiter.encode(), _PART.encode())), _PART
    return pa.csv.read_csv(
        source,
        pa.csv.ReadOptions(
            column_names=list(dialect.names), skip_rows=dialect.skip, block_size=bounds.LINE, encoding=dialect.encoding
        ),
        pa.csv.ParseOptions(
            delimiter=delimiter, quote_char='"' if dialect.quoted else False, newlines_in_values=newlines
        ),
        pa.csv.ConvertOptions(
            include_columns=list(types), column_types=types, null_values=list(MISSING), strings_can_be_null=missing
        ),
    )


def lines(path: Path, dialect: Dialect) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of each row of a text file; slow, used to report a fault.

    Raises:
      MetarecError: a line is longer than `bounds.LINE` characters.
    """
    encoding = "utf-8-sig" if dialect.encoding == "utf-8" else dialect.encoding
    with (
        bounds.opened(path, kind(path)) as file,
        io.TextIOWrapper(file, encoding, "surrogateescape", newline="") as stream,
    ):
        for number, row in _fields(_bounded(stream, path), dialect.delimiter, dialect.quoted):
            if number > dialect.skip:
                yield number, row


def _bounded(stream: io.TextIOWrapper, path: Path) -> Iterator[str]:
    for number, line in enumerate(iter(lambda: stream.readline(bounds.LINE + 1), ""), 1):
        if len(line) > bounds.LINE:
            raise MetarecError(f"line {number} of {path} is longer than {bounds.LINE} characters. Correct or delete it")
        yield line


def place(path: Path, dialect: Dialect | None, row: int) -> str:
    """The location of row ``row`` (from 0) for a message: its line (from 1) in a text file, else its number."""
    if dialect is not None:
        try:
            for k, (number, _) in enumerate(lines(path, dialect)):
                if k == row:
                    return f"line {number} of {path}"
        except csv.Error:  # Arrow accepts longer fields than csv does
            pass
    return f"row {row + 1} of {path}"


def _refusal(path: Path, dialect: Dialect, error: Exception) -> MetarecError:
    """The error of a text file that does not parse; it names the first bad line, if there is one."""
    number, wanted = dialect.skip, len(dialect.names)
    try:
        for number, row in lines(path, dialect):
            if dialect.encoding == "utf-8" and (bad := re.search("[\udc80-\udcff]", "".join(row))):
                return _not_utf8(path, number, bytes([ord(bad[0]) - 0xDC00]))
            if len(row) != wanted:
                cause = "The file may be truncated:" if len(row) < wanted else "A field may contain the delimiter:"
                return MetarecError(
                    f"line {number} of {path}: expected {wanted} fields ({listed(dialect.names)}), got {len(row)}. "
                    f"{cause} correct or delete the line"
                )
    except READ_ERRORS as broken:
        return bounds.broken(path, broken)
    except csv.Error as broken:
        return MetarecError(f"line {number + 1} of {path} cannot be split into fields ({one_line(broken)}). Correct it")
    return bounds.broken(path, error)


def read_text(path: Path, dialect: Dialect, ids: Collection[str | None] = ()) -> pd.DataFrame:
    """A whole text file, for side features: columns of numbers, of lists (if RecBole's header says so), or of text.

    Args:
      ids: columns of ids, which keep their spelling.

    Returns:
      The columns; ``attrs["notes"]`` lists what was changed.

    Raises:
      MetarecError: a line has too few or too many fields or is not UTF-8, or the file is truncated; the line is named.
    """
    frame = read_columns(path, dialect, dict.fromkeys(dialect.names, _TEXT), missing=False)
    if not len(frame):
        raise MetarecError(f"{path} has no rows. At least one row is required")
    columns, notes = {}, []
    for name, type_ in zip(dialect.names, dialect.types, strict=True):
        codes = frame.pop(name).cat
        spelled = [value.strip() for value in codes.categories]
        given = [None if value in MISSING else value for value in spelled]
        at = codes.codes.to_numpy()
        if type_ == "float_seq" and (bad := [k for k, value in enumerate(given) if _floats(value) is None]):
            row = int(np.argmax(at == bad[0]))
            raise MetarecError(
                f"{place(path, dialect, row)}, column {shown(name)}: {shown(given[bad[0]])} is not a list of numbers, "
                "the type in its header. Correct it, or change the type to token_seq"
            )
        if name in ids:
            typed = pd.Series([*given, None], dtype=object)
        elif dialect.delimiter == ";" and (decimals := spelling.decimal_commas(given)) is not None:
            typed = pd.Series([*decimals, np.nan], dtype=np.float64)
            notes.append(f"column {shown(name)}: {spelling.commas_note(given)}")
        else:
            typed = _typed([*given, None], type_)
            if typed.dtype == object and not type_.endswith("_seq"):  # NA may be a value: the whole column decides
                typed = pd.Series([*(value or None for value in spelled), None], dtype=object)
        columns[name] = typed.iloc[at].reset_index(drop=True)  # -1, missing, is the last
    frame = pd.DataFrame(columns)
    frame.attrs["notes"] = notes
    return frame


def _floats(text: str | None) -> list[float] | None:
    found = [spelling.number(part) for part in (text or "").split()]
    return None if None in found else [f for f in found if f is not None]


def _typed(values: list[str | None], type_: str) -> pd.Series:
    if type_.endswith("_seq"):
        return pd.Series([_floats(v) if type_ == "float_seq" else (v or "").split() for v in values], dtype=object)
    given = [v for v in values if v is not None]
    if given and all(map(_DIGITS.fullmatch, given)):
        integers = [None if v is None else int(v) for v in values]
        if all(n is None or -(2**63) <= n < 2**63 for n in integers):
            return pd.Series(integers, dtype="Int64")
        return pd.Series(values, dtype=object)
    # a number with a leading zero ("02139") is a label
    if given and all(spelling.number(v) is not None and not re.match("0[0-9]", v) for v in given):
        return pd.Series([np.nan if v is None else float(v) for v in values], dtype=np.float64)
    return pd.Series(values, dtype=object)
