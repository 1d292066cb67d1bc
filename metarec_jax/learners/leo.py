"""LEO: gradient steps on a short latent code that a network computes from the support, not on the user's vector itself.

Source: Rusu et al., "Meta-Learning with Latent Embedding Optimization", 2019, with the code and the decoded vector at
their means: without the paper's sampling and its penalties.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from metarec_jax import losses
from metarec_jax.core import Array, Examples, Inputs, Learner, Model, Params
from metarec_jax.learners import _support as shows
from metarec_jax.learners._inner import loop
from metarec_jax.models.networks import encoder
from metarec_jax.options import POSITIVE, Bounds, bounded


@bounded
def leo(
    model: Model,
    *,
    latent: Annotated[int, Bounds(1)] = 8,
    inner_lr: Annotated[float, Bounds(0.0)] = 0.3,
    inner_steps: Annotated[int, Bounds(0)] = 5,
    width: Annotated[int, Bounds(1)] = 64,
    prior: Annotated[float, POSITIVE] = 3.0,
    prior_weight: Annotated[float, Bounds(0.0)] = 0.5,
    loss: Callable[..., Array] = losses.mse,
    inner_loss: Callable[..., Array] | None = None,
    expected: shows.Expected = shows.itself,
) -> Learner:
    """Meta-train an encoder to a code, a decoder to the user's vector, and the rates of gradient steps on the code.

    ``score = apply + <M z, [v, 1]>``, ``z <- z - rate * n / (n + prior) * grad_z L(support)`` with n the weight of the
    support, from the output ``z`` of `networks.encoder` on ``[s v, e, s e v]`` of each example, with residuals ``e =
    target - expected(apply)``. Scale s and prior are learned; the prior shrinks the steps of a short support. An empty
    support has code 0 and predicts ``apply``. Without steps it is `hypernetwork` with a code.

    Args:
      model: a model with ``features``, such as `content_model`.
      latent: length of the code.
      inner_lr: initial rate of the steps on the code, learned for each of its numbers.
      inner_steps: number of gradient steps on the code; the meta-gradient goes through them.
      width: units of each layer of the encoder.
      prior: initial prior strength, in examples, of the encoder and of the steps; learned for each of the two.
      prior_weight: weight of the loss of the model's own score in the objective; that after adaptation has weight 1.
      loss: loss of the query, ``loss(scores [n], target [n], where=[n]) -> scalar``.
      inner_loss: loss of the support, by default squared error, or cross-entropy where scores are logits.
      expected: target that a score predicts; ``jax.nn.sigmoid`` for clicks, where the score is a logit.

    Returns:
      A learner whose ``adapted`` is ``{"code": [latent]}``.

    Raises:
      MetarecError: the model has no ``features``, or a number is out of bounds.
    """
    vectors, model = shows.features_of(model, "leo"), shows.scaled(model, "leo")
    inner_loss = inner_loss or (losses.mse if expected is shows.itself else losses.bce)
    size = model.num_features
    net = encoder(2 * size + 1, width, latent, prior)

    def init(key: Array) -> Params:
        k_model, k_net, k_map = jax.random.split(key, 3)
        own = {
            "net": net.init(k_net),
            "map": jax.random.normal(k_map, (latent, size + 1)) / latent**0.5,
            "rate": jnp.full(latent, inner_lr, jnp.float32),
            "log_prior": jnp.asarray(np.log(prior), jnp.float32),
            "log_scale": jnp.asarray(shows.LOG_SCALE, jnp.float32),
            "log_unknown_trust": jnp.zeros((), jnp.float32),
        }
        return {**model.init(k_model), "leo": own}

    def decoded(params: Params, code: Array, base: Array, h: Array) -> Array:
        weights = code @ params["leo"]["map"]
        return base + h @ weights[:-1] + weights[-1]

    def adapt(params: Params, support: Examples, key: Array) -> dict[str, Array]:
        own = params["leo"]
        shown = shows.evidence(model, params, support, own["log_unknown_trust"], expected)
        base, h = model.apply(params, support.inputs), vectors(params, support.inputs)

        def support_loss(code: Array) -> Array:
            return inner_loss(decoded(params, code, base, h), support.target, where=support.mask)

        code, n = net.apply(own["net"], shows.signed(shown), shown.weight), shown.weight.sum()
        rate = own["rate"] * n / (n + jnp.exp(own["log_prior"]))

        def step(code: Array, _: None) -> tuple[Array, None]:
            return code - rate * jax.grad(support_loss)(code), None

        start = code.astype(jnp.result_type(code, rate))
        return {"code": loop(step, start, inner_steps)[0]}

    def predict(params: Params, adapted: dict[str, Array], inputs: Inputs) -> Array:
        return decoded(params, adapted["code"], model.apply(params, inputs), vectors(params, inputs))

    return shows.learner(init, adapt, predict, loss, model, prior_weight)
