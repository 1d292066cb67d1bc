"""How numbers are spelled in text, and which of them may have lost digits before they came here."""

from __future__ import annotations

import re

_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")
WHOLE = r"(0|-?[1-9][0-9]{0,17})(\.0*)?"
"""A regular expression of integers, also where a decimal point follows: 26.0 is what pandas makes of 26."""
ROUNDED = r"-?[0-9](\.[0-9]+)?[eE]\+[0-9]+|-?[0-9]{16,}\.0*"
"""And of numbers as a float column or a spreadsheet writes long ones (1.23457E+18): see `was_rounded`."""
_WHOLE, _ROUNDED = re.compile(WHOLE), re.compile(ROUNDED)
EXACT = 53
"""Bits of the integers that float64 counts one by one; 2**53 and 2**53 + 1 are one float."""


def is_integer(text: str) -> bool:
    """Whether text is an integer written in the one usual way, so that nothing is lost: no leading zeros, no "+"."""
    return _INTEGER.fullmatch(text) is not None


def whole(text: str) -> int | None:
    """The integer that text spells, with or without a decimal point; None for other text.

    >>> whole("26.0"), whole("26"), whole("26.5"), whole("007")
    (26, 26, None, None)
    """
    match = _WHOLE.fullmatch(text)
    return None if match is None else int(match[1])


def number(text: str) -> float | None:
    """The number that text spells; None for other text."""
    if "_" in text:  # "1_000" is a number to Python alone
        return None
    try:
        return float(text)
    except ValueError:
        return None


def was_rounded(value: object, bits: int = EXACT) -> bool:
    """Whether an id went through a float that does not hold it exactly, so that several ids may have become this one.

    Args:
      bits: of a float's integers.

    >>> was_rounded(2.0**53), was_rounded("1.23457E+18"), was_rounded("26.0"), was_rounded(2**60)
    (True, True, False, False)
    """
    if isinstance(value, str):
        match = _ROUNDED.fullmatch(value)
        return match is not None and ("." not in value or "e" in value.lower() or abs(float(value)) >= 2.0**EXACT)
    return isinstance(value, float) and 2.0**bits <= abs(value) < float("inf")
