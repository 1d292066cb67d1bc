"""Tasks for meta-training, drawn on the device.

Drawing requires no table of a user's history and no sort: a keyed permutation of ``0..n-1`` is evaluated only at the
required positions (swap-or-not, Hoang, Morris and Rogaway 2012), so that a draw costs the same for any history length.

JAX's generator is called once per batch, for two words per purpose; they key a counter hash (`random_words`) that
makes the rest. A random word w becomes a number below n as ``floor(w n / 2^32)``, so that the probabilities of two
numbers differ by at most a factor of 1 + n / 2^32. Probabilities are rounded to 2^-24.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metarec_jax.core import Array, Examples, Inputs, MetarecError, Task
from metarec_jax.data.catalogue import Catalogue, catalogue
from metarec_jax.data.interactions import Interactions, group_by_user

CLICK_NEGATIVES = 4
"""Negatives for each click by default, in training, in fixed tasks and in serving; for ratings there are none."""
_ROUNDS, _ROUNDS_AT_ONCE = 12, 3


class TaskData(NamedTuple):
    """Histories on the device, as CSR arrays in time order (or file order, without timestamps).

    Attributes:
      users: int32 ``[U, 4]``, the users with enough interactions: vocabulary row, start, length, and the number of
        distinct items. A user's interactions are ``events[start : start + length]``.
      events: int32 ``[N, 2]``: the item's vocabulary row, and the target, a float32 by its bits.
      free_before: int32 ``[N]``: entry ``start + i`` counts the items of the pool that the user never had and that
        precede the user's i-th distinct item. Empty if no negatives are drawn.
      pool: int32 ``[M]``: the items that negatives are drawn from, ascending.
      known: the catalogue.
    """

    users: Array
    events: Array
    free_before: Array
    pool: Array
    known: Catalogue


class TaskSource(NamedTuple):
    """The source of tasks for meta-training: ``draw(data, key) -> Task``, leading axis ``tasks``; pure, traced once.

    ``draw`` belongs to its ``data``: it may treat sizes of the data as constants.

    Attributes:
      stream: for data that is not on the device: ``stream(step)`` yields one host batch per outer step, starting with
        that of ``step``: pytrees of NumPy arrays of equal shapes that depend only on the step, so that a run resumes
        exactly. ``draw`` is then called with ``(data, batch)`` instead of ``data``.
    """

    data: Any
    draw: Callable[[Any, Array], Task]
    tasks: int
    stream: Callable[[int], Iterator[Any]] | None = None


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
    negatives: int | None = None,
    whole: bool = False,
) -> TaskSource:
    """Draw batches of user tasks on the device.

    Args:
      tasks: T, tasks per batch.
      support: minimum and maximum number of support examples; the number is drawn uniformly for each task, up to the
        length of the user's history.
      query: query examples (fewer if the history is short).
      order: "random": any interactions; "time": the support is the events just before a random time, the query those
        after it.
      user_rows: "prior": tasks have the unknown user row, like a cold user; "own": the user's own row.
      user_drop, item_drop: probability of replacing a task's user id, or an example's item id, by the unknown id, which
        trains priors and content for new users and items.
      cold_tasks: probability that all items of a task are unknown, as for a user of new items.
      negatives: sampled items per positive that the user never had, with target 0, in support and query; default:
        `CLICK_NEGATIVES` for clicks, 0 for ratings.
      whole: take all of a history, up to ``support[1]`` support examples, instead of a random number of them; for
        losses that divide the examples themselves.

    Returns:
      A source of tasks with ``support[1] * (1 + negatives)`` support and ``query * (1 + negatives)`` query slots.

    Raises:
      MetarecError: no user has ``support[0] + 1`` interactions, ``order="time"`` without timestamps, a number is out of
        range, or there are more interactions than int32 can count.
    """
    (low, high), negatives = support, negatives_of(negatives, train.implicit)
    _check_ranges(len(train), tasks, support, query, negatives)
    for name, chance in (("user_drop", user_drop), ("item_drop", item_drop), ("cold_tasks", cold_tasks)):
        if not 0 <= chance <= 1:
            raise MetarecError(f"{name} is a probability, from 0 to 1, got {chance}; correct it")
    if order not in ("random", "time") or (order == "time" and not train.timed):
        group_by_user(train, order)  # raises
    data, lengths = _on_device(train, support, user_rows, negatives)
    shortest, longest = int(lengths.min()), int(lengths.max())
    # Slots beyond the last support, so that their number is a multiple of 8, the vector width of a CPU.
    slot_q, slot_s = (np.arange(size, dtype=np.int32)[None] for size in (query, high + -(query + high) % 8))

    def draw(data: TaskData, key: Array) -> Task:
        for_user, for_size, for_place, for_cold, for_user_drop, for_drop, for_negatives = _streams(key, 7)
        who = data.users[_below(random_words(for_user, (tasks,)), data.users.shape[0])]
        user, (start, n, distinct) = who[:, 0], (who[:, k : k + 1] for k in (1, 2, 3))
        # Sizes that no history of this data shortens are constants, and so are their masks.
        q: Any = query if shortest >= low + query else jnp.minimum(query, n - low)
        s: Any = high
        if low < high and whole:
            s = jnp.minimum(high, n - q)
        elif low < high:
            s = low + _below(random_words(for_size, (tasks, 1)), jnp.minimum(high, n - q) - low + 1)
        if order == "random":
            place = _permuted(_side_by_side(tasks, slot_q, q + slot_s), n[:, 0], for_place)
        else:
            cut = s + _below(random_words(for_place, (tasks, 1)), n - q - s + 1)
            place = jnp.minimum(_side_by_side(tasks, cut + slot_q, cut - s + slot_s), n - 1)
        events = data.events.at[(start + place).astype(jnp.uint32)].get(mode="promise_in_bounds")
        items, targets = events[..., 0], jax.lax.bitcast_convert_type(events[..., 1], jnp.float32)
        if negatives:
            words = random_words(for_negatives, (tasks, (query + high) * negatives))
            drawn, free = _free_items(data, start, distinct, words, longest)
        keep_user = None if user_drop == 0 else ~happens(random_words(for_user_drop, (tasks,)), user_drop)
        keep = None
        if max(item_drop, cold_tasks) > 0:
            keep = ~happens(random_words(for_drop, (tasks, (query + high) * (1 + negatives))), item_drop)
            keep &= ~happens(random_words(for_cold, (tasks, 1)), cold_tasks)

        def examples(first: int, last: int, real: Any) -> Examples:
            item, target = (jnp.where(real, a[:, first:last], 0) for a in (items, targets))
            mask = jnp.broadcast_to(real, item.shape).astype(jnp.float32)
            if negatives:
                mask_too = jnp.repeat(mask, negatives, axis=1) * free
                item_too = jnp.where(mask_too > 0, drawn[:, first * negatives : last * negatives], 0)
                item, mask = jnp.concatenate([item, item_too], 1), jnp.concatenate([mask, mask_too], 1)
                target = jnp.concatenate([target, jnp.zeros_like(mask_too)], 1)
            kept = None if keep is None else keep[:, first * (1 + negatives) : last * (1 + negatives)]
            return Examples(_columns(data.known, user, item, keep_user, kept), target, mask)

        return Task(support=examples(query, query + high, slot_s[:, :high] < s), query=examples(0, query, slot_q < q))

    return TaskSource(data, draw, tasks)


def negatives_of(negatives: int | None, implicit: bool) -> int:
    """Negatives for each positive: as given; by default `CLICK_NEGATIVES` for clicks and 0 for ratings.

    >>> negatives_of(None, True), negatives_of(None, False), negatives_of(2, True)
    (4, 0, 2)
    """
    return negatives if negatives is not None else CLICK_NEGATIVES if implicit else 0


def _on_device(
    train: Interactions, support: tuple[int, int], user_rows: Literal["prior", "own"], negatives: int
) -> tuple[TaskData, np.ndarray]:
    """The arrays that tasks are drawn from, and the lengths of the histories that are long enough."""
    low, high = support
    by, users, starts = group_by_user(train, "time" if train.timed else "file")
    counts = np.diff(starts)
    enough = counts >= low + 1
    if not enough.any():
        raise MetarecError(
            f"no user has {low + 1} interactions to train on (the maximum is {counts.max(initial=0)}), which --support "
            f"{low} {high} (support= in Python) requires; lower its first number"
        )
    target = np.ones(len(train), np.float32) if train.rating is None else train.rating[by].astype(np.float32)
    pool = np.unique(train.item)
    distinct, free_before = counts, np.zeros(0, np.int32)
    if negatives:
        free_before = np.zeros(len(train), np.int32)
        by_item = np.lexsort((train.item, train.user))
        user, item = train.user[by_item], train.item[by_item]
        first = np.append(True, (user[1:] != user[:-1]) | (item[1:] != item[:-1]))
        owner = np.searchsorted(users, user[first])
        distinct = np.bincount(owner, minlength=len(users))
        number = np.arange(len(owner)) - (np.cumsum(distinct) - distinct)[owner]
        free_before[starts[owner] + number] = np.searchsorted(pool, item[first]) - number
    data = TaskData(
        users=jnp.asarray(np.stack([users, starts[:-1], counts, distinct], 1)[enough], jnp.int32),
        events=jnp.asarray(np.stack([train.item[by].astype(np.int32), target.view(np.int32)], 1)),
        free_before=jnp.asarray(free_before),
        pool=jnp.asarray(pool, jnp.int32),
        known=catalogue(train, train, user_rows),
    )
    return data, counts[enough]


def _check_ranges(count: int, tasks: int, support: tuple[int, int], query: int, negatives: int) -> None:
    low, high = support
    if not 0 <= low <= high or high < 1:
        raise MetarecError(
            f"support must be (minimum, maximum), 0 <= minimum <= maximum and maximum >= 1, got {support}"
        )
    for name, value, least in (("tasks", tasks, 1), ("query", query, 1), ("negatives", negatives, 0)):
        if value < least:
            raise MetarecError(f"{name} must be {least} or more, got {value}")
    if count >= 2**31:
        raise MetarecError(f"there are {count} interactions, and positions are int32; train on fewer than 2**31")


def _side_by_side(tasks: int, *parts: Any) -> Array:
    """``[T, m + n]`` of ``[1 or T, m]`` and ``[1 or T, n]``."""
    return jnp.concatenate([jnp.broadcast_to(part, (tasks, part.shape[-1])) for part in parts], axis=1)


def _columns(known: Catalogue, user: Array, item: Array, keep_user: Array | None, keep: Array | None) -> Inputs:
    """`catalogue.inputs` for T users ``[T]`` and their items ``[T, n]``, all of them in training: the table row of an
    item is then its vocabulary row."""
    user_id = known.user_row[user]
    user_id = user_id if keep_user is None else jnp.where(keep_user, user_id, 0)
    columns = {"user_id": user_id[:, None], "item_id": item if keep is None else jnp.where(keep, item, 0)}
    columns |= {name: values[user][:, None] for name, values in known.user.items()}
    return columns | {name: values[item] for name, values in known.item.items()}


def _streams(key: Array, count: int) -> Array:
    """uint32 ``[count, 2]``: two words per purpose, from the generator of the key."""
    return jax.random.bits(key, (count, 2), jnp.uint32)


def random_words(stream: Array, shape: tuple[int, ...]) -> Array:
    """Random uint32 words: a hash of the counters 0, 1, ... under the two words of ``stream``.

    The mixing is that of triple32 (Wellons, "hash-prospector", 2018), the second word added after its first product.
    """
    counter = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        counter = counter * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    h = counter + stream[0]
    h = (h ^ (h >> 17)) * jnp.uint32(0xED5AD4BB) + stream[1]
    h = (h ^ (h >> 11)) * jnp.uint32(0xAC4C1B51)
    h = (h ^ (h >> 15)) * jnp.uint32(0x31848BAB)
    return h ^ (h >> 14)


def _below(word: Array, n: Array | int) -> Array:
    """``floor(word n / 2^32)``, int32: a number of ``0..n-1`` from a random word; 0 where n is 0."""
    n = jnp.asarray(n).astype(jnp.uint32)
    word_low, word_high, n_low, n_high = word & 0xFFFF, word >> 16, n & 0xFFFF, n >> 16
    middle = word_high * n_low + (word_low * n_low >> 16)
    other = word_low * n_high + (middle & 0xFFFF)
    return (word_high * n_high + (middle >> 16) + (other >> 16)).astype(jnp.int32)


def happens(word: Array, chance: float) -> Array:
    """True with this probability, to 2^-24."""
    if chance == 0:
        return jnp.zeros(word.shape, bool)
    return (word >> 8) < jnp.uint32(round(chance * 2**24))


def permuted(x: Array, n: Array, key: Array) -> Array:
    """A keyed random permutation of ``0..n-1``, evaluated at ``x`` (int32, any shape; x >= n gives an arbitrary x < n).

    Swap-or-not (Hoang, Morris and Rogaway, "An Enciphering Scheme Based on a Card Shuffle", 2012): each of 12 rounds
    pairs x with k - x (mod n), k random, and swaps the pair or not by a random bit of the pair. With probability 2^-12
    all rounds leave a point in place, or keep the distance of two points: the result deviates that far from uniform.
    The bit is the highest of ``a max(x, k - x) + b`` mod 2^32 with a and b random, so that in a round the bits of two
    pairs are independent (Dietzfelbinger, "Universal Hashing and k-wise Independent Random Variables via Integer
    Arithmetic without Primes", 1996).

    >>> [int(i) for i in jnp.sort(permuted(jnp.arange(5), jnp.int32(5), jax.random.key(0)))]
    [0, 1, 2, 3, 4]
    """
    return _permuted(x.reshape(1, -1), jnp.reshape(n, (1,)), _streams(key, 1)[0]).reshape(x.shape)


def _permuted(x: Array, n: Array, stream: Array) -> Array:
    """`permuted` for T permutations at once: x ``[T, K]``, n ``[T]``."""
    pivots, factors, terms = random_words(stream, (3, _ROUNDS, n.shape[0]))
    size = n.astype(jnp.uint32)[:, None]

    def swap_or_not(x: Array, rounds: tuple[Array, Array, Array]) -> tuple[Array, None]:
        for pivot, factor, term in zip(*(words[..., None] for words in rounds), strict=True):
            y = pivot - x
            y = jnp.minimum(y, y + size)  # below 0, y has wrapped round and is the larger
            x = jnp.where((jnp.maximum(x, y) * factor + term) >> 31 == 1, y, x)
        return x, None

    # A scan, not a Python loop over all rounds: XLA would fuse the words into it, and hash them again for each slot.
    rounds = (_below(pivots, n[None]).astype(jnp.uint32), factors, terms)
    some = jax.tree.map(lambda a: a.reshape(-1, _ROUNDS_AT_ONCE, n.shape[0]), rounds)
    return jax.lax.scan(swap_or_not, jnp.minimum(x.astype(jnp.uint32), size - 1), some)[0].astype(jnp.int32)


def draw_negatives(data: TaskData, start: Array, n: Array, count: int, key: Array) -> tuple[Array, Array]:
    """``count`` items that each user never had, uniform over those of the pool, with replacement.

    Args:
      start, n: int32 ``[T]``: the users' first interaction and number of distinct items, as in ``data.users``.

    Returns:
      Items int32 ``[T, count]``, and ``free`` float32 ``[T, 1]``: 0 for a user who had the whole pool.

    >>> from metarec_jax.data.interactions import Vocabulary
    >>> ids = Vocabulary(np.arange(5))
    >>> train = Interactions(np.array([1, 1, 2, 2, 2, 2]), np.array([4, 2, 1, 2, 3, 4]), None, None, ids, ids)
    >>> data = task_source(train, support=(1, 1), negatives=1).data
    >>> user, start, length, distinct = data.users.T
    >>> items, free = draw_negatives(data, start, distinct, 50, jax.random.key(0))
    >>> sorted({int(i) for i in items[0]}), free[:, 0].tolist()  # user 1 had 2 and 4 of 1..4; user 2 had all four
    ([1, 3], [1.0, 0.0])
    """
    words = random_words(_streams(key, 1)[0], (start.shape[0], count))
    return _free_items(data, start[:, None], n[:, None], words, data.free_before.shape[0])


def _free_items(data: TaskData, start: Array, distinct: Array, words: Array, longest: int) -> tuple[Array, Array]:
    """`draw_negatives` from words ``[T, count]``; start, distinct ``[T, 1]``, distinct at most ``longest``.

    The r-th item that a user never had is at position r + k of the pool, where k of the user's own items precede it:
    those with ``free_before <= r``. These are ascending, so a binary search gives k.
    """
    missing = data.pool.shape[0] - distinct
    number = _below(words, missing)
    steps = 2 ** np.arange(max(1, longest.bit_length()))[::-1].astype(np.int32)

    def halve(k: Array, step: Array) -> tuple[Array, None]:
        last = k + step - 1
        before = data.free_before[start + jnp.minimum(last, distinct - 1)] <= number
        return jnp.where((last < distinct) & before, last + 1, k), None

    k, _ = jax.lax.scan(halve, jnp.zeros_like(number), jnp.asarray(steps, jnp.int32))
    return data.pool[number + k], (missing > 0).astype(jnp.float32)
