"""Item map: the user is the sum of the support's item vectors, learned for supports as short as a new user's.

Source: asymmetric factor models (Paterek, "Improving regularized singular value decomposition for collaborative
filtering", 2007); source of the closed-form start: Steck, "Autoencoders that don't overfit towards the Identity", 2020,
whose random drop-out of a history is here the draw of a support.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from metarec_jax import losses
from metarec_jax.core import Array, Examples, Inputs, Learner, MetarecError, Params, Table, Task
from metarec_jax.data.interactions import Interactions
from metarec_jax.factorization import support_map
from metarec_jax.models.content import normal_rows
from metarec_jax.options import Bounds, bounded


@bounded
def item_map(
    num_items: int,
    *,
    size: Annotated[int, Bounds(1)] = 64,
    loss: Callable[..., Array] = losses.sampled_softmax,
    table_scale: Annotated[float, Bounds(0.0)] = 0.1,
) -> Learner:
    """Meta-train two vectors per item, one for its place in a support and one for its place in a query. For clicks.

    ``score(j) = b_j + <sum_{i in support} t_i a_i, v_j>``

    It reads only ids: an item that training never saw has the unknown row. An empty support predicts ``b``, a
    popularity.

    Args:
      num_items: rows of the table, the unknown row included (`Vocabulary.num_rows`).
      size: length of an item's two vectors, which is the rank of the map from support to catalogue.
      loss: loss of the query, ``loss(scores [n], target [n], where=[n]) -> scalar``.
      table_scale: standard deviation of the initial rows.

    Returns:
      A learner whose ``adapted`` is ``{"vector": [size]}``. `item_map_start` computes its parameters in closed form.

    Raises:
      MetarecError: ``size`` is below 1.

    >>> import jax
    >>> learner = item_map(4, size=1)
    >>> params = {"tables": {"item_id": jnp.array([[0.0, 0, 0], [0, 2, 0], [0, 3, 0], [7, 0, 10]])}}  # b, a, v
    >>> support = Examples({"item_id": jnp.array([1, 2])}, jnp.ones(2), jnp.ones(2))
    >>> adapted = learner.adapt(params, support, jax.random.key(0))
    >>> learner.predict(params, adapted, {"item_id": jnp.array([3])}).tolist()  # 7 + (2 + 3) 10
    [57.0]
    """
    tables = {"item_id": Table(num_items, 2 * size + 1, ("item_id",), adapted=False)}

    def init(key: Array) -> Params:
        rows = table_scale * normal_rows(key, num_items, 2 * size + 1)
        return {"tables": {"item_id": rows.at[:, 0].set(0.0).at[0].set(0.0)}}

    def adapt(params: Params, support: Examples, key: Array) -> dict[str, Array]:
        value = jnp.where(support.mask > 0, support.mask * support.target, 0.0)
        return {"vector": value @ params["tables"]["item_id"][support.inputs["item_id"], 1 : size + 1]}

    def predict(params: Params, adapted: dict[str, Array], inputs: Inputs) -> Array:
        rows = params["tables"]["item_id"][inputs["item_id"]]
        return rows[:, 0] + rows[:, size + 1 :] @ adapted["vector"]

    def meta_loss(params: Params, task: Task, key: Array) -> tuple[Array, dict[str, Array]]:
        scores = predict(params, adapt(params, task.support, key), task.query.inputs)
        value = loss(scores, task.query.target, where=task.query.mask)
        return value, {"query_loss": value}

    return Learner(init, adapt, predict, meta_loss, tables)


@jax.jit
def item_map_scores(params: Params, adapted: dict[str, Array]) -> Array:
    """What ``predict`` gives for all items and a batch of users, ``[B, rows]``."""
    table, size = params["tables"]["item_id"], adapted["vector"].shape[1]
    return adapted["vector"] @ table[:, size + 1 :].T + table[None, :, 0]


def item_map_start(
    params: Params,
    train: Interactions,
    *,
    support: int | None = None,
    reg: float = 1.0,
    dense_limit: int = 20_000,
    seed: int = 0,
) -> Params:
    """The parameters of an `item_map` that solve its meta-objective under squared error, in closed form.

    The objective is ``E sum_users |x_query - (b + x_support M)|^2 + reg |M|^2`` over random supports of ``support``
    items and the whole catalogue, ``x_query`` the rest of the user's items: `factorization.support_map`.
    No training is required after it; `fit` may continue from here with another loss.

    Args:
      params: parameters from ``init``; the rank is the size of the table.
      support: size of the supports in the objective; others are predicted well, too. By default 5, or one less than
        the length of the longest history.
      reg: ridge, in users.
      dense_limit: largest number of item rows for which a square matrix is computed.
      seed: seed of the iteration for the best rank.

    Raises:
      MetarecError: more item rows than ``dense_limit``, or a rank above the number of items.
    """
    table = params["tables"]["item_id"]
    rows, size = train.items.num_rows, (table.shape[1] - 1) // 2
    if rows > dense_limit:
        raise MetarecError(
            f"item_map_start requires a matrix of {rows} x {rows} item rows, and dense_limit is {dense_limit}; "
            "raise dense_limit, or train item_map from random rows"
        )
    if support is None:
        pairs = np.unique(np.stack([train.user, train.item]), axis=1)
        support = min(5, int(np.bincount(pairs[0]).max(initial=1)) - 1)
    bias, inward, outward = support_map(train, support=support, reg=reg, size=size, seed=seed)
    solved = np.zeros(table.shape, np.float32)
    solved[:rows] = np.column_stack([bias, inward, outward])
    return {**params, "tables": {**params["tables"], "item_id": jnp.asarray(solved)}}
