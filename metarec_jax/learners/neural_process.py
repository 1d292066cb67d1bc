"""Neural processes: a decoder predicts from the encoding of a set of ratings, a vector or a distribution of vectors.

Sources: Garnelo et al., "Conditional Neural Processes", 2018; "Neural Processes", 2018 (``latent=True``); Lin et al.,
"Task-Adaptive Neural Process for User Cold-Start Recommendation" (TaNP), 2021 (``clusters``). TaNP's loss that sharpens
the clusters is left out: its target is a sum over a whole batch of users, and a meta-objective is that of one task.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from metarec_jax import losses
from metarec_jax.core import Array, Examples, Inputs, Learner, Model, Params, Task
from metarec_jax.learners import _support as shows
from metarec_jax.models.networks import decoder, encoder
from metarec_jax.options import POSITIVE, Bounds, bounded


@bounded
def neural_process(
    model: Model,
    *,
    latent: bool = False,
    clusters: Annotated[int, Bounds(0)] = 0,
    size: Annotated[int, Bounds(1)] = 16,
    width: Annotated[int, Bounds(1)] = 64,
    hidden: Annotated[tuple[int, ...], Bounds(1)] = (64,),
    prior: Annotated[float, POSITIVE] = 3.0,
    kl_weight: Annotated[float, Bounds(0.0)] = 1.0,
    prior_weight: Annotated[float, Bounds(0.0)] = 0.5,
    loss: Callable[..., Array] | None = None,
    expected: shows.Expected = shows.itself,
) -> Learner:
    """Meta-train an encoder of sets and a decoder: ``score = apply + g(v, z) - g(v, z_0)``.

    z is the output of `networks.encoder` on ``[v, e, e v]`` of each support example, with residuals
    ``e = target - expected(apply)``, and z_0 that of an empty support, which therefore predicts ``apply``.

    The objective is the mean of ``-log N(target; score, d^2)`` over the query, with a deviation d that is also an
    output of the decoder.

    - With ``latent``, z has a distribution q, and the objective is the bound on the likelihood (ELBO), divided by the
      number of query examples, with one draw z of ``q(.|support, query)``:
      ``-log p(query | z) + kl_weight KL(q(.|support, query) || q(.|support))``. `adapt` takes the mean of
      ``q(.|support)``.
    - With ``clusters``, a second encoding t of the support reads a pool of that many learned tasks m_k,
      ``o = t + sum_k c_k m_k`` with c_k in proportion to ``1 / (1 + |t - m_k|^2)``, and o scales and shifts the
      decoder's units (FiLM).

    Args:
      model: a model with ``features``, such as `content_model`.
      latent: encode the support as a distribution of z instead of one z.
      clusters: number of learned tasks in TaNP's pool; 0 leaves the modulation out.
      size: length of the code z of a support, and of the task vector o.
      width: units of each layer of the encoders.
      hidden: units of each layer of the decoder.
      prior: initial prior strength of the encoders, in examples; learned.
      kl_weight: weight of the KL term.
      prior_weight: weight of the loss of the model's own score in the objective; that after adaptation has weight 1.
      loss: loss of the query, ``loss(scores [n], target [n], where=[n]) -> scalar``, in place of the Gaussian
        likelihood, such as `losses.bce` for clicks. ``query_loss`` reports it; without one, the mean squared error.
      expected: target that a score predicts; ``jax.nn.sigmoid`` for clicks, where the score is a logit.

    Returns:
      A learner whose ``adapted`` is ``{"z": [size], "task": [size or 0]}``.

    Raises:
      MetarecError: the model has no ``features``, or a number is out of bounds.
    """
    model = shows.scaled(model, "neural_process")
    vectors = shows.features_of(model, "neural_process")
    measure = losses.mse if loss is None else loss
    num_read = 2 * model.num_features + 1
    to_z = encoder(num_read, width, 2 * size if latent else size, prior)
    to_task = encoder(num_read, width, size, prior)
    decode = decoder(model.num_features, size, hidden, 2, film=size if clusters else 0)

    def init(key: Array) -> Params:
        k_model, k_z, k_task, k_pool, k_decoder = jax.random.split(key, 5)
        own = {
            "to_z": to_z.init(k_z),
            "decoder": decode.init(k_decoder),
            "log_scale": jnp.asarray(shows.LOG_SCALE, jnp.float32),
            "log_unknown_trust": jnp.zeros((), jnp.float32),
        }
        if clusters:
            pool = jax.random.normal(k_pool, (clusters, size)) / size**0.5
            own |= {"to_task": to_task.init(k_task), "pool": pool}
        return {**model.init(k_model), "neural_process": own}

    def encode(own: Any, shown: shows.Evidence) -> tuple[Array, Array]:
        """Mean and deviation of z; the deviation is 0 where z is not drawn."""
        z = to_z.apply(own["to_z"], shows.signed(shown), shown.weight)
        if not latent:
            return z, jnp.zeros_like(z)
        return z[:size], 0.1 + 0.9 * jax.nn.sigmoid(z[size:])

    def customize(own: Any, t: Array) -> Array:
        if not clusters:
            return t
        near = 1.0 / (1.0 + jnp.sum(jnp.square(t[None] - own["pool"]), axis=1))
        return t + (near / near.sum()) @ own["pool"]

    def adapted_to(own: Any, shown: shows.Evidence) -> dict[str, Array]:
        read = shows.signed(shown)
        t = to_task.apply(own["to_task"], read, shown.weight) if clusters else jnp.zeros(0, read.dtype)
        return {"z": encode(own, shown)[0], "task": customize(own, t)}

    def adapt(params: Params, support: Examples, key: Array) -> dict[str, Array]:
        own = params["neural_process"]
        return adapted_to(own, shows.evidence(model, params, support, own["log_unknown_trust"], expected))

    def score(params: Params, adapted: dict[str, Array], inputs: Inputs) -> tuple[Array, Array]:
        """Scores, and the deviations of their targets, ``[n]`` each."""
        own, v = params["neural_process"], vectors(params, inputs)
        after = decode.apply(own["decoder"], v, adapted["z"], adapted["task"])
        no_task = customize(own, jnp.zeros_like(adapted["task"]))
        before = decode.apply(own["decoder"], v, jnp.zeros_like(adapted["z"]), no_task)
        deviation = 0.1 + 0.9 * jax.nn.softplus(after[:, 1])
        return model.apply(params, inputs) + after[:, 0] - before[:, 0], deviation

    def predict(params: Params, adapted: dict[str, Array], inputs: Inputs) -> Array:
        return score(params, adapted, inputs)[0]

    def meta_loss(params: Params, task: Task, key: Array) -> tuple[Array, dict[str, Array]]:
        own, query = params["neural_process"], task.query
        trust = own["log_unknown_trust"]
        shown = shows.evidence(model, params, task.support, trust, expected)
        adapted = adapted_to(own, shown)
        reported = measure(predict(params, adapted, query.inputs), query.target, where=query.mask)
        metrics = {"query_loss": reported}
        kl = jnp.zeros(())
        if latent:
            asked = shows.evidence(model, params, query, trust, expected)
            both = shows.Evidence(*(jnp.concatenate(pair) for pair in zip(shown, asked, strict=True)))
            before, after = encode(own, shown), encode(own, both)
            kl = gaussian_kl(*after, *before)
            drawn = after[0] + after[1] * jax.random.normal(key, after[0].shape, after[0].dtype)
            adapted = {**adapted, "z": drawn}
            metrics["kl"] = kl
        scores, deviation = score(params, adapted, query.inputs)
        if loss is None:
            value = gaussian_nll(scores, deviation, query.target, query.mask)
        else:
            value = loss(scores, query.target, where=query.mask)
        prior = measure(model.apply(params, query.inputs), query.target, where=query.mask)
        return value + kl_weight * kl / jnp.maximum(query.mask.sum(), 1.0) + prior_weight * prior, metrics

    return Learner(init, adapt, predict, meta_loss, shows.unmoved(model.tables))


def gaussian_nll(mean: Array, deviation: Array, target: Array, where: Array) -> Array:
    """Mean over the examples of ``-log N(target; mean, deviation^2)``, less the constant ``log(2 pi) / 2``.

    >>> two, one = jnp.full(2, 2.0), jnp.array([1.0, 0.0])
    >>> round(float(gaussian_nll(jnp.zeros(2), two, two, one)), 4)  # (2 / 2)^2 / 2 + log 2
    1.1931
    """
    live = where > 0
    error = jnp.where(live, target, 0.0) - mean
    each = jnp.where(live, 0.5 * jnp.square(error / deviation) + jnp.log(deviation), 0.0)
    return jnp.sum(where * each) / jnp.where(live.any(), where.sum(), 1.0)


def gaussian_kl(mean: Array, deviation: Array, of_mean: Array, of_deviation: Array) -> Array:
    """``KL(N(mean, deviation^2) || N(of_mean, of_deviation^2))`` of independent components, summed over the last axis.

    ``log(s_2 / s_1) + (s_1^2 + (m_1 - m_2)^2) / (2 s_2^2) - 1/2``

    >>> gaussian_kl(jnp.array([1.0, 0.0]), jnp.ones(2), jnp.array([0.0, 0.0]), jnp.ones(2))  # 1 / 2
    Array(0.5, dtype=float32)
    """
    ratio = deviation / of_deviation
    distance = jnp.square((mean - of_mean) / of_deviation)
    return 0.5 * jnp.sum(jnp.square(ratio) + distance - 1.0 - 2.0 * jnp.log(ratio), axis=-1)
