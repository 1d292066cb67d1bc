"""How a configuration trains and is measured: what `fit` and `compare` ask of the library alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from metarec_jax.core import Learner, MetarecError, Method
from metarec_jax.data.interactions import Interactions
from metarec_jax.data.splits import Split
from metarec_jax.data.tasks import Catalogue, TaskSet, make_tasks
from metarec_jax.experiment import config as configs
from metarec_jax.experiment.build import build_optimizers, build_params, negatives

VALIDATION_USERS = 1000
"""Validation users a scenario, at the most."""


def fixed_tasks(
    config: configs.Config, parts: Split, scenarios: Mapping[str, Interactions], *, seed: int, max_users: int
) -> dict[str, TaskSet]:
    """Fixed tasks by scenario, of at most ``max_users`` users drawn with the seed.

    What a user has in training leaves the candidates of a ranking of the catalogue, also what the support omits.
    """
    found = {}
    for name, part in scenarios.items():
        if not len(part):
            continue
        tasks = make_tasks(
            part,
            history=parts.history.get(name),
            past=parts.train,
            query=config.tasks.query,
            support=(1, config.tasks.max_history),
            order=config.tasks.order,
            negatives=negatives(config.tasks, part),
            seed=seed,
        )
        if len(tasks) > max_users:
            chosen = np.sort(np.random.default_rng(seed).choice(len(tasks), max_users, replace=False))
            tasks = tasks.take(chosen)
        if len(tasks):
            found[name] = tasks
    return found


def training_options(
    config: configs.Config,
    learner: Learner,
    data: Interactions,
    train: Interactions,
    known: Catalogue,
    held: Mapping[str, TaskSet],
) -> dict[str, Any]:
    """The arguments of `training.loop.fit` that the configuration settles.

    Args:
      train: the training part of ``data``; held: validation tasks by scenario, none for training without validation.
    """
    import jax.numpy as jnp

    from metarec_jax.training.validation import validator

    optimizers, given = build_optimizers(config, train), config.train
    return {
        "steps": given.steps,
        "optimizer": optimizers.dense,
        "rows": optimizers.rows,
        "seed": given.seed,
        "params": build_params(config, learner, train),
        "validate": validator(learner, held, known, rating_range=rating_range(data)) if held else None,
        "validate_every": given.validate_every,
        "monitor": "error",
        "patience": given.patience,
        "save_every": given.save_every,
        "micro_batches": given.micro_batches,
        "dtype": None if given.dtype == "float32" else jnp.dtype(given.dtype),
    }


def measuring_options(
    data: Interactions, methods: Mapping[str, Method], liked_from: float | None = None
) -> dict[str, Any]:
    """The arguments of `evaluation.evaluate` that the kind of feedback settles; ``liked_from``: see `relevant_from`."""
    return {
        "rating_range": rating_range(data),
        "relevant": relevant_from(data, liked_from),
        "ranking_only": tuple(methods) if data.implicit else ("popularity",),
    }


def rating_range(data: Interactions) -> tuple[float, float] | None:
    """(lowest, highest) rating; None for clicks."""
    return None if data.rating is None else (float(data.rating.min()), float(data.rating.max()))


def relevant_from(data: Interactions, liked_from: float | None = None) -> float:
    """From what rating on an item counts as liked: three quarters of the scale, 4 on 1..5; any click.

    Where fewer than 5% or more than 95% of the ratings reach that (counts, hours, a scale that is used at one end): the
    rating, other than the lowest, whose share of ratings at or above it is nearest to a quarter.

    Args:
      liked_from: what the user chose, in place of all that.

    Raises:
      MetarecError: ``liked_from`` with clicks, or such that all ratings or none are liked.
    """
    if data.rating is None:
        if liked_from is not None:
            raise MetarecError("--liked-from is a rating, and the data are clicks, all of them liked; leave it out")
        return 1.0
    values, counts = np.unique(data.rating, return_counts=True)
    low, high = float(values[0]), float(values[-1])
    if liked_from is not None:
        if not low < liked_from <= high:
            raise MetarecError(
                f"--liked-from must be above {low:g} and at most {high:g}, got {liked_from:g}; correct it"
            )
        return liked_from
    point = low + 0.75 * (high - low)
    reaching = counts[::-1].cumsum()[::-1] / counts.sum()  # share of ratings at or above each value
    if low == high or 0.05 <= float(reaching[np.searchsorted(values, point)]) <= 0.95:
        return point
    return float(values[1:][np.argmin(np.abs(reaching[1:] - 0.25))])


def liked(data: Interactions, liked_from: float | None = None) -> str:
    """What counts as liked, in words."""
    if data.rating is None:
        return "every click"
    point = relevant_from(data, liked_from)
    return f"ratings of {point:g} or more, {(data.rating >= point).mean():.0%} of all; --liked-from changes it"
