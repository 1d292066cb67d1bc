"""``metarec fit`` and ``metarec evaluate``: train or resume, measure beside the baselines, report."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metarec_jax import config as configs
from metarec_jax import runs
from metarec_jax.commands.compiled import compile_cache
from metarec_jax.core import Learner, MetarecError, Method
from metarec_jax.data.describe import describe
from metarec_jax.data.interactions import Interactions
from metarec_jax.data.splits import Split
from metarec_jax.data.tasks import TaskSet, TaskSource, catalogue, make_tasks
from metarec_jax.online.history import spoken
from metarec_jax.results import Report
from metarec_jax.training.checkpoint import Checkpoints
from metarec_jax.training.progress import Progress, StopSignal, read_history

_VALIDATION_USERS = 1000
_CURVE = (0, 1, 2, 3, 5, 8, 12, 20, 30, 50)


class Phases:
    """Wall-clock seconds of the parts of a command."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 2)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        return f"{parts}; {sum(self.seconds.values()):.1f} s in all"


def fit(
    config: configs.Config, *, out: Path | None, fresh: bool, evaluate: bool, data_dir: Path | None, as_json: bool
) -> int:
    """``metarec fit``: train (or resume), then measure and report."""
    compile_cache()
    phases = Phases()
    with phases("load"):
        data = configs.build_data(config.data, data_dir=data_dir)
    _tell_data(data)
    directory = out or Path("runs") / runs.name_of(data)
    prepared = None
    if fresh or runs.result(directory) is None:  # what cannot be trained is refused before anything is made or cleared
        with phases("prepare"):
            prepared = _prepare(config, data)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MetarecError(f"{directory} cannot be a run directory ({error.strerror}); give --out another") from error
    with Checkpoints(directory, identity=runs.identity(config, data), fresh=fresh, say=print) as checkpoints:
        if fresh:
            _clear(directory)
        if prepared is not None:
            ended = _train(config, data, prepared, directory, checkpoints, phases)
        else:
            ended = runs.result(directory) or {}
            print(f"{directory} is finished already (--fresh starts over)")
        found = {"run": str(directory), **ended, "phases": phases.seconds}
        if evaluate and ended.get("stopped") != "interrupted":
            found = _measured(directory) or _measure(runs.open_run(directory), 1, 1000, phases)
            _tell_next(directory, data)
        elif ended.get("stopped") != "interrupted":
            print(f"trained: {directory}; {phases}")
            print(f"next: metarec evaluate {directory}")
    if as_json:
        print(json.dumps(found))
    return 0


def evaluate(directory: Path, *, seeds: int, max_users: int, as_json: bool) -> int:
    """``metarec evaluate``: measure a trained run beside the baselines."""
    for name, number in (("--seeds", seeds), ("--max-users", max_users)):
        if number < 1:
            raise MetarecError(f"{name} must be 1 or more, and is {number}; leave it out for the default")
    compile_cache()
    phases = Phases()
    with phases("open"):
        run = runs.open_run(directory)
    found = _measure(run, seeds, max_users, phases)
    if as_json:
        print(json.dumps(found))
    return 0


class _Prepared(NamedTuple):
    parts: Split
    learner: Learner
    source: TaskSource


def _prepare(config: configs.Config, data: Interactions) -> _Prepared:
    """All that may refuse the configuration, and is quick."""
    import jax

    parts = configs.build_split(config.split, data)
    _tell_split(parts)
    learner = configs.build_learner(config, data)
    jax.eval_shape(learner.init, jax.random.key(0))
    return _Prepared(parts, learner, configs.build_source(config.tasks, parts.train))


def _train(
    config: configs.Config,
    data: Interactions,
    prepared: _Prepared,
    directory: Path,
    checkpoints: Checkpoints,
    phases: Phases,
) -> dict[str, Any]:
    """Train to the end, or until a signal, and say how it ended: ``{"step": ..., "stopped": ...}``."""
    from metarec_jax.training.loop import fit
    from metarec_jax.training.validation import validator

    parts, learner, source = prepared
    with phases("warm start"):
        runs.write(directory, config, data, parts.train)
        params = configs.build_params(config, learner, parts.train)
        optimizers = configs.build_optimizers(config, parts.train)
        held = _tasks(config, parts, parts.validation, seed=0, max_users=_VALIDATION_USERS)
        known = catalogue(data, parts.train, config.tasks.user_rows)
        validate = validator(learner, held, known, rating_range=_range(data)) if held else None
    settings = config.train
    with (
        phases("train"),
        StopSignal() as stop,
        Progress(
            settings.steps,
            tasks=config.tasks.tasks,
            path=directory / "metrics.jsonl",
            tensorboard=directory / "tensorboard",
        ) as progress,
    ):
        found = fit(
            learner,
            source,
            steps=settings.steps,
            optimizer=optimizers.dense,
            rows=optimizers.rows,
            seed=settings.seed,
            params=params,
            validate=validate,
            validate_every=settings.validate_every,
            monitor="error",
            patience=settings.patience,
            checkpoints=_Resuming(checkpoints, progress),
            save_every=settings.save_every,
            progress=progress.update,
            say=progress.start,
            stop=lambda: bool(stop),
        )
    ended = {"step": found.step, "stopped": found.stopped}
    if found.stopped == "interrupted":
        print(f"{stop.name}: saved at step {found.step} of {settings.steps} in {directory}")
        print("resume: run the same command again")
        return ended
    print(f"trained {found.step} steps ({found.stopped})")
    runs.write_json(directory / "result.json", ended)
    return ended


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


def _measured(directory: Path) -> dict[str, Any] | None:
    """What the last measurement found; None where there is none, or its file is damaged."""
    try:
        return json.loads((directory / "evaluation" / "summary.json").read_text())
    except (OSError, ValueError):
        return None


def _measure(run: runs.Run, seeds: int, max_users: int, phases: Phases) -> dict[str, Any]:
    """Evaluate a run on its test part, beside the baselines; write the report, print the table."""
    from metarec_jax import results
    from metarec_jax.evaluation import evaluate
    from metarec_jax.report import terminal_table, write_report
    from metarec_jax.tuning import fit_baselines

    config = run.config
    own = runs.method(run)
    with phases("baselines"):
        parts = configs.build_split(config.split, run.data)
        if run.trained not in (None, runs.rows_digest(parts.train)):
            raise MetarecError(
                f"{run.directory} was trained on other rows than its split gives now, so it may have learned what is "
                f"held out; {f'put {config.split.partition} back, or ' if config.split.partition else ''}train again "
                "with --fresh"
            )
        held = _tasks(config, parts, parts.validation, seed=0, max_users=_VALIDATION_USERS)
        baselines = fit_baselines(parts.train, run.known, held, say=print)
    methods: dict[str, Method] = {config.learner.name: own} | baselines
    with phases("evaluate"):
        reports = [
            evaluate(
                methods,
                _tasks(config, parts, parts.test, seed=seed, max_users=max_users),
                run.known,
                rating_range=_range(run.data),
                relevant=_relevant(run.data),
                catalogue_ranking=True,
                curve=_CURVE,
                baselines=tuple(baselines),
                ranking_only=_ranking_only(run.data, methods),
                seed=seed,
            )
            for seed in range(seeds)
        ]
        report: Report = results.merge(reports)
        by_steps = _by_inner_steps(run, parts, max_users)
    with phases("report"):
        report.save(run.directory / "evaluation")
        write_report(
            report,
            run.directory,
            history=read_history(run.directory / "metrics.jsonl"),
            config=configs.to_dict(config),
            data_facts=describe(run.data),
            title=f"{run.data.name}: {config.learner.name}",
            by_inner_steps=by_steps,
        )
        found = report.to_json() | {"phases": phases.seconds, "run": str(run.directory)}
        if by_steps is not None:
            found["by_inner_steps"] = by_steps.to_json()["results"]
        runs.write_json(run.directory / "evaluation" / "summary.json", found)
    print(terminal_table(report))
    print(f"report: {run.directory / 'report.html'}")
    print(phases)
    return found


def _by_inner_steps(run: runs.Run, parts: Split, max_users: int) -> Report | None:
    """The trained parameters after fewer and more inner steps, on the first of the test scenarios; None for ridge."""
    from metarec_jax.evaluation import evaluate

    methods = {str(k): adapted for k, adapted in runs.by_inner_steps(run).items()}
    if not methods:
        return None
    scenario = "user_cold" if "user_cold" in parts.test else next(iter(parts.test))
    part = {scenario: parts.test[scenario]}
    return evaluate(
        methods,
        _tasks(run.config, parts, part, seed=0, max_users=max_users),
        run.known,
        rating_range=_range(run.data),
        relevant=_relevant(run.data),
        catalogue_ranking=run.data.implicit,
        ranking_only=_ranking_only(run.data, methods),
    )


def _tasks(
    config: configs.Config, parts: Split, scenarios: Mapping[str, Interactions], *, seed: int, max_users: int
) -> dict[str, TaskSet]:
    """Fixed tasks by scenario, of at most ``max_users`` users drawn with the seed."""
    found = {}
    for name, part in scenarios.items():
        if not len(part):
            continue
        tasks = make_tasks(
            part,
            history=parts.history.get(name),
            query=config.tasks.query,
            order=config.tasks.order,
            negatives=configs.negatives(config.tasks, part),
            seed=seed,
        )
        if len(tasks) > max_users:
            chosen = np.sort(np.random.default_rng(seed).choice(len(tasks), max_users, replace=False))
            tasks = tasks.take(chosen)
        if len(tasks):
            found[name] = tasks
    return found


def _range(data: Interactions) -> tuple[float, float] | None:
    return None if data.rating is None else (float(data.rating.min()), float(data.rating.max()))


def _relevant(data: Interactions) -> float:
    """From what rating on an item counts as liked: three quarters of the scale, 4 on 1..5; any click."""
    span = _range(data)
    return 1.0 if span is None else span[0] + 0.75 * (span[1] - span[0])


def _ranking_only(data: Interactions, methods: Mapping[str, Method]) -> tuple[str, ...]:
    return tuple(methods) if data.implicit else ("popularity",)


def _tell_data(data: Interactions) -> None:
    counts = {"users": data.users.num_rows - 1, "items": data.items.num_rows - 1, "interactions": len(data)}
    print(f"{data.name}: {runs.summary({'counts': counts})}")
    features = [*data.user_features, *data.item_features]
    print(f"  features: {', '.join(features) if features else 'none; items never rated are all alike'}")
    for note in data.notes:
        print(f"  note: {note}")


def _tell_split(parts: Split) -> None:
    print(f"  training on {len(parts.train):,} interactions of {len(np.unique(parts.train.user)):,} users")
    for name, part in parts.test.items():
        print(f"  held out for test, {name}: {len(part):,} of {len(np.unique(part.user)):,} users")
    for reason, count in parts.dropped.items():
        print(f"  left out: {count:,} ({reason})")


def _tell_next(directory: Path, data: Interactions) -> None:
    popular = int(np.bincount(data.item).argmax())
    title = data.items.decode([popular])[0] if data.titles is None else data.titles[popular - 1]
    best = "" if data.rating is None else f"={spoken(data.rating.max())}"
    print(f'next: metarec recommend {directory} --rate "{title}{best}" -n 10')


def _clear(directory: Path) -> None:
    """Forget a run's files; what the user put there stays."""
    for name in ("evaluation", "tensorboard", "plots"):
        shutil.rmtree(directory / name, ignore_errors=True)
    for name in (
        "result.json",
        "metrics.jsonl",
        "report.md",
        "report.html",
        "data.parquet",
        "catalogue.npz",
        "config.json",
    ):
        (directory / name).unlink(missing_ok=True)
