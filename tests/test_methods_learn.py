"""Each method learns to learn: on planted preferences, after a short meta-training, new users are predicted far better than
before they adapt; gradient steps and closed forms nearly as well as by the posterior that knows the generator."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metarec_jax import learners, losses, models
from metarec_jax.core import MetarecError, Task
from metarec_jax.data.catalogue import catalogue
from metarec_jax.data.draw import TaskSource, task_source
from metarec_jax.data.splits import split
from metarec_jax.data.synthetic import synthetic
from metarec_jax.data.tasks import batches, make_tasks
from metarec_jax.experiment.build import build_learner, build_loss, build_source
from metarec_jax.experiment.config import Config, LearnerConfig, ModelConfig, TaskConfig
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
READERS = {
    "protonet": learners.protonet,
    "cosine": learners.matching,
    "relation": lambda m: learners.matching(m, similarity="relation"),
    "cnp": learners.neural_process,
    "latent": lambda m: learners.neural_process(m, latent=True),
    "tanp": lambda m: learners.neural_process(m, latent=True, clusters=4, width=32, hidden=(32,)),
    "in_context": lambda m: learners.in_context(m, width=16, layers=1),
    "hypernetwork": learners.hypernetwork,
    "leo": lambda m: learners.leo(m, latent=3),
    "written_head": lambda m: learners.hypernetwork(m, hidden=16),
    "memory": learners.memory,
}
"""Learners that read the support by attention, an encoder or a memory: they have to learn what the others compute."""
CLICKS = {
    "logistic": learners.logistic,
    "protonet": lambda m: learners.protonet(m, loss=losses.bce, expected=jax.nn.sigmoid),
    "cnp": lambda m: learners.neural_process(m, loss=losses.bce, expected=jax.nn.sigmoid),
    "hypernetwork": lambda m: learners.hypernetwork(m, loss=losses.bce, expected=jax.nn.sigmoid),
    "memory": lambda m: learners.memory(m, loss=losses.bce),
}
LONG = {"cnp": 700, "latent": 700, "tanp": 700, "in_context": 600, "written_head": 600}
"""Steps of those that learn slowly."""
BY_DEFAULT = ("maml",)
"""The others are slow."""


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


def before_and_after(learner, params, new: Task, loss) -> list[float]:
    """Mean query loss of new users: with an empty support, and with their own."""

    @jax.jit
    def mean(params, kept):
        support = new.support._replace(mask=new.support.mask * kept)
        adapted = jax.vmap(learner.adapt, (None, 0, None))(params, support, jax.random.key(0))
        scores = jax.vmap(learner.predict, (None, 0, 0))(params, adapted, new.query.inputs)
        real = new.query.mask.any(1)
        return jnp.sum(loss(scores, new.query.target, where=new.query.mask) * real) / real.sum()

    return [float(mean(params, kept)) for kept in (0.0, 1.0)]


def trained(name: str, learner, source: TaskSource):
    steps = LONG.get(name, STEPS)
    decayed = optax.cosine_decay_schedule(0.01 if name == "cnp" else 0.03, steps, 0.1)
    return fit(learner, source, steps=steps, optimizer=optax.adam(decayed), rows=lazy_adam(decayed)).params


def slow_but(names, default):
    return [pytest.param(name, marks=[pytest.mark.slow] * (name not in default)) for name in names]


@pytest.mark.parametrize("name", slow_but({**METHODS, **READERS}, BY_DEFAULT))
def test_new_users_are_predicted(name):
    """Mean squared error: the posterior of a user with 8 to 16 ratings has 0.098, of which 0.09 is noise. Before a user
    adapts the variance of tastes is on top: 1.4 or more. Untrained, adaptation does hardly anything."""
    given = world(clicks=False)
    learner = {**METHODS, **READERS}[name](given.model)
    params = trained(name, learner, given.source)
    before, after = before_and_after(learner, params, given.new, losses.mse)
    assert before > 1.2
    assert after < (1.4 * given.best if name in METHODS else (0.8 if name == "latent" else 0.6) * before)
    if name == "maml_plus_plus":
        assert float(params["progress"]) == 1.0
    if name in METHODS:
        assert before_and_after(learner, learner.init(jax.random.key(0)), given.new, losses.mse)[1] > 5 * after


@pytest.mark.slow
@pytest.mark.parametrize("name", CLICKS)
def test_new_users_of_clicks_are_predicted(name):
    """Logistic loss, a third of the queries taken: log 3 - 2/3 log 2 = 0.637 for who knows no more than that."""
    given = world(clicks=True)
    learner = CLICKS[name](given.model)
    params = trained(name, learner, given.source)
    before, after = before_and_after(learner, params, given.new, losses.bce)
    assert after < 0.97 * before
    assert before < 0.637


@pytest.mark.slow
@pytest.mark.parametrize("implicit", [False, True])
def test_by_name(implicit):
    """As the command line names them: built for ratings and for clicks, each loss is finite."""
    data = synthetic(30, 20, ratings_per_user=(8, 12), size=2, implicit=implicit, seed=2).data
    tasks = TaskConfig(tasks=2, support=(2, 4), query=3)
    source = build_source(Config(tasks=tasks), data)
    batch = source.draw(source.data, jax.random.key(0))
    chosen = [LearnerConfig(name=name) for name in ("protonet", "in_context", "hypernetwork", "leo", "memory")]
    chosen += [LearnerConfig("matching", {"similarity": "relation"}), LearnerConfig("neural_process", {"clusters": 2})]
    for given in chosen:
        by_default = "bce" if implicit else "mse" if given.name == "memory" else "mae"
        assert build_loss(given, data) is losses.LOSSES[by_default]
        learner = build_learner(Config(model=ModelConfig(size=2), learner=given, tasks=tasks), data)
        found = jax.jit(jax.vmap(learner.loss, (None, 0, None)))(
            learner.init(jax.random.key(0)), batch, jax.random.key(0)
        )
        assert np.isfinite(found[0]).all()


def test_they_require_item_vectors():
    with pytest.raises(MetarecError, match="learner 'protonet' requires the model 'content'; use --model content"):
        Config(model=ModelConfig(name="meta_recommender"), learner=LearnerConfig(name="protonet"))
