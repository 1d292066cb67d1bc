"""The Gaussian process over items: its posterior is the textbook's, and a training user is taken out of what was counted."""

from __future__ import annotations

import sys
from dataclasses import replace

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metarec_jax import losses
from metarec_jax.baselines.tuning import fit_baselines
from metarec_jax.core import Examples, MetarecError, Method, Task
from metarec_jax.data.catalogue import catalogue, inputs
from metarec_jax.data.draw import task_source
from metarec_jax.data.synthetic import synthetic
from metarec_jax.data.tasks import make_tasks
from metarec_jax.evaluation.evaluate import evaluate
from metarec_jax.learners import gaussian_process, gaussian_process_start
from metarec_jax.training.loop import fit
from metarec_jax.training.row_optimizers import lazy_adam
from metarec_jax.training.step import Optimizers, init_state

KEY = jax.random.key(0)
gp = sys.modules["metarec_jax.learners.gaussian_process"]
sides, kernel_of, own_part = (jax.jit(function) for function in (gp._sides, gp._kernel, gp._own))


@pytest.fixture(scope="module")
def world():
    made = synthetic(200, 40, ratings_per_user=(10, 20), size=2, seed=0)
    old = made.data.user <= 160
    return made, made.data.take(old), made.data.take(~old)


def trained(train, **given):
    learner = gaussian_process(train.columns)
    source = task_source(train, support=(1, 64), user_rows="own", item_drop=0.05, tasks=given.get("tasks", 32))
    params = gaussian_process_start(learner.init(KEY), train)
    return fit(learner, source, steps=given["steps"], lr=0.05, params=params).method


@pytest.fixture(scope="module")
def fitted(world):
    _, train, _ = world
    return trained(train, steps=40, tasks=16)


def examples(known, items, target):
    columns = inputs(known, jnp.int32(0), jnp.asarray(items))
    return Examples(columns, jnp.asarray(target, jnp.float32), jnp.ones(len(items)))


def served(method, support, inputs):
    """Scores by what adapts to a support, in one program."""
    both = jax.jit(lambda params, support, inputs: method.predict(params, method.adapt(params, support, KEY), inputs))
    return both(method.params, support, inputs)


def test_the_posterior_is_the_textbooks(world, fitted):
    """m_q + K_qs (K_ss + D)^-1 (r - m_s), by NumPy, from the mean and the kernel of `_sides` and `_kernel`."""
    known = catalogue(world[1])
    support, query = examples(known, [1, 2, 3], [5.0, 1.0, 3.0]), examples(known, [4, 5], [0.0, 0.0])
    weights, statistics = fitted.params["weights"], fitted.params["fixed"]
    s, q = (sides(weights, statistics, part.inputs, None) for part in (support, query))
    (k_ss, near_ss), (k_qs, near_qs) = (kernel_of(weights, statistics, a, s) for a in (s, q))
    near, near_ss, near_qs = weights["mean"]["near"] / np.sqrt(3), np.asarray(near_ss), np.asarray(near_qs)
    m_s = np.asarray(s["prior"]) + near * (near_ss * (1 - np.eye(3))).sum(1)
    m_q = np.asarray(q["prior"]) + near * near_qs.sum(1)
    noise = np.exp(weights["noise"]) * np.eye(3)
    want = m_q + k_qs @ np.linalg.solve(k_ss + noise, np.asarray(support.target) - m_s)
    np.testing.assert_allclose(served(fitted, support, query.inputs), want, rtol=1e-4)


def test_the_kernel_is_positive_semidefinite(world, fitted):
    known = catalogue(world[1])
    weights, statistics = fitted.params["weights"], fitted.params["fixed"]
    every = sides(weights, statistics, examples(known, np.arange(1, 41), np.zeros(40)).inputs, None)
    kernel = np.asarray(kernel_of(weights, statistics, every, every)[0])
    np.testing.assert_allclose(kernel, kernel.T, rtol=1e-4)
    assert np.linalg.eigvalsh(kernel).min() > -1e-3 * np.linalg.eigvalsh(kernel).max()


def test_a_training_user_is_taken_out(world, fitted):
    """Kernel and mean of a user's items, less what he gave, are those of statistics counted without his rows."""
    _, train, _ = world
    statistics, user = fitted.params["fixed"], 7
    own = train.take(train.user == user)
    known = catalogue(train, user_rows="own")
    columns = inputs(known, jnp.int32(user), jnp.asarray(own.item))
    part = Examples(columns, jnp.asarray(own.rating), jnp.ones(len(own)))
    level = own.rating - float(statistics["mu"]) - float(statistics["user_bias"][user])
    e = np.zeros(41, np.float32)
    e[own.item] = level - np.asarray(statistics["item_bias"])[own.item]
    rated = (e != 0).astype(np.float32)
    beyond = np.zeros(41, np.float32)
    content = statistics["base"] + sum(
        _content(statistics["content"][name], columns[name]) for name in statistics["content"]
    )
    beyond[own.item] = level - np.asarray(content)
    without = dict(statistics)
    without["gram"] = statistics["gram"] - np.outer(e, e)
    without["pairs"] = statistics["pairs"] - np.outer(rated, rated)
    without["rest"] = statistics["rest"] - beyond
    without["groups"] = {
        name: {
            "sum": g["sum"].at[columns[name][0]].add(-beyond),
            "count": g["count"].at[columns[name][0]].add(-rated),
        }
        for name, g in statistics["groups"].items()
    }
    weights = fitted.params["weights"]
    got = sides(weights, statistics, columns, own_part(statistics, part))
    want = sides(weights, without, columns, None)
    np.testing.assert_allclose(got["prior"], want["prior"], rtol=1e-4)
    for a, b in zip(kernel_of(weights, statistics, got, got), kernel_of(weights, without, want, want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def _content(coefficients, x):
    if not jnp.issubdtype(x.dtype, jnp.integer):
        return x @ coefficients
    x = x[:, None] if x.ndim == 1 else x
    return (coefficients[x] * (x > 0)).sum(1) / jnp.maximum((x > 0).sum(1), 1)


def test_padding_changes_nothing(world, fitted):
    known = catalogue(world[1])
    short = examples(known, [1, 2, 3], [5.0, 1.0, 3.0])
    long = examples(known, [1, 2, 3, 9], [5.0, 1.0, 3.0, np.nan])._replace(mask=jnp.array([1.0, 1.0, 1.0, 0.0]))
    query = examples(known, [4, 5], [0.0, 0.0]).inputs
    scores = [served(fitted, part, query) for part in (short, long)]
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-4)


@pytest.mark.slow
def test_weights_have_the_derivative_of_finite_differences(world, fitted, float64):
    _, train, _ = world
    known = catalogue(train, user_rows="own")
    own = train.take(train.user == 3)
    columns = inputs(known, jnp.int32(3), jnp.asarray(own.item))
    half = lambda rows: Examples(  # noqa: E731
        {n: c[rows] if n.startswith("item") else c for n, c in columns.items()},
        jnp.asarray(own.rating[rows], jnp.float64),
        jnp.ones(len(own.rating[rows])),
    )
    task = Task(half(slice(0, 6)), half(slice(6, 10)))
    double = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)  # noqa: E731
    weights, statistics = double(fitted.params["weights"]), double(fitted.params["fixed"])
    flat, back = jax.flatten_util.ravel_pytree(weights)
    value = jax.jit(lambda flat: gp.task_loss(back(flat), statistics, task, loss=losses.mse))
    flat, step = np.asarray(flat), 1e-5 * np.eye(len(flat))
    want = [(value(flat + d) - value(flat - d)) / 2e-5 for d in step]
    np.testing.assert_allclose(jax.jit(jax.grad(value))(flat), want, rtol=1e-5, atol=1e-8)


@pytest.mark.slow
def test_it_beats_what_does_not_adapt(world):
    """New users of a planted world: below the item mean's and the bias model's error, by a tenth."""
    _, train, new = world
    known = catalogue(train)
    methods = {
        "gaussian_process": trained(train, steps=100),
        **fit_baselines(train, known, names=["item_mean", "bias"]),
    }
    tasks, scale = {"user_cold": make_tasks(new, query=5)}, (float(new.rating.min()), float(new.rating.max()))
    found = evaluate(methods, tasks, known, rating_range=scale, baselines=("item_mean", "bias")).summary()
    error = {name: found[name]["user_cold"]["squared_error"].mean for name in methods}
    assert error["gaussian_process"] < 0.9 * min(error["item_mean"], error["bias"])


def test_clicks_and_what_does_not_fit_are_refused(world):
    train = world[1]
    params = jax.jit(gaussian_process(train.columns).init)(KEY)
    with pytest.raises(MetarecError, match="requires ratings"):
        gaussian_process_start(params, replace(train, rating=None))
    with pytest.raises(MetarecError, match="41 item rows"):
        gaussian_process(train.columns, dense_limit=40)
    with pytest.raises(MetarecError, match="other users, items or features"):
        gaussian_process_start(params, replace(train, item_features={}))


def test_training_changes_the_weights_and_not_the_counts(world, fitted):
    """And keeps no optimiser's state for them: Adam's moments have the sizes of the weights."""
    start = gaussian_process_start(gaussian_process(world[1].columns).init(KEY), world[1])
    assert jax.tree.all(jax.tree.map(np.array_equal, fitted.params["fixed"], start["fixed"]))
    assert not jax.tree.all(jax.tree.map(np.array_equal, fitted.params["weights"], start["weights"]))
    optimizers = Optimizers(optax.adam(1e-3), lazy_adam(1e-3))
    state = init_state(gaussian_process(world[1].columns), optimizers, start, KEY)
    of_weights = sum(leaf.size for leaf in jax.tree.leaves(start["weights"]))
    assert sum(leaf.size for leaf in jax.tree.leaves(state.dense) if leaf.dtype == jnp.float32) == 2 * of_weights


def test_a_user_without_a_row_was_not_counted(world, fitted):
    """The loss of a new user is that of what adapt and predict give; of a counted one it is another."""
    _, train, _ = world
    params, own = fitted.params, train.take(train.user == 3)
    losses_of = []
    for user in (0, 3):
        columns = inputs(catalogue(train, user_rows="own"), jnp.int32(user), jnp.asarray(own.item))
        part = Examples(columns, jnp.asarray(own.rating), jnp.ones(len(own)))
        learner = gaussian_process(train.columns)
        scores = served(Method(params, learner.adapt, learner.predict), part, part.inputs)
        told = float(jax.jit(learner.loss)(params, Task(part, part), KEY)[0])
        losses_of.append((told, float(losses.mse(scores, part.target, where=part.mask))))
    assert losses_of[0][0] == pytest.approx(losses_of[0][1], rel=1e-6)
    assert losses_of[1][0] > losses_of[1][1] + 1e-3
