"""The file of a published partition: a table of interactions with the state of each row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from metarec_jax.core import MetarecError
from metarec_jax.data.interactions import Interactions, Vocabulary
from metarec_jax.data.io import bounds, formats, parquet
from metarec_jax.data.io.columns import find_column, numbers, seconds
from metarec_jax.data.io.ids import Coded, code_ids
from metarec_jax.data.splits import Split, by_state
from metarec_jax.messages import listed, shown

_STATE_NAMES = ("state", "scenario", "split", "partition", "part", "subset")
_STATES = {
    "warm": "train",
    "warm_up": "train",
    "train": "train",
    "meta_training": "train",
    "user_cold": "user_cold",
    "item_cold": "item_cold",
    "both_cold": "both_cold",
    "user_and_item_cold": "both_cold",
}


@bounds.fits
def read_states(
    path: Path, data: Interactions | None = None, state_col: str | None = None
) -> tuple[Interactions, np.ndarray, int]:
    """The rows of a partition file, the part of each ("train" or a scenario), and the number of rows not in ``data``.

    Args:
      path: a Parquet file or delimited text with a header.
      data: supplies the vocabularies and features; None: the ids of the file, sorted.
      state_col: the column of states; None: the first named state, scenario, split, ..., or ending in ``_state``.

    Raises:
      MetarecError: no such file, column or state; a missing value; or ids that do not match those of ``data``.
    """
    dialect = None if formats.kind(path) == "parquet" else formats.sniff(path)
    if dialect is not None and not dialect.header:
        raise MetarecError(f"{path} has no header, so its columns have no names. Add one as its first line")
    names = parquet.columns(path) if dialect is None else list(dialect.names)
    role = {r: find_column(names, r, None, path.name) for r in ("user", "item", "rating", "timestamp")}
    state = state_col or next((c for c in names if c.lower() in _STATE_NAMES or c.lower().endswith("_state")), None)
    wanted = {"user": role["user"], "item": role["item"], "state": state}
    if missing := [r for r, column in wanted.items() if column not in names]:
        raise MetarecError(f"{path} has no column for {', '.join(missing)}, only {listed(names)}; rename the columns")
    needed = [c for c in dict.fromkeys([*wanted.values(), *role.values()]) if c is not None]
    if dialect is None:
        frame = parquet.read(path, needed)
    else:
        text = pa.dictionary(pa.int32(), pa.string())
        frame = formats.read_columns(path, dialect, {c: pa.float32() if c == role["rating"] else text for c in needed})
    if not len(frame):
        raise MetarecError(f"{path} has no rows, expected one row per interaction. Check the file")

    def where(row: int) -> str:
        return formats.place(path, dialect, row)

    values: dict[str, np.ndarray] = {}
    blank: dict[str | None, np.ndarray] = {}
    if role["rating"] is not None:
        values["rating"] = numbers(frame[role["rating"]], role["rating"], where)
        blank[role["rating"]] = np.isnan(values["rating"])
    if role["timestamp"] is not None:
        values["timestamp"], blank[role["timestamp"]], _ = seconds(frame[role["timestamp"]], role["timestamp"], where)
    coded = {r: code_ids(frame[c], spelled=dialect is not None, name=str(c)) for r, c in wanted.items()}
    blank |= {column: coded[r].codes < 0 for r, column in wanted.items()}
    for column, gone in blank.items():
        if gone.any():
            raise MetarecError(
                f"{where(int(np.argmax(gone)))}, column {shown(column)}, has no value; fill it in or delete the row"
            )
    parts = _parts(path, str(state), coded["state"])
    user, item = coded["user"], coded["item"]
    if data is None:
        nothing = np.zeros(0, np.int32)
        data = Interactions(nothing, nothing, None, None, Vocabulary(user.ids), Vocabulary(item.ids), name=path.stem)
    rows = {"user": _rows(path, "user", user, data.users), "item": _rows(path, "item", item, data.items)}
    kept = (rows["user"] > 0) & (rows["item"] > 0)
    rating, timestamp = (values[r][kept] if r in values else None for r in ("rating", "timestamp"))
    table = replace(data, user=rows["user"][kept], item=rows["item"][kept], rating=rating, timestamp=timestamp)
    return table, parts[kept], int((~kept).sum())


def _parts(path: Path, column: str, state: Coded) -> np.ndarray:
    parts = [_STATES.get(str(s).lower().removesuffix("_state")) for s in state.ids.tolist()]
    if unknown := [s for s, part in zip(state.ids.tolist(), parts, strict=True) if part is None]:
        raise MetarecError(f"{path}: {shown(column)} has {listed(unknown, 5)}; known states are {', '.join(_STATES)}")
    return np.array(parts)[state.codes]


def _rows(path: Path, side: str, coded: Coded, vocabulary: Vocabulary) -> np.ndarray:
    """The row of each id in the vocabulary; 0 if it is not in it."""
    rows = vocabulary.encode(coded.ids)
    if not rows.any():
        raise MetarecError(
            f"no {side} of {path.name}, such as {coded.shown(0)}, is in the data, which has ids such as "
            f"{shown(vocabulary.ids.tolist()[0])}; use data with the ids of the partition, or data=None"
        )
    return rows[coded.codes]


def read_partition(
    path: str | Path,
    data: Interactions | None = None,
    *,
    state_col: str | None = None,
    validation: float = 0.1,
    seed: int = 0,
) -> Split:
    """Read a published partition: a table of user, item, rating and state of each row, such as MeLU's of ML-1M.

    States are named warm, user_cold, item_cold and both_cold, or user_and_item_cold, with or without ``_state``. The
    warm state is the training part. ``validation`` is the fraction of its users, and of its items, that is moved from
    training to the validation scenarios that the file has tests for; 0 keeps all warm rows in training. Test parts stay
    as published, including items that are not in training.

    Args:
      path: a Parquet file, or delimited text with a header.
      data: supplies vocabularies and features, with the ids of the file; rows with other ids are dropped and counted.
        None: the ids of the file, sorted.
      state_col: the column of states; default: the first named state, scenario, split, ..., or ending in ``_state``.

    Raises:
      MetarecError: no such file or column, an unknown state, no warm rows, or ids that do not match those of ``data``.

    Source: Lee et al., "MeLU: Meta-Learned User Preference Estimator for Cold-Start Recommendation", KDD 2019.
    """
    if not 0 <= validation < 1:
        raise MetarecError(
            f"validation, a fraction of the warm users, must be at least 0 and below 1, got {validation}"
        )
    table, state, unknown = read_states(Path(path), data, state_col)
    dropped = {"rows with ids that the data lacks": unknown} if unknown else {}
    return by_state(table, state, validation=validation, seed=seed, source=str(path), dropped=dropped)
