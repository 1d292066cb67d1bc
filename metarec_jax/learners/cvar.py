"""CVAR: a conditional variational autoencoder between the content of an item and its embedding.

Source: Zhao, Ren, Du, Zhang and Zhang, "Improving Item Cold-start Recommendation via Model-agnostic Conditional
Variational Autoencoder", 2022.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from metarec_jax import losses
from metarec_jax.core import Array, Examples, Inputs, Learner, Model, Params, Task
from metarec_jax.learners import _cold_rows as made
from metarec_jax.options import Bounds, bounded


def wasserstein(mean: Array, log_variance: Array, other_mean: Array, other_log_variance: Array) -> Array:
    """Squared 2-Wasserstein distance of two diagonal normals: ``|m - m'|^2 + |s - s'|^2``, s the deviations.

    >>> log = jnp.log(jnp.array([9.0, 1.0]))  # deviations 3 and 1 against 1 and 1; means 0 and 2 against 1 and 2
    >>> round(float(wasserstein(jnp.array([0.0, 2.0]), log, jnp.array([1.0, 2.0]), jnp.zeros(2))), 4)  # 1 + 4
    5.0
    """
    squares = jnp.square(jnp.exp(0.5 * log_variance) - jnp.exp(0.5 * other_log_variance))
    return jnp.sum(jnp.square(mean - other_mean)) + jnp.sum(squares)


def kl(mean: Array, log_variance: Array, other_mean: Array, other_log_variance: Array) -> Array:
    """KL divergence of two diagonal normals: ``1/2 sum [v / v' + (m - m')^2 / v' - 1 - log(v / v')]``.

    >>> round(float(kl(jnp.ones(1), jnp.zeros(1), jnp.zeros(1), jnp.zeros(1))), 4)  # (1 - 0)^2 / 2
    0.5
    """
    ratio = log_variance - other_log_variance
    far = jnp.square(mean - other_mean) * jnp.exp(-other_log_variance)
    return 0.5 * jnp.sum(jnp.exp(ratio) + far - 1.0 - ratio)


_LOG_VARIANCE = -4.0
"""Initial log variance, a deviation of 0.14: about the size of most rows, which noise of deviation 1 would hide."""
DISTANCES = {"wasserstein": wasserstein, "kl": kl}


@bounded
def cvar(
    model: Model,
    content: Model,
    *,
    column: str = "item_id",
    latent: Annotated[int, Bounds(1)] = 16,
    distance: Literal["wasserstein", "kl"] = "wasserstein",
    distance_weight: Annotated[float, Bounds(0.0)] = 1e-2,
    reconstruction_weight: Annotated[float, Bounds(0.0)] = 1.0,
    inner_lr: Annotated[float, Bounds(0.0)] = 0.1,
    inner_steps: Annotated[int, Bounds(0)] = 0,
    loss: Callable[..., Array] = losses.bce,
) -> Learner:
    """Meta-train a decoder of latents on which content and a trained row agree; the decoded row replaces the id's.

    - ``q(z | r)``: the encoder of an item's trained row; ``p(z | content)``: the prior. Diagonal normals, linear maps.
    - ``row(z) = D [z, log(1 + n)] + d``, n the number of support examples: the paper also conditions on frequency.
    - ``loss(task) = L_query(row(z_p)) + reconstruction_weight |row(z_q) - r|^2 / size + distance_weight dist(q, p)``,
      z_p and z_q drawn from p and q.

    `adapt` decodes the mean of the prior, and takes ``inner_steps`` of gradient descent on the support from there; the
    item's own row is read only in training. The model is trained before and is not changed.

    Args:
      model: a model with a table for ``column``; insert its trained parameters with `_cold_rows.on_base`.
      content: a model with ``features`` over the content columns.
      column: the id whose rows are decoded; all examples of a task share it.
      latent: length of the latent vector z.
      distance: distance between encoder and prior in the loss: "wasserstein", as in the paper, or "kl".
      distance_weight: weight of that distance in the loss.
      reconstruction_weight: weight in the loss of the squared error with which the trained row is decoded.
      inner_lr: rate of the gradient steps on the row.
      inner_steps: number of gradient steps on the support, in training too; ``query_loss`` is measured after them.
      loss: loss of the support and of the query, ``loss(scores [n], target [n], where=[n]) -> scalar``.

    Returns:
      A learner whose ``adapted`` is the row, ``[size]``.

    Raises:
      MetarecError: the model has no table for ``column``, ``content`` has no features, or a setting is out of bounds.
    """
    distance_of = DISTANCES[distance]
    table, size = made.table_of(model, column, "cvar")
    know = made.reader(content, "cvar")
    scores = made.with_row(model.apply, model.tables, table, column)

    def init(key: Array) -> Params:
        k_model, k_reader, k_encoder, k_prior, k_decoder = jax.random.split(key, 5)
        params = model.init(k_model)
        tables, net = know.init(k_reader)
        narrow = jnp.repeat(jnp.array([0.0, _LOG_VARIANCE]), latent)
        own = {
            "encoder": made.linear(k_encoder, size, 2 * latent) | {"bias": narrow},
            "prior": made.linear(k_prior, know.size, 2 * latent, 0.1) | {"bias": narrow},
            "decoder": made.linear(k_decoder, latent + 1, size, 0.1),
        }
        return {**params, "tables": {**params["tables"], **tables}, "content": net, "cvar": own}

    def normal(weights: Params, x: Array) -> tuple[Array, Array]:
        """Mean and log variance, each ``[latent]``."""
        mean, log_variance = jnp.split(made.affine(weights, x), 2)
        return mean, log_variance

    def decoded(params: Params, z: Array, support: Examples) -> Array:
        seen = jnp.log1p(support.mask.sum())[None]
        return made.affine(params["cvar"]["decoder"], jnp.concatenate([z, seen]))

    def prior(params: Params, support: Examples) -> tuple[Array, Array]:
        return normal(params["cvar"]["prior"], know.read(params, support.inputs))

    def moved(params: Params, z: Array, support: Examples) -> Array:
        value = made.support_loss(scores, loss, params, support)
        return made.descend(value, decoded(params, z, support), inner_lr, inner_steps)

    def adapt(params: Params, support: Examples, key: Array) -> Array:
        return moved(params, prior(params, support)[0], support)

    def predict(params: Params, adapted: Array, inputs: Inputs) -> Array:
        return scores(params, adapted, inputs)

    def meta_loss(params: Params, task: Task, key: Array) -> tuple[Array, dict[str, Array]]:
        params = made.frozen(params, "cvar")
        support, query = task
        row = params["tables"][table][support.inputs[column][0]]
        p, q = prior(params, support), normal(params["cvar"]["encoder"], row)
        k_p, k_q = jax.random.split(key)
        z_p, z_q = (
            mean + jnp.exp(0.5 * log_variance) * jax.random.normal(k, mean.shape, mean.dtype)
            for k, (mean, log_variance) in ((k_p, p), (k_q, q))
        )
        query_loss = made.support_loss(scores, loss, params, query)
        value = query_loss(moved(params, z_p, support))
        error = jnp.mean(jnp.square(decoded(params, z_q, support) - row))
        far = distance_of(*q, *p)
        total = value + reconstruction_weight * error + distance_weight * far
        metrics = {"reconstruction": error, "distance": far, "query_loss": query_loss(adapt(params, support, key))}
        return total, metrics

    return Learner(init, adapt, predict, meta_loss, made.unmoved(model.tables, know.tables), user_rows="own")
