"""JSON tables: one object per line, or an array of objects. A key is a column; a missing key is a missing value."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from metarec_jax.core import MetarecError
from metarec_jax.data.io import bounds, formats
from metarec_jax.data.io.spelling import EXACT
from metarec_jax.messages import one_line, shown

_EXPECTED = "expected one JSON object per line, or an array of objects. Convert it"


def is_json(path: Path) -> bool:
    """Whether a file starts like a JSON object or an array of objects; for a name in ``.json``, with a bracket."""
    start = _start(path)
    named = any(suffix in (".json", ".jsonl", ".ndjson") for suffix in path.suffixes[-2:])
    following = start[1:].lstrip()[:1]
    return (start[:1] == "{" and (named or following == '"')) or (start[:1] == "[" and (named or following == "{"))


def _start(path: Path) -> str:
    return formats.first_bytes(path)[:4096].decode("utf-8", "replace").lstrip("\ufeff \t\r\n")


def columns(path: Path) -> list[str]:
    """All keys of the objects of a file.

    Raises:
      MetarecError: there are no rows, a row is not a JSON object, or there are more keys than a table may have columns.
    """
    names: dict[str, None] = {}
    for _, row in _rows(path):
        names.update(dict.fromkeys(row))
        if len(names) > bounds.COLUMNS:
            raise MetarecError(f"{path} has more than {bounds.COLUMNS} keys. Remove some")
    if not names:
        raise MetarecError(f"{path} has no rows. At least one row is required")
    return list(names)


def read(path: Path, wanted: Sequence[str] | None = None) -> pd.DataFrame:
    """The ``wanted`` columns of a file, of single values (numbers or text); None: all columns, of any values.

    Raises:
      MetarecError: as `columns`; and an object or a list in a wanted column. The message names the line.
    """
    names = columns(path) if wanted is None else list(wanted)
    values_by_name: dict[str, list[Any]] = {name: [] for name in names}
    for place, row in _rows(path):
        for name, values in values_by_name.items():
            value = row.get(name)
            if wanted is not None and isinstance(value, (dict, list)):
                raise MetarecError(
                    f"{place}, column {shown(name)}: expected one value per row, got an object or a list. "
                    "Name another column, or write its parts as separate columns"
                )
            values.append(value)
    return pd.DataFrame({name: _typed(values) for name, values in values_by_name.items()})


def place(path: Path, row: int) -> str:
    """The location of row ``row`` (from 0) for a message: its line, or its position in the array."""
    return next(itertools.islice((at for at, _ in _rows(path)), row, None), f"row {row + 1} of {path}")


def _typed(values: list[Any]) -> pd.Series:
    """A typed column. Integers stay exact: numbers become floats only if floats represent all of the integers."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int} and all(value is None or -(2**63) <= value < 2**63 for value in values):
        return pd.Series(values, dtype="Int64")
    whole = (value for value in values if isinstance(value, int))
    if kinds and kinds <= {int, float} and all(abs(value) < 2**EXACT for value in whole):
        return pd.Series(values, dtype="float64")
    return pd.Series(values, dtype=object)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The location of each object, for messages, and the object."""
    number = 0
    try:
        with bounds.opened(path, formats.kind(path)) as file, io.TextIOWrapper(file, "utf-8-sig") as stream:
            if _start(path)[:1] == "[":
                entries = _parsed(stream.read(), str(path))
                for number, row in enumerate(entries, 1):
                    yield f"entry {number} of {path}", _object(row, f"entry {number} of {path}")
                return
            for number, line in enumerate(stream, 1):
                if line.strip():
                    place = f"line {number} of {path}"
                    yield place, _object(_parsed(line, place), place)
    except UnicodeDecodeError as error:
        raise MetarecError(f"{path} is not UTF-8 text (near line {number + 1}). Convert it to UTF-8") from error
    except formats.READ_ERRORS as error:
        raise bounds.broken(path, error) from error


def _parsed(text: str, place: str) -> Any:
    try:
        return bounds.parse_json(text)
    except ValueError as error:
        raise MetarecError(f"{place} is not JSON ({one_line(error)}); {_EXPECTED}") from error


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise MetarecError(f"{place} is not a JSON object but {shown(json.dumps(value))}; {_EXPECTED}")
    return value
