"""Optimisers that touch only the rows of a batch: lazy Adam, row-wise Adagrad. Optax transformations are dense."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metarec_jax.core import Array, Table
from metarec_jax.options import Bounds, bounded

Schedule = Callable[[Array], Array] | float
_DECAY, _EPS = Bounds(0.0, 1 - 1e-12), Bounds(1e-30, 1e12)


class RowOptimizer(NamedTuple):
    """A rule for single rows; every leaf of its state has the table's leading axis.

    Attributes:
      init: ``init(table [num_rows, size]) -> state``.
      update: ``update(grads [m, size], state of those rows, rows [m, size], step [], where=None) -> (rows, state)``;
        ``where`` is bool ``[m]``: rows for which it is False are not changed, nor is their state.
    """

    init: Callable[[Array], Any]
    update: Callable[..., tuple[Array, Any]]


class LazyAdamState(NamedTuple):
    """State of lazy Adam.

    Attributes:
      moments: ``[num_rows, 2, size]``, the first and the second moment next to each other: a touched row of a large
        table then costs one cache miss, not two.
      updates: int32 ``[num_rows]``, number of updates of the row (or, with catch_up, its last step).
    """

    moments: Array
    updates: Array


@bounded
def lazy_adam(
    lr: Schedule = 1e-3,
    b1: Annotated[float, _DECAY] = 0.9,
    b2: Annotated[float, _DECAY] = 0.999,
    eps: Annotated[float, _EPS] = 1e-8,
    weight_decay: Annotated[float, Bounds(0.0)] = 0.0,
    catch_up: bool = False,
) -> RowOptimizer:
    """Adam on the rows of the batch only.

    This is not dense Adam, in which a row that a batch does not touch still moves by its momentum. Here such a row and
    its moments do not change, and bias is corrected by the row's own number of updates. Row 0 counts as touched in
    every step, since padding points at it.

    Args:
      lr: rate, or a function of the step.
      b1, b2: as in Adam, from 0 (no momentum; the second moment is the last square) to below 1.
      eps: as in Adam, above 0: the gradient of row 0 is often 0.
      weight_decay: decoupled weight decay (AdamW), applied to a row when it is touched.
      catch_up: decay the moments for the steps in which a row was not touched, as dense Adam does.

    Raises:
      MetarecError: a number is out of bounds.

    Source: Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015.

    A first step is ``lr`` long, whatever the gradient:

    >>> adam, table = lazy_adam(0.1), jnp.zeros((3, 1))
    >>> moved, _ = update_rows(adam, table, init_table(adam, table), jnp.array([2]), jnp.array([[5.0]]), jnp.array(0))
    >>> [round(float(x), 4) for x in moved[:, 0]]
    [0.0, 0.0, -0.1]
    """
    log_b1, log_b2 = (math.log(b) if b > 0 else -math.inf for b in (b1, b2))

    def init(table: Array) -> LazyAdamState:
        moments = jnp.zeros((table.shape[0], 2, table.shape[1]), table.dtype)
        return LazyAdamState(moments, jnp.zeros(table.shape[0], jnp.int32))

    def update(
        grads: Array, state: LazyAdamState, rows: Array, step: Array, where: Array | None = None
    ) -> tuple[Array, LazyAdamState]:
        dtype = grads.dtype
        on = jnp.ones((1,), dtype) if where is None else where.astype(dtype)
        moments, updates = state.moments, state.updates + on.astype(jnp.int32)
        if catch_up:
            updates = jnp.where(on > 0, step + 1, state.updates).astype(jnp.int32)
            missed = jnp.maximum(updates - state.updates - 1, 0).astype(dtype)
            moments = moments * jnp.stack([b1**missed, b2**missed], axis=1)[:, :, None]
        # Both moments in one formula: concatenating the halves would double the cost.
        first = (jnp.arange(2) == 0)[None, :, None]
        share = jnp.where(first, 1 - b1, 1 - b2).astype(dtype) * on[:, None, None]
        moments = (1 - share) * moments + share * grads[:, None] * jnp.where(first, 1.0, grads[:, None])
        # 1 / (1 - b**t) once per row: without the barrier the compiler computes a power for every element.
        t = jnp.maximum(updates, 1).astype(dtype)
        unbiased = [-1.0 / jnp.expm1(t * log_b) for log_b in (log_b1, log_b2)]
        moments, mu_scale, nu_scale = jax.lax.optimization_barrier((moments, unbiased[0], unbiased[1]))
        mu, nu = moments[:, 0] * mu_scale[:, None], moments[:, 1] * nu_scale[:, None]
        rate = (_rate(lr, step) * on)[:, None]
        return rows - rate * (mu / (jnp.sqrt(nu) + eps) + weight_decay * rows), LazyAdamState(moments, updates)

    return RowOptimizer(init, update)


@bounded
def row_adagrad(lr: Schedule = 1e-2, eps: Annotated[float, _EPS] = 1e-8) -> RowOptimizer:
    """Adagrad with one accumulator per row: ``a += mean(g^2)``, ``row -= lr g / (sqrt(a) + eps)``.

    Its state takes 1/size of the memory of one of Adam's moments. Raises MetarecError where ``eps`` is not above 0.
    Source: the row-wise sparse Adagrad of FBGEMM, TorchRec.

    ``g = (3, 4)``: a = 12.5, so the row moves by ``-0.5 * g / 3.5355``.

    >>> adagrad, table = row_adagrad(0.5), jnp.zeros((2, 2))
    >>> state, grads = init_table(adagrad, table), jnp.array([[3.0, 4.0]])
    >>> [round(float(x), 4) for x in update_rows(adagrad, table, state, jnp.array([1]), grads, jnp.array(0))[0][1]]
    [-0.4243, -0.5657]
    """

    def update(grads: Array, total: Array, rows: Array, step: Array, where: Array | None = None) -> tuple[Array, Array]:
        new = total + jnp.mean(grads**2, axis=1)
        moved = rows - _rate(lr, step) * grads / (jnp.sqrt(new)[:, None] + eps)
        if where is None:
            return moved, new
        return jnp.where(where[:, None], moved, rows), jnp.where(where, new, total)

    return RowOptimizer(lambda table: jnp.zeros(table.shape[0], table.dtype), update)


def _rate(lr: Schedule, step: Array) -> Any:
    return lr(step) if callable(lr) else lr


class TableState(NamedTuple):
    """State of a table's optimiser; ``slot`` int32 ``[num_rows]`` is scratch to find duplicates, never cleared."""

    inner: Any
    slot: Array


def init_table(optimizer: RowOptimizer | optax.GradientTransformation, table: Array) -> TableState:
    """The state of one table's optimiser before its first step; table ``[num_rows, size]``."""
    if isinstance(optimizer, RowOptimizer):
        return TableState(optimizer.init(table), jnp.zeros((table.shape[0],), jnp.int32))
    return TableState(optimizer.init(table), jnp.zeros((0,), jnp.int32))


def update_rows(
    optimizer: RowOptimizer | optax.GradientTransformation,
    table: Array,
    state: TableState,
    ids: Array,
    grads: Array,
    step: Array,
) -> tuple[Array, TableState]:
    """One step on the rows ``ids [m]`` given their gradients ``[m, size]``; repeated ids are summed first.

    Where the ids are at least half as many as the rows, the whole table is updated: streaming is cheaper than
    gathering. An id beyond the last row, with a gradient of 0, changes nothing: it is a row of another device.

    Duplicates are found without a sort: every copy of an id writes its position to ``slot[id]`` and reads back the one
    that was kept. Rows are written in place when the buffers are donated. An accelerator may sum many copies in a
    different order each time; on a CPU the result is bitwise reproducible.
    """
    if not isinstance(optimizer, RowOptimizer) or 2 * ids.shape[0] >= table.shape[0]:
        return update_whole(optimizer, table, state, ids, jnp.zeros_like(table).at[ids].add(grads), step)
    position = jnp.arange(ids.shape[0], dtype=jnp.int32)
    slot = state.slot.at[ids].set(position)
    owner = slot[ids]
    summed = jnp.zeros_like(grads).at[owner].add(grads)
    take = lambda a: a[ids]  # noqa: E731
    rows, inner = optimizer.update(summed, jax.tree.map(take, state.inner), table[ids], step)
    target = jnp.where(owner == position, ids, table.shape[0])
    put = lambda a, b: a.at[target].set(b, mode="drop")  # noqa: E731
    return put(table, rows), TableState(jax.tree.map(put, state.inner, inner), slot)


def update_whole(
    optimizer: RowOptimizer | optax.GradientTransformation,
    table: Array,
    state: TableState,
    ids: Array,
    grads: Array,
    step: Array,
) -> tuple[Array, TableState]:
    """`update_rows` from a gradient of the whole table, which is cheaper where a batch touches most of it."""
    if not isinstance(optimizer, RowOptimizer):
        updates, inner = optimizer.update(grads, state.inner, table)
        return table + updates, TableState(inner, state.slot)
    touched = jnp.zeros((table.shape[0],), bool).at[ids].set(True)
    rows, inner = optimizer.update(grads, state.inner, table, step, where=touched)
    return rows, TableState(inner, state.slot)


def shared_whole(table: Table, slots: int, tasks: int) -> bool:
    """Whether tasks get the whole table: it has at most as many rows as a view would have slots."""
    return table.num_rows <= (slots if table.adapted else slots * tasks)
