"""What selects: a number from validation tasks, quick enough to be taken every few hundred steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metarec_jax.core import Array, Learner, MetarecError, Params, Task
from metarec_jax.data.tasks import Catalogue, TaskSet, batches, inputs


def validator(
    learner: Learner,
    tasks: Mapping[str, TaskSet],
    known: Catalogue,
    *,
    rating_range: tuple[float, float] | None,
    seed: int = 0,
    others: int = 100,
) -> Callable[[Params], dict[str, float]]:
    """``validate(params) -> {name: value}`` for `fit`, smaller is better, the tasks already on the device.

    For ratings: ``mae`` over the query, predictions clipped to ``rating_range``. For clicks: ``misranked``, the share
    of pairs of a query item and one of ``others`` random items in which the random one has the higher score; a tie
    counts half. Each is taken by scenario, and ``error`` is the mean over scenarios: the one to monitor.

    Args:
      rating_range: (lowest, highest) rating; None for clicks.
      seed: of the random items.

    Raises:
      MetarecError: no validation task.
    """
    tasks = {name: chosen for name, chosen in tasks.items() if len(chosen)}
    if not tasks:
        raise MetarecError("no validation task to select by; hold out more users, or lower the fewest support examples")
    items = np.random.default_rng(seed).integers(1, known.item_row.shape[0], others)
    random_items = inputs(known, jnp.int32(0), jnp.asarray(items, jnp.int32))
    held = [
        (name, len(index), task)
        for name, chosen in tasks.items()
        for index, task in batches(chosen, known, min(256, 1 << max(0, len(chosen) - 1).bit_length()))
    ]
    metric = "misranked" if rating_range is None else "mae"

    def of_task(params: Params, task: Task, key: Array) -> Array:
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
    def of_batch(params: Params, task: Task) -> Array:
        return jax.vmap(of_task, (None, 0, None))(params, task, jax.random.key(seed))

    def validate(params: Params) -> dict[str, float]:
        total: dict[str, Any] = dict.fromkeys(tasks, 0.0)
        for name, count, task in held:
            total[name] += float(np.asarray(of_batch(params, task))[:count].sum())
        means = {name: total[name] / len(chosen) for name, chosen in tasks.items()}
        return {"error": float(np.mean(list(means.values())))} | {f"{metric}_{name}": v for name, v in means.items()}

    return validate
