"""The metric that selects parameters, from validation tasks; fast enough for every few hundred steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metarec_jax.core import Array, Learner, MetarecError, Params, Task
from metarec_jax.data.catalogue import Catalogue, inputs
from metarec_jax.data.tasks import TaskSet, batches


def validator(
    learner: Learner,
    tasks: Mapping[str, TaskSet],
    catalogue: Catalogue,
    *,
    rating_range: tuple[float, float] | None,
    seed: int = 0,
    others: int = 100,
) -> Callable[[Params], dict[str, float]]:
    """``validate(params) -> {name: value}`` for `fit`, smaller is better; the tasks stay on the device.

    For ratings: ``mae`` over the query, with predictions clipped to ``rating_range``. For clicks: ``misranked``, the
    share of pairs of a query item and one of ``others`` random items in which the random item has the higher score; a
    tie counts half. Both are computed per scenario, and ``error``, the metric to monitor, is the mean over scenarios.

    Args:
      learner: the learner.
      tasks: validation tasks by scenario.
      catalogue: the users and items of the data.
      rating_range: (lowest, highest) rating; None for clicks.
      seed: seed of the random items.
      others: number of random items per query item.

    Raises:
      MetarecError: there is no validation task.
    """
    tasks = {name: chosen for name, chosen in tasks.items() if len(chosen)}
    if not tasks:
        raise MetarecError(
            "there is no validation task; hold out more users, or lower the smallest number of support examples"
        )
    items = np.random.default_rng(seed).integers(1, catalogue.item_row.shape[0], others)
    random_items = inputs(catalogue, jnp.int32(0), jnp.asarray(items, jnp.int32))
    parts = [
        (name, len(index), task)
        for name, chosen in tasks.items()
        for index, task in batches(chosen, catalogue, min(256, 1 << max(0, len(chosen) - 1).bit_length()))
    ]
    metric = "misranked" if rating_range is None else "mae"

    def task_error(params: Params, task: Task, key: Array) -> Array:
        adapted = learner.adapt(params, task.support, key)
        scores = learner.predict(params, adapted, task.query.inputs)
        if rating_range is not None:
            error = jnp.abs(jnp.clip(scores, *rating_range) - task.query.target)
        else:
            user = {name: column for name, column in task.query.inputs.items() if name.startswith("user_")}
            rivals = learner.predict(params, adapted, {**random_items, **user})[None, :]
            own = scores[:, None]
            error = ((rivals > own) + 0.5 * (rivals == own)).mean(1)
        return jnp.sum(error * task.query.mask) / jnp.maximum(task.query.mask.sum(), 1.0)

    @jax.jit
    def batch_errors(params: Params, task: Task) -> Array:
        return jax.vmap(task_error, (None, 0, None))(params, task, jax.random.key(seed))

    def validate(params: Params) -> dict[str, float]:
        total: dict[str, Any] = dict.fromkeys(tasks, 0.0)
        for name, count, task in parts:
            total[name] += float(np.asarray(batch_errors(params, task))[:count].sum())
        means = {name: total[name] / len(chosen) for name, chosen in tasks.items()}
        return {"error": float(np.mean(list(means.values())))} | {f"{metric}_{name}": v for name, v in means.items()}

    return validate
