"""Metrics of one task: rating errors and ranking quality. The last axis is the list; leading axes are batch axes.

Every function is ``(scores, target, *, where=None, ...) -> [...]``: ``where`` is true (or 1) for an example, and other
slots are ignored. A metric that is undefined (no example; no relevant item) is nan, never 0, so that it can be excluded
from a mean and counted.

Ranking functions read ``target`` as relevance (1 or more is relevant; `at_least` and `top_rated` derive it from
ratings), and take

- ``topn``: length of the list to evaluate; None is the whole list;
- ``scores``: a score that is nan or -inf ranks last, just before padding;
- ``key``: breaks ties between scores at random; without it, the first item wins;
- ``ranks``: 1-based ranks of the examples, if known, in a list that may be longer than the examples; its other items
  count as irrelevant. `ranks_among` computes them, so that a ranking of a whole catalogue costs as much as one of a
  short list.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import rax
from rax.utils import ranks as _rax_ranks

from metarec_jax.core import Array, MetarecError

GAINS: dict[str, Callable[[Array], Array]] = {
    "exp": lambda r: 2.0**r - 1.0,
    "linear": lambda r: r,
    "square": lambda r: jnp.maximum(r * r - 1.0, 0.0),
    "binary": lambda r: jnp.where(r >= 1.0, 1.0, 0.0),
    "scaled": lambda r: jnp.expm1(math.log(2.0) * r),
}
"""Gains of `ndcg` by name: ``exp`` 2^r - 1, ``linear`` r, ``square`` r^2 - 1 (0 for r < 1), ``binary`` 1 if r >= 1,
``scaled`` 2^r - 1 of ratings rescaled by `on_five`, also exact for small ones.

The published gains are for r of 0 or more, and ``exp`` for small r: nDCG is in [0, 1] only if no gain is negative or
infinite. `suitable_gain` chooses a gain for any scale."""
_GAIN_RANGES = {"exp": (0.0, 100.0), "linear": (0.0, 1e30), "square": (0.0, 1e15)}
"""Targets for which a gain is neither negative nor, summed over a list, beyond float32."""


def on_five(target: Array, rating_range: tuple[float, float]) -> Array:
    """Ratings rescaled to 0..5: 0 at the low end of their scale, 5 at the high end.

    >>> on_five(jnp.array([-10.0, 0.0, 10.0]), (-10.0, 10.0))
    Array([0. , 2.5, 5. ], dtype=float32)
    """
    low, high = rating_range
    return 5.0 * ((target - low) / (high - low))


def suitable_gain(rating_range: tuple[float, float]) -> str:
    """The gain for a scale: ``exp`` as published if ratings are within 0 to 5, else ``scaled``.

    >>> [suitable_gain(span) for span in ((1, 5), (0.5, 5), (0, 1), (0.5, 10), (-1, 1), (1, 69_016))]
    ['exp', 'exp', 'exp', 'scaled', 'scaled', 'scaled']
    """
    return "exp" if rating_range[0] >= 0 and rating_range[1] <= 5 else "scaled"


def check_gain(gain: str, lowest: float, highest: float) -> None:
    """Refuse a gain that is unknown, or negative or infinite for targets from ``lowest`` to ``highest``.

    Raises:
      MetarecError: the gain is one of these.
    """
    if gain not in GAINS:
        raise MetarecError(f"gain {gain!r} is not known; use one of {', '.join(GAINS)}")
    low, high = _GAIN_RANGES.get(gain, (-math.inf, math.inf))
    if not (low <= lowest and highest <= high):
        raise MetarecError(
            f"gain {gain!r} expects targets from {low:g} to {high:g}, got {lowest:g} to {highest:g}, for which nDCG is "
            "not within 0 to 1; use gain='scaled', or 'auto'"
        )


def mae(scores: Array, target: Array, *, where: Array | None = None) -> Array:
    """Mean absolute error of each task: ``mean_i |s_i - y_i|``.

    >>> mae(jnp.array([3.0, 5.0]), jnp.array([4.0, 5.0]))
    Array(0.5, dtype=float32)
    """
    return _mean(jnp.abs(scores - target), where)


def squared_error(scores: Array, target: Array, *, where: Array | None = None) -> Array:
    """Mean squared error of each task: ``mean_i (s_i - y_i)^2``.

    The root of its mean over tasks, weighted by their number of examples, is the pooled RMSE of most papers; `rmse`
    differs from it.

    >>> squared_error(jnp.array([3.0, 5.0]), jnp.array([4.0, 5.0]))
    Array(0.5, dtype=float32)
    """
    return _mean(jnp.square(scores - target), where)


def rmse(scores: Array, target: Array, *, where: Array | None = None) -> Array:
    """Root mean squared error of each task: ``sqrt(mean_i (s_i - y_i)^2)``. Its mean over tasks is not the pooled RMSE.

    >>> rmse(jnp.array([[3.0, 5.0], [2.0, 2.0]]), jnp.array([[4.0, 4.0], [2.0, 2.0]]))
    Array([1., 0.], dtype=float32)
    """
    return jnp.sqrt(squared_error(scores, target, where=where))


def ndcg(
    scores: Array,
    target: Array,
    *,
    where: Array | None = None,
    topn: int | None = None,
    gain: str = "exp",
    key: Array | None = None,
    ranks: Array | None = None,
) -> Array:
    """Normalised discounted cumulative gain: ``sum_i gain(y_i) / log2(1 + rank_i)`` over its largest possible value.

    Args:
      scores, target: ``[..., n]``; target is a grade (a rating, or relevance for ``gain="binary"``).
      gain: a name in `GAINS`. The same ranking scores 0.690, 0.739 or 0.845 by this choice: report which one was used.
      where, topn, key, ranks: see the module.

    Returns:
      ``[...]``; nan if no example has a gain.

    Raises:
      MetarecError: the gain is unknown.

    >>> print(f"{ndcg(jnp.array([3.0, 2.0, 1.0]), jnp.array([1.0, 0.0, 1.0]), topn=2):.4f}")  # 1 / (1 + 1 / log2(3))
    0.6131

    Järvelin and Kekäläinen, "Cumulated gain-based evaluation of IR techniques", 2002.
    """
    if gain not in GAINS:
        raise MetarecError(f"gain {gain!r} is not known; use one of {', '.join(GAINS)}")
    where = _all(target) if where is None else where.astype(bool)
    value = rax.ndcg_metric(
        _ordered(scores), target, where=where, topn=topn, key=key, gain_fn=GAINS[gain], reduce_fn=None, **_given(ranks)
    )
    return _known(value, (GAINS[gain](target) > 0) & where)


def precision(
    scores: Array,
    target: Array,
    *,
    where: Array | None = None,
    topn: int | None = None,
    key: Array | None = None,
    ranks: Array | None = None,
    length: Array | int | None = None,
) -> Array:
    """Fraction of the first ``topn`` that is relevant: ``hits / min(topn, n)``, which does not penalise short lists.

    Args:
      length: length of the list of ``ranks``, ``[...]`` or one number; without it, at least ``topn``.

    Raises:
      MetarecError: ``ranks`` is given with neither ``topn`` nor ``length``.

    >>> precision(jnp.array([3.0, 2.0, 1.0]), jnp.array([1.0, 0.0, 1.0]), topn=2)
    Array(0.5, dtype=float32)
    """
    relevant, where = _relevant(target, where)
    if ranks is None:
        value = rax.precision_metric(_ordered(scores), relevant, where=where, topn=topn, key=key, reduce_fn=None)
    else:
        sizes = [size for size in (topn, length) if size is not None]
        if not sizes:
            raise MetarecError("precision with ranks requires topn or length, got neither; pass one of them")
        hits = relevant if topn is None else relevant * (ranks <= topn)
        value = jnp.sum(hits, axis=-1) / jnp.maximum(reduce(jnp.minimum, sizes), 1)
    return _known(value, relevant > 0)


def recall(
    scores: Array,
    target: Array,
    *,
    where: Array | None = None,
    topn: int | None = None,
    key: Array | None = None,
    ranks: Array | None = None,
) -> Array:
    """Fraction of the relevant items that are in the first ``topn``: ``hits / relevant``.

    >>> recall(jnp.array([3.0, 2.0, 1.0]), jnp.array([1.0, 0.0, 1.0]), topn=2)
    Array(0.5, dtype=float32)
    """
    relevant, where = _relevant(target, where)
    value = rax.recall_metric(
        _ordered(scores), relevant, where=where, topn=topn, key=key, reduce_fn=None, **_given(ranks)
    )
    return _known(value, relevant > 0)


def hit_rate(
    scores: Array,
    target: Array,
    *,
    where: Array | None = None,
    topn: int | None = None,
    key: Array | None = None,
    ranks: Array | None = None,
) -> Array:
    """1 if a relevant item is in the first ``topn``, else 0.

    >>> hit_rate(jnp.array([3.0, 2.0, 1.0]), jnp.array([0.0, 0.0, 1.0]), topn=2)
    Array(0., dtype=float32)
    """
    share = recall(scores, target, where=where, topn=topn, key=key, ranks=ranks)
    return jnp.where(jnp.isnan(share), share, jnp.where(share > 0, 1.0, 0.0))


def mrr(
    scores: Array,
    target: Array,
    *,
    where: Array | None = None,
    topn: int | None = None,
    key: Array | None = None,
    ranks: Array | None = None,
) -> Array:
    """Reciprocal rank of the first relevant item, 0 if it is beyond ``topn``.

    >>> mrr(jnp.array([3.0, 2.0, 1.0]), jnp.array([0.0, 1.0, 1.0]))
    Array(0.5, dtype=float32)
    """
    relevant, where = _relevant(target, where)
    value = rax.mrr_metric(_ordered(scores), relevant, where=where, topn=topn, key=key, reduce_fn=None, **_given(ranks))
    return _known(value, relevant > 0)


def average_precision(
    scores: Array,
    target: Array,
    *,
    where: Array | None = None,
    topn: int | None = None,
    key: Array | None = None,
    ranks: Array | None = None,
) -> Array:
    """Mean over ALL relevant items of the precision at their rank, 0 beyond ``topn``. The mean over tasks is MAP.

    >>> print(f"{average_precision(jnp.array([3.0, 2.0, 1.0]), jnp.array([1.0, 0.0, 1.0])):.4f}")  # (1/1 + 2/3) / 2
    0.8333
    """
    relevant, where = _relevant(target, where)
    value = rax.ap_metric(_ordered(scores), relevant, where=where, topn=topn, key=key, reduce_fn=None, **_given(ranks))
    return _known(value, relevant > 0)


def auc(scores: Array, target: Array, *, where: Array | None = None) -> Array:
    """Probability that a relevant item scores above an irrelevant one; a tie counts one half.

    nan if either kind is missing. It costs one sort, and so also suits one pooled list of many thousands.

    >>> auc(jnp.array([3.0, 2.0, 2.0, 1.0]), jnp.array([1.0, 1.0, 0.0, 0.0]))  # (2 + 1.5) / (2 * 2)
    Array(0.875, dtype=float32)
    """
    relevant, where = _relevant(target, where)
    scores, irrelevant = _ordered(scores), jnp.where(where, 1.0 - relevant, 0.0)
    below = jnp.sort(jnp.where(irrelevant > 0, scores, jnp.inf), axis=-1)
    place = lambda side: jnp.vectorize(lambda a, s: jnp.searchsorted(a, s, side=side), signature="(n),(n)->(n)")  # noqa: E731
    count = jnp.sum(irrelevant, axis=-1)
    wins = 0.5 * (place("left")(below, scores) + jnp.minimum(place("right")(below, scores), count[..., None]))
    share = jnp.sum(relevant * wins / jnp.maximum(count, 1)[..., None], axis=-1) / jnp.maximum(relevant.sum(-1), 1)
    return jnp.where((count > 0) & (relevant.sum(-1) > 0), share, jnp.nan)


def ranks_of(scores: Array, *, where: Array | None = None, key: Array | None = None) -> Array:
    """1-based ranks, best first; masked items are last. int32 ``[..., n]``.

    >>> ranks_of(jnp.array([0.1, 0.7, 0.4]))
    Array([3, 1, 2], dtype=int32)
    """
    return _rax_ranks(_ordered(scores), where=None if where is None else where.astype(bool), key=key).astype(jnp.int32)


def ranks_among(scores: Array, where: Array, items: Array, key: Array) -> Array:
    """Ranks of a few items in a long list, without a sort: 1 + the number of items before them.

    Args:
      scores: ``[N]`` of the whole list; where: bool ``[N]``, the items of the list that are ranked.
      items: int32 ``[n]`` positions in the list.
      key: breaks ties at random.

    Returns:
      int32 ``[n]``.

    >>> ranks_among(jnp.array([0.1, 0.7, 0.4, 0.9]), jnp.array([1, 1, 1, 0]) > 0, jnp.array([2, 0]), jax.random.key(0))
    Array([2, 3], dtype=int32)
    """
    scores, draw = _ordered(scores), jax.random.bits(key, scores.shape, jnp.uint32)

    def rank(item: Array) -> Array:
        before = (scores > scores[item]) | ((scores == scores[item]) & (draw > draw[item]))
        return 1 + jnp.sum(before & where, dtype=jnp.int32)

    return jax.lax.map(rank, items)


def of_ranks(
    ranks: Array,
    relevant: Array,
    where: Array,
    length: Array | int,
    topn: Sequence[int],
    *,
    grade: Array | None = None,
    gain: str = "binary",
) -> dict[str, Array]:
    """``ndcg@n``, ``precision@n``, ``recall@n``, ``hit_rate@n``, ``mrr@n`` and ``map@n`` from the ranks of the items.

    Args:
      ranks: int32 ``[..., n]``; relevant, where: ``[..., n]``.
      length: number of ranked items.
      grade: ``[..., n]``, the argument of the ``gain`` of ndcg; None: ``relevant``.

    >>> found = of_ranks(jnp.array([3, 1]), jnp.array([1.0, 0.0]), jnp.ones(2, bool), 5, (1, 3))
    >>> float(found["mrr@1"]), round(float(found["mrr@3"]), 4), float(found["recall@3"])
    (0.0, 0.3333, 1.0)
    """
    scores, grade = -ranks.astype(jnp.float32), relevant if grade is None else grade
    shared: dict[str, Any] = {"where": where, "ranks": ranks}
    found: dict[str, Array] = {}
    for n in topn:
        at = shared | {"topn": n}
        found[f"ndcg@{n}"] = ndcg(scores, grade, gain=gain, **at)
        found[f"precision@{n}"] = precision(scores, relevant, length=length, **at)
        found[f"recall@{n}"] = recall(scores, relevant, **at)
        found[f"hit_rate@{n}"] = hit_rate(scores, relevant, **at)
        found[f"mrr@{n}"] = mrr(scores, relevant, **at)
        found[f"map@{n}"] = average_precision(scores, relevant, **at)
    return found


class Relevant(NamedTuple):
    """Which items of a list count as relevant.

    Attributes:
      name: description, for reports.
      labels: ``labels(target [..., n], where [..., n], key) -> [..., n]``, 1 for relevant, 0 for not.
    """

    name: str
    labels: Callable[[Array, Array, Array], Array]


@lru_cache
def at_least(threshold: float) -> Relevant:
    """Relevant: ``target >= threshold``. For implicit feedback, where a positive is 1, ``at_least(1)``."""

    def labels(target: Array, where: Array, key: Array) -> Array:
        del key
        return jnp.where(where.astype(bool) & (target >= threshold), 1.0, 0.0)

    return Relevant(f"target >= {threshold:g}", labels)


@lru_cache
def top_rated(n: int) -> Relevant:
    """Relevant: the ``n`` highest targets of the list, ties broken at random."""

    def labels(target: Array, where: Array, key: Array) -> Array:
        return jnp.where(where.astype(bool) & (ranks_of(target, where=where, key=key) <= n), 1.0, 0.0)

    return Relevant(f"the {n} highest targets of the list", labels)


def higher_is_better(metric: str) -> bool:
    """Whether a larger value of a metric, named as in a report (``ndcg@5``, ``catalogue_recall@20``), is better."""
    return metric.split("@")[0] not in {"mae", "rmse", "squared_error", "rmse_pooled"}


def _all(target: Array) -> Array:
    return jnp.ones(target.shape, bool)


def _mean(values: Array, where: Array | None) -> Array:
    where = _all(values) if where is None else where.astype(bool)
    count = jnp.sum(where, axis=-1)
    return jnp.where(count > 0, jnp.sum(jnp.where(where, values, 0.0), axis=-1) / jnp.maximum(count, 1), jnp.nan)


def _ordered(scores: Array) -> Array:
    """Scores for sorting before padding, which is -inf: nan and -inf become the lowest finite number."""
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        return scores
    return jnp.where(scores >= jnp.finfo(scores.dtype).min, scores, jnp.finfo(scores.dtype).min)


def _relevant(target: Array, where: Array | None) -> tuple[Array, Array]:
    where = _all(target) if where is None else where.astype(bool)
    return jnp.where(where & (target >= 1), 1.0, 0.0), where


def _known(value: Array, counts: Array) -> Array:
    """nan if nothing is relevant, where rax returns 0."""
    return jnp.where(jnp.any(counts, axis=-1), value, jnp.nan)


def _given(ranks: Array | None) -> dict[str, Any]:
    """Arguments that make rax use the ranks instead of computing them."""
    if ranks is None:
        return {}
    return {
        "rank_fn": lambda scores, **_: ranks,
        "cutoff_fn": lambda minus_ranks, n=None, **_: (
            jnp.ones(minus_ranks.shape, jnp.float32) if n is None else (-minus_ranks <= n).astype(jnp.float32)
        ),
    }
