"""Means with honest intervals: standard errors and bootstraps that draw users, not rows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_WEIGHTS_AT_ONCE = 1 << 23


class Estimates(NamedTuple):
    """One entry a column: mean, standard error, and the ends of the 95% percentile interval."""

    mean: np.ndarray
    se: np.ndarray
    low: np.ndarray
    high: np.ndarray


def estimate(
    values: np.ndarray, users: np.ndarray, weight: np.ndarray | None = None, resamples: int = 1000
) -> Estimates:
    """Mean, standard error and 95% bootstrap interval of each column; nan is left out, and constant is certain.

    The rows of one user are one cluster c, with sum S_c and weight N_c, N = sum N_c:
    ``mean = sum S_c / N``, ``se = sqrt(C / (C - 1) sum_c (S_c - mean N_c)^2) / N``. With one row a user, that is
    ``sd / sqrt(n)``. The bootstrap draws C users, with a fixed seed: two calls on the same users draw the same ones.

    Args:
      values: ``[n, m]``; users: ``[n]``; weight: ``[n, m]``, 1 by default.
      resamples: of the bootstrap; 0 gives the mean as both ends.

    >>> e = estimate(np.array([[1.0], [2.0], [3.0], [np.nan]]), np.arange(4))
    >>> float(e.mean[0]), round(float(e.se[0]), 4)  # sd 1, n 3: 1 / sqrt(3)
    (2.0, 0.5774)
    """
    known = np.isfinite(values)
    _, cluster = np.unique(users, return_inverse=True)
    total = _by_cluster(np.where(known, values if weight is None else values * weight, 0.0), cluster)
    size = _by_cluster(known * (1.0 if weight is None else weight), cluster)
    c = len(total)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = total.sum(0) / size.sum(0)
        clusters = (size > 0).sum(0)
        se = np.sqrt(clusters / (clusters - 1) * np.square(total - mean * size).sum(0)) / size.sum(0)
        rng = np.random.default_rng(0)
        drawn_means = [mean[None]]
        step = max(1, _WEIGHTS_AT_ONCE // c)
        for start in range(0, resamples, step):
            b = min(step, resamples - start)
            drawn = rng.integers(0, c, (b, c)) + np.arange(b)[:, None] * c
            times = np.bincount(drawn.ravel(), minlength=b * c).reshape(b, c).astype(np.float64)
            drawn_means.append((times @ total) / (times @ size))
    means = np.concatenate(drawn_means[1:] or drawn_means)
    means = np.where(np.isfinite(means), means, mean)  # a resample without any answer
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return Estimates(mean, se, low, high)


def p_values(gap: np.ndarray, users: np.ndarray, mean: float, se: float) -> tuple[float, float]:
    """Two-sided p of "no difference": a t-test with the clustered standard error, and Wilcoxon's signed ranks of users.

    Args:
      gap: ``[n]`` differences, finite; users: ``[n]``; mean, se: of ``gap``, from `estimate`.

    Returns:
      (t, Wilcoxon): 1 where every difference is 0; nan for t with one user.
    """
    if not gap.any():
        return 1.0, 1.0
    _, cluster = np.unique(users, return_inverse=True)
    by_user = np.bincount(cluster, gap) / np.bincount(cluster)
    if len(by_user) < 2:
        return float("nan"), 1.0
    t = abs(mean) / se if se > 0 else np.inf
    from scipy import stats  # half a second, for these two lines

    wilcoxon = float(stats.wilcoxon(by_user).pvalue) if by_user.any() else 1.0
    return float(2 * stats.t.sf(t, len(by_user) - 1)), wilcoxon


def _by_cluster(values: np.ndarray, cluster: np.ndarray) -> np.ndarray:
    order = np.argsort(cluster, kind="stable")
    return np.add.reduceat(values[order], np.flatnonzero(np.diff(cluster[order], prepend=-1)), axis=0)
