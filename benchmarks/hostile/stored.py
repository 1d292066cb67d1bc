"""What the library wrote itself, or downloads: a cached or named data set, a configuration, a run directory, checkpoints."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import warnings
import zipfile
from functools import cache
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np
import pyarrow.parquet as pq

from benchmarks.hostile import mutate
from benchmarks.hostile.checks import Family, Files, check_interactions, check_message, hold, taken
from benchmarks.hostile.tables import ROWS, lines, world
from metarec_jax.core import MetarecError
from metarec_jax.data.catalogue import catalogue
from metarec_jax.data.interactions import Interactions
from metarec_jax.data.io import datasets, movielens
from metarec_jax.data.io.cache import read_cache, write_cache
from metarec_jax.experiment import config
from metarec_jax.experiment import directory as directories
from metarec_jax.experiment.build import build_learner
from metarec_jax.serving.history import Names, feature_columns
from metarec_jax.training.checkpoints import checkpoint, folders
from metarec_jax.training.progress import read_history

# A cached data set; archives and folders of a named one


def _good_cache() -> list[Files]:
    found = []
    clicks = Interactions(world().user, world().item, None, None, world().users, world().items)
    for data in (world(), clicks, _tiny_data()):
        with TemporaryDirectory() as scratch:
            write_cache(data, Path(scratch) / "data.parquet")
            found.append(taken(Path(scratch)))
    return found


def _spoil_cache(rng: Random, good: Files) -> Files:
    """Mostly with the right sum beside it: who changes a file can write its sum, too."""
    name = next(n for n in good if n.endswith(".parquet"))
    out, how = dict(good), rng.random()
    out[name] = _other_metadata(rng, good[name]) if how < 0.6 else mutate.table(rng, good[name])
    if rng.random() < 0.95:
        out[f"{name}.sha256"] = hashlib.sha256(out[name]).hexdigest().encode()
    elif rng.random() < 0.5:
        out[f"{name}.sha256"] = mutate.raw(rng, out[f"{name}.sha256"])
    return out


def _other_metadata(rng: Random, good: bytes) -> bytes:
    table = pq.read_table(io.BytesIO(good))
    rest = mutate.as_json(rng, table.schema.metadata[b"metarec_jax"])
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({b"metarec_jax": rest}), sink)
    return sink.getvalue()


def _enter_cache(folder: Path) -> None:
    check_interactions(read_cache(folder / "data.parquet"), several=False)


TINY = {
    "u.data": lines("\t", (), [(u, i, int(r), t) for u, i, r, t in ROWS]),
    "u.user": lines("|", (), [(u, 18 * u, "FM"[u % 2], f"job {u}", "0") for u in range(1, 5)]),
    "u.item": lines(
        "|", (), [(i, f"Heat {i} (1990)", "", "", "x", *"0" * i, "1", *"0" * (18 - i)) for i in range(10, 14)]
    ),
}


def _tiny_data() -> Interactions:
    return movielens.ml_100k(TINY, "tiny")


def tiny() -> datasets.Dataset:
    files = datasets.Files({n: hashlib.sha256(b).hexdigest() for n, b in TINY.items()}, "tiny/", movielens.ml_100k)
    return datasets.Dataset("Tiny", (4, 4, 8), files, files, "file:///none.zip", "none==0", "Tiny is free.")


def _good_datasets() -> list[Files]:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as z:
        for name, content in TINY.items():
            z.writestr(f"tiny/{name}", content)
    packed = {f"tiny/{name}.gz": gzip.compress(content) for name, content in TINY.items()}
    return [{"tiny.zip": sink.getvalue()}, {"tiny.zip": sink.getvalue()}, packed]


def _spoil_datasets(rng: Random, good: Files) -> Files:
    if "tiny.zip" in good:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return {"tiny.zip": mutate.archive(rng, good["tiny.zip"])}
    name = rng.choice(sorted(good))
    changed = mutate.text(rng, gzip.decompress(good[name])) if rng.random() < 0.3 else gzip.decompress(good[name])
    return {**good, name: mutate.packed(rng, name, changed)}


def _enter_datasets(folder: Path) -> None:
    """`load` from original files laid by hand; and what it does with a downloaded archive."""
    datasets._licences_printed.add("tiny")
    if (folder / "tiny.zip").exists():
        data = datasets._from_zip(folder / "tiny.zip", tiny().original, "tiny")
    else:
        data = datasets._named("tiny", tiny(), folder / "tiny", offline=True)
    check_interactions(data)
    hold(directories.fingerprint(data) == directories.fingerprint(_tiny_data()), "another data set under the same sums")
    hold(not (folder.parent / "x").exists(), "a file outside")


# A configuration, a run directory, its checkpoints


def _good_configs() -> list[Files]:
    whole = config.Config(
        split=config.SplitConfig(by="time", partition="part.csv"),
        learner=config.LearnerConfig("maml", {"only": ("net",), "inner_lr": 0.1}),
        model=config.ModelConfig(hidden=(8, 4)),
        train=config.TrainConfig(lr=1e-2, patience=3),
    )
    return [{"config.json": json.dumps(config.to_dict(c)).encode()} for c in (whole, config.Config())]


def _spoil_configs(rng: Random, good: Files) -> Files:
    return {name: mutate.as_json(rng, content) for name, content in good.items()}


def _enter_configs(folder: Path) -> None:
    try:
        values = json.loads((folder / "config.json").read_text())
    except (ValueError, RecursionError) as error:
        raise MetarecError("no JSON") from error
    found = config.from_dict(values)
    again = config.from_dict(json.loads(json.dumps(config.to_dict(found), allow_nan=False)))
    hold(again == found, "a configuration that does not survive JSON")


RUN = config.Config(
    data=config.DataConfig(name="world.csv"), model=config.ModelConfig(size=2), train=config.TrainConfig(steps=3)
)


@cache
def run_files() -> Files:
    """A finished run, as `metarec fit` leaves it, without its report."""
    from metarec_jax.training.checkpoints.checkpoint import Checkpoints

    learner = build_learner(RUN, world())
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        with Checkpoints(folder, identity=directories.identity(RUN, world())) as checkpoints:
            directories.write(folder, RUN, world(), world(), catalogue(world()))
            params = learner.init(jax.random.key(0))
            checkpoints.save(3, {"params": params}, metrics={"loss": 0.5}, best=True, wait=True)
        for note in (folder / "checkpoints").glob("*/*/commit_success.txt"):  # Orbax writes where it was saved
            note.write_text("Checkpoint commit was successful")
            folders.mark(note.parent)
        directories.write_json(folder / "result.json", {"step": 3, "stopped": "finished"})
        (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 0.75}\n{"step": 3, "loss": 0.5}\n')
        return taken(folder)


_RUN_TEXT = ("config.json", "identity.json", "result.json", "metrics.jsonl")


def _good_runs() -> list[Files]:
    return [{n: b for n, b in run_files().items() if not n.startswith("checkpoints")}]


def _spoil_runs(rng: Random, good: Files) -> Files:
    name, out = rng.choice((*_RUN_TEXT, "catalogue.npz", "catalogue.npz", "data.parquet", "data.parquet")), dict(good)
    if name == "data.parquet":
        pair = _spoil_cache(rng, {n: good[n] for n in (name, f"{name}.sha256")})
        return out | pair
    if name == "catalogue.npz":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out[name] = mutate.arrays(rng, good[name])
    elif name == "metrics.jsonl":
        first, rest = good[name].split(b"\n", 1)
        out[name] = mutate.as_json(rng, first) + b"\n" + rest
    else:
        out[name] = mutate.as_json(rng, good[name])
    if rng.random() < 0.05:
        del out[rng.choice(sorted(out))]
    return out


def _enter_runs(folder: Path) -> None:
    read_history(folder / "metrics.jsonl")
    run = directories.read(folder)
    check_interactions(run.data, several=False)
    for rows, ids in ((run.catalogue.user_row, run.data.users), (run.catalogue.item_row, run.data.items)):
        hold(rows.shape == (ids.num_rows,) and rows.dtype == np.int32, "rows of the catalogue")
        values = np.asarray(rows)
        hold(bool(((values == 0) | (values == np.arange(len(values)))).all()), "a row of the catalogue is another's")
    Names(run.data).rows(["Heat 10", 10])
    feature_columns({"age": 2.0}, run.data) if "user_age" in run.data.user_features else None


def _good_checkpoints() -> list[Files]:
    """Of one kind each: the best is loaded into a known form, the latest into what it says itself."""
    kinds = ("checkpoints/best", "checkpoints/latest")
    return [{n: b for n, b in run_files().items() if n.startswith((kind, "identity"))} for kind in kinds]


def _spoil_checkpoints(rng: Random, good: Files) -> Files:
    """Any file of a step; mostly with the sums made again, so that what reads it sees what was changed."""
    out = dict(good)
    steps = sorted({str(Path(*Path(n).parts[:3])) for n in good if n.startswith("checkpoints")})
    step = rng.choice(steps)
    inside = sorted(n for n in good if n.startswith(step))
    for name in rng.sample(inside, rng.choice((1, 1, 2))):
        whole = good[name].lstrip()[:1] == b"{"
        out[name] = mutate.as_json(rng, good[name]) if whole and rng.random() < 0.8 else mutate.raw(rng, good[name])
    if rng.random() < 0.05:
        del out[rng.choice(inside)]
    if rng.random() < 0.05:  # a copy by hand
        out |= {
            n.replace(step, rng.choice((f"{step} copy", f"{step}0", f"{step}.old"))): out[n] for n in inside if n in out
        }
    if rng.random() < 0.8:
        sums = {
            str(Path(n).relative_to(step)): hashlib.sha256(b).hexdigest()
            for n, b in sorted(out.items())
            if n.startswith(f"{step}/") and not n.endswith("sha256.json")
        }
        out[f"{step}/sha256.json"] = json.dumps(sums).encode()
    return out


@cache
def _like() -> Any:
    return jax.eval_shape(build_learner(RUN, world()).init, jax.random.key(0))


def _enter_checkpoints(folder: Path) -> None:
    for which in ("latest", "best"):
        checkpoint.saved_metrics(folder, which=which)  # type: ignore[arg-type]
    like = _like() if (folder / "checkpoints" / "best").exists() else None
    params = checkpoint.load_params(folder, like=like, say=check_message)
    if like is not None:
        same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), params, like)
        hold(all(jax.tree.leaves(same)), "parameters of other shapes")


FAMILIES: dict[str, Family] = {
    "cache": Family("a cached data set: read_cache", _good_cache, _spoil_cache, _enter_cache, (OSError, ValueError)),
    "datasets": Family(
        "archives and original files of a named data set: load",
        _good_datasets,
        _spoil_datasets,
        _enter_datasets,
        (MetarecError, datasets._Unavailable),
    ),
    "config": Family("a configuration: from_dict", _good_configs, _spoil_configs, _enter_configs),
    "run": Family("a run directory: open_run", _good_runs, _spoil_runs, _enter_runs),
    "checkpoint": Family("checkpoints: load_params", _good_checkpoints, _spoil_checkpoints, _enter_checkpoints),
}
