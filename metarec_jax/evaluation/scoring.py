"""A whole catalogue scored and ranked for a batch of users, in blocks; by one product where a method has one."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metarec_jax.core import Array, Examples, Inputs, Method, Task
from metarec_jax.data.catalogue import Catalogue, inputs
from metarec_jax.data.tasks import TaskSet, batches
from metarec_jax.evaluation import metrics

_SCORES = 1 << 23
"""Maximum number of scores of a block of users over all items."""
_CHUNK = 1 << 18
"""Number of scores per call of `predict`."""


class _Program:
    """``batched(function, ...)`` compiled, for one function of a method, with only a weak reference to it.

    Attributes:
      traced: number of traces, which distinguishes a first call, which compiles, from a later one.
    """

    def __init__(self, batched: Callable[..., Any], function: Callable[..., Any]) -> None:
        self.traced, reference = 0, weakref.ref(function)

        def run(*arrays: Any) -> Any:
            self.traced += 1
            return batched(reference(), *arrays)

        self.call = jax.jit(run)


_programs: weakref.WeakKeyDictionary[Any, dict[Any, _Program]] = weakref.WeakKeyDictionary()
"""By function of a method: a second evaluation compiles nothing; programs are freed with their function."""


def compiled(batched: Callable[..., Any], function: Callable[..., Any]) -> _Program:
    """``batched(function, ...)``, compiled once per pair for the lifetime of the function."""
    return _programs.setdefault(function, {}).setdefault(batched, _Program(batched, function))


def user_blocks(count: int, batch: int, num_rows: int) -> Iterator[slice]:
    """Slices of equal size, a divisor of ``batch``, that cover ``count`` users: few at a time for many ``num_rows``.

    >>> [(s.start, s.stop) for s in user_blocks(5, 8, 1 << 22)]
    [(0, 2), (2, 4), (4, 6)]
    """
    most = int(np.clip(_SCORES // num_rows, 1, min(batch, 64)))
    size = next(n for n in range(most, 0, -1) if batch % n == 0)
    for start in range(0, count, size):
        yield slice(start, start + size)


def catalogue_scores(
    method: Method, adapted: Any, known: Catalogue, user: Array, items: np.ndarray | None = None
) -> np.ndarray:
    """Scores that order lists: ``method.orders`` of U adapted users and n items, float32 ``[U, n]``.

    A method with ``rank`` may know unknown items by their content: its ``scores`` are used for known items alone.

    Args:
      adapted: result of ``method.adapt``, each leaf with leading axis U.
      user: int32 ``[U]`` vocabulary rows.
      items: ``[n]`` vocabulary rows; None: all, row 0 included.
    """
    rows = np.asarray(known.item_row)
    every = np.arange(len(rows)) if items is None else items
    if method.scores is not None:
        out = np.take(np.asarray(method.scores(method.params, adapted)), rows[every], axis=1)
        new = np.flatnonzero(rows[every] == 0)
        if method.rank is not None and len(new):
            out[:, new] = _in_chunks(method, adapted, known, user, every[new])
        return out
    return _in_chunks(method, adapted, known, user, every)


def _in_chunks(method: Method, adapted: Any, known: Catalogue, user: Array, items: np.ndarray) -> np.ndarray:
    """`catalogue_scores` by calls of ``method.orders`` on some items at a time."""
    chunk = max(1, min(_CHUNK // len(user), len(items)))
    score = partial(compiled(predictions, method.orders).call, method.params, adapted, known, user)
    out = np.empty((len(user), len(items)), np.float32)
    for first in range(0, len(items), chunk):
        chosen = np.resize(items[first : first + chunk], chunk).astype(np.int32)
        out[:, first : first + chunk] = np.asarray(score(chosen))[:, : len(items) - first]
    return out


def predictions(predict: Any, params: Any, adapted: Any, known: Catalogue, user: Array, items: Array) -> Array:
    """Scores ``[U, n]``, without copies of tables per user."""
    return jax.vmap(lambda adapted, user: predict(params, adapted, inputs(known, user, items)))(adapted, user)


class Ranked(NamedTuple):
    """Query items among all candidates: ``ranks [T, Q]``, ``candidates [T]`` (their number), ``finite [T]``."""

    ranks: np.ndarray
    candidates: np.ndarray
    finite: np.ndarray


def query_ranks(
    method: Method, adapted: Any, known: Catalogue, tasks: TaskSet, of_new: np.ndarray, keys: Array
) -> Ranked:
    """Ranks of the query items of U tasks among the candidates, the catalogue except the known history.

    Args:
      adapted: leaves ``[U, ...]``; of_new: bool ``[U]``, whether only items that are not in training are candidates.
      keys: ``[U]``, keys for ties.
    """
    scores = catalogue_scores(method, adapted, known, jnp.asarray(tasks.user))
    free = candidates(tasks, of_new, np.asarray(known.item_row))
    finite = (np.isfinite(scores) | ~free).all(axis=1)
    return Ranked(np.asarray(_ranks(scores, free, tasks.query_item, keys)), free.sum(axis=1, dtype=np.int32), finite)


@jax.jit
def _ranks(scores: Array, free: Array, items: Array, keys: Array) -> Array:
    """Ranks ``[U, Q]``, one user after the other: a row of scores stays in the cache for all that is asked of it."""
    return jax.lax.map(lambda user: metrics.ranks_among(*user), (scores, free, items, keys))


def candidates(tasks: TaskSet, of_new: np.ndarray, item_row: np.ndarray) -> np.ndarray:
    """The candidates of each user, bool ``[U, N]``: not the support, nor the known history, nor row 0."""
    free = np.where(of_new[:, None], item_row == 0, True)
    if tasks.past is not None:
        free &= ~tasks.past.toarray()
    np.put_along_axis(free, tasks.support_item, False, axis=1)
    free[:, 0] = False
    return free


@jax.jit
def weighted_rows(table: Array, ids: Array, values: Array) -> Array:
    """``sum_s values[b, k, s] table[ids[b, s]]``, ``[B, k, N]``: a product with few rows of a matrix.

    Args:
      table: ``[rows, N]``; ids: int ``[B, S]``; values: ``[B, k, S]``.
    """

    def one(user: tuple[Array, Array]) -> Array:
        rows, weights = user
        zero = jnp.zeros((weights.shape[0], table.shape[1]), table.dtype)
        return jax.lax.fori_loop(
            0, rows.shape[0], lambda s, sum: sum + weights[:, s, None] * table[rows[s]][None], zero
        )

    return jax.lax.map(one, (ids, values))


def batch_size(count: int, most: int = 256) -> int:
    """Tasks per call: ``most``, or the next power of two from ``count``, so that few are not padded to many.

    >>> batch_size(5), batch_size(5000)
    (8, 256)
    """
    return min(most, 1 << (count - 1).bit_length())


def adapted_to(method: Method, tasks: TaskSet, known: Catalogue, batch: int) -> Iterator[tuple[np.ndarray, Any, Task]]:
    """The positions of the tasks of a batch ``[n]``, the method's adapted state and the batch: leaves ``[batch, ...]``.

    The order of the tasks depends on the tasks alone (`data.tasks.batches`).
    """
    keys = jax.random.split(jax.random.key(0), batch)
    for index, task in batches(tasks, known, batch):
        yield index, compiled(adapt_each, method.adapt).call(method.params, task.support, keys), task


def query_scores(method: Method, tasks: TaskSet, known: Catalogue, batch: int) -> np.ndarray:
    """What ``method.predict`` gives for the query of each task after its support, float32 ``[T, Q]``."""
    out = np.zeros(tasks.query_item.shape, np.float32)
    for index, adapted, task in adapted_to(method, tasks, known, batch):
        scores = compiled(predict_each, method.predict).call(method.params, adapted, task.query.inputs)
        out[index] = np.asarray(scores)[: len(index)]
    return out


def list_scores(
    method: Method, tasks: TaskSet, known: Catalogue, of_new: np.ndarray, batch: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of tasks: their positions ``[U]``, and the scores of all items, -inf for no candidate, ``[U, rows]``.

    Args:
      of_new: bool ``[T]``, whether only items that are not in training are candidates.
      batch: tasks per call; a smaller last batch is padded.
    """
    for index, adapted, task in adapted_to(method, tasks, known, batch):
        size = task.support.mask.shape[0]
        rows = np.concatenate([index, np.full(size - len(index), index[0])])
        for some in user_blocks(len(index), size, len(known.item_row)):
            users = tasks.take(rows[some])
            own = jax.tree.map(lambda a, some=some: a[some], adapted)
            scores = catalogue_scores(method, own, known, jnp.asarray(users.user))
            free = candidates(users, of_new[rows[some]], np.asarray(known.item_row))
            real = index[some]
            yield real, np.where(free, scores, -np.inf)[: len(real)]


def adapt_each(adapt: Any, params: Any, support: Examples, keys: Array) -> Any:
    """The adapted state of B tasks. Separate from `predict_each`, which is not compiled for each support length."""
    return jax.vmap(adapt, (None, 0, 0))(params, support, keys)


def predict_each(predict: Any, params: Any, adapted: Any, query: Inputs) -> Array:
    """Scores ``[B, Q]``."""
    return jax.vmap(predict, (None, 0, 0))(params, adapted, query)
