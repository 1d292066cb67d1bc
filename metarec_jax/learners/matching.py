"""Matching networks: a score is the attention-weighted mean of what similar support items showed.

Source: Vinyals et al., "Matching Networks for One Shot Learning", 2016; ``similarity="relation"``: Sung et al.,
"Learning to Compare: Relation Network for Few-Shot Learning", 2018. Left out are Vinyals' full context embeddings
(LSTMs that read the support in an order): an item's vector does not depend on the rest of the support here;
`in_context` has vectors that do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from metarec_jax import losses
from metarec_jax.core import Array, Examples, Inputs, Learner, MetarecError, Model, Params
from metarec_jax.learners import _support as shows
from metarec_jax.models.networks import attend, relation
from metarec_jax.options import POSITIVE, Bounds, bounded

_SHORT = 1e-4
"""Added to a squared length: an item of which nothing is known has the vector 0, and no direction."""


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
    """Meta-train item vectors whose similarity tells how far one rating speaks for another item.

    ``score = apply + gain sum_i w_i s_i e_i / (prior + sum_i w_i s_i)`` with the support's residuals
    ``e_i = target_i - expected(apply_i)`` and ``s_i = exp(temperature similarity(v, v_i))``; with "relation" ``s_i`` is
    ``exp(g(v, v_i))`` of a small network g (Sung's ends in a sigmoid; that learned far slower here). ``prior`` examples
    say that the model's own score is right, so that an empty support predicts exactly it. At temperature 0 it is the
    (shrunken) mean residual, at infinity the nearest neighbour's; an item like none of the support keeps the model's
    own score. Temperature, prior, gain and g are learned.

    Args:
      model: with ``features``, such as `content_model`.
      similarity: "cosine" ``<v, v_i> / |v| |v_i|``, "dot" ``<v, v_i>``, "euclidean" ``-|v - v_i|^2``, or "relation".
      temperature, prior: where they start (not used, for the first, by "relation").
      hidden: units of the network of "relation".
      loss: of the query, ``loss(scores [n], target [n], where=[n]) -> scalar``.
      expected: the target that a score expects, ``jax.nn.sigmoid`` for clicks (the score is then a logit).

    Returns:
      A learner whose ``adapted`` is the support's `Evidence`: vectors ``[S, D]``, residuals and weights ``[S]``.

    Raises:
      MetarecError: the model has no ``features``, the similarity is not known, or a number is not above 0.

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
    known = ("cosine", "dot", "euclidean", "relation")
    if similarity not in known:
        raise MetarecError(f"matching: similarity {similarity!r} is not known; use one of {', '.join(known)}")
    if hidden < 1:
        raise MetarecError(f"matching: hidden is {hidden}; give 1 or more")
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
