"""Logistic regression: for clicks, the user is the optimum of a regularised logistic loss on learned item vectors.

The counterpart of `learners.ridge`. Source: Bertinetto et al., "Meta-learning with differentiable closed-form solvers"
(LR-D2), 2019.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp

from metarec_jax import losses
from metarec_jax.core import Array, Learner, Model
from metarec_jax.learners.ridge import closed_form
from metarec_jax.options import Bounds, bounded

_HALVINGS = 8
"""Number of fractions of a Newton step that are tried: 1, 1/2, 1/4, ..."""


@bounded
def logistic(
    model: Model,
    *,
    precision: Annotated[float, Bounds(1e-6, 1e12)] = 1.0,
    bias_precision: Annotated[float, Bounds(1e-6, 1e12)] = 1.0,
    newton_steps: Annotated[int, Bounds(1)] = 8,
    loss: Callable[..., Array] = losses.bce,
) -> Learner:
    """Meta-train item vectors, a prior for the user, and its precision; adapt by a few Newton steps.

    ``logit = apply(params, x) + <d, [features(params, x), 1]>``, where d minimises ``sum_support [log(1 + e^logit) -
    target * logit] + 1/2 sum_k exp(log_precision_k) d_k^2``.

    The model's own score is the prior, and the prediction where the support is empty. Precisions are learned, one per
    feature.

    Args:
      model: a model with ``features``, such as `content_model`.
      precision: initial prior precision of the user's vector, in units of 4 clicks or more (a click has the weight
        p (1 - p), at most 1/4).
      bias_precision: initial prior precision of the user's bias, in the same units.
      newton_steps: number of Newton steps, one solve each, shortened where a full one would increase the loss; 5 to 8
        reach float32 rounding.
      loss: loss of the query, ``loss(scores [n], target [n], where=[n]) -> scalar``; the support is always fitted by
        the logistic loss.

    Raises:
      MetarecError: the model has no ``features``, a precision is not above 0, or ``newton_steps`` is below 1.
    """

    def solve_user(phi: Array, prior: Array, target: Array, weight: Array, precision: Array) -> Array:
        return optimum(phi, prior, target, weight, precision, newton_steps)

    return closed_form(model, "logistic", solve_user, precision=precision, bias_precision=bias_precision, loss=loss)


def optimum(phi: Array, prior: Array, target: Array, weight: Array, precision: Array, steps: int = 8) -> Array:
    """``argmin_d sum_i w_i [log(1 + e^s_i) - t_i s_i] + 1/2 sum_k precision_k d_k^2``, ``s = prior + phi d``.

    By Newton steps (iteratively reweighted least squares), then one more, the only one that is differentiated: at the
    optimum its derivative is that of the optimum, by the implicit function theorem. The first derivative only.

    Args:
      phi: ``[n, d]``; prior, target, weight: ``[n]``, where the weight is 0, nan is allowed; precision: ``[d]``,
        above 0.

    Returns:
      ``[d]``.

    One click with a prior of even odds, ``s = d``: ``sigmoid(d) - 1 + d = 0``, so ``d = 0.4011``.

    >>> one = jnp.ones(1)
    >>> round(float(optimum(one[None], 0 * one, one, one, one)[0]), 4)
    0.4011
    """
    real = weight > 0
    phi, prior, target = jnp.where(real[:, None], phi, 0.0), jnp.where(real, prior, 0.0), jnp.where(real, target, 0.0)

    def newton(d: Array, phi: Array, prior: Array, target: Array, weight: Array, precision: Array) -> Array:
        chance = jax.nn.sigmoid(prior + phi @ d)
        slope = phi.T @ (weight * (target - chance)) - precision * d
        curvature = (phi * (weight * chance * (1 - chance))[:, None]).T @ phi + jnp.diag(precision)
        return jax.scipy.linalg.solve(curvature, slope, assume_a="pos")

    data = (phi, prior, target, weight, precision)
    fixed = jax.lax.stop_gradient(data)

    def guarded(d: Array, _: None) -> tuple[Array, None]:
        phi, prior, target, weight, precision = fixed
        step = newton(d, *fixed)
        tried = d[None] + 0.5 ** jnp.arange(_HALVINGS, dtype=d.dtype)[:, None] * step[None]
        scores = prior[None] + tried @ phi.T
        fits = jnp.sum(weight[None] * (jax.nn.softplus(scores) - target[None] * scores), axis=1)
        return tried[jnp.argmin(fits + 0.5 * jnp.square(tried) @ precision)], None

    start = jnp.zeros(precision.shape, jnp.result_type(*data))  # in bfloat16 targets and weights keep their float32
    d, _ = jax.lax.scan(guarded, start, None, length=steps)
    return d + newton(d, *data)
