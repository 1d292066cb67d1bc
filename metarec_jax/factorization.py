"""Matrix factorisation by alternating least squares, in closed form, on the host.

The normal equations of all users (then of all items) are grouped by similar history length, so that each group is one
batched matrix product and one batched solve. Nothing loops over users, and the memory beyond the ratings, sorted once
by each side, is that of one group.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from scipy.linalg import cho_factor, cho_solve, lapack, solve_triangular
from scipy.sparse import csr_matrix

from metarec_jax.core import MetarecError

_SLOTS = 1 << 17
"""Number of ratings in one batched product."""
_NUMBERS = 1 << 22
"""Maximum size of a batch of matrices, and a quarter of that of the moments of a chunk of users."""
_BLOCK = 512
"""Number of rows of a square matrix that are copied at a time."""
Part = TypeVar("Part")


class Rows(Protocol):
    """The part of a vocabulary that this file uses."""

    @property
    def num_rows(self) -> int: ...


class Feedback(Protocol):
    """The part of `metarec_jax.data.interactions.Interactions` that this file uses."""

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
      item_bias, item_factors: float32 ``[rows]`` and ``[rows, size]`` by vocabulary row; 0 in row 0 and for items
        without training data.
      user_bias, user_factors: the same for users.
    """

    mu: float
    item_bias: np.ndarray
    item_factors: np.ndarray
    user_bias: np.ndarray
    user_factors: np.ndarray


class GaussianPrior(NamedTuple):
    """A Gaussian prior of a user's ratings: r_i = mu + item_mean[i] + b + loadings[i] . z + e_i.

    Independently z ~ N(0, I), b ~ N(0, offset_variance) and e_i ~ N(0, noise[i]).

    Attributes:
      mu: mean rating.
      item_mean, loadings: float32 ``[rows]`` and ``[rows, size]``; 0 in row 0 and for items without training data.
      noise: float32 ``[rows]``; for items without training data that of a typical item.
      offset_variance: variance of a user's offset b.
    """

    mu: float
    item_mean: np.ndarray
    loadings: np.ndarray
    noise: np.ndarray
    offset_variance: float


class Group(NamedTuple):
    """Entities with histories of similar length. Padding points at row ``num_other``, which holds zeros.

    Attributes:
      rows: ``[B]`` rows of the entities.
      other: int32 ``[B, L]`` rows of the other side.
      value: float32 ``[B, L]``.
    """

    rows: np.ndarray
    other: np.ndarray
    value: np.ndarray


def grouped(
    by: np.ndarray, other: np.ndarray, value: np.ndarray, num_other: int, slots: int = _SLOTS, most: int = _SLOTS
) -> list[Group]:
    """Ratings by the entity in ``by``, in groups of about ``slots``, ``most`` entities at most; a fifth is padding."""
    order = np.argsort(by, kind="stable")
    counts = np.bincount(by)
    start = np.concatenate([[0], np.cumsum(counts)])
    other, value = other[order].astype(np.int32), value[order].astype(np.float32)
    widths = np.ceil(np.log2(np.maximum(counts, 1)) * 2).astype(int)  # lengths grow by a factor of sqrt(2)
    groups = []
    for width in np.unique(widths[counts > 0]):
        members = np.flatnonzero((widths == width) & (counts > 0))
        length = int(counts[members].max())
        step = max(1, min(slots // length, most))
        for first in range(0, len(members), step):
            rows = members[first : first + step]
            mask = np.arange(length) < counts[rows][:, None]
            at = np.where(mask, start[rows][:, None] + np.arange(length), 0)
            padding = np.int32(num_other), np.float32(0)
            groups.append(Group(rows, np.where(mask, other[at], padding[0]), np.where(mask, value[at], padding[1])))
    return groups


def als_factors(
    train: Feedback,
    *,
    size: int = 16,
    reg: float = 5.0,
    reg_bias: float | None = None,
    iterations: int = 8,
    seed: int = 0,
) -> Factors:
    """Factorise ratings: min sum (r - mu - b_i - b_u - q_i . p_u)^2 + reg (|q|^2 + |p|^2) + reg_bias |b|^2.

    Each half step solves, for every user at once, (X^T X + R) [p_u, b_u] = X^T (r - mu - b_i) with X the rows [q_i, 1]
    of the items the user rated and R = diag(reg, ..., reg, reg_bias); then the same for items. Biases are fitted first.

    Args:
      train: explicit ratings, in vocabulary rows.
      size: length D of a factor.
      reg: ridge of the factors, in units of one rating.
      reg_bias: ridge of the biases, in the same units; None for ``reg``.
      iterations: number of full sweeps.
      seed: seed of the initial item factors.

    Raises:
      MetarecError: the data has no ratings.

    Source: Zhou et al., "Large-scale Parallel Collaborative Filtering for the Netflix Prize", 2008.
    """
    if train.rating is None or not len(train.rating):
        raise MetarecError("als_factors requires ratings, and the data has none; use implicit_als_factors for clicks")
    reg_bias = reg if reg_bias is None else reg_bias
    rng = np.random.default_rng(seed)
    mu = float(np.mean(train.rating, dtype=np.float64))
    residual = train.rating - np.float32(mu)
    by_user = grouped(train.user, train.item, residual, train.items.num_rows)
    by_item = grouped(train.item, train.user, residual, train.users.num_rows)
    item = np.zeros((train.items.num_rows, size + 1), np.float32)
    seen = np.unique(train.item)
    item[seen, :size] = rng.normal(0, 0.1, (len(seen), size))
    item[:, size] = bias_terms(train, reg_item=reg_bias, reg_user=reg_bias)[1]
    user = np.zeros((train.users.num_rows, size + 1), np.float32)
    for _ in range(iterations):
        _half_step(user, item, by_user, reg, reg_bias)
        _half_step(item, user, by_item, reg, reg_bias)
    _half_step(user, item, by_user, reg, reg_bias)
    return Factors(mu, item[:, size].copy(), item[:, :size].copy(), user[:, size].copy(), user[:, :size].copy())


def _half_step(out: np.ndarray, fixed: np.ndarray, groups: list[Group], reg: float, reg_bias: float) -> None:
    """Solve for the rows of ``out`` (factors, then bias) given ``fixed``."""
    size = out.shape[1] - 1
    ridge = np.diag([reg] * size + [reg_bias]).astype(np.float32)
    bias = np.append(fixed[:, size], np.float32(0))
    features = np.vstack([fixed, np.zeros((1, size + 1), np.float32)])
    features[:-1, size] = 1.0

    def solve(group: Group) -> None:
        x = features.take(group.other, axis=0)
        left, right = _products(x, group.value - bias.take(group.other))
        out[group.rows] = np.linalg.solve(left + ridge, right)[..., 0]

    _in_threads(solve, groups)


def _products(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """X^T X ``[B, D, D]`` and X^T y ``[B, D, 1]``, in pieces below BLAS's threshold for its own threads.

    Those threads spin while they wait: slower than none at this size, and ten times slower on a busy machine.
    """
    left = np.zeros((x.shape[0], x.shape[2], x.shape[2]), np.float32)
    right = np.zeros((x.shape[0], x.shape[2], 1), np.float32)
    step = max(1, (1 << 18) // x.shape[2] ** 2)
    for first in range(0, x.shape[1], step):
        part = x[:, first : first + step]
        left += part.swapaxes(1, 2) @ part
        right += part.swapaxes(1, 2) @ y[:, first : first + step, None]
    return left, right


def _in_threads(solve: Callable[[Part], None], parts: Iterable[Part]) -> None:
    """Solve all parts in a pool of threads; each writes numbers of its own, so the order does not matter."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for _ in pool.map(solve, parts):
            pass


def implicit_als_factors(
    train: Feedback, *, size: int = 16, reg: float = 5.0, alpha: float = 10.0, iterations: int = 8, seed: int = 0
) -> Factors:
    """Factorise clicks: min sum over ALL pairs of c_ui (x_ui - q_i . p_u)^2 + reg (|q|^2 + |p|^2), c = 1 + alpha x.

    x_ui is 1 for a pair that is in the data and 0 for any other. The sum over all pairs is never computed:
    (Q^T Q + alpha Q_u^T Q_u + reg I) p_u = (1 + alpha) Q_u^T 1.

    Args:
      train: interactions; a rating, if any, is ignored.
      size: length D of a factor.
      reg: ridge.
      alpha: weight of a click minus that of its absence.
      iterations: number of full sweeps.
      seed: seed of the initial item factors.

    Source: Hu, Koren and Volinsky, "Collaborative Filtering for Implicit Feedback Datasets", 2008.
    """
    rng = np.random.default_rng(seed)
    ones = np.ones(len(train.user), np.float32)
    by_user = grouped(train.user, train.item, ones, train.items.num_rows)
    by_item = grouped(train.item, train.user, ones, train.users.num_rows)
    item = np.zeros((train.items.num_rows, size), np.float32)
    seen = np.unique(train.item)
    item[seen] = rng.normal(0, 0.1, (len(seen), size))
    user = np.zeros((train.users.num_rows, size), np.float32)
    for _ in range(iterations):
        _implicit_half_step(user, item, by_user, reg, alpha)
        _implicit_half_step(item, user, by_item, reg, alpha)
    _implicit_half_step(user, item, by_user, reg, alpha)
    return Factors(0.0, np.zeros(len(item), np.float32), item, np.zeros(len(user), np.float32), user)


def _implicit_half_step(out: np.ndarray, fixed: np.ndarray, groups: list[Group], reg: float, alpha: float) -> None:
    """Solve for the rows of ``out`` given ``fixed``; the Gram matrix includes the absent pairs."""
    everywhere = fixed.T @ fixed + (reg * np.eye(fixed.shape[1])).astype(np.float32)
    features = np.vstack([fixed, np.zeros((1, fixed.shape[1]), np.float32)])

    def solve(group: Group) -> None:
        x = features.take(group.other, axis=0)
        left, right = _products(x, group.value)
        out[group.rows] = np.linalg.solve(everywhere + alpha * left, (1 + alpha) * right)[..., 0]

    _in_threads(solve, groups)


def bias_terms(
    train: Feedback, *, reg_item: float = 5.0, reg_user: float = 5.0, iterations: int = 10
) -> tuple[float, np.ndarray, np.ndarray]:
    """Biases by alternating least squares: b_i = sum_u (r - mu - b_u) / (n_i + reg_item), and likewise for users.

    Returns:
      mu, item_bias float32 ``[rows]``, user_bias float32 ``[rows]``; 0 for rows without training data.

    Source: Koren, Bell and Volinsky, "Matrix Factorization Techniques for Recommender Systems", 2009.
    """
    if train.rating is None or not len(train.rating):
        raise MetarecError("bias_terms requires ratings, and the data has none; use popularity for clicks")
    mu = float(np.mean(train.rating, dtype=np.float64))
    residual = train.rating - np.float32(mu)
    item, user = np.zeros(train.items.num_rows), np.zeros(train.users.num_rows)
    per_item, per_user = np.bincount(train.item, minlength=len(item)), np.bincount(train.user, minlength=len(user))
    item_total = np.bincount(train.item, residual, minlength=len(item))
    user_total = np.bincount(train.user, residual, minlength=len(user))
    by_item = csr_matrix((np.ones(len(residual)), (train.item, train.user)), shape=(len(item), len(user)))
    by_user = by_item.T.tocsr()  # a product with a vector is three times as fast as a bincount of each rating
    for _ in range(iterations):
        item = (item_total - by_item @ user) / np.maximum(per_item + reg_item, 1e-12)
        user = (user_total - by_user @ item) / np.maximum(per_user + reg_user, 1e-12)
    return mu, item.astype(np.float32), user.astype(np.float32)


def similarities(train: Feedback, values: np.ndarray, shrinkage: float) -> np.ndarray:
    """Positive shrunk cosine of item columns, max(0, r_i . r_j / (|r_i| |r_j| + shrinkage)), and 0 on the diagonal.

    Args:
      values: float32 ``[N]``, one for each interaction: the entries of the columns.
      shrinkage: 0 or more; it shrinks similarities from few users towards 0.

    Returns:
      float32 ``[rows, rows]``.
    """
    out = np.zeros((train.items.num_rows, train.items.num_rows), np.float32)
    for first, block in _similar_blocks(train, values, shrinkage):
        out[first : first + block.shape[0]] = block.toarray()
    return out


def item_weights(train: Feedback, values: np.ndarray, reg: float) -> np.ndarray:
    """The item weights of EASE: ``argmin_B |X - X B|^2 + reg |B|^2`` with a zero diagonal.

    With P = (X^T X + reg I)^-1: ``B_ij = -P_ij / P_jj`` for i != j. X has a row for each user. An item that training
    never saw has a column of zeros there, and so a row and a column of zeros in B.

    Args:
      values: float32 ``[N]``, one for each interaction: the entries of X.
      reg: ridge, above 0.

    Returns:
      float32 ``[rows, rows]``; row i is what item i adds to each score.

    Raises:
      MetarecError: ``reg`` is not above 0.

    Source: Steck, "Embarrassingly Shallow Autoencoders for Sparse Data", 2019.
    """
    if not reg > 0:
        raise MetarecError(f"item_weights: reg must be above 0, got {reg}; give a larger ridge")
    items, item = np.unique(train.item, return_inverse=True)
    shape = (train.users.num_rows, len(items))
    x = csr_matrix((values, (train.user, item)), shape=shape, dtype=np.float32)
    gram = (x.T @ x).toarray(order="C")
    gram[np.diag_indices_from(gram)] += np.float32(reg)
    factor, bad = lapack.spotrf(gram.T, lower=False, overwrite_a=True)  # by columns, so in place
    if bad:
        raise MetarecError(f"item_weights: the matrix is numerically singular with reg {reg}; give a larger reg")
    root = lapack.strtri(factor, lower=False, overwrite_c=True)[0]  # P = root root': spotri waits if cores are busy
    out = np.zeros((train.items.num_rows, train.items.num_rows), np.float32)
    for first in range(0, len(items), _BLOCK):
        end = first + _BLOCK
        block = root[:end, first:] @ root[first:end, first:].T
        out[items[:end, None], items[first:end]] = block
        out[items[first:end, None], items[:end]] = block.T
    scale = np.zeros(len(out), np.float32)
    scale[items] = -1 / out[items, items]
    out *= scale
    np.fill_diagonal(out, 0.0)
    return out


def item_vectors(train: Feedback, values: np.ndarray, reg: float) -> np.ndarray:
    """`item_weights` as vectors, for fewer users than items: ``B_ij = <V_i, V_j> / (1 - |V_j|^2)`` for i != j.

    By the Woodbury identity ``reg P = I - X^T (X X^T + reg I)^-1 X = I - V V^T``: a matrix of users is solved in place
    of one of items.

    Args:
      values, reg: as in `item_weights`.

    Returns:
      V, float32 ``[rows, users in train]``.

    Raises:
      MetarecError: ``reg`` is not above 0.
    """
    if not reg > 0:
        raise MetarecError(f"item_vectors: reg must be above 0, got {reg}; give a larger ridge")
    users, user = np.unique(train.user, return_inverse=True)
    x = csr_matrix((values, (user, train.item)), shape=(len(users), train.items.num_rows), dtype=np.float32)
    gram = (x @ x.T).toarray(order="F")
    gram[np.diag_indices_from(gram)] += np.float32(reg)
    factor, bad = lapack.spotrf(gram, lower=True, overwrite_a=True)
    if bad:
        raise MetarecError(f"item_vectors: the matrix is numerically singular with reg {reg}; give a larger reg")
    return solve_triangular(factor, x.toarray(order="F"), lower=True, overwrite_b=True, check_finite=False).T


def support_map(
    train: Feedback, *, support: int, reg: float, size: int, iterations: int = 8, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best linear map of rank ``size`` from a random support of a user's items to the rest of them.

    ``argmin_{b, M} E sum_u |q_u - b - s_u M|^2 + reg |M|^2``, where s_u is the 0-1 row of ``support`` of the user's m
    items, drawn uniformly, and q_u that of the others. With p = support / m, the expectations are sums over users:
    for two items of the user, ``E s's`` has p on the diagonal and p (support - 1) / (m - 1) off it, and ``E s'q`` has
    0 on the diagonal and p (m - support) / (m - 1) off it. ``M = (cov(s, s) + reg I)^-1 cov(s, q)``, projected on the
    directions of q in which it explains most: the best of that rank (reduced-rank regression).

    Args:
      train: interactions; a rating, if any, is ignored. Users with at most ``support`` items are left out.
      support: size of the supports, 1 or more.
      reg: ridge, in users, above 0.
      size: rank, below the number of item rows.
      iterations: number of subspace iterations, which find those directions.
      seed: seed of the start of these iterations.

    Returns:
      bias float32 ``[rows]``, inward and outward ``[rows, size]``: M = inward outward'. 0 for items without data.

    Raises:
      MetarecError: a number is out of bounds, or no user has more than ``support`` items.

    Source: Izenman, "Reduced-rank regression for the multivariate linear model", 1975.
    """
    rows = train.items.num_rows
    if support < 1 or not reg > 0 or not 1 <= size < rows:
        raise MetarecError(
            f"support_map: support must be 1 or more, reg above 0 and size between 1 and {rows - 1}, got {support}, "
            f"{reg} and {size}; correct it"
        )
    ones = np.ones(len(train.user), np.float32)
    x = csr_matrix((ones, (train.user, train.item)), shape=(train.users.num_rows, rows), dtype=np.float32)
    x.data[:] = 1.0  # an item that a user had twice counts once
    m = np.asarray(x.sum(1), np.float64).ravel()
    if not (m > support).any():
        raise MetarecError(
            f"support_map: no user has more than {support} items, the most is {m.max():.0f}; give a smaller support"
        )
    x, m = x[m > support], m[m > support]
    p, users = support / m, len(m)

    def gram(weight: np.ndarray, diagonal: np.ndarray) -> np.ndarray:
        weighted = x.multiply(weight[:, None].astype(np.float32)).tocsr()
        out = np.asarray((x.T @ weighted).toarray(), np.float32)
        np.fill_diagonal(out, diagonal)
        return out

    s_mean, q_mean = x.T @ p / users, x.T @ (1 - p) / users
    seen = x.T @ p
    left = gram(p * (support - 1) / (m - 1), seen + reg) - np.float32(users) * np.outer(s_mean, s_mean).astype(
        np.float32
    )
    right = gram(p * (m - support) / (m - 1), np.zeros(rows)) - np.float32(users) * np.outer(s_mean, q_mean).astype(
        np.float32
    )
    factor = cho_factor(left, overwrite_a=True)
    directions = np.random.default_rng(seed).normal(size=(rows, min(rows, size + 16))).astype(np.float32)
    for _ in range(iterations):  # of right' left^-1 right, by products with a few columns
        directions = np.linalg.qr(right.T @ cho_solve(factor, right @ directions))[0]
    explained = cho_solve(factor, right @ directions)
    _, turn = np.linalg.eigh((right @ directions).T @ explained)
    best = turn[:, ::-1][:, :size]
    inward, outward = explained @ best, directions @ best
    return (q_mean - (s_mean @ inward) @ outward.T).astype(np.float32), inward, outward


def neighbours(train: Feedback, values: np.ndarray, shrinkage: float, top: int) -> tuple[np.ndarray, np.ndarray]:
    """The ``top`` most similar items per item: int32 rows and their `similarities`, ``[rows, top]``, padded with 0."""
    ids = np.zeros((train.items.num_rows, top), np.int32)
    similar = np.zeros((train.items.num_rows, top), np.float32)
    for first, block in _similar_blocks(train, values, shrinkage):
        for k in np.flatnonzero(np.diff(block.indptr)):
            entries = slice(block.indptr[k], block.indptr[k + 1])
            best = np.argsort(-block.data[entries], kind="stable")[:top]
            ids[first + k, : len(best)] = block.indices[entries][best]
            similar[first + k, : len(best)] = block.data[entries][best]
    return ids, similar


def _similar_blocks(train: Feedback, values: np.ndarray, shrinkage: float) -> Iterator[tuple[int, csr_matrix]]:
    """Rows ``first ..`` of the similarity matrix, a few at a time, with positive entries only."""
    rows = train.items.num_rows
    by_user = csr_matrix((values, (train.user, train.item)), shape=(train.users.num_rows, rows), dtype=np.float32)
    by_item = by_user.T.tocsr()
    norm = np.sqrt(np.asarray(by_item.multiply(by_item).sum(1), np.float32).ravel())
    step = max(1, (1 << 24) // rows)
    for first in range(0, rows, step):
        block = (by_item[first : first + step] @ by_user).tocsr()
        at = np.repeat(np.arange(block.shape[0]) + first, np.diff(block.indptr))
        block.data /= np.maximum(norm[at] * norm[block.indices] + np.float32(shrinkage), 1e-12)
        block.data[(at == block.indices) | (block.data < 0)] = 0
        block.eliminate_zeros()
        yield first, block


def gaussian_factors(
    train: Feedback,
    *,
    size: int = 16,
    reg: float = 20.0,
    reg_item: float = 3.0,
    reg_noise: float = 50.0,
    iterations: int = 6,
    seed: int = 0,
) -> GaussianPrior:
    """Fit `GaussianPrior` to the ratings of all users by EM: probabilistic PCA with missing values.

    Each iteration increases, up to rounding, the log likelihood (users integrated out) plus the log prior of the items,
    -1/2 sum_i [(reg |V_i|^2 + reg_item m_i^2 + reg_noise s) / s_i + reg_noise log(s_i / s)], with V the loadings, m the
    item means and s_i the noise; s, the noise of a typical item, is fitted too. It costs the number of ratings times
    size^2, and stores size^2 / 2 numbers per item; users are processed in chunks.

    Args:
      train: explicit ratings, in vocabulary rows.
      size: length of z.
      reg, reg_item: ridge of an item's loadings and of its mean, in units of one rating.
      reg_noise: number of ratings of typical noise that are added to each item; infinite: one noise for all items.
      iterations: number of EM iterations.
      seed: seed of the subspace iteration from which the loadings start.

    Raises:
      MetarecError: the data has no ratings.

    Sources: Tipping and Bishop, "Mixtures of Probabilistic Principal Component Analysers", 1999; Lim and Teh,
    "Variational Bayesian Approach to Movie Rating Prediction", 2007.
    """
    mu, item_mean, user_mean = bias_terms(train, reg_item=reg_item)
    assert train.rating is not None  # bias_terms
    rows, value = train.items.num_rows, train.rating - np.float32(mu)
    count = np.bincount(train.item, minlength=rows)
    squares = np.bincount(train.item, value.astype(np.float64) ** 2, minlength=rows)
    residual = value - item_mean[train.item] - user_mean[train.user]
    floor = max(1e-4 * float(value.var()), 1e-8)  # of a variance: equal ratings have none
    typical = max(float(residual.var()), floor)
    offset_variance = max(float(user_mean[np.unique(train.user)].var()), floor)
    noise, loadings = np.full(rows, typical, np.float32), _first_loadings(train, residual, size, seed)
    loadings *= np.float32(np.sqrt(typical / 4 / max(float((loadings[train.item] ** 2).sum(1).mean()), 1e-12)))
    chunks = _chunks(train, value, size + 2)
    diagonal = np.array([reg] * size + [reg_item], np.float32)
    upper = np.triu_indices(size + 2)
    for _ in range(iterations):
        second = np.zeros((rows, len(upper[0])), np.float32)
        first = np.zeros((rows, size + 2), np.float32)
        offset = 0.0
        for chunk in chunks:
            moments = _moments(chunk, item_mean, loadings, noise, offset_variance)
            _add_products(second, chunk.ones, moments)
            first += chunk.values @ moments[:, upper[1] == size + 1]
            offset += float(moments[:, (upper[0] == size) & (upper[1] == size)].sum(dtype=np.float64))
        errors = squares - _fit_items(item_mean, loadings, first, second, count, diagonal)
        if np.isinf(reg_noise):
            typical = max(errors.sum() / len(value), floor)
            noise[:] = typical
        else:
            share = np.where(count > 0, (errors + reg_noise * typical) / np.maximum(count + reg_noise, 1e-12), typical)
            noise[:] = np.maximum(share, floor)
            typical = 1 / float((1 / noise[count > 0]).mean(dtype=np.float64))
            noise[count == 0] = typical
        offset_variance = max(offset / sum(chunk.ones.shape[1] for chunk in chunks), floor)
    return GaussianPrior(mu, item_mean, loadings, noise, offset_variance)


def _fit_items(
    item_mean: np.ndarray,
    loadings: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    count: np.ndarray,
    diagonal: np.ndarray,
) -> np.ndarray:
    """Solve for the loadings and the mean of every item, in place, given moments of w = [z, b, 1] of its users.

    Args:
      first: ``[rows, size + 2]``, sums of rating times w; second: sums of w w', the upper triangle.
      count: number of ratings; items without one get 0.
      diagonal: ridge of the loadings and of the mean.

    Returns:
      float64 ``[rows]``: what is explained of the sum of squares, less the penalty.
    """
    rows, size = loadings.shape
    upper, fitted = np.triu_indices(size + 2), np.append(np.arange(size), size + 1)  # b has coefficient 1
    explained, step = np.zeros(rows), max(1, _NUMBERS // (size + 2) ** 2)

    def solve(begin: int) -> None:
        some = slice(begin, begin + step)
        both = np.empty((len(second[some]), size + 2, size + 2), np.float32)
        both[:, upper[0], upper[1]] = both[:, upper[1], upper[0]] = second[some]
        left = both[:, fitted[:, None], fitted] + np.diag(diagonal)
        left[count[some] == 0] = np.eye(size + 1)
        right = first[some][:, fitted] - both[:, fitted, size]
        solved = np.where(count[some, None] > 0, np.linalg.solve(left, right[..., None])[..., 0], 0)
        loadings[some], item_mean[some] = solved[:, :-1], solved[:, -1]
        weights = np.insert(solved, size, 1.0, axis=1).astype(np.float64)
        gained = 2 * first[some] - (both @ weights[..., None])[..., 0]
        explained[some] = (weights * gained).sum(1) - solved.astype(np.float64) ** 2 @ diagonal

    _in_threads(solve, range(0, rows, step))
    return explained


class _Chunk(NamedTuple):
    """Some users: their groups, whose rows count from 0, and the matrices items x users of ones and of ratings."""

    groups: Sequence[Group]
    ones: csr_matrix
    values: csr_matrix


def _chunks(train: Feedback, value: np.ndarray, size: int) -> list[_Chunk]:
    """All users in chunks, whose second moments of vectors of ``size`` numbers fit in memory."""
    most = max(1, _NUMBERS // size**2)
    groups = grouped(train.user, train.item, value, train.items.num_rows, most=most)
    number = np.cumsum([len(group.rows) for group in groups]) // (8 * most)
    chunks = []
    for of_chunk in np.unique(number):
        some = [group for group, own in zip(groups, number, strict=True) if own == of_chunk]
        users = np.concatenate([group.rows for group in some])
        place = np.full(train.users.num_rows, -1)
        place[users] = np.arange(len(users))
        mine = np.flatnonzero(place[train.user] >= 0)
        at, shape = (train.item[mine], place[train.user[mine]]), (train.items.num_rows, len(users))
        ones = csr_matrix((np.ones(len(mine), np.float32), at), shape=shape)
        values = csr_matrix((value[mine], at), shape=shape)
        chunks.append(_Chunk([group._replace(rows=place[group.rows]) for group in some], ones, values))
    return chunks


def _moments(
    chunk: _Chunk, item_mean: np.ndarray, loadings: np.ndarray, noise: np.ndarray, offset_variance: float
) -> np.ndarray:
    """Posterior second moments of [z, b, 1] of each user, the upper triangle: float32 ``[users, ...]``."""
    size = loadings.shape[1]
    scale = np.append(1 / np.sqrt(noise), 0).astype(np.float32)
    features = np.zeros((len(noise) + 1, size + 1), np.float32)
    features[:-1, :size], features[:-1, size] = loadings, 1.0
    features *= scale[:, None]
    mean = np.append(item_mean, np.float32(0))
    precision = np.diag([1.0] * size + [1 / offset_variance]).astype(np.float32)
    upper = np.triu_indices(size + 2)
    out = np.empty((chunk.ones.shape[1], len(upper[0])), np.float32)

    def solve(group: Group) -> None:
        residual = (group.value - mean.take(group.other)) * scale.take(group.other)
        left, right = _products(features.take(group.other, axis=0), residual)
        covariance = np.linalg.inv(left + precision)
        expected = np.concatenate([(covariance @ right)[..., 0], np.ones((len(right), 1), np.float32)], axis=1)
        moments = expected[:, :, None] * expected[:, None]
        moments[:, :-1, :-1] += covariance
        out[group.rows] = moments[:, upper[0], upper[1]]

    _in_threads(solve, chunk.groups)
    return out


def _add_products(out: np.ndarray, matrix: csr_matrix, table: np.ndarray) -> None:
    """``out += matrix @ table``, a few columns at a time, which stay in the cache."""

    def add(begin: int) -> None:
        out[:, begin : begin + 64] += matrix @ np.ascontiguousarray(table[:, begin : begin + 64])

    _in_threads(add, range(0, table.shape[1], 64))


def _first_loadings(train: Feedback, residual: np.ndarray, size: int, seed: int) -> np.ndarray:
    """The leading directions of the residuals by item, with 0 for missing ones, by subspace iteration; any scale."""
    shape = (train.items.num_rows, train.users.num_rows)
    matrix = csr_matrix((residual, (train.item, train.user)), shape=shape)
    columns = min(size, *shape)
    users = np.random.default_rng(seed).normal(size=(shape[1], columns)).astype(np.float32)
    for _ in range(3):
        users = np.linalg.qr(matrix.T @ np.linalg.qr(matrix @ users)[0])[0]
    ratings = np.bincount(train.item, minlength=shape[0])[:, None] + np.float32(len(residual) / shape[0])
    out = np.zeros((shape[0], size), np.float32)
    out[:, :columns] = (matrix @ users) / ratings
    return out
