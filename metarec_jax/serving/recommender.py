"""Recommendations for new users: adapt on their feedback, score the whole catalogue, and explain the scores."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from metarec_jax.core import MetarecError, Method
from metarec_jax.data.catalogue import Catalogue, check_method
from metarec_jax.data.draw import negatives_of
from metarec_jax.data.interactions import Interactions
from metarec_jax.messages import printable, shown
from metarec_jax.serving.catalogue_scores import (
    Best,
    Plan,
    Users,
    best,
    contributions,
    predictions_of,
)
from metarec_jax.serving.history import (
    History,
    Names,
    Unknown,
    feature_columns,
    features_by_user,
    format_rating,
    parse_history,
    parse_table,
)
from metarec_jax.serving.linear import item_tables

_USERS = 64
"""Maximum number of users per call of the compiled program of `recommend_many`."""
_CANDIDATES = 1 << 20
"""Maximum number of items that one call scores a second time, over all its users."""
_SHOWN_USERS, _SHOWN_ITEMS = 5, 3
_PATH = 16
"""Points of the integrated gradients, if a single derivative does not explain the change of a score."""


@dataclass(frozen=True)
class Influence:
    """A rating or click behind a recommendation; ``contribution`` is its effect on the score, in units of the score.

    ``rating`` is None for a click.
    """

    item_id: Any
    title: str | None
    rating: float | None
    contribution: float


@dataclass(frozen=True)
class Recommendation:
    """One recommended item.

    Attributes:
      item_id: original id of the item.
      score: score after adaptation, which orders the items; prior: score without any feedback.
      because: the feedback that changed the score most, strongest first.
      predicted: the predicted rating, clipped to the scale: the score, or that of a method that ranks by another one;
        None if there is none.
    """

    item_id: Any
    title: str | None
    score: float
    prior: float
    because: tuple[Influence, ...] = ()
    predicted: float | None = None


@dataclass(frozen=True)
class Recommendations(Sequence[Recommendation]):
    """A list of recommendations, best first.

    Attributes:
      items: the recommendations.
      unknown: history entries that match no item of the data; they were skipped.
      notes: other changes to the history, one line each.
    """

    items: tuple[Recommendation, ...]
    unknown: tuple[Unknown, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        return self.items[index]

    def rows(self) -> list[dict[str, Any]]:
        """One dict per recommendation: rank, item_id, title, predicted (of ratings), score, because (text)."""
        return [{"rank": k + 1, **_row(r)} for k, r in enumerate(self.items)]


@dataclass(frozen=True, repr=False)
class ManyRecommendations(Mapping[Any, Recommendations]):
    """Recommendations by user id, in the order of the table; ``unknown`` and ``notes`` refer to the whole table.

    It is a mapping: iterate over user ids, or over ``items()``.
    """

    users: dict[Any, Recommendations]
    unknown: tuple[Unknown, ...] = ()
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """The first users with their first items, and the notes.

        >>> ManyRecommendations({"ann": Recommendations((Recommendation(7, "Heat", 4.5, 3.0),))})
        ManyRecommendations of 1 user
          'ann': 'Heat'
        """
        lines = [f"{type(self).__name__} of {len(self)} user{'s' if len(self) != 1 else ''}"]
        for user in list(self)[:_SHOWN_USERS]:
            names = [shown(r.title or r.item_id) for r in self.users[user]]
            more = f", and {len(names) - _SHOWN_ITEMS} more" if len(names) > _SHOWN_ITEMS else ""
            lines.append(f"  {shown(user)}: {', '.join(names[:_SHOWN_ITEMS]) or 'nothing'}{more}")
        if len(self) > _SHOWN_USERS:
            lines.append(f"  and {len(self) - _SHOWN_USERS} more")
        lines += [f"  skipped: no single item is called {shown(u.name)}" for u in self.unknown[:_SHOWN_USERS]]
        return "\n".join([*lines, *(f"  note: {printable(note)}" for note in self.notes)])

    def __getitem__(self, user_id: Any) -> Recommendations:
        return self.users[user_id]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.users)

    def __len__(self) -> int:
        return len(self.users)

    def rows(self) -> list[dict[str, Any]]:
        """One dict per user and recommendation: user_id, and as `Recommendations.rows`."""
        return [{"user_id": user, **row} for user, recs in self.users.items() for row in recs.rows()]


def _row(r: Recommendation) -> dict[str, Any]:
    why = "; ".join(
        f"{i.title or i.item_id}{'' if i.rating is None else f' ({i.rating:g})'}: {i.contribution:+.3f}"
        for i in r.because
    )
    predicted = {} if r.predicted is None else {"predicted": r.predicted}
    return {"item_id": r.item_id, "title": r.title, **predicted, "score": r.score, "because": why}


class _Best(NamedTuple):
    """Best items of one user: vocabulary rows, scores, scores before adaptation ``[n]``, predictions of ``predict``
    ``[n]``, contributions ``[n, S]``."""

    item: np.ndarray
    score: np.ndarray
    prior: np.ndarray
    rating: np.ndarray
    contribution: np.ndarray


class Recommender:
    """Serve a fitted method: adapt to a new user with a few ratings or clicks, and recommend from the whole catalogue.

    Args:
      method: a fitted baseline, or a learner with its parameters.
      data: supplies items, titles, features and the range of ratings.
      known: the catalogue that the method was trained with (`metarec_jax.data.catalogue.catalogue`). Items that are
        not in training are scored too, by their content.
      chunk: items scored at a time; None: chosen by the device. For one user of a method with known ``tables`` and
        scores that are linear in an item's row, the whole catalogue is one product.
      negatives: implicit feedback: sampled items per click of the history, used as support with target 0; as many as in
        training; default: as in `task_source`. The same history draws the same items.
      predicts_ratings: whether scores are ratings; those of popularity or of a ranking loss are not.
      by: "list" orders items as the method ranks them, by what the user may like where it has that; "rating" by the
        predicted rating.
      seed: seed of the key of `adapt`.

    A Recommender cannot be pickled, nor used in a fork of its process, which lacks compiled programs and JAX's threads:
    save the run, and open it in each process (started by "spawn").

    Raises:
      MetarecError: the catalogue is empty, or the tables of the method do not match it.
    """

    def __init__(
        self,
        method: Method,
        data: Interactions,
        known: Catalogue,
        *,
        chunk: int | None = None,
        negatives: int | None = None,
        predicts_ratings: bool = True,
        by: Literal["list", "rating"] = "list",
        seed: int = 0,
    ) -> None:
        if len(data.items.ids) == 0 or len(data) == 0:
            raise MetarecError("there is no item to recommend: the data is empty; read some interactions first")
        check_method(method, known)
        if by not in ("list", "rating"):
            raise MetarecError(f"by {by!r} is not known; use 'list' or 'rating'")
        if by == "rating":
            if not predicts_ratings or data.implicit:
                raise MetarecError(
                    "by='rating' requires a method that predicts ratings, and this one has none; omit it"
                )
            method = method._replace(rank=None, scores=None)
        self.method, self.data, self.known = method, data, known
        self._names = Names(data)
        self._negatives = negatives_of(negatives, True) if data.implicit else 0
        self._pool = np.unique(data.item) if self._negatives else np.zeros(0, np.int32)
        self._key = jax.random.key(seed)
        self._chunk = chunk
        self.predicts_ratings = predicts_ratings and not data.implicit
        self._scale = self._names.scale if predicts_ratings else None
        self._process = os.getpid()
        trained = np.asarray(known.item_row)
        own_row = bool(((trained == 0) | (trained == np.arange(len(trained)))).all())
        self._unseen = bool((trained[1:] == 0).any())
        tables = method.tables if own_row and not known.item else {}
        self._tables = item_tables(tables, method.params, len(trained))

    def __reduce__(self) -> Any:
        raise MetarecError(
            "a Recommender cannot be pickled: it holds compiled programs and closures. Save its run, and open the run "
            "in each process that serves it"
        )

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise MetarecError(
                f"this Recommender belongs to process {self._process}, and {os.getpid()} is a fork of it, in which JAX "
                'would wait forever for missing threads; start workers with "spawn" '
                '(multiprocessing.get_context("spawn")), and open the run in each'
            )

    def recommend(
        self,
        history: Any,
        n: int = 10,
        *,
        user_features: Mapping[str, Any] | None = None,
        explain: int = 3,
        exclude_seen: bool = True,
        known_user: Any = None,
        candidates: np.ndarray | None = None,
    ) -> Recommendations:
        """The best ``n`` items for a user with this ``history``.

        Each contribution is (d score / d target_j) (target_j - prior prediction of j), by differentiating through the
        adaptation. If adaptation is linear in the targets (ridge, ALS fold-in, bias, item-kNN) that is exact:
        contributions add up to ``score - prior``. Otherwise the derivative is averaged along the path of targets from
        the prior predictions to the ratings (integrated gradients, Sundararajan et al. 2017). For implicit feedback,
        whose targets are all 1, it is d score / d weight_j, the sensitivity of the score to the weight of the click.
        For a method that ranks by other scores than its ratings, that derivative is averaged along the path of weights
        from 0 to 1, so that contributions add up to ``score - prior``.

        Args:
          history: ``{item: rating}``, a pandas Series of ratings by item, columns ``{"item_id": [...], "rating":
            [...]}`` or a DataFrame of them (with the usual column names), or, for implicit feedback, a sequence of
            items. An item is an id, else a title, else a title in another case. Empty: the ranking of the prior.
          n: number of items; fewer are returned if the catalogue has fewer.
          user_features: the user's side features by column name, in the units of the data. An unknown value counts as
            missing.
          explain: number of ratings or clicks listed per item; 0 saves the backward passes.
          exclude_seen: exclude the items of the history.
          known_user: id of a user of the data, whose history may be partial: with ``exclude_seen``, all items that the
            user has in the data are excluded.
          candidates: bool ``[items + 1]``, the vocabulary rows that may be recommended, such as those of
            `serving.candidates.candidates`; the list is the best among them.

        Raises:
          MetarecError: a rating is missing or outside the range of the data, a feature name is unknown, ``n`` is below
            1, or ``known_user`` is not in the data.
        """
        self._check_process()
        parsed = parse_history(history, self.data, self._names)
        if known_user is not None:
            parsed = parsed._replace(had=np.setdiff1d(self._had_by(known_user), parsed.item))
        features, notes = feature_columns(user_features or {}, self.data)
        best = self._serve([parsed], n, [features], explain > 0, exclude_seen, users=1, candidates=candidates)
        return self._result(parsed, next(best), explain, (*parsed.notes, *notes))

    def _had_by(self, user: Any) -> np.ndarray:
        """Rows of all items of a user of the data."""
        row = int(self.data.users.encode([user])[0])
        if not row:
            raise MetarecError(f"known_user {user!r} is not a user of the data; omit it for a new user")
        return self.data.item[self.data.user == row]

    def recommend_many(
        self,
        histories: Any,
        n: int = 10,
        *,
        user_features: Any = None,
        explain: int = 0,
        exclude_seen: bool = True,
        candidates: np.ndarray | None = None,
    ) -> ManyRecommendations:
        """`recommend` for a table of new users, in batches, with one compiled program per length class of histories.

        Args:
          histories: columns ``(user ids, item ids or titles, ratings or None)``, one entry per rating or click; or a
            mapping or DataFrame with columns of users, items and ratings, with the usual names.
          user_features: features by user id, as ``{"ann": {"age": 25}}``, or a DataFrame with one row per user. Users
            without a history get recommendations from their features only; absent features count as unknown.
          n, explain, exclude_seen, candidates: as in `recommend`.
        """
        self._check_process()
        users, parsed, unknown, notes = parse_table(histories, self.data, self._names)
        by_user = {} if user_features is None else features_by_user(user_features)
        new = [user for user in by_user if user not in set(users)]
        users, parsed = [*users, *new], [*parsed, *([parse_history([], self.data, self._names)] * len(new))]
        columns, remarks = self._feature_columns(users, by_user)
        order = sorted(range(len(users)), key=lambda k: _slots(len(parsed[k].item) * (1 + self._negatives)))
        found: dict[int, Recommendations] = {}
        best = self._serve(
            [parsed[k] for k in order],
            n,
            [columns[k] for k in order],
            explain > 0,
            exclude_seen,
            users=_USERS,
            candidates=candidates,
        )
        for k, one in zip(order, best, strict=True):
            found[k] = self._result(parsed[k], one, explain, (*parsed[k].notes, *remarks[k]))
        for k, user in enumerate(users):
            left = () if found[k].items else self._nothing_left(parsed[k])
            notes = (*notes, *(f"user {printable(str(user))}: {note}" for note in (*remarks[k], *left)))
        notes = (*notes, *self._clipped([item for one in found.values() for item in one]))
        return ManyRecommendations({user: found[k] for k, user in enumerate(users)}, unknown, notes)

    def _nothing_left(self, history: History) -> tuple[str, ...]:
        count = len(history.item)
        return (
            (f"nothing to recommend: all {count} items are in the history",)
            if count == len(self.data.items.ids)
            else ()
        )

    def _clipped(self, items: Sequence[Recommendation]) -> tuple[str, ...]:
        if self._scale is None or self.method.rank is not None or all(i.predicted == i.score for i in items):
            return ()
        low, high = map(format_rating, self._scale)
        return (f"predicted ratings are clipped to the scale, {low} to {high}; the order is by the score",)

    def _feature_columns(
        self, users: Sequence[Any], by_user: Mapping[Any, Mapping[str, Any]]
    ) -> tuple[list[dict[str, np.ndarray]], list[tuple[str, ...]]]:
        """Feature columns of each user, the same columns for all, unknown if absent; and notes on each user."""
        known = self.data.user_features
        found = [feature_columns(by_user.get(user, {}), self.data) for user in users]
        names = dict.fromkeys(name for columns, _ in found for name in columns)
        unknown = {name: known[name].values[:1] for name in names}
        return [unknown | columns for columns, _ in found], [notes for _, notes in found]

    def _serve(
        self,
        parsed: Sequence[History],
        n: int,
        features: Sequence[dict[str, np.ndarray]],
        explain: bool,
        drop: bool,
        users: int,
        candidates: np.ndarray | None,
    ) -> Iterator[_Best]:
        """The best items of each history, in order; consecutive histories with equal numbers of slots share a call."""
        if n < 1:
            raise MetarecError(f"n must be 1 or more, got {n}; request at least one item")
        n = min(n, len(self.data.items.ids))
        size = len(self.known.item_row)
        if candidates is not None and (candidates.shape != (size,) or candidates.dtype != bool):
            raise MetarecError(
                f"candidates expected bool [{size}], one per vocabulary row, got {candidates.dtype} "
                f"{list(candidates.shape)}; make them by serving.candidates.candidates"
            )
        support = [self._with_negatives(h) for h in parsed]
        widths = [_slots(len(item)) for item, _, _ in support]
        users = max(1, min(users, _CANDIDATES // ((n + max(widths, default=0)) * 8)))
        first = 0
        while first < len(parsed):
            last = first + 1
            while last < min(first + users, len(parsed)) and widths[last] == widths[first]:
                last += 1
            item, target, mask = (np.zeros((users, widths[first]), t) for t in (np.int32, np.float32, np.float32))
            given = np.zeros(users, np.int32)
            for row, (items, targets, real) in enumerate(support[first:last]):
                item[row, : len(items)], target[row, : len(items)], mask[row, : len(items)] = items, targets, real
                given[row] = len(parsed[first + row].item) + len(parsed[first + row].had) if drop else 0
            batch = Users(item, target, mask, given)
            rows = [*features[first:last], *([features[first]] * (users - (last - first)))]
            columns = {name: np.concatenate([one[name] for one in rows]) for name in features[first]}
            found = self._best(n, columns, batch, candidates)
            moved = self._contributions(columns, batch, found) if explain else np.zeros((users, n, 0), np.float32)
            rating = found.score
            if self.method.rank is not None and self.predicts_ratings:
                one = self.method
                arguments = one.params, self.known, columns, batch, found.item, self._key
                rating = np.asarray(predictions_of(one.adapt, one.predict, *arguments))
            for row in range(last - first):
                yield _Best(*(a[row] for a in [*found, rating, moved]))
            first = last

    def _best(self, n: int, features: dict[str, np.ndarray], users: Users, allowed: np.ndarray | None) -> Best:
        chunk = self._chunk or _chunk_size(len(users.item))
        plan = Plan(self.method.adapt, self.method.orders, n, chunk, self._tables, self._unseen)
        world = self.method.params, self.known, features, users, self._key
        return Best(*map(np.asarray, best(plan, *world, allowed)))

    def _contributions(self, features: dict[str, np.ndarray], users: Users, found: Best) -> np.ndarray:
        method, implicit = self.method, self.data.implicit or self.method.rank is not None

        def at(points: int) -> np.ndarray:
            static = (method.adapt, method.orders, implicit, points)
            return np.asarray(contributions(*static, method.params, self.known, features, users, found.item, self._key))

        if self.method.rank is not None and not self.data.implicit:
            return at(_PATH)
        moved = at(1)
        return moved if implicit or not _unexplained(found, moved) else at(_PATH)

    def _with_negatives(self, history: History) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Items, targets and masks of the slots: the history, other items of the user (mask 0), sampled negatives."""
        drawn = np.zeros(0, np.int32)
        if self._negatives and len(history.item):
            own = np.concatenate([history.item, history.had])
            rng = np.random.default_rng(history.item)
            count = min(self._negatives * len(history.item), max(0, len(self._pool) - len(own)))
            drawn = self._pool[rng.permutation(len(self._pool))[: count + len(own)]]
            drawn = drawn[~np.isin(drawn, own)][:count]
        sizes = len(history.item), len(history.had), len(drawn)
        target = np.concatenate([history.rating, np.zeros(sizes[1] + sizes[2], np.float32)])
        return (
            np.concatenate([history.item, history.had, drawn]),
            target,
            np.repeat(np.array([1, 0, 1], np.float32), sizes),
        )

    def _result(self, history: History, best: _Best, explain: int, notes: tuple[str, ...]) -> Recommendations:
        real = np.isfinite(best.score)
        decode = self.data.items.decode
        titles = self.data.titles

        def named(rows: Any) -> list[tuple[Any, str | None]]:
            ids = decode(rows).tolist()
            return [(i, None if titles is None else str(titles[r - 1])) for i, r in zip(ids, rows, strict=True)]

        given = named(history.item) if explain else []
        items = []
        for k, (item_id, title) in zip(np.flatnonzero(real), named(best.item[real]), strict=True):
            because: tuple[Influence, ...] = ()
            if explain:
                moved = best.contribution[k][: len(history.item)]
                strongest = np.argsort(-np.abs(moved), kind="stable")[:explain]
                because = tuple(
                    Influence(
                        given[j][0],
                        given[j][1],
                        None if self.data.implicit else float(history.rating[j]),
                        float(moved[j]),
                    )
                    for j in strongest
                )
            score = float(best.score[k])
            predicted = None if self._scale is None else float(np.clip(best.rating[k], *self._scale))
            items.append(Recommendation(item_id, title, score, float(best.prior[k]), because, predicted))
        left = () if items else self._nothing_left(history)
        return Recommendations(tuple(items), history.unknown, (*notes, *left, *self._clipped(items)))


def _chunk_size(users: int) -> int:
    """Number of items that one step scores for ``users`` users: on a CPU, as many as fit into its cache."""
    rows, scores = (1 << 11, 1 << 16) if jax.default_backend() == "cpu" else (1 << 16, 1 << 20)
    return max(1, min(rows, scores // users))


def _slots(length: int) -> int:
    """The smallest of 8, 16, 32, ... that is at least ``length``."""
    return max(8, 1 << max(0, length - 1).bit_length())


def _unexplained(found: Best, contribution: np.ndarray) -> bool:
    """Whether contributions do not add up to the change of the score, by more than rounding."""
    real = np.isfinite(found.score)
    moved = np.where(real, found.score - found.prior, 0.0)
    explained = np.where(real, contribution.sum(-1), 0.0)
    return bool((np.abs(explained - moved) > 0.02 * np.abs(moved) + 1e-3).any())
