"""``metarec evaluate``: measure a trained run beside the baselines, report."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from metarec_jax import signals
from metarec_jax.core import MetarecError
from metarec_jax.data.describe import describe
from metarec_jax.evaluation import diagnostics
from metarec_jax.experiment import config as configs
from metarec_jax.experiment import directory as directories
from metarec_jax.experiment.build import inner_rate
from metarec_jax.experiment.compiled import compile_cache
from metarec_jax.experiment.phases import Phases
from metarec_jax.experiment.run import Run, open_run
from metarec_jax.report.write import terminal_table, write_report
from metarec_jax.training.progress import read_history


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
        run = open_run(directory)
        if max_history is not None:
            tasks = dataclasses.replace(run.config.tasks, max_history=max_history)
            run = dataclasses.replace(run, config=dataclasses.replace(run.config, tasks=tasks))
    summary = measure(run, seeds, max_users, phases, liked_from)
    if as_json:
        print(json.dumps(summary))
    return 0


def last_measurement(directory: Path) -> dict[str, Any] | None:
    """What the last measurement found; None where there is none, or its file is damaged."""
    try:
        return json.loads((directory / "evaluation" / "summary.json").read_text())
    except (OSError, ValueError):
        return None


def measure(run: Run, seeds: int, max_users: int, phases: Phases, liked_from: float | None = None) -> dict[str, Any]:
    """Evaluate a run in a directory on its test part, beside the baselines; write the report, print the table."""
    directory, data, name = run.directory, run.data, run.config.learner.name
    assert directory is not None, "a report is written into the run's directory"
    report, by_steps, curves, liking = run.measure(
        seeds=seeds, max_users=max_users, liked_from=liked_from, phases=phases, say=print
    )
    rate = inner_rate(run.config, data)
    with phases("report"):
        print("writing the report", file=sys.stderr, flush=True)
        report.save(directory / "evaluation")
        write_report(
            report,
            directory,
            history=read_history(directory / "metrics.jsonl"),
            config=configs.to_dict(run.config),
            data_facts=describe(data) | {"liked": liking},
            title=f"{data.name}: {name}",
            by_inner_steps=by_steps,
            convergence=None if curves is None else {name: curves},
            inner_lr={name: rate},
        )
        summary = report.to_json() | {"phases": phases.seconds, "run": str(directory)}
        if by_steps is not None:
            summary["by_inner_steps"] = by_steps.to_json()["results"]
        if curves is not None:
            summary["convergence"] = diagnostics.to_json(curves)
        directories.write_json(directory / "evaluation" / "summary.json", summary)
    print(terminal_table(report))
    if not data.implicit:
        print(f"liked: {liking}")
    for note in report.notes:
        print(f"note: {note}")
    if curves is not None and (warning := diagnostics.remedy(curves, inner_lr=rate)):
        print(warning)
    print(f"report: {directory / 'report.html'}")
    print(phases)
    return summary
