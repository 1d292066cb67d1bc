"""The inner loop of all learners that take gradient steps, and what its steps do by default.

Where a task moves only what the model names for it (`core.Model.adapts`: the user's row of a dot product), a context or
a head, each number has a learned rate (`meta_sgd`) that starts at 0.3, and the loss of n support examples is multiplied
by ``n / (n + 30)``: chosen on validation users (docs/decisions.md). All else moves by plain gradient steps at 0.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metarec_jax.core import Array, Model
from metarec_jax.learners.rules import MakeRule, Rule, meta_sgd, sgd

PRIOR = 30.0
"""Number of support examples at which a step has half of its full length."""


class Inner(NamedTuple):
    """How a task adapts: the rule, the paths that adapt (None: all), the prior in examples, and the initial rate."""

    rule: Rule
    only: tuple[str, ...] | None
    prior: float
    lr: float


def inner(
    model: Model,
    *,
    lr: float | None,
    steps: int,
    prior: float | None = None,
    rule: Rule | MakeRule | None = None,
    only: Sequence[str] | None = (),
    alone: bool = False,
) -> Inner:
    """The arguments of a learner, with defaults where they are None.

    Args:
      lr, prior, rule: None for the default; a function is called as ``rule(lr, steps)``.
      only: () for what the model names, None for everything.
      alone: whether only small parameters of the task itself adapt (a context, a head), whatever ``only`` says.
    """
    chosen = model.adapts if only is not None and not tuple(only) else only
    paths = None if chosen is None else tuple(chosen)
    alone = alone or (paths is not None and paths == model.adapts)
    rate = lr if lr is not None else 0.3 if alone else 0.1
    make: MakeRule = (lambda lr, steps: meta_sgd(lr)) if alone else (lambda lr, steps: sgd(lr))
    made = rule if isinstance(rule, Rule) else (make if rule is None else rule)(rate, steps)
    return Inner(made, paths, prior if prior is not None else PRIOR if alone else 0.0, rate)


Step = Callable[[Any, None], tuple[Any, Array | None]]
"""``step(carry, None) -> (carry, seen)``: one inner step, and what is to be kept of it."""
_UNROLL_UP_TO = 5


def loop(step: Step, start: Any, steps: int, *, remat: bool = False) -> tuple[Any, Any]:
    """The carry after ``steps`` inner steps, and what each of them showed.

    A few steps are unrolled, which is faster; more are a loop, so that the program does not grow with them.

    Args:
      remat: keep every sqrt(steps)-th carry for the derivative, and go through the steps between a second time.
    """
    if not remat:
        return jax.lax.scan(step, start, None, length=steps, unroll=max(steps, 1) if steps <= _UNROLL_UP_TO else 1)
    size = max(1, round(steps**0.5))
    segment = jax.checkpoint(lambda carry, _: loop(step, carry, size), prevent_cse=False)
    carry, seen = jax.lax.scan(segment, start, None, length=steps // size)
    carry, rest = loop(step, carry, steps % size)
    return carry, jnp.concatenate([seen.reshape(-1), rest])
