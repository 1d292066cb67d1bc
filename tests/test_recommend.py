"""Recommender: the same list as a plain sort, exact reasons where the method is linear, names and ratings checked."""

import dataclasses
import os
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from metarec_jax.baselines.closed_form import als, bias, item_knn, popularity, user_mean
from metarec_jax.core import MetarecError, Method
from metarec_jax.data.catalogue import catalogue
from metarec_jax.data.draw import CLICK_NEGATIVES
from metarec_jax.data.interactions import Feature, Interactions, Vocabulary
from metarec_jax.serving.history import Names, format_rating, parse_history
from metarec_jax.serving.recommender import Recommender

TITLES = np.array(
    ["Toy Story (1995)", "Heat (1995)", "Alien (1979)", "ALIEN (1979)", *[f"Film {k}" for k in range(5, 51)]]
)


def make(implicit=False, num_items=50, num_users=80, seed=0):
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(1, num_users + 1), 20).astype(np.int32)
    item = np.concatenate([rng.permutation(num_items - 2)[:20] + 1 for _ in range(num_users)]).astype(np.int32)
    taste = rng.normal(size=(num_users + 1, 2)) @ rng.normal(size=(2, num_items + 1))
    rating = np.clip(np.round(3 + taste[user, item]), 1, 5).astype(np.float32)
    return Interactions(
        user,
        item,
        None if implicit else rating,
        None,
        Vocabulary(np.arange(100, 100 + num_users)),
        Vocabulary(np.array([f"m{k}" for k in range(1, num_items + 1)])),
        user_features={
            "user_job": Feature(
                "categorical", np.zeros(num_users + 1, np.int32), Vocabulary(np.array(["cook", "clerk"]))
            ),
            "user_tags": Feature("multi", np.zeros((num_users + 1, 3), np.int32), Vocabulary(np.array(["a", "b"]))),
            "user_age": Feature("numeric", np.zeros((num_users + 1, 1), np.float32)),
        },
        titles=TITLES,
    )


DATA = make()
KNOWN = catalogue(DATA)
CLICKS = make(implicit=True)
ALS = als(DATA, KNOWN, size=3, reg=1.0)
HISTORY = {"m3": 5, "m7": 1, "m12": 4, "m20": 2}


def slow_scores(method, history):
    """Scores of the whole catalogue, [num_rows], in one predict."""
    from metarec_jax.core import Examples

    rows = jnp.asarray(DATA.items.encode(list(history)))
    support = Examples({"item_id": rows}, jnp.asarray(list(history.values()), jnp.float32), jnp.ones(len(history)))
    adapted = method.adapt(method.params, support, jax.random.key(0))
    return np.array(method.predict(method.params, adapted, {"item_id": KNOWN.item_row}))


@pytest.mark.parametrize("chunk", [1, 7, 50, 65536])
def test_chunks_give_the_plain_sort_without_the_seen(chunk):
    scores = slow_scores(ALS, HISTORY)
    scores[[0, 3, 7, 12, 20]] = -np.inf
    wanted = np.argsort(-scores, kind="stable")[:8]
    got = Recommender(ALS, DATA, KNOWN, chunk=chunk).recommend(HISTORY, n=8, explain=0)
    assert [r.item_id for r in got] == [f"m{k}" for k in wanted]
    np.testing.assert_allclose([r.score for r in got], scores[wanted], rtol=1e-5)
    assert [r.title for r in got] == [TITLES[k - 1] for k in wanted]


def test_seen_items_may_stay_and_the_list_ends_with_the_catalogue():
    recommender = Recommender(ALS, DATA, KNOWN)
    everything = recommender.recommend(HISTORY, n=1000, exclude_seen=False)
    assert {r.item_id for r in everything} == set(DATA.items.ids)
    rest = recommender.recommend(HISTORY, n=1000)
    assert {r.item_id for r in rest} == set(DATA.items.ids) - set(HISTORY)


@pytest.mark.parametrize("make_method", [als, bias, item_knn, user_mean])
def test_contributions_of_a_linear_method_add_up_to_what_the_history_moved(make_method):
    got = Recommender(make_method(DATA, KNOWN), DATA, KNOWN).recommend(HISTORY, n=6, explain=9)
    for r in got:
        assert len(r.because) == 4
        np.testing.assert_allclose(sum(i.contribution for i in r.because), r.score - r.prior, atol=1e-5)
        sizes = [abs(i.contribution) for i in r.because]
        assert sizes == sorted(sizes, reverse=True)


def test_contributions_of_a_curved_method_are_averaged_along_the_path():
    """Scores 3 + sum (t - 3)^3: of 5 and 2 the parts are 8 and -1, where the last slope alone says 3 * 4 * 2 = 24."""

    def adapt(params, support, key):
        return (support.mask * (support.target - 3) ** 3).sum()

    def predict(params, adapted, inputs):
        return 3.0 + adapted + 0.0 * inputs["item_id"]

    best = Recommender(Method({}, adapt, predict), DATA, KNOWN).recommend({"m1": 5, "m2": 2}, n=1)[0]
    assert [i.item_id for i in best.because] == ["m1", "m2"]
    np.testing.assert_allclose([i.contribution for i in best.because], [8, -1], rtol=2e-3)


def test_reasons_name_the_feedback_as_it_was_given():
    best = Recommender(bias(DATA, KNOWN, reg_user=1.0), DATA, KNOWN).recommend({"Toy Story (1995)": 5, "m9": 1}, n=1)[0]
    by = {i.item_id: i for i in best.because}
    assert by["m1"].title == "Toy Story (1995)"
    assert (by["m1"].rating, by["m9"].rating) == (5.0, 1.0)
    mu, b = float(bias(DATA, KNOWN).params["mu"]), np.asarray(bias(DATA, KNOWN).params["item_bias"])
    np.testing.assert_allclose(by["m1"].contribution, (5 - mu - b[1]) / (2 + 1.0), rtol=1e-4)  # a third of its residual


def test_names_id_then_title_then_another_case_and_unknown_ones_with_suggestions():
    recommender = Recommender(ALS, DATA, KNOWN)
    same = [{"m2": 5.0}, {"Heat (1995)": 5.0}, {"hEAT (1995) ": 5.0}, {"title": ["Heat (1995)"], "rating": [5]}]
    lists = [[r.item_id for r in recommender.recommend(h)] for h in same]
    assert lists == [lists[0]] * 4
    assert "m2" not in lists[0]
    out = recommender.recommend({"Heat": 5, "Toy Stori (1995)": 4, "alien (1979)": 3, "m5": 2})
    assert [u.name for u in out.unknown] == ["Heat", "Toy Stori (1995)", "alien (1979)"]
    assert out.unknown[0].suggestions[0] == "Heat (1995)"
    assert out.unknown[1].suggestions[0] == "Toy Story (1995)"
    assert set(out.unknown[2].suggestions) >= {"Alien (1979)", "ALIEN (1979)"}  # two films: not guessed
    assert [r.item_id for r in out] == [r.item_id for r in recommender.recommend({"m5": 2})]


def test_an_empty_history_gives_the_list_of_the_prior():
    out = Recommender(ALS, DATA, KNOWN).recommend({}, n=3)
    prior = np.asarray(ALS.params["mu"] + ALS.params["item_bias"])
    assert [r.item_id for r in out] == [f"m{k}" for k in np.argsort(-prior[1:], kind="stable")[:3] + 1]
    assert all(r.score == pytest.approx(r.prior) and r.because == () for r in out)
    assert [r.item_id for r in Recommender(popularity(DATA, KNOWN), DATA, KNOWN).recommend([], n=3)]


def test_of_repeated_feedback_the_last_counts_and_is_noted():
    recommender = Recommender(ALS, DATA, KNOWN)
    out = recommender.recommend({"item_id": ["m3", "m7", "m3"], "rating": [1, 2, 5]})
    assert out.notes == ("1 repeated ratings or clicks: the last of each item is used",)
    once = recommender.recommend({"m7": 2, "m3": 5})
    assert [(r.item_id, r.score) for r in out] == [(r.item_id, pytest.approx(r.score, abs=1e-5)) for r in once]


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ({"m3": 9}, "rating of 'm3': expected a number from 1 to 5, got 9"),
        ({"m3": float("nan")}, "'m3': expected .* got nan"),
        ({"m3": "good"}, "'m3': expected .* got 'good'"),
        (["m3"], "items without ratings"),
        ({"item_id": ["m3", "m4"], "rating": [3]}, "different lengths"),
    ],
)
def test_a_bad_history_is_refused_in_one_message(history, message):
    with pytest.raises(MetarecError, match=message):
        Recommender(ALS, DATA, KNOWN).recommend(history)


def test_the_ends_of_a_scale_that_float32_rounds_are_on_it():
    """-9.95 is -9.949999809 at float32: who writes -9.95 has not left the scale."""
    rating = np.where(DATA.rating == 1, np.float32(-9.95), np.float32(8.384207)).astype(np.float32)
    data = dataclasses.replace(DATA, rating=rating)
    parsed = parse_history({"m3": -9.95, "m4": float(format_rating(rating.max()))}, data, Names(data))
    assert set(parsed.rating) == {np.float32(-9.95), np.float32(8.384207)}
    with pytest.raises(MetarecError, match=r"from -9\.95 to 8\.384207"):
        parse_history({"m3": -9.96}, data, Names(data))


def test_n_and_features_are_checked():
    recommender = Recommender(ALS, DATA, KNOWN)
    with pytest.raises(MetarecError, match="n must be 1 or more"):
        recommender.recommend(HISTORY, n=0)
    with pytest.raises(MetarecError, match="no user feature 'shoe'; the data has: user_job"):
        recommender.recommend(HISTORY, user_features={"shoe": 1})
    with pytest.raises(MetarecError, match="user_age: expected 1 finite number, got 'old'"):
        recommender.recommend(HISTORY, user_features={"user_age": "old"})


def test_user_features_reach_the_method_in_support_and_catalogue():
    def adapt(params, support, key):
        return support.inputs["user_job"][0] * (support.inputs["item_id"].shape[0] > 0)

    def predict(params, adapted, inputs):
        age, tags = inputs["user_age"][0, 0], inputs["user_tags"].sum()
        return inputs["item_id"] * 0.0 + 100 * adapted + 10 * tags + age + 1000 * inputs["user_job"][0]

    recommender = Recommender(Method({}, adapt, predict), DATA, KNOWN)
    out = recommender.recommend(
        {}, n=1, user_features={"job": "clerk", "user_tags": ["a", "b", "zz"], "age": 0.5}, explain=0
    )
    assert out[0].score == 100 * 2 + 10 * (1 + 2) + 0.5 + 1000 * 2
    assert out.notes[0] == "user_tags 'zz' is not in the data, and counts as unknown"
    assert recommender.recommend({}, n=1, user_features={"job": "king"})[0].score == 0.0


def test_items_never_trained_are_scored_too():
    train = DATA.take(DATA.item <= 10)
    method = als(train, catalogue(DATA, train), size=2)
    out = Recommender(method, DATA, catalogue(DATA, train)).recommend({"m1": 3}, n=100)
    assert {r.item_id for r in out} == set(DATA.items.ids) - {"m1"}


def test_clicks_reasons_are_the_derivative_with_respect_to_the_weight():
    known = catalogue(CLICKS)
    out = Recommender(item_knn(CLICKS, known), CLICKS, known).recommend(["m3", "m7"], n=2, explain=5)
    assert {i.rating for i in out[0].because} == {None}
    assert out.rows()[0]["because"].startswith(f"{out[0].because[0].title}: +")
    for r in out:  # its score is a sum over the history of similarities: each is its own derivative
        np.testing.assert_allclose(sum(i.contribution for i in r.because), r.score, rtol=1e-5)
    noted = Recommender(item_knn(CLICKS, known), CLICKS, known).recommend({"m3": 5})
    assert "ignored" in noted.notes[0]


def test_negatives_stand_in_the_support_of_clicks_and_are_not_dropped_from_the_list():
    known = catalogue(CLICKS)

    def adapt(params, support, key):
        return (support.mask * (support.target == 0)).sum(), (support.mask * support.target).sum()

    def predict(params, adapted, inputs):
        return inputs["item_id"] * 0.0 + 100 * adapted[0] + adapted[1]

    out = Recommender(Method({}, adapt, predict), CLICKS, known, negatives=3).recommend(["m3", "m7"], n=100, explain=0)
    assert out[0].score == 100 * 6 + 2
    assert len(out) == 48
    usual = Recommender(Method({}, adapt, predict), CLICKS, known).recommend(["m3", "m7"], n=1, explain=0)
    assert usual[0].score == 100 * CLICK_NEGATIVES * 2 + 2


def test_many_users_get_what_each_gets_alone():
    recommender = Recommender(ALS, DATA, KNOWN)
    rng = np.random.default_rng(3)
    users, items, ratings = [], [], []
    for user, count in zip(["zoe", "al", "bo", "cy"], [3, 20, 1, 9], strict=True):
        users += [user] * count
        items += [f"m{k}" for k in rng.permutation(50)[:count] + 1]
        ratings += rng.integers(1, 6, count).tolist()
    items[1] = "nothing"
    many = recommender.recommend_many((users, items, ratings), n=4, explain=2)
    assert list(many) == ["zoe", "al", "bo", "cy"]
    assert [u.name for u in many.unknown] == ["nothing"]
    assert [u.name for u in many["zoe"].unknown] == ["nothing"]
    for user in many:
        at = [k for k, u in enumerate(users) if u == user]
        alone = recommender.recommend({items[k]: ratings[k] for k in at}, n=4, explain=2)
        assert [r.item_id for r in many[user]] == [r.item_id for r in alone]
        for a, b in zip(many[user], alone, strict=True):
            np.testing.assert_allclose(a.score, b.score, rtol=1e-5)
            np.testing.assert_allclose(
                [i.contribution for i in a.because], [i.contribution for i in b.because], atol=1e-5
            )
    rows = many.rows()
    assert len(rows) == 16
    assert list(rows[0]) == ["user_id", "rank", "item_id", "title", "predicted", "score", "because"]
    with pytest.raises(MetarecError, match="row 2 of the histories has no user_id"):
        recommender.recommend_many((["a", None], ["m1", "m2"], [3, 3]))
    assert len(recommender.recommend_many(([], [], []))) == 0


def test_one_program_serves_many_histories():
    traces = []

    def predict(params, adapted, inputs):
        traces.append(1)
        return ALS.predict(params, adapted, inputs)

    recommender = Recommender(Method(ALS.params, ALS.adapt, predict), DATA, KNOWN)
    recommender.recommend({"m1": 3})
    once = len(traces)
    for k in range(2, 7):
        recommender.recommend({f"m{j}": 4 for j in range(1, k)})
    assert len(traces) == once


def test_predicted_ratings_are_clipped_and_the_order_is_by_the_score():
    def predict(params, adapted, inputs):
        return inputs["item_id"] * 1.0

    method = Method({}, lambda params, support, key: None, predict)
    out = Recommender(method, DATA, KNOWN).recommend({"m48": 3}, n=48, explain=0)
    assert [r.score for r in out[:3]] == [47, 46, 45]
    assert [r.predicted for r in out] == [5.0] * 43 + [4.0, 3.0, 2.0, 1.0, 1.0]  # the last has score 0
    assert out.notes == ("predicted ratings are clipped to the scale, 1 to 5; the order is by the score",)
    many = Recommender(method, DATA, KNOWN).recommend_many((["a", "b"], ["m48", "m3"], [3, 3]), n=2)
    assert many.notes == out.notes
    raw = Recommender(method, DATA, KNOWN, predicts_ratings=False).recommend({"m50": 3}, n=2)
    assert (raw[0].predicted, raw.notes) == (None, ())
    assert "predicted" not in raw.rows()[0]


def test_items_of_one_title_are_told_apart_by_id():
    titles = TITLES.copy()
    titles[[9, 19]] = "Hamlet"
    titles[29] = "m1"
    data = dataclasses.replace(DATA, titles=titles)
    names = Names(data)
    (hamlet,) = parse_history({"Hamlet": 5}, data, names).unknown
    assert hamlet.ids == ("m10", "m20")
    assert names.sharing("hamlet") == ("m10", "m20")
    assert names.sharing("Alien (1979)") == ()  # the other is spelt otherwise
    assert names.rows(["m1", "M1"]).tolist() == [1, 30]  # an id goes before a title


def test_a_history_of_all_items_leaves_nothing_and_says_so():
    recommender = Recommender(ALS, DATA, KNOWN)
    every = {f"m{k}": 3 for k in range(1, 51)}
    assert recommender.recommend(every).notes == ("nothing to recommend: all 50 items are in the history",)
    many = recommender.recommend_many((["ann"] * 50 + ["bo"], [*every, "m1"], [3] * 51))
    assert many.notes[0] == "user ann: nothing to recommend: all 50 items are in the history"
    assert (len(many["ann"]), len(many["bo"])) == (0, 10)


@pytest.mark.parametrize(
    "history",
    [
        pd.Series({"m3": 5.0, "m7": 1.0}),
        pd.DataFrame({"item": ["m3", "m7"], "stars": [5, 1]}),
        pd.DataFrame({"movieId": ["m3", "m7"], "score": [5, 1], "title": ["x", "y"]}),
        {"asin": ["m3", "m7"], "overall": [5.0, 1.0]},
        {"Title": ["film 3", "Film 7"], "Rating": np.array([5, 1])},
    ],
)
def test_histories_under_the_names_that_files_have(history):
    titles = np.array([f"Film {k}" for k in range(1, 51)])
    data = dataclasses.replace(DATA, titles=titles)
    parsed = parse_history(history, data, Names(data))
    assert (parsed.item.tolist(), parsed.rating.tolist(), parsed.unknown) == ([3, 7], [5.0, 1.0], ())


def test_a_series_of_names_is_a_list_of_clicks_and_other_columns_are_named():
    parsed = parse_history(pd.Series(["m3", "m7"]), CLICKS, Names(CLICKS))
    assert parsed.item.tolist() == [3, 7]
    with pytest.raises(MetarecError, match="columns shoe, stars, none of them with a usual name for items"):
        parse_history(pd.DataFrame({"shoe": [1], "stars": [2]}), DATA, Names(DATA))
    table = pd.DataFrame({"customer": ["a", "b"], "product": ["m3", "m7"], "overall": [5, 1]})
    assert list(Recommender(ALS, DATA, KNOWN).recommend_many(table, n=1)) == ["a", "b"]
    with pytest.raises(MetarecError, match="none of them with a usual name for users"):
        Recommender(ALS, DATA, KNOWN).recommend_many(table.drop(columns="customer"))


def test_features_of_each_of_many_users():
    """Each gets what it gets alone, in the data's own units; one whom only the features name gets a list too."""

    def adapt(params, support, key):
        return support.inputs["user_job"][0]

    def predict(params, adapted, inputs):
        return inputs["item_id"] * 1.0 + 1000 * adapted + 100 * inputs["user_age"][0, 0] + 0 * inputs["user_job"]

    age = Feature("numeric", np.zeros((81, 1), np.float32), units=((40.0, 10.0),))
    data = dataclasses.replace(DATA, user_features={**DATA.user_features, "user_age": age})
    recommender = Recommender(Method({}, adapt, predict), data, catalogue(data), predicts_ratings=False)
    table = pd.DataFrame({"user": ["bo", "new"], "age": [60.0, np.nan], "job": ["clerk", "king"]})
    many = recommender.recommend_many((["ann", "bo"], ["m50", "m50"], [3, 3]), n=1, user_features=table)
    assert {user: many[user][0].score for user in many} == {"ann": 48, "bo": 48 + 2000 + 200, "new": 48}
    assert many.notes == ("user new: user_job 'king' is not in the data, and counts as unknown",)
    alone = recommender.recommend({"m50": 3}, n=1, user_features={"age": 60, "job": "clerk"})
    assert alone[0].score == many["bo"][0].score
    with pytest.raises(MetarecError, match="no user feature 'shoe'"):
        recommender.recommend_many(([], [], []), user_features={"ann": {"shoe": 1}})


def test_many_recommendations_show_what_they_hold():
    many = Recommender(ALS, DATA, KNOWN).recommend_many((["ann", 7, "ann"], ["m3", "m4", "nothing"], [3, 4, 3]), n=5)
    first, ann, seven, skipped = repr(many).splitlines()
    assert first == "ManyRecommendations of 2 users"
    assert ann == f"  'ann': {', '.join(repr(str(r.title)) for r in many['ann'][:3])}, and 2 more"
    assert seven.startswith("  7: ")
    assert skipped == "  skipped: no single item is called 'nothing'"
    assert [user for user, _ in many.items()] == ["ann", 7]


def test_a_recommender_is_not_pickled():
    with pytest.raises(MetarecError, match=r"cannot be pickled.* open the run in each process"):
        pickle.dumps(Recommender(ALS, DATA, KNOWN))


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")  # of forking where JAX has threads
def test_a_fork_is_refused_and_does_not_hang():
    recommender = Recommender(ALS, DATA, KNOWN)
    child = os.fork()
    if not child:
        try:
            recommender.recommend({"m1": 3})
        except MetarecError as error:
            os._exit(7 if "spawn" in str(error) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@pytest.mark.parametrize("implicit", [False, True], ids=["ratings", "clicks"])
def test_nothing_that_a_known_user_had_is_recommended_however_little_of_it_is_given(implicit):
    """User 100 had 20 of 50 items and gives one of them: the list is that of a new user less the other 19."""
    data = make(implicit)
    serve = Recommender(item_knn(data, catalogue(data)), data, catalogue(data), negatives=0)
    had = {str(item) for item in data.items.decode(data.item[data.user == 1])}
    given = sorted(had)[:1]
    history = given if implicit else dict.fromkeys(given, 5.0)
    every, left = serve.recommend(history, 50), serve.recommend(history, 50, known_user=100)
    assert len(left) == 30
    assert [r.item_id for r in left] == [r.item_id for r in every if r.item_id not in had]
    scores = {r.item_id: r.score for r in every}
    assert [r.score for r in left] == pytest.approx([scores[r.item_id] for r in left], abs=1e-5)
    with pytest.raises(MetarecError, match="known_user 7 is not a user of the data"):
        serve.recommend(history, 5, known_user=7)
