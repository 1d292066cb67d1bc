"""A task store: the histories of users in files, for data larger than memory; opened, read user by user, or loaded.

A store is a folder; docs/data_larger_than_memory.md describes it. Its portable half is Parquet, which SQL can write:

- ``users/*.parquet``, ``items/*.parquet``: ``row`` (1, 2, ..) and ``id`` (ascending), the vocabularies;
- ``histories/*.parquet``: one row per user: ``user``, and the lists ``items``, ``ratings``, ``times``, in time order.

Streaming reads flat little-endian arrays made from it (`metarec_jax.data.store.pack`), N interactions of U users:

- ``starts.bin`` int64 ``[U + 1]``: the interactions of user row u are ``starts[u - 1] .. starts[u] - 1``;
- ``events.bin`` int32 ``[N, 2]``: item row, and the rating, a float32 by its bits; ``[N, 1]`` for implicit feedback;
- ``times.bin`` int64 ``[N]``: seconds, `NO_TIME` if not known; absent if the data has no times;
- ``counts.bin`` int64 ``[items + 1]``: interactions of each item row;
- ``hashes.bin`` uint64 ``[U]``: hashes of the users' ids, which decide who is held out;
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
    """A file for reads at any position that threads may share; closed when garbage-collected.

    It is not mapped into memory, so pages that were read count as the system's cache, not as memory of this process.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._descriptor = path, os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, places: Sequence[tuple[int, int]]) -> np.ndarray:
        """The concatenated bytes of several places ``(first, size)``, uint8.

        All places are announced to the system before the first is read, so that it fetches them together.

        Raises:
          MetarecError: the file ends before the last place.
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
    """An open store.

    Attributes:
      users, items, interactions: their numbers.
      ratings: the lowest and the highest rating; None for implicit feedback.
      timestamps: whether it has times; untimed: number of interactions without a time all the same.
      longest: length of the longest history.
      digest: sha256 of everything that is streamed; equal digests mean equal data.
      starts: int64 ``[users + 1]``, mapped from its file.
      events: the file of histories.
      user_features, item_features, titles: as in `Interactions`, if files of them were given.
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
        """Numbers per interaction in ``events.bin``."""
        return 1 if self.ratings is None else 2

    @property
    def columns(self) -> dict[str, Column]:
        """The input columns of a model, as `Interactions.columns`; the table of users has only the unknown row.

        If tasks carry the users' own rows, use ``columns | {"user_id": Column("id", store.users + 1)}``.
        """
        out = {"user_id": Column("id", 1)} | {name: f.column for name, f in self.user_features.items()}
        out["item_id"] = Column("id", self.items + 1)
        return out | {name: f.column for name, f in self.item_features.items()}

    @property
    def bytes_in_memory(self) -> int:
        """Approximate peak memory of `load` and `metarec_jax.data.draw.task_source`: 80 bytes per interaction."""
        return 80 * self.interactions + 200 * (self.users + self.items)


def is_store(path: str | Path) -> bool:
    """Whether a path is a task store."""
    return (Path(path) / FILE).is_file()


def open_store(
    path: str | Path, *, user_features: str | Path | None = None, item_features: str | Path | None = None
) -> Store:
    """Open a store that `metarec prepare` wrote.

    Args:
      user_features, item_features: files with one row per id; the ids of that side are then held in memory.

    Raises:
      MetarecError: there is no store, it has another version, or its files do not have the recorded sizes.
    """
    folder = Path(path)
    if not is_store(folder):
        raise MetarecError(
            f"{folder} is not a task store (it has no {FILE}). Create one with: metarec prepare DATA --out {folder}"
        )
    try:
        header = _header(bounds.read_json(folder / FILE))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, f"{FILE}: {one_line(error)}") from error
    users, interactions = header["users"], header["interactions"]
    width = 1 if header["ratings"] is None else 2
    sizes = {"starts": 8 * (users + 1), "events": 4 * width * interactions, "hashes": 8 * users}
    sizes |= {"counts": 8 * (header["items"] + 1)} | ({"times": 8 * interactions} if header["timestamps"] else {})
    for name, size in sizes.items():
        file = folder / f"{name}.bin"
        if (actual := file.stat().st_size if file.is_file() else -1) != size:
            raise _damaged(folder, f"{file.name}: expected {size} bytes, got {max(actual, 0)}")
    starts = np.memmap(folder / "starts.bin", "<i8", "r", shape=(users + 1,))
    store = Store(folder, **header, starts=starts, events=File(folder / "events.bin"))
    lengths(store)  # raises if they are damaged
    if (frame := layouts.side_frame(user_features, "user")) is not None:
        table = side_features(frame, Vocabulary(ids(store, "user")), side="user")
        store = store._replace(user_features=table.features, notes=(*store.notes, *table.notes))
    if (frame := layouts.side_frame(item_features, "item")) is not None:
        table = side_features(frame, Vocabulary(ids(store, "item")), side="item")
        store = store._replace(item_features=table.features, notes=(*store.notes, *table.notes), titles=table.titles)
    return store


def _header(facts: Any) -> dict[str, Any]:
    """The fields of `Store` in ``store.json``, with checked types."""
    if facts["format"] != FORMAT or facts["version"] != VERSION:
        raise ValueError(f"expected {FORMAT!r}, version {VERSION}, got {facts['format']!r}, version {facts['version']}")
    header: dict[str, Any] = {"name": str(facts["name"])[:200], "digest": str(facts["digest"])[:64]}
    for name, most in (("users", 2**31 - 2), ("items", 2**31 - 2), ("interactions", 2**48), ("longest", 2**31 - 1)):
        if type(facts[name]) is not int or not 1 <= facts[name] <= most:
            raise ValueError(f"{name} must be 1 to {most}, got {facts[name]!r}")
        header[name] = facts[name]
    header["timestamps"] = facts["timestamps"] is True
    header["untimed"] = int(facts.get("untimed", 0))
    header["ratings"] = None if facts["ratings"] is None else tuple(float(r) for r in facts["ratings"][:2])
    if header["ratings"] is not None and not (len(header["ratings"]) == 2 and np.isfinite(header["ratings"]).all()):
        raise ValueError(f"ratings: expected the lowest and the highest, got {facts['ratings']!r}")
    header["notes"] = tuple(str(note)[:1000] for note in facts["notes"][:100])
    return header


def _damaged(folder: Path, why: str) -> MetarecError:
    return MetarecError(f"the store {folder} is damaged ({why}). Prepare it again, with --fresh")


def lengths(store: Store) -> np.ndarray:
    """Interactions of each user, int32 ``[users]``.

    Raises:
      MetarecError: ``starts.bin`` is not ascending from 0 to the number of interactions.
    """
    counts = np.empty(store.users, np.int32)
    for first in range(0, store.users, 1 << 20):
        part = np.diff(store.starts[first : first + (1 << 20) + 1])
        if part.min() < 1 or part.max() > store.longest:
            raise _damaged(store.path, f"starts.bin: a user has {part.min()} or {part.max()} interactions")
        counts[first : first + len(part)] = part
    if store.starts[0] != 0 or store.starts[-1] != store.interactions:
        raise _damaged(store.path, f"starts.bin goes from {store.starts[0]} to {store.starts[-1]}")
    return counts


def read_events(store: Store, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The histories of some users, in time order.

    Args:
      users: int ``[T]``, rows 1..U.

    Returns:
      ``starts`` int64 ``[T + 1]`` and ``events`` int32 ``[n, 1 or 2]``: those of the k-th user are
      ``events[starts[k] : starts[k + 1]]``.

    Raises:
      MetarecError: an item row is outside the vocabulary, or a rating is not finite; the message names user and row.
    """
    first, last = store.starts[users - 1], store.starts[users]
    starts = np.append(0, np.cumsum(last - first))
    size = 4 * store.width
    places = list(zip((first * size).tolist(), ((last - first) * size).tolist(), strict=True))
    events = store.events.read(places).view("<i4").reshape(-1, store.width)
    item, rating = events[:, 0], events[:, -1].view("<f4")  # for implicit feedback the items, all finite as floats
    wrong = (item < 1) | (item > store.items) | ~np.isfinite(rating)
    if wrong.any():
        at = int(np.argmax(wrong))
        k = int(np.searchsorted(starts, at, side="right")) - 1
        rated = "" if store.implicit else f" with rating {rating[at]}"
        raise _damaged(
            store.path,
            f"interaction {at - starts[k]} of user row {users[k]} has item row {item[at]}{rated}, expected rows 1 to "
            f"{store.items} with finite ratings",
        )
    return starts, events


def ids(store: Store, side: Literal["user", "item"], rows: np.ndarray | None = None) -> np.ndarray:
    """The ids of a side in the order of its rows, int64 or text; only those of ``rows`` (ascending) if given."""
    folder = store.path / f"{side}s"
    wanted = np.arange(1, (store.users if side == "user" else store.items) + 1) if rows is None else rows
    parts, done = [], 0
    for batch in batches(folder, ["row", "id"], _IDS):
        row = batch.column(0).to_numpy(zero_copy_only=False)
        if len(row) and not np.array_equal(row, np.arange(done + 1, done + len(row) + 1)):
            raise _damaged(store.path, f"{folder.name}: the rows are not 1, 2, 3, ...")
        low, high = np.searchsorted(wanted, [done + 1, done + len(row) + 1])
        parts.append(batch.column(1).to_numpy(zero_copy_only=False)[wanted[low:high] - done - 1])
        done += len(row)
    if done != (store.users if side == "user" else store.items):
        raise _damaged(store.path, f"{folder.name} has {done} rows")
    return np.concatenate(parts)


def batches(folder: Path, columns: Sequence[str], size: int) -> Iterator[pa.RecordBatch]:
    """The rows of the Parquet files in a folder, in the order of their names, ``size`` rows at a time.

    Raises:
      MetarecError: there is no file, or one is damaged, lacks a column, or unpacks to far more than its size.
    """
    files = sorted(p for p in folder.glob("*.parquet") if not p.name.startswith((".", "_")))
    if not files:
        raise MetarecError(f"{folder} has no Parquet file, which a task store requires. Prepare the store again")
    for path in files:
        room = max(bounds.ROOM, bounds.SWELL * path.stat().st_size)
        if lacking := [name for name in columns if name not in parquet.columns(path)]:
            raise MetarecError(f"{path} has no column {lacking[0]!r}. Write it again in the layout of a task store")
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(size, columns=list(columns)):
                    if (room := room - batch.nbytes) < 0:
                        raise bounds.swollen(path)
                    yield batch.select(columns)
        except parquet.ERRORS as error:
            raise MetarecError(
                f"{path} is damaged or truncated ({one_line(error)}). Prepare the store again"
            ) from error


def load(store: Store, users: np.ndarray | None = None, *, whole: bool = False) -> Interactions:
    """Load a store, or some of its users, sorted by user and time.

    Args:
      users: ascending rows; default: all.
      whole: keep the vocabulary (and the features) of all users, so that rows are those of the store; else the loaded
        users have rows 1, 2, ....
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
