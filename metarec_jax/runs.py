"""A run directory: all that a trained recommender needs to be resumed, measured and asked. Nothing in it is pickled.

``config.json``, ``data.parquet`` (interactions, vocabularies, features, titles), ``catalogue.npz`` (which rows training
saw), ``checkpoints/``, ``metrics.jsonl``, and ``result.json`` once training has ended.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metarec_jax import config as configs
from metarec_jax.core import Learner, MetarecError, Method
from metarec_jax.data.cache import read_cache, write_cache
from metarec_jax.data.interactions import Feature, Interactions
from metarec_jax.data.tasks import Catalogue, catalogue
from metarec_jax.training import checkpoint


class Run(NamedTuple):
    """A run directory, opened.

    Attributes:
      config: how it was trained.
      data: what it was trained and tested on.
      known: its catalogue: items that training never saw have row 0.
      trained: digest of the interactions it was trained on; None in a run that noted none.
      learner: as configured.
    """

    directory: Path
    config: configs.Config
    data: Interactions
    known: Catalogue
    learner: Learner
    trained: str | None = None


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
            digest.update("\x00".join(map(str, array.tolist())).encode())
        else:
            digest.update(str((array.dtype, array.shape)).encode())
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    features: list[Feature] = []
    for side in (data.user_features, data.item_features):
        digest.update("\x00".join(side).encode())
        features += side.values()
    arrays = [data.user, data.item, data.rating, data.timestamp, data.users.ids, data.items.ids]
    for array in [*arrays, *(f.values for f in features)]:
        add(array)
    return digest.hexdigest()


def rows_digest(data: Interactions) -> str:
    """sha256 of the rows alone: of two parts of one data set, whether they are the same."""
    return hashlib.sha256(np.stack([data.user, data.item]).astype(np.int32).tobytes()).hexdigest()


def identity(config: configs.Config, data: Interactions) -> dict[str, Any]:
    """What makes two trainings the same one: every setting but the data's path, the data itself, and the version.

    Of a published partition the file's contents count too: training may not go on with what was held out before.
    """
    settings = configs.to_dict(config)
    partition = config.split.partition
    held = {}
    if partition is not None and Path(partition).is_file():  # one that is missing is told by what reads it
        held = {"partition": hashlib.sha256(Path(partition).read_bytes()).hexdigest()}
    return held | {
        "config": settings | {"data": {k: v for k, v in settings["data"].items() if k != "name"}},
        "data": fingerprint(data),
        "version": version("metarec_jax"),
    }


def write(directory: Path, config: configs.Config, data: Interactions, train: Interactions) -> None:
    """Lay down what `open_run` reads."""
    write_cache(data, directory / "data.parquet")
    known = catalogue(data, train, config.tasks.user_rows)
    with (directory / "catalogue.tmp").open("wb") as file:
        np.savez_compressed(file, user_row=np.asarray(known.user_row), item_row=np.asarray(known.item_row))
    os.replace(directory / "catalogue.tmp", directory / "catalogue.npz")
    told = {"config": configs.to_dict(config), "data": fingerprint(data), "train": rows_digest(train)}
    write_json(directory / "config.json", told)


def write_json(path: Path, value: Any) -> None:
    """Write in one step, so that a reader never sees half a file."""
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(partial, path)


def result(directory: Path) -> dict[str, Any] | None:
    """How training ended, or None while it has not."""
    try:
        return json.loads((directory / "result.json").read_text())
    except (OSError, ValueError):
        return None


def open_run(directory: str | os.PathLike[str]) -> Run:
    """Open a run that has ended.

    Raises:
      MetarecError: no run there, one that is still to be trained, or one whose files do not belong together.
    """
    run = Path(directory)
    if not run.is_dir() or not (run / "identity.json").is_file():
        raise MetarecError(f"{run} is no run directory{_others(run)}")
    ended = result(run)
    if ended is None:
        saved = checkpoint.saved_metrics(run, which="latest")
        at = "it has no checkpoint yet" if saved is None else f"it stands at step {saved[0]}"
        raise MetarecError(f"{run} has not been trained to its end ({at}); run its metarec fit command again to resume")
    try:
        stored = json.loads((run / "config.json").read_text())
        data = read_cache(run / "data.parquet")
        with np.load(run / "catalogue.npz", allow_pickle=False) as rows:
            user_row, item_row = jnp.asarray(rows["user_row"]), jnp.asarray(rows["item_row"])
        known = catalogue(data)._replace(user_row=user_row, item_row=item_row)
        config = configs.from_dict(stored["config"])
        digest, trained = stored["data"], stored.get("train")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise MetarecError(
            f"{run} is damaged ({error}); train it again with metarec fit ... --out {run} --fresh"
        ) from error
    whole = (data.users.num_rows, data.items.num_rows) == (known.user_row.shape[0], known.item_row.shape[0])
    if not whole or fingerprint(data) != digest:
        raise MetarecError(
            f"{run / 'data.parquet'} is not the data that {run} was trained on: its users and items are others. "
            "Put the run's own file back, or train again with --fresh"
        )
    return Run(run, config, data, known, configs.build_learner(config, data), trained)


def method(run: Run) -> Method:
    """The trained method of a run: its best parameters.

    It adapts as in training, to the same numbers; but where training took inner gradients for constants (Reptile, first
    order), a derivative through this adaptation is whole: without it no feedback would seem to move a score.
    """
    like = jax.eval_shape(run.learner.init, jax.random.key(0))
    params = checkpoint.load_params(run.directory, like=like)
    learner, given = run.learner, run.config.learner
    if given.name == "reptile" or given.first_order:
        learner = _with_steps(run, given.inner_steps)
    return Method(params, learner.adapt, learner.predict, learner.tables)


def by_inner_steps(run: Run) -> dict[int, Method]:
    """The trained parameters adapted by other numbers of inner steps, 0 to twice those of training; {} for ridge."""
    given = run.config.learner
    if given.name == "ridge":
        return {}
    params, trained = method(run).params, given.inner_steps
    learners = {k: _with_steps(run, k) for k in sorted({0, 1, (trained + 1) // 2, trained, 2 * trained})}
    return {k: Method(params, learner.adapt, learner.predict, learner.tables) for k, learner in learners.items()}


def _with_steps(run: Run, inner_steps: int) -> Learner:
    """The run's learner with another number of inner steps, second order."""
    given = dataclasses.replace(run.config.learner, name="maml", first_order=False, inner_steps=inner_steps)
    return configs.build_learner(dataclasses.replace(run.config, learner=given), run.data)


def _others(run: Path) -> str:
    near = sorted(p.parent for p in run.parent.glob("*/identity.json")) if run.parent.is_dir() else []
    if not near:
        return "; train one with metarec fit"
    close = difflib.get_close_matches(run.name, [p.name for p in near], n=1)
    if close:
        return f"; perhaps you meant {run.parent / close[0]}"
    return f"; here are {', '.join(map(str, near[:5]))}"


def summary(data: Mapping[str, Any]) -> str:
    """One line of the counts that `describe` found."""
    counts = data["counts"]
    return f"{counts['interactions']:,} interactions of {counts['users']:,} users with {counts['items']:,} items"
