"""Evaluation: every method on the same tasks, the same ties, the same resamples.

`evaluate` runs ``adapt`` and ``predict`` of each method on each task, with the whole support, with none of it, and with
its first k examples where a curve is asked for, and returns a `metarec_jax.evaluation.results.Report`.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix, vstack

from metarec_jax.core import Array, MetarecError, Method, Task
from metarec_jax.cpu import runs_together
from metarec_jax.data.catalogue import Catalogue, check_method
from metarec_jax.data.tasks import TaskSet, batches, check_tasks
from metarec_jax.evaluation import metrics
from metarec_jax.evaluation.results import ALL, FACTS, Report
from metarec_jax.evaluation.scoring import (
    Ranked,
    adapt_each,
    batch_size,
    compiled,
    predict_each,
    query_ranks,
    user_blocks,
)

_LISTS_AT_ONCE = 2048


def evaluate(
    methods: Mapping[str, Method],
    tasks: Mapping[str, TaskSet],
    known: Catalogue,
    *,
    rating_range: tuple[float, float] | None = None,
    gain: str = "auto",
    topn: Sequence[int] = (1, 3, 5, 10),
    relevant: float | metrics.Relevant = 4.0,
    catalogue_ranking: bool = False,
    catalogue_topn: Sequence[int] = (10, 20),
    curve: Sequence[int] | None = None,
    baselines: Collection[str] = (),
    ranking_only: Collection[str] = (),
    seed: int = 0,
    batch: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Adapt and predict every task with every method, and compute the metrics.

    Over the query items of a task: mae, rmse, squared_error (and, in a summary, rmse_pooled), and ndcg, precision,
    recall, hit_rate, mrr and map at each ``topn``, and auc. Over all candidates, if requested: ``catalogue_ndcg@n``
    (gain 1 for a relevant query item), ``_precision``, ``_recall``, ``_hit_rate``, ``_map`` and ``catalogue_mrr``.
    Candidates are the whole catalogue except the support and the user's known history (`TaskSet.past`). In a scenario
    whose query items are all new, candidates are the items that training did not see, since known items would fill any
    list. Candidates that the user never rated count as irrelevant, so these numbers are lower bounds.
    A task without a relevant item has no ranking metric: it is nan, excluded from means, and counted.

    Args:
      methods: learners and baselines, by name.
      tasks: by scenario ("user_cold", ...). A scenario without tasks is skipped, with a note.
      known: the catalogue of the tasks' vocabulary rows; items with ``item_row`` 0 are not in training.
      rating_range: (lowest, highest) rating: predictions are clipped to it for rating errors, never for ranking.
      gain: gain of ndcg over the query: "exp" 2^r - 1, "linear" r, "square" r^2 - 1, "binary" (of relevance), "scaled"
        2^g - 1, g the rating rescaled from ``rating_range`` to 0..5; "auto": exp if ratings are within 0 to 5 (without
        ``rating_range``: 0 to 100), else scaled; ``settings["gain"]`` records the choice.
      topn: list lengths over the query; catalogue_topn: over all candidates.
      relevant: a threshold on the target (1 for implicit feedback), `metrics.top_rated(5)`, or another
        `metrics.Relevant`.
      catalogue_ranking: also rank all candidates, with the whole support only (and at each point of the curve if the
        query has nothing to rank). It costs users x items.
      curve: support sizes k: also evaluate with the first k support examples, on the tasks that have as many. 0 is
        always included.
      baselines: names of the methods that others are compared with; names that are not in ``methods`` are ignored.
      ranking_only: methods whose scores are not ratings; they get no rating errors.
      seed: seed of ties and of the random draws of methods.
      batch: tasks per device call.
      progress: called after each call with the number of tasks done and the total, over all points of the curve.

    Returns:
      A `Report`.

    Raises:
      MetarecError: there is no method or no task, a method or the tasks do not match the catalogue, a gain is unknown
        or does not suit the targets, targets are outside ``rating_range``, or scores are not finite.
    """
    if not methods:
        raise MetarecError("no method to evaluate; pass at least one, as {'name': Method(...)}")
    if rating_range is not None and not rating_range[0] < rating_range[1]:
        raise MetarecError(f"rating_range expected (lowest, highest), got {rating_range}; correct it")
    points = sorted({0, *(int(k) for k in curve or ())})
    relevance = relevant if isinstance(relevant, metrics.Relevant) else metrics.at_least(relevant)
    scenarios = [name for name, chosen in tasks.items() if len(chosen)]
    if not scenarios:
        raise MetarecError(
            f"no tasks in {', '.join(tasks) or 'an empty mapping'}; pass a TaskSet with one or more tasks"
        )
    for name in scenarios:
        check_tasks(tasks[name], known, name)
    for name, method in methods.items():
        check_method(method, known, name)
    notes = [f"{name}: skipped, no tasks" for name in tasks if name not in scenarios]
    for name in scenarios:
        if more := tasks[name].beyond_support():
            shown = int((tasks[name].support_mask > 0).sum(1).max())
            notes.append(
                f"{name}: the known history of {more:,} of {len(tasks[name]):,} users exceeds the support of at most "
                f"{shown:,}; rankings exclude all of it"
            )
    every, scenario, place = _join([tasks[name] for name in scenarios])
    lengths = every.support_mask.sum(1).astype(int)
    real = every.query_mask > 0
    gain = _suitable_gain(gain, every.query_target[real], rating_range)
    varied = bool((np.ptp(np.where(real, every.query_target, every.query_target[:, :1]), axis=1) > 0).any())
    if not varied:
        notes.append(
            "all query targets of each task are equal: rankings are over all candidates only, not within the query"
        )

    of_new = _only_new(every, scenario, known)
    shown_to = {ALL: np.arange(len(every))} | {k: np.flatnonzero(lengths >= k) for k in points}
    total = sum(map(len, shown_to.values()))
    runner = _Runner(methods, known, seed, batch, of_new[scenario], lambda done: progress and progress(done, total))
    in_query = partial(_query_columns, gain=gain, topn=tuple(topn), span=rating_range, ranking=varied)
    in_catalogue = partial(_catalogue_columns, topn=tuple(catalogue_topn))
    numbers = np.arange(len(every), dtype=np.int32)
    relevant_items = _in_chunks(
        lambda target, mask, number: _labels(relevance, target, mask, _keys(seed, number, 2)),
        [every.query_target, every.query_mask, numbers],
    )["labels"]
    frames: list[pd.DataFrame] = []
    for shown, members in shown_to.items():
        if not len(members):
            continue
        part = _shown(every, members, shown)
        facts = {
            "scenario": pd.Categorical([scenarios[s] for s in scenario[members]], scenarios),
            "seed": np.int32(seed),
            "task": place[members],
            "user": part.user,
            "shown": np.int32(shown),
            "support": lengths[members].astype(np.int32),
            "queries": part.query_mask.sum(1).astype(np.int32),
        }
        scores, ranks = runner.scores(part, members, catalogue_ranking and (shown == ALL or not varied))
        labels, named = relevant_items[members], [scenarios[s] for s in scenario[members]]
        for name in methods:
            _refuse_bad(name, (~np.isfinite(scores[name]) & (part.query_mask > 0)).any(axis=1), named, shown)
            columns = _in_chunks(
                lambda *lists: in_query(*lists[:-1], _keys(seed, lists[-1], 1)),
                [scores[name], part.query_target, labels, part.query_mask, numbers[members]],
            )
            if name in ranking_only:
                columns |= {c: np.full(len(members), np.nan, np.float32) for c in ("mae", "rmse", "squared_error")}
            if ranks:
                ranked = ranks[name]
                _refuse_bad(name, ~ranked.finite, named, shown)
                columns |= _in_chunks(in_catalogue, [ranked.ranks, labels, ranked.candidates])
            frames.append(pd.DataFrame({"method": name} | facts | columns))
    per_task = pd.concat(frames, ignore_index=True)
    per_task["method"] = pd.Categorical(per_task["method"], list(methods))
    notes += _overflows(per_task)
    settings: dict[str, Any] = {
        "gain": gain,
        "relevant": relevance.name,
        "rating_range": None if rating_range is None else [float(x) for x in rating_range],
        "topn": [int(n) for n in topn],
        "catalogue_topn": [int(n) for n in catalogue_topn] if catalogue_ranking else [],
        "catalogue_items": len(known.item_row) - 1,
        "new_items": int((known.item_row[1:] == 0).sum()),
        "rank_new_items": [name for name, only in zip(scenarios, of_new, strict=True) if only],
        "curve": points,
        "ranking_only": [name for name in methods if name in ranking_only],
    }
    rivals = tuple(name for name in methods if name in baselines)
    return Report(per_task, settings, rivals, runner.times(), tuple(notes))


def _suitable_gain(gain: str, targets: np.ndarray, rating_range: tuple[float, float] | None) -> str:
    """The gain to use, with "auto" resolved; raises if nDCG would leave [0, 1]."""
    lowest, highest = (float(targets.min()), float(targets.max())) if len(targets) else (0.0, 0.0)
    low, high = (lowest, highest) if rating_range is None else rating_range
    slack = 1e-5 * (high - low)  # of float32, in which the targets are
    if lowest < low - slack or highest > high + slack:
        raise MetarecError(
            f"rating_range is {low:g} to {high:g}, and the tasks have ratings from {lowest:g} to {highest:g}; pass the "
            "range of their scale"
        )
    if gain == "auto":
        as_published = rating_range is None and low >= 0 and high <= 100
        gain = "exp" if as_published else metrics.suitable_gain((low, high))
    metrics.check_gain(gain, lowest, highest)
    if gain == "scaled" and rating_range is None:
        raise MetarecError(
            f"nDCG of ratings from {lowest:g} to {highest:g} requires the range of their scale; pass "
            "rating_range=(lowest, highest), or gain='binary'"
        )
    return gain


def _join(parts: Sequence[TaskSet]) -> tuple[TaskSet, np.ndarray, np.ndarray]:
    """All scenarios as one set of tasks, the scenario of each task, and its position in the scenario."""

    def stack(name: str) -> Any:
        arrays = [getattr(part, name) for part in parts]
        if name == "past":
            if all(past is None for past in arrays):
                return None
            rows = next(past.shape[1] for past in arrays if past is not None)
            none = [csr_matrix((len(part), rows), dtype=bool) for part in parts]
            return vstack([a if b is None else b for a, b in zip(none, arrays, strict=True)], format="csr")
        if name == "user":
            return np.concatenate(arrays)
        width = max(a.shape[1] for a in arrays)
        return np.concatenate([np.pad(a, ((0, 0), (0, width - a.shape[1]))) for a in arrays])

    every = TaskSet(*(stack(f.name) for f in fields(TaskSet)))
    sizes = [len(part) for part in parts]
    place = np.concatenate([np.arange(n, dtype=np.int32) for n in sizes])
    return every, np.repeat(np.arange(len(parts)), sizes), place


def _only_new(every: TaskSet, scenario: np.ndarray, known: Catalogue) -> np.ndarray:
    """Whether all query items of each scenario are absent from training."""
    old = ((np.asarray(known.item_row)[every.query_item] > 0) & (every.query_mask > 0)).any(axis=1)
    return np.bincount(scenario, old) == 0


def _shown(every: TaskSet, members: np.ndarray, shown: int) -> TaskSet:
    part, n = every.take(members), None if shown == ALL else shown
    names = ("support_item", "support_target", "support_mask")
    return replace(part, **{name: getattr(part, name)[:, :n] for name in names})


def _refuse_bad(name: str, bad: np.ndarray, scenario: list[str], shown: int) -> None:
    """Refuse a method with scores that are not finite, which have no rank; ``bad`` ``[T]`` marks their tasks."""
    if bad.any():
        first = scenario[int(np.flatnonzero(bad)[0])]
        support = "the whole support" if shown == ALL else f"{shown} support examples"
        raise MetarecError(
            f"method {name!r} returned scores that are not finite for {bad.sum()} of {len(bad)} tasks with {support}, "
            f"the first in {first!r}; check its adapt for a division by 0, or lower its inner rate"
        )


def _overflows(per_task: pd.DataFrame) -> list[str]:
    """A note for each method with numbers too large for float32, such as the square of an error of 1e20."""
    beyond = np.isinf(per_task.drop(columns=list(FACTS)).to_numpy(np.float64))
    notes = []
    for name in per_task["method"].cat.categories:
        rows = beyond[(per_task["method"] == name).to_numpy()]
        if rows.any():
            columns = per_task.columns.drop(list(FACTS))[rows.any(0)]
            notes.append(
                f"{name}: {rows.any(1).sum():,} of {len(rows):,} rows have infinite {', '.join(columns)}; they count "
                "as infinite in every mean"
            )
    return notes


@jax.jit
def _keys(seed: Array, number: Array, purpose: Array) -> Array:
    """A key per task, independent of its batch. Purpose 0: draws of a method; 1: ties of scores; 2: ties of targets."""
    base = jax.random.fold_in(jax.random.key(seed), purpose)
    return jax.vmap(lambda k: jax.random.fold_in(base, k))(number)


class _Runner:
    """Runs every method on every batch, and times first calls, which compile, separately from later ones."""

    def __init__(
        self,
        methods: Mapping[str, Method],
        known: Catalogue,
        seed: int,
        batch: int,
        of_new: np.ndarray,
        progress: Callable[[int], Any],
    ) -> None:
        self.methods, self.known, self.seed, self.of_new = methods, known, seed, of_new
        self.batch = batch_size(len(of_new), batch)
        self.shapes: set[Any] = set()
        self.first = dict.fromkeys(methods, 0.0)
        self.later: dict[str, list[tuple[int, float]]] = {name: [] for name in methods}
        self.last: tuple[Task, Array, int] | None = None
        self.progress, self.done, self.stopped = progress, 0, False

    def scores(
        self, part: TaskSet, numbers: np.ndarray, rank_catalogue: bool
    ) -> tuple[dict[str, np.ndarray], dict[str, Ranked]]:
        """Scores ``[T, Q]`` of the query items, and their ranks in the catalogue, by method."""
        scores = {name: np.zeros(part.query_item.shape, np.float32) for name in self.methods}
        n = len(part)
        ranks = {
            name: Ranked(np.zeros(part.query_item.shape, np.int32), np.zeros(n, np.int32), np.ones(n, bool))
            for name in (self.methods if rank_catalogue else ())
        }
        for index, task in batches(part, self.known, self.batch):
            rows = np.concatenate([index, np.full(self.batch - len(index), index[0])])
            number = jnp.asarray(numbers[rows], jnp.int32)
            self.last = (task, _keys(self.seed, number, 0), len(index))

            rank = partial(self.ranks, part.take(rows), number, len(index)) if rank_catalogue else None
            one = partial(self.call, task=task, number=number, n=len(index), rank=rank)
            shape = (task.support.mask.shape, task.query.mask.shape, rank_catalogue)
            for name, (found, placed) in zip(self.methods, self.each(one, shape), strict=True):
                scores[name][index] = np.asarray(found)[: len(index)]
                if placed is not None:
                    for whole, some in zip(ranks[name], placed, strict=True):
                        whole[index] = some
            self.shapes.add(shape)
            self.done += len(index)
            self.progress(self.done)
        return scores, ranks

    def each(self, one: Any, shape: Any) -> Iterator[Any]:
        """``one(name)`` of each method; two at a time if they have to be compiled, which XLA does in parallel."""
        at_once = 1 if shape in self.shapes else runs_together()
        if at_once == 1:
            yield from map(one, self.methods)
            return
        pool = ThreadPoolExecutor(at_once)
        try:
            yield from pool.map(one, self.methods)
        except BaseException:  # such as Ctrl-C: running calls end after their block, and no other call starts
            self.stopped = True
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def call(self, name: str, *, task: Task, number: Array, n: int, rank: Any) -> tuple[Array, Ranked | None]:
        """Query scores of one method on one batch and, if requested, the catalogue ranks of the query items."""
        scores, adapted = self.timed(name, task, _keys(self.seed, number, 0), n)
        return scores, None if rank is None else rank(self.methods[name], adapted)

    def ranks(self, part: TaskSet, number: Array, n: int, method: Method, adapted: Any) -> Ranked:
        """Catalogue ranks of the query items of the first ``n`` users, in blocks of users."""
        ties, ranks = _keys(self.seed, number, 1), []
        for some in user_blocks(n, self.batch, len(self.known.item_row)):
            if self.stopped:
                raise KeyboardInterrupt
            users, new = part.take(np.arange(some.start, some.stop)), self.of_new[np.asarray(number[some])]
            own = jax.tree.map(operator.itemgetter(some), adapted)
            ranks.append(query_ranks(method, own, self.known, users, new, ties[some]))
        return Ranked(*(np.concatenate(parts)[:n] for parts in zip(*ranks, strict=True)))

    def timed(self, name: str, task: Task, keys: Array, n: int) -> tuple[Array, Any]:
        """Query scores and adapted state of one method on ``n`` real tasks; the call is timed to its completion."""
        method = self.methods[name]
        adapt, predict = compiled(adapt_each, method.adapt), compiled(predict_each, method.predict)
        before, start = adapt.traced + predict.traced, time.perf_counter()
        adapted = adapt.call(method.params, task.support, keys)
        scores = jax.block_until_ready(predict.call(method.params, adapted, task.query.inputs))
        seconds = time.perf_counter() - start
        if adapt.traced + predict.traced > before:
            self.first[name] += seconds
        else:
            self.later[name].append((n, seconds))
        return scores, adapted

    def times(self) -> dict[str, dict[str, float]]:
        """By method: seconds per user of adapt and predict, compiled; and the seconds of the calls that compiled."""
        times = {}
        for name in self.methods:
            if not self.later[name] and self.last is not None:
                self.timed(name, *self.last)
            users, seconds = (sum(column) for column in zip(*self.later[name], strict=True))
            times[name] = {"seconds_per_user": seconds / users, "first_call_seconds": self.first[name]}
        return times


def _in_chunks(measure: Any, arrays: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Columns of ``measure(*arrays)``, computed on slices of one size, so that it is compiled once."""
    n = len(arrays[0])
    parts: list[dict[str, np.ndarray]] = []
    for start in range(0, n, _LISTS_AT_ONCE):
        part = [a[start : start + _LISTS_AT_ONCE] for a in arrays]
        m = len(part[0])
        part = [np.pad(a, [(0, _LISTS_AT_ONCE - m)] + [(0, 0)] * (a.ndim - 1)) for a in part]
        with jax.debug_nans(False):  # nan means that a metric is undefined, which is not an error
            parts.append({name: np.asarray(values)[:m] for name, values in measure(*part).items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@partial(jax.jit, static_argnums=0)
def _labels(relevance: metrics.Relevant, target: Array, mask: Array, keys: Array) -> dict[str, Array]:
    return {"labels": jax.vmap(relevance.labels)(target, mask > 0, keys)}


@partial(jax.jit, static_argnames=("gain", "topn", "span", "ranking"))
def _query_columns(
    scores: Array,
    target: Array,
    labels: Array,
    mask: Array,
    keys: Array,
    *,
    gain: str,
    topn: tuple[int, ...],
    span: tuple[float, float] | None,
    ranking: bool,
) -> dict[str, Array]:
    where = mask > 0
    rating = scores if span is None else jnp.clip(scores, *span)
    found = {
        "mae": metrics.mae(rating, target, where=where),
        "rmse": metrics.rmse(rating, target, where=where),
        "squared_error": metrics.squared_error(rating, target, where=where),
    }
    if ranking:
        order = jnp.arange(scores.shape[1])
        ranks = jax.vmap(metrics.ranks_among, (0, 0, None, 0))(scores, where, order, keys)
        grade = labels if gain == "binary" else target
        if gain == "scaled":
            assert span is not None  # _suitable_gain
            grade = metrics.on_five(target, span)
        found |= metrics.of_ranks(ranks, labels, where, where.sum(-1), topn, grade=grade, gain=gain)
        found["auc"] = metrics.auc(scores, labels, where=where)
    return found


@partial(jax.jit, static_argnames="topn")
def _catalogue_columns(ranks: Array, labels: Array, candidates: Array, *, topn: tuple[int, ...]) -> dict[str, Array]:
    where = labels > 0
    found = metrics.of_ranks(ranks, labels, where, candidates, topn) | {
        "mrr": metrics.mrr(-ranks, labels, where=where, ranks=ranks)
    }
    return {f"catalogue_{name}": values for name, values in found.items()}
