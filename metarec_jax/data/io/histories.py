"""A table of new users with their ratings of items, read without the checks of a training set."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from metarec_jax.core import MetarecError
from metarec_jax.data.interactions import NO_TIME
from metarec_jax.data.io import bounds, formats, json_rows, layouts, parquet
from metarec_jax.data.io.columns import MISSING, find_column, option, seconds
from metarec_jax.data.io.features import id_column
from metarec_jax.data.io.ids import code_ids
from metarec_jax.messages import listed, shown


class Histories(NamedTuple):
    """Columns with one entry per rating or click; ``rating`` is None if the table has none; ``notes`` list drops."""

    user_id: list[Any]
    item_id: list[Any]
    rating: list[Any] | None
    notes: tuple[str, ...] = ()


@bounds.fits
def read_histories(
    path: str | Path,
    *,
    user_col: str | None = None,
    item_col: str | None = None,
    rating_col: str | None = None,
    timestamp_col: str | None = None,
    trained_with: Mapping[str, str | None] = MappingProxyType({}),
) -> Histories:
    """Users, items (by id or title) and ratings of a delimited, JSON or Parquet file.

    Rows without an item or, in a table with ratings, without a rating are dropped, and counted in ``notes``. A table
    without a user column holds one user. If it has times, the rows of a user are in time order, those without a time
    first, so that the last row of a repeated item is the last in time.

    Args:
      user_col, item_col, rating_col, timestamp_col: columns that must exist, by name or, without a header, by number
        ("1", "2", ...); None: detected by their usual names.
      trained_with: the same four columns of the table that a run was trained on, used if this table has them too.

    Raises:
      MetarecError: no such file, no item column, no complete row, or a file that cannot be read; the line is named.
    """
    path = bounds.local(path)
    notes: list[str] = []
    if path.is_dir():
        raise MetarecError(f"{path} is a folder, expected a table of new users; name a file in it")
    if "\0" in str(path) or not path.exists():
        raise MetarecError(f"there is no file {path}; name a table with the columns user_id, item_id and rating")
    asked = {"user": user_col, "item": item_col, "rating": rating_col, "timestamp": timestamp_col}
    form, dialect = layouts.layout(path), None
    if form in ("parquet", "json"):
        frame = parquet.read(path) if form == "parquet" else json_rows.read(path)
        names = [str(name) for name in frame.columns]
    else:
        hints = tuple(c for c in (*asked.values(), *trained_with.values()) if c)
        dialect = formats.sniff(path, asked=hints)
        names = list(dialect.names)
        if not dialect.header:
            notes.append(f"{path} has no header: its columns are read as {listed(names)}")
            by_position = {str(k + 1): name for k, name in enumerate(names)}
            asked = {role: by_position.get(c or "", c) for role, c in asked.items()}
    for role, column in asked.items():
        theirs = trained_with.get(f"{role}_col")
        asked[role] = theirs if column is None and (theirs in names or theirs == "") else column
    user, item, rating, time = (find_column(names, role, column, str(path)) for role, column in asked.items())
    item = item or find_column(names, "title", None, str(path))
    if item is None:
        raise MetarecError(
            f"{path} has no item column by a usual name; its columns are: {listed(names)}. "
            f"Name it with {option('item')}, or rename it to item_id"
        )
    if dialect is not None:
        frame = formats.read_text(path, dialect, (user, item, time))
    wanted = [item] if rating is None else [item, rating]
    if user is not None:
        wanted.append(user)
    for name in wanted:
        if any(isinstance(value, (list, tuple, dict, np.ndarray)) for value in frame[name]):
            raise MetarecError(f"{path}: column {shown(name)}: expected one value per row, got lists or tables")
    ids = {}
    for role in filter(None, (user, item)):
        coded = code_ids(frame[role], spelled=dialect is not None, name=role)
        known = [*coded.ids.tolist(), None]  # code -1, of a missing id, is the last
        ids[role] = pd.Series([known[code] for code in coded.codes], dtype=object)
    frame = frame.assign(**ids)
    if time is not None:
        try:
            frame = _in_time(frame, user, time, path, dialect)
        except MetarecError as error:
            notes.append(f"rows are read in the order of the file, since their times cannot be read: {error}")
    frame = frame[wanted]
    whole = frame.dropna()
    if lost := len(frame) - len(whole):
        gone = 0 if user is None else frame[user].nunique() - whole[user].nunique()
        users_too = f"; {gone} users have no other row and get no recommendations" if gone else ""
        notes.append(f"{lost} rows of {path} dropped: they lack one of {listed(wanted)}{users_too}")
    if not len(whole):
        raise MetarecError(f"every row of {path} lacks one of {listed(wanted)}; complete them")
    columns = {name: whole[name].astype(object).tolist() for name in wanted}
    users = ["new user"] * len(whole) if user is None else columns[user]
    if len({type(u) for u in users}) > 1:
        users = [str(u) for u in users]
    return Histories(users, columns[item], None if rating is None else columns[rating], tuple(notes))


def _in_time(
    frame: pd.DataFrame, user: str | None, time: str, path: Path, dialect: formats.Dialect | None
) -> pd.DataFrame:
    """The rows of each user in time order, those without a time first; each user keeps the positions of their rows."""
    moments, missing, _ = seconds(frame[time], time, lambda row: formats.place(path, dialect, row))
    users = np.zeros(len(frame), np.intp) if user is None else pd.factorize(frame[user])[0]
    places, order = np.argsort(users, kind="stable"), np.empty(len(frame), np.intp)
    order[places] = np.lexsort((np.where(missing, NO_TIME, moments), users))
    return frame.iloc[order]


@bounds.fits
def read_features(path: str | Path, user_col: str | None = None) -> dict[Any, dict[str, Any]]:
    """Side features of new users, by user and column, of a delimited or Parquet file with one row per user.

    Args:
      user_col: the column of users; detected by its usual names if None or absent from the file.

    Raises:
      MetarecError: no such file, no column of users, a row without a user, or a user on two rows.
    """
    path = bounds.local(path)
    if "\0" in str(path) or not path.is_file():
        raise MetarecError(f"there is no file {path}; name a table with one row per user: user_id and the features")
    frame = layouts.side_frame(path, "user", user_col)
    assert frame is not None, "path is not None"
    by = id_column(list(frame.columns), "user", user_col)
    coded = code_ids(frame[by], spelled=layouts.layout(path) not in ("parquet", "json"), name=by)
    if (coded.codes < 0).any():
        raise MetarecError(f"row {int(np.argmax(coded.codes < 0)) + 1} of {path} has no {by}; fill it in or delete it")
    if len(coded.ids) < len(frame):
        twice = int(np.argmax(np.bincount(coded.codes) > 1))
        raise MetarecError(f"{path} has user {coded.shown(twice)} on two rows; keep one")
    users = coded.ids[coded.codes].tolist()
    columns = {str(c): frame[c].astype(object).tolist() for c in frame.columns if str(c) != by}
    return {
        user: {name: values[k] for name, values in columns.items() if not _is_missing(values[k])}
        for k, user in enumerate(users)
    }


def _is_missing(value: Any) -> bool:
    if isinstance(value, (list, tuple, np.ndarray)):
        return False
    return bool(pd.isna(value)) or (isinstance(value, str) and value.strip() in MISSING)
