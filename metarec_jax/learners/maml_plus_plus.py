"""MAML++: losses after every step with weights that move to the last, learned rates, first order before second.

Source: Antoniou, Edwards and Storkey, "How to Train Your MAML", 2019. Batch normalisation per step is left out, since
no model here has batch normalisation; the cosine schedule of the outer rate is the engine's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from metarec_jax import losses
from metarec_jax.core import PROGRESS, Array, Examples, Inputs, Learner, Model, Params, Task
from metarec_jax.learners.maml import maml
from metarec_jax.learners.rules import lslr
from metarec_jax.options import Bounds, bounded


@bounded
def maml_plus_plus(
    model: Model,
    *,
    inner_lr: Annotated[float | None, Bounds(0.0)] = None,
    inner_steps: Annotated[int, Bounds(1)] = 5,
    prior: Annotated[float | None, Bounds(0.0)] = None,
    loss: Callable[..., Array] = losses.mse,
    only: tuple[str, ...] | None = (),
    first_order_until: Annotated[float, Bounds(0.0, 1.0)] = 0.0,
    remat: bool = False,
) -> Learner:
    """`maml` with the rule `lslr`, query losses after every step, and loss weights that depend on the progress.

    ``params["progress"]`` in [0, 1] has no gradient; training sets it to the share of outer steps that are done. At 0
    all inner steps have the same weight, at 1 only the last one counts.

    Args:
      inner_lr: initial rate of every layer and step; by default 0.3 where only the model's task parameters adapt (the
        user's row of a dot product), else 0.1.
      inner_steps: number of gradient steps on the support.
      prior: prior strength, in examples: the loss of n support examples is multiplied by ``n / (n + prior)``. By
        default 30 where ``inner_lr`` is 0.3, else 0.
      loss: loss of the support and of the query, ``loss(scores [n], target [n], where=[n]) -> scalar``.
      only: path prefixes of the parameters that adapt; () is what the model names (`Model.adapts`), None is all.
      first_order_until: share of training, from 0 to 1, during which the inner gradients are treated as constant.
      remat: store only every sqrt(k)-th inner step for the derivative and recompute the others, to save memory.

    Returns:
      A learner; ``adapt`` and ``predict`` are those of `maml`.

    Raises:
      MetarecError: ``inner_steps`` is below 1, or as in `maml`.

    >>> [round(float(w), 2) for w in step_weights(4, jnp.array(0.0))], step_weights(4, jnp.array(1.0)).tolist()
    ([0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 0.0, 1.0])
    """

    def at(weights: Array, first_order: bool) -> Learner:
        return maml(
            model,
            inner_lr=inner_lr,
            inner_steps=inner_steps,
            prior=prior,
            rule=lslr,
            loss=loss,
            only=only,
            per_step_losses=weights,
            first_order=first_order,
            remat=remat,
        )

    steps = at(step_weights(inner_steps, jnp.zeros(())), False)

    def without_progress(params: Params) -> Params:
        return {name: part for name, part in params.items() if name != PROGRESS}

    def init(key: Array) -> Params:
        return {**steps.init(key), PROGRESS: jnp.zeros(())}

    def adapt(params: Params, support: Examples, key: Array) -> Any:
        return steps.adapt(without_progress(params), support, key)

    def predict(params: Params, adapted: Any, inputs: Inputs) -> Array:
        return steps.predict(without_progress(params), adapted, inputs)

    def meta_loss(params: Params, task: Task, key: Array) -> tuple[Array, Any]:
        done = jax.lax.stop_gradient(params[PROGRESS])
        body, weights = without_progress(params), step_weights(inner_steps, done)
        orders = [lambda body, task, first=first: at(weights, first).loss(body, task, key) for first in (True, False)]
        if first_order_until <= 0:
            return orders[1](body, task)
        return jax.lax.cond(done < first_order_until, *orders, body, task)

    return Learner(init, adapt, predict, meta_loss, steps.tables)


def step_weights(steps: int, done: Array) -> Array:
    """``(1 - done) / k`` for every inner step except the last, which has the rest: equal at 0, only the last at 1.

    The paper keeps 0.03 / k for each, and drops them all at the end of annealing.
    """
    others = jnp.broadcast_to((1 - jnp.clip(done, 0.0, 1.0)) / steps, (steps - 1,))
    return jnp.concatenate([others, 1 - others.sum(keepdims=True)])
