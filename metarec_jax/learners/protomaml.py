"""Proto-MAML: the user's head starts at the prototypes of the support, then takes gradient steps.

Source: Triantafillou et al., "Meta-Dataset: A Dataset of Datasets for Learning to Learn from Few Examples", 2020.
There a class has a prototype c, the mean of its features, and its head starts at ``w = 2 c, b = -|c|^2``, which scores
as a prototypical network does. Here there are two classes: what the user likes more than the prior expects, and what
the user likes less.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from metarec_jax import losses
from metarec_jax.core import Array, Examples, Inputs, Learner, Model, Params, Task
from metarec_jax.learners._support import features_of
from metarec_jax.learners.maml import maml
from metarec_jax.learners.rules import MakeRule, Rule
from metarec_jax.options import Bounds, bounded


@bounded
def protomaml(
    model: Model,
    *,
    inner_lr: Annotated[float | None, Bounds(0.0)] = None,
    inner_steps: Annotated[int, Bounds(0)] = 5,
    prior: Annotated[float | None, Bounds(0.0)] = None,
    rule: Rule | MakeRule | None = None,
    loss: Callable[..., Array] = losses.mse,
    only: tuple[str, ...] | None = (),
    first_order: bool = False,
) -> Learner:
    """Meta-train features and a prior; a task's head starts at its prototypes and adapts by gradient steps.

    ``score = apply(params, x) + <w, features(params, x)> + b``, and (w, b) starts at `prototypes` of the support. The
    derivative goes through that start as well.

    Args:
      model: with ``features``, such as `content_model`.
      inner_lr: initial rate of the inner steps; 0.3 by default.
      inner_steps: number of gradient steps on the support; with 0 the head stays at the prototypes.
      prior: prior strength, in examples: the loss of n support examples is multiplied by ``n / (n + prior)``; 30 by
        default.
      rule: inner update rule (`learners.rules`), or a function ``rule(inner_lr, inner_steps)`` that makes one;
        `meta_sgd` by default.
      loss: loss of the support and of the query, ``loss(scores [n], target [n], where=[n]) -> scalar``.
      only: path prefixes of the model's parameters that adapt in addition to the head; None is all of them.
      first_order: treat the inner gradients as constant (FOMAML).

    Returns:
      A learner; ``adapted["rest"]`` holds the head, ``"head/weight" [D]`` and ``"head/bias" []``.

    Raises:
      MetarecError: the model has no ``features``, or as in `maml`.
    """
    features, beside = features_of(model, "protomaml"), ("tables", "net") if only is None else only
    empty = {"weight": jnp.zeros((model.num_features,)), "bias": jnp.zeros(())}

    def apply(params: Params, inputs: Inputs) -> Array:
        head = params["head"]
        return model.apply(params, inputs) + features(params, inputs) @ head["weight"] + head["bias"]

    steps = maml(
        Model(lambda key: {**model.init(key), "head": empty}, apply, model.tables, adapts=("head", *beside)),
        inner_lr=inner_lr,
        inner_steps=inner_steps,
        prior=prior,
        rule=rule,
        loss=loss,
        first_order=first_order,
    )

    def init(key: Array) -> Params:
        params = {name: part for name, part in steps.init(key).items() if name != "head"}
        return {
            **params,
            "prototypes": {
                "log_gain": jnp.zeros(()),
                "log_prior": jnp.zeros(()),
                "level": jnp.asarray(0.5, jnp.float32),
            },
        }

    def headed(params: Params, head: dict[str, Array]) -> Params:
        return {**{name: part for name, part in params.items() if name != "prototypes"}, "head": head}

    def start(params: Params, support: Examples) -> Params:
        pull = jax.grad(lambda scores: loss(scores, support.target, where=support.mask))
        liking = -support.mask.sum() * pull(model.apply(params, support.inputs))
        return headed(params, prototypes(params["prototypes"], features(params, support.inputs), liking, support.mask))

    def adapt(params: Params, support: Examples, key: Array) -> Any:
        return steps.adapt(start(params, support), support, key)

    def predict(params: Params, adapted: Any, inputs: Inputs) -> Array:
        return steps.predict(headed(params, empty), adapted, inputs)

    def meta_loss(params: Params, task: Task, key: Array) -> tuple[Array, Any]:
        return steps.loss(start(params, task.support), task, key)

    return Learner(init, adapt, predict, meta_loss, steps.tables)


def prototypes(learned: dict[str, Array], phi: Array, liking: Array, mask: Array) -> dict[str, Array]:
    """The head of two prototypes: ``w = 2 g (c+ - c-)``, ``b = g (|c-|^2 - |c+|^2) + level * sum a / (k + n)``.

    ``c+ = sum_i a_i^+ phi_i / (k + sum_i a_i^+)`` is the mean of the features with positive a, weighted by a and shrunk
    towards 0 by a prior weight k; c- likewise. With a in {-1, 1}, ``k = 0`` and ``level = 0`` the score is
    ``g (|phi - c-|^2 - |phi - c+|^2)``, as in a prototypical network. Without support the head is 0.

    Args:
      learned: ``{"log_gain": log g, "log_prior": log k, "level"}``.
      phi: ``[n, D]``.
      liking: a ``[n]``, how much more each example was liked than the prior expects: minus the gradient of its loss
        with respect to its score (for mse twice the residual).
      mask: ``[n]``.

    Returns:
      ``{"weight": [D], "bias": []}``.

    >>> learned = {"log_gain": jnp.array(0.0), "log_prior": jnp.array(-jnp.inf), "level": jnp.array(0.0)}
    >>> head = prototypes(learned, jnp.array([[3.0], [1.0]]), jnp.array([1.0, -1.0]), jnp.ones(2))
    >>> head["weight"].tolist(), float(head["bias"])  # (x - 1)^2 - (x - 3)^2 = 4 x - 8
    ([4.0], -8.0)
    """
    prior, gain = jnp.exp(learned["log_prior"]), jnp.exp(learned["log_gain"])

    def centre(weight: Array) -> Array:
        total = prior + weight.sum()
        return weight @ phi / jnp.where(total > 0, total, 1.0)

    up, down = centre(jax.nn.relu(liking)), centre(jax.nn.relu(-liking))
    count = prior + mask.sum()
    level = learned["level"] * liking.sum() / jnp.where(count > 0, count, 1.0)
    return {"weight": 2 * gain * (up - down), "bias": gain * (down @ down - up @ up) + level}
