"""How a configuration trains and is measured: what `fit` and `compare` ask of the library alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from metarec_jax import config as configs
from metarec_jax.core import Learner, Method
from metarec_jax.data.interactions import Interactions
from metarec_jax.data.splits import Split
from metarec_jax.data.tasks import Catalogue, TaskSet, make_tasks

VALIDATION_USERS = 1000
"""Validation users a scenario, at the most."""


def fixed_tasks(
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

    optimizers, given = configs.build_optimizers(config, train), config.train
    return {
        "steps": given.steps,
        "optimizer": optimizers.dense,
        "rows": optimizers.rows,
        "seed": given.seed,
        "params": configs.build_params(config, learner, train),
        "validate": validator(learner, held, known, rating_range=rating_range(data)) if held else None,
        "validate_every": given.validate_every,
        "monitor": "error",
        "patience": given.patience,
        "save_every": given.save_every,
        "micro_batches": given.micro_batches,
        "dtype": None if given.dtype == "float32" else jnp.dtype(given.dtype),
    }


def measuring_options(data: Interactions, methods: Mapping[str, Method]) -> dict[str, Any]:
    """The arguments of `evaluation.evaluate` that the kind of feedback settles."""
    return {
        "rating_range": rating_range(data),
        "relevant": relevant_from(data),
        "ranking_only": tuple(methods) if data.implicit else ("popularity",),
    }


def rating_range(data: Interactions) -> tuple[float, float] | None:
    return None if data.rating is None else (float(data.rating.min()), float(data.rating.max()))


def relevant_from(data: Interactions) -> float:
    """From what rating on an item counts as liked: three quarters of the scale, 4 on 1..5; any click."""
    span = rating_range(data)
    return 1.0 if span is None else span[0] + 0.75 * (span[1] - span[0])
