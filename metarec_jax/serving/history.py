"""Histories of new users in vocabulary rows: names are resolved, ratings checked, unknown items listed separately."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from metarec_jax.core import MetarecError
from metarec_jax.data.interactions import Feature, Interactions
from metarec_jax.data.io.columns import find_column
from metarec_jax.data.io.ids import refuse_rounded
from metarec_jax.messages import listed, shown

_SUGGESTED = 5
"""Maximum number of unknown names of a history that get suggestions."""
_SEARCHED = 20_000
"""Maximum number of names that a suggestion compares with."""
_LONGEST = 200
"""Maximum length of a name that gets suggestions."""
_LARGEST = float(np.finfo(np.float32).max)


class Unknown(NamedTuple):
    """A history entry that matches no item, or several: its name, similar existing names, ids that share the name."""

    name: Any
    suggestions: tuple[str, ...] = ()
    ids: tuple[Any, ...] = ()


class History(NamedTuple):
    """One user's feedback: vocabulary rows int32 ``[S]``, ratings float32 ``[S]`` (1 for a click), each item once.

    ``had``: rows of other items in the user's known history, which are not recommended.
    """

    item: np.ndarray
    rating: np.ndarray
    unknown: tuple[Unknown, ...] = ()
    notes: tuple[str, ...] = ()
    had: np.ndarray = np.zeros(0, np.int32)


def format_rating(rating: float) -> str:
    """The shortest decimal that equals this rating at float32, so that it can be entered again.

    >>> format_rating(5.0), format_rating(np.float32(-9.95)), format_rating(np.float32(8.384207))
    ('5', '-9.95', '8.384207')
    """
    return np.format_float_positional(np.float32(rating), trim="-")


def rated(value: Any, low: float, high: float) -> float | None:
    """A rating as a number; None if it is not a number, or outside the scale at float32."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    if not abs(number) <= _LARGEST:  # also false for nan
        return None
    number = float(np.float32(number))
    return number if low <= number <= high else None


class Names:
    """Items by name: the exact id, else the exact title, else a title in another case that only one item has.

    Attributes:
      scale: the lowest and the highest rating of the data; None for clicks.
    """

    def __init__(self, data: Interactions) -> None:
        self.scale = None if data.rating is None else (float(data.rating.min()), float(data.rating.max()))
        self._items = data.items
        self._labels = data.items.ids if data.titles is None else data.titles
        self._numeric = np.issubdtype(np.asarray(self._labels).dtype, np.number)

    @cached_property
    def _exact(self) -> dict[str, int]:
        return _unambiguous([str(label) for label in self._labels])

    @cached_property
    def _folded(self) -> dict[str, int]:
        return _unambiguous([str(label).casefold().strip() for label in self._labels])

    @cached_property
    def _shared(self) -> dict[str, list[int]]:
        """Rows by case-folded name, for names that several items share."""
        rows: dict[str, list[int]] = {}
        for k, label in enumerate(self._labels):
            rows.setdefault(str(label).casefold().strip(), []).append(k + 1)
        return {name: some for name, some in rows.items() if len(some) > 1}

    def sharing(self, name: Any) -> tuple[Any, ...]:
        """Ids of the items that share ``name``; () if the exact spelling distinguishes them."""
        if self._numeric:
            return ()
        rows = self._shared.get(str(name).casefold().strip(), [])
        exact = [row for row in rows if str(self._labels[row - 1]) == str(name)]
        rows = exact if len(exact) > 1 else rows
        if len({str(self._labels[row - 1]) for row in rows}) == len(rows):
            return ()
        return tuple(self._items.decode(rows).tolist())

    def rows(self, names: Sequence[Any] | np.ndarray) -> np.ndarray:
        """Vocabulary rows, int32; 0 for a name of no item or of several."""
        if not len(names):
            return np.zeros(0, np.int32)
        rows = self._items.encode(names)
        if self._numeric:
            return rows
        row_of: dict[str, int] = {}  # each name is looked up once
        for k in np.flatnonzero(rows == 0):
            text = str(names[int(k)])
            if text not in row_of:
                row_of[text] = self._exact.get(text) or self._folded.get(text.casefold().strip(), 0)
            rows[k] = row_of[text]
        return rows

    def suggest(self, name: Any) -> tuple[str, ...]:
        """Up to three existing names: those that start with ``name`` or contain it, then similar ones."""
        text = str(name).casefold().strip()
        if not text or len(text) > _LONGEST or self._numeric:
            return ()
        folded = [str(label).casefold() for label in self._labels]
        holds = [k for k, label in enumerate(folded) if text in label]
        holds.sort(key=lambda k: (folded[k].find(text), len(folded[k])))
        near = list(range(len(folded)))
        if len(folded) > _SEARCHED:
            near = [k for k in near if folded[k][:2] == text[:2]][:_SEARCHED]
        alike = difflib.get_close_matches(text, [folded[k] for k in near], n=3)
        similar = [str(self._labels[k]) for k in holds[:3]]
        similar += [str(self._labels[k]) for a in alike for k in near if folded[k] == a]
        return tuple(dict.fromkeys(similar))[:3]

    def unknown(self, names: Sequence[Any]) -> tuple[Unknown, ...]:
        """Each name once; the first few with suggestions."""
        once = dict.fromkeys(names)
        close = [self.suggest(name) if k < _SUGGESTED else () for k, name in enumerate(once)]
        return tuple(Unknown(name, some, self.sharing(name)) for name, some in zip(once, close, strict=True))


def _unambiguous(labels: list[str]) -> dict[str, int]:
    rows: dict[str, int] = {}
    for k, label in enumerate(labels):
        rows[label] = 0 if label in rows else k + 1
    return rows


def parse_history(history: Any, data: Interactions, names: Names) -> History:
    """Read one user's history (see `metarec_jax.serving.recommender.Recommender.recommend`).

    Raises:
      MetarecError: a rating is missing, not a number, or outside the range of the data.
    """
    given, ratings = _columns(history)
    given = _plain(given, "the history's items")
    rows = names.rows(given)
    values, notes = _ratings(given, ratings, rows, names.scale)
    unknown = names.unknown([g for g, row in zip(given, rows, strict=True) if row == 0])
    one, repeated = _last_of_each(rows, values)
    return one._replace(unknown=unknown, notes=(*notes, *_repeats(repeated)))


def parse_table(
    histories: Any, data: Interactions, names: Names
) -> tuple[list[Any], list[History], tuple[Unknown, ...], tuple[str, ...]]:
    """Read the histories of many users. Returns user ids, their histories, and unknown items and notes of the table."""
    users, given, ratings = _table(histories)
    users, given = _plain(users, "user_id"), _plain(given, "item_id")
    rows = names.rows(given)
    values, notes = _ratings(given, ratings, rows, names.scale, users)
    every = names.unknown([g for g, row in zip(given, rows, strict=True) if row == 0])
    by_name = {u.name: u for u in every}
    member: dict[Any, list[int]] = {}  # in the order in which users come
    for k, user in enumerate(users):
        member.setdefault(user, []).append(k)
    parsed: list[History] = []
    total = 0
    for at in member.values():
        one, repeated = _last_of_each(rows[at], values[at])
        total += repeated
        missing = tuple(by_name[name] for name in dict.fromkeys(given[j] for j in at if rows[j] == 0))
        parsed.append(one._replace(unknown=missing, notes=_repeats(repeated)))
    return list(member), parsed, every, (*notes, *_repeats(total))


def _repeats(count: int) -> tuple[str, ...]:
    return (f"{count} repeated ratings or clicks: the last of each item is used",) if count else ()


def _last_of_each(rows: np.ndarray, values: np.ndarray) -> tuple[History, int]:
    """Known items, each once, in the order of their last entry; and the number of entries dropped."""
    last: dict[int, int] = {}
    count = 0
    for k, row in enumerate(rows.tolist()):
        if row > 0:
            count += 1
            last.pop(row, None)  # so that it moves to its last position
            last[row] = k
    at = np.fromiter(last.values(), np.intp, len(last))
    return History(rows[at].astype(np.int32), values[at].astype(np.float32)), count - len(at)


def _is_column(value: Any) -> bool:
    return hasattr(value, "__len__") and not isinstance(value, (str, bytes))


def _labelled(table: Any) -> dict[str, Any]:
    """The columns of a DataFrame, or those entries of a mapping that are columns, by name as text."""
    return {str(name): name for name in table if hasattr(table, "columns") or _is_column(table[name])}


def _pick(table: Any, *roles: str) -> list[Any] | None:
    """The column of the first role that has one, by the usual names."""
    labels = _labelled(table)
    for role in roles:
        name = find_column(list(labels), role, None, "the history")
        if name is not None:
            return list(table[labels[name]])
    return None


def _columns(history: Any) -> tuple[list[Any], list[Any] | None]:
    """Items and ratings of one history; None: no ratings."""
    if isinstance(history, (str, bytes)):
        return [history], None
    if hasattr(history, "columns") or (isinstance(history, Mapping) and _pick(history, "item", "title") is not None):
        items, ratings = _pick(history, "item", "title"), _pick(history, "rating")
        if items is None:
            raise MetarecError(
                f"the history has columns {listed(_labelled(history))}, none of them with a usual name for items; "
                "rename one to item_id"
            )
        _same_length({"item_id": items, "rating": ratings})
        return items, ratings
    if isinstance(history, Mapping):
        return list(history), list(history.values())
    if hasattr(history, "index") and hasattr(history, "dtype"):  # a Series: ratings by item, or only items
        numbers = getattr(history.dtype, "kind", "O") in "iufb"
        return (list(history.index), list(history)) if numbers else (list(history), None)
    return list(history), None


def _plain(values: list[Any], what: str) -> list[Any]:
    """Single values; NumPy scalars as Python scalars."""
    plain = [value.item() if isinstance(value, np.generic) else value for value in values]
    for k, value in enumerate(plain):
        if isinstance(value, (list, tuple, set, dict, np.ndarray)):
            raise MetarecError(f"entry {k + 1} of {what} is a {type(value).__name__}; use one value per entry")
    return plain


def _table(histories: Any) -> tuple[list[Any], list[Any], list[Any] | None]:
    if isinstance(histories, Mapping) or hasattr(histories, "columns"):
        users, items, ratings = _pick(histories, "user"), _pick(histories, "item", "title"), _pick(histories, "rating")
        if users is None or items is None:
            lacks = "users" if users is None else "items"
            raise MetarecError(
                f"the table has columns {listed(_labelled(histories))}, none of them with a usual name for {lacks}; "
                f"rename one to {lacks[:-1]}_id"
            )
    else:
        users, items, ratings = (None if c is None else list(c) for c in (*histories, None)[:3])
        if users is None or items is None:
            raise MetarecError("histories require user ids and item ids, got None; pass (users, items, ratings)")
    _same_length({"user_id": users, "item_id": items, "rating": ratings})
    refuse_rounded(users, "user_id")
    for k, user in enumerate(users):
        if user is None or (isinstance(user, float) and math.isnan(user)):
            raise MetarecError(f"row {k + 1} of the histories has no user_id; fill it in or drop the row")
    return users, items, ratings


def _same_length(columns: Mapping[str, list[Any] | None]) -> None:
    lengths = {name: len(c) for name, c in columns.items() if c is not None}
    if len(set(lengths.values())) > 1:
        raise MetarecError(f"the columns of the history have different lengths, {lengths}; use one entry per rating")


def _ratings(
    given: list[Any],
    ratings: list[Any] | None,
    rows: np.ndarray,
    scale: tuple[float, float] | None,
    users: Sequence[Any] | None = None,
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Ratings as float32, checked if the item is known; all 1 if the data is implicit feedback."""
    if scale is None:
        ignored = ratings is not None and any(r not in (1, None, True) for r in ratings)
        note = (
            "ratings in the history are ignored: the data is implicit feedback, and each item counts as a positive",
        )
        return np.ones(len(given), np.float32), note if ignored else ()
    low, high = scale
    if ratings is None:
        if given:
            raise MetarecError(
                f"the history has items without ratings, and the data has ratings; pass {{item: rating}} with "
                f"ratings from {format_rating(low)} to {format_rating(high)}"
            )
        return np.zeros(0, np.float32), ()
    values = np.zeros(len(given), np.float32)
    for k, rating in enumerate(ratings):
        value = rated(rating, low, high)
        if value is None and rows[k]:
            by = "" if users is None else f" by user {shown(users[k])}"
            raise MetarecError(
                f"the rating of {shown(given[k])}{by}: expected a number from {format_rating(low)} to "
                f"{format_rating(high)}, got {shown(rating)}; correct it"
            )
        values[k] = value or 0.0
    return values, ()


def feature_columns(features: Mapping[str, Any], data: Interactions) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """A new user's side features as input columns with leading axis 1, and notes on unknown values.

    Numbers are in the units of the original data, and standardised in the same way.

    Raises:
      MetarecError: the data lacks a feature, or a number is invalid.
    """
    columns: dict[str, np.ndarray] = {}
    notes: list[str] = []
    for label, value in features.items():
        name = feature_name(label, data)
        if name is None:
            have = ", ".join(data.user_features) or "none"
            raise MetarecError(f"there is no user feature {shown(label)}; the data has: {have}")
        feature = data.user_features[name]
        if feature.vocabulary is None:
            columns[name] = _numeric(name, value, feature)
            continue
        values = list(value) if _is_column(value) else [value]
        if feature.kind == "multi" and isinstance(value, str):
            values = [part.strip() for part in value.split("|")]
        rows = feature.vocabulary.encode(values) if values else np.zeros(0, np.int32)
        unseen = [v for v, row in zip(values, rows, strict=True) if row == 0]
        notes += [f"{name} {shown(v)} is not in the data, and counts as unknown" for v in unseen]
        if feature.kind == "categorical":
            columns[name] = np.asarray(rows[:1] if len(rows) else [0], np.int32)
        else:
            rows, width = rows[rows > 0], feature.values.shape[1]
            if len(rows) > width:
                notes.append(f"{name} has {len(rows)} values: the first {width} are used")
            columns[name] = np.pad(rows[:width], (0, max(0, width - len(rows))))[None].astype(np.int32)
    return columns, tuple(notes)


def feature_name(label: Any, data: Interactions) -> str | None:
    """The user feature with this name, with or without ``user_``; None if there is none."""
    return next((name for name in (str(label), f"user_{label}") if name in data.user_features), None)


def features_by_user(table: Any) -> dict[Any, dict[str, Any]]:
    """Features of many users, from a mapping of mappings or a table with one row per user, without missing values."""
    if not hasattr(table, "columns"):
        return {user: dict(features) for user, features in table.items()}
    labels = _labelled(table)
    by = find_column(list(labels), "user", None, "the table of user features")
    if by is None:
        raise MetarecError(
            f"the table of user features has columns {listed(labels)}, none of them with a usual name for users; "
            "rename one to user_id"
        )
    users = _plain(list(table[labels[by]]), by)
    columns = {name: list(table[label]) for name, label in labels.items() if name != by}
    return {
        user: {name: column[k] for name, column in columns.items() if not _is_missing(column[k])}
        for k, user in enumerate(users)
    }


def _is_missing(value: Any) -> bool:
    return value is None or (not _is_column(value) and bool(value != value))


def _numeric(name: str, value: Any, feature: Feature) -> np.ndarray:
    width = feature.values.shape[1]
    expected = f"expected {width} finite number{'s' * (width > 1)}"
    try:
        numbers = np.asarray(value, np.float64).reshape(1, -1)
    except (TypeError, ValueError) as error:
        raise MetarecError(f"{name}: {expected}, got {shown(value)}; correct it") from error
    if numbers.shape[1] != width or not np.isfinite(numbers).all():
        raise MetarecError(f"{name}: {expected}, got {shown(value)}; correct it")
    if feature.units:
        middle, spread = np.array(feature.units).T
        numbers = (numbers - middle) / spread
    return numbers.astype(np.float32)
