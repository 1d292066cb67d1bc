"""Implicit MAML: the derivative depends only on the end of adaptation, not on the path; memory for one inner step.

Source: Rajeswaran, Finn, Kakade and Levine, "Meta-Learning with Implicit Gradients", 2019.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import jax

from metarec_jax import losses, tree
from metarec_jax.core import Array, Learner, Model, Params, Task
from metarec_jax.learners._inner import inner
from metarec_jax.learners.maml import maml
from metarec_jax.learners.rules import Rule
from metarec_jax.options import Bounds, bounded


@bounded
def imaml(
    model: Model,
    *,
    inner_lr: Annotated[float | None, Bounds(0.0)] = None,
    inner_steps: Annotated[int, Bounds(0)] = 5,
    proximal: Annotated[float, Bounds(1e-6, 1e12)] = 1.0,
    cg_steps: Annotated[int, Bounds(1)] = 8,
    loss: Callable[..., Array] = losses.mse,
    only: tuple[str, ...] | None = (),
) -> Learner:
    """Meta-train through the minimum of ``L_support(q) + proximal / 2 |q - p|^2``, reached by gradient steps from p.

    At the minimum q, ``dq/dp = proximal (H + proximal I)^-1`` with H the Hessian of ``L_support`` there, so that the
    meta-gradient is ``proximal (H + proximal I)^-1 grad L_query(q)``, by conjugate gradients; the derivative of the
    parameters that do not adapt follows from the same theorem. Both are only as accurate as q is close to the minimum:
    a small ``proximal`` requires more steps.

    Args:
      inner_lr: rate of the inner steps, below ``2 / (largest curvature + proximal)``; by default 0.3 where only the
        model's task parameters adapt (the user's row of a dot product), else 0.1.
      inner_steps: number of plain gradient steps on the support.
      proximal: strength with which parameters are held at their start.
      cg_steps: largest number of conjugate-gradient steps, with one Hessian-vector product each; exact once it reaches
        the number of different eigenvalues of the Hessian.
      loss: loss of the support and of the query, ``loss(scores [n], target [n], where=[n]) -> scalar``.
      only: path prefixes of the parameters that adapt; () is what the model names (`Model.adapts`), None is all.

    Returns:
      A learner; ``adapt`` and ``predict`` are those of `maml` with the rule `towards_start`.

    Raises:
      MetarecError: ``proximal`` is not above 0, ``cg_steps`` is below 1, or as in `maml`.
    """
    _, only, _, rate = inner(model, lr=inner_lr, steps=inner_steps, only=only)
    rule = towards_start(rate, proximal)
    steps = maml(model, inner_steps=inner_steps, prior=0.0, rule=rule, loss=loss, only=only)

    def meta_loss(params: Params, task: Task, key: Array) -> tuple[Array, dict[str, Array]]:
        body = {name: part for name, part in params.items() if name != "rule"}
        start, _ = tree.partition(body, only)

        def support_gradient(moving: dict[str, Array]) -> dict[str, Array]:
            def support_loss(moving: dict[str, Array]) -> Array:
                scores = model.apply(tree.merge(body, moving), task.support.inputs)
                return loss(scores, task.support.target, where=task.support.mask)

            return jax.grad(support_loss)(moving)

        def slope(moving: dict[str, Array]) -> dict[str, Array]:
            """0 at the minimum; divided by ``proximal``, so that it is close to the identity where H is small."""
            grads = support_gradient(moving)
            return jax.tree.map(lambda q, p, g: q - p + g / proximal, moving, start, grads)

        def descend(_: Any, moving: dict[str, Array]) -> dict[str, Array]:
            def step(_: Array, carry: Any) -> Any:
                moving, state = carry
                return rule.update({}, support_gradient(moving), state, moving)

            return jax.lax.fori_loop(0, inner_steps, step, (moving, rule.start({}, moving)))[0]

        def conjugate(product: Callable[[Any], Any], right: Any) -> Any:
            return jax.scipy.sparse.linalg.cg(product, right, tol=1e-7, maxiter=cg_steps)[0]

        def solve(product: Callable[[Any], Any], right: Any) -> Any:  # cg alone cannot be transposed in here
            return jax.lax.custom_linear_solve(product, right, conjugate, symmetric=True)

        moved = jax.lax.custom_root(slope, start, descend, solve)
        scores = model.apply(tree.merge(body, moved), task.query.inputs)
        value = loss(scores, task.query.target, where=task.query.mask)
        return value, {"query_loss": value}

    return steps._replace(loss=meta_loss)


def towards_start(lr: float, strength: float) -> Rule:
    """Gradient descent with a pull to the start: ``moving <- moving - lr * (gradient + strength * (moving - start))``.

    >>> rule = towards_start(0.5, 2.0)
    >>> state = rule.start({}, {"a": 3.0})
    >>> rule.update({}, {"a": 4.0}, state, {"a": 2.0})[0]["a"]  # 2 - 0.5 (4 + 2 (2 - 3))
    1.0
    """

    def update(params: Any, grads: Any, start: Any, moving: Any) -> tuple[Any, Any]:
        return jax.tree.map(lambda q, g, p: q - lr * (g + strength * (q - p)), moving, grads, start), start

    return Rule(lambda moving: {}, lambda params, moving: moving, update)
