"""Reptile: move the initialisation towards each task's adapted parameters; no second derivative, no query needed.

Source: Nichol, Achiam and Schulman, "On First-Order Meta-Learning Algorithms", 2018.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp

from metarec_jax import losses, tree
from metarec_jax.core import Array, Examples, Learner, Model, Params, Task
from metarec_jax.learners._inner import inner
from metarec_jax.learners.maml import maml
from metarec_jax.learners.rules import MakeRule, Rule
from metarec_jax.options import Bounds, bounded


@bounded
def reptile(
    model: Model,
    *,
    inner_lr: Annotated[float | None, Bounds(0.0)] = None,
    inner_steps: Annotated[int, Bounds(0)] = 5,
    prior: Annotated[float | None, Bounds(0.0)] = None,
    rule: Rule | MakeRule | None = None,
    loss: Callable[..., Array] = losses.mse,
    only: tuple[str, ...] | None = (),
) -> Learner:
    """Meta-train by the surrogate ``<stop_gradient(p - adapted(p)), p>``, whose gradient is Reptile's direction.

    A task adapts on support and query together, since Reptile does not split them. The reported ``query_loss`` is that
    after adaptation on the support alone; ``loss`` is the surrogate, which does not measure quality.

    Args:
      inner_lr: rate of the inner steps; by default 0.3 where only the model's task parameters adapt (the user's row of
        a dot product), else 0.1.
      inner_steps: number of gradient steps on support and query.
      prior: prior strength, in examples: the loss of n examples is multiplied by ``n / (n + prior)``. By default 30
        where ``inner_lr`` is 0.3, else 0.
      rule: inner update rule (`learners.rules`), or a function ``rule(inner_lr, inner_steps)`` that makes one. Its own
        parameters (the rates of `meta_sgd`) keep their initial values: the surrogate has no gradient there.
      loss: loss of the inner steps, ``loss(scores [n], target [n], where=[n]) -> scalar``.
      only: path prefixes of the parameters that adapt; () is what the model names (`Model.adapts`), None is all.

    Returns:
      A learner; ``adapt`` and ``predict`` are those of `maml`.

    Raises:
      MetarecError: as in `maml`.
    """
    only = inner(model, lr=inner_lr, steps=inner_steps, only=only).only
    steps = maml(
        model,
        inner_lr=inner_lr,
        inner_steps=inner_steps,
        prior=prior,
        rule=rule,
        loss=loss,
        only=only,
        first_order=True,
    )

    def meta_loss(params: Params, task: Task, key: Array) -> tuple[Array, dict[str, Array]]:
        start = jax.lax.stop_gradient(params)
        adapted = steps.adapt(start, _joined(task), key)
        moving, _ = tree.partition({k: v for k, v in params.items() if k != "rule"}, only)
        surrogate = jnp.zeros(())
        for name, value in moving.items():
            if name.startswith("tables/"):
                table = name.removeprefix("tables/")
                ids = adapted["ids"][table]
                surrogate += jnp.vdot(jax.lax.stop_gradient(value[ids] - adapted["rows"][table]), value[ids])
            else:
                surrogate += jnp.vdot(jax.lax.stop_gradient(value - adapted["rest"][name]), value)
        scores = steps.predict(start, steps.adapt(start, task.support, key), task.query.inputs)
        query_loss = loss(scores, task.query.target, where=task.query.mask)
        return surrogate, {"query_loss": query_loss}

    return steps._replace(loss=meta_loss)


def _joined(task: Task) -> Examples:
    """Support and query as one set of examples; a column that all examples of both share stays shared."""
    sizes = task.support.mask.shape[0], task.query.mask.shape[0]

    def join(a: Array, b: Array) -> Array:
        if a.shape[0] == b.shape[0] == 1 and sizes != (1, 1):
            return a
        return jnp.concatenate([jnp.broadcast_to(x, (n, *x.shape[1:])) for x, n in zip((a, b), sizes, strict=True)])

    return jax.tree.map(join, task.support, task.query)
