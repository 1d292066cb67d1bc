"""The best items of a whole catalogue for one user or a batch: compiled programs on arrays.

First a screen computes the highest score of each block of items. The best n items are in the n blocks with the highest
maxima, so only those blocks are scored again, exactly, and sorted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metarec_jax.core import Array, Examples, Table
from metarec_jax.data.catalogue import Catalogue, inputs
from metarec_jax.serving import linear

_BLOCKS = (8, 256)
"""Minimum and maximum number of items per block."""


class Plan(NamedTuple):
    """The static arguments of a compiled program.

    Attributes:
      adapt, predict: functions of the method.
      n: number of items to return.
      chunk: items scored per step; a smaller catalogue is scored at once.
      tables: tables of `linear.item_tables`; if empty, `predict` scores the catalogue chunk by chunk.
      unseen: whether some items have table row 0.
    """

    adapt: Callable[..., Any]
    predict: Callable[..., Array]
    n: int
    chunk: int
    tables: tuple[tuple[str, Table], ...] = ()
    unseen: bool = True


class Users(NamedTuple):
    """Supports of B users ``[B, S]``, in vocabulary rows; the first ``given`` ``[B]`` items are not recommended."""

    item: Any
    target: Any
    mask: Any
    given: Any


class Best(NamedTuple):
    """Best items of each user ``[B, n]``: vocabulary rows, scores (-inf past the end), scores with no feedback."""

    item: Any
    score: Any
    prior: Any


class _World(NamedTuple):
    """The arguments for scoring a user; ``features`` are those of the user, with leading axis 1.

    ``allowed``: bool ``[rows]``, the items that may be recommended; None for all.
    """

    params: Any
    known: Catalogue
    features: dict[str, Array]
    key: Array
    allowed: Array | None = None

    def columns(self, rows: Array) -> dict[str, Array]:
        return {**inputs(self.known, jnp.int32(0), rows), **self.features}


def block_size(num_rows: int, wanted: int) -> int:
    """Items per block, a power of two, such that the maxima of all blocks and the items of ``wanted`` blocks are few.

    >>> block_size(1_000_001, 26), block_size(4000, 26)
    (128, 8)
    """
    low, high = _BLOCKS
    return max(low, min(high, 1 << int(math.log2(max(1.0, math.sqrt(num_rows / wanted))))))


@partial(jax.jit, static_argnums=0)
def best(
    plan: Plan,
    params: Any,
    known: Catalogue,
    features: dict[str, Array],
    users: Users,
    key: Array,
    allowed: Array | None = None,
) -> Best:
    """The best ``plan.n`` items for each user.

    Args:
      features: the users' side features, leading axis B.
      allowed: bool ``[rows]``, the items that may be recommended; None for all.
    """
    alone = users.item.shape[0] == 1

    def one(user: Users, features: dict[str, Array]) -> Best:
        return _best(plan, _World(params, known, _one_row(features), key, allowed), user, alone)

    if alone:
        return jax.tree.map(lambda a: a[None], one(*jax.tree.map(lambda a: a[0], (users, features))))
    return jax.vmap(one)(users, features)


def _one_row(features: dict[str, Array]) -> dict[str, Array]:
    """One user's features with a leading axis of 1, as input columns have it."""
    return {name: jnp.asarray(value)[None] for name, value in features.items()}


def _best(plan: Plan, world: _World, user: Users, alone: bool) -> Best:
    num_rows, slots = world.known.item_row.shape[0], user.item.shape[0]
    examples = Examples(world.columns(user.item), user.target, user.mask)
    adapted = plan.adapt(world.params, examples, world.key)

    def score(rows: Array) -> Array:
        values = plan.predict(world.params, adapted, world.columns(rows))
        out = jnp.isnan(values) if world.allowed is None else jnp.isnan(values) | ~world.allowed[rows]
        return jnp.where(out, -jnp.inf, values)

    wanted = plan.n + slots  # a support item may be the highest of a block and be excluded, or be changed by adaptation
    size = block_size(num_rows, wanted)
    blocks = jnp.arange(-(-num_rows // size), dtype=jnp.int32)
    if num_rows > plan.chunk and wanted < blocks.shape[0]:
        maxima = _screen(plan, world, examples, score, size, alone)
        blocks = jnp.sort(jax.lax.top_k(maxima, wanted)[1])
    rows = (blocks[:, None] * size + jnp.arange(size, dtype=jnp.int32)[None]).reshape(-1)
    inside = (rows > 0) & (rows < num_rows)
    rows = jnp.where(inside, rows, 0)
    scores = jnp.where(inside, score(rows), -jnp.inf)
    # The position of each support item among the candidates; one outside is an additional candidate, unless dropped.
    block_of = user.item[:, None] // size == blocks[None, :]
    inside_blocks = block_of.any(1)
    place = jnp.where(inside_blocks, jnp.argmax(block_of, axis=1) * size + user.item % size, rows.shape[0])
    dropped = (jnp.arange(slots) < user.given) | (user.item == 0)
    scores = scores.at[jnp.where(dropped, place, rows.shape[0])].set(-jnp.inf, mode="drop")
    own = jnp.where(dropped | inside_blocks, -jnp.inf, score(user.item))
    top, at = jax.lax.top_k(jnp.concatenate([scores, own]), plan.n)
    item = jnp.concatenate([rows, user.item])[at]
    empty = plan.adapt(world.params, examples._replace(mask=jnp.zeros_like(user.mask)), world.key)
    return Best(item, top, plan.predict(world.params, empty, world.columns(item)))


def _screen(
    plan: Plan, world: _World, support: Examples, score: Callable[[Array], Array], size: int, alone: bool
) -> Array:
    """The highest score of each block of ``size`` items; scores of support items may be those before adaptation."""
    num_rows = world.known.item_row.shape[0]
    form = None
    if plan.tables:
        form = linear.linear(plan.adapt, plan.predict, world.params, dict(plan.tables), support, world.key)
    if form is None:

        def part(first: Array | int, count: int) -> Array:
            rows = first + jnp.arange(count, dtype=jnp.int32)
            return jnp.where(rows > 0, score(rows), -jnp.inf)

        return _maxima(part, num_rows, size, plan.chunk)

    def product(first: Array | int, count: int) -> Array:
        def cut(table: Array) -> Array:
            return table if count == num_rows else jax.lax.dynamic_slice_in_dim(table, first, count)

        values = sum(
            jnp.dot(cut(world.params["tables"][name]), weights, precision=jax.lax.Precision.HIGHEST)[:count]
            for name, weights in form.weights.items()
        )
        if plan.unseen:
            values = jnp.where(cut(world.known.item_row) == 0, form.unknown, values + form.known)
        out = jnp.isnan(values) if world.allowed is None else jnp.isnan(values) | ~cut(world.allowed)
        return jnp.where(out, -jnp.inf, values)

    # One product over the whole table reads it once; a chunk is a copy, which pays if many users share it.
    return _maxima(product, num_rows, size, num_rows if alone else plan.chunk)


def _maxima(part: Callable[[Array | int, int], Array], num_rows: int, size: int, chunk: int) -> Array:
    """Maxima of blocks of ``size`` of the scores ``part(first, count) -> [count]``, in chunks of about ``chunk``."""

    def of(scores: Array) -> Array:
        whole = scores.shape[0] // size * size
        maxima = scores[:whole].reshape(-1, size).max(1)
        return maxima if whole == scores.shape[0] else jnp.append(maxima, scores[whole:].max())

    chunk = min(-(-chunk // size) * size, num_rows)
    count = num_rows // chunk
    if count <= 1:
        head = [of(part(0, chunk))]
    else:
        firsts = jnp.arange(count, dtype=jnp.int32) * chunk
        head = [jax.lax.map(lambda first: of(part(first, chunk)), firsts).reshape(-1)]
    rest = num_rows - count * chunk
    return jnp.concatenate([*head, of(part(count * chunk, rest))] if rest else head)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def contributions(
    adapt: Any,
    predict: Any,
    implicit: bool,
    points: int,
    params: Any,
    known: Catalogue,
    features: dict[str, Array],
    users: Users,
    item: Array,
    key: Array,
) -> Array:
    """Contributions of the support to the scores of ``item [B, n]``, ``[B, n, S]``, from ``points`` derivatives.

    Those of the targets, or, for ``implicit`` feedback, of the weights: at the weights themselves, or at several points
    between no weight and them.
    """

    def one(user: Users, item: Array, features: dict[str, Array]) -> Array:
        world = _World(params, known, _one_row(features), key)
        examples = Examples(world.columns(user.item), user.target, user.mask)

        def scores(target: Array, mask: Array) -> Array:
            adapted = adapt(params, Examples(examples.inputs, target, mask), key)
            return predict(params, adapted, world.columns(item))

        if implicit:
            by_weight = jax.jacrev(scores, 1)
            if points == 1:
                return by_weight(user.target, user.mask) * user.mask[None]
            shares = (jnp.arange(points) + 0.5) / points
            return (
                jax.lax.map(lambda share: by_weight(user.target, share * user.mask), shares).mean(0) * user.mask[None]
            )
        empty = adapt(params, examples._replace(mask=jnp.zeros_like(user.mask)), key)
        moved = (user.target - predict(params, empty, examples.inputs)) * user.mask
        slope = jax.jacrev(scores, 0)
        if points == 1:
            return slope(user.target, user.mask) * moved[None]
        left = 1.0 - (jnp.arange(points) + 0.5) / points
        along = jax.lax.map(lambda part: slope(user.target - part * moved, user.mask), left)
        return along.mean(0) * moved[None]

    return jax.vmap(one)(users, item, features)


@partial(jax.jit, static_argnums=(0, 1))
def predictions_of(
    adapt: Any,
    predict: Any,
    params: Any,
    known: Catalogue,
    features: dict[str, Array],
    users: Users,
    item: Array,
    key: Array,
) -> Array:
    """What ``predict`` gives for ``item [B, n]`` after each user's support, ``[B, n]``."""

    def one(user: Users, item: Array, features: dict[str, Array]) -> Array:
        world = _World(params, known, _one_row(features), key)
        adapted = adapt(params, Examples(world.columns(user.item), user.target, user.mask), key)
        return predict(params, adapted, world.columns(item))

    return jax.vmap(one)(users, item, features)
