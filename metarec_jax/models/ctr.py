"""The networks of click prediction, as `Model`s: factorisation machine, DeepFM, two towers.

Each column of the data is a field with one row of a table: a weight (column 0) and a vector. The vector of a
multi-valued field is the mean of its values' vectors, that of a numeric field a linear map of the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp

from metarec_jax.core import Array, Column, Inputs, MetarecError, Model
from metarec_jax.models.content import Fields, Joint, Rows, added, flax_model


def factorization_machine(
    columns: Mapping[str, Column], *, size: int = 16, table_scale: float = 0.1, pairs: bool = True
) -> Model:
    """Factorisation machine of second order: ``score = mean + sum_f w_f + sum_{f < g} <v_f, v_g>`` over the fields.

    In O(fields size): ``sum_{f < g} <v_f, v_g> = 1/2 (|sum_f v_f|^2 - sum_f |v_f|^2)``. Pairs of two values of the same
    multi-valued field are left out.

    Args:
      columns: columns of the data, `Interactions.columns`: ids and content of both sides.
      size: length of a field's vector.
      table_scale: standard deviation of the initial rows.
      pairs: whether to include the pairs; without them it is a linear regression on the fields.

    Returns:
      A model whose ``features``, in which the score is linear for a user, are the sum of the item's vectors.

    Raises:
      MetarecError: a column of neither side, or a side without columns.

    Source: Rendle, "Factorization Machines", 2010.

    >>> import jax
    >>> model = factorization_machine({"user_id": Column("id", 4), "item_id": Column("id", 6)}, size=2)
    >>> params = model.init(jax.random.key(0))
    >>> u, v = params["tables"]["user_id"][1], params["tables"]["item_id"][5]
    >>> score = model.apply(params, {"user_id": jnp.array([1]), "item_id": jnp.array([5])})
    >>> bool(jnp.allclose(score, u[0] + v[0] + u[1:] @ v[1:]))
    True
    """
    module = _DeepFM(_kinds(columns), size + 1, (), pairs)
    return flax_model(module, columns, size=size + 1, features="item_vectors", table_scale=table_scale)


def deepfm(
    columns: Mapping[str, Column], *, size: int = 16, hidden: tuple[int, ...] = (64, 64), table_scale: float = 0.1
) -> Model:
    """DeepFM: a factorisation machine plus dense layers over the concatenation of the same vectors.

    ``score = FM + out . relu(... relu(A [v_1, ..., v_F] + a))``

    Args:
      columns, size, table_scale: as for `factorization_machine`.
      hidden: units of each dense layer; at least one layer.

    Returns:
      A model whose ``features`` are the units of the last layer.

    Raises:
      MetarecError: as in `factorization_machine`, or no hidden layer.

    Source: Guo et al., "DeepFM: A Factorization-Machine based Neural Network for CTR Prediction", 2017.

    >>> import jax
    >>> model = deepfm({"user_id": Column("id", 4), "item_id": Column("id", 6)}, size=2, hidden=(3,))
    >>> params = model.init(jax.random.key(0))
    >>> model.apply(params, {"user_id": jnp.array([1]), "item_id": jnp.array([2, 5, 0])}).shape, model.num_features
    ((3,), 3)
    """
    if not hidden:
        raise MetarecError("deepfm requires a hidden layer, got none; give one, or use factorization_machine")
    module = _DeepFM(_kinds(columns), size + 1, tuple(hidden), True)
    return flax_model(module, columns, size=size + 1, features="last_hidden", table_scale=table_scale)


def two_tower(
    columns: Mapping[str, Column], *, size: int = 16, hidden: tuple[int, ...] = (64,), table_scale: float = 0.1
) -> Model:
    """Two towers: ``score = mean + w_user + w_item + <f(user's fields), g(item's fields)>``.

    A tower adds dense layers to the sum of its side's vectors: ``f = s + out relu(... relu(A [v_1, ...] + a))``, where
    ``out`` starts at 0, so the initial model is matrix factorisation with content. An item's vector does not depend on
    the user, so a catalogue is scored by one product.

    Args:
      columns, size, table_scale: as for `factorization_machine`.
      hidden: units of each dense layer of a tower; () for no layers.

    Returns:
      A model whose ``features`` are the item's vectors.

    Raises:
      MetarecError: as in `factorization_machine`.

    Source: Yi et al., "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations", 2019.

    >>> import jax
    >>> model = two_tower({"user_id": Column("id", 4), "item_id": Column("id", 6)}, size=2)
    >>> params = model.init(jax.random.key(0))
    >>> u, v = params["tables"]["user_id"][1], params["tables"]["item_id"][5]
    >>> score = model.apply(params, {"user_id": jnp.array([1]), "item_id": jnp.array([5])})
    >>> bool(jnp.allclose(score, u[0] + v[0] + u[1:] @ v[1:]))
    True
    """
    module = _TwoTower(_kinds(columns), size + 1, tuple(hidden))
    return flax_model(module, columns, size=size + 1, features="item_vectors", table_scale=table_scale)


def _kinds(columns: Mapping[str, Column]) -> dict[str, str]:
    strange = [name for name in columns if not name.startswith(("user_", "item_"))]
    missing = [side for side in ("user_", "item_") if not any(name.startswith(side) for name in columns)]
    if strange or missing:
        raise MetarecError(
            "names of columns must start with 'user_' or 'item_', with some of each, got "
            f"{', '.join(sorted(columns))}; give Interactions.columns"
        )
    return {name: column.kind for name, column in columns.items()}


class _DeepFM(Fields):
    """A factorisation machine, with dense layers unless ``hidden`` is empty."""

    hidden: tuple[int, ...]
    pairs: bool

    def more(self) -> None:
        self.layers = [Joint(units, name=f"dense_{k}") for k, units in enumerate(self.hidden)]
        self.out = Joint(1, name="out") if self.hidden else None

    def last_hidden(self, rows: Rows, inputs: Inputs) -> Array:
        parts = [row[:, 1:] for row in self.fields(rows, inputs)]
        for layer in self.layers:
            parts = [nn.relu(layer(parts))]
        return parts[0]

    def __call__(self, rows: Rows, inputs: Inputs) -> Array:
        fields = self.fields(rows, inputs)
        total = added(fields)
        score = self.mean + total[:, 0]
        if self.pairs:
            own = added([jnp.sum(jnp.square(row[:, 1:]), axis=-1, keepdims=True) for row in fields])
            score = score + 0.5 * (jnp.sum(jnp.square(total[:, 1:]), axis=-1) - own[:, 0])
        return score if self.out is None else score + self.out([self.last_hidden(rows, inputs)])[:, 0]


class _TwoTower(Fields):
    hidden: tuple[int, ...]

    def more(self) -> None:
        def tower(side: str) -> list[Joint]:
            return [Joint(units, name=f"{side}dense_{k}") for k, units in enumerate(self.hidden)]

        zeros = nn.initializers.zeros
        self.towers = {side: tower(side) for side in ("user_", "item_")}
        self.outs = {s: nn.Dense(self.size - 1, kernel_init=zeros, name=f"{s}out") for s in self.towers if self.hidden}

    def side(self, rows: Rows, inputs: Inputs, side: str) -> tuple[Array, Array]:
        """Weight ``[n]`` and vector ``[n, size]``."""
        fields = self.fields(rows, inputs, side)
        total, parts = added(fields), [row[:, 1:] for row in fields]
        for layer in self.towers[side]:
            parts = [nn.relu(layer(parts))]
        vector = total[:, 1:]
        return total[:, 0], vector + self.outs[side](parts[0]) if self.hidden else vector

    def item_vectors(self, rows: Rows, inputs: Inputs) -> Array:
        return self.side(rows, inputs, "item_")[1]

    def __call__(self, rows: Rows, inputs: Inputs) -> Array:
        (w_user, u), (w_item, v) = self.side(rows, inputs, "user_"), self.side(rows, inputs, "item_")
        return self.mean + w_user + w_item + jnp.sum(u * v, axis=-1)
