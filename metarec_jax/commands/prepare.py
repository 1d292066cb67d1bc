"""``metarec prepare``: convert a table of any size to a task store, which ``metarec fit`` streams."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from metarec_jax import signals
from metarec_jax.core import MetarecError
from metarec_jax.data.store import prepare as preparing


def prepare(
    paths: Sequence[str],
    *,
    out: Path | None,
    user_col: str | None,
    item_col: str | None,
    rating_col: str | None,
    timestamp_col: str | None,
    implicit: bool,
    partitions: int | None,
    memory: str,
    fresh: bool,
    as_json: bool,
) -> int:
    """Write the task store and print its size. Returns 0.

    Args:
      out: default ``stores/NAME``, with the name of the first path; a Parquet half is completed in its own folder.
      user_col, item_col, rating_col, timestamp_col, implicit, partitions, memory, fresh: as in
        `metarec_jax.data.store.prepare.prepare`.
    """
    if not paths:
        raise MetarecError(
            "expected a file of interactions, got none; name a CSV or Parquet file, a folder, or a pattern"
        )
    first = Path(paths[0])
    half = preparing.is_half(first) and len(paths) == 1
    target = out or (first if half else Path("stores") / (first.name.lstrip("*").split(".")[0] or "store"))
    signals.keep("no store was written; the same command starts again and removes the partial files")
    store = preparing.prepare(
        paths,
        target,
        user_col=user_col,
        item_col=item_col,
        rating_col=rating_col,
        timestamp_col=timestamp_col,
        implicit=implicit,
        partitions=partitions,
        memory=memory,
        fresh=fresh,
    )
    size = sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file())
    print(
        f"{store.path}: {store.interactions:,} interactions of {store.users:,} users with {store.items:,} items, "
        f"{size / 1e9:.2f} GB"
    )
    for note in store.notes:
        print(f"  note: {note}")
    print(f"next: metarec fit {store.path}")
    if as_json:
        counts = {"users": store.users, "items": store.items, "interactions": store.interactions}
        print(json.dumps({"store": str(store.path), **counts, "bytes": size, "notes": list(store.notes)}))
    return 0
