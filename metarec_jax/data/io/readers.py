"""Tables and files as `Interactions`: columns are detected, ids coded, bad rows reported and dropped rows counted."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pyarrow as pa

from metarec_jax.core import MetarecError, MetarecWarning
from metarec_jax.data.interactions import NO_TIME, Interactions, Vocabulary, texts
from metarec_jax.data.io import bounds, formats, json_rows, layouts, parquet
from metarec_jax.data.io.columns import Roles, Where, find_roles, no_rating, numbers, option, seconds
from metarec_jax.data.io.features import id_column, side_features
from metarec_jax.data.io.ids import Coded, code_ids
from metarec_jax.data.io.layouts import Format
from metarec_jax.data.io.spelling import is_integer, number
from metarec_jax.messages import listed, shown

Duplicates = Literal["last", "first", "mean", "error"]


def from_pandas(
    frame: pd.DataFrame,
    *,
    user_col: str | None = None,
    item_col: str | None = None,
    rating_col: str | None = None,
    timestamp_col: str | None = None,
    implicit: bool = False,
    user_features: pd.DataFrame | None = None,
    item_features: pd.DataFrame | None = None,
    title_col: str | None = None,
    unrated_items: bool = False,
    duplicates: Duplicates = "last",
    name: str = "interactions",
) -> Interactions:
    """Interactions from a table with one row per interaction; ids are kept, and sorted in the vocabularies.

    Args:
      frame: a user and an item column; a rating column or none (implicit feedback: every row is a positive); times in
        seconds since 1970 (milli-, micro- and nanoseconds are recognised by their size), dates, or ISO text.
      user_col, item_col, rating_col, timestamp_col: None: detected by the usual names (`columns.ALIASES`); "" for no
        rating or timestamp column.
      implicit: ignore ratings.
      user_features, item_features: one row per id; see `metarec_jax.data.io.features` for the kinds of columns.
      title_col: titles of items, a column of ``item_features`` or else of ``frame``.
      unrated_items: include items that occur only in ``item_features``, which are recommended by content.
      duplicates: of several rows of a user and item, keep the "last" or "first" (in time, or in order without times),
        or the "mean" of the ratings with the last time; "error" raises.
      name: name of the data set, for reports.

    Returns:
      The interactions, in the order of the rows. ``notes`` lists what was dropped or changed; dropped rows are a
      `MetarecWarning` too. Rows without a user, item or rating are dropped; rows without a time are kept (`NO_TIME`),
      and refused by methods that require times.

    Raises:
      MetarecError: a column given by name is missing, a value is not a finite number, there are fewer than two users,
        or all ratings are equal; the message names the row and column.

    >>> data = from_pandas(pd.DataFrame({"user": ["b", "a", "b"], "item": [7, 7, 9], "stars": [5, 3, 1]}))
    >>> data.user.tolist(), data.item.tolist(), data.rating.tolist()
    ([2, 1, 2], [1, 1, 2], [5.0, 3.0, 1.0])
    >>> data.users.ids.tolist(), data.items.ids.tolist()
    (['a', 'b'], [7, 9])
    """
    names = [str(c) for c in frame.columns]
    if repeated := [n for n in dict.fromkeys(names) if names.count(n) > 1]:
        raise MetarecError(f"the table has two columns called {shown(repeated[0])}. Rename one of them")
    frame = frame.set_axis(names, axis=1)
    in_items = item_features is not None and (title_col is None or title_col in map(str, item_features.columns))
    roles = find_roles(
        names, user_col, item_col, rating_col, timestamp_col, None if in_items else title_col, implicit, "the table"
    )
    data = _interactions(
        frame,
        roles,
        names,
        lambda row: f"frame.iloc[{row}]",
        source="the table",
        implicit=implicit,
        user_features=user_features,
        item_features=item_features,
        asked=(user_col, item_col, title_col if in_items else None),
        unrated_items=unrated_items,
        duplicates=duplicates,
        name=name,
    )
    return _warned(data, 3)


@bounds.fits
def read(
    path: str | Path,
    *,
    format: Format | None = None,
    user_col: str | None = None,
    item_col: str | None = None,
    rating_col: str | None = None,
    timestamp_col: str | None = None,
    implicit: bool = False,
    user_features: str | Path | None = None,
    item_features: str | Path | None = None,
    title_col: str | None = None,
    unrated_items: bool = False,
    duplicates: Duplicates = "last",
    name: str | None = None,
) -> Interactions:
    """Interactions from a file, or from a folder with a known layout.

    - Delimited text: comma, tab, semicolon, "|" or "::", plain or compressed (gzip, bzip2), UTF-8, with a header or
      without (then user_id, item_id, rating, timestamp by position; columns may be named "1", "2", ...).
    - Parquet; ids of bytes are read as UTF-8 text, or as UUIDs.
    - JSON: one object per line, or an array of objects, plain or compressed.
    - RecBole: ``NAME.inter`` with a typed header; ``NAME.user`` and ``NAME.item`` beside it are its features.
    - MovieLens: ``ratings.dat`` with ``users.dat`` and ``movies.dat`` beside it, ``u.data`` with ``u.user`` and
      ``u.item``, ``ratings.csv`` with ``movies.csv``; each may be compressed.

    A column of integers without leading zeros is integer ids (26.0 is one too), any other is text. Empty fields, NA,
    N/A, NaN, NULL and None are missing values.

    Args:
      path: the file or folder.
      format: the format that the file must have; None: detected by its content.
      user_features, item_features: files, instead of those beside the interactions.
      name: name of the data set; None: that of the file or folder.
      user_col, item_col, rating_col, timestamp_col, implicit: as in `from_pandas`; and so are
      title_col, unrated_items, duplicates.

    Raises:
      MetarecError: a fault of the files; the message names the line of a bad row.
    """
    path = bounds.local(path)
    folder = path.is_dir()
    path = layouts.find(path) if folder else path
    form = layouts.layout(path)
    if format is not None and format != form and not (format == "csv" and form in ("recbole", "movielens")):
        raise MetarecError(f"{path}: expected format {format!r}, got {form!r}. Omit the format, or use {form!r}")
    asked = tuple(c for c in (user_col, item_col, rating_col, timestamp_col, title_col) if c)
    tables = {"parquet": parquet, "json": json_rows}
    dialect = None if form in tables else formats.sniff(path, asked=asked)
    names = tables[form].columns(path) if dialect is None else list(dialect.names)
    notes: list[str] = []
    if dialect is not None and not dialect.header:
        if form == "csv":
            notes.append(f"no header: the columns are read as {listed(names)}")
        by_position = {str(k + 1): n for k, n in enumerate(names)}
        user_col, item_col, rating_col, timestamp_col = (
            None if c is None else by_position.get(c, c) for c in (user_col, item_col, rating_col, timestamp_col)
        )
    beside = (None, None) if format == "csv" else layouts.beside(path, form)
    users = layouts.side_frame(user_features or beside[0], "user", user_col)
    items = layouts.side_frame(item_features or beside[1], "item", item_col)
    in_items = items is not None and (title_col is None or title_col in items.columns)
    roles = find_roles(
        names, user_col, item_col, rating_col, timestamp_col, None if in_items else title_col, implicit, str(path)
    )
    wanted = [c for c in dict.fromkeys(roles) if c is not None]
    if dialect is None:
        frame = tables[form].read(path, wanted)
    else:
        frame = formats.read_columns(path, dialect, {c: _type(c, roles, dialect) for c in wanted})

    def where(row: int) -> str:
        return json_rows.place(path, row) if form == "json" else formats.place(path, dialect, row)

    if name is None:
        stem = path.name.split(".")[0]
        name = (
            path.resolve().parent.name
            if form == "movielens" or (folder and stem in ("ratings", "interactions"))
            else stem
        )
    data = _interactions(
        frame,
        roles,
        names,
        where,
        source=str(path),
        spelled=dialect is not None,
        implicit=implicit,
        user_features=users,
        item_features=items,
        asked=(user_col, item_col, title_col if in_items else None),
        unrated_items=unrated_items,
        duplicates=duplicates,
        name=name,
        first_notes=notes,
    )
    return _warned(data, 4)


def _warned(data: Interactions, level: int) -> Interactions:
    """The data, after a warning for each note on dropped rows; ``level`` is the stack level of the user's call."""
    for note in data.notes:
        if " dropped (" in note:
            warnings.warn(note, MetarecWarning, stacklevel=level)
    return data


def _type(column: str, roles: Roles, dialect: formats.Dialect) -> pa.DataType:
    """The type to read a text column as. Ids are read as text, which keeps leading zeros and unusual spellings."""
    if column == roles.rating:
        return pa.float32()
    if column == roles.timestamp:
        k = dialect.names.index(column)
        sample = [row[k].strip() for row in dialect.sample if k < len(row) and row[k].strip()]
        if all(map(is_integer, sample)):
            return pa.int64()
        if all(number(value) is not None for value in sample):
            return pa.float64()
    return pa.dictionary(pa.int32(), pa.string())


def _interactions(
    frame: pd.DataFrame,
    roles: Roles,
    names: Sequence[str],
    where: Where,
    *,
    source: str,
    spelled: bool = False,
    implicit: bool,
    user_features: pd.DataFrame | None,
    item_features: pd.DataFrame | None,
    asked: tuple[str | None, str | None, str | None],
    unrated_items: bool,
    duplicates: Duplicates,
    name: str,
    first_notes: Sequence[str] = (),
) -> Interactions:
    """Interactions from a frame of any source: ids are coded, values checked, bad rows dropped and counted."""
    if duplicates not in ("last", "first", "mean", "error"):
        raise MetarecError(
            f"--duplicates (duplicates= in Python) must be 'last', 'first', 'mean' or 'error', got {duplicates!r}"
        )
    if not len(frame):
        raise MetarecError(f"{source} has no rows, expected one row per interaction. Check the file")
    notes = list(first_notes)
    if roles.rating is None:
        notes.append("ratings are ignored (implicit)" if implicit else "no rating column: implicit feedback")
    if unused := [c for c in names if c not in roles]:
        notes.append(f"columns not used: {listed(unused)}")

    titles = frame[roles.title] if roles.title is not None else None
    timestamp = rating = None
    missing: dict[str, np.ndarray] = {}
    if roles.rating is not None:
        rating = numbers(frame[roles.rating], roles.rating, where, notes)
        missing[roles.rating] = np.isnan(rating)
    if roles.timestamp is not None:
        timestamp, timeless, changed = seconds(frame[roles.timestamp], roles.timestamp, where)
        notes.extend(changed)
        timestamp = np.where(timeless, NO_TIME, timestamp) if timeless.any() else timestamp
        if timeless.all():
            timestamp = None
            notes.append(f"column {shown(roles.timestamp)} is empty: read without timestamps")
    user = code_ids(frame[roles.user], spelled=spelled, name=roles.user)
    item = code_ids(frame[roles.item], spelled=spelled, name=roles.item)
    del frame
    notes.extend([*user.notes, *item.notes])
    missing = {roles.user: user.codes < 0, roles.item: item.codes < 0, **missing}
    counts = {column: int(gone.sum()) for column, gone in missing.items()}
    rows: np.ndarray | None = None  # rows of the source that are kept; None: all of them
    if any(counts.values()):
        gone = np.logical_or.reduce(list(missing.values()))
        first = where(int(np.argmax(gone)))
        each = ", ".join(f"{n} without {listed([column])}" for column, n in counts.items() if n)
        notes.append(f"{int(gone.sum())} rows with missing values dropped ({each}; the first is {first})")
        rows = np.flatnonzero(~gone)
        if not len(rows):
            raise MetarecError(f"every row of {source} lacks a value ({each}). Complete the rows")
        user, item = _taken(user, rows), _taken(item, rows)
        rating = None if rating is None else rating[rows]
        timestamp = None if timestamp is None else timestamp[rows]
    del missing
    if timestamp is not None and (count := int((timestamp == NO_TIME).sum())):
        notes.append(f"{count} rows have no time: kept, but --by time and --order time require a time in every row")

    keep, rating, repeats = _without_repeats(user, item, rating, timestamp, duplicates)
    if keep is not None:
        if duplicates == "error":
            raise MetarecError(_repeat_message(user, item, where, rows))
        notes.append(f"{repeats} repeated rows of a user and item dropped (the {duplicates} is kept)")
        timestamp = None if timestamp is None else timestamp[keep]
        user, item = user._replace(codes=user.codes[keep]), item._replace(codes=item.codes[keep])
        rows = keep if rows is None else rows[keep]
    _check(user, rating, roles, source)
    if rating is not None and (odd := no_rating(*np.unique(rating, return_counts=True))) is not None:
        notes.append(odd)
    singles = int((np.bincount(user.codes, minlength=len(user.ids)) == 1).sum())
    if singles:
        notes.append(
            f"{singles} of {len(user.ids)} users have a single interaction: kept, but too few to adapt and test on"
        )

    if unrated_items and item_features is not None:
        their_ids = item_features[id_column(list(item_features.columns), "item", asked[1])]
        more_ids = code_ids(their_ids, spelled=item.ids.dtype != object).ids
        if more_ids.dtype != item.ids.dtype:  # text matches no integer id; integers match text by their spelling
            more_ids = texts(more_ids) if item.ids.dtype == object else item.ids[:0]
        union = np.union1d(item.ids, more_ids)
        notes.append(f"{len(union) - len(item.ids)} items without an interaction are added from the item table")
        item = Coded(np.searchsorted(union, item.ids).astype(np.int32)[item.codes], union)
    users, items = Vocabulary(user.ids), Vocabulary(item.ids)
    about_users = None if user_features is None else side_features(user_features, users, side="user", id_col=asked[0])
    about_items = (
        None
        if item_features is None
        else side_features(item_features, items, side="item", id_col=asked[1], title_col=asked[2])
    )
    named = about_items.titles if about_items is not None else None
    if titles is not None:
        named = texts(items.ids)
        kept_titles = titles if rows is None else titles.iloc[rows]
        of_row = pd.Series(kept_titles.to_numpy(dtype=object), index=item.codes).dropna()
        of_row = of_row[~of_row.index.duplicated()]
        named[of_row.index.to_numpy()] = [str(t) for t in of_row]
    for about in (about_users, about_items):
        notes.extend(about.notes if about is not None else ())
    user.codes[...] += 1
    item.codes[...] += 1
    rating, timestamp = (None if a is None else np.require(a, requirements=["O", "W"]) for a in (rating, timestamp))
    return Interactions(
        user=user.codes,
        item=item.codes,
        rating=rating,
        timestamp=timestamp,
        users=users,
        items=items,
        user_features=about_users.features if about_users is not None else {},
        item_features=about_items.features if about_items is not None else {},
        titles=named,
        notes=tuple(notes),
        name=name,
    )


def _taken(coded: Coded, rows: np.ndarray) -> Coded:
    """The ids that occur in some rows, with the codes of these rows."""
    codes = coded.codes[rows]
    present = np.bincount(codes, minlength=len(coded.ids)) > 0
    if present.all():
        return coded._replace(codes=codes)
    return coded._replace(
        codes=(np.cumsum(present, dtype=np.int32) - 1)[codes].astype(np.int32), ids=coded.ids[present]
    )


def _without_repeats(
    user: Coded, item: Coded, rating: np.ndarray | None, timestamp: np.ndarray | None, how: Duplicates
) -> tuple[np.ndarray | None, np.ndarray | None, int]:
    """Rows to keep (None: all), their ratings, and the number of dropped rows."""
    pair = user.codes.astype(np.int64)
    pair *= len(item.ids)
    pair += item.codes
    ranked = np.sort(pair)
    repeats = int((ranked[1:] == ranked[:-1]).sum())
    del ranked
    if not repeats:
        return None, rating, 0
    by = np.argsort(pair, kind="stable") if timestamp is None else np.lexsort((timestamp, pair))
    pair = pair[by]
    change = np.flatnonzero(pair[1:] != pair[:-1]) + 1
    starts, ends = np.append(0, change), np.append(change, len(pair))
    keep = by[starts] if how == "first" else by[ends - 1]
    if how == "mean" and rating is not None:
        total = np.add.reduceat(rating[by].astype(np.float64), starts)
        mean = (total / (ends - starts)).astype(np.float32)
        in_order = np.argsort(keep)
        return keep[in_order], mean[in_order], repeats
    keep.sort()
    return keep, None if rating is None else rating[keep], repeats


def _repeat_message(user: Coded, item: Coded, where: Where, rows: np.ndarray | None) -> str:
    pair = pd.Series(user.codes.astype(np.int64) * len(item.ids) + item.codes)
    second = int(np.argmax(pair.duplicated().to_numpy()))
    first = int(np.argmax((pair == pair[second]).to_numpy()))
    at = [where(k if rows is None else int(rows[k])) for k in (first, second)]
    return (
        f"user {user.shown(user.codes[second])} and item {item.shown(item.codes[second])} occur on {at[0]} and on "
        f"{at[1]}. Delete one, or keep one with --duplicates last, first or mean (duplicates= in Python)"
    )


def _check(user: Coded, rating: np.ndarray | None, roles: Roles, source: str) -> None:
    if len(user.ids) < 2:
        raise MetarecError(
            f"{source}, column {shown(roles.user)}: all rows belong to one user ({user.shown(0)}); meta-learning "
            f"requires at least two. Name another column with {option('user')}"
        )
    if rating is not None and rating.min() == rating.max():
        raise MetarecError(
            f"{source}, column {shown(roles.rating)}: all ratings are {rating[0]:g}, so there is nothing to predict. "
            "If a row means that the user chose the item, use --implicit (implicit=True in Python)"
        )
