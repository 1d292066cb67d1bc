"""Inner rules: how a gradient of the support loss becomes a step. SGD, any optax transformation, Meta-SGD."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metarec_jax.core import Array


class Rule(NamedTuple):
    """An inner update rule, possibly with parameters of its own that are meta-learned.

    Attributes:
      init: ``init(moving) -> params``, given the parameters that adapt (a dict of arrays); {} where nothing is learned.
      start: ``start(params, moving) -> state`` at the beginning of a task.
      update: ``update(params, grads, state, moving) -> (moving, state)``.
      lr: where an update is exactly ``moving - lr * grads``, that rate: it lets `maml` keep changes of low rank.
    """

    init: Callable[[dict[str, Array]], Any]
    start: Callable[[Any, dict[str, Array]], Any]
    update: Callable[[Any, dict[str, Array], Any, dict[str, Array]], tuple[dict[str, Array], Any]]
    lr: float | None = None


def sgd(lr: float) -> Rule:
    """Gradient descent: ``moving <- moving - lr * gradient``.

    >>> rule = sgd(0.5)
    >>> float(rule.update({}, {"a": jnp.array(4.0)}, (), {"a": jnp.array(3.0)})[0]["a"])  # 3 - 0.5 * 4
    1.0
    """

    def update(params: Any, grads: Any, state: Any, moving: Any) -> tuple[Any, Any]:
        return jax.tree.map(lambda p, g: p - lr * g, moving, grads), state

    return Rule(lambda moving: {}, lambda params, moving: (), update, lr)


def from_optax(transformation: optax.GradientTransformation) -> Rule:
    """Any optax transformation as inner rule. Adam wants ``eps_root=1e-8``: else the second derivative is NaN.

    Where tables adapt, it must leave alone what has no gradient (no weight decay): a task owns the rows of its support
    only, and those of the query, seen in meta-training too, would be moved there and not when the task is served.
    """

    def update(params: Any, grads: Any, state: Any, moving: Any) -> tuple[Any, Any]:
        updates, state = transformation.update(grads, state, moving)
        return optax.apply_updates(moving, updates), state

    return Rule(lambda moving: {}, lambda params, moving: transformation.init(moving), update)


def meta_sgd(lr: float) -> Rule:
    """A learned rate for every parameter, started at ``lr``: ``moving <- moving - rate * gradient``.

    The rate of a table is learned for each of its columns, not for each row: it must serve rows never seen.
    Source: Li et al., "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning", 2017.
    """

    def init(moving: dict[str, Array]) -> dict[str, Array]:
        shape = lambda name, a: (1, a.shape[1]) if name.startswith("tables/") else a.shape  # noqa: E731
        return {name: jnp.full(shape(name, a), lr, a.dtype) for name, a in moving.items()}

    def update(rates: Any, grads: Any, state: Any, moving: Any) -> tuple[Any, Any]:
        return {name: p - rates[name] * grads[name] for name, p in moving.items()}, state

    return Rule(init, lambda rates, moving: (), update)
