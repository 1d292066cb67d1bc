"""Many methods under many seeds: one report of all of them, what each costs, and a choice by a stated rule.

The user is the unit of chance: over seeds that part the users anew, the tasks of one user stay together
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
from metarec_jax.data.tasks import Catalogue, TaskSet, batches
from metarec_jax.evaluation.intervals import FEWEST_USERS, estimate
from metarec_jax.evaluation.metrics import higher_is_better
from metarec_jax.evaluation.results import Report, difference, merge

_CALLS = 30


class Cost(NamedTuple):
    """What a method takes.

    Attributes:
      train_seconds: to fit it, tuning, warm start and compiling included.
      latency_ms: median milliseconds for one user alone, compiled: adapt on the support, score the query.
      batch_ms: milliseconds a user where many are adapted together.
      parameters_mib: of what was fitted; user_kib: of what one user adds to it.
    """

    train_seconds: float
    latency_ms: float
    batch_ms: float
    parameters_mib: float
    user_kib: float


class Gap(NamedTuple):
    """How much better one method is than another, positive is better, with its 95% interval over ``users`` users."""

    mean: float
    low: float
    high: float
    users: int

    @property
    def shown(self) -> bool:
        """Whether it is above zero, over users enough."""
        return self.low > 0 and self.users >= FEWEST_USERS


class Choice(NamedTuple):
    """What to use, and why.

    Attributes:
      method: the simplest that is not shown to be worse than ``best``; ``best``: of those within the budgets, the one
        with the best mean.
      gap: of ``best`` over ``method``; None where they are the same.
      over_simpler: of ``best`` over each candidate simpler than ``method``; all above zero.
      left_out: method -> why it was no candidate.
    """

    method: str
    best: str
    metric: str
    gap: Gap | None
    over_simpler: Mapping[str, Gap]
    left_out: Mapping[str, str]


def cost(
    method: Method, tasks: Mapping[str, TaskSet], known: Catalogue, *, train_seconds: float, batch_ms: float
) -> Cost:
    """Latency and memory, measured on one task: of the first scenario, that with the median support."""
    first = next(t for t in tasks.values() if len(t))
    lengths = first.support_mask.sum(1)
    middle = np.argsort(lengths, kind="stable")[len(lengths) // 2]
    _, one = next(batches(first.take(np.array([middle])), known, 1))
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
    """Means over seeds.

    >>> mean_cost([Cost(1.0, 2.0, 0.1, 3.0, 4.0), Cost(3.0, 4.0, 0.1, 3.0, 4.0)]).train_seconds
    2.0
    """
    return Cost(*(float(np.mean(column)) for column in zip(*costs, strict=True)))


def join(reports: Sequence[Report]) -> Report:
    """One report of methods that were evaluated apart, on the same tasks with the same seed: as if in one call.

    Raises:
      MetarecError: no report, a method twice, or other tasks or settings.
    """
    if not reports:
        raise MetarecError("no report to join; give one or more")
    first, facts = reports[0], ["scenario", "seed", "task", "user", "shown", "support", "queries"]
    methods = [name for report in reports for name in report.methods]
    if len(set(methods)) < len(methods):
        raise MetarecError(f"methods {methods} repeat; each report to join wants methods of its own")
    for other in reports[1:]:
        same = _shared(other) == _shared(first) and all(
            np.array_equal(a, b)
            for a, b in zip(*([_of_one(r, name) for name in facts] for r in (other, first)), strict=True)
        )
        if not same:
            raise MetarecError(
                f"{other.methods[0]!r} and {first.methods[0]!r} were not measured on the same tasks in the same way; "
                "evaluate them alike, then join"
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
    """One report of several seeds, each with a split of its own: the number of new items becomes its mean."""
    new = round(float(np.mean([report.settings["new_items"] for report in reports])))
    return merge([replace(report, settings=report.settings | {"new_items": new}) for report in reports])


def overall(report: Report, method: str, metric: str) -> float | None:
    """Mean over scenarios of a method's means; None where it lacks the metric in one of them."""
    found = report.summary()[method]
    means = [found[s][metric].mean for s in report.scenarios if metric in found.get(s, {})]
    return float(np.mean(means)) if len(means) == len(report.scenarios) else None


def gap(report: Report, method: str, other: str, metric: str) -> Gap:
    """How much better ``method`` is than ``other``, on the same tasks; each scenario counts alike, users are drawn."""
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
    """The simplest method that is not shown to be worse than the best of those within the budgets.

    Of the candidates, the one with the best mean over scenarios is found. Candidates are then gone through from the
    simplest: the first over which the best one's advantage is not shown is chosen (its 95% interval reaches zero, or
    there are too few users for a verdict).

    Args:
      simplicity: all methods, the simplest first.
      max_ms: bound on `Cost.latency_ms`; max_mib: on `Cost.parameters_mib`.

    Raises:
      MetarecError: no method within the budgets.
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
            left_out[name] = f"{took.latency_ms:.3g} ms a user, over {max_ms:g}"
        elif max_mib is not None and took.parameters_mib > max_mib:
            left_out[name] = f"{took.parameters_mib:.3g} MiB, over {max_mib:g}"
        else:
            means[name] = mean
    if not means:
        least = min(costs.values(), key=lambda c: c.latency_ms).latency_ms
        small = min(c.parameters_mib for c in costs.values())
        raise MetarecError(
            f"no method is within the budgets (the quickest takes {least:.3g} ms a user, the smallest {small:.3g} "
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
    """Which of ``names`` has the best mean with so many support examples shown, the same users at every point."""
    curve = report.curve(metric, scenario)
    curve = curve[curve["method"].isin(list(names))]
    found = []
    for shown in sorted(curve["shown"].unique()):
        at = curve[curve["shown"] == shown].set_index("method")["mean"].dropna()
        if len(at):
            found.append((int(shown), str(at.idxmax() if higher_is_better(metric) else at.idxmin())))
    return found


def _shared(report: Report) -> dict[str, Any]:
    return {k: v for k, v in report.settings.items() if k != "ranking_only"}


def _of_one(report: Report, fact: str) -> np.ndarray:
    """A column of facts, of the report's first method; scenarios by name."""
    rows = report.per_task[report.per_task["method"] == report.methods[0]]
    return rows[fact].astype(str).to_numpy() if fact == "scenario" else rows[fact].to_numpy()


def _bytes(tree: Any) -> int:
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
