"""Held-out users of a store, and the part of it that is loaded: for evaluation, baselines and a warm start."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from metarec_jax.core import MetarecError
from metarec_jax.data.catalogue import Catalogue, catalogue
from metarec_jax.data.interactions import Interactions
from metarec_jax.data.splits import Split
from metarec_jax.data.store.opened import Store, lengths, load


class Held(NamedTuple):
    """The training users and the held-out users of a store.

    Attributes:
      users: int32, ascending rows of the training users, who are streamed.
      items: int32, ascending rows of the items in their histories.
      data: held-out users, and a sample of the other users, in memory.
      part: int8 ``[data.users.num_rows]``: 0 for users of the sample, 1 for validation, 2 for test.
      split: the split of ``data``; its training part is the sample.
      known: the catalogue of ``data``; it includes every item of the stream, even if the sample lacks it.
    """

    users: np.ndarray
    items: np.ndarray
    data: Interactions
    part: np.ndarray
    split: Split
    known: Catalogue


def hold_out(
    store: Store,
    *,
    validation: float = 0.1,
    test: float = 0.1,
    most: int = 10_000,
    sample: int = 5_000_000,
    seed: int = 0,
    user_rows: Literal["prior", "own"] = "prior",
) -> Held:
    """Hold out validation and test users of a store, chosen by a hash of their ids and the seed, and load them.

    Args:
      validation, test: fractions of the users with two or more interactions, at most ``most`` users each.
      sample: number of interactions of other users that are loaded too, for baselines and a warm start.
      user_rows: as in `task_source`; "own" keeps the rows of all users in ``data``.

    Raises:
      MetarecError: the fractions leave no user to train on, or none held out.
    """
    if not (0 <= validation < 1 and 0 <= test < 1 and validation + test < 1):
        raise MetarecError(
            f"--validation {validation:g} and --test {test:g} must be at least 0, and their sum below 1; correct them"
        )
    hashes = np.fromfile(store.path / "hashes.bin", "<u8")
    order = np.argsort(_mixed(hashes + _mixed(np.array([seed], np.uint64)))).astype(np.int32) + 1
    del hashes
    counts = lengths(store)
    able = order[counts[order - 1] > 1]
    tested, validated = (min(round(share * len(able)), most) for share in (test, validation))
    if len(able) <= tested + validated or not (tested or not test) or not (validated or not validation):
        raise MetarecError(
            f"{len(able)} of {store.users} users have two or more interactions; {tested} of them would be held out for "
            f"the test and {validated} for validation; change --test {test:g} or --validation {validation:g}, or use "
            "more data"
        )
    held = (able[:tested], able[tested : tested + validated])
    part = np.zeros(store.users + 1, np.int8)
    part[held[0]], part[held[1]] = 2, 1
    others = order[part[order] == 0]
    others = others[: max(1, int(np.searchsorted(np.cumsum(counts[others - 1], dtype=np.int64), sample, side="right")))]
    loaded = np.sort(np.concatenate([*held, others]))
    data = load(store, loaded, whole=user_rows == "own")
    part_of = part if user_rows == "own" else part[np.append(0, loaded)]
    split = split_of(data, part_of)
    left = np.fromfile(store.path / "counts.bin", "<i8") - np.bincount(
        data.item[part_of[data.user] > 0], minlength=store.items + 1
    )
    trained = np.where(left > 0, np.arange(store.items + 1, dtype=np.int32), 0).astype(np.int32)
    own = np.where(part_of == 0, np.arange(len(part_of)), 0) if user_rows == "own" else np.zeros(len(part_of))
    known = catalogue(data, split.train, user_rows)._replace(
        user_row=jnp.asarray(own, jnp.int32), item_row=jnp.asarray(trained)
    )
    users = np.flatnonzero(part[1:] == 0).astype(np.int32) + 1
    return Held(users, np.flatnonzero(trained).astype(np.int32), data, part_of, split, known)


def split_of(data: Interactions, part: np.ndarray) -> Split:
    """The split of ``Held.data`` by ``Held.part``; a run stores both, and so recovers its held-out users."""
    of_row = part[data.user]
    held = [{"user_cold": data.take(of_row == k)} if (of_row == k).any() else {} for k in (1, 2)]
    return Split(data.take(of_row == 0), held[0], held[1], {}, {})


def _mixed(words: np.ndarray) -> np.ndarray:
    """uint64 hashes of uint64 words (splitmix64: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number
    Generators", 2014)."""
    z = words + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
