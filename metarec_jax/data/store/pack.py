"""The flat arrays of a task store, made and checked from its Parquet half: the last step of `data.store.prepare`.

Any SQL engine may write the Parquet half; `metarec_jax.data.store.opened` describes it.
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
    folder: Path,
    *,
    name: str,
    notes: Sequence[str] = (),
    progress: Callable[[str, int], None] = lambda what, done: None,
) -> dict[str, Any]:
    """Write the flat arrays of the store in ``folder``, and last ``store.json``, which completes the store.

    Args:
      progress: called with the part being read ("users", "items", "histories") and the number of its entries so far.

    Returns:
      The content of ``store.json``.

    Raises:
      MetarecError: rows are not 1, 2, 3, ..., ids do not ascend, a user has no history, items are outside the
        vocabulary, ratings are not finite, or times do not ascend; the message names the user.
    """
    (folder / FILE).unlink(missing_ok=True)
    names = ["users", "items", "starts", "events", "times"]
    digests = {name: hashlib.sha256() for name in names}  # one per file: the digest must not depend on batch sizes
    with (folder / "hashes.bin").open("wb") as file:
        users = 0
        for ids in _vocabulary(folder / "users", digests["users"]):
            file.write(_hashes(ids).astype("<u8").tobytes())
            progress("users", users := users + len(ids))
    items = 0
    for ids in _vocabulary(folder / "items", digests["items"]):
        progress("items", items := items + len(ids))
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
            sizes, lists = _histories(batch, done, items)
            item = lists["items"].astype("<i4")
            events = item[:, None]
            if rated:
                rating = lists["ratings"].astype("<f4")
                low, high = min(low, float(rating.min())), max(high, float(rating.max()))
                events = np.stack([item, rating.view("<i4")], axis=1)
            untimed += int((lists["times"] == NO_TIME).sum()) if timed else 0
            ends = total + np.cumsum(sizes)
            arrays = {"starts": ends.astype("<i8"), "events": events}
            for which, array in (arrays | ({"times": lists["times"].astype("<i8")} if timed else {})).items():
                files[which].write(np.ascontiguousarray(array).data)
                digests[which].update(np.ascontiguousarray(array).data)
            np.add.at(counts, item, 1)
            longest, done, total = max(longest, int(sizes.max())), done + len(sizes), int(ends[-1])
            progress("histories", total)
    finally:
        for file in files.values():
            file.close()
    if done != users:
        raise MetarecError(
            f"{folder / 'histories'} has {done} users, and the vocabulary has {users}. Write both from one table"
        )
    (folder / "counts.bin").write_bytes(counts.astype("<i8").tobytes())
    header = {
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
    write_atomically(folder / FILE, json.dumps(header, indent=1) + "\n")
    return header


def _singles(folder: Path, users: int) -> list[str]:
    starts = np.memmap(folder / "starts.bin", "<i8", "r")
    parts = (starts[k : k + (1 << 20) + 1] for k in range(0, users, 1 << 20))
    singles = sum(int((np.diff(part) == 1).sum()) for part in parts)
    note = f"{singles} of {users} users have a single interaction: kept, but too few to adapt and test on"
    return [note] if singles else []


def _vocabulary(folder: Path, digest: Any) -> Iterator[np.ndarray]:
    """The ids of a vocabulary in parts, checked."""
    done, before = 0, None
    for batch in batches(folder, ["row", "id"], _IDS):
        row, ids = batch.column(0), batch.column(1)
        if not len(ids):
            continue
        if not (pa.types.is_int64(ids.type) or pa.types.is_string(ids.type) or pa.types.is_large_string(ids.type)):
            raise MetarecError(f"{folder}: expected ids of 64-bit integers or text, got {ids.type}. Cast them")
        if row.null_count or not np.array_equal(row.to_numpy(), np.arange(done + 1, done + len(row) + 1)):
            raise MetarecError(
                f"{folder}: the rows are not 1, 2, 3, ... across the files. Number the ids in their order"
            )
        ascending = ids.null_count == 0 and pc.all(pc.greater(ids[1:], ids[:-1]), min_count=0).as_py()
        if not ascending or (before is not None and not pc.greater(ids[0], before).as_py()):
            raise MetarecError(
                f"{folder}: the ids do not ascend (near row {done + 1}, {shown(ids[0].as_py())}). Sort them, text by "
                "its UTF-8 bytes, without missing values"
            )
        before, values = ids[-1], ids.to_numpy(zero_copy_only=False)
        digest.update(_hashes(values).astype("<u8").tobytes())
        done += len(row)
        yield values
    if not done:
        raise MetarecError(f"{folder} is empty, expected a vocabulary. Write the store again")
    if done > 2**31 - 2:
        raise MetarecError(f"{folder} has {done} ids, and rows are 32-bit integers. Remove the rarest ids")


def _hashes(ids: np.ndarray) -> np.ndarray:
    """uint64 hashes that depend only on the ids: the same in every store and process."""
    return pd.util.hash_array(ids, categorize=False)


def _histories(batch: pa.RecordBatch, done: int, items: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The number of interactions of each user of a batch, and the flat columns of all of them, checked.

    Args:
      done: number of users before this batch; items: size of the vocabulary of items.
    """
    user = batch.column(0).to_numpy(zero_copy_only=False)
    place = f"the histories of users {done + 1} to {done + len(user)}"
    if not np.array_equal(user, np.arange(done + 1, done + len(user) + 1)):
        raise MetarecError(
            f"{place}: their rows are not consecutive across the files. Write one row per user, in order"
        )
    lists, sizes = {}, None
    for name, column in zip(batch.schema.names[1:], batch.columns[1:], strict=True):
        if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
            raise MetarecError(f"{place}: {name}: expected a list, got {column.type}. Write one list per user")
        lengths = pc.list_value_length(column)
        values = column.flatten()
        if lengths.null_count or values.null_count:
            raise MetarecError(f"{place}: {name} has missing values. Remove such interactions")
        lengths = lengths.to_numpy(zero_copy_only=False).astype(np.int64)
        if sizes is not None and (bad := np.flatnonzero(lengths != sizes)).size:
            at = bad[0]
            raise MetarecError(
                f"{place}: user row {user[at]} has {sizes[at]} items and {lengths[at]} {name}. Make them equally long"
            )
        sizes, lists[name] = lengths, values.to_numpy(zero_copy_only=False)
    assert sizes is not None
    ends = np.cumsum(sizes)
    if (empty := np.flatnonzero(sizes == 0)).size:
        raise MetarecError(f"{place}: user row {user[empty[0]]} has no interaction. Remove such users")

    def refuse(bad: np.ndarray, what: Callable[[int], str]) -> None:
        if bad.any():
            at = int(np.argmax(bad))
            raise MetarecError(f"{place}: user row {user[np.searchsorted(ends, at, side='right')]} has {what(at)}")

    item = lists["items"]
    if item.dtype.kind not in "iu":
        raise MetarecError(f"{place}: items: expected rows of the vocabulary, got {item.dtype}. Join the vocabulary")
    refuse(
        (item < 1) | (item > items), lambda at: f"item row {item[at]}; rows are 1 to {items}. Join the vocabulary again"
    )
    if (rating := lists.get("ratings")) is not None:
        refuse(~np.isfinite(rating.astype(np.float32)), lambda at: f"rating {rating[at]}. Remove such interactions")
    if (time := lists.get("times")) is not None:
        falls = np.append(False, time[1:] < time[:-1])
        falls[ends[:-1]] = False
        refuse(falls, lambda at: f"times that do not ascend ({time[at - 1]}, {time[at]}). Sort each list by time")
    return sizes, lists
