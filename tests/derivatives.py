"""Derivatives of a learner, and whether they are those of finite differences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from worlds import double

KEY = jax.random.key(0)
P = np.array([0.3, -0.2, 0.9], np.float32).astype(float)
"""Where the quadratic world starts."""


def gradient_of(learner, task, params=None):
    params = double(jax.jit(learner.init)(KEY)) if params is None else params
    return jax.jit(jax.grad(lambda p: learner.loss(p, task, KEY)[0]))(params)


def loss_at_start(learner, task) -> float:
    """The loss of a task by the learner's first parameters, in one program."""
    return float(jax.jit(lambda key: learner.loss(learner.init(key), task, key)[0])(KEY))


def agree_with_finite_differences(loss, params, rel=1e-6, seeds=(0, 1)):
    """Along random directions: (L(p + e d) - L(p - e d)) / 2e = <grad L, d>."""
    both = jax.jit(jax.value_and_grad(loss))
    gradient = both(params)[1]
    leaves, form = jax.tree.flatten(params)
    for seed in seeds:
        rng = np.random.default_rng(seed)  # in NumPy: what JAX does outside of a jit is compiled for each shape
        d = form.unflatten([rng.normal(size=leaf.shape) for leaf in leaves])
        ahead, behind = (jax.tree.map(lambda p, q, e=e: np.asarray(p) + e * q, params, d) for e in (1e-5, -1e-5))
        numeric = (both(ahead)[0] - both(behind)[0]) / 2e-5
        exact = sum(np.vdot(g, q) for g, q in zip(jax.tree.leaves(gradient), jax.tree.leaves(d), strict=True))
        assert float(numeric) == pytest.approx(float(exact), rel=rel, abs=1e-9)


def off_start(params, scale=0.03):
    """Parameters near the start, where nothing is 0 or the identity any more."""
    rng = np.random.default_rng(9)
    return jax.tree.map(lambda p: jnp.asarray(p + scale * rng.normal(size=p.shape), p.dtype), params)
