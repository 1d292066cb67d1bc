"""Flax networks as `Model`s: the engine owns the tables, the network sees rows.

A network is called with ``rows`` (one ``[n, size]`` array for each id, categorical or multi-valued column; the values
of a multi-valued column are averaged) and ``inputs`` (the columns themselves). Leading axis 1 means "shared by all
examples". Any Linen module with that signature becomes a model by `flax_model`, any NNX module by `nnx_model`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from metarec_jax.core import Array, Column, Inputs, MetarecError, Model, Params, Table
from metarec_jax.rows import rounded

Rows = Mapping[str, Array]


def content_model(
    columns: Mapping[str, Column],
    *,
    size: int = 16,
    head: Literal["dot", "mlp"] = "dot",
    hidden: tuple[int, ...] = (64, 64),
    table_scale: float = 0.1,
) -> Model:
    """Ids and content of both sides; also for items without ratings, which have the unknown row.

    With ``head="dot"``: ``score = mean + b_user + b_item + <u, v>``, where a side's vector and bias are the sum of its
    id row, its content rows and a linear map of its numeric features. With ``"mlp"``: all rows concatenated, dense
    layers of ``hidden`` units with ReLU, one output.

    Args:
      columns: columns of the data, `Interactions.columns`.
      size: length D of the vectors.
      head: "dot" or "mlp".
      hidden: units of each layer of "mlp".
      table_scale: standard deviation of the initial rows.

    Raises:
      MetarecError: an unknown ``head``, a column of neither side, or a dot product without columns of one side.

    >>> model = content_model({"user_id": Column("id", 4), "item_id": Column("id", 6)}, size=2)
    >>> params = model.init(jax.random.key(0))
    >>> model.apply(params, {"user_id": jnp.array([1]), "item_id": jnp.array([2, 5, 0])}).shape
    (3,)
    """
    kinds = {name: column.kind for name, column in columns.items()}
    strange = [name for name in columns if not name.startswith(("user_", "item_"))]
    if strange:
        raise MetarecError(
            f"names of columns must start with 'user_' or 'item_', got {', '.join(strange)}; rename them"
        )
    if head == "dot":
        for side in ("user_", "item_"):
            if not any(name.startswith(side) for name in columns):
                raise MetarecError(
                    f"a dot product requires columns of both sides, and none of {', '.join(sorted(columns))} starts "
                    f"with {side!r}; add one"
                )
        sides = flax_model(
            TwoSides(kinds, size + 1), columns, size=size + 1, features="item_vectors", table_scale=table_scale
        )
        return sides._replace(adapts=("tables/user_id",)) if "user_id" in columns else sides
    if head == "mlp":
        return flax_model(Tower(kinds, hidden), columns, size=size, features="last_hidden", table_scale=table_scale)
    raise MetarecError(f"head {head!r} is not known; use 'dot' or 'mlp'")


def meta_recommender(num_users: int, num_items: int, *, size: int = 32, table_scale: float = 0.1) -> Model:
    """The original model: user embedding and item embedding, concatenated, and one linear layer.

    ``score = w . [user row, item row] + b``

    Args:
      num_users, num_items: rows of the tables, the unknown row included (`Vocabulary.num_rows`).
      size: length of an embedding.
      table_scale: standard deviation of the initial rows.

    >>> model = meta_recommender(4, 6, size=2)
    >>> params = model.init(jax.random.key(0))
    >>> model.apply(params, {"user_id": jnp.array([1]), "item_id": jnp.array([2, 5, 0])}).shape
    (3,)
    """
    columns = {"user_id": Column("id", num_users), "item_id": Column("id", num_items)}
    kinds = {name: column.kind for name, column in columns.items()}
    return flax_model(Tower(kinds, ()), columns, size=size, features="last_hidden", table_scale=table_scale)


def flax_model(
    module: nn.Module,
    columns: Mapping[str, Column],
    *,
    size: int = 16,
    features: str | None = None,
    table_scale: float = 0.1,
) -> Model:
    """A Linen module as a `Model`: one table of row length ``size`` for each column that is not numeric.

    Args:
      module: the network, called as ``module(rows, inputs) -> scores [n]``.
      columns: columns of the data, `Interactions.columns`.
      size: length of a row.
      features: name of a method ``(rows, inputs) -> [n, D]``, for closed-form learners.
      table_scale: standard deviation of the initial rows; row 0 starts at 0.

    Raises:
      MetarecError: from ``apply``, where the inputs lack a column.
    """
    example_rows, example_inputs = _example(columns, size)

    def init_net(key: Array) -> Any:
        return module.init(key, example_rows, example_inputs)

    def call(net: Any, rows: Rows, inputs: Inputs, method: str | None = None) -> Array:
        return module.apply(net, rows, inputs, method=method)  # type: ignore[return-value]

    return _model(init_net, call, columns, size, features, table_scale)


def nnx_model(
    make: Callable[[nnx.Rngs], Any],
    columns: Mapping[str, Column],
    *,
    size: int = 16,
    features: str | None = None,
    table_scale: float = 0.1,
) -> Model:
    """An NNX module as a `Model`, through ``nnx.split`` and ``nnx.merge``.

    Args:
      make: ``make(rngs) -> module``; the module is called as ``module(rows, inputs) -> scores [n]``.
      columns, size, table_scale: as for `flax_model`.
      features: name of a method ``(rows, inputs) -> [n, D]``, for closed-form learners.

    Raises:
      MetarecError: from ``apply``, where the inputs lack a column.
    """
    graph, _ = nnx.split(jax.eval_shape(lambda: make(nnx.Rngs(0))))

    def init_net(key: Array) -> Any:
        return nnx.to_pure_dict(nnx.split(make(nnx.Rngs(key)))[1])

    def call(net: Any, rows: Rows, inputs: Inputs, method: str | None = None) -> Array:
        module = nnx.merge(graph, nnx.State(net))
        return getattr(module, method)(rows, inputs) if method else module(rows, inputs)

    return _model(init_net, call, columns, size, features, table_scale)


def _model(
    init_net: Callable[[Array], Any],
    call: Callable[..., Array],
    columns: Mapping[str, Column],
    size: int,
    features: str | None,
    table_scale: float,
) -> Model:
    tables = {name: Table(c.size, size, (name,)) for name, c in columns.items() if c.kind != "numeric"}

    def init(key: Array) -> Params:
        k_net, *keys = jax.random.split(key, 1 + len(tables))
        drawn = {
            n: table_scale * normal_rows(k, t.num_rows, size) for k, (n, t) in zip(keys, tables.items(), strict=True)
        }
        return {"tables": {n: rows.at[0].set(0.0) for n, rows in drawn.items()}, "net": init_net(k_net)}

    def lookup(params: Params, inputs: Inputs) -> Rows:
        missing = [name for name in columns if name not in inputs]
        if missing:
            raise MetarecError(
                f"the inputs lack columns of the model: {', '.join(missing)}; they have {', '.join(sorted(inputs))}; "
                "build the model from the columns of this data (Interactions.columns)"
            )
        return {name: _pooled(params["tables"][name], inputs[name]) for name in tables}

    def apply(params: Params, inputs: Inputs) -> Array:
        return call(params["net"], lookup(params, inputs), inputs)

    def vectors(params: Params, inputs: Inputs) -> Array:
        return call(params["net"], lookup(params, inputs), inputs, features)

    if features is None:
        return Model(init, apply, tables)
    num_features = jax.eval_shape(lambda key: vectors(init(key), _example(columns, size)[1]), jax.random.key(0)).shape[
        1
    ]
    return Model(init, apply, tables, vectors, num_features)


_BLOCK = 1 << 16


def normal_rows(key: Array, num_rows: int, size: int) -> Array:
    """Standard normal rows, `rows.rounded` of them.

    A large table is drawn in blocks: the random bits of the whole table would double its memory. The rows of a block
    are spaced evenly, so that the partitioner can give each device its part of every block, and of the table.
    """
    allocated = rounded(num_rows)
    if allocated <= _BLOCK:
        return jnp.pad(jax.random.normal(key, (num_rows, size)), ((0, allocated - num_rows), (0, 0)))
    count = min(_BLOCK, allocated & -allocated)  # the largest power of two that divides the rows

    def draw(k: Array, table: Array) -> Array:
        rows = jax.random.normal(jax.random.fold_in(key, k), (count, 1, size))
        return jax.lax.dynamic_update_slice(table, rows, (0, k, 0))

    parts = jnp.zeros((count, allocated // count, size))
    return jax.lax.fori_loop(0, allocated // count, draw, parts).reshape(allocated, size)


def _pooled(table: Array, ids: Array) -> Array:
    """Rows of ``ids [n]``; for ``ids [n, f]`` the mean row of the values that are not padding."""
    if ids.ndim == 1:
        return table[ids]
    real = (ids > 0).astype(table.dtype)
    return jnp.einsum("nfd,nf->nd", table[ids], real) / jnp.maximum(real.sum(1, keepdims=True), 1.0)


def _example(columns: Mapping[str, Column], size: int) -> tuple[dict[str, Array], dict[str, Array]]:
    """Rows and inputs of one example, for shapes."""
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "id": ((1,), jnp.int32),
        "categorical": ((1,), jnp.int32),
        "multi": ((1, 1), jnp.int32),
    }
    inputs = {
        n: jnp.zeros((1, c.size)) if c.kind == "numeric" else jnp.zeros(*shapes[c.kind]) for n, c in columns.items()
    }
    return {name: jnp.zeros((1, size)) for name, c in columns.items() if c.kind != "numeric"}, inputs


class Fields(nn.Module):
    """Base class of networks over fields: a row per column, by a linear map for numeric columns, and the mean.

    Column 0 of a row is a weight, the others are a vector.
    """

    kinds: Mapping[str, str]
    size: int

    def setup(self) -> None:
        self.mean = self.param("mean", nn.initializers.zeros, ())
        zeros, numeric = nn.initializers.zeros, [name for name, kind in self.kinds.items() if kind == "numeric"]
        self.maps = {name: nn.Dense(self.size, use_bias=False, kernel_init=zeros, name=name) for name in numeric}
        self.more()

    def more(self) -> None:
        """Set up further layers of a network."""

    def fields(self, rows: Rows, inputs: Inputs, side: str = "") -> list[Array]:
        names = [name for name in self.kinds if name.startswith(side)]
        return [self.maps[name](inputs[name]) if name in self.maps else rows[name] for name in names]

    def item_vectors(self, rows: Rows, inputs: Inputs) -> Array:
        return added(self.fields(rows, inputs, "item_"))[:, 1:]


def added(parts: Sequence[Array]) -> Array:
    """The sum of parts of one shape, or of leading axis 1."""
    return functools.reduce(jnp.add, parts)


class TwoSides(Fields):
    """Dot product of a user side and an item side, with biases; column 0 of every row is the bias."""

    def __call__(self, rows: Rows, inputs: Inputs) -> Array:
        u, v = added(self.fields(rows, inputs, "user_")), added(self.fields(rows, inputs, "item_"))
        return self.mean + u[:, 0] + v[:, 0] + jnp.sum(u[:, 1:] * v[:, 1:], axis=-1)


class Joint(nn.Module):
    """A dense layer over several parts, as if they were concatenated.

    Parts that all examples share (leading axis 1) are multiplied with their rows of the kernel separately, and once.
    """

    units: int

    @nn.compact
    def __call__(self, parts: Sequence[Array]) -> Array:
        sizes = [part.shape[-1] for part in parts]
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (sum(sizes), self.units))
        bias = self.param("bias", nn.initializers.zeros, (self.units,))
        terms, start = [], 0
        for _, run in itertools.groupby(parts, key=lambda part: part.shape[0]):
            together = list(run)
            x = together[0] if len(together) == 1 else jnp.concatenate(together, axis=-1)
            terms.append(x @ kernel[start : start + x.shape[-1]])
            start += x.shape[-1]
        return functools.reduce(jnp.add, terms) + bias[None]


class Tower(nn.Module):
    """All rows and numeric features concatenated, dense layers with ReLU, one linear output. No layers: linear."""

    kinds: Mapping[str, str]
    hidden: tuple[int, ...]

    def setup(self) -> None:
        self.layers = [Joint(units, name=f"dense_{k}") for k, units in enumerate(self.hidden)]
        self.out = Joint(1, name="out")

    def parts(self, rows: Rows, inputs: Inputs) -> list[Array]:
        return [rows[name] if name in rows else inputs[name] for name in self.kinds]

    def last_hidden(self, rows: Rows, inputs: Inputs) -> Array:
        parts = self.parts(rows, inputs)
        if not self.hidden:
            n = max(part.shape[0] for part in parts)
            return jnp.concatenate([jnp.broadcast_to(part, (n, part.shape[-1])) for part in parts], axis=-1)
        for layer in self.layers:
            parts = [nn.relu(layer(parts))]
        return parts[0]

    def __call__(self, rows: Rows, inputs: Inputs) -> Array:
        return self.out([self.last_hidden(rows, inputs)] if self.hidden else self.parts(rows, inputs))[:, 0]
