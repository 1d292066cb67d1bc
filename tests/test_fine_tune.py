"""Plain training and fine-tuning: the pooled loss, the steps of fine-tuning, and what tuning chooses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from worlds import content, largest_difference, one, tasks

from metarec_jax import learners
from metarec_jax.baselines import trained as plain
from metarec_jax.baselines.tuning import fit_baselines
from metarec_jax.core import Column, MetarecError, Task
from metarec_jax.data.catalogue import catalogue
from metarec_jax.data.synthetic import synthetic
from metarec_jax.data.tasks import make_tasks
from metarec_jax.models.content import meta_recommender

pytestmark = pytest.mark.slow

KEY = jax.random.key(0)


def squared(model, params, task):
    """Squared errors of all examples that are there, of support and query."""
    parts = [(model.apply(params, e.inputs) - e.target, e.mask) for e in task]
    errors, mask = (jnp.concatenate([part[k] for part in parts]) for k in (0, 1))
    return float(jnp.sum(mask * jnp.square(errors)) / mask.sum())


@pytest.mark.parametrize("steps", [0, 2])
def test_the_loss_is_that_of_all_examples_with_nothing_adapted(steps):
    """Task 0 has 6 + 4 slots of which the last of each is padding: the mean of 5 + 3 squared errors."""
    model = content("dot")
    learner, task = learners.fine_tune(model, inner_steps=steps, inner_lr=0.05), one(tasks(jax.random.key(1), 2))
    params = jax.jit(learner.init)(KEY)
    assert float(jax.jit(learner.loss)(params, task, KEY)[0]) == pytest.approx(squared(model, params, task), rel=1e-5)


def test_the_gradient_of_training_knows_no_fine_tuning():
    """With and without fine-tuning steps: the same derivative, which MAML's is not."""
    model, task = content("dot"), one(tasks(jax.random.key(1), 2))
    plainly, tuned = (learners.fine_tune(model, inner_steps=steps, inner_lr=0.3) for steps in (0, 3))
    params = jax.jit(plainly.init)(KEY)
    meta = learners.maml(model, inner_steps=3, inner_lr=0.3, only=None)
    *slope, of_meta = (
        jax.jit(jax.grad(lambda p, made=made: made.loss(p, task, KEY)[0]))(params) for made in (plainly, tuned, meta)
    )
    assert largest_difference(*slope) < 1e-6
    assert largest_difference(slope[0], of_meta) > 1e-3


def test_one_step_on_the_users_row_by_hand():
    """score = w . [u, v] + b with w = (2, 3), u = 0, v = 1, b = 0: one rating of 9, error 3 - 9 = -6. The slope by u is
    2 (-6) 2 = -24; rate 1/8 moves u to 3 and the score to 9. Nothing else moves."""
    learner = learners.fine_tune(
        meta_recommender(2, 2, size=1), inner_lr=0.125, inner_steps=1, only=("tables/user_id",)
    )
    params = jax.jit(learner.init)(KEY)
    tables = {"user_id": jnp.zeros((2, 1)), "item_id": jnp.ones((2, 1))}
    out = {"kernel": jnp.array([[2.0], [3.0]]), "bias": jnp.zeros(1)}
    params = {**params, "tables": tables, "net": {"params": {"out": out}}}
    _, batch = None, tasks(jax.random.key(0), 1, columns={"user_id": Column("id", 2), "item_id": Column("id", 2)})
    support = one(batch).support._replace(
        inputs={"user_id": jnp.array([0]), "item_id": jnp.array([1])}, target=jnp.array([9.0]), mask=jnp.ones(1)
    )
    adapted = learner.adapt(params, support, KEY)
    assert learner.predict(params, adapted, support.inputs).tolist() == [9.0]
    assert adapted["rest"] == {}
    assert set(adapted["rows"]) == {"user_id"}


def test_what_each_rating_moved_is_the_whole_derivative():
    """A list explains itself by it: two steps of rate r on the bias alone are 1 - (1 - 2 r)^2 of the mean target."""
    learner = learners.fine_tune(content("mlp"), inner_lr=0.1, inner_steps=2, only=("net/params/out/bias",))
    params, task = jax.jit(learner.init)(KEY), one(tasks(jax.random.key(1), 2), 1)

    def score(target):
        adapted = learner.adapt(params, task.support._replace(target=target), KEY)
        return learner.predict(params, adapted, task.query.inputs)[0]

    mask = task.support.mask
    np.testing.assert_allclose(jax.jit(jax.grad(score))(task.support.target), 0.36 * mask / mask.sum(), atol=1e-6)


def test_query_loss_is_after_fine_tuning():
    learner, task = learners.fine_tune(content("dot"), inner_steps=2, inner_lr=0.05), one(tasks(jax.random.key(1), 2))
    params = jax.jit(learner.init)(KEY)
    both = jax.jit(lambda p, task: learner.predict(p, learner.adapt(p, task.support, KEY), task.query.inputs))
    scores = both(params, task)
    mse = float(jnp.sum(task.query.mask * jnp.square(scores - task.query.target)) / task.query.mask.sum())
    assert float(jax.jit(learner.loss)(params, task, KEY)[1]["query_loss"]) == pytest.approx(mse, rel=1e-5)
    assert isinstance(task, Task)


DATA = synthetic(150, 40, ratings_per_user=(20, 30), seed=0).data
TRAIN = DATA.take(DATA.user <= 110)
KNOWN = catalogue(DATA, TRAIN)
HELD = {"user_cold": make_tasks(DATA.take(DATA.user > 110), query=10, seed=0)}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n != "factorization_machine")) for n in plain.TRAINED],
)
def test_a_plain_model_is_fitted_and_served_by_its_defaults(name):
    """60 steps leave a model whose closed-form users have an error below that of the mean rating."""
    method = plain.fit_plain(name, TRAIN, KNOWN, settings={"strength": 1.0}, steps=60)
    tasks_ = HELD["user_cold"]
    held = plain.on_device(tasks_, KNOWN, columns=DATA.columns)
    mean = np.abs(tasks_.query_target - TRAIN.rating.mean())[tasks_.query_mask > 0].mean()
    assert plain.quality(method, held, KNOWN, TRAIN) < 0.95 * mean
    assert set(method.tables) <= set(DATA.columns)


@pytest.mark.slow
def test_tuning_takes_what_is_best_on_validation(monkeypatch):
    """One decay, five ways: the quality of the chosen settings is the least of all, and is what is told."""
    closed = ({"way": "nothing", "strength": 0.0}, {"way": "fold_in", "strength": 1.0})
    stepped = tuple(
        {"way": "row", "strength": rate, "fine_steps": 2} for rate in (0.1, 0.5, 1e6)
    )  # the last one is useless
    monkeypatch.setattr(plain, "_DECAYS", (0.1,))
    monkeypatch.setattr(plain, "_CLOSED", closed)
    monkeypatch.setattr(plain, "_STEPPED", stepped)
    said: list[str] = []
    settings = plain.tune_plain("sgd_mf", TRAIN, KNOWN, HELD, steps=60, say=said.append)
    served = plain._Served(plain.TRAINED["sgd_mf"], TRAIN)
    params = plain._trained(served, TRAIN, KNOWN, HELD, {**plain.DEFAULTS, "weight_decay": 0.1}, 60, 0)
    held = [plain.on_device(HELD["user_cold"], KNOWN)]
    each = [plain._mean_quality(served.method(params, way), held, KNOWN, TRAIN) for way in (*closed, *stepped)]
    best = int(np.argmin(each))
    assert {**plain.DEFAULTS, "weight_decay": 0.1, **(*closed, *stepped)[best]} == settings
    assert said[0].endswith(f"(validation MAE {each[best]:.4f})")


def test_names_of_baselines_go_to_the_baselines():
    method = plain.fit_plain("bias", TRAIN, KNOWN, settings={"reg_user": 3.0})
    assert float(method.params["reg_user"]) == 3.0


def test_bad_names_and_settings_are_refused():
    with pytest.raises(MetarecError, match="no plain model 'svd'; choose from sgd_mf"):
        plain.fit_plain("svd", TRAIN, KNOWN)
    for name, settings, message in (
        (
            "sgd_mf",
            {"inner_lr": 9, "strenght": 1.0},
            "sgd_mf has no setting 'inner_lr', 'strenght'; its settings are weig",
        ),
        ("bias", {"reg": 3.0}, "bias has no setting 'reg'; its settings are reg_item, reg_user"),
        ("random", {"reg": 3.0}, "random has no setting 'reg'; its settings are none"),
        ("sgd_mf", {"way": "row"}, "way 'row' requires fine_steps"),
        ("sgd_mf", {"way": "fold_in", "fine_steps": 3}, "'fold_in' takes no gradient steps, got fine_steps 3"),
        ("sgd_mf", {"strength": float("nan")}, "must be numbers of at least 0"),
        ("sgd_mf", {"weight_decay": -1.0}, "must be numbers of at least 0"),
        ("sgd_mf", {"strength": 0.0}, "requires a strength above 0"),
    ):
        with pytest.raises(MetarecError, match=message):
            plain.fit_plain(name, TRAIN, KNOWN, settings=settings, steps=1)
    with pytest.raises(MetarecError, match="bias has no setting 'reg'"):
        fit_baselines(TRAIN, KNOWN, names=["item_mean"], settings={"bias": {"reg": 1.0}})
    with pytest.raises(MetarecError, match="no baseline 'bais'"):
        fit_baselines(TRAIN, KNOWN, names=["bias"], settings={"bais": {}})
    with pytest.raises(MetarecError, match="way 'pray' is not known; use 'nothing'"):
        plain.fit_plain("sgd_mf", TRAIN, KNOWN, settings={"way": "pray"}, steps=1)
    with pytest.raises(MetarecError, match="requires a validation task, got none"):
        plain.tune_plain("sgd_mf", TRAIN, KNOWN, {})
