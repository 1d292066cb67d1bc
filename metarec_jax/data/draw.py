"""Tasks for meta-training, drawn on the device.

Drawing needs no table of a user's history and no sort: a keyed permutation of ``0..n-1`` is evaluated only at the
positions wanted (swap-or-not, Hoang, Morris and Rogaway 2012), so that a draw costs the same for any history length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metarec_jax.core import Array, Examples, MetarecError, Task
from metarec_jax.data.catalogue import Catalogue, catalogue, inputs
from metarec_jax.data.interactions import Interactions, group_by_user

_ROUNDS = 12


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

    Returns:
      A source of tasks with ``support[1] * (1 + negatives)`` support and ``query * (1 + negatives)`` query slots.

    Raises:
      MetarecError: no user has ``support[0] + 1`` interactions, ``order="time"`` without timestamps, a number out of
        its range, or more interactions than int32 can count.
    """
    low, high = support
    _check_ranges(len(train), tasks, support, query, negatives)
    for name, chance in (("user_drop", user_drop), ("item_drop", item_drop), ("cold_tasks", cold_tasks)):
        if not 0 <= chance <= 1:
            raise MetarecError(f"{name} is {chance}; it is a chance, from 0 to 1")
    if order not in ("random", "time") or (order == "time" and train.timestamp is None):
        group_by_user(train, order)  # says what is wrong
    by, users, starts = group_by_user(train, "file" if train.timestamp is None else "time")
    counts = np.diff(starts)
    enough = counts >= low + 1
    if not enough.any():
        raise MetarecError(
            f"no user has {low + 1} interactions (the most is {counts.max(initial=0)}); "
            f"lower the support range {support}"
        )
    target = np.ones(len(train), np.float32) if train.rating is None else train.rating[by].astype(np.float32)
    by_item = train.item[np.lexsort((train.item, train.user))] if negatives else np.zeros(1)
    data = TaskData(
        user=jnp.asarray(users[enough], jnp.int32),
        start=jnp.asarray(starts[:-1][enough], jnp.int32),
        length=jnp.asarray(counts[enough], jnp.int32),
        item=jnp.asarray(train.item[by], jnp.int32),
        target=jnp.asarray(target),
        item_sorted=jnp.asarray(by_item, jnp.int32),
        pool=jnp.asarray(np.unique(train.item), jnp.int32),
        known=catalogue(train, train, user_rows),
    )

    def one(data: TaskData, key: Array) -> Task:
        k_user, k_size, k_place, k_drop, k_negative = jax.random.split(key, 5)
        who = jax.random.randint(k_user, (), 0, data.user.shape[0])
        start, n = data.start[who], data.length[who]
        q = jnp.minimum(query, n - low)
        s = jax.random.randint(k_size, (), low, jnp.minimum(high, n - q) + 1)
        slot_q, slot_s = jnp.arange(query, dtype=jnp.int32), jnp.arange(high, dtype=jnp.int32)
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


def _check_ranges(count: int, tasks: int, support: tuple[int, int], query: int, negatives: int) -> None:
    low, high = support
    if not 0 <= low <= high or high < 1:
        raise MetarecError(f"support is {support}; give (fewest, most) with 0 <= fewest <= most and most 1 or more")
    for name, value, least in (("tasks", tasks, 1), ("query", query, 1), ("negatives", negatives, 0)):
        if value < least:
            raise MetarecError(f"{name} is {value}; give {least} or more")
    if count >= 2**31:
        raise MetarecError(f"there are {count} interactions, and positions are int32; train on fewer than 2**31")


def permuted(x: Array, n: Array, key: Array) -> Array:
    """A keyed random permutation of ``0..n-1``, evaluated at ``x`` (int32, any shape; x >= n gives rubbish in range).

    Swap-or-not (Hoang, Morris and Rogaway, "An Enciphering Scheme Based on a Card Shuffle", 2012): each round pairs
    x with k - x (mod n) and swaps the pair or not by one bit of a hash of the larger.

    >>> [int(i) for i in jnp.sort(permuted(jnp.arange(5), jnp.int32(5), jax.random.key(0)))]
    [0, 1, 2, 3, 4]
    """
    words = jax.random.bits(key, (_ROUNDS, 2), jnp.uint32)
    pivots = (words[:, 0] % n.astype(jnp.uint32)).astype(jnp.int32)

    def swap_or_not(x: Array, word: tuple[Array, Array]) -> tuple[Array, None]:
        pivot, salt = word
        y = pivot - x
        y = jnp.where(y < 0, y + n, y)
        h = jnp.maximum(x, y).astype(jnp.uint32) * jnp.uint32(0x9E3779B1) + salt
        h = (h ^ (h >> 15)) * jnp.uint32(0x85EBCA77)
        h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE3D)
        return jnp.where((h >> 31) == 1, y, x), None

    # A scan, not a Python loop: fused into one kernel, every round would be computed anew for each of its two uses.
    return jax.lax.scan(swap_or_not, jnp.minimum(x, n - 1).astype(jnp.int32), (pivots, words[:, 1]))[0]


def draw_negatives(
    data: TaskData, start: Array, n: Array, count: int, key: Array, tries: int = 4
) -> tuple[Array, Array]:
    """``count`` items that the user whose interactions are ``start .. start+n`` never had, uniform over the pool.

    Returns items int32 ``[count]`` and ``free`` float32 ``[count]``: 0 where all ``tries`` draws hit the history.
    """
    drawn = data.pool[jax.random.randint(key, (tries, count), 0, data.pool.shape[0])]

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = low + (high - low) // 2  # not (low + high) // 2, which leaves int32 from 2**30 interactions on
        less = (data.item_sorted[middle] < drawn) & (low < high)
        return jnp.where(less, middle + 1, low), jnp.where(less, high, middle)

    ends = jnp.full(drawn.shape, start), jnp.full(drawn.shape, start + n)
    low, _ = jax.lax.fori_loop(0, max(1, int(data.item_sorted.shape[0]).bit_length()), halve, ends)
    had = (low < start + n) & (data.item_sorted[jnp.minimum(low, start + n - 1)] == drawn)
    first = jnp.argmin(had, axis=0)
    pick = lambda a: jnp.take_along_axis(a, first[None], axis=0)[0]  # noqa: E731
    return pick(drawn), 1.0 - pick(had).astype(jnp.float32)
