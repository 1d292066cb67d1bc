"""Convert a table of interactions of any size to a task store: DuckDB sorts it out of core, once, by user and time.

The result does not depend on the order of the rows or on the number of files or threads: ids are sorted; the last in
time of repeated pairs of user and item is kept (of equal times, or without times, the one with the highest rating); of
equal times the lower item row comes first.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from metarec_jax.core import MetarecError
from metarec_jax.data.store import ingest, sql
from metarec_jax.data.store.opened import Store, is_store, open_store
from metarec_jax.data.store.pack import pack
from metarec_jax.data.store.partition import partition
from metarec_jax.messages import one_line, shown

_PER_FILE = 5_000_000
_A_THREAD = 250e6
_PARQUET = "(FORMAT parquet, COMPRESSION zstd"
_ON_DISK = {"BIGINT": 40, "VARCHAR": 80}
"""Bytes of disk per interaction while a store is made, by the type of user ids: 33 were measured with integers."""


def prepare(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    user_col: str | None = None,
    item_col: str | None = None,
    rating_col: str | None = None,
    timestamp_col: str | None = None,
    implicit: bool = False,
    partitions: int | None = None,
    memory: str = "2GB",
    fresh: bool = False,
    say: Callable[[str], None] = print,
) -> Store:
    """Convert a table to a task store; `metarec_jax.data.store.opened` describes it.

    The store appears atomically: it is written to a folder beside ``out``, which a killed run leaves and the next run
    clears.

    Args:
      paths: CSV or Parquet files, folders or patterns, all of one table. A single folder with users/, items/ and
        histories/ is the Parquet half of a store: then only the rest is written, in place.
      user_col, item_col, rating_col, timestamp_col, implicit: as in `metarec_jax.data.io.readers.read`.
      partitions: number of files of histories; default: one per 5 million interactions.
      memory: memory for DuckDB, such as "2GB"; the rest of the process uses about 0.5 GB more.
      fresh: replace an existing store.
      say: called with a line on each phase and its speed.

    Raises:
      MetarecError: a fault of the files, too little disk or memory, or an existing ``out``.
    """
    out, phase = Path(out), _Phases(say)
    if len(paths) == 1 and is_half(paths[0]):
        return _finish_in_place(Path(paths[0]), out, fresh, phase)
    limit = _bytes(memory)
    table = ingest.source(
        paths,
        user_col=user_col,
        item_col=item_col,
        rating_col=rating_col,
        timestamp_col=timestamp_col,
        implicit=implicit,
    )
    if out.exists() and not (fresh and is_store(out)):
        raise MetarecError(
            f"{out} is already a task store; train on it with metarec fit {out}, or replace it with --fresh"
            if is_store(out)
            else f"{out} exists and is not a task store; choose another folder with --out"
        )
    size = sum(path.stat().st_size for path in table.files)
    say(f"{len(table.files)} {'Parquet' if table.dialect is None else 'text'} files, {size / 1e9:.2f} GB")
    with _work_folder(out) as folder:
        with _database(folder / "scratch", limit, table) as run:
            kept, notes = _parquet_half(folder, run, table, partitions, phase)
        shutil.rmtree(folder / "scratch")
        with phase("pack", kept) as progress:
            pack(folder, name=out.name, notes=notes, progress=lambda what, done: progress(done * (what == "histories")))
        (folder / "lock").unlink()
        old = out.with_name(f"{out.name}.old")
        if out.exists():
            os.replace(out, old)
        os.replace(folder, out)
        shutil.rmtree(old, ignore_errors=True)
    return open_store(out)


def is_half(path: str | Path) -> bool:
    """Whether a path is a folder with the Parquet half of a store."""
    return all((Path(path) / part).is_dir() for part in ("users", "items", "histories"))


def _parquet_half(
    folder: Path, run: Callable[[str], list[Any]], table: ingest.Source, partitions: int | None, phase: _Phases
) -> tuple[int, list[str]]:
    """Write users/, items/ and histories/. Returns the number of interactions, and notes on what was dropped."""
    files = table.files
    if table.dialect is not None:
        files = (folder / "scratch" / "text.parquet",)
        _require_disk(folder, sum(path.stat().st_size for path in table.files))
        with phase("read") as progress:
            ingest.text_to_parquet(table, files[0], progress)
    relation = f"read_parquet([{', '.join(sql.literal(str(path)) for path in files)}])"
    with phase("check") as progress:
        checked = sql.check(run, relation, table)
        progress(checked.read)
    kind = run(f"SELECT column_type FROM (DESCRIBE SELECT {checked.columns['user']} FROM {relation})")[0][0]
    _require_disk(folder, checked.read * _ON_DISK[kind])
    with phase("items", checked.read):
        notes = [*checked.notes, *sql.number_items(run, relation, table, checked)]
        (folder / "items").mkdir()
        target = sql.literal(str(folder / "items" / "part-00000.parquet"))
        run(f"COPY (SELECT (rowid + 1)::INTEGER AS row, id FROM items ORDER BY rowid) TO {target} {_PARQUET})")
    ordered = folder / "scratch" / "sorted.parquet"
    with phase("sort", checked.read):
        # Ratings are not part of the key: a key of at most 24 bytes requires half the disk of a longer one.
        keys = ["user", *(["time"] if "time" in checked.columns else []), "item"]
        rated = ["rating"] if "rating" in checked.columns else []
        columns = ", ".join(f"{value} AS {sql.quoted(name)}" for name, value in checked.columns.items())
        run(
            f"COPY (SELECT {', '.join('row AS item' if n == 'item' else sql.quoted(n) for n in keys + rated)} FROM "
            f"(SELECT {columns}, {checked.item} AS raw FROM {relation}{checked.condition}) JOIN item_rows USING (raw) "
            f"ORDER BY {', '.join('row' if n == 'item' else sql.quoted(n) for n in keys)}) "
            f"TO {sql.literal(str(ordered))} {_PARQUET}, ROW_GROUP_SIZE 500000)"
        )
    rows = pq.read_metadata(ordered).num_rows
    per_file = _PER_FILE if partitions is None else math.ceil(rows / max(1, partitions))
    with phase("histories", rows) as progress:
        _, kept = partition(ordered, folder, per_file=per_file, progress=progress)
    if repeats := rows - kept:
        which = "last" if "time" in checked.columns else "highest" if "rating" in checked.columns else "one"
        notes.append(f"{repeats} repeated rows of a user and item dropped (the {which} is kept)")
    return kept, notes


def _finish_in_place(folder: Path, out: Path, fresh: bool, phase: _Phases) -> Store:
    """Write the flat half beside a Parquet half that another program wrote."""
    if out.resolve() != folder.resolve():
        raise MetarecError(f"{folder} is the Parquet half of a store, which is completed in place; use --out {folder}")
    if is_store(folder) and not fresh:
        raise MetarecError(f"{folder} is already a task store; train on it with metarec fit {folder}, or use --fresh")
    with phase("pack") as progress:
        pack(folder, name=folder.resolve().name, progress=lambda what, done: progress(done * (what == "histories")))
    return open_store(folder)


@contextlib.contextmanager
def _database(scratch: Path, limit: int, table: ingest.Source) -> Iterator[Callable[[str], list[Any]]]:
    """A DuckDB database with its files and spilled data in ``scratch``; yields a function that executes SQL."""
    try:
        import duckdb
    except ImportError as error:
        raise MetarecError(
            "preparing a store requires DuckDB, which is not installed; pip install 'metarec_jax[store]'"
        ) from error

    def run(text: str) -> list[Any]:
        query = worker.submit(lambda: connection.execute(text).fetchall())
        try:
            return query.result()
        except KeyboardInterrupt:
            connection.interrupt()
            wait([query])
            raise
        except duckdb.OutOfMemoryException as error:
            raise MetarecError(
                f"{limit / 1e9:.1f} GB are not enough for DuckDB ({one_line(error)}); allow more: --memory-limit 4GB"
            ) from error
        except duckdb.Error as error:
            raise MetarecError(
                f"{table.files[0]}{' and others' * (len(table.files) > 1)}: {one_line(error)}. Check these files, and "
                "that the disk is not full"
            ) from error

    scratch.mkdir()
    connection = duckdb.connect(str(scratch / "work.duckdb"))
    worker = ThreadPoolExecutor(1)  # so that Ctrl-C does not wait for the end of a query
    try:
        run(f"SET memory_limit = '{limit // 10**6}MB'")
        run(f"SET temp_directory = {sql.literal(str(scratch / 'spilled'))}")
        run(f"SET threads = {max(1, min(os.cpu_count() or 1, int(limit / _A_THREAD)))}")
        run("SET autoinstall_known_extensions = false")
        run("SET TimeZone = 'UTC'")
        run("SET enable_progress_bar = false")
        yield run
    finally:
        worker.shutdown()
        connection.close()


@contextlib.contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out``, locked by this process; the files of an earlier run are removed."""
    import fcntl

    folder = out.with_name(f"{out.name}.part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MetarecError(f"cannot create {folder} ({error.strerror}); choose another folder with --out") from error
    with (folder / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise MetarecError(
                f"another metarec prepare is writing {folder}; wait for it, or choose another folder with --out"
            ) from None
        for left in folder.iterdir():
            if left.name != "lock":
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _require_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise MetarecError(
            f"preparing the store requires about {needed / 1e9:.1f} GB of disk, and {free / 1e9:.1f} GB are free at "
            f"{folder.parent}; free some, or choose a folder on another disk with --out"
        )


def _bytes(memory: str) -> int:
    """Bytes of a limit. ``_bytes("2GB")`` is 2000000000."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([MGT])(i?)B?\s*", memory, re.IGNORECASE)
    size = 0.0
    if match is not None:
        size = float(match[1]) * (1024 if match[3] else 1000) ** (" kmgt".index(match[2].lower()))
    if not 250e6 <= size < 2**60:
        raise MetarecError(f"--memory-limit expected a size of at least 250MB, such as 2GB, got {shown(memory)}")
    return int(size)


class _Phases:
    """Prints the time of each phase, and the progress of a long one."""

    EVERY = 15.0

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    @contextlib.contextmanager
    def __call__(self, name: str, rows: int = 0) -> Iterator[Callable[[int], None]]:
        began = last = time.perf_counter()
        most = 0

        def progress(done: int) -> None:
            nonlocal last, most
            most = max(most, done)
            if time.perf_counter() - last > self.EVERY:
                last = time.perf_counter()
                self._say(f"  {name}: {done:,}{f' of {rows:,}' if rows else ''} rows, {_rate(done, last - began)}")

        self._say(f"{name} ...")
        yield progress
        took, count = time.perf_counter() - began, rows or most
        self._say(f"{name}: {count:,} rows in {took:.1f} s, {_rate(count, took)}")


def _rate(rows: int, seconds: float) -> str:
    return f"{rows / max(seconds, 1e-9) / 1e6:.1f} million rows/s"
