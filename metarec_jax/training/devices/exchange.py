"""Rows of tables that are partitioned over devices: each device requests the rows it needs from their owners.

Each device sorts the ids of its tasks, removes repeats, and sends each owner the ids that it needs from it; the rows
come back, and later their gradients go the same way, summed over a device's repeats. That is two all-to-alls of rows
per step for any number of devices, whereas gathering everything on every device grows with that number.

All shapes are fixed: each device can request `capacity` ids from an owner. Where it needs more (of an owner with the
popular rows), all devices gather everything, in that step and for that table: slower, with the same result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metarec_jax.core import Array
from metarec_jax.training.devices.sharding import DATA, MODEL, gather_updates, take_rows

SLACK = 2.0
"""An owner's capacity, as a multiple of its equal share of the ids that a device requests."""
PAYS_FROM = 8
"""Number of devices sharing a table from which on requests move fewer bytes than gathering, with this slack."""


class Route(NamedTuple):
    """How the rows of a device's ids are exchanged; within `each_device`.

    Attributes:
      place: int32 ``[m]``, for each id its place in what is sent and received, ``owners * capacity`` places in all.
      requested: int32 ``[owners * capacity]``, the rows of this device that the others request; an index beyond its
        last row is not a request.
      full: bool ``[1]``, whether any device requested more ids from an owner than its capacity.
    """

    place: Array
    requested: Array
    full: Array


def capacity(ids: int, owners: int) -> int:
    """How many of ``ids`` a device can request from one owner.

    >>> capacity(1000, 8), capacity(20, 8)
    (256, 16)
    """
    return min(ids, max(16, -(-int(SLACK * ids / owners) // 16) * 16))


def route(ids: Array, num_rows: int, owners: int) -> Route:
    """Send requests to the owners; within `each_device`.

    Args:
      ids: int32 ``[m]``, rows of the whole table.
      num_rows: rows of each owner; owner k has ``k * num_rows .. (k + 1) * num_rows - 1``.
      owners: number of devices that share the table.
    """
    local, place = _places(ids, num_rows, owners)
    size = capacity(ids.shape[0], owners)
    full = (place >= size).any()
    slot = jnp.where(place < size, ids // num_rows * size + place, owners * size)
    requests = jnp.full((owners * size,), num_rows, jnp.int32)
    requests = requests.at[slot].set(local, mode="drop")
    requested = jax.lax.all_to_all(requests, MODEL, 0, 0, tiled=True)
    return Route(slot, requested, jax.lax.pmax(full, (DATA, MODEL))[None])


def _places(ids: Array, num_rows: int, owners: int) -> tuple[Array, Array]:
    """For each id, its row at its owner, and its place among the distinct ids that are requested from that owner.

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
    """Rows of a table that is partitioned over ``owners`` devices, for this device's ids; within `each_device`.

    Args:
      table: ``[num_rows, size]``, this device's rows.
      ids: int32 ``[t, n]``, rows of the whole table; the same number on every device.

    Returns:
      ``[t, n, size]``, exactly the rows; and the route for their gradients, None where all devices gather all.
    """
    if owners < PAYS_FROM:
        return take_rows(table, ids), None
    way = route(ids.reshape(-1), table.shape[0], owners)

    def request(table: Array) -> Array:
        answers = table.at[way.requested].get(mode="fill", fill_value=0)
        rows = jax.lax.all_to_all(answers, MODEL, 0, 0, tiled=True)
        return rows[way.place].reshape(*ids.shape, -1)

    return jax.lax.cond(way.full[0], lambda table: take_rows(table, ids), request, table), way


def step_rows(
    update: Callable[[Array, Any, Array, Array], Any],
    table: Array,
    state: Any,
    ids: Array,
    grads: Array,
    way: Route | None,
) -> Any:
    """``update(table, state, ids, grads)`` of this device's rows, with the gradients of all; within `each_device`.

    Args:
      ids, grads: int32 ``[m]`` rows of the whole table, and their gradients ``[m, size]``, of this device's tasks.
      way: the route from the `fetch` of these rows.
    """

    def by_all(table: Array, state: Any) -> Any:
        return update(table, state, *gather_updates(table, ids, grads, True))

    if way is None:
        return by_all(table, state)

    def by_owner(table: Array, state: Any) -> Any:
        own = jnp.zeros((way.requested.shape[0], grads.shape[1]), grads.dtype).at[way.place].add(grads, mode="drop")
        sent = jax.lax.all_to_all(own, MODEL, 0, 0, tiled=True)
        requested, sent = (jax.lax.all_gather(a, DATA, tiled=True) for a in (way.requested, sent))
        return update(table, state, requested, sent)

    # Loops of one round or none: `cond` would copy the table.
    full = way.full[0].astype(jnp.int32)
    table, state = jax.lax.fori_loop(0, full, lambda _, carry: by_all(*carry), (table, state))
    return jax.lax.fori_loop(0, 1 - full, lambda _, carry: by_owner(*carry), (table, state))
