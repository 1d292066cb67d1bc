"""The map from a support to the catalogue: its closed form against every support written out; what it learns."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metarec_jax import learners, losses
from metarec_jax.core import Examples, MetarecError
from metarec_jax.data.draw import task_source
from metarec_jax.data.interactions import Interactions, Vocabulary
from metarec_jax.factorization import support_map
from metarec_jax.training.loop import fit

KEY = jax.random.key(0)


def clicks(histories, num_items):
    user = np.repeat(np.arange(1, len(histories) + 1), [len(h) for h in histories]).astype(np.int32)
    item = np.concatenate(histories).astype(np.int32)
    ids = Vocabulary(np.arange(1, len(histories) + 1)), Vocabulary(np.arange(1, num_items + 1))
    return Interactions(user, item, None, None, *ids)


HISTORIES = [[1, 2, 3], [2, 3, 4, 5], [1, 5], [1, 3, 5, 6], [2, 6, 4], [1, 2, 3, 4, 5]]
DATA = clicks(HISTORIES, 7)  # item 7 is never seen


def supports():
    """Every support of 2 items, q the rest: (s, q, chance) over users with more than 2 items, one user one unit."""
    for history in HISTORIES:
        chosen = list(itertools.combinations(history, 2)) if len(history) > 2 else []
        for pair in chosen:
            s, q = np.zeros(8), np.zeros(8)
            s[list(pair)], q[[i for i in history if i not in pair]] = 1, 1
            yield s, q, 1 / len(chosen)


def moments():
    """cov(s, s), cov(s, q) as sums over users, and the means of s and q."""
    s, q, chance = (np.array(a) for a in zip(*supports(), strict=True))
    users = chance.sum()
    s_mean, q_mean = chance @ s / users, chance @ q / users
    weighted = (s - s_mean) * chance[:, None]
    return weighted.T @ (s - s_mean), weighted.T @ (q - q_mean), s_mean, q_mean


def test_the_closed_form_is_the_regression_over_every_support():
    """5 of 6 users have more than 2 items; M = (cov(s, s) + reg I)^-1 cov(s, q), b = mean q - mean s M."""
    bias, inward, outward = support_map(DATA, support=2, reg=0.7, size=7)
    ss, sq, s_mean, q_mean = moments()
    exact = np.linalg.solve(ss + 0.7 * np.eye(8), sq)
    np.testing.assert_allclose(inward @ outward.T, exact, atol=1e-5)
    np.testing.assert_allclose(bias, q_mean - s_mean @ exact, atol=1e-5)
    for k in (0, 7):  # the unknown row and the item never seen
        assert bias[k] == pytest.approx(0, abs=1e-6)
        np.testing.assert_allclose(inward[k], 0, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_map_of_that_rank_is_better(size):
    """The objective of rank k is that of the full map plus the eigenvalues left out of M'(cov + reg I)M; a map that steps
    of gradient descent have improved on from a random one is no better."""
    _, inward, outward = support_map(DATA, support=2, reg=0.7, size=size)
    ss, sq, _, _ = moments()
    left = ss + 0.7 * np.eye(8)
    exact = np.linalg.solve(left, sq)
    objective = lambda m: np.trace(m.T @ left @ m) - 2 * np.trace(m.T @ sq)  # noqa: E731
    values = np.sort(np.linalg.eigvalsh(exact.T @ left @ exact))[::-1]
    got = objective(inward @ outward.T)
    assert got == pytest.approx(objective(exact) + values[size:].sum(), abs=1e-4)
    rng = np.random.default_rng(0)
    a, v = rng.normal(size=(8, size)), rng.normal(size=(8, size))
    for _ in range(300):  # alternating least squares of the same objective
        v = np.linalg.lstsq(a.T @ left @ a, a.T @ sq, rcond=None)[0].T
        a = exact @ v @ np.linalg.pinv(v.T @ v)
    assert got <= objective(a @ v.T) + 1e-6


def test_an_item_clicked_twice_counts_once():
    twice = clicks([[*HISTORIES[0], 2], *HISTORIES[1:]], 7)
    for one, other in zip(support_map(twice, support=2, reg=1.0, size=2), support_map(DATA, support=2, reg=1.0, size=2), strict=True):  # fmt: skip
        np.testing.assert_allclose(np.abs(one), np.abs(other), atol=1e-5)


def started(size=7, **given):
    learner = learners.item_map(8, size=size)
    return learner, learners.item_map_start(learner.init(KEY), DATA, **{"support": 2, "reg": 0.7, **given})


def test_scores_are_the_bias_and_the_rows_of_the_support():
    learner, params = started()
    bias, inward, outward = support_map(DATA, support=2, reg=0.7, size=7)
    support = Examples({"item_id": jnp.array([2, 6, 5])}, jnp.array([1.0, 1.0, jnp.nan]), jnp.array([1.0, 1.0, 0.0]))
    adapted = learner.adapt(params, support, KEY)
    assert adapted["vector"].shape == (7,)
    got = learner.predict(params, adapted, {"item_id": jnp.arange(8)})
    np.testing.assert_allclose(got, bias + (inward @ outward.T)[[2, 6]].sum(0), atol=1e-5)
    empty = learner.adapt(params, support._replace(mask=jnp.zeros(3)), KEY)
    np.testing.assert_allclose(learner.predict(params, empty, {"item_id": jnp.arange(8)}), bias, atol=1e-6)


def test_meta_training_finds_two_kinds_of_users():
    """Users click items of one parity alone: trained from random rows, the map ranks the parity of the support first."""
    data = clicks([np.random.default_rng(u).permutation(np.arange(1 + u % 2, 41, 2))[:12] for u in range(80)], 40)
    source = task_source(data, tasks=16, support=(2, 6), query=4, item_drop=0.0, cold_tasks=0.0, negatives=5)
    learner = learners.item_map(41, size=2)
    method = fit(learner, source, steps=150, lr=0.03).method
    for parity in (0, 1):
        own = np.arange(1 + parity, 41, 2)
        support = Examples({"item_id": jnp.asarray(own[:3])}, jnp.ones(3), jnp.ones(3))
        adapted = method.adapt(method.params, support, KEY)
        scores = np.asarray(method.predict(method.params, adapted, {"item_id": jnp.arange(1, 41)}))
        assert set(np.argsort(-scores)[:15] + 1) <= set(own.tolist())


def test_the_start_is_no_worse_than_training_by_its_own_loss():
    """Its squared error over random supports of 2 and the whole catalogue: 300 steps of Adam do not better it by 2%."""
    learner = learners.item_map(8, size=3, loss=losses.mse)
    _, params = started(3, reg=1e-3)
    s, q, chance = (jnp.asarray(np.array(a), jnp.float32) for a in zip(*supports(), strict=True))

    def error(table):
        scores = table[:, 0][None] + (s @ table[:, 1:4]) @ table[:, 4:].T
        return jnp.sum(chance[:, None] * jnp.square(scores - q)[:, 1:]) / chance.sum()

    table = params["tables"]["item_id"]
    before, step = float(error(table)), jax.jit(jax.value_and_grad(error))
    for _ in range(300):
        table = table - 0.01 * step(table)[1]
    assert float(error(table)) > 0.98 * before
    assert learner.tables["item_id"].size == 7


def test_bad_numbers_are_refused():
    with pytest.raises(MetarecError, match="no user has more than 9 items"):
        support_map(DATA, support=9, reg=1.0, size=2)
    with pytest.raises(MetarecError, match=r"size between 1 and 7, got 2, 1\.0 and 8"):
        support_map(DATA, support=2, reg=1.0, size=8)
    with pytest.raises(MetarecError, match="8 x 8 item rows, and dense_limit is 7"):
        started(dense_limit=7)
    with pytest.raises(MetarecError, match="item_map: size must be 1 or more, got 0"):
        learners.item_map(8, size=0)


def test_a_large_table_has_rows_that_devices_can_share():
    """5,000 items: 5,056 rows, which 2 to 64 devices share equally, as the tables of models have; 3,000 stay 3,000."""
    for items, rows in ((5000, 5056), (3000, 3000)):
        params = jax.eval_shape(learners.item_map(items, size=2).init, KEY)
        assert params["tables"]["item_id"].shape == (rows, 5)
