"""In-context learning: a transformer reads the support, and each query attends to it.

Source: Müller et al., "Transformers Can Do Bayesian Inference", 2022 (the attention mask); for ratings, Fang et al.,
"All-in-One: Heterogeneous Interaction Modeling for Cold-Start Rating Prediction" (HIRE), 2024, whose tokens are the
pairs of several users and items; here they are those of one user.
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
from metarec_jax.models.networks import transformer
from metarec_jax.options import POSITIVE, Bounds, bounded


@bounded
def in_context(
    model: Model,
    *,
    width: Annotated[int, Bounds(1)] = 32,
    layers: Annotated[int, Bounds(1)] = 2,
    heads: Annotated[int, Bounds(1)] = 2,
    prior: Annotated[float, POSITIVE] = 3.0,
    prior_weight: Annotated[float, Bounds(0.0)] = 0.5,
    loss: Callable[..., Array] = losses.mse,
    expected: shows.Expected = shows.itself,
) -> Learner:
    """Meta-train a transformer that predicts a query from the support: adaptation is one forward pass.

    ``score = apply + n / (n + prior) t(v; support)`` with n the weight of the support; the learned ``prior`` shrinks
    the change of a short support, and an empty support predicts the model's own score.

    A support token is its item vector and its residual ``target - expected(apply)``. Tokens of the support attend to
    each other; a query token, whose residual is masked, attends to the support and to no other query. Tokens have no
    positions, so the order of the support does not matter.

    Args:
      model: a model with ``features``, such as `content_model`.
      width: length of a token, a multiple of ``heads``.
      layers: number of layers of the transformer.
      heads: number of attention heads per layer.
      prior: initial prior strength, in examples; learned.
      prior_weight: weight of the loss of the model's own score in the objective; that after adaptation has weight 1.
      loss: loss of the query, ``loss(scores [n], target [n], where=[n]) -> scalar``.
      expected: target that a score predicts; ``jax.nn.sigmoid`` for clicks, where the score is a logit.

    Returns:
      A learner whose ``adapted`` holds the keys and values of the support in each layer,
      ``[layers, S, heads, width / heads]``, and its weights ``[S]``.

    Raises:
      MetarecError: the model has no ``features``, ``width`` is not a multiple of ``heads``, or a number is out of
        bounds.
    """
    model = shows.scaled(model, "in_context")
    vectors = shows.features_of(model, "in_context")
    if width % heads:
        raise MetarecError(f"in_context: width must be a multiple of heads ({heads}), got {width}; correct one of them")
    net = transformer(model.num_features, width, layers, heads)

    def init(key: Array) -> Params:
        k_model, k_net = jax.random.split(key)
        own = {
            "net": net.init(k_net),
            "log_scale": jnp.asarray(shows.LOG_SCALE, jnp.float32),
            "log_prior": jnp.asarray(np.log(prior), jnp.float32),
            "log_unknown_trust": jnp.zeros((), jnp.float32),
        }
        return {**model.init(k_model), "in_context": own}

    def adapt(params: Params, support: Examples, key: Array) -> dict[str, Array]:
        own = params["in_context"]
        shown = shows.evidence(model, params, support, own["log_unknown_trust"], expected)
        keys, values = net.apply(own["net"], *shown, method="read")
        return {"keys": keys, "values": values, "weight": shown.weight}

    def predict(params: Params, adapted: dict[str, Any], inputs: Inputs) -> Array:
        own, weight = params["in_context"], adapted["weight"]
        x = vectors(params, inputs)
        change = net.apply(own["net"], x, adapted["keys"], adapted["values"], weight, method="answer")
        n = weight.sum()
        return model.apply(params, inputs) + n / (n + jnp.exp(own["log_prior"])) * change

    return shows.learner(init, adapt, predict, loss, model, prior_weight)
