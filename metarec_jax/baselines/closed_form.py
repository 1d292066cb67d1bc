"""Baselines in closed form, which every table of results includes.

Each factory ``name(train, known, ...)`` returns a fitted `Method`. ``inputs["item_id"]`` identifies items; row 0, the
unknown item, gets the prior. Hyperparameters of `adapt` and `predict` are in ``params``, so that refitting with other
values does not compile again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, wraps
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse import csr_matrix

from metarec_jax.core import Array, Examples, Inputs, MetarecError, Method
from metarec_jax.data.catalogue import Catalogue
from metarec_jax.data.interactions import Interactions
from metarec_jax.evaluation.scoring import weighted_rows
from metarec_jax.factorization import (
    als_factors,
    bias_terms,
    gaussian_factors,
    implicit_als_factors,
    item_vectors,
    item_weights,
    neighbours,
    similarities,
)

Factory = Callable[..., Method]


def _ratings(train: Interactions, known: Catalogue, name: str, instead: str) -> np.ndarray:
    _check(train, known, name)
    if train.rating is None:
        raise MetarecError(f"{name} requires ratings, and the data is implicit feedback; use {instead}")
    return train.rating


def _check(train: Interactions, known: Catalogue, name: str) -> None:
    if not len(train):
        raise MetarecError(f"{name} requires interactions to fit, got none; use a training part with rows")
    if known.item_row.shape[0] != train.items.num_rows:
        raise MetarecError(
            f"the catalogue has {known.item_row.shape[0]} item rows, and the training data {train.items.num_rows}; "
            "make the catalogue from the same data"
        )


def _weighted(support: Examples) -> tuple[Array, Array]:
    """Targets, 0 in the padding, and weights."""
    return jnp.where(support.mask > 0, support.target, 0.0), support.mask


def _nothing(params: Any, support: Examples, key: Array) -> Any:
    return ()


def random(train: Interactions, known: Catalogue) -> Method:
    """A uniform random score between the lowest and the highest rating, from the key of `adapt` and the item id.

    The score of an unknown item depends on its position in the list, so that unknown items are not tied.
    """
    _check(train, known, "random")
    low, high = (0.0, 1.0) if train.rating is None else (float(train.rating.min()), float(train.rating.max()))
    return Method({"low": jnp.float32(low), "high": jnp.float32(high)}, _random_adapt, _random_predict)


def _random_adapt(params: Any, support: Examples, key: Array) -> Any:
    return {"key": key}


def _random_predict(params: Any, adapted: Any, inputs: Inputs) -> Array:
    ids = inputs["item_id"]
    name = jnp.where(ids > 0, ids, -1 - jnp.arange(ids.shape[0])).astype(jnp.uint32)
    draws = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(adapted["key"], i)))(name)
    return params["low"] + (params["high"] - params["low"]) * draws


def popularity(train: Interactions, known: Catalogue) -> Method:
    """log(1 + interactions of the item): a ranking score, not a rating, so MAE and RMSE do not apply."""
    _check(train, known, "popularity")
    count = np.bincount(train.item, minlength=train.items.num_rows)
    return Method({"score": jnp.asarray(np.log1p(count), jnp.float32)}, _nobody, _by_item, scores=_same_for_all)


def _nobody(params: Any, support: Examples, key: Array) -> Any:
    return {"user": jnp.zeros((), jnp.float32)}


def _same_for_all(params: Any, adapted: Any) -> Array:
    return adapted["user"][:, None] + params["score"][None]


def item_mean(train: Interactions, known: Catalogue, *, shrinkage: float = 0.0) -> Method:
    """The item's mean rating, (sum r + shrinkage mu) / (n + shrinkage); the global mean mu if it has none."""
    rating = _ratings(train, known, "item_mean", "popularity")
    mu = float(rating.mean(dtype=np.float64))
    count = np.bincount(train.item, minlength=train.items.num_rows) + shrinkage
    total = np.bincount(train.item, rating, minlength=train.items.num_rows) + shrinkage * mu
    score = np.where(count > 0, total / np.where(count > 0, count, 1), mu)
    return Method({"score": jnp.asarray(score, jnp.float32)}, _nothing, _by_item)


def _by_item(params: Any, adapted: Any, inputs: Inputs) -> Array:
    return params["score"][inputs["item_id"]]


def user_mean(train: Interactions, known: Catalogue) -> Method:
    """The mean of the support; the global mean if the support is empty."""
    rating = _ratings(train, known, "user_mean", "popularity")
    return Method({"mu": jnp.float32(rating.mean(dtype=np.float64))}, _user_mean_adapt, _user_mean_predict)


def _user_mean_adapt(params: Any, support: Examples, key: Array) -> Any:
    target, weight = _weighted(support)
    total = weight.sum()
    return {"mean": jnp.where(total > 0, (weight * target).sum() / jnp.where(total > 0, total, 1.0), params["mu"])}


def _user_mean_predict(params: Any, adapted: Any, inputs: Inputs) -> Array:
    return jnp.broadcast_to(adapted["mean"], inputs["item_id"].shape)


def bias(train: Interactions, known: Catalogue, *, reg_item: float = 5.0, reg_user: float = 2.0) -> Method:
    """mu + b_i + b_u; b_u of a new user is sum(r - mu - b_i) / (n + reg_user) over the support.

    Args:
      reg_item, reg_user: number of ratings without deviation that are added to each item and user.
    """
    _ratings(train, known, "bias", "popularity")
    return Method(_bias_params(train, reg_item, reg_user), _bias_adapt, _bias_predict)


def _bias_params(train: Interactions, reg_item: float, reg_user: float) -> dict[str, Array]:
    mu, item_bias, _ = bias_terms(train, reg_item=reg_item, reg_user=reg_user)
    return {"mu": jnp.float32(mu), "item_bias": jnp.asarray(item_bias), "reg_user": jnp.float32(reg_user)}


def _bias_adapt(params: Any, support: Examples, key: Array) -> Any:
    target, weight = _weighted(support)
    residual = (target - params["mu"] - params["item_bias"][support.inputs["item_id"]]) * weight
    return {"bias": residual.sum() / jnp.maximum(weight.sum() + params["reg_user"], 1e-12)}


def _bias_everywhere(params: Any, adapted: Any) -> Array:
    """`_bias_predict` of a batch of users for all items, ``[B, N]``."""
    return params["mu"] + params["item_bias"][None] + adapted["bias"][:, None]


def _bias_predict(params: Any, adapted: Any, inputs: Inputs) -> Array:
    return params["mu"] + params["item_bias"][inputs["item_id"]] + adapted["bias"]


def item_knn(
    train: Interactions,
    known: Catalogue,
    *,
    shrinkage: float = 20.0,
    shrinkage_predict: float = 0.1,
    top: int | None = None,
    dense_limit: int = 10_000,
) -> Method:
    """Item neighbours: bias + sum_j s_ij e_j / (sum_j s_ij + shrinkage_predict) over the support j; clicks: sum_j s_ij.

    s_ij = max(0, r_i . r_j / (|r_i| |r_j| + shrinkage)), where r_i is the item's column of residuals of the bias model
    (adjusted cosine), or of clicks; e_j is the residual of the support's rating.

    Args:
      shrinkage: shrinkage of similarities from few users, in squared ratings (ratings) or users (clicks).
      shrinkage_predict: shrinkage of predictions with little total similarity; ratings only.
      top: neighbours kept per item. None: all, as a dense matrix, for up to ``dense_limit`` item rows; else 200.

    Source: Sarwar et al., "Item-based Collaborative Filtering Recommendation Algorithms", 2001.
    """
    _check(train, known, "item_knn")
    if train.rating is None:
        values, params = np.ones(len(train), np.float32), {}
    else:
        mu, item_bias, user_bias = bias_terms(train)
        values = train.rating - np.float32(mu) - item_bias[train.item] - user_bias[train.user]
        params = _bias_params(train, 5.0, 2.0) | {"shrinkage": jnp.float32(shrinkage_predict)}
    if top is None and train.items.num_rows <= dense_limit:
        params["similar"] = jnp.asarray(similarities(train, values, shrinkage))
    else:
        ids, similar = neighbours(train, values, shrinkage, 200 if top is None else top)
        params |= {"neighbour": jnp.asarray(ids), "similar": jnp.asarray(similar), "of": _lists_with(ids, similar)}
    return Method(params, _knn_adapt, _knn_predict, scores=_knn_scores)


def _knn_adapt(params: Any, support: Examples, key: Array) -> Any:
    """The support sorted by item id, and the contribution of each item to the sums of a prediction: ``value [k, S]``.

    A repeated item occurs once, with its sum. Padding has id 0, which is not a neighbour of any item.
    """
    target, weight = _weighted(support)
    ids = jnp.where(weight > 0, support.inputs["item_id"], 0)
    order = jnp.argsort(ids)
    first = jnp.searchsorted(ids[order], ids[order])
    once = lambda values: jnp.zeros_like(values).at[:, first].add(values[:, order])  # noqa: E731
    if "mu" not in params:
        return {"id": ids[order], "value": once((weight * target)[None])}
    user = _bias_adapt(params, support, key)
    residual = target - _bias_predict(params, user, {"item_id": ids})
    return user | {"id": ids[order], "value": once(jnp.stack([weight, weight * residual]))}


def _knn_predict(params: Any, adapted: Any, inputs: Inputs) -> Array:
    items, ids, values, of_support = inputs["item_id"], adapted["id"], adapted["value"], params["similar"]
    if "neighbour" in params:
        found = params["neighbour"][items]
        place = jnp.minimum(jnp.searchsorted(ids, found), ids.shape[0] - 1)
        similar = of_support[items] * (ids[place] == found)
        sums = (similar[None] * values[:, place]).sum(-1)
    else:
        sums = (of_support[items[:, None], ids[None]][None] * values[:, None]).sum(-1)
    if "mu" not in params:
        return sums[0]
    return _bias_predict(params, adapted, inputs) + sums[1] / (sums[0] + params["shrinkage"])


def _knn_scores(params: Any, adapted: Any) -> Array:
    """Scores of all items for a batch of users: rows of the similarities, or a product with the sparse neighbours."""
    ids, values = adapted["id"], adapted["value"]
    if "neighbour" in params:
        sums = _from_neighbours(params["of"], ids, values)
    else:
        sums = weighted_rows(params["similar"], ids, values)
    if "mu" not in params:
        return sums[:, 0]
    return _bias_everywhere(params, adapted) + sums[:, 1] / (sums[:, 0] + params["shrinkage"])


def _lists_with(ids: np.ndarray, similar: np.ndarray) -> dict[str, Array]:
    """Inverted neighbour lists: for each item, the items that list it, with similarities; rows of a sparse matrix."""
    item, slot = np.nonzero(similar)
    entries = similar[item, slot], (ids[item, slot], item)
    lists = csr_matrix(entries, shape=(len(ids), len(ids)))
    return {name: jnp.asarray(getattr(lists, name)) for name in ("data", "indices", "indptr")}


def _from_neighbours(lists: Mapping[str, Array], ids: Array, values: Array) -> Array:
    """Sums over the neighbours in the support of similarity times value, ``[B, k, N]``: one sparse product.

    Args:
      lists: from `_lists_with`; ids: ``[B, S]``; values: ``[B, k, S]``.
    """
    users, sums, slots = values.shape
    rows = len(lists["indptr"]) - 1
    matrix = csr_matrix(tuple(np.asarray(lists[name]) for name in ("data", "indices", "indptr")), shape=(rows, rows))
    column = np.broadcast_to(np.asarray(ids)[:, None], values.shape).ravel()
    begins = np.arange(users * sums + 1, dtype=np.int32) * slots
    support = csr_matrix((np.ravel(values), column, begins), shape=(users * sums, rows))
    return jnp.asarray((support @ matrix).toarray().reshape(users, sums, rows))


_VECTORS_FROM = 4000
"""Item rows from which `ease` keeps vectors in place of a square matrix, if there are three times as many as users."""


def ease(
    train: Interactions,
    known: Catalogue,
    *,
    reg: float = 1000.0,
    dense_limit: int = 20_000,
) -> Method:
    """EASE: an item's score is a linear function of the other items that the user has, learned in closed form.

    Clicks: x_u B, the sum of the support's rows of B. Ratings: bias + e_u B, e_u the residuals of the support's ratings
    under the bias model, and B of the matrix of such residuals. B is what `factorization.item_weights` solves for:
    min |X - X B|^2 + reg |B|^2 with a zero diagonal.

    Args:
      reg: ridge penalty, in users (clicks) or squared ratings (ratings). Shorter supports require a larger one.
      dense_limit: maximum number of item rows of the square matrix and its inverse.

    Raises:
      MetarecError: there are more item rows than ``dense_limit``.

    Source: Steck, "Embarrassingly Shallow Autoencoders for Sparse Data", 2019.
    """
    _check(train, known, "ease")
    rows = train.items.num_rows
    if rows > dense_limit:
        raise MetarecError(
            f"ease requires a matrix of {rows} x {rows} items, and dense_limit is {dense_limit}; use item_knn, which "
            "keeps a few neighbours per item, or raise dense_limit"
        )
    if train.rating is None:
        values, params = np.ones(len(train), np.float32), {}
    else:
        mu, item_bias, user_bias = bias_terms(train)
        values = train.rating - np.float32(mu) - item_bias[train.item] - user_bias[train.user]
        params = _bias_params(train, 5.0, 2.0)
    if rows > _VECTORS_FROM and 3 * len(np.unique(train.user)) <= rows:
        vectors = item_vectors(train, values, reg)
        params["vectors"] = jnp.asarray(vectors)
        params["divisor"] = jnp.asarray(np.maximum(1 - np.square(vectors).sum(1), 1e-6))
    else:
        params["weights"] = jnp.asarray(item_weights(train, values, reg))
    return Method(params, _ease_adapt, _ease_predict, scores=_ease_scores)


def _ease_adapt(params: Any, support: Examples, key: Array) -> Any:
    """Ids and values of the support; padding has value 0."""
    target, weight = _weighted(support)
    ids = jnp.where(weight > 0, support.inputs["item_id"], 0)
    user, value = {}, weight * target
    if "mu" in params:
        user = _bias_adapt(params, support, key)
        value = weight * (target - _bias_predict(params, user, {"item_id": ids}))
    if "vectors" in params:
        user["vector"] = value @ params["vectors"][ids]
    return {**user, "id": ids, "value": value}


def _ease_predict(params: Any, adapted: Any, inputs: Inputs) -> Array:
    items, ids, value = inputs["item_id"], adapted["id"], adapted["value"]
    if "vectors" in params:
        own = ((items[:, None] == ids[None]) * value[None]).sum(1)
        total = _by_vectors(params["vectors"][items] @ adapted["vector"], own, params["divisor"][items])
    else:
        total = value @ params["weights"][ids[:, None], items[None]]
    return _bias_predict(params, adapted, inputs) + total if "mu" in params else total


def _ease_scores(params: Any, adapted: Any) -> Array:
    ids, value = adapted["id"], adapted["value"]
    if "vectors" in params:
        product = adapted["vector"] @ params["vectors"].T
        own = jnp.zeros_like(product).at[jnp.arange(len(ids))[:, None], ids].add(value)
        total = _by_vectors(product, own, params["divisor"][None])
    else:
        total = weighted_rows(params["weights"], ids, value[:, None])[:, 0]
    return _bias_everywhere(params, adapted) + total if "mu" in params else total


def _by_vectors(product: Array, own: Array, divisor: Array) -> Array:
    """Scores by `item_vectors`; ``own``: the support's value of the item itself, which does not count."""
    return (product - own * (1 - divisor)) / divisor


def als(
    train: Interactions,
    known: Catalogue,
    *,
    size: int = 16,
    reg: float = 5.0,
    reg_bias: float = 5.0,
    alpha: float = 10.0,
    iterations: int = 8,
    seed: int = 0,
) -> Method:
    """Matrix factorisation by ALS; a new user's factors and bias are folded in by the same normal equations.

    Ratings: [p, b] = (X^T X + R)^-1 X^T (r - mu - b_i), X = [q_i, 1] over the support, R = diag(reg, ..., reg_bias).
    Clicks: p = (Q^T Q + alpha X^T X + reg I)^-1 (1 + alpha) X^T 1, X = q_i over the support's positives.

    Args:
      size: dimension of a factor.
      reg, reg_bias: ridge penalty of the factors and of the biases; biases exist for ratings only.
      alpha: additional weight of a click over its absence; clicks only.
      iterations, seed: iterations and seed of the fit.
    """
    _check(train, known, "als")
    if train.rating is None:
        f = implicit_als_factors(train, size=size, reg=reg, alpha=alpha, iterations=iterations, seed=seed)
        gram = f.item_factors.T @ f.item_factors
        params = {"item": jnp.asarray(f.item_factors), "gram": jnp.asarray(gram), "alpha": jnp.float32(alpha)}
        params["reg"] = jnp.float32(reg)
        return Method(params, _implicit_fold_in, _implicit_predict, scores=_implicit_scores)
    f = als_factors(train, size=size, reg=reg, reg_bias=reg_bias, iterations=iterations, seed=seed)
    ridge = np.array([reg] * size + [reg_bias], np.float32)
    params = {"mu": jnp.float32(f.mu), "item_bias": jnp.asarray(f.item_bias), "item": jnp.asarray(f.item_factors)}
    params["reg"] = jnp.asarray(ridge)
    return Method(params, _fold_in, _als_predict, scores=_als_scores)


def _fold_in(params: Any, support: Examples, key: Array) -> Any:
    target, weight = _weighted(support)
    ids = support.inputs["item_id"]
    x = jnp.concatenate([params["item"][ids], jnp.ones((ids.shape[0], 1))], axis=1)
    wanted = (target - params["mu"] - params["item_bias"][ids]) * weight
    left = x.T @ (x * weight[:, None]) + jnp.diag(params["reg"])
    solved = jax.scipy.linalg.solve(left, x.T @ wanted, assume_a="pos")
    return {"factors": solved[:-1], "bias": solved[-1]}


def _als_predict(params: Any, adapted: Any, inputs: Inputs) -> Array:
    return _bias_predict(params, adapted, inputs) + params["item"][inputs["item_id"]] @ adapted["factors"]


@jax.jit
def _als_scores(params: Any, adapted: Any) -> Array:
    return _bias_everywhere(params, adapted) + adapted["factors"] @ params["item"].T


def _implicit_fold_in(params: Any, support: Examples, key: Array) -> Any:
    target, weight = _weighted(support)
    x, liked = params["item"][support.inputs["item_id"]], (weight * target)[:, None]
    left = params["gram"] + params["alpha"] * x.T @ (x * liked) + params["reg"] * jnp.eye(x.shape[1])
    return {"factors": jax.scipy.linalg.solve(left, (1 + params["alpha"]) * (x * liked).sum(0), assume_a="pos")}


def _implicit_predict(params: Any, adapted: Any, inputs: Inputs) -> Array:
    return params["item"][inputs["item_id"]] @ adapted["factors"]


@jax.jit
def _implicit_scores(params: Any, adapted: Any) -> Array:
    return adapted["factors"] @ params["item"].T


def gaussian_prior(
    train: Interactions,
    known: Catalogue,
    *,
    size: int = 16,
    reg: float = 20.0,
    reg_item: float = 3.0,
    unseen: float = 0.5,
    iterations: int = 6,
    seed: int = 0,
) -> Method:
    """Gaussian prior of a user's ratings, fitted by EM; a new user's offset and factors are their exact posterior mean.

    [z, b] = (X^T S^-1 X + R)^-1 X^T S^-1 (r - mu - m_i), X = [V_i, 1] over the support, S its noise and R the precision
    of the prior, diag(1, ..., 1, 1 / offset_variance): `als` with every penalty fitted.

    Args:
      size, reg, reg_item, iterations, seed: as in `factorization.gaussian_factors`.
      unseen: noise of a rating of an unknown item, in units of that of a typical item.

    Sources: as there.
    """
    _ratings(train, known, "gaussian_prior", "als")
    f = gaussian_factors(train, size=size, reg=reg, reg_item=reg_item, iterations=iterations, seed=seed)
    noise = f.noise.copy()
    noise[0] *= unseen
    precision = np.array([1.0] * size + [1 / f.offset_variance], np.float32)
    params = {"mu": jnp.float32(f.mu), "item_bias": jnp.asarray(f.item_mean), "item": jnp.asarray(f.loadings)}
    params |= {"noise": jnp.asarray(noise), "reg": jnp.asarray(precision)}
    return Method(params, _posterior_mean, _als_predict, scores=_als_scores)


def _posterior_mean(params: Any, support: Examples, key: Array) -> Any:
    ids = support.inputs["item_id"]
    return _fold_in(params, support._replace(mask=support.mask / params["noise"][ids]), key)


BASELINES: Mapping[str, Factory] = MappingProxyType(
    {f.__name__: f for f in (random, popularity, item_mean, user_mean, bias, item_knn, ease, als, gaussian_prior)}
)
"""The factories by name. ``item_mean``, ``user_mean``, ``bias`` and ``gaussian_prior`` require ratings."""


def liked_rows(train: Interactions, liked_from: float) -> Interactions:
    """The ratings of at least ``liked_from``, each a click; the vocabularies are those of ``train``."""
    assert train.rating is not None, "asked of ratings"
    return replace(train.take(train.rating >= liked_from), rating=None)


def of_liked(factory: Factory, liked_from: float) -> Factory:
    """A factory of ``factory`` for clicks, fitted on the liked ratings: lists from ratings. Its scores are no ratings.

    Ratings of at least ``liked_from`` are clicks, in training and in the support; the others do not count.

    Raises:
      MetarecError: from the new factory, if no rating of the training part is that high, or there are no ratings.
    """
    name = f"{factory.__name__}_liked"

    @wraps(factory)
    def fit(train: Interactions, known: Catalogue, **settings: Any) -> Method:
        _ratings(train, known, name, factory.__name__)
        rows = liked_rows(train, liked_from)
        if not len(rows):
            raise MetarecError(
                f"{name}: the training part has no rating of {liked_from:g} or more; choose a lower threshold"
            )
        method = factory(rows, known, **settings)
        adapt, predict, scores = _of_clicks(method.adapt, method.predict, method.scores)
        params = {"clicks": method.params, "liked_from": jnp.float32(liked_from)}
        return Method(params, adapt, predict, scores=None if method.scores is None else scores)

    fit.__name__ = name
    return fit


@cache  # the same functions for every fit, so that they compile once
def _of_clicks(adapt: Any, predict: Any, scores: Any) -> tuple[Any, Any, Any]:
    def adapt_to_liked(params: Any, support: Examples, key: Array) -> Any:
        liked = support.mask * (support.target >= params["liked_from"])
        return adapt(params["clicks"], Examples(support.inputs, jnp.ones_like(support.target), liked), key)

    return (
        adapt_to_liked,
        lambda params, adapted, inputs: predict(params["clicks"], adapted, inputs),
        lambda params, adapted: scores(params["clicks"], adapted),
    )


LISTS: Mapping[str, Factory] = MappingProxyType({f"{f.__name__}_liked": f for f in (item_knn, ease, als)})
"""The factories for clicks that make lists from ratings (`of_liked`), by the name of the list."""
