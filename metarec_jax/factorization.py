"""Matrix factorisation by alternating least squares, in closed form, on the host.

The normal equations of all users (then of all items) are gathered in groups of like history length, so that each group is
one batched matrix product and one batched solve: nothing loops over users, and memory does not grow with the number of ratings.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

from metarec_jax.core import MetarecError

_SLOTS = 1 << 17
"""Ratings that one batched product holds at a time."""


class Rows(Protocol):
    """A vocabulary, as far as this file cares."""

    @property
    def num_rows(self) -> int: ...


class Feedback(Protocol):
    """What `metarec_jax.data.interactions.Interactions` is, as far as this file cares."""

    @property
    def user(self) -> np.ndarray: ...
    @property
    def item(self) -> np.ndarray: ...
    @property
    def rating(self) -> np.ndarray | None: ...
    @property
    def users(self) -> Rows: ...
    @property
    def items(self) -> Rows: ...


class Factors(NamedTuple):
    """A factorisation: score = mu + item_bias[i] + user_bias[u] + item_factors[i] . user_factors[u].

    Attributes:
      mu: mean rating; 0 for implicit feedback.
      item_bias, item_factors: float32 ``[rows]`` and ``[rows, size]`` by vocabulary row; 0 in row 0 and where training saw nothing.
      user_bias, user_factors: the same, of users.
    """

    mu: float
    item_bias: np.ndarray
    item_factors: np.ndarray
    user_bias: np.ndarray
    user_factors: np.ndarray


class Grouped(NamedTuple):
    """Ratings sorted by one side. Entity ``k`` owns ``start[k] .. start[k + 1]`` of ``other`` and ``value``."""

    start: np.ndarray
    other: np.ndarray
    value: np.ndarray


def grouped(by: np.ndarray, other: np.ndarray, value: np.ndarray, num_rows: int) -> Grouped:
    """Sort ratings by the rows ``by``. ``start`` has ``num_rows + 1`` entries."""
    order = np.argsort(by, kind="stable")
    start = np.concatenate([[0], np.cumsum(np.bincount(by, minlength=num_rows))])
    return Grouped(start, other[order].astype(np.int32), value[order].astype(np.float32))


def padded(groups: Grouped, slots: int = _SLOTS) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Entities of like length together: ``(rows [B], other [B, L], value [B, L], mask [B, L])``, ``B * L`` about ``slots``."""
    counts = np.diff(groups.start)
    widths = np.ceil(np.log2(np.maximum(counts, 1)) * 2).astype(int)  # lengths grow by a factor of sqrt(2)
    widths[counts == 0] = -1
    for width in np.unique(widths[widths >= 0]):
        members = np.flatnonzero(widths == width)
        length = int(counts[members].max())
        step = max(1, slots // length)
        for first in range(0, len(members), step):
            rows = members[first : first + step]
            at = groups.start[rows][:, None] + np.arange(length)
            mask = np.arange(length) < counts[rows][:, None]
            at = np.where(mask, at, 0)
            yield rows, groups.other[at], groups.value[at] * mask, mask.astype(np.float32)


def als_factors(train: Feedback, *, size: int = 16, reg: float = 5.0, iterations: int = 8, seed: int = 0) -> Factors:
    """Factorise ratings: min sum (r - mu - b_i - b_u - q_i . p_u)^2 + reg (|q|^2 + |p|^2 + |b|^2).

    Each half step solves, for every user at once, (X^T X + reg I) [p_u, b_u] = X^T (r - mu - b_i) with X the rows
    [q_i, 1] of the items the user rated; then the same for items. Biases are fitted alone first.

    Args:
      train: explicit ratings, in vocabulary rows.
      size: D, length of a factor.
      reg: ridge, in units of one rating.
      iterations: full sweeps.
      seed: of the first item factors.

    Raises:
      MetarecError: the data has no ratings, or none at all.

    Source: Zhou et al., "Large-scale Parallel Collaborative Filtering for the Netflix Prize", 2008; biases as in Koren, 2009.
    """
    if train.rating is None or not len(train.rating):
        raise MetarecError("als_factors wants ratings, and the data has none; use implicit_als_factors for clicks")
    rng = np.random.default_rng(seed)
    mu = float(np.mean(train.rating, dtype=np.float64))
    residual = train.rating - np.float32(mu)
    by_user = grouped(train.user, train.item, residual, train.users.num_rows)
    by_item = grouped(train.item, train.user, residual, train.items.num_rows)
    item = np.zeros((train.items.num_rows, size + 1), np.float32)
    seen = np.flatnonzero(np.diff(by_item.start))
    item[seen, :size] = rng.normal(0, 0.1, (len(seen), size))
    item[:, size] = bias_terms(train, reg_item=reg, reg_user=reg)[1]
    user = np.zeros((train.users.num_rows, size + 1), np.float32)
    for _ in range(iterations):
        _half_step(user, item, by_user, reg)
        _half_step(item, user, by_item, reg)
    _half_step(user, item, by_user, reg)
    return Factors(mu, item[:, size].copy(), item[:, :size].copy(), user[:, size].copy(), user[:, :size].copy())


def _half_step(out: np.ndarray, fixed: np.ndarray, groups: Grouped, reg: float) -> None:
    """Solve for the rows of ``out`` (factors, then bias) given ``fixed``."""
    size = out.shape[1] - 1
    ridge = (reg * np.eye(size + 1)).astype(np.float32)
    for rows, other, value, mask in padded(groups):
        x = fixed[other]
        wanted = (value - x[..., size]) * mask
        x[..., size] = 1.0
        x *= mask[..., None]
        xt = x.swapaxes(1, 2)
        out[rows] = np.linalg.solve(xt @ x + ridge, xt @ wanted[..., None])[..., 0]


def implicit_als_factors(
    train: Feedback, *, size: int = 16, reg: float = 5.0, alpha: float = 10.0, iterations: int = 8, seed: int = 0
) -> Factors:
    """Factorise clicks: min sum over ALL pairs of c_ui (x_ui - q_i . p_u)^2 + reg (|q|^2 + |p|^2), c = 1 + alpha x.

    x_ui is 1 for a pair that is in the data and 0 for any other. The sum over all pairs is never made:
    (Q^T Q + alpha Q_u^T Q_u + reg I) p_u = (1 + alpha) Q_u^T 1.

    Args:
      train: interactions; a rating, if any, is ignored.
      size: D, length of a factor.
      reg: ridge.
      alpha: how much more a click weighs than its absence.
      iterations: full sweeps.
      seed: of the first item factors.

    Source: Hu, Koren and Volinsky, "Collaborative Filtering for Implicit Feedback Datasets", 2008.
    """
    rng = np.random.default_rng(seed)
    ones = np.ones(len(train.user), np.float32)
    by_user = grouped(train.user, train.item, ones, train.users.num_rows)
    by_item = grouped(train.item, train.user, ones, train.items.num_rows)
    item = np.zeros((train.items.num_rows, size), np.float32)
    seen = np.flatnonzero(np.diff(by_item.start))
    item[seen] = rng.normal(0, 0.1, (len(seen), size))
    user = np.zeros((train.users.num_rows, size), np.float32)
    for _ in range(iterations):
        _implicit_half_step(user, item, by_user, reg, alpha)
        _implicit_half_step(item, user, by_item, reg, alpha)
    _implicit_half_step(user, item, by_user, reg, alpha)
    return Factors(0.0, np.zeros(len(item), np.float32), item, np.zeros(len(user), np.float32), user)


def _implicit_half_step(out: np.ndarray, fixed: np.ndarray, groups: Grouped, reg: float, alpha: float) -> None:
    """Solve for the rows of ``out`` given ``fixed``, the absent pairs included through the Gram matrix."""
    everywhere = fixed.T @ fixed + (reg * np.eye(fixed.shape[1])).astype(np.float32)
    for rows, other, _, mask in padded(groups):
        x = fixed[other] * mask[..., None]
        xt = x.swapaxes(1, 2)
        out[rows] = np.linalg.solve(everywhere + alpha * (xt @ x), (1 + alpha) * x.sum(1)[..., None])[..., 0]


def bias_terms(
    train: Feedback, *, reg_item: float = 5.0, reg_user: float = 5.0, iterations: int = 10
) -> tuple[float, np.ndarray, np.ndarray]:
    """Biases by alternating least squares: b_i = sum_u (r - mu - b_u) / (n_i + reg_item), and so for users.

    Returns:
      mu, item_bias float32 ``[rows]``, user_bias float32 ``[rows]``; 0 where training saw nothing.

    Source: Koren, Bell and Volinsky, "Matrix Factorization Techniques for Recommender Systems", 2009.
    """
    if train.rating is None or not len(train.rating):
        raise MetarecError("bias_terms wants ratings, and the data has none; for clicks use popularity")
    mu = float(np.mean(train.rating, dtype=np.float64))
    residual = train.rating - np.float32(mu)
    count = np.bincount(train.item, minlength=train.items.num_rows), np.bincount(train.user, minlength=train.users.num_rows)
    item, user = np.zeros(train.items.num_rows), np.zeros(train.users.num_rows)
    for _ in range(iterations):
        sums = np.bincount(train.item, residual - user[train.user], minlength=len(item))
        item = sums / np.maximum(count[0] + reg_item, 1e-12)
        sums = np.bincount(train.user, residual - item[train.item], minlength=len(user))
        user = sums / np.maximum(count[1] + reg_user, 1e-12)
    return mu, item.astype(np.float32), user.astype(np.float32)
