"""Meta Warm Up Framework: a cold embedding is scaled by the item's content and shifted by the users who met it.

Source: Zhu, Xie, Zhuang, Ge, Sun, Zhang, Lin and Cao, "Learning to Warm Up Cold Item Embeddings for Cold-start
Recommendation with Meta Scaling and Shifting Networks", 2021.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp

from metarec_jax import losses
from metarec_jax.core import Array, Examples, Inputs, Learner, Model, Params, Task
from metarec_jax.data.interactions import Interactions
from metarec_jax.learners import _cold_rows as made
from metarec_jax.learners._starts import warm_start
from metarec_jax.options import Bounds, bounded


@bounded
def mwuf(
    model: Model,
    content: Model,
    *,
    column: str = "item_id",
    other: str = "user_id",
    hidden: Annotated[int, Bounds(1)] = 16,
    inner_lr: Annotated[float, Bounds(0.0)] = 0.1,
    inner_steps: Annotated[int, Bounds(0)] = 1,
    loss: Callable[..., Array] = losses.bce,
) -> Learner:
    """Meta-train two networks that turn a cold row into a warm one: ``r' = r * scale(content) + shift(mean user row)``.

    - r starts from one common row, which should be the mean of the base rows (`common_row`), and moves by
      ``inner_steps`` of gradient descent on the loss of the support under r itself: the paper's cold phase.
    - ``scale = 1 + A reader(content) + a``; ``shift = B relu(C u + c)``, u the mean row of the support's ids in
      ``other``, weighted by the mask; 0 without support. A, a and B start at 0, so that r' is r.
    - ``loss(task) = L_query(r')``. As in the paper the model and the common row are not learned here, and no gradient
      goes through the steps of the cold phase: only the two networks are learned.

    Args:
      model: a model with tables for ``column`` and ``other``; insert its trained parameters with
        `_cold_rows.on_base`.
      content: a model with ``features`` over the content columns of the task's side.
      column: the id whose rows are warmed; all examples of a task share it.
      other: the id of the other side, whose rows the shift reads.
      hidden: units of the shifting network.
      inner_lr: rate of the gradient steps of the cold phase.
      inner_steps: number of gradient steps of the cold phase.
      loss: loss of the support and of the query, ``loss(scores [n], target [n], where=[n]) -> scalar``.

    Returns:
      A learner whose ``adapted`` is the row r', ``[size]``.

    Raises:
      MetarecError: the model lacks one of the tables, ``content`` has no features, or a number is out of bounds.
    """
    table, size = made.table_of(model, column, "mwuf")
    other_table, other_size = made.table_of(model, other, "mwuf")
    know = made.reader(content, "mwuf")
    scores = made.with_row(model.apply, model.tables, table, column)

    def init(key: Array) -> Params:
        k_model, k_reader, k_scale, k_shift = jax.random.split(key, 4)
        params = model.init(k_model)
        tables, net = know.init(k_reader)
        own = {
            "scale": made.linear(k_scale, know.size, size, 0.0),
            "shift_0": made.linear(k_shift, other_size, hidden),
            "shift_1": jnp.zeros((hidden, size)),
        }
        common = {"common": jnp.zeros(size)}
        return {**params, "tables": {**params["tables"], **tables}, "content": net, "mwuf": own, **common}

    def warmed(params: Params, row: Array, support: Examples) -> Array:
        own = params["mwuf"]
        met = params["tables"][other_table][support.inputs[other]]
        met = jnp.where(support.mask[:, None] > 0, met, 0.0)
        total = support.mask.sum()
        mean = (support.mask @ met) / jnp.maximum(total, 1.0)
        shift = jax.nn.relu(made.affine(own["shift_0"], mean)) @ own["shift_1"]
        scale = 1.0 + made.affine(own["scale"], know.read(params, support.inputs))
        return row * scale + jnp.where(total > 0, shift, 0.0)

    def adapt(params: Params, support: Examples, key: Array) -> Array:
        loss_of_row = made.support_loss(scores, loss, params, support)
        return warmed(params, made.descend(loss_of_row, params["common"], inner_lr, inner_steps), support)

    def predict(params: Params, adapted: Array, inputs: Inputs) -> Array:
        return scores(params, adapted, inputs)

    def meta_loss(params: Params, task: Task, key: Array) -> tuple[Array, dict[str, Array]]:
        params = made.frozen(params, "mwuf")
        value = made.support_loss(scores, loss, params, task.query)(adapt(params, task.support, key))
        return value, {"query_loss": value}

    return Learner(init, adapt, predict, meta_loss, made.unmoved(model.tables, know.tables))


def common_row(params: Params, rows: Array, *, table: str = "item_id") -> Params:
    """``params`` with the common row set to the mean of ``rows`` (int ``[n]``) of the table, those of base items."""
    return {**params, "common": params["tables"][table][rows].mean(0)}


def mwuf_start(params: Params, train: Interactions, *, column: str = "item_id", seed: int = 0) -> Params:
    """Parameters over a dot-product `content_model` that starts from ALS (`warm_start`), with the mean of the rows of
    ``train`` as common row.

    Args:
      column: the id whose rows are made, as in `mwuf`.

    Raises:
      MetarecError: as `warm_start`.
    """
    rows = train.user if column == "user_id" else train.item
    return common_row(warm_start(params, train, seed=seed), jnp.unique(jnp.asarray(rows)), table=column)
