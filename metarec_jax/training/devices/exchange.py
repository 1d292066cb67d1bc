"""Rows of tables that are cut over devices, fetched and stepped by asking their owners for what a device needs.

Each device sorts the ids of its tasks, counts every id once, and sends each owner the ids that it wants of it; the rows
come back, and later their gradients go the same way, summed over a device's repeats. That is two all-to-alls of rows a
step, whatever the number of devices, where gathering everything on every device grows with it.

All shapes are fixed: an owner can be asked for `capacity` ids by each device. Where one is asked for more (its rows are
the popular ones), all devices gather everything, in that step and for that table: slower, and the same result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metarec_jax.core import Array
from metarec_jax.training.devices.sharding import DATA, MODEL, gather_updates, take_rows

SLACK = 2.0
"""An owner's capacity over its fair share of the ids that a device asks for."""
PAYS_FROM = 8
"""Devices that share a table from which on asking owners moves fewer bytes than gathering, at this slack."""


class Route(NamedTuple):
    """Where the rows of a device's ids travel; within `each_device`.

    Attributes:
      place: int32 ``[m]``, for each id its place in what is sent and comes back, ``owners * capacity`` places in all.
      asked: int32 ``[owners * capacity]``, the rows of this device that the others ask for; behind its last row: none.
      full: bool ``[1]``, whether some device anywhere asked an owner for more than its capacity.
    """

    place: Array
    asked: Array
    full: Array


def capacity(ids: int, owners: int) -> int:
    """How many of ``ids`` a device can ask of one owner.

    >>> capacity(1000, 8), capacity(20, 8)
    (256, 16)
    """
    return min(ids, max(16, -(-int(SLACK * ids / owners) // 16) * 16))


def route(ids: Array, num_rows: int, owners: int) -> Route:
    """Ask the owners; within `each_device`.

    Args:
      ids: int32 ``[m]``, rows of the whole table.
      num_rows: rows of each owner; owner k has ``k * num_rows .. (k + 1) * num_rows - 1``.
    """
    wanted, place = _places(ids, num_rows, owners)
    size = capacity(ids.shape[0], owners)
    full = (place >= size).any()
    slot = jnp.where(place < size, ids // num_rows * size + place, owners * size)
    requests = jnp.full((owners * size,), num_rows, jnp.int32)
    requests = requests.at[slot].set(wanted, mode="drop")
    asked = jax.lax.all_to_all(requests, MODEL, 0, 0, tiled=True)
    return Route(slot, asked, jax.lax.pmax(full, (DATA, MODEL))[None])


def _places(ids: Array, num_rows: int, owners: int) -> tuple[Array, Array]:
    """The row of its owner that each id is, and its place among the distinct ids that are asked of that owner.

    >>> [a.tolist() for a in _places(jnp.array([5, 1, 5, 0, 7, 1]), 4, 2)]  # owner 0: 0 1, owner 1: 5 7
    [[1, 1, 1, 0, 3, 1], [0, 1, 0, 0, 1, 1]]
    """
    order = jnp.argsort(ids)
    ranked = ids[order]
    first = jnp.concatenate([jnp.ones((1,), bool), ranked[1:] != ranked[:-1]])
    distinct = jnp.cumsum(first, dtype=jnp.int32)  # of the sorted ids: how many distinct ones so far
    bounds = jnp.arange(owners, dtype=jnp.int32) * num_rows
    before = jnp.concatenate([jnp.zeros((1,), jnp.int32), distinct])[jnp.searchsorted(ranked, bounds)]
    place = jnp.zeros_like(ids).at[order].set(distinct - 1 - before[ranked // num_rows])
    return ids % num_rows, place


def fetch(table: Array, ids: Array, owners: int) -> tuple[Array, Route | None]:
    """Rows of a table that is cut over ``owners`` devices, for this device's own ids; within `each_device`.

    Args:
      table: ``[num_rows, size]``, this device's rows.
      ids: int32 ``[t, n]``, rows of the whole table; as many on every device.

    Returns:
      ``[t, n, size]``, exactly the rows; and the way that their gradients go, None for all to all devices.
    """
    if owners < PAYS_FROM:
        return take_rows(table, ids), None
    way = route(ids.reshape(-1), table.shape[0], owners)

    def ask(table: Array) -> Array:
        answers = table.at[way.asked].get(mode="fill", fill_value=0)
        rows = jax.lax.all_to_all(answers, MODEL, 0, 0, tiled=True)
        return rows[way.place].reshape(*ids.shape, -1)

    return jax.lax.cond(way.full[0], lambda table: take_rows(table, ids), ask, table), way


def step_rows(
    update: Callable[[Array, Any, Array, Array], Any],
    table: Array,
    state: Any,
    ids: Array,
    grads: Array,
    way: Route | None,
) -> Any:
    """``update(table, state, ids, grads)`` of this device's rows by the gradients of all; within `each_device`.

    Args:
      ids, grads: int32 ``[m]`` rows of the whole table, and their gradients ``[m, size]``, of this device's own tasks.
      way: of the `fetch` that brought these rows.
    """

    def by_all(table: Array, state: Any) -> Any:
        return update(table, state, *gather_updates(table, ids, grads, True))

    if way is None:
        return by_all(table, state)

    def by_owner(table: Array, state: Any) -> Any:
        own = jnp.zeros((way.asked.shape[0], grads.shape[1]), grads.dtype).at[way.place].add(grads, mode="drop")
        sent = jax.lax.all_to_all(own, MODEL, 0, 0, tiled=True)
        asked, sent = (jax.lax.all_gather(a, DATA, tiled=True) for a in (way.asked, sent))
        return update(table, state, asked, sent)

    # Loops of one round or none, where `cond` would copy the table.
    full = way.full[0].astype(jnp.int32)
    table, state = jax.lax.fori_loop(0, full, lambda _, carry: by_all(*carry), (table, state))
    return jax.lax.fori_loop(0, 1 - full, lambda _, carry: by_owner(*carry), (table, state))
