"""Rows and features of users and items, on the device, and the model's input columns made from them."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from metarec_jax.core import Array, Inputs, MetarecError, Method
from metarec_jax.data.interactions import Interactions


class Catalogue(NamedTuple):
    """Rows and features of users and items, on the device.

    Attributes:
      user_row, item_row: int32 ``[num_rows]``: vocabulary row -> table row; 0 for ids that are not in training.
      user, item: feature columns by name, ``[num_rows]`` or ``[num_rows, f]``.
    """

    user_row: Array
    item_row: Array
    user: dict[str, Array]
    item: dict[str, Array]


def catalogue(
    data: Interactions, train: Interactions | None = None, user_rows: Literal["prior", "own"] = "prior"
) -> Catalogue:
    """The catalogue of ``data``; ids that do not occur in ``train`` (default: ``data``) are mapped to row 0.

    Args:
      user_rows: "prior" maps every user to row 0, the learned prior of a user; "own" keeps the rows of training users.

    Raises:
      MetarecError: ``train`` has rows outside the vocabularies of ``data``, or ``user_rows`` is another value.

    >>> from metarec_jax.data.interactions import Vocabulary
    >>> users, items = Vocabulary(np.arange(1)), Vocabulary(np.arange(4))
    >>> data = Interactions(np.array([1, 1]), np.array([1, 3]), None, None, users, items)
    >>> catalogue(data).item_row.tolist()  # items 2 and 4 were never seen
    [0, 1, 0, 3, 0]
    """
    train = data if train is None else train
    if user_rows not in ("prior", "own"):
        raise MetarecError(f"user_rows {user_rows!r} is not known; use 'prior' or 'own'")

    def trained(rows: np.ndarray, num_rows: int, what: str) -> Array:
        if rows.max(initial=0) >= num_rows:
            raise MetarecError(
                f"train has {what} row {rows.max()}, and data has rows up to {num_rows - 1}; "
                "use both from the same Interactions"
            )
        own = np.zeros(num_rows, np.int32)
        own[rows] = rows
        return jnp.asarray(own)

    users = trained(train.user, data.users.num_rows, "user")
    return Catalogue(
        user_row=users if user_rows == "own" else jnp.zeros_like(users),
        item_row=trained(train.item, data.items.num_rows, "item"),
        user={name: jnp.asarray(f.values) for name, f in data.user_features.items()},
        item={name: jnp.asarray(f.values) for name, f in data.item_features.items()},
    )


def check_method(method: Method, catalogue: Catalogue, name: str | None = None) -> None:
    """Refuse a method whose tables do not match the catalogue, since JAX clamps an index past the end.

    A catalogue may have more items than an item table has rows, if those items map to row 0. A method without
    ``tables`` cannot be checked.

    Args:
      name: name of the method, for the message.

    Raises:
      MetarecError: a table has fewer rows than the catalogue refers to, or than it declares; an item table has more
        rows than the catalogue; or the catalogue lacks a column of a table.
    """
    who = "the method" if name is None else f"method {name!r}"
    columns = {"user_id": catalogue.user_row, "item_id": catalogue.item_row, **catalogue.user, **catalogue.item}
    for table_name, table in method.tables.items():
        held = method.params["tables"][table_name].shape[0]
        if held < table.num_rows:
            raise MetarecError(
                f"{who}: its parameters have a table {table_name!r} of {held} rows, and its model expects "
                f"{table.num_rows}; use the parameters that were trained with this model"
            )
        for column in table.columns:
            if column not in columns:
                raise MetarecError(
                    f"{who}: its table {table_name!r} reads the column {column!r}, and the catalogue has "
                    f"{', '.join(columns)}; make the catalogue from the data that the method was trained on"
                )
            highest = int(columns[column].max(initial=0))
            if highest >= table.num_rows:
                raise MetarecError(
                    f"{who}: its table {table_name!r} has {table.num_rows} rows, and the column {column!r} of the "
                    f"catalogue goes up to {highest}; make the catalogue from the data that the method was trained on"
                )
        if "item_id" in table.columns and table.num_rows > len(catalogue.item_row):
            raise MetarecError(
                f"{who}: its table {table_name!r} has {table.num_rows} rows, and the catalogue "
                f"{len(catalogue.item_row)}; make the catalogue from the data that the method was trained on"
            )


def inputs(
    catalogue: Catalogue, user: Array, item: Array, keep_user: Array | None = None, keep: Array | None = None
) -> Inputs:
    """Input columns of one user and ``n`` items. User columns have leading axis 1: all examples share them.

    Args:
      user: int32 ``[]`` vocabulary row; item: int32 ``[n]`` vocabulary rows.
      keep_user, keep: bool ``[]`` and ``[n]``; where False, the id is replaced by the unknown one; content is kept.
    """
    user_id, item_id = catalogue.user_row[user], catalogue.item_row[item]
    user_id = user_id if keep_user is None else jnp.where(keep_user, user_id, 0)
    item_id = item_id if keep is None else jnp.where(keep, item_id, 0)
    columns = {"user_id": user_id[None], "item_id": item_id}
    columns |= {name: values[user][None] for name, values in catalogue.user.items()}
    columns |= {name: values[item] for name, values in catalogue.item.items()}
    return columns
