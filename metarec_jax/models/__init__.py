"""Models: scoring functions whose tables the engine owns. The only package that imports flax."""

from metarec_jax.models.content import content_model, flax_model, meta_recommender, nnx_model
from metarec_jax.models.ctr import deepfm, factorization_machine, two_tower

__all__ = [
    "content_model",
    "deepfm",
    "factorization_machine",
    "flax_model",
    "meta_recommender",
    "nnx_model",
    "two_tower",
]
