"""The input of a chunk of outer steps: the data on the device, or host batches stacked for its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from metarec_jax.core import MetarecError
from metarec_jax.data.draw import TaskSource

Place = Callable[[Any], Any]
"""Puts a pytree of NumPy arrays ``[capacity, ...]`` on the device, or over the devices of a mesh."""


class Feed:
    """The second argument of a chunk: ``source.data``, or with a stream ``(source.data, stacked batches)``.

    The next chunk of a stream is prepared while the device works on this one: call `ready` after the dispatch.

    Args:
      source: the source of tasks.
      step: the first outer step.
      capacity: largest number of steps of a chunk; shorter ones are padded, so that one program runs all.
      place: puts stacked batches on the device.
    """

    def __init__(self, source: TaskSource, step: int, capacity: int, place: Place = jax.device_put) -> None:
        self._source, self._capacity, self._place = source, capacity, place
        self._batches: Iterator[Any] | None = None if source.stream is None else source.stream(step)
        self._next: tuple[int, Any] | None = None

    def take(self, length: int) -> Any:
        """The input of the next ``length`` steps."""
        if self._batches is None:
            return self._source.data
        self.ready(length)
        assert self._next is not None
        (_, stacked), self._next = self._next, None
        return self._source.data, stacked

    def ready(self, length: int) -> None:
        """Read and place the next ``length`` batches now, for the next `take`.

        Raises:
          MetarecError: the stream has ended, or the shapes of its batches change.
        """
        if self._batches is None or length < 1 or self._next is not None:
            return
        batches = []
        for _ in range(length):
            try:
                batches.append(next(self._batches))
            except StopIteration:
                raise MetarecError(
                    "the stream of tasks has ended before the last step; let it repeat, or train for fewer steps"
                ) from None
        self._next = (length, self._place(_stacked(batches, self._capacity)))

    @staticmethod
    def one(data: Any, k: Any, streamed: bool) -> Any:
        """The part of a chunk's data that step ``k`` reads, inside the compiled program."""
        return (data[0], jax.tree.map(lambda a: a[k], data[1])) if streamed else data


def _stacked(batches: list[Any], capacity: int) -> Any:
    """``[capacity, ...]`` of each leaf; 0 beyond the batches.

    >>> _stacked([{"item": np.array([1, 2])}, {"item": np.array([3, 4])}], 3)["item"].tolist()
    [[1, 2], [3, 4], [0, 0]]
    """

    def stack(*leaves: Any) -> np.ndarray:
        first = np.asarray(leaves[0])
        out = np.zeros((capacity, *first.shape), first.dtype)
        for k, leaf in enumerate(leaves):
            if np.shape(leaf) != first.shape:
                raise MetarecError(
                    f"the batches of the stream must have one shape, got {list(first.shape)} and then "
                    f"{list(np.shape(leaf))}; pad them"
                )
            out[k] = leaf
        return out

    return jax.tree.map(stack, *batches)
