"""Fit the baselines, each tuned on validation tasks over a small grid.

A grid is searched one argument at a time. Arguments in a method's ``params`` do not compile again, and the tasks are
moved to the device once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metarec_jax.baselines.closed_form import BASELINES, LISTS, Factory, ease, of_liked
from metarec_jax.core import Array, Examples, MetarecError, Method, Task
from metarec_jax.data.catalogue import Catalogue, inputs
from metarec_jax.data.interactions import Interactions
from metarec_jax.data.tasks import TaskSet
from metarec_jax.evaluation.scoring import catalogue_scores, user_blocks

_Grid = Mapping[str, Sequence[float]]
_GRIDS: Mapping[str, _Grid] = {
    "bias": {"reg_user": (0.5, 1.0, 2.0, 5.0), "reg_item": (2.0, 5.0, 10.0)},
    "item_knn": {"shrinkage_predict": (0.03, 0.1, 0.3), "shrinkage": (5.0, 20.0, 100.0)},
    "ease": {"reg": (30.0, 100.0, 300.0)},
    "als": {"reg": (2.0, 5.0, 10.0), "size": (8, 16, 32)},
    "gaussian_prior": {"reg": (5.0, 20.0, 80.0), "size": (8, 16, 32), "unseen": (0.5, 1.0)},
}
_CLICK_GRIDS: Mapping[str, _Grid] = {
    "item_knn": {"shrinkage": (1.0, 20.0, 100.0)},
    "ease": {"reg": (1000.0, 3000.0, 10_000.0, 30_000.0)},
    "als": {"size": (16, 32, 64), "alpha": (2.0, 10.0, 40.0), "reg": (5.0, 50.0, 200.0)},
}
_LIST_GRIDS: Mapping[str, _Grid] = {
    "item_knn_liked": {"shrinkage": (0.0, 5.0, 20.0, 100.0)},
    "ease_liked": {"reg": (100.0, 300.0, 1000.0, 3000.0)},
    "als_liked": {"alpha": (2.0, 5.0, 10.0), "reg": (20.0, 50.0, 100.0), "size": (32, 64)},
}
_STARTS: Mapping[str, Mapping[str, Any]] = {
    "gaussian_prior": {"iterations": 4},
    "als_liked": {"size": 32, "reg": 50.0, "iterations": 4},
}
"""Where the search starts, and what it saves, instead of the defaults."""
_SQUARE = {"ease", "ease_liked"}
_TUNING_ITEMS = 3000
"""Maximum number of items, the most frequent ones, in the square matrices of tuning."""


def fit_baselines(
    train: Interactions,
    known: Catalogue,
    validation_tasks: Mapping[str, TaskSet] | None = None,
    *,
    names: Sequence[str] | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    say: Callable[[str], None] | None = None,
    kept: MutableMapping[str, dict[str, Any]] | None = None,
    liked_from: float | None = None,
) -> dict[str, Method]:
    """Fit baselines, after tuning (`tune`) if there are validation tasks.

    Args:
      validation_tasks: by scenario; None or empty: no tuning.
      names: names of `BASELINES`, and of `LISTS` for ratings with ``liked_from``; None: all that suit the data.
      settings: arguments by baseline, such as those of `tune` on another split of the data; disables tuning.
      say: called with one line per tuned baseline.
      kept: as in `tune`.
      liked_from: the lowest rating that counts as liked; None: no lists. Lists are methods that only rank (`LISTS`).

    Raises:
      MetarecError: a name is unknown, a baseline requires ratings and there are none, a list requires ``liked_from``,
        or a setting is unknown.
    """
    names = _names(train, names, liked_from)
    for name, arguments in (settings or {}).items():
        _names(train, [name], liked_from)
        own = [p for p in inspect.signature(_factory(name, liked_from)).parameters if p not in ("train", "known")]
        check_settings(name, arguments, own)
    if settings is None:
        tuning = partial(tune, names=names, say=say, kept=kept, liked_from=liked_from)
        settings = tuning(train, known, validation_tasks) if validation_tasks else {}
    return {name: _factory(name, liked_from)(train, known, **settings.get(name, {})) for name in names}


def _factory(name: str, liked_from: float | None) -> Factory:
    if name in BASELINES:
        return BASELINES[name]
    if liked_from is None:
        raise MetarecError(f"{name} requires the rating from which an item counts as liked; pass liked_from")
    return of_liked(LISTS[name], liked_from)


def check_settings(name: str, settings: Mapping[str, Any], own: Sequence[str]) -> None:
    """Refuse settings that are not in ``own``, the settings of the model."""
    if foreign := [key for key in settings if key not in own]:
        raise MetarecError(
            f"{name} has no setting {', '.join(map(repr, foreign))}; its settings are {', '.join(own) or 'none'}"
        )


def tune(
    train: Interactions,
    known: Catalogue,
    validation_tasks: Mapping[str, TaskSet],
    *,
    names: Sequence[str] | None = None,
    tuning_rows: int = 500_000,
    say: Callable[[str], None] | None = None,
    kept: MutableMapping[str, dict[str, Any]] | None = None,
    liked_from: float | None = None,
) -> dict[str, dict[str, Any]]:
    """Arguments for the baselines, chosen on validation tasks, one argument at a time, over small grids.

    Selection is by the mean over scenarios of MAE (ratings), or of nDCG@10 over the training items (clicks). Lists from
    ratings are chosen by that nDCG on new users, else on known users: they cannot list new items.

    Args:
      tuning_rows: tuning uses the whole histories of random users, about this many interactions.
      names, say, liked_from: as in `fit_baselines`.
      kept: arguments by baseline from an interrupted call with the same data, which are used unchanged; arguments of
        newly tuned baselines are added.
    """
    kept = {} if kept is None else kept
    grids = {**(_CLICK_GRIDS if train.implicit else _GRIDS), **_LIST_GRIDS}
    tasks = {s: t for s, t in validation_tasks.items() if len(t)}
    names = [name for name in _names(train, names, liked_from) if tasks and name in grids]
    lists = {} if liked_from is None else _list_tasks(tasks, liked_from)
    part, settings = some_users(train, tuning_rows), {}
    held = [on_device(t, known) for t in tasks.values()] if set(names) - set(LISTS) else []
    held_lists = [on_device(t, known) for t in lists.values()] if set(names) & set(LISTS) else []
    for name in names:
        ranks = train.implicit or name in LISTS
        key = f"{name} from {liked_from:g}" if name in LISTS else name
        if name in LISTS and not lists:
            continue
        if key in kept:
            settings[name] = kept[key]
            if say is not None:
                say(f"{name}: {_formatted(settings[name])} (from an earlier run)")
            continue
        rows = some_items(part, _TUNING_ITEMS) if name in _SQUARE else part
        held_out = held_lists if name in LISTS else held
        factory = partial(_factory(name, liked_from), **_STARTS.get(name, {}))
        settings[name], score = _search(factory, grids[name], rows, known, held_out, ranks)
        kept[key] = settings[name]
        if say is not None:
            say(f"{name}: {_formatted(settings[name])} (validation {'nDCG@10' if ranks else 'MAE'} {abs(score):.4f})")
    return settings


def _list_tasks(tasks: Mapping[str, TaskSet], liked_from: float) -> dict[str, TaskSet]:
    """The tasks on which lists are tuned, with a target of 1 for a liked query item; those without any are left out."""
    scenario = next((s for s in ("user_cold", "warm") if s in tasks), None)
    if scenario is None:
        return {}
    chosen = tasks[scenario]
    liked = (chosen.query_target >= liked_from) & (chosen.query_mask > 0)
    chosen = replace(chosen, query_target=liked.astype(np.float32)).take(np.flatnonzero(liked.any(axis=1)))
    return {scenario: chosen} if len(chosen) else {}


def _formatted(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in settings.items())


def _names(train: Interactions, names: Sequence[str] | None, liked_from: float | None) -> list[str]:
    for name in names or ():
        if name not in BASELINES and name not in LISTS:
            raise MetarecError(f"there is no baseline {name!r}; choose from {', '.join([*BASELINES, *LISTS])}")
    return suitable(train, liked_from) if names is None else list(names)


def suitable(train: Interactions, liked_from: float | None = None) -> list[str]:
    """The baselines that suit the data, and the lists from ratings of at least ``liked_from``, if there are any.

    `ease` of ratings is slow and poor, and any `ease` requires a square matrix of items.
    """
    left_out = {"item_mean", "user_mean", "bias", "gaussian_prior"} if train.implicit else {"ease"}
    if train.items.num_rows > inspect.signature(ease).parameters["dense_limit"].default:
        left_out |= _SQUARE
    lists = LISTS if liked_from is not None and train.rating is not None and (train.rating >= liked_from).any() else ()
    return [name for name in (*BASELINES, *lists) if name not in left_out]


def some_items(train: Interactions, items: int) -> Interactions:
    """The interactions with the ``items`` most frequent items."""
    count = np.bincount(train.item, minlength=train.items.num_rows)
    if (count > 0).sum() <= items:
        return train
    keep = np.zeros(len(count), bool)
    keep[np.argsort(-count, kind="stable")[:items]] = True
    return train.take(keep[train.item])


def some_users(train: Interactions, rows: int) -> Interactions:
    """The whole histories of random users, about ``rows`` interactions."""
    if len(train) <= rows:
        return train
    users = np.random.default_rng(0).permutation(train.users.num_rows)
    count = np.bincount(train.user, minlength=train.users.num_rows)[users]
    keep = np.zeros(train.users.num_rows, bool)
    keep[users[: max(1, int(np.searchsorted(np.cumsum(count), rows)))]] = True
    part = train.take(keep[train.user])
    return part if len(part) else train


Held = Sequence[tuple[int, Task, Array]]
"""Device batches of one scenario, each with its number of real tasks, and the vocabulary rows of its users."""
_columns = jax.jit(jax.vmap(inputs, (None, 0, 0)))


def on_device(
    tasks: TaskSet, known: Catalogue, size: int = 128, columns: Collection[str] = ("user_id", "item_id")
) -> Held:
    """Batches of equal shapes, so that a method is compiled once.

    Args:
      columns: the input columns to include; closed forms do not use content.
    """
    held = []
    for start in range(0, len(tasks), size):
        count = min(size, len(tasks) - start)
        some = tasks.take(np.minimum(np.arange(start, start + size), len(tasks) - 1))
        user = jnp.asarray(some.user)

        def part(item: np.ndarray, target: np.ndarray, mask: np.ndarray, user: Array = user) -> Examples:
            width = ((0, 0), (0, (1 << max(3, (item.shape[1] - 1).bit_length())) - item.shape[1]))
            rows, targets, real = (jnp.asarray(np.pad(a, width)) for a in (item, target, mask))
            every = _columns(known, user, rows)
            return Examples({name: every[name] for name in columns}, targets, real)

        support = part(some.support_item, some.support_target, some.support_mask)
        held.append((count, Task(support, part(some.query_item, some.query_target, some.query_mask)), user))
    return held


def _search(
    factory: Factory, grid: _Grid, train: Interactions, known: Catalogue, held: Sequence[Held], ranks: bool
) -> tuple[dict[str, Any], float]:
    """Coordinate search: the best value of each argument in turn, with earlier ones fixed. Lower is better."""
    defaults = inspect.signature(factory).parameters
    chosen: dict[str, Any] = {argument: defaults[argument].default for argument in grid}
    scores: dict[tuple[Any, ...], float] = {}

    def score(settings: dict[str, Any]) -> float:
        at = tuple(settings.values())
        if at not in scores:
            method = factory(train, known, **settings)
            scores[at] = float(np.mean([quality(method, of_scenario, known, train, ranks) for of_scenario in held]))
        return scores[at]

    for argument, values in grid.items():
        chosen = min(({**chosen, argument: value} for value in values), key=score)
    return chosen, score(chosen)


def quality(method: Method, held: Held, known: Catalogue, train: Interactions, ranks: bool | None = None) -> float:
    """Mean over tasks of MAE, or of -nDCG@10 over the training items; lower is better.

    Args:
      ranks: whether by nDCG, of query items with a target above 0; None: for clicks.
    """
    key, each = jax.random.key(0), []
    pool = np.random.default_rng(0).permutation(np.unique(train.item))[:20_000]
    for count, task, user in held:
        if train.rating is None or ranks:
            of_task = -_click_quality(method, known, pool, task, user, count, key)
        else:
            low, high = train.rating.min(), train.rating.max()
            of_task = _rating_quality(method.adapt, method.predict, method.params, task, low, high, key)
        each.append(np.asarray(of_task)[:count])
    return float(np.concatenate(each).mean())


@partial(jax.jit, static_argnums=(0, 1))
def _rating_quality(adapt: Any, predict: Any, params: Any, task: Task, low: Array, high: Array, key: Array) -> Array:
    def one(task: Task) -> Array:
        scores = jnp.clip(predict(params, adapt(params, task.support, key), task.query.inputs), low, high)
        mask = task.query.mask
        return (jnp.abs(scores - task.query.target) * mask).sum() / jnp.maximum(mask.sum(), 1)

    return jax.vmap(one)(task)


def _click_quality(
    method: Method, known: Catalogue, pool: np.ndarray, task: Task, user: Array, count: int, key: Array
) -> np.ndarray:
    """nDCG@10 of the query's positives among ``pool``; a tie counts one half, and the support is excluded."""
    adapted, own = _adapted(method.adapt, method.predict, method.params, task, key)
    each, place = [], np.full(len(known.item_row), len(pool), np.int32)
    place[np.asarray(known.item_row)[pool]] = np.arange(len(pool))
    for some in user_blocks(count, len(user), len(known.item_row)):
        part, adapted_part, own_part = jax.tree.map(lambda a, some=some: a[some], (task, adapted, own))
        others = catalogue_scores(method, adapted_part, known, user[some], pool)
        each.append(np.asarray(_ndcg_among(jnp.asarray(others), own_part, jnp.asarray(place), part)))
    return np.concatenate(each)


@partial(jax.jit, static_argnums=(0, 1))
def _adapted(adapt: Any, predict: Any, params: Any, task: Task, key: Array) -> tuple[Any, Array]:
    """The adapted state of each task, and the scores of its query ``[B, Q]``."""
    adapted = jax.vmap(lambda support: adapt(params, support, key))(task.support)
    return adapted, jax.vmap(lambda adapted, query: predict(params, adapted, query))(adapted, task.query.inputs)


@jax.jit
def _ndcg_among(others: Array, own: Array, place: Array, task: Task) -> Array:
    """nDCG@10 of each task, ``[B]``.

    Args:
      others: scores ``[B, P]`` of the pool; own: scores ``[B, Q]`` of the query.
      place: ``[rows]``, position of each item in the pool; P if it is not in it.
    """

    def one(others: Array, own: Array, task: Task) -> Array:
        pool = jnp.arange(others.shape[0])
        support = jnp.where(task.support.mask > 0, task.support.inputs["item_id"], 0)
        free = jnp.ones(others.shape[0], bool).at[place[support]].set(False, mode="drop")
        query = place[task.query.inputs["item_id"]]
        own = jnp.where(query < len(pool), others[jnp.minimum(query, len(pool) - 1)], own)  # bitwise equal, for ties
        free = free[None] & (pool[None] != query[:, None])
        before = (others[None] > own[:, None]) + 0.5 * (others[None] == own[:, None])
        rank = 1 + (free * before).sum(1)
        liked = task.query.mask * (task.query.target > 0)
        gain = (liked * (rank <= 10) / jnp.log2(1 + rank)).sum()
        ideal = jnp.where(jnp.arange(10) < liked.sum(), 1 / jnp.log2(2.0 + jnp.arange(10)), 0.0).sum()
        return gain / jnp.maximum(ideal, 1e-6)

    return jax.vmap(one)(others, own, task)
