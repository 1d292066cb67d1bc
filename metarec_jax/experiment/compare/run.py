"""``metarec compare``: many methods, many seeds, one table. Each cell is measured once; an interrupted run resumes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from metarec_jax import files, signals
from metarec_jax.baselines.trained import fit_plain
from metarec_jax.core import Learner, MetarecError, Method
from metarec_jax.data.catalogue import Catalogue, catalogue
from metarec_jax.data.describe import remarks
from metarec_jax.data.interactions import Interactions
from metarec_jax.data.splits import Split
from metarec_jax.data.tasks import TaskSet
from metarec_jax.experiment import config as configs
from metarec_jax.experiment import directory as directories
from metarec_jax.experiment import run as runs
from metarec_jax.experiment.build import (
    build_data,
    build_learner,
    build_source,
    build_split,
    open_store,
    resolved,
    settled,
)
from metarec_jax.experiment.compare import cells
from metarec_jax.experiment.compare.cells import Cell
from metarec_jax.experiment.compare.choice import cost
from metarec_jax.experiment.compare.entries import (
    Entry,
    all_entries,
    baseline_of,
    default_learners,
    learners_of,
    names_of,
)
from metarec_jax.experiment.compare.report import write_and_print
from metarec_jax.experiment.compiled import compile_cache
from metarec_jax.experiment.diagnose import diagnose
from metarec_jax.experiment.protocol import (
    VALIDATION_USERS,
    fixed_tasks,
    measuring_options,
    relevant_from,
    training_options,
)
from metarec_jax.training.checkpoints import lock as run_directory
from metarec_jax.training.checkpoints.checkpoint import Checkpoints
from metarec_jax.training.loop import Diverged, fit

_SECONDS_BETWEEN_LINES = 15.0


class World(NamedTuple):
    """The split, catalogue, validation tasks and test tasks that all methods of one seed share."""

    parts: Split
    catalogue: Catalogue
    held_out: Mapping[str, TaskSet]
    tasks: Mapping[str, TaskSet]


def compare(
    config: configs.Config,
    *,
    flags: Mapping[str, Any],
    learners: Sequence[str] | None,
    baselines: Sequence[str] | None,
    seeds: int,
    max_users: int,
    support_curve: Sequence[int],
    recommend: bool,
    max_ms: float | None,
    max_mib: float | None,
    out: Path | None,
    fresh: bool,
    data_dir: Path | None,
    as_json: bool,
) -> int:
    """Measure the missing cells one by one, then write and print the table."""
    for name, number in (("--seeds", seeds), ("--max-users", max_users)):
        if number < 1:
            raise MetarecError(f"{name} must be 1 or more, got {number}; omit it for the default")
    for name, bound in (("--max-ms", max_ms), ("--max-mib", max_mib)):
        if bound is not None and not bound > 0:
            raise MetarecError(f"{name} must be above 0, got {bound:g}; omit it for no bound")
    if any(k < 0 for k in support_curve):
        raise MetarecError(f"--support-curve expected support sizes of 0 or more, got {min(support_curve)}; correct it")
    ours = None if learners is None else learners_of(config, names_of(learners), flags)
    plain = None if baselines is None else [baseline_of(config, name) for name in names_of(baselines)]
    compile_cache()
    _log(f"reading {config.data.name}")
    data = _load(config, data_dir)
    counts = {"users": data.users.num_rows - 1, "items": data.items.num_rows - 1, "interactions": len(data)}
    print(f"{data.name}: {directories.summary({'counts': counts})}")
    for note in remarks(data):
        print(f"  note: {note}")
    liked_from = config.tasks.liked_from
    relevant = relevant_from(data, liked_from)  # raises before any training
    if ours is None:
        ours = learners_of(config, default_learners(data), flags)
    entries = all_entries(config, data, ours, plain, relevant)
    folder = out or Path("runs") / f"compare-{directories.name_of(data)}"
    if fresh:
        _clear_all(folder / "cells")
    try:
        (folder / "cells").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MetarecError(
            f"cannot write a comparison to {folder} ({error.strerror}); choose another folder with --out"
        ) from error
    table = _measure(entries, data, seeds, max_users, tuple(support_curve), folder / "cells", liked_from)
    results = write_and_print(
        table,
        [entry.name for entry in entries],
        {entry.name: entry.config for entry in entries if entry.kind == "learner"},
        data,
        folder,
        recommend=recommend,
        max_ms=max_ms,
        max_mib=max_mib,
    )
    if as_json:
        print(json.dumps(results))
    return 0


def _load(config: configs.Config, data_dir: Path | None) -> Interactions:
    store = open_store(config.data)
    if store is None:
        return build_data(config.data, data_dir=data_dir)
    from metarec_jax.data.store import opened as stores
    from metarec_jax.training.devices import budget as memory

    free, needed = memory.free(jax.local_devices()[0]), store.bytes_in_memory
    if free is not None and needed > free / 2:
        raise MetarecError(
            f"{store.path} requires about {memory.format_bytes(needed)} of memory, and {memory.format_bytes(free)} are "
            "free: a comparison holds all data in memory; compare on a part of the data, then train with metarec fit"
        )
    return stores.load(store)


def _measure(
    entries: Sequence[Entry],
    data: Interactions,
    seeds: int,
    max_users: int,
    curve: tuple[int, ...],
    folder: Path,
    liked_from: float | None,
) -> dict[tuple[str, int], Cell]:
    """All cells by name and seed, read from disk or else measured."""
    base, to_measure = directories.identity(entries[0].config, data), []
    relevant = relevant_from(data, liked_from)
    table: dict[tuple[str, int], Cell] = {}
    for seed in range(seeds):
        for entry in entries:
            identity = _identity(entry, seed, base, max_users, curve, relevant)
            path = cells.place(folder, entry.name, seed, identity)
            if (stored := cells.read(path, identity)) is not None:
                table[entry.name, seed] = stored
            else:
                to_measure.append((entry, seed, identity, path))
    total, done = len(entries) * seeds, len(entries) * seeds - len(to_measure)
    if done:
        _log(f"{done} of {total} cells are already measured")
    seconds: dict[tuple[str, int], float] = {}
    built: dict[str, Learner] = {}
    world: tuple[int, World] | None = None
    for k, (entry, seed, identity, path) in enumerate(to_measure):
        signals.keep(f"{done + k} of {total} cells are kept in {folder}; the same command measures the others")
        _log(f"cell {done + k + 1} of {total}: {entry.name}, seed {seed}{_left(seconds, to_measure[k:])}")
        began = time.perf_counter()
        seeded = _seeded(entry.config, seed)
        if world is None or world[0] != seed:
            world = seed, _world(seeded, data, seed, max_users)
            for note in world[1].parts.notes:
                _log(f"  note: {note}")
        for note in settled(seeded, world[1].parts.train) if entry.kind == "learner" else ():
            _log(f"  note: {note}")
        training = path.with_name(f"{path.name}.training")
        cell = _cell(entry, seeded, data, world[1], seed, curve, built, training, identity, liked_from)
        if cell.passing is None:
            with signals.saving(f"the cell {entry.name}, seed {seed},"):
                cells.write(path, cell, identity)
            _clear(training)
        seconds[entry.name, seed] = time.perf_counter() - began
        outcome = f"diverged: {cell.diverged}" if cell.diverged else "measured"
        outcome = outcome if cell.passing is None else f"not measured: {cell.passing}"
        _log(f"  {outcome} ({seconds[entry.name, seed]:.1f} s)")
        table[entry.name, seed] = cell
    return table


def _clear(training: Path) -> None:
    """Delete the training directory of a measured cell, unless another process holds its lock."""
    if training.is_dir():
        with contextlib.suppress(MetarecError), _locked(training):
            shutil.rmtree(training, ignore_errors=True)


def _clear_all(folder: Path) -> None:
    """Delete all cells.

    Raises:
      MetarecError: another process is training one of them; nothing is deleted.
    """
    with contextlib.ExitStack() as stack:
        for training in folder.glob("*.training"):
            stack.enter_context(_locked(training))
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(training: Path) -> Iterator[None]:
    handle, _ = run_directory.lock(training)
    try:
        yield
    finally:
        os.close(handle)


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _left(seconds: Mapping[tuple[str, int], float], to_measure: Sequence[tuple[Entry, int, Any, Any]]) -> str:
    """Estimated time for the remaining cells, from earlier cells of the same method, else of all methods."""
    if not seconds:
        return ""
    every = sum(seconds.values()) / len(seconds)
    left = 0.0
    for entry, *_ in to_measure:
        own = [s for (name, _), s in seconds.items() if name == entry.name]
        left += sum(own) / len(own) if own else every
    return f"; about {left / 60:.0f} min left" if left > 90 else f"; about {left:.0f} s left"


def _seeded(config: configs.Config, seed: int) -> configs.Config:
    """The configuration with the seeds of its split and of its training shifted by ``seed``."""
    parts = dataclasses.replace(config.split, seed=config.split.seed + seed)
    return dataclasses.replace(
        config, split=parts, train=dataclasses.replace(config.train, seed=config.train.seed + seed)
    )


def _identity(
    entry: Entry, seed: int, base: Mapping[str, Any], max_users: int, curve: tuple[int, ...], relevant: float
) -> dict[str, Any]:
    """Everything that the numbers of a cell depend on; sections that a closed form does not read are left out.

    Args:
      base: the identity of a run on the same data, which supplies its digests and the version.
    """
    settings = configs.to_dict(_seeded(entry.config, seed))
    settings["data"].pop("name")
    for unread in {"baseline": ("model", "learner", "train"), "trained": ("model", "learner"), "learner": ()}[
        entry.kind
    ]:
        settings.pop(unread)
    measured = {"max_users": max_users, "curve": list(curve), "validation_users": VALIDATION_USERS}
    measured |= {"relevant": relevant, "gain": "auto"}
    return {**base, "config": settings, "method": entry.name, "seed": seed, "measured": measured}


def _world(config: configs.Config, data: Interactions, seed: int, max_users: int) -> World:
    parts = build_split(config.split, data)
    held_out = fixed_tasks(config, parts, parts.validation, seed=0, max_users=VALIDATION_USERS)
    tasks = fixed_tasks(config, parts, parts.test, seed=seed, max_users=max_users)
    if not tasks:
        raise MetarecError(
            f"there are no test tasks in {', '.join(parts.test) or 'any scenario'}; choose --scenarios for which the "
            "data has users, or a larger --test"
        )
    return World(parts, catalogue(data, parts.train, config.tasks.user_rows), held_out, tasks)


def _cell(
    entry: Entry,
    config: configs.Config,
    data: Interactions,
    world: World,
    seed: int,
    curve: tuple[int, ...],
    built: dict[str, Learner],
    training: Path,
    identity: Mapping[str, Any],
    liked_from: float | None,
) -> Cell:
    """A cell: measured, diverged, or not measured because of a temporary fault such as a full disk."""
    from metarec_jax.evaluation.evaluate import evaluate

    try:
        if config.learner.name == "mixture" and entry.kind == "learner":
            method, seconds = _train_mixture(config, data, training, identity)
        elif entry.kind == "learner":
            if entry.name not in built:  # one object for all seeds, so that evaluation compiles once
                built[entry.name] = build_learner(config, data)
            method, seconds = _train(config, built[entry.name], data, world, training, identity)
        else:
            start = time.perf_counter()
            method = fit_plain(
                entry.name,
                world.parts.train,
                world.catalogue,
                world.held_out,
                steps=config.train.steps,
                seed=config.train.seed,
                say=_indented,
                liked_from=relevant_from(data, liked_from),
            )
            jax.block_until_ready(method.params)
            seconds = time.perf_counter() - start
        report = evaluate(
            {entry.name: method},
            world.tasks,
            world.catalogue,
            catalogue_ranking=True,
            curve=curve,
            baselines=() if entry.kind == "learner" else (entry.name,),
            seed=seed,
            **measuring_options(
                data, {entry.name: method}, liked_from, {entry.name: config} if entry.kind == "learner" else {}
            ),
        )
        took = cost(
            method,
            world.tasks,
            world.catalogue,
            train_seconds=seconds,
            batch_ms=1e3 * report.times[entry.name]["seconds_per_user"],
        )
        curves = None
        if entry.kind == "learner":
            curves = diagnose(config, data, method.params, world.catalogue, world.held_out)
    except Diverged as error:
        return Cell(None, None, diverged=_one_line(error))
    except BrokenPipeError:  # the reader has closed the pipe
        raise
    except (OSError, MemoryError) as error:
        return Cell(None, None, passing=files.cause(error))
    except (MetarecError, jax.errors.JaxRuntimeError) as error:
        return Cell(None, None, passing=_one_line(error))
    return Cell(report, took, curves)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


def _train(
    config: configs.Config,
    learner: Learner,
    data: Interactions,
    world: World,
    folder: Path,
    identity: Mapping[str, Any],
) -> tuple[Method, float]:
    """Train a learner as `metarec fit` does, on one device, or resume its training; returns it with the seconds taken.

    Raises:
      Interrupted: a signal arrived; the state is saved in ``folder``.
    """
    before, began, settings = _elapsed(folder), time.perf_counter(), config.train

    def spent() -> float:
        return before + time.perf_counter() - began

    last_line = began

    def progress(step: int, row: Mapping[str, float]) -> None:
        nonlocal last_line
        directories.write_json(folder / "elapsed.json", {"seconds": spent()})
        if time.perf_counter() - last_line > _SECONDS_BETWEEN_LINES:
            last_line = time.perf_counter()
            _log(f"  step {step} of {settings.steps}, {spent():.0f} s")

    options = training_options(config, learner, data, world.parts.train, world.catalogue, world.held_out)
    checkpoints: Any
    with signals.StopSignal() as stop, Checkpoints(folder, identity=identity, say=_indented) as checkpoints:
        result = fit(
            learner,
            build_source(config, world.parts.train),
            checkpoints=checkpoints,
            progress=progress,
            stop=lambda: bool(stop),
            **options,
        )
    if stop or result.stopped == "interrupted":
        _log(f"  {stop.name or 'stopped'}: saved at step {result.step}; the same command resumes")
        raise signals.Interrupted(stop.number or signal.SIGINT)
    return result.method, spent()


def _train_mixture(
    config: configs.Config, data: Interactions, folder: Path, identity: Mapping[str, Any]
) -> tuple[Method, float]:
    """As `_train`, for a mixture, whose members are kept as they are trained; the seconds are those of this session."""
    began = time.perf_counter()
    config = resolved(config, data)
    with Checkpoints(folder, identity=identity, say=_indented) as checkpoints:
        prepared = runs.prepare(config, runs.World(data), _indented)
        trained = runs.fit_prepared(config, data, prepared, directory=folder, checkpoints=checkpoints, quiet=True)
    if trained.result.stopped == "interrupted":
        raise signals.Interrupted(trained.signal or signal.SIGINT)
    return trained.result.method, time.perf_counter() - began


def _elapsed(folder: Path) -> float:
    """Seconds that earlier sessions of this training took."""
    try:
        return float(json.loads((folder / "elapsed.json").read_text())["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def _indented(text: str) -> None:
    _log(f"  {text}")
