"""Prototypical networks: a user is the mean item vectors of the items liked more, and less, than expected.

Source: Snell, Swersky and Zemel, "Prototypical Networks for Few-Shot Learning", 2017; class means as a user, for
recommendation: Vartak et al., "A Meta-Learning Perspective on Cold-Start Recommendations for Items", 2017.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from metarec_jax import losses
from metarec_jax.core import Array, Examples, Inputs, Learner, Model, Params
from metarec_jax.learners import _support as shows
from metarec_jax.models.networks import attend
from metarec_jax.options import POSITIVE, Bounds, bounded

_NOTHING = -1e30
"""Null logit that matters only where there is no example."""


@bounded
def protonet(
    model: Model,
    *,
    classes: Annotated[int, Bounds(1)] = 5,
    sharpness: Annotated[float, POSITIVE] = 1.0,
    prior: Annotated[float, POSITIVE] = 3.0,
    loss: Callable[..., Array] = losses.mse,
    expected: shows.Expected = shows.itself,
) -> Learner:
    """Meta-train item vectors in which the distance to a class mean predicts how much a user likes an item.

    With residuals ``e_i = target_i - expected(apply_i)`` and item vectors ``v_i`` of the support:

    - an example belongs to class k by ``w_ik = softmax_k(-sharpness (e_i - centre_k)^2)``,
    - the class has the count ``n_k = sum_i w_ik``, the prototype ``c_k = sum_i w_ik v_i / n_k`` and the value
      ``r_k = sum_i w_ik e_i / n_k``,
    - ``score = apply + gain sum_k n_k s_k r_k / (prior + sum_k n_k s_k)`` with
      ``s_k = exp(-sum_j scale_j (v_j - c_kj)^2)``.

    This is Snell's softmax over distances, as the expected value of the classes; the weight of a class is its number
    of examples, and that of the model's own score is ``prior`` examples, so an empty support predicts that score.
    Centres, sharpness, scales, prior and gain are learned.

    Args:
      model: a model with ``features``, such as `content_model`.
      classes: number of levels of liking; 2 separates more than expected from less. Their centres start evenly spaced
        on [-1, 1].
      sharpness: initial sharpness of the classes; with a large one each example belongs to one class only.
      prior: initial weight of the model's own score, in examples.
      loss: loss of the query, ``loss(scores [n], target [n], where=[n]) -> scalar``.
      expected: target that a score predicts; ``jax.nn.sigmoid`` for clicks, where the score is a logit.

    Returns:
      A learner whose ``adapted`` is ``{"prototype": [K, D], "count": [K], "value": [K]}``.

    Raises:
      MetarecError: the model has no ``features``, ``classes`` is below 1, or a number is not above 0.

    Items are numbers, the model's own score is 0. Two examples of residual 1 at 0 and 2 give the prototype 1, one of -1
    gives 3, and the query 2 is between them: ``e^-1 (2 - 1) / (1 + e^-1 (2 + 1))``.

    >>> numbers = lambda params, inputs: inputs["x"]
    >>> model = Model(lambda key: {"tables": {}}, lambda params, inputs: 0.0 * inputs["x"][:, 0], {}, numbers, 1)
    >>> learner = protonet(model, classes=2, sharpness=1e3, prior=1.0)
    >>> support = Examples({"x": jnp.array([[0.0], [2.0], [3.0]])}, jnp.array([1.0, 1.0, -1.0]), jnp.ones(3))
    >>> params = learner.init(jax.random.key(0))
    >>> adapted = learner.adapt(params, support, jax.random.key(0))
    >>> adapted["prototype"].tolist(), adapted["count"].tolist()
    ([[3.0], [1.0]], [1.0, 2.0])
    >>> round(float(learner.predict(params, adapted, {"x": jnp.array([[2.0]])})[0]), 4)
    0.1749
    """
    vectors = shows.features_of(model, "protonet")

    def init(key: Array) -> Params:
        own = {
            "centre": jnp.asarray(np.linspace(-1.0, 1.0, classes) if classes > 1 else [0.0], jnp.float32),
            "log_sharpness": jnp.asarray(np.log(sharpness), jnp.float32),
            "log_scale": jnp.zeros(model.num_features, jnp.float32),
            "log_prior": jnp.asarray(np.log(prior), jnp.float32),
            "gain": jnp.ones((), jnp.float32),
            "log_unknown_trust": jnp.zeros((), jnp.float32),
        }
        return {**model.init(key), "protonet": own}

    def adapt(params: Params, support: Examples, key: Array) -> dict[str, Array]:
        own = params["protonet"]
        shown = shows.evidence(model, params, support, own["log_unknown_trust"], expected)
        squares = jnp.square(shown.residual[:, None] - own["centre"][None])
        log_member = jax.nn.log_softmax(-jnp.exp(own["log_sharpness"]) * squares, axis=1)
        # The mean of a class by a softmax over its examples: their shares in a class may be too small for a float.
        both = jnp.concatenate([shown.vectors, shown.residual[:, None]], axis=1)
        means = attend(log_member.T, shown.weight, both, _NOTHING)
        return {
            "prototype": means[:, :-1],
            "count": shown.weight @ jnp.exp(log_member),
            "value": means[:, -1],
        }

    def predict(params: Params, adapted: dict[str, Any], inputs: Inputs) -> Array:
        own = params["protonet"]
        squares = jnp.square(vectors(params, inputs)[:, None] - adapted["prototype"][None])
        distance = squares @ jnp.exp(own["log_scale"])
        change = attend(-distance, adapted["count"], adapted["value"][:, None], own["log_prior"])[:, 0]
        return model.apply(params, inputs) + own["gain"] * change

    return shows.learner(init, adapt, predict, loss, model)
