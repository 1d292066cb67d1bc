"""Candidate filters: the list is the best among the candidates, exactly; what the data does not have is refused."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from metarec_jax.core import MetarecError, Method
from metarec_jax.data.catalogue import catalogue
from metarec_jax.data.interactions import Feature, Interactions, Vocabulary
from metarec_jax.serving.candidates import candidates
from metarec_jax.serving.recommender import Recommender

ITEMS = 5000
GENRE = Feature(
    "multi", np.pad(1 + np.arange(ITEMS)[:, None] % 3, ((1, 0), (0, 1))), Vocabulary(np.array(["a", "b", "c"]))
)
YEAR = Feature(
    "numeric", np.pad((np.arange(ITEMS)[:, None] % 7).astype(np.float32), ((1, 0), (0, 0))), units=((1990.0, 1.0),)
)
USERS = np.repeat(np.arange(1, 11), ITEMS // 10)
DATA = Interactions(
    np.append(USERS, 1),
    np.append(1 + np.arange(ITEMS), 7),
    1 + (np.arange(ITEMS + 1) % 5).astype(np.float32),
    None,
    Vocabulary(np.arange(10)),
    Vocabulary(np.arange(ITEMS)),
    item_features={"item_genre": GENRE, "item_year": YEAR},
)
SCORE = np.random.default_rng(0).uniform(1, 5, ITEMS + 1).astype(np.float32)


def recommender() -> Recommender:
    params = {"score": jnp.asarray(SCORE)}
    method = Method(
        params, lambda p, s, k: {"sum": s.target.sum() * 0}, lambda p, a, x: p["score"][x["item_id"]] + a["sum"]
    )
    return Recommender(method, DATA, catalogue(DATA), chunk=512)


@pytest.mark.parametrize(
    ("filters", "passes"),
    [
        ({"only": [5, 17, 4999, 2500]}, lambda i: i in (5, 17, 4999, 2500)),
        ({"exclude": list(range(0, 4000))}, lambda i: i >= 4000),
        ({"where": {"genre": ["b"]}}, lambda i: i % 3 == 1),
        ({"where": {"item_genre": ["b", "c"], "year": ["1993"]}}, lambda i: i % 3 != 0 and i % 7 == 3),
        ({"min_ratings": 2}, lambda i: i == 6),
    ],
)
def test_the_list_is_the_best_of_the_candidates(filters, passes):
    """By hand: the scores of the items that pass, less the history, in order."""
    allowed = candidates(DATA, **filters)
    assert np.flatnonzero(allowed).tolist() == [i + 1 for i in range(ITEMS) if passes(i)]
    found = recommender().recommend({17: 3.0, 2: 4.0}, n=5, candidates=allowed, explain=0)
    wanted = sorted((i for i in range(ITEMS) if passes(i) and i not in (17, 2)), key=lambda i: -SCORE[i + 1])[:5]
    assert [r.item_id for r in found] == wanted
    many = recommender().recommend_many(([1, 1], [17, 2], [3.0, 4.0]), n=5, candidates=allowed)
    assert [r.item_id for r in many[1]] == wanted


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"only": [77_777]}, "only: no single item is called"),
        ({"where": {"colour": ["red"]}}, "no feature 'colour'; their features are: genre, year"),
        ({"where": {"genre": ["z"]}}, "no item has genre=z; its values are, among others: a, b, c"),
        ({"where": {"year": ["new"]}}, "year is a number, got 'new'"),
        ({"min_ratings": 3}, "no item passes all filters"),
    ],
)
def test_what_the_data_does_not_have_is_refused(filters, message):
    with pytest.raises(MetarecError, match=message):
        candidates(DATA, **filters)


def test_the_order_by_rating_and_wrong_masks():
    with pytest.raises(MetarecError, match=r"candidates expected bool \[5001\]"):
        recommender().recommend({1: 2.0}, candidates=np.ones(3, bool))
    lists = Method(
        {"score": jnp.asarray(SCORE)},
        lambda p, s, k: {"sum": s.target.sum() * 0},
        lambda p, a, x: p["score"][x["item_id"]] + a["sum"],
        rank=lambda p, a, x: -p["score"][x["item_id"]] + a["sum"],
    )
    by_list, by_rating = (
        Recommender(lists, DATA, catalogue(DATA), by=by).recommend({17: 3.0}, n=3, explain=0)
        for by in ("list", "rating")
    )
    assert by_rating[0].item_id == int(np.argmax(SCORE[1:]))
    assert by_list[0].item_id == int(np.argmin(SCORE[1:]))
    assert by_list[0].predicted == pytest.approx(SCORE[1:].min())
