"""Plain training in epochs: every interaction once, in random order, regardless of its user."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from metarec_jax.core import Array, Examples, MetarecError, Task
from metarec_jax.data.catalogue import catalogue
from metarec_jax.data.draw import TaskSource
from metarec_jax.data.interactions import Interactions


def epoch_source(train: Interactions, *, batch: int = 1024, seed: int = 0) -> TaskSource:
    """Batches of interactions of all users: one task per step, half of it support, half query.

    For learners whose loss treats both alike, as `learners.dropout_net`. ``fit(..., steps=steps_of(train, batch))``
    is one epoch; each epoch has another order.

    Args:
      batch: interactions per step, an even number. The remainder of an epoch, less than a batch, is skipped.

    Returns:
      A source of one task of ``batch`` examples per step, with the own rows of users and items.

    Raises:
      MetarecError: ``batch`` is odd or below 2, or there are fewer interactions.
    """
    count = steps_of(train, batch)
    known = catalogue(train, user_rows="own")
    target = np.ones(len(train), np.float32) if train.rating is None else train.rating
    data = (known, jnp.asarray(train.user, jnp.int32), jnp.asarray(train.item, jnp.int32), jnp.asarray(target))

    def stream(step: int) -> Iterator[np.ndarray]:
        while True:
            epoch, first = divmod(step, count)
            order = np.random.default_rng((seed, epoch)).permutation(len(train)).astype(np.int32)
            for k in range(first, count):
                yield order[k * batch : (k + 1) * batch]
            step = (epoch + 1) * count

    def draw(data: Any, key: Array) -> Task:
        (known, users, items, targets), index = data

        def part(index: Array) -> Examples:
            user, item = users[index], items[index]
            columns = {"user_id": user, "item_id": item}
            columns |= {name: values[user] for name, values in known.user.items()}
            columns |= {name: values[item] for name, values in known.item.items()}
            columns = {name: values[None] for name, values in columns.items()}
            return Examples(columns, targets[index][None], jnp.ones((1, index.shape[0]), jnp.float32))

        return Task(part(index[: batch // 2]), part(index[batch // 2 :]))

    return TaskSource(data, draw, 1, stream)


def steps_of(train: Interactions, batch: int) -> int:
    """Steps of an epoch: ``floor(interactions / batch)``. Raises MetarecError as `epoch_source`."""
    if batch < 2 or batch % 2:
        raise MetarecError(f"batch must be an even number of at least 2, got {batch}")
    if len(train) < batch:
        raise MetarecError(f"batch must be at most the {len(train)} interactions, got {batch}; use a smaller batch")
    return len(train) // batch
