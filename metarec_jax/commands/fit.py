"""``metarec fit``: train or resume, on one device or many, then measure and report."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shlex
import shutil
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from metarec_jax import options, signals
from metarec_jax.commands.evaluate import Phases, measure, measured
from metarec_jax.core import Learner, MetarecError
from metarec_jax.data.describe import remarks
from metarec_jax.data.interactions import Interactions
from metarec_jax.data.splits import Split
from metarec_jax.data.tasks import Catalogue, TaskSource, catalogue
from metarec_jax.experiment import config as configs
from metarec_jax.experiment import runs
from metarec_jax.experiment.build import (
    build_data,
    build_learner,
    build_mesh,
    build_source,
    build_split,
    build_stream,
    open_store,
    settled,
)
from metarec_jax.experiment.compiled import compile_cache
from metarec_jax.experiment.protocol import VALIDATION_USERS, fixed_tasks, relevant_from, training_options
from metarec_jax.serving.history import spoken
from metarec_jax.training.checkpoints.checkpoint import Checkpoints, saved_metrics
from metarec_jax.training.checkpoints.lock import AnotherRun
from metarec_jax.training.devices import launch, processes
from metarec_jax.training.progress import Progress

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from metarec_jax.data.store.held_out import Held
    from metarec_jax.data.store.opened import Store


class Devices(NamedTuple):
    """Who works on a run: the mesh as text, and how this process finds the others. See ``metarec fit --help``."""

    mesh: str | None = None
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def fit(
    config: configs.Config,
    *,
    out: Path | None,
    fresh: bool,
    evaluate: bool,
    data_dir: Path | None,
    as_json: bool,
    devices: Devices,
    liked_from: float | None = None,
) -> int:
    """``metarec fit``: train (or resume), then measure and report. Of several processes the first one speaks."""
    sizes = options.mesh_sizes(devices.mesh)
    wanted, several = sizes.get("data", 1) * sizes.get("model", 1), devices.num_processes or launch.launched()
    launch.cpu_devices(wanted // max(several, 1))
    launch.join(devices.coordinator, devices.num_processes, devices.process_id)
    with contextlib.ExitStack() as stack:
        if not processes.is_first():
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        return _fit(config, out, fresh, evaluate, data_dir, as_json, build_mesh(sizes), liked_from)


def _fit(
    config: configs.Config,
    out: Path | None,
    fresh: bool,
    evaluate: bool,
    data_dir: Path | None,
    as_json: bool,
    mesh: Mesh | None,
    liked_from: float | None,
) -> int:
    compile_cache()
    phases, first = Phases(), processes.is_first()
    signals.keep("nothing was trained yet")
    if first:
        print(f"reading {config.data.name}", file=sys.stderr, flush=True)
    with phases("load"):
        world = _load(config, data_dir)
    data = world.data
    relevant_from(data, liked_from)  # refused before training
    _tell_data(data)
    directory = out or Path("runs") / runs.name_of(data)
    prepared = None
    # What cannot be trained is refused before anything is made or cleared.
    if processes.decide(lambda: fresh or runs.result(directory) is None):
        with phases("prepare"):
            prepared = _prepare(config, world)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MetarecError(f"{directory} cannot be a run directory ({error.strerror}); give --out another") from error
    try:
        opened = Checkpoints(directory, identity=runs.identity(config, data, world.digest), fresh=fresh, say=print)
    except AnotherRun as error:
        if error.other_data:
            raise MetarecError(runs.other_data(directory, config, data)) from error
        raise
    with opened as checkpoints:
        number: int | None = None
        if fresh and first:
            _clear(directory)
        if prepared is not None:
            ended, number = _train(config, data, prepared, directory, checkpoints, phases, mesh)
        else:
            ended = runs.result(directory) or {}
            print(f"{directory} is finished already (--fresh starts over)")
        found = {"run": str(directory), **ended, "phases": phases.seconds}
        checkpoints.wait()
        launch.leave()
        interrupted = ended.get("stopped") == "interrupted"
        if not first or interrupted:
            if as_json and first:
                print(json.dumps(found))
            return 0 if number is None else 128 + number
        signals.keep(f"the training is kept in {directory}, and the same command measures it")
        if number is not None:
            raise signals.Interrupted(number)
        if evaluate:
            before = measured(directory) if liked_from is None else None
            found = before or measure(runs.open_run(directory), 1, 1000, phases, liked_from)
            _tell_next(directory, data)
        else:
            print(f"trained: {directory}; {phases}")
            print(f"next: metarec evaluate {shlex.quote(str(directory))}")
    if as_json:
        print(json.dumps(found))
    return 0


class _World(NamedTuple):
    """What a run learns from. Of a store that is streamed, ``data`` is the part that came into memory."""

    data: Interactions
    store: Store | None = None
    held: Held | None = None

    @property
    def digest(self) -> str | None:
        return None if self.held is None or self.store is None else self.store.digest


def _load(config: configs.Config, data_dir: Path | None) -> _World:
    """The data in memory; of a store that does not fit there, the users held out and a sample of the others."""
    store = open_store(config.data)
    if store is None:
        return _World(build_data(config.data, data_dir=data_dir))
    import jax

    from metarec_jax.data.store import opened as stores
    from metarec_jax.data.store.held_out import hold_out
    from metarec_jax.training.devices import budget as memory

    free, needed = memory.free(jax.local_devices()[0]), store.bytes_in_memory
    told = f"{store.path}: {store.interactions:,} interactions would take about {memory.spoken(needed)} of memory"
    if processes.decide(lambda: free is None or needed < free / 2):
        print(f"{told}: all are loaded")
        return _World(stores.load(store))
    print(f"{told}, of {memory.spoken(free or 0)} that are free: they are streamed")
    given = config.split
    held = hold_out(
        store,
        validation=given.validation,
        test=given.test,
        seed=given.seed,
        user_rows=config.tasks.user_rows,
    )
    print("  in memory: users held out, and a sample of the others for a warm start and the baselines")
    return _World(held.data, store, held)


class _Prepared(NamedTuple):
    parts: Split
    learner: Learner
    source: TaskSource
    known: Catalogue
    part: np.ndarray | None


def _prepare(config: configs.Config, world: _World) -> _Prepared:
    """All that may refuse the configuration, and is quick."""
    import jax

    data, held = world.data, world.held
    parts = build_split(config.split, data) if held is None else held.split
    _tell_split(parts)
    learner = build_learner(config, data)
    jax.eval_shape(learner.init, jax.random.key(0))
    if world.store is not None and held is not None:
        source = build_stream(config, world.store, held)
        print(f"  streaming the histories of {len(held.users):,} users")
        return _Prepared(parts, learner, source, held.known, held.part)
    known = catalogue(data, parts.train, config.tasks.user_rows)
    source = build_source(config, parts.train)
    for note in settled(config, parts.train):
        print(f"  note: {note}")
    return _Prepared(parts, learner, source, known, None)


def _train(
    config: configs.Config,
    data: Interactions,
    prepared: _Prepared,
    directory: Path,
    checkpoints: Checkpoints,
    phases: Phases,
    mesh: Mesh | None,
) -> tuple[dict[str, Any], int | None]:
    """Train to the end, or until a signal: ``{"step": ..., "stopped": ...}`` and the signal that came, if any did."""
    from metarec_jax.training.loop import fit

    parts, learner, source, known, part = prepared
    first = processes.is_first()
    with phases("warm start"):
        if first:
            runs.write(directory, config, data, parts.train, known, part)
        held = fixed_tasks(config, parts, parts.validation, seed=0, max_users=VALIDATION_USERS)
        given = training_options(config, learner, data, parts.train, known, held)
    settings = config.train
    signals.keep(functools.partial(_kept, directory, settings.steps))
    with (
        phases("train", silent=True),
        launch.together("start all of them again with the same command to resume"),
        signals.StopSignal() as stop,
        Progress(
            settings.steps,
            tasks=config.tasks.tasks,
            path=directory / "metrics.jsonl" if first else None,
            tensorboard=directory / "tensorboard" if first else None,
            quiet=not first,
        ) as progress,
    ):
        progress.note("compiling the outer step")
        found = fit(
            learner,
            source,
            checkpoints=_Resuming(checkpoints, progress),
            progress=progress.update,
            say=progress.start,
            stop=launch.agreed(lambda: bool(stop)),
            mesh=mesh,
            **given,
        )
    ended = {"step": found.step, "stopped": found.stopped}
    if found.stopped == "interrupted":
        print(f"{stop.name or 'stopped'}: saved at step {found.step} of {settings.steps} in {directory}")
        print("resume: run the same command again")
        return ended, stop.number or signal.SIGTERM  # one that reached another process
    print(f"trained {found.step} steps ({found.stopped})")
    if first:
        runs.write_json(directory / "result.json", ended)
    return ended, stop.number


def _kept(directory: Path, steps: int) -> str:
    """What is on disk of a training that a signal ended without another save."""
    saved = saved_metrics(directory, which="latest")
    if saved is None:
        return "nothing was trained yet"
    return f"step {saved[0]} of {steps} is kept in {directory}, and the same command resumes there"


class _Resuming:
    """Checkpoints that tell the progress where training goes on."""

    def __init__(self, checkpoints: Checkpoints, progress: Progress) -> None:
        self._progress, self.save = progress, checkpoints.save
        self._checkpoints = checkpoints

    def restore(self, like: Any, *, which: Any = "latest") -> tuple[int, Any] | None:
        found = self._checkpoints.restore(like, which=which)
        if which == "latest" and found is not None:
            self._progress.resume(found[0])
            self._progress.note(f"resuming at step {found[0]}")
        return found


def _tell_data(data: Interactions) -> None:
    counts = {"users": data.users.num_rows - 1, "items": data.items.num_rows - 1, "interactions": len(data)}
    print(f"{data.name}: {runs.summary({'counts': counts})}")
    features = [*data.user_features, *data.item_features]
    print(f"  features: {', '.join(features) if features else 'none; items never rated are all alike'}")
    for note in (*data.notes, *remarks(data)):
        print(f"  note: {note}")


def _tell_split(parts: Split) -> None:
    print(f"  training on {len(parts.train):,} interactions of {len(np.unique(parts.train.user)):,} users")
    for name, part in parts.test.items():
        print(f"  held out for test, {name}: {len(part):,} of {len(np.unique(part.user)):,} users")
    for reason, count in parts.dropped.items():
        print(f"  left out: {count:,} ({reason})")
    for note in parts.notes:
        print(f"  note: {note}")


def _tell_next(directory: Path, data: Interactions) -> None:
    popular = int(np.bincount(data.item).argmax())
    title = data.items.decode([popular])[0] if data.titles is None else data.titles[popular - 1]
    rating = ""
    if data.rating is not None:  # one that many give, were the scale a count
        rating = f"={spoken(np.quantile(data.rating[data.item == popular], 0.75, method='nearest'))}"
    print(f"next: metarec recommend {shlex.quote(str(directory))} --rate {shlex.quote(f'{title}{rating}')} -n 10")


def _clear(directory: Path) -> None:
    """Forget a run's files; what the user put there stays."""
    for name in ("evaluation", "tensorboard", "plots"):
        shutil.rmtree(directory / name, ignore_errors=True)
    for name in (
        "result.json",
        "tuned.json",
        "metrics.jsonl",
        "report.md",
        "report.html",
        "data.parquet",
        "catalogue.npz",
        "config.json",
    ):
        (directory / name).unlink(missing_ok=True)
