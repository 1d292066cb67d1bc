"""One column at a time: which one is meant, and its values as arrays. Bad values are refused by row and column."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from metarec_jax.core import MetarecError
from metarec_jax.data.io.spelling import decimal_commas, said_of_commas
from metarec_jax.messages import listed, shown

Where = Callable[[int], str]
"""Where row ``k`` (from 0) of a table stands, in words: "line 7 of ratings.csv"."""

MISSING = ("", "NA", "N/A", "NaN", "nan", "NULL", "null", "None")
"""Text that means "no value", in ids, ratings and timestamps; blanks around a value do not count."""

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
"""Names that people give to each column, as compared: letters and digits only, in lower case; the first one wins."""


class Roles(NamedTuple):
    """The column of each role, or None."""

    user: str
    item: str
    rating: str | None
    timestamp: str | None
    title: str | None


def plain(name: object) -> str:
    """A column name as aliases are compared. ``plain("User_ID")`` is ``"userid"``."""
    return re.sub(r"[^a-z0-9]", "", str(name).lower())


def find_column(names: Sequence[str], role: str, asked: str | None, where: str) -> str | None:
    """The column that plays ``role``: the one asked for, or the first alias; None where there is none.

    Args:
      names: the columns there are.
      role: a key of `ALIASES`.
      asked: a name that must be there; "" says that no column is to be used.
      where: the table, for messages.

    Raises:
      MetarecError: a name asked for is not there.

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
            f"{where} has no column {shown(asked)}; its columns are: {listed(names)}. "
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
    """The columns of a table of interactions; a name asked for must be there, and user and item must be found.

    Raises:
      MetarecError: a column is missing; the columns that are there are named.
    """
    found = {}
    for role, asked in (("user", user), ("item", item)):
        column = find_column(names, role, asked or None, source)
        if column is None:
            raise MetarecError(
                f"{source} has no {role} column by a usual name; its columns are: {listed(names)}. "
                f"Name it with {option(role)}"
            )
        found[role] = column
    roles = Roles(
        **found,
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
    """How a person names the column of a role: on the command line and in Python."""
    return f"--{role}-col ({role}_col= in Python)"


def numbers(column: pd.Series, name: str, where: Where, notes: list[str] | None = None) -> np.ndarray:
    """A column of numbers, float32 ``[N]``, nan where missing.

    Args:
      notes: gets what is to be said of the column.

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
                notes.append(f"column {shown(name)}: {said_of_commas(spelled)}")
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
            f"{where(row)}, column {shown(name)}: {out[row]} where a finite number was wanted. "
            "Correct or delete the row"
        )
    return out


def no_rating(values: np.ndarray, counts: np.ndarray) -> str | None:
    """A note where one value far from all others is given so often that it may stand for "no rating"; else None.

    Such is 0 where a fifth of the ratings have it and the others' mean lies above half of the scale (Book-Crossing);
    the one negative value of a twentieth (-1); and one further from the others than these are from each other (99).

    Args:
      values, counts: the distinct ratings in ascending order, and how often each is given.
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
                f"{share:.0%} of the ratings are {value:g}, far from the rest (mean {mean:.3g}): if that means "
                "'no rating', delete these rows, or read every row as a click with --implicit (implicit=True in Python)"
            )
    return None


def distinct_values(column: pd.Series, name: str) -> tuple[np.ndarray, list[Any]]:
    """Codes of the distinct values, -1 where missing, and these values.

    Raises:
      MetarecError: a row holds a list or a table, not one value.
    """
    if isinstance(column.dtype, pd.CategoricalDtype):
        codes = column.cat.codes.to_numpy()
        if not np.bincount(codes[codes >= 0], minlength=len(column.cat.categories)).all():
            column = column.cat.remove_unused_categories()  # an id is one that a row has
        return column.cat.codes.to_numpy(), list(column.cat.categories)
    try:
        codes, found = pd.factorize(column)
    except TypeError as error:
        raise MetarecError(
            f"column {shown(name)} holds lists or tables, and one value a row was wanted. Name another column"
        ) from error
    return codes, found.tolist() if hasattr(found, "tolist") else list(found)


def _float(value: Any) -> float | None:
    """A number; nan for a missing value; None for what is neither."""
    if isinstance(value, str) and value.strip() in MISSING:
        return np.nan
    if isinstance(value, str) and "_" in value:  # "1_000" is a number to Python alone
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, NotImplementedError):
        return None


def seconds(column: pd.Series, name: str, where: Where) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """A column of times: int64 seconds since 1970, which are missing (bool), and notes. All ``[N]``.

    Numbers are seconds; where their median is 1e11 or more (as seconds, after the year 5138) they are taken as
    milli-, micro- or nanoseconds, and a note says so. Dates and ISO 8601 text are read as UTC where they name no zone.

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
    if 2 * is_number.sum() > len(is_number):  # a column of seconds, so blame what is no number
        bad = ~is_number
    if bad.any():
        row = int(np.argmax(bad[codes]))
        raise MetarecError(
            f"{where(row)}, column {shown(name)}: {shown(str(distinct[codes[row]]))} is neither seconds since 1970 "
            "nor an ISO date (2024-01-31 or 2024-01-31T12:00:00). Correct it, or name another column with "
            f"{option('timestamp')}, or an empty name to use none"
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
