"""Which interactions train, which choose, which test: cold users, cold items, both, and warm; or a published partition.

Users are parted into train, validation and test users, and items likewise, on the axes that the scenarios ask for:

=========== ============== ============== ===========================================================
part        users          items
=========== ============== ============== ===========================================================
train       train          train
warm        train          train          rows held out from train; supports come from the train rows
user_cold   validation or  train
            test
item_cold   train          validation or
                           test
both_cold   validation or  validation or
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
"""Of data that is too small for all of them, the scenarios that are kept first."""

_TRAIN, _VALIDATION, _TEST = 0, 1, 2
_NEVER = np.iinfo(np.int64).max


class Split(NamedTuple):
    """Parts of a data set; they share its vocabularies and features, and no interaction is in two of them.

    Attributes:
      train: what meta-training sees.
      validation, test: by scenario: what chooses, and what is scored once at the end.
      history: by scenario: where the supports come from, if not from the scenario's own rows ("warm": train).
      dropped: interactions that are in no part, by reason.
      notes: what the data was too small for, one line each.
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

    by="random": test and validation users are drawn at random, and so are items; warm rows are drawn from each train
    user, in proportion.

    by="time": test users are the last to appear, validation users the last before those; items likewise. What is
    guaranteed where user_cold or both_cold is asked for, with V the moment the first validation user appears (test
    user, if there is no validation): every training row is earlier than V, so no row of a held-out user precedes any
    training row, and user_cold, both_cold and warm tests are all later than training; validation rows of these three
    are earlier than the first test user. With "warm" and no user axis, V and the start of test are quantiles of the
    rows' times. For item_cold: the held-out items are the last to appear and no row of them is in training, but ratings
    of older items may be later than theirs, since one item's appearance cannot stop the clock for all others. Rows that
    would look ahead are dropped and counted; of equal times, none is on both sides.

    Args:
      scenarios: any of "warm", "user_cold", "item_cold", "both_cold"; only the axes these need are held out. None: all
        that the data is large enough for; `Split.notes` names the others.
      test, validation: the share of users, of items, and of warm rows; validation=0 for none.
      seed: of the random choices.

    Returns:
      A `Split`. Dropped are the rows that no part may have: held-out users on held-out items where both_cold is not
      asked for, validation users on test items and the reverse, rows of users or items that were not held out but have
      no row in training either, and (by time) rows that look ahead.

      A scenario whose validation part is too small is tested all the same, and noted.

    Raises:
      MetarecError: an unknown scenario, shares that leave nothing, no timestamps, or a scenario that was asked for and
        has no test user with two interactions (a support and a query).

    >>> from metarec_jax.data.synthetic import synthetic
    >>> parts = split(synthetic(60, 40, ratings_per_user=(20, 20)).data, ("user_cold",))
    >>> len(parts.train), len(parts.validation["user_cold"]), len(parts.test["user_cold"]), dict(parts.dropped)
    (960, 120, 120, {})
    """
    asked = SCENARIOS if scenarios is None else tuple(dict.fromkeys(scenarios))
    _check(data, asked, by, test, validation)

    def parted(chosen: tuple[str, ...]) -> Split:
        train, held_out, dropped = _masks(data, chosen, by, test, validation, np.random.default_rng(seed))
        return Split(
            train=_trained(data.take(train), dropped),
            validation={s: data.take(rows[0]) for s, rows in held_out.items()} if validation else {},
            test={s: data.take(rows[1]) for s, rows in held_out.items()},
            history={"warm": data.take(train)} if "warm" in chosen else {},
            dropped=dropped,
        )

    ordered = sorted(asked, key=_FIRST.index)
    reasons: dict[str, str] = {}
    for some in (some for size in range(len(asked), 0, -1) for some in combinations(ordered, size)):
        chosen = tuple(s for s in asked if s in some)
        parts = parted(chosen)
        if not (lacking := _lacking(parts)):
            break
        reasons |= lacking
    else:
        chosen = ()
    unknown = "what it holds out leaves too little of the others"
    too_small = {s: reasons.get(s, unknown) for s in asked if s not in chosen}
    if too_small and (scenarios is not None or not chosen):
        why = "; ".join(f"{name}: {reason}" for name, reason in too_small.items())
        fewer = f"give --scenarios {' '.join(chosen)} (scenarios= in Python), or other" if chosen else "give other"
        raise MetarecError(
            f"{len(data)} interactions of {data.users.num_rows - 1} users with {data.items.num_rows - 1} items are too "
            f"few to test {', '.join(too_small)} ({why}); {fewer} shares (--test, now {test:g}, --validation, now "
            f"{validation:g})"
        )
    notes = tuple(f"{name} is not tested: {reason}" for name, reason in too_small.items())
    return _validated(parts._replace(notes=notes))


def by_state(
    table: Interactions,
    state: np.ndarray,
    *,
    validation: float,
    seed: int,
    source: str,
    dropped: Mapping[str, int] = MappingProxyType({}),
) -> Split:
    """A split of rows whose states are published; see `metarec_jax.data.io.published.read_partition`.

    Args:
      state: of each row, "train" or a scenario.
      source: where the states come from, for messages.
      dropped: rows that were left out before, by reason.
    """
    warm = state == "train"
    scenarios = tuple(s for s in SCENARIOS if (state == s).any())
    if not warm.any() or not scenarios:
        raise MetarecError(
            f"{source}: the states give {int(warm.sum())} warm rows and the test scenarios {scenarios}; both are "
            "required; check state_col"
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
        seen = f"scenarios {unknown} are not known" if scenarios else "no scenario is given"
        raise MetarecError(f"{seen}; choose from {', '.join(SCENARIOS)}")
    if by not in ("random", "time"):
        raise MetarecError(f"by={by!r} is no way to split; give 'random' or 'time'")
    if not (test > 0 and validation >= 0 and test + validation < 1):
        raise MetarecError(
            f"--test {test:g} and --validation {validation:g} (test=, validation= in Python): test must be above 0, "
            "validation 0 or more, and their sum below 1"
        )
    if by == "time":
        require_times(data, "--by time (by='time' in Python)", ", or take --by random")


Masks = tuple[np.ndarray, dict[str, tuple[np.ndarray, np.ndarray]], dict[str, int]]


def _masks(
    data: Interactions,
    scenarios: tuple[str, ...],
    by: str,
    test: float,
    validation: float,
    rng: np.random.Generator,
) -> Masks:
    """Which rows train; which are (validation, test) of each scenario; how many are in no part, by reason."""
    time = np.asarray(data.timestamp) if by == "time" else None
    user_axis = bool({"user_cold", "both_cold"} & set(scenarios))
    item_axis = bool({"item_cold", "both_cold"} & set(scenarios))
    shares = (test, validation)
    user_part, starts = _parts(data.user, data.users.num_rows, time, shares if user_axis else (0.0, 0.0), rng)
    item_part, _ = _parts(data.item, data.items.num_rows, time, shares if item_axis else (0.0, 0.0), rng)
    user, item = user_part[data.user], item_part[data.item]

    # The stretch of time (or, at random, the draw) that a row falls into: of training, of validation, of test.
    inner = (user == _TRAIN) & (item == _TRAIN)
    stretch = np.zeros(len(data), np.int8)
    if time is not None and (user_axis or "warm" in scenarios):
        starts = starts if user_axis else _starts(time[inner], shares)
        stretch = np.searchsorted(np.array(starts), time, side="right").astype(np.int8)
    elif "warm" in scenarios:
        stretch[inner] = _draw_within_users(data.user[inner], shares, rng)
    train = inner & (stretch == _TRAIN)
    if time is None:  # an item whose every row was drawn for warm tests goes back to train
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
        ("held-out users on held-out items, of different parts or not asked for", (user > 0) & (item > 0)),
        ("held-out users on train items, not asked for", (user > 0) & ("user_cold" not in scenarios)),
        ("train users on held-out items, not asked for", (item > 0) & ("item_cold" not in scenarios)),
        ("validation users after the first test user came", (user == _VALIDATION) & (stretch == _TEST)),
        ("after training ends, not asked for", inner & ("warm" not in scenarios)),
        ("a user or item that training never saw", np.ones(len(data), bool)),
    ):
        if count := int((left & mask).sum()):
            dropped[reason] = count
        left &= ~mask
    return train, held_out, dropped


def _parts(
    rows: np.ndarray, num_rows: int, time: np.ndarray | None, shares: tuple[float, float], rng: np.random.Generator
) -> tuple[np.ndarray, tuple[int, int]]:
    """The part of each user (or item) ``[num_rows]``, and the moments when validation and test begin.

    At random where ``time`` is None; else the last to appear are test, and the last before those validation.
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
    """The least value of the validation and of the test part, if the largest ``test`` share of the values are test.

    Of equal values none is on both sides: ties go to the later part. At least one value for a share above 0.

    >>> _starts(np.arange(10), (0.1, 0.2))
    (7, 9)
    """
    ordered = np.sort(values)
    test, validation = (0 if share == 0 else max(1, round(share * len(ordered))) for share in shares)

    def nth(k: int) -> int:
        return int(ordered[max(k, 0)]) if k < len(ordered) else int(_NEVER)

    return nth(len(ordered) - test - validation), nth(len(ordered) - test)


def _draw_within_users(user: np.ndarray, shares: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """Part of each row: of a user's n rows in random order, the k-th is placed at (k + 1/2) / n, the last are test."""
    order = np.lexsort((rng.random(len(user)), user))
    ordered = user[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])) if len(user) else np.zeros(0, int)
    counts = np.diff(np.append(starts, len(user)))
    place = (np.arange(len(user)) - np.repeat(starts, counts) + 0.5) / np.repeat(counts, counts)
    out = np.empty(len(user), np.int8)
    out[order] = np.searchsorted([1 - sum(shares), 1 - shares[0]], place, side="right")
    return out


def _seen(rows: np.ndarray, where: np.ndarray, num_rows: int) -> np.ndarray:
    """Whether each row's user (or item) has a row in ``where``."""
    seen = np.zeros(num_rows, bool)
    seen[rows[where]] = True
    return seen[rows]


def _trained(train: Interactions, dropped: Mapping[str, int]) -> Interactions:
    return replace(train, notes=(*train.notes, *(f"split: {n} rows left out: {why}" for why, n in dropped.items())))


def _lacking(parts: Split) -> dict[str, str]:
    """Why scenarios cannot be tested, by scenario; all of them where nothing is left to train on."""
    if not len(parts.train):
        return dict.fromkeys(parts.test, "no interaction is left to train on")
    reasons = {name: _unusable(parts, name, rows) for name, rows in parts.test.items()}
    return {name: reason.format("test") for name, reason in reasons.items() if reason}


def _unusable(parts: Split, scenario: str, rows: Interactions) -> str:
    """Why these rows, of the part ``{}``, make no task of the scenario; "" where they do."""
    if not len(rows):
        return "its {} part is empty"
    fewest = 1 if scenario in parts.history else 2
    return "" if np.bincount(rows.user).max() >= fewest else f"no user has 2 of the {len(rows)} rows of its {{}} part"


def _validated(parts: Split) -> Split:
    """The parts without validation scenarios that have no task, which are noted."""
    reasons = {name: _unusable(parts, name, rows) for name, rows in parts.validation.items()}
    notes = [f"{name} is tested, and not validated: {why.format('validation')}" for name, why in reasons.items() if why]
    kept = {name: rows for name, rows in parts.validation.items() if not reasons[name]}
    return parts._replace(validation=kept, notes=(*parts.notes, *notes))
