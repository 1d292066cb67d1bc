"""Masked losses. The last axis is the list, leading axes are batch, the mask is ``where``; smaller is better.

``where`` may hold fractional weights, and every loss may be differentiated with respect to those above 0. An entry of
weight 0 changes nothing, even if it is nan: the derivative with respect to a weight of 0 is therefore not meaningful.
A list without weight has loss 0 and gradient 0 in the scores, at any order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp

from metarec_jax.core import Array

Loss = Callable[..., Array]
"""``loss(scores [..., n], target [..., n], where=[..., n]) -> [...]``."""


def mse(scores: Array, target: Array, where: Array | None = None) -> Array:
    """Squared error: sum_i w_i (s_i - t_i)^2 / sum_i w_i.

    Args:
      scores, target: ``[..., n]``.
      where: ``[..., n]`` weights; None for weights of 1.

    Returns:
      ``[...]``.

    >>> float(mse(jnp.array([1.0, 5.0, 9.0]), jnp.array([2.0, 2.0, 0.0]), where=jnp.array([1.0, 1.0, 0.0])))
    5.0
    """
    scores, target, where = _clean(scores, target, where)
    return _mean(jnp.square(scores - target), where, (-1,))


def mae(scores: Array, target: Array, where: Array | None = None) -> Array:
    """Absolute error: sum_i w_i |s_i - t_i| / sum_i w_i. For the query of closed-form learners: its curvature is 0.

    Args:
      scores, target: ``[..., n]``.
      where: ``[..., n]`` weights; None for weights of 1.

    Returns:
      ``[...]``.

    >>> float(mae(jnp.array([1.0, 5.0]), jnp.array([2.0, 2.0])))
    2.0
    """
    scores, target, where = _clean(scores, target, where)
    return _mean(jnp.abs(scores - target), where, (-1,))


def bce(scores: Array, target: Array, where: Array | None = None) -> Array:
    """Logistic loss on logits: sum_i w_i (log(1 + e^{s_i}) - t_i s_i) / sum_i w_i.

    Args:
      scores: ``[..., n]`` logits.
      target: ``[..., n]`` in [0, 1].
      where: ``[..., n]`` weights; None for weights of 1.

    Returns:
      ``[...]``.

    >>> round(float(bce(jnp.array([0.0, 2.0]), jnp.array([1.0, 1.0]))), 4)  # (log 2 + log(1 + e^-2)) / 2
    0.41
    """
    scores, target, where = _clean(scores, target, where)
    return _mean(jax.nn.softplus(scores) - target * scores, where, (-1,))


def bpr(scores: Array, target: Array, where: Array | None = None) -> Array:
    """Pairwise logistic loss: the mean of log(1 + e^{-(s_i - s_j)}) over the pairs with t_i > t_j, weight w_i w_j.

    Args:
      scores, target: ``[..., n]``.
      where: ``[..., n]`` weights; None for weights of 1.

    Returns:
      ``[...]``; 0 where no pair differs.

    Source: Rendle et al., "BPR: Bayesian Personalized Ranking from Implicit Feedback", 2009.

    >>> round(float(bpr(jnp.array([1.0, 0.0, 0.0]), jnp.array([1.0, 0.0, 1.0]))), 4)  # (log(1 + e^-1) + log 2) / 2
    0.5032
    """
    scores, target, where = _clean(scores, target, where)
    pairs = (target[..., :, None] > target[..., None, :]) * where[..., :, None] * where[..., None, :]
    return _mean(jax.nn.softplus(scores[..., None, :] - scores[..., :, None]), pairs, (-2, -1))


def sampled_softmax(scores: Array, target: Array, where: Array | None = None) -> Array:
    """Softmax of each positive against the negatives: the mean of -log(e^{s_i} / (e^{s_i} + sum_j w_j e^{s_j})).

    The mean is over t_i > 0 with weight w_i, the sum over t_j = 0.

    Args:
      scores, target: ``[..., n]``.
      where: ``[..., n]`` weights; None for weights of 1.

    Returns:
      ``[...]``; 0 where there is no positive, or no negative.

    >>> round(float(sampled_softmax(jnp.array([1.0, 0.0, 0.0]), jnp.array([1.0, 0.0, 0.0]))), 4)  # log(1 + 2 / e)
    0.5514
    """
    scores, target, where = _clean(scores, target, where)
    negative = jnp.where(target == 0, where, 0.0)
    counted = negative > 0
    any_counted = counted.any(-1, keepdims=True)
    # Shifting by the largest negative keeps exp in range; the shift cancels, so no gradient goes through it.
    top = jax.lax.stop_gradient(jnp.max(jnp.where(counted, scores, -jnp.inf), axis=-1, keepdims=True))
    top = jnp.where(any_counted, top, 0.0)
    total = jnp.sum(negative * jnp.exp(jnp.where(counted, scores - top, 0.0)), axis=-1, keepdims=True)
    log_total = top + jnp.log(jnp.where(any_counted, total, 1.0))
    each = jnp.where(any_counted, jax.nn.softplus(log_total - scores), 0.0)
    return _mean(each, jnp.where(target > 0, where, 0.0), (-1,))


LOSSES: Mapping[str, Loss] = MappingProxyType(
    {"mse": mse, "mae": mae, "bce": bce, "bpr": bpr, "sampled_softmax": sampled_softmax}
)
"""Losses by name: mse and mae for ratings; bce, bpr and sampled_softmax for clicks."""


def _clean(scores: Array, target: Array, where: Array | None) -> tuple[Array, Array, Array]:
    """The arrays with 0 wherever the weight is 0, so that no nan enters a derivative."""
    where = jnp.ones_like(scores) if where is None else jnp.broadcast_to(where, scores.shape).astype(scores.dtype)
    live = where > 0
    return jnp.where(live, scores, 0.0), jnp.where(live, target, 0.0).astype(scores.dtype), where


def _mean(values: Array, weights: Array, axis: tuple[int, ...]) -> Array:
    """Weighted mean over ``axis``, 0 without weight; two ``where``, so that no derivative contains 0 / 0."""
    total = weights.sum(axis)
    return jnp.where(total > 0, (values * weights).sum(axis) / jnp.where(total > 0, total, 1.0), 0.0)
