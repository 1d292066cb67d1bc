"""Interactions in memory: integer rows beside the ids that the user gave.

Row 0 is everywhere the unknown id. Nothing here reads a file; `metarec_jax.data.readers` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class Vocabulary:
    """Ids as they were given, and their rows 1..n. Row 0 stands for any id that is not in it.

    Args:
      ids: ``[n]`` distinct ids, all strings or all integers; id ``ids[k]`` has row ``k + 1``.

    >>> v = Vocabulary(np.array(["b", "a"]))
    >>> v.encode(["a", "b", "zebra"])
    array([2, 1, 0], dtype=int32)
    >>> v.decode([2, 1]).tolist()
    ['a', 'b']
    """

    ids: np.ndarray
    _index: pd.Index = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_index", pd.Index(self.ids))

    @property
    def num_rows(self) -> int:
        """Rows of a table indexed by this vocabulary: the ids and the unknown row."""
        return len(self.ids) + 1

    def encode(self, values: Any) -> np.ndarray:
        """Rows of ``values``, int32; 0 for an id never seen. Text that spells an integer id finds it."""
        values = np.asarray(values)
        integer_ids = np.issubdtype(np.asarray(self.ids).dtype, np.integer)
        if integer_ids and not np.issubdtype(values.dtype, np.integer):
            numbers = pd.to_numeric(pd.Series(values.ravel()), errors="coerce").to_numpy(dtype=np.float64)
            whole = np.isfinite(numbers) & (numbers == np.floor(np.nan_to_num(numbers)))
            rows = self._index.get_indexer(np.where(whole, numbers, 0).astype(np.int64)) + 1
            return np.where(whole, rows, 0).astype(np.int32).reshape(values.shape)
        if not integer_ids:
            values = values.astype(str).astype(object)
        return (self._index.get_indexer(values.ravel()) + 1).astype(np.int32).reshape(values.shape)

    def decode(self, rows: Any) -> np.ndarray:
        """Ids of rows ``1..n``. Raises IndexError for row 0 or a row past the end."""
        rows = np.asarray(rows)
        if rows.size and (rows.min() < 1 or rows.max() > len(self.ids)):
            raise IndexError(f"rows must lie in 1..{len(self.ids)}, got {rows.min()}..{rows.max()}")
        return np.asarray(self.ids)[rows - 1]


@dataclass(frozen=True)
class Feature:
    """One side feature, aligned with the rows of a vocabulary (row 0: unknown).

    Args:
      kind: "categorical" int32 ``[rows]``; "multi" int32 ``[rows, f]`` padded with 0; "numeric" float32 ``[rows, f]``,
        standardised, 0 where missing.
      values: the array.
      vocabulary: of the values, for categorical and multi; None for numeric.
    """

    kind: Literal["categorical", "multi", "numeric"]
    values: np.ndarray
    vocabulary: Vocabulary | None = None


@dataclass(frozen=True)
class Interactions:
    """Who gave what to which item, when. All arrays have one entry an interaction (N of them).

    Args:
      user, item: int32 ``[N]`` rows, 1 or more.
      rating: float32 ``[N]``, or None for implicit feedback (every row is a positive).
      timestamp: int64 ``[N]`` seconds, or None.
      users, items: the vocabularies.
      user_features, item_features: by name; names are the model's input columns and start with ``user_`` or ``item_``.
      titles: ``[len(items)]`` display names, in row order, or None.
      notes: one line for each thing that was dropped or changed on reading, with its count.
      name: of the data set, for reports.
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

    def __len__(self) -> int:
        return len(self.user)

    @property
    def implicit(self) -> bool:
        return self.rating is None

    def take(self, where: np.ndarray) -> Interactions:
        """The interactions that a boolean mask or an index array names; vocabularies and features stay whole."""
        return replace(
            self,
            user=self.user[where],
            item=self.item[where],
            rating=None if self.rating is None else self.rating[where],
            timestamp=None if self.timestamp is None else self.timestamp[where],
        )
