"""Baselines, tuned as carefully as the learners: closed forms, models trained by gradient descent, and their tuning."""

from metarec_jax.baselines.closed_form import (
    BASELINES,
    LISTS,
    als,
    bias,
    ease,
    gaussian_prior,
    item_knn,
    item_mean,
    of_liked,
    popularity,
    random,
    user_mean,
)

__all__ = [
    "BASELINES",
    "LISTS",
    "als",
    "bias",
    "ease",
    "gaussian_prior",
    "item_knn",
    "item_mean",
    "of_liked",
    "popularity",
    "random",
    "user_mean",
]
