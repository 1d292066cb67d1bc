"""Recommendations for users never seen: adapt on what they gave, score the whole catalogue in chunks, say why.

Nothing the size of the catalogue is made for a user: a chunk of items is scored, and merged into the running best.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metarec_jax.core import Array, Examples, MetarecError, Method
from metarec_jax.data.interactions import Interactions
from metarec_jax.data.tasks import Catalogue, inputs
from metarec_jax.online.history import History, Names, Unknown, feature_columns, parse_history, parse_table

_USERS = 64
"""Users that one call of `recommend_many`'s compiled program serves."""
_PATH = 16
"""Points at which the derivative is taken where one does not tell how far the history moved a score."""


@dataclass(frozen=True)
class Influence:
    """One feedback behind a recommendation: ``contribution`` is how far it moved the score, in units of the score.

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
      item_id: as the data gave it.
      score: after adaptation; prior: before, with no feedback at all.
      because: the feedbacks that moved the score most, strongest first.
    """

    item_id: Any
    title: str | None
    score: float
    prior: float
    because: tuple[Influence, ...] = ()


@dataclass(frozen=True)
class Recommendations(Sequence[Recommendation]):
    """A list of recommendations, best first.

    Attributes:
      items: the recommendations.
      unknown: history entries that name no item of the data; they were skipped.
      notes: what else was changed in the history, one line each.
    """

    items: tuple[Recommendation, ...]
    unknown: tuple[Unknown, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        return self.items[index]

    def rows(self) -> list[dict[str, Any]]:
        """One dict a recommendation: rank, item_id, title, score, because (text)."""
        return [{"rank": k + 1, **_row(r)} for k, r in enumerate(self.items)]


@dataclass(frozen=True)
class ManyRecommendations(Mapping[Any, Recommendations]):
    """Recommendations by user id, in the order of the table; ``unknown`` and ``notes`` are of the whole table."""

    users: dict[Any, Recommendations] = field(repr=False)
    unknown: tuple[Unknown, ...] = ()
    notes: tuple[str, ...] = ()

    def __getitem__(self, user_id: Any) -> Recommendations:
        return self.users[user_id]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.users)

    def __len__(self) -> int:
        return len(self.users)

    def rows(self) -> list[dict[str, Any]]:
        """One dict a user and recommendation: user_id, rank, item_id, title, score, because (text)."""
        return [{"user_id": user, **row} for user, recs in self.users.items() for row in recs.rows()]


def _row(r: Recommendation) -> dict[str, Any]:
    why = "; ".join(
        f"{i.title or i.item_id}{'' if i.rating is None else f' ({i.rating:g})'}: {i.contribution:+.3f}"
        for i in r.because
    )
    return {"item_id": r.item_id, "title": r.title, "score": r.score, "because": why}


class _Best(NamedTuple):
    """Best items of one user: vocabulary rows, scores, scores before adaptation ``[n]``, contributions ``[n, S]``."""

    item: Array
    score: Array
    prior: Array
    contribution: Array


class Recommender:
    """Serve a fitted method: adapt a new user on a few feedbacks and recommend from the whole catalogue.

    Args:
      method: a fitted baseline, or a learner with its parameters.
      data: names items, titles, features and the range of ratings.
      known: the catalogue that the method was trained with (`metarec_jax.data.tasks.catalogue`). Items that training
        never saw are scored too, by their content.
      chunk: items scored at a time.
      negatives: implicit feedback: items that the user did not give, drawn as support with target 0 for each one given;
        as many as the method met in training. The same history draws the same ones.
      seed: of the key that `adapt` gets.

    Raises:
      MetarecError: an empty catalogue.
    """

    def __init__(
        self,
        method: Method,
        data: Interactions,
        known: Catalogue,
        *,
        chunk: int = 65536,
        negatives: int = 0,
        seed: int = 0,
    ) -> None:
        if len(data.items.ids) == 0 or len(data) == 0:
            raise MetarecError("there is no item to recommend: the data is empty; read some interactions first")
        self.method, self.data, self.known = method, data, known
        self._names = Names(data)
        self._negatives = negatives if data.implicit else 0
        self._pool = np.unique(data.item) if self._negatives else np.zeros(0, np.int32)
        self._key = jax.random.key(seed)
        self._chunk = max(1, min(chunk, len(data.items.ids)))

    def recommend(
        self,
        history: Any,
        n: int = 10,
        *,
        user_features: Mapping[str, Any] | None = None,
        explain: int = 3,
        exclude_seen: bool = True,
    ) -> Recommendations:
        """The best ``n`` items for a user who gave ``history``.

        Each contribution is (d score / d target_j) (target_j - prior prediction of j), by differentiating through the
        adaptation. Where adaptation is linear in the targets (ridge, ALS fold-in, bias, item-kNN) that is exact:
        contributions add up to ``score - prior``. Where they would not, the derivative is averaged along the path of
        targets from the prior predictions to what the user gave (integrated gradients, Sundararajan et al. 2017). For
        implicit feedback, whose targets
        are all 1, it is d score / d weight_j: the rate at which the score would fall were the feedback to fade.

        Args:
          history: ``{item: rating}``, or columns ``{"item_id": [...], "rating": [...]}`` (a DataFrame is fine), or, for
            implicit feedback, a sequence of items. An item is an id, a title, or a title in another case. Empty: the
            list of the prior.
          n: items wanted; fewer come back where the catalogue ends.
          user_features: the user's side features by column name, as the data gave them; numeric ones in the data's
            standardised units. A value never seen counts as unknown.
          explain: feedbacks told for each item; 0 saves the backward passes.
          exclude_seen: leave out what is in the history.

        Raises:
          MetarecError: a rating outside the range of the data or missing, an unknown feature name, ``n`` below 1.
        """
        parsed = parse_history(history, self.data, self._names)
        features, notes = feature_columns(user_features or {}, self.data)
        best = self._serve([parsed], n, features, explain > 0, exclude_seen, users=1)
        return self._told(parsed, next(best), explain, (*parsed.notes, *notes))

    def recommend_many(
        self, histories: Any, n: int = 10, *, explain: int = 0, exclude_seen: bool = True
    ) -> ManyRecommendations:
        """`recommend` for a table of new users, in batches: one compiled program for each length class of histories.

        Args:
          histories: columns ``(user ids, item ids or titles, ratings or None)``, one entry a feedback; or a mapping or
            DataFrame with ``user_id``, ``item_id`` and ``rating``.
          n, explain, exclude_seen: as in `recommend`.
        """
        users, parsed, unknown, notes = parse_table(histories, self.data, self._names)
        order = sorted(range(len(users)), key=lambda k: _slots(len(parsed[k].item) * (1 + self._negatives)))
        found: dict[int, Recommendations] = {}
        best = self._serve([parsed[k] for k in order], n, {}, explain > 0, exclude_seen, users=_USERS)
        for k, one in zip(order, best, strict=True):
            found[k] = self._told(parsed[k], one, explain, parsed[k].notes)
        return ManyRecommendations({user: found[k] for k, user in enumerate(users)}, unknown, notes)

    def _serve(
        self, parsed: Sequence[History], n: int, features: dict[str, np.ndarray], explain: bool, drop: bool, users: int
    ) -> Iterator[_Best]:
        """The best items of each history, in order; neighbours in the list that need like many slots share a call."""
        if n < 1:
            raise MetarecError(f"n must be 1 or more, and is {n}; ask for at least one item")
        support = [self._with_negatives(h) for h in parsed]
        widths = [_slots(len(item)) for item, _ in support]
        first = 0
        while first < len(parsed):
            last = first + 1
            while last < min(first + users, len(parsed)) and widths[last] == widths[first]:
                last += 1
            item, target, mask = (np.zeros((users, widths[first]), t) for t in (np.int32, np.float32, np.float32))
            given = np.zeros(users, np.int32)
            for row, (items, targets) in enumerate(support[first:last]):
                item[row, : len(items)], target[row, : len(items)], mask[row, : len(items)] = items, targets, 1.0
                given[row] = len(parsed[first + row].item)
            program = partial(
                _best,
                self.method.adapt,
                self.method.predict,
                min(n, len(self.data.items.ids)),
                self._chunk if users == 1 else max(1, min(self._chunk, (1 << 20) // users)),
                self.data.implicit,
                params=self.method.params,
                known=self.known,
                features=features,
                support=(item, target, mask),
                given=given if drop else np.zeros_like(given),
                key=self._key,
            )
            best = jax.tree.map(np.asarray, program(points=1 if explain else 0))
            if explain and not self.data.implicit and _unexplained(best):
                best = jax.tree.map(np.asarray, program(points=_PATH))
            for row in range(last - first):
                yield jax.tree.map(lambda a, row=row: a[row], best)
            first = last

    def _with_negatives(self, history: History) -> tuple[np.ndarray, np.ndarray]:
        if not self._negatives or not len(history.item):
            return history.item, history.rating
        rng = np.random.default_rng(history.item)
        count = min(self._negatives * len(history.item), max(0, len(self._pool) - len(history.item)))
        drawn = self._pool[rng.permutation(len(self._pool))[: count + len(history.item)]]
        drawn = drawn[~np.isin(drawn, history.item)][:count]
        return np.concatenate([history.item, drawn]), np.concatenate([history.rating, np.zeros(len(drawn), np.float32)])

    def _told(self, history: History, best: _Best, explain: int, notes: tuple[str, ...]) -> Recommendations:
        real = np.isfinite(best.score)
        decode = self.data.items.decode
        titles = self.data.titles

        def named(rows: Any) -> list[tuple[Any, str | None]]:
            ids = decode(rows).tolist()
            return [(i, None if titles is None else str(titles[r - 1])) for i, r in zip(ids, rows, strict=True)]

        given = named(history.item)
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
            items.append(Recommendation(item_id, title, float(best.score[k]), float(best.prior[k]), because))
        return Recommendations(tuple(items), history.unknown, notes)


def _slots(length: int) -> int:
    """8, 16, 32, ...: as many as hold ``length``."""
    return max(8, 1 << max(0, length - 1).bit_length())


def _unexplained(best: _Best) -> bool:
    """Whether contributions do not add up to what the history moved, by more than rounding."""
    real = np.isfinite(best.score)
    moved = np.where(real, best.score - best.prior, 0.0)
    told = np.where(real, best.contribution.sum(-1), 0.0)
    return bool((np.abs(told - moved) > 0.02 * np.abs(moved) + 1e-3).any())


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4), static_argnames=("points",))
def _best(
    adapt: Any,
    predict: Any,
    n: int,
    chunk: int,
    implicit: bool,
    *,
    points: int,
    params: Any,
    known: Catalogue,
    features: dict[str, Array],
    support: tuple[Array, Array, Array],
    given: Array,
    key: Array,
) -> _Best:
    """Best ``n`` of the catalogue for each of B users. The first ``given`` support items are left out.

    Derivatives are taken at ``points`` points; 0 tells no contributions.
    """
    num_rows = known.item_row.shape[0]

    def columns(rows: Array) -> dict[str, Array]:
        return {**inputs(known, jnp.int32(0), rows), **features}

    def one(item: Array, target: Array, mask: Array, given: Array) -> _Best:
        examples = Examples(columns(item), target, mask)
        adapted = adapt(params, examples, key)
        dropped = jnp.where(jnp.arange(item.shape[0]) < given, item, num_rows)

        def step(best: tuple[Array, Array], first: Array) -> tuple[tuple[Array, Array], None]:
            rows = first + jnp.arange(chunk, dtype=jnp.int32)
            inside = rows < num_rows
            rows = jnp.where(inside, rows, 0)
            score = predict(params, adapted, columns(rows))
            score = jnp.where(inside & ~jnp.isnan(score), score, -jnp.inf)
            place = jnp.where((dropped >= first) & (dropped < first + chunk), dropped - first, chunk)
            score = score.at[place].set(-jnp.inf, mode="drop")
            top, at = jax.lax.top_k(score, min(n, chunk))
            both = jnp.concatenate([best[0], top]), jnp.concatenate([best[1], rows[at]])
            top, at = jax.lax.top_k(both[0], n)
            return (top, both[1][at]), None

        start = jnp.full((n,), -jnp.inf), jnp.zeros((n,), jnp.int32)
        firsts = jnp.arange(1, num_rows, chunk, dtype=jnp.int32)
        (score, rows), _ = jax.lax.scan(step, start, firsts)
        empty = adapt(params, examples._replace(mask=jnp.zeros_like(mask)), key)
        prior = predict(params, empty, columns(rows))
        if not points:
            return _Best(rows, score, prior, jnp.zeros((n, 0)))

        def scores(target: Array, mask: Array) -> Array:
            return predict(params, adapt(params, Examples(examples.inputs, target, mask), key), columns(rows))

        if implicit:
            return _Best(rows, score, prior, jax.jacrev(scores, 1)(target, mask) * mask[None])
        moved = (target - predict(params, empty, examples.inputs)) * mask
        slope = jax.jacrev(scores, 0)
        if points == 1:
            return _Best(rows, score, prior, slope(target, mask) * moved[None])
        left = 1.0 - (jnp.arange(points) + 0.5) / points
        along = jax.lax.map(lambda part: slope(target - part * moved, mask), left)
        return _Best(rows, score, prior, along.mean(0) * moved[None])

    return jax.vmap(one)(*support, given)
