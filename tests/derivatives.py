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
    params = double(learner.init(KEY)) if params is None else params
    return jax.jit(jax.grad(lambda p: learner.loss(p, task, KEY)[0]))(params)


def agree_with_finite_differences(loss, params, rel=1e-6, seeds=(0, 1)):
    """Along random directions: (L(p + e d) - L(p - e d)) / 2e = <grad L, d>."""
    both = jax.jit(jax.value_and_grad(loss))
    gradient = both(params)[1]
    leaves, form = jax.tree.flatten(params)
    for seed in seeds:
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        d = form.unflatten([jax.random.normal(k, leaf.shape, np.float64) for k, leaf in zip(keys, leaves, strict=True)])
        moved = lambda e: jax.tree.map(lambda p, q: p + e * q, params, d)  # noqa: B023, E731
        numeric = (both(moved(1e-5))[0] - both(moved(-1e-5))[0]) / 2e-5
        exact = sum(jnp.vdot(g, q) for g, q in zip(jax.tree.leaves(gradient), jax.tree.leaves(d), strict=True))
        assert float(numeric) == pytest.approx(float(exact), rel=rel, abs=1e-9)


def off_start(params, scale=0.03):
    """Parameters near the start, where nothing is 0 or the identity any more."""
    leaves, form = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(9), len(leaves))
    return form.unflatten([p + scale * jax.random.normal(k, p.shape) for k, p in zip(keys, leaves, strict=True)])
