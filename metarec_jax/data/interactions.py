"""Interactions in memory: integer rows beside the ids that the user gave.

Row 0 is everywhere the unknown id. Nothing here reads a file; `metarec_jax.data.io.readers` does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pandas as pd

from metarec_jax.core import Column, MetarecError
from metarec_jax.messages import shown

EXACT = 53
"""Bits of the integers that float64 counts one by one; 2**53 and 2**53 + 1 are one float."""
NO_TIME = np.iinfo(np.int64).min
"""The timestamp of an interaction whose time is not known; it sorts before all others."""
_SPELLED = re.compile(r"\s*([-+]?[0-9]{1,100})(?:\.0*)?\s*")


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Ids as they were given, and their rows 1..n. Row 0 stands for any id that is not in it.

    Args:
      ids: ``[n]`` distinct ids, all strings or all integers; id ``ids[k]`` has row ``k + 1``. Kept as int64, or as
        Python strings: an array of fixed width would give every id the room of the longest.

    Raises:
      MetarecError: ids of other types, or one twice.

    Two vocabularies are equal only if they are the same object; compare ``ids`` for the rest.

    >>> v = Vocabulary(np.array(["b", "a"]))
    >>> v.encode(["a", "b", "zebra"])
    array([2, 1, 0], dtype=int32)
    >>> v.decode([2, 1]).tolist()
    ['a', 'b']
    """

    ids: np.ndarray
    _index: pd.Index = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ids = _checked_ids(np.asarray(self.ids))
        index = pd.Index(ids, dtype=ids.dtype)
        if not index.is_unique:
            raise MetarecError(
                f"the id {shown(index[index.duplicated()][0])} stands twice in a vocabulary; give each once"
            )
        object.__setattr__(self, "ids", ids)
        object.__setattr__(self, "_index", index)

    @property
    def num_rows(self) -> int:
        """Rows of a table indexed by this vocabulary: the ids and the unknown row."""
        return len(self.ids) + 1

    def encode(self, values: Any) -> np.ndarray:
        """Rows of ``values``, int32; 0 for an id never seen or missing.

        An integer finds the text id that spells it (12 finds "12"), and text finds the integer id ("12" finds 12).
        """
        values = _array(values)
        flat = values.ravel()
        if self._index.dtype != object:
            wanted, valid = _integers(flat)
            rows = np.where(valid, self._index.get_indexer(pd.Index(wanted)) + 1, 0)
        else:
            rows = self._index.get_indexer(pd.Index(_texts(flat), dtype=object)) + 1
        return rows.astype(np.int32).reshape(values.shape)

    def decode(self, rows: Any) -> np.ndarray:
        """Ids of rows ``1..n``. Raises IndexError for row 0 or a row past the end."""
        rows = np.asarray(rows)
        if rows.size and (rows.min() < 1 or rows.max() > len(self.ids)):
            raise IndexError(f"rows must lie in 1..{len(self.ids)}, got {rows.min()}..{rows.max()}")
        return np.asarray(self.ids)[rows - 1]


def texts(ids: np.ndarray) -> np.ndarray:
    """Ids as text, in an object array."""
    out = np.empty(len(ids), object)
    out[:] = [str(value) for value in ids.tolist()]
    return out


def _checked_ids(ids: np.ndarray) -> np.ndarray:
    """Ids as int64 or as Python strings."""
    if ids.ndim == 1 and ids.dtype.kind in "iu" and (not ids.size or ids.max() < 2**63):
        return ids.astype(np.int64, copy=False)
    if ids.ndim == 1 and (not ids.size or ids.dtype.kind == "U"):
        return ids.astype(object)
    if ids.ndim == 1 and ids.dtype == object and pd.api.types.infer_dtype(ids, skipna=False) == "string":
        return ids
    raise MetarecError(f"ids of type {ids.dtype}{list(ids.shape)}; give a list of texts, or of integers below 2^63")


def _array(values: Any) -> np.ndarray:
    """Values as an array; those that are no numbers as objects, each with the room that it needs."""
    if not isinstance(values, np.ndarray):
        given = values
        values = np.asarray(given, object) if _holds_text(given) else np.asarray(given)
        if values.dtype.kind == "f" and isinstance(given, (list, tuple)) and any(isinstance(v, int) for v in given):
            values = np.asarray(given, object)  # beside a float, integers beyond 2**53 would be rounded
    return values.astype(object) if values.dtype.kind == "U" else values


def _holds_text(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and any(isinstance(value, str) for value in values)


def _integers(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values as int64, and which of them are whole numbers (or spell one)."""
    if values.dtype.kind in "iu":
        valid = values <= np.iinfo(np.int64).max if values.dtype.kind == "u" else np.ones(values.shape, bool)
        return values.astype(np.int64), valid
    if values.dtype.kind == "f":
        valid = (values == np.floor(values)) & (np.abs(values) < 2.0**EXACT)  # beyond, several ids are one float
        return np.where(valid, values, 0).astype(np.int64), valid
    found = [_integer(value) for value in values.tolist()]
    valid = np.array([n is not None for n in found], bool)
    return np.array([n or 0 for n in found], np.int64), valid


def _integer(value: Any) -> int | None:
    """An integer, also one that text spells ("12", or "12.0", which spreadsheets make of 12); never through a float."""
    if isinstance(value, str):
        match = _SPELLED.fullmatch(value)
        number = None if match is None else int(match[1])
    elif isinstance(value, (int, np.integer)):
        number = int(value)
    else:
        try:
            number = int(value) if abs(value) < 2**EXACT and value == int(value) else None
        except (TypeError, ValueError, OverflowError):
            return None
    return number if number is not None and -(2**63) <= number < 2**63 else None


def _texts(values: np.ndarray) -> np.ndarray:
    """Values as an object array of text; a missing value (None, nan) stays itself, and finds nothing."""
    if values.dtype.kind == "O" and pd.api.types.infer_dtype(values) == "string":
        return values
    if values.dtype.kind in "iu":
        return values.astype(str).astype(object)
    return np.array([_text(value) for value in values.tolist()] + [None], dtype=object)[:-1]


def _text(value: Any) -> str | None:
    if value is None or value is pd.NA or value != value:
        return None
    if isinstance(value, float) and value.is_integer():
        return str(int(value)) if abs(value) < 2.0**EXACT else None
    return str(value)


@dataclass(frozen=True, eq=False)
class Feature:
    """One side feature, aligned with the rows of a vocabulary (row 0: unknown).

    Args:
      kind: "categorical" int32 ``[rows]``; "multi" int32 ``[rows, f]`` padded with 0; "numeric" float32 ``[rows, f]``,
        standardised, 0 where missing.
      values: the array.
      vocabulary: of the values, for categorical and multi; None for numeric.
      units: numeric: mean and standard deviation, by which each number was standardised; () where they are not known.

    Raises:
      MetarecError: values of another type or shape, or not finite.
    """

    kind: Literal["categorical", "multi", "numeric"]
    values: np.ndarray
    vocabulary: Vocabulary | None = None
    units: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        values, numeric = np.asarray(self.values), self.kind == "numeric"
        wanted = {"categorical": ("iu", 1, np.int32), "multi": ("iu", 2, np.int32), "numeric": ("fiu", 2, np.float32)}
        if self.kind not in wanted or numeric != (self.vocabulary is None):
            raise MetarecError(
                f"a feature of kind {self.kind!r} {'without' if self.vocabulary is None else 'with'} a vocabulary; "
                "give 'categorical' or 'multi' with one, or 'numeric' without"
            )
        kinds, axes, dtype = wanted[self.kind]
        if values.dtype.kind not in kinds or values.ndim != axes:
            raise MetarecError(
                f"a {self.kind} feature of type {values.dtype} with {values.ndim} axes; give "
                f"{np.dtype(dtype).name} with {axes}"
            )
        if not numeric:
            _check_rows(values, -(2**31), 2**31, f"a {self.kind} feature at row {{}} has value")
        with np.errstate(over="ignore"):
            values = values.astype(dtype, copy=False)
        if numeric and not np.isfinite(values).all():
            raise MetarecError("a numeric feature has a value that is not finite; give 0 where it is missing")
        object.__setattr__(self, "values", values)

    @property
    def column(self) -> Column:
        return Column(self.kind, self.vocabulary.num_rows if self.vocabulary else self.values.shape[-1])


@dataclass(frozen=True, eq=False)
class Interactions:
    """Who gave what to which item, when. All arrays have one entry an interaction (N of them).

    Args:
      user, item: int32 ``[N]`` rows, 1 or more.
      rating: float32 ``[N]``, or None for implicit feedback (every row is a positive).
      timestamp: int64 ``[N]`` seconds, `NO_TIME` where not known, or None.
      users, items: the vocabularies.
      user_features, item_features: by name; names are the model's input columns and start with ``user_`` or ``item_``.
      titles: ``[len(items)]`` display names, in row order, or None.
      notes: one line for each thing that was dropped or changed on reading, with its count.
      name: of the data set, for reports.

    Raises:
      MetarecError: columns of different lengths or of other types, a row outside its vocabulary, a rating that is not
        finite, a feature that does not fit its vocabulary or is not called ``user_...`` or ``item_...``; the first such
        place is named.

    >>> ids = Vocabulary(np.array(["a", "b"]))
    >>> Interactions(np.array([1, 3]), np.array([1, 2]), None, None, ids, ids)
    Traceback (most recent call last):
    metarec_jax.core.MetarecError: interaction 1 has user row 3, outside the rows 1..2 of its vocabulary; ...
    """

    user: np.ndarray
    item: np.ndarray
    rating: np.ndarray | None
    timestamp: np.ndarray | None
    users: Vocabulary
    items: Vocabulary
    user_features: Mapping[str, Feature] = field(default_factory=dict)
    item_features: Mapping[str, Feature] = field(default_factory=dict)
    titles: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    name: str = "interactions"

    def __post_init__(self) -> None:
        n = len(self.user)
        for name in ("item", "rating", "timestamp"):
            column = getattr(self, name)
            if column is not None and len(column) != n:
                raise MetarecError(f"{name} has {len(column)} entries and user {n}; give one entry an interaction")
        for name, rows, ids in (("user", self.user, self.users), ("item", self.item, self.items)):
            _check_rows(rows, 1, ids.num_rows, f"interaction {{}} has {name} row")
        for name, kinds, dtype in _COLUMNS:
            if (column := getattr(self, name)) is not None:
                object.__setattr__(self, name, _column(name, np.asarray(column), kinds, dtype))
        if self.rating is not None and len(bad := np.flatnonzero(~np.isfinite(self.rating))):
            raise MetarecError(f"the rating of interaction {bad[0]} is {self.rating[bad[0]]}; leave such rows out")
        if self.titles is not None and len(self.titles) != len(self.items.ids):
            raise MetarecError(f"there are {len(self.titles)} titles for {len(self.items.ids)} items; give one an item")
        for side, features, ids in (
            ("user", self.user_features, self.users),
            ("item", self.item_features, self.items),
        ):
            for name, feature in features.items():
                if not name.startswith(f"{side}_") or name == f"{side}_id":
                    raise MetarecError(
                        f"{side}_features has {name!r}; rename it to start with '{side}_' (not {side}_id)"
                    )
                if len(feature.values) != ids.num_rows:
                    raise MetarecError(
                        f"feature {name!r} has {len(feature.values)} rows and there are {ids.num_rows} (the unknown "
                        f"{side} included); give one row an id, and row 0 for the unknown one"
                    )
                if feature.vocabulary is not None:
                    _check_rows(
                        feature.values, 0, feature.vocabulary.num_rows, f"feature {name!r} at row {{}} has value"
                    )

    def __len__(self) -> int:
        return len(self.user)

    def __repr__(self) -> str:
        rated = "clicks"
        if self.rating is not None:
            rated = f"ratings {self.rating.min():g} to {self.rating.max():g}" if len(self) else "ratings"
        return (
            f"<Interactions {self.name!r}: {len(self):,} of {len(self.users.ids):,} users with {len(self.items.ids):,} "
            f"items, {rated}{', times' * (self.timestamp is not None)}>"
        )

    @property
    def implicit(self) -> bool:
        return self.rating is None

    @property
    def timed(self) -> bool:
        """Whether the time of every interaction is known."""
        return self.timestamp is not None and not (self.timestamp == NO_TIME).any()

    @property
    def columns(self) -> dict[str, Column]:
        """The input columns of a model for this data, users first: ids, then features by name."""
        out = {"user_id": Column("id", self.users.num_rows)}
        out |= {name: f.column for name, f in self.user_features.items()}
        out["item_id"] = Column("id", self.items.num_rows)
        return out | {name: f.column for name, f in self.item_features.items()}

    def take(self, where: np.ndarray) -> Interactions:
        """The interactions that a boolean mask or an index array names; vocabularies and features stay whole."""
        return replace(
            self,
            user=self.user[where],
            item=self.item[where],
            rating=None if self.rating is None else self.rating[where],
            timestamp=None if self.timestamp is None else self.timestamp[where],
        )


_COLUMNS: tuple[tuple[str, str, type], ...] = (
    ("user", "iu", np.int32),
    ("item", "iu", np.int32),
    ("rating", "fiub", np.float32),
    ("timestamp", "iu", np.int64),
)


def _column(name: str, column: np.ndarray, kinds: str, dtype: type) -> np.ndarray:
    if column.ndim != 1 or column.dtype.kind not in kinds:
        raise MetarecError(f"{name} is {column.dtype}{list(column.shape)}; give one {np.dtype(dtype).name} a row")
    with np.errstate(over="ignore"):
        return column.astype(dtype, copy=False)


def group_by_user(
    data: Interactions, order: Literal["random", "time", "file"], rng: np.random.Generator | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Interactions grouped by user; inside a group at random, in time, or as they stand.

    Returns:
      ``(index, users, starts)``: the interactions of ``users[k]`` are ``index[starts[k] : starts[k + 1]]``.

    Raises:
      MetarecError: ``order`` is "time" and the data has no timestamps, or it is none of the three.
    """
    if order not in ("random", "time", "file"):
        raise MetarecError(f"order {order!r} is not known; use 'random' or 'time'")
    if order == "time":
        require_times(data, "--order time (order='time' in Python)", ", or take --order random")
    if order == "random":
        inside = (rng or np.random.default_rng(0)).permutation(len(data))
    else:
        inside = np.asarray(data.timestamp) if order == "time" else np.arange(len(data))
    index = np.lexsort((inside, data.user))
    users, starts = np.unique(data.user[index], return_index=True)
    return index, users, np.append(starts, len(index))


def require_times(data: Interactions, what: str, otherwise: str = "") -> None:
    """Refuse data without times, or without the time of some interactions.

    Args:
      what: goes by time, as the user asked for it; otherwise: what can be had without times.
    """
    if data.timed:
        return
    lacking = "the data has none"
    if data.timestamp is not None:
        lacking = f"{int((data.timestamp == NO_TIME).sum())} of {len(data)} interactions have no time"
    remedy = "name their column" if data.timestamp is None else "delete these rows"
    raise MetarecError(f"{what} requires the time of every interaction, and {lacking}; {remedy}{otherwise}")


def _check_rows(rows: np.ndarray, low: int, num_rows: int, what: str) -> None:
    """Raise where a row lies outside ``low .. num_rows - 1``, naming the first; ``what`` has a ``{}`` for its place."""
    if rows.dtype.kind not in "iu":
        raise MetarecError(
            f"{what.format(0)} of type {rows.dtype}, and whole numbers are wanted; use Vocabulary.encode"
        )
    if rows.size and (rows.min() < low or rows.max() >= num_rows):
        place = np.argwhere((rows < low) | (rows >= num_rows))[0]
        raise MetarecError(
            f"{what.format(place[0])} {rows[tuple(place)]}, outside the rows {low}..{num_rows - 1} of its vocabulary; "
            "use Vocabulary.encode, and leave out what it does not know"
        )
