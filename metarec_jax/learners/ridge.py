"""Ridge: the user is the closed-form solution of a regularised regression on learned item vectors.

Source: Bertinetto et al., "Meta-learning with differentiable closed-form solvers" (R2-D2), 2019.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from metarec_jax import losses
from metarec_jax.core import Array, Examples, Inputs, Learner, Model, Params, Task
from metarec_jax.learners._support import features_of, unmoved
from metarec_jax.options import Bounds, bounded


@bounded
def ridge(
    model: Model,
    *,
    precision: Annotated[float, Bounds(1e-6, 1e12)] = 8.0,
    bias_precision: Annotated[float, Bounds(1e-6, 1e12)] = 5.0,
    loss: Callable[..., Array] = losses.mse,
) -> Learner:
    """Meta-train item vectors, a prior for the user, and its precision; adapt by one linear solve.

    ``score = apply(params, x) + <d, [features(params, x), 1]>``, where d minimises
    ``sum_support (target - score)^2 + sum_k exp(log_precision_k) d_k^2``.

    The model's own score is the prior (for a new user: the unknown row and the user's content), and the prediction
    where the support is empty. Precisions are learned, one per feature. The solution is linear in the targets, which
    makes explanations exact.

    Args:
      model: a model with ``features``, such as `content_model`.
      precision: initial prior precision of the user's vector, in ratings.
      bias_precision: initial prior precision of the user's bias, in ratings.
      loss: loss of the query, ``loss(scores [n], target [n], where=[n]) -> scalar``; the support is always fitted by
        least squares.

    Raises:
      MetarecError: the model has no ``features``, or a precision is not above 0.
    """

    def solve_user(phi: Array, prior: Array, target: Array, weight: Array, precision: Array) -> Array:
        return solve(phi, target - prior, weight, precision)

    return closed_form(model, "ridge", solve_user, precision=precision, bias_precision=bias_precision, loss=loss)


def closed_form(
    model: Model,
    name: str,
    solve_user: Callable[[Array, Array, Array, Array, Array], Array],
    *,
    precision: float,
    bias_precision: float,
    loss: Callable[..., Array],
) -> Learner:
    """A learner whose user is a vector ``d`` on the model's features and a constant, computed by ``solve_user``.

    Args:
      name: name of the learner, in messages and of its learned precisions among the parameters.
      solve_user: ``solve_user(phi [n, D + 1], prior score [n], target [n], weight [n], precision [D + 1])``, which
        returns ``d [D + 1]``.
      precision, bias_precision: initial precisions of the vector and of the constant.
    """
    vectors = features_of(model, name)

    def design(params: Params, inputs: Inputs) -> Array:
        phi = vectors(params, inputs)
        return jnp.concatenate([phi, jnp.ones((phi.shape[0], 1), phi.dtype)], axis=1)

    def init(key: Array) -> Params:
        params = model.init(key)
        initial = np.append(np.full(model.num_features, precision), bias_precision)
        log_precision = jnp.asarray(np.log(initial), jnp.float32)
        return {**params, name: {"log_precision": log_precision, "log_unknown_trust": jnp.zeros((), jnp.float32)}}

    def trust(params: Params, inputs: Inputs) -> Array:
        if "item_id" not in inputs:
            return jnp.ones(())
        return jnp.where(inputs["item_id"] == 0, jnp.exp(params[name]["log_unknown_trust"]), 1.0)

    def adapt(params: Params, support: Examples, key: Array) -> Array:
        prior = model.apply(params, support.inputs)
        weight = support.mask * trust(params, support.inputs)
        precision = jnp.exp(params[name]["log_precision"])
        return solve_user(design(params, support.inputs), prior, support.target, weight, precision)

    def predict(params: Params, adapted: Array, inputs: Inputs) -> Array:
        return model.apply(params, inputs) + design(params, inputs) @ adapted

    def meta_loss(params: Params, task: Task, key: Array) -> tuple[Array, dict[str, Array]]:
        scores = predict(params, adapt(params, task.support, key), task.query.inputs)
        value = loss(scores, task.query.target, where=task.query.mask)
        return value, {"query_loss": value}

    return Learner(init, adapt, predict, meta_loss, unmoved(model.tables))


def solve(phi: Array, residual: Array, mask: Array, precision: Array) -> Array:
    """``(phi' M phi + diag(precision))^-1 phi' M residual``, ``M = diag(mask)``; nan is allowed where the mask is 0.

    Args:
      phi: ``[n, d]``; residual, mask: ``[n]``; precision: ``[d]``, above 0.

    Returns:
      ``[d]``.

    >>> d = solve(jnp.array([[1.0], [1.0]]), jnp.array([3.0, 100.0]), jnp.array([1.0, 0.0]), jnp.array([2.0]))
    >>> round(float(d[0]), 4)  # 3 / (1 + 2)
    1.0
    """
    real = mask > 0
    phi, residual = jnp.where(real[:, None], phi, 0.0), jnp.where(real, residual, 0.0)
    weighted = phi * mask[:, None]
    normal = weighted.T @ phi + jnp.diag(precision)
    return jax.scipy.linalg.solve(normal, weighted.T @ residual, assume_a="pos")
