"""Baselines: equal to their normal equations, right on planted problems, blind to padding."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metarec_jax.baselines import closed_form
from metarec_jax.baselines.closed_form import (
    BASELINES,
    als,
    bias,
    ease,
    item_knn,
    item_mean,
    popularity,
    random,
    user_mean,
)
from metarec_jax.baselines.tuning import fit_baselines, on_device, quality, suitable
from metarec_jax.core import Examples, MetarecError
from metarec_jax.data.catalogue import catalogue
from metarec_jax.data.interactions import Interactions, Vocabulary
from metarec_jax.data.tasks import make_tasks
from metarec_jax.factorization import (
    als_factors,
    bias_terms,
    implicit_als_factors,
    item_weights,
    neighbours,
    similarities,
)

KEY = jax.random.key(0)


def frame(user, item, rating=None, num_items=None):
    """Interactions from rows that count from 1."""
    user, item = np.asarray(user, np.int32), np.asarray(item, np.int32)
    return Interactions(
        user,
        item,
        None if rating is None else np.asarray(rating, np.float32),
        None,
        Vocabulary(np.arange(1, user.max() + 1)),
        Vocabulary(np.arange(1, (num_items or item.max()) + 1)),
    )


def planted(num_users=300, num_items=80, size=2, per_user=30, noise=0.0, seed=0):
    """Ratings from a low-rank model; returns them and the whole true matrix [users, items]."""
    rng = np.random.default_rng(seed)
    true = 3 + rng.normal(0, 0.3, num_items) + rng.normal(0, 0.3, (num_users, 1))
    true = true + rng.normal(size=(num_users, size)) @ rng.normal(size=(size, num_items))
    item = np.concatenate([rng.permutation(num_items)[:per_user] for _ in range(num_users)])
    user = np.repeat(np.arange(num_users), per_user)
    rating = true[user, item] + noise * rng.normal(size=len(user))
    return frame(user + 1, item + 1, rating, num_items), true


def checkerboard(users=40, items=20):
    """User u clicked the items of its own parity, but for one or two."""
    pairs = [
        (u, i) for u in range(users) for i in range(items) if u % 2 == i % 2 and i not in (u % items, (u + 2) % items)
    ]
    user, item = np.array(pairs).T
    return frame(user + 1, item + 1)


RATED = planted(noise=0.2)[0]
KNOWN = catalogue(RATED)
CLICKED = checkerboard()
CASES = [*((n, RATED) for n in BASELINES), *((n, CLICKED) for n in ("random", "popularity", "item_knn", "ease", "als"))]
IDS = [f"{n}-{'clicks' if d.implicit else 'ratings'}" for n, d in CASES]


def support(items, targets, pad=0, garbage=0.0):
    items, targets = np.asarray(items, np.int32), np.asarray(targets, np.float32)
    ids = jnp.asarray(np.pad(items, (0, pad), constant_values=3))
    mask = jnp.asarray(np.pad(np.ones(len(items), np.float32), (0, pad)))
    inputs = {"user_id": jnp.zeros(1, jnp.int32), "item_id": ids}
    return Examples(inputs, jnp.asarray(np.pad(targets, (0, pad), constant_values=garbage)), mask)


@partial(jax.jit, static_argnums=(0, 1))
def served(adapt, predict, params, examples, items, key):
    return predict(params, adapt(params, examples, key), {"item_id": items})


def predict(method, examples, items, key=KEY):
    items = jnp.asarray(items, jnp.int32)
    return np.asarray(served(method.adapt, method.predict, method.params, examples, items, key))


@pytest.mark.parametrize("data", [RATED, CLICKED], ids=["ratings", "clicks"])
def test_ease_by_vectors_of_users_is_ease_by_a_matrix_of_items(data, monkeypatch):
    """Few users, so that vectors are the smaller form: the same scores, of items in the support too."""
    few = data.take(data.user <= data.items.num_rows // 4)
    known, ids = catalogue(data, few), np.arange(1, data.items.num_rows)
    by_matrix = ease(few, known, reg=3.0)
    monkeypatch.setattr(closed_form, "_VECTORS_FROM", 0)
    by_vectors = ease(few, known, reg=3.0)
    assert "vectors" in by_vectors.params
    support = Examples(
        {"item_id": jnp.array([3, 5, 9, 5, 0])}, jnp.array([1.0, 1, 1, 1, 1]), jnp.array([1.0, 1, 1, 1, 0])
    )
    found = []
    for method in (by_matrix, by_vectors):
        adapted = method.adapt(method.params, support, jax.random.key(0))
        batch = jax.tree.map(lambda a: jnp.stack([a, a]), adapted)
        found += [method.predict(method.params, adapted, {"item_id": jnp.asarray(ids)})]
        found += [method.scores(method.params, batch)[1][1:]]
    for one in found[1:]:
        np.testing.assert_allclose(one, found[0], atol=2e-5)


@pytest.mark.parametrize(("name", "data"), CASES, ids=IDS)
def test_padding_order_and_vmap_change_nothing(name, data):
    method = BASELINES[name](data, catalogue(data))
    items, targets = [5, 9, 2, 11], [5.0, 1.0, 4.0, 2.0] if not data.implicit else [1.0] * 4
    queries = [1, 7, 0, 12, 9]
    plain = predict(method, support(items, targets), queries)
    assert plain.shape == (5,)
    assert np.isfinite(plain).all()
    np.testing.assert_allclose(predict(method, support(items, targets, 3, np.nan), queries), plain, atol=1e-5)
    np.testing.assert_allclose(predict(method, support(items[::-1], targets[::-1]), queries), plain, atol=1e-5)
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), support(items, targets), support(items[:3] + [1], targets))
    run = lambda s: method.predict(method.params, method.adapt(method.params, s, KEY), {"item_id": jnp.array(queries)})  # noqa: E731
    np.testing.assert_allclose(jax.jit(jax.vmap(run))(both)[0], plain, atol=1e-5)


@pytest.mark.parametrize(("name", "data"), CASES, ids=IDS)
def test_an_empty_support_and_an_unknown_item_give_finite_scores_and_derivatives(name, data):
    method = BASELINES[name](data, catalogue(data))
    empty = support([], [], 8)
    assert np.isfinite(predict(method, empty, [0, 1, 2])).all()

    def total(target, mask):
        s = support([5, 0], [1.0, 1.0], 2)
        s = s._replace(target=target, mask=mask)
        return method.predict(method.params, method.adapt(method.params, s, KEY), {"item_id": jnp.arange(4)}).sum()

    slopes = jax.jit(jax.grad(total, (0, 1)))
    for mask in (jnp.zeros(4), jnp.array([1.0, 1.0, 0.0, 0.0])):
        for derivative in slopes(jnp.ones(4), mask):
            assert np.isfinite(derivative).all()


def test_means_by_arithmetic():
    data = frame(
        [1, 1, 2], [1, 2, 1], [5, 3, 1], num_items=3
    )  # mean 3; item 1: (5 + 1) / 2 = 3, item 2: 3, item 3 unseen
    known = catalogue(data)
    np.testing.assert_allclose(predict(item_mean(data, known), support([1], [1.0]), [1, 2, 3, 0]), [3, 3, 3, 3])
    data = frame([1, 1, 2], [1, 2, 1], [5, 2, 2], num_items=3)  # mean 3, item 1 3.5, item 2 2
    np.testing.assert_allclose(predict(item_mean(data, known), support([1], [1.0]), [1, 2, 3, 0]), [3.5, 2, 3, 3])
    # with 2 ratings of the mean added: (7 + 6) / 4 and (2 + 6) / 3
    np.testing.assert_allclose(predict(item_mean(data, known, shrinkage=2.0), support([], []), [1, 2]), [13 / 4, 8 / 3])
    np.testing.assert_allclose(predict(user_mean(data, known), support([1, 2], [5.0, 2.0], 2), [1, 3]), [3.5, 3.5])
    np.testing.assert_allclose(predict(user_mean(data, known), support([], [], 4), [1, 3]), [3, 3])
    np.testing.assert_allclose(
        predict(popularity(data, known), support([], []), [1, 2, 3, 0]), np.log([3, 2, 1, 1]), rtol=1e-6
    )


def test_bias_is_the_ridge_solution_and_shrinks_the_new_user():
    mu, b_item, b_user = bias_terms(RATED, reg_item=3.0, reg_user=2.0, iterations=60)
    # Its stationary point is one linear system over all biases: (Z^T Z + R) b = Z^T (r - mu), Z one-hot item and user.
    items, users = RATED.items.num_rows, RATED.users.num_rows
    z = np.zeros((len(RATED), items + users))
    z[np.arange(len(RATED)), RATED.item] = 1
    z[np.arange(len(RATED)), items + RATED.user] = 1
    left = z.T @ z + np.diag([3.0] * items + [2.0] * users)
    exact = np.linalg.solve(left, z.T @ (RATED.rating - mu))
    np.testing.assert_allclose(np.concatenate([b_item, b_user]), exact, atol=1e-5)
    method = bias(RATED, KNOWN, reg_item=3.0, reg_user=2.0)
    b = np.asarray(method.params["item_bias"])
    own = ((5 - mu - b[4]) + (2 - mu - b[6])) / (2 + 2.0)
    np.testing.assert_allclose(
        predict(method, support([4, 6], [5.0, 2.0]), [1, 0]), [mu + b[1] + own, mu + own], rtol=1e-5
    )


def test_als_half_steps_and_fold_in_are_the_normal_equations():
    f = als_factors(RATED, size=3, reg=0.7, reg_bias=0.4, iterations=2)
    ridge = np.diag([0.7, 0.7, 0.7, 0.4])
    for user in (1, 17, 300):  # the last half step solved the users
        mine = RATED.user == user
        x = np.column_stack([f.item_factors[RATED.item[mine]], np.ones(mine.sum())]).astype(np.float64)
        y = RATED.rating[mine] - f.mu - f.item_bias[RATED.item[mine]]
        exact = np.linalg.solve(x.T @ x + ridge, x.T @ y)
        np.testing.assert_allclose(np.append(f.user_factors[user], f.user_bias[user]), exact, atol=1e-4)
    method = als(RATED, KNOWN, size=3, reg=0.7, reg_bias=0.4, iterations=2)
    np.testing.assert_allclose(method.params["item"], f.item_factors, atol=1e-5)
    mine = RATED.user == 17
    got = predict(method, support(RATED.item[mine], RATED.rating[mine], 2, 9.0), [1, 2, 0])
    q = np.vstack([f.item_factors[[1, 2]], np.zeros(3)])
    wanted = f.mu + np.append(f.item_bias[[1, 2]], 0) + f.user_bias[17] + q @ f.user_factors[17]
    np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_als_finds_a_planted_low_rank_model_for_new_users():
    data, true = planted(num_users=400)
    train = data.take(data.user <= 300)
    method = als(train, catalogue(data, train), size=4, reg=0.05, iterations=20)
    rng = np.random.default_rng(1)
    errors, spread = [], []
    for user in range(300, 400):
        items = rng.permutation(80)
        got = predict(method, support(items[:20] + 1, true[user, items[:20]]), items[20:] + 1)
        errors.append(np.mean((got - true[user, items[20:]]) ** 2))
        spread.append(true[user, items[20:]].var())
    assert np.mean(errors) < 0.01 * np.mean(spread)  # noiseless and of rank 2 + biases: nearly all is found


def test_implicit_als_half_steps_and_fold_in_are_the_dense_weighted_normal_equations():
    f = implicit_als_factors(CLICKED, size=3, reg=0.5, alpha=4.0, iterations=2)
    method = als(CLICKED, catalogue(CLICKED), size=3, reg=0.5, alpha=4.0, iterations=2)
    q = f.item_factors.astype(np.float64)
    for user in (1, 8):
        x = np.zeros(len(q))
        x[CLICKED.item[CLICKED.user == user]] = 1
        confidence = np.diag(1 + 4.0 * x)  # over ALL items, absent ones too
        exact = np.linalg.solve(q.T @ confidence @ q + 0.5 * np.eye(3), q.T @ confidence @ x)
        np.testing.assert_allclose(f.user_factors[user], exact, atol=1e-4)
        had = np.flatnonzero(x)
        np.testing.assert_allclose(
            predict(method, support(had, np.ones(len(had)), 3), [1, 2]), q[[1, 2]] @ exact, atol=1e-4
        )


@pytest.mark.parametrize(
    "make", [als, item_knn, lambda d, k: item_knn(d, k, top=9), ease], ids=["als", "knn", "knn-top", "ease"]
)
def test_checkerboard_items_of_the_own_parity_come_first(make):
    method = make(CLICKED, catalogue(CLICKED))
    for parity in (0, 1):
        own = np.arange(parity, 20, 2) + 1
        scores = predict(method, support(own[:3], np.ones(3), 5), np.arange(1, 21))
        ranked = [i for i in np.argsort(-scores) + 1 if i not in own[:3]]
        assert set(ranked[:7]) == set(own[3:])


def test_item_knn_by_arithmetic_and_top_neighbours_equal_the_dense_matrix():
    values = np.random.default_rng(0).normal(size=len(RATED)).astype(np.float32)
    dense = similarities(RATED, values, 7.0)
    columns = np.zeros((RATED.users.num_rows, RATED.items.num_rows))
    columns[RATED.user, RATED.item] = values
    norm = np.sqrt((columns**2).sum(0))
    wanted = np.maximum(0, columns.T @ columns / (np.outer(norm, norm) + 7.0))
    np.fill_diagonal(wanted, 0)
    np.testing.assert_allclose(dense, wanted, atol=1e-6)
    ids, similar = neighbours(RATED, values, 7.0, 5)
    np.testing.assert_allclose(similar, -np.sort(-wanted, axis=1)[:, :5], atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(wanted, ids, 1) * (similar > 0), similar, atol=1e-6)
    one, other = item_knn(RATED, KNOWN), item_knn(RATED, KNOWN, top=81)
    given = support([5, 9, 2], [5.0, 1.0, 4.0], 3)
    np.testing.assert_allclose(predict(one, given, np.arange(81)), predict(other, given, np.arange(81)), atol=1e-5)
    s = np.asarray(one.params["similar"])[7, [5, 9, 2]]
    base = bias(RATED, KNOWN)
    prior = predict(base, given, [5, 9, 2, 7])
    moved = s @ (np.array([5.0, 1.0, 4.0]) - prior[:3]) / (s.sum() + 0.1)
    np.testing.assert_allclose(predict(one, given, [7])[0], prior[3] + moved, atol=1e-5)


@pytest.mark.parametrize("data", [RATED, CLICKED], ids=["ratings", "clicks"])
@pytest.mark.parametrize(
    "made", [als, ease, item_knn, lambda *given: item_knn(*given, top=6)], ids=["als", "ease", "knn", "knn_of_few"]
)
def test_the_scores_of_a_batch_are_the_predictions_one_by_one(made, data):
    """Supports of several lengths, one of them empty, one with the unknown item and an item twice."""
    method, rows = made(data, catalogue(data)), data.items.num_rows
    shown = [([5, 9, 2], [5.0, 1.0, 4.0]), ([], []), ([3, 0, 3], [2.0, 4.0, 5.0]), ([17], [1.0])]
    given = [support(items, np.ones(len(items)) if data.implicit else r, 4 - len(items)) for items, r in shown]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *given)
    adapted = jax.vmap(lambda one: method.adapt(method.params, one, KEY))(batch)
    scores = np.asarray(method.scores(method.params, adapted))
    assert scores.shape == (4, rows)
    for k, one in enumerate(given):
        np.testing.assert_allclose(scores[k], predict(method, one, np.arange(rows)), atol=2e-5)


def matrix(data, values):
    x = np.zeros((data.users.num_rows, data.items.num_rows))
    x[data.user, data.item] = values
    return x


@pytest.mark.parametrize("data", [RATED, CLICKED], ids=["residuals", "clicks"])
def test_ease_weights_are_the_stationary_point_under_a_zero_diagonal(data):
    """The Lagrangian of |X - X B|^2 + reg |B|^2 with diag(B) = 0: (G + reg I) B = G - diag(gamma), one gamma an item. Column
    by column that is the ridge regression of an item on all others, which NumPy solves."""
    values = np.ones(len(data), np.float32) if data.implicit else data.rating - np.float32(3.0)
    weights, x = item_weights(data, values, 7.0), matrix(data, values)
    gram = x.T @ x
    assert (np.diag(weights) == 0).all()
    left = (gram + 7.0 * np.eye(len(gram))) @ weights - gram
    np.testing.assert_allclose(left - np.diag(np.diag(left)), 0, atol=2e-3)  # but for gamma, on the diagonal alone
    for item in (1, 5, 12):
        others = [i for i in range(len(gram)) if i != item]
        ridge = gram[np.ix_(others, others)] + 7.0 * np.eye(len(others))
        np.testing.assert_allclose(weights[others, item], np.linalg.solve(ridge, gram[others, item]), atol=1e-4)


def test_ease_by_arithmetic_over_few_items_and_over_the_catalogue():
    """Clicks: the sum of the support's rows of B. Ratings: the bias model's score, plus residuals times rows of B."""
    method = ease(CLICKED, catalogue(CLICKED), reg=3.0)
    weights = item_weights(CLICKED, np.ones(len(CLICKED), np.float32), 3.0)
    given = support([4, 6, 11], [1.0] * 3, 2)
    want = weights[[4, 6, 11]].sum(0)
    for items in ([2, 0, 7], np.arange(21)):
        np.testing.assert_allclose(predict(method, given, items), want[items], atol=1e-6)
    method, base = ease(RATED, KNOWN, reg=3.0), bias(RATED, KNOWN)
    given = support([5, 9, 2], [5.0, 1.0, 4.0], 3)
    residual = np.array([5.0, 1.0, 4.0]) - predict(base, given, [5, 9, 2])
    want = predict(base, given, np.arange(81)) + residual @ np.asarray(method.params["weights"])[[5, 9, 2]]
    for items in ([7, 0], np.arange(81)):
        np.testing.assert_allclose(predict(method, given, items), want[items], atol=1e-5)


def test_ease_of_items_never_seen_says_nothing_of_them():
    """Item 21 is in the vocabulary and in no row: it has weight on none, and none on it."""
    weights = item_weights(frame(CLICKED.user, CLICKED.item, num_items=21), np.ones(len(CLICKED), np.float32), 3.0)
    assert (weights[21] == 0).all()
    assert (weights[:, 21] == 0).all()


def test_ease_weights_in_blocks_are_the_same(monkeypatch):
    """Item 3 is in no row, in the middle of the others."""
    data = CLICKED.take(CLICKED.item != 3)
    whole = item_weights(data, np.ones(len(data), np.float32), 3.0)
    monkeypatch.setattr("metarec_jax.factorization._BLOCK", 4)
    np.testing.assert_allclose(item_weights(data, np.ones(len(data), np.float32), 3.0), whole, atol=1e-6)
    assert (whole[3] == 0).all()
    assert (whole[:, 3] == 0).all()
    assert np.isfinite(whole).all()


def test_random_is_a_function_of_key_and_item_and_unknown_items_are_not_tied():
    method = random(RATED, KNOWN)
    one = predict(method, support([1], [1.0]), [3, 8, 0, 0, 5])
    assert len(set(one.tolist())) == 5
    assert (one >= RATED.rating.min()).all()
    assert (one <= RATED.rating.max()).all()
    again = predict(method, support([2], [4.0]), [5, 3])  # another support, other places: the same numbers
    np.testing.assert_array_equal(again, one[[4, 0]])
    assert (predict(method, support([1], [1.0]), [3, 8], jax.random.key(1)) != one[:2]).all()


def test_the_pieces_of_a_long_history_change_nothing():
    rng = np.random.default_rng(0)  # 3,000 ratings of one user are several BLAS pieces at size 16
    data = frame(
        np.concatenate([np.ones(3000), np.full(5, 2)]),
        np.concatenate([np.arange(1, 3001), np.arange(1, 6)]),
        rng.normal(size=3005),
    )
    f = als_factors(data, size=16, reg=1.0, iterations=1)
    x = np.column_stack([f.item_factors[1:], np.ones(3000)]).astype(np.float64)
    exact = np.linalg.solve(x.T @ x + np.eye(17), x.T @ (data.rating[:3000] - f.mu - f.item_bias[1:]))
    np.testing.assert_allclose(np.append(f.user_factors[1], f.user_bias[1]), exact, atol=1e-3)


def test_tuning_takes_the_value_that_is_best_on_validation():
    data, _ = planted(num_users=200, noise=0.5)
    train = data.take(data.user <= 150)
    known = catalogue(data, train)
    tasks = {"user_cold": make_tasks(data.take(data.user > 150), query=10, seed=0)}
    said: list[str] = []
    methods = fit_baselines(train, known, tasks, names=["bias", "als"], say=said.append)
    assert list(methods) == ["bias", "als"]

    def error(method):
        t = tasks["user_cold"]
        each = []
        for k in range(len(t)):
            n = int(t.support_mask[k].sum())
            got = predict(method, support(t.support_item[k, :n], t.support_target[k, :n]), t.query_item[k])
            each.append(np.abs(np.clip(got, train.rating.min(), train.rating.max()) - t.query_target[k]).mean())
        return np.mean(each)

    # regularisation first, at the default size 16; then the size
    by_reg = {reg: error(als(train, known, reg=reg)) for reg in (2.0, 5.0, 10.0)}
    reg = min(by_reg, key=by_reg.__getitem__)
    by_size = {size: error(als(train, known, reg=reg, size=size)) for size in (8, 16, 32)}
    size = min(by_size, key=by_size.__getitem__)
    assert said[1] == f"als: reg {reg:g}, size {size} (validation MAE {by_size[size]:.4f})"
    assert methods["als"].params["item"].shape[1] == size


def test_the_quality_of_a_method_for_clicks_is_its_ndcg_among_the_training_items(monkeypatch):
    """By a loop over tasks; three users a block. Item 20 is in no training row, so it does not compete."""
    monkeypatch.setattr("metarec_jax.evaluation.scoring._SCORES", 3 * CLICKED.items.num_rows)
    known, train = catalogue(CLICKED), CLICKED.take(CLICKED.item != 20)
    tasks = make_tasks(CLICKED, query=2, negatives=0, seed=0).take(np.arange(7))
    for method in (popularity(train, known), als(train, known, size=3)):
        each = []
        for k in range(len(tasks)):
            shown = tasks.support_item[k][tasks.support_mask[k] > 0]
            scores = predict(method, support(shown, np.ones(len(shown))), np.arange(21))
            gain = 0.0
            for item in tasks.query_item[k]:
                others = np.setdiff1d(np.unique(train.item), [*shown, item])
                rank = 1 + (scores[others] > scores[item]).sum() + 0.5 * (scores[others] == scores[item]).sum()
                gain += (rank <= 10) / np.log2(1 + rank)
            each.append(gain / (1 + 1 / np.log2(3)))
        assert quality(method, on_device(tasks, known, 8), known, train) == pytest.approx(-np.mean(each), abs=1e-6)


def test_clicks_are_tuned_by_ranking_and_only_what_suits_them_is_fitted():
    said: list[str] = []
    assert set(fit_baselines(CLICKED, catalogue(CLICKED))) == {"random", "popularity", "item_knn", "ease", "als"}
    assert "ease" not in fit_baselines(RATED, KNOWN)  # asked for by name alone
    assert "ease" not in suitable(frame([1], [1], num_items=20_000))  # 20,001 rows: one more than its dense_limit
    assert "ease" in suitable(frame([1], [1], num_items=19_999))
    clicks = {"user_cold": make_tasks(CLICKED, query=2, seed=0)}
    assert "nDCG@10" in (
        fit_baselines(CLICKED, catalogue(CLICKED), clicks, names=["item_knn"], say=said.append) and said[-1]
    )


def test_bad_input_is_refused_in_one_message():
    with pytest.raises(MetarecError, match=r"bias requires ratings, .* use popularity"):
        bias(CLICKED, catalogue(CLICKED))
    with pytest.raises(MetarecError, match="no baseline 'svd'; choose from random"):
        fit_baselines(RATED, KNOWN, names=["svd"])
    with pytest.raises(MetarecError, match="requires interactions"):
        als(RATED.take(np.zeros(len(RATED), bool)), KNOWN)
    with pytest.raises(MetarecError, match="make the catalogue from the same data"):
        random(RATED, catalogue(CLICKED))
    with pytest.raises(MetarecError, match=r"81 x 81 items, and dense_limit is 80; use item_knn"):
        ease(RATED, KNOWN, dense_limit=80)
    with pytest.raises(MetarecError, match="reg must be above 0, got 0"):
        ease(RATED, KNOWN, reg=0)
    with pytest.raises(MetarecError, match="use implicit_als_factors"):
        als_factors(replace(RATED, rating=None))
