"""Rows generated for one id: what the learners of cold items share.

A task has one id (an item with many users, or a user with many items), in a column that all its examples share. Its
row in the model's table is replaced by a vector ``[size]`` that was generated for it: that row is all a task owns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from metarec_jax import losses, rows
from metarec_jax.core import Array, Examples, Inputs, Learner, MetarecError, Model, Params, Table, Task
from metarec_jax.learners._inner import loop
from metarec_jax.options import Bounds, bounded

CONTENT = "content_"
"""Prefix of the names of a content reader's tables."""

WithRow = Callable[[Params, Array, Inputs], Array]


class Reader(NamedTuple):
    """The content of a task's id, as a vector.

    Attributes:
      init: ``init(key) -> (tables, net)``; the tables are added to those of the model, the net is
        ``params["content"]``.
      read: ``read(params, inputs) -> [D]``.
      tables: what the engine may gather.
      size: D.
    """

    init: Callable[[Array], tuple[dict[str, Array], Any]]
    read: Callable[[Params, Inputs], Array]
    tables: dict[str, Table]
    size: int


def table_of(model: Model, column: str, learner: str) -> tuple[str, int]:
    """Name and row length of the table that ``column`` indexes. Raises MetarecError unless there is exactly one."""
    names = [name for name, table in model.tables.items() if column in table.columns]
    if len(names) > 1:
        raise MetarecError(
            f"{learner}: the model has {len(names)} tables for the column {column!r} ({', '.join(sorted(names))}), and "
            "only one row is generated; give a model with one table for it"
        )
    if not names:
        columns = ", ".join(sorted(c for table in model.tables.values() for c in table.columns)) or "none"
        raise MetarecError(
            f"{learner}: the model has no table for the column {column!r}, its columns are: {columns}; "
            "give a model with a table for it"
        )
    return names[0], model.tables[names[0]].size


def with_row(
    function: Callable[[Params, Inputs], Array], tables: Mapping[str, Table], table: str, column: str
) -> WithRow:
    """``f(params, row, inputs)``: the function, where ``column`` looks up ``row [size]`` instead of its table's row.

    No other table may have that column (`table_of`). Other columns of the table look up its own rows, even where they
    hold the same id.

    >>> score = lambda params, inputs: params["tables"]["item"][inputs["item_id"], 0] + inputs["user_x"]
    >>> params, inputs = {"tables": {"item": jnp.zeros((9, 1))}}, {"item_id": jnp.array([7]), "user_x": jnp.arange(3.0)}
    >>> scores = with_row(score, {"item": Table(9, 1, ("item_id",))}, "item", "item_id")
    >>> scores(params, jnp.array([5.0]), inputs).tolist()
    [5.0, 6.0, 7.0]
    """
    seen_tables = {n: t._replace(adapted=False) for n, t in rows.linked(tables, (table,)).items()}

    def call(params: Params, row: Array, inputs: Inputs) -> Array:
        others = {name: values for name, values in inputs.items() if name != column}
        seen = rows.view(seen_tables, others)
        own = rows.gather(params["tables"], seen.ids)
        inputs = {**seen.inputs[0], column: jnp.full((1,), own[table].shape[0], jnp.int32)}
        own[table] = jnp.concatenate([own[table], row[None]])
        return function({**params, "tables": {**params["tables"], **own}}, inputs)

    return call


def reader(content: Model, learner: str) -> Reader:
    """The reader of a model over content columns: its ``features`` of the first example, which all share."""
    features = content.features
    if features is None:
        raise MetarecError(
            f"{learner} requires a content model with features; give one such as content_model(columns, head='mlp')"
        )

    def init(key: Array) -> tuple[dict[str, Array], Any]:
        params = content.init(key)
        return {CONTENT + name: rows for name, rows in params["tables"].items()}, params["net"]

    def read(params: Params, inputs: Inputs) -> Array:
        tables = {name: params["tables"][CONTENT + name] for name in content.tables}
        return features({"tables": tables, "net": params["content"]}, inputs)[0]

    return Reader(init, read, {CONTENT + name: table for name, table in content.tables.items()}, content.num_features)


def descend(value: Callable[[Array], Array], row: Array, lr: Array | float, steps: int) -> Array:
    """``row`` after ``steps`` of gradient descent on ``value``.

    >>> round(float(descend(lambda x: jnp.sum((x - 1.0) ** 2), jnp.zeros(1), 0.25, 2)[0]), 4)  # 0, 1/2, 3/4
    0.75
    """

    def step(row: Array, _: None) -> tuple[Array, None]:
        return row - lr * jax.grad(value)(row), None

    return loop(step, row, steps)[0]


def linear(key: Array, inputs: int, outputs: int, scale: float = 1.0) -> dict[str, Array]:
    """Weights of ``x @ kernel + bias``, drawn with variance ``scale^2 / inputs``; the bias starts at 0."""
    kernel = scale * jax.random.normal(key, (inputs, outputs)) / max(inputs, 1) ** 0.5
    return {"kernel": kernel, "bias": jnp.zeros(outputs)}


def affine(weights: Mapping[str, Array], x: Array) -> Array:
    """``x @ kernel + bias`` of one vector ``[inputs]``."""
    return x @ weights["kernel"] + weights["bias"]


def frozen(params: Params, *own: str) -> Params:
    """The parameters, with a gradient only in those named ``own``, the reader's net and the reader's tables."""
    learned = {"content", *own}
    held = {name: part if name in learned else jax.lax.stop_gradient(part) for name, part in params.items()}
    tables = params["tables"]
    held["tables"] = {n: t if n.startswith(CONTENT) else jax.lax.stop_gradient(t) for n, t in tables.items()}
    return held


def unmoved(*tables: Mapping[str, Table]) -> dict[str, Table]:
    """All these tables, marked as not adapted: no row of them changes in a task."""
    return {name: table._replace(adapted=False) for part in tables for name, table in part.items()}


def on_base(params: Params, base: Params) -> Params:
    """``params`` of a learner, with the model's part taken from a trained ``base``.

    >>> on_base({"tables": {"a": 0, "content_a": 1}, "net": 2, "content": 3}, {"tables": {"a": 7}, "net": 8})
    {'tables': {'a': 7, 'content_a': 1}, 'net': 8, 'content': 3}
    """
    own = {name: part for name, part in base.items() if name in params and name != "tables"}
    tables = {name: rows for name, rows in base["tables"].items() if name in params["tables"]}
    return {**params, **own, "tables": {**params["tables"], **tables}}


def support_loss(
    scores: WithRow, loss: Callable[..., Array], params: Params, examples: Examples
) -> Callable[[Array], Array]:
    """The loss of the examples as a function of the row."""

    def value(row: Array) -> Array:
        return loss(scores(params, row, examples.inputs), examples.target, where=examples.mask)

    return value


def made(model: Model, content: Model, *, column: str = "item_id") -> Model:
    """The model with the row of ``column`` computed from content: ``row = reader(content) @ kernel + bias``.

    Any learner runs on it: with `logistic` an item is that row, plus the closed-form change from its first clicks. The
    model's own rows of the column are not read, so items with and without ratings are treated alike in training.

    Args:
      model: a model with a table for ``column``.
      content: a model with ``features`` over the content columns of that side, ``content_model(columns, head="mlp")``.

    Raises:
      MetarecError: no such table, or no features.
    """
    table, size = table_of(model, column, "made")
    know = reader(content, "made")
    features = model.features

    def init(key: Array) -> Params:
        k_model, k_reader, k_row = jax.random.split(key, 3)
        params = model.init(k_model)
        tables, net = know.init(k_reader)
        own = {"content": net, "made": linear(k_row, know.size, size, 0.1)}
        return {**params, "tables": {**params["tables"], **tables}, **own}

    def laid(function: Callable[[Params, Inputs], Array]) -> Callable[[Params, Inputs], Array]:
        placed = with_row(function, model.tables, table, column)
        return lambda params, inputs: placed(params, affine(params["made"], know.read(params, inputs)), inputs)

    tables = unmoved(model.tables, know.tables)
    return Model(init, laid(model.apply), tables, None if features is None else laid(features), model.num_features)


@bounded
def with_cold_loss(
    learner: Learner,
    model: Model,
    alpha: Annotated[float, Bounds(0.0, 1.0)] = 0.5,
    loss: Callable[..., Array] = losses.bce,
) -> Learner:
    """The learner with the loss ``alpha L_query(model) + (1 - alpha) loss``, so that cold predictions are trained, too.

    With supports of 0 to 40 examples only one task in 41 is cold: predictions from content alone are hardly trained.

    Args:
      model: the model that the learner adapts, such as one of `made`.
      alpha: weight of the loss before adaptation, from 0 to 1.
      loss: loss of the model's own score, ``loss(scores [n], target [n], where=[n]) -> scalar``.

    Raises:
      MetarecError: ``alpha`` is not in [0, 1].
    """

    def both(params: Params, task: Task, key: Array) -> tuple[Array, Mapping[str, Array]]:
        value, metrics = learner.loss(params, task, key)
        inputs, target, mask = task.query
        cold = loss(model.apply(params, inputs), target, where=mask)
        return (1 - alpha) * value + alpha * cold, {**metrics, "cold_loss": cold}

    return learner._replace(loss=both)
