"""Plain training and fine-tuning: what a model achieves without meta-learning.

This is the usual way to serve a new user with a trained network. Source, that it is hard to beat: Chen et al., "A
Closer Look at Few-shot Classification", 2019.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp

from metarec_jax import losses
from metarec_jax.core import Array, Examples, Learner, Model, Params, Task
from metarec_jax.learners.maml import maml
from metarec_jax.learners.rules import RULES, MakeRule, Rule
from metarec_jax.options import Bounds, bounded


@bounded
def fine_tune(
    model: Model,
    *,
    inner_lr: Annotated[float | None, Bounds(0.0)] = None,
    inner_steps: Annotated[int, Bounds(0)] = 5,
    rule: Rule | MakeRule = RULES["sgd"],
    loss: Callable[..., Array] = losses.mse,
    only: tuple[str, ...] | None = (),
) -> Learner:
    """Train ``model`` on all examples of a task alike, and fine-tune it on the support of a new user.

    ``loss(task) = loss(apply(p, x), y)`` over support and query together, without adaptation: pooled training, in
    batches of users. `adapt` then takes gradient steps on the support, as `maml` does: on the user's row
    (``only=("tables/user_id",)``: the fold-in of matrix factorisation by gradients), the last layer, or everything.

    Args:
      inner_lr: rate of the fine-tuning steps; by default 0.3 where only the model's task parameters adapt (the user's
        row of a dot product), else 0.1.
      inner_steps: number of fine-tuning steps; with 0, `adapt` changes nothing.
      rule: update rule of fine-tuning (`learners.rules`), SGD by default; its own parameters keep their initial values.
      loss: loss of training and of fine-tuning, ``loss(scores [n], target [n], where=[n]) -> scalar``.
      only: path prefixes of the parameters that fine-tuning moves; () is what the model names (`Model.adapts`), None
        is all. Training moves all parameters.

    Returns:
      A learner whose ``adapted`` is that of `maml`. Its ``query_loss`` is measured after fine-tuning on the support,
      which with many steps takes longer than training: train with 0 steps if only the parameters are needed.

    Raises:
      MetarecError: as in `maml`.

    >>> from metarec_jax.models.content import meta_recommender
    >>> learner = fine_tune(meta_recommender(4, 6, size=2), inner_steps=0)
    >>> params = learner.init(jax.random.key(0))
    >>> part = Examples({"user_id": jnp.array([1]), "item_id": jnp.array([2])}, jnp.array([3.0]), jnp.ones(1))
    >>> scores = learner.predict(params, learner.adapt(params, part, jax.random.key(0)), part.inputs)
    >>> loss, _ = learner.loss(params, Task(part, part), jax.random.key(0))
    >>> bool(abs(loss - (scores[0] - 3.0) ** 2) < 1e-5)
    True
    """
    tuned = maml(
        model,
        inner_lr=inner_lr,
        inner_steps=inner_steps,
        prior=0.0,
        rule=rule,
        loss=loss,
        only=only,
    )

    def pooled(params: Params, task: Task, key: Array) -> tuple[Array, dict[str, Array]]:
        body = {name: part for name, part in params.items() if name != "rule"}

        def scores_of(part: Examples) -> Array:
            return model.apply(body, part.inputs)

        support, query = task
        scores = [scores_of(support), scores_of(query)]
        both = jnp.concatenate(scores), jnp.concatenate([support.target, query.target])
        value = loss(*both, where=jnp.concatenate([support.mask, query.mask]))
        if inner_steps == 0:
            return value, {"query_loss": loss(scores[1], query.target, where=query.mask)}
        fixed = jax.lax.stop_gradient(params)
        after = tuned.predict(fixed, tuned.adapt(fixed, support, key), query.inputs)
        return value, {"query_loss": loss(after, query.target, where=query.mask)}

    return tuned._replace(loss=pooled)
