"""Tasks: disjoint, in time order where asked, uniform, and never a wrong row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from metarec_jax.core import MetarecError
from metarec_jax.data import tasks as t
from metarec_jax.data.interactions import Feature, Interactions, Vocabulary

LENGTHS = [4, 9, 30, 2, 15]


def history(rated: bool = True) -> Interactions:
    """User k has LENGTHS[k] interactions with items in a scrambled order; the rating is 100 * user + time, so it names the event."""
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(1, 6), LENGTHS).astype(np.int32)
    item = np.concatenate([rng.permutation(40)[:n] + 1 for n in LENGTHS]).astype(np.int32)
    time = np.concatenate([np.arange(n) for n in LENGTHS])
    shuffle = rng.permutation(len(user))
    genre = Feature("categorical", np.arange(41, dtype=np.int32) % 7, Vocabulary(np.arange(6)))
    age = Feature("numeric", np.arange(6, dtype=np.float32)[:, None])
    return Interactions(
        user[shuffle],
        item[shuffle],
        (100 * user + time).astype(np.float32)[shuffle] if rated else None,
        time.astype(np.int64)[shuffle],
        Vocabulary(np.arange(5)),
        Vocabulary(np.arange(40)),
        {"user_age": age},
        {"item_genre": genre},
    )


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 2000), st.integers(0, 10**6))
def test_permuted_is_a_permutation(n, seed):
    x = t.permuted(jnp.arange(n), jnp.int32(n), jax.random.key(seed))
    assert np.sort(np.asarray(x)).tolist() == list(range(n))


@pytest.mark.parametrize("n", [5, 13, 200])
def test_permuted_pairs_are_uniform(n):
    """Images of (0, 1) over 40,000 keys: chi-square of the pairs (folded to at most 25 cells) passes at p > 1e-4."""
    keys = jax.random.split(jax.random.key(1), 40_000)
    pairs = np.asarray(jax.jit(jax.vmap(lambda k: t.permuted(jnp.arange(2), jnp.int32(n), k)))(keys))
    cells = np.minimum(pairs * 5 // n, 4)
    counts = np.bincount(cells[:, 0] * 5 + cells[:, 1], minlength=25)
    size = np.bincount(np.minimum(np.arange(n) * 5 // n, 4), minlength=5)
    both = np.outer(size, size) - np.diag(size)
    expected = both.ravel() / (n * (n - 1)) * len(keys)
    keep = expected > 0
    assert counts[~keep].sum() == 0
    assert stats.chisquare(counts[keep], expected[keep]).pvalue > 1e-4


@pytest.mark.parametrize("order", ["random", "time"])
def test_drawn_tasks_are_disjoint_and_of_one_user(order):
    data = history()
    source = t.task_source(data, tasks=300, support=(2, 8), query=5, order=order, item_drop=0.0, cold_tasks=0.0)
    task = jax.jit(source.draw)(source.data, jax.random.key(0))
    for k in range(300):
        s = np.asarray(task.support.target[k])[np.asarray(task.support.mask[k]) > 0]
        q = np.asarray(task.query.target[k])[np.asarray(task.query.mask[k]) > 0]
        both = np.concatenate([s, q])
        user = int(both[0] // 100)
        assert (both // 100 == user).all()
        assert len(set(both)) == len(both)
        assert 2 <= len(s) <= 8
        assert len(q) == min(5, LENGTHS[user - 1] - 2)
        if order == "time":  # consecutive events, the support just before the query
            assert np.sort(both).tolist() == list(range(int(s.min()), int(s.min()) + len(both)))
            assert s.max() < q.min()


def test_short_users_are_left_out_and_the_others_drawn_alike():
    """Users 1, 2, 3, 5 have 3 interactions or more: 4,000 draws give each about 1,000 (chi-square p > 1e-4)."""
    source = t.task_source(
        history(), tasks=4000, support=(2, 4), query=3, user_rows="own", item_drop=0.0, cold_tasks=0.0
    )
    users = np.asarray(jax.jit(source.draw)(source.data, jax.random.key(1)).support.inputs["user_id"])[:, 0]
    assert set(users) == {1, 2, 3, 5}
    assert stats.chisquare(np.bincount(users)[[1, 2, 3, 5]]).pvalue > 1e-4


def test_inputs_carry_the_right_rows_and_content():
    """Prior user rows are 0; an item's genre is its row mod 7, also where its id was dropped (20,000 slots: rate 0.3 +- 0.02)."""
    source = t.task_source(history(), tasks=1000, support=(2, 8), query=5, item_drop=0.3, cold_tasks=0.0)
    support = jax.jit(source.draw)(source.data, jax.random.key(0)).support
    real = np.asarray(support.mask) > 0
    item, genre = np.asarray(support.inputs["item_id"])[real], np.asarray(support.inputs["item_genre"])[real]
    assert (np.asarray(support.inputs["user_id"]) == 0).all()
    assert set(np.asarray(support.inputs["user_age"]).ravel()) == {1.0, 2.0, 3.0, 5.0}
    assert abs((item == 0).mean() - 0.3) < 0.03
    assert (genre[item > 0] == item[item > 0] % 7).all()


def test_negatives_were_never_had():
    data = history(rated=False)
    source = t.task_source(
        data, tasks=200, support=(2, 6), query=4, negatives=3, item_drop=0.0, cold_tasks=0.0, user_rows="own"
    )
    task = jax.jit(source.draw)(source.data, jax.random.key(0))
    had = {u: set(data.item[data.user == u]) for u in range(1, 6)}
    for part, n in ((task.support, 6), (task.query, 4)):
        assert part.mask.shape == (200, n * 4)
        for k in range(200):
            user = int(part.inputs["user_id"][k, 0])
            items, real = np.asarray(part.inputs["item_id"][k]), np.asarray(part.mask[k]) > 0
            positive = np.asarray(part.target[k]) == 1
            assert set(items[real & positive]) <= had[user]
            assert not set(items[real & ~positive]) & had[user]
    drawn = np.asarray(task.query.inputs["item_id"])[np.asarray(task.query.mask * (task.query.target == 0)) > 0]
    assert set(drawn) == set(np.unique(data.item))


def test_no_user_long_enough_is_told():
    with pytest.raises(MetarecError, match="no user has 51 interactions \\(the most is 30\\)"):
        t.task_source(history(), support=(50, 60))


@pytest.mark.parametrize("order", ["random", "time"])
def test_fixed_tasks_cover_each_user_once(order):
    data = history()
    fixed = t.make_tasks(data, query=3, support=(1, 100), order=order, seed=3)
    assert fixed.user.tolist() == [1, 2, 3, 4, 5]
    for k, n in enumerate(LENGTHS):
        s = fixed.support_target[k][fixed.support_mask[k] > 0]
        q = fixed.query_target[k][fixed.query_mask[k] > 0]
        assert len(q) == min(3, n - 1)
        assert sorted([*s, *q]) == [100 * (k + 1) + i for i in range(n)]
        assert order == "random" or s.max() < q.min()


def test_the_most_recent_support_is_kept():
    fixed = t.make_tasks(history(), query=3, support=(1, 4), order="time")
    assert fixed.support_target[2].tolist() == [323, 324, 325, 326]
    assert fixed.query_target[2].tolist() == [327, 328, 329]


def test_support_from_history():
    """Query from the held-out rows, support from the past alone."""
    data = history()
    late = data.timestamp >= 2
    fixed = t.make_tasks(data.take(late), history=data.take(~late), query=100, order="time")
    assert (fixed.support_target[:, :2] == [[100 * u, 100 * u + 1] for u in fixed.user]).all()
    assert fixed.user.tolist() == [1, 2, 3, 5]  # user 4 has no late row


def test_batches_hold_every_task_once():
    data = history()
    fixed = t.make_tasks(data, query=3, support=(1, 100))
    known = t.catalogue(data)
    seen = []
    for index, task in t.batches(fixed, known, size=2):
        assert task.support.mask.shape[0] == 2
        assert task.support.mask.shape[1] in (8, 16, 32)
        for row, k in enumerate(index):
            seen.append(int(k))
            n = int(fixed.support_mask[k].sum())
            items = np.asarray(task.support.inputs["item_id"][row])
            assert items[:n].tolist() == fixed.support_item[k][:n].tolist()
            assert float(task.support.mask[row].sum()) == n
    assert sorted(seen) == [0, 1, 2, 3, 4]


def test_cold_items_go_to_row_zero_and_keep_their_content():
    data = history()
    known = t.catalogue(data, data.take(data.item <= 20), user_rows="own")
    columns = t.inputs(known, jnp.int32(3), jnp.array([5, 33]))
    assert columns["item_id"].tolist() == [5 if 5 in data.item else 0, 0]
    assert columns["item_genre"].tolist() == [5 % 7, 33 % 7]
