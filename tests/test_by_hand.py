"""One number per learner, by hand: a new learner adds a row.

The world: items are numbers x, the model's own score is 0, a user has rated the items 0 and 2 with 4 and 2, and the
prediction for the item 1 is asked for, untrained.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from metarec_jax.core import Examples, Model
from metarec_jax.learners import registry

NUMBERS = Model(
    lambda key: {"tables": {}},
    lambda params, inputs: 0.0 * inputs["x"][:, 0],
    {},
    lambda params, inputs: inputs["x"],
    1,
)
SUPPORT = Examples({"x": jnp.array([[0.0], [2.0]])}, jnp.array([4.0, 2.0]), jnp.ones(2))
BY_HAND = {
    # sum (t - w x - b)^2 + w^2 + b^2: (1 + 4) w + 2 b = 4, 2 w + (1 + 2) b = 6; w = 0, b = 2
    "ridge": ({"precision": 1.0, "bias_precision": 1.0}, 2.0),
    # both items are as near as each other: (4 + 2) / (1 + 2)
    "matching": ({"similarity": "euclidean", "temperature": 1e-6, "prior": 1.0}, 2.0),
    # one prototype at 1 with two examples of mean 3: 2 * 3 / (1 + 2)
    "protonet": ({"classes": 1, "prior": 1.0}, 2.0),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_prediction_by_hand(name):
    options, expected = BY_HAND[name]
    learner = registry.factory(name)(NUMBERS, **options)
    params = learner.init(jax.random.key(0))
    adapted = learner.adapt(params, SUPPORT, jax.random.key(0))
    assert float(learner.predict(params, adapted, {"x": jnp.array([[1.0]])})[0]) == pytest.approx(expected, abs=1e-3)
