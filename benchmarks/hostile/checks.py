"""What must hold of whatever a hostile input becomes: data that holds together, or one readable message, and nothing else."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np

from benchmarks.hostile import mutate
from metarec_jax.core import MetarecError, MetarecWarning
from metarec_jax.data.describe import describe
from metarec_jax.data.interactions import Interactions, Vocabulary
from metarec_jax.experiment import directory as directories

Files = dict[str, bytes]
"""A folder: contents by relative path."""


class Family(NamedTuple):
    """One way in.

    Attributes:
      good: folders that are right.
      spoil: one of them, spoilt.
      enter: reads the folder; raises one of ``refusals`` or gives what holds.
    """

    what: str
    good: Callable[[], list[Files]]
    spoil: Callable[[Random, Files], Files]
    enter: Callable[[Path], Any]
    refusals: tuple[type[Exception], ...] = (MetarecError,)


class Wrong(AssertionError):
    """What was read does not hold together."""


def lay(folder: Path, files: Files) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def taken(folder: Path) -> Files:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def entered(family: Family, folder: Path) -> str:
    """Enter a folder that is laid. "read" or "refused"; raises what must not be raised."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            family.enter(folder)
        except family.refusals as error:
            check_message(str(error))
            outcome = "refused at the memory limit" if isinstance(error.__cause__, MemoryError) else "refused"
        else:
            outcome = "read"
    if Path(mutate.MARK).exists():
        Path(mutate.MARK).rmdir()
        raise Wrong("a loaded file ran code")
    if others := [warning for warning in said if not issubclass(warning.category, MetarecWarning)]:
        raise Wrong(f"a warning: {others[0].category.__name__}: {others[0].message}")
    return outcome


def check_message(message: str) -> None:
    if not message.strip():
        raise Wrong("an empty message")
    if len(message) > 4000 or message.count("\n") > 12:
        raise Wrong(f"a message that is too long: {len(message)} characters, {message[:300]!r}")
    if odd := re.search(r"[^\n -~\x80-\U0010ffff]|[\x80-\x9f\u2028\u2029\ud800-\udfff]", message):
        raise Wrong(f"a message with control characters in it: {odd[0]!r} in {message[:300]!r}")


def hold(ok: bool, what: str) -> None:
    if not ok:
        raise Wrong(what)


def check_interactions(data: Interactions, several: bool = True) -> None:
    """Everything that `Interactions` promises, and that every reader promises of it."""
    n = len(data.user)
    for name, rows, ids in (("user", data.user, data.users), ("item", data.item, data.items)):
        check_vocabulary(ids, name)
        hold(rows.dtype == np.int32 and rows.shape == (n,), f"{name} is {rows.dtype}{rows.shape}")
        hold(not n or (rows.min() >= 1 and rows.max() < ids.num_rows), f"{name} rows outside the vocabulary")
    if several:
        hold(len(np.unique(data.user)) >= 2, "fewer than two users")
        pairs = data.user.astype(np.int64) * data.items.num_rows + data.item
        hold(len(np.unique(pairs)) == n, "a user and an item twice")
    if data.rating is not None:
        hold(data.rating.dtype == np.float32 and data.rating.shape == (n,), f"rating is {data.rating.dtype}")
        hold(bool(np.isfinite(data.rating).all()), "a rating that is not finite")
    if data.timestamp is not None:
        hold(data.timestamp.dtype == np.int64 and data.timestamp.shape == (n,), f"timestamp is {data.timestamp.dtype}")
    if data.titles is not None:
        hold(data.titles.shape == (len(data.items.ids),), "titles do not fit")
        hold(all(isinstance(t, str) for t in data.titles), "a title that is no text")
    for side, features, ids in (("user", data.user_features, data.users), ("item", data.item_features, data.items)):
        for name, feature in features.items():
            hold(name.startswith(f"{side}_") and len(feature.values) == ids.num_rows, f"feature {name} does not fit")
            if feature.vocabulary is None:
                hold(feature.values.dtype == np.float32 and feature.values.ndim == 2, f"{name}: {feature.values.dtype}")
                hold(bool(np.isfinite(feature.values).all()), f"feature {name} is not finite")
            else:
                check_vocabulary(feature.vocabulary, name)
                hold(feature.values.dtype == np.int32, f"{name}: {feature.values.dtype}")
                hold(feature.values.min(initial=0) >= 0, f"{name} below 0")
                hold(feature.values.max(initial=0) < feature.vocabulary.num_rows, f"{name} beyond its vocabulary")
            hold(not feature.values[0].any(), f"row 0 of {name} is not empty")
    json.dumps(describe(data), allow_nan=False).encode()
    hold(len(directories.fingerprint(data)) == 64 and bool(directories.name_of(data)), "no fingerprint")
    hold(
        "/" not in directories.name_of(data) and directories.name_of(data) not in (".", ".."),
        "a name that leaves its folder",
    )
    for note in filter(None, data.notes):
        check_message(note)


def check_vocabulary(ids: Vocabulary, name: str) -> None:
    values = ids.ids.tolist()
    hold(ids.ids.ndim == 1, f"{name}: ids in {ids.ids.ndim} dimensions")
    hold(len({type(v) for v in values}) <= 1, f"{name}: ids of several types")
    hold(all(isinstance(v, (int, str)) and not isinstance(v, bool) for v in values), f"{name}: an id that is none")
    hold(len(set(values)) == len(values), f"{name}: an id twice")
    rows = ids.encode(ids.ids)
    hold(np.array_equal(rows, np.arange(1, len(values) + 1)), f"{name}: an id does not find its row")
