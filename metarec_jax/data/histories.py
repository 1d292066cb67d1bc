"""A table of new users and what they say of items: read as it stands, since it need not be a data set to learn from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from metarec_jax.core import MetarecError
from metarec_jax.data import bounds, formats, layouts, parquet
from metarec_jax.data.columns import MISSING, find_column, id_of, listed, option, seconds, shown
from metarec_jax.data.features import id_column


class Histories(NamedTuple):
    """Columns, one entry a feedback. ``rating`` is None where the table has none; ``notes`` say what was left out."""

    user_id: list[Any]
    item_id: list[Any]
    rating: list[Any] | None
    notes: tuple[str, ...] = ()


@bounds.fits
def read_histories(
    path: str | Path,
    *,
    asked: Mapping[str, str | None] = MappingProxyType({}),
    trained: Mapping[str, str | None] = MappingProxyType({}),
) -> Histories:
    """Users, items (by id or title) and ratings of a delimited or Parquet file.

    Rows without an item or, in a table with ratings, without a rating are left out, and counted in ``notes``. A table
    without a user column is one user's. Of a table with times, rows are taken in their order.

    Args:
      asked: names of columns by role (user, item, rating, timestamp); they must be there.
      trained: the names that a run learned from, taken where they are there. Other columns are found by their usual
        names.

    Raises:
      MetarecError: no such file, no item column, no whole row, or a file that cannot be read; the line is named.
    """
    path = Path(path)
    notes: list[str] = []
    if path.is_dir():
        raise MetarecError(f"{path} is a folder; name the table of new users in it")
    if "\0" in str(path) or not path.exists():
        raise MetarecError(f"there is no file {path}; give a table with the columns user_id, item_id and rating")
    if layouts.layout(path) == "parquet":
        frame = parquet.read(path)
    else:
        dialect = formats.sniff(path)
        frame = formats.read_text(path, dialect)
        if not dialect.header:
            notes.append(f"{path} has no header: its columns are taken for {listed(dialect.names)}")
    names = [str(name) for name in frame.columns]

    def column(role: str) -> str | None:
        name = asked.get(role)
        if name is None and trained.get(role) in names:
            name = trained[role]
        return find_column(names, role, name, str(path))

    user, item, rating, timestamp = map(column, ("user", "item", "rating", "timestamp"))
    item = item or column("title")
    if item is None:
        raise MetarecError(
            f"{path} has no item column by a usual name; its columns are: {listed(names)}. Name it with "
            f"{option('item')}"
        )
    wanted = [item] if rating is None else [item, rating]
    if user is not None:
        wanted.append(user)
    for name in wanted:
        if any(isinstance(value, (list, tuple, dict, np.ndarray)) for value in frame[name]):
            raise MetarecError(f"{path}: column {shown(name)} holds lists or tables, and one value a row was wanted")
    ids = {name: pd.Series(map(id_of, frame[name]), dtype=object) for name in (user, item) if name is not None}
    table, frame = frame, frame[wanted].assign(**ids)
    if timestamp is not None and timestamp not in wanted:
        moments, missing, said = seconds(table[timestamp], timestamp, lambda k: f"row {k + 1} of {path}")
        notes += said
        frame = frame.iloc[np.lexsort((np.where(missing, np.iinfo(np.int64).min, moments),))]
    whole = frame.dropna()
    if lost := len(frame) - len(whole):
        gone = 0 if user is None else frame[user].nunique() - whole[user].nunique()
        users_too = f"; {gone} users have no other row, and get no list" if gone else ""
        notes.append(f"{lost} rows of {path} left out: they lack one of {listed(wanted)}{users_too}")
    if not len(whole):
        raise MetarecError(f"every row of {path} lacks one of {listed(wanted)}; fill them in")
    columns = {name: whole[name].astype(object).tolist() for name in wanted}
    users = ["new user"] * len(whole) if user is None else columns[user]
    if len({type(u) for u in users}) > 1:
        users = [str(u) for u in users]
    return Histories(users, columns[item], None if rating is None else columns[rating], tuple(notes))


@bounds.fits
def read_features(path: str | Path, user_col: str | None = None) -> dict[Any, dict[str, Any]]:
    """Side features of new users, by user and column, of a delimited or Parquet file with one row per user.

    Args:
      user_col: the column of users; found by its usual names where None, or where the file has none of that name.

    Raises:
      MetarecError: no such file, no column of users, or a user on two rows.
    """
    path = Path(path)
    if "\0" in str(path) or not path.is_file():
        raise MetarecError(f"there is no file {path}; give a table with one row per user: user_id, and the features")
    if layouts.layout(path) == "parquet":
        frame = parquet.read(path)
    else:
        frame = formats.read_text(path, formats.sniff(path))
    by = id_column(frame, "user", user_col)
    users = [id_of(value) for value in frame[by]]
    for k, user in enumerate(users):
        if user is None:
            raise MetarecError(f"row {k + 1} of {path} has no {by}; fill it in or delete the row")
    if len(set(users)) < len(users):
        twice = next(user for k, user in enumerate(users) if user in users[:k])
        raise MetarecError(f"{path} has user {shown(twice)} on two rows; keep one")
    columns = {str(c): frame[c].astype(object).tolist() for c in frame.columns if str(c) != by}
    return {
        user: {name: values[k] for name, values in columns.items() if not _is_missing(values[k])}
        for k, user in enumerate(users)
    }


def _is_missing(value: Any) -> bool:
    if isinstance(value, (list, tuple, np.ndarray)):
        return False
    return bool(pd.isna(value)) or (isinstance(value, str) and value.strip() in MISSING)
