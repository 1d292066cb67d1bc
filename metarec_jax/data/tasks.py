"""Fixed tasks for validation and test, made on the host; `draw` draws tasks for training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse import csr_matrix

from metarec_jax.core import Examples, MetarecError, Task
from metarec_jax.data.catalogue import Catalogue, inputs
from metarec_jax.data.draw import negatives_of
from metarec_jax.data.interactions import Interactions, group_by_user


@dataclass(frozen=True, eq=False)
class TaskSet:
    """Fixed tasks for validation or test, in vocabulary rows, on the host. Padding has item 0 and mask 0.

    Attributes:
      user: int32 ``[T]``.
      support_item, support_target, support_mask: ``[T, S]``; query_*: ``[T, Q]``.
      past: bool ``[T, item rows]``: the user's known history before the query, which may exceed the support. Catalogue
        rankings exclude it and the support. None: nothing beyond the support is known.
    """

    user: np.ndarray
    support_item: np.ndarray
    support_target: np.ndarray
    support_mask: np.ndarray
    query_item: np.ndarray
    query_target: np.ndarray
    query_mask: np.ndarray
    past: csr_matrix | None = None

    def __len__(self) -> int:
        return len(self.user)

    def take(self, index: np.ndarray) -> TaskSet:
        """The tasks of an index array or a boolean mask."""
        columns: dict[str, Any] = {}
        for f in fields(self):
            values = getattr(self, f.name)
            columns[f.name] = None if values is None else values[index]
        return TaskSet(**columns)

    def beyond_support(self) -> int:
        """The number of users whose known history exceeds their support."""
        if self.past is None:
            return 0
        task, slot = np.nonzero(self.support_mask)
        entries = np.ones(len(task), bool), (task, self.support_item[task, slot])
        return int(((self.past > csr_matrix(entries, shape=self.past.shape)).getnnz(axis=1) > 0).sum())


def make_tasks(
    data: Interactions,
    *,
    history: Interactions | None = None,
    past: Interactions | None = None,
    query: int = 10,
    support: tuple[int, int] = (1, 100),
    ratings: tuple[int, int] | None = None,
    order: Literal["random", "time"] = "random",
    negatives: int | None = None,
    seed: int = 0,
) -> TaskSet:
    """One task per user of ``data``: the last ``query`` interactions (of a shuffle, or in time), the rest is support.

    Args:
      history: the source of the support (a warm user's known past); all query items then come from ``data``.
      past: the known history of users, such as the training part (`TaskSet.past`); default: ``history``.
      query: maximum number of query examples; a user with few keeps ``support[0]`` for the support first.
      support: minimum and maximum number of support examples; the most recent are kept. Users with fewer are skipped.
      ratings: only users with this many interactions (low, high) in ``data``.
      negatives: this many items per support positive, with target 0, that the user has neither in ``data`` nor in
        ``history``; fewer if there are no more. Default: as in `task_source`, 4 for clicks, 0 for ratings.

    Raises:
      MetarecError: ``order="time"`` without timestamps, or a support or query size is out of range.

    >>> from metarec_jax.data.interactions import Vocabulary
    >>> ids = Vocabulary(np.arange(5))
    >>> data = Interactions(np.ones(5, int), np.arange(1, 6), None, np.array([50, 10, 40, 20, 30]), ids, ids)
    >>> tasks = make_tasks(data, query=2, support=(1, 2), order="time")
    >>> tasks.support_item.tolist(), tasks.query_item.tolist()  # in time: 2 4 5 3 1
    ([[4, 5]], [[3, 1]])
    """
    if query < 1 or not 0 <= support[0] <= support[1]:
        raise MetarecError(f"expected query >= 1 and 0 <= minimum <= maximum, got query {query} and support {support}")
    rng = np.random.default_rng(seed)
    own = group_by_user(data, order, rng)
    users, end = own[1], own[2][1:]
    size = np.diff(own[2])
    if history is None:
        source, rows = data, own
        size_q = np.clip(size - support[0], 0, query)
        begin_s, end_s = own[2][:-1], end - size_q
    else:
        source, rows = history, group_by_user(history, order, rng)
        size_q = np.minimum(size, query)
        at = np.searchsorted(rows[1], users)
        present = np.isin(users, rows[1])
        begin_s = np.where(present, rows[2][np.where(present, at, 0)], 0)
        end_s = np.where(present, rows[2][np.where(present, at + 1, 0)], 0)
    size_s = np.minimum(end_s - begin_s, support[1])
    keep = (size_q > 0) & (size_s >= support[0])
    if ratings is not None:
        keep &= (ratings[0] <= size) & (size <= ratings[1])
    users, end, end_s, size_q, size_s = (a[keep] for a in (users, end, end_s, size_q, size_s))
    support_part = _part(source, rows[0], end_s - size_s, size_s)
    if count := negatives_of(negatives, data.implicit):
        support_part = _with_negatives(support_part, users, data, history, count, rng)
    query_part = _part(data, own[0], end - size_q, size_q)
    past = history if past is None else past
    matrix = None if past is None else _past_items(past, users)
    return TaskSet(users.astype(np.int32), *support_part, *query_part, matrix)


def _past_items(past: Interactions, users: np.ndarray) -> csr_matrix:
    """Which items each of ``users``, in ascending order, has in ``past``: bool ``[T, item rows]``."""
    mine = np.isin(past.user, users)
    entries = np.ones(int(mine.sum()), bool), (np.searchsorted(users, past.user[mine]), past.item[mine])
    return csr_matrix(entries, shape=(len(users), past.items.num_rows))


class _Part(NamedTuple):
    """Supports or queries: ``[T, n]`` each, padded at the end."""

    item: np.ndarray
    target: np.ndarray
    mask: np.ndarray


def _part(data: Interactions, index: np.ndarray, begin: np.ndarray, size: np.ndarray) -> _Part:
    """The interactions ``index[begin[t] : begin[t] + size[t]]`` of each task."""
    slot = np.arange(size.max(initial=0))
    real = slot < size[:, None]
    rows = index[np.where(real, begin[:, None] + slot, 0)]
    item = np.where(real, data.item[rows], 0)
    target = real if data.rating is None else np.where(real, data.rating[rows], 0)
    return _Part(item.astype(np.int32), target.astype(np.float32), real.astype(np.float32))


def _with_negatives(
    part: _Part,
    users: np.ndarray,
    data: Interactions,
    history: Interactions | None,
    count: int,
    rng: np.random.Generator,
) -> _Part:
    """Each support followed by ``count`` items per positive that its user never had, distinct, uniform over the pool.

    All tasks are drawn at once, and again for items that the user has or that repeat; a task that requires more than
    half of its free items is drawn from the list of free items.
    """
    sources = [data] if history is None else [data, history]
    had_user, had_item = (np.concatenate([getattr(d, f).astype(np.int64) for d in sources]) for f in ("user", "item"))
    pool = np.unique((data if history is None else history).item)
    width = max(data.items.num_rows, int(had_item.max(initial=0)) + 1)
    had = np.unique(had_user * width + had_item)
    in_pool = np.isin(had % width, pool)
    free = len(pool) - np.bincount(had[in_pool] // width, minlength=data.users.num_rows)[users]
    size = part.mask.sum(1).astype(int)
    want = np.minimum(count * size, free)
    task = np.repeat(np.arange(len(users)), want)
    drawn = np.zeros(len(task), np.int64)
    crowded = 2 * want > free
    starts = np.cumsum(want) - want
    for t in np.flatnonzero(crowded):
        own = had[slice(*np.searchsorted(had, (int(users[t]) * width, (int(users[t]) + 1) * width)))] % width
        drawn[starts[t] : starts[t] + want[t]] = rng.choice(np.setdiff1d(pool, own), want[t], replace=False)
    live = again = np.flatnonzero(~crowded[task])
    while len(again):
        drawn[again] = rng.choice(pool, len(again))
        taken = np.isin(users[task[again]].astype(np.int64) * width + drawn[again], had)
        _, first = np.unique(task[live] * width + drawn[live], return_index=True)
        again = np.union1d(again[taken], np.delete(live, first))
        live = live[np.isin(task[live], task[again])]
    slot = np.arange((size + want).max(initial=0))
    out = _Part(*(np.zeros((len(users), len(slot)), a.dtype) for a in part))
    for a, b in zip(out, part, strict=True):
        a[:, : b.shape[1]] = b
    negative = (slot >= size[:, None]) & (slot < (size + want)[:, None])
    out.item[negative] = drawn
    out.mask[negative] = 1.0
    return out


def check_tasks(tasks: TaskSet, catalogue: Catalogue, name: str | None = None) -> None:
    """Refuse tasks with rows outside the catalogue, since JAX clamps or wraps such an index.

    Args:
      name: name of the scenario, for the message.

    Raises:
      MetarecError: a task has a user or an item that the catalogue lacks.
    """
    scenario = "" if name is None else f" of {name!r}"
    for what, rows, table_rows in (
        ("user", tasks.user, catalogue.user_row),
        ("support item", tasks.support_item, catalogue.item_row),
        ("query item", tasks.query_item, catalogue.item_row),
    ):
        if rows.size and (rows.min() < 0 or rows.max() >= table_rows.shape[0]):
            raise MetarecError(
                f"the tasks{scenario} have {what} rows {rows.min()}..{rows.max()}, and the catalogue has "
                f"0..{table_rows.shape[0] - 1}; make both from the same Interactions"
            )
    if tasks.past is not None and tasks.past.shape[1] != catalogue.item_row.shape[0]:
        raise MetarecError(
            f"the past of the tasks{scenario} has {tasks.past.shape[1]} item rows, and the catalogue has "
            f"{catalogue.item_row.shape[0]}; make both from the same Interactions"
        )


def batches(tasks: TaskSet, catalogue: Catalogue, size: int = 256) -> Iterator[tuple[np.ndarray, Task]]:
    """Device batches of few shapes: tasks sorted by support length, each batch padded to 8, 32, 128, ... support slots.

    Few widths are used, since compiling a program costs more than padding does.

    Yields ``(index, task)``: ``index`` [t] holds the positions of the tasks (t <= size), and every leaf of ``task`` has
    leading axis ``size``: the rest is padding with mask 0.

    Raises:
      MetarecError: a task has a user or an item that the catalogue lacks.
    """
    check_tasks(tasks, catalogue)
    slot = np.arange(1, tasks.support_mask.shape[1] + 1)
    lengths = np.max((tasks.support_mask > 0) * slot, axis=1, initial=0)
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), size):
        index = order[start : start + size]
        rows = np.concatenate([index, np.full(size - len(index), -1)])
        yield index, _device_task(tasks, catalogue, rows, _width(int(lengths[index[-1]])))


def _width(length: int) -> int:
    """
    >>> [_width(length) for length in (0, 8, 9, 32, 33, 200)]
    [8, 8, 32, 32, 128, 512]
    """
    width = 8
    while width < length:
        width *= 4
    return width


_columns = jax.jit(jax.vmap(inputs, (None, 0, 0)))


def _device_task(tasks: TaskSet, catalogue: Catalogue, rows: np.ndarray, width: int) -> Task:
    real = (rows >= 0)[:, None]

    def part(item: np.ndarray, target: np.ndarray, mask: np.ndarray, n: int) -> Examples:
        def fit(a: np.ndarray) -> np.ndarray:
            a = np.where(real, a[rows], 0)[:, :n]
            return np.pad(a, ((0, 0), (0, n - a.shape[1])))

        user = jnp.asarray(np.where(rows >= 0, tasks.user[rows], 0))
        columns = _columns(catalogue, user, jnp.asarray(fit(item)))
        return Examples(columns, jnp.asarray(fit(target)), jnp.asarray(fit(mask)))

    return Task(
        part(tasks.support_item, tasks.support_target, tasks.support_mask, width),
        part(tasks.query_item, tasks.query_target, tasks.query_mask, tasks.query_item.shape[1]),
    )
