"""Items as tasks: a cold item has a few first ratings, of several users.

A task is one item: its id and content are columns that all examples share (leading axis 1), and users vary. The
implementation is that of user tasks, on data with users and items exchanged.
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
    """The split of `warm_up`: interactions of base items, and those of cold items by stage, then the rest."""

    base: Interactions
    stages: tuple[Interactions, ...]
    test: Interactions


def warm_up(
    data: Interactions, *, base_above: int = 200, cold: tuple[int, int] = (60, 200), stage: int = 20, stages: int = 3
) -> WarmUp:
    """Base items, and cold items whose first interactions arrive in stages.

    Items with more than ``base_above`` interactions are base, those with ``cold[0]`` to ``cold[1]`` are cold, and the
    others are dropped. In the time order of each cold item the first ``stage`` interactions are the first stage, and so
    on; the remaining ones are the test. Ties in time keep file order.

    Raises:
      MetarecError: there are no timestamps, the bounds would let a cold item lack a stage or be a base item too, or
        one of the kinds has no items.

    Source: the split of Pan et al., "Warm Up Cold-start Advertisements", 2019, and of the papers after it.

    >>> from metarec_jax.data.interactions import Vocabulary
    >>> ids, n = Vocabulary(np.arange(5)), np.array([1, 2, 3, 4, 5, 1, 2, 3])
    >>> data = Interactions(n, np.array([1, 1, 1, 1, 1, 2, 2, 2]), None, np.array([5, 4, 3, 2, 1, 8, 6, 7]), ids, ids)
    >>> cut = warm_up(data, base_above=4, cold=(2, 4), stage=1, stages=2)
    >>> len(cut.base), [part.user.tolist() for part in cut.stages], cut.test.user.tolist()
    (5, [[2], [3]], [1])
    """
    if stage < 1 or stages < 1 or cold[0] < stage * stages or base_above < cold[1] or cold[1] < cold[0]:
        raise MetarecError(
            f"expected stages of 1 or more, stage * stages <= cold[0] <= cold[1] <= base_above, got {stages} stages of "
            f"{stage}, cold={cold}, base_above={base_above}; correct them"
        )
    require_times(data, "warm_up")
    count = np.bincount(data.item, minlength=data.items.num_rows)[data.item]
    is_base, is_cold = count > base_above, (count >= cold[0]) & (count <= cold[1])
    if not is_base.any() or not is_cold.any():
        raise MetarecError(
            f"no item has {f'more than {base_above}' if not is_base.any() else f'{cold[0]} to {cold[1]}'} interactions "
            f"(the maximum is {count.max(initial=0)}); change the bounds"
        )
    place = place_in_time(data)
    part = np.where(is_cold, np.minimum(place // stage, stages), -1)
    return WarmUp(data.take(is_base), tuple(data.take(part == k) for k in range(stages)), data.take(part == stages))


def place_in_time(data: Interactions) -> np.ndarray:
    """For each interaction, the number of earlier interactions of its item."""
    order = np.lexsort((np.asarray(data.timestamp), data.item))
    item = data.item[order]
    first = np.flatnonzero(np.append(True, item[1:] != item[:-1])) if len(item) else np.zeros(0, int)
    place = np.zeros(len(data), int)
    place[order] = np.arange(len(data)) - np.repeat(first, np.diff(np.append(first, len(data))))
    return place


def joined(parts: tuple[Interactions, ...]) -> Interactions:
    """The concatenated interactions of several parts of one data set."""

    def column(name: str) -> Any:
        columns = [getattr(part, name) for part in parts]
        return None if columns[0] is None else np.concatenate(columns)

    return replace(parts[0], **{name: column(name) for name in ("user", "item", "rating", "timestamp")})


def clicks(data: Interactions, least: float = 4.0) -> Interactions:
    """Ratings as clicks: 1.0 for at least ``least``, 0.0 below. Raises MetarecError for data without ratings."""
    if data.rating is None:
        raise MetarecError("the data has no ratings to convert to clicks; it already has clicks")
    return replace(data, rating=(data.rating >= least).astype(np.float32))


def exchanged(data: Interactions) -> Interactions:
    """The same interactions with users and items exchanged, including features.

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
    """Columns with ``user_x`` renamed to ``item_x`` and vice versa."""
    other = {"user_": "item_", "item_": "user_"}
    return {other[name[:5]] + name[5:]: values for name, values in columns.items()}


def _other_side(catalogue: Catalogue) -> Catalogue:
    return Catalogue(catalogue.item_row, catalogue.user_row, _renamed(catalogue.item), _renamed(catalogue.user))


def _task(task: Task) -> Task:
    """A task of exchanged data, with the columns renamed back."""

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
    """Batches of item tasks, drawn on the device as in `data.draw.task_source`.

    Args:
      tasks, support, query, order: as in `task_source`, for an item's interactions; ``"time"``: the query is later than
        the support.
      user_drop, item_drop: probability of replacing an example's user, or a task's item, by the unknown id.
      negatives: sampled users per positive that never had the item; default: as in `task_source`.

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

    # The catalogue keeps its own names, so that `fit` checks its ids against the right tables.
    return source._replace(data=source.data._replace(known=_other_side(source.data.known)), draw=draw)


def item_catalogue(data: Interactions) -> Catalogue:
    """The catalogue for `item_batches`: every item and user keeps its own row."""
    return catalogue(exchanged(data), user_rows="own")


def item_batches(tasks: TaskSet, catalogue: Catalogue, size: int = 128) -> Iterator[tuple[np.ndarray, Task]]:
    """`data.tasks.batches` for item tasks: ``make_tasks(exchanged(test), history=exchanged(first ratings), ...)``.

    Args:
      catalogue: from `item_catalogue`.

    Raises:
      MetarecError: as `batches`.
    """
    for index, task in batches(tasks, catalogue, size):
        yield index, _task(task)
