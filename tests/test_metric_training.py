"""Metric, amortised and memory learners learn: a few ratings, or clicks, of new users make their scores better."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metarec_jax import learners, losses, models
from metarec_jax.core import MetarecError
from metarec_jax.data.synthetic import synthetic
from metarec_jax.data.tasks import batches, catalogue, make_tasks, task_source
from metarec_jax.experiment.build import build_learner, build_loss, build_source
from metarec_jax.experiment.config import Config, LearnerConfig, ModelConfig, TaskConfig
from metarec_jax.training.loop import fit

KEY = jax.random.key(0)


@cache
def new_users():
    """Data of 600 users, tasks of the last 120 of them, and the error of a prior that knows all of the truth but the user.

    That prior is mean + item's bias + <mean vector of the user's group, item's vector>: no method without support is better.
    """
    made = synthetic(600, 60, ratings_per_user=(20, 30), size=2, noise=0.3, seed=0)
    old = made.data.user <= 480
    train, new = made.data.take(old), made.data.take(~old)
    tasks, truth = make_tasks(new, query=8, support=(4, 16)), made.truth
    best = truth.mean + truth.item_bias[tasks.query_item]
    best = best + np.einsum("tqd,td->tq", truth.item_vector[tasks.query_item], truth.user_prior[tasks.user])
    error = np.sum(tasks.query_mask * (best - tasks.query_target) ** 2) / tasks.query_mask.sum()
    (_, task), *_ = batches(tasks, catalogue(train), 128)
    return train, task, float(np.sqrt(error))


TRAINED = {
    "protonet": (learners.protonet, 400),
    "cosine": (learners.matching, 400),
    "relation": (lambda model: learners.matching(model, similarity="relation"), 400),
    "cnp": (learners.neural_process, 600),
    "latent": (lambda model: learners.neural_process(model, latent=True), 600),
    "tanp": (lambda model: learners.neural_process(model, latent=True, clusters=4, width=32, hidden=(32,)), 700),
    "in_context": (lambda model: learners.in_context(model, width=16, layers=1), 600),
    "hypernetwork": (learners.hypernetwork, 400),
    "leo": (lambda model: learners.leo(model, latent=3), 400),
    "written_head": (lambda model: learners.hypernetwork(model, hidden=16), 600),
    "memory": (learners.memory, 400),
}


CLICKS = {
    "protonet": learners.protonet,
    "cnp": learners.neural_process,
    "hypernetwork": learners.hypernetwork,
    "memory": learners.memory,
}


def before_and_after(learner, params, task, loss):
    """The mean loss of the query with no support, and with all of it."""

    @jax.jit
    def error(shown):
        def one(task):
            support = task.support._replace(mask=task.support.mask * shown)
            scores = learner.predict(params, learner.adapt(params, support, KEY), task.query.inputs)
            return loss(scores, task.query.target, where=task.query.mask), (task.query.mask.sum() > 0)

        values, there = jax.vmap(one)(task)
        return jnp.sum(values * there) / there.sum()

    return float(error(0.0)), float(error(1.0))


LONG = ("relation", "cnp", "latent", "written_head")
"""What stands for them by default: "cosine", "tanp", "hypernetwork"."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LONG)) for n in TRAINED])
def test_a_few_ratings_of_a_new_user_beat_any_prior(name):
    """After a short meta-training, the root of the mean squared error on users never seen is below what it was before
    adaptation, and below what the best prior that there is can do, which knows the truth of items and groups (0.74).
    """
    train, task, best_prior = new_users()
    make, steps = TRAINED[name]
    learner = make(models.content_model(train.columns, size=3))
    source = task_source(train, tasks=16, support=(0, 12), query=8, cold_tasks=0.1)
    params = fit(learner, source, steps=steps, lr=0.01, chunk=steps, seed=1).params
    before, after = np.sqrt(before_and_after(learner, params, task, losses.mse))
    assert after < 0.93 * min(before, best_prior)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLICKS)
def test_clicks(name):
    """Scores are logits, residuals target - sigmoid(score): the logistic loss falls below that before adaptation."""
    data = synthetic(400, 60, ratings_per_user=(12, 20), size=2, taste=4.0, group=0.0, implicit=True, seed=0).data
    old = data.user <= 320
    train, new = data.take(old), data.take(~old)
    of_clicks = {"loss": losses.bce} | ({} if name == "memory" else {"expected": jax.nn.sigmoid})
    learner = CLICKS[name](models.content_model(train.columns, size=3), **of_clicks)
    source = task_source(train, tasks=16, support=(0, 8), query=4, cold_tasks=0.1, negatives=2)
    params = fit(learner, source, steps=600, lr=0.01, chunk=300, seed=1).params
    asked = task_source(new, tasks=256, support=(8, 8), query=4, item_drop=0.0, cold_tasks=0.0, negatives=2)
    task = asked.draw(asked.data, jax.random.key(3))
    before, after = before_and_after(learner, params, task, losses.bce)
    assert after < 0.97 * before


@pytest.mark.parametrize("implicit", [pytest.param(b, marks=pytest.mark.slow) for b in (False, True)])
def test_by_name(implicit):
    """As the command line names them: built for ratings and for clicks, each loss is finite."""
    data = synthetic(30, 20, ratings_per_user=(8, 12), size=2, implicit=implicit, seed=2).data
    tasks = TaskConfig(tasks=2, support=(2, 4), query=3)
    source = build_source(Config(tasks=tasks), data)
    batch = source.draw(source.data, KEY)
    chosen = [LearnerConfig(name=name) for name in ("protonet", "in_context", "hypernetwork", "leo", "memory")]
    chosen += [LearnerConfig("matching", {"similarity": "relation"}), LearnerConfig("neural_process", {"clusters": 2})]
    for given in chosen:
        assert (
            build_loss(given, data) is losses.LOSSES["bce" if implicit else "mse" if given.name == "memory" else "mae"]
        )
        learner = build_learner(Config(model=ModelConfig(size=2), learner=given, tasks=tasks), data)
        params = learner.init(KEY)
        found = jax.jit(jax.vmap(learner.loss, (None, 0, None)))(params, batch, KEY)[0]
        assert np.isfinite(found).all()


def test_they_want_item_vectors():
    with pytest.raises(MetarecError, match="learner 'protonet' wants model 'content'; give --model content"):
        Config(model=ModelConfig(name="meta_recommender"), learner=LearnerConfig(name="protonet"))
