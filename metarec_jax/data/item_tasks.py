"""Items as tasks: a cold item arrives with a few first ratings, of many users.

A task is one item: its id and content are columns that all examples share (leading axis 1), and users vary. The
machinery is that of users as tasks, run on the data with its sides exchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from metarec_jax.core import Array, Examples, MetarecError, Task
from metarec_jax.data.catalogue import Catalogue, catalogue
from metarec_jax.data.draw import TaskData, TaskSource, task_source
from metarec_jax.data.interactions import Interactions, require_times
from metarec_jax.data.tasks import TaskSet, batches

V = TypeVar("V")


class WarmUp(NamedTuple):
    """The cut of `warm_up`: interactions of base items, and of cold items by stage, then the rest."""

    base: Interactions
    stages: tuple[Interactions, ...]
    test: Interactions


def warm_up(
    data: Interactions, *, base_above: int = 200, cold: tuple[int, int] = (60, 200), stage: int = 20, stages: int = 3
) -> WarmUp:
    """Base items and cold items, the first interactions of which come in stages.

    Items with more than ``base_above`` interactions are base, those with ``cold[0]`` to ``cold[1]`` are cold, the
    others are left out. In the time order of each cold item the first ``stage`` interactions are the first stage, and
    so on; what the stages leave is the test. Ties in time stay in file order.

    Raises:
      MetarecError: no timestamps; a cold item could lack a stage, or be a base item too; no item of one of the kinds.

    Source: the cut of Pan et al., "Warm Up Cold-start Advertisements", 2019, and of the papers after it.

    >>> from metarec_jax.data.interactions import Vocabulary
    >>> ids, n = Vocabulary(np.arange(5)), np.array([1, 2, 3, 4, 5, 1, 2, 3])
    >>> data = Interactions(n, np.array([1, 1, 1, 1, 1, 2, 2, 2]), None, np.array([5, 4, 3, 2, 1, 8, 6, 7]), ids, ids)
    >>> cut = warm_up(data, base_above=4, cold=(2, 4), stage=1, stages=2)
    >>> len(cut.base), [part.user.tolist() for part in cut.stages], cut.test.user.tolist()
    (5, [[2], [3]], [1])
    """
    if stage < 1 or stages < 1 or cold[0] < stage * stages or base_above < cold[1] or cold[1] < cold[0]:
        raise MetarecError(
            f"{stages} stages of {stage}, cold items of {cold[0]} to {cold[1]} interactions and base items above "
            f"{base_above}; give stages of 1 or more, in all no more than the fewest, and base_above at least the most"
        )
    require_times(data, "warm_up")
    count = np.bincount(data.item, minlength=data.items.num_rows)[data.item]
    is_base, is_cold = count > base_above, (count >= cold[0]) & (count <= cold[1])
    if not is_base.any() or not is_cold.any():
        raise MetarecError(
            f"no item has {f'more than {base_above}' if not is_base.any() else f'{cold[0]} to {cold[1]}'} interactions "
            f"(the most is {count.max(initial=0)}); give other bounds"
        )
    place = place_in_time(data)
    part = np.where(is_cold, np.minimum(place // stage, stages), -1)
    return WarmUp(data.take(is_base), tuple(data.take(part == k) for k in range(stages)), data.take(part == stages))


def place_in_time(data: Interactions) -> np.ndarray:
    """For each interaction, how many of its item come before it."""
    order = np.lexsort((np.asarray(data.timestamp), data.item))
    item = data.item[order]
    first = np.flatnonzero(np.append(True, item[1:] != item[:-1])) if len(item) else np.zeros(0, int)
    place = np.zeros(len(data), int)
    place[order] = np.arange(len(data)) - np.repeat(first, np.diff(np.append(first, len(data))))
    return place


def joined(parts: tuple[Interactions, ...]) -> Interactions:
    """The interactions of several cuts of one data set, one after the other."""

    def column(name: str) -> Any:
        columns = [getattr(part, name) for part in parts]
        return None if columns[0] is None else np.concatenate(columns)

    return replace(parts[0], **{name: column(name) for name in ("user", "item", "rating", "timestamp")})


def clicks(data: Interactions, least: float = 4.0) -> Interactions:
    """Ratings as clicks: 1.0 from ``least`` on, 0.0 below. Raises MetarecError where there are no ratings."""
    if data.rating is None:
        raise MetarecError("the data has no ratings to make clicks of; it is clicks already")
    return replace(data, rating=(data.rating >= least).astype(np.float32))


def exchanged(data: Interactions) -> Interactions:
    """The same interactions with users and items exchanged, features and all: what is made for users then serves items.

    >>> from metarec_jax.data.interactions import Vocabulary
    >>> few, many = Vocabulary(np.arange(2)), Vocabulary(np.arange(9))
    >>> turned = exchanged(Interactions(np.array([1, 2]), np.array([7, 9]), None, None, few, many))
    >>> turned.user.tolist(), turned.item.tolist(), turned.columns["user_id"].size
    ([7, 9], [1, 2], 10)
    """
    return replace(
        data,
        user=data.item,
        item=data.user,
        users=data.items,
        items=data.users,
        user_features=_renamed(data.item_features),
        item_features=_renamed(data.user_features),
        titles=None,
    )


def _renamed(columns: Mapping[str, V]) -> dict[str, V]:
    """``user_x`` as ``item_x`` and the other way round."""
    other = {"user_": "item_", "item_": "user_"}
    return {other[name[:5]] + name[5:]: values for name, values in columns.items()}


def _other_side(known: Catalogue) -> Catalogue:
    return Catalogue(known.item_row, known.user_row, _renamed(known.item), _renamed(known.user))


def _task(task: Task) -> Task:
    """A task of exchanged data, its columns under their own names."""

    def part(examples: Examples) -> Examples:
        return examples._replace(inputs=_renamed(examples.inputs))

    return Task(part(task.support), part(task.query))


def item_task_source(
    train: Interactions,
    *,
    tasks: int = 64,
    support: tuple[int, int] = (0, 60),
    query: int = 20,
    order: Literal["random", "time"] = "time",
    user_drop: float = 0.0,
    item_drop: float = 0.0,
    negatives: int | None = None,
) -> TaskSource:
    """Batches of item tasks, drawn on the device as `data.draw.task_source` draws those of users.

    Args:
      tasks, support, query, order: as there, of an item's interactions. ``"time"``: the query comes after the support.
      user_drop, item_drop: chance that an example's user, or a task's item, is replaced by the unknown id.
      negatives: users who never had the item, for each who had it; by default as in `task_source`.

    Returns:
      A source whose tasks have ``item_id`` and the item's content with leading axis 1; users vary.

    Raises:
      MetarecError: as `task_source`, which calls items users.
    """
    source = task_source(
        exchanged(train),
        tasks=tasks,
        support=support,
        query=query,
        order=order,
        user_rows="own",
        user_drop=item_drop,
        item_drop=user_drop,
        cold_tasks=0.0,
        negatives=negatives,
    )

    def draw(data: TaskData, key: Array) -> Task:
        return _task(source.draw(data._replace(known=_other_side(data.known)), key))

    # The catalogue lies there by its own names, so that `fit` checks its ids against the right tables.
    return source._replace(data=source.data._replace(known=_other_side(source.data.known)), draw=draw)


def item_catalogue(data: Interactions) -> Catalogue:
    """What `item_batches` reads of ``data``: every item and user keeps a row of its own."""
    return catalogue(exchanged(data), user_rows="own")


def item_batches(tasks: TaskSet, known: Catalogue, size: int = 128) -> Iterator[tuple[np.ndarray, Task]]:
    """`data.tasks.batches` for item tasks: ``make_tasks(exchanged(test), history=exchanged(first ratings), ...)``.

    Args:
      known: of `item_catalogue`.

    Raises:
      MetarecError: as there.
    """
    for index, task in batches(tasks, known, size):
        yield index, _task(task)
