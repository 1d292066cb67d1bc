"""Logistic regression of the support by Newton steps: the optimum, its derivative, and the learner on it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from derivatives import agree_with_finite_differences
from scipy.optimize import minimize
from test_closed_forms import KEY
from worlds import content, double, one, tasks

from metarec_jax import learners
from metarec_jax.core import Examples
from metarec_jax.learners.logistic import optimum

# Logistic regression


def clicks_world(seed=0, n=12, d=3, offset=1.0):
    rng = np.random.default_rng(seed)
    phi, prior, precision = rng.normal(size=(n, d)), offset * rng.normal(size=n), np.exp(rng.normal(size=d))
    target = (rng.random(n) < 0.5).astype(float)
    return phi, prior, target, rng.random(n) + 0.1, precision


@pytest.mark.parametrize("offset", [1.0, 30.0])
def test_logistic_reaches_the_optimum(offset, float64):
    """Against BFGS on the same objective. With a prior of +-30 the whole Newton step from there is wild."""
    phi, prior, target, weight, precision = clicks_world(offset=offset)

    def objective(d):
        s = prior + phi @ d
        return (weight * (np.logaddexp(0, s) - target * s)).sum() + 0.5 * (precision * d**2).sum()

    want = minimize(objective, np.zeros(3), method="BFGS", options={"gtol": 1e-9}).x
    got = optimum(*(jnp.asarray(a) for a in (phi, prior, target, weight, precision)), 12)
    assert objective(np.asarray(got)) <= objective(want) + 1e-12
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_newton_steps_until_float32():
    """8 steps in float32 are within 1e-5 of 30 steps in float64, in 50 worlds."""
    worlds = [np.stack(a) for a in zip(*(clicks_world(s, n=24, d=5, offset=2.0) for s in range(50)), strict=True)]

    def many(dtype, steps):
        return jax.jit(jax.vmap(lambda *world: optimum(*world, steps)))(*(jnp.asarray(a, dtype) for a in worlds))

    got = many(jnp.float32, 8)
    with jax.enable_x64(True):
        want = many(jnp.float64, 30)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_derivative_of_the_optimum(float64):
    """Of features, prior, targets, weights and precisions, against finite differences of the converged solution."""
    world = dict(zip("abcde", (jnp.asarray(a) for a in clicks_world()), strict=True))
    direction = jnp.array([0.3, -1.0, 0.7])
    agree_with_finite_differences(lambda w: optimum(*(w[k] for k in "abcde"), 12) @ direction, world)


def test_padding_of_logistic_may_be_nan():
    phi, prior, target, weight, precision = (jnp.asarray(a, jnp.float32) for a in clicks_world())
    spoiled = (phi.at[0].set(jnp.nan), prior.at[0].set(jnp.nan), target.at[0].set(jnp.nan), weight.at[0].set(0.0))
    solved = jax.jit(optimum)
    want = solved(phi[1:], prior[1:], target[1:], weight[1:], precision)
    np.testing.assert_allclose(solved(*spoiled, precision), want, atol=1e-6)
    slope = jax.jit(jax.grad(lambda p: optimum(*spoiled, p).sum()))(precision)
    assert bool(jnp.isfinite(slope).all())


def test_logistic_learner_solves_for_the_user(float64):
    """predict = prior + phi . d with d the optimum on [features, 1]: two clicks, two misses."""
    model, task = content("dot"), double(one(tasks(jax.random.key(3), 2), 1))
    support = Examples(task.support.inputs, jnp.array([1.0, 0, 0, 1, 0, 0]), jnp.array([1.0, 1, 1, 1, 0, 0]))
    learner = learners.logistic(model, precision=2.0, bias_precision=0.5)
    params = double(jax.jit(learner.init)(KEY))
    d = np.asarray(jax.jit(learner.adapt)(params, support, KEY))
    phi = np.column_stack([jax.jit(model.features)(params, support.inputs), np.ones(6)])[:4]
    chance = 1 / (1 + np.exp(-(np.asarray(jax.jit(model.apply)(params, support.inputs))[:4] + phi @ d)))
    slope = phi.T @ (chance - np.array([1, 0, 0, 1])) + np.array([2.0, 2, 2, 0.5]) * d
    np.testing.assert_allclose(slope, 0, atol=1e-7)  # precisions are kept as float32 logarithms
