"""Rows sorted by user and time, written as one row per user to a few Parquet files; the last of repeats is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

_ROWS = 1 << 20


class _Users(NamedTuple):
    """Whole histories: the users' ids, the number of rows of each, and the other columns of these rows."""

    ids: list[Any]
    sizes: list[int]
    columns: dict[str, np.ndarray]


def partition(
    rows: Path, folder: Path, *, per_file: int, progress: Callable[[int], None] = lambda done: None
) -> tuple[int, int]:
    """Write ``users/`` and ``histories/`` of a store.

    Args:
      rows: a Parquet file of the columns user (ids), item (rows of the vocabulary), and optionally rating and time,
        sorted by user, then time, then item.
      per_file: interactions after which a new file of histories starts.
      progress: called with the number of rows read so far.

    Returns:
      The numbers of users and of interactions that are kept.
    """
    users = kept = files = 0
    (folder / "users").mkdir()
    (folder / "histories").mkdir()
    with pq.ParquetFile(rows) as file:
        schema = file.schema_arrow
        lists = [(plural, name) for plural, name in _LISTS.items() if name in schema.names]
        vocabulary = pa.schema([("row", pa.int32()), ("id", schema.field("user").type)])
        histories = pa.schema([("user", pa.int32()), *((p, pa.list_(schema.field(n).type)) for p, n in lists)])
        writer: pq.ParquetWriter | None = None
        with pq.ParquetWriter(folder / "users" / "part-00000.parquet", vocabulary, compression="zstd") as names:
            for ids, sizes, columns in _by_user(file, progress):
                row = np.arange(users + 1, users + len(ids) + 1, dtype=np.int32)
                names.write_table(pa.table([row, pa.array(ids, vocabulary.field("id").type)], schema=vocabulary))
                keep, left = _without_repeats(np.array(sizes), columns)
                offsets = np.append(0, np.cumsum(left)).astype(np.int32)
                values = [pa.array(columns[name] if keep is None else columns[name][keep]) for _, name in lists]
                table = pa.table([row, *(pa.ListArray.from_arrays(offsets, v) for v in values)], schema=histories)
                if writer is None or kept >= files * per_file:
                    if writer is not None:
                        writer.close()
                    path = folder / "histories" / f"part-{files:05d}.parquet"
                    writer, files = (
                        pq.ParquetWriter(path, histories, compression="zstd", compression_level=1),
                        files + 1,
                    )
                writer.write_table(table)
                users, kept = users + len(ids), kept + int(offsets[-1])
        if writer is not None:
            writer.close()
    return users, kept


_LISTS = {"items": "item", "ratings": "rating", "times": "time"}


def _by_user(file: pq.ParquetFile, progress: Callable[[int], None]) -> Iterator[_Users]:
    """Groups of whole users, of about as many rows as are read at once."""
    done, open_id = 0, None  # the user whose rows may continue in the next batch
    waiting: list[dict[str, np.ndarray]] = []
    for batch in file.iter_batches(_ROWS):
        runs = pc.run_end_encode(batch.column("user"))
        ids, ends = runs.values.to_pylist(), runs.run_ends.to_numpy().astype(np.int64)
        columns = {n: batch.column(n).to_numpy(zero_copy_only=False) for n in batch.schema.names if n != "user"}
        sizes = np.diff(ends, prepend=0).tolist()
        if waiting and ids[0] == open_id:
            if len(ids) == 1:
                waiting.append(columns)
                continue
            sizes[0] += sum(len(part["item"]) for part in waiting)
        elif waiting:
            ids, sizes = [open_id, *ids], [sum(len(part["item"]) for part in waiting), *sizes]
        cut = int(ends[-2]) if len(ends) > 1 else 0
        if len(ids) > 1:
            parts = [*waiting, {name: values[:cut] for name, values in columns.items()}]
            yield _Users(ids[:-1], sizes[:-1], {n: np.concatenate([part[n] for part in parts]) for n in columns})
        open_id, waiting = ids[-1], [{name: values[cut:] for name, values in columns.items()}]
        done += batch.num_rows
        progress(done)
    if waiting:
        whole = {name: np.concatenate([part[name] for part in waiting]) for name in waiting[0]}
        yield _Users([open_id], [len(whole["item"])], whole)


def _without_repeats(sizes: np.ndarray, columns: dict[str, np.ndarray]) -> tuple[np.ndarray | None, np.ndarray]:
    """Which rows to keep (None: all), and the number of rows that each user keeps.

    The last row in time of each user and item is kept; of equal times, or without times, the one rated highest.

    >>> _without_repeats(np.array([3, 2]), {"item": np.array([7, 8, 7, 7, 7]), "rating": np.array([1, 5, 2, 4, 3])})
    (array([False,  True,  True,  True, False]), array([2, 1]))
    """
    pair = np.repeat(np.arange(len(sizes)), sizes) << 32 | columns["item"]
    ranked = np.sort(pair)
    again = np.unique(ranked[1:][ranked[1:] == ranked[:-1]])
    if not len(again):
        return None, sizes
    among = np.flatnonzero(again[np.minimum(np.searchsorted(again, pair), len(again) - 1)] == pair)
    by = [columns[name][among] for name in ("rating", "time") if name in columns]
    among = among[np.lexsort([*by, pair[among]])]
    keep = np.ones(len(pair), bool)
    keep[among[np.append(pair[among[1:]] == pair[among[:-1]], False)]] = False
    return keep, np.add.reduceat(keep, np.cumsum(sizes) - sizes, dtype=np.int64)
