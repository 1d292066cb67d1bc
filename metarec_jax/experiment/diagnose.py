"""Convergence of the inner loop of a trained learner, measured on validation tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from metarec_jax.core import PROGRESS, Learner, Params
from metarec_jax.data.catalogue import Catalogue
from metarec_jax.data.interactions import Interactions
from metarec_jax.data.tasks import TaskSet, batches
from metarec_jax.evaluation.diagnostics import Convergence, converge
from metarec_jax.experiment import config as configs
from metarec_jax.experiment.build import build_learner, build_loss, with_inner_steps

_TASKS = 64


def diagnose(
    config: configs.Config, data: Interactions, params: Params, catalogue: Catalogue, held_out: Mapping[str, TaskSet]
) -> Convergence | None:
    """Convergence on new users, else on the first scenario; None for learners without inner steps.

    Args:
      held_out: validation tasks by scenario; at most 64 of them are used.
    """
    trained = config.learner
    if with_inner_steps(trained, 1) is None or not held_out:
        return None
    tasks = held_out.get("user_cold") or next(iter(held_out.values()))
    tasks = tasks.take(np.flatnonzero(tasks.support_mask.any(axis=1))[:_TASKS])
    if not len(tasks):
        return None

    def at(steps: int, first_order: bool = False) -> Learner:
        changed = with_inner_steps(trained, steps, first_order=first_order) or trained
        return build_learner(dataclasses.replace(config, learner=changed), data)

    index, batch = next(batches(tasks, catalogue, _TASKS))
    steps = trained.options["inner_steps"]
    return converge(
        at,
        {name: part for name, part in params.items() if name != PROGRESS},
        batch,
        trained=steps,
        loss=build_loss(trained, data),
        real=np.arange(_TASKS) < len(index),
        orders=None if trained.name == "imaml" else (at(steps, True), at(steps)),
    )
