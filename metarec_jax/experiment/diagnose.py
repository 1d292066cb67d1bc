"""The inner loop of a trained learner, followed on validation tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from metarec_jax.core import PROGRESS, Learner, Params
from metarec_jax.data.interactions import Interactions
from metarec_jax.data.tasks import Catalogue, TaskSet, batches
from metarec_jax.evaluation.diagnostics import Convergence, converge
from metarec_jax.experiment import config as configs
from metarec_jax.experiment.build import build_learner, build_loss, with_inner_steps

_TASKS = 64


def diagnose(
    config: configs.Config, data: Interactions, params: Params, known: Catalogue, held: Mapping[str, TaskSet]
) -> Convergence | None:
    """Convergence on new users (else on the first scenario) of ``held``; None for learners without inner steps.

    Args:
      held: validation tasks by scenario, of which 64 are used at the most.
    """
    given = config.learner
    if with_inner_steps(given, 1) is None or not held:
        return None
    tasks = held.get("user_cold") or next(iter(held.values()))
    tasks = tasks.take(np.flatnonzero(tasks.support_mask.any(axis=1))[:_TASKS])
    if not len(tasks):
        return None

    def at(steps: int, first_order: bool = False) -> Learner:
        changed = with_inner_steps(given, steps, first_order=first_order) or given
        return build_learner(dataclasses.replace(config, learner=changed), data)

    index, batch = next(batches(tasks, known, _TASKS))
    steps = given.options["inner_steps"]
    return converge(
        at,
        {name: part for name, part in params.items() if name != PROGRESS},
        batch,
        trained=steps,
        loss=build_loss(given, data),
        real=np.arange(_TASKS) < len(index),
        orders=None if given.name == "imaml" else (at(steps, True), at(steps)),
    )
