"""``metarec evaluate``: measure a trained run beside the baselines, report."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from metarec_jax import signals
from metarec_jax.core import MetarecError, Method
from metarec_jax.data.describe import describe
from metarec_jax.data.splits import Split
from metarec_jax.evaluation.results import Report
from metarec_jax.experiment import config as configs
from metarec_jax.experiment import runs
from metarec_jax.experiment.build import inner_rate
from metarec_jax.experiment.compiled import compile_cache
from metarec_jax.experiment.diagnose import diagnose
from metarec_jax.experiment.protocol import VALIDATION_USERS, fixed_tasks, liked, measuring_options
from metarec_jax.training.progress import read_history

_CURVE = (0, 1, 2, 3, 5, 8, 12, 20, 30, 50)


class Phases:
    """Wall-clock seconds of the parts of a command. A part that takes long prints a line every few seconds.

    Args:
      every: seconds between two lines.
      say: called with each line, in a thread; by default it is printed.
    """

    def __init__(self, every: float = 5.0, say: Callable[[str], None] | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._every, self._done = every, ""
        self._say = say or partial(print, flush=True)

    def progress(self, done: int, total: int) -> None:
        """What the next line reports of the part that is running."""
        self._done = f"{done:,} of {total:,} tasks, "

    @contextlib.contextmanager
    def __call__(self, name: str, *, silent: bool = False) -> Iterator[None]:
        """Time a part; ``silent``: it prints progress of its own."""
        began, ended, self._done = time.perf_counter(), threading.Event(), ""

        def tell() -> None:
            while not ended.wait(self._every):
                self._say(f"{name}: {self._done}{time.perf_counter() - began:.0f} s so far")

        teller = threading.Thread(target=tell, daemon=True)
        if not silent:
            teller.start()
        try:
            yield
        finally:
            ended.set()
            if not silent:
                teller.join()
        self.seconds[name] = round(time.perf_counter() - began, 2)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        return f"{parts}; {sum(self.seconds.values()):.1f} s in all"


def evaluate(
    directory: Path,
    *,
    seeds: int,
    max_users: int,
    liked_from: float | None,
    max_history: int | None = None,
    as_json: bool,
) -> int:
    """``metarec evaluate``: measure a trained run beside the baselines."""
    for name, number in (("--seeds", seeds), ("--max-users", max_users), ("--max-history", max_history)):
        if number is not None and number < 1:
            raise MetarecError(f"{name} must be 1 or more, and is {number}; leave it out for the default")
    compile_cache()
    phases = Phases()
    signals.keep(f"the training is kept in {directory}")
    with phases("open"):
        run = runs.open_run(directory)
        if max_history is not None:
            tasks = dataclasses.replace(run.config.tasks, max_history=max_history)
            run = run._replace(config=dataclasses.replace(run.config, tasks=tasks))
    found = measure(run, seeds, max_users, phases, liked_from)
    if as_json:
        print(json.dumps(found))
    return 0


def measured(directory: Path) -> dict[str, Any] | None:
    """What the last measurement found; None where there is none, or its file is damaged."""
    try:
        return json.loads((directory / "evaluation" / "summary.json").read_text())
    except (OSError, ValueError):
        return None


def measure(
    run: runs.Run, seeds: int, max_users: int, phases: Phases, liked_from: float | None = None
) -> dict[str, Any]:
    """Evaluate a run on its test part, beside the baselines; write the report, print the table."""
    from metarec_jax.baselines.tuning import fit_baselines
    from metarec_jax.evaluation import diagnostics, results
    from metarec_jax.evaluation.evaluate import evaluate
    from metarec_jax.report.write import terminal_table, write_report

    config, liking = run.config, liked(run.data, liked_from)
    own, rate = runs.method(run), inner_rate(config, run.data)
    with phases("baselines"):
        parts = runs.split_of(run)
        if run.trained not in (None, runs.rows_digest(parts.train)):
            raise MetarecError(
                f"{run.directory} was trained on other rows than its split gives now, so it may have learned what is "
                f"held out; {f'put {config.split.partition} back, or ' if config.split.partition else ''}train again "
                "with --fresh"
            )
        held = fixed_tasks(config, parts, parts.validation, seed=0, max_users=VALIDATION_USERS)
        print("tuning the baselines", file=sys.stderr, flush=True)
        baselines = fit_baselines(parts.train, run.known, held, say=print, kept=_Tuned(run))
    methods: dict[str, Method] = {config.learner.name: own} | baselines
    with phases("evaluate"):
        print(f"evaluating {len(methods)} methods", file=sys.stderr, flush=True)
        reports = [
            evaluate(
                methods,
                fixed_tasks(config, parts, parts.test, seed=seed, max_users=max_users),
                run.known,
                catalogue_ranking=True,
                curve=_CURVE,
                baselines=tuple(baselines),
                seed=seed,
                progress=phases.progress,
                **measuring_options(run.data, methods, liked_from),
            )
            for seed in range(seeds)
        ]
        report: Report = results.merge(reports)
        by_steps = _by_inner_steps(run, parts, max_users, liked_from)
        curves = diagnose(config, run.data, own.params, run.known, held)
    with phases("report"):
        print("writing the report", file=sys.stderr, flush=True)
        report.save(run.directory / "evaluation")
        write_report(
            report,
            run.directory,
            history=read_history(run.directory / "metrics.jsonl"),
            config=configs.to_dict(config),
            data_facts=describe(run.data) | {"liked": liking},
            title=f"{run.data.name}: {config.learner.name}",
            by_inner_steps=by_steps,
            convergence=None if curves is None else {config.learner.name: curves},
            inner_lr={config.learner.name: rate},
        )
        found = report.to_json() | {"phases": phases.seconds, "run": str(run.directory)}
        if by_steps is not None:
            found["by_inner_steps"] = by_steps.to_json()["results"]
        if curves is not None:
            found["convergence"] = diagnostics.to_json(curves)
        runs.write_json(run.directory / "evaluation" / "summary.json", found)
    print(terminal_table(report))
    if not run.data.implicit:
        print(f"liked: {liking}")
    for note in report.notes:
        print(f"note: {note}")
    if curves is not None and (warning := diagnostics.remedy(curves, inner_lr=rate)):
        print(warning)
    print(f"report: {run.directory / 'report.html'}")
    print(phases)
    return found


class _Tuned(dict[str, dict[str, Any]]):
    """What tuning found, by baseline, kept in ``tuned.json`` of the run: a measurement that was ended reuses it."""

    def __init__(self, run: runs.Run) -> None:
        self._path = run.directory / "tuned.json"
        self._identity = json.loads(json.dumps(runs.identity(run.config, run.data)))
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(self._path.read_text())
            if kept["identity"] == self._identity:
                super().__init__(kept["tuned"])

    def __setitem__(self, name: str, settings: dict[str, Any]) -> None:
        super().__setitem__(name, settings)
        runs.write_json(self._path, {"identity": self._identity, "tuned": self})


def _by_inner_steps(run: runs.Run, parts: Split, max_users: int, liked_from: float | None) -> Report | None:
    """The trained parameters after fewer and more inner steps, on the first of the test scenarios; None for ridge."""
    from metarec_jax.evaluation.evaluate import evaluate

    methods = {str(k): adapted for k, adapted in runs.by_inner_steps(run).items()}
    if not methods:
        return None
    scenario = "user_cold" if "user_cold" in parts.test else next(iter(parts.test))
    part = {scenario: parts.test[scenario]}
    return evaluate(
        methods,
        fixed_tasks(run.config, parts, part, seed=0, max_users=max_users),
        run.known,
        catalogue_ranking=run.data.implicit,
        **measuring_options(run.data, methods, liked_from),
    )
