"""Gradient steps on dense layers without a copy of the layer for each task.

A gradient step on a kernel ``W [in, out]`` from n examples changes it by a matrix of rank n, ``-lr X' G``, with the
layer's inputs ``X [n, in]`` and the gradients of its outputs ``G [n, out]``. So the adapted layer is

``x W_k = x W + sum_j (x A_j') B_j``,  ``A_j = X_j``, ``B_j = -lr G_j``

where ``W`` is shared by all tasks (one large product for the whole batch) and the sum is small. Where the layer's
inputs do not change while the task adapts, ``A`` is the same in every step and the rank stays n. The result is that of
the plain inner loop, to rounding; so is its derivative, which passes through ``A`` and ``B``.

It works on the jaxpr of a model's ``apply``, whatever library the layers come from. A matrix adapts in the plain way if
it, or a slice of its rows, is used other than as the right side of a product ``[n, in] @ [in, out]``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metarec_jax import jax_private
from metarec_jax.core import Array, Inputs

Apply = Callable[[dict[str, Array], Any, Inputs], Array]
"""``apply(moving, fixed, inputs) -> scores [n]``; ``moving`` holds the parameters that adapt, by path."""


class Op(NamedTuple):
    """One primitive; inputs and outputs are names of values, or constants."""

    eqn: Any
    inputs: tuple[Any, ...]
    outputs: tuple[int, ...]


class Constant(NamedTuple):
    value: Any


class Site(NamedTuple):
    """A product ``x @ leaf[start:stop]``: where a low-rank change is added.

    Attributes:
      op: index of the product among the program's ops.
      x: name of its left side ``[n, in]``.
      rows: n.
      fixed: whether x is independent of the parameters that adapt.
    """

    op: int
    x: int
    leaf: str
    start: int
    stop: int
    units: int
    rows: int
    fixed: bool


class Program(NamedTuple):
    """A model on inputs of one shape: a list of primitives without nested jits."""

    ops: tuple[Op, ...]
    arguments: tuple[int, ...]
    moving: dict[str, int]
    output: Any
    sites: tuple[Site, ...]
    depends: frozenset[int]


LONGEST = 8
"""Largest number of inner steps that are kept low-rank."""


class Change(NamedTuple):
    """A change by ``a' b`` of rows ``start:stop`` of a matrix; a ``[r, stop - start]``, b ``[r, out]``."""

    start: int
    stop: int
    a: Array
    b: Array


def trace(apply: Apply, moving: Mapping[str, Array], fixed: Any, inputs: Inputs) -> Program:
    """The program of ``apply``, with every product in which a matrix of ``moving`` is the right side."""
    closed = jax.make_jaxpr(apply)(dict(moving), fixed, dict(inputs))
    names = itertools.count()
    arguments = tuple(next(names) for _ in closed.jaxpr.invars)
    ops: list[Op] = []
    (output,) = _inline(closed, arguments, names, ops)
    leaves = dict(zip(sorted(moving), arguments[: len(moving)], strict=True))
    depends = set(leaves.values())
    for op in ops:
        if any(name in depends for name in op.inputs if isinstance(name, int)):
            depends.update(op.outputs)
    sites = _sites(ops, {name: (leaf, moving[leaf].shape) for leaf, name in leaves.items()}, depends)
    return Program(tuple(ops), arguments, leaves, output, tuple(sites), frozenset(depends))


def _inline(closed: Any, arguments: Sequence[Any], names: Any, ops: list[Op]) -> list[Any]:
    """Append the ops of a jaxpr, with nested jits inlined; returns the names of its outputs."""
    values: dict[Any, Any] = dict(zip(closed.jaxpr.invars, arguments, strict=True))
    values |= dict(zip(closed.jaxpr.constvars, map(Constant, closed.consts), strict=True))

    def name(atom: Any) -> Any:
        return Constant(atom.val) if jax_private.is_literal(atom) else values[atom]

    for eqn in closed.jaxpr.eqns:
        inputs = tuple(name(atom) for atom in eqn.invars)
        if eqn.primitive.name in ("jit", "pjit"):
            outputs = _inline(eqn.params["jaxpr"], inputs, names, ops)
        else:
            outputs = [next(names) for _ in eqn.outvars]
            ops.append(Op(eqn, inputs, tuple(outputs)))
        values |= dict(zip(eqn.outvars, outputs, strict=True))
    return [name(atom) for atom in closed.jaxpr.outvars]


def _sites(ops: Sequence[Op], leaves: dict[int, tuple[str, tuple[int, ...]]], depends: set[int]) -> list[Site]:
    """Products with a matrix that adapts, for matrices that are used in no other way."""
    parts = {name: (leaf, 0, shape[0]) for name, (leaf, shape) in leaves.items() if len(shape) == 2}
    products: list[Site] = []
    used_otherwise: set[str] = set()
    for k, op in enumerate(ops):
        for place, name in enumerate(op.inputs):
            if not isinstance(name, int) or name not in parts:
                continue
            leaf, start, stop = parts[name]
            x = op.inputs[0]
            if op.eqn.primitive.name == "slice" and _takes_rows(op.eqn):
                low, high = op.eqn.params["start_indices"][0], op.eqn.params["limit_indices"][0]
                parts[op.outputs[0]] = leaf, start + low, start + high
            elif place == 1 and isinstance(x, int) and x not in parts and _is_product(op.eqn):
                rows, units = op.eqn.outvars[0].aval.shape
                products.append(Site(k, x, leaf, start, stop, units, rows, x not in depends))
            else:
                used_otherwise.add(leaf)
    return [site for site in products if site.leaf not in used_otherwise]


def _takes_rows(eqn: Any) -> bool:
    (shape,) = (atom.aval.shape for atom in eqn.invars)
    low, high = eqn.params["start_indices"], eqn.params["limit_indices"]
    return eqn.params["strides"] is None and low[1] == 0 and high[1] == shape[1]


def _is_product(eqn: Any) -> bool:
    return (
        eqn.primitive.name == "dot_general"
        and eqn.params["dimension_numbers"] == (((1,), (0,)), ((), ()))
        and eqn.invars[0].aval.ndim == 2
    )


def worth(program: Program, steps: int) -> frozenset[str]:
    """The matrices for which the low-rank form is cheaper: ``r (in + out) < 2 in out``, averaged over the steps.

    The factor is 2 because a product with a task's own matrix took about twice the time of an equal share of one common
    product. Empty beyond `LONGEST` steps: they are traced one by one, and compiling 50 of them took minutes.
    """
    if steps > LONGEST:
        return frozenset()
    cost: dict[str, list[int]] = {}
    for site in program.sites:
        rank = site.rows * (1 if site.fixed else (steps + 1) // 2)
        entry = cost.setdefault(site.leaf, [0, 0])
        entry[0] += site.rows * rank * (site.stop - site.start + site.units)
        entry[1] += site.rows * (site.stop - site.start) * site.units
    return frozenset(leaf for leaf, (low, dense) in cost.items() if low < 2 * dense)


class Evaluated(NamedTuple):
    """A program with the values computed that do not change while the task adapts; sites by op, values by name."""

    program: Program
    sites: dict[int, Site]
    values: dict[int, Any]


def fix(program: Program, low: frozenset[str], moving: Mapping[str, Array], fixed: Any, inputs: Inputs) -> Evaluated:
    """Evaluate all values that are independent of the adapting parameters, and products with a low-rank start."""
    values = dict(zip(program.arguments, jax.tree.leaves((dict(moving), fixed, dict(inputs))), strict=True))
    sites = {site.op: site for site in program.sites if site.leaf in low}
    start = {program.moving[leaf] for leaf in low}  # these values never change: a change is added to the product
    constant = {name for name in values if name not in program.depends} | start
    for k, op in enumerate(program.ops):
        if op.outputs and all(not isinstance(name, int) or name in constant for name in op.inputs):
            _evaluate(op, values)
            if k not in sites:
                constant.update(op.outputs)
            else:
                values[op.outputs[0]] = jax.lax.optimization_barrier(values[op.outputs[0]])
    for name in set(values) - constant - {site_output for k in sites for site_output in program.ops[k].outputs}:
        del values[name]
    return Evaluated(program, sites, values)


def run(
    evaluated: Evaluated,
    dense: Mapping[str, Array],
    changes: Mapping[str, Sequence[Change]],
    probes: Mapping[int, Array] | None = None,
) -> tuple[Array, dict[int, Array]]:
    """Scores under changed parameters, and the input of each site.

    Args:
      dense: the parameters that adapt in the plain way.
      changes: changes of each low-rank matrix; of their rows only those count that a product uses.
      probes: arrays added to the outputs of the sites: their gradients are those of the layer's outputs.
    """
    program, values = evaluated.program, dict(evaluated.values)
    values |= {program.moving[leaf]: value for leaf, value in dense.items()}
    inputs: dict[int, Array] = {}
    for k, op in enumerate(program.ops):
        site = evaluated.sites.get(k)
        if not op.outputs or op.outputs[0] not in values:
            _evaluate(op, values)
            if site is not None:
                values[op.outputs[0]] = jax.lax.optimization_barrier(values[op.outputs[0]])
        if site is None:
            continue
        (out,) = op.outputs
        x = inputs[k] = values[site.x]
        product = partial(jnp.matmul, precision=op.eqn.params["precision"])
        for change in changes.get(site.leaf, ()):
            low, high = max(site.start, change.start), min(site.stop, change.stop)
            if low < high:
                part_x = x[:, low - site.start : high - site.start]
                part_a = change.a[:, low - change.start : high - change.start]
                values[out] = values[out] + product(product(part_x, part_a.T), change.b)
        if probes is not None:
            values[out] = values[out] + probes[k]
    output = program.output
    return (output.value if isinstance(output, Constant) else values[output]), inputs


def _evaluate(op: Op, values: dict[int, Any]) -> None:
    arguments = [name.value if isinstance(name, Constant) else values[name] for name in op.inputs]
    for name, value in zip(op.outputs, jax_private.evaluated(op.eqn, arguments), strict=True):
        values[name] = value


class Adapted(NamedTuple):
    """Parameters after some steps: ``dense`` in full, the others by their ``changes``."""

    dense: dict[str, Array]
    changes: dict[str, list[Change]]


def steps(
    evaluated: Evaluated,
    dense: dict[str, Array],
    support_loss: Callable[[Array], Array],
    *,
    lr: float,
    count: int,
    first_order: bool = False,
) -> list[Adapted]:
    """The parameters after each of ``count`` gradient steps on ``support_loss(scores)``."""
    program = evaluated.program
    shapes = {k: program.ops[k].eqn.outvars[0].aval for k in evaluated.sites}
    probes = {k: jnp.zeros(a.shape, a.dtype) for k, a in shapes.items()}
    grown: dict[int, Change] = {}
    seen: list[Adapted] = []

    def changes() -> dict[str, list[Change]]:
        by_leaf: dict[str, list[Change]] = {}
        for k, change in grown.items():
            by_leaf.setdefault(evaluated.sites[k].leaf, []).append(change)
        return by_leaf

    for _ in range(count):
        now = changes()

        def objective(dense: dict[str, Array], probes: dict[int, Array], now: Any = now) -> Any:
            scores, inputs = run(evaluated, dense, now, probes)
            return support_loss(scores), inputs

        grads, inputs = jax.grad(objective, (0, 1), has_aux=True)(dense, probes)
        if first_order:
            grads, inputs = jax.lax.stop_gradient((grads, inputs))
        dense = jax.tree.map(lambda p, g: p - lr * g, dense, grads[0])
        for k, site in evaluated.sites.items():
            a, b = inputs[k], -lr * grads[1][k]
            if k in grown:
                before = grown[k]
                a = before.a if site.fixed else jnp.concatenate([before.a, a])
                b = before.b + b if site.fixed else jnp.concatenate([before.b, b])
            grown[k] = Change(site.start, site.stop, a, b)
        seen.append(Adapted(dense, changes()))
    return seen
