"""Row views: a task sees only the table rows that it touches, and does not notice.

The rows of a task are gathered into a local table ``[L, size]`` and its ids re-indexed to local positions. Local row 0
is always global row 0 (the unknown id, or padding), so a model that tests ``id == 0`` works in both worlds. Repeated
ids of an adapted table share one local row, since the inner loop must move them together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from metarec_jax.core import Array, Inputs, Table

_PAIRWISE_LIMIT = 192


class View(NamedTuple):
    """Which rows a set of examples touches, and the examples re-indexed to them.

    Attributes:
      ids: table name -> int32 ``[L]``, the global row behind each local row; entry 0 is global row 0. A slot whose id
        already stands earlier keeps its id here (gathering it is harmless) but no example points at it.
      inputs: the same examples, with local ids.
    """

    ids: Mapping[str, Array]
    inputs: tuple[Inputs, ...]


def first_occurrence(ids: Array) -> Array:
    """Position of the first occurrence of each id. Shape ``[n] -> [n]``, int32.

    >>> first_occurrence(jnp.array([7, 3, 7, 3, 5]))
    Array([0, 1, 0, 1, 4], dtype=int32)
    """
    n = ids.shape[0]
    if n <= _PAIRWISE_LIMIT:
        return jnp.argmax(ids[:, None] == ids[None, :], axis=1).astype(jnp.int32)
    order = jnp.argsort(ids, stable=True).astype(jnp.int32)
    ranked = ids[order]
    starts = jnp.concatenate([jnp.ones((1,), bool), ranked[1:] != ranked[:-1]])
    run = jax.lax.cummax(jnp.where(starts, jnp.arange(n, dtype=jnp.int32), 0))
    return jnp.zeros((n,), jnp.int32).at[order].set(order[run])


def view(tables: Mapping[str, Table], *examples: Inputs) -> View:
    """The rows that ``examples`` touch. L = 1 + the ids of the table's columns, over all examples."""
    ids: dict[str, Array] = {}
    local: list[dict[str, Array]] = [dict(inputs) for inputs in examples]
    for name, table in tables.items():
        uses = [(k, c) for k, inputs in enumerate(examples) for c in table.columns if c in inputs]
        flat = jnp.concatenate([jnp.zeros((1,), jnp.int32), *(examples[k][c].reshape(-1) for k, c in uses)])
        ids[name] = flat
        slots = first_occurrence(flat) if table.adapted else jnp.arange(flat.shape[0], dtype=jnp.int32)
        slots = jnp.where(flat == 0, 0, slots)
        start = 1
        for k, c in uses:
            column = examples[k][c]
            local[k][c] = slots[start : start + column.size].reshape(column.shape)
            start += column.size
    return View(ids, tuple(local))


def gather(tables: Mapping[str, Array], ids: Mapping[str, Array]) -> dict[str, Array]:
    """The rows behind a view: ``{name: [L, size]}``."""
    return {name: tables[name][ids[name]] for name in ids}


def overlay(table: Array, ids: Array, moved: Array, slots: Array) -> tuple[Array, Array]:
    """Rows of ``table`` at ``slots``, with ``moved[k]`` in place of row ``ids[k]``.

    Returns a local table ``[1 + n, size]`` and the local ids of ``slots``; nothing of the table's size is made.
    A repeated id in ``ids`` counts where it stands first. Cost: ``slots.size * ids.size`` comparisons.
    """
    flat = slots.reshape(-1)
    hits = flat[:, None] == ids[None, :]
    rows = jnp.where(hits.any(1, keepdims=True), moved[jnp.argmax(hits, axis=1)], table[flat])
    zero = jnp.where((ids == 0).any(), moved[jnp.argmax(ids == 0)], table[0])[None]
    local = jnp.where(flat == 0, 0, 1 + jnp.arange(flat.shape[0], dtype=jnp.int32)).reshape(slots.shape)
    return jnp.concatenate([zero, rows]), local
