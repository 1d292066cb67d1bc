"""Meta-Embedding: a generator computes the first embedding of a new id from its content.

Source: Pan, Li, Ao, Tang and He, "Warm Up Cold-start Advertisements: Improving CTR Predictions via Learning to Learn ID
Embeddings", 2019.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import jax

from metarec_jax import losses
from metarec_jax.core import Array, Examples, Inputs, Learner, Model, Params, Task
from metarec_jax.learners import _cold_rows as made
from metarec_jax.options import Bounds, bounded


@bounded
def meta_embedding(
    model: Model,
    content: Model,
    *,
    column: str = "item_id",
    alpha: Annotated[float, Bounds(0.0, 1.0)] = 0.1,
    inner_lr: Annotated[float, Bounds(0.0)] = 0.1,
    inner_steps: Annotated[int, Bounds(0)] = 1,
    loss: Callable[..., Array] = losses.bce,
    freeze: bool = True,
) -> Learner:
    """Meta-train a generator ``r_0 = g(content)`` of an id's row, which gradient steps on the support then move.

    ``loss(task) = alpha L_support(r_0) + (1 - alpha) L_query(r_k)``, ``r_{j+1} = r_j - inner_lr grad L_support(r_j)``:
    a row that predicts well while the item is cold, and from which it adapts well.

    The model is trained before and is not changed: only the generator is learned (its last layer, and ``content``,
    which has tables of its own where the paper reads those of the model).

    Args:
      model: a model with a table for ``column``; insert its trained parameters with `_cold_rows.on_base`.
      content: a model with ``features`` over the content columns, such as ``content_model(columns, head="mlp")``.
      column: the id whose rows are generated; all examples of a task share it.
      alpha: weight of the loss before the steps (the cold phase), from 0 to 1; that after them has the rest.
      inner_lr: rate of the gradient steps on the row.
      inner_steps: number k of gradient steps on the support.
      loss: loss of the support and of the query, ``loss(scores [n], target [n], where=[n]) -> scalar``.
      freeze: keep the model's parameters as they are; False trains them as well.

    Returns:
      A learner whose ``adapted`` is the row, ``[size]``.

    Raises:
      MetarecError: the model has no table for ``column``, ``content`` has no features, or a number is out of bounds.
    """
    table, size = made.table_of(model, column, "meta_embedding")
    know = made.reader(content, "meta_embedding")
    scores = made.with_row(model.apply, model.tables, table, column)

    def init(key: Array) -> Params:
        k_model, k_reader, k_row = jax.random.split(key, 3)
        params = model.init(k_model)
        tables, net = know.init(k_reader)
        own = {"content": net, "generator": made.linear(k_row, know.size, size, 0.1)}
        return {**params, "tables": {**params["tables"], **tables}, **own}

    def adapt(params: Params, support: Examples, key: Array) -> Array:
        start = made.affine(params["generator"], know.read(params, support.inputs))
        return made.descend(made.support_loss(scores, loss, params, support), start, inner_lr, inner_steps)

    def predict(params: Params, adapted: Array, inputs: Inputs) -> Array:
        return scores(params, adapted, inputs)

    def meta_loss(params: Params, task: Task, key: Array) -> tuple[Array, dict[str, Array]]:
        params = made.frozen(params, "generator") if freeze else params
        start = made.affine(params["generator"], know.read(params, task.support.inputs))
        cold = made.support_loss(scores, loss, params, task.support)(start)
        warm = made.support_loss(scores, loss, params, task.query)(adapt(params, task.support, key))
        return alpha * cold + (1 - alpha) * warm, {"cold_loss": cold, "query_loss": warm}

    return Learner(init, adapt, predict, meta_loss, made.unmoved(model.tables, know.tables))
