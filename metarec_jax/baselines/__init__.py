"""Baselines, tuned as carefully as the learners: closed forms, models trained by gradient descent, and their tuning."""

from metarec_jax.baselines.closed_form import (
    BASELINES,
    als,
    bias,
    ease,
    gaussian_prior,
    item_knn,
    item_mean,
    popularity,
    random,
    user_mean,
)

__all__ = [
    "BASELINES",
    "als",
    "bias",
    "ease",
    "gaussian_prior",
    "item_knn",
    "item_mean",
    "popularity",
    "random",
    "user_mean",
]
