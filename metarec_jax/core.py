"""The nouns: examples, tasks, tables, models, learners.

Shapes: T tasks, n examples of a task (S support, Q query), D embedding size, f values of a feature.
Everything here is a pure function of arrays or a tuple of such functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax

Array = jax.Array
Params = Any
"""A pytree with a mapping ``params["tables"]`` of ``[num_rows, size]`` arrays (or of more rows: `rows.rounded`).
Training does not change ``params["fixed"]``, if there is such a part; the rest is small and dense. Training sets a
scalar ``params["progress"]`` (`PROGRESS`), if there is one, to the share of its steps that are done."""
PROGRESS = "progress"
Inputs = Mapping[str, Array]
"""Columns of examples: ``int32 [n]`` ids, ``int32 [n, f]`` multi-valued ids padded with 0, or ``float32 [n, f]``.
A column that all examples share (the user's) may have leading axis 1."""


class Examples(NamedTuple):
    """`n` interactions. ``mask`` is 1.0 for an example, 0.0 for padding; padding never changes a result."""

    inputs: Inputs
    target: Array
    mask: Array


class Task(NamedTuple):
    """One user (or one cold item, or one domain): the examples to adapt to, and those to predict."""

    support: Examples
    query: Examples


class Table(NamedTuple):
    """An embedding table. Row 0 is the unknown id; in a multi-valued column id 0 is padding.

    Attributes:
      num_rows: number of rows, the unknown row included.
      size: length of a row.
      columns: the input columns that index this table.
      adapted: whether the inner loop may change its rows. Where it may not, repeated ids need not share one row in a
        row view, which is cheaper and gives the same gradient.
    """

    num_rows: int
    size: int
    columns: tuple[str, ...]
    adapted: bool = True


class Column(NamedTuple):
    """Kind of an input column; ``size`` is the rows of an id or categorical column, and the width of a numeric one."""

    kind: Literal["id", "categorical", "multi", "numeric"]
    size: int


class Model(NamedTuple):
    """A scoring function whose tables are plain arrays that the engine owns.

    Attributes:
      init: ``init(key) -> params``, a dict ``{"tables": {name: [num_rows, size]}, "net": ...}``.
      apply: ``apply(params, inputs) -> scores [n]``.
      tables: the tables that the engine may gather, by name.
      features: ``features(params, inputs) -> [n, D]``, item vectors in which the score is linear, with the user's
        vector as coefficients; closed-form learners solve for that vector. None where the model has no such form.
      num_features: D of ``features``.
      adapts: path prefixes of the parameters that inner gradient steps move by default, such as
        ``("tables/user_id",)`` in a dot product; None for all.
    """

    init: Callable[[Array], Params]
    apply: Callable[[Params, Inputs], Array]
    tables: Mapping[str, Table]
    features: Callable[[Params, Inputs], Array] | None = None
    num_features: int = 0
    adapts: tuple[str, ...] | None = None


class Learner(NamedTuple):
    """A meta-learner, as four pure functions. The engine, the evaluator and the recommender treat all alike.

    Attributes:
      init: ``init(key) -> params``, the meta-parameters.
      adapt: ``adapt(params, support, key) -> adapted``: the task's changes, never of the size of the catalogue.
      predict: ``predict(params, adapted, inputs) -> scores [n]``: scores of the meta-parameters with these changes.
      loss: ``loss(params, task, key) -> (loss, metrics)``: the meta-objective of ONE task; metrics are scalars.
      tables: the tables that the engine may gather, by name.
      user_rows: how users enter training tasks: "prior": as new ones do, with the unknown row; "own": with rows of
        their own, which ``loss`` reads.
    """

    init: Callable[[Array], Params]
    adapt: Callable[[Params, Examples, Array], Any]
    predict: Callable[[Params, Any, Inputs], Array]
    loss: Callable[[Params, Task, Array], tuple[Array, Mapping[str, Array]]]
    tables: Mapping[str, Table]
    user_rows: Literal["prior", "own"] = "prior"


class Method(NamedTuple):
    """A fitted method, which `evaluate` compares and `Recommender` serves: a learner or a baseline.

    Attributes:
      params: the (meta-)parameters.
      adapt, predict: as in `Learner`.
      tables: as in `Learner`, for a method that can run on row views; empty where it cannot, or that is unknown.
      rank: ``rank(params, adapted, inputs) -> [n]``: the scores that order lists of the catalogue, where ``predict``
        gives ratings and lists have another order; None where ``predict`` orders lists too.
      scores: ``scores(params, adapted) -> [B, rows]``: the scores of every row of the item table for a batch of users,
        with leading axis B in each leaf of ``adapted``; equal to those of ``rank``, or of ``predict`` without one, by
        one product. Not traced: it may compute on the host. None where chunks of items are as fast.
    """

    params: Params
    adapt: Callable[[Params, Examples, Array], Any]
    predict: Callable[[Params, Any, Inputs], Array]
    tables: Mapping[str, Table] = MappingProxyType({})
    scores: Callable[[Params, Any], Any] | None = None
    rank: Callable[[Params, Any, Inputs], Array] | None = None

    @property
    def orders(self) -> Callable[[Params, Any, Inputs], Array]:
        """``rank``, or ``predict`` where there is none."""
        return self.predict if self.rank is None else self.rank


class MetarecWarning(UserWarning):
    """A note for a Python user on data that was read: which rows were dropped, and how many."""


class MetarecError(Exception):
    """Bad input, in one message: what was seen, what was expected, one thing to do. The command line exits with 2."""
