"""An ensemble is the weighted mean of its methods."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metarec_jax.baselines.tuning import fit_baselines
from metarec_jax.core import Examples, MetarecError
from metarec_jax.data.catalogue import catalogue, inputs
from metarec_jax.data.synthetic import synthetic
from metarec_jax.learners import ensemble


def test_scores_are_the_weighted_mean():
    """Weights 3 and 1 of known items, 0 and 1 of unknown ones."""
    data = synthetic(30, 20, ratings_per_user=(5, 10), seed=0).data
    known = catalogue(data)
    methods = fit_baselines(data, known, names=["bias", "als"])
    both = ensemble(methods, {"bias": 3, "als": 1}, {"bias": 0, "als": 2})
    columns = inputs(known, jnp.int32(0), jnp.arange(4))  # row 0 is unknown
    support = Examples(columns, jnp.array([5.0, 1.0, 2.0, 4.0]), jnp.ones(4))
    key = jax.random.key(0)
    each = {n: m.predict(m.params, m.adapt(m.params, support, key), columns) for n, m in methods.items()}
    got = both.predict(both.params, both.adapt(both.params, support, key), columns)
    np.testing.assert_allclose(got[1:], 0.75 * each["bias"][1:] + 0.25 * each["als"][1:], rtol=1e-5)
    np.testing.assert_allclose(got[0], each["als"][0], rtol=1e-5)


@pytest.mark.parametrize(("names", "weights"), [([], None), (["bias"], {"als": 1.0}), (["bias"], {"bias": 0.0})])
def test_bad_weights_are_refused(names, weights):
    data = synthetic(30, 20, ratings_per_user=(5, 10), seed=0).data
    methods = fit_baselines(data, catalogue(data), names=names) if names else {}
    with pytest.raises(MetarecError, match=r"give (one for each|at least one)"):
        ensemble(methods, weights)
