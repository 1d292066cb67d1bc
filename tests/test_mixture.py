"""The mixture: its mean by hand, weights that find the truth, and a run that uses, saves and opens it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metarec_jax as mr
from metarec_jax.core import Examples, MetarecError, Method
from metarec_jax.data.catalogue import Catalogue
from metarec_jax.data.tasks import TaskSet
from metarec_jax.experiment.mixing import (
    _least_deviations,
    _likeliest,
    _list_weights,
    _Lists,
    _ndcg,
    _place_of_new_items,
    _rating_weights,
)
from metarec_jax.learners.mixture import Weights, mixture

KEY = jax.random.key(0)


def level(value: float) -> Method:
    return Method(jnp.float32(value), lambda p, s, k: (), lambda p, a, x: p * jnp.ones(len(x["item_id"])))


def test_weights_follow_the_length_of_the_support_and_whether_the_item_is_known():
    """10 examples: half of the weights of short, half of those of long supports; members are bounded; lists are scaled."""
    ratings = Weights(
        {"low": np.array([[1.0, 0.0], [0.2, 0.6]]), "high": np.array([[0.0, 1.0], [0.8, 0.4]])},
        {"low": 1.0, "high": 1.0},
    )
    lists = Weights({"high": np.array([[1.0, 3.0], [5.0, 7.0]])}, {"high": 2.0})
    both = mixture({"low": level(1.0), "high": level(9.0)}, ratings, lists, rating_range=(1.0, 5.0))
    ten = Examples({"item_id": jnp.ones(12, int)}, jnp.ones(12), jnp.arange(12) < 10)
    adapted = both.adapt(both.params, ten._replace(mask=ten.mask.astype(jnp.float32)), KEY)
    items = {"item_id": jnp.array([3, 0])}
    np.testing.assert_allclose(both.predict(both.params, adapted, items), [0.4 + 0.6 * 7, 0.5 + 0.5 * 7], rtol=1e-6)
    np.testing.assert_allclose(both.rank(both.params, adapted, items), [6 * 9 / 2, 2 * 9 / 2], rtol=1e-6)
    with pytest.raises(MetarecError, match="weights for low"):
        mixture({"high": level(1.0)}, ratings, lists)


def test_rating_weights_are_those_of_the_truth():
    """y = 0.3 a + 0.7 b and noise: weights sum to 1, none is negative, and they are found to 0.03; noise gets none."""
    rng = np.random.default_rng(0)
    x = np.clip(rng.normal(3, 1, (6000, 3)), 1, 5)
    y = x @ [0.3, 0.7, 0.0] + rng.laplace(0, 0.2, 6000)
    few = rng.uniform(0, 1, 6000)
    weights = _least_deviations(x, y, few)
    np.testing.assert_allclose(weights.sum(1), 1.0, atol=1e-6)
    np.testing.assert_allclose(weights, [[0.3, 0.7, 0.0]] * 2, atol=0.03)
    assert (weights >= 0).all()
    found = _rating_weights(x, y, few, np.arange(6000) // 10, (1.0, 5.0))
    np.testing.assert_allclose(found, [[0.3, 0.7, 0.0]] * 2, atol=0.03)


def test_weights_change_with_the_length_of_the_support():
    """Short supports follow the first member, long ones the second."""
    rng = np.random.default_rng(1)
    x, few = rng.uniform(1, 5, (8000, 2)), rng.uniform(0, 1, 8000)
    y = few * x[:, 0] + (1 - few) * x[:, 1] + rng.laplace(0, 0.1, 8000)
    np.testing.assert_allclose(_least_deviations(x, y, few), [[1, 0], [0, 1]], atol=0.05)


def test_a_mean_that_does_not_generalise_is_its_best_member():
    """Four tasks of pure noise, one member exact: it stays alone."""
    rng = np.random.default_rng(2)
    y = rng.uniform(1, 5, 40)
    x = np.column_stack([y, *(rng.uniform(1, 5, 40) for _ in range(5))])
    found = _rating_weights(x, y, np.full(40, 0.5), np.arange(40) // 10, (1.0, 5.0))
    assert np.abs(x @ found[0] - y).mean() < 0.05


def test_list_weights_prefer_what_ranks_what_is_liked():
    rng = np.random.default_rng(3)
    truth, noise = rng.normal(size=(400, 50)), rng.normal(size=(400, 50))
    chance = np.exp(2 * truth)
    liked = np.zeros((400, 50), bool)
    for row, p in zip(liked, chance / chance.sum(1, keepdims=True), strict=True):
        row[rng.choice(50, 3, replace=False, p=p)] = True
    lists = _Lists(np.stack([truth, noise], -1).astype(np.float32), liked, np.full(400, 0.3))
    weights = _likeliest(lists)
    by_length = 0.3 * weights[0] + 0.7 * weights[1]
    assert by_length[0] == pytest.approx(2.0, rel=0.2)
    assert by_length[1] < 0.1
    assert (_list_weights(lists, ["truth", "noise"])[:, 1] < 0.1 * weights[:, 0]).all()
    assert _ndcg(np.array([[3.0, 2.0, 1.0]]), np.array([[False, True, False]])) == pytest.approx(1 / np.log2(3))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    data = mr.synthetic(150, 60, ratings_per_user=(12, 20))
    settings = {"steps": 20, "size": 3, "scenarios": ("user_cold",)}
    return mr.train("auto", data, tmp_path_factory.mktemp("run"), **settings, quiet=True)


def test_a_run_of_the_default_rates_and_ranks_and_is_the_same_when_opened(run):
    """Both heads from one adaptation; what is saved and opened again gives the same lists and ratings."""
    history = {1: 5.0, 2: 1.0, 3: 4.0}
    first, again = (one.recommender().recommend(history, n=5) for one in (run, mr.open_run(run.directory)))
    assert [(r.item_id, r.predicted, r.score) for r in first] == [(r.item_id, r.predicted, r.score) for r in again]
    low, high = run.data.rating.min(), run.data.rating.max()
    assert all(low <= r.predicted <= high for r in first)
    assert [r.score for r in first] == sorted((r.score for r in first), reverse=True)
    for r in first:  # reasons for the rank, which add up to it
        assert sum(i.contribution for i in r.because) == pytest.approx(r.score - r.prior, rel=0.05, abs=0.02)


@pytest.mark.slow
def test_the_default_is_no_worse_than_a_plain_method_on_validation_and_its_report_has_both(run):
    report = run.evaluate()
    methods = set(report.per_task["method"])
    assert {"mixture", "item_knn", "popularity"} <= methods
    assert np.isfinite(report.per_task.loc[report.per_task["method"] == "mixture", "mae"]).all()


@pytest.mark.slow
def test_a_finished_run_is_opened_and_members_that_do_not_fit_are_refused(run):
    data = mr.synthetic(150, 60, ratings_per_user=(12, 20))
    again = mr.train("auto", data, run.directory, steps=20, size=3, scenarios=("user_cold",), quiet=True)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), run.params, again.params))
    for text, message in (
        ("mixture:members=mixture", "cannot have the member 'mixture'"),
        ("mixture:members=rigde", "perhaps you meant 'ridge'"),
        ("mixture:members=item_map", "is for clicks"),
    ):
        with pytest.raises(MetarecError, match=message):
            mr.train(text, data, steps=1, quiet=True)


def test_new_items_come_after_the_first_ten_of_a_list():
    """Known items 1 to 200 score their number, of which the user has had none; new ones score 1,000 and more."""
    rows = np.arange(251)
    item_row = np.where(rows <= 200, rows, 0)
    known = Catalogue(
        jnp.zeros(9, jnp.int32), jnp.asarray(item_row), {}, {"item_number": jnp.asarray(rows, jnp.float32)[:, None]}
    )
    one = Method(
        jnp.zeros(()),
        lambda p, s, k: {"bias": s.target.sum() * 0},
        lambda p, a, x: jnp.where(x["item_id"] > 0, x["item_number"][:, 0], 1000 + x["item_number"][:, 0]) + a["bias"],
    )
    weights = Weights({"one": np.ones((2, 2))}, {"one": 1.0})
    made = mixture({"one": one}, None, weights)
    tasks = TaskSet(
        *(
            np.ones(shape, kind)
            for shape, kind in ((4, np.int32), *([((4, 1), t) for t in (np.int32, np.float32, np.float32)] * 2))
        )
    )
    offset = _place_of_new_items(made, {"user_cold": tasks}, known, 4)
    assert offset == pytest.approx(191 - 1250)  # items 200 to 191 are the ten best of every user
    moved = mixture({"one": one}, None, weights, new_items=offset)
    adapted = moved.adapt(moved.params, Examples({"item_id": jnp.zeros(1, int)}, jnp.zeros(1), jnp.zeros(1)), KEY)
    inputs = {"item_id": jnp.array([150, 0]), "item_number": jnp.array([[150.0], [250.0]])}
    assert moved.rank(moved.params, adapted, inputs).tolist() == [150.0, 191.0]


def test_a_run_in_a_folder_called_members_is_written_whole(tmp_path):
    data = mr.synthetic(60, 40, ratings_per_user=(8, 12))
    run = mr.train("ridge", data, tmp_path / "members" / "ridge", steps=2, size=2, scenarios=("user_cold",), quiet=True)
    assert mr.open_run(run.directory).config == run.config


def test_a_recipe_of_a_mixture_without_members_is_refused():
    with pytest.raises(MetarecError, match=r"a mixture is trained by mr\.train"):
        mr.recipe("auto", mr.synthetic(60, 40, ratings_per_user=(8, 12)))
