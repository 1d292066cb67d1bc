"""The weights of a `mixture`, learned on validation tasks: those of ratings by least absolute deviations, those of
lists by the likelihood of what is liked; each compared with its best member on tasks that the weights were not learned
on, and replaced by it where the mean is no better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.optimize import nnls

from metarec_jax.core import Array, Method
from metarec_jax.data.catalogue import Catalogue
from metarec_jax.data.tasks import TaskSet
from metarec_jax.evaluation import metrics
from metarec_jax.evaluation.scoring import batch_size, list_scores, query_scores
from metarec_jax.learners.mixture import FEW, Weights, bounds, mixture

_SHOWN = (None, 20, 5, 1)
"""Support sizes, None for the whole, at which the weights of ratings are learned; lists use the first and the third."""
_LISTED = 300
"""Most tasks of a scenario on which the weights of lists are learned."""
_CANDIDATES = 500
"""Items per list on which they are learned: the best by the mean of all members."""
_SHRINK = 10.0
"""Strength with which weights of ratings are drawn to equal weights of the three best members, in squared errors."""
_PLACE, _LISTS = 10, 0.02
"""In this share of the lists of all items a new item is among the first ones, this many."""
_LEAST = 0.02
"""Smallest share of a mean that a member keeps."""


def mix(
    methods: Mapping[str, Method],
    tasks: Mapping[str, TaskSet],
    known: Catalogue,
    *,
    rates: Sequence[str],
    ranks: Sequence[str],
    rating_range: tuple[float, float] | None,
    liked_from: float,
) -> Method:
    """A `mixture` of fitted methods with weights learned on validation tasks; without any, the first name of each list.

    Args:
      methods: fitted methods by name, of which none saw these tasks.
      tasks: validation tasks by scenario.
      known: the catalogue.
      rates: names of the methods that predict ratings; empty for clicks.
      ranks: names of the methods that order lists.
      rating_range: lowest and highest rating; None for clicks.
      liked_from: target from which an item of the query is liked.
    """
    batch = batch_size(max(1, sum(len(one) for one in tasks.values())))
    ratings = None
    if rates and rating_range is not None:
        blend = {}
        if tasks:
            members = {name: methods[name] for name in rates}
            x, y, few, is_known, task, item = _rated(members, tasks, known, rating_range, batch)
            for group, rows in ((1, is_known), (0, ~is_known)):
                if rows.any():
                    cluster = task if group else item  # new users are held out, or new items, of which there are few
                    blend[group] = _rating_weights(x[rows], y[rows], few[rows], cluster[rows], rating_range)
        alone = {1: np.tile(np.eye(len(rates))[0], (2, 1))}
        ratings = _weights(list(rates), blend or alone, np.ones(len(rates)))
    found: dict[int, np.ndarray] = {}
    scale = np.ones(len(ranks))
    for group, scenarios in ((1, ("user_cold", "warm")), (0, ("item_cold", "both_cold"))):
        parts = [_sample(tasks[name]) for name in scenarios if name in tasks]
        lists = [
            _listed({n: methods[n] for n in ranks}, part, known, liked_from, group == 0, shown, batch)
            for part in parts
            for shown in (None, 5)
        ]
        lists = [one for one in lists if len(one.score)]
        if not lists:
            continue
        every = _Lists(*map(np.concatenate, zip(*lists, strict=True)))
        if group == 1 or not found:
            scale = np.maximum(np.nanstd(np.where(np.isfinite(every.score), every.score, np.nan), axis=(0, 1)), 1e-6)
        found[group] = _list_weights(every._replace(score=every.score / scale), list(ranks))
    if found:
        lists_of = _weights(list(ranks), found, scale)
    else:
        lists_of = Weights({ranks[0]: np.ones((2, 2))}, {ranks[0]: 1.0})
    used = {*lists_of.weight, *(ratings.weight if ratings else ())}
    chosen = {name: method for name, method in methods.items() if name in used}
    made = mixture(chosen, ratings, lists_of, rating_range=rating_range)
    offset = _place_of_new_items(made, tasks, known, batch)
    return mixture(chosen, ratings, lists_of, rating_range=rating_range, new_items=offset)


def _place_of_new_items(made: Method, tasks: Mapping[str, TaskSet], known: Catalogue, batch: int) -> float:
    """What to add to the rank of new items, so that one of them is among the first ten in 1 of 50 lists of all items.

    No validation task asks for known and new items at once, so that how the two compare cannot be learned; and without
    features new items are all alike, so that they would fill a list. Lists of new items alone do not depend on it.
    """
    new = np.asarray(known.item_row) == 0
    new[0] = False
    part = next((tasks[name] for name in ("user_cold", "warm") if name in tasks), None)
    if part is None or not new.any() or new.all():
        return 0.0
    part, gaps = _sample(part, 64), []
    for _, scores in list_scores(made, part, known, np.zeros(len(part), bool), batch):
        of_known = np.sort(np.where(new, -np.inf, scores), axis=1)[:, ::-1]
        last = np.minimum(_PLACE, np.isfinite(of_known).sum(1)) - 1
        best = np.where(new, scores, -np.inf).max(1)
        gaps.append(np.take_along_axis(of_known, last[:, None], 1)[:, 0] - best)
    gap = np.concatenate(gaps)
    return float(np.quantile(gap[np.isfinite(gap)], _LISTS)) if np.isfinite(gap).any() else 0.0


def _weights(names: list[str], blend: Mapping[int, np.ndarray], scale: np.ndarray) -> Weights:
    """Weights by name from those by group, ``[2 (short, long), M]``; a group without tasks has those of the other."""
    other = next(iter(blend.values()))
    table = np.stack([blend.get(group, other) for group in (0, 1)])  # [2, 2, M]
    used = [k for k in range(len(names)) if table[..., k].any()]
    return Weights({names[k]: table[..., k] for k in used}, {names[k]: float(scale[k]) for k in used})


def _shown(tasks: TaskSet, shown: int | None) -> TaskSet:
    names = ("support_item", "support_target", "support_mask")
    return replace(tasks, **{name: getattr(tasks, name)[:, :shown] for name in names})


def _rated(
    methods: Mapping[str, Method],
    tasks: Mapping[str, TaskSet],
    known: Catalogue,
    rating_range: tuple[float, float],
    batch: int,
) -> tuple[np.ndarray, ...]:
    """The query ratings of all tasks at each support size, as columns.

    Returns:
      Predictions ``[n, M]``, ratings, shares of the weights of short supports, whether the item is known, task, item.
    """
    columns, item_row, number = [], np.asarray(known.item_row), 0
    for one in tasks.values():
        real = one.query_mask > 0
        owner = np.broadcast_to(number + np.arange(len(one))[:, None], real.shape)
        number += len(one)
        for shown in _SHOWN:
            part = _shown(one, shown)
            x = np.stack(
                [np.clip(query_scores(m, part, known, batch), *bounds(rating_range))[real] for m in methods.values()], 1
            )
            few = np.broadcast_to((FEW / (FEW + (part.support_mask > 0).sum(1)))[:, None], real.shape)
            item = one.query_item[real]
            columns.append((x, one.query_target[real], few[real], item_row[item] > 0, owner[real], item))
    return tuple(np.concatenate(part) for part in zip(*columns, strict=True))


def _rating_weights(
    x: np.ndarray, y: np.ndarray, few: np.ndarray, cluster: np.ndarray, rating_range: tuple[float, float]
) -> np.ndarray:
    """Weights ``[2, M]``: those of least absolute deviations, or the best member alone.

    It stays alone where the mean is not better by a standard error on clusters that the weights were not learned on.

    Args:
      cluster: ``[n]`` what is held out together, a task or an item.
    """
    span = rating_range[1] - rating_range[0]
    x, y = 4 * (x - rating_range[0]) / span, 4 * (y - rating_range[0]) / span
    half = np.random.default_rng(0).permutation(cluster.max() + 1)[cluster] % 2
    gain = np.zeros(len(y))
    for held in (0, 1):
        fit, out = half != held, half == held
        if not fit.any() or not out.any():
            continue
        weights = _least_deviations(x[fit], y[fit], few[fit])
        best = _errors(x[fit], y[fit, None]).mean(0).argmin()
        gain[out] = _errors(x[out, best], y[out]) - _errors(_mean(x[out], few[out], weights), y[out])
    by_cluster = np.bincount(np.unique(cluster, return_inverse=True)[1], gain)
    if by_cluster.sum() <= np.sqrt(np.square(by_cluster - by_cluster.mean()).sum()):  # less than a standard error
        return np.tile(np.eye(x.shape[1])[_errors(x, y[:, None]).mean(0).argmin()], (2, 1))
    weights = _least_deviations(x, y, few)
    weights[weights < _LEAST] = 0.0
    return weights / weights.sum(1, keepdims=True)


def _mean(x: np.ndarray, few: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return (x @ weights[0]) * few + (x @ weights[1]) * (1 - few)


def _errors(predicted: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Absolute errors of predictions within the scale, which is 0 to 4 here."""
    return np.abs(np.clip(predicted, 0.0, 4.0) - y)


def _least_deviations(x: np.ndarray, y: np.ndarray, few: np.ndarray, sweeps: int = 30) -> np.ndarray:
    """Non-negative weights ``[2, M]`` of least absolute deviations, rows of sum 1, by reweighted least squares."""
    count = x.shape[1]
    best = np.argsort(np.abs(x - y[:, None]).mean(0), kind="stable")[:3]
    prior = np.zeros(count)
    prior[best] = 1 / len(best)
    both = np.concatenate([x * few[:, None], x * (1 - few)[:, None]], 1)
    sums = 1e3 * np.sqrt(len(y)) * np.kron(np.eye(2), np.ones(count))
    shrink = np.sqrt(_SHRINK) * np.eye(2 * count)
    weights = np.tile(prior, 2)
    for _ in range(sweeps):
        scale = 1 / np.sqrt(np.maximum(np.abs(y - both @ weights), 0.05))
        a = both * scale[:, None]
        # the normal equations of the rows, as a square root, so that nnls sees 2 M rows and not all ratings
        gram = a.T @ a + sums.T @ sums + shrink.T @ shrink
        right = a.T @ (y * scale) + sums.T @ np.full(2, 1e3 * np.sqrt(len(y))) + shrink.T @ (shrink @ np.tile(prior, 2))
        root = np.linalg.cholesky(gram + 1e-9 * np.trace(gram) * np.eye(2 * count) / (2 * count))
        new, _ = nnls(root.T, np.linalg.solve(root, right))
        if np.abs(new - weights).max() < 1e-4:
            weights = new
            break
        weights = new
    weights = weights.reshape(2, count)
    return weights / np.maximum(weights.sum(1, keepdims=True), 1e-12)


class _Lists(NamedTuple):
    """Candidates of T lists: scores ``[T, C, M]`` (-inf past the end), whether liked ``[T, C]``, "short" ``[T]``."""

    score: np.ndarray
    liked: np.ndarray
    few: np.ndarray


def _sample(tasks: TaskSet, most: int = _LISTED) -> TaskSet:
    if len(tasks) <= most:
        return tasks
    return tasks.take(np.sort(np.random.default_rng(0).choice(len(tasks), most, replace=False)))


def _listed(
    methods: Mapping[str, Method],
    tasks: TaskSet,
    known: Catalogue,
    liked_from: float,
    new: bool,
    shown: int | None,
    batch: int,
) -> _Lists:
    """The best candidates of each task by the mean of all members, and the liked items of its query."""
    liked = (tasks.query_mask > 0) & (tasks.query_target >= liked_from)
    keep = np.flatnonzero(liked.any(1))
    tasks, liked = _shown(tasks.take(keep), shown), liked[keep]
    count = min(_CANDIDATES, len(known.item_row) - 1)
    scores, hits, places = [], [], []
    if not len(tasks):
        empty = np.zeros((0, count, len(methods)), np.float32)
        return _Lists(empty, empty[..., 0] > 0, np.zeros(0))
    of_new = np.full(len(tasks), new)
    for block in zip(*(list_scores(m, tasks, known, of_new, batch) for m in methods.values()), strict=True):
        index = block[0][0]
        every = np.stack([one for _, one in block], -1)  # [U, rows, M]
        free = np.isfinite(every).all(-1)
        level = np.where(free[..., None], every, np.nan)
        with np.errstate(invalid="ignore"):
            level = (level - np.nanmean(level, 1, keepdims=True)) / np.maximum(np.nanstd(level, 1, keepdims=True), 1e-9)
        mean = np.where(free, np.nan_to_num(level).mean(-1), -np.inf)
        hit = np.zeros(mean.shape, bool)
        np.put_along_axis(hit, np.where(liked[index], tasks.query_item[index], 0), True, axis=1)
        hit &= free
        place = np.argsort(-(mean + np.where(hit, 1e6, 0)), axis=1, kind="stable")[:, :count]
        scores.append(np.take_along_axis(np.where(free[..., None], every, -np.inf), place[..., None], 1))
        hits.append(np.take_along_axis(hit, place, 1))
        places.append(index)
    few = FEW / (FEW + (tasks.support_mask > 0).sum(1)[np.concatenate(places)])
    found = _Lists(np.concatenate(scores).astype(np.float32), np.concatenate(hits), few)
    some = found.liked.any(1)
    return _Lists(*(part[some] for part in found))


def _list_weights(lists: _Lists, names: list[str]) -> np.ndarray:
    """Weights ``[2, M]`` of greatest likelihood, or the best member alone where they do not generalise.

    A member that scores all candidates alike gets no weight.
    """
    varied = (_spread(lists) > 1e-6 * np.abs(np.where(np.isfinite(lists.score), lists.score, 0.0)).max((0, 1))).any(0)
    if not varied.all():
        if not varied.any():
            return np.tile(np.eye(len(names))[0], (2, 1))
        some = _list_weights(
            lists._replace(score=lists.score[..., varied]), [n for n, v in zip(names, varied, strict=True) if v]
        )
        weights = np.zeros((2, len(names)))
        weights[:, varied] = some
        return weights
    half = np.random.default_rng(0).permutation(len(lists.few)) % 2
    quality = np.zeros(2)
    alone = np.array([_ndcg(lists.score[..., k], lists.liked) for k in range(len(names))])  # [M, T]
    for held in (0, 1):
        fit, out = half != held, half == held
        if not fit.any() or not out.any():
            continue
        weights = _likeliest(_Lists(*(part[fit] for part in lists)))
        quality += (
            _ndcg(_blend(lists, weights), lists.liked)[out].sum(),
            alone[alone[:, fit].mean(1).argmax(), out].sum(),
        )
    if quality[0] < quality[1]:
        return np.tile(np.eye(len(names))[alone.mean(1).argmax()], (2, 1))
    weights = _likeliest(lists)
    weights[weights < _LEAST * weights.sum(1, keepdims=True)] = 0.0
    return weights


def _spread(lists: _Lists) -> np.ndarray:
    """The standard deviation of each member over the candidates of each list, ``[T, M]``."""
    free = np.isfinite(lists.score)
    score, count = np.where(free, lists.score, 0.0), np.maximum(free.sum(1), 1)
    mean = score.sum(1) / count
    return np.sqrt((np.where(free, score - mean[:, None], 0.0) ** 2).sum(1) / count)


def _blend(lists: _Lists, weights: np.ndarray) -> np.ndarray:
    free = np.isfinite(lists.score).all(-1)
    by_length = lists.few[:, None] * weights[0] + (1 - lists.few)[:, None] * weights[1]
    return np.where(free, np.einsum("tcm,tm->tc", np.where(free[..., None], lists.score, 0.0), by_length), -np.inf)


def _ndcg(score: np.ndarray, liked: np.ndarray) -> np.ndarray:
    """nDCG@10 of each list, ties broken at random."""
    found = metrics.ndcg(
        jnp.asarray(score),
        jnp.asarray(liked, jnp.float32),
        where=jnp.asarray(np.isfinite(score)),
        topn=10,
        gain="binary",
        key=jax.random.key(0),
    )
    return np.asarray(found)


def _likeliest(lists: _Lists, steps: int = 200) -> np.ndarray:
    """Non-negative weights ``[2, M]`` that give what is liked the greatest likelihood under a softmax of the means."""
    free = np.isfinite(lists.score).all(-1)
    score = jnp.asarray(np.where(free[..., None], lists.score, 0.0), jnp.float32)
    return np.array(_ascend(score, jnp.asarray(free), jnp.asarray(lists.liked), jnp.asarray(lists.few), steps))


@partial(jax.jit, static_argnums=4)
def _ascend(score: Array, free: Array, liked: Array, few: Array, steps: int) -> Array:
    def loss(logs: Array) -> Array:
        weights = jnp.exp(logs)
        by_length = few[:, None] * weights[0][None] + (1 - few)[:, None] * weights[1][None]
        mean = jnp.where(free, jnp.einsum("tcm,tm->tc", score, by_length), -1e9)
        each = jnp.where(liked, jax.nn.log_softmax(mean, axis=1), 0.0).sum(1) / liked.sum(1)
        return -each.mean() + 1e-3 * jnp.square(logs[0] - logs[1]).sum()

    optimizer = optax.adam(0.05)
    logs = jnp.full((2, score.shape[-1]), -0.5)

    def step(carry: tuple[Array, optax.OptState], _: None) -> tuple[tuple[Array, optax.OptState], None]:
        logs, state = carry
        updates, state = optimizer.update(jax.grad(loss)(logs), state)
        return (logs + updates, state), None

    return jnp.exp(jax.lax.scan(step, (logs, optimizer.init(logs)), None, length=steps)[0][0])
