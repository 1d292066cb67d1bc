"""Synthetic interactions with a known optimum, at any scale: no array of users x items is created."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
from scipy.special import expit, ndtr

from metarec_jax.core import MetarecError
from metarec_jax.data.interactions import Feature, Interactions, Vocabulary

_YEAR = 365 * 86_400
_START = 1_600_000_000
_GENRES, _MOST_GENRES, _GROUPS = 18, 3, 8
_MAX_MATRIX = 2**22
_LEVELS = np.arange(1, 6)


class Truth(NamedTuple):
    """The parameters that generated the data. Row 0 of each array is the unknown id (zeros).

    Attributes:
      mean: mu.
      user_vector: w, float32 ``[users + 1, D]``; user_prior: its mean given the user's group, ``[users + 1, D]``;
        user_sd: its standard deviation around that mean, in each direction.
      item_vector: v, float32 ``[items + 1, D]``; item_prior: the part of v that the features explain.
      user_bias, item_bias: ``[users + 1]``, ``[items + 1]``; user_bias_sd; item_bias_prior: the part of item_bias that
        the features explain.
      noise: the standard deviation of a rating around its score (0 for implicit data).
    """

    mean: float
    user_vector: np.ndarray
    user_prior: np.ndarray
    user_sd: float
    item_vector: np.ndarray
    item_prior: np.ndarray
    user_bias: np.ndarray
    user_bias_sd: float
    item_bias: np.ndarray
    item_bias_prior: np.ndarray
    noise: float


class Synthetic(NamedTuple):
    """Interactions and their ground truth.

    Attributes:
      data: with features ``user_group``, ``item_genre`` (multi), ``item_maker`` (categorical), ``item_tone`` (numeric).
      best_rmse: the RMSE over ``data`` of the optimal prediction, which uses `truth`; nan for implicit data.
      truth: the parameters that generated the data.
    """

    data: Interactions
    best_rmse: float
    truth: Truth

    def scores(self, user: np.ndarray, item: np.ndarray) -> np.ndarray:
        """mu + b_u + b_i + <w_u, v_i>, for rows ``user`` and ``item``, which broadcast; the logit for implicit data."""
        return _scores(self.truth, user, item)

    def posterior_scores(self, user: int, support: np.ndarray, rating: np.ndarray, item: np.ndarray) -> np.ndarray:
        """The optimal prediction for a user with a few ratings, given the true items; no learner can be better.

        With x = (1, v), prior (b, w) ~ N(m, S) and residuals e = r - mu - b_i - <x, m>:
        m + S X^T (X S X^T + noise^2 I)^-1 e.

        Args:
          user: a row, of which only the group is used.
          support, rating: item rows ``[S]`` and their ratings, not rounded.
          item: rows ``[n]`` to predict.

        Returns:
          ``[n]`` scores.
        """
        t = self.truth

        def design(rows: np.ndarray) -> np.ndarray:
            return np.concatenate([np.ones((len(rows), 1)), t.item_vector[rows]], axis=1)

        prior = np.concatenate([[0.0], t.user_prior[user]])
        variance = np.concatenate([[t.user_bias_sd**2], np.full(len(prior) - 1, t.user_sd**2)])
        x = design(support)
        residual = rating - t.mean - t.item_bias[support] - x @ prior
        gram = (x * variance) @ x.T + t.noise**2 * np.eye(len(x))
        belief = prior + variance * (x.T @ np.linalg.solve(gram, residual))
        return t.mean + t.item_bias[item] + design(item) @ belief


def synthetic(
    num_users: int,
    num_items: int,
    *,
    ratings_per_user: tuple[int, int] = (20, 100),
    size: int = 4,
    noise: float = 0.5,
    content: float = 0.8,
    group: float = 0.3,
    taste: float = 0.7,
    cold_items: float = 0.0,
    rounded: bool = False,
    implicit: bool = False,
    seed: int = 0,
) -> Synthetic:
    """Ratings r = mu + b_u + b_i + <w_u, v_i> + noise, mu = 3.5, with features that explain a known part of them.

    w_u ~ N(m, I / size), where the fraction ``group`` of the variance is common to the users of a group. The fraction
    ``content`` of the variance of v_i and b_i is a linear function of the item's genres, maker and tone, the rest is
    individual; <w_u - m, v_i> has standard deviation ``taste`` over users and items, b_u 0.4, b_i 0.3.

    Args:
      ratings_per_user: minimum and maximum; the number is uniform between them, the items are distinct, and popular
        ones more likely.
      size: D, dimension of the preference vectors.
      noise: standard deviation of the noise, and so the lowest possible RMSE.
      cold_items: this fraction of the items, the last rows, has features but no interaction.
      rounded: round and clip to 1..5; ``best_rmse`` is then that of the exact mean of the rounded rating.
      implicit: no ratings; a user accepts an offered item with probability sigmoid(score), mu = 0, noise is not used.
      seed: seed of everything random. Timestamps are in the month after a user's arrival, arrivals within a year.

    Raises:
      MetarecError: there are not enough items for that many distinct items per user.

    >>> made = synthetic(100, 50, ratings_per_user=(10, 20), noise=0.25)
    >>> made.best_rmse
    0.25
    >>> error = made.data.rating - made.scores(made.data.user, made.data.item)
    >>> bool(abs(np.sqrt(np.mean(error**2)) - 0.25) < 0.02)
    True
    """
    low, high = ratings_per_user
    warm_items = num_items - round(cold_items * num_items)
    if num_users < 1 or not 1 <= low <= high <= warm_items:
        raise MetarecError(
            f"{num_users} users cannot have {low} to {high} distinct items each of {warm_items} items; "
            "lower ratings_per_user or raise num_items"
        )
    rng = np.random.default_rng(seed)
    features, prior, own = _items(rng, num_items, size, content)
    scale = np.array([taste] * size + [0.3])
    explained, whole = _padded(scale * prior), _padded(scale * (prior + own))
    groups = rng.integers(0, _GROUPS, num_users)
    common = rng.standard_normal((_GROUPS, size)) * np.sqrt(group / size)
    mean_vector = np.full(size, 0.5 / np.sqrt(size))
    user_prior = _padded(mean_vector + common[groups])
    user_sd = float(np.sqrt((1 - group) / size))
    truth = Truth(
        mean=0.0 if implicit else 3.5,
        user_vector=user_prior + _padded(user_sd * rng.standard_normal((num_users, size), np.float32)),
        user_prior=user_prior,
        user_sd=user_sd,
        item_vector=np.ascontiguousarray(whole[:, :-1]),
        item_prior=np.ascontiguousarray(explained[:, :-1]),
        user_bias=_padded(0.4 * rng.standard_normal((num_users, 1)))[:, 0],
        user_bias_sd=0.4,
        item_bias=whole[:, -1],
        item_bias_prior=explained[:, -1],
        noise=0.0 if implicit else noise,
    )
    counts = rng.integers(low, high + 1, num_users)
    user, item = _distinct(rng, counts, warm_items, truth if implicit else None)
    arrival = rng.integers(0, _YEAR, num_users + 1)
    timestamp = _START + arrival[user] + rng.integers(0, 30 * 86_400, len(user))
    rating = None if implicit else _score_rows(truth, user, item)
    best = float("nan") if implicit else noise
    if rating is not None:
        if rounded:
            best = _rounding_floor(rating, noise)
        rating += np.float32(noise) * rng.standard_normal(len(rating), np.float32)
        if rounded:
            np.clip(np.rint(rating, out=rating), 1, 5, out=rating)
    data = Interactions(
        user=user,
        item=item,
        rating=rating,
        timestamp=timestamp,
        users=Vocabulary(np.arange(1, num_users + 1)),
        items=Vocabulary(np.arange(1, num_items + 1)),
        user_features={"user_group": _coded(groups, _GROUPS)},
        item_features=features,
        name=f"synthetic:{num_users}x{num_items}",
    )
    return Synthetic(data, best, truth)


@functools.wraps(synthetic, assigned=("__annotations__",))
def interactions(*args: Any, **kwargs: Any) -> Interactions:
    """The data of `synthetic`, without what is known of how it was made.

    >>> interactions(100, 50, ratings_per_user=(10, 20)).items.num_rows
    51
    """
    return synthetic(*args, **kwargs).data


def checkerboard(num_users: int, num_items: int, *, implicit: bool = False, leave_out: bool = True) -> Interactions:
    """User u likes item i if both are even or both are odd: a test problem with an obvious optimum.

    Ids are 0, 1, ...; a liked item is rated 5 and the others 1; with ``implicit`` only liked items occur.

    Args:
      num_items: even.
      leave_out: omit item ``u % num_items`` of user u, which u likes, so that there is one right recommendation.

    >>> board = checkerboard(2, 4)
    >>> list(zip((board.user - 1).tolist(), (board.item - 1).tolist(), board.rating.tolist()))
    [(0, 1, 1.0), (0, 2, 5.0), (0, 3, 1.0), (1, 0, 1.0), (1, 2, 1.0), (1, 3, 5.0)]
    """
    if num_items % 2:
        raise MetarecError(f"a checkerboard requires an even number of items, got {num_items}")
    user, item = (grid.ravel() for grid in np.meshgrid(np.arange(num_users), np.arange(num_items), indexing="ij"))
    liked = user % 2 == item % 2
    kept = np.ones(len(user), bool)
    if implicit:
        kept &= liked
    if leave_out:
        kept &= item != user % num_items
    return Interactions(
        user=(user[kept] + 1).astype(np.int32),
        item=(item[kept] + 1).astype(np.int32),
        rating=None if implicit else np.where(liked[kept], 5, 1).astype(np.float32),
        timestamp=None,
        users=Vocabulary(np.arange(num_users)),
        items=Vocabulary(np.arange(num_items)),
        name=f"checkerboard:{num_users}x{num_items}",
    )


def _items(
    rng: np.random.Generator, num_items: int, size: int, content: float
) -> tuple[dict[str, Feature], np.ndarray, np.ndarray]:
    """Features, and vectors ``[items, size + 1]`` of unit variance: a part explained by features, and the rest."""
    makers = int(np.clip(num_items // 20, 2, 200))
    number = rng.integers(1, _MOST_GENRES + 1, num_items)
    genres = np.argsort(rng.random((num_items, _GENRES), np.float32), axis=1)[:, :_MOST_GENRES].astype(np.int32) + 1
    genres *= np.arange(_MOST_GENRES) < number[:, None]
    maker = rng.integers(0, makers, num_items)
    tone = rng.standard_normal(num_items)
    tone = (tone - tone.mean()) / tone.std() if num_items > 1 else np.zeros(num_items)
    genre_vector = rng.standard_normal((_GENRES + 1, size + 1)) / np.sqrt(2)
    genre_vector[0] = 0.0
    explained = rng.standard_normal((makers, size + 1))[maker] + tone[:, None] * rng.standard_normal(size + 1)
    for k in range(_MOST_GENRES):
        explained += genre_vector[genres[:, k]]
    explained -= explained.mean(0)
    explained /= np.maximum(np.sqrt((explained**2).mean(0)), 1e-12)
    features = {
        "item_genre": Feature(
            "multi",
            np.concatenate([np.zeros((1, _MOST_GENRES), np.int32), genres]),
            Vocabulary(np.array([f"genre {k:02d}" for k in range(_GENRES)])),
        ),
        "item_maker": _coded(maker, makers),
        "item_tone": Feature("numeric", _padded(tone[:, None])),
    }
    own = np.sqrt(1 - content) * rng.standard_normal((num_items, size + 1))
    return features, np.sqrt(content) * explained, own


def _coded(values: np.ndarray, cardinality: int) -> Feature:
    return Feature(
        "categorical", np.concatenate([[0], values + 1]).astype(np.int32), Vocabulary(np.arange(1, cardinality + 1))
    )


def _padded(values: np.ndarray) -> np.ndarray:
    """float32, below a row of zeros."""
    return np.concatenate([np.zeros((1, *values.shape[1:])), values]).astype(np.float32)


def _scores(truth: Truth, user: np.ndarray, item: np.ndarray) -> np.ndarray:
    inner = np.einsum("...d,...d->...", truth.user_vector[user], truth.item_vector[item])
    return truth.mean + truth.user_bias[user] + truth.item_bias[item] + inner


def _score_rows(truth: Truth, user: np.ndarray, item: np.ndarray) -> np.ndarray:
    out = np.empty(len(user), np.float32)
    for start in range(0, len(user), _MAX_MATRIX):
        part = slice(start, start + _MAX_MATRIX)
        out[part] = _scores(truth, user[part], item[part])
    return out


def _distinct(
    rng: np.random.Generator, counts: np.ndarray, num_items: int, taken: Truth | None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows ``(user, item)``: ``counts[k]`` distinct items for user k + 1, sorted by user and item.

    The probability of an item decreases with its popularity rank as 1 / (rank + items / 20); with ``taken`` an offer is
    also accepted with probability sigmoid(score). Offers are drawn with replacement, repeats dropped, and missing ones
    drawn again; for users with most of the items, exact weighted draws without replacement (the Gumbel trick) are used.
    """
    weight = 1.0 / (rng.permutation(num_items) + 1 + num_items / 20)
    if counts.max() > num_items / 8:
        return _gumbel(rng, counts, np.log(weight), taken)
    shares = np.rint(weight / weight.sum() * max(2**20, 16 * num_items)).astype(np.int64)
    pool = np.repeat(np.arange(1, num_items + 1, dtype=np.int32), np.maximum(shares, 1))
    stride = num_items + 1
    missing, active, held = counts.copy(), np.arange(len(counts)), np.zeros(0, np.int64)
    done: list[np.ndarray] = []
    while len(active):
        user = np.repeat(active, missing[active])
        item = pool[rng.integers(0, len(pool), len(user))]
        if taken is not None:
            accepted = rng.random(len(user), np.float32) < expit(_score_rows(taken, user + 1, item))
            user, item = user[accepted], item[accepted]
        keys = np.concatenate([held, user * stride + item])
        keys.sort()
        keys = keys[np.append(True, keys[1:] != keys[:-1])] if len(keys) else keys
        owner = keys // stride
        missing[active] = counts[active] - np.bincount(owner, minlength=len(counts))[active]
        full = missing[owner] == 0
        done.append(keys[full])
        held, active = keys[~full], active[missing[active] > 0]
    keys = np.concatenate(done)
    keys.sort()
    return (keys // stride + 1).astype(np.int32), (keys % stride).astype(np.int32)


def _gumbel(
    rng: np.random.Generator, counts: np.ndarray, log_weight: np.ndarray, taken: Truth | None
) -> tuple[np.ndarray, np.ndarray]:
    """The ``counts[k]`` largest of log weight + Gumbel noise, a few users at a time (Plackett-Luce draws)."""
    num_items, users, items = len(log_weight), [], []
    step = max(1, _MAX_MATRIX // num_items)
    for start in range(0, len(counts), step):
        sizes = counts[start : start + step]
        rows = np.arange(start, start + len(sizes))
        value = log_weight - np.log(rng.standard_exponential((len(sizes), num_items)))
        if taken is not None:
            value += np.log(expit(_scores(taken, rows[:, None] + 1, np.arange(1, num_items + 1)[None])))
        best = np.argsort(-value, axis=1)[:, : sizes.max()]
        kept = np.arange(best.shape[1]) < sizes[:, None]
        chosen = np.sort(np.where(kept, best, num_items), axis=1)
        users.append(np.repeat(rows + 1, sizes))
        items.append(chosen[chosen < num_items] + 1)
    return np.concatenate(users).astype(np.int32), np.concatenate(items).astype(np.int32)


def _rounding_floor(score: np.ndarray, noise: float) -> float:
    """sqrt of the mean, over rows, of Var[clip(round(score + noise), 1, 5)], the error of the optimal prediction."""
    variance = 0.0
    edges = np.concatenate([[-np.inf], _LEVELS[:-1] + 0.5, [np.inf]])
    for start in range(0, len(score), _MAX_MATRIX):
        below = ndtr((edges - score[start : start + _MAX_MATRIX, None].astype(np.float64)) / max(noise, 1e-9))
        chance = np.diff(below, axis=1)
        variance += ((chance @ _LEVELS**2) - (chance @ _LEVELS) ** 2).sum()
    return float(np.sqrt(variance / len(score)))
