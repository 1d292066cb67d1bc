"""Convergence of adaptation: inner-loop curves, gradient norms, and the error of the first-order approximation.

Only the learner contract is used: a curve comes from learners that differ only in their number of inner steps, and the
inner gradient is that of the support loss with respect to the result of `adapt`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metarec_jax import rows
from metarec_jax.core import Array, Learner, MetarecError, Params, Task

_POINTS = 12


class Convergence(NamedTuple):
    """The inner loop over tasks, at ``steps`` inner steps; losses and norms are means over the tasks.

    Attributes:
      steps: ascending, from 0, past ``trained``.
      support_loss: the loss that the inner loop lowers; query_loss: the loss on the query.
      gradient_norm: norm of the gradient of the support loss in the adapted parameters.
      trained: inner steps of the trained learner.
      worse: fraction of the tasks whose support loss is higher after ``trained`` steps than before, or not finite.
      growth: factor by which the last step up to ``trained`` (the first, with one) multiplied the gradient norm,
        ``(norm after / norm before) ** (1 / steps between)``; for lr * h > 2 on a quadratic it is ``lr h - 1``.
      cosine: between the meta-gradients of first and of second order; None if the learner has no such pair.
      tasks: number of tasks.
    """

    steps: tuple[int, ...]
    support_loss: tuple[float, ...]
    query_loss: tuple[float, ...]
    gradient_norm: tuple[float, ...]
    trained: int
    worse: float
    growth: float
    cosine: float | None
    tasks: int

    @property
    def unstable_from(self) -> int | None:
        """The smallest of ``steps`` with a support loss above that of no step, or not finite."""
        start = self.support_loss[0]
        return next((k for k, v in zip(self.steps, self.support_loss, strict=True) if not v <= start), None)

    @property
    def diverges(self) -> bool:
        """Whether the support loss after the trained number of steps is above its start."""
        return self.unstable_from is not None and not _at(self, self.trained) <= self.support_loss[0]

    @property
    def best_steps(self) -> int:
        """The number of inner steps with the lowest query loss."""
        finite = [v if math.isfinite(v) else math.inf for v in self.query_loss]
        return self.steps[int(np.argmin(finite))]


def points(trained: int) -> tuple[int, ...]:
    """Numbers of inner steps of a curve: those up to ``trained`` (at most ten), then 1.5, 2 and 3 times ``trained``.

    >>> points(1), points(5), points(40)
    ((0, 1, 2, 3), (0, 1, 2, 3, 4, 5, 8, 10, 15), (0, 4, 9, 13, 18, 22, 27, 31, 36, 40, 60, 80, 120))
    """
    trained = max(trained, 1)
    inside = np.linspace(0, trained, min(trained + 1, _POINTS - 2)).round().astype(int)
    return tuple(sorted({*inside.tolist(), math.ceil(1.5 * trained), 2 * trained, 3 * trained}))


def converge(
    learner_at: Callable[[int], Learner],
    params: Params,
    tasks: Task,
    *,
    trained: int,
    loss: Callable[..., Array],
    real: np.ndarray | None = None,
    orders: tuple[Learner, Learner] | None = None,
    key: Array | None = None,
) -> Convergence:
    """Measure the inner loop from the trained parameters.

    Args:
      learner_at: returns the learner with a number of inner steps; all use the same ``params``.
      tasks: a batch, every leaf with leading axis T.
      trained: inner steps of the trained learner; the curve continues to three times as many (`points`).
      loss: loss of the inner steps, ``loss(scores [n], target [n], where=[n])``.
      real: bool ``[T]``, the tasks to include; default: all. Tasks without a support example are always excluded.
      orders: the first-order and the second-order learner, for the cosine of their meta-gradients.

    Raises:
      MetarecError: no task is included.

    For a row u, one rating of 3, ``loss = (u - 3)^2`` and rate 1/8, every step multiplies u - 3 by ``1 - 2/8``, and the
    loss by 9/16. (MAML's own doctest has this model.)

    >>> from metarec_jax import losses
    >>> from metarec_jax.core import Examples, Model, Table
    >>> from metarec_jax.learners.maml import maml
    >>> score = lambda params, inputs: params["tables"]["user_id"][inputs["user_id"], 0]
    >>> tables = {"user_id": Table(1, 1, ("user_id",))}
    >>> model = Model(lambda key: {"tables": {"user_id": jnp.zeros((1, 1))}}, score, tables)
    >>> three = Examples({"user_id": jnp.zeros((1, 1), jnp.int32)}, jnp.full((1, 1), 3.0), jnp.ones((1, 1)))
    >>> at = lambda k: maml(model, inner_lr=0.125, inner_steps=k)
    >>> found = converge(at, at(1).init(jax.random.key(0)), Task(three, three), trained=1, loss=losses.mse)
    >>> [round(x / 9, 4) for x in found.support_loss], found.diverges
    ([1.0, 0.5625, 0.3164, 0.178], False)
    """
    counts = np.asarray(tasks.support.mask.sum(1) > 0) & (True if real is None else np.asarray(real))
    if not counts.any():
        raise MetarecError(
            "expected a task with a support example to measure the inner loop, got none; pass one or more"
        )
    tasks = jax.tree.map(lambda leaf: leaf[counts], tasks)
    key = jax.random.key(0) if key is None else key
    at = points(trained)
    learners = [learner_at(k) for k in at]
    support, query, norm = (np.asarray(a) for a in _curves(learners, loss, params, tasks, key))  # [T, P]

    def mean(values: np.ndarray) -> tuple[float, ...]:
        return tuple(float(v) for v in values.mean(0))

    here = at.index(max(trained, 1))
    norms = mean(norm)
    growth = (norms[here] / norms[here - 1]) ** (1 / (at[here] - at[here - 1])) if norms[here - 1] > 0 else 1.0
    cosine = None if orders is None else _cosine(*orders, params, tasks, key)
    higher = ~(support[:, at.index(trained)] <= support[:, 0])
    return Convergence(
        at, mean(support), mean(query), norms, trained, float(higher.mean()), growth, cosine, int(counts.sum())
    )


def findings(found: Convergence, *, inner_lr: float | None = None) -> list[str]:
    """Sentences on the curves: the effect of the steps, whether they diverge, and the remedy."""
    c, k = found, found.trained
    first, last = c.query_loss[0], _at(c, k, c.query_loss)
    lines = [
        f"Over {c.tasks:,} validation tasks, {k} inner step{'s' * (k != 1)} change the support loss from "
        f"{c.support_loss[0]:.4g} to {_at(c, k):.4g}, the query loss from {first:.4g} to {last:.4g}, and the norm "
        f"of the inner gradient from {c.gradient_norm[0]:.3g} to {_at(c, k, c.gradient_norm):.3g}."
    ]
    if warning := remedy(found, inner_lr=inner_lr):
        lines.append(warning)
    elif c.unstable_from is not None:
        lines.append(
            f"It converges as trained, but with {c.unstable_from} steps the support loss is above its start: use fewer "
            "steps than that."
        )
    if not c.diverges and c.best_steps != k:
        best = _at(c, c.best_steps, c.query_loss)
        lines.append(f"The query loss is lowest, {best:.4g}, with {c.best_steps} steps; training used {k}.")
    if c.worse > 0 and not c.diverges:
        lines.append(f"For {c.worse:.0%} of the tasks the support loss is higher after the steps than before.")
    if c.cosine is not None:
        how = "close" if c.cosine > 0.95 else "not the same direction" if c.cosine > 0.5 else "another direction"
        lines.append(
            f"Cosine between the meta-gradients of first and second order: {c.cosine:.3f}, {how}"
            + ("; --first-order has nearly the same gradient." if c.cosine > 0.95 else ".")
        )
    return lines


def remedy(found: Convergence, *, inner_lr: float | None = None) -> str | None:
    """The warning and remedy if adaptation diverges, with numbers; else None.

    The last step multiplied the gradient by rho. On a quadratic rho = lr h - 1 for the steepest direction, h its
    curvature, so that lr / (1 + rho) = 1 / h is the rate that solves that direction in one step.
    """
    if not found.diverges:
        return None
    c, k = found, found.trained
    lower = "a lower --inner-lr"
    if inner_lr and math.isfinite(c.growth):
        lower = f"--inner-lr {inner_lr / (1 + max(c.growth, 1.0)):.2g} (now {inner_lr:g})"
    below = [n for n, v in zip(c.steps, c.support_loss, strict=True) if 0 < n < k and v <= c.support_loss[0]]
    fewer = f", --inner-steps {max(below)}" if below else ""
    return (
        f"Warning: adaptation diverges: after {k} inner step{'s' * (k != 1)} the support loss is {_at(c, k):.4g}, from "
        f"{c.support_loss[0]:.4g}, and higher for {c.worse:.0%} of the tasks. Use {lower}{fewer}, or --rule meta_sgd "
        "or lslr, which learn their rates."
    )


def to_json(found: Convergence) -> dict[str, Any]:
    """Plain numbers; values that are not finite become None."""
    plain = lambda v: v if not isinstance(v, float) or math.isfinite(v) else None  # noqa: E731
    return {name: [plain(v) for v in value] if isinstance(value, tuple) else plain(value) for name, value in
            found._asdict().items()}  # fmt: skip


def from_json(values: Mapping[str, Any]) -> Convergence:
    """The inverse of `to_json`; None becomes inf."""
    number = lambda v: math.inf if v is None else v  # noqa: E731
    fields: dict[str, Any] = {
        name: tuple(map(number, v)) if isinstance(v, list) else number(v) for name, v in values.items()
    }
    return Convergence(**(fields | {"cosine": values["cosine"]}))


def _at(found: Convergence, steps: int, values: Sequence[float] | None = None) -> float:
    return (found.support_loss if values is None else values)[found.steps.index(steps)]


def _curves(learners: list[Learner], loss: Any, params: Params, tasks: Task, key: Array) -> tuple[Array, ...]:
    """Support loss, query loss and norm of the inner gradient, each ``[T, P]``; one program for all points."""

    def of_task(params: Params, task: Task) -> tuple[Array, ...]:
        return tuple(jnp.stack(column) for column in zip(*(_point(a, loss, params, task, key) for a in learners),
                                                         strict=True))  # fmt: skip

    return jax.jit(jax.vmap(of_task, (None, 0)))(params, tasks)


def _point(learner: Learner, loss: Any, params: Params, task: Task, key: Array) -> tuple[Array, Array, Array]:
    adapted = learner.adapt(params, task.support, key)
    leaves, tree = jax.tree.flatten(adapted)
    moves = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]  # ids of rows do not

    def of(part: Any, moved: list[Array]) -> Array:
        some = iter(moved)
        whole = jax.tree.unflatten(tree, [next(some) if m else leaf for m, leaf in zip(moves, leaves, strict=True)])
        return loss(learner.predict(params, whole, part.inputs), part.target, where=part.mask)

    moved = [leaf for m, leaf in zip(moves, leaves, strict=True) if m]
    value, grads = jax.value_and_grad(partial(of, task.support))(moved)
    norm = jnp.sqrt(sum((jnp.square(g).sum() for g in grads), start=jnp.zeros(())))
    return value, of(task.query, moved), norm


def _cosine(first: Learner, second: Learner, params: Params, tasks: Task, key: Array) -> float:
    """Cosine of two meta-gradients of the mean loss, over all parameters; for tables, only the rows of these tasks."""
    params, tasks = _touched(second, params, tasks)

    def gradient(learner: Learner) -> list[Array]:
        def mean(params: Params) -> Array:
            return jax.vmap(lambda task: learner.loss(params, task, key)[0])(tasks).mean()

        return jax.tree.leaves(jax.jit(jax.grad(mean))(params))

    a, b = (np.concatenate([np.asarray(g, np.float64).reshape(-1) for g in gradient(each)]) for each in (first, second))
    scale = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / scale if scale > 0 else 1.0


def _touched(learner: Learner, params: Params, tasks: Task) -> tuple[Params, Task]:
    """Tables reduced to the rows of these tasks (row 0 first), with ids to match: no cost of the whole catalogue."""
    parts = [dict(part.inputs) for part in tasks]
    tables = dict(params["tables"])
    for group in rows.groups(learner.tables):
        uses = [(k, c) for k, inputs in enumerate(parts) for c in rows.columns_of(group) if c in inputs]
        ids = np.unique(
            np.concatenate([np.zeros(1, np.int32), *(np.asarray(parts[k][c]).reshape(-1) for k, c in uses)])
        )
        for name in group:
            tables[name] = jnp.take(tables[name], ids, axis=0, mode="clip")  # ids of other columns may be larger
        for k, c in uses:
            parts[k][c] = jnp.asarray(np.searchsorted(ids, np.asarray(parts[k][c])), jnp.int32)
    support, query = (part._replace(inputs=inputs) for part, inputs in zip(tasks, parts, strict=True))
    return {**params, "tables": tables}, Task(support, query)
