"""Item vectors and residuals of a support, as the metric, amortised and memory learners read them.

Each of them predicts ``apply(params, x) + change(x)``, where the change is computed from the item vectors and the
residuals of the support and is 0 where the support is empty: the model's own score is the prior, as in `ridge`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from metarec_jax.core import Array, Examples, Inputs, Learner, MetarecError, Model, Params, Table, Task

Expected = Callable[[Array], Array]
"""The target that a score predicts: the score itself for ratings (`itself`), ``jax.nn.sigmoid`` for clicks."""
LOG_SCALE = float(np.log(4.0))
"""Initial value for `scaled`: rows start with a deviation of 0.1, too small for a network to learn from quickly."""


class Evidence(NamedTuple):
    """Item vectors ``[S, D]``, residuals ``[S]`` and weights ``[S]`` of S support examples; padding is 0 in all."""

    vectors: Array
    residual: Array
    weight: Array


def itself(scores: Array) -> Array:
    """The expected target of ratings."""
    return scores


def features_of(model: Model, learner: str) -> Callable[[Params, Inputs], Array]:
    """The model's item vectors, on which its score is linear. Raises MetarecError where it has none."""
    if model.features is None:
        raise MetarecError(f"{learner} requires a model with features (item vectors); give one such as content_model")
    return model.features


def scaled(model: Model, learner: str) -> Model:
    """The model with its item vectors multiplied by ``exp(params[learner]["log_scale"])``, which is learned."""
    features = features_of(model, learner)
    return model._replace(
        features=lambda params, inputs: jnp.exp(params[learner]["log_scale"]) * features(params, inputs)
    )


def evidence(
    model: Model, params: Params, examples: Examples, log_unknown_trust: Array, expected: Expected = itself
) -> Evidence:
    """Vectors, residuals ``target - expected(apply(params, x))``, and weights of examples.

    The weight is the mask, times the learned trust in an unknown item: its vector is only a guess from content.
    """
    real = examples.mask > 0
    vectors = features_of(model, "this learner")(params, examples.inputs)
    residual = examples.target - expected(model.apply(params, examples.inputs))
    weight = examples.mask
    if "item_id" in examples.inputs:
        weight = weight * jnp.where(examples.inputs["item_id"] == 0, jnp.exp(log_unknown_trust), 1.0)
    return Evidence(jnp.where(real[:, None], vectors, 0.0), jnp.where(real, residual, 0.0), weight)


def signed(shown: Evidence) -> Array:
    """``[v, e, e v]`` of each example, ``[S, 2 D + 1]``: what a network of a support reads.

    ``e v`` is the direction in which the example moves a user's vector.
    """
    e = shown.residual[:, None]
    return jnp.concatenate([shown.vectors, e, e * shown.vectors], axis=1)


def learner(
    init: Callable[[Array], Params],
    adapt: Callable[[Params, Examples, Array], Any],
    predict: Callable[[Params, Any, Inputs], Array],
    loss: Callable[..., Array],
    model: Model,
    prior_weight: float = 0.0,
    before: Callable[[Params, Inputs], Array] | None = None,
) -> Learner:
    """A learner that only reads the support and moves no row: its objective is the loss of the query after `adapt`.

    ``prior_weight`` times the loss of the score before adaptation (the model's own, or ``before(params, inputs)``) is
    added: the loss after adaptation alone does not make it good.
    """
    first = model.apply if before is None else before

    def meta_loss(params: Params, task: Task, key: Array) -> tuple[Array, dict[str, Array]]:
        inputs, target, mask = task.query
        value = loss(predict(params, adapt(params, task.support, key), inputs), target, where=mask)
        prior = loss(first(params, inputs), target, where=mask) if prior_weight else 0.0
        return value + prior_weight * prior, {"query_loss": value}

    return Learner(init, adapt, predict, meta_loss, unmoved(model.tables))


def unmoved(tables: Mapping[str, Table]) -> dict[str, Table]:
    """The tables, marked as not adapted: no row of them changes in a task."""
    return {name: table._replace(adapted=False) for name, table in tables.items()}
