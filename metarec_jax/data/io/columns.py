"""Single columns of a table: detection by name, and values as arrays. Errors name the row and the column."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from metarec_jax.core import MetarecError
from metarec_jax.data.io.spelling import commas_note, decimal_commas
from metarec_jax.messages import listed, shown

Where = Callable[[int], str]
"""The location of row ``k`` (from 0) of a table for a message: "line 7 of ratings.csv"."""

MISSING = ("", "NA", "N/A", "NaN", "nan", "NULL", "null", "None")
"""Text that means "no value", in ids, ratings and timestamps; surrounding blanks are ignored."""

ALIASES = {
    "user": (
        *("userid", "user", "uid", "customerid", "customer", "reviewerid", "reviewer", "memberid", "member"),
        *("visitorid", "clientid", "accountid", "personid", "studentid", "useridx", "username", "sessionid"),
    ),
    "item": (
        *("itemid", "item", "iid", "movieid", "movie", "productid", "product", "parentasin", "asin", "businessid"),
        *("isbn", "bookid", "book", "songid", "trackid", "artistid", "articleid", "newsid", "videoid", "gameid"),
        *("recipeid", "courseid", "jokeid", "contentid", "itemidx", "sku"),
    ),
    "rating": (
        *("rating", "ratings", "score", "scores", "stars", "star", "starrating", "overall", "reviewscore"),
        *("reviewrating", "bookrating", "userrating"),
    ),
    "timestamp": (
        *("timestamp", "timestamps", "unixreviewtime", "unixtime", "ts", "time", "datetime", "date", "createdat"),
        *("eventtime", "reviewtime", "reviewdate", "ratedat"),
    ),
    "title": ("title", "movietitle", "itemtitle", "booktitle", "producttitle", "name", "itemname", "productname"),
}
"""Usual names of each column, normalised to letters and digits in lower case; earlier ones take precedence."""


class Roles(NamedTuple):
    """The column of each role, or None."""

    user: str
    item: str
    rating: str | None
    timestamp: str | None
    title: str | None


def plain(name: object) -> str:
    """A normalised column name. ``plain("User_ID")`` is ``"userid"``."""
    return re.sub(r"[^a-z0-9]", "", str(name).lower())


def find_column(names: Sequence[str], role: str, asked: str | None, source: str) -> str | None:
    """The column of ``role``: ``asked``, or the first alias; None if there is none.

    Args:
      names: the columns of the table.
      role: a key of `ALIASES`.
      asked: a name that must exist; "" for no column.
      source: the table, for messages.

    Raises:
      MetarecError: the column ``asked`` does not exist.

    >>> find_column(["userId", "movieId", "stars"], "item", None, "ratings.csv")
    'movieId'
    """
    if asked == "":
        return None
    if asked is not None:
        if asked in names:
            return asked
        close = difflib.get_close_matches(plain(asked), [plain(n) for n in names], n=1, cutoff=0.6)
        hint = next((n for n in names if close and plain(n) == close[0]), None)
        raise MetarecError(
            f"{source} has no column {shown(asked)}; its columns are: {listed(names)}. "
            + (f"Did you mean {shown(hint)}?" if hint else f"Name the {role} column with {option(role)}")
        )
    by_plain = {plain(n): n for n in reversed(names)}
    return next((by_plain[alias] for alias in ALIASES[role] if alias in by_plain), None)


def find_roles(
    names: Sequence[str],
    user: str | None,
    item: str | None,
    rating: str | None,
    timestamp: str | None,
    title: str | None,
    implicit: bool,
    source: str,
) -> Roles:
    """The columns of a table of interactions. Columns given by name must exist; user and item columns are required.

    Raises:
      MetarecError: a column is missing; the message lists the columns of the table.
    """
    required = {}
    for role, asked in (("user", user), ("item", item)):
        column = find_column(names, role, asked or None, source)
        if column is None:
            raise MetarecError(
                f"{source} has no {role} column by a usual name; its columns are: {listed(names)}. "
                f"Name it with {option(role)}"
            )
        required[role] = column
    roles = Roles(
        **required,
        rating=None if implicit else find_column(names, "rating", rating, source),
        timestamp=find_column(names, "timestamp", timestamp, source),
        title=None if title is None else find_column(names, "title", title, source),
    )
    taken: dict[str, str] = {}
    for role, column in zip(("user", "item", "rating", "timestamp"), roles, strict=False):
        if column is not None and column in taken:
            raise MetarecError(
                f"{source}: column {shown(column)} cannot be both {taken[column]} and {role}. "
                f"Name each with {option(role)}"
            )
        if column is not None:
            taken[column] = role
    return roles


def option(role: str) -> str:
    """The option that names the column of a role, on the command line and in Python."""
    return f"--{role}-col ({role}_col= in Python)"


def numbers(column: pd.Series, name: str, where: Where, notes: list[str] | None = None) -> np.ndarray:
    """A column of numbers, float32 ``[N]``, nan where missing.

    Args:
      notes: a list that notes on the column are appended to.

    Raises:
      MetarecError: a value is not a number, or is infinite; the message names its row.
    """
    if pd.api.types.is_numeric_dtype(column.dtype):
        with np.errstate(over="ignore"):
            out = column.to_numpy(dtype=np.float32, na_value=np.nan)
    else:
        codes, distinct = distinct_values(column, name)
        parsed = np.array([_float(value) for value in distinct] + [np.nan], np.float64)
        bad = np.array([_float(v) is None for v in distinct] + [False])
        spelled = [None if v is None or str(v).strip() in MISSING else str(v).strip() for v in distinct]
        if bad.any() and (decimals := decimal_commas(spelled)) is not None:
            parsed, bad = np.array([*decimals, np.nan]), np.zeros(len(bad), bool)
            if notes is not None:
                notes.append(f"column {shown(name)}: {commas_note(spelled)}")
        if bad.any():
            row = int(np.argmax(bad[codes]))
            raise MetarecError(
                f"{where(row)}, column {shown(name)}: {shown(str(distinct[codes[row]]))} is not a number. "
                f"Correct or delete the row, or name another column with {option('rating')}"
            )
        with np.errstate(over="ignore"):
            out = parsed.astype(np.float32)[codes]
    infinite = np.isinf(out)
    if infinite.any():
        row = int(np.argmax(infinite))
        raise MetarecError(
            f"{where(row)}, column {shown(name)}: expected a finite number, got {out[row]}. Correct or delete the row"
        )
    return out


def no_rating(values: np.ndarray, counts: np.ndarray) -> str | None:
    """A note if a value far from all others is so frequent that it may mean "no rating"; else None.

    Such a value is: 0, if a fifth of the ratings have it and the mean of the others is above half of the scale
    (Book-Crossing); the only negative value (-1), or a value further from the others than these are from each other
    (99), if a twentieth of the ratings have it.

    Args:
      values, counts: the distinct ratings in ascending order, and their frequencies.
    """
    if len(values) < 4:
        return None
    total, ratings = float(counts.sum()), float((values.astype(np.float64) * counts).sum())
    for k, nearest, others in ((0, 1, values[1:]), (-1, -2, values[:-1])):
        value, share = float(values[k]), float(counts[k]) / total
        mean = (ratings - value * float(counts[k])) / (total - float(counts[k]))
        odd = abs(value - float(values[nearest])) > float(others[-1]) - float(others[0]) or (
            k == 0 and value < 0 < others[0]
        )
        if (odd and share >= 0.05) or (k == 0 and value == 0 and share >= 0.2 and mean > float(values[-1]) / 2):
            return (
                f"{share:.0%} of the ratings are {value:g}, far from the others (mean {mean:.3g}): if that means "
                "'no rating', delete these rows, or read every row as a click with --implicit (implicit=True in Python)"
            )
    return None


def distinct_values(column: pd.Series, name: str) -> tuple[np.ndarray, list[Any]]:
    """Codes of the distinct values, -1 where missing, and these values.

    Raises:
      MetarecError: a row holds a list or a table instead of a single value.
    """
    if isinstance(column.dtype, pd.CategoricalDtype):
        codes = column.cat.codes.to_numpy()
        if not np.bincount(codes[codes >= 0], minlength=len(column.cat.categories)).all():
            column = column.cat.remove_unused_categories()  # only values that occur are ids
        return column.cat.codes.to_numpy(), list(column.cat.categories)
    try:
        codes, values = pd.factorize(column)
    except TypeError as error:
        raise MetarecError(
            f"column {shown(name)}: expected one value per row, got lists or tables. Name another column"
        ) from error
    return codes, values.tolist() if hasattr(values, "tolist") else list(values)


def _float(value: Any) -> float | None:
    """A number; nan for a missing value; None for anything else."""
    if isinstance(value, str) and value.strip() in MISSING:
        return np.nan
    if isinstance(value, str) and "_" in value:  # "1_000" is a number to Python alone
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, NotImplementedError):
        return None


def seconds(column: pd.Series, name: str, where: Where) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """A column of times: int64 seconds since 1970 ``[N]``, which of them are missing (bool ``[N]``), and notes.

    Numbers are seconds; if their median is 1e11 or more (as seconds, after the year 5138), they are read as milli-,
    micro- or nanoseconds, with a note. Dates and ISO 8601 text without a zone are read as UTC.

    Raises:
      MetarecError: a value is neither a number nor an ISO date; the message names its row.
    """
    if pd.api.types.is_datetime64_any_dtype(column.dtype):
        missing = column.isna().to_numpy()
        zoneless = column.dt.tz_convert("UTC").dt.tz_localize(None) if column.dt.tz is not None else column
        return zoneless.to_numpy().astype("datetime64[s]").astype(np.int64), missing, ()
    if pd.api.types.is_numeric_dtype(column.dtype):
        return _epoch(column, name, where)
    codes, distinct = distinct_values(column, name)
    spelled = [_float(value) for value in distinct]
    if all(value is not None for value in spelled):
        return _epoch(pd.Series(np.array([*spelled, np.nan], np.float64)[codes]), name, where)
    gone = np.array([isinstance(v, str) and v.strip() in MISSING for v in distinct] + [True])
    texts = pd.Series([None if gone[k] else str(v).strip() for k, v in enumerate(distinct)], dtype=object)
    dates = pd.to_datetime(texts, format="ISO8601", utc=True, errors="coerce")
    is_number = np.array([value is not None for value in spelled] + [True])
    bad = np.append(dates.isna().to_numpy(), False) & ~gone
    if 2 * is_number.sum() > len(is_number):  # a column of seconds, so report a value that is not a number
        bad = ~is_number
    if bad.any():
        row = int(np.argmax(bad[codes]))
        raise MetarecError(
            f"{where(row)}, column {shown(name)}: {shown(str(distinct[codes[row]]))} is neither seconds since 1970 "
            "nor an ISO date (2024-01-31 or 2024-01-31T12:00:00). Correct it, or name another column with "
            f"{option('timestamp')}, or an empty name for no timestamps"
        )
    parsed = np.append(dates.dt.tz_localize(None).to_numpy().astype("datetime64[s]").astype(np.int64), 0)
    return parsed[codes], gone[codes], ()


def _epoch(column: pd.Series, name: str, where: Where) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    if isinstance(column.dtype, np.dtype) and column.dtype.kind in "iu" and column.dtype != np.uint64:
        values, missing = column.to_numpy(dtype=np.int64), np.zeros(len(column), bool)
    else:
        floats = column.to_numpy(dtype=np.float64, na_value=np.nan)
        missing = np.isnan(floats)
        far = np.abs(floats) >= 2.0**63
        if far.any():
            row = int(np.argmax(far))
            raise MetarecError(
                f"{where(row)}, column {shown(name)}: {floats[row]} is not a time. Correct or delete the row"
            )
        values = np.where(missing, 0, floats).astype(np.int64)
    known = values if not missing.any() else values[~missing]
    middle = abs(float(np.partition(known, len(known) // 2)[len(known) // 2])) if len(known) else 0.0
    for at_least, divisor, unit in ((1e17, 10**9, "nano"), (1e14, 10**6, "micro"), (1e11, 10**3, "milli")):
        if middle >= at_least:
            note = f"column {shown(name)} was read as {unit}seconds and divided by {divisor:,}"
            return values // divisor, missing, (note,)
    return values, missing, ()
