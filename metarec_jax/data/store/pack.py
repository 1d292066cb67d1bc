"""The flat arrays of a task store, made of its Parquet half and checked: the last step of `data.store.prepare`.

The Parquet half may have been written by any SQL engine; `metarec_jax.data.store.opened` says what it holds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from metarec_jax.core import MetarecError
from metarec_jax.data.interactions import NO_TIME
from metarec_jax.data.io import parquet
from metarec_jax.data.store.opened import FILE, FORMAT, VERSION, batches
from metarec_jax.files import sha256, write_atomically
from metarec_jax.messages import shown

_IDS = 1 << 17
_USERS = 1 << 10


def pack(
    folder: Path, *, name: str, notes: Sequence[str] = (), tell: Callable[[str, int], None] = lambda what, done: None
) -> dict[str, Any]:
    """Write the flat arrays of the store in ``folder``, and ``store.json`` last: without it there is no store.

    Args:
      tell: called with what is being read ("users", "items", "histories") and how much of it so far.

    Returns:
      What ``store.json`` holds.

    Raises:
      MetarecError: rows that are not 1, 2, 3, ..., ids that do not ascend, a user without a history, items outside
        the vocabulary, ratings that are not finite, times that do not ascend; the user is named.
    """
    (folder / FILE).unlink(missing_ok=True)
    names = ["users", "items", "starts", "events", "times"]
    digests = {name: hashlib.sha256() for name in names}  # one each: how the files are read in parts must not count
    with (folder / "hashes.bin").open("wb") as file:
        users = 0
        for ids in _vocabulary(folder / "users", digests["users"]):
            file.write(_hashes(ids).astype("<u8").tobytes())
            tell("users", users := users + len(ids))
    items = 0
    for ids in _vocabulary(folder / "items", digests["items"]):
        tell("items", items := items + len(ids))
    columns = parquet.columns(next(iter(sorted((folder / "histories").glob("*.parquet"))), folder / "histories"))
    rated, timed = ("ratings" in columns), ("times" in columns)
    counts = np.zeros(items + 1, np.int64)
    starts = np.zeros(1, np.int64)
    low, high, longest, done, total, untimed = np.inf, -np.inf, 0, 0, 0, 0
    wanted = ["user", "items", *(["ratings"] if rated else []), *(["times"] if timed else [])]
    files = {n: (folder / f"{n}.bin").open("wb") for n in ["starts", "events", *(["times"] if timed else [])]}
    try:
        files["starts"].write(starts.astype("<i8").tobytes())
        for batch in batches(folder / "histories", wanted, _USERS):
            sizes, found = _histories(batch, done, items)
            item = found["items"].astype("<i4")
            events = item[:, None]
            if rated:
                rating = found["ratings"].astype("<f4")
                low, high = min(low, float(rating.min())), max(high, float(rating.max()))
                events = np.stack([item, rating.view("<i4")], axis=1)
            untimed += int((found["times"] == NO_TIME).sum()) if timed else 0
            ends = total + np.cumsum(sizes)
            arrays = {"starts": ends.astype("<i8"), "events": events}
            for which, array in (arrays | ({"times": found["times"].astype("<i8")} if timed else {})).items():
                files[which].write(np.ascontiguousarray(array).data)
                digests[which].update(np.ascontiguousarray(array).data)
            np.add.at(counts, item, 1)
            longest, done, total = max(longest, int(sizes.max())), done + len(sizes), int(ends[-1])
            tell("histories", total)
    finally:
        for file in files.values():
            file.close()
    if done != users:
        raise MetarecError(
            f"{folder / 'histories'} has {done} users, and the vocabulary {users}. Write both of one table"
        )
    (folder / "counts.bin").write_bytes(counts.astype("<i8").tobytes())
    told = {
        "format": FORMAT,
        "version": VERSION,
        "name": name,
        "users": users,
        "items": items,
        "interactions": total,
        "ratings": [low, high] if rated else None,
        "timestamps": timed,
        "untimed": untimed,
        "longest": longest,
        "digest": sha256("".join(digests[n].hexdigest() for n in names).encode()),
        "notes": [*notes, *_singles(folder, users)],
    }
    write_atomically(folder / FILE, json.dumps(told, indent=1) + "\n")
    return told


def _singles(folder: Path, users: int) -> list[str]:
    starts = np.memmap(folder / "starts.bin", "<i8", "r")
    parts = (starts[k : k + (1 << 20) + 1] for k in range(0, users, 1 << 20))
    singles = sum(int((np.diff(part) == 1).sum()) for part in parts)
    said = f"{singles} of {users} users have a single interaction: kept, but too few to adapt and test on"
    return [said] if singles else []


def _vocabulary(folder: Path, digest: Any) -> Iterator[np.ndarray]:
    """The ids of a vocabulary, checked, part by part."""
    done, before = 0, None
    for batch in batches(folder, ["row", "id"], _IDS):
        row, ids = batch.column(0), batch.column(1)
        if not len(ids):
            continue
        if not (pa.types.is_int64(ids.type) or pa.types.is_string(ids.type) or pa.types.is_large_string(ids.type)):
            raise MetarecError(f"{folder}: ids of type {ids.type}, and 64-bit integers or text were wanted. Cast them")
        if row.null_count or not np.array_equal(row.to_numpy(), np.arange(done + 1, done + len(row) + 1)):
            raise MetarecError(
                f"{folder}: the rows are not 1, 2, 3, ... from file to file. Number the ids in their order"
            )
        ascending = ids.null_count == 0 and pc.all(pc.greater(ids[1:], ids[:-1]), min_count=0).as_py()
        if not ascending or (before is not None and not pc.greater(ids[0], before).as_py()):
            raise MetarecError(
                f"{folder}: the ids do not ascend (near row {done + 1}, {shown(ids[0].as_py())}). Sort them, text by "
                "its UTF-8 bytes, and leave none out"
            )
        before, values = ids[-1], ids.to_numpy(zero_copy_only=False)
        digest.update(_hashes(values).astype("<u8").tobytes())
        done += len(row)
        yield values
    if not done:
        raise MetarecError(f"{folder} is empty, and a vocabulary was wanted. Write the store again")
    if done > 2**31 - 2:
        raise MetarecError(f"{folder} has {done} ids, and rows are 32 bits. Leave the rarest out")


def _hashes(ids: np.ndarray) -> np.ndarray:
    """uint64, of the ids alone: the same in every store and process."""
    return pd.util.hash_array(ids, categorize=False)


def _histories(batch: pa.RecordBatch, done: int, items: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """How many interactions each user of a batch has, and the columns of them all, checked.

    Args:
      done: users before this batch; items: of the vocabulary.
    """
    user = batch.column(0).to_numpy(zero_copy_only=False)
    where = f"the histories of users {done + 1} to {done + len(user)}"
    if not np.array_equal(user, np.arange(done + 1, done + len(user) + 1)):
        raise MetarecError(f"{where}: their rows are not consecutive from file to file. Write one row a user, in order")
    found, sizes = {}, None
    for name, column in zip(batch.schema.names[1:], batch.columns[1:], strict=True):
        if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
            raise MetarecError(f"{where}: {name} is {column.type}, and a list was wanted. Write one list a user")
        lengths = pc.list_value_length(column)
        values = column.flatten()
        if lengths.null_count or values.null_count:
            raise MetarecError(f"{where}: {name} has missing values. Leave such interactions out")
        lengths = lengths.to_numpy(zero_copy_only=False).astype(np.int64)
        if sizes is not None and (bad := np.flatnonzero(lengths != sizes)).size:
            at = bad[0]
            raise MetarecError(
                f"{where}: user row {user[at]} has {sizes[at]} items and {lengths[at]} {name}. Write as many of each"
            )
        sizes, found[name] = lengths, values.to_numpy(zero_copy_only=False)
    assert sizes is not None
    ends = np.cumsum(sizes)
    if (empty := np.flatnonzero(sizes == 0)).size:
        raise MetarecError(f"{where}: user row {user[empty[0]]} has no interaction. Leave such users out")

    def refuse(bad: np.ndarray, what: Callable[[int], str]) -> None:
        if bad.any():
            at = int(np.argmax(bad))
            raise MetarecError(f"{where}: user row {user[np.searchsorted(ends, at, side='right')]} has {what(at)}")

    item = found["items"]
    if item.dtype.kind not in "iu":
        raise MetarecError(f"{where}: items are {item.dtype}, and rows of the vocabulary were wanted. Join its rows in")
    refuse(
        (item < 1) | (item > items), lambda at: f"item row {item[at]}; rows are 1 to {items}. Join the rows in again"
    )
    if (rating := found.get("ratings")) is not None:
        refuse(~np.isfinite(rating.astype(np.float32)), lambda at: f"rating {rating[at]}. Leave such interactions out")
    if (time := found.get("times")) is not None:
        falls = np.append(False, time[1:] < time[:-1])
        falls[ends[:-1]] = False
        refuse(falls, lambda at: f"times that do not ascend ({time[at - 1]}, {time[at]}). Sort each list by time")
    return sizes, found
