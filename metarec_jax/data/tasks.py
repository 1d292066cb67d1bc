"""Tasks: drawn on the device for meta-training, fixed on the host for evaluation.

Drawing needs no table of a user's history and no sort: a keyed permutation of ``0..n-1`` is evaluated only at the
positions wanted (swap-or-not, Hoang, Morris and Rogaway 2012), so that a draw costs the same for any history length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metarec_jax.core import Array, Examples, Inputs, MetarecError, Task
from metarec_jax.data.interactions import Interactions

_ROUNDS = 12


class Catalogue(NamedTuple):
    """What is known of users and items besides interactions; lives on the device.

    Attributes:
      user_row, item_row: int32 ``[num_rows]``: vocabulary row -> table row; 0 for one that training never saw.
      user, item: feature columns by name, ``[num_rows]`` or ``[num_rows, f]``.
    """

    user_row: Array
    item_row: Array
    user: dict[str, Array]
    item: dict[str, Array]


def catalogue(data: Interactions, train: Interactions | None = None, user_rows: str = "prior") -> Catalogue:
    """The catalogue of ``data``; ids without a row in ``train`` (default: ``data``) go to row 0.

    Args:
      user_rows: "prior" sends every user to row 0, the learned prior of a user; "own" keeps the rows of users in train.
    """
    train = data if train is None else train

    def trained(rows: np.ndarray, num_rows: int) -> Array:
        own = np.zeros(num_rows, np.int32)
        seen = np.unique(rows)
        own[seen] = seen
        return jnp.asarray(own)

    users = trained(train.user, data.users.num_rows)
    return Catalogue(
        user_row=users if user_rows == "own" else jnp.zeros_like(users),
        item_row=trained(train.item, data.items.num_rows),
        user={name: jnp.asarray(f.values) for name, f in data.user_features.items()},
        item={name: jnp.asarray(f.values) for name, f in data.item_features.items()},
    )


def inputs(
    known: Catalogue, user: Array, item: Array, keep_user: Array | None = None, keep: Array | None = None
) -> Inputs:
    """Input columns of one user and ``n`` items. User columns have leading axis 1: all examples share them.

    Args:
      user: int32 ``[]`` vocabulary row; item: int32 ``[n]`` vocabulary rows.
      keep_user, keep: bool ``[]`` and ``[n]``; where False, the id becomes the unknown one (the content stays).
    """
    user_id, item_id = known.user_row[user], known.item_row[item]
    user_id = user_id if keep_user is None else jnp.where(keep_user, user_id, 0)
    item_id = item_id if keep is None else jnp.where(keep, item_id, 0)
    columns = {"user_id": user_id[None], "item_id": item_id}
    columns |= {name: values[user][None] for name, values in known.user.items()}
    columns |= {name: values[item] for name, values in known.item.items()}
    return columns


@dataclass(frozen=True, eq=False)
class TaskSet:
    """Fixed tasks for validation or test, in vocabulary rows, on the host. Padding has item 0 and mask 0.

    Attributes:
      user: int32 ``[T]``.
      support_item, support_target, support_mask: ``[T, S]``; query_*: ``[T, Q]``.
    """

    user: np.ndarray
    support_item: np.ndarray
    support_target: np.ndarray
    support_mask: np.ndarray
    query_item: np.ndarray
    query_target: np.ndarray
    query_mask: np.ndarray

    def __len__(self) -> int:
        return len(self.user)

    def take(self, index: np.ndarray) -> TaskSet:
        """The tasks that an index array or a boolean mask names."""
        return TaskSet(*(getattr(self, f.name)[index] for f in fields(self)))


def _by_user(data: Interactions, rng: np.random.Generator, order: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row order grouped by user (inside: "time", "random" or "file"), the users, and the start of each group."""
    if order == "time" and data.timestamp is None:
        raise MetarecError("order='time' wants a timestamp column, and the data has none; use order='random'")
    inside = rng.permutation(len(data)) if order == "random" else np.arange(len(data))
    inside = np.asarray(data.timestamp) if order == "time" else inside
    by = np.lexsort((inside, data.user))
    users, starts = np.unique(data.user[by], return_index=True)
    return by, users, np.append(starts, len(by))


def make_tasks(
    data: Interactions,
    *,
    history: Interactions | None = None,
    query: int = 10,
    support: tuple[int, int] = (1, 100),
    ratings: tuple[int, int] | None = None,
    order: Literal["random", "time"] = "random",
    negatives: int = 0,
    seed: int = 0,
) -> TaskSet:
    """One task a user of ``data``: the last ``query`` interactions (of a shuffle, or in time), the rest support.

    Args:
      history: where given, the support comes from here (a warm user's known past) and all query items from ``data``.
      query: query examples at the most; a user with few keeps ``support[0]`` for the support first.
      support: fewest and most support examples; the most recent are kept. A user with fewer is left out.
      ratings: only users with this many interactions (low, high) in ``data``.
      negatives: implicit feedback: this many items the user never had, target 0, for each support positive.
    """
    rng = np.random.default_rng(seed)
    by, users, starts = _by_user(data, rng, order)
    past = None if history is None else _by_user(history, rng, order)
    target = np.ones(len(data), np.float32) if data.rating is None else data.rating
    past_target = (
        None if history is None else (np.ones(len(history), np.float32) if history.rating is None else history.rating)
    )
    chosen: list[tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    for k, user in enumerate(users):
        rows = by[starts[k] : starts[k + 1]]
        if ratings is not None and not ratings[0] <= len(rows) <= ratings[1]:
            continue
        if history is not None and past is not None and past_target is not None:
            at = np.searchsorted(past[1], user)
            found = at < len(past[1]) and past[1][at] == user
            old = past[0][past[2][at] : past[2][at + 1]] if found else past[0][:0]
            old, new = old[max(0, len(old) - support[1]) :], rows[max(0, len(rows) - query) :]
            known = (history.item[old], past_target[old])
        else:
            q = min(query, len(rows) - support[0])
            old, new = (rows[: len(rows) - q], rows[len(rows) - q :]) if q > 0 else (rows[:0], rows[:0])
            old = old[max(0, len(old) - support[1]) :]
            known = (data.item[old], target[old])
        if len(new) and len(old) >= support[0]:
            chosen.append((int(user), *known, data.item[new], target[new]))
    if negatives:
        chosen = [_with_negatives(task, data, history, negatives, rng) for task in chosen]
    return _pack(chosen)


def _with_negatives(
    task: tuple, data: Interactions, history: Interactions | None, count: int, rng: np.random.Generator
) -> tuple:
    user, items, target, query_items, query_target = task
    had = np.union1d(items, query_items)
    pool = np.setdiff1d(np.unique(data.item if history is None else history.item), had)
    drawn = rng.choice(pool, size=min(len(pool), count * len(items)), replace=False)
    return (
        user,
        np.concatenate([items, drawn.astype(np.int32)]),
        np.concatenate([target, np.zeros(len(drawn), np.float32)]),
        query_items,
        query_target,
    )


def _pack(chosen: list[tuple]) -> TaskSet:
    def pad(arrays: list[np.ndarray], dtype: Any) -> np.ndarray:
        out = np.zeros((len(arrays), max((len(a) for a in arrays), default=0)), dtype)
        for row, a in zip(out, arrays, strict=True):
            row[: len(a)] = a
        return out

    users, *columns = zip(*chosen, strict=True) if chosen else ((), (), (), (), ())
    s_item, s_target, q_item, q_target = (list(c) for c in columns)
    ones = lambda arrays: [np.ones(len(a), np.float32) for a in arrays]  # noqa: E731
    return TaskSet(
        np.asarray(users, np.int32),
        pad(s_item, np.int32),
        pad(s_target, np.float32),
        pad(ones(s_item), np.float32),
        pad(q_item, np.int32),
        pad(q_target, np.float32),
        pad(ones(q_item), np.float32),
    )


def batches(tasks: TaskSet, known: Catalogue, size: int = 256) -> Iterator[tuple[np.ndarray, Task]]:
    """Device batches of a few shapes: tasks of like support length together, padded to 8, 16, 32, ... support slots.

    Yields ``(index, task)``: ``index`` [t] says which tasks these are (t <= size), and every leaf of ``task`` has
    leading axis ``size``: the rest is padding with mask 0.
    """
    lengths = tasks.support_mask.sum(1).astype(int)
    widths = np.maximum(8, 2 ** np.ceil(np.log2(np.maximum(lengths, 1))).astype(int))
    for width in np.unique(widths):
        members = np.flatnonzero(widths == width)
        for start in range(0, len(members), size):
            index = members[start : start + size]
            rows = np.concatenate([index, np.full(size - len(index), -1)])
            yield index, _device_task(tasks, known, rows, int(width))


def _device_task(tasks: TaskSet, known: Catalogue, rows: np.ndarray, width: int) -> Task:
    real = (rows >= 0)[:, None]

    def part(item: np.ndarray, target: np.ndarray, mask: np.ndarray, n: int) -> Examples:
        def fit(a: np.ndarray) -> np.ndarray:
            a = np.where(real, a[rows], 0)[:, :n]
            return np.pad(a, ((0, 0), (0, n - a.shape[1])))

        user = jnp.asarray(np.where(rows >= 0, tasks.user[rows], 0))
        columns = jax.vmap(inputs, (None, 0, 0))(known, user, jnp.asarray(fit(item)))
        return Examples(columns, jnp.asarray(fit(target)), jnp.asarray(fit(mask)))

    return Task(
        part(tasks.support_item, tasks.support_target, tasks.support_mask, width),
        part(tasks.query_item, tasks.query_target, tasks.query_mask, tasks.query_item.shape[1]),
    )


class TaskData(NamedTuple):
    """Histories on the device, as CSR arrays in time order (or file order, without timestamps).

    Attributes:
      user: int32 ``[U]`` vocabulary rows of the users with enough interactions.
      start, length: int32 ``[U]``: user k's interactions are ``start[k] .. start[k] + length[k]``.
      item, target: ``[N]``; item_sorted: ``[N]``, each user's items in ascending order, to test membership.
      pool: int32 ``[M]`` the items that negatives are drawn from.
      known: the catalogue.
    """

    user: Array
    start: Array
    length: Array
    item: Array
    target: Array
    item_sorted: Array
    pool: Array
    known: Catalogue


class TaskSource(NamedTuple):
    """Where meta-training gets its tasks: ``draw(data, key) -> Task``, leading axis ``tasks``; pure, traced once."""

    data: Any
    draw: Callable[[Any, Array], Task]
    tasks: int


def task_source(
    train: Interactions,
    *,
    tasks: int = 64,
    support: tuple[int, int] = (3, 64),
    query: int = 10,
    order: Literal["random", "time"] = "random",
    user_rows: Literal["prior", "own"] = "prior",
    user_drop: float = 0.0,
    item_drop: float = 0.1,
    cold_tasks: float = 0.3,
    negatives: int = 0,
) -> TaskSource:
    """Draw batches of user tasks on the device.

    Args:
      tasks: T, tasks a batch.
      support: fewest and most support examples; the number is drawn uniformly for each task, as far as the user's
        history reaches.
      query: query examples (fewer where the history is short).
      order: "random": any interactions; "time": the support is the events just before a random moment, the query those
        after.
      user_rows: "prior": tasks carry the unknown user row, as a cold user does; "own": the user's own row.
      user_drop, item_drop: chance that a task's user id, or an example's item id, is replaced by the unknown id, so
        that priors and content are trained for those never seen.
      cold_tasks: chance that all items of a task are unknown, as they are to a user of new items.
      negatives: items the user never had, target 0, drawn for each positive, in support and query.

    Raises:
      MetarecError: no user has ``support[0] + 1`` interactions.
    """
    low, high = support
    by, users, starts = _by_user(train, np.random.default_rng(0), "time" if train.timestamp is not None else "file")
    counts = np.diff(starts)
    enough = counts >= low + 1
    if not enough.any():
        raise MetarecError(
            f"no user has {low + 1} interactions (the most is {counts.max(initial=0)}); "
            f"lower the support range {support}"
        )
    item = train.item[by]
    target = np.ones(len(train), np.float32) if train.rating is None else train.rating[by]
    data = TaskData(
        user=jnp.asarray(users[enough].astype(np.int32)),
        start=jnp.asarray(starts[:-1][enough].astype(np.int32)),
        length=jnp.asarray(counts[enough].astype(np.int32)),
        item=jnp.asarray(item),
        target=jnp.asarray(target),
        item_sorted=jnp.asarray(
            train.item[np.lexsort((train.item, train.user))] if negatives else np.zeros(1, np.int32)
        ),
        pool=jnp.asarray(np.unique(train.item).astype(np.int32)),
        known=catalogue(train, train, user_rows),
    )

    def one(data: TaskData, key: Array) -> Task:
        k_user, k_size, k_place, k_drop, k_negative = jax.random.split(key, 5)
        who = jax.random.randint(k_user, (), 0, data.user.shape[0])
        start, n = data.start[who], data.length[who]
        q = jnp.minimum(query, n - low)
        s = jax.random.randint(k_size, (), low, jnp.minimum(high, n - q) + 1)
        slot_q, slot_s = jnp.arange(query), jnp.arange(high)
        if order == "random":
            place = permuted(jnp.concatenate([slot_q, q + slot_s]), n, k_place)
            place_q, place_s = place[:query], place[query:]
        else:
            cut = jax.random.randint(k_place, (), s, n - q + 1)
            place_q, place_s = cut + slot_q, cut - s + slot_s
        mask_q, mask_s = slot_q < q, slot_s < s
        at_q, at_s = (start + jnp.where(m, p, 0) for m, p in ((mask_q, place_q), (mask_s, place_s)))
        user = data.user[who]
        keys = jax.random.split(k_drop, 4)
        drop = jnp.where(jax.random.bernoulli(keys[0], cold_tasks), 1.0, item_drop)
        keep_user = None if user_drop == 0 else jax.random.bernoulli(keys[3], 1 - user_drop)

        def examples(at: Array, mask: Array, k_drop: Array, k_negative: Array) -> Examples:
            items, targets, mask = data.item[at], data.target[at], mask.astype(jnp.float32)
            if negatives:
                drawn, free = draw_negatives(data, start, n, mask.shape[0] * negatives, k_negative)
                items = jnp.concatenate([items, drawn])
                targets = jnp.concatenate([targets, jnp.zeros_like(drawn, jnp.float32)])
                mask = jnp.concatenate([mask, jnp.repeat(mask, negatives) * free])
            keep = None if max(item_drop, cold_tasks) == 0 else jax.random.bernoulli(k_drop, 1 - drop, items.shape)
            items = jnp.where(mask > 0, items, 0)
            return Examples(inputs(data.known, user, items, keep_user, keep), jnp.where(mask > 0, targets, 0.0), mask)

        k_neg_s, k_neg_q = jax.random.split(k_negative)
        return Task(examples(at_s, mask_s, keys[1], k_neg_s), examples(at_q, mask_q, keys[2], k_neg_q))

    def draw(data: TaskData, key: Array) -> Task:
        return jax.vmap(one, (None, 0))(data, jax.random.split(key, tasks))

    return TaskSource(data, draw, tasks)


def permuted(x: Array, n: Array, key: Array) -> Array:
    """A keyed random permutation of ``0..n-1``, evaluated at ``x`` (int32, any shape; x >= n gives rubbish in range).

    Swap-or-not (Hoang, Morris and Rogaway, "An Enciphering Scheme Based on a Card Shuffle", 2012): each round pairs
    x with k - x (mod n) and swaps the pair or not by one bit of a hash of the larger.

    >>> [int(i) for i in jnp.sort(permuted(jnp.arange(5), jnp.int32(5), jax.random.key(0)))]
    [0, 1, 2, 3, 4]
    """
    words = jax.random.bits(key, (_ROUNDS, 2), jnp.uint32)
    pivots = (words[:, 0] % n.astype(jnp.uint32)).astype(jnp.int32)
    x = jnp.minimum(x, n - 1)
    for r in range(_ROUNDS):
        y = pivots[r] - x
        y = jnp.where(y < 0, y + n, y)
        h = jnp.maximum(x, y).astype(jnp.uint32) * jnp.uint32(0x9E3779B1) + words[r, 1]
        h = (h ^ (h >> 15)) * jnp.uint32(0x85EBCA77)
        h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE3D)
        x = jnp.where((h >> 31) == 1, y, x)
    return x


def draw_negatives(
    data: TaskData, start: Array, n: Array, count: int, key: Array, tries: int = 4
) -> tuple[Array, Array]:
    """``count`` items that the user whose interactions are ``start .. start+n`` never had, uniform over the pool.

    Returns items int32 ``[count]`` and ``free`` float32 ``[count]``: 0 where all ``tries`` draws hit the history.
    """
    drawn = data.pool[jax.random.randint(key, (tries, count), 0, data.pool.shape[0])]
    low, high = jnp.full(drawn.shape, start), jnp.full(drawn.shape, start + n)
    for _ in range(max(1, int(data.item_sorted.shape[0]).bit_length())):
        middle = (low + high) // 2
        less = (data.item_sorted[middle] < drawn) & (low < high)
        low, high = jnp.where(less, middle + 1, low), jnp.where(less, high, middle)
    had = (low < start + n) & (data.item_sorted[jnp.minimum(low, start + n - 1)] == drawn)
    first = jnp.argmin(had, axis=0)
    pick = lambda a: jnp.take_along_axis(a, first[None], axis=0)[0]  # noqa: E731
    return pick(drawn), 1.0 - pick(had).astype(jnp.float32)
