"""DropoutNet: train with the id hidden at random, so that a new id is an input the model was trained on.

Source: Volkovs, Yu and Poutanen, "DropoutNet: Addressing Cold Start in Recommender Systems", 2017.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from metarec_jax import losses
from metarec_jax.core import Array, Examples, Inputs, Learner, MetarecError, Model, Params, Task
from metarec_jax.learners import _cold_rows as made
from metarec_jax.options import Bounds, bounded


@bounded
def dropout_net(
    model: Model,
    *,
    column: str = "item_id",
    drop: Annotated[float, Bounds(0.0, 1.0)] = 0.5,
    start: Literal["unknown", "own"] = "unknown",
    inner_lr: Annotated[float, Bounds(0.0)] = 0.1,
    inner_steps: Annotated[int, Bounds(0)] = 1,
    loss: Callable[..., Array] = losses.bce,
) -> Learner:
    """Plain training on all examples alike, with a task's id replaced by the unknown id with probability ``drop``.

    ``loss(task) = loss(apply(p, x'), y)`` over support and query together, where x' has row 0 in place of some ids:
    row 0 is trained to represent the mean id (the paper uses the mean of all rows). `adapt` starts from that row and
    takes gradient steps on the support.

    With ``drop=0`` and ``start="own"`` it is the plain model, and a new id starts from the row that `init` drew for it.

    Args:
      model: a model with a table for ``column``.
      column: the id that is dropped, and whose row adapts; all examples of a task to adapt to share it.
      drop: probability, below 1, of hiding the id that the examples of a task share: drawn once for its support and
        once for its query, not for each example as in the paper. Examples with ids of their own (`data.epochs`) are
        dropped one by one.
      start: row from which adaptation starts: "unknown" is row 0, "own" the id's own row.
      inner_lr: rate of the gradient steps on the row.
      inner_steps: number of gradient steps on the support.
      loss: loss of training and of adaptation, ``loss(scores [n], target [n], where=[n]) -> scalar``.

    Returns:
      A learner whose ``adapted`` is the row, ``[size]``.

    Raises:
      MetarecError: the model has no table for ``column``, or a setting is out of bounds.
    """
    if drop == 1:
        raise MetarecError("dropout_net: drop must be below 1, got 1, which hides every id; correct it")
    table, _ = made.table_of(model, column, "dropout_net")
    scores = made.with_row(model.apply, model.tables, table, column)

    def adapt(params: Params, support: Examples, key: Array) -> Array:
        row = params["tables"][table][0 if start == "unknown" else support.inputs[column][0]]
        return made.descend(made.support_loss(scores, loss, params, support), row, inner_lr, inner_steps)

    def predict(params: Params, adapted: Array, inputs: Inputs) -> Array:
        return scores(params, adapted, inputs)

    def pooled(params: Params, task: Task, key: Array) -> tuple[Array, dict[str, Array]]:
        def scores_of(part: Examples, key: Array) -> Array:
            ids = part.inputs[column]
            if drop:
                ids = jnp.where(jax.random.bernoulli(key, drop, ids.shape), 0, ids)
            return model.apply(params, {**part.inputs, column: ids})

        support, query = task
        keys = jax.random.split(key)
        both = jnp.concatenate([scores_of(support, keys[0]), scores_of(query, keys[1])])
        target, mask = (jnp.concatenate([getattr(part, n) for part in task]) for n in ("target", "mask"))
        value = loss(both, target, where=mask)
        if query.inputs[column].shape[0] > 1:  # examples of many ids, as in `data.epochs`: there is no task to adapt to
            return value, {"query_loss": loss(both[support.mask.shape[0] :], query.target, where=query.mask)}
        fixed = jax.lax.stop_gradient(params)
        after = made.support_loss(scores, loss, fixed, query)(adapt(fixed, support, key))
        return value, {"query_loss": after}

    return Learner(model.init, adapt, predict, pooled, made.unmoved(model.tables), user_rows="own")
