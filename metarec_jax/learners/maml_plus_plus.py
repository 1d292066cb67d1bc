"""MAML++: losses after every step with weights that move to the last, learned rates, first order before second.

Source: Antoniou, Edwards and Storkey, "How to Train Your MAML", 2019. Its batch normalisation by step has no place
here, for want of batch normalisation; its cosine schedule of the outer rate is the engine's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metarec_jax import losses
from metarec_jax.core import Array, Examples, Inputs, Learner, MetarecError, Model, Params, Task
from metarec_jax.learners.maml import maml
from metarec_jax.learners.rules import lslr

CLOCK = "annealed"
"""Name of the parameter that says how far training has come, from 0 to 1."""


def maml_plus_plus(
    model: Model,
    *,
    inner_lr: float = 0.1,
    inner_steps: int = 5,
    prior: float = 0.0,
    loss: Callable[..., Array] = losses.mse,
    only: Sequence[str] | None = None,
    first_order_until: float = 0.0,
    remat: bool = False,
) -> Learner:
    """`maml` with the rule `lslr`, query losses after every step, and weights of them that depend on ``annealed``.

    ``annealed`` in [0, 1] is a parameter without gradient: a loss is a function of parameters and task alone. `anneal`
    wraps the outer optimiser so that every outer step adds to it; with any other optimiser it stays at 0, where all
    inner steps weigh the same.

    Args:
      inner_lr: the first rate of every layer and step.
      inner_steps, prior, loss, only, remat: as for `maml`.
      first_order_until: inner gradients are constants while ``annealed`` is below this, as in `maml` with
        ``first_order=True``; 0: never.

    Returns:
      A learner; ``adapt`` and ``predict`` are those of `maml`.

    Raises:
      MetarecError: ``inner_steps`` below 1, or as `maml`.

    >>> [round(float(w), 2) for w in step_weights(4, jnp.array(0.0))], step_weights(4, jnp.array(1.0)).tolist()
    ([0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 0.0, 1.0])
    """
    rule = lslr(inner_lr, inner_steps)

    def at(weights: Array, first_order: bool) -> Learner:
        return maml(
            model,
            inner_steps=inner_steps,
            prior=prior,
            rule=rule,
            loss=loss,
            only=only,
            per_step_losses=weights,
            first_order=first_order,
            remat=remat,
        )

    steps = at(step_weights(inner_steps, jnp.zeros(())), False)

    def without_clock(params: Params) -> Params:
        return {name: part for name, part in params.items() if name != CLOCK}

    def init(key: Array) -> Params:
        return {**steps.init(key), CLOCK: jnp.zeros(())}

    def adapt(params: Params, support: Examples, key: Array) -> Any:
        return steps.adapt(without_clock(params), support, key)

    def predict(params: Params, adapted: Any, inputs: Inputs) -> Array:
        return steps.predict(without_clock(params), adapted, inputs)

    def meta_loss(params: Params, task: Task, key: Array) -> tuple[Array, Any]:
        done = jax.lax.stop_gradient(params[CLOCK])
        body, weights = without_clock(params), step_weights(inner_steps, done)
        orders = [lambda body, task, first=first: at(weights, first).loss(body, task, key) for first in (True, False)]
        if first_order_until <= 0:
            return orders[1](body, task)
        return jax.lax.cond(done < first_order_until, *orders, body, task)

    return Learner(init, adapt, predict, meta_loss, steps.tables)


def step_weights(steps: int, done: Array) -> Array:
    """``(1 - done) / k`` for every inner step but the last, which has the rest: all alike at 0, the last alone at 1.

    The paper keeps 0.03 / k for each until it drops them all at the end of annealing.
    """
    others = jnp.broadcast_to((1 - jnp.clip(done, 0.0, 1.0)) / steps, (steps - 1,))
    return jnp.concatenate([others, 1 - others.sum(keepdims=True)])


def anneal(optimizer: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
    """``optimizer`` for the dense parameters of `maml_plus_plus`; each update adds ``1 / steps`` to ``annealed``.

    Args:
      steps: outer steps until all weight is on the last inner step.

    Raises:
      MetarecError: ``steps`` below 1, or (from ``init``) parameters that are not those of `maml_plus_plus`.

    >>> by = anneal(optax.sgd(0.1), steps=4)
    >>> params = {"annealed": jnp.array(0.5), "w": jnp.array(1.0)}
    >>> updates, _ = by.update({"annealed": jnp.array(0.0), "w": jnp.array(2.0)}, by.init(params), params)
    >>> float(updates["annealed"]), round(float(updates["w"]), 4)
    (0.25, -0.2)
    """
    if steps < 1:
        raise MetarecError(f"anneal wants 1 outer step or more, got {steps}")

    def init(params: Any) -> Any:
        if CLOCK not in params:
            raise MetarecError(f"anneal wants the parameters of maml_plus_plus; these are {sorted(params)}")
        return optimizer.init(params)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = optimizer.update(grads, state, params)
        return {**updates, CLOCK: jnp.full_like(updates[CLOCK], 1 / steps)}, state

    return optax.GradientTransformation(init, update)
