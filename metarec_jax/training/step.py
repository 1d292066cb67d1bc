"""The outer step: draw tasks, take their rows, one gradient of the mean loss, write the touched rows back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metarec_jax import rows
from metarec_jax.core import Array, Learner, MetarecError, Params, Table, Task
from metarec_jax.data.tasks import TaskSource
from metarec_jax.training.row_optimizers import (
    RowOptimizer,
    TableState,
    init_table,
    shared_whole,
    update_rows,
    update_whole,
)


class TrainState(NamedTuple):
    """All that the next step needs. ``key`` never changes: step k draws from ``fold_in(key, k)``."""

    params: Params
    dense: optax.OptState
    tables: dict[str, TableState]
    key: Array
    step: Array


class Optimizers(NamedTuple):
    """One for the dense parameters, one for table rows."""

    dense: optax.GradientTransformation
    rows: RowOptimizer | optax.GradientTransformation


LOWEST, HIGHEST = "lowest_id/", "highest_id/"
"""With ``debug``, metrics of these names (and a table's after them) hold the ids that a step drew."""


def init_state(learner: Learner, optimizers: Optimizers, params: Params, key: Array) -> TrainState:
    """The state before the first step: ``params``, fresh optimisers, and the key of all draws."""
    dense, tables = _split(params)
    states = {name: init_table(optimizers.rows, table) for name, table in tables.items()}
    return TrainState(params, optimizers.dense.init(dense), states, key, jnp.zeros((), jnp.int32))


def make_step(
    learner: Learner, source: TaskSource, optimizers: Optimizers, *, debug: bool = False, groups: int | None = None
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]:
    """``step(state, source.data) -> (state, metrics)``, pure; metrics are scalars, ``loss`` among them.

    Args:
      debug: metrics also hold the lowest and highest id drawn for each table.
      groups: the tasks of a batch adapt in so many equal groups, one after the other: the temporaries of one group at a
        time, the same result to rounding. None: on a CPU groups of at most 64 tasks, which its caches hold; else one.

    Raises:
      MetarecError: ``groups`` does not divide the tasks of a batch.
    """
    groups = _groups(source.tasks, jax.default_backend()) if groups is None else groups
    if groups < 1 or source.tasks % groups:
        raise MetarecError(f"groups is {groups}, and a batch has {source.tasks} tasks; give a divisor of them")

    def step(state: TrainState, data: Any) -> tuple[TrainState, dict[str, Array]]:
        k_draw, k_loss = jax.random.split(jax.random.fold_in(state.key, state.step))
        batch = source.draw(data, k_draw)
        (loss, metrics), grads, ids = loss_and_grads(learner, state.params, batch, k_loss, groups)
        params, dense, tables = _apply(optimizers, state, grads, ids)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads["dense"]), **metrics}
        if debug:
            for name, (low, high) in rows.id_extent(learner.tables, batch.support.inputs, batch.query.inputs).items():
                metrics |= {LOWEST + name: low, HIGHEST + name: high}
        return TrainState(params, dense, tables, state.key, state.step + 1), metrics

    return step


def loss_and_grads(
    learner: Learner, params: Params, batch: Task, key: Array, groups: int = 1
) -> tuple[tuple[Array, dict[str, Array]], dict[str, Any], dict[str, Array]]:
    """Mean loss of a batch of tasks, and its gradient by row view.

    Returns:
      ``(loss, metrics)``; gradients ``{"dense": ..., "rows": {table: [T, L, size]},
      "whole": {table: [num_rows, size]}}``; ids ``{table: [T, L]}``, the global row of each gradient row
      (of a whole table: the ids that were touched).
    """
    dense, tables = _split(params)
    tasks = batch.query.mask.shape[0]
    viewed, whole = _plan(learner.tables, batch, tasks)
    seen = jax.vmap(lambda s, q: rows.view(viewed, s, q))(batch.support.inputs, batch.query.inputs)
    local = Task(
        batch.support._replace(inputs=seen.inputs[0]),
        batch.query._replace(inputs=seen.inputs[1]),
    )
    gathered = rows.gather({name: tables[name] for name in viewed}, seen.ids)

    def mean_loss(leaves: dict[str, Any], local: Task, keys: Array) -> tuple[Array, dict[str, Array]]:
        def one(own: dict[str, Array], task: Task, key: Array) -> tuple[Array, Mapping[str, Array]]:
            return learner.loss({**leaves["dense"], "tables": {**leaves["whole"], **own}}, task, key)

        losses, metrics = jax.vmap(one)(leaves["rows"], local, keys)
        return losses.mean(), {name: value.mean() for name, value in metrics.items()}

    shared = {"dense": dense, "whole": {name: tables[name] for name in whole}}
    value_and_grad = jax.value_and_grad(mean_loss, has_aux=True)

    def group(part: tuple[Any, Task, Array]) -> Any:
        own, local, keys = part
        return value_and_grad({**shared, "rows": own}, local, keys)

    value, grads = _in_groups(group, (gathered, local, jax.random.split(key, tasks)), groups)
    touched = {name: _touched(table, batch) for name, table in whole.items()}
    return value, grads, {**seen.ids, **touched}


def _in_groups(
    group: Callable[[Any], tuple[Any, dict[str, Any]]], parts: Any, groups: int
) -> tuple[Any, dict[str, Any]]:
    """``group`` over ``groups`` equal slices of the leading axis of ``parts``, one after the other; the mean of all."""
    if groups == 1:
        return group(parts)
    sliced = jax.tree.map(lambda a: a.reshape((groups, a.shape[0] // groups) + a.shape[1:]), parts)

    def step(total: Any, part: Any) -> tuple[Any, Any]:
        value, grads = group(part)
        own = grads.pop("rows")
        return jax.tree.map(lambda a, b: a + b / groups, total, (value, grads)), own

    value, grads = jax.eval_shape(group, jax.tree.map(lambda a: a[0], sliced))
    zeros = jax.tree.map(
        lambda a: jnp.zeros(a.shape, a.dtype), (value, {k: v for k, v in grads.items() if k != "rows"})
    )
    (value, grads), own = jax.lax.scan(step, zeros, sliced)
    whole = jax.tree.map(lambda a: a.reshape((-1,) + a.shape[2:]) / groups, own)
    return value, {**grads, "rows": whole}


def _groups(tasks: int, backend: str) -> int:
    """The fewest equal groups of at most 64 tasks on a CPU; one on an accelerator, or where there are none such."""
    if backend != "cpu":
        return 1
    return next((n for n in range(-(-tasks // 64), tasks // 8 + 1) if tasks % n == 0), 1)


def _plan(tables: Mapping[str, Table], batch: Task, tasks: int) -> tuple[dict[str, Table], dict[str, Table]]:
    """Which tables are seen through a row view, and which are so small that every task gets them whole."""

    def slots(table: Table) -> int:
        used = [part.inputs[c].size // tasks for part in batch for c in table.columns if c in part.inputs]
        return 1 + sum(used)

    whole = {name for name, table in tables.items() if shared_whole(table, slots(table), tasks)}
    return (
        {name: table for name, table in tables.items() if name not in whole},
        {name: table for name, table in tables.items() if name in whole},
    )


def _touched(table: Table, batch: Task) -> Array:
    used = [part.inputs[c].reshape(-1) for part in batch for c in table.columns if c in part.inputs]
    return jnp.concatenate([jnp.zeros((1,), jnp.int32), *used])


def _apply(
    optimizers: Optimizers, state: TrainState, grads: dict[str, Any], ids: dict[str, Array]
) -> tuple[Params, optax.OptState, dict[str, TableState]]:
    dense, tables = _split(state.params)
    updates, dense_state = optimizers.dense.update(grads["dense"], state.dense, dense)
    dense = optax.apply_updates(dense, updates)
    new_tables, new_states = dict(tables), dict(state.tables)
    for name, table in tables.items():
        args = (optimizers.rows, table, state.tables[name], ids[name].reshape(-1))
        if name in grads["whole"]:
            new_tables[name], new_states[name] = update_whole(*args, grads["whole"][name], state.step)
        else:
            flat = grads["rows"][name].reshape(-1, table.shape[1])
            new_tables[name], new_states[name] = update_rows(*args, flat, state.step)
    return {**dense, "tables": new_tables}, dense_state, new_states


def _split(params: Params) -> tuple[dict[str, Any], dict[str, Array]]:
    return {name: part for name, part in params.items() if name != "tables"}, dict(params["tables"])
