"""CAVIA: a task adapts only a short context vector; the meaning of the context is meta-learned and shared by all tasks.

Source: Zintgraf, Shiarlis, Kurin, Hofmann and Whiteson, "Fast Context Adaptation via Meta-Learning", 2019.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from metarec_jax import losses, rows
from metarec_jax.core import Array, Examples, Inputs, Learner, MetarecError, Model, Params, Task
from metarec_jax.learners.maml import maml
from metarec_jax.learners.rules import MakeRule, Rule
from metarec_jax.options import Bounds, bounded

START = "context/start"
"""Path of the context in the parameters of the `maml` below."""


@bounded
def cavia(
    model: Model,
    *,
    size: Annotated[int, Bounds(1)] = 16,
    table: str = "user_id",
    inner_lr: Annotated[float | None, Bounds(0.0)] = None,
    inner_steps: Annotated[int, Bounds(0)] = 5,
    prior: Annotated[float | None, Bounds(0.0)] = None,
    rule: Rule | MakeRule | None = None,
    loss: Callable[..., Array] = losses.mse,
    first_order: bool = False,
) -> Learner:
    """Meta-train ``model`` with a context ``c [size]``, which starts at 0 for every task; nothing else adapts.

    The context is added to the user's row, ``row + c M``, with M learned: before dense layers this is the same as
    concatenating the context to their input, in a dot product it moves the user's vector. A task owns ``size`` numbers.

    Args:
      size: length C of the context.
      table: name of the table whose rows the context moves.
      inner_lr: initial rate of the inner steps; 0.3 by default.
      inner_steps: number of gradient steps on the support.
      prior: prior strength, in examples: the loss of n support examples is multiplied by ``n / (n + prior)``; 30 by
        default.
      rule: inner update rule (`learners.rules`), or a function ``rule(inner_lr, inner_steps)`` that makes one;
        `meta_sgd` by default.
      loss: loss of the support and of the query, ``loss(scores [n], target [n], where=[n]) -> scalar``.
      first_order: treat the inner gradients as constant (FOMAML).

    Returns:
      A learner; ``adapted["rest"]["context/start"]`` is the context ``[C]``.

    Raises:
      MetarecError: the model has no such table, or as in `maml`.
    """
    if table not in model.tables:
        raise MetarecError(f"cavia: the model has no table {table!r}; choose from {', '.join(sorted(model.tables))}")
    steps = maml(
        with_context(model, size, table),
        inner_lr=inner_lr,
        inner_steps=inner_steps,
        prior=prior,
        rule=rule,
        loss=loss,
        first_order=first_order,
    )

    def init(key: Array) -> Params:
        params = steps.init(key)
        return {**params, "context": {"map": params["context"]["map"]}}

    def at_zero(params: Params) -> Params:
        mapping = params["context"]["map"]
        return {**params, "context": {"map": mapping, "start": jnp.zeros_like(mapping[:, 0])}}

    def adapt(params: Params, support: Examples, key: Array) -> Any:
        return steps.adapt(at_zero(params), support, key)

    def predict(params: Params, adapted: Any, inputs: Inputs) -> Array:
        return steps.predict(at_zero(params), adapted, inputs)

    def meta_loss(params: Params, task: Task, key: Array) -> tuple[Array, Any]:
        return steps.loss(at_zero(params), task, key)

    return Learner(init, adapt, predict, meta_loss, steps.tables)


def with_context(model: Model, size: int, table: str) -> Model:
    """``model`` with a context in its parameters: ``{"start": c [size], "map": M [size, D]}``, rows become row + c M.

    M is drawn with variance ``1 / size``: ``M' M`` is about I, so that a rate of the context has the same effect as a
    rate of the row itself.
    """

    seen_tables = {n: t._replace(adapted=False) for n, t in rows.linked(model.tables, (table,)).items()}

    def init(key: Array) -> Params:
        k_model, k_map = jax.random.split(key)
        mapping = jax.random.normal(k_map, (size, model.tables[table].size)) / size**0.5
        return {**model.init(k_model), "context": {"start": jnp.zeros((size,)), "map": mapping}}

    def apply(params: Params, inputs: Inputs) -> Array:
        shift = params["context"]["start"] @ params["context"]["map"]
        seen = rows.view(seen_tables, inputs)
        tables = {**params["tables"], **rows.gather(params["tables"], seen.ids)}
        body = {name: part for name, part in params.items() if name != "context"}
        return model.apply({**body, "tables": {**tables, table: tables[table] + shift[None]}}, seen.inputs[0])

    return Model(init, apply, model.tables, adapts=(START,))
