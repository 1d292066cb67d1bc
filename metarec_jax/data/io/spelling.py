"""How text spells numbers, and which of them may have lost digits before they were read."""

from __future__ import annotations

import re
from collections.abc import Sequence

from metarec_jax.data.interactions import EXACT

_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")
WHOLE = r"(0|-?[1-9][0-9]{0,17})(\.0*)?"
"""A regular expression of integers, with or without a decimal point: pandas writes 26 as 26.0."""
ROUNDED = r"-?[0-9](\.[0-9]+)?[eE]\+[0-9]+|-?[0-9]\.[0-9]+[eE][0-9]+|-?[0-9]{16,}\.0*"
"""A regular expression of long numbers as float columns and spreadsheets write them (1.23457E+18): `was_rounded`."""
COMMA, THOUSANDS = "[-+]?[0-9]*,[0-9]+", "[-+]?[0-9]*,[0-9]{3}"
_COMMA, _THOUSANDS = re.compile(COMMA), re.compile(THOUSANDS)
_WHOLE, _ROUNDED = re.compile(WHOLE), re.compile(ROUNDED)


def is_integer(text: str) -> bool:
    """Whether text is an integer in canonical form: no leading zeros, no "+"."""
    return _INTEGER.fullmatch(text) is not None


def whole(text: str) -> int | None:
    """The integer that text spells, with or without a decimal point; None for any other text.

    >>> whole("26.0"), whole("26"), whole("26.5"), whole("007")
    (26, 26, None, None)
    """
    match = _WHOLE.fullmatch(text)
    return None if match is None else int(match[1])


def number(text: str) -> float | None:
    """The number that text spells; None for any other text."""
    if "_" in text:  # "1_000" is a number only in Python
        return None
    try:
        return float(text)
    except ValueError:
        return None


def decimal_commas(texts: Sequence[str | None]) -> list[float] | None:
    """Numbers with decimal commas, nan where missing; None if the commas are not clearly decimal.

    They are not if a point occurs too, or if three digits follow every comma, as in thousands.

    >>> decimal_commas(["2,5", "3", "4,0"]), decimal_commas(["1,000"]), decimal_commas(["2,5", "3.5"])
    ([2.5, 3.0, 4.0], None, None)
    """
    present = [text for text in texts if text is not None]
    commas = [text for text in present if _COMMA.fullmatch(text)]
    if not commas or all(_THOUSANDS.fullmatch(text) for text in commas) or any("." in text for text in present):
        return None
    numbers = [None if text is None else number(text.replace(",", ".", 1)) for text in texts]
    if any(value is None and text is not None for value, text in zip(numbers, texts, strict=True)):
        return None
    return [float("nan") if value is None else value for value in numbers]


def commas_note(texts: Sequence[str | None]) -> str:
    """The note on a column that `decimal_commas` reads."""
    such = next(text for text in texts if text is not None and "," in text)
    return f"decimal commas, such as '{such}', are read as decimal points"


def was_rounded(value: object, bits: int = EXACT) -> bool:
    """Whether an id passed through a float that cannot represent it exactly, so that several ids may coincide.

    Args:
      bits: a float represents integers of up to this many bits exactly.

    >>> was_rounded(2.0**53), was_rounded("1.23457E+18"), was_rounded("26.0"), was_rounded(2**60)
    (True, True, False, False)
    """
    if isinstance(value, str):
        if "." not in value and "+" not in value:  # a quick test that most ids pass
            return False
        match = _ROUNDED.fullmatch(value)
        return match is not None and ("." not in value or "e" in value.lower() or abs(float(value)) >= 2.0**EXACT)
    return isinstance(value, float) and 2.0**bits <= abs(value) < float("inf")
