"""The generator's claims: its noise is the floor, its features explain what it says, its draws are distinct."""

import numpy as np
import pytest

from metarec_jax.core import MetarecError
from metarec_jax.data.synthetic import Synthetic, checkerboard, synthetic


def rmse(error: np.ndarray) -> float:
    return float(np.sqrt(np.mean(error**2)))


def test_the_truth_misses_exactly_the_noise():
    made = synthetic(2000, 500, noise=0.3)
    data = made.data
    error = data.rating - made.scores(data.user, data.item)
    # the standard error of an RMSE over N rows is noise / sqrt(2 N)
    assert abs(rmse(error) - made.best_rmse) < 4 * 0.3 / np.sqrt(2 * len(data))
    assert abs(error.mean()) < 4 * 0.3 / np.sqrt(len(data))
    # and any other prediction misses more: rmse^2 = noise^2 + mean (prediction - truth)^2
    worse = rmse(data.rating - data.rating.mean())
    spread = np.std(made.scores(data.user, data.item))
    assert worse == pytest.approx(np.sqrt(0.3**2 + spread**2), rel=0.02)


def test_the_moments_are_as_said():
    t = synthetic(20_000, 20_000, ratings_per_user=(1, 1), size=4, taste=0.7, content=0.8, group=0.3).truth
    assert t.item_vector[1:].std() == pytest.approx(0.7, rel=0.03)
    assert t.user_bias[1:].std() == pytest.approx(0.4, rel=0.03)
    assert t.item_bias[1:].std() == pytest.approx(0.3, rel=0.03)
    own = (t.user_vector - t.user_prior)[1:]
    assert own.std() == pytest.approx(np.sqrt(0.7 / 4), rel=0.03)
    assert t.user_sd == pytest.approx(np.sqrt(0.7 / 4))
    assert not t.user_vector[0].any()
    assert not t.item_vector[0].any()
    assert t.item_bias[0] == 0


@pytest.mark.parametrize("content", [0.0, 0.5, 1.0])
def test_features_explain_the_share_of_the_item_vectors(content):
    made = synthetic(10, 5000, ratings_per_user=(5, 5), content=content)
    features = made.data.item_features
    maker = features["item_maker"].values[1:]
    genre = features["item_genre"].values[1:]
    design = np.concatenate(
        [
            np.eye(maker.max() + 1)[maker],
            sum(np.eye(19)[genre[:, k]] for k in range(3))[:, 1:],
            features["item_tone"].values[1:],
        ],
        axis=1,
    )
    target = made.truth.item_vector[1:]
    fitted = design @ np.linalg.lstsq(design, target, rcond=None)[0]
    explained = 1 - ((target - fitted) ** 2).sum() / ((target - target.mean(0)) ** 2).sum()
    # a fit of 219 columns to 5000 rows of noise explains 219 / 5000 of the rest
    assert explained == pytest.approx(content + (1 - content) * 219 / 5000, abs=0.03)


def test_posterior_lies_between_the_prior_and_the_truth():
    made = synthetic(400, 300, ratings_per_user=(100, 100), noise=0.5)
    data, t = made.data, made.truth
    errors: dict[int, list[np.ndarray]] = {0: [], 4: [], 16: [], 80: []}
    for user in range(1, 401):
        rows = np.random.default_rng(user).permutation(np.flatnonzero(data.user == user))
        query = rows[80:]
        for k, of in errors.items():
            known = rows[:k]
            guess = made.posterior_scores(user, data.item[known], data.rating[known], data.item[query])
            of.append(data.rating[query] - guess)
    by_support = [rmse(np.concatenate(of)) for of in errors.values()]
    assert by_support == sorted(by_support, reverse=True)
    # without support: variance of noise, of b_u, and of <w - prior, v>, whose mean is user_sd^2 |v|^2
    size = (t.item_vector[data.item] ** 2).sum(1).mean()
    assert by_support[0] == pytest.approx(np.sqrt(0.25 + 0.16 + t.user_sd**2 * size), rel=0.05)
    # with 80 ratings for 5 unknowns: noise^2 (1 + 5 / 80), a little less as the prior helps
    assert 0.5 < by_support[-1] < 0.5 * np.sqrt(1 + 5 / 80) * 1.03


def test_posterior_equals_the_closed_form_of_one_rating():
    made = synthetic(5, 10, ratings_per_user=(2, 2), size=1, noise=0.5)
    t, item, other = made.truth, np.array([3]), np.array([7])
    prior = lambda i: t.mean + t.item_bias[i] + t.user_prior[1, 0] * t.item_vector[i, 0]  # noqa: E731
    cov = 0.4**2 + t.user_sd**2 * t.item_vector[3, 0] * t.item_vector[7, 0]
    var = 0.4**2 + t.user_sd**2 * t.item_vector[3, 0] ** 2
    want = prior(7) + cov / (var + 0.25) * (5.0 - prior(3))
    assert made.posterior_scores(1, item, np.array([5.0]), other)[0] == pytest.approx(want, rel=1e-5)


def test_rounded_ratings_and_their_floor():
    made = synthetic(2000, 500, rounded=True, noise=0.5)
    data = made.data
    assert set(np.unique(data.rating)) == {1, 2, 3, 4, 5}
    # the best prediction is E[r | score]; take it from the data: the mean rating in narrow bands of the score
    score = made.scores(data.user, data.item)
    band = np.digitize(score, np.arange(0, 7, 0.02))
    mean = np.bincount(band, data.rating) / np.maximum(np.bincount(band), 1)
    assert rmse(data.rating - mean[band]) == pytest.approx(made.best_rmse, rel=0.01)
    assert made.best_rmse < rmse(data.rating - score)


@pytest.mark.parametrize(("items", "most"), [(2000, 30), (100, 90), (40, 40)])
@pytest.mark.parametrize("implicit", [False, True])
def test_items_of_a_user_are_distinct_and_as_many_as_asked(items, most, implicit):
    data = synthetic(300, items, ratings_per_user=(10, most), implicit=implicit).data
    pairs = data.user.astype(np.int64) * 10_000 + data.item
    assert (np.diff(pairs) > 0).all()
    counts = np.bincount(data.user, minlength=301)[1:]
    assert counts.min() >= 10
    assert counts.max() <= most
    assert data.item.min() >= 1
    assert data.item.max() <= items


def test_implicit_users_take_what_they_like():
    made = synthetic(2000, 1000, ratings_per_user=(20, 40), implicit=True, taste=2.0)
    data = made.data
    assert data.implicit
    assert np.isnan(made.best_rmse)
    strangers = np.random.default_rng(0).permutation(data.user)
    # the log odds of taken pairs exceed those of the same items with users at random: acceptance weighs a pair by
    # sigmoid(score), which moves the mean of a wide symmetric score by about E|score| = 2 sqrt(2 / pi), less what
    # user and item means take
    assert made.scores(data.user, data.item).mean() > made.scores(strangers, data.item).mean() + 0.8


def test_cold_items_have_features_and_no_rating():
    made = synthetic(200, 100, ratings_per_user=(10, 20), cold_items=0.2)
    assert made.data.item.max() == 80
    assert made.data.items.num_rows == 101
    assert (made.data.item_features["item_maker"].values[81:] > 0).all()
    assert np.isfinite(made.scores(np.arange(1, 11), np.arange(91, 101))).all()


def test_the_seed_decides():
    a, b, c = (synthetic(50, 60, ratings_per_user=(5, 9), seed=seed).data for seed in (3, 3, 4))
    assert np.array_equal(a.rating, b.rating)
    assert np.array_equal(a.item, b.item)
    assert len(a) != len(c) or not np.array_equal(a.item, c.item)


def test_a_large_one_makes_no_matrix_of_users_and_items():
    made = synthetic(200_000, 1_000_000, ratings_per_user=(5, 5))  # a byte for each pair would be 200 GB
    assert len(made.data) == 1_000_000
    assert isinstance(made, Synthetic)
    assert made.data.user.dtype == made.data.item.dtype == np.int32


def test_too_many_distinct_items_are_refused():
    with pytest.raises(MetarecError, match="lower ratings_per_user or raise num_items"):
        synthetic(10, 20)


def test_the_checkerboard():
    board = checkerboard(6, 8)
    assert len(board) == 6 * 8 - 6
    even = (board.user - 1) % 2 == (board.item - 1) % 2
    assert (board.rating[even] == 5).all()
    assert (board.rating[~even] == 1).all()
    liked = checkerboard(6, 8, implicit=True)
    assert liked.implicit
    assert len(liked) == 6 * 4 - 6
    # the one item that user u likes and has not had is u % num_items
    for u in range(6):
        had = set((liked.item[liked.user == u + 1] - 1).tolist())
        assert {i for i in range(8) if i % 2 == u % 2} - had == {u % 8}
    with pytest.raises(MetarecError, match="even"):
        checkerboard(3, 5)
