"""Tasks: disjoint, in time order where asked, and never a wrong row. How evenly they are drawn: test_draw."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from metarec_jax.core import MetarecError
from metarec_jax.data import tasks as t
from metarec_jax.data.catalogue import catalogue, inputs
from metarec_jax.data.draw import CLICK_NEGATIVES, task_source
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


@pytest.mark.parametrize("order", ["random", "time"])
def test_drawn_tasks_are_disjoint_and_of_one_user(order):
    data = history()
    source = task_source(data, tasks=300, support=(2, 8), query=5, order=order, item_drop=0.0, cold_tasks=0.0)
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
    source = task_source(history(), tasks=4000, support=(2, 4), query=3, user_rows="own", item_drop=0.0, cold_tasks=0.0)
    users = np.asarray(jax.jit(source.draw)(source.data, jax.random.key(1)).support.inputs["user_id"])[:, 0]
    assert set(users) == {1, 2, 3, 5}
    assert stats.chisquare(np.bincount(users)[[1, 2, 3, 5]]).pvalue > 1e-4


def test_inputs_carry_the_right_rows_and_content():
    """Prior user rows are 0; an item's genre is its row mod 7, also where its id was dropped (20,000 slots: rate 0.3 +- 0.02)."""
    source = task_source(history(), tasks=1000, support=(2, 8), query=5, item_drop=0.3, cold_tasks=0.0)
    support = jax.jit(source.draw)(source.data, jax.random.key(0)).support
    real = np.asarray(support.mask) > 0
    item, genre = np.asarray(support.inputs["item_id"])[real], np.asarray(support.inputs["item_genre"])[real]
    assert (np.asarray(support.inputs["user_id"]) == 0).all()
    assert set(np.asarray(support.inputs["user_age"]).ravel()) == {1.0, 2.0, 3.0, 5.0}
    assert abs((item == 0).mean() - 0.3) < 0.03
    assert (genre[item > 0] == item[item > 0] % 7).all()


def test_negatives_were_never_had():
    data = history(rated=False)
    source = task_source(
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


@pytest.mark.parametrize("kept", [4, 100])
def test_fixed_negatives_were_never_had(kept):
    """Three for each support positive, distinct, in the pool, and none that the user had anywhere.

    With ``kept=4`` most of user 3's 30 items are in neither its support nor its query: they are still its own. User 3
    had 30 of the 40 items: at the most 10 are free, fewer if the others had not all of them.
    """
    data = history(rated=False)
    pool = set(data.item.tolist())
    for past, now in ((None, data), (data.take(data.timestamp < 5), data.take(data.timestamp >= 5))):
        whole = now if past is None else past
        pool = set(whole.item.tolist())
        fixed = t.make_tasks(now, history=past, query=3, support=(1, kept), negatives=3, seed=1)
        for k, user in enumerate(fixed.user):
            mask = fixed.support_mask[k] > 0
            items, target = fixed.support_item[k][mask], fixed.support_target[k][mask]
            had = set(data.item[data.user == user].tolist())
            negative = items[target == 0].tolist()
            assert not set(negative) & had
            assert set(negative) <= pool
            assert len(set(negative)) == len(negative) == min(3 * int((target == 1).sum()), len(pool - had))
            assert (target[: int((target == 1).sum())] == 1).all()


@pytest.mark.parametrize(("rated", "each"), [(False, CLICK_NEGATIVES), (True, 0)])
def test_training_and_fixed_tasks_draw_as_many_negatives_by_default(rated, each):
    """For each click of a support as many in both, none for ratings, and a number that is given is kept."""
    data = history(rated=rated)
    source = task_source(data, support=(1, 1), query=3)
    drawn = jax.jit(source.draw)(source.data, jax.random.key(0)).support
    assert drawn.mask.sum(1).tolist() == [1 + each] * 64
    fixed = t.make_tasks(data, query=3, support=(1, 1))
    assert set(fixed.support_mask.sum(1).tolist()) == {1 + each}
    none = t.make_tasks(data, query=3, support=(1, 1), negatives=0)
    assert set(none.support_mask.sum(1).tolist()) == {1}


def test_fixed_negatives_are_uniform():
    """One user with item 1 of 5, one negative a positive; 2,000 copies of the user: items 2..5 come alike (p > 1e-4)."""
    user = np.repeat(np.arange(1, 2001), 2)
    item = np.tile([1, 2], 2000)
    ids = Vocabulary(np.arange(2001)), Vocabulary(np.arange(6))
    others = np.arange(3, 7)
    data = Interactions(np.append(user, np.full(4, 2001)), np.append(item, others), None, None, *ids)
    fixed = t.make_tasks(data, query=1, negatives=1)
    drawn = fixed.support_item[:2000][:, 1]
    assert set(drawn) == {3, 4, 5, 6}
    assert stats.chisquare(np.bincount(drawn)[3:]).pvalue > 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "time"}, "--order time .* requires the time of every interaction, and the data has none"),
        ({"order": "tiem"}, "order 'tiem' is not known"),
        ({"support": (5, 4)}, r"support must be .* got \(5, 4\)"),
        ({"query": 0}, "query must be 1 or more, got 0"),
        ({"tasks": 0}, "tasks must be 1 or more, got 0"),
        ({"item_drop": 1.5}, "item_drop is a probability, from 0 to 1, got 1.5"),
        ({"user_rows": "mine"}, "user_rows 'mine' is not known"),
    ],
)
def test_a_source_says_what_is_wrong(options, message):
    with pytest.raises(MetarecError, match=message):
        task_source(replace(history(rated=False), timestamp=None), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"item": np.full(60, 41)}, r"interaction 0 has item row 41, outside the rows 1\.\.40 of its vocabulary"),
        ({"user": np.zeros(60, int)}, "interaction 0 has user row 0"),
        ({"user": np.ones(60)}, "of type float64, expected whole numbers"),
        ({"rating": np.ones(3)}, "rating has 3 entries, and user has 60"),
        ({"rating": np.append(np.ones(59), np.nan)}, "the rating of interaction 59 is nan"),
        ({"item_features": {"genre": Feature("numeric", np.zeros((41, 1)))}}, "item_features has 'genre'; rename it"),
        ({"item_features": {"item_x": Feature("numeric", np.zeros((40, 1)))}}, "expected 41 rows, one per id"),
        (
            {"item_features": {"item_x": Feature("multi", np.full((41, 2), 3), Vocabulary(np.arange(2)))}},
            r"feature 'item_x' at row 0 has value 3, outside the rows 0\.\.2",
        ),
        ({"titles": np.array(["one"])}, "expected 40 titles, one per item, got 1"),
    ],
)
def test_interactions_are_checked_where_they_enter(change, message):
    with pytest.raises(MetarecError, match=message):
        replace(history(), **change)


def test_a_catalogue_and_tasks_of_other_data_are_refused():
    data = history()
    few = Interactions(
        np.array([1, 1]), np.array([1, 2]), None, None, Vocabulary(np.arange(1)), Vocabulary(np.arange(2))
    )
    with pytest.raises(MetarecError, match="train has user row 5, and data has rows up to 1"):
        catalogue(few, data)
    with pytest.raises(MetarecError, match=r"the tasks have user rows 1\.\.5, and the catalogue has 0\.\.1"):
        next(iter(t.batches(t.make_tasks(data), catalogue(few))))


def test_a_batch_keeps_examples_wherever_they_stand():
    """Two examples in slots 0 and 11 of 12: the batch must be 16 wide, not 8."""
    mask = np.zeros((1, 12), np.float32)
    mask[0, [0, 11]] = 1.0
    item = (mask * 7).astype(np.int32)
    one = np.ones((1, 1))
    fixed = t.TaskSet(np.array([1]), item, mask, mask, one.astype(np.int32), one, one)
    ((_, task),) = t.batches(fixed, catalogue(history()), size=1)
    assert float(task.support.mask.sum()) == 2.0


def test_drawing_keeps_32_bits_in_double_precision(float64):
    """Ids, targets and masks keep 32 bits where 64-bit numbers are on."""
    source = task_source(history(), tasks=50, support=(2, 8), query=5, negatives=2)
    wide = jax.jit(source.draw)(source.data, jax.random.key(3))
    assert wide.support.inputs["item_id"].dtype == wide.query.inputs["user_id"].dtype == jnp.int32
    assert wide.support.mask.dtype == wide.support.target.dtype == jnp.float32


def test_no_user_long_enough_is_told():
    with pytest.raises(MetarecError, match=r"no user has 51 interactions .*the maximum is 30\), which --support 50 60"):
        task_source(history(), support=(50, 60))


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
    known = catalogue(data)
    seen = []
    for index, task in t.batches(fixed, known, size=2):
        assert task.support.mask.shape[0] == 2
        assert task.support.mask.shape[1] in (8, 32)
        for row, k in enumerate(index):
            seen.append(int(k))
            n = int(fixed.support_mask[k].sum())
            items = np.asarray(task.support.inputs["item_id"][row])
            assert items[:n].tolist() == fixed.support_item[k][:n].tolist()
            assert float(task.support.mask[row].sum()) == n
    assert sorted(seen) == [0, 1, 2, 3, 4]


def test_cold_items_go_to_row_zero_and_keep_their_content():
    data = history()
    known = catalogue(data, data.take(data.item <= 20), user_rows="own")
    columns = inputs(known, jnp.int32(3), jnp.array([5, 33]))
    assert columns["item_id"].tolist() == [5 if 5 in data.item else 0, 0]
    assert columns["item_genre"].tolist() == [5 % 7, 33 % 7]
