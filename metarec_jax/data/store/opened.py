"""A task store: the histories of users in files, for data larger than memory. Opened, read user by user, loaded.

A store is a folder; docs/data_larger_than_memory.md describes it. Its portable half is Parquet, which SQL can write:

- ``users/*.parquet``, ``items/*.parquet``: ``row`` (1, 2, ..) and ``id`` (ascending), the vocabularies;
- ``histories/*.parquet``: one row a user: ``user``, and the lists ``items``, ``ratings``, ``times``, in time order.

What is streamed from are flat little-endian arrays made of it (`metarec_jax.data.store.pack`), N interactions of U
users:

- ``starts.bin`` int64 ``[U + 1]``: the interactions of user row u are ``starts[u - 1] .. starts[u] - 1``;
- ``events.bin`` int32 ``[N, 2]``: item row, and the rating, a float32 by its bits; ``[N, 1]`` for implicit feedback;
- ``times.bin`` int64 ``[N]``: seconds, where there are such (`NO_TIME` where one is not known);
- ``counts.bin`` int64 ``[items + 1]``: interactions of each item row;
- ``hashes.bin`` uint64 ``[U]``: of the users' ids, which decide who is held out;
- ``store.json``: counts, and the digest of all these.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from metarec_jax.core import Column, MetarecError
from metarec_jax.data.interactions import Feature, Interactions, Vocabulary
from metarec_jax.data.io import bounds, layouts, parquet
from metarec_jax.data.io.features import side_features
from metarec_jax.messages import one_line

FORMAT, VERSION = "metarec_jax task store", 1
FILE = "store.json"
_IDS = 1 << 17


class File:
    """Bytes of a file at any place, read without moving a pointer, so that threads may share it; closed when forgotten.

    Not mapped into memory: pages that were read are the system's cache, not this process's.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._descriptor = path, os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, places: Sequence[tuple[int, int]]) -> np.ndarray:
        """The bytes of several places ``(first, size)``, one after the other, uint8.

        The system is told of all places before the first is read, so that it fetches them together.

        Raises:
          MetarecError: the file ends before.
        """
        out = np.empty(sum(size for _, size in places), np.uint8)
        if hasattr(os, "posix_fadvise"):
            for first, size in places:
                os.posix_fadvise(self._descriptor, first, size, os.POSIX_FADV_WILLNEED)
        view, done = memoryview(out.data), 0
        for first, size in places:
            end = done + size
            while done < end:
                got = os.preadv(self._descriptor, [view[done:end]], first + size - (end - done))
                if not got:
                    raise MetarecError(f"{self.path} ends before its last interaction. Prepare the store again")
                done += got
        return out


class Store(NamedTuple):
    """A store, opened.

    Attributes:
      users, items, interactions: how many.
      ratings: the least and the greatest; None for implicit feedback.
      timestamps: whether it has times; untimed: interactions that have none all the same.
      longest: interactions of the user who has most.
      digest: sha256 of all that is streamed: the same digest, the same data.
      starts: int64 ``[users + 1]``, mapped from its file.
      events: where histories are read.
      user_features, item_features, titles: as in `Interactions`, where files of them were given.
    """

    path: Path
    name: str
    users: int
    items: int
    interactions: int
    ratings: tuple[float, float] | None
    timestamps: bool
    longest: int
    digest: str
    notes: tuple[str, ...]
    starts: np.ndarray
    events: File
    user_features: Mapping[str, Feature] = MappingProxyType({})
    item_features: Mapping[str, Feature] = MappingProxyType({})
    titles: np.ndarray | None = None
    untimed: int = 0

    @property
    def implicit(self) -> bool:
        return self.ratings is None

    @property
    def width(self) -> int:
        """Numbers that an interaction has in ``events.bin``."""
        return 1 if self.ratings is None else 2

    @property
    def columns(self) -> dict[str, Column]:
        """The input columns of a model, as `Interactions.columns`; the table of users has the unknown row alone.

        Where tasks carry the users' own rows, take ``columns | {"user_id": Column("id", store.users + 1)}``.
        """
        out = {"user_id": Column("id", 1)} | {name: f.column for name, f in self.user_features.items()}
        out["item_id"] = Column("id", self.items + 1)
        return out | {name: f.column for name, f in self.item_features.items()}

    @property
    def bytes_in_memory(self) -> int:
        """What `load` and `metarec_jax.data.draw.task_source` take at their peak, about: 80 bytes an interaction."""
        return 80 * self.interactions + 200 * (self.users + self.items)


def is_store(path: str | Path) -> bool:
    """Whether a path is a folder that holds a store."""
    return (Path(path) / FILE).is_file()


def open_store(
    path: str | Path, *, user_features: str | Path | None = None, item_features: str | Path | None = None
) -> Store:
    """Open a store that `metarec prepare` wrote.

    Args:
      user_features, item_features: files with one row an id; the ids of that side are then held in memory.

    Raises:
      MetarecError: no store there, one of another version, or one whose files are not of the sizes that it notes.
    """
    folder = Path(path)
    if not is_store(folder):
        raise MetarecError(
            f"{folder} is no task store (it has no {FILE}). Make one with: metarec prepare DATA --out {folder}"
        )
    try:
        noted = _noted(bounds.read_json(folder / FILE))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, f"{FILE}: {one_line(error)}") from error
    users, interactions = noted["users"], noted["interactions"]
    width = 1 if noted["ratings"] is None else 2
    sizes = {"starts": 8 * (users + 1), "events": 4 * width * interactions, "hashes": 8 * users}
    sizes |= {"counts": 8 * (noted["items"] + 1)} | ({"times": 8 * interactions} if noted["timestamps"] else {})
    for name, size in sizes.items():
        file = folder / f"{name}.bin"
        if (there := file.stat().st_size if file.is_file() else -1) != size:
            raise _damaged(folder, f"{file.name} has {max(there, 0)} bytes, and {size} were written")
    starts = np.memmap(folder / "starts.bin", "<i8", "r", shape=(users + 1,))
    store = Store(folder, **noted, starts=starts, events=File(folder / "events.bin"))
    lengths(store)  # checks them
    if (frame := layouts.side_frame(user_features, "user")) is not None:
        table = side_features(frame, Vocabulary(ids(store, "user")), side="user")
        store = store._replace(user_features=table.features, notes=(*store.notes, *table.notes))
    if (frame := layouts.side_frame(item_features, "item")) is not None:
        table = side_features(frame, Vocabulary(ids(store, "item")), side="item")
        store = store._replace(item_features=table.features, notes=(*store.notes, *table.notes), titles=table.titles)
    return store


def _noted(told: Any) -> dict[str, Any]:
    """The fields of `Store` that ``store.json`` holds, of the right kinds."""
    if told["format"] != FORMAT or told["version"] != VERSION:
        raise ValueError(f"it is {told['format']!r}, version {told['version']}; version {VERSION} is read")
    found: dict[str, Any] = {"name": str(told["name"])[:200], "digest": str(told["digest"])[:64]}
    for name, most in (("users", 2**31 - 2), ("items", 2**31 - 2), ("interactions", 2**48), ("longest", 2**31 - 1)):
        if type(told[name]) is not int or not 1 <= told[name] <= most:
            raise ValueError(f"{name} is {told[name]!r}, and 1 to {most} is possible")
        found[name] = told[name]
    found["timestamps"] = told["timestamps"] is True
    found["untimed"] = int(told.get("untimed", 0))
    found["ratings"] = None if told["ratings"] is None else tuple(float(r) for r in told["ratings"][:2])
    if found["ratings"] is not None and not (len(found["ratings"]) == 2 and np.isfinite(found["ratings"]).all()):
        raise ValueError(f"ratings is {told['ratings']!r}, and the least and the greatest were wanted")
    found["notes"] = tuple(str(note)[:1000] for note in told["notes"][:100])
    return found


def _damaged(folder: Path, why: str) -> MetarecError:
    return MetarecError(f"the store {folder} is damaged ({why}). Prepare it again, with --fresh")


def lengths(store: Store) -> np.ndarray:
    """Interactions of each user, int32 ``[users]``.

    Raises:
      MetarecError: ``starts.bin`` is not ascending from 0 to the number of interactions.
    """
    found = np.empty(store.users, np.int32)
    for first in range(0, store.users, 1 << 20):
        part = np.diff(store.starts[first : first + (1 << 20) + 1])
        if part.min() < 1 or part.max() > store.longest:
            raise _damaged(store.path, f"starts.bin: a user has {part.min()} or {part.max()} interactions")
        found[first : first + len(part)] = part
    if store.starts[0] != 0 or store.starts[-1] != store.interactions:
        raise _damaged(store.path, f"starts.bin goes from {store.starts[0]} to {store.starts[-1]}")
    return found


def read_events(store: Store, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The histories of some users, in time order.

    Args:
      users: int ``[T]``, rows 1..U.

    Returns:
      ``starts`` int64 ``[T + 1]`` and ``events`` int32 ``[n, 1 or 2]``: the k-th user's are
      ``events[starts[k] : starts[k + 1]]``.

    Raises:
      MetarecError: an item row outside the vocabulary, or a rating that is not finite; the user and the row are named.
    """
    first, last = store.starts[users - 1], store.starts[users]
    starts = np.append(0, np.cumsum(last - first))
    size = 4 * store.width
    places = list(zip((first * size).tolist(), ((last - first) * size).tolist(), strict=True))
    events = store.events.read(places).view("<i4").reshape(-1, store.width)
    item, rating = events[:, 0], events[:, -1].view("<f4")  # of implicit feedback the items again, all finite as floats
    wrong = (item < 1) | (item > store.items) | ~np.isfinite(rating)
    if wrong.any():
        at = int(np.argmax(wrong))
        k = int(np.searchsorted(starts, at, side="right")) - 1
        rated = "" if store.implicit else f" with rating {rating[at]}"
        raise _damaged(
            store.path,
            f"interaction {at - starts[k]} of user row {users[k]} is item row {item[at]}{rated}, and rows 1 to "
            f"{store.items} with finite ratings were written",
        )
    return starts, events


def ids(store: Store, side: Literal["user", "item"], rows: np.ndarray | None = None) -> np.ndarray:
    """The ids of a side in the order of its rows, int64 or text; of ascending ``rows`` alone where given."""
    folder = store.path / f"{side}s"
    wanted = np.arange(1, (store.users if side == "user" else store.items) + 1) if rows is None else rows
    found, done = [], 0
    for batch in batches(folder, ["row", "id"], _IDS):
        row = batch.column(0).to_numpy(zero_copy_only=False)
        if len(row) and not np.array_equal(row, np.arange(done + 1, done + len(row) + 1)):
            raise _damaged(store.path, f"{folder.name}: the rows are not 1, 2, 3, ...")
        low, high = np.searchsorted(wanted, [done + 1, done + len(row) + 1])
        found.append(batch.column(1).to_numpy(zero_copy_only=False)[wanted[low:high] - done - 1])
        done += len(row)
    if done != (store.users if side == "user" else store.items):
        raise _damaged(store.path, f"{folder.name} has {done} rows")
    return np.concatenate(found)


def batches(folder: Path, columns: Sequence[str], size: int) -> Iterator[pa.RecordBatch]:
    """The rows of the Parquet files in a folder, file by file in the order of their names, ``size`` at a time.

    Raises:
      MetarecError: there is none, one is damaged or lacks a column, or one swells far beyond its size.
    """
    files = sorted(p for p in folder.glob("*.parquet") if not p.name.startswith((".", "_")))
    if not files:
        raise MetarecError(f"{folder} holds no Parquet file, and a task store has some there. Prepare the store again")
    for path in files:
        room = max(bounds.ROOM, bounds.SWELL * path.stat().st_size)
        if lacking := [name for name in columns if name not in parquet.columns(path)]:
            raise MetarecError(
                f"{path} has no column {lacking[0]!r}. Write it again as the layout of a task store says"
            )
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(size, columns=list(columns)):
                    if (room := room - batch.nbytes) < 0:
                        raise bounds.swollen(path)
                    yield batch.select(columns)
        except parquet.ERRORS as error:
            raise MetarecError(f"{path} is damaged or cut off ({one_line(error)}). Prepare the store again") from error


def load(store: Store, users: np.ndarray | None = None, *, whole: bool = False) -> Interactions:
    """A store, or some of its users, in memory; by user, and in time order.

    Args:
      users: ascending rows; default all.
      whole: keep the vocabulary (and the features) of all users, so that rows stay what they are in the store; else
        the users loaded are rows 1, 2, ....
    """
    rows = np.arange(1, store.users + 1) if users is None else np.asarray(users)
    starts, events = read_events(store, rows)
    names = None if whole else rows
    timestamp = None
    if store.timestamps:
        first, last = store.starts[rows - 1] * 8, store.starts[rows] * 8
        places = zip(first.tolist(), (last - first).tolist(), strict=True)
        timestamp = File(store.path / "times.bin").read(list(places)).view("<i8")
    own = rows if whole else np.arange(1, len(rows) + 1)
    kept = slice(None) if whole else np.append(0, rows)
    return Interactions(
        user=np.repeat(own.astype(np.int32), np.diff(starts)),
        item=np.ascontiguousarray(events[:, 0]),
        rating=None if store.implicit else np.ascontiguousarray(events[:, 1]).view("<f4"),
        timestamp=timestamp,
        users=Vocabulary(ids(store, "user", names)),
        items=Vocabulary(ids(store, "item")),
        user_features={name: replace(f, values=f.values[kept]) for name, f in store.user_features.items()},
        item_features=store.item_features,
        titles=store.titles,
        notes=store.notes,
        name=store.name,
    )
