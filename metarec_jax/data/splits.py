"""Splits into training, validation and test: cold users, cold items, both, and warm; or a published partition.

Users are divided into train, validation and test users, and items likewise, on the axes that the scenarios require:

=========== ============== ============== ===========================================================
part        users          items
=========== ============== ============== ===========================================================
train       train          train
warm        train          train          rows held out from train; supports come from the train rows
user_cold   validation or  train
            test
item_cold   train          validation or  supports come from the train rows
                           test
both_cold   validation or  validation or  supports come from the users' rows of user_cold, if that is a scenario
            test           test
=========== ============== ============== ===========================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np

from metarec_jax.core import MetarecError
from metarec_jax.data.interactions import Interactions, require_times

SCENARIOS = ("warm", "user_cold", "item_cold", "both_cold")
_FIRST = ("user_cold", "warm", "item_cold", "both_cold")
"""Priority of the scenarios, for data that is too small for all of them."""

_TRAIN, _VALIDATION, _TEST = 0, 1, 2
_NEVER = np.iinfo(np.int64).max


class Split(NamedTuple):
    """Disjoint parts of a data set, which share its vocabularies and features.

    Attributes:
      train: the training part.
      validation, test: by scenario: the part for model selection, and the part that is scored once at the end.
      history: by scenario: the source of the supports, if it is not the scenario's own part: training rows for "warm"
        and "item_cold"; for "both_cold" the held-out users' rows of training items, if "user_cold" is among the
        scenarios.
      dropped: number of interactions in no part, by reason.
      notes: the scenarios that the data is too small for, one line each.
    """

    train: Interactions
    validation: dict[str, Interactions]
    test: dict[str, Interactions]
    history: dict[str, Interactions]
    dropped: Mapping[str, int] = MappingProxyType({})
    notes: tuple[str, ...] = ()


def split(
    data: Interactions,
    scenarios: Sequence[str] | None = None,
    *,
    by: Literal["random", "time"] = "random",
    test: float = 0.1,
    validation: float = 0.1,
    seed: int = 0,
) -> Split:
    """Hold out cold users, cold items and warm interactions.

    by="random": test and validation users are drawn at random, and so are items; warm rows are drawn from each training
    user, in proportion.

    by="time": test users are the last to appear, validation users the last before those; items likewise. With user_cold
    or both_cold, and V the time at which the first validation user (without validation: test user) appears, it is
    guaranteed that every training row is earlier than V, so that no row of a held-out user precedes any training row,
    and user_cold, both_cold and warm tests are all later than training; validation rows of these three are earlier than
    the first test user. With "warm" and no user axis, V and the start of the test are quantiles of the rows' times. For
    item_cold, the held-out items are the last to appear and have no row in training, but ratings of older items may be
    later than theirs. Rows that would leak the future are dropped and counted; equal times are never on both sides.

    Args:
      scenarios: any of "warm", "user_cold", "item_cold", "both_cold"; only the axes that they require are held out.
        None: all that the data is large enough for; `Split.notes` lists the others.
      test, validation: fraction of users, of items, and of warm rows; validation=0 for none.
      seed: seed of the random choices.

    Returns:
      A `Split`. It drops rows that no part may contain: held-out users on held-out items without both_cold, validation
      users on test items and the reverse, rows of users or items that were not held out but have no row in training,
      and (by time) rows that would leak the future. A scenario whose validation part is too small is still tested, with
      a note.

    Raises:
      MetarecError: a scenario is unknown, the fractions leave nothing, there are no timestamps, or a requested scenario
        has no test user with two interactions (a support and a query).

    >>> from metarec_jax.data.synthetic import synthetic
    >>> parts = split(synthetic(60, 40, ratings_per_user=(20, 20)).data, ("user_cold",))
    >>> len(parts.train), len(parts.validation["user_cold"]), len(parts.test["user_cold"]), dict(parts.dropped)
    (960, 120, 120, {})
    """
    requested = SCENARIOS if scenarios is None else tuple(dict.fromkeys(scenarios))
    _check(data, requested, by, test, validation)

    def divided(chosen: tuple[str, ...]) -> Split:
        train, held_out, dropped = _masks(data, chosen, by, test, validation, np.random.default_rng(seed))
        return Split(
            train=_trained(data.take(train), dropped),
            validation={s: data.take(rows[0]) for s, rows in held_out.items()} if validation else {},
            test={s: data.take(rows[1]) for s, rows in held_out.items()},
            history=_histories(data, train, held_out),
            dropped=dropped,
        )

    ordered = sorted(requested, key=_FIRST.index)
    reasons: dict[str, str] = {}
    for some in (some for size in range(len(requested), 0, -1) for some in combinations(ordered, size)):
        chosen = tuple(s for s in requested if s in some)
        parts = divided(chosen)
        if not (lacking := _lacking(parts)):
            break
        reasons |= lacking
    else:
        chosen = ()
    default = "its held-out part leaves too little for the other scenarios"
    too_small = {s: reasons.get(s, default) for s in requested if s not in chosen}
    if too_small and (scenarios is not None or not chosen):
        why = "; ".join(f"{name}: {reason}" for name, reason in too_small.items())
        fewer = f"use --scenarios {' '.join(chosen)} (scenarios= in Python), or other" if chosen else "use other"
        raise MetarecError(
            f"{len(data)} interactions of {data.users.num_rows - 1} users with {data.items.num_rows - 1} items are too "
            f"few to test {', '.join(too_small)} ({why}); {fewer} fractions (--test, now {test:g}, --validation, now "
            f"{validation:g})"
        )
    notes = tuple(f"{name} is not tested: {reason}" for name, reason in too_small.items())
    return _validated(parts._replace(notes=notes))


def _histories(
    data: Interactions, train: np.ndarray, held_out: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> dict[str, Interactions]:
    """What is known of the users of each scenario beside its own part."""
    known = {name: data.take(train) for name in ("warm", "item_cold") if name in held_out}
    if {"user_cold", "both_cold"} <= held_out.keys():
        known["both_cold"] = data.take(np.logical_or(*held_out["user_cold"]))
    return known


def by_state(
    table: Interactions,
    state: np.ndarray,
    *,
    validation: float,
    seed: int,
    source: str,
    dropped: Mapping[str, int] = MappingProxyType({}),
) -> Split:
    """A split of rows with published states; see `metarec_jax.data.io.published.read_partition`.

    Args:
      state: the state of each row, "train" or a scenario.
      source: the file of the states, for messages.
      dropped: number of rows that were dropped before, by reason.
    """
    warm = state == "train"
    scenarios = tuple(s for s in SCENARIOS if (state == s).any())
    if not warm.any() or not scenarios:
        raise MetarecError(
            f"{source}: expected warm rows and test scenarios, got {int(warm.sum())} warm rows and the scenarios "
            f"{scenarios}; check state_col"
        )
    train, chosen, left = table.take(warm), {}, dict(dropped)
    if validation:
        rows, held_out, more = _masks(train, scenarios, "random", 0.0, validation, np.random.default_rng(seed))
        left |= more
        chosen = {s: train.take(held[0]) for s, held in held_out.items()}
        train = train.take(rows)
    tests = {s: table.take(state == s) for s in scenarios}
    parts = Split(_trained(train, left), chosen, tests, {}, left)
    if lacking := _lacking(parts):
        why = "; ".join(f"{name}: {reason}" for name, reason in lacking.items())
        raise MetarecError(f"{source} is too small to test {', '.join(lacking)} ({why}); remove their rows from it")
    return _validated(parts)


def _check(data: Interactions, scenarios: tuple[str, ...], by: str, test: float, validation: float) -> None:
    if not scenarios or (unknown := [s for s in scenarios if s not in SCENARIOS]):
        fault = f"scenarios {unknown} are not known" if scenarios else "expected at least one scenario"
        raise MetarecError(f"{fault}; choose from {', '.join(SCENARIOS)}")
    if by not in ("random", "time"):
        raise MetarecError(f"by must be 'random' or 'time', got {by!r}")
    if not (test > 0 and validation >= 0 and test + validation < 1):
        raise MetarecError(
            f"--test {test:g} and --validation {validation:g} (test=, validation= in Python): test must be above 0, "
            "validation 0 or more, and their sum below 1"
        )
    if by == "time":
        require_times(data, "--by time (by='time' in Python)", ", or use --by random")


Masks = tuple[np.ndarray, dict[str, tuple[np.ndarray, np.ndarray]], dict[str, int]]


def _masks(
    data: Interactions,
    scenarios: tuple[str, ...],
    by: str,
    test: float,
    validation: float,
    rng: np.random.Generator,
) -> Masks:
    """Masks of the training rows and of (validation, test) of each scenario; the number of dropped rows by reason."""
    time = np.asarray(data.timestamp) if by == "time" else None
    user_axis = bool({"user_cold", "both_cold"} & set(scenarios))
    item_axis = bool({"item_cold", "both_cold"} & set(scenarios))
    shares = (test, validation)
    user_part, starts = _parts(data.user, data.users.num_rows, time, shares if user_axis else (0.0, 0.0), rng)
    item_part, _ = _parts(data.item, data.items.num_rows, time, shares if item_axis else (0.0, 0.0), rng)
    user, item = user_part[data.user], item_part[data.item]

    # The period (or, at random, the draw) of a row: training, validation or test.
    inner = (user == _TRAIN) & (item == _TRAIN)
    stretch = np.zeros(len(data), np.int8)
    if time is not None and (user_axis or "warm" in scenarios):
        starts = starts if user_axis else _starts(time[inner], shares)
        stretch = np.searchsorted(np.array(starts), time, side="right").astype(np.int8)
    elif "warm" in scenarios:
        stretch[inner] = _draw_within_users(data.user[inner], shares, rng)
    train = inner & (stretch == _TRAIN)
    if time is None:  # an item whose rows were all drawn for warm tests returns to training
        back = inner & ~_seen(data.item, train, data.items.num_rows)
        train, stretch = train | back, np.where(back, np.int8(_TRAIN), stretch)
    by_known_user = _seen(data.user, train, data.users.num_rows)
    of_known_item = _seen(data.item, train, data.items.num_rows)

    def rows(scenario: str, part: int) -> np.ndarray:
        in_time = stretch <= part if time is not None else True
        if scenario == "warm":
            return inner & by_known_user & of_known_item & (stretch == part)
        if scenario == "user_cold":
            return (user == part) & (item == _TRAIN) & of_known_item & in_time
        if scenario == "item_cold":
            return (user == _TRAIN) & (item == part) & by_known_user
        return (user == part) & (item == part) & in_time

    held_out = {s: (rows(s, _VALIDATION), rows(s, _TEST)) for s in scenarios}
    left = ~(train | np.logical_or.reduce([mask for pair in held_out.values() for mask in pair]))
    dropped = {}
    for reason, mask in (
        ("held-out users on held-out items, of different parts or not requested", (user > 0) & (item > 0)),
        ("held-out users on training items, not requested", (user > 0) & ("user_cold" not in scenarios)),
        ("training users on held-out items, not requested", (item > 0) & ("item_cold" not in scenarios)),
        ("validation users after the first test user appears", (user == _VALIDATION) & (stretch == _TEST)),
        ("after the end of training, not requested", inner & ("warm" not in scenarios)),
        ("a user or item that is not in training", np.ones(len(data), bool)),
    ):
        if count := int((left & mask).sum()):
            dropped[reason] = count
        left &= ~mask
    return train, held_out, dropped


def _parts(
    rows: np.ndarray, num_rows: int, time: np.ndarray | None, shares: tuple[float, float], rng: np.random.Generator
) -> tuple[np.ndarray, tuple[int, int]]:
    """The part of each user (or item) ``[num_rows]``, and the times at which validation and test start.

    At random if ``time`` is None; else the last to appear are test, and the last before those validation.
    """
    present = np.unique(rows)
    if time is None:
        first = rng.permutation(len(present)).astype(np.int64)
    else:
        appears = np.full(num_rows, _NEVER)
        np.minimum.at(appears, rows, time)
        first = appears[present]
    starts = _starts(first, shares)
    part = np.zeros(num_rows, np.int8)
    part[present] = np.searchsorted(np.array(starts), first, side="right")
    return part, starts


def _starts(values: np.ndarray, shares: tuple[float, float]) -> tuple[int, int]:
    """The lowest value of the validation and of the test part, if the largest fraction ``test`` of the values is test.

    Equal values are never on both sides: ties go to the later part. A fraction above 0 gives at least one value.

    >>> _starts(np.arange(10), (0.1, 0.2))
    (7, 9)
    """
    ordered = np.sort(values)
    test, validation = (0 if share == 0 else max(1, round(share * len(ordered))) for share in shares)

    def nth(k: int) -> int:
        return int(ordered[max(k, 0)]) if k < len(ordered) else int(_NEVER)

    return nth(len(ordered) - test - validation), nth(len(ordered) - test)


def _draw_within_users(user: np.ndarray, shares: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """Part of each row: the k-th of a user's n rows in random order is at (k + 1/2) / n; the last are test."""
    order = np.lexsort((rng.random(len(user)), user))
    ordered = user[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])) if len(user) else np.zeros(0, int)
    counts = np.diff(np.append(starts, len(user)))
    place = (np.arange(len(user)) - np.repeat(starts, counts) + 0.5) / np.repeat(counts, counts)
    out = np.empty(len(user), np.int8)
    out[order] = np.searchsorted([1 - sum(shares), 1 - shares[0]], place, side="right")
    return out


def _seen(rows: np.ndarray, mask: np.ndarray, num_rows: int) -> np.ndarray:
    """Whether each row's user (or item) has a row in ``mask``."""
    seen = np.zeros(num_rows, bool)
    seen[rows[mask]] = True
    return seen[rows]


def _trained(train: Interactions, dropped: Mapping[str, int]) -> Interactions:
    return replace(train, notes=(*train.notes, *(f"split: {n} rows dropped: {why}" for why, n in dropped.items())))


def _lacking(parts: Split) -> dict[str, str]:
    """The reasons why scenarios cannot be tested; those of all scenarios if the training part is empty."""
    if not len(parts.train):
        return dict.fromkeys(parts.test, "no interaction is left to train on")
    reasons = {name: _unusable(parts, name, rows) for name, rows in parts.test.items()}
    return {name: reason.format("test") for name, reason in reasons.items() if reason}


def _unusable(parts: Split, scenario: str, rows: Interactions) -> str:
    """The reason why these rows of the part ``{}`` give no task of the scenario; "" if they give one."""
    if not len(rows):
        return "its {} part is empty"
    fewest = 1 if scenario == "warm" else 2
    return "" if np.bincount(rows.user).max() >= fewest else f"no user has 2 of the {len(rows)} rows of its {{}} part"


def _validated(parts: Split) -> Split:
    """The parts without validation scenarios that have no task; a note lists each of these."""
    reasons = {name: _unusable(parts, name, rows) for name, rows in parts.validation.items()}
    notes = [f"{name} is tested but not validated: {why.format('validation')}" for name, why in reasons.items() if why]
    kept = {name: rows for name, rows in parts.validation.items() if not reasons[name]}
    return parts._replace(validation=kept, notes=(*parts.notes, *notes))
