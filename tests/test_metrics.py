"""Metrics: arithmetic by hand, edge cases by name, and ir-measures (trec_eval) as an independent oracle."""

import math
from functools import partial

import ir_measures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ir_measures import AP, RR, P, R, Success, nDCG

from metarec_jax.core import MetarecError
from metarec_jax.evaluation import metrics

RANKING = (metrics.precision, metrics.recall, metrics.hit_rate, metrics.mrr, metrics.average_precision)
SCORES = jnp.array([0.9, 0.1, 0.5, 0.7])  # ranks 1, 4, 3, 2
RATING = jnp.array([3.0, 5.0, 4.0, 1.0])


def close(value, wanted):
    np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-6)


def test_rating_errors_by_hand():
    scores, target = jnp.array([[3.0, 4.0, 9.0], [1.0, 1.0, 1.0]]), jnp.array([[4.0, 2.0, 0.0], [1.0, 2.0, 4.0]])
    where = jnp.array([[1, 1, 0], [1, 1, 1]])
    close(metrics.mae(scores, target, where=where), [(1 + 2) / 2, (0 + 1 + 3) / 3])
    close(metrics.squared_error(scores, target, where=where), [(1 + 4) / 2, (0 + 1 + 9) / 3])
    close(metrics.rmse(scores, target, where=where), [math.sqrt(5 / 2), math.sqrt(10 / 3)])


def test_pooled_rmse_is_the_root_of_the_weighted_mean_of_squared_errors():
    scores, target = jnp.array([[3.0, 4.0, 0.0], [1.0, 1.0, 1.0]]), jnp.array([[4.0, 2.0, 0.0], [1.0, 2.0, 4.0]])
    where = jnp.array([[1, 1, 0], [1, 1, 1]])
    count = where.sum(-1)
    pooled = jnp.sqrt(jnp.sum(metrics.squared_error(scores, target, where=where) * count) / count.sum())
    close(pooled, math.sqrt((1 + 4 + 0 + 1 + 9) / 5))


@pytest.mark.parametrize(
    ("gain", "gains"),
    [
        ("exp", [7, 31, 15, 1]),
        ("linear", [3, 5, 4, 1]),
        ("square", [8, 24, 15, 0]),
        ("binary", [1, 1, 1, 1]),
    ],
)
def test_ndcg_by_hand_with_each_gain(gain, gains):
    rank = [1, 4, 3, 2]
    dcg = sum(g / math.log2(1 + r) for g, r in zip(gains, rank, strict=True) if r <= 3)
    best = sum(g / math.log2(2 + k) for k, g in enumerate(sorted(gains, reverse=True)[:3]))
    close(metrics.ndcg(SCORES, RATING, topn=3, gain=gain), dcg / best)


def test_ranking_metrics_by_hand():
    relevant = jnp.array([0.0, 1.0, 1.0, 0.0])  # at ranks 4 and 3
    close(metrics.precision(SCORES, relevant, topn=3), 1 / 3)
    close(metrics.recall(SCORES, relevant, topn=3), 1 / 2)
    close(metrics.hit_rate(SCORES, relevant, topn=3), 1)
    close(metrics.hit_rate(SCORES, relevant, topn=2), 0)
    close(metrics.mrr(SCORES, relevant), 1 / 3)
    close(metrics.mrr(SCORES, relevant, topn=2), 0)
    close(metrics.average_precision(SCORES, relevant), (1 / 3 + 2 / 4) / 2)
    close(metrics.average_precision(SCORES, relevant, topn=3), (1 / 3) / 2)
    close(metrics.auc(SCORES, relevant), 0)


@pytest.mark.parametrize("metric", RANKING)
def test_no_relevant_item_is_no_answer(metric):
    assert math.isnan(metric(SCORES, jnp.zeros(4), topn=2))


@pytest.mark.parametrize(
    "metric", [*RANKING, metrics.ndcg, metrics.mae, metrics.rmse, metrics.squared_error, metrics.auc]
)
def test_empty_list_is_no_answer(metric):
    assert math.isnan(metric(SCORES, RATING, where=jnp.zeros(4)))


@pytest.mark.parametrize("metric", RANKING)
def test_all_relevant_is_perfect(metric):
    close(metric(SCORES, jnp.ones(4), topn=4), 1)


def test_auc_wants_both_kinds():
    assert math.isnan(metrics.auc(SCORES, jnp.ones(4)))
    assert math.isnan(metrics.auc(SCORES, jnp.zeros(4)))


def test_list_shorter_than_topn_divides_by_its_length():
    close(metrics.precision(jnp.array([2.0, 1.0]), jnp.array([1.0, 0.0]), topn=5), 1 / 2)


def test_one_item():
    close(metrics.ndcg(jnp.array([0.3]), jnp.array([4.0]), topn=1), 1)


@pytest.mark.parametrize("metric", [*RANKING, metrics.ndcg])
@pytest.mark.parametrize("topn", [1, 10, None])
def test_one_candidate_that_is_relevant_is_perfect(metric, topn):
    close(metric(jnp.array([-3.0]), jnp.ones(1), topn=topn), 1)


@pytest.mark.parametrize("metric", [*RANKING, metrics.ndcg])
def test_fewer_candidates_than_n_are_the_whole_list(metric):
    relevant = jnp.array([0.0, 1.0, 1.0, 0.0])
    close(metric(SCORES, relevant, topn=100), metric(SCORES, relevant, topn=4))


@pytest.mark.parametrize("metric", [*RANKING, metrics.ndcg])
@pytest.mark.parametrize("worst", [-jnp.inf, -3e38, jnp.nan])
def test_the_lowest_score_stands_before_the_padding(metric, worst):
    """A list of two with two slots of padding: the relevant item is last, at rank 2, whatever fills the padding."""
    scores = jnp.array([0.5, worst, 9.0, 9.0])
    relevant, where = jnp.array([0.0, 1.0, 1.0, 1.0]), jnp.array([1, 1, 0, 0])
    short = metric(jnp.array([0.5, -1.0]), jnp.array([0.0, 1.0]), topn=2)
    for seed in range(5):
        close(metric(scores, relevant, where=where, topn=2, key=jax.random.key(seed)), short)


def test_infinite_scores_have_their_ranks():
    scores = jnp.array([jnp.inf, 1.0, -jnp.inf, 2.0])
    assert metrics.ranks_of(scores).tolist() == [1, 3, 4, 2]
    assert metrics.ranks_among(scores, _true(4), jnp.arange(4), jax.random.key(0)).tolist() == [1, 3, 4, 2]
    relevant = jnp.array([1.0, 0.0, 1.0, 0.0])
    close(metrics.auc(scores, relevant), 0.5)  # the first above both, the third below both
    close(metrics.auc(jnp.full(4, jnp.inf), relevant), 0.5)
    close(metrics.auc(jnp.full(4, -jnp.inf), relevant), 0.5)


def test_nan_never_stands_first():
    scores = jnp.array([jnp.nan, 1.0, 0.0])
    assert metrics.ranks_of(scores).tolist() == [3, 1, 2]
    assert metrics.ranks_among(scores, _true(3), jnp.arange(3), jax.random.key(0)).tolist() == [3, 1, 2]
    close(metrics.auc(scores, jnp.array([1.0, 0.0, 0.0])), 0)


def test_an_infinite_error_is_infinite():
    scores, target = jnp.array([jnp.inf, 1.0]), jnp.ones(2)
    for metric in (metrics.mae, metrics.squared_error, metrics.rmse):
        assert float(metric(scores, target)) == math.inf
        close(metric(scores, target, where=jnp.array([0, 1])), 0)


def test_unknown_gain_names_the_known_ones():
    with pytest.raises(MetarecError, match="exp, linear, square, binary"):
        metrics.ndcg(SCORES, RATING, gain="cubic")


@pytest.mark.parametrize(
    "span", [(1, 5), (0.5, 10), (-10, 10), (-1, 1), (1, 100), (0, 1), (0, 1e6), (1, 69_016), (0, 3e9)]
)
def test_ndcg_lies_in_0_to_1_on_a_scale_of_any_kind(span):
    """The best order has 1, no order is below 0, and a better order is never worse; half of the ratings are small."""
    rng = np.random.default_rng(0)
    share = np.concatenate([rng.random((200, 4)) ** 12, rng.random((200, 4))], 1)  # a tail, as counts have it
    share[:, 0], share[:, 1] = 0.0, 1.0
    target = jnp.asarray(span[0] + share * (span[1] - span[0]), jnp.float32)
    gain = metrics.suitable_gain(span)
    metrics.check_gain(gain, *span)
    grade = metrics.on_five(target, span) if gain == "scaled" else target

    def at(scores):
        return np.asarray(metrics.ndcg(scores, grade, topn=5, gain=gain))

    found = at(jnp.asarray(rng.normal(size=target.shape), jnp.float32))
    assert np.isfinite(found).all()
    assert found.min() >= 0
    assert found.max() <= 1 + 1e-6
    close(at(target), 1)
    assert (at(-target) <= found + 1e-6).mean() > 0.9


def test_the_scaled_gain_tells_small_counts_apart():
    """Of plays 1, 2 and 3 beside a highest of a billion: gains 0, a, 2 a, where 2^g - 1 by float32 would be 0 for all."""
    grade = metrics.on_five(jnp.array([1.0, 2.0, 3.0]), (1.0, 1e9))
    close(
        metrics.ndcg(jnp.array([3.0, 2.0, 1.0]), grade, gain="scaled"), (1 / np.log2(3) + 2 / 2) / (2 + 1 / np.log2(3))
    )


@pytest.mark.parametrize("gain", ["exp", "linear", "square"])
def test_a_gain_that_leaves_0_to_1_is_refused(gain):
    with pytest.raises(MetarecError, match=f"'{gain}'.*scaled"):
        metrics.check_gain(gain, -1.0, 1.0)
    with pytest.raises(MetarecError, match=f"'{gain}'.*scaled"):
        metrics.check_gain(gain, 0.0, 1e31)
    metrics.check_gain(gain, 0.0, 5.0)


def test_precision_in_a_longer_list_wants_topn():
    with pytest.raises(MetarecError, match="topn"):
        metrics.precision(SCORES, RATING, ranks=jnp.arange(1, 5))


def test_ties_are_broken_at_random():
    relevant = jnp.zeros(4).at[0].set(1.0)
    keys = jax.random.split(jax.random.key(0), 4000)
    found = jax.jit(jax.vmap(lambda key: metrics.hit_rate(jnp.zeros(4), relevant, topn=1, key=key)))(keys)
    assert abs(float(found.mean()) - 1 / 4) < 4 * math.sqrt(1 / 4 * 3 / 4 / 4000)  # four standard errors
    rank = jax.jit(jax.vmap(lambda key: metrics.ranks_among(jnp.zeros(4), _true(4), jnp.array([0]), key)[0]))(keys)
    share = np.bincount(np.asarray(rank), minlength=5)[1:] / 4000
    assert np.abs(share - 1 / 4).max() < 4 * math.sqrt(1 / 4 * 3 / 4 / 4000)


def test_a_tie_is_never_won_by_both():
    rank = metrics.ranks_among(jnp.zeros(50), _true(50), jnp.arange(50), jax.random.key(1))
    assert sorted(rank.tolist()) == list(range(1, 51))


def _true(n):
    return jnp.ones(n, bool)


def test_at_least_and_top_rated():
    key, where = jax.random.key(0), jnp.array([1.0, 1.0, 1.0, 0.0])
    rating = jnp.array([3.0, 5.0, 4.0, 5.0])
    close(metrics.at_least(4).labels(rating, where, key), [0, 1, 1, 0])
    close(metrics.top_rated(1).labels(rating, where, key), [0, 1, 0, 0])
    close(metrics.top_rated(9).labels(rating, where, key), [1, 1, 1, 0])


def test_direction_of_each_metric():
    better_low = {"mae", "rmse", "rmse_pooled", "squared_error"}
    assert all(not metrics.higher_is_better(m) for m in better_low)
    assert all(metrics.higher_is_better(m) for m in ("ndcg@5", "catalogue_recall@20", "auc", "mrr@10"))


SLOTS = 12
lists = st.integers(3, SLOTS).flatmap(
    lambda n: st.tuples(
        st.permutations(range(n)),
        st.lists(st.integers(0, 5), min_size=n, max_size=n),
        st.sampled_from([1, 3]),
    )
)


@partial(jax.jit, static_argnames="topn")
def _all_of(scores, grade, relevant, where, topn):
    at = {"where": where, "topn": topn}
    return {
        str(P @ topn): metrics.precision(scores, relevant, **at),
        str(R @ topn): metrics.recall(scores, relevant, **at),
        str(Success @ topn): metrics.hit_rate(scores, relevant, **at),
        str(RR): metrics.mrr(scores, relevant, where=where),
        str(AP): metrics.average_precision(scores, relevant, where=where),
        str(AP @ topn): metrics.average_precision(scores, relevant, **at),
        "linear": metrics.ndcg(scores, grade, gain="linear", **at),
        "exp": metrics.ndcg(scores, grade, gain="exp", **at),
    }


@settings(max_examples=60, deadline=None)
@given(lists)
def test_agrees_with_ir_measures_whatever_stands_in_the_padding(case):
    order, rating, topn = case
    relevant = [int(r >= 4) for r in rating]

    def padded(values, rubbish):
        return jnp.array([float(v) for v in values] + [rubbish] * (SLOTS - len(values)))

    ours = _all_of(padded(order, 99.0), padded(rating, 5.0), padded(relevant, 1.0), padded([1] * len(order), 0.0), topn)

    def oracle(grades, measures):
        run = {"q": {f"d{i}": float(s) for i, s in enumerate(order)}}
        return ir_measures.calc_aggregate(measures, {"q": {f"d{i}": g for i, g in enumerate(grades)}}, run)

    theirs = oracle(relevant, [P @ topn, R @ topn, Success @ topn, RR, AP, AP @ topn])
    theirs = {str(name): value for name, value in theirs.items()}
    theirs["linear"] = oracle(rating, [nDCG @ topn])[nDCG @ topn]
    theirs["exp"] = oracle([2**r - 1 for r in rating], [nDCG @ topn])[nDCG @ topn]
    for name, wanted in theirs.items():
        assert math.isnan(ours[name]) == (max(rating) == 0 if name in ("linear", "exp") else sum(relevant) == 0)
        close(jnp.nan_to_num(ours[name]), wanted)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=SLOTS))
def test_auc_equals_all_pairs(pairs):
    wins = [(s > t) + 0.5 * (s == t) for s, good in pairs if good for t, other in pairs if not other]
    fill = [0.0] * (SLOTS - len(pairs))
    scores, relevant = (jnp.array([float(p[k]) for p in pairs] + fill) for k in (0, 1))
    value = _auc(scores, relevant, jnp.array([1.0] * len(pairs) + fill))
    close(value, np.mean(wins) if wins else np.nan)


_auc = jax.jit(lambda scores, relevant, where: metrics.auc(scores, relevant, where=where))


def test_auc_of_a_hundred_thousand_at_once():
    rng = np.random.default_rng(0)
    target = rng.integers(0, 2, 100_000)
    scores = rng.normal(size=100_000) + target
    # two unit normals one apart: AUC = Phi(1 / sqrt(2)) = 0.7602
    assert abs(float(metrics.auc(jnp.asarray(scores), jnp.asarray(target))) - 0.7602) < 0.005


@pytest.mark.parametrize("metric", [*RANKING, metrics.ndcg])
def test_short_list_with_ranks_equals_the_long_list(metric):
    """Three relevant items of thirty, ranked among all: the same number as scoring the list of thirty."""

    def both(key):
        k_scores, k_items, k_ties = jax.random.split(key, 3)
        scores = jax.random.permutation(k_scores, 30).astype(jnp.float32)
        items = jax.random.choice(k_items, 30, (3,), replace=False)
        ranks = metrics.ranks_among(scores, _true(30), items, k_ties)
        short = metric(scores[items], jnp.ones(3), topn=10, ranks=ranks)
        return short, metric(scores, jnp.zeros(30).at[items].set(1.0), topn=10)

    short, full = jax.jit(jax.vmap(both))(jax.random.split(jax.random.key(0), 200))
    close(short, full)
    assert len(set(full.tolist())) > 1


@pytest.mark.parametrize("metric", [*RANKING, metrics.ndcg, metrics.mae, metrics.auc])
def test_leading_axes_are_batch(metric):
    rng = np.random.default_rng(0)
    scores, target = jnp.asarray(rng.normal(size=(2, 3, 8))), jnp.asarray(rng.integers(0, 2, (2, 3, 8)).astype(float))
    ways = jax.jit(lambda s, t: (metric(s, t), jax.vmap(jax.vmap(metric))(s, t), metric(s[1, 2], t[1, 2])))
    batch, mapped, alone = ways(scores, target)
    assert batch.shape == (2, 3)
    close(batch, mapped)
    close(batch[1, 2], alone)
