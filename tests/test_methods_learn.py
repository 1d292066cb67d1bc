"""Each method learns to learn: on planted preferences, after a short meta-training, new users are predicted nearly as well
as by the posterior that knows the generator, and far better than before they adapt."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metarec_jax import learners, losses, models
from metarec_jax.core import Task
from metarec_jax.data.splits import split
from metarec_jax.data.synthetic import synthetic
from metarec_jax.data.tasks import TaskSource, batches, catalogue, make_tasks, task_source
from metarec_jax.learners.rules import RULES
from metarec_jax.training.loop import fit
from metarec_jax.training.row_optimizers import lazy_adam

STEPS, ROW = 300, ("tables/user_id",)
METHODS = {
    "maml": lambda m: learners.maml(m, inner_lr=0.3, inner_steps=3, rule=RULES["sgd"], prior=0.0, only=ROW),
    "meta_sgd": lambda m: learners.maml(m, inner_steps=3, rule=learners.meta_sgd(0.3), prior=0.0, only=ROW),
    "meta_curvature": lambda m: learners.maml(m, inner_steps=3, rule=learners.meta_curvature(0.3), prior=0.0, only=ROW),
    "lstm": lambda m: learners.maml(m, inner_steps=3, rule=learners.lstm(0.3, hidden=4), prior=0.0, only=ROW),
    "maml_plus_plus": lambda m: learners.maml_plus_plus(
        m, inner_lr=0.3, inner_steps=3, prior=0.0, only=ROW, first_order_until=0.3
    ),
    "imaml": lambda m: learners.imaml(m, inner_lr=0.2, inner_steps=16, proximal=0.2, cg_steps=5, only=ROW),
    "cavia": lambda m: learners.cavia(m, size=4, inner_lr=0.3, inner_steps=3, rule=RULES["sgd"], prior=0.0),
    "protomaml": lambda m: learners.protomaml(m, inner_lr=0.3, inner_steps=3, rule=RULES["sgd"], prior=0.0),
    "ridge": learners.ridge,
}


class World(NamedTuple):
    """Tasks of 400 users to train on, those of 100 others, and the error of the best prediction for these (ratings)."""

    model: models.Model
    source: TaskSource
    new: Task
    best: float


@cache
def world(clicks: bool) -> World:
    made = synthetic(
        500, 60, ratings_per_user=(20, 30), size=2, noise=0.3, taste=2.0 if clicks else 1.0, group=0.0, implicit=clicks
    )
    parts = split(made.data, ["user_cold"], test=0.2, validation=0.0)
    new = parts.test["user_cold"]
    given = {"support": (8, 16), "query": 6}
    whole = {"item_drop": 0.0, "cold_tasks": 0.0, "negatives": 2 if clicks else 0}
    model = models.content_model(made.data.columns, size=2)
    source = task_source(parts.train, tasks=16, **given, **whole)
    if clicks:  # make_tasks draws no negatives for the query
        held = task_source(new, tasks=100, **given, **whole)
        return World(model, source, held.draw(held.data, jax.random.key(7)), float("nan"))
    tasks = make_tasks(new, **given)
    ((_, batch),) = batches(tasks, catalogue(made.data, parts.train), 128)
    squares = []
    for k, user in enumerate(tasks.user):
        known, asked = tasks.support_mask[k] > 0, tasks.query_mask[k] > 0
        support, rating = tasks.support_item[k][known], tasks.support_target[k][known]
        guess = made.posterior_scores(user, support, rating, tasks.query_item[k][asked])
        squares.append(np.mean((guess - tasks.query_target[k][asked]) ** 2))
    return World(model, source, batch, float(np.mean(squares)))


def errors(learner, params, new: Task, loss) -> list[float]:
    """Mean query loss of new users: with an empty support, and with their own."""

    @jax.jit
    def of(kept):
        support = new.support._replace(mask=new.support.mask * kept)
        adapted = jax.vmap(learner.adapt, (None, 0, None))(params, support, jax.random.key(0))
        scores = jax.vmap(learner.predict, (None, 0, 0))(params, adapted, new.query.inputs)
        real = new.query.mask.any(1)
        return jnp.sum(loss(scores, new.query.target, where=new.query.mask) * real) / real.sum()

    return [float(of(kept)) for kept in (0.0, 1.0)]


def trained(name: str, learner, source: TaskSource):
    decayed = optax.cosine_decay_schedule(0.03, STEPS, 0.1)
    return fit(learner, source, steps=STEPS, optimizer=optax.adam(decayed), rows=lazy_adam(decayed)).params


@pytest.mark.parametrize("name", METHODS)
def test_new_users_are_predicted(name):
    """Mean squared error: the posterior of a user with 8 to 16 ratings has 0.098, of which 0.09 is noise. Before a user
    adapts the variance of tastes is on top: 1.4 or more. Untrained, adaptation does hardly anything."""
    given = world(clicks=False)
    learner = METHODS[name](given.model)
    params = trained(name, learner, given.source)
    before, after = errors(learner, params, given.new, losses.mse)
    assert after < 1.4 * given.best
    assert before > 5 * after
    assert errors(learner, learner.init(jax.random.key(0)), given.new, losses.mse)[1] > 5 * after
    if name == "maml_plus_plus":
        assert float(params["progress"]) == 1.0


@pytest.mark.slow
def test_new_users_of_clicks_are_predicted():
    """Logistic loss, a third of the queries taken: log 3 - 2/3 log 2 = 0.637 for who knows no more than that."""
    given = world(clicks=True)
    learner = learners.logistic(given.model)
    params = trained("logistic", learner, given.source)
    before, after = errors(learner, params, given.new, losses.bce)
    assert after < 0.88 * before
    assert before < 0.637
