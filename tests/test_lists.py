"""Plain lists from ratings: the click methods on what users liked, to the bit, tuned by ranking, without rating errors."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metarec_jax.baselines.closed_form import BASELINES, LISTS, als, of_liked
from metarec_jax.baselines.fitted import fitted
from metarec_jax.baselines.trained import fit_plain
from metarec_jax.baselines.tuning import fit_baselines, some_items, suitable, tune
from metarec_jax.core import Examples, MetarecError
from metarec_jax.data.catalogue import catalogue
from metarec_jax.data.interactions import Interactions, Vocabulary
from metarec_jax.data.splits import split
from metarec_jax.data.synthetic import synthetic
from metarec_jax.data.tasks import make_tasks
from metarec_jax.evaluation.evaluate import evaluate
from metarec_jax.experiment.protocol import measuring_options, relevant_from
from metarec_jax.report.write import method_sections, metric_blocks

DATA = synthetic(80, 30, ratings_per_user=(12, 20), size=2, seed=3).data
LIKED_FROM = relevant_from(DATA)
PARTS = split(DATA, seed=0)
TRAIN, KNOWN = PARTS.train, catalogue(DATA, PARTS.train)
TASKS = {
    name: make_tasks(PARTS.validation[name], history=PARTS.history.get(name), past=TRAIN, query=4, seed=0)
    for name in ("user_cold", "item_cold")
}
HIGH, LOW = LIKED_FROM + 0.25, np.nextafter(np.float32(LIKED_FROM), np.float32(-100))
KEY = jax.random.key(0)


def support(items, targets):
    """One user of a batch; padding, with target 9, up to 5 items."""
    mask = (np.arange(5) < len(items)).astype(np.float32)
    padded = (np.pad(a, (0, 5 - len(items)), constant_values=9) for a in (np.int32(items), np.float32(targets)))
    ids, values = padded
    return Examples({"item_id": jnp.asarray(ids)[None]}, jnp.asarray(values)[None], jnp.asarray(mask)[None])


def scores(method, given):
    """Scores of the whole catalogue, by `scores` and by `predict`."""
    adapted = jax.vmap(lambda one: method.adapt(method.params, one, KEY))(given)
    every = {"item_id": jnp.arange(DATA.items.num_rows)}
    one_by_one = jax.vmap(lambda one: method.predict(method.params, one, every))(adapted)
    return np.asarray(method.scores(method.params, adapted))[0], np.asarray(one_by_one)[0]


@pytest.mark.parametrize("name", LISTS)
def test_a_list_is_the_click_method_fitted_by_hand_on_the_liked_ratings(name):
    """And of the support only what is liked counts; a rating that equals the threshold is liked."""
    liked = replace(TRAIN.take(np.flatnonzero(TRAIN.rating >= LIKED_FROM)), rating=None)
    assert 0 < len(liked) < len(TRAIN)
    by_hand = LISTS[name](liked, KNOWN)
    method = of_liked(LISTS[name], LIKED_FROM)(TRAIN, KNOWN)
    rated = support([4, 7, 11, 2], [HIGH, LOW, LIKED_FROM, 0.0])
    clicked = support([4, 7, 11, 2], np.ones(4))._replace(mask=jnp.asarray([[1.0, 0.0, 1.0, 0.0, 0.0]]))
    for mine, theirs in zip(scores(method, rated), scores(by_hand, clicked), strict=True):
        np.testing.assert_array_equal(mine, theirs)
        assert np.ptp(mine) > 0
    nothing = support([7, 2], [LOW, 0.0])
    np.testing.assert_array_equal(scores(method, nothing)[0], scores(by_hand, support([], []))[0])


def test_another_threshold_compiles_nothing():
    one, other = of_liked(als, LIKED_FROM)(TRAIN, KNOWN), of_liked(als, LIKED_FROM - 1)(TRAIN, KNOWN, size=16)
    assert (one.adapt, one.predict) == (other.adapt, other.predict)
    assert jax.tree.map(jnp.shape, one.params) == jax.tree.map(jnp.shape, other.params)


def test_lists_are_tuned_by_ndcg_on_new_users_and_kept_by_threshold():
    said, kept = [], {}
    options = {"names": ["item_knn_liked", "bias"], "say": said.append, "kept": kept, "liked_from": LIKED_FROM}
    both = fit_baselines(TRAIN, KNOWN, TASKS, **options)
    assert list(both) == ["item_knn_liked", "bias"]
    assert "validation nDCG@10" in said[0]
    assert "validation MAE" in said[1]
    alone: list[str] = []
    tune(
        TRAIN,
        KNOWN,
        {"user_cold": TASKS["user_cold"]},
        names=["item_knn_liked"],
        say=alone.append,
        liked_from=LIKED_FROM,
    )
    assert alone == said[:1]  # new items are not in the mean
    said.clear()
    tune(TRAIN, KNOWN, TASKS, **options)
    tune(TRAIN, KNOWN, TASKS, **{**options, "liked_from": LIKED_FROM - 0.5})
    assert [line.endswith("(from an earlier run)") for line in said] == [True, True, False, True]
    assert tune(TRAIN, KNOWN, {"item_cold": TASKS["item_cold"]}, names=["als_liked"], liked_from=LIKED_FROM) == {}


def test_the_tuned_setting_is_the_best_of_the_grid_by_hand():
    found = tune(TRAIN, KNOWN, TASKS, names=["ease_liked"], liked_from=LIKED_FROM)["ease_liked"]
    tasks, best = TASKS["user_cold"], []
    for reg in (100.0, 300.0, 1000.0, 3000.0):
        method, each = of_liked(LISTS["ease_liked"], LIKED_FROM)(TRAIN, KNOWN, reg=reg), []
        for k in range(len(tasks)):
            shown, query = tasks.support_item[k][tasks.support_mask[k] > 0], tasks.query_item[k]
            liked = (tasks.query_mask[k] > 0) & (tasks.query_target[k] >= LIKED_FROM)
            values = np.asarray(
                method.scores(
                    method.params,
                    jax.vmap(lambda one, m=method: m.adapt(m.params, one, KEY))(
                        Examples(
                            {"item_id": jnp.asarray(KNOWN.item_row)[tasks.support_item[k]][None]},
                            jnp.asarray(tasks.support_target[k])[None],
                            jnp.asarray(tasks.support_mask[k])[None],
                        )
                    ),
                )
            )[0]
            gain = 0.0
            for item in query[liked]:
                others = np.setdiff1d(np.unique(TRAIN.item), [*shown, item])
                rank = 1 + (values[others] > values[item]).sum() + 0.5 * (values[others] == values[item]).sum()
                gain += (rank <= 10) / np.log2(1 + rank)
            if liked.any():
                each.append(gain / (1 / np.log2(2 + np.arange(liked.sum()))).sum())
        best.append((np.mean(each), reg))
    assert found == {"reg": max(best, key=lambda one: (one[0], -one[1]))[1]}


def test_a_report_has_the_lists_and_ranking_errors_only_of_them():
    methods = fit_baselines(TRAIN, KNOWN, names=["bias", "popularity", *LISTS], liked_from=LIKED_FROM)
    test = {"user_cold": make_tasks(PARTS.test["user_cold"], past=TRAIN, query=4, seed=0)}
    report = evaluate(
        {"mine": methods["bias"], **methods},
        test,
        KNOWN,
        catalogue_ranking=True,
        baselines=tuple(methods),
        **measuring_options(DATA, methods, None),
    )
    summary = report.summary()
    for name in LISTS:
        assert not {"mae", "rmse", "rmse_pooled"} & set(summary[name]["user_cold"])
        assert {"ndcg@5", "catalogue_ndcg@10", "catalogue_recall@20"} <= set(summary[name]["user_cold"])
    against = {d.metric: d.baseline for d in report.compare()}
    assert against["mae"] == against["squared_error"] == "bias"  # errors against methods that rate
    best = max(methods, key=lambda name: summary[name]["user_cold"]["catalogue_ndcg@10"].mean)
    assert against["catalogue_ndcg@10"] == best
    assert best in LISTS
    mae = metric_blocks(report)[0]
    assert "the scores of popularity, item_knn_liked, ease_liked, als_liked are not ratings" in mae
    notes = " ".join(method_sections(report)[0].sentences)
    assert "item_knn_liked, ease_liked, als_liked: fitted on the relevant ratings alone, each a click" in notes


def test_lists_suit_ratings_with_a_threshold_that_some_reach():
    assert set(suitable(TRAIN, LIKED_FROM)) - set(suitable(TRAIN)) == set(LISTS)
    assert not set(suitable(TRAIN, 100.0)) & set(LISTS)
    clicks = replace(TRAIN, rating=None)
    assert not set(suitable(clicks, 1.0)) & set(LISTS)
    assert not set(LISTS) & set(BASELINES)
    items = Vocabulary(np.arange(20_000))  # one row more than the square matrix may have
    large = Interactions(TRAIN.user, TRAIN.item, TRAIN.rating, None, TRAIN.users, items)
    assert set(suitable(large, LIKED_FROM)) & set(LISTS) == {"item_knn_liked", "als_liked"}
    with pytest.raises(MetarecError, match=r"als_liked requires ratings, .* use als"):
        of_liked(als, 1.0)(clicks, KNOWN)
    with pytest.raises(MetarecError, match=r"als_liked: the training part has no rating of 100 or more"):
        of_liked(als, 100.0)(TRAIN, KNOWN)
    with pytest.raises(MetarecError, match=r"ease_liked requires the rating .* pass liked_from"):
        fit_plain("ease_liked", TRAIN, KNOWN)


def test_the_most_frequent_items_stay():
    few = some_items(TRAIN, 5)
    count = np.bincount(TRAIN.item, minlength=TRAIN.items.num_rows)
    assert len(np.unique(few.item)) == 5
    assert len(few) == np.sort(count)[-5:].sum()
    assert some_items(TRAIN, 30) is TRAIN


@pytest.mark.parametrize("clicks", [False, True])
def test_a_stored_method_is_rebuilt_from_its_name_and_parameters(clicks):
    """`fitted`: the same predictions and catalogue scores as the method that was fitted, for every baseline."""
    data = synthetic(60, 40, ratings_per_user=(8, 12), seed=0).data
    data = replace(data, rating=None) if clicks else data
    known = catalogue(data)
    support = Examples(
        {"user_id": jnp.zeros(1, int), "item_id": jnp.array([3, 5, 9])}, jnp.array([4.0, 1.0, 5.0]), jnp.ones(3)
    )
    items = {"user_id": jnp.zeros(1, int), "item_id": jnp.arange(1, 41)}
    methods = fit_baselines(data, known, liked_from=None if clicks else 3.0)
    for name in methods.keys() - {"random"}:
        one, again = methods[name], fitted(name, methods[name].params)
        adapted, rebuilt = (m.adapt(m.params, support, KEY) for m in (one, again))
        assert np.array_equal(one.predict(one.params, adapted, items), again.predict(again.params, rebuilt, items)), (
            name
        )
        assert (one.scores is None) == (again.scores is None), name
