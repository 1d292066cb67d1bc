"""A table of new users and what they say of items: read as it stands, since it need not be a data set to learn from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from metarec_jax.core import MetarecError
from metarec_jax.data import bounds, formats, layouts, parquet
from metarec_jax.data.columns import find_column, listed, shown
from metarec_jax.data.ids import code_ids


class Histories(NamedTuple):
    """Columns, one entry a feedback. ``rating`` is None where the table has none; ``notes`` say what was left out."""

    user_id: list[Any]
    item_id: list[Any]
    rating: list[Any] | None
    notes: tuple[str, ...] = ()


@bounds.fits
def read_histories(path: str | Path) -> Histories:
    """Users, items (by id or title) and ratings of a delimited or Parquet file, columns found by their usual names.

    Rows without an item or, in a table with ratings, without a rating are left out, and counted in ``notes``. A table
    without a user column is one user's.

    Raises:
      MetarecError: no such file, no item column, no whole row, or a file that cannot be read; the line is named.
    """
    path = Path(path)
    notes: list[str] = []
    if path.is_dir():
        raise MetarecError(f"{path} is a folder; name the table of new users in it")
    if "\0" in str(path) or not path.exists():
        raise MetarecError(f"there is no file {path}; give a table with the columns user_id, item_id and rating")
    dialect = None
    if layouts.layout(path) == "parquet":
        frame = parquet.read(path)
    else:
        dialect = formats.sniff(path)
        ids_in = (find_column(dialect.names, role, None, str(path)) for role in ("user", "item", "title"))
        frame = formats.read_text(path, dialect, tuple(ids_in))
        if not dialect.header:
            notes.append(f"{path} has no header: its columns are taken for {listed(dialect.names)}")
    names = [str(name) for name in frame.columns]
    user, item, rating = (find_column(names, role, None, str(path)) for role in ("user", "item", "rating"))
    item = item or find_column(names, "title", None, str(path))
    if item is None:
        raise MetarecError(
            f"{path} has no item column by a usual name; its columns are: {listed(names)}. Name one of them item_id"
        )
    wanted = [item] if rating is None else [item, rating]
    if user is not None:
        wanted.append(user)
    for name in wanted:
        if any(isinstance(value, (list, tuple, dict, np.ndarray)) for value in frame[name]):
            raise MetarecError(f"{path}: column {shown(name)} holds lists or tables, and one value a row was wanted")
    ids = {}
    for name in (user, item):
        if name is not None:
            coded = code_ids(frame[name], spelled=dialect is not None, name=name)
            ids[name] = pd.Series(np.append(coded.ids.astype(object), None)[coded.codes], dtype=object)
    frame = frame[wanted].assign(**ids)
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
