"""Matching networks: a score is the attention-weighted mean of the residuals of similar support items.

Source: Vinyals et al., "Matching Networks for One Shot Learning", 2016; ``similarity="relation"``: Sung et al.,
"Learning to Compare: Relation Network for Few-Shot Learning", 2018. Vinyals' full context embeddings (LSTMs that read
the support in an order) are left out: here an item's vector does not depend on the rest of the support; in `in_context`
it does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from metarec_jax import losses
from metarec_jax.core import Array, Examples, Inputs, Learner, Model, Params
from metarec_jax.learners import _support as shows
from metarec_jax.models.networks import attend, relation
from metarec_jax.options import POSITIVE, Bounds, bounded

_SHORT = 1e-4
"""Added to a squared length: an item without known features has the vector 0, and no direction."""


@bounded
def matching(
    model: Model,
    *,
    similarity: Literal["cosine", "dot", "euclidean", "relation"] = "cosine",
    temperature: Annotated[float, POSITIVE] = 4.0,
    prior: Annotated[float, POSITIVE] = 3.0,
    hidden: Annotated[int, Bounds(1)] = 32,
    loss: Callable[..., Array] = losses.mse,
    expected: shows.Expected = shows.itself,
) -> Learner:
    """Meta-train item vectors whose similarity weights the residual of one item in the score of another.

    ``score = apply + gain sum_i w_i s_i e_i / (prior + sum_i w_i s_i)`` with the support's residuals
    ``e_i = target_i - expected(apply_i)`` and ``s_i = exp(temperature similarity(v, v_i))``; with "relation" ``s_i`` is
    ``exp(g(v, v_i))`` of a small network g (Sung's ends in a sigmoid, which learned far more slowly here). The model's
    own score has the weight of ``prior`` examples, so an empty support predicts that score. At temperature 0 the change
    is the (shrunken) mean residual, at infinity that of the nearest neighbour; an item unlike all of the support keeps
    the model's own score. Temperature, prior, gain and g are learned.

    Args:
      model: a model with ``features``, such as `content_model`.
      similarity: similarity of two item vectors: "cosine" ``<v, v_i> / |v| |v_i|``, "dot" ``<v, v_i>``, "euclidean"
        ``-|v - v_i|^2``, or "relation", a small network.
      temperature: initial factor on the similarity; not used by "relation".
      prior: initial weight of the model's own score, in examples.
      hidden: units of the network of "relation".
      loss: loss of the query, ``loss(scores [n], target [n], where=[n]) -> scalar``.
      expected: target that a score predicts; ``jax.nn.sigmoid`` for clicks, where the score is a logit.

    Returns:
      A learner whose ``adapted`` is the support's `Evidence`: vectors ``[S, D]``, residuals and weights ``[S]``.

    Raises:
      MetarecError: the model has no ``features``, the similarity is not one of the four, or a number is not above 0.

    Items are numbers, the model's own score is 0; temperature 0 and a prior of one example: ``(4 + 2) / (1 + 2)``.

    >>> numbers = lambda params, inputs: inputs["x"]
    >>> model = Model(lambda key: {"tables": {}}, lambda params, inputs: 0.0 * inputs["x"][:, 0], {}, numbers, 1)
    >>> learner = matching(model, similarity="dot", temperature=1e-6, prior=1.0)
    >>> support = Examples({"x": jnp.array([[5.0], [7.0]])}, jnp.array([4.0, 2.0]), jnp.ones(2))
    >>> params = learner.init(jax.random.key(0))
    >>> adapted = learner.adapt(params, support, jax.random.key(0))
    >>> round(float(learner.predict(params, adapted, {"x": jnp.array([[6.0]])})[0]), 3)
    2.0
    """
    vectors = shows.features_of(model, "matching")
    if similarity == "relation":
        model = shows.scaled(model, "matching")
        vectors = shows.features_of(model, "matching")
    compare = relation(model.num_features, hidden)

    def init(key: Array) -> Params:
        k_model, k_net = jax.random.split(key)
        own: dict[str, Any] = {
            "log_prior": jnp.asarray(np.log(prior), jnp.float32),
            "gain": jnp.ones((), jnp.float32),
            "log_unknown_trust": jnp.zeros((), jnp.float32),
        }
        if similarity == "relation":
            own |= {"net": compare.init(k_net), "log_scale": jnp.asarray(shows.LOG_SCALE, jnp.float32)}
        else:
            own["log_temperature"] = jnp.asarray(np.log(temperature), jnp.float32)
        return {**model.init(k_model), "matching": own}

    def logits(own: Any, query: Array, support: Array) -> Array:
        """``log s`` ``[q, n]``."""
        if similarity == "relation":
            return compare.apply(own["net"], query, support)
        if similarity == "cosine":
            query, support = (v / jnp.sqrt(jnp.sum(v * v, 1, keepdims=True) + _SHORT) for v in (query, support))
        alike = query @ support.T
        if similarity == "euclidean":
            alike = 2.0 * alike - jnp.sum(query * query, 1)[:, None] - jnp.sum(support * support, 1)[None]
        return jnp.exp(own["log_temperature"]) * alike

    def adapt(params: Params, support: Examples, key: Array) -> shows.Evidence:
        return shows.evidence(model, params, support, params["matching"]["log_unknown_trust"], expected)

    def predict(params: Params, adapted: shows.Evidence, inputs: Inputs) -> Array:
        own = params["matching"]
        alike = logits(own, vectors(params, inputs), adapted.vectors)
        change = attend(alike, adapted.weight, adapted.residual[:, None], own["log_prior"])[:, 0]
        return model.apply(params, inputs) + own["gain"] * change

    return shows.learner(init, adapt, predict, loss, model)
