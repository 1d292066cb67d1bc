"""A run directory: all that a trained recommender needs to be resumed, measured and asked. Nothing in it is pickled.

``config.json``, ``data.parquet`` (interactions, vocabularies, features, titles), ``catalogue.npz`` (which rows training
saw), ``checkpoints/``, ``metrics.jsonl``, and ``result.json`` once training has ended.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import io
import json
import os
import shutil
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from metarec_jax import files
from metarec_jax.core import MetarecError
from metarec_jax.data.catalogue import Catalogue, catalogue
from metarec_jax.data.describe import describe
from metarec_jax.data.interactions import Feature, Interactions
from metarec_jax.data.io.bounds import read_arrays, read_json
from metarec_jax.data.io.cache import read_cache, write_cache
from metarec_jax.experiment import config as configs
from metarec_jax.messages import one_line, shown
from metarec_jax.training.checkpoints import checkpoint

_WRITTEN = ("result.json", "tuned.json", "metrics.jsonl", "report.md", "report.html", "config.json")
_FILES = ("data.parquet", "catalogue.npz")
"""Files whose sha256 stands in the configuration."""


class Stored(NamedTuple):
    """What a run directory holds beside the parameters.

    Attributes:
      trained_on: digest of the interactions it was trained on; None in a run that noted none.
      part: of a run that streamed a store, int8 ``[data.users.num_rows]``: which users of ``data`` were held out.
    """

    directory: Path
    config: configs.Config
    data: Interactions
    catalogue: Catalogue
    trained_on: str | None
    part: np.ndarray | None


def name_of(data: Interactions) -> str:
    """A folder name for runs on this data, such as "ml-1m" or "ratings"."""
    plain = "".join(c if c.isalnum() or c in "-_." else "-" for c in Path(data.name).name)
    return plain.split(".")[0] or "run"


def fingerprint(data: Interactions) -> str:
    """sha256 of rows, ids and features: two tables with it are the same data, whatever they are called."""
    digest = hashlib.sha256()

    def add(array: np.ndarray | None) -> None:
        if array is None:
            digest.update(b"none")
        elif array.dtype.kind in "OUS":
            digest.update("\x00".join(map(str, array.tolist())).encode("utf-8", "surrogatepass"))
        else:
            digest.update(str((array.dtype, array.shape)).encode())
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    features: list[Feature] = []
    for side in (data.user_features, data.item_features):
        digest.update("\x00".join(side).encode("utf-8", "surrogatepass"))
        features += side.values()
    arrays = [data.user, data.item, data.rating, data.timestamp, data.users.ids, data.items.ids]
    for array in [*arrays, *(f.values for f in features)]:
        add(array)
    return digest.hexdigest()


def rows_digest(data: Interactions) -> str:
    """sha256 of the rows alone: of two parts of one data set, whether they are the same."""
    return files.sha256(np.stack([data.user, data.item]).astype(np.int32).tobytes())


def identity(config: configs.Config, data: Interactions, store: str | None = None) -> dict[str, Any]:
    """What makes two trainings the same one: every setting but the data's path, the data itself, and the version.

    Of a run that streams a store, ``store`` is the store's digest: ``data`` is a part of it.

    Of a published partition the file's contents count too: training may not go on with what was held out before.
    """
    settings = configs.to_dict(config)
    partition = config.split.partition
    held = {} if store is None else {"store": store}
    if partition is not None and Path(partition).is_file():  # one that is missing is told by what reads it
        held |= {"partition": files.sha256(Path(partition))}
    return held | {
        "config": settings | {"data": {k: v for k, v in settings["data"].items() if k != "name"}},
        "data": fingerprint(data),
        "version": version("metarec_jax"),
    }


def write(
    directory: Path,
    config: configs.Config,
    data: Interactions,
    train: Interactions,
    known: Catalogue,
    part: np.ndarray | None = None,
) -> None:
    """Lay down what `open_run` reads; ``part`` as in `Run`."""
    write_cache(data, directory / "data.parquet")
    rows = {"user_row": np.asarray(known.user_row), "item_row": np.asarray(known.item_row)}
    if part is not None:
        rows["part"] = part.astype(np.int32)
    packed = io.BytesIO()
    np.savez_compressed(packed, **rows)  # type: ignore[arg-type]
    files.write_atomically(directory / "catalogue.npz", packed.getvalue())
    told = {"config": configs.to_dict(config), "data": fingerprint(data), "train": rows_digest(train)}
    streamed = {"streamed": part is not None}
    write_json(
        directory / "config.json",
        told | streamed | {"files": {name: files.sha256(directory / name) for name in _FILES}},
    )


def write_json(path: Path, value: Any) -> None:
    """Write in one step, so that a reader never sees half a file."""
    files.write_atomically(path, json.dumps(value, indent=1) + "\n")


def result(directory: Path) -> dict[str, Any] | None:
    """How training ended, or None while it has not."""
    try:
        found = read_json(directory / "result.json")
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def read(directory: str | os.PathLike[str]) -> Stored:
    """Read a run that has ended, all but its parameters.

    Raises:
      MetarecError: no run there, one that is still to be trained, or one whose files do not belong together.
    """
    run = Path(directory)
    if not run.is_dir() or not (run / "identity.json").is_file():
        raise MetarecError(f"{run} is not a run directory{_others(run)}")
    ended = result(run)
    if ended is None:
        saved = checkpoint.saved_metrics(run, which="latest")
        at = "it has no checkpoint yet" if saved is None else f"it is at step {saved[0]}"
        raise MetarecError(f"{run} has not been trained to its end ({at}); run its metarec fit command again to resume")
    try:
        stored, identity = read_json(run / "config.json"), read_json(run / "identity.json")
        data = read_cache(run / "data.parquet")
        sizes = {"user_row": data.users.num_rows, "item_row": data.items.num_rows}
        if stored.get("streamed") is True:
            sizes["part"] = data.users.num_rows
        digest, trained, sums = stored["data"], stored.get("train"), stored.get("files", {})
        config = configs.from_dict(stored["config"])
        parts = _differing(stored, identity)
        rows = read_arrays(run / "catalogue.npz", sizes)
        part = rows.pop("part", None)
        changed = [name for name, sum in sums.items() if name in _FILES and sum != files.sha256(run / name)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT, errno.EISDIR, errno.ENOTDIR):
            raise MetarecError(f"{run} cannot be read: {files.cause(error)}") from error
        raise MetarecError(
            f"{run} is damaged ({one_line(error)}); train it again with metarec fit ... --out {run} --fresh"
        ) from error
    if parts:
        raise MetarecError(
            f"{run / 'config.json'} and {run / 'identity.json'} are of two different runs: "
            f"they differ in {', '.join(parts[:6])}. "
            "Put the run's own files back, or train again with --fresh"
        )
    if fingerprint(data) != digest or "data.parquet" in changed:
        raise MetarecError(
            f"{run / 'data.parquet'} is not the data that {run} was trained on: its users, items or features are "
            "others. Put the run's own file back, or train again with --fresh"
        )
    if "catalogue.npz" in changed or any(np.any((r != 0) & (r != np.arange(len(r)))) for r in rows.values()):
        raise MetarecError(
            f"{run / 'catalogue.npz'} is not the catalogue that {run} was trained with: the rows in it are others. "
            "Put the run's own file back, or train again with --fresh"
        )
    known = catalogue(data)._replace(user_row=jnp.asarray(rows["user_row"]), item_row=jnp.asarray(rows["item_row"]))
    held = None if part is None else np.clip(part, 0, 2).astype(np.int8)
    return Stored(run, config, data, known, trained, held)


def _differing(stored: Any, identity: Any) -> list[str]:
    """The parts in which a run's configuration and its identity differ; the path of the data does not count."""
    settings = {name: dict(section) for name, section in stored["config"].items()}
    settings["data"].pop("name", None)
    found = identity["config"]
    parts = [name for name in sorted({*settings, *found}) if settings.get(name) != found.get(name)]
    return [*map(shown, parts), *(["the data"] if identity["data"] != stored["data"] else [])]


def _others(run: Path) -> str:
    near = sorted(p.parent for p in run.parent.glob("*/identity.json")) if run.parent.is_dir() else []
    if not near:
        return "; train one with metarec fit"
    close = difflib.get_close_matches(run.name, [p.name for p in near], n=1)
    if close:
        return f"; perhaps you meant {run.parent / close[0]}"
    return f"; here are {', '.join(map(str, near[:5]))}"


def clear(directory: Path) -> None:
    """Delete a run's files; what the user put there stays."""
    for name in ("evaluation", "tensorboard", "plots", "members"):
        shutil.rmtree(directory / name, ignore_errors=True)
    for name in (*_FILES, *_WRITTEN):
        (directory / name).unlink(missing_ok=True)


def other_data(directory: Path, config: configs.Config, data: Interactions) -> str:
    """In what the data of a command and the data that a run was trained on differ, and what to do."""
    path, kept = Path(config.data.name), directory / "data.parquet"
    here = ""
    if path.is_file():
        here = f" (last changed {_moment(path)}, {path.stat().st_size:,} bytes)"
    try:
        then = read_cache(kept)
        noted, before = f" (noted {_moment(kept)})", summary(describe(then))
    except (OSError, ValueError):
        noted, before = "", "data that cannot be read any more"
    now = summary(describe(data))
    if before == now:
        now = "as many of each, but other ids, ratings, times or features"
    return (
        f"{path}{here} is not the data that {directory} was trained on: the run has {before}{noted}, and the data now "
        f"has {now}. Put the old data back to resume the run, give another directory (--out), or start over (--fresh)"
    )


def _moment(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime).isoformat(" ", "seconds")


def summary(data: Mapping[str, Any]) -> str:
    """One line of the counts that `describe` found."""
    counts = data["counts"]
    return f"{counts['interactions']:,} interactions of {counts['users']:,} users with {counts['items']:,} items"
