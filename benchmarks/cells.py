"""The cells of the speed questions and their batches: the same for both sides, by NumPy alone.

A cell is a JSON object: ``model`` ("seed" or "melu"), ``tasks``, ``inner_steps``, ``items``, ``batches``, ``lr`` (inner), and
``repeats`` where a task may meet an item twice.
Ids are counted from 0; ours adds 1, since row 0 is its unknown id.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

USERS, ITEMS, SIZE, EXAMPLES = 6040, 3706, 32, 10
VOCAB = (2, 7, 21, 3402, 6, 25, 2186, 8030)
"""Rows of the MeLU-like model's categorical columns: four of the user, four of the item."""
HIDDEN = (64, 64)


class Batches(NamedTuple):
    """Outer batches: ``ids`` int32 ``[batches, tasks, 20, columns]``, ``rating`` float32 ``[batches, tasks, 20]``.

    The first 10 examples of a task are its support, the last 10 its query.
    """

    ids: np.ndarray
    rating: np.ndarray


def seed_cell(tasks: int, inner_steps: int, items: int = ITEMS, batches: int = 8) -> dict[str, Any]:
    """S1 and S2: the seed's model."""
    return {
        "model": "seed",
        "tasks": tasks,
        "inner_steps": inner_steps,
        "items": items,
        "batches": batches,
        "lr": 0.1,
    }


def melu_cell(tasks: int, inner_steps: int) -> dict[str, Any]:
    """S3: the MeLU-like model, whose dense layers alone adapt."""
    return {
        "model": "melu",
        "tasks": tasks,
        "inner_steps": inner_steps,
        "items": None,
        "batches": 8,
        "lr": 0.01,
    }


def batches(cell: Mapping[str, Any]) -> Batches:
    """The prepared batches of a cell: users differ within a batch, items within a task, uniform over the catalogue."""
    rng, n = np.random.default_rng(0), 2 * EXAMPLES
    count, tasks = cell["batches"], cell["tasks"]
    if cell["model"] == "melu":
        half = len(VOCAB) // 2
        columns = [rng.integers(0, v, (count, tasks, 1 if c < half else n)) for c, v in enumerate(VOCAB)]
        ids = np.stack([np.broadcast_to(c, (count, tasks, n)) for c in columns], -1)
    else:
        user = np.stack([rng.permutation(USERS)[:tasks] for _ in range(count)])
        shape = (count * tasks, n)
        flat = rng.integers(0, cell["items"], shape) if cell.get("repeats") else _distinct(rng, cell["items"], shape)
        item = flat.reshape(count, tasks, n)
        ids = np.stack([np.broadcast_to(user[..., None], item.shape), item], -1)
    return Batches(ids.astype(np.int32), rng.integers(1, 6, (count, tasks, n)).astype(np.float32))


def _distinct(rng: np.random.Generator, high: int, shape: tuple[int, int]) -> np.ndarray:
    """Rows of distinct integers below ``high``: rows with a repetition are drawn again."""
    drawn = rng.integers(0, high, shape)
    while True:
        ranked = np.sort(drawn, axis=1)
        again = np.flatnonzero((ranked[:, 1:] == ranked[:, :-1]).any(1))
        if not len(again):
            return drawn
        drawn[again] = rng.integers(0, high, (len(again), shape[1]))
