"""Many methods over many seeds: one report of all of them, the cost of each, and a choice by a stated rule.

The user is the unit of sampling: over seeds with different splits of the users, the tasks of one user stay together
(`results.merge`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
import pandas as pd

from metarec_jax.core import MetarecError, Method, Task
from metarec_jax.data.catalogue import Catalogue
from metarec_jax.data.tasks import TaskSet, batches
from metarec_jax.evaluation.intervals import FEWEST_USERS, estimate
from metarec_jax.evaluation.metrics import higher_is_better
from metarec_jax.evaluation.results import Report, difference, merge

_CALLS = 30


class Cost(NamedTuple):
    """The time and memory of a method.

    Attributes:
      train_seconds: time to fit it, including tuning, warm start and compilation.
      latency_ms: median milliseconds for a single user, compiled: adapt on the support, score the query.
      batch_ms: milliseconds per user when many are adapted together.
      parameters_mib: size of the fitted parameters; user_kib: size of the adapted state of one user.
    """

    train_seconds: float
    latency_ms: float
    batch_ms: float
    parameters_mib: float
    user_kib: float


class Gap(NamedTuple):
    """The advantage of one method over another, positive if better, with its 95% interval over ``users`` users."""

    mean: float
    low: float
    high: float
    users: int

    @property
    def shown(self) -> bool:
        """Whether the interval is above zero, with enough users for a verdict."""
        return self.low > 0 and self.users >= FEWEST_USERS


class Choice(NamedTuple):
    """The recommended method, with the reasons.

    Attributes:
      method: the simplest candidate that is not shown to be worse than ``best``.
      best: the candidate with the best mean; candidates are the methods within the budgets.
      gap: advantage of ``best`` over ``method``; None if they are the same.
      over_simpler: advantage of ``best`` over each candidate simpler than ``method``; all above zero.
      left_out: method -> why it was not a candidate.
    """

    method: str
    best: str
    metric: str
    gap: Gap | None
    over_simpler: Mapping[str, Gap]
    left_out: Mapping[str, str]


def cost(
    method: Method, tasks: Mapping[str, TaskSet], catalogue: Catalogue, *, train_seconds: float, batch_ms: float
) -> Cost:
    """Latency and memory, measured on the task of the first scenario that has the median support size."""
    first = next(t for t in tasks.values() if len(t))
    lengths = first.support_mask.sum(1)
    middle = np.argsort(lengths, kind="stable")[len(lengths) // 2]
    _, one = next(batches(first.take(np.array([middle])), catalogue, 1))
    key = jax.random.key(0)

    def run(params: Any, task: Task) -> Any:
        adapted = jax.vmap(lambda support: method.adapt(params, support, key))(task.support)
        return jax.vmap(lambda adapted, inputs: method.predict(params, adapted, inputs))(adapted, task.query.inputs)

    call = jax.jit(run)
    jax.block_until_ready(call(method.params, one))
    seconds = []
    for _ in range(_CALLS):
        began = time.perf_counter()
        jax.block_until_ready(call(method.params, one))
        seconds.append(time.perf_counter() - began)
    support = jax.tree.map(lambda leaf: leaf[0], one.support)
    adapted = jax.eval_shape(method.adapt, method.params, support, key)
    latency = 1e3 * float(np.median(seconds))
    return Cost(train_seconds, latency, batch_ms, _bytes(method.params) / 2**20, _bytes(adapted) / 2**10)


def mean_cost(costs: Sequence[Cost]) -> Cost:
    """The mean cost over seeds.

    >>> mean_cost([Cost(1.0, 2.0, 0.1, 3.0, 4.0), Cost(3.0, 4.0, 0.1, 3.0, 4.0)]).train_seconds
    2.0
    """
    return Cost(*(float(np.mean(column)) for column in zip(*costs, strict=True)))


def join(reports: Sequence[Report]) -> Report:
    """One report of methods that were evaluated separately on the same tasks with the same seed, as if in one call.

    Raises:
      MetarecError: there is no report, a method repeats, or tasks or settings differ.
    """
    if not reports:
        raise MetarecError("join expected at least one report, got none; pass one or more")
    first, facts = reports[0], ["scenario", "seed", "task", "user", "shown", "support", "queries"]
    methods = [name for report in reports for name in report.methods]
    if len(set(methods)) < len(methods):
        raise MetarecError(f"methods {methods} repeat; join reports of different methods")
    for other in reports[1:]:
        same = _shared(other) == _shared(first) and all(
            np.array_equal(a, b)
            for a, b in zip(*([_of_one(r, name) for name in facts] for r in (other, first)), strict=True)
        )
        if not same:
            raise MetarecError(
                f"{other.methods[0]!r} and {first.methods[0]!r} were not measured on the same tasks in the same way; "
                "evaluate them with the same tasks and settings, then join"
            )
    frame = pd.concat([report.per_task for report in reports], ignore_index=True)
    frame["method"] = pd.Categorical(frame["method"].astype(str), methods)
    ranking = [name for report in reports for name in report.settings["ranking_only"]]
    return Report(
        frame,
        first.settings | {"ranking_only": ranking},
        tuple(name for report in reports for name in report.baselines),
        {name: times for report in reports for name, times in report.times.items()},
        tuple(dict.fromkeys(note for report in reports for note in report.notes)),
    )


def over_seeds(reports: Sequence[Report]) -> Report:
    """One report of several seeds, each with its own split; the number of new items is the mean over seeds."""
    new = round(float(np.mean([report.settings["new_items"] for report in reports])))
    return merge([replace(report, settings=report.settings | {"new_items": new}) for report in reports])


def overall(report: Report, method: str, metric: str) -> float | None:
    """Mean over scenarios of a method's means; None if it lacks the metric in one of them."""
    summary = report.summary()[method]
    means = [summary[s][metric].mean for s in report.scenarios if metric in summary.get(s, {})]
    return float(np.mean(means)) if len(means) == len(report.scenarios) else None


def gap(report: Report, method: str, other: str, metric: str) -> Gap:
    """Advantage of ``method`` over ``other`` on the same tasks, with equal weight for each scenario."""
    sign = 1.0 if higher_is_better(metric) else -1.0
    values, users, weights = [], [], []
    for scenario in report.scenarios:
        mine, theirs = (report.rows(name, scenario) for name in (method, other))
        values.append(sign * difference(mine[metric], theirs[metric]))
        users.append(mine["user"].to_numpy())
        weights.append(np.full(len(mine), 1.0 / max(int((~np.isnan(values[-1])).sum()), 1)))
    every, weight = np.concatenate(values)[:, None], np.concatenate(weights)[:, None]
    e = estimate(every, np.concatenate(users), weight)
    return Gap(float(e.mean[0]), float(e.low[0]), float(e.high[0]), int(e.users[0]))


def choose(
    report: Report,
    costs: Mapping[str, Cost],
    metric: str,
    simplicity: Sequence[str],
    *,
    max_ms: float | None = None,
    max_mib: float | None = None,
) -> Choice:
    """The simplest method that is not shown to be worse than the best method within the budgets.

    The best candidate is the one with the best mean over scenarios. The choice is the first candidate, from the
    simplest, over which the best one's advantage is not shown: the 95% interval of the advantage reaches zero, or there
    are too few users for a verdict.

    Args:
      simplicity: all methods, simplest first.
      max_ms: bound on `Cost.latency_ms`; max_mib: bound on `Cost.parameters_mib`.

    Raises:
      MetarecError: no method is within the budgets.
    """
    left_out: dict[str, str] = {}
    means: dict[str, float] = {}
    for name in simplicity:
        if name not in report.methods:
            continue
        took, mean = costs[name], overall(report, name, metric)
        if mean is None:
            left_out[name] = f"has no {metric}"
        elif max_ms is not None and took.latency_ms > max_ms:
            left_out[name] = f"{took.latency_ms:.3g} ms per user, over {max_ms:g}"
        elif max_mib is not None and took.parameters_mib > max_mib:
            left_out[name] = f"{took.parameters_mib:.3g} MiB, over {max_mib:g}"
        else:
            means[name] = mean
    if not means:
        least = min(costs.values(), key=lambda c: c.latency_ms).latency_ms
        small = min(c.parameters_mib for c in costs.values())
        raise MetarecError(
            f"no method is within the budgets (the fastest takes {least:.3g} ms per user, the smallest {small:.3g} "
            "MiB); raise --max-ms or --max-mib"
        )
    sign = 1 if higher_is_better(metric) else -1
    over_simpler: dict[str, Gap] = {}
    best = max(means, key=lambda name: sign * means[name])
    for name in means:
        ahead = None if name == best else gap(report, best, name, metric)
        if ahead is None or not ahead.shown:
            return Choice(name, best, metric, ahead, over_simpler, left_out)
        over_simpler[name] = ahead
    raise AssertionError("the best method is a candidate")


def by_support(report: Report, metric: str, scenario: str, names: Sequence[str]) -> list[tuple[int, str]]:
    """The method of ``names`` with the best mean at each support size, on the same users at every size."""
    curve = report.curve(metric, scenario)
    curve = curve[curve["method"].isin(list(names))]
    winners = []
    for shown in sorted(curve["shown"].unique()):
        at = curve[curve["shown"] == shown].set_index("method")["mean"].dropna()
        if len(at):
            winners.append((int(shown), str(at.idxmax() if higher_is_better(metric) else at.idxmin())))
    return winners


def _shared(report: Report) -> dict[str, Any]:
    return {k: v for k, v in report.settings.items() if k != "ranking_only"}


def _of_one(report: Report, fact: str) -> np.ndarray:
    """A column of the report's rows, for its first method; scenarios as names."""
    rows = report.per_task[report.per_task["method"] == report.methods[0]]
    return rows[fact].astype(str).to_numpy() if fact == "scenario" else rows[fact].to_numpy()


def _bytes(tree: Any) -> int:
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
