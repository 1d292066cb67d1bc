"""Where the answer is known on paper."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from derivatives import KEY, agree_with_finite_differences, gradient_of, loss_at_start
from worlds import content, double, largest_difference, one, seed_model, tasks

from metarec_jax import learners
from metarec_jax.core import Examples, MetarecError, Model, Task
from metarec_jax.learners.ridge import solve

H = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, 0.2], [0.0, 0.2, 0.5]])
"""Hessian of the support loss below."""
A_SUPPORT = np.linalg.cholesky(H / 2 * 3).T
"""mean over 3 rows of (a . p - y)^2 has Hessian 2/3 A'A = H."""


def quadratic():
    """score = x . p with p the one dense parameter: a quadratic loss, whose adaptation is linear in p."""
    model = Model(
        init=lambda key: {"tables": {}, "net": {"p": jnp.array([0.3, -0.2, 0.9])}},
        apply=lambda params, inputs: inputs["x"] @ params["net"]["p"],
        tables={},
    )
    support = Examples({"x": jnp.asarray(A_SUPPORT)}, jnp.array([1.0, -1.0, 0.5]), jnp.ones(3))
    query = Examples({"x": jnp.array([[1.0, 2.0, -1.0], [0.5, 0.0, 1.0]])}, jnp.array([0.2, 1.5]), jnp.ones(2))
    return model, Task(support, query)


def query_gradient(p, task):
    x, y = np.asarray(task.query.inputs["x"]), np.asarray(task.query.target)
    return 2 / len(y) * x.T @ (x @ p - y)


def support_gradient(p, task):
    x, y = np.asarray(task.support.inputs["x"]), np.asarray(task.support.target)
    return 2 / len(y) * x.T @ (x @ p - y)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("first_order", [False, True])
def test_maml_on_a_quadratic(steps, first_order, float64):
    """One step: p1 = p - a grad L_s(p), so dL_q(p1)/dp = (I - a H)^T g with g = grad L_q(p1); k steps: (I - a H)^k g. FOMAML: g."""
    model, task = quadratic()
    task = double(task)
    learner = learners.maml(model, inner_lr=0.1, inner_steps=steps, first_order=first_order)
    params = double(learner.init(KEY))
    got = jax.jit(jax.grad(lambda p: learner.loss(p, task, KEY)[0]))(params)["net"]["p"]
    p = np.array([0.3, -0.2, 0.9], np.float32).astype(float)
    for _ in range(steps):
        p = p - 0.1 * support_gradient(p, task)
    through = np.eye(3) if first_order else np.linalg.matrix_power(np.eye(3) - 0.1 * H, steps)
    np.testing.assert_allclose(got, through.T @ query_gradient(p, task), rtol=1e-7)


def test_reptile_moves_towards_the_adapted_parameters(float64):
    """Its gradient is p - p_k, with p_k after k steps on support and query together."""
    model, task = quadratic()
    task = double(task)
    learner = learners.reptile(model, inner_lr=0.1, inner_steps=2)
    params = double(learner.init(KEY))
    got = jax.jit(jax.grad(lambda p: learner.loss(p, task, KEY)[0]))(params)["net"]["p"]
    x = np.concatenate([task.support.inputs["x"], task.query.inputs["x"]])
    y = np.concatenate([task.support.target, task.query.target])
    start = p = np.asarray(params["net"]["p"])
    for _ in range(2):
        p = p - 0.1 * 2 / 5 * x.T @ (x @ p - y)
    np.testing.assert_allclose(got, start - p, rtol=1e-6)


@pytest.mark.slow
def test_reptile_with_one_support_example_and_a_shared_user():
    """Support width 1: the user's column is still shared by all examples, not joined with itself (shapes would not fit)."""
    model, task = seed_world()
    few = Task(jax.tree.map(lambda a: a[:1], task.support), task.query)
    spread = lambda e: e._replace(inputs={**e.inputs, "user_id": jnp.repeat(e.inputs["user_id"], len(e.mask))})  # noqa: E731
    learner = learners.reptile(model, inner_steps=2)
    gradient = jax.jit(jax.grad(lambda p, t: learner.loss(p, t, KEY)[0]))
    params = jax.jit(learner.init)(KEY)
    full = Task(spread(few.support), spread(few.query))
    assert largest_difference(gradient(params, few), gradient(params, full)) < 1e-6


def test_a_prior_is_a_rate_that_grows_with_the_support(float64):
    """Of 3 examples, prior 6: a third of the loss, so a third of the rate, to value and derivative; of none: nothing."""
    model, task = quadratic()
    task = double(task)
    found = []
    for options in ({"inner_lr": 0.3, "prior": 6.0}, {"inner_lr": 0.1}):
        learner = learners.maml(model, inner_steps=3, **options)
        params = double(learner.init(KEY))
        found.append(jax.jit(jax.value_and_grad(lambda p, of=learner.loss: of(p, task, KEY)[0]))(params))
    assert largest_difference(*found) < 1e-12
    learner = learners.maml(model, inner_steps=3, prior=6.0)
    empty = task.support._replace(mask=jnp.zeros(3))
    params = double(learner.init(KEY))
    assert largest_difference(learner.adapt(params, empty, KEY)["rest"]["net/p"], params["net"]["p"]) == 0.0
    with pytest.raises(MetarecError, match=r"maml: prior must be 0 or more, got -2\.0"):
        learners.maml(model, prior=-2.0)


def seed_world():
    model = seed_model()
    task = one(tasks(jax.random.key(3), 2, columns={"user_id": model_column(400), "item_id": model_column(600)}), 1)
    return model, task


def model_column(size):
    from metarec_jax.core import Column

    return Column("id", size)


@pytest.mark.parametrize(
    "make",
    [
        lambda model: learners.maml(model, inner_lr=0.05, inner_steps=3),
        lambda model: learners.maml(model, inner_steps=2, rule=learners.meta_sgd(0.05)),
        learners.ridge,
        *(
            pytest.param(make, marks=pytest.mark.slow)
            for make in (
                lambda model: learners.maml(
                    model, inner_steps=2, rule=learners.from_optax(optax.adam(0.05, eps_root=1e-8))
                ),
                lambda model: learners.maml(model, inner_lr=0.05, inner_steps=3, per_step_losses=True),
                lambda model: learners.maml(model, inner_lr=0.05, inner_steps=2, only=("net",)),
            )
        ),
    ],
    ids=["maml", "meta_sgd", "ridge", "inner_adam", "per_step", "anil"],
)
def test_meta_gradients_agree_with_finite_differences(make, float64):
    """Along random directions of all meta-parameters: (L(p + e d) - L(p - e d)) / 2e = <grad L, d> to 1e-6 relative."""
    model, task = seed_world()
    task = double(task)
    learner = make(model)
    agree_with_finite_differences(lambda p: learner.loss(p, task, KEY)[0], double(jax.jit(learner.init)(KEY)))


def test_second_order_differs_from_first():
    """The two gradients are not the same: the curvature term is there."""
    model, task = seed_world()
    gradient = {}
    for first_order in (False, True):
        learner = learners.maml(model, inner_lr=0.2, inner_steps=2, first_order=first_order)
        gradient[first_order] = gradient_of(learner, task, jax.jit(learner.init)(KEY))
    assert largest_difference(gradient[True], gradient[False]) > 1e-2


def test_ridge_equals_the_normal_equations(float64):
    rng = np.random.default_rng(0)
    phi, y, precision = rng.normal(size=(7, 3)), rng.normal(size=7), np.array([0.5, 1.0, 2.0])
    mask = np.array([1, 1, 0, 1, 1, 1, 0.0])
    kept = phi[mask > 0]
    want = np.linalg.inv(kept.T @ kept + np.diag(precision)) @ kept.T @ y[mask > 0]
    np.testing.assert_allclose(solve(*(jnp.asarray(a) for a in (phi, y, mask, precision))), want, rtol=1e-12)


def test_ridge_without_support_predicts_the_prior():
    model = content("dot")
    learner = learners.ridge(model)
    task = one(tasks(KEY, 2))
    empty = task.support._replace(mask=jnp.zeros_like(task.support.mask))

    @jax.jit
    def served_and_plain(key):
        params, asked = learner.init(key), task.query.inputs
        return learner.predict(params, learner.adapt(params, empty, key), asked), model.apply(params, asked)

    np.testing.assert_allclose(*served_and_plain(KEY), rtol=1e-6)


def test_meta_sgd_with_constant_rates_is_maml():
    model, task = seed_world()
    plain = learners.maml(model, inner_lr=0.05, inner_steps=2)
    rates = learners.maml(model, inner_steps=2, rule=learners.meta_sgd(0.05))
    losses = [loss_at_start(learner, task) for learner in (plain, rates)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_anil_with_every_parameter_is_maml():
    model, task = seed_world()
    plain = learners.maml(model, inner_lr=0.05, inner_steps=2)
    every = learners.maml(model, inner_lr=0.05, inner_steps=2, only=("tables", "net"))
    assert loss_at_start(plain, task) == loss_at_start(every, task)


def test_no_inner_step_is_plain_training():
    """k = 0: the meta-loss is the query loss of the unadapted parameters."""
    model, task = seed_world()
    learner = learners.maml(model, inner_steps=0)
    params = learner.init(KEY)
    error = model.apply(params, task.query.inputs) - task.query.target
    assert float(learner.loss(params, task, KEY)[0]) == pytest.approx(float(jnp.mean(error**2)), rel=1e-6)


def test_a_misspelt_parameter_is_refused():
    from metarec_jax.core import MetarecError

    learner = learners.maml(seed_model(), only=("net/params/outt",))
    with pytest.raises(MetarecError, match="no parameter is under 'net/params/outt'"):
        learner.init(KEY)
