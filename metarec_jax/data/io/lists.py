"""Text that holds several values: written as a list of JSON, Python, NumPy or SQL, or parted by a sign."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

_SIGNS = (";", ",", "/")
_LONGEST = 100_000
"""Characters of text that is read as a list."""
_WORDS = 60
"""Characters of a value that a sign parts."""
_QUOTED = re.compile(r"'([^']*)'|\"([^\"]*)\"")
_BRACKETS = {"[": "]", "(": ")", "{": "}"}


def split(texts: Sequence[str]) -> tuple[list[list[Any]], str] | None:
    """The values of each text, and in words how they were parted; None where they are not plainly lists.

    They are where each is written as a list in brackets, or where one sign parts them into values of which most stand
    first in some texts and later in others ("Comedy, War" and "War"), unlike names ("Lee, Ang") and places.

    >>> split(["War, Drama", "Drama"])
    ([['War', 'Drama'], ['Drama']], "parted by ','")
    >>> split(["Lyon, France", "Nice, France"])
    """
    if not texts:
        return None
    if all(text[0] in _BRACKETS and text[-1] == _BRACKETS[text[0]] for text in texts if text):
        rows = [_literal(text) for text in texts]
        found = [row for row in rows if row is not None]
        return (_of_one_kind(found), "written as a list") if len(found) == len(rows) else None
    for sign in _SIGNS:
        if any(sign in text for text in texts):
            parts = [[part.strip() for part in text.split(sign) if part.strip()] for text in texts]
            if _is_plain(parts, sign):
                return parts, f"parted by '{sign}'"
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
    """The values of a list as JSON, Python, NumPy or SQL write it; of objects their names."""
    inside = text[1:-1].strip()
    if len(text) > _LONGEST:
        return None
    if not inside:
        return []
    if re.search(r"['\"]\s+['\"]", inside) and "," not in inside:  # NumPy's; Python would join its parts to one text
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
    found = [name(value) for value in values]
    return None if None in found else found


def name(value: Any) -> str | int | float | None:
    """A value itself; of an object what it calls its name, or its only text."""
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
    """Numbers as floats where one of them has a fraction; all else as it is."""
    every = [value for row in rows for value in row]
    if all(isinstance(v, (int, float)) for v in every) and any(isinstance(v, float) for v in every):
        return [[float(v) for v in row] for row in rows]
    return rows
