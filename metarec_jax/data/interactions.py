"""Interactions in memory: integer rows, and the original ids.

Row 0 always means the unknown id. Files are read by `metarec_jax.data.io.readers`.
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
"""float64 represents integers of up to this many bits exactly; 2**53 and 2**53 + 1 are the same float."""
NO_TIME = np.iinfo(np.int64).min
"""The timestamp of an interaction with unknown time; it sorts before all others."""
_SPELLED = re.compile(r"\s*([-+]?[0-9]{1,100})(?:\.0*)?\s*")


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The original ids, and their rows 1..n. Row 0 is the row of any other id.

    Args:
      ids: ``[n]`` distinct ids, all strings or all integers; id ``ids[k]`` has row ``k + 1``. Stored as int64 or as
        Python strings, since an array of fixed width would pad every id to the longest.

    Raises:
      MetarecError: ids have other types, or an id occurs twice.

    Two vocabularies are equal only if they are the same object; otherwise compare ``ids``.

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
                f"the id {shown(index[index.duplicated()][0])} occurs twice in a vocabulary; list each id once"
            )
        object.__setattr__(self, "ids", ids)
        object.__setattr__(self, "_index", index)

    @property
    def num_rows(self) -> int:
        """Rows of a table indexed by this vocabulary: the ids and the unknown row."""
        return len(self.ids) + 1

    def encode(self, values: Any) -> np.ndarray:
        """Rows of ``values``, int32; 0 for an unknown or missing id.

        An integer matches the text id that spells it (12 matches "12"), and text matches the integer id it spells.
        """
        values = _array(values)
        flat = values.ravel()
        if self._index.dtype != object:
            integers, valid = _integers(flat)
            rows = np.where(valid, self._index.get_indexer(pd.Index(integers)) + 1, 0)
        else:
            rows = self._index.get_indexer(pd.Index(_texts(flat), dtype=object)) + 1
        return rows.astype(np.int32).reshape(values.shape)

    def decode(self, rows: Any) -> np.ndarray:
        """Ids of rows ``1..n``. Raises IndexError for row 0 or a row past the end."""
        rows = np.asarray(rows)
        if rows.size and (rows.min() < 1 or rows.max() > len(self.ids)):
            raise IndexError(f"rows must be in 1..{len(self.ids)}, got {rows.min()}..{rows.max()}")
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
    raise MetarecError(f"expected a list of texts or of integers below 2^63 as ids, got {ids.dtype}{list(ids.shape)}")


def _array(values: Any) -> np.ndarray:
    """Values as an array; values that are not numbers as objects."""
    if not isinstance(values, np.ndarray):
        sequence = values
        values = np.asarray(sequence, object) if _holds_text(sequence) else np.asarray(sequence)
        mixed = isinstance(sequence, (list, tuple)) and any(isinstance(v, int) for v in sequence)
        if values.dtype.kind == "f" and mixed:
            values = np.asarray(sequence, object)  # as floats, integers beyond 2**53 would be rounded
    return values.astype(object) if values.dtype.kind == "U" else values


def _holds_text(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and any(isinstance(value, str) for value in values)


def _integers(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values as int64, and which of them are whole numbers or spell one."""
    if values.dtype.kind in "iu":
        valid = values <= np.iinfo(np.int64).max if values.dtype.kind == "u" else np.ones(values.shape, bool)
        return values.astype(np.int64), valid
    if values.dtype.kind == "f":
        valid = (values == np.floor(values)) & (np.abs(values) < 2.0**EXACT)  # beyond, several ids share a float
        return np.where(valid, values, 0).astype(np.int64), valid
    integers = [_integer(value) for value in values.tolist()]
    valid = np.array([n is not None for n in integers], bool)
    return np.array([n or 0 for n in integers], np.int64), valid


def _integer(value: Any) -> int | None:
    """An integer, or the integer that text spells ("12", or "12.0" of spreadsheets); never through a float."""
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
    """Values as an object array of text; a missing value (None, nan) is kept, and matches nothing."""
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
    """A side feature, aligned with the rows of a vocabulary (row 0: unknown).

    Args:
      kind: "categorical" int32 ``[rows]``; "multi" int32 ``[rows, f]`` padded with 0; "numeric" float32 ``[rows, f]``,
        standardised, 0 where missing.
      values: the array.
      vocabulary: vocabulary of the values, for categorical and multi; None for numeric.
      units: for numeric, the mean and standard deviation of each number before standardisation; () if not known.

    Raises:
      MetarecError: values have another type or shape, or are not finite.
    """

    kind: Literal["categorical", "multi", "numeric"]
    values: np.ndarray
    vocabulary: Vocabulary | None = None
    units: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        values, numeric = np.asarray(self.values), self.kind == "numeric"
        layouts = {"categorical": ("iu", 1, np.int32), "multi": ("iu", 2, np.int32), "numeric": ("fiu", 2, np.float32)}
        if self.kind not in layouts or numeric != (self.vocabulary is None):
            raise MetarecError(
                f"a feature of kind {self.kind!r} {'without' if self.vocabulary is None else 'with'} a vocabulary; "
                "use 'categorical' or 'multi' with one, or 'numeric' without"
            )
        kinds, axes, dtype = layouts[self.kind]
        if values.dtype.kind not in kinds or values.ndim != axes:
            raise MetarecError(
                f"a {self.kind} feature: expected {np.dtype(dtype).name} with {axes} axes, got {values.dtype} with "
                f"{values.ndim}"
            )
        if not numeric:
            _check_rows(values, -(2**31), 2**31, f"a {self.kind} feature at row {{}} has value")
        with np.errstate(over="ignore"):
            values = values.astype(dtype, copy=False)
        if numeric and not np.isfinite(values).all():
            raise MetarecError("a numeric feature has a value that is not finite; use 0 for a missing value")
        object.__setattr__(self, "values", values)

    @property
    def column(self) -> Column:
        return Column(self.kind, self.vocabulary.num_rows if self.vocabulary else self.values.shape[-1])


@dataclass(frozen=True, eq=False)
class Interactions:
    """Interactions of users with items. All arrays have one entry per interaction (N entries).

    Args:
      user, item: int32 ``[N]`` rows, 1 or more.
      rating: float32 ``[N]``, or None for implicit feedback (every row is a positive).
      timestamp: int64 ``[N]`` seconds, `NO_TIME` if unknown; or None.
      users, items: the vocabularies.
      user_features, item_features: by name; names are the model's input columns and start with ``user_`` or ``item_``.
      titles: ``[len(items)]`` titles, in row order, or None.
      notes: what was dropped or changed on reading, one line each, with its count.
      name: name of the data set, for reports.

    Raises:
      MetarecError: columns have different lengths or other types, a row is outside its vocabulary, a rating is not
        finite, or a feature does not match its vocabulary or the names ``user_...`` or ``item_...``; the message names
        the first fault.

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
                raise MetarecError(f"{name} has {len(column)} entries, and user has {n}; use one entry per interaction")
        for name, rows, ids in (("user", self.user, self.users), ("item", self.item, self.items)):
            _check_rows(rows, 1, ids.num_rows, f"interaction {{}} has {name} row")
        for name, kinds, dtype in _COLUMNS:
            if (column := getattr(self, name)) is not None:
                object.__setattr__(self, name, _column(name, np.asarray(column), kinds, dtype))
        if self.rating is not None and len(bad := np.flatnonzero(~np.isfinite(self.rating))):
            raise MetarecError(f"the rating of interaction {bad[0]} is {self.rating[bad[0]]}; remove such rows")
        if self.titles is not None and len(self.titles) != len(self.items.ids):
            raise MetarecError(f"expected {len(self.items.ids)} titles, one per item, got {len(self.titles)}")
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
                        f"feature {name!r}: expected {ids.num_rows} rows, one per id and row 0 for the unknown {side}, "
                        f"got {len(feature.values)}"
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

    def take(self, index: np.ndarray) -> Interactions:
        """The interactions of a boolean mask or an index array; vocabularies and features are unchanged."""
        return replace(
            self,
            user=self.user[index],
            item=self.item[index],
            rating=None if self.rating is None else self.rating[index],
            timestamp=None if self.timestamp is None else self.timestamp[index],
        )


_COLUMNS: tuple[tuple[str, str, type], ...] = (
    ("user", "iu", np.int32),
    ("item", "iu", np.int32),
    ("rating", "fiub", np.float32),
    ("timestamp", "iu", np.int64),
)


def _column(name: str, column: np.ndarray, kinds: str, dtype: type) -> np.ndarray:
    if column.ndim != 1 or column.dtype.kind not in kinds:
        raise MetarecError(
            f"{name}: expected one {np.dtype(dtype).name} per row, got {column.dtype}{list(column.shape)}"
        )
    with np.errstate(over="ignore"):
        return column.astype(dtype, copy=False)


def group_by_user(
    data: Interactions, order: Literal["random", "time", "file"], rng: np.random.Generator | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Interactions grouped by user; within a group at random, in time order, or in file order.

    Returns:
      ``(index, users, starts)``: the interactions of ``users[k]`` are ``index[starts[k] : starts[k + 1]]``.

    Raises:
      MetarecError: ``order`` is "time" and the data has no timestamps, or ``order`` is another value.
    """
    if order not in ("random", "time", "file"):
        raise MetarecError(f"order {order!r} is not known; use 'random' or 'time'")
    if order == "time":
        require_times(data, "--order time (order='time' in Python)", ", or use --order random")
    if order == "random":
        inside = (rng or np.random.default_rng(0)).permutation(len(data))
    else:
        inside = np.asarray(data.timestamp) if order == "time" else np.arange(len(data))
    index = np.lexsort((inside, data.user))
    users, starts = np.unique(data.user[index], return_index=True)
    return index, users, np.append(starts, len(index))


def require_times(data: Interactions, what: str, otherwise: str = "") -> None:
    """Refuse data in which some interaction has no time.

    Args:
      what: the option that requires times, for the message; otherwise: the alternative without times.

    Raises:
      MetarecError: an interaction has no time.
    """
    if data.timed:
        return
    lacking = "the data has none"
    if data.timestamp is not None:
        lacking = f"{int((data.timestamp == NO_TIME).sum())} of {len(data)} interactions have no time"
    remedy = "name their column" if data.timestamp is None else "delete these rows"
    raise MetarecError(f"{what} requires the time of every interaction, and {lacking}; {remedy}{otherwise}")


def _check_rows(rows: np.ndarray, low: int, num_rows: int, what: str) -> None:
    """Raise if a row is outside ``low .. num_rows - 1``; the message ``what`` has a ``{}`` for the first such place."""
    if rows.dtype.kind not in "iu":
        raise MetarecError(f"{what.format(0)} of type {rows.dtype}, expected whole numbers; use Vocabulary.encode")
    if rows.size and (rows.min() < low or rows.max() >= num_rows):
        place = np.argwhere((rows < low) | (rows >= num_rows))[0]
        raise MetarecError(
            f"{what.format(place[0])} {rows[tuple(place)]}, outside the rows {low}..{num_rows - 1} of its vocabulary; "
            "use Vocabulary.encode, and remove ids that are not in it"
        )
