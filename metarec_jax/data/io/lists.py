"""Text that holds several values: a list of JSON, Python, NumPy or SQL, or values with a separator."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

_SIGNS = (";", ",", "/")
_LONGEST = 100_000
"""Maximum number of characters of a text that is read as a list."""
_WORDS = 60
"""Maximum number of characters of a value between separators."""
_QUOTED = re.compile(r"'([^']*)'|\"([^\"]*)\"")
_BRACKETS = {"[": "]", "(": ")", "{": "}"}


def split(texts: Sequence[str]) -> tuple[list[list[Any]], str] | None:
    """The values of each text, and a description of the separator; None if the texts are not clearly lists.

    They are lists if each is in brackets, or if a separator splits them into values most of which occur first in some
    texts and later in others ("Comedy, War" and "War"), unlike names ("Lee, Ang") and places.

    >>> split(["War, Drama", "Drama"])
    ([['War', 'Drama'], ['Drama']], "separated by ','")
    >>> split(["Lyon, France", "Nice, France"])
    """
    if not texts:
        return None
    if all(text[0] in _BRACKETS and text[-1] == _BRACKETS[text[0]] for text in texts if text):
        rows = [_literal(text) for text in texts]
        lists = [row for row in rows if row is not None]
        return (_of_one_kind(lists), "written as a list") if len(lists) == len(rows) else None
    for sign in _SIGNS:
        if any(sign in text for text in texts):
            parts = [[part.strip() for part in text.split(sign) if part.strip()] for text in texts]
            if _is_plain(parts, sign):
                return parts, f"separated by '{sign}'"
    return None


def _is_plain(rows: list[list[str]], sign: str) -> bool:
    counts = Counter(part for row in rows for part in row)
    if any(len(part) > _WORDS for part in counts):
        return False
    numbers = [part for part in counts if not any(map(str.isalpha, part))]
    if numbers and sign == "/":  # fractions, dates
        return False
    if numbers and sign == ",":  # decimal commas, thousands, vectors
        thousands = all(len(part) == 3 for row in rows for part in row[1:])
        if thousands or max(map(len, rows)) < 3 or not all(map(str.isdecimal, numbers)):
            return False
    both = {row[0] for row in rows if row} & {part for row in rows for part in row[1:]}
    return bool(both) and 2 * sum(counts[part] for part in both) >= sum(counts.values())


def _literal(text: str) -> list[Any] | None:
    """The values of a list as JSON, Python, NumPy or SQL write it; for objects, their names."""
    inside = text[1:-1].strip()
    if len(text) > _LONGEST:
        return None
    if not inside:
        return []
    if re.search(r"['\"]\s+['\"]", inside) and "," not in inside:  # NumPy's form; Python would concatenate the strings
        return [one or other for one, other in _QUOTED.findall(inside)]
    values: Any = None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        try:
            values = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return _bare(text[0], inside)
    if isinstance(values, (set, frozenset)):
        values = sorted(values, key=str)
    if not isinstance(values, (list, tuple)):
        return None
    names = [name(value) for value in values]
    return None if None in names else names


def name(value: Any) -> str | int | float | None:
    """The value itself; for an object, its "name" or its only text."""
    if isinstance(value, dict):
        words = [v for v in value.values() if isinstance(v, str)]
        value = value.get("name", words[0] if len(words) == 1 else None)
    return value if isinstance(value, (str, int, float)) else None


def _bare(bracket: str, inside: str) -> list[Any] | None:
    """NumPy's numbers, ``[0.5 1.]``, and SQL's words, ``{War,Drama}``."""
    if bracket == "{" and ":" not in inside:
        return [part.strip().strip('"') for part in inside.split(",")]
    try:
        return [float(part) for part in inside.split()] if bracket == "[" else None
    except ValueError:
        return None


def _of_one_kind(rows: list[list[Any]]) -> list[list[Any]]:
    """Numbers as floats if one of them is a float; any other values unchanged."""
    every = [value for row in rows for value in row]
    if all(isinstance(v, (int, float)) for v in every) and any(isinstance(v, float) for v in every):
        return [[float(v) for v in row] for row in rows]
    return rows
