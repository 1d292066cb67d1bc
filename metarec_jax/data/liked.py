"""The rating from which an item counts as liked."""

from __future__ import annotations

import numpy as np

from metarec_jax.core import MetarecError
from metarec_jax.data.interactions import Interactions


def relevant_from(data: Interactions, liked_from: float | None = None) -> float:
    """The lowest rating that counts as relevant: three quarters of the scale (4 of 1..5); 1 for clicks.

    If fewer than 5% or more than 95% of the ratings reach that (counts, hours, a scale used at one end): the rating,
    other than the lowest, for which the fraction of ratings at or above it is nearest to a quarter.

    Args:
      liked_from: the threshold that the user chose instead.

    Raises:
      MetarecError: ``liked_from`` is used with clicks, or makes all ratings or none relevant.
    """
    if data.rating is None:
        if liked_from is not None:
            raise MetarecError(
                "--liked-from is a threshold of ratings, and the data are clicks, which are all relevant; omit it"
            )
        return 1.0
    values, counts = np.unique(data.rating, return_counts=True)
    low, high = float(values[0]), float(values[-1])
    if liked_from is not None:
        if not low < liked_from <= high:
            raise MetarecError(
                f"--liked-from must be above {low:g} and at most {high:g}, got {liked_from:g}; correct it"
            )
        return liked_from
    point = low + 0.75 * (high - low)
    reaching = counts[::-1].cumsum()[::-1] / counts.sum()  # share of ratings at or above each value
    if low == high or 0.05 <= float(reaching[np.searchsorted(values, point)]) <= 0.95:
        return point
    return float(values[1:][np.argmin(np.abs(reaching[1:] - 0.25))])
