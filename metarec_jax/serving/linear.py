"""Detects from the program whether a score is linear in the row of the item; a catalogue is then scored by one product.

The learner declares nothing. Its adaptation and prediction run on a row view (`metarec_jax.rows`) of the support and of
one more item whose row is a variable: the score of that item is a function of its row only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metarec_jax import jax_private, rows
from metarec_jax.core import Array, Examples, Inputs, Params, Table

_EVERYWHERE = (
    "add add_any broadcast_in_dim concatenate convert_element_type copy expand_dims neg pad reduce_sum reshape rev "
    "slice squeeze sub transpose"
)
_ONE_FACTOR = ("mul", "dot_general")
_LINEAR_IN: dict[str, tuple[int, ...]] = {
    "div": (0,),
    "dynamic_slice": (0,),
    "dynamic_update_slice": (0, 1),
    "gather": (0,),
    "scatter": (0, 2),
    "scatter-add": (0, 2),
}
"""Operands in which a primitive is linear, if not in all of them."""


class Linear(NamedTuple):
    """Scores of one user as ``sum_t table_t[row] . weights[t] + known``; row 0, the unknown item, has ``unknown``.

    Attributes:
      weights: table name -> ``[D]``.
      known, unknown: ``[]``.
    """

    weights: dict[str, Array]
    known: Array
    unknown: Array


def is_linear(function: Callable[[Any], Array], example: Any) -> bool:
    """Whether ``function(x)`` is of the form ``A x + b`` for all x, proved operation by operation; else False.

    An operation that is not known to be linear counts as nonlinear; nothing is computed.

    >>> x, u = jnp.ones(3), jnp.arange(3.0)
    >>> is_linear(lambda x: 2 * x @ u + 1, x), is_linear(lambda x: jnp.where(u > 1, x, 0).sum(), x)
    (True, True)
    >>> is_linear(lambda x: x @ x, x), is_linear(jax.nn.relu, x), is_linear(lambda x: jax.lax.stop_gradient(x) * u, x)
    (False, False, False)
    """
    closed = jax.make_jaxpr(function)(example)
    return _reached(closed.jaxpr, [True] * len(closed.jaxpr.invars)) is not None


def _reached(jaxpr: Any, reached: Sequence[bool]) -> list[bool] | None:
    """Which outputs depend on the marked inputs, if all of these do so linearly; else None."""
    marked = {v for v, mark in zip(jaxpr.invars, reached, strict=True) if mark}

    def mark(v: Any) -> bool:
        return not jax_private.is_literal(v) and v in marked

    for eqn in jaxpr.eqns:
        name, marks = eqn.primitive.name, [mark(v) for v in eqn.invars]
        if not any(marks):
            continue
        inner = eqn.params.get("jaxpr")
        if name in ("jit", "pjit") and inner is not None:
            out = _reached(inner.jaxpr, marks)
        else:
            out = [True] * len(eqn.outvars) if _linear(eqn, marks) else None
        if out is None:
            return None
        marked |= {v for v, hit in zip(eqn.outvars, out, strict=True) if hit}
    return [mark(v) for v in jaxpr.outvars]


def _linear(eqn: Any, marks: Sequence[bool]) -> bool:
    name = eqn.primitive.name
    if name == "select_n":
        return not marks[0]
    if name == "convert_element_type":
        return bool(jnp.issubdtype(eqn.params["new_dtype"], jnp.floating))
    if name in _ONE_FACTOR:
        return sum(marks) == 1
    if name in _LINEAR_IN:
        return all(k in _LINEAR_IN[name] for k, mark in enumerate(marks) if mark)
    return name in _EVERYWHERE.split()


def item_tables(tables: Mapping[str, Table], params: Params, num_rows: int) -> tuple[tuple[str, Table], ...]:
    """The tables that ``item_id`` indexes, if they have a row for each of ``num_rows`` items; else none."""
    mine = {name: table for name, table in tables.items() if "item_id" in table.columns}
    for name, table in mine.items():
        present = isinstance(params, Mapping) and name in params.get("tables", {})
        shape = params["tables"][name].shape if present else (0, 0)  # possibly with more rows: see `rows.rounded`
        if table.columns != ("item_id",) or table.num_rows != num_rows or shape[0] < num_rows or shape[1] != table.size:
            return ()
    return tuple(mine.items())


def linear(
    adapt: Callable[[Params, Examples, Array], Any],
    predict: Callable[[Params, Any, Inputs], Array],
    params: Params,
    tables: Mapping[str, Table],
    support: Examples,
    key: Array,
) -> Linear | None:
    """The scores of items outside the support, if they are linear in the rows that ``item_id`` indexes; else None.

    Args:
      tables: from `item_tables`.
      support: without content of items.
    """
    beyond = jnp.array([next(iter(tables.values())).num_rows], jnp.int32)  # an id that no support contains
    seen = rows.view(tables, support.inputs, {"item_id": beyond})
    gathered = rows.gather(params["tables"], seen.ids)
    item = seen.inputs[1]["item_id"]
    shared = {name: column for name, column in support.inputs.items() if name != "item_id"}

    def local(of_item: dict[str, Array]) -> Params:
        laid = {name: table.at[item].set(of_item[name][None]) for name, table in gathered.items()}
        return {**params, "tables": {**params["tables"], **laid}}

    origin = {name: jnp.zeros_like(table[0]) for name, table in gathered.items()}
    adapted = adapt(local(origin), support._replace(inputs=seen.inputs[0]), key)

    def score(of_item: dict[str, Array]) -> Array:
        return predict(local(of_item), adapted, {**shared, "item_id": item})[0]

    if not is_linear(score, origin):
        return None
    known, weights = jax.value_and_grad(score)(origin)
    unknown = predict(local(origin), adapted, {**shared, "item_id": jnp.zeros_like(item)})[0]
    return Linear(weights, known, unknown)
