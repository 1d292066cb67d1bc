"""Hypernetworks: a network reads the support and outputs the user's own weights.

Source: Ha, Dai and Le, "HyperNetworks", 2016; from a set of examples, with FiLM and a generated last layer: Requeima et
al., "Fast and Flexible Multi-Task Classification Using Conditional Neural Adaptive Processes" (CNAPs), 2019.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp

from metarec_jax import losses
from metarec_jax.core import Array, Examples, Inputs, Learner, Model, Params
from metarec_jax.learners import _support as shows
from metarec_jax.models.networks import encoder
from metarec_jax.options import POSITIVE, Bounds, bounded


@bounded
def hypernetwork(
    model: Model,
    *,
    hidden: Annotated[int, Bounds(0)] = 0,
    width: Annotated[int, Bounds(1)] = 64,
    prior: Annotated[float, POSITIVE] = 3.0,
    prior_weight: Annotated[float, Bounds(0.0)] = 0.5,
    loss: Callable[..., Array] = losses.mse,
    expected: shows.Expected = shows.itself,
) -> Learner:
    """Meta-train an encoder of the support whose output is the weights of a user's head.

    - ``hidden=0``: ``score = apply + <w, [v, 1]>``: the user's vector and bias, as in `ridge`, in one forward pass.
    - ``hidden>0``: ``score = apply + <w, [h, 1]>``, ``h = relu((1 + scale) * (A v + b) + shift)``: one layer of that
      many units, shared by all users, scaled and shifted by the support (FiLM), and a last layer from the support.

    w, scale and shift are the output of `networks.encoder` on ``[v, e, e v]`` of each support example, with residuals
    ``e = target - expected(apply)``; they are 0 where the support is empty, which therefore predicts ``apply``.

    Args:
      model: a model with ``features``, such as `content_model`.
      hidden: units of the head's hidden layer; 0 leaves that layer out.
      width: units of each layer of the encoder.
      prior: initial prior strength of the encoder, in examples; learned.
      prior_weight: weight of the loss of the model's own score in the objective; that after adaptation has weight 1.
      loss: loss of the query, ``loss(scores [n], target [n], where=[n]) -> scalar``.
      expected: target that a score predicts; ``jax.nn.sigmoid`` for clicks, where the score is a logit.

    Returns:
      A learner whose ``adapted`` is ``{"weights": [D + 1]}``, or ``{"weights": [hidden + 1], "scale": [hidden],
      "shift": [hidden]}``.

    Raises:
      MetarecError: the model has no ``features``, or a number is out of bounds.
    """
    model = shows.scaled(model, "hypernetwork")
    vectors = shows.features_of(model, "hypernetwork")
    size = model.num_features
    length = 3 * hidden + 1 if hidden else size + 1
    net = encoder(2 * size + 1, width, length, prior)

    def init(key: Array) -> Params:
        k_model, k_net, k_head = jax.random.split(key, 3)
        own = {
            "net": net.init(k_net),
            "log_scale": jnp.asarray(shows.LOG_SCALE, jnp.float32),
            "log_unknown_trust": jnp.zeros((), jnp.float32),
        }
        if hidden:
            kernel = jax.random.normal(k_head, (size, hidden)) / size**0.5
            own |= {"kernel": kernel, "bias": jnp.zeros(hidden, jnp.float32)}
        return {**model.init(k_model), "hypernetwork": own}

    def adapt(params: Params, support: Examples, key: Array) -> dict[str, Array]:
        own = params["hypernetwork"]
        shown = shows.evidence(model, params, support, own["log_unknown_trust"], expected)
        written = net.apply(own["net"], shows.signed(shown), shown.weight)
        if not hidden:
            return {"weights": written}
        weights, scale, shift = jnp.split(written, [hidden + 1, 2 * hidden + 1])
        return {"weights": weights, "scale": scale, "shift": shift}

    def predict(params: Params, adapted: dict[str, Array], inputs: Inputs) -> Array:
        own, h, weights = params["hypernetwork"], vectors(params, inputs), adapted["weights"]
        if hidden:
            h = (h @ own["kernel"] + own["bias"][None]) * (1.0 + adapted["scale"][None]) + adapted["shift"][None]
            h = jax.nn.relu(h)
        return model.apply(params, inputs) + h @ weights[:-1] + weights[-1]

    return shows.learner(init, adapt, predict, loss, model, prior_weight)
