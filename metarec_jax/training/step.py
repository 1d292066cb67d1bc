"""The outer step: draw tasks, gather their rows, compute one gradient of the mean loss, update the touched rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from metarec_jax import rows
from metarec_jax.core import PROGRESS, Array, Learner, MetarecError, Params, Table, Task
from metarec_jax.data.draw import TaskSource
from metarec_jax.training.devices import exchange, sharding
from metarec_jax.training.row_optimizers import (
    RowOptimizer,
    TableState,
    init_table,
    shared_whole,
    update_rows,
    update_whole,
)


class TrainState(NamedTuple):
    """The input of the next step. ``key`` never changes: step k draws from ``fold_in(key, k)``."""

    params: Params
    dense: optax.OptState
    tables: dict[str, TableState]
    key: Array
    step: Array


class Optimizers(NamedTuple):
    """One optimiser for the dense parameters, one for table rows."""

    dense: optax.GradientTransformation
    rows: RowOptimizer | optax.GradientTransformation


LOWEST, HIGHEST = "lowest_id/", "highest_id/"
"""With ``debug``, prefixes of the metrics with the lowest and highest id of each table that a step drew."""
TASK_LOSSES = "task_losses"
"""The metric of `loss_and_grads` that is not a scalar: the loss of each task of the batch, ``[T]``."""
BAD_TASK = "bad_task"
"""The metric of a step with the index of the first task of the batch whose loss is not finite."""


def init_state(learner: Learner, optimizers: Optimizers, params: Params, key: Array) -> TrainState:
    """The state before the first step: ``params``, fresh optimisers, and the key of all draws."""
    dense, tables = _split(params)
    states = {name: init_table(optimizers.rows, table) for name, table in tables.items()}
    return TrainState(params, optimizers.dense.init(dense), states, key, jnp.zeros((), jnp.int32))


def make_step(
    learner: Learner,
    source: TaskSource,
    optimizers: Optimizers,
    *,
    debug: bool = False,
    groups: int | None = None,
    mesh: Mesh | None = None,
    dtype: Any = None,
    steps: int = 1,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]:
    """``step(state, source.data) -> (state, metrics)``, pure; metrics are scalars, ``loss`` among them.

    Args:
      debug: add the lowest and highest id drawn for each table to the metrics.
      groups: number of equal groups in which a device's tasks adapt, one after the other: only the temporaries of one
        group are in memory, and the result is the same up to rounding. None: on a CPU groups of at most 64 tasks, which
        fit into its caches; else one group.
      mesh: mesh of `sharding.make_mesh`; the tasks are partitioned over its devices. The result is the same up to
        rounding.
      dtype: dtype of the parameters in the learner, such as bfloat16; the stored parameters, which the optimisers
        update, keep theirs.
      steps: outer steps of the whole training, for learners that depend on its progress (`core.PROGRESS`).

    Raises:
      MetarecError: ``groups`` does not divide the tasks of a device, or the devices do not divide those of a batch.
    """
    if mesh is not None:
        sharding.check_tasks(mesh, source.tasks)
    tasks = source.tasks // (1 if mesh is None else mesh.size)
    groups = _groups(tasks, jax.default_backend()) if groups is None else groups
    if groups < 1 or tasks % groups:
        raise MetarecError(f"groups must divide the {tasks} tasks of a batch on a device, got {groups}; give a divisor")

    def step(state: TrainState, data: Any) -> tuple[TrainState, dict[str, Array]]:
        k_draw, k_loss = jax.random.split(jax.random.fold_in(state.key, state.step))
        batch = source.draw(data, k_draw)
        if mesh is not None:
            batch = sharding.spread_inside(mesh, batch)
        (loss, metrics), grads, ids, ways = _grads(learner, state.params, batch, k_loss, groups, mesh, dtype)
        params, dense, tables = _apply(optimizers, state, grads, ids, ways, mesh)
        if PROGRESS in params:
            params = {**params, PROGRESS: ((state.step + 1) / steps).astype(params[PROGRESS].dtype)}
        bad = jnp.argmax(~jnp.isfinite(metrics.pop(TASK_LOSSES))).astype(jnp.int32)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads["dense"]), **metrics, BAD_TASK: bad}
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
      ``(loss, metrics)``, the loss of each task among the metrics (`TASK_LOSSES`); gradients
      ``{"dense": ..., "rows": {table: [T, L, size]}, "whole": {table: [num_rows, size]}}``; ids ``{table: [T, L]}``,
      the global row of each gradient row (for a whole table: the touched ids).
    """
    return _grads(learner, params, batch, key, groups, None, None)[:3]


def _grads(
    learner: Learner, params: Params, batch: Task, key: Array, groups: int, mesh: Mesh | None, dtype: Any
) -> tuple[tuple[Array, dict[str, Array]], dict[str, Any], dict[str, Array], dict[str, exchange.Route | None]]:
    """`loss_and_grads`, where each device of a mesh computes its share of the tasks, and the routes of cut tables."""
    keys = jax.random.split(key, batch.query.mask.shape[0])
    if mesh is None:
        return _device_grads(learner, params, batch, keys, groups, (), 1, dtype)
    cut = tuple(name for name, table in params["tables"].items() if sharding.is_cut(mesh, table.shape[0]))
    specs: dict[str, Any] = {name: P() for name in params if name != "tables"}
    specs["tables"] = {name: P(sharding.MODEL) if name in cut else P() for name in params["tables"]}

    def work(params: Params, batch: Task, keys: Array) -> Any:
        owners = mesh.shape[sharding.MODEL]
        value, grads, ids, ways = _device_grads(learner, params, batch, keys, groups, cut, owners, dtype)
        losses, own = value[1].pop(TASK_LOSSES), jax.tree.map(lambda grad: grad / mesh.size, grads.pop("rows"))
        return sharding.mean_over_devices((*value, grads)), (losses, own, ids, ways)

    tasks = sharding.TASKS
    spread = sharding.each_device(mesh, work, (specs, tasks, tasks), (P(), tasks))
    (loss, metrics, grads), (losses, own, ids, ways) = spread(params, batch, keys)
    return (loss, {**metrics, TASK_LOSSES: losses}), {**grads, "rows": own}, ids, ways


def _device_grads(
    learner: Learner,
    params: Params,
    batch: Task,
    keys: Array,
    groups: int,
    cut: tuple[str, ...],
    owners: int,
    dtype: Any,
) -> tuple[tuple[Array, dict[str, Array]], dict[str, Any], dict[str, Array], dict[str, exchange.Route | None]]:
    """`_grads` for the tasks of one device, which shares the tables in ``cut`` with others, ``owners`` in all."""
    dense, tables = _split(params)
    fixed = _fixed(params)
    tasks = batch.query.mask.shape[0]
    viewed, whole = _plan(learner.tables, batch, tasks, cut)
    seen = jax.vmap(lambda s, q: rows.view(viewed, s, q))(batch.support.inputs, batch.query.inputs)
    local = Task(
        batch.support._replace(inputs=seen.inputs[0]),
        batch.query._replace(inputs=seen.inputs[1]),
    )
    gathered = rows.gather(tables, {name: ids for name, ids in seen.ids.items() if name not in cut})
    fetched = {name: exchange.fetch(tables[name], ids, owners) for name, ids in seen.ids.items() if name in cut}
    gathered |= {name: table_rows for name, (table_rows, _) in fetched.items()}

    def mean_loss(leaves: dict[str, Any], local: Task, keys: Array) -> tuple[Array, tuple[dict[str, Array], Array]]:
        if dtype is not None:
            leaves = _cast(leaves, dtype)

        def one(own: dict[str, Array], task: Task, key: Array) -> tuple[Array, Mapping[str, Array]]:
            return learner.loss({**leaves["dense"], **fixed, "tables": {**leaves["whole"], **own}}, task, key)

        losses, metrics = jax.vmap(one)(leaves["rows"], local, keys)
        return losses.mean(), ({name: value.mean() for name, value in metrics.items()}, losses)

    shared = {"dense": dense, "whole": {name: tables[name] for name in whole}}
    value_and_grad = jax.value_and_grad(mean_loss, has_aux=True)

    def group(part: tuple[Any, Task, Array]) -> Any:
        own, local, keys = part
        (loss, (metrics, losses)), grads = value_and_grad({**shared, "rows": own}, local, keys)
        own = jax.tree.map(lambda grad: grad / groups, grads.pop("rows"))
        return (loss, metrics, grads), (own, losses)

    (loss, metrics, grads), (own, losses) = _in_groups(group, (gathered, local, keys), groups)
    touched = {name: _touched(table, batch) for name, table in whole.items()}
    ways = {name: way for name, (_, way) in fetched.items()}
    return (loss, {**metrics, TASK_LOSSES: losses}), {**grads, "rows": own}, {**seen.ids, **touched}, ways


def _in_groups(group: Callable[[Any], tuple[Any, Any]], parts: Any, groups: int) -> tuple[Any, Any]:
    """``group`` on ``groups`` equal slices of the leading axis of ``parts``, one after the other.

    Returns the mean of its first results, and its second results joined along their leading axis.
    """
    if groups == 1:
        return group(parts)
    sliced = jax.tree.map(lambda a: a.reshape((groups, a.shape[0] // groups) + a.shape[1:]), parts)

    def step(total: Any, part: Any) -> tuple[Any, Any]:
        shared, own = group(part)
        return jax.tree.map(lambda a, b: a + b / groups, total, shared), own

    shapes, _ = jax.eval_shape(group, jax.tree.map(lambda a: a[0], sliced))
    shared, own = jax.lax.scan(step, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes), sliced)
    return shared, jax.tree.map(lambda a: a.reshape((-1,) + a.shape[2:]), own)


def _groups(tasks: int, backend: str) -> int:
    """The smallest number of equal groups of at most 64 tasks on a CPU; 1 on an accelerator, or without such groups."""
    if backend != "cpu":
        return 1
    return next((n for n in range(-(-tasks // 64), tasks // 8 + 1) if tasks % n == 0), 1)


def _cast(values: Any, dtype: Any) -> Any:
    """Floating leaves in another precision."""
    return jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, values)


def _plan(
    tables: Mapping[str, Table], batch: Task, tasks: int, cut: tuple[str, ...]
) -> tuple[dict[str, Table], dict[str, Table]]:
    """The tables that tasks see through a row view, and the small ones that every task gets whole.

    Tables that share a column are in the same part: its ids are either local or global.
    """
    whole: set[str] = set()
    for group in rows.groups(tables):
        used = [part.inputs[c].size // tasks for part in batch for c in rows.columns_of(group) if c in part.inputs]
        if all(name not in cut and shared_whole(table, 1 + sum(used), tasks) for name, table in group.items()):
            whole |= group.keys()
    return (
        {name: table for name, table in tables.items() if name not in whole},
        {name: table for name, table in tables.items() if name in whole},
    )


def _touched(table: Table, batch: Task) -> Array:
    used = [part.inputs[c].reshape(-1) for part in batch for c in table.columns if c in part.inputs]
    return jnp.concatenate([jnp.zeros((1,), jnp.int32), *used])


def _apply(
    optimizers: Optimizers,
    state: TrainState,
    grads: dict[str, Any],
    ids: dict[str, Array],
    ways: Mapping[str, exchange.Route | None],
    mesh: Mesh | None,
) -> tuple[Params, optax.OptState, dict[str, TableState]]:
    dense, tables = _split(state.params)
    updates, dense_state = optimizers.dense.update(grads["dense"], state.dense, dense)
    dense = optax.apply_updates(dense, updates)
    new_tables, new_states = dict(tables), dict(state.tables)
    for name, table in tables.items():
        whole = name in grads["whole"]
        grad = grads["whole"][name] if whole else grads["rows"][name].reshape(-1, table.shape[1])
        update = update_whole if whole else update_rows
        if mesh is not None:
            update = _on_mesh(update, mesh, table, state.tables[name], whole, ways.get(name))
        args = (optimizers.rows, table, state.tables[name], ids[name].reshape(-1), grad, state.step)
        new_tables[name], new_states[name] = update(*args)
    return {**dense, **_fixed(state.params), "tables": new_tables}, dense_state, new_states


def _on_mesh(
    update: Callable[..., Any],
    mesh: Mesh,
    table: Array,
    state: TableState,
    whole: bool,
    way: exchange.Route | None,
) -> Callable[..., Any]:
    """`update_rows` or `update_whole` (for a ``whole`` gradient) where each device updates the rows that it has."""
    cut = sharding.is_cut(mesh, table.shape[0])
    spec = lambda leaf: P(sharding.MODEL) if cut and leaf.shape[:1] == table.shape[:1] else P()  # noqa: E731
    table_spec, state_spec, tasks = spec(table), jax.tree.map(spec, state), sharding.TASKS

    def run(optimizer: Any, table: Array, state: TableState, ids: Array, grads: Array, step: Array) -> Any:
        if not isinstance(optimizer, RowOptimizer):  # it may read the whole table, which the partitioner handles
            if not whole:

                def dense(table: Array, ids: Array, grads: Array) -> Array:
                    ids, grads = sharding.gather_updates(table, ids, grads, cut)
                    return jnp.zeros_like(table).at[ids].add(grads, mode="drop")

                grads = sharding.each_device(mesh, dense, (table_spec, tasks, tasks), table_spec)(table, ids, grads)
            return update_whole(optimizer, table, state, ids, grads, step)

        def work(table: Array, state: TableState, ids: Array, grads: Array, way: Any, step: Array) -> Any:
            def own(table: Array, state: TableState, ids: Array, grads: Array) -> Any:
                return update(optimizer, table, state, ids, grads, step)

            if whole:
                return own(table, state, sharding.from_all(ids), grads)
            if cut:
                return exchange.step_rows(own, table, state, ids, grads, way)
            return own(table, state, *sharding.gather_updates(table, ids, grads, cut))

        arguments = (table_spec, state_spec, tasks, P() if whole else tasks, tasks, P())
        results = (table_spec, state_spec)
        return sharding.each_device(mesh, work, arguments, results)(table, state, ids, grads, way, step)

    return run


def _split(params: Params) -> tuple[dict[str, Any], dict[str, Array]]:
    """The parameters of the dense optimiser, and the tables."""
    return {name: part for name, part in params.items() if name not in ("tables", "fixed")}, dict(params["tables"])


def _fixed(params: Params) -> dict[str, Any]:
    return {"fixed": params["fixed"]} if "fixed" in params else {}
