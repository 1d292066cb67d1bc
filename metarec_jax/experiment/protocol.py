"""How a configuration is trained and measured: the calls that `fit` and `compare` share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from metarec_jax.baselines.closed_form import LISTS
from metarec_jax.core import Learner, Method
from metarec_jax.data.catalogue import Catalogue
from metarec_jax.data.interactions import Interactions
from metarec_jax.data.liked import relevant_from
from metarec_jax.data.splits import Split
from metarec_jax.data.tasks import TaskSet, make_tasks
from metarec_jax.experiment import config as configs
from metarec_jax.experiment.build import build_optimizers, build_params, negatives, predicts_ratings

VALIDATION_USERS = 1000
"""Maximum number of validation users per scenario."""


def fixed_tasks(
    config: configs.Config, parts: Split, scenarios: Mapping[str, Interactions], *, seed: int, max_users: int
) -> dict[str, TaskSet]:
    """Fixed tasks by scenario, of at most ``max_users`` users per scenario, sampled with the seed.

    Catalogue rankings exclude every item that the user has in training, including those that the support omits.
    """
    tasks_by_scenario = {}
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
            tasks_by_scenario[name] = tasks
    return tasks_by_scenario


def training_options(
    config: configs.Config,
    learner: Learner,
    data: Interactions,
    train: Interactions,
    catalogue: Catalogue,
    held_out: Mapping[str, TaskSet],
) -> dict[str, Any]:
    """The arguments of `training.loop.fit` that the configuration determines.

    Args:
      train: the training part of ``data``.
      held_out: validation tasks by scenario; empty for training without validation.
    """
    import jax.numpy as jnp

    from metarec_jax.training.validation import validator

    optimizers, settings = build_optimizers(config, train), config.train
    scale = rating_range(data) if predicts_ratings(config, data) else None
    return {
        "steps": settings.steps,
        "optimizer": optimizers.dense,
        "rows": optimizers.rows,
        "seed": settings.seed,
        "params": build_params(config, learner, train),
        "validate": validator(learner, held_out, catalogue, rating_range=scale) if held_out else None,
        "validate_every": settings.validate_every,
        "monitor": "error",
        "patience": settings.patience,
        "save_every": settings.save_every,
        "micro_batches": settings.micro_batches,
        "dtype": None if settings.dtype == "float32" else jnp.dtype(settings.dtype),
    }


def measuring_options(
    data: Interactions,
    methods: Mapping[str, Method],
    liked_from: float | None = None,
    configured: Mapping[str, configs.Config] = MappingProxyType({}),
) -> dict[str, Any]:
    """The arguments of `evaluation.evaluate` that depend on the kind of feedback.

    Args:
      liked_from: as in `relevant_from`.
      configured: configurations of the methods that are trained; the others are baselines.
    """
    return {
        "rating_range": rating_range(data),
        "relevant": relevant_from(data, liked_from),
        "ranking_only": tuple(lists_only(data, methods, configured)),
    }


def lists_only(
    data: Interactions, names: Iterable[str], configured: Mapping[str, configs.Config] = MappingProxyType({})
) -> list[str]:
    """The methods whose scores are not ratings: all for clicks; ``configured`` as in `measuring_options`."""

    def rates(name: str) -> bool:
        if name in configured:
            return predicts_ratings(configured[name], data)
        return not data.implicit and name not in {"popularity", *LISTS}

    return [name for name in names if not rates(name)]


def rating_range(data: Interactions) -> tuple[float, float] | None:
    """(lowest, highest) rating; None for clicks."""
    return None if data.rating is None else (float(data.rating.min()), float(data.rating.max()))


def liked(data: Interactions, liked_from: float | None = None) -> str:
    """A description of which feedback counts as relevant."""
    if data.rating is None:
        return "every click"
    point = relevant_from(data, liked_from)
    return f"ratings of {point:g} or more, {(data.rating >= point).mean():.0%} of all; --liked-from changes it"
