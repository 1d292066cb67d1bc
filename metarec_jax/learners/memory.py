"""Memory: a user starts from the vectors of users with a similar profile, and continues by gradient steps.

Source: Dong et al., "MAMO: Memory-Augmented Meta-Optimization for Cold-start Recommendation", 2020.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from metarec_jax import losses
from metarec_jax.core import Array, Examples, Inputs, Learner, Model, Params
from metarec_jax.learners import _support as shows
from metarec_jax.learners._inner import PRIOR, loop
from metarec_jax.options import POSITIVE, Bounds, bounded

_SHORT = 1e-4
"""Added to squared lengths: the profile of an unknown user is 0, and equally similar to all slots."""
_LONGEST = 5.0
"""Largest norm of an inner gradient, as in MAMO: P and d are multiplied, and steps on both diverge without it."""


@bounded
def memory(
    model: Model,
    *,
    slots: Annotated[int, Bounds(1)] = 8,
    inner_lr: Annotated[float, POSITIVE] = 0.3,
    inner_steps: Annotated[int, Bounds(0)] = 5,
    prior: Annotated[float, Bounds(0.0)] = PRIOR,
    prior_weight: Annotated[float, Bounds(0.0)] = 0.5,
    loss: Callable[..., Array] = losses.mse,
) -> Learner:
    """Meta-train memories that give a user with a profile a start, and the rates of the gradient steps from there.

    ``score = apply + <d, [P v, 1]>`` for an item vector v. The attention of a profile p over the slots,
    ``a = softmax_k(sharpness cos(p, key_k))``, reads two memories:

    - the feature-specific one holds the user's vector and bias, ``d_0 = sum_k a_k user_k``,
    - the task-specific one holds the matrix that maps items for the user, ``P_0 = I + sum_k a_k preference_k``.

    Then come ``inner_steps`` gradient steps on the loss of the support, clipped to norm 5, with a learned rate for each
    number of d and one for P. The profile is the concatenation of the user's rows, over all columns that start with
    ``user_`` and have a table.

    Differences from MAMO: the memories and keys are meta-parameters with a gradient, where MAMO updates them by running
    averages after each user, which a pure function cannot; d takes the place of the parameters of MAMO's user
    embedding, and the scorer is the model's own plus that product, without layers that adapt. Numeric features of the
    user enter only through the model. Without a profile (users with only an unknown id) the reading is the same for all
    users: Meta-SGD on a user's vector and matrix.

    Args:
      model: a model with ``features``, such as `content_model`.
      slots: number of slots of each memory.
      inner_lr: initial rate of the steps on the user's vector d; that of the steps on the matrix P is a tenth of it.
        Both are learned.
      inner_steps: number of gradient steps on the support.
      prior: prior strength, in examples: the gradient of n support examples is multiplied by ``n / (n + prior)``.
      prior_weight: weight of the loss before the first step in the objective; that after the last step has weight 1.
      loss: loss of the support and of the query, ``loss(scores [n], target [n], where=[n]) -> scalar``.

    Returns:
      A learner whose ``adapted`` is ``{"user": [D + 1], "preference": [D, D]}``.

    Raises:
      MetarecError: the model has no ``features``, or a number is out of bounds.
    """
    vectors = shows.features_of(model, "memory")
    size = model.num_features
    columns = [(table, c) for table, t in sorted(model.tables.items()) for c in t.columns if c.startswith("user_")]

    def init(key: Array) -> Params:
        k_model, k_keys, k_preference = jax.random.split(key, 3)
        width = sum(model.tables[table].size for table, _ in columns)
        own = {
            "key": jax.random.normal(k_keys, (slots, width)),
            "log_sharpness": jnp.asarray(np.log(4.0), jnp.float32),
            "user": jnp.zeros((slots, size + 1), jnp.float32),
            "preference": 0.01 * jax.random.normal(k_preference, (slots, size, size)),
            "log_rate": {
                "user": jnp.full(size + 1, np.log(inner_lr), jnp.float32),
                "preference": jnp.asarray(np.log(inner_lr / 10), jnp.float32),
            },
        }
        return {**model.init(k_model), "memory": own}

    def profile(params: Params, inputs: Inputs) -> Array:
        """The first example's user rows; all examples of a task have the same."""
        rows = [_mean_row(params["tables"][table], inputs[c][0]) for table, c in columns if c in inputs]
        return jnp.concatenate(rows) if rows else jnp.zeros(0)

    def read(params: Params, inputs: Inputs) -> dict[str, Array]:
        own, p = params["memory"], profile(params, inputs)
        length = lambda v: jnp.sqrt(jnp.sum(v * v, axis=-1) + _SHORT)  # noqa: E731
        alike = (own["key"] @ p) / (length(own["key"]) * length(p))
        attention = jax.nn.softmax(jnp.exp(own["log_sharpness"]) * alike)
        preference = jnp.einsum("k,kij->ij", attention, own["preference"])
        return {"user": attention @ own["user"], "preference": jnp.eye(size, dtype=preference.dtype) + preference}

    def score(base: Array, v: Array, moving: dict[str, Array]) -> Array:
        return base + (v @ moving["preference"].T) @ moving["user"][:-1] + moving["user"][-1]

    def adapt(params: Params, support: Examples, key: Array) -> dict[str, Array]:
        base, v, n = model.apply(params, support.inputs), vectors(params, support.inputs), support.mask.sum()
        share = n / (n + prior) if prior else 1.0

        def step(moving: dict[str, Array], _: None) -> tuple[dict[str, Array], None]:
            grads = jax.grad(lambda m: loss(score(base, v, m), support.target, where=support.mask))(moving)
            length = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)) + _SHORT)
            shrink = share * jnp.minimum(1.0, _LONGEST / length)
            rates = params["memory"]["log_rate"]

            def moved(p: Array, rate: Array, g: Array) -> Array:
                return p - (jnp.exp(rate) * shrink * g).astype(p.dtype)

            return jax.tree.map(moved, moving, rates, grads), None

        return loop(step, read(params, support.inputs), inner_steps)[0]

    def predict(params: Params, adapted: dict[str, Any], inputs: Inputs) -> Array:
        return score(model.apply(params, inputs), vectors(params, inputs), adapted)

    def before(params: Params, inputs: Inputs) -> Array:
        return predict(params, read(params, inputs), inputs)

    return shows.learner(init, adapt, predict, loss, model, prior_weight, before)


def _mean_row(table: Array, ids: Array) -> Array:
    """The row of one id, or the mean row of the values that are not padding, as in the model."""
    if ids.ndim == 0:
        return table[ids]
    real = (ids > 0).astype(table.dtype)
    return (real @ table[ids]) / jnp.maximum(real.sum(), 1.0)
