"""MAML and its variants: gradient steps on the support, and the gradient through them.

Source: Finn, Abbeel and Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", 2017. Variants are
arguments: FOMAML ``first_order=True``; ANIL (Raghu et al. 2020) ``only=`` the last layer; BOIL (Oh et al. 2021)
``only=`` all but the last; MeLU (Lee et al. 2019) ``only=("net",)``; Meta-SGD ``rule=meta_sgd(lr)``; the multi-step
loss of MAML++ (Antoniou et al. 2019) ``per_step_losses=True`` (all of it: `learners.maml_plus_plus`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from metarec_jax import losses, rows, tree
from metarec_jax.core import Array, Examples, Inputs, Learner, MetarecError, Model, Params, Table, Task
from metarec_jax.learners import _low_rank as thin
from metarec_jax.learners._inner import inner as choose
from metarec_jax.learners._inner import loop
from metarec_jax.learners.rules import MakeRule, Rule
from metarec_jax.options import Bounds, bounded


@bounded
def maml(
    model: Model,
    *,
    inner_lr: Annotated[float | None, Bounds(0.0)] = None,
    inner_steps: Annotated[int, Bounds(0)] = 5,
    prior: Annotated[float | None, Bounds(0.0)] = None,
    rule: Rule | MakeRule | None = None,
    loss: Callable[..., Array] = losses.mse,
    only: tuple[str, ...] | None = (),
    first_order: bool = False,
    per_step_losses: bool | Array = False,
    low_rank: bool = True,
    remat: bool = False,
) -> Learner:
    """Meta-train ``model`` so that a few gradient steps on the support predict the query.

    ``loss(task) = L_query(p_k)``, ``p_{j+1} = rule(p_j, grad L_support(p_j))``, differentiated through every step.

    Args:
      inner_lr: initial rate of the inner steps; by default 0.3 where only the model's task parameters adapt (the user's
        row of a dot product), else 0.1.
      inner_steps: number k of gradient steps on the support.
      prior: prior strength, in examples: the loss of n support examples is multiplied by ``n / (n + prior)``, so that
        few examples move a user less than many. 0 is the paper's mean. By default 30 where ``inner_lr`` is 0.3, else 0.
      rule: inner update rule (`learners.rules`), or a function ``rule(inner_lr, inner_steps)`` that makes one; by
        default `meta_sgd` where ``inner_lr`` is 0.3, else `sgd`.
      loss: loss of the support and of the query, ``loss(scores [n], target [n], where=[n]) -> scalar``.
      only: path prefixes of the parameters that adapt, such as ``("net",)`` or
        ``("net/params/out", "tables/user_id")``, in text net/params/out+tables/user_id; () is what the model names
        (`Model.adapts`), None is all.
      first_order: treat the inner gradients as constant (FOMAML).
      per_step_losses: average the query loss over all inner steps instead of taking the last; or weights ``[k]``.
      low_rank: with SGD, keep the change of a dense layer as a product of two thin matrices where that is cheaper
        (`learners._low_rank`); the result is the same up to rounding.
      remat: store only every sqrt(k)-th inner step for the derivative and recompute the others (Chen et al. 2016):
        memory grows with sqrt(k), time by up to a third. Dense layers are then not kept low-rank.

    Returns:
      A learner whose ``adapted`` is what the task moved: ``{"ids": {table: [L]}, "rows": {table: [L, size]},
      "rest": {path: array}}``, with L = 1 + the ids of the support (of the columns of the table's group: `rows.view`).

    Raises:
      MetarecError: ``inner_lr``, ``inner_steps`` or ``prior`` is below 0, the number of weights is not that of the
        steps, or (from ``init``) ``only`` names a parameter that does not exist.

    One user row, one rating of 3, one step with rate 1/8: ``u = 0 -> 0 - 2 (0 - 3) / 8 = 0.75``.

    >>> rows = lambda params, inputs: params["tables"]["user_id"][inputs["user_id"], 0]
    >>> tables = {"user_id": Table(2, 1, ("user_id",))}
    >>> model = Model(lambda key: {"tables": {"user_id": jnp.zeros((2, 1))}}, rows, tables)
    >>> learner = maml(model, inner_lr=0.125, inner_steps=1)
    >>> support = Examples({"user_id": jnp.array([1])}, jnp.array([3.0]), jnp.ones(1))
    >>> params = learner.init(jax.random.key(0))
    >>> adapted = learner.adapt(params, support, jax.random.key(0))
    >>> learner.predict(params, adapted, {"user_id": jnp.array([1, 0])}).tolist()
    [0.75, 0.0]
    """
    weights = None if isinstance(per_step_losses, bool) else jnp.asarray(per_step_losses)
    if weights is not None and weights.shape != (inner_steps,):
        raise MetarecError(
            f"maml: per_step_losses must have one weight for each of {inner_steps} steps, got shape {weights.shape}; "
            "correct it"
        )
    every_step = inner_steps > 0 and per_step_losses is not False
    inner, only, prior, _ = choose(model, lr=inner_lr, steps=inner_steps, prior=prior, rule=rule, only=only)
    adapted_tables = {
        name: table._replace(adapted=only is None or any(_covers(p, f"tables/{name}") for p in only))
        for name, table in model.tables.items()
    }
    moving_tables = {name: table for name, table in adapted_tables.items() if table.adapted}
    seen_tables = rows.linked(adapted_tables, moving_tables)

    def init(key: Array) -> Params:
        params = model.init(key)
        return {**params, "rule": inner.init(tree.partition(params, only)[0])}

    def shrunk_loss(scores: Array, support: Examples) -> Array:
        value, n = loss(scores, support.target, where=support.mask), support.mask.sum()
        return value * n / (n + prior) if prior else value

    def inner_loop(params: Params, support: Examples, visit: Callable[[Params], Array] | None) -> tuple[Params, Array]:
        """The parameters after the last step, and the values of ``visit`` at the parameters after each step."""
        body = {name: part for name, part in params.items() if name != "rule"}
        moving, _ = tree.partition(body, only)

        def support_loss(moving: dict[str, Array]) -> Array:
            return shrunk_loss(model.apply(tree.merge(body, moving), support.inputs), support)

        def step(carry: Any, _: None) -> tuple[Any, Array]:
            moving, state = carry
            value, grads = jax.value_and_grad(support_loss)(moving)
            if first_order:
                value, grads = jax.lax.stop_gradient((value, grads))
            extra = (value,) if inner.sees_loss else ()
            moving, state = inner.update(params["rule"], grads, state, moving, *extra)
            return (moving, state), jnp.zeros(()) if visit is None else visit(tree.merge(body, moving))

        start = (moving, inner.start(params["rule"], moving))
        (moving, _), seen = loop(step, start, inner_steps, remat=remat)
        return tree.merge(body, moving), seen

    def together(seen: Array) -> tuple[Array, dict[str, Array]]:
        return seen.mean() if weights is None else jnp.vdot(weights, seen), {"query_loss": seen[-1]}

    def meta_loss(params: Params, task: Task, key: Array) -> tuple[Array, dict[str, Array]]:
        def query_loss(body: Params) -> Array:
            return loss(model.apply(body, task.query.inputs), task.query.target, where=task.query.mask)

        if low_rank and not remat and inner.lr is not None and (after := thin_steps(params, task)):
            return together(jnp.stack([loss(scores, task.query.target, where=task.query.mask) for scores in after]))
        if every_step:
            return together(inner_loop(params, task.support, query_loss)[1])
        value = query_loss(inner_loop(params, task.support, None)[0])
        return value, {"query_loss": value}

    def thin_steps(params: Params, task: Task) -> list[Array]:
        """Query scores after the last step (with ``per_step_losses`` after each); empty where this form costs more."""
        body = {name: part for name, part in params.items() if name != "rule"}
        moving, _ = tree.partition(body, only)
        apply = lambda moving, body, inputs: model.apply(tree.merge(body, moving), inputs)  # noqa: E731
        programs = [thin.trace(apply, moving, body, part.inputs) for part in task]
        low = thin.worth(programs[0], inner_steps) & {site.leaf for site in programs[1].sites}
        if not low:
            return []
        support, query = (
            thin.fix(program, low, moving, body, part.inputs) for program, part in zip(programs, task, strict=True)
        )
        after = thin.steps(
            support,
            {name: leaf for name, leaf in moving.items() if name not in low},
            lambda scores: shrunk_loss(scores, task.support),
            lr=inner.lr or 0.0,
            count=inner_steps,
            first_order=first_order,
        )
        return [thin.run(query, *adapted)[0] for adapted in (after if every_step else after[-1:])]

    def adapt(params: Params, support: Examples, key: Array) -> dict[str, Any]:
        seen = rows.view(seen_tables, support.inputs)
        local = {**params, "tables": {**params["tables"], **rows.gather(params["tables"], seen.ids)}}
        moved, _ = inner_loop(local, support._replace(inputs=seen.inputs[0]), None)
        moving, _ = tree.partition({k: v for k, v in moved.items() if k != "rule"}, only)
        return {
            "ids": {name: seen.ids[name] for name in moving_tables},
            "rows": {name: moved["tables"][name] for name in moving_tables},
            "rest": {name: leaf for name, leaf in moving.items() if not name.startswith("tables/")},
        }

    def predict(params: Params, adapted: dict[str, Any], inputs: Inputs) -> Array:
        return model.apply(*laid_over(params, adapted, inputs, seen_tables))

    return Learner(init, adapt, predict, meta_loss, adapted_tables)


def laid_over(
    params: Params, adapted: dict[str, Any], inputs: Inputs, tables: Mapping[str, Table]
) -> tuple[Params, Inputs]:
    """Meta-parameters overlaid with a task's moved rows and dense parameters, and ``inputs`` that index them.

    ``tables`` are those whose rows the task moves, and those that share columns with them.
    """
    seen = rows.view({name: table._replace(adapted=False) for name, table in tables.items()}, inputs)
    whole, moved = params["tables"], adapted["rows"]
    laid = {
        name: rows.overlay(whole[name], adapted["ids"][name], moved[name], ids) if name in moved else whole[name][ids]
        for name, ids in seen.ids.items()
    }
    rest = {k: v for k, v in params.items() if k not in ("tables", "rule")}
    return {**tree.merge(rest, adapted["rest"]), "tables": {**whole, **laid}}, seen.inputs[0]


def _covers(prefix: str, name: str) -> bool:
    return prefix in (name, name.split("/")[0])
