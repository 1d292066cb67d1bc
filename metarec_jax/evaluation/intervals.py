"""Means with clustered intervals: standard errors and t-intervals that treat users, not rows, as the sample."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

FEWEST_USERS = 10
"""Minimum number of users for a verdict; the coverage of the interval with this many is tested."""


class Estimates(NamedTuple):
    """One entry per column: mean, standard error, bounds of the 95% interval, p-value of "the mean is 0", users."""

    mean: np.ndarray
    se: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p_value: np.ndarray
    users: np.ndarray


def estimate(values: np.ndarray, users: np.ndarray, weight: np.ndarray | None = None) -> Estimates:
    """Mean, standard error, 95% interval and p-value of each column; nan entries are excluded.

    The rows of one user are one cluster c, with sum S_c and weight N_c, N = sum N_c over C users with an entry:
    ``mean = sum S_c / N``, ``se = sqrt(C / (C - 1) sum_c (S_c - mean N_c)^2) / N``. With one row per user, that is
    ``sd / sqrt(n)``. Interval and p-value come from one t-test with C - 1 degrees of freedom, so that they agree:
    p < 0.05 exactly where the interval excludes 0. Bootstrap percentiles are too narrow for few users.

    A column with inf has an infinite mean, which is also both bounds, and no standard error.

    Args:
      values: ``[n, m]``; users: ``[n]``; weight: ``[n, m]``, 1 by default.

    Returns:
      `Estimates`; nan for se, low, high and p with fewer than two users; all nan for a column without entries.

    >>> e = estimate(np.array([[1.0], [2.0], [3.0], [np.nan]]), np.arange(4))
    >>> float(e.mean[0]), round(float(e.se[0]), 4)  # sd 1, n 3: 1 / sqrt(3)
    (2.0, 0.5774)
    >>> round(float(e.low[0]), 3), round(float(e.p_value[0]), 3)  # t with 2 degrees of freedom: 4.303, and 2 / 0.577
    (-0.484, 0.074)
    """
    from scipy import special  # a tenth of a second

    answered = ~np.isnan(values)
    _, cluster = np.unique(users, return_inverse=True)
    total = _by_cluster(np.where(answered, values if weight is None else values * weight, 0.0), cluster)
    size = _by_cluster(answered * (1.0 if weight is None else weight), cluster)
    count = (size > 0).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = total.sum(0) / size.sum(0)
        se = np.sqrt(count / (count - 1) * np.square(total - mean * size).sum(0)) / size.sum(0)
        se = np.where(count > 1, se, np.nan)
        half = special.stdtrit(np.maximum(count - 1, 1), 0.975) * se
        t = np.where(mean == 0, 0.0, np.abs(mean) / se)
        p_value = np.where(np.isnan(se), np.nan, 2 * special.stdtr(np.maximum(count - 1, 1), -t))
        low, high = mean - half, mean + half
    beyond = np.isinf(mean) & (count > 1)
    low, high, p_value = np.where(beyond, mean, low), np.where(beyond, mean, high), np.where(beyond, 0.0, p_value)
    return Estimates(mean, se, low, high, p_value, count)


def _by_cluster(values: np.ndarray, cluster: np.ndarray) -> np.ndarray:
    order = np.argsort(cluster, kind="stable")
    return np.add.reduceat(values[order], np.flatnonzero(np.diff(cluster[order], prepend=-1)), axis=0)
