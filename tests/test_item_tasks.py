"""Items as tasks: the cut in time, tasks of one item over many users, epochs of plain training."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from metarec_jax.core import MetarecError
from metarec_jax.data.epochs import epoch_source, steps_of
from metarec_jax.data.interactions import Feature, Interactions, Vocabulary
from metarec_jax.data.item_tasks import (
    clicks,
    exchanged,
    item_batches,
    item_catalogue,
    item_task_source,
    joined,
    warm_up,
)
from metarec_jax.data.tasks import make_tasks

KEY = jax.random.key(0)


def world(seed: int = 0) -> Interactions:
    """Item k (of 1..6) has 4 k interactions of distinct users (of 30), at times in random order; features tell their row."""
    rng = np.random.default_rng(seed)
    item = np.repeat(np.arange(1, 7), 4 * np.arange(1, 7))
    user = np.concatenate([rng.permutation(30)[: 4 * k] + 1 for k in range(1, 7)])
    mixed = rng.permutation(len(item))
    time = rng.permutation(len(item)) + 1000
    rows = lambda n: Vocabulary(np.arange(n))  # noqa: E731
    features = {
        "user_features": {"user_age": Feature("categorical", np.arange(31) % 5, rows(4))},
        "item_features": {"item_genre": Feature("multi", np.stack([np.arange(7), np.zeros(7, int)], 1), rows(6))},
    }
    rating = rng.integers(1, 6, len(item)).astype(np.float32)
    return Interactions(user[mixed], item[mixed], rating, time, rows(30), rows(6), **features)


def test_the_cut_covers_each_kept_item_once_and_in_time():
    """Above 18: items 5 (20) and 6 (24), 44 rows. Of 8 to 16: items 2, 3, 4, 36 rows: 3 x 2 a stage, 36 - 18 = 18 for test."""
    data = world()
    cut = warm_up(data, base_above=18, cold=(8, 16), stage=2, stages=3)
    assert (len(cut.base), [len(part) for part in cut.stages], len(cut.test)) == (44, [6, 6, 6], 18)
    kept = joined((cut.base, *cut.stages, cut.test))
    there = lambda d: sorted(zip(d.user.tolist(), d.item.tolist(), strict=True))  # noqa: E731
    assert there(kept) == there(data.take(data.item > 1))
    for item in (2, 3, 4):
        times = [part.timestamp[part.item == item] for part in (*cut.stages, cut.test)]
        assert all(a.max() < b.min() for a, b in itertools.pairwise(times))


def test_no_cold_item_is_a_base_item():
    cut = warm_up(world(), base_above=18, cold=(8, 16), stage=2, stages=3)
    assert not set(cut.base.item) & {i for part in (*cut.stages, cut.test) for i in part.item}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cold": (5, 16)}, r"got 3 stages of 2, cold=\(5, 16\), base_above=18"),
        ({"base_above": 12}, "base_above=12"),
        ({"stage": 0, "cold": (0, 16)}, "3 stages of 0"),
        ({"base_above": 99}, r"no item has more than 99 interactions \(the maximum is 24\)"),
        ({"cold": (9, 11)}, "no item has 9 to 11 interactions"),
    ],
)
def test_a_cut_that_cannot_be_is_told(changed, message):
    with pytest.raises(MetarecError, match=message):
        warm_up(world(), **{"base_above": 18, "cold": (8, 16), "stage": 2, "stages": 3, **changed})


def test_the_cut_wants_times_and_clicks_want_ratings():
    data = world()
    bare = Interactions(data.user, data.item, None, None, data.users, data.items)
    with pytest.raises(MetarecError, match="warm_up requires the time of every interaction, and the data has none"):
        warm_up(bare)
    with pytest.raises(MetarecError, match="no ratings to convert to clicks"):
        clicks(bare)
    assert clicks(data).rating.tolist() == [float(r >= 4) for r in data.rating]


def test_exchanged_twice_is_the_same():
    data = world()
    again = exchanged(exchanged(data))
    assert list(again.columns) == list(data.columns)
    assert again.columns == data.columns
    assert np.array_equal(again.user, data.user)
    assert again.users is data.users
    assert exchanged(data).user_features["user_genre"] is data.item_features["item_genre"]


def rows_of(data: Interactions) -> set[tuple[int, int, float]]:
    return set(zip(data.user.tolist(), data.item.tolist(), data.rating.tolist(), strict=True))


@pytest.mark.parametrize("order", ["time", "random"])
def test_a_task_is_one_item_over_many_users(order):
    """Item and content have leading axis 1, users vary, each with its own age; support and query are interactions of it."""
    data = world()
    source = item_task_source(data, tasks=32, support=(1, 4), query=3, order=order)
    task = jax.device_get(jax.jit(source.draw)(source.data, KEY))
    time_of = {(u, i): t for u, i, t in zip(data.user, data.item, data.timestamp, strict=True)}
    assert task.support.inputs["user_id"].shape[0] == task.query.inputs["item_id"].shape[0] == 32
    for t in range(32):
        times, seen = [], []
        for part in task:
            assert part.inputs["item_id"].shape == (32, 1)
            item, real = int(part.inputs["item_id"][t, 0]), part.mask[t] > 0
            users = part.inputs["user_id"][t][real]
            assert part.inputs["item_genre"][t].tolist() == [[item, 0]]
            assert part.inputs["user_age"][t][real].tolist() == (users % 5).tolist()
            assert {
                (u, item, r) for u, r in zip(users.tolist(), part.target[t][real].tolist(), strict=True)
            } <= rows_of(data)
            times.append([time_of[u, item] for u in users])
            seen += users.tolist()
        assert len(set(seen)) == len(seen)
        assert 1 <= len(times[0]) <= 4
        assert len(times[1]) == 3
        if order == "time":
            assert max(times[0]) < min(times[1])


def test_ids_are_dropped_on_the_side_that_was_named():
    source = item_task_source(world(), tasks=64, support=(1, 4), query=3, item_drop=1.0)
    task = jax.jit(source.draw)(source.data, KEY)
    assert int(task.query.inputs["item_id"].max()) == 0
    assert int(task.query.inputs["user_id"].min()) > 0
    source = item_task_source(world(), tasks=64, support=(1, 4), query=3, user_drop=1.0)
    task = jax.jit(source.draw)(source.data, KEY)
    assert int(task.query.inputs["user_id"].max()) == 0
    assert int(task.query.inputs["item_id"].min()) > 0


def test_fixed_tasks_of_a_cut():
    """The support is the first stage, in any batch; the query all of the test: 8 - 6, 12 - 6 and 16 - 6 interactions."""
    data = world()
    cut = warm_up(data, base_above=18, cold=(8, 16), stage=2, stages=3)
    tasks = make_tasks(exchanged(cut.test), history=exchanged(cut.stages[0]), query=100, support=(0, 100), order="time")
    assert tasks.user.tolist() == [2, 3, 4]
    assert tasks.query_mask.sum(1).tolist() == [2, 6, 10]
    found = list(item_batches(tasks, item_catalogue(data), size=4))
    assert len(found) == 1
    index, batch = found[0]
    assert batch.support.inputs["item_id"].shape == (4, 1)
    for row, t in enumerate(index):
        item, real = int(tasks.user[t]), np.asarray(batch.support.mask[row]) > 0
        stage = cut.stages[0].take(cut.stages[0].item == item)
        assert int(batch.support.inputs["item_id"][row, 0]) == item
        assert sorted(np.asarray(batch.support.inputs["user_id"][row])[real].tolist()) == sorted(stage.user.tolist())


def test_an_epoch_is_every_interaction_once():
    """84 interactions in batches of 12: 7 steps an epoch; the second epoch has another order; step 9 can be asked for."""
    data = world()
    assert (len(data), steps_of(data, 12)) == (84, 7)
    source = epoch_source(data, batch=12, seed=3)
    stream = source.stream(0)
    batches = [next(stream) for _ in range(14)]
    for epoch in (batches[:7], batches[7:]):
        assert sorted(np.concatenate(epoch).tolist()) == list(range(84))
    assert not np.array_equal(batches[0], batches[7])
    assert np.array_equal(next(source.stream(9)), batches[9])
    task = jax.device_get(jax.jit(source.draw)((source.data, batches[0]), KEY))
    got = set()
    for part in task:
        columns = (part.inputs["user_id"][0], part.inputs["item_id"][0], part.target[0])
        got |= set(zip(*(c.tolist() for c in columns), strict=True))
        assert part.inputs["user_age"][0].tolist() == (part.inputs["user_id"][0] % 5).tolist()
        assert part.inputs["item_genre"].shape == (1, 6, 2)
    first = data.take(batches[0])
    assert got == rows_of(first)


@pytest.mark.parametrize(
    ("batch", "message"), [(3, "batch must be an even number"), (86, "at most the 84 interactions")]
)
def test_a_batch_that_cannot_be_is_told(batch, message):
    with pytest.raises(MetarecError, match=message):
        epoch_source(world(), batch=batch)


def test_the_cut_of_movielens(real_data):
    """1,420 base items with 854,530 ratings; 972 cold ones: 19,440 = 972 x 20 a stage, 116,729 - 58,320 = 58,409 for test."""
    from metarec_jax.data.io.readers import read

    cut = warm_up(read(real_data / "ml-1m"))
    assert len(np.unique(cut.base.item)) == 1420
    assert (len(cut.base), [len(part) for part in cut.stages], len(cut.test)) == (854_530, [19_440] * 3, 58_409)


def test_the_benchmark_weighs_items_as_if_their_rows_stood_so_often():
    """AUC under a bootstrap's weights == AUC of the rows repeated, ties and items that were not drawn among them."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
    from warm_up import Weighted, auc

    rng = np.random.default_rng(0)
    scores, clicked = rng.integers(0, 9, 60).astype(float), rng.integers(0, 2, 60).astype(float)
    item, times = rng.integers(0, 7, 60), np.array([0, 1, 2, 3, 1, 0, 2])
    again = np.repeat(np.arange(60), times[item])
    want = auc(scores[again], clicked[again])
    pairs = scores[again][clicked[again] > 0][:, None] - scores[again][clicked[again] == 0][None]
    assert want == pytest.approx(float(np.mean((pairs > 0) + 0.5 * (pairs == 0))), abs=1e-12)
    assert Weighted(scores, clicked, item)(times) == pytest.approx(want, abs=1e-12)
