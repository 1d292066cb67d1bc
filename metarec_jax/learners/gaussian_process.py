"""A user is a draw of a Gaussian process over items; its kernels come from all users, its few weights are meta-learned.

The query is predicted by ``m(q) + k(q, S) (k(S, S) + D)^-1 (r - m(S))``. Mean and kernels are counted from the ratings
of all users; only their weights are learned, some twenty numbers, for which a few hundred users are enough. While they
are learned, a user's own ratings are subtracted from all counts: otherwise the weight of a kernel that has seen the
answer would become too large.

Source: Rasmussen and Williams, "Gaussian Processes for Machine Learning", 2006, chapters 2 and 5; the meta-learning
view: Harrison et al., "Meta-Learning Priors for Efficient Online Bayesian Regression", 2018.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse

from metarec_jax import losses
from metarec_jax.core import Array, Column, Examples, Inputs, Learner, MetarecError, Params, Task
from metarec_jax.data.interactions import Interactions
from metarec_jax.factorization import bias_terms
from metarec_jax.learners._starts import content_blocks, regress
from metarec_jax.options import Bounds, bounded

DENSE_LIMIT = 10_000
"""Largest number of item rows for which square matrices are computed."""
_GROUPS = 1000
"""Largest number of values of a user feature by which users are grouped: two numbers are kept per value and item."""


@bounded
def gaussian_process(
    columns: Mapping[str, Column],
    *,
    loss: Callable[..., Array] = losses.mse,
    dense_limit: Annotated[int, Bounds(1)] = DENSE_LIMIT,
) -> Learner:
    """Meta-train the weights of a mean and of kernels that `gaussian_process_start` counts. For ratings.

    Kernels of items i, j, each with a learned weight: a constant (the user's bias); the products of residuals of users
    who rated both, scaled by the items' norms or by their numbers of ratings; the number of users who rated both;
    products of popularity and of mean; shared values of each categorical item feature; closeness in each numeric one.
    The mean is the item's, shrunk towards a regression on its content, plus the mean deviation of users with the same
    features, plus the closeness of the item to all that the user has rated.

    It is trained on tasks of users with rows of their own (`core.Learner.user_rows`; ``task_source(...,
    user_rows="own")``): a user with a row has been counted, and ``loss`` takes out what this user gave. ``adapt`` and
    ``predict`` treat every user as new.

    Args:
      columns: columns of the data (`Interactions.columns`). Item features are used, and categorical user features of
        up to 1,000 values.
      loss: loss of the query, ``loss(scores [n], target [n], where=[n]) -> scalar``.
      dense_limit: largest number of item rows; two matrices of item rows squared are kept.

    Returns:
      A learner without tables: ``params["weights"]`` is learned, ``params["fixed"]`` is counted, and 0 before
      `gaussian_process_start`.

    Raises:
      MetarecError: more item rows than ``dense_limit``.
    """
    rows = columns["item_id"].size
    if rows > dense_limit:
        raise MetarecError(
            f"gaussian_process keeps two matrices of item rows squared; there are {rows} item rows, and dense_limit is "
            f"{dense_limit}; raise dense_limit, or use ridge"
        )

    def init(key: Array) -> Params:
        return {"tables": {}, "weights": _weights(columns), "fixed": _nothing_counted(columns)}

    def meta_loss(params: Params, task: Task, key: Array) -> tuple[Array, dict[str, Array]]:
        value = task_loss(params["weights"], params["fixed"], task, loss=loss)
        return value, {"query_loss": value}

    return Learner(init, adapt, predict, meta_loss, {}, user_rows="own")


def gaussian_process_start(params: Params, train: Interactions, *, seed: int = 0) -> Params:
    """Parameters of a `gaussian_process` with mean and kernels counted on ``train`` (`counted`); ``seed`` is not used.

    Raises:
      MetarecError: implicit feedback, nothing to count, or data with other columns than the learner's.
    """
    if train.rating is None:
        raise MetarecError("gaussian_process requires ratings, and the data has clicks; use ridge or logistic")
    statistics = counted(train)
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (statistics, params["fixed"])]
    if shapes[0] != shapes[1]:
        raise MetarecError(
            "gaussian_process_start got data with other users, items or features than those of the learner; build the "
            "learner from the columns of this data"
        )
    return {**params, "fixed": statistics}


def counted(train: Interactions) -> Params:
    """The statistics of which mean and kernels are computed.

    Returns:
      ``gram[i, j] = sum_u e_ui e_uj`` of the residuals e of the bias model, ``pairs[i, j]`` the users who rated both,
      both ``[items, items]``; ``mu``, ``item_bias``, ``user_bias`` of the bias model; ``rest [items]`` the sum of an
      item's ratings less ``mu``, users' biases and the regression on its content; ``content``: that regression's
      coefficients, by feature value; ``groups``: by user feature and its value, the same sums and the counts per item,
      ``[values, items]``.

    Raises:
      MetarecError: the data has no rows.
    """
    if not len(train):
        raise MetarecError("gaussian_process requires ratings to count, got none; give training data with rows")
    assert train.rating is not None
    mu, item_bias, user_bias = bias_terms(train)
    shape = (train.users.num_rows, train.items.num_rows)
    residual = train.rating - np.float32(mu) - item_bias[train.item] - user_bias[train.user]
    residuals = sparse.csr_matrix((residual, (train.user, train.item)), shape=shape)
    rated = sparse.csr_matrix((np.ones(len(train), np.float32), (train.user, train.item)), shape=shape)
    count = np.bincount(train.item, minlength=shape[1])
    level = np.bincount(train.item, train.rating - mu - user_bias[train.user], minlength=shape[1])
    names, blocks = content_blocks(train)
    numeric = {n: f for n, f in train.item_features.items() if f.vocabulary is None}
    columns = [sparse.csr_matrix(f.values.reshape(shape[1], -1).astype(np.float64)) for f in numeric.values()]
    weight = count / (count + 5.0)
    fit, base, parts = regress([*blocks, *columns], (level / np.maximum(count, 1))[:, None], weight, 2.0)
    content = dict(zip([*names, *numeric], (jnp.asarray(part[:, 0], jnp.float32) for part in parts), strict=True))
    rest = np.where(count > 0, level - count * fit[:, 0], 0.0)
    groups = {}
    for name, feature in train.user_features.items():
        if feature.vocabulary is not None and feature.values.ndim == 1 and feature.vocabulary.num_rows <= _GROUPS:
            values = feature.values[train.user]
            at, size = (values, train.item), (feature.vocabulary.num_rows, shape[1])
            beyond = train.rating - np.float32(mu) - user_bias[train.user] - fit[train.item, 0]
            sums = sparse.csr_matrix((beyond, at), shape=size).toarray()
            ones = sparse.csr_matrix((np.ones_like(beyond), at), shape=size).toarray()
            groups[name] = {"sum": jnp.asarray(sums), "count": jnp.asarray(ones)}
    popularity = np.log1p(count[count > 0])
    statistics = {
        "gram": (residuals.T @ residuals).toarray(),
        "pairs": (rated.T @ rated).toarray(),
        "rest": rest,
        "item_bias": item_bias,
        "user_bias": user_bias,
        "mu": mu,
        "base": base[0],
        "popularity": np.array([popularity.mean(), popularity.std() + 1e-3]),
    }
    arrays = {name: jnp.asarray(a, jnp.float32) for name, a in statistics.items()}
    return arrays | {"content": content, "groups": groups}


def _grouping(columns: Mapping[str, Column]) -> list[str]:
    """User features by whose values users are grouped."""
    sides = {name: c for name, c in columns.items() if name.startswith("user_") and name != "user_id"}
    return [name for name, c in sides.items() if c.kind == "categorical" and c.size <= _GROUPS]


def _item_features(columns: Mapping[str, Column]) -> dict[str, Column]:
    return {name: c for name, c in columns.items() if name.startswith("item_") and name != "item_id"}


def _nothing_counted(columns: Mapping[str, Column]) -> Params:
    """The result of `counted` without any rating."""
    items, users = columns["item_id"].size, columns["user_id"].size
    shapes = {
        "gram": (items, items),
        "pairs": (items, items),
        "rest": (items,),
        "item_bias": (items,),
        "user_bias": (users,),
        "mu": (),
        "base": (),
        "popularity": (2,),
        "content": {name: (column.size,) for name, column in _item_features(columns).items()},
        "groups": {n: dict.fromkeys(("sum", "count"), (columns[n].size, items)) for n in _grouping(columns)},
    }
    empty = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda shape: isinstance(shape, tuple))
    return {**empty, "popularity": jnp.array([0.0, 1.0])}


def _weights(columns: Mapping[str, Column]) -> Params:
    """Weights before learning; those that must be positive are logarithms."""
    content, groups = _item_features(columns), _grouping(columns)
    numeric = [name for name, column in content.items() if column.kind == "numeric"]
    kernels = {"constant": -1.5, "gram": -0.7, "covariance": -2.0, "pairs": -1.0, "popularity": -3.0, "mean": -3.0}
    kernels |= dict.fromkeys(content, -2.0)
    shrinkage = {"gram": 2.5, "covariance": 2.5, "pairs": 2.0, "rest": 1.5} | dict.fromkeys(groups, 3.0)
    weights = {
        "kernels": kernels,
        "shrinkage": shrinkage,
        "mean": {"content": 1.0, "rest": 1.0, "popularity": 0.0, "near": 0.0, **dict.fromkeys(groups, 0.5)},
        "noise": 0.0,
        "unknown": {"noise": -2.0, "content": 0.0},
        "length": dict.fromkeys(numeric, 0.0),
    }
    return jax.tree.map(jnp.float32, weights)


def adapt(params: Params, support: Examples, key: Array) -> Params:
    """The support's items and the weight of each in every prediction."""
    return _condition(params["weights"], params["fixed"], support, None)


def predict(params: Params, adapted: Params, inputs: Inputs) -> Array:
    """Posterior means ``[n]``."""
    return _posterior(params["weights"], params["fixed"], adapted, inputs, None)


def task_loss(weights: Params, statistics: Params, task: Task, *, loss: Callable[..., Array]) -> Array:
    """Loss of a user's query; ratings of a user who was counted, and so has a row, are subtracted from the counts."""
    own_s, own_q = (_own(statistics, part) for part in (task.support, task.query))
    adapted = _condition(weights, statistics, task.support, own_s)
    scores = _posterior(weights, statistics, adapted, task.query.inputs, own_q)
    return loss(scores, task.query.target, where=task.query.mask)


def _own(statistics: Params, part: Examples) -> tuple[Array, Array]:
    """The user's share in the statistics of each item: a rating less mu and the user's bias, and the count 1; both 0
    where the user or the item is unknown."""
    user, item = part.inputs["user_id"], part.inputs["item_id"]
    there = jnp.where((user > 0) & (item > 0) & (part.mask > 0), 1.0, 0.0)
    level = part.target - statistics["mu"] - statistics["user_bias"][user]
    return jnp.where(there > 0, level, 0.0), there


def _sides(weights: Params, statistics: Params, inputs: Inputs, own: tuple[Array, Array] | None) -> Params:
    """For each item ``[n]``, the terms of its mean and of its kernels with others."""
    item = inputs["item_id"]
    level, there = (jnp.zeros(item.shape),) * 2 if own is None else own
    residual = level - there * statistics["item_bias"][item]
    count = statistics["pairs"][item, item] - there
    square = statistics["gram"][item, item] - residual**2
    center, scale = statistics["popularity"]
    popular = jnp.where(item > 0, (jnp.log1p(count) - center) / scale, 0.0)
    content, columns = statistics["base"] * jnp.ones(item.shape), {}
    for name, coefficients in statistics["content"].items():
        x = inputs[name]
        if jnp.issubdtype(x.dtype, jnp.integer):
            x = x[:, None] if x.ndim == 1 else x
            real = (x > 0).astype(jnp.float32)
            content += (coefficients[x] * real).sum(1) / jnp.maximum(real.sum(1), 1.0)
        else:
            content += x @ coefficients
        columns[name] = x
    beyond = level - there * content
    shrinkage = {name: jnp.exp(value) for name, value in weights["shrinkage"].items()}
    share = weights["mean"]
    rest = (statistics["rest"][item] - beyond) / (count + shrinkage["rest"])
    deviation = share["content"] * content + share["rest"] * rest
    for name, group in statistics["groups"].items():
        value = inputs[name][0]
        members = group["count"][value, item] - there
        total = group["sum"][value, item] - beyond - members * rest
        deviation += jnp.where(value > 0, share[name] * total / (members + shrinkage[name]), 0.0)
    return {
        "item": item,
        "columns": columns,
        "residual": residual,
        "there": there,
        "popularity": popular,
        "mean": deviation,
        "prior": statistics["mu"] + deviation + share["popularity"] * popular,
        "gram": 1 / jnp.sqrt(jnp.maximum(square, 0.0) + shrinkage["gram"]),
        "covariance": 1 / jnp.sqrt(count + shrinkage["covariance"]),
        "pairs": 1 / jnp.sqrt(count + shrinkage["pairs"]),
        "content": jnp.where(item > 0, 1.0, jnp.exp(weights["unknown"]["content"])),
    }


def _kernel(weights: Params, statistics: Params, a: Params, b: Params) -> tuple[Array, Array]:
    """``k(a, b)``, and the closeness of the items by the users who rated them, both ``[n, m]``."""
    outer = lambda x, y: x[:, None] * y[None]  # noqa: E731
    scale = {name: jnp.exp(value) for name, value in weights["kernels"].items()}
    at = (a["item"][:, None], b["item"][None])
    gram = statistics["gram"][at] - outer(a["residual"], b["residual"])
    near = (statistics["pairs"][at] - outer(a["there"], b["there"])) * outer(a["pairs"], b["pairs"])
    total = scale["constant"] + scale["pairs"] * near
    total += gram * (scale["gram"] * outer(a["gram"], b["gram"]))
    total += gram * (scale["covariance"] * outer(a["covariance"], b["covariance"]))
    for name in ("popularity", "mean"):
        total += scale[name] * outer(a[name], b[name])
    both = outer(a["content"], b["content"])
    for name, x in a["columns"].items():
        y = b["columns"][name]
        alike = _near(x, y, weights["length"][name]) if name in weights["length"] else _shared(x, y)
        total += scale[name] * both * alike
    return total, near


def _shared(x: Array, y: Array) -> Array:
    """Number of shared values of ``x [n, f]`` and ``y [m, f]`` over the root of their counts; 0 is not a value."""
    same = (x[:, None, :, None] == y[None, :, None, :]) & (x > 0)[:, None, :, None]
    counts = [jnp.maximum((z > 0).sum(1), 1).astype(jnp.float32) for z in (x, y)]
    return same.sum((2, 3)) / jnp.sqrt(counts[0][:, None] * counts[1][None])


def _near(x: Array, y: Array, log_length: Array) -> Array:
    """``exp(-|x_i - y_j|^2 / (2 length^2))``."""
    return jnp.exp(-jnp.square(x[:, None] - y[None]).sum(-1) / (2 * jnp.exp(2 * log_length)))


def _condition(weights: Params, statistics: Params, support: Examples, own: Any) -> Params:
    sides = _sides(weights, statistics, support.inputs, own)
    mask = support.mask
    kernel, near = _kernel(weights, statistics, sides, sides)
    near = near * mask[None] * (1 - jnp.eye(mask.shape[0]))
    level = jax.lax.rsqrt(jnp.maximum(mask.sum(), 1.0))
    prior = sides["prior"] + weights["mean"]["near"] * near.sum(1) * level
    noise = jnp.exp(weights["noise"]) * jnp.where(sides["item"] > 0, 1.0, 1 + jnp.exp(weights["unknown"]["noise"]))
    left = kernel * mask[:, None] * mask[None] + jnp.diag(jnp.where(mask > 0, noise, 1.0))
    right = jnp.where(mask > 0, support.target - prior, 0.0)
    solved = jax.scipy.linalg.solve(left, right, assume_a="pos")
    return {"sides": sides, "weight": solved, "mask": mask, "level": level}


def _posterior(weights: Params, statistics: Params, adapted: Params, inputs: Inputs, own: Any) -> Array:
    sides = _sides(weights, statistics, inputs, own)
    kernel, near = _kernel(weights, statistics, sides, adapted["sides"])
    near = (near * adapted["mask"][None]).sum(1) * adapted["level"]
    return sides["prior"] + weights["mean"]["near"] * near + kernel @ (adapted["weight"] * adapted["mask"])
