"""A warm start scores known items as the factorisation does, and unknown ones by their content."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import sparse
from worlds import seed_model

from metarec_jax import learners, models
from metarec_jax.core import MetarecError
from metarec_jax.data.catalogue import catalogue, inputs
from metarec_jax.data.synthetic import synthetic
from metarec_jax.factorization import als_factors

DATA = synthetic(300, 80, ratings_per_user=(10, 20), seed=0).data


def test_known_items_have_their_factors():
    """Own row + content rows = the ALS row, for every item that was rated: bias and vector, to float32 rounding."""
    model = models.content_model(DATA.columns, size=3)
    learner = learners.ridge(model)
    params = learners.warm_start(learner.init(jax.random.key(0)), DATA, reg=4.0, iterations=6)
    factors = als_factors(DATA, size=3, reg=4.0, iterations=6)
    rated = np.unique(DATA.item)
    columns = inputs(catalogue(DATA), jnp.int32(0), jnp.asarray(rated))
    numeric = [name for name, f in DATA.item_features.items() if f.kind == "numeric"]
    assert all(not np.any(params["net"]["params"][name]["kernel"]) for name in numeric)  # they start at 0
    np.testing.assert_allclose(model.features(params, columns), factors.item_factors[rated], atol=2e-5)
    assert float(params["net"]["params"]["mean"]) == pytest.approx(factors.mu)


def test_the_regression_is_the_weighted_ridge():
    """Conjugate gradients against (X' W X + R)^-1 X' W Y on a small problem."""
    rng = np.random.default_rng(0)
    block = sparse.csr_matrix((rng.random((30, 6)) < 0.4).astype(float))
    target, weight, reg = rng.normal(size=(30, 2)), rng.random(30), 0.7
    x = np.hstack([block.toarray(), np.ones((30, 1))])
    penalty = np.diag([reg] * 6 + [1e-3 * reg])
    want = np.linalg.solve(x.T @ (weight[:, None] * x) + penalty, x.T @ (weight[:, None] * target))
    fit, base, parts = sys.modules["metarec_jax.learners._starts"].regress([block], target, weight, reg)
    np.testing.assert_allclose(np.vstack([*parts, base]), want, atol=1e-8)
    np.testing.assert_allclose(fit, x @ want, atol=1e-8)


def test_another_model_is_refused():
    learner = learners.maml(seed_model(), inner_steps=1)
    with pytest.raises(MetarecError, match="content_model"):
        learners.warm_start(learner.init(jax.random.key(0)), DATA)
