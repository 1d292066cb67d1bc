"""Row views: a task sees only the table rows that it touches, through the same interface as whole tables.

The rows of a task are gathered into a local table ``[L, size]`` and its ids are re-indexed to local positions. Local
row 0 is always global row 0 (the unknown id, or padding), so a model that tests ``id == 0`` works with both. Repeated
ids of an adapted table share one local row, since the inner loop must move them together. Tables that share a column
are numbered together: an example has one local id in that column for all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from metarec_jax.core import Array, Inputs, MetarecError, Table

_PAIRWISE_LIMIT = 192
LARGE = 4096
"""Number of rows from which on a table is rounded up, and may be partitioned over devices."""


def rounded(num_rows: int) -> int:
    """Rows to allocate for a table of ``num_rows``: up to a 64th more, so that 2, 4, 8, ... devices can share them.

    A table below `LARGE` is not rounded. No id points at the rows beyond ``num_rows``.

    >>> rounded(3707), rounded(6041), rounded(1_000_001)
    (3707, 6080, 1007616)
    """
    if num_rows < LARGE:
        return num_rows
    step = 1 << (num_rows.bit_length() - 7)
    return -(-num_rows // step) * step


class View(NamedTuple):
    """The rows that a set of examples touches, and the examples re-indexed to them.

    Attributes:
      ids: table name -> int32 ``[L]``, the global row of each local row; entry 0 is global row 0. A slot that repeats
        an earlier id keeps that id (gathering it is harmless), but no example points at it.
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
        same = ids[:, None] == ids[None, :]
        return jnp.min(jnp.where(same, jnp.arange(n, dtype=jnp.int32), n), axis=1)
    order = jnp.argsort(ids, stable=True).astype(jnp.int32)
    ranked = ids[order]
    starts = jnp.concatenate([jnp.ones((1,), bool), ranked[1:] != ranked[:-1]])
    run = jax.lax.cummax(jnp.where(starts, jnp.arange(n, dtype=jnp.int32), 0))
    return jnp.zeros((n,), jnp.int32).at[order].set(order[run])


def groups(tables: Mapping[str, Table]) -> list[dict[str, Table]]:
    """The tables in groups: two tables that share a column, directly or through a third one, are in the same group.

    An example has one id in a column, so all tables of a group must number their rows in the same way.

    >>> a, b, c = (Table(9, 2, columns) for columns in (("item_id",), ("user_id",), ("item_id", "last_item")))
    >>> [sorted(group) for group in groups({"a": a, "b": b, "c": c})]
    [['b'], ['a', 'c']]
    """
    separate: list[dict[str, Table]] = []
    for name, table in tables.items():
        linked = [g for g in separate if any(set(t.columns) & set(table.columns) for t in g.values())]
        joined = {n: t for group in linked for n, t in group.items()} | {name: table}
        separate = [group for group in separate if group not in linked] + [joined]
    return separate


def linked(tables: Mapping[str, Table], names: Collection[str]) -> dict[str, Table]:
    """The tables of all groups with one of ``names``."""
    return {n: t for group in groups(tables) if not group.keys().isdisjoint(names) for n, t in group.items()}


def view(tables: Mapping[str, Table], *examples: Inputs) -> View:
    """The rows that ``examples`` touch. L = 1 + the number of ids in the columns of a table's group, over all examples.

    Tables that share columns have the same slots (`groups`); a slot of a column that a table does not have holds that
    table's row 0. Repeated ids share a slot where any table of the group is adapted.

    >>> seen = view({"item": Table(9, 2, ("item_id",))}, {"item_id": jnp.array([7, 0, 7])}, {"item_id": jnp.array([4])})
    >>> seen.ids["item"].tolist(), seen.inputs[0]["item_id"].tolist(), seen.inputs[1]["item_id"].tolist()
    ([0, 7, 0, 7, 4], [1, 0, 1], [4])
    """
    ids: dict[str, Array] = {}
    local: list[dict[str, Array]] = [dict(inputs) for inputs in examples]
    for group in groups(tables):
        columns = columns_of(group)
        uses = [(k, c) for k, inputs in enumerate(examples) for c in columns if c in inputs]
        flat = jnp.concatenate([jnp.zeros((1,), jnp.int32), *(examples[k][c].reshape(-1) for k, c in uses)])
        adapted = any(table.adapted for table in group.values())
        slots = first_occurrence(flat) if adapted else jnp.arange(flat.shape[0], dtype=jnp.int32)
        slots = jnp.where(flat == 0, 0, slots)
        start = 1
        for k, c in uses:
            column = examples[k][c]
            local[k][c] = slots[start : start + column.size].reshape(column.shape)
            start += column.size
        for name, table in group.items():
            ids[name] = flat
            own = [(k, c) for k, c in uses if c in table.columns]
            if len(own) < len(uses):
                pointed, there = (
                    jnp.concatenate([jnp.zeros((1,), jnp.int32), *(part[k][c].reshape(-1) for k, c in own)])
                    for part in (local, examples)
                )
                ids[name] = jnp.zeros_like(flat).at[pointed].set(there)
    return View({name: ids[name] for name in tables}, tuple(local))


def columns_of(tables: Mapping[str, Table]) -> tuple[str, ...]:
    """The columns that index any of the tables, each once."""
    return tuple(dict.fromkeys(c for table in tables.values() for c in table.columns))


def gather(tables: Mapping[str, Array], ids: Mapping[str, Array]) -> dict[str, Array]:
    """The rows of a view's ids: ``{name: [L, size]}``."""
    return {name: tables[name][ids[name]] for name in ids}


def overlay(table: Array, ids: Array, moved: Array, slots: Array) -> Array:
    """Rows of ``table`` at ``slots [n]``, with ``moved[k]`` in place of row ``ids[k]``: ``[n, size]``.

    Nothing of the table's size is allocated. Of a repeated id in ``ids`` the first entry counts.
    Cost: ``slots.size * ids.size`` comparisons.

    >>> table = jnp.array([[0.0], [1.0], [2.0]])
    >>> overlay(table, jnp.array([2]), jnp.array([[9.0]]), jnp.array([1, 2, 0]))[:, 0].tolist()
    [1.0, 9.0, 0.0]
    """
    n = ids.shape[0]
    at = jnp.min(jnp.where(slots[:, None] == ids[None, :], jnp.arange(n, dtype=jnp.int32), n), axis=1)
    return jnp.where((at < n)[:, None], moved[jnp.minimum(at, n - 1)], table[slots])


def id_extent(tables: Mapping[str, Table], *examples: Inputs) -> dict[str, tuple[Array, Array]]:
    """Lowest and highest id of each table in ``examples`` (of any leading axes); (0, 0) without any id.

    >>> low, high = id_extent({"t": Table(9, 2, ("a", "b"))}, {"a": jnp.array([[4, 2]])}, {"b": jnp.array([12])})["t"]
    >>> int(low), int(high)
    (2, 12)
    """
    extents = {}
    for name, table in tables.items():
        columns = [inputs[c] for inputs in examples for c in table.columns if c in inputs]
        columns = [c for c in columns if c.size] or [jnp.zeros((1,), jnp.int32)]
        lows, highs = jnp.stack([c.min() for c in columns]), jnp.stack([c.max() for c in columns])
        extents[name] = (lows.min(), highs.max())
    return extents


def check_ids(tables: Mapping[str, Table], *examples: Inputs, source: str = "the data") -> None:
    """Raise where ``examples`` have an id that its table lacks. JAX itself would silently take the nearest row.

    For concrete arrays, on the host; `fit` with ``debug=True`` does the same for every task that it draws.

    Raises:
      MetarecError: an id out of range; the message names the table, its rows and the id.

    >>> check_ids({"item": Table(4, 2, ("item_id",))}, {"item_id": jnp.array([1, 4])})
    Traceback (most recent call last):
    metarec_jax.core.MetarecError: table 'item' has rows 0..3, and the data has the id 4; ...
    """
    for name, (low, high) in jax.device_get(id_extent(tables, *examples)).items():
        if low < 0 or high >= tables[name].num_rows:
            raise MetarecError(outside(name, tables[name], int(low if low < 0 else high), source))


def outside(name: str, table: Table, bad: int, source: str) -> str:
    """The message for an id, from ``source``, that its table lacks."""
    return (
        f"table {name!r} has rows 0..{table.num_rows - 1}, and {source} has the id {bad}; "
        "build the model from the columns of this data (Interactions.columns)"
    )
