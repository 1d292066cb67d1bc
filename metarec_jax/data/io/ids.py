"""Ids of any source as codes: exact, sorted, and refused where a float has rounded them."""

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
    """Sorted distinct ids of a column, and each row's position among them.

    Integers stay integers; text stays text, without blanks around it. Whole floats (what pandas makes of integers when
    some are missing) become integers again. A mixture becomes text, and a note says so.

    Args:
      column: ``[N]``, of any dtype.
      spelled: the values come from a text file: integers if every one is spelled as one without leading zeros, with or
        without a decimal point ("26.0").
      name: of the column, for notes.

    Raises:
      MetarecError: an id was rounded by a float, so that several may have become one; or is bytes that are not UTF-8.

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
            f"column {shown(name)}: the id {shown(error.object)} is bytes that are not UTF-8 text. Write it as text"
        ) from error
    texts = [n for n in names if isinstance(n, str)]
    notes: tuple[str, ...] = ()
    given = len(names) - names.count(None)
    if spelled and len(texts) == given and not all(map(is_integer, texts)) and None not in map(whole, texts):
        such = next(text for text in texts if not is_integer(text))
        notes = (
            f"column {shown(name)}: whole numbers with a decimal point, such as {shown(such)}, are read as integers",
        )
        names = [whole(n) if isinstance(n, str) else n for n in names]
        texts = []
    as_integers = not texts or (spelled and len(texts) == given and all(map(is_integer, texts)))
    if as_integers and all(n is None or -(2**63) <= int(n) < 2**63 for n in names):
        known: list[Any] = [None if n is None else int(n) for n in names]
    else:
        known = [None if n is None else str(n) for n in names]
        spelled_numbers = sum(map(is_integer, texts)) if spelled else given - len(texts)
        if 0 < spelled_numbers < given:
            notes = (f"column {shown(name)} mixes numbers ({spelled_numbers} ids) and text: all ids are kept as text",)
    kept = [n for n in known if n is not None]
    dtype = np.int64 if kept and isinstance(kept[0], int) else object
    ids, inverse = np.unique(np.array(kept, dtype=dtype), return_inverse=True)
    lookup = np.full(len(known) + 1, -1, np.int32)  # the last one answers code -1
    lookup[[k for k, n in enumerate(known) if n is not None]] = inverse
    return Coded(lookup[codes], ids, notes)


def refuse_rounded(values: Sequence[Any], name: str, bits: int = EXACT) -> None:
    """Refuse ids that a float has rounded; text only where all of it is numbers.

    Raises:
      MetarecError: naming the first such id.
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
            f"column {shown(name)}: the id {shown(bad)} was rounded: a float tells ids from {2**bits} on no longer "
            "apart. Read the column again as int64 (Int64 where some are missing) or as text"
        )


def float_bits(dtype: Any) -> int:
    """Bits of the integers that values of a dtype hold exactly, as floats do."""
    of_values = getattr(dtype, "categories", pd.Index([])).dtype if isinstance(dtype, pd.CategoricalDtype) else dtype
    plain_dtype = getattr(of_values, "numpy_dtype", of_values)
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
    """An id as text or integer; None where there is none. Bytes are UTF-8 text.

    Raises:
      UnicodeDecodeError: bytes that are not.
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
