"""From the options of a run to the learners that take gradient steps on the support."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metarec_jax.config import LearnerConfig
    from metarec_jax.core import Array, Learner, Model

STEPPERS = ("maml", "reptile", "imaml", "cavia", "protomaml")
"""Learners whose parameters serve any number of inner steps, none included."""
PRIOR = 30.0
"""Of inner steps on a user's row, context or head alone, in examples: see `learners.maml`."""
FIRST_ORDER_SHARE = 0.3
"""Of the outer steps of maml_plus_plus, taken with inner gradients for constants if ``first_order``."""


def build_gradient(given: LearnerConfig, model: Model, loss: Callable[..., Array], *, dot: bool) -> Learner:
    """The learner of `STEPPERS`, or "maml_plus_plus"; ``dot``: the model is a dot product with a user's row."""
    import optax

    from metarec_jax import learners

    only = {(): ("tables/user_id",) if dot else None, ("all",): None}.get(given.only, given.only)
    alone = only == ("tables/user_id",) or given.name in ("cavia", "protomaml")
    rate = inner_rate(given, dot=dot)
    of: dict[str, Any] = {"inner_steps": given.inner_steps, "loss": loss}
    if given.name == "imaml":  # it holds parameters at their start by ``proximal``
        return learners.imaml(model, inner_lr=rate, proximal=given.proximal, only=only, **of)
    of["prior"] = PRIOR if alone else 0.0
    if given.name == "maml_plus_plus":
        until = FIRST_ORDER_SHARE if given.first_order else 0.0
        return learners.maml_plus_plus(
            model, inner_lr=rate, only=only, remat=given.remat, first_order_until=until, **of
        )
    rules = {
        "sgd": lambda: learners.sgd(rate),
        "meta_sgd": lambda: learners.meta_sgd(rate),
        "lslr": lambda: learners.lslr(rate, max(given.inner_steps, 1)),
        "meta_curvature": lambda: learners.meta_curvature(rate),
        "lstm": lambda: learners.lstm(rate),
        "adam": lambda: learners.from_optax(optax.adam(rate, eps_root=1e-8)),
    }
    of["rule"] = rules[given.rule if given.rule != "auto" else "meta_sgd" if alone else "sgd"]()
    if given.name == "reptile":
        return learners.reptile(model, only=only, **of)
    of["first_order"] = given.first_order
    if given.name == "cavia":
        return learners.cavia(model, size=given.context, **of)
    if given.name == "protomaml":
        return learners.protomaml(model, only=("tables", "net") if given.only == ("all",) else given.only, **of)
    return learners.maml(model, only=only, per_step_losses=given.per_step_losses, remat=given.remat, **of)


def inner_rate(given: LearnerConfig, *, dot: bool) -> float:
    """The inner rate, as configured or by what adapts; `build_gradient` has the arguments."""
    alone = given.only == ("tables/user_id",) or (given.only == () and dot) or given.name in ("cavia", "protomaml")
    return given.inner_lr if given.inner_lr is not None else 0.3 if alone else 0.1


def with_inner_steps(given: LearnerConfig, steps: int, *, first_order: bool = False) -> LearnerConfig | None:
    """A learner that adapts by ``steps`` inner steps from the parameters that ``given`` trains; None where none does.

    Reptile adapts as `maml` does, and so does maml_plus_plus, with a rate a step; parameters beyond those of `maml`
    (`learners.maml_plus_plus.CLOCK`) are to be left out.
    """
    if given.name not in (*STEPPERS, "maml_plus_plus"):
        return None
    name = "maml" if given.name in ("reptile", "maml_plus_plus") else given.name
    rule = "lslr" if given.name == "maml_plus_plus" else given.rule
    return dataclasses.replace(
        given, name=name, rule=rule, inner_steps=steps, first_order=first_order, per_step_losses=False
    )
