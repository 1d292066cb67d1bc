"""Table files: what a file is, how its fields are parted, and its columns. What is wrong with one is a `MetarecError`.

Delimited text (comma, tab, semicolon, "|" or "::"; plain, gzip or bzip2; UTF-8, or Latin-1 where the caller allows it)
and Parquet. A RecBole atomic file is tab-parted text whose header names types (``user_id:token``).
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
"""One byte that no text holds, in the place of a delimiter of two, for a reader that wants one."""


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
    if "\0" in str(path):
        raise MetarecError(f"{shown(str(path))} is no path: it holds a zero byte. Check the path")
    if path.exists() and not path.is_file():  # a pipe or a device may never end
        raise MetarecError(f"{path} is no plain file. Write what it gives into a file and name that")
    head = first_bytes(path, raw=True)[:4096]
    if head[:4] == b"PAR1":
        return "parquet"
    if path.suffix == ".parquet":
        raise MetarecError(f"{path} is not a Parquet file (it does not begin with PAR1). Write it again")
    if head[:2] == b"PK":
        raise MetarecError(f"{path} is a zip archive; a table or a folder was wanted. Unzip it first")
    if head[:2] == b"\x1f\x8b":
        return "gzip"
    return "bz2" if head[:3] == b"BZh" else "text"


def first_bytes(path: Path, raw: bool = False) -> bytes:
    """How a file begins, unpacked unless ``raw``."""
    try:
        with bounds.opened(path, "text" if raw else kind(path)) as file:
            return file.read(_HEAD)
    except READ_ERRORS as error:
        raise bounds.broken(path, error) from error


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
    head = first_bytes(path)
    if head[:2] in _UTF16:
        raise MetarecError(f"{path} is UTF-16 text. Convert it, say with: iconv -f utf-16 -t utf-8")
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
    lines = list(io.StringIO(text, newline=""))  # str.splitlines parts at more than line ends
    lines = lines[:-1] if len(head) == _HEAD and len(lines) > 1 else lines
    separator = _SEPARATOR.fullmatch(lines[0].rstrip("\r\n")) if lines else None
    if separator is not None:  # Excel's first line, which is neither a header nor a row
        lines[0] = "\n"
    if not any(line.strip() for line in lines):
        raise MetarecError(f"{path} is empty. A table with one row an interaction was wanted")
    delimiter = _delimiter(path, lines[:_SAMPLE]) if separator is None else separator[1]
    try:
        quoted = delimiter in ",;" or (
            names is None
            and len(delimiter) == 1
            and any(_is_quoted(f) for _, row in _fields(lines[:_SAMPLE], delimiter, False) for f in row)
        )
        rows = list(_first(_fields(lines, delimiter, quoted), _SAMPLE))
    except csv.Error as error:
        raise MetarecError(f"{path}: its first lines cannot be parted into fields ({one_line(error)})") from error
    if (width := len(rows[0][1])) > bounds.COLUMNS:
        raise MetarecError(f"line 1 of {path} has {width} fields, and {bounds.COLUMNS} are the most. Leave some out")
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
        raise MetarecError(f"{path} holds a header ({listed(first)}) and no rows. At least one row was wanted")
    columns = tuple(names) if names is not None else _unique(first)
    if len(columns) != len(first):
        raise MetarecError(
            f"line 1 of {path} has {len(first)} fields where {len(columns)} were wanted ({listed(columns)})"
        )
    fields = tuple(tuple(row) for _, row in sample)
    skip = rows[0][0] if header else int(separator is not None)
    return Dialect(delimiter, quoted, columns, types, header, skip, encoding, fields)


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
        try:
            counts = Counter(len(row) for _, row in _fields(lines, delimiter, delimiter in ",;"))
        except csv.Error:  # a quote that is never closed, a field without end
            continue
        width, times = max(((w, n) for w, n in counts.items() if w > 1), key=lambda p: p[1], default=(1, 0))
        scores.append((round(times / sum(counts.values()), 1), width if times else 0, delimiter))
    share, width, best = max(scores, key=lambda score: score[:2], default=(0.0, 0, ""))
    if share < 0.5 or width < 2:
        raise MetarecError(
            f"{path}: the fields of its lines are not parted by a comma, tab, semicolon, '|' or '::' "
            f"(line 1: {shown(lines[0].strip())}). A table with a user and an item column was wanted"
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
    """Some columns of a text file. A numeric column in which something is no number comes back as text.

    Args:
      missing: whether text such as NA is a missing value.

    Raises:
      MetarecError: a line has too few or too many fields, or the file is cut off or not UTF-8; the line is named.
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
            raise MetarecError(f"{path} holds the control character {shown(_PART)}. Delete it")
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
    """Line number and fields of each row of a text file, slowly: to name what is wrong.

    Raises:
      MetarecError: a line of more than `bounds.LINE` characters.
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
    """Where row ``row`` (from 0) stands, in words: by its line (from 1) in a text file, by its number elsewhere."""
    if dialect is not None:
        try:
            for k, (number, _) in enumerate(lines(path, dialect)):
                if k == row:
                    return f"line {number} of {path}"
        except csv.Error:  # Arrow takes longer fields than csv does
            pass
    return f"row {row + 1} of {path}"


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
                    f"({listed(dialect.names)}).{cut} correct or delete the line"
                )
    except READ_ERRORS as broken:
        return bounds.broken(path, broken)
    except csv.Error as broken:
        return MetarecError(
            f"line {number + 1} of {path} cannot be parted into fields ({one_line(broken)}). Correct it"
        )
    return bounds.broken(path, error)


def read_text(path: Path, dialect: Dialect, ids: Collection[str | None] = ()) -> pd.DataFrame:
    """A whole text file, for side features: numbers where all of a column is, lists where RecBole says so, or text.

    Args:
      ids: columns of ids, which stay as they are spelled.

    Returns:
      The columns; ``attrs["notes"]`` says what was changed.

    Raises:
      MetarecError: a line has too few or too many fields or is not UTF-8, or the file is cut off; the line is named.
    """
    frame = read_columns(path, dialect, dict.fromkeys(dialect.names, _TEXT), missing=False)
    if not len(frame):
        raise MetarecError(f"{path} holds no rows. At least one row was wanted")
    columns, notes = {}, []
    for name, type_ in zip(dialect.names, dialect.types, strict=True):
        codes = frame.pop(name).cat
        spelled = [value.strip() for value in codes.categories]
        given = [None if value in MISSING else value for value in spelled]
        at = codes.codes.to_numpy()
        if type_ == "float_seq" and (bad := [k for k, value in enumerate(given) if _floats(value) is None]):
            row = int(np.argmax(at == bad[0]))
            raise MetarecError(
                f"{place(path, dialect, row)}, column {shown(name)}: {shown(given[bad[0]])} is no list of numbers, as "
                "its header says. Correct it, or call the column token_seq"
            )
        if name in ids:
            typed = pd.Series([*given, None], dtype=object)
        elif dialect.delimiter == ";" and (decimals := spelling.decimal_commas(given)) is not None:
            typed = pd.Series([*decimals, np.nan], dtype=np.float64)
            notes.append(f"column {shown(name)}: {spelling.said_of_commas(given)}")
        else:
            typed = _typed([*given, None], type_)
            if typed.dtype == object and not type_.endswith("_seq"):  # whether its NA is a value, the whole column says
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
