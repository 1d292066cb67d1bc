"""Ids of any source as codes: exact and sorted; ids that a float has rounded are refused."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from metarec_jax.core import MetarecError
from metarec_jax.data.io.columns import MISSING, distinct_values
from metarec_jax.data.io.spelling import EXACT, is_integer, number, was_rounded, whole
from metarec_jax.messages import shown


class Coded(NamedTuple):
    """A column of ids as codes. ``codes`` int32 ``[N]``, -1 where missing; ``ids`` ``[n]`` sorted, int64 or text."""

    codes: np.ndarray
    ids: np.ndarray
    notes: tuple[str, ...] = ()

    def shown(self, code: int) -> str:
        """An id as a message shows it: text in quotes."""
        return shown(self.ids[[code]].tolist()[0])


def code_ids(column: pd.Series, *, spelled: bool = False, name: str = "id") -> Coded:
    """Sorted distinct ids of a column, and the position of each row's id among them.

    Integers stay integers; text stays text, stripped of blanks. Whole floats (pandas' form of integers with missing
    values) become integers again. A mixture becomes text, with a note.

    Args:
      column: ``[N]``, of any dtype.
      spelled: the values come from a text file: they are integers if every one is spelled as an integer without leading
        zeros, with or without a decimal point ("26.0").
      name: name of the column, for notes.

    Raises:
      MetarecError: a float has rounded an id, so that several may coincide; or an id is bytes that are not UTF-8.

    >>> code_ids(pd.Series(["b", "a", None, "b"]))
    Coded(codes=array([ 1,  0, -1,  1], dtype=int32), ids=array(['a', 'b'], dtype=object), notes=())
    """
    if isinstance(column.dtype, np.dtype) and column.dtype.kind in "iu" and len(column):
        values = column.to_numpy()
        low, high = int(values.min()), int(values.max())
        if high < 2**63 and high - low < max(4 * len(values), 1 << 20):
            return _code_dense(values, low, high)
    codes, distinct = distinct_values(column, name)
    refuse_rounded(distinct, name, float_bits(column.dtype))
    try:
        names = [id_of(value) for value in distinct]
    except UnicodeDecodeError as error:
        raise MetarecError(
            f"column {shown(name)}: the id {shown(error.object)} is not UTF-8 text. Write it as text"
        ) from error
    texts = [n for n in names if isinstance(n, str)]
    notes: tuple[str, ...] = ()
    present = len(names) - names.count(None)
    if spelled and len(texts) == present and not all(map(is_integer, texts)) and None not in map(whole, texts):
        such = next(text for text in texts if not is_integer(text))
        notes = (
            f"column {shown(name)}: whole numbers with a decimal point, such as {shown(such)}, are read as integers",
        )
        names = [whole(n) if isinstance(n, str) else n for n in names]
        texts = []
    as_integers = not texts or (spelled and len(texts) == present and all(map(is_integer, texts)))
    if as_integers and all(n is None or -(2**63) <= int(n) < 2**63 for n in names):
        typed: list[Any] = [None if n is None else int(n) for n in names]
    else:
        typed = [None if n is None else str(n) for n in names]
        spelled_numbers = sum(map(is_integer, texts)) if spelled else present - len(texts)
        if 0 < spelled_numbers < present:
            notes = (f"column {shown(name)} mixes numbers ({spelled_numbers} ids) and text: all ids are kept as text",)
    kept = [n for n in typed if n is not None]
    dtype = np.int64 if kept and isinstance(kept[0], int) else object
    ids, inverse = np.unique(np.array(kept, dtype=dtype), return_inverse=True)
    lookup = np.full(len(typed) + 1, -1, np.int32)  # the last entry is that of code -1
    lookup[[k for k, n in enumerate(typed) if n is not None]] = inverse
    return Coded(lookup[codes], ids, notes)


def refuse_rounded(values: Sequence[Any], name: str, bits: int = EXACT) -> None:
    """Refuse ids that a float has rounded; text only if all of it is numbers.

    Raises:
      MetarecError: a float has rounded an id; the message names the first one.
    """
    bad = next((v for v in values if was_rounded(v, bits)), None)
    if isinstance(bad, str):
        if all(not isinstance(v, str) or v.strip() in MISSING or number(v) is not None for v in values):
            raise MetarecError(
                f"column {shown(name)}: the id {shown(bad)} was rounded when its file was written, and other ids with "
                "it. Write the column again as text or as whole numbers, without powers of ten"
            )
    elif bad is not None:
        raise MetarecError(
            f"column {shown(name)}: the id {shown(bad)} was rounded: a float cannot distinguish ids from {2**bits} on. "
            "Read the column again as int64 (Int64 if some are missing) or as text"
        )


def float_bits(dtype: Any) -> int:
    """Bits of the integers that a dtype represents exactly."""
    if isinstance(dtype, pd.CategoricalDtype):
        dtype = getattr(dtype, "categories", pd.Index([])).dtype
    plain_dtype = getattr(dtype, "numpy_dtype", dtype)
    is_float = isinstance(plain_dtype, np.dtype) and plain_dtype.kind == "f"
    return np.finfo(plain_dtype).nmant + 1 if is_float else EXACT


def _code_dense(values: np.ndarray, low: int, high: int) -> Coded:
    if low < 0 or high >= max(4 * len(values), 1 << 20):
        values = values.astype(np.int64) - low  # in 8 or 16 bits the difference would wrap
        high -= low
        shift = low
    else:
        shift = 0
    seen = np.zeros(high + 1, bool)
    seen[values] = True
    lookup = np.cumsum(seen, dtype=np.int32)
    lookup -= 1
    return Coded(lookup[values], np.flatnonzero(seen).astype(np.int64) + shift)


def id_of(value: Any) -> str | int | None:
    """An id as text or integer; None if it is missing. Bytes are decoded as UTF-8.

    Raises:
      UnicodeDecodeError: the bytes are not UTF-8.
    """
    if isinstance(value, bytes):
        value = value.decode()
    if isinstance(value, str):
        value = value.strip()
        return None if value in MISSING else value
    if isinstance(value, (bool, np.bool_)):
        return str(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return None if np.isnan(value) else int(value) if float(value).is_integer() else str(value)
    if isinstance(value, Decimal) and value.is_finite() and value == value.to_integral_value():
        return int(value)
    return None if value is None or value is pd.NA or value is pd.NaT else str(value)
