"""JSON tables: one object per line, or an array of objects. A column is a key, and a missing key a missing value."""

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

_EXPECTED = "expected one JSON object per line, or an array of objects. Write it so"


def is_json(path: Path) -> bool:
    """Whether a file begins as a JSON object or as an array does; named ``.json``, with either bracket."""
    start = _start(path)
    named = any(suffix in (".json", ".jsonl", ".ndjson") for suffix in path.suffixes[-2:])
    following = start[1:].lstrip()[:1]
    return (start[:1] == "{" and (named or following == '"')) or (start[:1] == "[" and (named or following == "{"))


def _start(path: Path) -> str:
    return formats.first_bytes(path)[:4096].decode("utf-8", "replace").lstrip("\ufeff \t\r\n")


def columns(path: Path) -> list[str]:
    """All keys of the objects of a file.

    Raises:
      MetarecError: no rows, what is not JSON or not an object, or more keys than a table has columns.
    """
    names: dict[str, None] = {}
    for _, row in _rows(path):
        names.update(dict.fromkeys(row))
        if len(names) > bounds.COLUMNS:
            raise MetarecError(f"{path} has more than {bounds.COLUMNS} keys. Leave some out")
    if not names:
        raise MetarecError(f"{path} holds no rows. At least one row is required")
    return list(names)


def read(path: Path, wanted: Sequence[str] | None = None) -> pd.DataFrame:
    """Some columns of a file, each value of which must be a number, text, or missing; or all, as they are.

    Raises:
      MetarecError: as `columns`; and an object or a list in a column that is wanted. The line is named.
    """
    names = columns(path) if wanted is None else list(wanted)
    found: dict[str, list[Any]] = {name: [] for name in names}
    for place, row in _rows(path):
        for name, values in found.items():
            value = row.get(name)
            if wanted is not None and isinstance(value, (dict, list)):
                raise MetarecError(
                    f"{place}, column {shown(name)} holds an object or a list, and one value per row is expected. "
                    "Name another column, or write its parts as columns of their own"
                )
            values.append(value)
    return pd.DataFrame({name: _typed(values) for name, values in found.items()})


def place(path: Path, row: int) -> str:
    """Where row ``row`` (from 0) stands: its line, or its number in the array."""
    return next(itertools.islice((where for where, _ in _rows(path)), row, None), f"row {row + 1} of {path}")


def _typed(values: list[Any]) -> pd.Series:
    """Integers stay exact; a column of numbers is one of floats only where these hold all of its integers."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int} and all(value is None or -(2**63) <= value < 2**63 for value in values):
        return pd.Series(values, dtype="Int64")
    whole = (value for value in values if isinstance(value, int))
    if kinds and kinds <= {int, float} and all(abs(value) < 2**EXACT for value in whole):
        return pd.Series(values, dtype="float64")
    return pd.Series(values, dtype=object)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each object, and where it stands, in words."""
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
                    where = f"line {number} of {path}"
                    yield where, _object(_parsed(line, where), where)
    except UnicodeDecodeError as error:
        raise MetarecError(f"{path} is not UTF-8 text (near line {number + 1}). Convert it to UTF-8") from error
    except formats.READ_ERRORS as error:
        raise bounds.broken(path, error) from error


def _parsed(text: str, where: str) -> Any:
    try:
        return bounds.parse_json(text)
    except ValueError as error:
        raise MetarecError(f"{where} is not JSON ({one_line(error)}); {_EXPECTED}") from error


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise MetarecError(f"{where} is not a JSON object but {shown(json.dumps(value))}; {_EXPECTED}")
    return value
