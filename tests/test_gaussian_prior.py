"""The Gaussian prior of a user's ratings: EM rises, the posterior is the textbook's, a planted truth is found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metarec_jax import factorization
from metarec_jax.baselines.closed_form import als, gaussian_prior
from metarec_jax.core import Examples, MetarecError
from metarec_jax.data.catalogue import catalogue
from metarec_jax.data.interactions import Interactions, Vocabulary
from metarec_jax.factorization import gaussian_factors


def drawn(users, items, size, per_user, seed=0, noise=(0.3, 1.5)):
    """Ratings drawn from a Gaussian prior with offsets and a noise per item; they and the true scores [users, items]."""
    rng = np.random.default_rng(seed)
    true = 3 + rng.normal(0, 0.5, items) + rng.normal(0, 0.4, (users, 1))
    true = true + rng.normal(size=(users, size)) @ rng.normal(0, 0.7, (size, items))
    item = np.concatenate([rng.permutation(items)[:per_user] for _ in range(users)])
    user = np.repeat(np.arange(users), per_user)
    rating = true[user, item] + np.linspace(*noise, items)[item] * rng.normal(size=len(user))
    names = Vocabulary(np.arange(users)), Vocabulary(np.arange(items + 1))  # the last item is never rated
    return Interactions(
        (user + 1).astype(np.int32), (item + 1).astype(np.int32), np.float32(rating), None, *names
    ), true


SMALL, _ = drawn(60, 12, 2, 7)


def support(items, targets, pad=0):
    ids = jnp.asarray(np.pad(items, (0, pad), constant_values=3), jnp.int32)
    mask = jnp.asarray(np.pad(np.ones(len(items)), (0, pad)), jnp.float32)
    return Examples({"item_id": ids}, jnp.asarray(np.pad(targets, (0, pad), constant_values=9.0), jnp.float32), mask)


def scores(method, given, items):
    adapted = method.adapt(method.params, given, jax.random.key(0))
    return np.asarray(method.predict(method.params, adapted, {"item_id": jnp.asarray(items, jnp.int32)}))


def penalised_likelihood(f, data, reg, reg_item, reg_noise):
    """The log-likelihood of the ratings under dense multivariate normals, one per user, in float64."""
    v, m, noise = (np.asarray(a, np.float64) for a in (f.loadings, f.item_mean, f.noise))
    total = 0.0
    for user in np.unique(data.user):
        mine = data.user == user
        items = data.item[mine]
        covariance = v[items] @ v[items].T + f.offset_variance + np.diag(noise[items])
        residual = data.rating[mine] - f.mu - m[items]
        total -= 0.5 * (np.linalg.slogdet(covariance)[1] + residual @ np.linalg.solve(covariance, residual))
    rated = np.unique(data.item)
    penalty = reg * (v**2).sum(1) + reg_item * m**2
    if not np.isinf(reg_noise):
        penalty += reg_noise * noise[0] + reg_noise * noise * np.log(noise / noise[0])  # row 0 has the typical noise
    return total - 0.5 * (penalty / noise)[rated].sum()


@pytest.mark.parametrize("penalties", [(0.0, 0.0, 0.0), (2.0, 1.0, 5.0), (2.0, 1.0, np.inf)])
def test_em_never_lowers_the_penalised_marginal_likelihood(penalties):
    names = ("reg", "reg_item", "reg_noise")
    fits = [
        gaussian_factors(SMALL, size=2, iterations=k, **dict(zip(names, penalties, strict=True))) for k in range(1, 12)
    ]
    values = [penalised_likelihood(f, SMALL, *penalties) for f in fits]
    rises = np.diff(values)
    assert (rises > -1e-3).all(), rises  # in float32
    assert rises[:3].min() > 0.05


def test_the_score_is_the_conditional_mean_of_the_joint_normal(float64):
    """cov(j, S) cov(S, S)^-1 (r - mean): the form without a posterior of the factors. Item 0 is unknown."""
    method = gaussian_prior(SMALL, catalogue(SMALL), size=3, unseen=0.7)
    method = method._replace(params=jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), method.params))
    f = gaussian_factors(SMALL, size=3)
    items, ratings = np.array([4, 9, 0, 1]), np.array([5.0, 2.0, 4.0, 3.5])
    v, m, noise = (np.asarray(a, np.float64) for a in (f.loadings, f.item_mean, f.noise.copy()))
    noise[0] *= np.float32(0.7)
    joint = v @ v.T + 1 / np.float64(np.float32(1 / f.offset_variance))
    inside = joint[np.ix_(items, items)] + np.diag(noise[items])
    mu = np.float64(np.float32(f.mu))
    want = mu + m + joint[:, items] @ np.linalg.solve(inside, ratings - mu - m[items])
    np.testing.assert_allclose(scores(method, support(items, ratings, 3), np.arange(len(m))), want, atol=1e-6)


def test_without_a_support_the_scores_are_the_item_means_and_an_unknown_item_has_the_users_offset():
    method, f = gaussian_prior(SMALL, catalogue(SMALL), size=2), gaussian_factors(SMALL, size=2)
    means = scores(method, support([], [], 4), np.arange(14))
    np.testing.assert_allclose(means, f.mu + f.item_mean, rtol=1e-6)
    assert means[0] == means[13] == np.float32(f.mu)  # of no item, and of one that nobody rated
    given = support([4, 9, 1], [5.0, 5.0, 5.0])
    offset = method.adapt(method.params, given, jax.random.key(0))["bias"]
    assert offset > 0.1
    np.testing.assert_allclose(scores(method, given, [0, 13]), np.float32(f.mu) + offset, rtol=1e-6)


def test_the_mean_of_an_item_with_one_rating_is_shrunk():
    rows = SMALL.item != 5
    rows[np.flatnonzero(~rows)[0]] = True
    data = SMALL.take(rows)
    data.rating[data.item == 5] = 9.0
    f = gaussian_factors(data, size=2, reg_item=3.0)
    assert 0 < f.item_mean[5] < (9.0 - f.mu) / 4  # one rating, and three without deviation


def test_a_planted_truth_is_found_better_than_by_als():
    """New users with 12 ratings; ALS with the best of five penalties on these very users."""
    data, true = drawn(500, 60, 3, 12)
    train = data.take(data.user <= 400)
    known = catalogue(data, train)

    def error(method):
        run = jax.jit(lambda given: method.predict(method.params, method.adapt(method.params, given, None), every))
        every, squared = {"item_id": jnp.arange(1, 61)}, []
        for user in range(400, 500):
            mine = data.user == user + 1
            squared.append((run(support(data.item[mine], data.rating[mine])) - true[user]) ** 2)
        return np.mean(squared)

    prior = error(gaussian_prior(train, known, size=3, reg=1.0, reg_item=1.0, iterations=20))
    best_als = min(error(als(train, known, size=3, reg=reg, reg_bias=reg)) for reg in (1.0, 2.0, 4.0, 8.0, 16.0))
    assert prior < 0.95 * best_als


def test_chunks_of_users_and_blocks_of_items_change_nothing(monkeypatch):
    whole = gaussian_factors(SMALL, size=2)
    monkeypatch.setattr(factorization, "_NUMBERS", 32)  # 2 users per product, 16 per chunk, 2 items per solve
    assert len(factorization._chunks(SMALL, SMALL.rating, 4)) > 2
    parts = gaussian_factors(SMALL, size=2)
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_the_fit_follows_the_scale_of_the_ratings_and_equal_ratings_have_one():
    larger = Interactions(SMALL.user, SMALL.item, SMALL.rating * 20 - 50, None, SMALL.users, SMALL.items)
    one, other = gaussian_factors(SMALL, size=2), gaussian_factors(larger, size=2)
    np.testing.assert_allclose(other.item_mean, 20 * one.item_mean, atol=0.02)
    np.testing.assert_allclose(np.abs(other.loadings), 20 * np.abs(one.loadings), atol=0.02)
    np.testing.assert_allclose(other.noise, 400 * one.noise, rtol=1e-3)
    equal = Interactions(SMALL.user, SMALL.item, np.full(len(SMALL), 4.0, np.float32), None, SMALL.users, SMALL.items)
    method = gaussian_prior(equal, catalogue(equal), size=20)  # more factors than items
    np.testing.assert_allclose(scores(method, support([4, 9], [4.0, 4.0]), np.arange(14)), 4.0, atol=1e-4)


def test_clicks_are_refused():
    clicks = Interactions(SMALL.user, SMALL.item, None, None, SMALL.users, SMALL.items)
    with pytest.raises(MetarecError, match=r"gaussian_prior requires ratings, .* use als"):
        gaussian_prior(clicks, catalogue(clicks))
