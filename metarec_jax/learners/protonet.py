"""Prototypical networks: a user is the mean item vectors of what was liked more, and less, than expected.

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
from metarec_jax.core import Array, Examples, Inputs, Learner, MetarecError, Model, Params
from metarec_jax.learners import _support as shows
from metarec_jax.models.networks import attend
from metarec_jax.options import POSITIVE, Bounds, bounded

_NOTHING = -1e30
"""A null logit that counts only where there is no example at all."""


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
    """Meta-train item vectors in which nearness to a class mean tells how far a user likes an item.

    With residuals ``e_i = target_i - expected(apply_i)`` and item vectors ``v_i`` of the support:

    - an example belongs to class k by ``w_ik = softmax_k(-sharpness (e_i - centre_k)^2)``,
    - the class has the count ``n_k = sum_i w_ik``, the prototype ``c_k = sum_i w_ik v_i / n_k`` and the value
      ``r_k = sum_i w_ik e_i / n_k``,
    - ``score = apply + gain sum_k n_k s_k r_k / (prior + sum_k n_k s_k)`` with
      ``s_k = exp(-sum_j scale_j (v_j - c_kj)^2)``.

    This is Snell's softmax over distances, as the expected value of the classes; a class weighs as many examples as it
    has, and ``prior`` examples say that the model's own score is right, so that an empty support predicts exactly it.
    Centres, sharpness, scales, prior and gain are learned.

    Args:
      model: with ``features``, such as `content_model`.
      classes: levels of liking; 2: more than expected, and less. Their centres start evenly on [-1, 1].
      sharpness: where it starts; large: each example in one class alone.
      prior: where the weight of the model's own score starts, in examples.
      loss: of the query, ``loss(scores [n], target [n], where=[n]) -> scalar``.
      expected: the target that a score expects, ``jax.nn.sigmoid`` for clicks (the score is then a logit).

    Returns:
      A learner whose ``adapted`` is ``{"prototype": [K, D], "count": [K], "value": [K]}``.

    Raises:
      MetarecError: the model has no ``features``, fewer than 1 class, or a number is not above 0.

    Items are numbers, the model's own score is 0. Two examples of residual 1 at 0 and 2 make the prototype 1, one of -1
    makes 3, and the query 2 lies between: ``e^-1 (2 - 1) / (1 + e^-1 (2 + 1))``.

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
    if classes < 1:
        raise MetarecError(f"protonet: classes is {classes}; give 1 or more")

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
        apart = jnp.square(shown.residual[:, None] - own["centre"][None])
        log_member = jax.nn.log_softmax(-jnp.exp(own["log_sharpness"]) * apart, axis=1)
        # The mean of a class by a softmax over its examples: a class may hold less of each than a number can say.
        both = jnp.concatenate([shown.vectors, shown.residual[:, None]], axis=1)
        means = attend(log_member.T, shown.weight, both, _NOTHING)
        return {
            "prototype": means[:, :-1],
            "count": shown.weight @ jnp.exp(log_member),
            "value": means[:, -1],
        }

    def predict(params: Params, adapted: dict[str, Any], inputs: Inputs) -> Array:
        own = params["protonet"]
        apart = jnp.square(vectors(params, inputs)[:, None] - adapted["prototype"][None])
        distance = apart @ jnp.exp(own["log_scale"])
        change = attend(-distance, adapted["count"], adapted["value"][:, None], own["log_prior"])[:, 0]
        return model.apply(params, inputs) + own["gain"] * change

    return shows.learner(init, adapt, predict, loss, model)
