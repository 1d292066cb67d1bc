"""Tasks of a store, streamed from disk: every epoch visits each user once, in a new order; grain reads ahead.

A batch depends only on the seed and the step, so that a run that resumes at step k starts with batch k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from metarec_jax.core import Array, Examples, Inputs, MetarecError, Task
from metarec_jax.data.draw import TaskSource, _check_ranges, _streams, happens, negatives_of, random_words
from metarec_jax.data.store.opened import Store, lengths, read_events

_ROUNDS = 12
_STEPS = 2**62


def stream_source(
    store: Store,
    users: np.ndarray | None = None,
    items: np.ndarray | None = None,
    *,
    tasks: int = 64,
    support: tuple[int, int] = (3, 64),
    query: int = 10,
    order: Literal["random", "time"] = "random",
    user_rows: Literal["prior", "own"] = "prior",
    user_drop: float = 0.0,
    item_drop: float = 0.1,
    cold_tasks: float = 0.3,
    negatives: int | None = None,
    seed: int = 0,
    ahead: int = 64,
    threads: int = 2,
) -> TaskSource:
    """Draw batches of user tasks from a store, as `metarec_jax.data.draw.task_source` does from memory.

    The host chooses users, the events of support and query, and negatives; the device hides ids and looks features up.
    Unlike in `task_source`, each user is visited once per epoch, in a shuffled order, instead of with replacement.

    Args:
      users: rows of the users to draw from (default: all), without the held-out ones, see `hold_out`.
      items: ascending rows of the items that negatives are drawn from; default: all.
      seed: seed of the order of users, of support and query, and of negatives.
      ahead: number of batches read ahead of the device; threads: number of reading threads.
      tasks, support, query, order, user_rows, user_drop, item_drop, cold_tasks, negatives: as in `task_source`.

    Returns:
      A source whose host batches hold ``user`` int32 ``[T]``, ``sizes`` int32 ``[T, 2]`` (support and query examples),
      ``events`` int32 ``[T, query + support[1], 1 or 2]`` (item rows and ratings by their bits, the query first; beyond
      the sizes there are arbitrary events of the user), and with negatives ``negatives`` int32 ``[T, (query +
      support[1]) * negatives]``, 0 for a user who had all items.

    Raises:
      MetarecError: as `task_source`; grain is not installed; or, while streaming, the store is damaged.
    """
    (low, high), negatives = support, negatives_of(negatives, store.implicit)
    _check_ranges(0, tasks, support, query, negatives)
    for name, chance in (("user_drop", user_drop), ("item_drop", item_drop), ("cold_tasks", cold_tasks)):
        if not 0 <= chance <= 1:
            raise MetarecError(f"{name} is a probability, from 0 to 1, got {chance}; correct it")
    if user_rows not in ("prior", "own"):
        raise MetarecError(f"user_rows {user_rows!r} is not known; use 'prior' or 'own'")
    if order == "time" and store.untimed:
        raise MetarecError(
            f"--order time requires the time of every interaction, and {store.untimed} of the store {store.path} have "
            "none; use --order random, or prepare it without them"
        )
    if order not in ("random", "time") or (order == "time" and not store.timestamps):
        asked = f"--order {order} (order={order!r} in Python)"
        raise MetarecError(f"{asked} requires timestamps, which the store lacks; use --order random")
    if not 0 <= seed < 2**32:
        raise MetarecError(f"seed must be from 0 to 2**32 - 1, got {seed}")
    counts = lengths(store)
    chosen = np.arange(1, store.users + 1, dtype=np.int32) if users is None else np.asarray(users, np.int32)
    if chosen.size and (chosen.min() < 1 or chosen.max() > store.users):
        raise MetarecError(f"users must be rows 1 to {store.users} of the store, got {chosen.min()} to {chosen.max()}")
    chosen = chosen[counts[chosen - 1] >= low + 1]
    if not len(chosen):
        raise MetarecError(
            f"no user has {low + 1} interactions to train on (the maximum is {store.longest}), which --support {low} "
            f"{high} (support= in Python) requires; lower its first number"
        )
    del counts
    pool = np.arange(1, store.items + 1, dtype=np.int32) if items is None else np.asarray(items, np.int32)
    place_of = np.full(store.items + 1 if negatives else 0, -1, np.int32)
    if negatives:
        place_of[pool] = np.arange(len(pool))

    def batch(step: int) -> dict[str, np.ndarray]:
        rng = _generator(seed, step, 0)
        user = chosen[_visited(step * tasks, tasks, len(chosen), seed)]
        starts, events = read_events(store, user)
        n = np.diff(starts)[:, None]
        q = np.minimum(query, n - low)
        s = low + _below(_random(rng, (tasks, 1)), np.minimum(high, n - q) - low + 1)
        slot_q, slot_s = np.arange(query)[None], np.arange(high)[None]
        if order == "random":
            place = _permuted(_side_by_side(tasks, slot_q, q + slot_s), n, rng)
        else:
            cut = s + _below(_random(rng, (tasks, 1)), n - q - s + 1)
            place = np.minimum(_side_by_side(tasks, cut + slot_q, cut - s + slot_s), n - 1)
        found = {
            "user": user,
            "sizes": np.concatenate([s, q], axis=1).astype(np.int32),
            "events": events[starts[:-1, None] + place],
        }
        if negatives:
            words = _random(rng, (tasks, (query + high) * negatives))
            found["negatives"] = _never_had(starts, place_of[events[:, 0]], pool, words)
        return found

    def draw(data: Any, key: Array) -> Task:
        tables, given = data
        for_cold, for_user_drop, for_drop = _streams(key, 3)
        s, q = given["sizes"][:, :1], given["sizes"][:, 1:]
        items = given["events"][..., 0]
        if store.implicit:
            targets = jnp.ones(items.shape, jnp.float32)
        else:
            targets = jax.lax.bitcast_convert_type(given["events"][..., 1], jnp.float32)
        keep_user = ~happens(random_words(for_user_drop, (tasks,)), user_drop) & (user_rows == "own")
        keep = ~happens(random_words(for_drop, (tasks, (query + high) * (1 + negatives))), item_drop)
        keep &= ~happens(random_words(for_cold, (tasks, 1)), cold_tasks)

        def examples(first: int, last: int, real: Array) -> Examples:
            item, target = (jnp.where(real, a[:, first:last], 0) for a in (items, targets))
            mask = real.astype(jnp.float32)
            if negatives:
                drawn = given["negatives"][:, first * negatives : last * negatives]
                mask_too = jnp.repeat(mask, negatives, axis=1) * (drawn > 0)
                item, mask = (
                    jnp.concatenate(pair, 1) for pair in ((item, jnp.where(mask_too > 0, drawn, 0)), (mask, mask_too))
                )
                target = jnp.concatenate([target, jnp.zeros_like(mask_too)], 1)
            kept = keep[:, first * (1 + negatives) : last * (1 + negatives)]
            return Examples(_columns(tables, given["user"], item, keep_user, kept), target, mask)

        return Task(support=examples(query, query + high, slot_s < s), query=examples(0, query, slot_q < q))

    slot_q, slot_s = (np.arange(size, dtype=np.int32)[None] for size in (query, high))
    tables = {
        side: {name: jnp.asarray(f.values) for name, f in features.items()}
        for side, features in (("user", store.user_features), ("item", store.item_features))
    }
    return TaskSource(tables, draw, tasks, _stream(batch, ahead, threads))


def _stream(
    batch: Callable[[int], dict[str, np.ndarray]], ahead: int, threads: int
) -> Callable[[int], Iterator[dict[str, np.ndarray]]]:
    """``stream(step)``: ``batch(step)``, ``batch(step + 1)``, ..., made ahead of their use."""
    try:
        import grain
    except ImportError as error:
        raise MetarecError(
            "streaming requires grain, which is not installed; pip install 'metarec_jax[store]'"
        ) from error

    every = grain.MapDataset.range(_STEPS).map(batch)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    return lambda step: iter(every[step:].to_iter_dataset(options))


def _visited(first: int, count: int, users: int, seed: int) -> np.ndarray:
    """The users ``0..users-1`` at positions ``first .. first + count - 1`` of an endless sequence of epochs.

    Each epoch is a random permutation, evaluated only where required: no array of all users is shuffled, and resuming
    at any position costs nothing.

    >>> sorted(_visited(0, 5, 5, seed=0).tolist()), sorted(_visited(5, 5, 5, seed=0).tolist())
    ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])
    """
    epoch, place = np.divmod(np.arange(first, first + count), users)
    users_at = np.empty(count, np.int64)
    for number in range(int(epoch[0]), int(epoch[-1]) + 1):
        inside = epoch == number
        rng = _generator(seed, number, 1)
        users_at[inside] = _permuted(place[None, inside], np.array([[users]]), rng)[0]
    return users_at


def _generator(seed: int, number: int, purpose: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, number], counter=[0, 0, 0, purpose]))


def _columns(tables: Any, user: Array, item: Array, keep_user: Array, keep: Array) -> Inputs:
    """`draw._columns` for rows of the store: a table row is a vocabulary row."""
    columns = {"user_id": jnp.where(keep_user, user, 0)[:, None], "item_id": jnp.where(keep, item, 0)}
    columns |= {name: values[user][:, None] for name, values in tables["user"].items()}
    return columns | {name: values[item] for name, values in tables["item"].items()}


def _random(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Random words, uint32. They are raw words of the generator, which are stable across versions of NumPy."""
    count = int(np.prod(shape))
    return rng.bit_generator.random_raw((count + 1) // 2).view(np.uint32)[:count].reshape(shape)


def _below(word: np.ndarray, n: np.ndarray) -> np.ndarray:
    """``floor(word n / 2^32)``, int64: a number of ``0..n-1`` from a random word; 0 where n is 0."""
    return (word.astype(np.uint64) * n.astype(np.uint64) >> np.uint64(32)).astype(np.int64)


def _side_by_side(tasks: int, *parts: np.ndarray) -> np.ndarray:
    return np.concatenate([np.broadcast_to(part, (tasks, part.shape[-1])) for part in parts], axis=1)


def _permuted(x: np.ndarray, n: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random permutation of ``0..n-1`` for each row, at ``x`` ``[T, K]``; n ``[T, 1]``; x >= n gives some x < n.

    As `metarec_jax.data.draw.permuted`, which has the source and the quality.
    """
    size = n.astype(np.uint32)
    pivots, factors, terms = _random(rng, (3, _ROUNDS, len(n), 1))
    x = np.minimum(x, n - 1).astype(np.uint32)
    for pivot, factor, term in zip(_below(pivots, n).astype(np.uint32), factors, terms, strict=True):
        y = pivot - x
        np.minimum(y, y + size, out=y)  # below 0, y has wrapped round and is the larger
        np.copyto(x, y, where=(np.maximum(x, y) * factor + term).view(np.int32) < 0)
    return x.astype(np.int64)


def _never_had(starts: np.ndarray, place: np.ndarray, pool: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Items of the pool that each user never had, uniform, with replacement; 0 for one who had the whole pool.

    As `metarec_jax.data.draw.draw_negatives`: the r-th item that a user lacks is at position r + k of the pool, where k
    of the user's own items precede it. With ``b_i`` free items before the i-th own one, k counts ``b_i <= r``.

    Args:
      starts: starts of the histories, from `read_events`; place: position of each of their items in the pool, -1 for
        one that is not in it; words: uint32 ``[T, count]``.

    >>> starts, place, pool = np.array([0, 2, 6]), np.array([3, 1, 0, 1, 2, 3]), np.array([5, 6, 7, 8])
    >>> words = np.broadcast_to(np.uint32([0, 2**31]), (2, 2))
    >>> _never_had(starts, place, pool, words).tolist()  # the first had 6 and 8 of 5..8; the second all four
    [[5, 7], [0, 0]]
    """
    tasks, size = len(starts) - 1, np.int64(len(pool) + 1)
    owner = np.repeat(np.arange(tasks), np.diff(starts))
    own = np.sort((owner * size + place)[place >= 0])
    own = own[np.append(True, own[1:] != own[:-1])[: len(own)]]
    first = np.searchsorted(own, np.arange(tasks + 1) * size)
    before = own - (np.arange(len(own)) - np.repeat(first[:-1], np.diff(first)))  # owner * size + b_i
    missing = len(pool) - np.diff(first)[:, None]
    number = _below(words, missing)
    k = np.searchsorted(before, number + (np.arange(tasks) * size)[:, None], side="right") - first[:-1, None]
    drawn = pool[np.minimum(number + k, len(pool) - 1)]
    return np.where(missing > 0, drawn, 0).astype(np.int32)
