"""Convergence of the inner loop where it is known in closed form: quadratics, with rates on both sides of 2 / h."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from worlds import tasks, wide_and_deep

from metarec_jax import learners, losses
from metarec_jax.core import Examples, MetarecError, Model, Table, Task
from metarec_jax.evaluation import diagnostics
from metarec_jax.evaluation.diagnostics import converge, findings, from_json, points, remedy, to_json

pytestmark = pytest.mark.slow


def half(scores, target, where):
    """1/2 sum of w^2, w = scores - target: its Hessian in the scores is the identity."""
    return 0.5 * jnp.sum(jnp.square(scores - target) * where)


def quadratic(curvature):
    """Scores ``sqrt(h) * u`` of one user's row u: with targets 0 the support loss is ``1/2 sum h u^2``, Hessian diag(h)."""
    root = jnp.sqrt(jnp.asarray(curvature, jnp.float32))
    size = len(curvature)

    def apply(params, inputs):
        axis = inputs["axis"][:, 0].astype(jnp.int32)
        return params["tables"]["user_id"][inputs["user_id"][0]][axis] * root[axis]

    def init(key):
        return {"tables": {"user_id": jnp.ones((9, size))}}

    return Model(init, apply, {"user_id": Table(9, size, ("user_id",))})


def tasks_of(size, users=(7, 3), query_target=1.0):
    """A task a user: support and query are the axes of the quadratic, with targets 0 and ``query_target``."""

    def part(target):
        axis = jnp.broadcast_to(jnp.arange(size, dtype=jnp.float32)[:, None], (len(users), size, 1))
        user = jnp.asarray(users, jnp.int32)[:, None]
        full = jnp.full((len(users), size), target, jnp.float32)
        return Examples({"user_id": user, "axis": axis}, full, jnp.ones_like(full))

    return Task(part(0.0), part(query_target))


def followed(curvature, lr, trained, cosine=False, **given):
    model = quadratic(curvature)

    def at(k, first=False):
        return learners.maml(model, inner_lr=lr, inner_steps=k, loss=half, first_order=first)

    params = at(1).init(jax.random.key(0))
    orders = (at(trained, True), at(trained)) if cosine else None
    tasks = given.pop("tasks", tasks_of(len(curvature)))
    return converge(at, params, tasks, trained=trained, loss=half, orders=orders, **given)


def test_points_go_to_three_times_the_trained_steps():
    for trained in (1, 2, 5, 9, 30):
        at = points(trained)
        assert at[0] == 0
        assert at[-1] == 3 * trained
        assert trained in at
        assert len(at) <= 13


@pytest.mark.parametrize("lr", [0.1, 0.9])
def test_the_curve_of_a_quadratic(lr):
    """u_0 = 1, H = diag(h): u_k = (1 - lr h)^k, support loss 1/2 sum h u_k^2, gradient h u_k, query 1/2 sum (sqrt(h) u_k - 1)^2."""
    h = np.array([0.5, 1.5])
    found = followed(h, lr, trained=3)
    for k, support, query, norm in zip(
        found.steps, found.support_loss, found.query_loss, found.gradient_norm, strict=True
    ):
        u = (1 - lr * h) ** k
        np.testing.assert_allclose(support, 0.5 * (h * u**2).sum(), rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(query, 0.5 * ((np.sqrt(h) * u - 1) ** 2).sum(), rtol=1e-4)
        np.testing.assert_allclose(norm, np.linalg.norm(h * u), rtol=1e-4, atol=1e-6)
    assert not found.diverges
    assert found.unstable_from is None
    assert found.worse == 0
    assert remedy(found) is None


@pytest.mark.parametrize("lr", [1.2, 3.0])
def test_a_rate_above_two_over_h_diverges_and_the_remedy_has_the_rate_that_solves(lr):
    """h = 2: |1 - lr h| > 1 iff lr > 1. A step multiplies the gradient by rho = 2 lr - 1, so lr / (1 + rho) = 1/2 = 1/h."""
    found = followed([2.0], lr, trained=2)
    assert found.diverges
    assert found.unstable_from == 1
    assert found.worse == 1.0
    np.testing.assert_allclose(found.growth, 2 * lr - 1, rtol=1e-4)
    said = remedy(found, inner_lr=lr)
    assert f"--inner-lr 0.5 (now {lr:g})" in said
    assert "--rule meta_sgd or lslr" in said
    assert said in findings(found, inner_lr=lr)


def test_just_below_two_over_h_converges():
    assert not followed([2.0], 0.99, trained=1).diverges


def test_a_learner_that_is_stable_as_trained_and_not_beyond():
    """Rates of LSLR by step, lr = 0.5 then 1.6, and h = 2: u_1 = 0, and 0 stays 0; with an error left it grows.

    Rates 0.4 and 1.6: u_1 = 0.2, u_2 = 0.2 * (1 - 3.2) = -0.44, u_3 = 0.968, u_4 = -2.13: above u_0 = 1 from 4 on.
    """
    model = quadratic([2.0])

    def at(k):
        return learners.maml(model, inner_steps=k, rule=learners.lslr(0.4, 2), loss=half)

    params = at(2).init(jax.random.key(0))
    params["rule"] = jax.tree.map(lambda rates: jnp.array([0.4, 1.6]), params["rule"])
    found = converge(at, params, tasks_of(1), trained=2, loss=half)
    assert found.steps == (0, 1, 2, 3, 4, 6)
    assert not found.diverges
    assert found.unstable_from == 4
    assert found.cosine is None
    assert any("with 4 steps the support loss is above" in line for line in findings(found))


@pytest.mark.parametrize(
    ("lr", "steps"), [(0.6, 2), *(pytest.param(*given, marks=pytest.mark.slow) for given in ((0.2, 1), (0.6, 3)))]
)
def test_cosine_of_first_and_second_order(lr, steps):
    """First order: g = grad of the query at u_k. Second: (I - lr H)^k g. Users' rows add up alike, so the cosine is theirs."""
    h = np.array([0.5, 3.0])
    u = (1 - lr * h) ** steps
    g = np.sqrt(h) * (np.sqrt(h) * u - 1)
    second = (1 - lr * h) ** steps * g
    expected = g @ second / np.linalg.norm(g) / np.linalg.norm(second)
    np.testing.assert_allclose(followed(h, lr, trained=steps, cosine=True).cosine, expected, rtol=1e-4)


def test_the_cosine_costs_the_rows_of_the_tasks_alone():
    """Nine rows in the table, two users: gradients are of rows 0, 3 and 7."""
    model = quadratic([1.0])
    params, tasks = diagnostics._touched(
        learners.maml(model, loss=half), {"tables": {"user_id": jnp.arange(9.0)[:, None]}}, tasks_of(1)
    )
    assert params["tables"]["user_id"][:, 0].tolist() == [0.0, 3.0, 7.0]
    assert tasks.support.inputs["user_id"].tolist() == tasks.query.inputs["user_id"].tolist() == [[2], [1]]


def test_padding_and_tasks_without_support_do_not_count():
    """The third task has no support, the fourth is not real: the same means as of two tasks."""
    four = tasks_of(2, users=(7, 3, 1, 2), query_target=1.0)
    mask = four.support.mask.at[2].set(0.0)
    bad = four.query.target.at[3].set(jnp.nan)
    four = Task(four.support._replace(mask=mask), four.query._replace(target=bad))
    found = followed([0.5, 1.5], 0.5, trained=1, cosine=True, tasks=four, real=np.array([True, True, True, False]))
    want = followed([0.5, 1.5], 0.5, trained=1, cosine=True)
    assert found.tasks == 2
    np.testing.assert_allclose(found.query_loss, want.query_loss, rtol=1e-6)
    np.testing.assert_allclose(found.cosine, want.cosine, rtol=1e-6)
    nothing = Task(four.support._replace(mask=jnp.zeros_like(mask)), four.query)
    with pytest.raises(MetarecError, match="expected a task with a support example"):
        followed([0.5, 1.5], 0.5, trained=2, tasks=nothing)


@pytest.mark.slow
@pytest.mark.parametrize("make", [learners.cavia, learners.imaml])
def test_other_learners_of_gradient_steps(make):
    """What adapts is the learner's own affair: with one step the first gradient norm is that of no step taken."""
    from metarec_jax.data.catalogue import catalogue
    from metarec_jax.data.synthetic import synthetic
    from metarec_jax.data.tasks import batches, make_tasks
    from metarec_jax.models.content import content_model

    data = synthetic(20, 12, ratings_per_user=(8, 10), size=2).data
    model = content_model(data.columns, size=2)
    _, tasks = next(batches(make_tasks(data, query=4), catalogue(data), 8))
    given = {"rule": learners.sgd(0.05)} if make is not learners.imaml else {"inner_lr": 0.05}

    def at(k):
        return make(model, inner_steps=k, **given)

    found = converge(at, at(2).init(jax.random.key(0)), tasks, trained=1, loss=losses.mse)
    assert not found.diverges
    assert found.support_loss[1] < found.support_loss[0]
    assert all(norm > 0 for norm in found.gradient_norm)


def test_what_is_not_finite_diverges_and_survives_json():
    found = followed([2.0], 1e30, trained=2)
    assert found.diverges
    assert not math.isfinite(found.support_loss[-1])
    assert "diverges" in remedy(found, inner_lr=1e30)
    again = from_json(json.loads(json.dumps(to_json(found), allow_nan=False)))
    assert again.diverges
    fine = followed([0.5, 1.5], 0.5, trained=1)
    assert from_json(json.loads(json.dumps(to_json(fine)))) == fine


@pytest.mark.slow
@pytest.mark.parametrize("name", ["maml", "maml_plus_plus", "reptile", "protomaml", "cavia", "imaml"])
def test_from_a_configuration(name):
    """Each learner of gradient steps, as `metarec fit` builds it; a reader of the support has no inner loop."""
    from metarec_jax.data.catalogue import catalogue
    from metarec_jax.data.synthetic import synthetic
    from metarec_jax.data.tasks import make_tasks
    from metarec_jax.experiment import config as configs
    from metarec_jax.experiment.build import build_learner, inner_rate
    from metarec_jax.experiment.diagnose import diagnose

    data = synthetic(20, 12, ratings_per_user=(8, 10), size=2).data
    given = configs.LearnerConfig(name, {"inner_steps": 2, "inner_lr": 0.05})
    config = configs.Config(model=configs.ModelConfig(size=2), learner=given)
    params = build_learner(config, data).init(jax.random.key(0))
    found = diagnose(config, data, params, catalogue(data), {"user_cold": make_tasks(data, query=4)})
    assert found.trained == 2
    assert found.tasks == 20
    assert found.support_loss[2] < found.support_loss[0]
    assert (found.cosine is None) == (name == "imaml")
    assert inner_rate(config, data) == 0.05
    ridge = configs.Config()
    assert diagnose(ridge, data, {}, catalogue(data), {"user_cold": make_tasks(data, query=4)}) is None
    assert inner_rate(ridge, data) is None


def test_cut_tables_that_share_a_column_show_the_same_rows():
    """The loss on tables cut to the rows of the tasks is the loss on whole ones, also with three tables on two columns."""
    learner = learners.maml(wide_and_deep(), inner_lr=0.05, only=("tables/wide",))
    params, batch, key = learner.init(jax.random.key(0)), tasks(jax.random.key(1), 3), jax.random.key(2)
    cut, local = diagnostics._touched(learner, params, batch)
    loss = jax.jit(jax.vmap(lambda params, task: learner.loss(params, task, key)[0], (None, 0)))
    np.testing.assert_allclose(loss(cut, local), loss(params, batch), rtol=1e-6)
    assert cut["tables"]["wide"].shape[0] < 60
