"""Side features from a table: which of its columns are features, their kinds, and arrays in vocabulary rows.

The kind of a column depends on its values; missing values are ignored:

- lists, text separated by "|", or text that clearly holds lists (`metarec_jax.data.io.lists`) -> "multi". Lists of
  decimal numbers of one length -> "numeric".
- true/false, pandas categories, text, and whole numbers of at most `FEW` different values -> "categorical".
- any other number, and dates (of pandas, or ISO 8601 text) -> "numeric".
- not a feature: a column with a single value; labels, that is text (or whole numbers in a column named like an id or
  a zip code) with more distinct values than half of the rows, such as titles, addresses and descriptions.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from metarec_jax.core import MetarecError
from metarec_jax.data.interactions import Feature, Vocabulary, texts
from metarec_jax.data.io import lists as lists_of_text
from metarec_jax.data.io.columns import MISSING, find_column, option, plain
from metarec_jax.data.io.ids import float_bits, refuse_rounded
from metarec_jax.messages import listed, shown

MAX_VALUES = 32
"""A multi-valued feature keeps at most this many values of a row, the first ones."""
FEW = 50
"""Whole numbers of at most this many different values are categories."""

_FEWEST_LABELS = 20
_LABEL_NAME = re.compile(r"(zip|postal|postcode|phone|url)|(_id|Id|ID)s?$", re.IGNORECASE)
_ISO = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}([T ][0-9]{2}:[0-9]{2}(:[0-9]{2}([.][0-9]+)?)?(Z|[+-][0-9]{2}:?[0-9]{2})?)?"
)
_CODE, _NAMIBIA = re.compile("[A-Z]{2}"), "NA"
_NO_VALUE = {*MISSING, "(no genres listed)"}


class SideTable(NamedTuple):
    """Features by name, display titles ``[len(vocabulary.ids)]`` or None, and notes on what was dropped."""

    features: dict[str, Feature]
    titles: np.ndarray | None
    notes: tuple[str, ...]


def side_features(
    frame: pd.DataFrame, vocabulary: Vocabulary, *, side: str, id_col: str | None = None, title_col: str | None = None
) -> SideTable:
    """The features of users or items, aligned with their vocabulary.

    Names get the prefix ``user_`` or ``item_`` unless they have it. Vocabularies of values are sorted. Numeric columns
    are standardised over the known values of the vocabulary's ids, and a missing value is 0, the mean.

    Args:
      frame: one row per id; the last row of a repeated id is used; ids outside the vocabulary are dropped.
      side: "user" or "item".
      id_col: the column of ids; None: detected by its name.
      title_col: the column of titles (items only); None: detected by its name.

    Raises:
      MetarecError: a column given by name does not exist, or no id of the table occurs in the interactions.

    >>> table = pd.DataFrame({"item": ["b", "a"], "genres": ["War|Drama", "Drama"]})
    >>> genres = side_features(table, Vocabulary(np.array(["a", "b"])), side="item").features["item_genres"]
    >>> genres.kind, genres.vocabulary.ids.tolist(), genres.values.tolist()  # rows: unknown, "a", "b"
    ('multi', ['Drama', 'War'], [[0, 0], [1, 0], [2, 1]])
    """
    ids = id_column(list(frame.columns), side, id_col)
    if not len(frame):
        raise MetarecError(f"the {side} table: expected one row per id, got no rows. Check the file")
    refuse_rounded(frame[ids].unique().tolist(), f"{ids} of the {side} table", float_bits(frame[ids].dtype))
    rows = vocabulary.encode(_objects(frame[ids]))
    notes = [f"{side} {note}" for note in frame.attrs.get("notes", ())]
    if outside := int((rows == 0).sum()):
        notes.append(f"{outside} {side}s of the {side} table have no interaction: dropped")
    if outside == len(rows):
        raise MetarecError(
            f"no id in column {shown(ids)} of the {side} table (such as {shown(frame[ids].iloc[0])}) is among the "
            f"{len(vocabulary.ids)} {side} ids of the interactions (such as {shown(vocabulary.ids.tolist()[0])}). "
            f"Name its id column with {option(side)}"
        )
    known = pd.Series(np.arange(len(rows)), index=rows)[rows > 0]
    repeated = known.index.duplicated(keep="last")
    if repeated.any():
        notes.append(f"{int(repeated.sum())} repeated {side} ids in the {side} table: the last row is used")
    known = known[~repeated]
    if without := len(vocabulary.ids) - len(known):
        notes.append(f"{without} {side}s have no row in the {side} table: their features are unknown")
    at = known.index.to_numpy()
    frame = frame.iloc[known.to_numpy()].reset_index(drop=True)

    columns = [str(c) for c in frame.columns]
    title = find_column(columns, "title", title_col, f"the {side} table") if side == "item" else None
    titles = None
    if title is not None:
        titles = texts(vocabulary.ids)
        values = _objects(frame[title])
        has = np.array([isinstance(t, str) and t.strip() not in MISSING for t in values], bool)
        titles[at[has] - 1] = values[has]
        notes.extend(_shared_titles(titles, vocabulary.ids, at[has] - 1))
    features: dict[str, Feature] = {}
    for column in columns:
        if column in (ids, title):
            continue
        name = column if column.startswith(f"{side}_") else f"{side}_{column}"
        feature, note = _feature(column, frame[column], at, vocabulary.num_rows)
        if feature is not None and (name in features or name in ("user_id", "item_id")):
            feature, note = None, f"is a second {shown(name)}: not a feature"
        if feature is not None:
            features[name] = feature
        if note:
            notes.append(f"{side} column {shown(column)}{'' if note[0] == ':' else ' '}{note}")
    return SideTable(features, titles, tuple(notes))


def _shared_titles(titles: np.ndarray, ids: np.ndarray, at: np.ndarray) -> list[str]:
    """A note if several of the items ``at`` share a title."""
    shared = pd.Series(at, index=titles[at]).groupby(level=0, sort=False).agg(list)
    shared = shared[shared.map(len) > 1]
    if not len(shared):
        return []
    count = f"{len(shared)} titles belong" if len(shared) > 1 else "1 title belongs"
    first, second = (shown(n) for n in ids[sorted(shared.iloc[0])[:2]].tolist())
    such = f"such as {shown(shared.index[0])}, ids {first} and {second}"
    return [f"{count} to several items ({such}): refer to these by their ids"]


def id_column(columns: Sequence[object], side: str, asked: str | None) -> str:
    """The column of ids of a side table: ``asked`` if it exists, else the first alias, else "id"."""
    names = [str(c) for c in columns]
    if asked is not None and asked in names:
        return asked
    column = find_column(names, side, None, f"the {side} table") or next((n for n in names if plain(n) == "id"), None)
    if column is None:
        raise MetarecError(
            f"the {side} table has no column of {side} ids; its columns are: {listed(names)}. "
            f"Rename one of them to {asked or side + '_id'!r}"
        )
    return column


def _feature(name: str, column: pd.Series, at: np.ndarray, num_rows: int) -> tuple[Feature | None, str | None]:
    """The feature of a column, or None, and a note on it."""
    if any(isinstance(value, (dict, bytes)) for value in _objects(column)):
        held = "objects" if any(isinstance(value, dict) for value in _objects(column)) else "bytes"
        return None, f"holds {held}: not a feature"
    remark: str | None = None
    if (dates := _dates(column)) is not None:
        column, remark = dates, "is read as dates"
    values, lists = _numbers(column), None
    if values is None and (lists := _lists(column)) is None and (spelled := _spelled_lists(column)) is not None:
        lists, remark = spelled
    if lists is not None:
        width = {len(row) for row in lists if row}
        if len(width) == 1 and all(isinstance(v, float) for row in lists for v in row):
            values = np.array([row or [np.nan] * max(width) for row in lists], np.float64)
        else:
            feature, note = _multi(lists, at, num_rows)
            return feature, "; ".join(filter(None, (remark, note))) or None
    if values is not None:
        values = values.reshape(len(values), -1)
        exact_ints = _objects(column).tolist() if pd.api.types.is_integer_dtype(column.dtype) else None
        present = values[np.isfinite(values)]
        distinct = len(set(exact_ints) - {None}) if exact_ints else len(np.unique(present))
        if distinct < 2:
            return None, "has the same value in every row: not a feature"
        exact = bool((np.abs(present) < 2.0**63).all())
        whole = values.shape[1] == 1 and exact and bool((present == np.floor(present)).all())
        dated = pd.api.types.is_datetime64_any_dtype(column.dtype)
        label = whole and not dated and _LABEL_NAME.search(name) is not None
        if label and _is_label(distinct, len(present)):
            return None, "differs on most rows, like a label: not a feature"
        if not label and (dated or not whole or distinct > FEW):
            feature, note = _numeric(values, at, num_rows)
            return feature, "; ".join(filter(None, (remark, note))) or None
        plain_values = exact_ints or [None if not np.isfinite(v) else int(v) for v in values[:, 0]]
        labels: list[int | str | None] = [None if v is None else int(v) for v in plain_values]
    else:
        labels = [_text(v) for v in _objects(column)]
        if _NAMIBIA in set(_objects(column)) and all(_CODE.fullmatch(str(text)) for text in labels if text is not None):
            labels = [_NAMIBIA if v == _NAMIBIA else text for v, text in zip(_objects(column), labels, strict=True)]
            remark = ": 'NA' is read as a value, like the other two-letter codes"
    present_values = [t for t in labels if t is not None]
    distinct = len(set(present_values))
    if distinct < 2:
        return None, "has the same value in every row: not a feature"
    category = isinstance(column.dtype, pd.CategoricalDtype)
    if values is None and not category and _is_label(distinct, len(present_values)):
        return None, "differs on most rows, like a label: not a feature"
    vocabulary = _vocabulary(present_values)
    out = np.zeros(num_rows, np.int32)
    out[at] = vocabulary.encode(np.array([*labels, None], dtype=object)[:-1])
    return Feature("categorical", out, vocabulary), remark


def _is_label(distinct: int, rows: int) -> bool:
    return distinct > _FEWEST_LABELS and 2 * distinct > rows


def _vocabulary(values: Any) -> Vocabulary:
    distinct = sorted(set(values))
    return Vocabulary(np.array(distinct, dtype=np.int64 if isinstance(distinct[0], int) else object))


def _objects(column: pd.Series) -> np.ndarray:
    """A column as Python objects, None where missing."""
    return column.to_numpy(dtype=object, na_value=None)  # type: ignore[call-overload]  # the stubs leave out None


def _text(value: Any) -> str | None:
    if value is None or value is pd.NA or (isinstance(value, (float, np.generic)) and value != value):
        return None
    text = str(value).strip()
    return None if text in _NO_VALUE else text


def _numbers(column: pd.Series) -> np.ndarray | None:
    """A numeric or date column as float64, nan where missing; None for any other column."""
    if pd.api.types.is_bool_dtype(column.dtype) or isinstance(column.dtype, pd.CategoricalDtype):
        return None
    if pd.api.types.is_datetime64_any_dtype(column.dtype):
        zoneless = column.dt.tz_convert("UTC").dt.tz_localize(None) if column.dt.tz is not None else column
        moments = zoneless.to_numpy()  # counted in their own unit: in nanoseconds far years do not fit
        a_day = 86_400 * {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[np.datetime_data(moments.dtype)[0]]
        return np.where(np.isnat(moments), np.nan, moments.astype(np.int64) / a_day)
    if pd.api.types.is_numeric_dtype(column.dtype):
        return column.to_numpy(dtype=np.float64, na_value=np.nan)
    return None


def _lists(column: pd.Series) -> list[list[Any]] | None:
    """A column of lists, or of text separated by "|", as lists without missing or repeated values; else None."""
    if isinstance(column.dtype, pd.CategoricalDtype) or pd.api.types.is_bool_dtype(column.dtype):
        return None
    values = _objects(column).tolist()
    listed = any(isinstance(v, (list, tuple, set, frozenset, np.ndarray)) for v in values)
    if not listed and not any(isinstance(v, str) and "|" in v for v in values):
        return None
    out: list[list[Any]] = []
    for value in values:
        if isinstance(value, str) or value is None or isinstance(value, float):
            row = [] if not isinstance(value, str) else value.split("|")
        else:
            row = sorted(value, key=str) if isinstance(value, (set, frozenset)) else list(value)
            row = [v for part in row for v in (part if isinstance(part, (list, np.ndarray)) else [part])]
            row = [lists_of_text.name(v) if isinstance(v, dict) else v for v in row]
        if row and all(isinstance(v, (float, np.floating)) for v in row):
            out.append([float(v) for v in row])
        else:
            out.append(list(dict.fromkeys(t for t in map(_text, row) if t is not None)))
    return out


def _spelled_lists(column: pd.Series) -> tuple[list[list[Any]], str] | None:
    """A column of text that clearly holds lists (`lists.split`), and a note on it; None for any other column."""
    if column.dtype != object and not pd.api.types.is_string_dtype(column.dtype):
        return None
    texts = [_text(value) for value in _objects(column)]
    distinct = list(dict.fromkeys(text for text in texts if text is not None))
    if (split := lists_of_text.split(distinct)) is None:
        return None
    values = dict(zip(distinct, split[0], strict=True))
    rows = pd.Series([[] if text is None else values[text] for text in texts], dtype=object)
    lists = _lists(rows)
    return None if lists is None else (lists, f"is {split[1]}: split into its values")


def _dates(column: pd.Series) -> pd.Series | None:
    """A column of ISO 8601 dates in text, as dates in UTC; None for any other column."""
    if column.dtype != object and not pd.api.types.is_string_dtype(column.dtype):
        return None
    texts = [_text(value) for value in _objects(column)]
    if not any(texts) or not all(text is None or _ISO.fullmatch(text) for text in texts):
        return None
    dates = pd.to_datetime(pd.Series(texts, dtype=object), format="ISO8601", utc=True, errors="coerce")
    return None if any(date is pd.NaT and text for date, text in zip(dates, texts, strict=True)) else dates


def _multi(lists: list[list[Any]], at: np.ndarray, num_rows: int) -> tuple[Feature | None, str | None]:
    lists = [[str(v) for v in row] for row in lists]
    distinct = {value for row in lists for value in row}
    if len(distinct) < 2 or len({tuple(row) for row in lists}) < 2:
        return None, "has the same value in every row: not a feature"
    longest = max(map(len, lists))
    width = min(longest, MAX_VALUES)
    vocabulary = _vocabulary(distinct)
    lengths = np.array([min(len(row), width) for row in lists])
    flat = vocabulary.encode(np.array([v for row in lists for v in row[:width]] + [None], dtype=object)[:-1])
    slot = np.arange(len(flat)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    out = np.zeros((num_rows, width), np.int32)
    out[np.repeat(at, lengths), slot] = flat
    cut = sum(len(row) > width for row in lists)
    note = f"has up to {longest} values per row: the first {width} are kept ({cut} rows truncated)" if cut else None
    return Feature("multi", out, vocabulary), note


def _numeric(values: np.ndarray, at: np.ndarray, num_rows: int) -> tuple[Feature | None, str | None]:
    infinite = np.isinf(values)
    values = np.where(infinite, np.nan, values)
    peak = np.nanmax(np.abs(values), initial=0.0)
    peak = peak if peak > 1e100 else 1.0  # squares of larger values overflow
    values = values / peak
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a part of the vectors of which no value is known
        spread, middle = np.nanstd(values, axis=0), np.nanmean(values, axis=0)
    spread = np.where(spread > 0, spread, 1.0)
    scaled = (values - middle) / spread
    out = np.zeros((num_rows, values.shape[1]), np.float32)
    out[at] = np.nan_to_num(scaled)
    note = f"has {int(infinite.sum())} infinite values: read as missing" if infinite.any() else None
    units = np.nan_to_num(np.stack([middle, spread], 1)) * peak
    return Feature("numeric", out, units=tuple((float(m), float(s)) for m, s in units)), note
