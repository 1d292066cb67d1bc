"""The results of an evaluation: one row per task, and means, intervals and paired tests computed from the rows.

The user is the unit of sampling. Over one seed, each user of a scenario is one task, and the standard error is
``sd / sqrt(n)``; over several seeds (`merge`) the tasks of one user form a cluster in the standard error, so that
scoring the same users five times does not narrow the interval.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from metarec_jax.core import MetarecError
from metarec_jax.evaluation.intervals import FEWEST_USERS, Estimates, estimate
from metarec_jax.evaluation.metrics import higher_is_better

ALL = -1
"""The value of ``shown`` in rows with the whole support."""
FACTS = ("method", "scenario", "seed", "task", "user", "shown", "support", "queries")
"""Columns of `Report.per_task` that are not metrics."""


class Estimate(NamedTuple):
    """A mean over ``tasks`` tasks; ``low`` and ``high`` are its 95% t-interval over users, nan for a single user."""

    mean: float
    se: float
    low: float
    high: float
    tasks: int


class Difference(NamedTuple):
    """Mean of method - baseline over the tasks that both have, with its interval.

    Attributes:
      low, high, p_value: from one paired t-test over users: p < 0.05 exactly if the interval excludes zero.
      better: whether the interval excludes zero on the better side of this metric; worse: on the other side. Both are
        False with fewer than `intervals.FEWEST_USERS` users.
      users: number of users with a value for both methods.
    """

    method: str
    baseline: str
    scenario: str
    metric: str
    mean: float
    se: float
    low: float
    high: float
    p_value: float
    better: bool
    worse: bool
    tasks: int
    users: int


@dataclass(frozen=True)
class Report:
    """The rows of an evaluation, and their statistics.

    Attributes:
      per_task: one row per method, scenario, seed, task and support size shown. Columns: `FACTS`, where ``user`` is the
        vocabulary row, ``shown`` the number of support examples used (`ALL`: all), ``support`` the number available,
        ``queries`` the number of query items; and one column per metric, nan if it is undefined for the task.
      settings: the protocol: gain, relevant, rating_range, topn, curve, ...
      baselines: the methods that the others are compared with.
      times: method -> ``seconds_per_user`` (adapt and predict), ``first_call_seconds`` (calls that compiled).
      notes: what was skipped, one line each.
    """

    per_task: pd.DataFrame
    settings: dict[str, Any]
    baselines: tuple[str, ...]
    times: dict[str, dict[str, float]]
    notes: tuple[str, ...] = ()

    @property
    def methods(self) -> list[str]:
        """Names of the methods, in the order given."""
        return list(self.per_task["method"].cat.categories)

    @property
    def scenarios(self) -> list[str]:
        """Names of the scenarios that have tasks, in the order given."""
        return list(self.per_task["scenario"].cat.categories)

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics, as columns of ``per_task``."""
        return [name for name in self.per_task.columns if name not in FACTS]

    @property
    def seeds(self) -> list[int]:
        """The seeds of the rows."""
        return sorted(int(s) for s in self.per_task["seed"].unique())

    @cached_property
    def _cells(self) -> dict[tuple[str, str, int], pd.DataFrame]:
        ordered = self.per_task.sort_values(["seed", "task"], kind="stable")
        groups = ordered.groupby(["method", "scenario", "shown"], observed=True)
        return {(str(key[0]), str(key[1]), int(str(key[2]))): cell for key, cell in groups}  # type: ignore[index]

    def rows(self, method: str, scenario: str, shown: int = ALL) -> pd.DataFrame:
        """The rows of one method in one scenario, in the order of seed and task.

        Raises:
          MetarecError: no such rows.
        """
        cell = self._cells.get((method, scenario, shown))
        if cell is None:
            what = "its whole support" if shown == ALL else f"{shown} support examples"
            raise MetarecError(
                f"no rows of {method!r} in {scenario!r} with {what}; methods are {', '.join(self.methods)}, "
                f"scenarios {', '.join(self.scenarios)}"
            )
        return cell

    def summary(self, shown: int = ALL) -> dict[str, dict[str, dict[str, Estimate]]]:
        """``summary[method][scenario][metric]``: an `Estimate`, over all tasks of all seeds that have the metric.

        ``rmse_pooled`` is the root of the mean squared error over all query ratings. A metric that is undefined for all
        tasks of a method (rating errors of a ranking-only method) is omitted.
        """
        if shown not in self._summaries:
            self._summaries[shown] = self._summarise(shown)
        return self._summaries[shown]

    @cached_property
    def _summaries(self) -> dict[int, dict[str, dict[str, dict[str, Estimate]]]]:
        return {}

    def _summarise(self, shown: int) -> dict[str, dict[str, dict[str, Estimate]]]:
        found: dict[str, dict[str, dict[str, Estimate]]] = {name: {} for name in self.methods}
        for scenario in self.scenarios:
            present = [name for name in self.methods if (name, scenario, shown) in self._cells]
            if not present:
                continue
            cells = [self._cells[name, scenario, shown] for name in present]
            users = cells[0]["user"].to_numpy()
            values = np.concatenate([cell[self.metrics].to_numpy(np.float64) for cell in cells], axis=1)
            each = estimate(values, users)
            tasks = (~np.isnan(values)).sum(0)
            for m, name in enumerate(present):
                found[name][scenario] = {
                    metric: _one(each, k, int(tasks[k]))
                    for k, metric in enumerate(self.metrics, m * len(self.metrics))
                    if tasks[k]
                }
            if "squared_error" in self.metrics:
                error = np.stack([cell["squared_error"].to_numpy(np.float64) for cell in cells], axis=1)
                weight = np.stack([cell["queries"].to_numpy(np.float64) for cell in cells], axis=1)
                pooled = estimate(error, users, weight)
                for m, name in enumerate(present):
                    if tasks_with := int((~np.isnan(error[:, m])).sum()):
                        mean, se, low, high, n = _one(pooled, m, tasks_with)
                        root = mean**0.5
                        slope = se / (2 * root) if root else 0.0  # d sqrt(x) = dx / (2 sqrt(x))
                        low = low if np.isnan(low) else max(low, 0.0) ** 0.5
                        found[name][scenario]["rmse_pooled"] = Estimate(root, slope, low, high**0.5, n)
        return found

    def paired(self, method: str, baseline: str, metric: str, scenario: str) -> Difference:
        """Difference of two methods on the same tasks: method - baseline."""
        other = self.rows(baseline, scenario)
        return self._differences(method, self.rows(method, scenario), [(metric, baseline, other)])[0]

    def adaptation_gain(self, method: str, metric: str, scenario: str) -> Difference:
        """Effect of the support: with the whole support - without support, same method, same tasks."""
        before = self.rows(method, scenario, 0)
        return self._differences(method, self.rows(method, scenario), [(metric, f"{method}, no support", before)])[0]

    def _differences(
        self, method: str, mine: pd.DataFrame, others: Sequence[tuple[str, str, pd.DataFrame]]
    ) -> list[Difference]:
        scenario, users = str(mine["scenario"].iloc[0]), mine["user"].to_numpy()
        gaps = np.zeros((len(mine), len(others)))
        for k, (metric, name, other) in enumerate(others):
            if metric not in self.metrics:
                raise MetarecError(f"{metric!r} has no per-task values; use one of {', '.join(self.metrics)}")
            if not np.array_equal(mine[["seed", "task"]].to_numpy(), other[["seed", "task"]].to_numpy()):
                raise MetarecError(f"{method!r} and {name!r} were not run on the same tasks; evaluate them in one call")
            gaps[:, k] = difference(mine[metric], other[metric])
            if np.isnan(gaps[:, k]).all():
                raise MetarecError(f"{method!r} and {name!r} share no task of {scenario!r} that has {metric!r}")
        each = estimate(gaps, users)
        found = []
        for k, (metric, name, _) in enumerate(others):
            one, count = _one(each, k, int((~np.isnan(gaps[:, k])).sum())), int(each.users[k])
            above, below = (bool(side) and count >= FEWEST_USERS for side in (one.low > 0, one.high < 0))
            better, worse = (above, below) if higher_is_better(metric) else (below, above)
            p_value = float(each.p_value[k])
            found.append(Difference(method, name, scenario, metric, *one[:4], p_value, better, worse, one.tasks, count))
        return found

    def tied(self, metric: str, scenario: str, name: str) -> list[str]:
        """The other baselines whose mean is that of baseline ``name``, to six digits."""
        found = self.summary()
        means = {n: found[n][scenario][metric].mean for n in self.baselines if metric in found[n].get(scenario, {})}
        return [n for n in means if n != name and np.isclose(means[n], means[name], rtol=1e-6, atol=1e-9)]

    def best_baseline(self, metric: str, scenario: str) -> str | None:
        """The baseline with the best mean on these same tasks, which favours the baselines; None if there is none."""
        return self._best(self.baselines, metric, scenario)

    def best(self, metric: str, scenario: str) -> str | None:
        """The method with the best mean, including baselines."""
        return self._best(self.methods, metric, scenario)

    def _best(self, names: Sequence[str], metric: str, scenario: str) -> str | None:
        found = self.summary()
        means = {n: found[n][scenario][metric].mean for n in names if metric in found[n].get(scenario, {})}
        sign = 1 if higher_is_better(metric) else -1
        return max(means, key=lambda n: sign * means[n]) if means else None

    @cached_property
    def _compared(self) -> dict[tuple[str, ...], list[Difference]]:
        return {}

    def compare(self, metrics: Sequence[str] | None = None) -> list[Difference]:
        """Each method that is not a baseline against the best baseline, by scenario and metric."""
        chosen = tuple(self.metrics if metrics is None else metrics)
        if chosen not in self._compared:
            self._compared[chosen] = self._compare(chosen)
        return list(self._compared[chosen])

    def _compare(self, metrics: Sequence[str]) -> list[Difference]:
        found = self.summary()
        compared: list[Difference] = []
        for scenario in self.scenarios:
            best = {m: self.best_baseline(m, scenario) for m in metrics}
            for name in self.methods:
                rivals = [
                    (m, rival, self.rows(rival, scenario))
                    for m, rival in best.items()
                    if rival is not None and m in found[name].get(scenario, {})
                ]
                if rivals and name not in self.baselines:
                    compared += self._differences(name, self.rows(name, scenario), rivals)
        return compared

    def curve(self, metric: str, scenario: str, min_share: float = 0.25) -> pd.DataFrame:
        """A metric by the number of support examples shown, over the SAME tasks at every point.

        The last point is the largest that at least the fraction ``min_share`` of the tasks reaches; all points are over
        the tasks that reach it. Columns: method, shown, and the fields of `Estimate`.
        """
        first = self.rows(self.methods[0], scenario)
        sizes = first["support"].to_numpy()
        points = [k for k in self.settings["curve"] if k == 0 or (sizes >= k).mean() >= min_share]
        columns: list[tuple[str, int, np.ndarray]] = []
        for name in self.methods:
            cells = [self.rows(name, scenario, k) for k in points]
            values = [cell[metric].to_numpy(np.float64)[cell["support"] >= points[-1]] for cell in cells]
            if not np.isnan(values).all():
                columns += [(name, k, column) for k, column in zip(points, values, strict=True)]
        if not columns:
            return pd.DataFrame([], columns=["method", "shown", *Estimate._fields])
        every = np.stack([column for _, _, column in columns], axis=1)
        users = first["user"].to_numpy()[sizes >= points[-1]]
        each = estimate(every, users)
        table = [
            {"method": name, "shown": k, **_one(each, i, int((~np.isnan(column)).sum()))._asdict()}
            for i, (name, k, column) in enumerate(columns)
        ]
        return pd.DataFrame(table, columns=["method", "shown", *Estimate._fields])

    def by_seed(self, metric: str) -> pd.DataFrame:
        """Mean of a metric by method, scenario and seed, which shows the variation over seeds."""
        whole = self.per_task[self.per_task["shown"] == ALL]
        return whole.groupby(["method", "scenario", "seed"], observed=True)[metric].mean().reset_index()

    def counts(self) -> dict[str, dict[str, Any]]:
        """By scenario: tasks, users, query ratings, median support, and by metric the tasks where it is undefined."""
        found: dict[str, dict[str, Any]] = {}
        for scenario in self.scenarios:
            cells = [self.rows(name, scenario) for name in self.methods]
            missing = {m: min(int(cell[m].isna().sum()) for cell in cells) for m in self.metrics}
            found[scenario] = {
                "tasks": len(cells[0]),
                "users": int(cells[0]["user"].nunique()),
                "queries": int(cells[0]["queries"].sum()),
                "median_support": float(cells[0]["support"].median()),
                "no_answer": {m: n for m, n in missing.items() if n},
            }
        return found

    def to_json(self) -> dict[str, Any]:
        """Everything except the rows, ready for ``json.dumps``; nan becomes None.

        ``results[method][scenario][metric]`` is ``{"mean", "se", "low", "high"}``, and ``before_adapting`` alike.
        """
        return _plain(
            {
                "results": self._means(ALL),
                "before_adapting": self._means(0),
                "comparison": [d._asdict() for d in self.compare()],
                "baselines": self.baselines,
                "seeds": self.seeds,
                "counts": self.counts(),
                "times": self.times,
                "settings": self.settings,
                "notes": self.notes,
            }
        )

    def _means(self, shown: int) -> dict[str, Any]:
        return {
            method: {
                scenario: {m: {k: getattr(e, k) for k in ("mean", "se", "low", "high")} for m, e in row.items()}
                for scenario, row in scenarios.items()
            }
            for method, scenarios in self.summary(shown).items()
        }

    def save(self, folder: str | Path) -> Path:
        """Write ``per_task.parquet`` and ``summary.json`` (`to_json`) into a folder, which is created if absent."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.per_task.to_parquet(folder / "per_task.parquet", index=False)
        (folder / "summary.json").write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
        return folder


def load(folder: str | Path) -> Report:
    """Load a report that `Report.save` wrote.

    Raises:
      MetarecError: one of its two files is missing.
    """
    folder = Path(folder)
    for name in ("per_task.parquet", "summary.json"):
        if not (folder / name).is_file():
            raise MetarecError(f"there is no {name} in {folder}; evaluate first, or use the folder of an evaluation")
    facts = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    frame = pd.read_parquet(folder / "per_task.parquet")
    for column, names in (("method", list(facts["results"])), ("scenario", list(facts["counts"]))):
        frame[column] = pd.Categorical(frame[column].astype(str), names)
    return Report(frame, facts["settings"], tuple(facts["baselines"]), facts["times"], tuple(facts["notes"]))


def merge(reports: Sequence[Report]) -> Report:
    """One report of several seeds. Means are over seeds x tasks; the tasks of a user form a cluster in the errors.

    All reports must share the vocabulary of users, since ``user`` rows are compared. Times are averaged.

    Raises:
      MetarecError: there is no report, a seed repeats, or the reports differ in settings or methods.
    """
    if not reports:
        raise MetarecError("merge expected at least one report, got none; pass one or more")
    first = reports[0]
    settings = [{k: v for k, v in r.settings.items() if k != "rank_new_items"} for r in reports]  # by scenarios there
    for other, its in zip(reports[1:], settings[1:], strict=True):
        if its != settings[0] or other.methods != first.methods or other.baselines != first.baselines:
            raise MetarecError("reports differ in settings, methods or baselines; evaluate them alike, then merge")
    seeds = [seed for report in reports for seed in report.seeds]
    if len(set(seeds)) < len(seeds):
        raise MetarecError(f"seeds {sorted(seeds)} repeat; merge reports of different seeds")
    scenarios = list(dict.fromkeys(name for report in reports for name in report.scenarios))
    frame = pd.concat([report.per_task for report in reports], ignore_index=True)
    frame["method"] = pd.Categorical(frame["method"].astype(str), first.methods)
    frame["scenario"] = pd.Categorical(frame["scenario"].astype(str), scenarios)
    times = {
        name: {key: float(np.mean([r.times[name][key] for r in reports])) for key in first.times[name]}
        for name in first.times
    }
    notes = tuple(dict.fromkeys(note for report in reports for note in report.notes))
    new = dict.fromkeys(name for report in reports for name in report.settings.get("rank_new_items", ()))
    merged = first.settings | ({"rank_new_items": list(new)} if new else {})
    return replace(first, per_task=frame, settings=merged, times=times, notes=notes)


def difference(mine: pd.Series[float], other: pd.Series[float]) -> np.ndarray:
    """Differences per task, mine - other; 0 if both are the same infinity, nan if one is undefined."""
    a, b = mine.to_numpy(np.float64), other.to_numpy(np.float64)
    with np.errstate(invalid="ignore"):
        return np.where(np.isinf(a) & (a == b), 0.0, a - b)


def _one(each: Estimates, k: int, tasks: int) -> Estimate:
    return Estimate(float(each.mean[k]), float(each.se[k]), float(each.low[k]), float(each.high[k]), tasks)


def _plain(value: Any) -> Any:
    """Plain Python types, for JSON; values that are not finite become None."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (bool, str)) or value is None:
        return value
    if isinstance(value, (int, np.integer)):
        return int(value)
    return float(value) if np.isfinite(value) else None
